"""Which keys a query sees besides causality: a window, the segments of a packed row, padding.

    query m sees key n      lo[m] <= n <= m  and  (real[n] or n == m)         m, n key indices
    lo[m] = max(m - window + 1, first[m])        hi[n] = min(n + window - 1, last[n])

A query sees itself, so no softmax is over nothing. lo and hi, the last query that sees a key, do
not fall along the sequence: the keys of a tile of queries, and the queries of a tile of keys, are
one stretch, and what lies outside is not read. Padding before the first and after the last real
key shortens it further; padding between real keys is masked.

What a mask leaves out is None, a constant of the compiled kernel: causal attention alone pays for
none of this. Functions that have nothing to say of it end without `return`: that is None too, and
triton 3.6 compiles no `return None`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from posenc.kernels.common import any_given

#: Where the running maximum of a row starts that may see none of its first keys: with -inf their
#: weights, exp2(-inf - -inf), would be NaN.
FLOOR = tl.constexpr(-3e38)


class Mask(NamedTuple):
    """What attention leaves out besides the future.

    window: a query sees this many tokens, itself included; at least 1.
    first, last: int32 (B, T), index of the first and of the last token of every token's segment;
        segments are contiguous, so neither falls along T. Only where T = S.
    real: bool (B, S), False for padding. A padded query still sees itself. Its output is of no use,
        but finite; a padded key has gradients from its own query only.
    """

    window: int | None = None
    first: Tensor | None = None
    last: Tensor | None = None
    real: Tensor | None = None


CAUSAL = Mask()


class Arguments(NamedTuple):
    """A mask as kernels take it."""

    window: int | None
    first: Tensor | None  # contiguous
    last: Tensor | None
    real: Tensor | None  # int64 (B, S / 64): a bit a key
    span: Tensor | None  # int32 (B, 2): the first real key, and the one after the last


PLAIN = Arguments(None, None, None, None, None)


def arguments(mask: Mask, key_length: int) -> Arguments:
    """What kernels take of a checked mask; nothing of a window that holds every key."""
    window, first, last, real = mask
    if window is not None and window >= key_length:
        window = None
    words = span = None
    if real is not None:
        keys = torch.arange(key_length, dtype=torch.int32, device=real.device)
        start = keys.where(real, key_length).amin(1)
        span = torch.stack((start, keys.where(real, -1).amax(1) + 1), 1)
        bits = pad(real, (0, -key_length % 64)).unflatten(1, (-1, 64)).long()
        words = (bits << torch.arange(64, device=real.device)).sum(-1)
    if first is not None and last is not None:
        first, last = first.contiguous(), last.contiguous()
    return Arguments(window, first, last, words, span)


def every_part(batch: int, length: int) -> Arguments:
    """All that a mask can hold, on the meta device, for examples."""
    index = torch.empty(batch, length, dtype=torch.int32, device="meta")
    words = torch.empty(batch, triton.cdiv(length, 64), dtype=torch.int64, device="meta")
    return Arguments(255, index, index, words, index[:, :2])


def check_mask(mask: Mask, batch: int, length: int, key_length: int, device: torch.device) -> None:
    """ValueError unless the mask is one of (batch, length) queries and `key_length` keys."""
    if mask.window is not None and mask.window < 1:
        raise ValueError(
            f"window counts the token itself, so is at least 1; got {mask.window}. "
            "Use None for no window."
        )
    if (mask.first is None) != (mask.last is None):
        raise ValueError("segments need both first and last; got one. Pass both, or neither.")
    if mask.first is not None and length != key_length:
        raise ValueError(
            f"segments need as many keys as queries; got T={length}, S={key_length}. "
            "Decode without them: the cache holds one segment a row."
        )
    check_index("first", mask.first, batch, length, device)
    check_index("last", mask.last, batch, length, device)
    check_real(mask.real, batch, key_length, device)


def check_index(
    name: str, index: Tensor | None, batch: int, length: int, device: torch.device
) -> None:
    """ValueError unless an index of tokens is None, or int32 (batch, length) on the device."""
    if index is None:
        return
    if index.shape != (batch, length) or index.dtype != torch.int32 or index.device != device:
        raise ValueError(
            f"{name} must be int32 {(batch, length)} on {device}; got {index.dtype} "
            f"{tuple(index.shape)} on {index.device}."
        )


def check_real(real: Tensor | None, batch: int, length: int, device: torch.device) -> None:
    """ValueError unless `real` is None, or bool (batch, length) on the device."""
    if real is None:
        return
    if real.shape != (batch, length) or real.dtype != torch.bool or real.device != device:
        raise ValueError(
            f"real must be bool {(batch, length)} on {device}; got {real.dtype} "
            f"{tuple(real.shape)} on {real.device}."
        )


@triton.jit
def lowest_seen(mask, b, m, T, shift):
    """lo of rows m of the queries (row 0 is key `shift`), or None where nothing bounds them."""
    lo = None
    if mask.window is not None:
        lo = m + shift - mask.window + 1
    if mask.first is not None:
        own = tl.load(mask.first + b * T + tl.maximum(tl.minimum(m, T - 1), 0))
        lo = own if lo is None else tl.maximum(lo, own)
    if lo is not None:
        return lo


@triton.jit
def highest_seeing(mask, b, n, S):
    """hi of keys n, a key index, or None where nothing bounds the queries that see them."""
    hi = None
    if mask.window is not None:
        hi = n + mask.window - 1
    if mask.last is not None:
        own = tl.load(mask.last + b * S + tl.minimum(n, S - 1))
        hi = own if hi is None else tl.minimum(hi, own)
    if hi is not None:
        return hi


@triton.jit
def real_of(mask, b, S):
    """Where it stands which keys of a sequence are real; None where there is no padding."""
    if mask.real is not None:
        return mask.real + b * tl.cdiv(S, 64)


@triton.jit
def real_keys(real, n, S):
    """Which keys n are real, by `real_of`; None for None."""
    if real is not None:
        word = tl.load(real + n // 64, mask=n < S, other=0)
        return ((word >> (n % 64)) & 1) != 0


@triton.jit
def real_tile(real, first, BLOCK_N: tl.constexpr):
    """`real_keys` of the BLOCK_N <= 64 keys from `first`, a multiple of it, on.

    One word for all threads: a vector of a tile's columns would take 16 registers of each.
    """
    if real is not None:
        word = tl.load(real + first // 64)
        if BLOCK_N < 64:
            word = word >> (first % 64)
        n = tl.arange(0, BLOCK_N)
        half = word.to(tl.int32)
        if BLOCK_N == 64:
            half = tl.where(n < 32, half, (word >> 32).to(tl.int32))
        return ((half >> (n % 32)) & 1) != 0


@triton.jit
def start_of_peak(mask, ROWS: tl.constexpr):
    """The running maxima of a softmax before its first key."""
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    if any_given(mask.window, mask.first, mask.real):
        peak = tl.full([ROWS], FLOOR, tl.float32)
    return peak


@triton.jit
def hide(s, m, n, lo, hi, real, MASK: tl.constexpr):
    """-inf where query m does not see key n; all broadcast against s, lo, hi and real may be None.

    MASK False promises that only padding can hide a key.
    """
    if MASK:
        seen = n <= m
        if lo is not None:
            seen = seen & (n >= lo)
        if hi is not None:
            seen = seen & (m <= hi)
        if real is not None:
            seen = seen & (real | (n == m))
        s = tl.where(seen, s, -float("inf"))
    elif real is not None:
        s = tl.where(real, s, -float("inf"))
    return s


@triton.jit
def along(x, AXIS: tl.constexpr):
    """A vector as a column (AXIS 0) or row (1) of a matrix, None as None."""
    if x is not None:
        return tl.expand_dims(x, 1 - AXIS)


@triton.jit
def key_bounds(mask, b, lowest, highest, T, shift, BLOCK_N: tl.constexpr):
    """The keys of queries between the rows `lowest` and `highest`: begin, inner, until, whole, stop

    None is seen outside begin .. until and whole .. stop. All queries see all keys of inner ..
    until that are real. Whole tiles, except for stop.
    """
    whole = (lowest + shift + 1) // BLOCK_N * BLOCK_N
    if mask.real is not None:
        whole = max(lowest + shift, 0) // BLOCK_N * BLOCK_N  # no query meets itself before
    begin, inner, until = 0, 0, whole
    lo = lowest_seen(mask, b, lowest, T, shift)
    if lo is not None:
        begin = tl.maximum(lo, 0) // BLOCK_N * BLOCK_N
        last = tl.maximum(lowest_seen(mask, b, highest, T, shift), 0)
        inner = tl.minimum(tl.cdiv(last, BLOCK_N) * BLOCK_N, whole)
    if mask.span is not None:
        span = mask.span + 2 * b
        until = tl.minimum(whole, tl.cdiv(tl.load(span + 1), BLOCK_N) * BLOCK_N)
        begin = tl.minimum(tl.maximum(tl.load(span) // BLOCK_N * BLOCK_N, begin), until)
        inner = tl.maximum(tl.minimum(until, inner), begin)
    return begin, inner, until, whole, highest + shift + 1


@triton.jit
def query_bounds(mask, b, first, real, T, S, BLOCK_N: tl.constexpr):
    """The rows of queries that see a tile of keys: start, whole, until, stop.

    None outside start .. stop sees any; those of whole .. until see all of them that are real.
    `real`: `real_keys` of the tile.
    """
    shift = S - T
    start, whole = max(first - shift, 0), max(first + BLOCK_N - 1 - shift, 0)
    until, stop = T, T
    hi = highest_seeing(mask, b, first, S)
    if hi is not None:
        last = highest_seeing(mask, b, min(first + BLOCK_N, S) - 1, S)
        until = tl.maximum(tl.minimum(hi + 1 - shift, T), 0)
        stop = tl.maximum(tl.minimum(last + 1 - shift, T), 0)
    if real is not None:
        whole = max(first + BLOCK_N - shift, 0)  # no query meets itself from there on
        if tl.max(real.to(tl.int32), 0) == 0:
            stop = tl.minimum(stop, whole)
            until = tl.minimum(until, whole)
    return start, whole, until, stop
