"""Causal depthwise convolution of q, k and v in one launch (MDHA of Primer, arXiv 2109.08668;
RCMHA, arXiv 2308.03429).

    y[t] = sum_j w[j] x[t - (K-1) + j] (+ bias)            own weights for q, k and v; K taps

    dx[t] = sum_j w[j] dy[t + (K-1) - j]
    dw[j] = sum_t dy[t] x[t - (K-1) + j],  dbias = sum_t dy[t]

Taps that meet padding, or a token of another segment, read zero.

Memory is all that costs time here: the floor is 6 tensors forward and 9 backward. A thread holds 16
bytes (8 for more than 4 taps) of each of STRIP consecutive rows and of the K-1 rows beside them,
and forms its STRIP results from these registers. The rows beside a strip belong to a neighbour's
strip: all but those at the edge of a tile come from the L1 cache. Programs that run at the same
time read all heads of q, k and v of the same tokens: where these are slices of one packed
projection, whole rows of it.

A program walks over several tiles of one head of q, k or v, also of several rows of the batch, with
its taps in registers, and backward with their sums. These leave as one row of partial sums a
program, at most max(BACKWARD_PROGRAMS, 3H) rows of (K+1) D numbers (1 MiB at K = 3, D = 64), added
up in a fixed order: no atomics, the same bits in every run.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels.common import (
    OPTIONS,
    aligned,
    backward_only,
    device_of,
    require_runnable,
    rows_by_head,
    strided,
)
from posenc.kernels.mask import check_index, check_real

#: More would not fit in the registers of a thread.
MAX_TAPS = 8
NUM_WARPS = 4
#: Consecutive rows a thread turns out at a time. Backward it holds two windows, and sums beside.
FORWARD_STRIP, BACKWARD_STRIP = 4, 3
#: Programs wanted, for an H100's 132 processors: several rounds of them forward; backward as few as
#: keep all busy, for each leaves partial sums.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 4096, 1024
UNSPECIALIZED = ["length", "heads", "tiles", "items", "share"]


@triton.jit
def _chosen(part, q, k, v):
    """Number `part` of three tensors, each a `common.strided`: the pointer and four strides."""
    chosen = ()
    for i in tl.static_range(5):
        chosen = chosen + (tl.where(part == 0, q[i], tl.where(part == 1, k[i], v[i])),)
    return chosen


@triton.constexpr_function
def _common_unit(*units):
    """What divides the rows' strides of several `common.strided`."""
    return min(units)


@triton.jit
def _head_of(x, b, h, UNIT: tl.constexpr):
    """`common.head_of` of such numbers."""
    start = x[0] + b * aligned(x[1], UNIT) + h * aligned(x[2], UNIT)
    return start, aligned(x[3], UNIT), x[4]


@triton.jit
def _past_of(past, part, b, h):
    """The matrix of one head's rows before x; nothing for nothing."""
    matrix = None
    if past is not None:
        matrix = past[0] + b * past[1] + part * past[2] + h * past[3], past[4], past[5]
    return matrix


@triton.jit
def _rows_at(
    matrix, past, rows, length, TAPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Where rows lie, those before x in `past` if there is one; and which elements exist."""
    begin = 0 if past is None else 1 - TAPS
    inside = ((rows >= begin) & (rows < length))[:, None]
    if BLOCK_D > D:
        inside = inside & (tl.arange(0, BLOCK_D) < D)[None, :]
    rows = rows.to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    at = matrix[0] + rows * matrix[1] + columns * matrix[2]
    if past is not None:
        before = past[0] + (rows + (TAPS - 1)) * past[1] + columns * past[2]
        at = tl.where(rows < 0, before, at)
    return at, inside


@triton.jit
def _where_real(inside, real, b, rows, length):
    """`inside`, (rows, columns), without the rows that are padding; those before x are not."""
    if real is not None:
        known = (rows >= 0) & (rows < length)
        inside = inside & (tl.load(real + b * length + rows, mask=known, other=1) != 0)[:, None]
    return inside


@triton.jit
def _first_of(firsts, b, rows, length):
    """A tuple of the first tokens of the rows' segments; an empty one without segments."""
    found = ()
    if firsts is not None:
        known = (rows >= 0) & (rows < length)
        found = (tl.load(firsts + b * length + rows, mask=known, other=0),)
    return found


@triton.jit
def _reached(values, row, firsts, place: tl.constexpr):
    """What taps of the rows with `firsts[place]` read of `row`, in fp32: zero before it."""
    values = values.to(tl.float32)
    if len(firsts) > 0:
        values = tl.where((row >= firsts[place])[:, None], values, 0.0)
    return values


@triton.jit
def _load_taps(weight, part, h, TAPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The K taps of one head of q, k or v, (1, BLOCK_D) each, in fp32."""
    columns = tl.arange(0, BLOCK_D)
    at = weight[0] + part * weight[1] + h * weight[2] + columns.to(tl.int64) * weight[3]
    taps = ()
    for j in tl.static_range(TAPS):
        tap = tl.load(at + j * weight[4], mask=columns < D, other=0.0)
        taps = taps + (tap.to(tl.float32)[None, :],)
    return taps


@triton.jit
def _load_bias(bias, part, h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The bias of one head of q, k or v, (1, BLOCK_D) in fp32; zeros for None."""
    columns = tl.arange(0, BLOCK_D)
    if bias is None:
        found = tl.zeros((BLOCK_D,), tl.float32)
    else:
        at = bias[0] + part * bias[1] + h * bias[2] + columns.to(tl.int64) * bias[3]
        found = tl.load(at, mask=columns < D, other=0.0).to(tl.float32)
    return found[None, :]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q,
    k,
    v,
    q_out,
    k_out,
    v_out,
    weight,
    bias,
    past,
    firsts,
    real,
    length,
    heads,
    tiles,
    items,
    share,
    TAPS: tl.constexpr,
    STRIP: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (head of q, k or v; `share` of the tiles of all batch rows)."""
    lane = tl.program_id(0)
    part, h = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    taps = _load_taps(weight, part, h, TAPS, D, BLOCK_D)
    shift = _load_bias(bias, part, h, D, BLOCK_D)
    x, y = _chosen(part, q, k, v), _chosen(part, q_out, k_out, v_out)
    OF_X: tl.constexpr = _common_unit(q[5], k[5], v[5])
    OF_Y: tl.constexpr = _common_unit(q_out[5], k_out[5], v_out[5])
    begin = tl.program_id(1) * share
    for item in range(begin, tl.minimum(begin + share, items)):
        b = (item // tiles).to(tl.int64)
        source, target = _head_of(x, b, h, OF_X), _head_of(y, b, h, OF_Y)
        before = _past_of(past, part, b, h)
        first = (item % tiles * GROUPS + tl.arange(0, GROUPS)) * STRIP
        window = ()
        for i in tl.static_range(STRIP + TAPS - 1):
            rows = first + (i - (TAPS - 1))
            at, inside = _rows_at(source, before, rows, length, TAPS, D, BLOCK_D)
            inside = _where_real(inside, real, b, rows, length)
            window = window + (tl.load(at, mask=inside, other=0.0),)
        for i in tl.static_range(STRIP):
            result = tl.zeros((GROUPS, BLOCK_D), tl.float32) + shift
            own = _first_of(firsts, b, first + i, length)
            for j in tl.static_range(TAPS):
                result += taps[j] * _reached(window[i + j], first + (i + j - (TAPS - 1)), own, 0)
            at, inside = _rows_at(target, None, first + i, length, TAPS, D, BLOCK_D)
            tl.store(at, result.to(y[0].dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(
    q,
    k,
    v,
    dq_out,
    dk_out,
    dv_out,
    dq,
    dk,
    dv,
    weight,
    past,
    firsts,
    real,
    dpast,
    dweight,
    dbias,
    length,
    heads,
    tiles,
    items,
    share,
    TAPS: tl.constexpr,
    STRIP: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (head of q, k or v; `share` of the tiles of all batch rows): dx, dpast, and its rows
    of the sums dweight (programs, 3, H, D, K) and dbias (programs, 3, H, D).
    """
    lane, program = tl.program_id(0), tl.program_id(1)
    part, h = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    taps = _load_taps(weight, part, h, TAPS, D, BLOCK_D)
    sums = (tl.zeros((GROUPS, BLOCK_D), tl.float32),) * TAPS
    total = tl.zeros((GROUPS, BLOCK_D), tl.float32)
    # With a past the rows before x have a gradient too: the tiles begin there.
    HALO: tl.constexpr = TAPS - 1
    origin = 0 if past is None else -HALO
    x, dx = _chosen(part, q, k, v), _chosen(part, dq, dk, dv)
    dy = _chosen(part, dq_out, dk_out, dv_out)
    OF_X: tl.constexpr = _common_unit(q[5], k[5], v[5])
    OF_DX: tl.constexpr = _common_unit(dq[5], dk[5], dv[5])
    OF_DY: tl.constexpr = _common_unit(dq_out[5], dk_out[5], dv_out[5])
    for item in range(program * share, tl.minimum(program * share + share, items)):
        b = (item // tiles).to(tl.int64)
        source, target = _head_of(x, b, h, OF_X), _head_of(dx, b, h, OF_DX)
        upstream = _head_of(dy, b, h, OF_DY)
        before = _past_of(past, part, b, h)
        dbefore = _past_of(dpast, part, b, h)
        first = origin + (item % tiles * GROUPS + tl.arange(0, GROUPS)) * STRIP
        xs = ()
        dys = ()
        owns = ()
        for i in tl.static_range(STRIP + HALO):
            rows = first + (i - HALO)
            at, inside = _rows_at(source, before, rows, length, TAPS, D, BLOCK_D)
            inside = _where_real(inside, real, b, rows, length)
            xs = xs + (tl.load(at, mask=inside, other=0.0),)
            at, inside = _rows_at(upstream, None, first + i, length, TAPS, D, BLOCK_D)
            dys = dys + (tl.load(at, mask=inside, other=0.0),)
            owns = owns + _first_of(firsts, b, first + i, length)
        for i in tl.static_range(STRIP):
            gradient = tl.zeros((GROUPS, BLOCK_D), tl.float32)
            new = ()
            for j in tl.static_range(TAPS):
                gradient += taps[j] * _reached(dys[i + HALO - j], first + i, owns, i + HALO - j)
                read = _reached(xs[i + j], first + (i + j - HALO), owns, i)
                new = new + (sums[j] + dys[i].to(tl.float32) * read,)
            sums = new
            total += dys[i].to(tl.float32)
            at, inside = _rows_at(target, dbefore, first + i, length, TAPS, D, BLOCK_D)
            if real is not None:
                everywhere = tl.full((GROUPS, 1), 1, tl.int1)
                gradient = tl.where(
                    _where_real(everywhere, real, b, first + i, length), gradient, 0.0
                )
            tl.store(at, gradient.to(dx[0].dtype.element_ty), mask=inside)
    columns = tl.arange(0, BLOCK_D)
    at = (program.to(tl.int64) * 3 * heads + lane) * D + columns
    for j in tl.static_range(TAPS):
        tl.store(dweight + at * TAPS + j, tl.sum(sums[j], 0), mask=columns < D)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(total, 0), mask=columns < D)


def blocks(dim: int, taps: int, dtype: torch.dtype, strip: int) -> dict[str, int]:
    """The compile-time sizes of the kernels."""
    block = triton.next_power_of_2(dim)
    # What a thread reads at once of rows that lie side by side; more taps leave too few registers.
    access = 16 if dim * dtype.itemsize % 16 == 0 and taps <= 4 else 8
    held = 32 * NUM_WARPS * access // dtype.itemsize
    return {
        "TAPS": taps,
        "STRIP": strip,
        "GROUPS": max(held // block, 1),
        "D": dim,
        "BLOCK_D": block,
    }


def shares(
    batch: int, heads: int, rows: int, tile: int, programs: int
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """The grid; and tiles of a sequence, tiles of all sequences, tiles a program."""
    tiles = triton.cdiv(rows, tile)
    items = batch * tiles
    share = triton.cdiv(items, max(programs // (3 * heads), 1))
    return (3 * heads, triton.cdiv(items, share)), (tiles, items, share)


def per_head(parameter: Tensor, heads: int, ndim: int) -> Tensor:
    """A view of weight (4) or bias (3 dimensions) with heads, for those that share one too."""
    if parameter.ndim == ndim:
        return parameter
    return parameter.unsqueeze(1).expand(3, heads, *parameter.shape[1:])


def bounds(first: Tensor | None, real: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Segments and padding as kernels take them, contiguous."""
    first = None if first is None else first.contiguous()
    return first, None if real is None else real.contiguous().view(torch.uint8)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    first: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolved q, k and v."""
    batch, heads, length, dim = q.shape
    outputs = rows_by_head(q), rows_by_head(k), rows_by_head(v)
    sizes = blocks(dim, weight.shape[-1], q.dtype, FORWARD_STRIP)
    tile = sizes["STRIP"] * sizes["GROUPS"]
    grid, counts = shares(batch, heads, length, tile, FORWARD_PROGRAMS)
    with device_of(q):
        forward_kernel[grid](
            strided(q), strided(k), strided(v), *map(strided, outputs),
            strided(per_head(weight, heads, 4)),
            None if bias is None else strided(per_head(bias, heads, 3)),
            None if past is None else strided(past), *bounds(first, real), length, heads, *counts,
            **sizes, num_warps=NUM_WARPS, **OPTIONS,
        )  # fmt: skip
    return outputs


def backward(
    dq_out: Tensor,
    dk_out: Tensor,
    dv_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    first: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dweight, dbias and dpast, the last two empty where there is no bias or past."""
    batch, heads, length, dim = q.shape
    taps = weight.shape[-1]
    dq, dk, dv = rows_by_head(q), rows_by_head(k), rows_by_head(v)
    dpast = q.new_empty(0 if past is None else past.shape)
    sizes = blocks(dim, taps, q.dtype, BACKWARD_STRIP)
    rows = length if past is None else length + taps - 1
    tile = sizes["STRIP"] * sizes["GROUPS"]
    grid, counts = shares(batch, heads, rows, tile, BACKWARD_PROGRAMS)
    sums = q.new_empty((grid[1], 3, heads, dim, taps), dtype=torch.float32)
    shifts = None if bias is None else q.new_empty(sums.shape[:-1], dtype=torch.float32)
    with device_of(q):
        backward_kernel[grid](
            strided(q), strided(k), strided(v),
            strided(dq_out), strided(dk_out), strided(dv_out),
            strided(dq), strided(dk), strided(dv),
            strided(per_head(weight, heads, 4)),
            None if past is None else strided(past),
            *bounds(first, real),
            None if past is None else strided(dpast),
            sums, shifts,
            length, heads, *counts,
            **sizes, num_warps=NUM_WARPS, **OPTIONS,
        )  # fmt: skip
    dweight = sums.sum((0, 2) if weight.ndim == 3 else 0).to(weight.dtype)
    if bias is None:
        dbias = weight.new_empty(0)
    else:
        dbias = shifts.sum((0, 2) if bias.ndim == 2 else 0).to(bias.dtype)
    return dq, dk, dv, dweight, dbias, dpast


@torch.library.custom_op("posenc::conv_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    first: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return forward(q, k, v, weight, bias, past, first, real)


@torch.library.custom_op("posenc::conv_backward", mutates_args=())
def _backward_op(
    dq_out: Tensor,
    dk_out: Tensor,
    dv_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    first: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward(dq_out, dk_out, dv_out, q, k, v, weight, bias, past, first, real)


@_forward_op.register_fake
def _(q, k, v, *options):
    return rows_by_head(q), rows_by_head(k), rows_by_head(v)


@_backward_op.register_fake
def _(dq_out, dk_out, dv_out, q, k, v, weight, bias, past, *options):
    return (
        rows_by_head(q),
        rows_by_head(k),
        rows_by_head(v),
        weight.new_empty(weight.shape),
        weight.new_empty(0 if bias is None else bias.shape),
        q.new_empty(0 if past is None else past.shape),
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dq_out, dk_out, dv_out):
    *_, bias, past, _, _ = ctx.saved_tensors
    *found, dbias, dpast = _backward_op(dq_out, dk_out, dv_out, *ctx.saved_tensors)
    found += [None if bias is None else dbias, None if past is None else dpast]
    return *found, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    first: Tensor | None = None,
    real: Tensor | None = None,
) -> None:
    """ValueError unless these arguments of `conv` fit together."""
    require_runnable("conv", q, k, v, *(() if past is None else (past,)))
    require_runnable("conv", weight, *(() if bias is None else (bias,)))
    if q.ndim != 4 or not q.shape == k.shape == v.shape or not q.numel():
        raise ValueError(
            "conv needs q, k and v of one shape (B, H, T, D) and at least one token; "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if weight.device != q.device:
        raise ValueError(
            f"q is on {q.device} and the weight on {weight.device}. Move one to the other's."
        )
    batch, heads, _, dim = q.shape
    taps = weight.shape[-1] if weight.ndim else 0
    if weight.shape not in ((3, dim, taps), (3, heads, dim, taps)) or not 1 <= taps <= MAX_TAPS:
        raise ValueError(
            f"weight must be (3, {dim}, K) or (3, {heads}, {dim}, K) with K from 1 to {MAX_TAPS}; "
            f"got {tuple(weight.shape)}. Longer kernels: posenc.convolution.depthwise_conv."
        )
    if bias is not None and bias.shape not in ((3, dim), (3, heads, dim)):
        raise ValueError(
            f"bias must be (3, {dim}) or (3, {heads}, {dim}); got {tuple(bias.shape)}."
        )
    before = (batch, 3, heads, taps - 1, dim)
    if past is not None and past.shape != before:
        raise ValueError(f"past must be {before}; got {tuple(past.shape)}.")
    check_index("first", first, batch, q.shape[2], q.device)
    check_real(real, batch, q.shape[2], q.device)


@backward_only
def conv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past: Tensor | None = None,
    *,
    first: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve each channel of q, k and v with its own kernel, causally; differentiable once.

    Args:
        q, k, v: (B, H, T, D), any strides.
        weight: (3, D, K), the same for all heads, or (3, H, D, K), K from 1 to 8; for q, k and v.
            The last tap meets the present token. Any of the dtypes, used in fp32.
        bias: (3, D) or (3, H, D), in weight's dtype.
        past: (B, 3, H, K-1, D) in q's dtype, the rows before q, k and v; None is zeros.
        first: int32 (B, T), the index of the first token of every token's segment, before which
            its taps read zero; negative where that lies in the past.
        real: bool (B, T), False for padding, which taps read as zero, its own too.

    Returns:
        q, k and v in their dtype, summed in fp32, laid out (B, T, H, D): to merge the heads copies
        nothing.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    check(q, k, v, weight, bias, past, first, real)
    # One tap looks at no row before the present one.
    past = None if weight.shape[-1] == 1 else past
    return _forward_op(q, k, v, weight, bias, past, first, real)


def conv_with_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past: Tensor | None = None,
    *,
    first: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`conv`, and the past of the tokens that follow: (B, 3, H, K-1, D), without a gradient.

    Arguments and errors as of `conv`. The sequence in chunks, each with the state of the one before
    it as its past, gives what the whole gives, bit for bit. Padding is zero in it.
    """
    outputs = conv(q, k, v, weight, bias, past, first=first, real=real)
    count = weight.shape[-1] - 1
    with torch.no_grad():
        kept = max(q.shape[2] - count, 0)
        state = torch.stack([z[:, :, kept:] for z in (q, k, v)], dim=1)
        if real is not None:
            state = state.where(real[:, None, None, kept:, None], 0.0)
        missing = count - state.shape[3]
        if missing:
            shape = (*state.shape[:3], count, state.shape[4])
            before = state.new_zeros(shape) if past is None else past
            state = torch.cat((before[:, :, :, count - missing :], state), dim=3)
    return *outputs, state


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches that between them use every configuration, for `inspect_sm90`."""
    half, single = torch.bfloat16, torch.float32
    for dtype, dim, taps, shared, biased, continued in (
        (half, 64, 3, True, True, False),
        (half, 64, 3, False, False, False),
        (half, 64, 4, False, True, True),
        (half, 16, 2, True, False, False),
        (half, 40, 3, False, True, False),
        (half, 100, 3, True, False, False),
        (half, 128, 8, True, True, True),
        (single, 64, 3, True, True, True),
        (single, 40, 8, False, True, False),
        (single, 128, 4, False, False, False),
    ):
        packed = torch.empty(16, 1024, 3, 12, dim, dtype=dtype, device="meta")
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        out = rows_by_head(q)
        channels = (3, dim) if shared else (3, 12, dim)
        weight = torch.empty(*channels, taps, device="meta")
        bias = torch.empty(channels, device="meta") if biased else None
        past = None
        if continued:
            past = torch.empty(16, 3, 12, taps - 1, dim, dtype=dtype, device="meta")
        name = f"{str(dtype).removeprefix('torch.')} D={dim} K={taps}"
        name += " shared" * shared + " bias" * biased + " past" * continued
        yield name, functools.partial(forward, q, k, v, weight, bias, past)
        yield (
            f"{name} back",
            functools.partial(backward, out, out, out, q, k, v, weight, bias, past),
        )
        if (dim, taps) in ((64, 3), (64, 4)) and dtype == half:
            first = torch.empty(16, 1024, dtype=torch.int32, device="meta")
            bounded = (weight, bias, past, first, first > 0)
            yield f"{name} masked", functools.partial(forward, q, k, v, *bounded)
            yield (
                f"{name} masked back",
                functools.partial(backward, out, out, out, q, k, v, *bounded),
            )
