"""Checkpoints of a GPT: config.json beside model.safetensors, ours or Hugging Face's GPT-2.

Only safetensors and JSON are read: loading never runs code from a checkpoint.
"""

import json
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posenc.files import atomic_file
from posenc.models.config import GPTConfig
from posenc.phase import Float32Parameters
from posenc.wrappers import plain_name

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
#: GPT-2 stores these linear weights as (in, out).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
#: Keys of a config.json of ours that say nothing of the model: those that transformers adds.
NOT_OURS = frozenset(
    {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
     "aux_weight", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "return_dict",
     "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder",
     "id2label", "label2id", "num_labels", "problem_type", "tie_word_embeddings"}
)  # fmt: skip
#: Before the names of a model that transformers has saved.
WITHIN = "model."
#: Buffers of old GPT-2 checkpoints, and the output layer, which is tied.
IGNORED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def save(config: GPTConfig, state: Mapping[str, Tensor], path: Path) -> None:
    """Write both files, each by renaming a finished temporary file into place."""
    from safetensors.torch import save_file

    # What JSON cannot hold fails here, before a file is touched.
    text = json.dumps({"model_type": "posenc", **asdict(with_impl(config))}, indent=2)
    tensors = {plain_name(name): tensor.contiguous() for name, tensor in state.items()}
    with atomic_file(path / WEIGHTS) as file:
        save_file(tensors, file, metadata={"format": "pt"})
    # Of a model in several files that lay here: it would name the weights that count.
    (path / INDEX).unlink(missing_ok=True)
    with atomic_file(path / CONFIG) as file:
        file.write_text(text + "\n", encoding="utf-8")


def read(path_or_hub_id: str | Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config and the weights of a checkpoint, see `GPT.from_pretrained`."""
    folder = _folder(path_or_hub_id)
    raw = _read_config(folder)
    if "model_type" not in raw and (folder / "model").is_dir():
        # The run folder of train.py, whose config.json is that of the training.
        folder = folder / "model"
        raw = _read_config(folder)
    elif "model_type" not in raw and (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{folder} is a run that has not ended: it holds no model/. "
            f"End it by: python -m posenc train --resume {shlex.quote(str(folder))}"
        )
    kind = raw.get("model_type")
    if kind not in ("posenc", "gpt2"):
        raise ValueError(
            f"config.json names the architecture {kind!r}; expected 'posenc' or 'gpt2'."
        )
    state = _read_weights(folder)
    if kind == "gpt2":
        return gpt2_config(raw), gpt2_state(state)
    # transformers saves our model within its own, and its output layer, tied, not at all.
    return our_config(raw), {name.removeprefix(WITHIN): one for name, one in state.items()}


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model on `meta` its weights, all in the widest of their dtypes, or ValueError."""
    _check_fit(model.state_dict(), state)
    model.load_state_dict(state, assign=True)
    _to_one_dtype(model)


def with_impl(config: GPTConfig, impl: str | None = None) -> GPTConfig:
    """A config with this back end in place of its own: a property of a machine, not of a model."""
    options = {
        key: value
        for key, value in config.attention_options.items()
        if key not in ("impl", "attention_impl")
    }
    if impl is not None:
        options["impl"] = impl
    return replace(config, attention_options=options)


def _to_one_dtype(model: nn.Module) -> None:
    """To the widest dtype of the weights, phase parameters aside."""
    dtypes = {
        parameter.dtype
        for part in model.modules()
        if not isinstance(part, Float32Parameters)
        for parameter in part.parameters(recurse=False)
    }
    if len(dtypes) > 1:
        model.to(reduce(torch.promote_types, dtypes))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the files that describe the model, by the names of bare parts."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    home = _read_index(folder)
    state: dict[str, Tensor] = {}
    for name in _weight_files(home):
        file = folder / name
        if not file.is_file():
            raise ValueError(
                f"{folder} holds no {name}, which {INDEX} names. Download it again."
                if home
                else f"{folder} holds neither {WEIGHTS} nor {INDEX}; pickled weights are not read. "
                "Convert the checkpoint to safetensors."
            )
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}.") from None
        # A tensor that the index places elsewhere is a stale one.
        state |= {
            plain_name(key): tensor
            for key, tensor in tensors.items()
            if home.get(key, name) == name
        }
    return state


def _weight_files(home: Mapping[str, str]) -> list[str]:
    return sorted(set(home.values())) or [WEIGHTS]


def _read_index(folder: Path) -> dict[str, str]:
    """The file of every weight, or nothing where there is no index."""
    if not (folder / INDEX).exists():
        return {}
    home = _read_json(folder / INDEX).get("weight_map")
    mapping = isinstance(home, dict) and all(isinstance(file, str) for file in home.values())
    if not mapping or not home:
        raise ValueError(
            f"{folder / INDEX} must map weights to files by its weight_map; got {home!r}. "
            "Download it again."
        )
    return home


def _folder(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    repository = str(path_or_hub_id)
    if repository in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        repository = f"openai-community/{repository}"
    if path.exists() or isinstance(path_or_hub_id, Path) or repository.count("/") != 1:
        raise ValueError(f"{path_or_hub_id} is neither a folder nor a Hub id OWNER/NAME.")
    folder = _download(repository, [CONFIG, INDEX])
    return _download(repository, [CONFIG, INDEX, *_weight_files(_read_index(folder))])


def _download(repository: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{repository} is no local folder, and the Hub did not give it: {reason}"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():
        raise ValueError(
            f"{folder} holds no config.json; expected a folder written by save_pretrained."
        )
    return _read_json(folder / CONFIG)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must hold a JSON object; got {type(raw).__name__}.")
    return raw


def our_config(raw: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig in a config.json of ours; unknown keys are an error, not ignored."""
    known = {field.name for field in fields(GPTConfig)}
    if raw.get("tie_word_embeddings") is False:
        raise ValueError(
            "config.json has tie_word_embeddings=False, and the output layer of GPT is tied; open "
            "it as posenc.hf.PosencForCausalLM."
        )
    values = {key: value for key, value in raw.items() if key not in NOT_OURS}
    if strange := sorted(values.keys() - known):
        raise ValueError(
            f"config.json holds unknown keys {strange}; was it written by a newer posenc?"
        )
    return GPTConfig(**values)


def gpt2_config(raw: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of a Hugging Face GPT-2 configuration; with a warning for another `embd_pdrop`
    than `resid_pdrop`: GPT drops embeddings as it drops what is added to the stream.
    """
    activations = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
    activation = raw.get("activation_function", "gelu_new")
    expected: dict[str, Any] = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "layer_norm_epsilon": 1e-5,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    for key, value in expected.items():
        if raw.get(key, value) != value:
            raise ValueError(
                f"this GPT-2 has {key}={raw[key]!r}, which GPT lacks; expected {value!r}."
            )
    if activation not in activations:
        raise ValueError(
            f"this GPT-2 has activation_function={activation!r}; "
            f"expected one of {list(activations)}."
        )
    dropout, of_weights, of_embeddings = (
        raw.get(f"{part}_pdrop", 0.1) for part in ("resid", "attn", "embd")
    )
    if not isinstance(of_weights, int | float):
        raise ValueError(f"this GPT-2 has attn_pdrop={of_weights!r}; expected a number.")
    if of_embeddings != dropout:
        warnings.warn(
            f"this GPT-2 has embd_pdrop={of_embeddings} beside resid_pdrop={dropout}; GPT has one "
            f"dropout for both, and takes {dropout} in training. Set them equal in config.json.",
            stacklevel=2,
        )
    return GPTConfig(
        vocab_size=raw.get("vocab_size", 50257),
        context=raw.get("n_positions", 1024),
        layers=raw.get("n_layer", 12),
        heads=raw.get("n_head", 12),
        embed_dim=raw.get("n_embd", 768),
        attention="mha",
        attention_options={} if of_weights == dropout else {"dropout": of_weights},
        dropout=dropout,
        gelu="tanh" if activations[activation] == "tanh" else "none",
        mlp_dim=raw.get("n_inner"),
    )


def gpt2_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's GPT-2 weights under our names: four suffixes transposed, buffers dropped."""
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("transformer.")
        if not name.endswith(IGNORED):
            renamed[name] = tensor.T.contiguous() if name.endswith(TRANSPOSED) else tensor
    return renamed


def _check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"the checkpoint lacks {len(missing)} weights, first {missing[0]!r}.")
    if strange := sorted(state.keys() - expected.keys()):
        raise ValueError(
            f"the checkpoint holds {len(strange)} weights too many, first {strange[0]!r}."
        )
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}; expected {tuple(tensor.shape)}."
            )
        if state[name].dtype not in DTYPES:
            raise ValueError(
                f"{name} is of {state[name].dtype}; expected one of {', '.join(map(str, DTYPES))}. "
                "Store the weights dequantised."
            )
