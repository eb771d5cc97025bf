"""Another position scheme in a Hugging Face model: `swap`."""

import inspect
import json
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posenc.encodings.base import Encoding
from posenc.encodings.configs import rope_arguments
from posenc.encodings.rope import RoPE
from posenc.encodings.scaling import rope_type
from posenc.encodings.xpos import XPos
from posenc.hf.call import Scheme
from posenc.hf.saved import mark
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

_log = logging.getLogger(__name__)

#: Positions at which a layer's own rotation is held against ours.
TRIED = (0, 1, 2, 7, 50)
#: The most that the two may differ by: the model's phases are products in fp32.
ROUNDING = 1e-3
#: Options of RoPE that say which features turn, and by what: the model's own.
FIXED = ("rotary_dim", "partial", "axes", "layout", "continuous")


def swap(model: PreTrainedModel, name: str, **options: Any) -> PreTrainedModel:
    """Exchange the position scheme of a Hugging Face model, in place.

    What turns q and k is exchanged, on the features that the model turns, in its pairs, at its
    layer's theta; biases go into the mask, a router (`moh`) weighs the heads' outputs. Projections,
    norms, caches, masks and attention functions stay the model's own, so that `generate`,
    `Trainer`, LoRA, quantisation and `torch.compile` go on working. `swap(model, "rope")` leaves
    the logits as they are, to rounding; so do `carope`, `cmha`, `selective` and `grape` with their
    neutral starts where the model's RoPE is not scaled, and `moh` with `router="query_norm"` and
    all heads active.

    A swapped model is saved by `save_pretrained`, and loaded by the Auto classes where `posenc.hf`
    is imported. It can be swapped again.

    Args:
        model: a causal language model, or its decoder, whose attention has projections of its own
            and turns q and k by a function apply_rotary.. of its file, as that of Llama, Mistral,
            Qwen, Gemma, Phi, GPT-NeoX, GPT-J and others; or GPT-2, whose table of positions then
            goes.
        name: of `posenc.names()`; not those that act at the input of a model (mha, sinusoidal) or
            convolve (mdha, rcmha).
        options: of the encoding and the router, as in `posenc.attention`. `base`, `pairing`,
            `rotary_dim` and `scaling` are those of the model's config where they are not given;
            lengths (`fire`, `fope`) are its max_position_embeddings.

    Returns:
        The model.

    Raises:
        ValueError: for an unknown name or option, a name that is no scheme of attention, a module
            of attention that cannot be taken, with its name, or a rotation that is not the one that
            the config describes. The model is then as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"swap takes a model of transformers; got {type(model).__name__}. Of a PEFT model swap "
            "the base model before the adapters are added."
        )
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
    _warn_of_scaling(name, schemes, turned)
    for (_, module, site), scheme in zip(layers, schemes, strict=True):
        if isinstance(module, Swapped):
            restore(module)
        weight = next(p for p in module.parameters() if p.is_floating_point())
        scheme.to(device=weight.device, dtype=weight.dtype).train(module.training)
        exchange(module, site, scheme)
    _exchange_positions(decoder, layers[0][2])
    mark(model, name, options)
    count = sum(p.numel() for scheme in schemes for p in scheme.parameters())
    _log.info(
        f"swapped the position of {len(layers)} layers of {model.config.model_type} for {name}, "
        f"{count:+d} parameters"
    )
    return model


def _parts(name: str, options: Mapping[str, Any]) -> Parts:
    """The recipe and its options, or ValueError for what a model's own attention cannot take."""
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
    return model.base_model if found is None else found


def _layers(decoder: nn.Module) -> list[tuple[str, nn.Module, Site]]:
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
    if len({site.kind for _, _, site in found}) > 1:
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
        "causal": getattr(module, "is_causal", True),
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
        acts_on_all = parts.encoding.in_logits and parts.encoding is not XPos
        told = {**sizes, "head_dim": head_dim if acts_on_all else width}
        given = parts._replace(options={**parts.options, "encoding": options})
        encoding = build_encoding(given, told)
    return Scheme(
        encoding,
        build_router(parts, {**sizes, "head_dim": head_dim}),
        num_heads=heads,
        num_kv_heads=sizes["num_kv_heads"],
        width=width,
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
    if "rope_theta" not in (options.get("scaling") or {}):
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
    tried = _tried(module, site, rotary, layer_type, width)
    if tried is None:
        return ropes[0]
    x, theirs = tried
    at, off = torch.tensor(TRIED, device=x.device), []
    for rope in ropes:
        ours, _ = _rope(rope, width, {}).rotate(x, None, at)
        assert ours is not None
        off.append(float((ours - theirs).abs().max()))
        if off[-1] < ROUNDING:
            return rope
    raise ValueError(
        f"{type(module).__name__} turns q and k by another formula than its config describes, "
        f"{ropes[0]}: off by {min(off):.1e}. It cannot be swapped."
    )


def _tried(
    module: Any, site: Site, rotary: Any, layer_type: str | None, width: int
) -> tuple[Tensor, Tensor] | None:
    """Some q (1, 1, T, width) and what the layer's own code turns them to; None on the meta device,
    where nothing can be tried.
    """
    buffers = (module if rotary is None else rotary).buffers()
    device = next((one.device for one in buffers), torch.device("cpu"))
    if device.type == "meta":
        return None
    at = torch.tensor(TRIED, device=device).unsqueeze(0)
    x = torch.randn(1, 1, len(TRIED), width, generator=torch.Generator().manual_seed(0)).to(device)
    if site.kind == "singly":
        sin, cos = module.embed_positions[at].float().chunk(2, dim=-1)
        return x, site.original(x.transpose(1, 2), sin, cos).transpose(1, 2)
    cos, sin = rotary(x[:, 0], at) if layer_type is None else rotary(x[:, 0], at, layer_type)
    turned, _ = site.original(x, x, cos, sin)
    return x, turned


def _exchange_positions(decoder: Any, site: Site) -> None:
    """Let the model hand placements to its layers, or add no table at its input."""
    if site.kind == "pairwise" and not isinstance(decoder.rotary_emb, Places):
        decoder.rotary_emb = Places(decoder.rotary_emb)
    if site.kind == "absent" and not isinstance(decoder.wpe, NoTable):
        decoder.wpe = NoTable()


def _warn_of_scaling(name: str, schemes: list[Scheme], turned: list[RoPE | None]) -> None:
    """Say where a scheme of other frequencies takes the place of scaled ones."""
    for scheme, rope in zip(schemes, turned, strict=True):
        scaling = None if rope is None else rope.scaling
        kind = "default" if scaling is None else rope_type(dict(scaling))
        other = hasattr(scheme.encoding, "base") and not isinstance(scheme.encoding, RoPE)
        if kind != "default" and other:
            warnings.warn(
                f"the model's RoPE is scaled ({kind}); {name} has the frequencies of its base, "
                "without scaling: the model starts from other logits.",
                stacklevel=3,
            )
            return


def balance_loss(model: PreTrainedModel) -> Tensor:
    """The routers' balance loss (arXiv 2410.11842) at the last forward pass in training, a mean
    over the layers: to be added to the loss, times some 0.01.

    Raises:
        ValueError: for a model without routers, or before such a pass.
    """
    routed = [m for m in model.modules() if isinstance(m, Scheme) and m.router is not None]
    losses = [scheme.aux for scheme in routed if scheme.aux is not None]
    if not losses:
        raise ValueError(
            f"{type(model).__name__} has {len(routed)} routers and no balance loss yet: swap 'moh' "
            "in, and call the model in training mode first."
        )
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
