"""RoPE as a Hugging Face text config describes it: `RoPE.from_config`.

Read from the config, an object or the mapping of a config.json, of today (`rope_parameters`, for
some models one a type of layer) or of before (`rope_theta`, `rope_scaling`, `rotary_pct`, ..):

    head_dim        head_dim, or hidden_size over heads; of latent attention the part that turns,
                    qk_rope_head_dim; of full layers global_head_dim where there is one
    base            rope_theta, global_rope_theta; of sliding layers rope_local_base_freq or
                    local_rope_theta where there is one
    rotary_dim      rotary_dim, or a partial factor of head_dim
    scaling         what its rope_type reads
    axes, layout    mrope_section, mrope_interleaved
    pairing         interleaved where the models of this model_type pair (2i, 2i + 1)

A config.json must hold these values: what it leaves to the class of its model is known to
transformers alone, so give the object then. Layers without positions are known where layer_types
tell them apart, not where a list of layers does (no_rope_layers).

Numbers are those of transformers for a text that fits into the original length. There `dynamic` and
`longrope` change with the running length; here the length is an argument and stays.
"""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from posenc.encodings.scaling import SCALINGS, rope_type

#: Values of `model_type` whose released models turn neighbours, (2i, 2i + 1).
INTERLEAVED = frozenset(
    {"axk1", "axk2", "bailing_hybrid", "blt", "codegen", "cohere", "cohere2", "cohere2_moe",
     "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots3_note_text", "ernie4_5",
     "ernie4_5_moe", "ernie4_5_vl_moe_text", "glm", "glm4", "glm4_moe_lite", "glm4v_text",
     "glm_moe_dsa", "glm_ocr_text", "gptj", "helium", "llama4_text", "longcat_flash", "mistral4",
     "mistral_large4_text", "moonshine", "moonshine_streaming", "openai_privacy_filter", "roformer",
     "youtu"}
)  # fmt: skip
#: Those whose config.json of before may leave theta to its class, whose 10000 is the one here too.
DEFAULT_THETA = frozenset({None, "codegen", "gptj", "llama"})
#: Keys of models that change frequencies, or their factor, by formulas of their own.
FOREIGN = ("alpha", "short_mscale", "long_mscale")
#: Kinds whose original length is the config's own where the mapping has none.
_OF_LENGTH = ("yarn", "longrope", "llama3")


def rope_arguments(
    config: Any, layer_type: str | None = None, target_length: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of `RoPE`, see `RoPE.from_config`."""
    config = _of_text(config)
    options = _mapping(config, layer_type)
    made: dict[str, Any] = {"head_dim": _head_dim(config, layer_type)}
    if sections := options.pop("mrope_section", None):
        made["axes"] = tuple(2 * pairs for pairs in sections)
        made["layout"] = "interleaved" if options.get("mrope_interleaved") else "sections"
    options.pop("mrope_interleaved", None)
    if _get(config, "rotary_dim") is not None:
        made["rotary_dim"] = _get(config, "rotary_dim")
    if _get(config, "rope_interleave", _get(config, "model_type") in INTERLEAVED):
        made["pairing"] = "interleaved"
    return {**made, "scaling": _scaling(options, config, target_length)}


def _scaling(options: dict[str, Any], config: Any, target_length: int | None) -> dict[str, Any]:
    """The mapping that `RoPE` takes: complete, and without what its kind does not use."""
    kind = rope_type(dict(options))
    longest = _get(config, "max_position_embeddings")
    original = options.pop("original_max_position_embeddings", None)
    if kind in _OF_LENGTH and original is None:
        original = _get(config, "original_max_position_embeddings", longest)
    if kind == "dynamic":
        original = longest
    if kind in ("yarn", "longrope") and "factor" not in options:
        options["max_position_embeddings"] = longest
    known = [*inspect.signature(SCALINGS[kind]).parameters] if kind in SCALINGS else []
    if "original_max_position_embeddings" in known:
        options["original_max_position_embeddings"] = original
    if "target_length" in known:
        options["target_length"] = original if target_length is None else target_length
    known += ["rope_type", "rope_theta", "partial_rotary_factor", "max_position_embeddings"]
    known += ["factor"] if kind == "proportional" else []
    if kind == "yarn" and (
        "attention_factor" in options
        or not (options.get("mscale") and options.get("mscale_all_dim"))
    ):
        # transformers asks for the factor first, and for both scales together.
        known = [key for key in known if key not in ("mscale", "mscale_all_dim")]
    rest = sorted(options.keys() - set(known))
    if strange := [key for key in rest if key in FOREIGN]:
        raise ValueError(
            f"RoPE does not know what {', '.join(strange)} make of the frequencies; got "
            f"rope_type={kind!r} with them. Write an Encoding of your own for this model."
        )
    if rest:
        said = f"the config's rope_type={kind!r} does not use {', '.join(rest)}: left out."
        warnings.warn(said, stacklevel=4)
    return {key: value for key, value in options.items() if key in known}


def _mapping(config: Any, layer_type: str | None) -> dict[str, Any]:
    """rope_type, rope_theta and whatever else a config says of layers of this type, without None.

    Raises:
        ValueError: for a type that the config does not have, or none where it has several.
    """
    found = _get(config, "rope_parameters", _get(config, "rope_scaling", {}))
    if not isinstance(found, Mapping):
        raise ValueError(f"the config's RoPE parameters must be a mapping; got {found!r}.")
    nested = any(isinstance(value, Mapping) for value in found.values())
    known = list(found) if nested else sorted(set(_get(config, "layer_types", ())))
    if layer_type is not None and layer_type not in known:
        raise ValueError(
            f"the config has no layers of type {layer_type!r}; it has {known}. Take one of them, "
            "or None where all layers turn alike."
        )
    if layer_type == "full_attention" and _get(config, "model_type") in ("cohere2", "cohere2_moe"):
        raise ValueError("layers of type 'full_attention' turn nothing in this model: it is NoPE.")
    local = _get(config, "rope_local_base_freq", _get(config, "local_rope_theta"))
    if layer_type is None and (nested or local is not None):
        raise ValueError(
            f"layers of the config turn differently; got layer_type=None. Take one of {known}."
        )
    if nested and found[str(layer_type)] is None:
        raise ValueError(f"layers of type {layer_type!r} turn nothing: the config has None there.")
    if nested:
        found = found[str(layer_type)]
    options = {key: value for key, value in found.items() if value is not None}
    if local is not None and layer_type == "sliding_attention" and not nested:
        options = {"rope_theta": local}  # of before: sliding layers are never scaled
    kinds = {options.pop(key) for key in ("rope_type", "type") if key in options} - {"mrope"}
    if len(kinds) > 1:
        raise ValueError(f"the config's rope_type and type contradict each other: {sorted(kinds)}.")
    options["rope_type"] = kinds.pop() if kinds else "default"
    names = ("rope_theta", "global_rope_theta", "rotary_emb_base")
    theta = next((found for name in names if (found := _get(config, name)) is not None), None)
    if theta is None and "rope_theta" not in options and isinstance(config, Mapping):
        model_type = config.get("model_type")
        if model_type not in DEFAULT_THETA:
            raise ValueError(
                f"this config.json of a {model_type} leaves rope_theta to its class; got none. "
                "Give the object: transformers.AutoConfig.from_pretrained(..)."
            )
    options.setdefault("rope_theta", 10000.0 if theta is None else theta)
    share = _get(config, "partial_rotary_factor", _get(config, "rotary_pct"))
    if share is not None:
        options.setdefault("partial_rotary_factor", share)
    return options


def _head_dim(config: Any, layer_type: str | None) -> int:
    """Features of a head that may turn."""
    by_layer = _get(config, "per_layer_config")
    if by_layer is not None and layer_type is not None:
        config = by_layer[layer_type]
    wide = _get(config, "global_head_dim") if layer_type == "full_attention" else None
    found = wide or _get(config, "qk_rope_head_dim", _get(config, "head_dim"))
    if found is not None:
        return int(found)
    width = _get(config, "hidden_size", _get(config, "n_embd"))
    heads = _get(config, "num_attention_heads", _get(config, "n_head"))
    if width is None or heads is None:
        raise ValueError(
            "the config has neither head_dim nor hidden_size and num_attention_heads; got "
            f"{type(config).__name__}. Give the config of the text model."
        )
    return int(width) // int(heads)


def _of_text(config: Any) -> Any:
    """The part of a config that describes the text model."""
    if isinstance(config, Mapping):
        return config.get("text_config", config)
    decoder = getattr(config, "get_text_config", None)
    return config if decoder is None else decoder()


def _get(config: Any, name: str, default: Any = None) -> Any:
    """A value of a config; None counts as left out."""
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value
