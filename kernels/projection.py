"""A projection into heads of which only the kept (token, head) pairs are computed: MoH's queries
(arXiv 2410.11842), as one grouped product.

    y[b,h,t] = W_h x[b,t] + bias_h        where g[b,h,t] is not 0; else 0

The kept rows of every head are gathered, as in `posenc.kernels.routed`, and a tile of them meets
the head's own D rows of W. The grid is that of the worst case; programs past the last kept row only
write zeros. The backward pass is dense: its gradient is 0 in the dropped rows anyway, and its two
products sum over heads, or over tokens.

What it can save is the queries' share of dropped pairs; what it loses is the size of a tile, D
columns instead of the 256 of a dense product, so that x is read from L2 more often. Whether that
pays has to be measured, see `bench.routing`; until then no module takes it.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels.common import (
    aligned,
    backward_only,
    block_of,
    device_of,
    head_of,
    require_runnable,
    store_rows,
    strided,
    tile_options,
)
from posenc.kernels.flash import Config
from posenc.kernels.routed import Routing, is_kept, sort_rows
from posenc.kernels.tiles import config_of

#: By bytes of an element and the head dim rounded up to a power of two (at least 32): rows of a
#: tile, and columns of x at a time.
CONFIGS = {
    (2, 32): Config(128, 64, 4, 4),
    (2, 64): Config(128, 64, 4, 4),
    (2, 128): Config(128, 64, 8, 3),
    (2, 256): Config(128, 32, 8, 3),
    (4, 32): Config(64, 32, 4, 3),
    (4, 64): Config(64, 32, 4, 3),
    (4, 128): Config(64, 32, 8, 2),
    (4, 256): Config(32, 32, 8, 2),
}


@triton.jit(do_not_specialize=["H", "T"])
def project_kernel(
    x,
    weight,
    bias,
    order,
    ranks,
    y,
    H,
    T,
    C,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every row of y, `common.strided`. x: that of (B, 1, T, C). Contiguous: weight (H D, C), of
    which UNIT divides C, and bias (H D) or None.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    place = first + tl.arange(0, BLOCK_M)
    count = tl.load(ranks + bh * (T + 1) + T)
    m = tl.load(order + bh * T + place, mask=place < T, other=0).to(tl.int64)
    kept = place < count
    columns = tl.arange(0, BLOCK_D)

    start_of_x, stride, step = head_of(x, b, 0)
    rows = start_of_x + m[:, None] * stride
    C = aligned(C, UNIT)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    stop = C * (first < count).to(tl.int32)
    for c in range(0, stop, BLOCK_N):
        k = c + tl.arange(0, BLOCK_N)
        inside = kept[:, None] & (k < C)[None, :]
        x_tile = tl.load(rows + k.to(tl.int64)[None, :] * step, mask=inside, other=0.0)
        own = weight + (h * D + columns)[:, None] * C + k[None, :]
        w_tile = tl.load(own, mask=(columns < D)[:, None] & (k < C)[None, :], other=0.0)
        sums = tl.dot(x_tile, tl.trans(w_tile), sums, input_precision=PRECISION)
    if bias is not None:
        shift = tl.load(bias + h * D + columns, mask=columns < D, other=0.0)
        sums += shift.to(tl.float32)[None, :]
    sums = tl.where(kept[:, None], sums, 0.0)
    store_rows(head_of(y, b, h), sums, m, place < T, D, BLOCK_D)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """y (B, H, T, D) in x's dtype, of checked arguments."""
    batch, heads, length = routing.gates.shape
    dim = weight.shape[0] // heads
    y = torch.empty((batch, length, heads, dim), dtype=x.dtype, device=x.device).transpose(1, 2)
    key = x.element_size(), max(32, block_of(y))
    config = config_of("projection", CONFIGS, key, x.device)
    bias = None if bias is None else bias.contiguous()
    with device_of(x):
        project_kernel[(triton.cdiv(length, config.block_m) * batch * heads,)](
            strided(x.unsqueeze(1)), weight.contiguous(), bias, routing.order, routing.ranks,
            strided(y), heads, length, x.shape[2], UNIT=math.gcd(16, x.shape[2]),
            **tile_options(y, config),
        )  # fmt: skip
    return y


@torch.library.custom_op("posenc::project_kept", mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, bias: Tensor | None, gates: Tensor) -> Tensor:
    return forward(x, weight, bias, sort_rows(gates))


@_forward_op.register_fake
def _(x, weight, bias, gates):
    batch, heads, length = gates.shape
    return x.new_empty(batch, length, heads, weight.shape[0] // heads).transpose(1, 2)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, gates = inputs
    ctx.save_for_backward(x, weight, gates)
    ctx.has_bias = bias is not None


def _differentiate(ctx, dy):
    x, weight, gates = ctx.saved_tensors
    kept = is_kept(gates).unsqueeze(-1)
    rows = torch.where(kept, dy, 0.0).transpose(1, 2).flatten(2).flatten(0, 1)  # (B T, H D)
    d_x = (rows @ weight).view_as(x)
    return d_x, rows.T @ x.flatten(0, 1), rows.sum(0) if ctx.has_bias else None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


@backward_only
def project_kept(x: Tensor, weight: Tensor, bias: Tensor | None, gates: Tensor) -> Tensor:
    """Project into heads what the gates keep; differentiable in x, weight and bias.

    Args:
        x: (B, T, C) in bfloat16, float16 or float32, any strides.
        weight: (H D, C), D at most 256, and bias: (H D) or None, in x's dtype.
        gates: (B, H, T), not negative; 0 drops the pair.

    Returns:
        (B, H, T, D) in x's dtype, 0 where the gate is.

    Raises:
        ValueError: for other shapes, dtypes or devices.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    require_runnable("the projection of kept heads", *tensors)
    fits = x.dim() == 3 and gates.dim() == 3 and weight.dim() == 2
    fits = fits and gates.shape[::2] == x.shape[:2] and weight.shape[1] == x.shape[2]
    if not fits or weight.shape[0] % gates.shape[1] or weight.shape[0] > 256 * gates.shape[1]:
        raise ValueError(
            "expected x (B, T, C), weight (H D, C) with D at most 256, gates (B, H, T); got "
            f"{tuple(x.shape)}, {tuple(weight.shape)}, {tuple(gates.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {tuple(weight.shape[:1])}; got {tuple(bias.shape)}.")
    return _forward_op(x, weight, bias, gates)


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches that between them use every configuration, for `inspect_sm90`."""
    for dtype in (torch.bfloat16, torch.float32):
        for dim, width in ((32, 768), (64, 768), (100, 500), (256, 768)):
            x = torch.empty(16, 1024, width, dtype=dtype, device="meta")
            weight = torch.empty(12 * dim, width, dtype=dtype, device="meta")
            gates = torch.empty(16, 12, 1024, device="meta")
            order = torch.empty(16, 12, 1024, dtype=torch.int32, device="meta")
            ranks = torch.empty(16, 12, 1025, dtype=torch.int32, device="meta")
            name = f"{str(dtype).removeprefix('torch.')} D={dim}"
            routing = Routing(gates, order, ranks)
            yield name, functools.partial(forward, x, weight, weight[:, 0], routing)
