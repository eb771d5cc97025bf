"""Query-dependent relative terms, from columns of distances to columns of keys and back.

    b[i, d] = q[i].R[d] + S[d]         one product for a tile of rows and a block of distances
    bias[i, n] = b[i, m_i - n]         what the logits of row i, at key index m_i, and key n need

The move from (row, distance) to (row, key) shifts every row by another amount, which registers
cannot do cheaply. So it is done by addresses: a program stores b to its own slice of a scratch that
stays in the L2 cache, every element where its key stands, and loads whole tiles of the result after
a barrier. The way back, for the gradient of b, is a store at the distance's place.

Distances beyond the table take its last row. Where a key lies after its query the bias is -inf: it
is the causal mask too.
"""

import triton
import triton.language as tl

from posenc.kernels import common

INTERPRETED = tl.constexpr(common.INTERPRETED)


@triton.jit
def _index(distance, P):
    return tl.minimum(tl.maximum(distance, 0), P - 1)


@triton.jit
def within_table(lowest, tiles, rows, BLOCK: tl.constexpr):
    """Of tiles of BLOCK distances from `lowest` on, those near .. far - 1 have only 0 .. rows - 1.

    Nearly all: those around the diagonal do not, nor those beyond the table.
    """
    near = tl.minimum(tl.maximum(tl.cdiv(-lowest, BLOCK), 0), tiles)
    return near, tl.minimum(tl.maximum((rows - lowest) // BLOCK, near), tiles)


@triton.jit
def tile_of_ends(end, near, far):
    """Which tile the end-th is that `within_table` leaves out: one loop for both sides."""
    return tl.where(end < near, end, end - near + far)


@triton.jit
def load_rows_at(table, distance, P, D: tl.constexpr, BLOCK_D: tl.constexpr, INSIDE: tl.constexpr):
    """The table's rows (BLOCK, BLOCK_D) for distances; INSIDE: all are in 0 .. P - 1."""
    columns = tl.arange(0, BLOCK_D)
    row = distance if INSIDE else _index(distance, P)
    at = table + (row[:, None] * D + columns[None, :])
    return tl.load(at, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def load_offsets(offsets, first, P, BLOCK: tl.constexpr, INSIDE: tl.constexpr):
    """S of the distances first .. first + BLOCK - 1; INSIDE as above."""
    distance = first + tl.arange(0, BLOCK)
    return tl.load(offsets + (distance if INSIDE else _index(distance, P)))


@triton.jit
def saturated(x, dtype: tl.constexpr):
    """x, fp32, in the dtype; what overflows fp16 becomes its largest number, NaN stays."""
    if dtype == tl.float16:
        if INTERPRETED:
            x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)
        else:  # one instruction for two numbers
            x = tl.inline_asm_elementwise(
                "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.float16, True, 2
            )
    return x


@triton.jit
def _sheared(ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Places row (WIDTH + 1) - column of a (ROWS, BLOCK) tile: a row further, a column further on.

    Less ROWS (WIDTH + 1), to be added to the pointer: where the compiler knows an offset to be
    positive it does not see through its extension to 64 bits, and keeps a register for each.
    """
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    return rows * (WIDTH + 1) - columns - ROWS * (WIDTH + 1)


@triton.jit
def store_bias(
    scratch,
    q,
    first_row,
    first_key,
    keys,
    table,
    offsets,
    P,
    c,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    FRUGAL: tl.constexpr = False,
):
    """c times the bias of ROWS rows from index `first_row` on, for `keys` keys from first_key on.

    scratch: (ROWS, WIDTH) of fp16 or fp32; key n goes to column ROWS + n - first_key. What is left
    and right of the keys is overwritten too, ROWS columns each: WIDTH is at least keys + 2 ROWS.
    q: (ROWS, BLOCK_D). table: contiguous (P, D). offsets: contiguous (P,), c S, or None.
    FRUGAL: with fewer registers, and more instructions.
    """
    lowest = first_row - first_key - keys
    tiles = (keys + ROWS) // BLOCK
    near, far = within_table(lowest, tiles, P, BLOCK)
    for tile in tl.range(near, far, disable_licm=FRUGAL):
        _store_block(
            scratch, q, lowest, tile * BLOCK, keys, table, offsets, P, c,
            WIDTH, ROWS, BLOCK, D, BLOCK_D, PRECISION, True,
        )  # fmt: skip
    STAGES: tl.constexpr = 1 if FRUGAL else None
    for end in tl.range(0, near + tiles - far, num_stages=STAGES, disable_licm=True):
        tile = tile_of_ends(end, near, far)
        _store_block(
            scratch, q, lowest, tile * BLOCK, keys, table, offsets, P, c,
            WIDTH, ROWS, BLOCK, D, BLOCK_D, PRECISION, False,
        )  # fmt: skip


@triton.jit
def _store_block(
    scratch,
    q,
    lowest,
    begin,
    keys,
    table,
    offsets,
    P,
    c,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """BLOCK distances of `store_bias`, from lowest + begin on; INSIDE: all are in the table."""
    at, within = _sheared(ROWS, WIDTH, BLOCK), tl.arange(0, BLOCK)
    distance = lowest + begin + within
    r = load_rows_at(table, distance, P, D, BLOCK_D, INSIDE)
    b = tl.dot(q, tl.trans(r), input_precision=PRECISION)
    b *= c
    if offsets is not None:
        b += load_offsets(offsets, lowest + begin, P, BLOCK, INSIDE)[None, :]
    b = saturated(b, scratch.dtype.element_ty)
    if not INSIDE:
        b = tl.where(distance[None, :] >= 0, b, -float("inf"))
    start = scratch + (ROWS * (WIDTH + 2) + keys - begin)
    tl.store(start + at, b)


@triton.jit
def load_columns(scratch, begin, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns begin .. begin + BLOCK - 1 of a scratch (ROWS, WIDTH)."""
    at = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, BLOCK)[None, :]
    return tl.load((scratch + begin) + at)


@triton.jit
def load_bias(scratch, key, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Keys key .. key + BLOCK - 1, counted from the first, of what `store_bias` left, in fp32."""
    return load_columns(scratch, ROWS + key, WIDTH, ROWS, BLOCK).to(tl.float32)


@triton.jit
def clear_ends(scratch, keys, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Zero the places, ROWS columns at either end, that `store_by_distance` may leave out."""
    at = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, ROWS)[None, :]
    zero = tl.zeros([ROWS, ROWS], scratch.dtype.element_ty)
    tl.store(scratch + at, zero)
    tl.store((scratch + keys) + at, zero)


@triton.jit
def store_by_distance(
    scratch, tile, key, keys, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Put the gradients of keys key .. key + BLOCK - 1 of `keys` at their distances' places.

    Column 0 of scratch (ROWS, WIDTH) is the lowest distance of `store_bias`; WIDTH is at least
    keys + ROWS.
    """
    start = scratch + (ROWS * (WIDTH + 1) + keys - key)
    tl.store(start + _sheared(ROWS, WIDTH, BLOCK), tile.to(scratch.dtype.element_ty))
