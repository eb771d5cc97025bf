"""CMHA's polar rotation: position plus a learned multiple of each pair's own angle (2505.10222).

    pair i of q: (r, p) = (q_i, q_{i+D/2}),  th = atan2(p, r);  likewise k
    q'[m] = R(psi) q[m],  psi = (delta - 1) th_q + b + m omega        k'[n] the same without b

    (h1, h2) = R(-psi) dq',  u = (r, p) / |(r, p)|,  tan = u1 h2 - u2 h1,  dpsi = r h2 - p h1
    dq = (h1, h2) + (delta - 1) tan (-u2, u1),  ddelta = sum th dpsi (q and k),  db = sum dpsi (q)

At delta = 1, b = 0 this is RoPE bit for bit. No square root in the forward pass, no division by
|q|^2 in the backward pass: at a zero vector u = 0, so all gradients are finite there, and those of
autograd through torch.atan2. Across th = +-pi, q' jumps for non-integer delta: that belongs to the
method.

The position part is an exact integer (see `posenc.kernels.turns`); the content part, fp32, is
added to it as one. ddelta and db are summed by every program over its tile and then over programs
in a fixed order: no atomics, the same bits in every run.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels.common import (
    OPTIONS,
    backward_only,
    device_of,
    head_of,
    load_tile,
    place_of,
    require_runnable,
    store_tile,
    strided,
)
from posenc.kernels.turns import (
    check_positions,
    columns_from,
    cos_sin,
    fractions_of,
    position_arguments,
    position_turns,
    rotate,
    turns_from_angle,
)

NUM_WARPS = 4
#: Pairs of features that a program holds: eight a thread.
TILE = 1024
UNSPECIALIZED = ["position_b", "length", "heads", "tiles"]

PI = tl.constexpr(math.pi)
TAN_EIGHTH = tl.constexpr(math.tan(math.pi / 8))
#: A vector below this size counts as zero: fp32 could not hold its square or its reciprocal.
SMALLEST = tl.constexpr(1e-30)


@triton.jit
def _atan2(y, x):
    """atan2 in fp32 within 4e-7, without libdevice; 0 or pi at zero vectors.

    arctan of the smaller over the larger component, in [0, 1], folded about tan(pi/8) with the same
    single division: arctan s = pi/4 + arctan((s - 1) / (s + 1)).
    """
    ax, ay = tl.abs(x), tl.abs(y)
    large, small = tl.maximum(ax, ay), tl.minimum(ax, ay)
    zero = large < SMALLEST
    large, small = tl.where(zero, 1.0, large), tl.where(zero, 0.0, small)
    steep = small > large * TAN_EIGHTH
    s = tl.where(steep, small - large, small) / tl.where(steep, small + large, large)
    z = s * s
    tail = 0.199985325336 + z * (-0.142429605126 + z * (0.105813965201 - 0.0603300854564 * z))
    angle = s + s * z * (-0.333333194256 + z * tail)
    angle = tl.where(steep, angle + PI / 4, angle)
    angle = tl.where(ay > ax, -angle + PI / 2, angle)
    angle = tl.where(x < 0, -angle + PI, angle)
    # The sign bit, not y < 0: torch.atan2(-0.0, -1.0) is -pi.
    return tl.where(y.to(tl.int32, bitcast=True) < 0, -angle, angle)


@triton.jit
def _direction(x, y):
    """(x, y) / |(x, y)|, and (0, 0) at zero. Scaled first: a square would underflow at 1e-23."""
    large = tl.maximum(tl.abs(x), tl.abs(y))
    scale = tl.where(large < SMALLEST, 0.0, 1.0 / tl.maximum(large, SMALLEST))
    x, y = x * scale, y * scale
    norm = tl.rsqrt(tl.maximum(x * x + y * y, 0.5))  # at least 1 but at zero
    return x * norm, y * norm


@triton.jit
def _load_pairs(x, first, length, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr):
    x1 = load_tile(x, first, length, ROWS, PAIRS, BLOCK_P)
    x2 = load_tile(columns_from(x, PAIRS), first, length, ROWS, PAIRS, BLOCK_P)
    return x1.to(tl.float32), x2.to(tl.float32)


@triton.jit
def _store_pairs(
    x, x1, x2, first, length, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr
):
    store_tile(x, x1, first, length, ROWS, PAIRS, BLOCK_P)
    store_tile(columns_from(x, PAIRS), x2, first, length, ROWS, PAIRS, BLOCK_P)


@triton.jit
def _turn(
    x,
    y,
    shift,
    b,
    turns,
    first,
    length,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """y = R(shift th + b + turns) x."""
    x1, x2 = _load_pairs(x, first, length, PAIRS, ROWS, BLOCK_P)
    content = shift[None, :] * _atan2(x2, x1) + b[None, :]
    cos, sin = cos_sin(turns + turns_from_angle(content))
    y1, y2 = rotate(x1, x2, cos, sin)
    _store_pairs(y, y1, y2, first, length, PAIRS, ROWS, BLOCK_P)


@triton.jit
def _turn_back(
    x,
    dy,
    dx,
    shift,
    b,
    turns,
    first,
    length,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write dx; return the tile's sums of th dpsi and of dpsi, (BLOCK_P,)."""
    x1, x2 = _load_pairs(x, first, length, PAIRS, ROWS, BLOCK_P)
    dy1, dy2 = _load_pairs(dy, first, length, PAIRS, ROWS, BLOCK_P)
    angle = _atan2(x2, x1)
    cos, sin = cos_sin(turns + turns_from_angle(shift[None, :] * angle + b[None, :]))
    h1, h2 = rotate(dy1, dy2, cos, -sin)
    u1, u2 = _direction(x1, x2)
    tangential = shift[None, :] * (u1 * h2 - u2 * h1)
    dx1, dx2 = h1 - tangential * u2, h2 + tangential * u1
    _store_pairs(dx, dx1, dx2, first, length, PAIRS, ROWS, BLOCK_P)
    dpsi = x1 * h2 - x2 * h1
    return tl.sum(angle * dpsi, 0), tl.sum(dpsi, 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q,
    k,
    q_out,
    k_out,
    delta,
    b,
    fractions,
    positions,
    position_b,
    position_t,
    length,
    tiles,
    HAS_POSITIONS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (tile of ROWS tokens of a sequence, head)."""
    tile, head, row = place_of(tiles)
    first = tile * ROWS
    bands = tl.arange(0, BLOCK_P)
    shift = tl.load(delta + head * PAIRS + bands, mask=bands < PAIRS, other=1.0) - 1.0
    offset = tl.load(b + head * PAIRS + bands, mask=bands < PAIRS, other=0.0)
    if HAS_POSITIONS:
        positions += row * position_b
    turns = position_turns(
        fractions, positions, position_t, first, length, HAS_POSITIONS, ROWS, PAIRS, BLOCK_P
    )
    _turn(
        head_of(q, row, head), head_of(q_out, row, head), shift, offset,
        turns, first, length, PAIRS, ROWS, BLOCK_P,
    )  # fmt: skip
    _turn(
        head_of(k, row, head), head_of(k_out, row, head), shift, tl.zeros_like(offset),
        turns, first, length, PAIRS, ROWS, BLOCK_P,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(
    q,
    k,
    dq_out,
    dk_out,
    dq,
    dk,
    partial,
    delta,
    b,
    fractions,
    positions,
    position_b,
    position_t,
    length,
    tiles,
    heads,
    HAS_POSITIONS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (tile of a sequence, head): dq, dk, its row of `partial` (B, tiles, 2, H, D/2)."""
    tile, head, row = place_of(tiles)
    first = tile * ROWS
    bands = tl.arange(0, BLOCK_P)
    shift = tl.load(delta + head * PAIRS + bands, mask=bands < PAIRS, other=1.0) - 1.0
    offset = tl.load(b + head * PAIRS + bands, mask=bands < PAIRS, other=0.0)
    if HAS_POSITIONS:
        positions += row * position_b
    turns = position_turns(
        fractions, positions, position_t, first, length, HAS_POSITIONS, ROWS, PAIRS, BLOCK_P
    )
    q_delta, q_b = _turn_back(
        head_of(q, row, head), head_of(dq_out, row, head), head_of(dq, row, head), shift, offset,
        turns, first, length, PAIRS, ROWS, BLOCK_P,
    )  # fmt: skip
    k_delta, _ = _turn_back(
        head_of(k, row, head), head_of(dk_out, row, head), head_of(dk, row, head), shift,
        tl.zeros_like(offset), turns, first, length, PAIRS, ROWS, BLOCK_P,
    )  # fmt: skip
    at = partial + ((row * tiles + tile) * 2 * heads + head) * PAIRS + bands
    tl.store(at, q_delta + k_delta, mask=bands < PAIRS)
    tl.store(at + heads * PAIRS, q_b, mask=bands < PAIRS)


def blocks(head_dim: int) -> dict[str, int]:
    """The compile-time sizes of the kernels."""
    block = triton.next_power_of_2(head_dim // 2)
    return {"PAIRS": head_dim // 2, "ROWS": max(TILE // block, 1), "BLOCK_P": block}


def forward(
    q: Tensor, k: Tensor, delta: Tensor, b: Tensor, fractions: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rotated q and k."""
    batch, heads, length, head_dim = q.shape
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    sizes = blocks(head_dim)
    tiles = triton.cdiv(length, sizes["ROWS"])
    with device_of(q):
        forward_kernel[tiles * batch, heads](
            strided(q), strided(k), strided(q_out), strided(k_out), delta, b, fractions,
            *position_arguments(fractions, positions), length, tiles,
            HAS_POSITIONS=positions is not None, **sizes, num_warps=NUM_WARPS, **OPTIONS,
        )  # fmt: skip
    return q_out, k_out


def backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    delta: Tensor,
    b: Tensor,
    fractions: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, ddelta, db."""
    batch, heads, length, head_dim = q.shape
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    sizes = blocks(head_dim)
    tiles = triton.cdiv(length, sizes["ROWS"])
    shape = (batch, tiles, 2, heads, head_dim // 2)
    partial = torch.empty(shape, dtype=torch.float32, device=q.device)
    with device_of(q):
        backward_kernel[tiles * batch, heads](
            strided(q), strided(k), strided(dq_out), strided(dk_out), strided(dq), strided(dk),
            partial, delta, b, fractions, *position_arguments(fractions, positions),
            length, tiles, heads,
            HAS_POSITIONS=positions is not None, **sizes, num_warps=NUM_WARPS, **OPTIONS,
        )  # fmt: skip
    ddelta, db = partial[:, :, 0].sum((0, 1)), partial[:, :, 1].sum((0, 1))
    return dq, dk, ddelta, db


@torch.library.custom_op("posenc::polar_forward", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, delta: Tensor, b: Tensor, fractions: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    return forward(q, k, delta, b, fractions, positions)


@torch.library.custom_op("posenc::polar_backward", mutates_args=())
def _backward_op(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    delta: Tensor,
    b: Tensor,
    fractions: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward(dq_out, dk_out, q, k, delta, b, fractions, positions)


@_forward_op.register_fake
def _(q, k, delta, b, fractions, positions):
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )


@_backward_op.register_fake
def _(dq_out, dk_out, q, k, delta, b, fractions, positions):
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(delta),
        torch.empty_like(b),
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dq_out, dk_out):
    return *_backward_op(dq_out, dk_out, *ctx.saved_tensors), None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


@backward_only
def polar(
    q: Tensor,
    k: Tensor,
    delta: Tensor,
    b: Tensor,
    frequencies: Tensor,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by position and by delta - 1 times their own angles; differentiable once.

    Args:
        q, k: (B, H, T, D), any strides, half-split pairs.
        delta, b: (H, D/2) fp32.
        frequencies: (D/2,) on the device of q, fp64 radians a position or int64 turns, see
            `posenc.kernels.turns.fractions_of`.
        positions: integers (T,) or (B, T), below 2^31 in size; None is 0 .. T-1.

    Returns:
        Rotated q and k, contiguous, in their dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    require_runnable("polar", q, k)
    if q.dim() != 4 or k.shape != q.shape or q.shape[3] % 2 or not q.numel():
        raise ValueError(
            "polar needs q and k of one shape (B, H, T, D), D even, and at least one token; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    batch, heads, length, head_dim = q.shape
    bands = (heads, head_dim // 2)
    for name, x in (("delta", delta), ("b", b)):
        if x.shape != bands or x.dtype != torch.float32:
            raise ValueError(f"{name} must be {bands} in float32; got {tuple(x.shape)}, {x.dtype}.")
    if frequencies.shape != bands[1:]:
        raise ValueError(f"frequencies must be {bands[1:]}; got {tuple(frequencies.shape)}.")
    check_positions(positions, batch, length)
    fractions = fractions_of(frequencies)
    return _forward_op(q, k, delta.contiguous(), b.contiguous(), fractions, positions)


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches that between them use every configuration, for `inspect_sm90`."""
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (16, 64, 72, 128, 256):
            packed = torch.empty(16, 1024, 3, 12, dim, dtype=dtype, device="meta")
            q, k, _ = packed.permute(2, 0, 3, 1, 4)
            out = torch.empty(q.shape, dtype=dtype, device="meta")
            bands = torch.empty(12, dim // 2, device="meta")
            fractions = torch.empty(dim // 2, dtype=torch.int64, device="meta")
            positions = torch.empty(16, 1024, dtype=torch.int64, device="meta")
            parameters = (bands, bands, fractions)
            name = f"{str(dtype).removeprefix('torch.')} D={dim}"
            yield name, functools.partial(forward, q, k, *parameters, None)
            yield name, functools.partial(backward, out, out, q, k, *parameters, positions)
