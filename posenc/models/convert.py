"""From one attention to another: `convert`, for a GPT that is to go on with another scheme."""

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from posenc.encodings.base import Encoding
from posenc.encodings.rope import RoPE, half_to_interleaved, interleaved_to_half
from posenc.models.config import GPTConfig
from posenc.models.gpt import GPT, Block
from posenc.zoo import Parts, encoding_name, options_of, parse_layer, sort_layers

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
    made, said = converted(model, to, **options)
    _log.info(said)
    return made


def converted(model: GPT, to: str | Sequence[str], **options: Any) -> tuple[GPT, str]:
    """`convert` without its log, and the line that it logs."""
    if not isinstance(model, GPT):
        raise ValueError(f"convert takes a posenc.GPT; got {type(model).__name__}.")
    config = model.config
    before = sort_layers(config.attention, config.layers, config.attention_options)
    after = sort_layers(to, config.layers, options)
    names = [parse_layer(entry)[0] for entry in ([to] if isinstance(to, str) else to)]
    layers = zip(model.blocks, before, after, strict=True)
    kept = [carried(encoding_of(block, model), old, new) for block, old, new in layers]
    made = GPT(with_attention(config, names, kept))
    weight = model.wte.weight
    made.to(device=weight.device, dtype=weight.dtype)
    anew = fill(made, model)
    made.train(model.training)
    made.checkpoint_activations = model.checkpoint_activations
    more = made.num_parameters() - model.num_parameters()
    said = (
        f"converted {json.dumps(config.attention)} to {json.dumps(made.config.attention)}, "
        f"{more:+d} parameters{', anew: ' + ', '.join(sorted(anew)) if anew else ''}; "
        f"{verdict(model, made)}"
    )
    return made, said


def encoding_of(block: Block, model: GPT) -> Encoding:
    """That of a layer, or the one that its model computes for all layers."""
    encoding = block.attn.encoding
    return model.phase if encoding.reads_phase and model.phase is not None else encoding


def carried(encoding: Encoding, old: Parts, new: Parts) -> dict[str, Any]:
    """Options of one layer: those of its new parts, and what it keeps of the old ones."""
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
            # Those of the module bare, as a model gives its own.
            flat[option if part == "attention" else f"{part}_{option}"] = value
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
def fill(made: GPT, model: GPT) -> set[str]:
    """Copy what both have; give the names of parts that start anew.

    Raises:
        ValueError: a projection has another shape.
    """
    anew: set[str] = set()
    pairs: list[tuple[str, nn.Module | None, nn.Module | None]] = [
        ("wte", made.wte, model.wte),
        ("ln_f", made.ln_f, model.ln_f),
        ("wpe", made.wpe, model.wpe),
        ("phase", made.phase, model.phase),
    ]
    for new_block, old_block in zip(made.blocks, model.blocks, strict=True):
        for name in ("ln_1", "ln_2", "mlp"):
            pairs.append((name, getattr(new_block, name), getattr(old_block, name)))
        for name in ("c_attn", "c_proj", "q_norm", "k_norm", "encoding", "router", "conv"):
            pairs.append((name, getattr(new_block.attn, name), getattr(old_block.attn, name)))
    for name, new, old in pairs:
        if new is None or not shapes(new):
            continue
        if type(new) is type(old) and shapes(new) == shapes(old):
            assert old is not None
            copy_parameters(new, old)
        elif name in ("c_attn", "c_proj"):
            raise ValueError(
                f"convert keeps the projections; the options change {name} from {shapes(old)} to "
                f"{shapes(new)}. Leave num_kv_heads, head_dim and bias as they are."
            )
        else:
            anew.add(name)
    for new_block, old_block in zip(made.blocks, model.blocks, strict=True):
        pair_alike(new_block, old_block)
    return anew


def shapes(module: nn.Module | None) -> dict[str, tuple[int, ...]]:
    """Of its parameters, by name."""
    named = () if module is None else module.named_parameters()
    return {name: tuple(value.shape) for name, value in named}


def copy_parameters(target: nn.Module, source: nn.Module) -> None:
    """Values, dtypes, and whether they are trained."""
    values = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.data = values[name].detach().clone()
        parameter.requires_grad_(values[name].requires_grad)


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
def verdict(model: GPT, made: GPT) -> str:
    """Whether the logits are the old ones."""
    if model.wte.weight.is_meta:
        return "logits are not compared: there are none on meta"
    if any(block.attn.encoding.axes_count for part in (model, made) for block in part.blocks):
        return "logits are not compared: positions of several axes are the caller's"
    length = min(model.config.context, TRIED)
    ids = torch.arange(length, device=model.wte.weight.device) * 7919 % model.config.vocab_size
    old, now = (logits_of(each, ids.unsqueeze(0)) for each in (model, made))
    apart = ((now - old).abs().max() / old.abs().max()).item()
    said = "equal to rounding" if apart <= ROUNDING else "not those of before: train on"
    return f"logits are {said} (off by {apart:.1e} of the largest)"


def logits_of(model: GPT, ids: Tensor) -> Tensor:
    """In evaluation, fp32 or better."""
    if model.wte.weight.dtype.itemsize < 4 or model.training:
        model = copy.deepcopy(model).eval()
        model = model.float() if model.wte.weight.dtype.itemsize < 4 else model
    return model(ids).logits
