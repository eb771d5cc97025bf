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

from posenc.kernels.common import head_of, load_rows, load_tile, store_tile


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
    start,
    stop,
    S,
    shift,
    c,
    MASK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take keys start .. stop - 1 into the sums of dQ / scale of queries m."""
    for first in range(start, stop, BLOCK_N):
        k_tile = load_tile(k, first, S, BLOCK_N, D, BLOCK_D, not MASK)
        v_tile = load_tile(v, first, S, BLOCK_N, D, BLOCK_D, not MASK)
        s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * c
        if MASK:
            n = first + tl.arange(0, BLOCK_N)
            s = tl.where(n[None, :] <= m[:, None] + shift, s, -float("inf"))
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(do, tl.trans(v_tile), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


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
    shift = S - T

    q_tile = load_tile(head_of(q, b, h), first, T, BLOCK_M, D, BLOCK_D)
    do_tile = load_tile(head_of(do, b, h), first, T, BLOCK_M, D, BLOCK_D)
    o_tile = load_tile(head_of(o, b, h), first, T, BLOCK_M, D, BLOCK_D)
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + bh * T + m, row_delta, mask=m < T)
    row_lse = tl.load(lse + bh * T + m, mask=m < T, other=0.0)

    keys, values = head_of(k, b, h // GROUP), head_of(v, b, h // GROUP)
    grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # The keys that the first row of the tile sees, in whole tiles: every row sees them.
    whole = (first + shift + 1) // BLOCK_N * BLOCK_N
    grad = dq_over_keys(
        grad, q_tile, do_tile, row_lse, row_delta, keys, values, m,
        0, whole, S, shift, c, False, D, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    grad = dq_over_keys(
        grad, q_tile, do_tile, row_lse, row_delta, keys, values, m,
        whole, min(S, first + BLOCK_M + shift), S, shift, c, True, D, BLOCK_D, BLOCK_N, PRECISION,
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
    start,
    stop,
    T,
    shift,
    c,
    MASK: tl.constexpr,
    ADD_DQ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take queries start .. stop - 1 of GROUP heads into the sums of one tile of keys.

    `order`, int32 (B, H, T) or None: which row of q comes when.
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
        if MASK:
            s = tl.where(n[:, None] <= m[None, :] + shift, s, -float("inf"))
        p = tl.exp2(s - row_lse[None, :])
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do_tile), input_precision=PRECISION)
        ds = (p * (dp - row_delta[None, :])).to(q_tile.dtype)
        dk = tl.dot(ds, q_tile, dk, input_precision=PRECISION)
        if ADD_DQ:
            share = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
            columns = tl.arange(0, BLOCK_D)
            at = dq_sum + row * D + (m[:, None] * D + columns[None, :])
            tl.atomic_add(at, share, mask=inside[:, None] & (columns < D)[None, :], sem="relaxed")
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
    order, ranks: None, or which rows of q count (see `posenc.kernels.routed`; GROUP is 1).
    """
    tiles = tl.cdiv(S, BLOCK_N)
    # Early keys are seen by the most rows: they start first.
    first = tl.program_id(0) % tiles * BLOCK_N
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    kv_heads = H // GROUP
    b, kv_head = bh // kv_heads, bh % kv_heads
    n = first + tl.arange(0, BLOCK_N)
    shift = S - T

    k_tile = load_tile(head_of(k, b, kv_head), first, S, BLOCK_N, D, BLOCK_D)
    v_tile = load_tile(head_of(v, b, kv_head), first, S, BLOCK_N, D, BLOCK_D)
    k_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # Rows before `start` see no key of the tile; rows from `whole` on see all of them, which no
    # row does where the tile reaches past S.
    start, whole, stop = max(first - shift, 0), max(first + BLOCK_N - 1 - shift, 0), T
    if ranks is not None:
        ranks_of_head = ranks + bh * (T + 1)
        start = tl.load(ranks_of_head + start)
        whole = tl.load(ranks_of_head + min(whole, T))
        stop = tl.load(ranks_of_head + T)
    else:
        start = start // BLOCK_M * BLOCK_M  # contiguous rows load faster where they are aligned
    whole = start + tl.cdiv(whole - start, BLOCK_M) * BLOCK_M
    k_grad, v_grad = dkv_over_queries(
        k_grad, v_grad, k_tile, v_tile, q, do, lse, delta, dq_sum, order,
        b, kv_head * GROUP, H, n, start, min(whole, stop), T, shift, c,
        True, ADD_DQ, GROUP, D, BLOCK_D, BLOCK_M, PRECISION,
    )  # fmt: skip
    k_grad, v_grad = dkv_over_queries(
        k_grad, v_grad, k_tile, v_tile, q, do, lse, delta, dq_sum, order,
        b, kv_head * GROUP, H, n, whole, stop, T, shift, c,
        False, ADD_DQ, GROUP, D, BLOCK_D, BLOCK_M, PRECISION,
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
