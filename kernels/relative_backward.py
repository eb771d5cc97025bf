"""Backward pass of attention with a relative term; `posenc.kernels.relative` holds the forward.

With dS = P * (dP - delta) as in `posenc.kernels.flash_backward` and dB[m,d] = dS[m, m-d]:

    dq = scale (dS K + dB R)            dR[d] = scale sum_{b,m} dB[m,d] (q[m] + v_h)
    dk = scale dS^T (q + u)             dS_d  = scale sum_{b,m} dB[m,d]
    dv = P^T dO                         dv_h  = sum_d dS_d R[d],  du = sum_{b,m} dq - dv_h

Eleven products in two kernels: one owns rows of dq, turns dS by its scratch into dB, and adds to dR
and dS_d; the other owns rows of dk and dv and forms the bias anew.
"""

import triton
import triton.language as tl

from posenc.kernels.common import any_given, head_of, load_tile, store_tile
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
from posenc.kernels.skew import (
    clear_ends,
    load_bias,
    load_columns,
    load_rows_at,
    store_bias,
    store_by_distance,
    tile_of_ends,
    within_table,
)


@triton.jit(do_not_specialize=["share", "H", "B", "T", "S", "P"])
def dq_kernel(
    content,
    relative,
    k,
    v,
    table,
    offsets,
    do,
    lse,
    delta,
    dq,
    d_table,
    d_offsets,
    share,
    scratch,
    by_distance,
    mask,
    B,
    H,
    T,
    S,
    P,
    scale,
    c,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of dq; dR / scale and dS_d / scale, one row for each of S distances.

    Program (share, head) takes the head's tiles of every sequence, share .. by the number of
    shares. d_table and d_offsets, fp32 (H, S, D) and (H, S), of all programs if `share` is 0; if it
    is H those of (shares, H, S, ..) that only this program adds to. They are added to without being
    read: between two additions of one program to one number lies a barrier, so that their order,
    and hence the sum of a program's own, is the same in every run. scratch and by_distance:
    (BLOCK_M, SEGMENT + 2 BLOCK_M) a program; dB is in q's dtype, whose range gradients need.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    shift = S - T
    h = tl.program_id(1).to(tl.int64)
    shares = tl.num_programs(0)
    # One width for biases and gradients: the addresses of their stores are then the same.
    WIDTH: tl.constexpr = SEGMENT + 2 * BLOCK_M
    MASK: tl.constexpr = any_given(mask.window, mask.first, mask.real)
    # At the widest heads what the compiler would hoist out of loops, and hold, spills.
    FRUGAL: tl.constexpr = BLOCK_D > 64 or MASK
    STAGES: tl.constexpr = 1 if FRUGAL else None
    slot = (tl.program_id(0).to(tl.int64) * H + h) * (BLOCK_M * WIDTH)
    scratch += slot
    by_distance += slot
    rows_of_table = table + h * P * D
    offsets_of_head = offsets
    if offsets is not None:
        offsets_of_head = offsets + h * P
    own = h + tl.program_id(0).to(tl.int64) * share
    d_table += own * S * D
    d_offsets += own * S
    for turn in range(tl.program_id(0), B * tiles, shares):
        # Every other round backwards: a share then gets early and late rows alike.
        lap = turn // shares
        place = turn
        if lap % 2 == 1:
            place = min((lap + 1) * shares, B * tiles) - 1 - turn % shares
        first = (tiles - 1 - place % tiles) * BLOCK_M
        b = (place // tiles).to(tl.int64)
        bh = b * H + h
        m = first + tl.arange(0, BLOCK_M)
        q = load_tile(head_of(content, b, h), first, T, BLOCK_M, D, BLOCK_D)
        r = load_tile(head_of(relative, b, h), first, T, BLOCK_M, D, BLOCK_D)
        do_tile = load_tile(head_of(do, b, h), first, T, BLOCK_M, D, BLOCK_D)
        row_delta = tl.load(delta + bh * T + m, mask=m < T, other=0.0)
        # Rows past the last have P = 0, so that they add nothing to dR.
        row_lse = tl.load(lse + bh * T + m, mask=m < T, other=float("inf"))
        keys, values = head_of(k, b, h // GROUP), head_of(v, b, h // GROUP)
        grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        start, _, _, _, stop = key_bounds(
            mask, b, first, min(first + BLOCK_M, T) - 1, T, shift, BLOCK_N
        )
        lo = along(lowest_seen(mask, b, m, T, shift), 0)
        real = real_of(mask, b, S)
        for begin in tl.range(start, stop, SEGMENT, disable_licm=True):
            count = tl.cdiv(min(stop - begin, SEGMENT), BLOCK_N) * BLOCK_N
            store_bias(
                scratch, r, first + shift, begin, count, rows_of_table, offsets_of_head, P, c,
                WIDTH, BLOCK_M, BLOCK, D, BLOCK_D, PRECISION, FRUGAL,
            )  # fmt: skip
            clear_ends(by_distance, count, WIDTH, BLOCK_M)
            tl.debug_barrier()
            for at in tl.range(0, count, BLOCK_N, disable_licm=FRUGAL):
                k_tile = load_tile(keys, begin + at, S, BLOCK_N, D, BLOCK_D)
                v_tile = load_tile(values, begin + at, S, BLOCK_N, D, BLOCK_D)
                s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
                s = s * c + load_bias(scratch, at, WIDTH, BLOCK_M, BLOCK_N)
                n = begin + at + tl.arange(0, BLOCK_N)[None, :]
                real_here = along(real_tile(real, begin + at, BLOCK_N), 1)
                s = hide(s, (m + shift)[:, None], n, lo, None, real_here, MASK)
                p = tl.exp2(s - row_lse[:, None])
                dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
                ds = (p * (dp - row_delta[:, None])).to(k_tile.dtype)
                grad = tl.dot(ds, k_tile, grad, input_precision=PRECISION)
                store_by_distance(by_distance, ds, at, count, WIDTH, BLOCK_M, BLOCK_N)
            tl.debug_barrier()
            lowest = first + shift - begin - count
            blocks = (count + BLOCK_M) // BLOCK
            near, far = within_table(lowest, blocks, tl.minimum(P, S), BLOCK)
            for tile in tl.range(near, far, num_stages=STAGES, disable_licm=FRUGAL):
                grad = _take_distances(
                    grad, by_distance, r, lowest, tile * BLOCK, rows_of_table, d_table, d_offsets,
                    P, S, WIDTH, BLOCK_M, BLOCK, D, BLOCK_D, PRECISION, True,
                )  # fmt: skip
            for end in tl.range(0, near + blocks - far, num_stages=STAGES, disable_licm=True):
                tile = tile_of_ends(end, near, far)
                grad = _take_distances(
                    grad, by_distance, r, lowest, tile * BLOCK, rows_of_table, d_table, d_offsets,
                    P, S, WIDTH, BLOCK_M, BLOCK, D, BLOCK_D, PRECISION, False,
                )  # fmt: skip
            tl.debug_barrier()
        store_tile(head_of(dq, b, h), grad * scale, first, T, BLOCK_M, D, BLOCK_D)


@triton.jit
def _take_distances(
    grad,
    by_distance,
    r,
    lowest,
    at,
    table,
    d_table,
    d_offsets,
    P,
    S,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """Add what dB of the distances from lowest + at on gives dq, dR and dS_d.

    INSIDE promises that they are all of 0 .. min(P, S) - 1.
    """
    columns, within = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK)
    distance = lowest + at + within
    table_rows = load_rows_at(table, distance, P, D, BLOCK_D, INSIDE)
    db = load_columns(by_distance, at, WIDTH, BLOCK_M, BLOCK)
    grad = tl.dot(db, table_rows, grad, input_precision=PRECISION)
    d_row = tl.dot(tl.trans(db), r, input_precision=PRECISION)
    if db.dtype == tl.float32:
        d_offset = tl.sum(db, 0)
    else:  # as a product: sums over rows are spread over threads and warps
        ones = tl.full([BLOCK_M, 16], 1.0, db.dtype)
        d_offset = tl.max(tl.dot(tl.trans(db), ones, input_precision=PRECISION), 1)
    to = (d_table + (lowest + at) * D) + (within[:, None] * D + columns[None, :])
    to_offset = (d_offsets + (lowest + at)) + within
    inside = None
    there = None
    if not INSIDE:
        inside = (distance >= 0) & (distance < S)
        there = inside[:, None] & (columns < D)[None, :]
    elif BLOCK_D > D:
        there = (columns < D)[None, :]
    tl.atomic_add(to, d_row, mask=there, sem="relaxed")
    tl.atomic_add(to_offset, d_offset, mask=inside, sem="relaxed")
    return grad


@triton.jit(do_not_specialize=["work", "H", "T", "S", "P"])
def dkv_kernel(
    content,
    relative,
    k,
    v,
    table,
    offsets,
    do,
    lse,
    delta,
    dk,
    dv,
    counter,
    scratch,
    mask,
    work,
    H,
    T,
    S,
    P,
    scale,
    c,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of dk and dv, summed in order over the GROUP query heads that share them."""
    tiles = tl.cdiv(S, BLOCK_N)
    shift = S - T
    WIDTH: tl.constexpr = BLOCK_N + 2 * BLOCK_M
    MASK: tl.constexpr = any_given(mask.window, mask.first, mask.real)
    FRUGAL: tl.constexpr = MASK
    kv_heads = H // GROUP
    scratch += tl.program_id(0).to(tl.int64) * (SEGMENT * WIDTH)
    turn = tl.atomic_add(counter, 1)
    while turn < work:
        # Early keys are seen by the most rows: they are drawn first.
        first = turn % tiles * BLOCK_N
        bh = (turn // tiles).to(tl.int64)
        b, kv_head = bh // kv_heads, bh % kv_heads
        k_tile = load_tile(head_of(k, b, kv_head), first, S, BLOCK_N, D, BLOCK_D)
        v_tile = load_tile(head_of(v, b, kv_head), first, S, BLOCK_N, D, BLOCK_D)
        k_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        v_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        n = first + tl.arange(0, BLOCK_N)
        real = real_keys(real_of(mask, b, S), n, S)
        start, _, _, stop = query_bounds(mask, b, first, real, T, S, BLOCK_N)
        start = start // BLOCK_M * BLOCK_M
        hi = along(highest_seeing(mask, b, n, S), 0)
        real = along(real, 0)
        n = n[:, None]
        for member in range(GROUP):
            h = kv_head * GROUP + member
            on_keys, on_table = head_of(content, b, h), head_of(relative, b, h)
            outer = head_of(do, b, h)
            rows_of_table = table + h * P * D
            offsets_of_head = offsets
            if offsets is not None:
                offsets_of_head = offsets + h * P
            of_head = (b * H + h) * T
            for begin in tl.range(start, stop, SEGMENT, disable_licm=True):
                end = min(stop, begin + SEGMENT)
                for row in range(begin, end, BLOCK_M):
                    r = load_tile(on_table, row, T, BLOCK_M, D, BLOCK_D)
                    store_bias(
                        scratch + (row - begin) * WIDTH, r, row + shift, first, BLOCK_N,
                        rows_of_table, offsets_of_head, P, c,
                        WIDTH, BLOCK_M, BLOCK, D, BLOCK_D, PRECISION, FRUGAL,
                    )  # fmt: skip
                tl.debug_barrier()
                for row in range(begin, end, BLOCK_M):
                    m = row + tl.arange(0, BLOCK_M)
                    q = load_tile(on_keys, row, T, BLOCK_M, D, BLOCK_D)
                    do_tile = load_tile(outer, row, T, BLOCK_M, D, BLOCK_D)
                    row_lse = tl.load(lse + of_head + m, mask=m < T, other=float("inf"))
                    row_delta = tl.load(delta + of_head + m, mask=m < T, other=0.0)
                    s = tl.dot(k_tile, tl.trans(q), input_precision=PRECISION)
                    s = s * c + tl.trans(
                        load_bias(scratch + (row - begin) * WIDTH, 0, WIDTH, BLOCK_M, BLOCK_N)
                    )
                    s = hide(s, (m + shift)[None, :], n, None, hi, real, MASK)
                    p = tl.exp2(s - row_lse[None, :])
                    v_grad = tl.dot(p.to(do_tile.dtype), do_tile, v_grad, input_precision=PRECISION)
                    dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
                    ds = (p * (dp - row_delta[None, :])).to(q.dtype)
                    k_grad = tl.dot(ds, q, k_grad, input_precision=PRECISION)
                tl.debug_barrier()
        store_tile(head_of(dv, b, kv_head), v_grad, first, S, BLOCK_N, D, BLOCK_D)
        store_tile(head_of(dk, b, kv_head), k_grad * scale, first, S, BLOCK_N, D, BLOCK_D)
        turn = tl.atomic_add(counter, 1)
