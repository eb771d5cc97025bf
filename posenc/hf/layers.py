"""The layers of a Hugging Face model, and the schemes that take the place of their own."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posenc.encodings.base import Encoding
from posenc.encodings.configs import rope_arguments
from posenc.encodings.rope import RoPE
from posenc.encodings.xpos import XPos
from posenc.hf.call import Asked, Scheme
from posenc.hf.sites import (
    NoTable,
    Places,
    Site,
    Swapped,
    exchange,
    is_attention,
    restore,
    site_of,
)
from posenc.phase import PAIRINGS
from posenc.routing.moh import MoH
from posenc.zoo import Parts, build_encoding, build_router, options_of, sort_options

#: A module of attention: its name, itself, and how it is entered.
Layer = tuple[str, nn.Module, Site]

#: Positions at which a layer's own rotation is held against ours.
TRIED = (0, 1, 2, 7, 50)
#: The most that the two may differ by: the model's phases are products in fp32.
ROUNDING = 1e-3
#: Options of RoPE that say which features turn, and by what: the model's own.
FIXED = ("rotary_dim", "partial", "axes", "layout", "continuous")


def swap_layers(
    model: PreTrainedModel, name: str, options: Mapping[str, Any]
) -> tuple[list[RoPE | None], list[Scheme]]:
    """Put a scheme into every layer: the rotations that were there, and the schemes.

    Raises:
        ValueError: as `swap`; the model is then as it was.
    """
    parts = _parts(name, options)
    decoder = _decoder(model)
    layers = _layers(decoder)
    turned = [
        None if site.kind == "absent" else _own_rotation(module, site, decoder)
        for _, module, site in layers
    ]
    schemes = [
        _scheme(module, site, parts, decoder, rope)
        for (_, module, site), rope in zip(layers, turned, strict=True)
    ]
    before = [getattr(module, "posenc", None) for _, module, _ in layers]
    for (_, module, _), scheme in zip(layers, schemes, strict=True):
        weight = next((p for p in module.parameters() if p.is_floating_point()), model)
        scheme.to(device=weight.device, dtype=weight.dtype).train(module.training)
    tables = _positions_of(decoder)
    _put(decoder, layers, schemes)
    try:
        _try(decoder, layers, schemes)
    except Exception:
        _put(decoder, layers, before)
        decoder._modules.update(tables)
        raise
    return turned, schemes


def _put(decoder: Any, layers: list[Layer], schemes: Sequence[Scheme | None]) -> None:
    """Put a scheme into each layer, None being the model's own, and let the model hand out
    placements, or add no table at its input.
    """
    for (_, module, site), scheme in zip(layers, schemes, strict=True):
        if isinstance(module, Swapped):
            restore(module)
        if scheme is not None:
            exchange(module, scheme)
            if site.kind == "pairwise" and not isinstance(decoder.rotary_emb, Places):
                decoder.rotary_emb = Places(decoder.rotary_emb)
            if site.kind == "absent" and not isinstance(decoder.wpe, NoTable):
                decoder.wpe = NoTable()


def _positions_of(decoder: Any) -> dict[str, nn.Module]:
    """The parts of the model that `_put` exchanges."""
    names = ("rotary_emb", "wpe")
    return {name: decoder._modules[name] for name in names if name in decoder._modules}


@torch.no_grad()
def _try(decoder: Any, layers: list[Layer], schemes: list[Scheme]) -> None:
    """Call the model on two tokens: each layer must ask its scheme for what it is there for, once,
    or for nothing; ValueError where it does otherwise. Nothing can be tried on the meta device.
    """
    if any(p.is_meta for p in decoder.parameters()):
        return
    modes = {module: module.training for module in decoder.modules()}
    device = next(decoder.parameters()).device
    calls = [Asked(scheme) for scheme in schemes]
    try:
        decoder.eval()
        decoder(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for module, training in modes.items():
            module.training = training
        for call in calls:
            call.end()
    for (name, module, _), asked, scheme in zip(layers, calls, schemes, strict=True):
        if asked.attended > 1 or (scheme.adds and asked.turned and not asked.attended):
            raise ValueError(
                f"{name} ({type(module).__name__}) cannot be swapped: it asks its attention "
                f"function {asked.attended} times a call; expected once."
            )
    if not any(asked.turned for asked in calls):
        raise ValueError(
            f"no layer of {type(decoder).__name__} turns q and k, though its code could: the model "
            "has its position elsewhere. It cannot be swapped."
        )


def _parts(name: str, options: Mapping[str, Any]) -> Parts:
    """The recipe and its options, or ValueError for what a model's own attention cannot take."""
    if not isinstance(name, str):
        raise ValueError(f"swap takes one name for all layers; got {name!r}.")
    parts = sort_options(name, options)
    if parts.conv:
        raise ValueError(
            f"{name} convolves q, k and v, which no model of transformers has room for; "
            "posenc.GPT(attention=..) does. Choose a name without a convolution."
        )
    if parts.embedding is not None:
        raise ValueError(
            f"{name} adds a table to the tokens at the model's input and is no scheme of its "
            "attention: choose 'nope' for attention without position, or another name."
        )
    if given := sorted(parts.options["attention"]):
        raise ValueError(
            f"{', '.join(given)} belong to the model's own attention, which stays as it is; leave "
            f"them out. {name} takes {', '.join(_own_options(parts))}."
        )
    if strange := sorted(parts.options["encoding"].keys() & set(FIXED)):
        raise ValueError(
            f"{', '.join(strange)} are what the model turns, and stay; leave them out. "
            f"{name} takes {', '.join(_own_options(parts))}."
        )
    try:
        json.dumps(dict(options))
    except TypeError as error:
        raise ValueError(f"options must be what a config.json can hold: {error}.") from None
    return parts


def _own_options(parts: Parts) -> list[str]:
    own = [o for o in options_of(parts.encoding) if o not in FIXED]
    return own + (options_of(MoH) if parts.recipe.router is not None else [])


def _decoder(model: PreTrainedModel) -> Any:
    """The part that holds the layers of a language model."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = found is not None and any(is_attention(module) for module in found.modules())
    return found if inside else model.base_model


def _layers(decoder: nn.Module) -> list[Layer]:
    """Every module of attention with its name and site; ValueError for one that has none."""
    found = []
    for name, module in decoder.named_modules():
        if not is_attention(module):
            continue
        site = site_of(module)
        if isinstance(site, str):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) cannot be swapped: {site}. "
                "Turn its q and k by encoding.rotate(q, k, positions) in a forward of your own."
            )
        found.append((name, module, site))
    if not found:
        raise ValueError(
            f"{type(decoder).__name__} holds no module of attention that swap knows; got none with "
            "is_causal, or that turns q and k by a function apply_rotary..."
        )
    kinds = {site.kind for _, _, site in found}
    config: Any = decoder.config
    if "absent" in kinds and (
        not hasattr(decoder, "wpe") or getattr(config, "reorder_and_upcast_attn", False)
    ):
        raise ValueError(
            f"{type(decoder).__name__} cannot be swapped: it has no table wpe, or its attention is "
            "reordered (reorder_and_upcast_attn=True)."
        )
    if len(kinds) > 1:
        raise ValueError(f"layers of {type(decoder).__name__} take position in different ways.")
    return found


def _scheme(module: Any, site: Site, parts: Parts, decoder: Any, turned: RoPE | None) -> Scheme:
    """What takes the place of one layer's own scheme, which is the rotation `turned`."""
    config = decoder.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(module, "head_dim", None) or config.hidden_size // heads
    sizes = {
        "embed_dim": config.hidden_size,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "causal": getattr(module, "is_causal", True) and getattr(config, "is_causal", True),
    }
    # Of "proportional" rotations every feature counts; else the first ones turn, the rest do not.
    width = head_dim
    if turned is not None and turned.partial == "front":
        width = turned.rotary_dim
    options = dict(parts.options["encoding"])
    if parts.encoding is RoPE:
        encoding: Encoding = _rope(turned, width, options)
    else:
        if turned is not None and "base" in options_of(parts.encoding):
            options.setdefault("base", turned.base)
        if parts.encoding.context_option is not None:
            options.setdefault(parts.encoding.context_option, config.max_position_embeddings)
        if width < head_dim and parts.encoding is XPos:
            raise ValueError(
                f"xpos fades all features; the model turns {width} of {head_dim}. Choose another."
            )
        if parts.encoding is XPos and getattr(config, "attn_logit_softcapping", None):
            raise ValueError(
                "xpos makes logits of its own, which the model's attn_logit_softcapping="
                f"{config.attn_logit_softcapping} would not reach. Choose another."
            )
        acts_on_all = parts.encoding.in_logits and parts.encoding is not XPos
        told = {**sizes, "head_dim": head_dim if acts_on_all else width}
        given = parts._replace(options={**parts.options, "encoding": options})
        encoding = build_encoding(given, told)
    return Scheme(
        encoding,
        build_router(parts, {**sizes, "head_dim": head_dim}),
        num_heads=heads,
        num_kv_heads=sizes["num_kv_heads"],
        head_dim=head_dim,
        width=width,
        causal=sizes["causal"],
        interleaved=(
            turned is not None
            and turned.pairing == "interleaved"
            and not isinstance(encoding, RoPE)
        ),
        turns=site.kind == "pairwise",
    )


def _rope(turned: RoPE | None, width: int, options: Mapping[str, Any]) -> RoPE:
    """The model's own rotation of its first `width` features, with other options."""
    if turned is None:
        return RoPE(width, **options)
    own: dict[str, Any] = {"pairing": turned.pairing, "scaling": turned.scaling}
    if turned.partial != "front":
        own.update(rotary_dim=turned.rotary_dim, partial=turned.partial)
    scaling = options.get("scaling")
    if not (isinstance(scaling, Mapping) and "rope_theta" in scaling):
        own["base"] = turned.base
    return RoPE(width, **{**own, **options})


def _own_rotation(module: Any, site: Site, decoder: Any) -> RoPE:
    """The RoPE of the layer, as its config describes it and its own code computes it."""
    config = decoder.config.get_text_config()
    layer_type = None
    rotary = None
    if site.kind == "pairwise":
        rotary = getattr(decoder, "rotary_emb", None)
        rotary = rotary.original[0] if isinstance(rotary, Places) else rotary
        if rotary is None:
            raise ValueError(f"{type(decoder).__name__} has no rotary_emb that makes its cosines.")
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            layer_type = getattr(module, "layer_type", None) or config.layer_types[module.layer_idx]
    described = rope_arguments(config, layer_type)
    if "axes" in described:
        raise ValueError(
            "the model's positions have several axes (mrope), which swap does not take; use "
            "posenc.RoPE.from_config and rotate in a forward of your own."
        )
    pairings = sorted(PAIRINGS, key=lambda one: one != described.get("pairing", "half"))
    ropes = [RoPE(**{**described, "pairing": pairing}) for pairing in pairings]
    width = ropes[0].rotary_dim if ropes[0].partial == "front" else ropes[0].head_dim
    original = (ropes[0].scaling or {}).get("original_max_position_embeddings")
    at = [n for n in TRIED if n < (original or config.max_position_embeddings)]
    tried = _tried(module, site, rotary, config, layer_type, width, at)
    if tried is None:
        return ropes[0]
    x, theirs = tried
    off = []
    for rope in ropes:
        ours, _ = _rope(rope, width, {}).rotate(x, None, torch.tensor(at, device=x.device))
        assert ours is not None
        off.append(float((ours - theirs).abs().max()))
        if off[-1] < ROUNDING:
            return rope
    raise ValueError(
        f"{type(module).__name__} turns q and k by another formula than its config describes, "
        f"{ropes[0]}: off by {min(off):.1e}. It cannot be swapped."
    )


def _tried(
    module: Any,
    site: Site,
    rotary: Any,
    config: Any,
    layer_type: str | None,
    width: int,
    positions: list[int],
) -> tuple[Tensor, Tensor] | None:
    """Some q (1, 1, T, width) and what the layer's own code turns them to; None on the meta device,
    where nothing can be tried.
    """
    buffers = (module if rotary is None else rotary).buffers()
    device = next((one.device for one in buffers), torch.device("cpu"))
    if device.type == "meta":
        return None
    at = torch.tensor(positions, device=device).unsqueeze(0)
    x = torch.randn(1, 1, len(positions), width, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    if rotary is not None and any(one.dtype.itemsize < 4 for one in rotary.buffers()):
        rotary = type(rotary)(config)  # a cast of the model has rounded its frequencies
    if site.kind == "singly":
        sin, cos = module.embed_positions[at].float().chunk(2, dim=-1)
        return x, site.original(x.transpose(1, 2), sin, cos).transpose(1, 2)
    cos, sin = rotary(x[:, 0], at) if layer_type is None else rotary(x[:, 0], at, layer_type)
    turned, _ = site.original(x, x, cos, sin)
    return x, turned
