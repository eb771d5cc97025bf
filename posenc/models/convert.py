"""From one attention to another: `convert`, for a GPT that is to go on with another scheme."""

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from posenc.encodings.rope import RoPE, half_to_interleaved, interleaved_to_half
from posenc.models.config import GPTConfig
from posenc.models.gpt import GPT, Block
from posenc.zoo import Parts, encoding_name, options_of, sort_layers

_log = logging.getLogger(__name__)

#: The most that logits may differ by, relative to the largest, to count as equal to rounding.
ROUNDING = 1e-5
#: Tokens of the text that tells whether they are.
TRIED = 128


def convert(model: GPT, to: str | Sequence[str], **options: Any) -> GPT:
    """A new GPT with another attention and the same weights besides.

    What the layers had of `num_kv_heads`, `head_dim`, `window`, `qk_norm` and the base of their
    rotation they keep, and every option of an encoding, router or convolution that both have;
    options given here go before. New parts start as they do in a new model. Projections are copied,
    pairs of features in the order that the new encoding has them. Where the new start is the old
    scheme (RoPE to CARoPE, CMHA, GRAPE, Selective RoPE, or MoH with router="query_norm" and all
    heads active) the logits are equal to rounding; whether they are is tried, and logged in one
    line.

    Args:
        model: stays as it is.
        to: a name, or a pattern of names, as in `GPTConfig`.
        options: of `posenc.attention`.

    Returns:
        On the model's device, in its dtype and mode.

    Raises:
        ValueError: for an unknown name or option, or one that changes the projections' shape.
    """
    config = model.config
    before = sort_layers(config.attention, config.layers, config.attention_options)
    after = sort_layers(to, config.layers, options)
    names = [to] if isinstance(to, str) else [entry.partition(":")[0] for entry in to]
    kept = [
        carried(block, old, new)
        for block, old, new in zip(model.blocks, before, after, strict=True)
    ]
    made = GPT(with_attention(config, names, kept))
    weight = model.wte.weight
    made.to(device=weight.device, dtype=weight.dtype)
    fill(made, model)
    made.train(model.training)
    made.checkpoint_activations = model.checkpoint_activations
    report(model, made, json.dumps(config.attention), json.dumps(made.config.attention))
    return made


def carried(block: Block, old: Parts, new: Parts) -> dict[str, Any]:
    """Options of one layer: those of its new parts, and what it keeps of the old ones."""
    encoding = block.attn.encoding
    kept: dict[str, dict[str, Any]] = {"attention": dict(old.options["attention"])}
    if old.encoding is new.encoding:
        kept["encoding"] = dict(old.options["encoding"])
    elif hasattr(encoding, "base") and "base" in options_of(new.encoding):
        kept["encoding"] = {"base": encoding.base}
    if old.embedding is not None and old.embedding is new.embedding:
        kept["embedding"] = dict(old.options["embedding"])
    if old.recipe.router is not None and new.recipe.router is not None:
        kept["router"] = dict(old.options["router"])
    if old.conv and new.conv:
        kept["conv"] = dict(old.options["conv"])
    flat: dict[str, Any] = {}
    for part, given in new.options.items():
        for option, value in {**kept.get(part, {}), **given}.items():
            flat[f"{part}_{option}"] = value
    if (new.encoding, new.embedding) != (new.recipe.encoding, new.recipe.embedding):
        flat["encoding"] = encoding_name(new)
    if new.conv != (new.recipe.conv is not None):
        flat["conv"] = new.conv
    return flat


def with_attention(config: GPTConfig, names: list[str], layers: list[dict[str, Any]]) -> GPTConfig:
    """The config with these names, repeating over the layers, and each layer's options."""
    if len(names) == 1 and all(options == layers[0] for options in layers):
        return replace(config, attention=names[0], attention_options=layers[0])
    pattern = []
    for i, options in enumerate(layers):
        words = (f"{key}={json.dumps(value)}" for key, value in options.items())
        text = ",".join(words)
        name = names[i % len(names)]
        pattern.append(f"{name}:{text}" if text else name)
    return replace(config, attention=tuple(pattern), attention_options={})


@torch.no_grad()
def fill(made: GPT, model: GPT) -> None:
    """Copy what both have.

    Raises:
        ValueError: a projection has another shape.
    """
    copy_module(made.wte, model.wte)
    copy_module(made.ln_f, model.ln_f)
    for new, old in ((made.wpe, model.wpe), (made.phase, model.phase)):
        if new is not None and old is not None and type(new) is type(old):
            copy_module(new, old)
    for new_block, old_block in zip(made.blocks, model.blocks, strict=True):
        ours, theirs = new_block.attn, old_block.attn
        for name in ("ln_1", "ln_2", "mlp"):
            copy_module(getattr(new_block, name), getattr(old_block, name))
        for name in ("c_attn", "c_proj"):
            copy_module(getattr(ours, name), getattr(theirs, name))
        for name in ("q_norm", "k_norm", "encoding", "router", "conv"):
            new_part, old_part = getattr(ours, name), getattr(theirs, name)
            if new_part is not None and type(new_part) is type(old_part):
                copy_module(new_part, old_part)
        pair_alike(new_block, old_block)


def copy_module(target: nn.Module, source: nn.Module) -> None:
    """Every parameter of the source.

    Raises:
        ValueError: they have other shapes.
    """
    state, wanted = source.state_dict(), target.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    expected = {name: tuple(value.shape) for name, value in wanted.items()}
    if shapes != expected:
        raise ValueError(
            f"convert copies the weights of {type(source).__name__}, which the options change: "
            f"from {shapes} to {expected}. Leave them as they are."
        )
    target.load_state_dict(state)


def pair_alike(new_block: Block, old_block: Block) -> None:
    """Put pairs of features where the new encoding turns them: q.k is the same."""
    ours, theirs = new_block.attn, old_block.attn
    before, after = (
        part if isinstance(part, RoPE) and part.pairing == "interleaved" else None
        for part in (theirs.encoding, ours.encoding)
    )
    if (before is None) == (after is None) or ours.conv is not None:
        return
    order = half_to_interleaved if before is None else interleaved_to_half
    interleaved = after if before is None else before
    assert interleaved is not None
    width = interleaved.rotary_dim
    heads, groups, dim = ours.num_heads, ours.num_kv_heads, ours.head_dim
    for values in (ours.c_attn.weight, ours.c_attn.bias):
        if values is not None:
            turned = values[: (heads + groups) * dim]
            turned.copy_(order(turned, heads + groups, width))
    for norm in (ours.q_norm, ours.k_norm):
        if norm is not None:
            norm.weight.copy_(order(norm.weight, 1, width))


@torch.no_grad()
def report(model: GPT, made: GPT, before: str, after: str) -> None:
    """One line: whether the logits are the old ones."""
    new = made.num_parameters() - model.num_parameters()
    start = f"converted {before} to {after}, {new:+,} parameters"
    if model.wte.weight.is_meta:
        _log.info("%s; on meta nothing can be compared", start)
        return
    length = min(model.config.context, TRIED)
    ids = torch.arange(length, device=model.wte.weight.device) * 7919 % model.config.vocab_size
    old, now = (logits_of(each, ids.unsqueeze(0)) for each in (model, made))
    apart = ((now - old).abs().max() / old.abs().max()).item()
    said = "equal to rounding" if apart <= ROUNDING else "not those of before: train on"
    _log.info("%s; logits are %s (off by %.1e of the largest)", start, said, apart)


def logits_of(model: GPT, ids: Tensor) -> Tensor:
    """In evaluation, fp32 or better."""
    if model.wte.weight.dtype.itemsize < 4 or model.training:
        model = copy.deepcopy(model).eval()
        model = model.float() if model.wte.weight.dtype.itemsize < 4 else model
    return model(ids).logits
