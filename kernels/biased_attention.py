"""Causal attention whose logits have an additive bias (see `posenc.kernels.bias`), forward and
backward in memory linear in T.

    logits[m, n] = scale q[m].k[n] + c[m] - c[n]        FoX (arXiv 2503.02130)

The kernels are those of `posenc.kernels.flash`.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from posenc.kernels import flash
from posenc.kernels.bias import Arguments, arguments
from posenc.kernels.common import backward_only, rows_by_head
from posenc.kernels.mask import CAUSAL, Mask
from posenc.kernels.mask import arguments as mask_arguments


@torch.library.custom_op("posenc::biased_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    # `deterministic` is only passed on to the backward pass.
    mask = mask_arguments(Mask(window, first, last, real), k.shape[2])
    return flash.forward(q, k, v, scale, mask=mask, bias=arguments(decay))


@torch.library.custom_op("posenc::biased_backward", mutates_args=())
def _backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = mask_arguments(Mask(window, first, last, real), k.shape[2])
    d_decay = torch.zeros(decay.shape, dtype=torch.float32, device=q.device)
    bias = arguments(decay)._replace(d_decay=d_decay)
    saved = flash.Saved(q, k, v, o, lse)
    return *flash.backward(do, saved, scale, deterministic, mask, bias), d_decay


@_forward_op.register_fake
def _(q, k, v, *options):
    return rows_by_head(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


@_backward_op.register_fake
def _(do, q, k, v, decay, *options):
    d_decay = torch.empty(decay.shape, dtype=torch.float32, device=q.device)
    return *(rows_by_head(x) for x in (q, k, v)), d_decay


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.deterministic, ctx.window, first, last, real = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, o, lse, first, last, real)


def _differentiate(ctx, do, _):
    *tensors, first, last, real = ctx.saved_tensors
    mask = (ctx.window, first, last, real)
    *grads, d_decay = _backward_op(do, *tensors, ctx.scale, ctx.deterministic, *mask)
    return *grads, d_decay.to(tensors[3].dtype), *(None,) * 6


_forward_op.register_autograd(_differentiate, setup_context=_save)


@backward_only
def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float | None = None,
    mask: Mask = CAUSAL,
    deterministic: bool | None = None,
) -> Tensor:
    """Causal softmax attention with a bias, differentiable once.

    Args:
        q: (B, H, T, D), D at most 256, in bfloat16, float16 or float32, any strides.
        k, v: (B, G, S, D), G a divisor of H, S >= T: query row i sits at key index S - T + i.
        decay: c (B, H, S), which should not rise along S; fp64 where it runs far.
        scale: of the products, positive; None is 1/sqrt(D).
        mask, deterministic: see `posenc.kernels.flash.flash_attention`.

    Returns:
        (B, H, T, D) in q's dtype.

    Raises:
        ValueError: for other shapes, dtypes or devices.
    """
    check(q, k, v, decay, scale, mask)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if torch.are_deterministic_algorithms_enabled():
        deterministic = True
    return _forward_op(q, k, v, decay, scale, deterministic, *mask)[0]


def check(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float | None, mask: Mask = CAUSAL
) -> None:
    """ValueError unless these arguments of `biased_attention` fit together."""
    flash.check(q, k, v, scale, mask)
    shape = (*q.shape[:2], k.shape[2])
    if decay.shape != shape or not decay.is_floating_point() or decay.device != q.device:
        raise ValueError(
            f"decay must be floating point {shape} on {q.device}; got {decay.dtype} "
            f"{tuple(decay.shape)} on {decay.device}."
        )


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches for `inspect_sm90`."""
    for dtype, dim, kv_heads in (
        (torch.bfloat16, 64, 12),
        (torch.bfloat16, 64, 3),
        (torch.bfloat16, 128, 12),
        (torch.float32, 64, 12),
    ):
        packed = torch.empty(16, 1024, 12 + 2 * kv_heads, dim, dtype=dtype, device="meta")
        q, k, v = packed.transpose(1, 2).split([12, kv_heads, kv_heads], 1)
        o, lse = rows_by_head(q), torch.empty(q.shape[:-1], device="meta")
        name = f"{str(dtype).removeprefix('torch.')} D={dim}"
        bias = Arguments(lse, lse, lse)
        yield f"{name} decay", functools.partial(flash.forward, q, k, v, 0.125, bias=bias)
        saved = flash.Saved(q, k, v, o, lse)
        for end, deterministic in (("", True), (" atomic", False)):
            back = functools.partial(flash.backward, o, saved, 0.125, deterministic, bias=bias)
            yield f"{name} decay{end}", back
