"""Causal attention of which only some (token, head) pairs are computed: MoH (arXiv 2410.11842),
forward and backward.

    y[h,m] = g[h,m] sum_n softmax_n(scale q[h,m].k[h,n]) v[h,n]        where g is not 0; else 0

Every key counts, as a later token may select the head; what a gate of 0 drops is the query's row:
its product with the keys, its output, its share of dk and dv. The rows of each head are sorted into
`order`, the kept ones first, by one small kernel; tiles gather their queries by it and read keys as
they lie. A grid is as large as if every row were kept, and programs past the last one only write
zeros: nothing waits for a count to reach the host, and CUDA graphs can hold the whole.

With L'[m] = L[m] - log2 g[m] in place of L the weights that the backward pass rebuilds are g P, and
with delta = <dy, y> / g, which is the gradient of the gate, the rest of it is flash attention's:

    dS = g P * (dP - delta)        dV = (g P)^T dY        dP = dY V^T        dg = delta

Straight-through gates (`straight_through=True`) have a gradient where they are 0 too, which takes
every output: then the forward pass is dense, and only the backward pass skips.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels import flash
from posenc.kernels.bias import NO_BIAS, head_at
from posenc.kernels.common import (
    OPTIONS,
    backward_only,
    block_of,
    check_weights,
    device_of,
    head_of,
    leave_out,
    load_rows,
    of_one_output,
    rows_by_head,
    store_rows,
    strided,
    tile_options,
)
from posenc.kernels.flash import Config, attend
from posenc.kernels.flash_backward import dq_of_rows
from posenc.kernels.hooks import STORE
from posenc.kernels.mask import CAUSAL, PLAIN, Arguments, Mask, arguments
from posenc.kernels.tiles import config_of

#: Gates below the smallest normal fp32 number count as 0: their reciprocal may not exist.
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
#: Rows that a program of `sort_kernel` places.
SORT_ROWS = 1024
DELTA_ROWS = 64

#: By kernel, bytes of an element, and the head dim rounded up to a power of two (at least 32). Half
#: as many rows as a dense tile: kept rows lie apart, and a tile's diagonal is as wide as they do.
CONFIGS = {
    ("forward", 2, 32): Config(64, 64, 4, 3),
    ("forward", 2, 64): Config(64, 64, 4, 3),
    ("forward", 2, 128): Config(64, 64, 4, 3),
    ("forward", 2, 256): Config(64, 32, 4, 2),
    ("forward", 4, 32): Config(64, 32, 4, 2),
    ("forward", 4, 64): Config(64, 32, 4, 2),
    ("forward", 4, 128): Config(16, 32, 4, 2),
    ("forward", 4, 256): Config(16, 16, 8, 1),
    ("dq", 2, 32): Config(64, 64, 4, 2),
    ("dq", 2, 64): Config(64, 64, 4, 2),
    ("dq", 2, 128): Config(64, 64, 4, 2),
    ("dq", 2, 256): Config(128, 32, 8, 2),
    ("dq", 4, 32): Config(64, 32, 4, 2),
    ("dq", 4, 64): Config(64, 32, 4, 2),
    ("dq", 4, 128): Config(16, 64, 8, 1),
    ("dq", 4, 256): Config(16, 16, 8, 1),
}


@triton.jit
def dropped(gate):
    """Which gates drop their row: not NaN, which must come through."""
    return gate < SMALLEST


@triton.jit(do_not_specialize=["T"])
def sort_kernel(gates, order, ranks, T, BLOCK: tl.constexpr):
    """Rows of one head, the kept ones in front, both kinds in order; and ranks.

    gates: contiguous fp32 (B, H, T). order: int32 (B, H, T). ranks: int32 (B, H, T + 1), the number
    of kept rows before each.
    """
    blocks = tl.cdiv(T, BLOCK)
    first = tl.program_id(0) % blocks * BLOCK
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    gates += bh * T
    order += bh * T
    ranks += bh * (T + 1)
    # Every program counts the rows before its own and those after: no waiting for one another.
    before = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        kept = (~dropped(tl.load(gates + t, mask=t < T, other=0.0))).to(tl.int32)
        total += kept
        before += kept * (start < first)
    count = tl.sum(total, 0)
    t = first + tl.arange(0, BLOCK)
    inside = t < T
    kept = (~dropped(tl.load(gates + t, mask=inside, other=0.0))).to(tl.int32)
    rank = tl.sum(before, 0) + tl.cumsum(kept, 0) - kept
    tl.store(ranks + t, rank, mask=inside)
    tl.store(ranks + T, count, mask=first == 0)
    tl.store(order + tl.where(kept != 0, rank, count + t - rank), t, mask=inside)


@triton.jit(do_not_specialize=["H", "T", "S"])
def forward_kernel(
    q,
    k,
    v,
    gates,
    order,
    ranks,
    y,
    lse,
    mask,
    bias,
    H,
    T,
    S,
    c,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every row of y and L', 0 where dropped. gates, lse: contiguous fp32 (B, H, T)."""
    tiles = tl.cdiv(T, BLOCK_M)
    # Late rows see the most keys: they start first.
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    shift = S - T
    m, kept, lowest, highest = rows_of_tile(order, ranks, bh, first, T, shift, BLOCK_M)

    q_tile = load_rows(head_of(q, b, h), m, kept, D, BLOCK_D)
    keys, values = head_of(k, b, h // GROUP), head_of(v, b, h // GROUP)
    sums, total, peak = attend(
        q_tile, keys, values, b, m, lowest, highest, mask,
        bias, head_at(b, h, H, S), T, S, c, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    gate = tl.load(gates + bh * T + m, mask=kept, other=1.0)
    total = tl.where(kept, total, 1.0)
    rows = tl.where(kept[:, None], sums * (gate / total)[:, None], 0.0)
    inside = first + tl.arange(0, BLOCK_M) < T
    store_rows(head_of(y, b, h), rows, m, inside, D, BLOCK_D)
    row_lse = tl.where(kept, peak + tl.log2(total) - tl.log2(gate), 0.0)
    tl.store(lse + bh * T + m, row_lse, mask=inside)


@triton.jit
def rows_of_tile(order, ranks, bh, first, T, shift, BLOCK_M: tl.constexpr):
    """Rows of places first .. of a head's order, which are kept, and the lowest and highest kept.

    Where none is, both are the row before the one that sees the first key: no keys are left.
    """
    place = first + tl.arange(0, BLOCK_M)
    count = tl.load(ranks + bh * (T + 1) + T)
    order += bh * T
    m = tl.load(order + place, mask=place < T, other=0)
    # Kept rows are sorted.
    lowest = tl.load(order + first, mask=first < count, other=-shift - 1)
    last = min(first + BLOCK_M, count) - 1
    highest = tl.load(order + last, mask=first < count, other=-shift - 1)
    return m, place < count, lowest, highest


@triton.jit(do_not_specialize=["H", "T", "S"])
def dq_kernel(
    q,
    k,
    v,
    y,
    dy,
    gates,
    order,
    ranks,
    lse,
    delta,
    dq,
    mask,
    bias,
    H,
    T,
    S,
    scale,
    c,
    HAS_DELTA: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every row of dQ and, unless it is there already, of delta, which dK and dV need after it."""
    tiles = tl.cdiv(T, BLOCK_M)
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    shift = S - T
    m, kept, lowest, highest = rows_of_tile(order, ranks, bh, first, T, shift, BLOCK_M)
    inside = first + tl.arange(0, BLOCK_M) < T

    q_tile = load_rows(head_of(q, b, h), m, kept, D, BLOCK_D)
    dy_tile = load_rows(head_of(dy, b, h), m, kept, D, BLOCK_D)
    if HAS_DELTA:
        row_delta = tl.load(delta + bh * T + m, mask=kept, other=0.0)
    else:
        y_tile = load_rows(head_of(y, b, h), m, kept, D, BLOCK_D)
        gate = tl.load(gates + bh * T + m, mask=kept, other=1.0)
        row_delta = tl.sum(y_tile.to(tl.float32) * dy_tile.to(tl.float32), 1) / gate
        tl.store(delta + bh * T + m, row_delta, mask=inside)
    row_lse = tl.load(lse + bh * T + m, mask=kept, other=0.0)

    keys, values = head_of(k, b, h // GROUP), head_of(v, b, h // GROUP)
    grad = dq_of_rows(
        q_tile, dy_tile, row_lse, row_delta, keys, values, b, m, lowest, highest,
        mask, bias, head_at(b, h, H, S), T, S, c, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    grad = tl.where(kept[:, None], grad * scale, 0.0)
    store_rows(head_of(dq, b, h), grad, m, inside, D, BLOCK_D)


@triton.jit(do_not_specialize=["H", "T"])
def delta_kernel(
    y,
    dy,
    gates,
    delta,
    H,
    T,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta alone, for the one-kernel backward; reads kept rows only."""
    tiles = tl.cdiv(T, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    m = first + tl.arange(0, BLOCK_M)
    gate = tl.load(gates + bh * T + m, mask=m < T, other=0.0)
    kept = ~dropped(gate)
    y_tile = load_rows(head_of(y, b, h), m, kept, D, BLOCK_D)
    dy_tile = load_rows(head_of(dy, b, h), m, kept, D, BLOCK_D)
    total = tl.sum(y_tile.to(tl.float32) * dy_tile.to(tl.float32), 1)
    tl.store(delta + bh * T + m, total / tl.where(kept, gate, 1.0), mask=m < T)


def is_kept(gates: Tensor) -> Tensor:
    """What the kernels compute: all that is not below the smallest normal number."""
    return ~(gates.float() < SMALLEST.value)


class Routing(NamedTuple):
    """Which rows of q count: the gates, and what `sort_kernel` made of them."""

    gates: Tensor  # contiguous fp32 (B, H, T)
    order: Tensor
    ranks: Tensor


def sort_rows(gates: Tensor) -> Routing:
    """Sort the rows of every head by their gates (B, H, T)."""
    gates = gates.float().contiguous()
    batch, heads, length = gates.shape
    order = torch.empty(gates.shape, dtype=torch.int32, device=gates.device)
    ranks = torch.empty((batch, heads, length + 1), dtype=torch.int32, device=gates.device)
    block = min(SORT_ROWS, triton.next_power_of_2(length))
    with device_of(gates):
        sort_kernel[(triton.cdiv(length, block) * batch * heads,)](
            gates, order, ranks, length, BLOCK=block, **OPTIONS
        )
    return Routing(gates, order, ranks)


def launch(kernel: str, x: Tensor) -> tuple[Config, dict]:
    """The configuration of a kernel for tensors like x, and the launch's keyword arguments."""
    key = kernel, x.element_size(), max(32, block_of(x))
    config = config_of("routed", CONFIGS, key, x.device)
    return config, tile_options(x, config)


def forward(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float, mask: Arguments = PLAIN
) -> tuple[Tensor, Tensor]:
    """y (B, H, T, D) in q's dtype and L', fp32 (B, H, T), of checked arguments."""
    batch, heads, length, _ = q.shape
    y = rows_by_head(q)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    config, options = launch("forward", q)
    grid = (triton.cdiv(length, config.block_m) * batch * heads,)
    with device_of(q):
        forward_kernel[grid](
            strided(q), strided(k), strided(v), *routing, strided(y), lse, mask,
            NO_BIAS, heads, length, k.shape[2], scale * math.log2(math.e),
            GROUP=heads // k.shape[1], **options,
        )  # fmt: skip
    return y, lse


def backward(
    dy: Tensor,
    saved: flash.Saved,
    routing: Routing,
    scale: float,
    deterministic: bool | None,
    delta: Tensor | None = None,
    mask: Arguments = PLAIN,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dgates of `forward`, or where `delta` is given, which is then dgates."""
    q, k, v, y, lse = saved
    batch, heads, length, _ = q.shape
    has_delta = delta is not None
    if delta is None:
        delta = torch.empty_like(lse)
    rest = (scale, STORE, mask, routing.order, routing.ranks)
    numbers = (heads, length, k.shape[2], scale, scale * math.log2(math.e))
    if flash.is_split(deterministic, length):
        dq = rows_by_head(q)
        config, options = launch("dq", q)
        grid = (triton.cdiv(length, config.block_m) * batch * heads,)
        with device_of(q):
            dq_kernel[grid](
                strided(q), strided(k), strided(v), strided(y), strided(dy), *routing, lse, delta,
                strided(dq), mask, NO_BIAS, *numbers, HAS_DELTA=has_delta,
                GROUP=heads // k.shape[1], **options,
            )  # fmt: skip
        return dq, *flash.launch_dkv("dkv", dy, saved, delta, delta, *rest), delta
    if not has_delta:
        with device_of(q):
            delta_kernel[(triton.cdiv(length, DELTA_ROWS) * batch * heads,)](
                strided(y), strided(dy), routing.gates, delta, heads, length,
                D=q.shape[-1], BLOCK_D=block_of(q), BLOCK_M=DELTA_ROWS, **OPTIONS,
            )  # fmt: skip
    dq_sum = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dk, dv = flash.launch_dkv("dqkv", dy, saved, delta, dq_sum, *rest)
    return flash.scaled(dq_sum, scale, q), dk, dv, delta


@torch.library.custom_op("posenc::routed_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # `deterministic` is only passed on to the backward pass.
    routing = sort_rows(gates)
    mask = arguments(Mask(window, first, last, real), k.shape[2])
    return *forward(q, k, v, routing, scale, mask), *routing[1:]


@torch.library.custom_op("posenc::routed_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    y: Tensor,
    lse: Tensor,
    order: Tensor,
    ranks: Tensor,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    routing = Routing(gates.float().contiguous(), order, ranks)
    mask = arguments(Mask(window, first, last, real), k.shape[2])
    return backward(dy, flash.Saved(q, k, v, y, lse), routing, scale, deterministic, mask=mask)


@_forward_op.register_fake
def _(q, k, v, gates, *options):
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    order = torch.empty(q.shape[:-1], dtype=torch.int32, device=q.device)
    ranks = order.new_empty((*q.shape[:2], q.shape[2] + 1))
    return rows_by_head(q), lse, order, ranks


@_backward_op.register_fake
def _(dy, q, k, v, gates, y, lse, *options):
    return *(rows_by_head(x) for x in (q, k, v)), torch.empty_like(lse)


def _save(ctx, inputs, output) -> None:
    q, k, v, gates, ctx.scale, ctx.deterministic, ctx.window, *mask = inputs
    leave_out(ctx, *output[1:])
    ctx.save_for_backward(q, k, v, gates, *output, *mask)


@of_one_output
def _differentiate(ctx, dy):
    return _gradients(_backward_op, ctx, dy)


def _gradients(op, ctx, dy) -> tuple:
    *saved, first, last, real = ctx.saved_tensors
    mask = (ctx.window, first, last, real)
    *tensors, d_gates = op(dy, *saved, ctx.scale, ctx.deterministic, *mask)
    return *tensors, d_gates.to(saved[3].dtype), *(None,) * 6


_forward_op.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("posenc::straight_through_forward", mutates_args=())
def _dense_forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = arguments(Mask(window, first, last, real), k.shape[2])
    o, lse = flash.forward(q, k, v, scale, mask=mask)
    y = rows_by_head(q)
    torch.mul(o, gates.unsqueeze(-1), out=y)
    return y, o, lse


@torch.library.custom_op("posenc::straight_through_backward", mutates_args=())
def _dense_backward_op(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    routing, delta = sort_rows(gates), flash.delta_of(o, dy)
    saved = flash.Saved(q, k, v, o, lse - routing.gates.log2())
    mask = arguments(Mask(window, first, last, real), k.shape[2])
    return backward(dy, saved, routing, scale, deterministic, delta, mask)


@_dense_forward_op.register_fake
def _(q, k, v, gates, *options):
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    return rows_by_head(q), rows_by_head(q), lse


@_dense_backward_op.register_fake
def _(dy, q, k, v, gates, o, lse, *options):
    return *(rows_by_head(x) for x in (q, k, v)), torch.empty_like(lse)


def _save_dense(ctx, inputs, output) -> None:
    q, k, v, gates, ctx.scale, ctx.deterministic, ctx.window, *mask = inputs
    _, o, lse = output
    leave_out(ctx, o, lse)
    ctx.save_for_backward(q, k, v, gates, o, lse, *mask)


@of_one_output
def _differentiate_dense(ctx, dy):
    return _gradients(_dense_backward_op, ctx, dy)


_dense_forward_op.register_autograd(_differentiate_dense, setup_context=_save_dense)


@backward_only
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    scale: float | None = None,
    mask: Mask = CAUSAL,
    straight_through: bool = False,
    deterministic: bool | None = None,
) -> Tensor:
    """Causal softmax attention weighed by gates, without computing what they drop.

    Args:
        q: (B, H, T, D), D at most 256, in bfloat16, float16 or float32, any strides.
        k, v: (B, G, S, D), G a divisor of H, S >= T: query row i sits at key index S - T + i.
        gates: (B, H, T), not negative; 0 drops the pair. fp32 inside. The gradient of a gate is
            <dy, y> / g of the rounded y: of gates below 6e-5 fp16 loses bits of it.
        scale: of the logits, positive; None is 1/sqrt(D).
        mask: see `posenc.kernels.flash.flash_attention`.
        straight_through: give gates of 0 their gradient <dy, o> too, where otherwise it is 0. The
            forward pass then computes every pair, and only the backward pass skips.
        deterministic: see `posenc.kernels.flash.flash_attention`.

    Returns:
        (B, H, T, D) in q's dtype, 0 where the gate is.

    Raises:
        ValueError: for other shapes, dtypes or devices.
    """
    check(q, k, v, gates, scale, mask)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if torch.are_deterministic_algorithms_enabled():
        deterministic = True
    op = _dense_forward_op if straight_through else _forward_op
    return op(q, k, v, gates, scale, deterministic, *mask)[0]


def check(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, scale: float | None, mask: Mask = CAUSAL
) -> None:
    """ValueError unless these arguments of `routed_attention` fit together."""
    flash.check(q, k, v, scale, mask)
    check_weights("gates", gates, q.device, tuple(q.shape[:-1]))


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches that between them use every configuration, for `inspect_sm90`."""
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (32, 64, 72, 128, 256):
            packed = torch.empty(16, 1024, 3, 12, dim, dtype=dtype, device="meta")
            q, k, v = packed.permute(2, 0, 3, 1, 4)
            y, gates = rows_by_head(q), torch.empty(16, 12, 1024, device="meta")
            order = torch.empty(16, 12, 1024, dtype=torch.int32, device="meta")
            ranks = torch.empty(16, 12, 1025, dtype=torch.int32, device="meta")
            routing, saved = Routing(gates, order, ranks), flash.Saved(q, k, v, y, gates)
            name = f"{str(dtype).removeprefix('torch.')} D={dim}"
            if dim == 64:
                yield "sort", functools.partial(sort_rows, gates)
            yield name, functools.partial(forward, q, k, v, routing, 0.125)
            back = functools.partial(backward, y, saved, routing, 0.125)
            yield name, functools.partial(back, True)
            yield f"{name} atomic", functools.partial(back, False)
            if dim == 64:
                yield f"{name} straight through", functools.partial(back, True, gates)
