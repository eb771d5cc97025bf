"""CARoPE's rates from the tokens (arXiv 2507.23083), forward and backward.

    z[b,h,t] = x[b,t] . W[:,h] (+ bias[h])        x (B, T, C), W (C, H)
    log f = -log1p(softplus(z))                   fp64, (B, H, T)

    dz = -sigmoid(z) f dlog f,  dx = dz W^T,  dW = x^T dz,  dbias = sum of dz

A rate in fp32 puts a million tokens 0.02 rad off, so z needs about twice its digits, and fp64 is
slow in most GPUs. A group of g columns (8, of fp32 4) is summed as two numbers: products x w are
added by fused multiply-adds to a number that is much larger, and what that rounds away is kept,

    s[j] = s[j-1] + x w,  r[j] = x w - (s[j] - s[j-1])        s[0] = top = 2 g max|x| max|W|

so that all s lie on a grid where their differences are exact, s[g] - top too, and r is at most
2^-23 top; sum x w = (s[g] - top) + sum r.
Groups are added with what each addition loses (Knuth's two-sum). For C up to 1024 z is off by
2^-37 C max|x| max|W| at the very most, if all roundings of r and of the losses fall the same way;
random ones leave 2^-48 of it, 4e-13 for normed tokens and weights of 0.02 at C = 768. (A group's
share of the bound is 10 2^-45 top, that of m losses in a sum 2^-23 m (m 2^-21 + m^2 2^-26) top.)

A row is summed in one order, whatever the number of rows: rates do not depend on how a sequence is
cut. x and its products with W must stay below 2^122; beyond, rates are NaN.

x is read once, in the dtype that it has, and no copy of it is kept or written. The backward pass
reads it once more, and sums dW over tiles of rows, then the tiles: the same bits in every run.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels.common import (
    INTERPRETED,
    OPTIONS,
    backward_only,
    device_of,
    head_of,
    numbers_of,
    of_one_output,
    require_runnable,
    strided,
)
from posenc.kernels.mask import check_real

#: Rows of a program, and groups of columns that it takes at a time.
ROWS, GROUPS = 16, 8
#: Heads of a program at most: each holds two sums.
HEADS = 16
#: Of the backward pass: rows and columns of a tile; programs that divide the rows, at most.
BLOCK_M, BLOCK_C = 64, 64
SPLITS = 64
#: Of the kernels before and after: columns of W, and numbers (B, H, T), that a program takes.
COLUMNS, NUMBERS = 1024, 256

EXACT = tl.constexpr(INTERPRETED)


@triton.jit
def _fused(a, b, c):
    """a b + c, rounded once. Triton's interpreter would round the product; in fp64 it is exact."""
    if EXACT:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def _add(a, a_rest, b, b_rest):
    """The sum of two unevaluated sums."""
    s = a + b
    of_b = s - a
    return s, a_rest + b_rest + ((a - (s - of_b)) + (b - of_b))


@triton.jit
def _halves(x):
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))


@triton.jit
def _columns(x):
    """The 4 or 8 columns of x, in an order of their own; a thread holds all of a row's."""
    a, b = _halves(x)
    if x.shape[2] == 4:
        found = tl.split(a) + tl.split(b)
    else:
        a1, a2 = _halves(a)
        b1, b2 = _halves(b)
        found = tl.split(a1) + tl.split(a2) + tl.split(b1) + tl.split(b2)
    return found


@triton.jit
def _place(rows, length):
    """Sequence and token of numbered rows, 64-bit."""
    return (rows // length).to(tl.int64), (rows % length).to(tl.int64)


@triton.jit
def rows_of(x, b, t):
    """Pointers to the rows of tokens t of sequences b."""
    start, stride, _ = head_of(x, b, 0)
    return start + t * stride


@triton.jit
def _log1p(y):
    """log(1 + y) of y >= 0 in fp64: what 1 + y rounds away is put back."""
    u = 1.0 + y
    same = (u == 1.0) | (u == float("inf"))
    return tl.where(same, y, tl.log(u) * (y / tl.where(same, 1.0, u - 1.0)))


@triton.jit
def _expm1(x):
    """e^x - 1 in fp64, below the overflow of e^x; put right in the same way."""
    u = tl.exp(x)
    less = u - 1.0
    inner = (u != 1.0) & (less != -1.0)
    ends = tl.where(u == 1.0, x, -1.0)
    return tl.where(inner, less * (x / tl.log(tl.where(inner, u, 2.0))), ends)


@triton.jit(do_not_specialize=["count", "H", "length"])
def log_kernel(sums, bias, real, log_rates, count, H, length, BLOCK: tl.constexpr):
    """log f (B, H, T), fp64, of `forward_kernel`'s sums; -inf where `real`, bool (B, T), is False.

    All contiguous; bias and real may be None.
    """
    n, inside, b, h, t = numbers_of(count, H, length, BLOCK)
    z = tl.load(sums + n, mask=inside, other=0.0).to(tl.float64)
    z += tl.load(sums + count + n, mask=inside, other=0.0).to(tl.float64)
    if bias is not None:
        z += tl.load(bias + h, mask=inside, other=0.0).to(tl.float64)
    softplus = tl.where(z > 0, z, 0.0) + _log1p(tl.exp(-tl.abs(z)))
    log = -_log1p(softplus)
    if real is not None:
        log = tl.where(tl.load(real + b * length + t, mask=inside, other=True), log, -float("inf"))
    tl.store(log_rates + n, log, mask=inside)


@triton.jit(do_not_specialize=["count", "H", "length"])
def dz_kernel(
    dlog,
    dlog_b,
    dlog_h,
    dlog_t,
    log_rates,
    dz,
    count,
    H,
    length,
    BLOCK: tl.constexpr,
):
    """dz = -sigmoid(z) f dlog f, fp32; 0 where a rate is. Contiguous: log_rates, dz (B, H, T)."""
    n, inside, b, h, t = numbers_of(count, H, length, BLOCK)
    log = tl.load(log_rates + n, mask=inside, other=0.0)
    gradient = tl.load(dlog + b * dlog_b + h * dlog_h + t * dlog_t, mask=inside, other=0.0)
    moves = log != -float("inf")
    log = tl.where(moves, log, 0.0)
    slope = tl.exp(log) * _expm1(-_expm1(-log))
    tl.store(dz + n, tl.where(moves, gradient * slope, 0.0).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["C", "H", "WIDTH"])
def weight_kernel(weight, of_c, of_h, by_head, largest, C, H, WIDTH, BLOCK: tl.constexpr):
    """Row of W^T (.., WIDTH) with zeros where W has nothing, and its largest size; a program each.

    W: (C, H) with any strides.
    """
    h = tl.program_id(0).to(tl.int64)
    most = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        c = start + tl.arange(0, BLOCK)
        w = tl.load(weight + c.to(tl.int64) * of_c + h * of_h, mask=(c < C) & (h < H), other=0.0)
        tl.store(by_head + h * WIDTH + c, w, mask=c < WIDTH)
        most = tl.maximum(most, tl.abs(w))
    tl.store(largest + h, tl.max(most, 0))


@triton.jit(do_not_specialize=["rows", "length"])
def forward_kernel(
    x,
    weight,
    largest,
    sums,
    rows,
    length,
    C: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Program (ROWS rows, HEADS heads): x W without the bias, as two numbers (2, B, H, T).

    x: `common.strided` of (B, 1, T, C). Contiguous, fp32: weight (H, C), with zeros up to whole
    steps of GROUPS groups of SIZE columns and to whole programs, and largest, max |W| of its rows.
    """
    WIDTH: tl.constexpr = tl.cdiv(C, GROUPS * SIZE) * GROUPS * SIZE
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, t = _place(n, length)
    real = n < rows
    first = tl.program_id(1) * HEADS
    at = rows_of(x, b, t)[:, None, None]
    columns = tl.arange(0, GROUPS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    weight += first * WIDTH
    of_heads = ()
    for i in tl.static_range(HEADS):
        of_heads += (tl.load(largest + first + i),)
    totals = (tl.zeros((ROWS, GROUPS), tl.float32),) * (2 * HEADS)
    for start in range(0, C, GROUPS * SIZE):
        c = start + columns
        x_tile = tl.load(
            at + c.to(tl.int64)[None, :, :] * x[4],
            mask=real[:, None, None] & (c < C)[None, :, :],
            other=0.0,
        ).to(tl.float32)
        bound = tl.max(tl.abs(x_tile), 2) * (2 * SIZE)
        x_columns = _columns(x_tile)
        added = ()
        for i in tl.static_range(HEADS):
            w = _columns(tl.load(weight + i * WIDTH + c)[None, :, :])
            top = bound * of_heads[i]
            total = top
            rest = tl.zeros((ROWS, GROUPS), tl.float32)
            for j in tl.static_range(SIZE):
                before = total
                total = _fused(x_columns[j], w[j], before)
                rest += _fused(x_columns[j], w[j], before - total)
            added += _add(totals[2 * i], totals[2 * i + 1], total - top, rest)
        totals = added
    for i in tl.static_range(HEADS):
        total, rest = tl.reduce((totals[2 * i], totals[2 * i + 1]), 1, _add)
        to = sums + (b * H + first + i) * length + t
        inside = real & (first + i < H)
        tl.store(to, total, mask=inside)
        tl.store(to + rows.to(tl.int64) * H, rest, mask=inside)


@triton.jit(do_not_specialize=["rows", "length", "per_program"])
def backward_kernel(
    x,
    dz,
    weight,
    dx,
    parts,
    rows,
    length,
    per_program,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (rows, columns): dx there, and what these rows add to dW, in parts (splits, C, H).

    x, dx: `common.strided` of (B, 1, T, C). Contiguous, fp32: dz (B, H, T), weight (H, C).
    """
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    h = tl.arange(0, BLOCK_H)
    w = tl.load(
        weight + h[:, None] * C + c[None, :], mask=(h < H)[:, None] & (c < C)[None, :], other=0.0
    )
    dw = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    start = tl.program_id(0) * per_program
    for first in range(start, min(start + per_program, rows), BLOCK_M):
        n = first + tl.arange(0, BLOCK_M)
        b, t = _place(n, length)
        real = n < rows
        gradients = tl.load(
            dz + (b * H * length + t)[:, None] + h[None, :] * length,
            mask=real[:, None] & (h < H)[None, :],
            other=0.0,
        )
        inside = real[:, None] & (c < C)[None, :]
        at = rows_of(x, b, t)[:, None] + c.to(tl.int64)[None, :] * x[4]
        x_tile = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        dw = tl.dot(tl.trans(x_tile), gradients, dw, input_precision="tf32x3")
        d_tile = tl.dot(gradients, w, input_precision="tf32x3").to(dx[0].dtype.element_ty)
        to = rows_of(dx, b, t)[:, None] + c.to(tl.int64)[None, :] * dx[4]
        tl.store(to, d_tile, mask=inside)
    at = parts + (tl.program_id(0).to(tl.int64) * C + c)[:, None] * H + h[None, :]
    tl.store(at, dw, mask=(c < C)[:, None] & (h < H)[None, :])


def columns(x: Tensor, weight: Tensor) -> Tensor:
    """(x W)^T as two numbers that are to be added, fp32 (2, B, H, T), of checked arguments."""
    batch, length, width = x.shape
    heads, rows = weight.shape[1], batch * length
    size = 16 // x.element_size()  # of a group: what a thread reads at once
    groups = triton.cdiv(heads, HEADS)
    together = triton.cdiv(heads, groups)
    single = {"dtype": torch.float32, "device": x.device}
    padded = triton.cdiv(width, GROUPS * size) * GROUPS * size
    by_head = torch.empty((groups * together, padded), **single)
    largest = torch.empty(groups * together, **single)
    sums = torch.empty((2, batch, heads, length), **single)
    with device_of(x):
        weight_kernel[(len(largest),)](
            weight, *weight.stride(), by_head, largest, width, heads, padded,
            BLOCK=COLUMNS, num_warps=4, **OPTIONS,
        )  # fmt: skip
        forward_kernel[triton.cdiv(rows, ROWS), groups](
            strided(x.unsqueeze(1)), by_head, largest, sums, rows, length,
            C=width, H=heads, HEADS=together, ROWS=ROWS, GROUPS=GROUPS,
            SIZE=size, num_warps=ROWS * GROUPS // 32, num_stages=1,
            # What a sum lost must not be computed as if nothing had been lost.
            enable_fp_fusion=False,
        )  # fmt: skip
    return sums


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, real: Tensor | None) -> Tensor:
    """log f, fp64 (B, H, T), of checked arguments."""
    sums = columns(x, weight)
    _, _, heads, length = sums.shape
    log_rates = torch.empty(sums.shape[1:], dtype=torch.float64, device=x.device)
    bias = None if bias is None else bias.contiguous()
    real = None if real is None else real.contiguous()
    count = log_rates.numel()
    with device_of(x):
        log_kernel[(triton.cdiv(count, NUMBERS),)](
            sums, bias, real, log_rates, count, heads, length, BLOCK=NUMBERS, **OPTIONS
        )
    return log_rates


def through_rates(dlog: Tensor, log_rates: Tensor) -> Tensor:
    """dz, fp32 (B, H, T) contiguous."""
    dz = torch.empty(log_rates.shape, dtype=torch.float32, device=log_rates.device)
    with device_of(dz):
        dz_kernel[(triton.cdiv(dz.numel(), NUMBERS),)](
            dlog, *dlog.stride(), log_rates, dz, dz.numel(), *dz.shape[1:],
            BLOCK=NUMBERS, **OPTIONS,
        )  # fmt: skip
    return dz


def backward(
    dlog: Tensor, x: Tensor, weight: Tensor, log_rates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in x's dtype, contiguous; dW (C, H) and dbias (H) in fp32."""
    batch, length, width = x.shape
    heads, rows = weight.shape[1], batch * length
    dz = through_rates(dlog, log_rates)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    per_program = triton.cdiv(triton.cdiv(rows, SPLITS), BLOCK_M) * BLOCK_M
    splits = triton.cdiv(rows, per_program)
    parts = torch.empty((splits, width, heads), dtype=torch.float32, device=x.device)
    with device_of(x):
        backward_kernel[splits, triton.cdiv(width, BLOCK_C)](
            strided(x.unsqueeze(1)), dz, weight.mT.contiguous(), strided(dx.unsqueeze(1)),
            parts, rows, length, per_program,
            C=width, H=heads, BLOCK_H=max(16, triton.next_power_of_2(heads)),
            BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C, num_warps=4, num_stages=2, **OPTIONS,
        )  # fmt: skip
    return dx, parts.sum(0), dz.sum((0, 2))


@torch.library.custom_op("posenc::log_rates_forward", mutates_args=())
def _forward_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, real: Tensor | None = None
) -> Tensor:
    return forward(x, weight, bias, real)


@torch.library.custom_op("posenc::log_rates_backward", mutates_args=())
def _backward_op(
    dlog: Tensor, x: Tensor, weight: Tensor, log_rates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dlog, x, weight, log_rates)


@_forward_op.register_fake
def _(x, weight, bias, real=None):
    shape = (x.shape[0], weight.shape[1], x.shape[1])
    return torch.empty(shape, dtype=torch.float64, device=x.device)


@_backward_op.register_fake
def _(dlog, x, weight, log_rates):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dw, db = (torch.empty(n, dtype=torch.float32, device=x.device)
              for n in (weight.shape, weight.shape[1:]))  # fmt: skip
    return dx, dw, db


def _save(ctx, inputs, output) -> None:
    x, weight, bias, _ = inputs
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output)


@of_one_output
def _differentiate(ctx, dlog):
    dx, dw, db = _backward_op(dlog, *ctx.saved_tensors)
    return dx, dw, db if ctx.has_bias else None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


@backward_only
def log_rates(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """log f of every token and head; differentiable once, in x, weight and bias.

    Args:
        x: (B, T, C) in bfloat16, float16 or float32, any strides.
        weight: (C, H) in float32. bias: (H) in float32, or None.
        real: bool (B, T), False at padding, where log f is -inf and no phase moves; None if all
            tokens are real.

    Returns:
        (B, H, T) in float64, at most 0.

    Raises:
        ValueError: for other shapes, dtypes or devices.
    """
    require_runnable("log_rates", x)
    fits = x.dim() == 3 and weight.dim() == 2 and x.shape[2] == weight.shape[0]
    if not fits or not x.numel() or not weight.numel():
        raise ValueError(
            "log_rates needs x (B, T, C) and weight (C, H), none of them empty; got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"bias must be {tuple(weight.shape[1:])}; got {tuple(bias.shape)}.")
    for given in (weight,) if bias is None else (weight, bias):
        if given.dtype != torch.float32 or given.device != x.device:
            raise ValueError(
                f"weight and bias must be float32 on {x.device}; got {given.dtype} on "
                f"{given.device}. Convert them first."
            )
    check_real(real, *x.shape[:2], x.device)
    return _forward_op(x, weight, bias, real)


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches that between them use every configuration, for `inspect_sm90`."""
    for dtype in (torch.bfloat16, torch.float32):
        for width, heads in ((768, 12), (768, 1), (100, 5), (4096, 32)):
            x = torch.empty(16, 1024, width, dtype=dtype, device="meta")
            weight = torch.empty(width, heads, device="meta")
            log = torch.empty(16, heads, 1024, dtype=torch.float64, device="meta")
            name = f"{str(dtype).removeprefix('torch.')} C={width} H={heads}"
            real = torch.empty(x.shape[:2], dtype=torch.bool, device="meta")
            yield name, functools.partial(forward, x, weight, weight[0], real)
            yield name, functools.partial(backward, log, x, weight, log)
