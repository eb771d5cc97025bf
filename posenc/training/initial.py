"""The weights that a run starts from where --init-from names them: another run's, or a model's.

    RUN                        a run folder: its newest checkpoint, else its finished model
    RUN/checkpoints/step-..    one checkpoint
    anything else              what `GPT.from_pretrained` takes: a saved model, a Hub name, GPT-2

The source says how large the model is, which attention it has and which tokenizer; another
attention is that of `posenc.convert`.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from posenc.data.sources import source_kind
from posenc.models.convert import converted
from posenc.models.gpt import GPT
from posenc.training import checkpoint
from posenc.training.config import TrainConfig, flag, from_mapping
from posenc.training.run_folder import CONFIG, RunFolder

#: What the weights decide: the source's, and nothing else.
SIZES = ("layers", "heads", "embed_dim", "mlp_dim", "bias", "gelu", "vocab_size")


class Source(NamedTuple):
    """Weights to start from.

    Attributes:
        model: on CPU, not to be changed.
        values: fields of a `TrainConfig` that the source decides, or proposes.
    """

    model: GPT
    values: Mapping[str, Any]


@functools.lru_cache(maxsize=1)
def read(path: str) -> Source:
    """What --init-from names; read once a process.

    Raises:
        ValueError: there is none, it is damaged, or it is a model that train.py has no flags for.
    """
    folder = Path(path)
    run = folder.parent.parent if (folder / checkpoint.STATE).is_file() else folder
    stored = folder if run != folder else checkpoint.latest(run / "checkpoints")
    if stored is None:
        model = GPT.from_pretrained(path)
    else:
        state = checkpoint.read_state(stored)
        rows = checkpoint.sizes(stored)["model.wte.weight"][0]
        model = GPT(from_mapping(state["config"]).model(rows)).eval()
        checkpoint.load_model(stored, model)
    config = model.config
    if not isinstance(config.attention, str):
        raise ValueError(
            f"--init-from {path} has layers of several kinds, {config.attention}, which train.py "
            "has no flag for. Give a model with one attention: posenc.convert makes it."
        )
    values: dict[str, Any] = {
        "layers": config.layers,
        "heads": config.heads,
        "embed_dim": config.embed_dim,
        "mlp_dim": config.mlp_dim or 0,
        "bias": config.bias,
        "gelu": config.gelu,
        "vocab_size": config.vocab_size,
        "context": config.context,
        "attention": config.attention,
        "attention_options": {k: v for k, v in config.attention_options.items() if k != "impl"},
    }
    for home in (run, run.parent) if run.name == "model" else (run,):  # of a run, of its model/
        if (home / CONFIG).is_file() and RunFolder(home).tokenizer.is_file():
            values["tokenizer"] = str(RunFolder(home).tokenizer.resolve())
            break
    return Source(model, values)


def check(config: TrainConfig, *, chosen: bool) -> None:
    """ValueError where flags contradict the source, or nothing says how text becomes its tokens.

    Args:
        chosen: whether a flag says which tokenizer.
    """
    assert config.init_from is not None
    values = read(config.init_from).values
    for name in SIZES:
        if getattr(config, name) != values[name]:
            raise ValueError(
                f"{flag(name)} is {values[name]!r} in {config.init_from}, which --init-from starts "
                f"from; got {getattr(config, name)!r}. Leave it out."
            )
    if config.tokenizer != values.get("tokenizer", config.tokenizer):
        raise ValueError(
            f"the model of {config.init_from} reads the tokens of {values['tokenizer']}; got "
            f"--tokenizer {config.tokenizer}. Leave it out."
        )
    known = "tokenizer" in values or (chosen and config.tokenizer != "bpe")
    if not known and config.data is not None and source_kind(config.data) != "tokens":
        raise ValueError(
            f"{config.init_from} has no tokenizer beside it, and another one, or a bpe trained on "
            "other text, would number symbols otherwise. Give the model's: --tokenizer gpt2, or "
            "PATH."
        )


def start(config: TrainConfig, vocab_size: int) -> tuple[GPT, TrainConfig, str]:
    """The model of a run, on CPU, its configuration with the options that conversion kept, and a
    line on where it comes from.

    Raises:
        ValueError: the text has more symbols than the model, another context needs other weights,
            or there is no conversion.
    """
    assert config.init_from is not None
    source = read(config.init_from)
    model, rows = source.model, source.model.config.vocab_size
    if vocab_size > rows:
        raise ValueError(
            f"the tokenizer has {vocab_size} symbols; the model of {config.init_from} has {rows}. "
            "Use the tokenizer that it was trained with."
        )
    origin = f"weights: of {config.init_from}, {source.values['attention']}"
    wanted = (config.attention, config.attention_options)
    if wanted != (source.values["attention"], source.values["attention_options"]):
        model, said = converted(model, config.attention, **config.attention_options)
        kept = {k: v for k, v in model.config.attention_options.items() if k != "impl"}
        config = replace(config, attention_options=kept)
        origin = f"weights: of {config.init_from}, {said}"
    made = GPT(config.model(rows))
    expected, state = made.state_dict(), model.state_dict()
    for name, tensor in state.items():
        if expected[name].shape != tensor.shape:
            raise ValueError(
                f"{config.attention}'s {name} is of a context of {model.config.context}; got "
                f"--context {config.context}. Leave --context out."
            )
    made.load_state_dict(state)
    read.cache_clear()  # or the source stays in memory
    return made, config, origin
