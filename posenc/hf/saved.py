"""Swapped models on disk: what was swapped stands in the config, and the Auto classes know it.

A swapped model's config.json has the model_type "posenc_swapped", so that no Auto class loads it
without its scheme, and its own in `swapped_model_type`. In memory the model_type stays the model's.
"""

import copy
import json
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from posenc.hf.call import Scheme
from posenc.hf.classes import Made, make
from posenc.hf.layers import swap_layers
from posenc.phase import Float32Parameters

TYPE, OWN_TYPE, MARK = "posenc_swapped", "swapped_model_type", "posenc"

#: By the class of the model's own config or model.
_CONFIGS: dict[type, Any] = {}
_MODELS: dict[type, Any] = {}


class SwappedConfig(PreTrainedConfig):
    """What AutoConfig finds under "posenc_swapped": it makes the config of the model's own type."""

    model_type = TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        given = dict(config_dict)
        own = CONFIG_MAPPING[given.pop(OWN_TYPE)]
        given["model_type"] = own.model_type
        return config_class(own).from_dict(given, **kwargs)


class _Marked(Made):
    """A config that says what was swapped."""

    def to_json_string(self, use_diff: bool = True) -> str:
        text = super().to_json_string(use_diff=use_diff)  # type: ignore[misc]
        raw = json.loads(text)
        raw[OWN_TYPE], raw["model_type"] = raw["model_type"], TYPE
        return json.dumps(raw, indent=2, sort_keys=True) + "\n"


class _Model(Made):
    """A model that swaps itself as its config says before its weights are loaded."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        said = getattr(config, MARK)
        swap_layers(self, said["name"], said["options"])  # type: ignore[arg-type]
        keep_precise(self)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As of transformers; parts of which a checkpoint holds nothing start as new ones do."""
        super().initialize_weights()  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            for part in module.parts() if isinstance(module, Scheme) else ():
                if not any(getattr(p, "_is_hf_initialized", False) for p in part.parameters()):
                    part.reset_parameters()


def keep_precise(model: Any) -> None:
    """Let a load in half precision leave phase parameters in fp32: rounded they are those of
    another encoding.
    """
    names = {
        f"{name}.{one}"
        for name, module in model.named_modules()
        if isinstance(module, Float32Parameters)
        for one, _ in module.named_parameters(recurse=False)
    }
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), *names}


def config_class(own: type) -> Any:
    """The class of configs that say what was swapped, known to every Auto class that knows its
    parent.
    """
    if own not in _CONFIGS:
        made = make((_Marked, own), config_class, {})
        _CONFIGS[own] = made
        for auto in vars(modeling_auto).values():
            if not (isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass)):
                continue
            mapping = auto._model_mapping
            if mapping is not None and own in mapping:
                found = mapping[own]
                if isinstance(found, type):
                    mapping.register(made, model_class(found), exist_ok=True)
    return _CONFIGS[own]


def model_class(own: Any) -> Any:
    """The class of swapped models."""
    if own not in _MODELS:
        body = {"config_class": _CONFIGS.get(own.config_class, own.config_class)}
        _MODELS[own] = make((_Model, own), model_class, body)
    return _MODELS[own]


def mark(model: PreTrainedModel, name: str, options: dict[str, Any]) -> None:
    """Let the model and its config say what was swapped: a config of its own, which another model
    may have shared.
    """
    copies: dict[int, Any] = {}
    config: Any = copy.deepcopy(model.config, copies)
    for module in model.modules():
        own = getattr(module, "config", None)
        if own is not None and id(own) in copies:
            module.config = copies[id(own)]
    if not isinstance(config, _Marked):
        config.__class__ = config_class(type(config))
    setattr(config, MARK, {"name": name, "options": dict(options)})
    if not isinstance(model, _Model):
        model.__class__ = model_class(type(model))


AutoConfig.register(TYPE, SwappedConfig)
