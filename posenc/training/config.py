"""The configuration of a run: one flat frozen dataclass whose fields are the command line's flags.

A preset is a set of defaults; flags override it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from posenc.backends.choice import IMPLS
from posenc.errors import unknown
from posenc.models.config import GPTConfig
from posenc.routing.moh import AUX_WEIGHT
from posenc.training.schedule import learning_rate
from posenc.zoo import ZOO, names, parse_value

PARALLEL = ("none", "ddp", "fsdp")
GELUS = ("none", "tanh")
DTYPES = ("auto", "float32", "bfloat16")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
BPE_SYMBOLS = 2048
GPT2_SYMBOLS = 50304  # GPT-2's 50257, padded to a multiple of 64


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words as a mapping; a value is read as JSON where it is JSON, else as a string.

    Raises:
        ValueError: for a word without "=", or a key given twice.
    """
    options: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not key or not equals:
            raise ValueError(f"expected KEY=VALUE; got {word!r}. For example init=paper.")
        if key in options:
            raise ValueError(f"{key!r} is given twice. Give it once.")
        options[key] = parse_value(text)
    return options


def format_options(options: Mapping[str, Any]) -> list[str]:
    """The inverse of `parse_options`."""
    return [f"{key}={json.dumps(value)}" for key, value in options.items()]


Options = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="KEY=VALUE ...",
        instance_from_str=parse_options,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=format_options,
    ),
]


def one_of(choices: Sequence[str]) -> Any:
    """Show the choices in --help. Checked by `TrainConfig`, which suggests the nearest spelling."""
    return arg(metavar="{" + ",".join(choices) + "}")


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT-2 with any of posenc's attention modules."""

    preset: Annotated[str, arg(metavar="{demo,shakespeare-char,gpt2-tiny,gpt2-small}")] = "demo"
    """Set of defaults for the flags below."""

    attention: Annotated[str, one_of(names())] = "rope"
    """Which attention."""
    attention_options: Options = field(default_factory=dict)
    """Its options, see posenc.attention; values are read as JSON."""
    layers: int = 4
    """Blocks."""
    heads: int = 4
    """Attention heads; must divide embed-dim."""
    embed_dim: int = 192
    """Width."""
    context: int = 128
    """Tokens in a training sequence."""
    dropout: float = 0.0
    """After the embedding, on attention weights and on residual branches."""
    bias: bool = False
    """Biases in linear layers and LayerNorms."""
    mlp_dim: int = 0
    """Hidden width of the MLP; 0 is four times embed-dim."""
    gelu: Annotated[Literal["none", "tanh"], one_of(GELUS)] = "none"
    """Of the MLP: none is exact, tanh GPT-2's approximation."""
    impl: Annotated[str, one_of(IMPLS)] = "auto"
    """Back end of attention."""

    data: str | None = "stdlib"
    """Training text: stdlib, a file or glob (.txt .md .jsonl .parquet, token shards .bin .npy), or
    hf:REPO[:CONFIG]."""
    val_data: str | None = None
    """Validation text; a part of data if not given."""
    tokenizer: Annotated[str, arg(metavar="{bpe,char,byte,gpt2,PATH}")] = "bpe"
    """bpe is trained on the training text; PATH is a saved tokenizer."""
    vocab_size: int = 0
    """Symbols of a bpe; with another tokenizer, rows of the embedding if more than its symbols. 0
    is 2048 for bpe, 50304 for gpt2, else the tokenizer's own."""
    cache_dir: str = "~/.cache/posenc"
    """Where tokenised text is kept for the next run."""

    batch_size: int = 16
    """Sequences in a micro-batch, over all processes together."""
    grad_accum: int = 1
    """Micro-batches in a step."""
    steps: int = 800
    """Optimiser steps."""
    lr: float = 2e-3
    """Peak learning rate."""
    min_lr: float = 2e-4
    """Learning rate at the end of the cosine."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """Steps until the learning rate has fallen to min-lr; 0 is steps. A resumed run with more steps
    keeps its decay by the number that it had."""
    weight_decay: float = 0.1
    """Of the weights of linear layers and embeddings."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.99
    """AdamW's decay of the gradient's square."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    aux_weight: float = AUX_WEIGHT
    """Of the balance loss of a router (moh), which is added to the loss."""

    eval_every: int = 200
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_tokens: int = 65536
    """Validation tokens of one evaluation; 0 is all of them."""
    log_every: int = 10
    """Steps between updates of metrics.jsonl and the progress bar; every step has its row."""
    save_every: int = 200
    """Steps between checkpoints; 0 saves at the end and when stopped."""
    sample_tokens: int = 200
    """Length of the sample at the end; 0 is none."""

    seed: int = 0
    """Of the initial weights and of dropout."""
    pack: bool = False
    """Pack whole documents into the sequences, longer ones cut at the context: nothing attends from
    one to another. Else sequences are cut from one stream of all documents."""
    eval_documents: bool = False
    """Score validation documents packed the same way, each with itself before it alone."""
    data_seed: int = 0
    """Of the order of the training text."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    dtype: Annotated[str, one_of(DTYPES)] = "auto"
    """auto is bfloat16 by autocast where the hardware has it; weights are float32 in any case."""
    compile: bool = False
    """Compile the model (torch.compile)."""
    parallel: Annotated[str, one_of(PARALLEL)] = "none"
    """How the processes of torchrun share the work; under torchrun it is ddp if not given."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    out: str | None = None
    """Run folder; runs/ATTENTION-DATE-TIME if not given."""
    init_from: str | None = None
    """Start from the weights of a run folder, checkpoint, saved model or GPT-2 (a Hub name), whose
    sizes and tokenizer the run takes; with another attention they are converted to it."""
    resume: str | None = None
    """Continue the run in this folder (without a value: in out); its configuration is the default
    then, but for parallel, device and tracker."""
    tracker: Annotated[str, one_of(TRACKERS)] = "none"
    """Where to send the metrics beside the run folder."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("preset", PRESETS),
            ("attention", names()),
            ("impl", IMPLS),
            ("gelu", GELUS),
            ("dtype", DTYPES),
            ("parallel", PARALLEL),
            ("tracker", TRACKERS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(unknown(name, getattr(self, name), choices))
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1; got {getattr(self, name)}.")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{flag(name)} must be 0 or more; got {getattr(self, name)}.")
        for name in ("seed", "data_seed"):
            if getattr(self, name) >= 2**63:
                raise ValueError(
                    f"{flag(name)} must lie in 0 .. 2^63 - 1; got {getattr(self, name)}. "
                    "Choose for example 0."
                )
        if self.aux_weight != AUX_WEIGHT and ZOO[self.attention].router is None:
            routed = [name for name, row in ZOO.items() if row.router is not None]
            raise ValueError(
                f"--aux-weight weighs a router's balance loss, and {self.attention} has no router. "
                f"Leave it out, or choose --attention {' or '.join(routed)}."
            )
        if self.min_lr > self.lr:
            raise ValueError(
                f"--min-lr must not exceed --lr; got {self.min_lr} and {self.lr}. Lower --min-lr."
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must lie in [0, 1); got {getattr(self, name)}.")

    def dropout_seed(self, rank: int) -> int:
        """Of the numbers that training draws on a rank."""
        return ((self.seed + 1) * 1_000_003 + rank) % 2**63

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.grad_accum * self.context

    @property
    def decay_end(self) -> int:
        """The step from which on the learning rate is min_lr."""
        return self.decay_steps or self.steps

    def learning_rate(self, step: int) -> float:
        """The rate of step 0, 1, ..."""
        return learning_rate(
            step,
            lr=self.lr,
            min_lr=self.min_lr,
            warmup=self.warmup,
            decay_steps=self.decay_end,
        )

    @property
    def bpe_symbols(self) -> int:
        return self.vocab_size or BPE_SYMBOLS

    def model(self, vocab_size: int) -> GPTConfig:
        """The model for a corpus of `vocab_size` symbols."""
        rows = 0 if self.tokenizer == "bpe" else self.vocab_size
        if self.tokenizer == "gpt2":
            rows = rows or GPT2_SYMBOLS
        options = {**({} if self.impl == "auto" else {"impl": self.impl}), **self.attention_options}
        return GPTConfig(
            vocab_size=max(rows, vocab_size),
            context=self.context,
            layers=self.layers,
            heads=self.heads,
            embed_dim=self.embed_dim,
            attention=self.attention,
            attention_options=options,
            dropout=self.dropout,
            bias=self.bias,
            mlp_dim=self.mlp_dim or None,
            gelu=self.gelu,
        )


AT_LEAST_ONE = (
    ["layers", "heads", "embed_dim", "context", "batch_size", "grad_accum", "steps", "log_every"]
)  # fmt: skip
NOT_NEGATIVE = [
    "vocab_size",
    "mlp_dim",
    "lr",
    "min_lr",
    "warmup",
    "decay_steps",
    "weight_decay",
    "aux_weight",
    "grad_clip",
    "eval_every",
    "eval_tokens",
    "save_every",
    "sample_tokens",
    "seed",
    "data_seed",
]

#: CARoPE's published recipe (arXiv 2507.23083): FineWeb-Edu, 19k steps of 524,288 tokens.
#: Optimiser, decay and clip are not given there; these are the usual ones for GPT-2.
_CAROPE: dict[str, Any] = {
    "data": "hf:HuggingFaceFW/fineweb-edu:sample-10BT",
    "tokenizer": "gpt2",
    "context": 512,
    "bias": True,
    "steps": 19_000,
    "lr": 6e-4,
    "min_lr": 6e-5,
    "warmup": 750,
    "beta2": 0.95,
    "eval_every": 1000,
    "eval_tokens": 1_048_576,
    "save_every": 500,
}

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    # nanoGPT's recipe for a CPU (config/train_shakespeare_char.py and its README).
    "shakespeare-char": {
        "data": None,
        "tokenizer": "char",
        "layers": 4,
        "heads": 4,
        "embed_dim": 128,
        "context": 64,
        "batch_size": 12,
        "steps": 2000,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "warmup": 100,
        "beta2": 0.99,
        "eval_every": 500,
        "eval_tokens": 0,
        "save_every": 500,
        "sample_tokens": 500,
    },
    "gpt2-tiny": {
        **_CAROPE,
        "layers": 6,
        "heads": 8,
        "embed_dim": 512,
        "batch_size": 64,
        "grad_accum": 16,
    },
    "gpt2-small": {
        **_CAROPE,
        "layers": 12,
        "heads": 12,
        "embed_dim": 768,
        "batch_size": 32,
        "grad_accum": 32,
    },
}


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def preset_values(name: str) -> dict[str, Any]:
    """The fields that a preset sets, its name included.

    Raises:
        ValueError: for an unknown preset.
    """
    if name not in PRESETS:
        raise ValueError(unknown("preset", name, PRESETS))
    return {"preset": name, **PRESETS[name]}


def from_mapping(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration stored in a config.json.

    Raises:
        ValueError: for unknown fields or values out of range.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if strange := sorted(values.keys() - known):
        raise ValueError(
            f"the stored configuration has unknown fields {strange}. "
            "Use the version of posenc that wrote it."
        )
    return TrainConfig(**values)
