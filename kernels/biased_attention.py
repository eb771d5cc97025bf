"""Causal attention whose logits have an additive bias (see `posenc.kernels.bias`), forward and
backward in memory linear in T.

    logits[m, n] = scale q[m].k[n] + (c[m] - c[n]) + b[m - n]

c falls along the tokens (FoX, arXiv 2503.02130), b is a number for each distance (ALiBi 2108.12409,
T5 1910.10683, KERPLE 2205.09921). The kernels are those of `posenc.kernels.flash`; a trained b
takes one more, `posenc.kernels.by_distance`.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from posenc.kernels import by_distance, flash
from posenc.kernels.bias import MARGIN, Bias, bias_arguments
from posenc.kernels.common import (
    backward_only,
    check_weights,
    leave_out,
    of_one_output,
    rows_by_head,
)
from posenc.kernels.mask import CAUSAL, PLAIN, Mask, arguments, every_part

#: Of wider heads three TF32 products of two pairs of tiles are more than the registers hold.
MAX_PRECISE_HEAD_DIM = 128


@torch.library.custom_op("posenc::biased_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    table: Tensor | None,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    # `deterministic` is only passed on to the backward pass.
    mask = arguments(Mask(window, first, last, real), k.shape[2])
    return flash.forward(q, k, v, scale, mask=mask, bias=bias_arguments(decay, table))


@torch.library.custom_op("posenc::biased_backward", mutates_args=())
def _backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    table: Tensor | None,
    o: Tensor,
    lse: Tensor,
    table_gradient: bool,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mask = arguments(Mask(window, first, last, real), k.shape[2])
    bias = bias_arguments(decay, table)
    d_decay, d_table = _gradients_of_bias(q, k, decay, table_gradient)
    if decay is not None:
        bias = bias._replace(d_decay=d_decay.zero_())
    saved = flash.Saved(q, k, v, o, lse)
    grads = flash.backward(do, saved, scale, deterministic, mask, bias)
    if table_gradient:
        delta = flash.delta_of(o, do)
        d_table = by_distance.gradient(do, q, k, v, lse, delta, scale, mask, bias)
    return *grads, d_decay, d_table


def _gradients_of_bias(
    q: Tensor, k: Tensor, decay: Tensor | None, table: bool
) -> tuple[Tensor, Tensor]:
    """Uninitialised, fp32: dc (B, H, S) and db (H, S), empty where they are not wanted."""
    batch, heads, keys = *q.shape[:2], k.shape[2]
    new = {"dtype": torch.float32, "device": q.device}
    d_decay = torch.empty((batch, heads, 0 if decay is None else keys), **new)
    return d_decay, torch.empty((heads, keys if table else 0), **new)


@_forward_op.register_fake
def _(q, k, v, *options):
    return rows_by_head(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


@_backward_op.register_fake
def _(do, q, k, v, decay, table, o, lse, table_gradient, *options):
    return *(rows_by_head(x) for x in (q, k, v)), *_gradients_of_bias(q, k, decay, table_gradient)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.deterministic, ctx.window, first, last, real = inputs
    o, lse = output
    leave_out(ctx, lse)
    ctx.save_for_backward(*tensors, o, lse, first, last, real)


@of_one_output
def _differentiate(ctx, do):
    *tensors, first, last, real = ctx.saved_tensors
    decay, table = tensors[3:5]
    trained = table is not None and ctx.needs_input_grad[4]
    options = (trained, ctx.scale, ctx.deterministic, ctx.window, first, last, real)
    *grads, d_decay, d_table = _backward_op(do, *tensors, *options)
    return (
        *grads,
        None if decay is None else d_decay.to(decay.dtype),
        d_table.to(table.dtype) if trained else None,
        *(None,) * 6,
    )


_forward_op.register_autograd(_differentiate, setup_context=_save)


@backward_only
def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    table: Tensor | None = None,
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
        table: b (H, S), column d for distance d; fp32 inside. Without a gradient it costs less.
        scale: of the products, positive; None is 1/sqrt(D).
        mask, deterministic: see `posenc.kernels.flash.flash_attention`. Distances are those of
            indices.

    Returns:
        (B, H, T, D) in q's dtype.

    Raises:
        ValueError: for other shapes, dtypes or devices.
    """
    check(q, k, v, decay, table, scale, mask)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if torch.are_deterministic_algorithms_enabled():
        deterministic = True
    return _forward_op(q, k, v, decay, table, scale, deterministic, *mask)[0]


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    table: Tensor | None,
    scale: float | None,
    mask: Mask = CAUSAL,
) -> None:
    """ValueError unless these arguments of `biased_attention` fit together."""
    flash.check(q, k, v, scale, mask)
    if table is not None and q.dtype == torch.float32 and q.shape[3] > MAX_PRECISE_HEAD_DIM:
        raise ValueError(
            f"a table of biases needs a head dim of at most {MAX_PRECISE_HEAD_DIM} in float32; "
            f"got {q.shape[3]}. Use half precision, more heads, or impl='sdpa'."
        )
    (batch, heads), keys = q.shape[:2], k.shape[2]
    check_weights("decay", decay, q.device, (batch, heads, keys))
    check_weights("table", table, q.device, (heads, keys))


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches for `inspect_sm90`."""
    half, single = torch.bfloat16, torch.float32
    plain = [(half, dim, 12, "") for dim in (32, 64, 128)] + [(single, 64, 12, "")]
    for dtype, dim, kv_heads, masked in [*plain, (half, 64, 3, " masked")]:
        packed = torch.empty(16, 1024, 12 + 2 * kv_heads, dim, dtype=dtype, device="meta")
        q, k, v = packed.transpose(1, 2).split([12, kv_heads, kv_heads], 1)
        o, lse = rows_by_head(q), torch.empty(q.shape[:-1], device="meta")
        mask = every_part(16, 1024) if masked else PLAIN
        saved = flash.Saved(q, k, v, o, lse)
        margins = torch.empty(12, 1024 + 2 * MARGIN.value, device="meta")
        for kind, bias in (
            ("decay", Bias(lse, lse, lse)),
            ("table", Bias(table=margins)),
        ):
            name = f"{str(dtype).removeprefix('torch.')} D={dim} {kind}{masked}"
            options = {"mask": mask, "bias": bias}
            yield name, functools.partial(flash.forward, q, k, v, 0.125, **options)
            for end, deterministic in (("", True), (" atomic", False)):
                back = functools.partial(flash.backward, o, saved, 0.125, deterministic, **options)
                yield f"{name}{end}", back
        sums = functools.partial(by_distance.gradient, o, q, k, v, lse, lse, 0.125, mask, bias)
        yield name, sums
