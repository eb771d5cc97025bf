"""The gradient of a table of biases by distance (see `posenc.kernels.bias`): sums of dS along its
diagonals, over queries and sequences.

    db[h, d] = sum_{b, m} dS[b, h, m, m - d]        dS = P * (dP - delta), by `flash_backward`

A program owns the tiles of one head whose queries lie one distance from their keys, those of one
block diagonal. They have the same distances in the same places, so it adds whole tiles up, in
registers, and only their sum is taken apart into diagonals: by a scratch in memory, that is written
row by row and read along them. Two products a tile that the kernels of dq, dk and dv have formed
too, but no atomics, and the same bits in every run; in those kernels every tile would have to be
taken apart.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from posenc.kernels.bias import NO_BIAS, Bias, add_bias, as_columns, decay_at, head_at
from posenc.kernels.common import block_of, device_of, head_of, load_tile, strided, tile_options
from posenc.kernels.mask import PLAIN, Arguments, along, hide, lowest_seen, real_keys, real_of
from posenc.kernels.tiles import config_of

#: As many programs as there are at least, where there is work for them: a few for each processor.
PROGRAMS = 512


class Config(NamedTuple):
    """Queries and keys of a tile, the same number, and how the kernel is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


#: By bytes of an element, and the head dim rounded up to a power of two (at least 32).
CONFIGS = {
    (2, 32): Config(64, 64, 4, 2),
    (2, 64): Config(64, 64, 4, 2),
    (2, 128): Config(64, 64, 8, 2),
    (2, 256): Config(64, 64, 8, 1),
    (4, 32): Config(64, 64, 8, 1),
    (4, 64): Config(64, 64, 8, 1),
    (4, 128): Config(16, 16, 4, 1),
}


@triton.jit
def add_tile(
    sums,
    q,
    k,
    v,
    do,
    lse,
    delta,
    mask,
    bias,
    b,
    h,
    H,
    first,
    first_key,
    T,
    S,
    c,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add dS of the rows from `first` on and the keys from `first_key` on."""
    shift = S - T
    m, n = first + tl.arange(0, BLOCK), first_key + tl.arange(0, BLOCK)
    q_tile = load_tile(head_of(q, b, h), first, T, BLOCK, D, BLOCK_D)
    k_tile = load_tile(head_of(k, b, h // GROUP), first_key, S, BLOCK, D, BLOCK_D)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    head = head_at(b, h, H, S)
    rows = as_columns(decay_at(bias, head, tl.minimum(m, T - 1) + shift))
    s, unit = add_bias(s, c, bias, head, rows, first + shift, first_key, S, BLOCK, BLOCK, False)
    lo = along(lowest_seen(mask, b, m, T, shift), 0)
    real = along(real_keys(real_of(mask, b, S), n, S), 1)
    s = hide(s * unit, (m + shift)[:, None], n[None, :], lo, None, real, True)
    # Rows past the last have no weight.
    row_lse = tl.load(lse + (b * H + h) * T + m, mask=m < T, other=float("inf"))
    row_delta = tl.load(delta + (b * H + h) * T + m, mask=m < T, other=0.0)
    do_tile = load_tile(head_of(do, b, h), first, T, BLOCK, D, BLOCK_D)
    v_tile = load_tile(head_of(v, b, h // GROUP), first_key, S, BLOCK, D, BLOCK_D)
    dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
    return sums + tl.exp2(s - row_lse[:, None]) * (dp - row_delta[:, None])


@triton.jit(do_not_specialize=["shares", "before", "B", "H", "T", "S"])
def by_distance_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    scratch,
    sums,
    mask,
    bias,
    shares,
    before,
    B,
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
    """One share of the tiles of a head's block diagonal, whose corners lie at `distance`.

    sums, fp32 (diagonals, H, shares, 2, BLOCK): those of the distances below and of those from
    `distance` on. scratch, fp32: BLOCK x BLOCK a program. before: of the diagonals, how many lie
    before that of the last keys.
    """
    BLOCK: tl.constexpr = BLOCK_M
    own = tl.program_id(0)
    share, h = own % shares, (own // shares % H).to(tl.int64)
    # Near distances have the most tiles: they start first.
    diagonal = own // (shares * H) - before
    shift = S - T
    distance = diagonal * BLOCK + shift % BLOCK
    start = max(diagonal - shift // BLOCK, 0)
    count = tl.cdiv(T, BLOCK) - start
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for turn in tl.range(share, B * count, shares, disable_licm=True):
        b = (turn // count).to(tl.int64)
        first = (start + turn % count) * BLOCK
        first_key = first + shift - distance
        seen = True
        if mask.first is not None:
            seen = tl.load(mask.first + b * T + first) < first_key + BLOCK
        if seen:
            total = add_tile(
                total, q, k, v, do, lse, delta, mask, bias, b, h, H, first, first_key, T, S, c,
                GROUP, D, BLOCK_D, BLOCK, PRECISION,
            )  # fmt: skip

    row, t = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    scratch += own.to(tl.int64) * (BLOCK * BLOCK)
    tl.store(scratch + (row * BLOCK + t), total)
    tl.debug_barrier()
    # Column t: what lies on diagonal t, and of rows before it on diagonal t - BLOCK.
    sheared = tl.load(scratch + (row * BLOCK + (row - t + BLOCK) % BLOCK))
    sums += own.to(tl.int64) * (2 * BLOCK) + tl.arange(0, BLOCK)
    tl.store(sums, tl.sum(tl.where(row < t, sheared, 0.0), 0))
    tl.store(sums + BLOCK, tl.sum(tl.where(row < t, 0.0, sheared), 0))


def gradient(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    mask: Arguments = PLAIN,
    bias: Bias = NO_BIAS,
) -> Tensor:
    """db, fp32 (H, S), of checked arguments; `delta` as by `flash.delta_of`."""
    batch, heads, length, _ = q.shape
    key_length = k.shape[2]
    key = q.element_size(), max(32, block_of(q))
    config = config_of("by_distance", CONFIGS, key, q.device)
    block, shift = config.block_m, key_length - length
    over = shift % block  # the distance of the corners nearest to 0
    before = int(over > 0)
    tiles = triton.cdiv(length, block)
    reach = key_length if mask.window is None else mask.window
    # The last one's least distance, at the right end of its tiles' first row, is within reach.
    diagonals = before + min(tiles + shift // block, triton.cdiv(reach - over + block - 1, block))
    shares = max(1, min(batch * tiles, triton.cdiv(PROGRAMS, max(1, diagonals * heads))))
    new = {"dtype": torch.float32, "device": q.device}
    sums = torch.empty((diagonals, heads, shares, 2, block), **new)
    scratch = torch.empty((diagonals, heads, shares, block, block), **new)
    with device_of(q):
        by_distance_kernel[(diagonals * heads * shares,)](
            strided(q), strided(k), strided(v), strided(do), lse, delta, scratch, sums, mask, bias,
            shares, before, batch, heads, length, key_length, scale * math.log2(math.e),
            GROUP=heads // k.shape[1], **tile_options(q, config),
        )  # fmt: skip
    low, high = sums.sum(2).permute(2, 1, 0, 3).flatten(2)
    line = pad(low, (0, block)) + pad(high, (block, 0))
    line = line[:, block * (1 + before) - over :][:, :key_length]
    return pad(line, (0, key_length - line.shape[1]))
