"""Checkpoints of a GPT: config.json beside model.safetensors, ours or Hugging Face's GPT-2.

Only safetensors and JSON are read: loading never runs code from a checkpoint.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posenc.files import atomic_file

if TYPE_CHECKING:
    from posenc.models.gpt import GPT, GPTConfig

#: GPT-2 stores these linear weights as (in, out).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
#: Buffers of old GPT-2 checkpoints, and the output layer, which is tied.
IGNORED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")


def save(model: "GPT", path: Path) -> None:
    """Write both files, each by renaming a finished temporary file into place."""
    from safetensors.torch import save_file

    # What JSON cannot hold fails here, before a file is touched.
    config = json.dumps({"model_type": "posenc", **asdict(model.config)}, indent=2)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_file(path / "model.safetensors") as file:
        save_file(tensors, file, metadata={"format": "pt"})
    with atomic_file(path / "config.json") as file:
        file.write_text(config + "\n", encoding="utf-8")


def load(path_or_hub_id: str | Path) -> "GPT":
    """See `GPT.from_pretrained`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from posenc.models.gpt import GPT

    folder = _folder(path_or_hub_id)
    raw = _read_config(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(
            f"{folder} holds no .safetensors file; pickled weights are not read. "
            "Convert the checkpoint to safetensors."
        )
    state: dict[str, Tensor] = {}
    for file in weights:
        try:
            state |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}.") from None
    kind = raw.get("model_type")
    if kind == "gpt2":
        config, state = gpt2_config(raw), gpt2_state(state)
    elif kind == "posenc":
        config = our_config(raw)
    else:
        raise ValueError(
            f"config.json names the architecture {kind!r}; expected 'posenc' or 'gpt2'."
        )
    with torch.device("meta"):
        model = GPT(config)
    _check_fit(model.state_dict(), state)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def _folder(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    repository = str(path_or_hub_id)
    if repository in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        repository = f"openai-community/{repository}"
    if path.exists() or isinstance(path_or_hub_id, Path) or repository.count("/") != 1:
        raise ValueError(f"{path_or_hub_id} is neither a folder nor a Hub id OWNER/NAME.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, allow_patterns=["config.json", "*.safetensors"]))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path_or_hub_id} is no local folder, and the Hub did not give it: {reason}"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no config.json; expected a folder written by save_pretrained."
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not valid JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ValueError(
            f"{folder / 'config.json'} must hold a JSON object; got {type(raw).__name__}."
        )
    return raw


def our_config(raw: Mapping[str, Any]) -> "GPTConfig":
    """The GPTConfig in a config.json of ours; unknown keys are an error, not ignored."""
    from posenc.models.gpt import GPTConfig

    known = {field.name for field in fields(GPTConfig)}
    values = {key: value for key, value in raw.items() if key != "model_type"}
    if strange := sorted(values.keys() - known):
        raise ValueError(
            f"config.json holds unknown keys {strange}; was it written by a newer posenc?"
        )
    return GPTConfig(**values)


def gpt2_config(raw: Mapping[str, Any]) -> "GPTConfig":
    """The GPTConfig of a Hugging Face GPT-2 configuration."""
    from posenc.models.gpt import GPTConfig

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
    return GPTConfig(
        vocab_size=raw.get("vocab_size", 50257),
        context=raw.get("n_positions", 1024),
        layers=raw.get("n_layer", 12),
        heads=raw.get("n_head", 12),
        embed_dim=raw.get("n_embd", 768),
        attention="mha",
        dropout=raw.get("resid_pdrop", 0.1),
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
