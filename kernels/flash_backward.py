"""Backward pass of causal flash attention; `posenc.kernels.flash` holds the forward pass.

With c = scale * log2 e, the saved rows L, and everything T x S rebuilt a tile at a time:

    P = exp2(c Q K^T - L)        dP = dO V^T        delta_m = sum_d O[m,d] dO[m,d]
    dS = P * (dP - delta)        dV = P^T dO        dK = scale dS^T Q        dQ = scale dS K

Two ways through the same tiles:
    split        one kernel owns rows of dQ, another rows of dK and dV. Seven products, no atomics:
                 the same bits in every run.
    one kernel   the owner of rows of dK and dV also adds its share of dQ, in fp32, with atomics.
                 Five products, but dQ is zeroed, added to in no fixed order, and converted.

Q and K are what met in the forward pass; HOOK stores dQ, or dK (see `posenc.kernels.hooks`).
"""

import triton
import triton.language as tl

from posenc.kernels.bias import (
    add_bias,
    add_to_decay,
    apart,
    as_columns,
    decay_at,
    diagonals,
    head_at,
)
from posenc.kernels.common import any_given, head_of, load_rows, load_tile, store_tile
from posenc.kernels.mask import (
    along,
    hide,
    highest_seeing,
    key_bounds,
    lowest_seen,
    query_bounds,
    real_keys,
    real_of,
    real_tile,
)


@triton.jit
def dq_over_keys(
    dq,
    q,
    do,
    lse,
    delta,
    k,
    v,
    m,
    lo,
    real,
    bias,
    head,
    own,
    lowest,
    start,
    stop,
    S,
    c,
    MASK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take keys start .. stop - 1 into the sums of dQ / scale of queries m (`flash.attend_keys`)"""
    for first in range(start, stop, BLOCK_N):
        k_tile = load_tile(k, first, S, BLOCK_N, D, BLOCK_D, not MASK)
        v_tile = load_tile(v, first, S, BLOCK_N, D, BLOCK_D, not MASK)
        s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        n = first + tl.arange(0, BLOCK_N)
        s, unit = add_bias(s, c, bias, head, own, lowest, first, S, BLOCK_M, BLOCK_N, not MASK)
        s = s * unit
        s = hide(s, m, n[None, :], lo, None, along(real_tile(real, first, BLOCK_N), 1), MASK)
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(do, tl.trans(v_tile), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if bias.high is not None:
            add_to_decay(bias, head, m, tl.sum(ds, 1, keep_dims=True), S)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_of_rows(
    q,
    do,
    lse,
    delta,
    k,
    v,
    b,
    m,
    lowest,
    highest,
    mask,
    bias,
    head,
    T,
    S,
    c,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ / scale of a tile q of rows m, between `lowest` and `highest` (`flash.attend`)."""
    shift = S - T
    begin, inner, until, whole, stop = key_bounds(mask, b, lowest, highest, T, shift, BLOCK_N)
    real = real_of(mask, b, S)
    lo = along(lowest_seen(mask, b, m, T, shift), 0)
    at = (m + shift)[:, None]
    base = decay_at(bias, head, lowest + shift)
    row = decay_at(bias, head, tl.minimum(m, T - 1) + shift)
    from_base = lse
    if bias.high is not None:
        from_base = lse - apart(row, base)
    grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if lo is not None:
        grad = dq_over_keys(
            grad, q, do, from_base, delta, k, v, at, lo, real, bias, head, base, lowest + shift,
            begin, inner, S, c, True, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    grad = dq_over_keys(
        grad, q, do, from_base, delta, k, v, at, lo, real, bias, head, base, lowest + shift,
        inner, until, S, c, False, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    return dq_over_keys(
        grad, q, do, lse, delta, k, v, at, lo, real, bias, head, as_columns(row), lowest + shift,
        whole, stop, S, c, True, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["H", "T", "S"])
def dq_kernel(
    q,
    k,
    v,
    o,
    do,
    lse,
    delta,
    dq,
    extra,
    mask,
    bias,
    H,
    T,
    S,
    scale,
    c,
    HOOK: tl.constexpr,
    OPTIONS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of dQ, and on the way the rows of delta, which the kernel of dK and dV reads after it.

    q, k, v, o, do, dq: `common.strided`. lse, delta: contiguous fp32 (B, H, T).
    """
    tiles = tl.cdiv(T, BLOCK_M)
    # Late rows see the most keys: they start first.
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    m = first + tl.arange(0, BLOCK_M)

    q_tile = load_tile(head_of(q, b, h), first, T, BLOCK_M, D, BLOCK_D)
    do_tile = load_tile(head_of(do, b, h), first, T, BLOCK_M, D, BLOCK_D)
    o_tile = load_tile(head_of(o, b, h), first, T, BLOCK_M, D, BLOCK_D)
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + bh * T + m, row_delta, mask=m < T)
    row_lse = tl.load(lse + bh * T + m, mask=m < T, other=0.0)

    keys, values = head_of(k, b, h // GROUP), head_of(v, b, h // GROUP)
    grad = dq_of_rows(
        q_tile, do_tile, row_lse, row_delta, keys, values, b, m, first, min(first + BLOCK_M, T) - 1,
        mask, bias, head_at(b, h, H, S), T, S, c, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    HOOK(grad * scale, dq, b, h, extra, first, T, OPTIONS, BLOCK_M, D, BLOCK_D)


@triton.jit
def dkv_over_queries(
    dk,
    dv,
    k,
    v,
    q,
    do,
    lse,
    delta,
    dq_sum,
    order,
    b,
    h,
    H,
    n,
    hi,
    real,
    bias,
    first_key,
    start,
    stop,
    T,
    S,
    shift,
    c,
    MASK: tl.constexpr,
    ADD_DQ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take queries start .. stop - 1 of GROUP heads into the sums of one tile of keys.

    n, hi, real: columns, the last two may be None (`posenc.kernels.mask`).
    `order`, int32 (B, H, T) or None: which row of q comes when.
    MASK False promises that no query comes before the last of the keys, which are consecutive from
    `first_key` on.
    """
    # One loop over the tiles of all GROUP heads: a loop in a loop takes up to 60 registers more,
    # which grouped heads do not have.
    tiles = tl.cdiv(max(stop - start, 0), BLOCK_M)
    for turn in range(GROUP * tiles):
        if GROUP == 1:
            head, first = h, start + turn * BLOCK_M
        else:
            head, first = h + turn // tiles, start + turn % tiles * BLOCK_M
        row = (b * H + head) * T
        m = first + tl.arange(0, BLOCK_M)
        inside = m < stop
        if order is None:
            q_tile = load_tile(head_of(q, b, head), first, stop, BLOCK_M, D, BLOCK_D)
            do_tile = load_tile(head_of(do, b, head), first, stop, BLOCK_M, D, BLOCK_D)
        else:
            m = tl.load(order + row + m, mask=inside, other=0)
            q_tile = load_rows(head_of(q, b, head), m, inside, D, BLOCK_D)
            do_tile = load_rows(head_of(do, b, head), m, inside, D, BLOCK_D)
        row_lse = tl.load(lse + row + m, mask=inside, other=0.0)
        row_delta = tl.load(delta + row + m, mask=inside, other=0.0)
        # Keys x queries: P^T and dS^T are then the left operands of dV and dK, and stay in
        # registers.
        s = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION) * c
        there = head_at(b, head, H, S)
        if bias.high is not None:
            rows = decay_at(bias, there, tl.minimum(m, T - 1) + shift)
            keys = decay_at(bias, there, tl.minimum(n, S - 1))
            if MASK:
                s += apart((rows[0][None, :], rows[1][None, :]), keys)
            else:
                base = decay_at(bias, there, min(first_key + BLOCK_N, S) - 1)
                s += apart(base, keys)
                row_lse -= apart(rows, base)
        if bias.table is not None:
            keys, queries = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_M)[None, :]
            s += diagonals(bias, there, first + shift - first_key, queries, keys)
        if any_given(bias.high, bias.table):
            # Rows past the last have no weight: 2^s may overflow, and meets a gradient of 0.
            row_lse = tl.where(inside, row_lse, float("inf"))
        s = hide(s, (m + shift)[None, :], n, None, hi, real, MASK)
        p = tl.exp2(s - row_lse[None, :])
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do_tile), input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        if bias.high is not None:
            add_to_decay(bias, there, n, -tl.sum(ds, 1, keep_dims=True), S)
            if ADD_DQ:
                add_to_decay(bias, there, m + shift, tl.sum(ds, 0), S)
        ds = ds.to(q_tile.dtype)
        dk = tl.dot(ds, q_tile, dk, input_precision=PRECISION)
        if ADD_DQ:
            share = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
            columns = tl.arange(0, BLOCK_D)
            at = dq_sum + row * D + (m[:, None] * D + columns[None, :])
            tl.atomic_add(at, share, mask=inside[:, None] & (columns < D)[None, :], sem="relaxed")
    return dk, dv


@triton.jit
def dkv_of_keys(
    dk,
    dv,
    k,
    v,
    q,
    do,
    lse,
    delta,
    dq_sum,
    order,
    ranks,
    b,
    h,
    H,
    first,
    mask,
    bias,
    T,
    S,
    c,
    ADD_DQ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take all that heads h .. h + GROUP - 1 see of the keys from `first` on into their sums.

    `ranks`, int32 (B, H, T + 1) or None: how many of the rows before each are in `order`.
    """
    shift = S - T
    n = first + tl.arange(0, BLOCK_N)
    real = real_keys(real_of(mask, b, S), n, S)
    start, whole, until, stop = query_bounds(mask, b, first, real, T, S, BLOCK_N)
    hi = along(highest_seeing(mask, b, n, S), 0)
    real = along(real, 0)
    n = n[:, None]
    if ranks is not None:
        ranks_of_head = ranks + (b * H + h) * (T + 1)
        start = tl.load(ranks_of_head + start)
        whole = tl.load(ranks_of_head + min(whole, T))
        until = tl.load(ranks_of_head + until)
        stop = tl.load(ranks_of_head + stop)
    else:
        start = start // BLOCK_M * BLOCK_M  # contiguous rows load faster where they are aligned
    whole = start + tl.cdiv(whole - start, BLOCK_M) * BLOCK_M
    until = stop if hi is None else whole + max(until - whole, 0) // BLOCK_M * BLOCK_M
    dk, dv = dkv_over_queries(
        dk, dv, k, v, q, do, lse, delta, dq_sum, order, b, h, H, n, hi, real,
        bias, first, start, min(whole, stop), T, S, shift, c,
        True, ADD_DQ, GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    dk, dv = dkv_over_queries(
        dk, dv, k, v, q, do, lse, delta, dq_sum, order, b, h, H, n, hi, real,
        bias, first, whole, until, T, S, shift, c,
        False, ADD_DQ, GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    if hi is not None:
        dk, dv = dkv_over_queries(
            dk, dv, k, v, q, do, lse, delta, dq_sum, order, b, h, H, n, hi, real,
            bias, first, until, stop, T, S, shift, c,
            True, ADD_DQ, GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=["H", "T", "S"])
def dkv_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    dq_sum,
    order,
    ranks,
    extra,
    mask,
    bias,
    H,
    T,
    S,
    scale,
    c,
    HOOK: tl.constexpr,
    OPTIONS: tl.constexpr,
    ADD_DQ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of dK and dV, summed in order over the GROUP query heads that share them.

    ADD_DQ adds dQ / scale to dq_sum, contiguous fp32 (B, H, T, D); else dq_sum is not touched.
    order, ranks: None, or which rows of q count (see `posenc.kernels.routed`).
    """
    tiles = tl.cdiv(S, BLOCK_N)
    # Early keys are seen by the most rows: they start first.
    first = tl.program_id(0) % tiles * BLOCK_N
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    kv_heads = H // GROUP
    b, kv_head = bh // kv_heads, bh % kv_heads

    k_tile = load_tile(head_of(k, b, kv_head), first, S, BLOCK_N, D, BLOCK_D)
    v_tile = load_tile(head_of(v, b, kv_head), first, S, BLOCK_N, D, BLOCK_D)
    k_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if ranks is None or GROUP == 1:
        k_grad, v_grad = dkv_of_keys(
            k_grad, v_grad, k_tile, v_tile, q, do, lse, delta, dq_sum, order, ranks,
            b, kv_head * GROUP, H, first, mask, bias, T, S, c,
            ADD_DQ, GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    else:
        # Other rows count for every head.
        for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
            k_grad, v_grad = dkv_of_keys(
                k_grad, v_grad, k_tile, v_tile, q, do, lse, delta, dq_sum, order, ranks,
                b, head, H, first, mask, bias, T, S, c,
                ADD_DQ, 1, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
    # dV first: its registers are then free for the hook.
    store_tile(head_of(dv, b, kv_head), v_grad, first, S, BLOCK_N, D, BLOCK_D)
    HOOK(k_grad * scale, dk, b, kv_head, extra, first, S, OPTIONS, BLOCK_N, D, BLOCK_D)


@triton.jit(do_not_specialize=["H", "T"])
def delta_kernel(
    o,
    do,
    delta,
    H,
    T,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta alone, for the one-kernel backward."""
    tiles = tl.cdiv(T, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    m = first + tl.arange(0, BLOCK_M)
    o_tile = load_tile(head_of(o, b, h), first, T, BLOCK_M, D, BLOCK_D)
    do_tile = load_tile(head_of(do, b, h), first, T, BLOCK_M, D, BLOCK_D)
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + bh * T + m, row_delta, mask=m < T)


@triton.jit(do_not_specialize=["H", "T"])
def scale_kernel(
    x,
    y,
    H,
    T,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """y = scale x, both `common.strided`: the sums of the one-kernel backward as dQ."""
    tiles = tl.cdiv(T, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    tile = load_tile(head_of(x, b, h), first, T, BLOCK_M, D, BLOCK_D)
    store_tile(head_of(y, b, h), tile * scale, first, T, BLOCK_M, D, BLOCK_D)
