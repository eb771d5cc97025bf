"""Biases that the flash core adds to its logits, a tile at a time: T x S is never formed.

    logits[m, n] = scale q[m].k[n] + c[m] - c[n]        n <= m, key indices

decay, c (B, H, S): a sum that runs along the tokens and does not rise, as FoX's (arXiv 2503.02130).

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
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)


class Arguments(NamedTuple):
    """A bias as kernels take it."""

    high: Tensor  # c log2(e) = high + low, contiguous fp32 (B, H, S)
    low: Tensor
    d_decay: Tensor | None = None  # to which dc is added, contiguous fp32 (B, H, S)


def arguments(decay: Tensor) -> Arguments:
    """What kernels take of c."""
    decay = decay.double() * LOG2E
    high = decay.float()
    low = (decay - high).float()
    return Arguments(high.contiguous(), low.contiguous())


@triton.jit
def bias_of(bias, b, h, H, S):
    """high, low and d_decay of one head as pointers; None for None."""
    if bias is not None:
        start = (b * H + h) * S
        d_decay = bias.d_decay
        if d_decay is not None:
            d_decay += start
        bias = bias.high + start, bias.low + start, d_decay
    return bias


@triton.jit
def decay_at(here, n):
    """c of tokens n, in its two parts. `here`: `bias_of`."""
    return tl.load(here[0] + n), tl.load(here[1] + n)


@triton.jit
def apart(a, b):
    """The difference of two `decay_at`, which broadcast."""
    return (a[0] - b[0]) + (a[1] - b[1])


@triton.jit
def decay_of_rows(here, m, lowest, T, shift):
    """Of rows m of the queries, the first of them `lowest`: c at `lowest` and at all as columns,
    and what is lost from there to each. None for None.
    """
    base, rows, lost = None, None, None
    if here is not None:
        base = decay_at(here, lowest + shift)
        row = decay_at(here, tl.minimum(m, T - 1) + shift)
        lost = apart(row, base)
        rows = row[0][:, None], row[1][:, None]
    return base, rows, lost


@triton.jit
def add_bias(s, c, here, own, n, S, WHOLE: tl.constexpr):
    """(s c + c[own] - c[n], 1) for keys n along the columns of s; (s, c) where there is no bias.

    own: `decay_at` of one token, or of the rows, as columns. WHOLE promises that all n are tokens.
    """
    if here is not None:
        if not WHOLE:
            n = tl.minimum(n, S - 1)
        keys = decay_at(here, n)
        s = s * c + apart(own, (keys[0][None, :], keys[1][None, :]))
        c = 1.0
    return s, c


@triton.jit
def add_to_decay(here, n, share, S):
    """Add to dc of tokens n: in the same order in every run, where only one program does."""
    tl.atomic_add(here[2] + n, share, mask=n < S, sem="relaxed")
