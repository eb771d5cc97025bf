"""Linear layers whose product is formed apart from them.

An adapter (LoRA), a quantised layer or a hook acts where the layer is called: its bare weight may
be taken only from a layer that is nothing else.
"""

import torch
from torch import Tensor, nn


def is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer is the product with its weight, which no hook of its own sees."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
        and not (layer._backward_hooks or layer._backward_pre_hooks)
    )


def floating_dtype(layer: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """Of its parameters; a quantised layer may have none."""
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), default)


def effective_weight(layer: nn.Module, width: int, like: Tensor) -> Tensor:
    """The matrix (rows, width) that a layer without bias applies, in the dtype of `like`."""
    if is_plain(layer):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight.to(like.dtype)
    unit = torch.eye(width, dtype=floating_dtype(layer, like.dtype), device=like.device)
    made: Tensor = layer(unit)
    return made.mT.to(like.dtype)
