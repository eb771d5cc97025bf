"""Biases that the flash core adds to its logits, a tile at a time: T x S is never formed.

    logits[m, n] = scale q[m].k[n] + (c[m] - c[n]) + b[m - n]        n <= m, key indices

    decay    c (B, H, S)    a sum along the tokens that does not rise: FoX (arXiv 2503.02130)
    table    b (H, S)       a number for each distance: ALiBi, T5, KERPLE

c may be at -7e5, where neighbours in fp32 are 0.06 apart: it comes as two fp32 numbers, c = high +
low, subtracted part by part. That takes four operations a pair of tokens, and a tile on the
diagonal spends them. Elsewhere a token r stands between, the first of the queries or the last of
the keys, and

    c[m] - c[n] = (c[m] - c[r]) + (c[r] - c[n])        n <= r <= m

has two terms of one sign: neither is larger than their sum, so that rounding them apart loses
nothing. The first is a number a row, the second one a key.

    dc[t] = sum_n dS[t, n] - sum_m dS[m, t]

A softmax does not see what all keys share: the first sum is 0, but for delta, which is formed of a
rounded output. It has to be added, for gates sum dc over all later tokens: then only pairs count
that a gate stands between, and roundings of all others cancel. In bf16, of 2048 tokens with gates
near 1/2, the gradient of the gates' bias is 0.2% off with it, and 760% without.

b is the same along a diagonal: a tile of it is loaded, element by element, from the few hundred
numbers that it takes, with no index out of the table as that has margins. The gradient is that of
`posenc.kernels.by_distance`.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from posenc.kernels.common import any_given

LOG2E = math.log2(math.e)
#: Zeros at either end of a table: tiles reach a row and a column of tiles beyond what is seen.
MARGIN = tl.constexpr(256)


class Bias(NamedTuple):
    """A bias as kernels take it; parts that it does not have are None."""

    high: Tensor | None = None  # c log2(e) = high + low, contiguous fp32 (B, H, S)
    low: Tensor | None = None
    d_decay: Tensor | None = None  # to which dc is added, contiguous fp32 (B, H, S)
    table: Tensor | None = None  # b log2(e), contiguous fp32 (H, S + 2 MARGIN)


NO_BIAS = Bias()


def bias_arguments(decay: Tensor | None, table: Tensor | None) -> Bias:
    """What kernels take of c and b."""
    high = low = None
    if decay is not None:
        decay = decay.double() * LOG2E
        high = decay.float().contiguous()
        low = (decay - high).float().contiguous()
    if table is not None:
        table = pad((table.double() * LOG2E).float(), (MARGIN.value, MARGIN.value))
    return Bias(high, low, None, table)


@triton.jit
def head_at(b, h, H, S):
    """Where the numbers of a head lie in c and in b, as offsets."""
    return (b * H + h) * S, h * (S + 2 * MARGIN) + MARGIN


@triton.jit
def decay_at(bias, at, n):
    """c of tokens n of a head, in its two parts, or None. at: `head_at`."""
    if bias.high is not None:
        return tl.load(bias.high + at[0] + n), tl.load(bias.low + at[0] + n)


@triton.jit
def as_columns(c):
    """Both parts of a `decay_at` as columns, None for None."""
    if c is not None:
        return c[0][:, None], c[1][:, None]


@triton.jit
def apart(a, b):
    """The difference of two `decay_at`, which broadcast."""
    return (a[0] - b[0]) + (a[1] - b[1])


@triton.jit
def diagonals(bias, at, distance, m, n):
    """b of distance + m - n."""
    return tl.load((bias.table + at[1] + distance) + (m - n))


@triton.jit
def add_bias(
    s,
    c,
    bias,
    at,
    own,
    lowest,
    first,
    S,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """(s c + bias, 1) of KEYS keys from `first` on; (s, c) where there is no bias.

    own: `decay_at` of one token, or of the rows as columns. lowest: key index of the first of the
    rows, which are consecutive. WHOLE promises that all keys exist.
    """
    if any_given(bias.high, bias.table):
        s, within = s * c, tl.arange(0, KEYS)
        if bias.high is not None:
            n = first + within
            if not WHOLE:
                n = tl.minimum(n, S - 1)
            keys = decay_at(bias, at, n)
            s += apart(own, (keys[0][None, :], keys[1][None, :]))
        if bias.table is not None:
            s += diagonals(bias, at, lowest - first, tl.arange(0, ROWS)[:, None], within[None, :])
        c = 1.0
    return s, c


@triton.jit
def add_to_decay(bias, at, n, share, S):
    """Add to dc of tokens n: in the same order in every run, where only one program does."""
    tl.atomic_add(bias.d_decay + at[0] + n, share, mask=n < S, sem="relaxed")
