"""Another position scheme in a Hugging Face model: `swap`."""

import logging
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posenc.encodings.rope import RoPE
from posenc.encodings.scaling import rope_type
from posenc.hf.call import Scheme
from posenc.hf.layers import swap_layers
from posenc.hf.modeling import PosencForCausalLM
from posenc.hf.saved import mark

_log = logging.getLogger(__name__)


def swap(model: PreTrainedModel, name: str, **options: Any) -> PreTrainedModel:
    """Exchange the position scheme of a Hugging Face model, in place.

    What turns q and k is exchanged, on the features that the model turns, in its pairs, at its
    layer's theta; biases go into the mask, a router (`moh`) weighs the heads' outputs. Projections,
    norms, caches, masks and attention functions stay the model's own, so that `generate`,
    `Trainer`, LoRA, quantisation and `torch.compile` go on working. `swap(model, "rope")` leaves
    the logits as they are, to rounding; so do `carope`, `cmha`, `selective` and `grape` with their
    neutral starts where the model's RoPE is not scaled, and `moh` with `router="query_norm"` and
    all heads active.

    The model is called once, on two tokens, to see that its layers ask the scheme as they should.
    It is saved by `save_pretrained`, and loaded by the Auto classes where `posenc.hf` is imported.
    It can be swapped again. Under PEFT new parameters are frozen unless modules_to_save has
    "posenc".

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
            of attention that cannot be taken, with its name, a rotation that is not what the config
            describes, or layers that do not ask for it. The model is then as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"swap takes a model of transformers; got {type(model).__name__}. Of a PEFT or a "
            "compiled model swap the model in it, before."
        )
    if isinstance(model, PosencForCausalLM):
        raise ValueError(
            "this model is posenc's own; got PosencForCausalLM. Use posenc.convert(model.model, "
            "name)."
        )
    turned, schemes = swap_layers(model, name, options)
    mark(model, name, options)
    _warn_of_scaling(name, schemes, turned)
    count = sum(p.numel() for scheme in schemes for p in scheme.parameters())
    _log.info(
        f"swapped the position of {len(schemes)} layers of {model.config.model_type} for {name}, "
        f"{count:+d} parameters"
    )
    return model


def _warn_of_scaling(name: str, schemes: list[Scheme], turned: list[RoPE | None]) -> None:
    """Say where the start is not the model's, or is it up to a length alone."""
    for scheme, rope in zip(schemes, turned, strict=True):
        scaling = None if rope is None else rope.scaling
        kind = "default" if scaling is None else rope_type(dict(scaling))
        said = None
        if isinstance(scheme.encoding, RoPE):
            if kind in ("dynamic", "longrope") and scheme.encoding.scaling == scaling:
                said = (
                    f"{kind} RoPE follows the length of the text in transformers; here it is that "
                    "of texts within the original length. Give scaling with a target_length for "
                    "longer ones."
                )
        elif kind != "default" and hasattr(scheme.encoding, "base"):
            said = (
                f"the model's RoPE is scaled ({kind}); {name} has the frequencies of its base, "
                "without scaling: the model starts from other logits."
            )
        if said is not None:
            warnings.warn(said, stacklevel=3)
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
