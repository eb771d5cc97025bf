"""Phases as integers: 2^64 is one turn, so sums and products wrap modulo a turn by themselves.

    position phase     turns = m * fraction,  fraction = omega / (2 pi) in 2^-64 turns
    cosine and sine    of the upper 32 bits: eighth of a turn by integer, then a polynomial

Integer arithmetic is exact and associative: a phase is the same to the last bit however the
sequence is cut, whatever the device, and its error does not grow with the position. A fraction
comes from a frequency in fp64, so a phase is within 2e-10 rad at a million positions; the fp32
product m * omega is 0.04 rad off there. Dropping the lower word costs 1.5e-9 rad, the fp32 angle
within an eighth of a turn 3e-8 rad, the polynomials 2e-9.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

#: 2^64 / (2 pi), a phase of one radian.
RADIAN = tl.constexpr(2935890503282001226)
#: Radians in 2^-32 and in 2^-64 turns.
UPPER_UNIT = tl.constexpr(2 * math.pi / 2**32)
FULL_UNIT = tl.constexpr(2 * math.pi / 2**64)


def turns_from_radians(radians: Tensor) -> Tensor:
    """Angles in fp64 as int64 turns: phases that kernels add, fractions that they multiply."""
    turns = radians.to(torch.float64) / (2 * math.pi)
    # Half a turn is 2^63, which int64 does not hold: convert half of it, doubling wraps.
    return ((turns - turns.round()) * 2.0**63).to(torch.int64) * 2


def fractions_of(frequencies: Tensor) -> Tensor:
    """What positions are multiplied by: frequencies in fp64 radians as int64 turns, or such turns
    themselves, which a caller of many layers makes once: it takes six launches.

    Raises:
        ValueError: for other dtypes.
    """
    if frequencies.dtype == torch.int64:
        return frequencies
    if frequencies.dtype != torch.float64:
        raise ValueError(
            "frequencies must be radians in float64, or turns in int64 by turns_from_radians; got "
            f"{frequencies.dtype}. Use frequencies.double()."
        )
    return turns_from_radians(frequencies)


def radians_from_turns(turns: Tensor) -> Tensor:
    """int64 turns as fp64 radians in [-pi, pi]."""
    return turns.to(torch.float64) * (2 * math.pi / 2.0**64)


def check_positions(positions: Tensor | None, batch: int, length: int) -> None:
    """ValueError unless positions are None, or int32 or int64 of shape (T,) or (B, T)."""
    if positions is None:
        return
    if positions.shape not in ((length,), (batch, length)):
        raise ValueError(
            f"positions must have shape ({length},) or ({batch}, {length}); "
            f"got {tuple(positions.shape)}."
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions must be integers, int32 or int64; got {positions.dtype}. Use torch.long."
        )


def position_arguments(fractions: Tensor, positions: Tensor | None) -> tuple[Tensor, int, int]:
    """What a kernel takes of positions (T,) or (B, T): the pointer, strides of rows and tokens."""
    if positions is None:
        return fractions, 0, 0  # a stand-in, never read
    return positions, positions.stride(0) if positions.ndim == 2 else 0, positions.stride(-1)


@triton.jit
def upper(turns):
    """The upper word of 64-bit turns, int32."""
    return (turns >> 32).to(tl.int32)


@triton.jit
def turns_from_angle(radians):
    """An fp32 angle as int32 turns, to the precision of fp32."""
    turns = radians * 0.15915494309189535
    # The same guard as above: 31 bits, then doubled.
    return ((turns - tl.floor(turns + 0.5)) * 2147483648.0).to(tl.int32) * 2


@triton.jit
def cos_sin(turns):
    """Cosine and sine of int32 turns, in fp32 and within 1.3e-7.

    Not `tl.cos` and `tl.sin`, whose reduction of large angles costs registers and stack, nor the
    hardware's approximations, four times less exact: the reduction is two integer operations here.
    """
    quarter = (turns + 536870912) >> 30
    x = (turns - (quarter << 30)).to(tl.float32) * UPPER_UNIT  # within +-pi/4
    z = x * x
    sin = x + x * z * (-0.16666650772 + z * (0.0083319786936 - 0.000194956024643 * z))
    tail = 0.0416666455567 + z * (-0.00138873676769 + 2.44384154939e-05 * z)
    cos = 1.0 - 0.5 * z + z * z * tail
    odd = (quarter & 1) != 0
    c = tl.where(odd, sin, cos)
    s = tl.where(odd, cos, sin)
    c = tl.where(((quarter + 1) & 2) != 0, -c, c)
    s = tl.where((quarter & 2) != 0, -s, s)
    return c, s


@triton.jit
def position_turns(
    fractions,
    positions,
    stride_t,
    first,
    length,
    HAS_POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """int32 turns (ROWS, BLOCK_P) from row `first` on; without positions, of the row's index."""
    rows = first + tl.arange(0, ROWS)
    bands = tl.arange(0, BLOCK_P)
    fraction = tl.load(fractions + bands, mask=bands < PAIRS, other=0)
    if HAS_POSITIONS:
        m = tl.load(positions + rows.to(tl.int64) * stride_t, mask=rows < length, other=0)
        m = m.to(tl.int64)
    else:
        m = rows.to(tl.int64)
    return upper(m[:, None] * fraction[None, :])


@triton.jit
def rotate(x1, x2, cos, sin):
    """R(a) on pairs: (x1 cos - x2 sin, x2 cos + x1 sin).

    Fused multiply-adds are explicit: left to the compiler, two kernels might round differently.
    """
    return tl.fma(x1, cos, -(x2 * sin)), tl.fma(x2, cos, x1 * sin)


@triton.jit
def rotate_tile(tile, cos, sin, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """R(a) on an fp32 tile (ROWS, 2 * PAIRS) that is already in registers."""
    if INTERLEAVED:
        x1, x2 = tl.split(tl.reshape(tile, (ROWS, PAIRS, 2)))
    else:
        x1, x2 = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, PAIRS)), (0, 2, 1)))
    y = tl.join(*rotate(x1, x2, cos, sin))
    if not INTERLEAVED:
        y = tl.permute(y, (0, 2, 1))
    return tl.reshape(y, (ROWS, 2 * PAIRS))


@triton.jit
def rotate_rows(
    tile,
    fractions,
    positions,
    stride_t,
    factor,
    first,
    length,
    INVERSE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """factor R(phase) on a tile in registers, in fp32: rows `first` .. of a sequence."""
    turns = position_turns(
        fractions,
        positions,
        stride_t,
        first,
        length,
        HAS_POSITIONS,
        ROWS,
        BLOCK_D // 2,
        BLOCK_D // 2,
    )
    cos, sin = cos_sin(turns)
    cos *= factor
    sin *= -factor if INVERSE else factor
    return rotate_tile(tile.to(tl.float32), cos, sin, INTERLEAVED, ROWS, BLOCK_D // 2)


@triton.jit
def columns_from(matrix, column):
    """A matrix (pointer, stride of rows, stride of columns) without its first columns."""
    return matrix[0] + column * matrix[2], matrix[1], matrix[2]
