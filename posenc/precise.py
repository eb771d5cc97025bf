"""Products of x with a few columns in fp64, of which nothing in fp64 is kept for backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from posenc.autocast import no_autocast


def precise_columns(x: Tensor, weight: Tensor) -> Tensor:
    """(x W)^T in fp64: x (B, T, C), W (C, H), of any float dtypes -> (B, H, T).

    fp64, H columns wide: cheap, and TF32, which a trainer may allow, cannot reach it. Backward
    keeps x and W as they are, and widens x again: eight bytes a feature would be several times what
    the rest of a half-precision layer keeps. Differentiable any number of times.
    """
    # Compilers decide themselves what they keep; transforms and forward mode see through the plain
    # product.
    seen_through = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
    follows = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if seen_through or not follows or x.dtype == torch.float64:
        return _product(x, weight)
    return _Columns.apply(x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    with no_autocast(x.device):
        return weight.double().mT @ x.double().mT


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dw = None
        with no_autocast(x.device):
            if ctx.needs_input_grad[0]:
                dx = (dz.mT @ weight.double().mT).to(x.dtype)
            if ctx.needs_input_grad[1]:
                dw = torch.einsum("bht,btc->ch", dz, x.double()).to(weight.dtype)
        return dx, dw
