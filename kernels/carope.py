"""CARoPE: rotation by running phases that the tokens set (arXiv 2507.23083), forward and backward.

    step_i[t] = f[t]^(i + first_power),  f = exp(log_rates), (B, G, T)          i = 0 .. D/2-1
    phi_i[m] = carry_i + sum over t <= m of step_i[t],  modulo one turn
    q'[m] = R(phi[m]) q[m],  k'[n] = R(phi[n]) k[n]

    dphi = q'1 dq'2 - q'2 dq'1 + (the same of k),  dq = R(-phi) dq',  dk = R(-phi) dk'
    dlog f[t] = sum_i (i + first_power) step_i[t] * sum over m >= t of dphi_i[m]

Rates, steps, sums and carries are 64-bit fractions of a turn (see `posenc.kernels.turns`). Sums are
exact, so the phase of a token is the same to the last bit however the sequence is cut into tiles
or chunks: prefill in chunks, decoding and the full pass agree. Its error comes from the steps
alone: at most 2^-56 turns each, 1e-10 rad over a million tokens, where 32-bit steps reach
2e-3 rad and fp32 sums beyond 0.5. That costs little: a power of f is one product of three 32-bit
multiplications more than the one before it, and the additions are two instructions.

The rates belong to the G heads of k; grouped, H / G heads of q turn with each of them. Nothing of
size (B, G, T, D/2) reaches memory. Tiles of tokens are summed, the sums scanned, and
each tile rebuilds its steps and phases; the backward pass scans the tiles' sums of dphi from the
end. There are no atomics: the same bits in every run.
"""

import functools
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
    leave_out,
    load_tile,
    numbers_of,
    place_of,
    require_runnable,
    rows_by_head,
    store_tile,
    strided,
)
from posenc.kernels.turns import FULL_UNIT, RADIAN, columns_from, cos_sin, rotate, upper

#: Pairs of features that a program holds. Few warps, because a scan pays for every warp it crosses:
#: at D = 64 turning 1024 pairs takes 135 instructions a pair with four warps, 112 with two, 81 with
#: one. The backward pass does not fit the registers of one. Twice as many for features in fp32.
TILE = 1024
WARPS = {"sum": 1, "forward": 1, "backward": 2, "later": 1}
#: Forward at 64 pairs a token, in every dtype: 104 instructions a pair where one warp takes 117 and
#: spills at D = 100, four take 125.
WARPS_AT_64 = 2
#: Rates that a program takes from their logarithms.
RATES = 256
#: Tiles that the scan over tiles takes at a time.
SCAN_ROWS = 32
UNSPECIALIZED = ["length", "tiles", "heads"]


@triton.jit(do_not_specialize=["count", "heads", "length"])
def rates_kernel(
    log_rates,
    log_b,
    log_h,
    log_t,
    rates,
    count,
    heads,
    length,
    BLOCK: tl.constexpr,
):
    """`rates_from_log` of BLOCK numbers."""
    n, inside, b, h, t = numbers_of(count, heads, length, BLOCK)
    at = log_rates + b * log_b + h * log_h + t * log_t
    log = tl.load(at, mask=inside, other=0.0).to(tl.float64)
    rate = (tl.exp(log) * 2.0**62).to(tl.int64)
    rate = tl.minimum(tl.maximum(rate, 1), 2**62 - 1) * 4
    tl.store(rates + n, tl.where(log == -float("inf"), 0, rate), mask=inside)


@triton.jit
def _times(a, b):
    """The product of two unsigned 64-bit fractions, at most three units (2^-64) too small."""
    a1, b1 = a >> 32, b >> 32
    a0, b0 = a.to(tl.uint32).to(tl.uint64), b.to(tl.uint32).to(tl.uint64)
    return a1 * b1 + ((a1 * b0) >> 32) + ((a0 * b1) >> 32)


@triton.jit
def token_steps(
    rates,
    head,
    first,
    length,
    FIRST_POWER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Turns, int64 (ROWS, BLOCK_P), of one tile of tokens; 0 past the end and where the rate is 0.

    The eight powers that differ in the low three bits of i are built by doubling, one product
    each, and stay with one thread: the layout in which it holds features.
    """
    rows = first + tl.arange(0, ROWS)
    rate = tl.load(rates + head * length + rows, mask=rows < length, other=0).to(tl.uint64)
    eighths = tl.arange(0, BLOCK_P // 8)[None, :]
    step = tl.full((ROWS, BLOCK_P // 8), RADIAN, tl.uint64)
    if FIRST_POWER == 1:
        step = _times(step, rate[:, None])
    second = _times(rate, rate)
    fourth = _times(second, second)
    power = _times(fourth, fourth)
    for bit in tl.static_range(5):
        if (8 << bit) < BLOCK_P:
            step = tl.where(((eighths >> bit) & 1) != 0, _times(step, power[:, None]), step)
            power = _times(power, power)
    step = tl.join(step, _times(step, fourth[:, None]))
    step = tl.join(step, _times(step, second[:, None, None]))
    step = tl.join(step, _times(step, rate[:, None, None, None]))
    step = tl.reshape(step, (ROWS, BLOCK_P)).to(tl.int64)
    return tl.where((rate != 0)[:, None], step, 0)


@triton.jit
def _exponents(FIRST_POWER: tl.constexpr, BLOCK_P: tl.constexpr):
    return (tl.arange(0, BLOCK_P) + FIRST_POWER).to(tl.float32)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sum_kernel(
    rates,
    sums,
    length,
    tiles,
    FIRST_POWER: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (tile of a sequence, head): how far the tile turns, into sums (B, G, tiles, D/2)."""
    tile, h, b = place_of(tiles)
    head = b * tl.num_programs(1) + h
    steps = token_steps(rates, head, tile * ROWS, length, FIRST_POWER, ROWS, BLOCK_P)
    bands = tl.arange(0, BLOCK_P)
    at = sums + (head * tiles + tile) * PAIRS + bands
    tl.store(at, tl.sum(steps, 0), mask=bands < PAIRS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scan_kernel(
    sums,
    start,
    tiles,
    HAS_START: tl.constexpr,
    REVERSE: tl.constexpr,
    PAIRS: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (head of the batch): sums become the sums of all tiles before (REVERSE: after)."""
    head = tl.program_id(0).to(tl.int64)
    bands = tl.arange(0, BLOCK_P)
    inside = bands < PAIRS
    running = tl.zeros((BLOCK_P,), sums.dtype.element_ty)
    if HAS_START:
        running += tl.load(start + head * PAIRS + bands, mask=inside, other=0)
    for block in range(0, tiles, SCAN):
        rows = block + tl.arange(0, SCAN)
        rows = tiles - 1 - rows if REVERSE else rows
        mask = ((rows >= 0) & (rows < tiles))[:, None] & inside[None, :]
        at = sums + (head * tiles + rows)[:, None] * PAIRS + bands[None, :]
        values = tl.load(at, mask=mask, other=0)
        before = tl.cumsum(values, 0).to(values.dtype) - values
        tl.store(at, before + running[None, :], mask=mask)
        running += tl.sum(values, 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q,
    k,
    q_out,
    k_out,
    rates,
    carries,
    last,
    phases,
    length,
    tiles,
    heads,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    FIRST_POWER: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (tile of a sequence, head of k): turn k and GROUP heads of q.

    The last tile leaves its final phase. KEEP writes the phases of all tokens, int64
    (B, G, T, D/2).
    """
    tile, h, b = place_of(tiles)
    head = b * heads + h
    first = tile * ROWS
    bands = tl.arange(0, BLOCK_P)
    steps = token_steps(rates, head, first, length, FIRST_POWER, ROWS, BLOCK_P)
    carry = tl.load(carries + (head * tiles + tile) * PAIRS + bands, mask=bands < PAIRS, other=0)
    if tile == tiles - 1:
        tl.store(last + head * PAIRS + bands, carry + tl.sum(steps, 0), mask=bands < PAIRS)
    turns = carry[None, :] + tl.cumsum(steps, 0)
    if KEEP:
        rows = first + tl.arange(0, ROWS)
        to = phases + (head * length + rows)[:, None] * PAIRS + bands[None, :]
        tl.store(to, turns, mask=(rows < length)[:, None] & (bands < PAIRS)[None, :])
    cos, sin = cos_sin(upper(turns))
    for member in range(GROUP):
        own = h * GROUP + member
        source, target = head_of(q, b, own), head_of(q_out, b, own)
        _rotate_tile(source, target, cos, sin, first, length, PAIRS, ROWS, BLOCK_P)
    _rotate_tile(
        head_of(k, b, h), head_of(k_out, b, h), cos, sin, first, length, PAIRS, ROWS, BLOCK_P
    )


@triton.jit
def _load_pairs(x, first, length, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr):
    x1 = load_tile(x, first, length, ROWS, PAIRS, BLOCK_P)
    x2 = load_tile(columns_from(x, PAIRS), first, length, ROWS, PAIRS, BLOCK_P)
    return x1.to(tl.float32), x2.to(tl.float32)


@triton.jit
def store_pairs(
    x, x1, x2, first, length, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Write the two halves of the features of a tile."""
    store_tile(x, x1, first, length, ROWS, PAIRS, BLOCK_P)
    store_tile(columns_from(x, PAIRS), x2, first, length, ROWS, PAIRS, BLOCK_P)


@triton.jit
def _rotate_tile(
    x,
    y,
    cos,
    sin,
    first,
    length,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    x1, x2 = _load_pairs(x, first, length, PAIRS, ROWS, BLOCK_P)
    y1, y2 = rotate(x1, x2, cos, sin)
    store_pairs(y, y1, y2, first, length, PAIRS, ROWS, BLOCK_P)


@triton.jit
def turn_back(
    y,
    dy,
    cos,
    sin,
    first,
    length,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The halves of dx = R(-phi) dy, and dphi = y x dy, for which the unrotated x is not kept."""
    y1, y2 = _load_pairs(y, first, length, PAIRS, ROWS, BLOCK_P)
    dy1, dy2 = _load_pairs(dy, first, length, PAIRS, ROWS, BLOCK_P)
    dx1, dx2 = rotate(dy1, dy2, cos, -sin)
    return dx1, dx2, y1 * dy2 - y2 * dy1


@triton.jit
def trace(dphi, steps, FIRST_POWER: tl.constexpr, BLOCK_P: tl.constexpr):
    """What dphi of a tile's tokens cause: dlog f in the tile, and their sum, for all before it."""
    weights = steps.to(tl.float32) * FULL_UNIT * _exponents(FIRST_POWER, BLOCK_P)[None, :]
    return tl.sum(weights * tl.cumsum(dphi, 0, reverse=True), 1), tl.sum(dphi, 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(
    q,
    k,
    dq_out,
    dk_out,
    dq,
    dk,
    rates,
    carries,
    dlog,
    sums,
    length,
    tiles,
    heads,
    GROUP: tl.constexpr,
    FIRST_POWER: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (tile of a sequence, head of k): dk, dq of the GROUP heads that share its phases, and
    dlog f as far as this tile's tokens cause it.

    q, k are the rotated ones. The tile's sums of dphi go to `sums` (B, G, tiles, D/2).
    """
    tile, h, b = place_of(tiles)
    head = b * heads + h
    first = tile * ROWS
    bands = tl.arange(0, BLOCK_P)
    at = (head * tiles + tile) * PAIRS + bands
    steps = token_steps(rates, head, first, length, FIRST_POWER, ROWS, BLOCK_P)
    carry = tl.load(carries + at, mask=bands < PAIRS, other=0)
    cos, sin = cos_sin(upper(carry[None, :] + tl.cumsum(steps, 0)))
    dphi = tl.zeros((ROWS, BLOCK_P), tl.float32)
    for member in range(GROUP):
        own = h * GROUP + member
        turned, gradient = head_of(q, b, own), head_of(dq_out, b, own)
        dq1, dq2, q_dphi = turn_back(
            turned, gradient, cos, sin, first, length, PAIRS, ROWS, BLOCK_P
        )
        store_pairs(head_of(dq, b, own), dq1, dq2, first, length, PAIRS, ROWS, BLOCK_P)
        dphi += q_dphi
    dk1, dk2, k_dphi = turn_back(
        head_of(k, b, h), head_of(dk_out, b, h), cos, sin, first, length, PAIRS, ROWS, BLOCK_P
    )
    store_pairs(head_of(dk, b, h), dk1, dk2, first, length, PAIRS, ROWS, BLOCK_P)
    own, tile_sum = trace(dphi + k_dphi, steps, FIRST_POWER, BLOCK_P)
    tl.store(sums + at, tile_sum, mask=bands < PAIRS)
    rows = first + tl.arange(0, ROWS)
    tl.store(dlog + head * length + rows, own, mask=rows < length)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def later_kernel(
    rates,
    dlog,
    sums,
    length,
    tiles,
    FIRST_POWER: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (tile of a sequence, head): add to dlog f what the tokens after the tile cause."""
    tile, h, b = place_of(tiles)
    head = b * tl.num_programs(1) + h
    first = tile * ROWS
    bands = tl.arange(0, BLOCK_P)
    later = tl.load(sums + (head * tiles + tile) * PAIRS + bands, mask=bands < PAIRS, other=0.0)
    later *= _exponents(FIRST_POWER, BLOCK_P) * FULL_UNIT
    steps = token_steps(rates, head, first, length, FIRST_POWER, ROWS, BLOCK_P)
    rows = first + tl.arange(0, ROWS)
    at = dlog + head * length + rows
    own = tl.load(at, mask=rows < length, other=0.0)
    tl.store(at, own + tl.sum(steps.to(tl.float32) * later[None, :], 1), mask=rows < length)


def blocks(head_dim: int, first_power: int) -> dict[str, int]:
    """The compile-time sizes of the kernels."""
    block = max(8, triton.next_power_of_2(head_dim // 2))
    return {
        "FIRST_POWER": first_power,
        "PAIRS": head_dim // 2,
        "ROWS": TILE // block,
        "BLOCK_P": block,
    }


def _scan(sums: Tensor, start: Tensor | None, reverse: bool) -> None:
    """Replace (B, G, tiles, D/2) sums by those of the tiles before, or after, in place."""
    batch, heads, tiles, pairs = sums.shape
    scan_kernel[(batch * heads,)](
        sums, sums if start is None else start, tiles,
        HAS_START=start is not None, REVERSE=reverse, PAIRS=pairs, SCAN=SCAN_ROWS,
        BLOCK_P=triton.next_power_of_2(pairs), **OPTIONS,
    )  # fmt: skip


def rates_from_log(log_rates: Tensor) -> Tensor:
    """exp(log_rates) as a 64-bit fraction, int64 of the same shape, contiguous.

    Between 2^-62 and 1 - 2^-62; 0, at which kernels do not turn at all, for -inf alone. Taking the
    exponential in fp64 costs one number a token and head; a rate in fp32 would put a million
    tokens 0.03 rad off. An integer has no NaN: that of log f comes through in its gradient alone.
    """
    rates = torch.empty(log_rates.shape, dtype=torch.int64, device=log_rates.device)
    with device_of(rates):
        rates_kernel[(triton.cdiv(rates.numel(), RATES),)](
            log_rates, *log_rates.stride(), rates, rates.numel(), *rates.shape[1:],
            BLOCK=RATES, **OPTIONS,
        )  # fmt: skip
    return rates


def forward(
    q: Tensor,
    k: Tensor,
    log_rates: Tensor,
    carry: Tensor | None,
    first_power: int,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rotated q and k, final carry (B, G, D/2), phases (B, G, T, D/2) if kept, else (0,).

    For the backward pass, rates and tile carries.
    """
    batch, heads, length, head_dim = k.shape
    rates = rates_from_log(log_rates)
    sizes = blocks(head_dim, first_power)
    warps = WARPS["forward"] * (q.element_size() // 2)
    warps = WARPS_AT_64 if sizes["BLOCK_P"] == 64 else warps
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    tiles = triton.cdiv(length, sizes["ROWS"])
    last, carries = _phases(k, tiles)
    phases = _kept(k, keep)
    with device_of(q):
        if tiles == 1 and carry is None:
            carries.zero_()
        elif tiles == 1:
            carries.copy_(carry[:, :, None])
        else:
            sum_kernel[tiles * batch, heads](
                rates, carries, length, tiles, **sizes, num_warps=WARPS["sum"], **OPTIONS
            )
            _scan(carries, carry, reverse=False)
        forward_kernel[tiles * batch, heads](
            strided(q), strided(k), strided(q_out), strided(k_out), rates, carries, last,
            phases, length, tiles, heads,
            KEEP=keep, GROUP=q.shape[1] // heads, **sizes,
            num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return q_out, k_out, last, phases, rates, carries


def backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    rates: Tensor,
    carries: Tensor,
    first_power: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and, in fp32, dlog f (B, G, T)."""
    batch, heads, length, head_dim = k_out.shape
    tiles = carries.shape[2]
    sizes = blocks(head_dim, first_power)
    dq, dk = rows_by_head(q_out), rows_by_head(k_out)
    dlog = torch.empty(rates.shape, dtype=torch.float32, device=rates.device)
    sums = torch.empty(carries.shape, dtype=torch.float32, device=rates.device)
    with device_of(q_out):
        backward_kernel[tiles * batch, heads](
            strided(q_out), strided(k_out), strided(dq_out), strided(dk_out), strided(dq),
            strided(dk), rates, carries, dlog, sums, length, tiles, heads,
            GROUP=q_out.shape[1] // heads, **sizes,
            num_warps=WARPS["backward"] * (q_out.element_size() // 2), **OPTIONS,
        )  # fmt: skip
    add_later(dlog, sums, rates, sizes)
    return dq, dk, dlog


def add_later(dlog: Tensor, sums: Tensor, rates: Tensor, sizes: dict[str, int]) -> None:
    """Add to dlog f what the tokens of later tiles cause; overwrites the tiles' sums of dphi."""
    batch, heads, tiles, _ = sums.shape
    if tiles > 1:
        with device_of(sums):
            _scan(sums, None, reverse=True)
            later_kernel[tiles * batch, heads](
                rates, dlog, sums, rates.shape[2], tiles,
                **sizes, num_warps=WARPS["later"], **OPTIONS,
            )  # fmt: skip


def _phases(k: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """Uninitialised int64 phases after all tokens and before every tile."""
    batch, heads, _, head_dim = k.shape
    shape = (batch, heads, tiles, head_dim // 2)
    carries = torch.empty(shape, dtype=torch.int64, device=k.device)
    return torch.empty_like(carries[:, :, 0]), carries


def _kept(k: Tensor, keep: bool) -> Tensor:
    """Uninitialised int64 phases of all tokens, or nothing."""
    batch, heads, length, head_dim = k.shape
    shape = (batch, heads, length, head_dim // 2) if keep else (0,)
    return torch.empty(shape, dtype=torch.int64, device=k.device)


@torch.library.custom_op("posenc::carope_forward", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, log_rates: Tensor, carry: Tensor | None, first_power: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward(q, k, log_rates, carry, first_power, keep)


@torch.library.custom_op("posenc::carope_backward", mutates_args=())
def _backward_op(
    dq_out: Tensor,
    dk_out: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    rates: Tensor,
    carries: Tensor,
    first_power: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dq_out, dk_out, q_out, k_out, rates, carries, first_power)


def fake_forward(
    q: Tensor, k: Tensor, log_rates: Tensor, first_power: int, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `forward` returns, uninitialised."""
    rows = blocks(k.shape[-1], first_power)["ROWS"]
    last, carries = _phases(k, (k.shape[2] + rows - 1) // rows)
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        last,
        _kept(k, keep),
        torch.empty(log_rates.shape, dtype=torch.int64, device=q.device),
        carries,
    )


@_forward_op.register_fake
def _(q, k, log_rates, carry, first_power, keep):
    return fake_forward(q, k, log_rates, first_power, keep)


@_backward_op.register_fake
def _(dq_out, dk_out, q_out, k_out, rates, carries, first_power):
    dlog = torch.empty(rates.shape, dtype=torch.float32, device=rates.device)
    return rows_by_head(q_out), rows_by_head(k_out), dlog


def _save(ctx, inputs, output) -> None:
    _, _, log_rates, _, ctx.first_power, _ = inputs
    q_out, k_out, *whole = output
    ctx.dtype = log_rates.dtype
    leave_out(ctx, *whole)
    ctx.save_for_backward(q_out, k_out, *whole[-2:])


def _differentiate(ctx, dq_out, dk_out, *_):
    q_out, k_out, *_ = ctx.saved_tensors
    if dq_out is None:  # only one of both goes on to the loss
        dq_out = torch.zeros_like(q_out)
    if dk_out is None:
        dk_out = torch.zeros_like(k_out)
    dq, dk, dlog = _backward_op(dq_out, dk_out, *ctx.saved_tensors, ctx.first_power)
    return dq, dk, dlog.to(ctx.dtype), None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


def check(q: Tensor, k: Tensor, log_rates: Tensor, carry: Tensor | None, first_power: int) -> None:
    """ValueError unless these arguments of `carope` fit together."""
    head_dim = q.shape[-1]
    fits = q.dim() == k.dim() == 4 and q.shape[::2] == k.shape[::2] and k.shape[3] == head_dim
    if not fits or head_dim % 2 or not 2 <= head_dim <= 512:
        raise ValueError(
            "CARoPE needs q (B, H, T, D) and k (B, G, T, D), D even and at most 512; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    batch, heads, length, _ = k.shape
    if not q.numel() or not k.numel():
        raise ValueError(
            f"CARoPE needs at least one token; got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    if q.shape[1] % heads:
        raise ValueError(
            f"the heads of k must divide those of q; got {heads} and {q.shape[1]}. "
            f"Choose k with a divisor of {q.shape[1]} heads."
        )
    if log_rates.shape != k.shape[:3] or log_rates.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"log_rates must be {(batch, heads, length)} in float64 or float32; got "
            f"{tuple(log_rates.shape)} in {log_rates.dtype}."
        )
    start = (batch, heads, head_dim // 2)
    if carry is not None and (carry.shape != start or carry.dtype != torch.int64):
        raise ValueError(
            f"carry must be {start} in int64 turns; got {tuple(carry.shape)} in {carry.dtype}. "
            "Pass the one that the previous call returned."
        )
    if first_power not in (0, 1):
        raise ValueError(f"first_power must be 0 or 1; got {first_power}.")
    require_runnable("carope", q, k)


@backward_only
def carope(
    q: Tensor,
    k: Tensor,
    log_rates: Tensor,
    carry: Tensor | None = None,
    *,
    first_power: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate q and k by the running phases of the tokens; differentiable once.

    Args:
        q: (B, H, T, D), any strides.
        k: (B, G, T, D), G a divisor of H: query head h turns with key head h // (H/G).
        log_rates: log f (B, G, T), at most 0, fp64 or fp32; -inf where the phase stands still, as
            on padding. Taken at its word: rounding log f to fp32 moves a million tokens 0.02 rad.
        carry: (B, G, D/2), int64 turns of 2^-64, the phase before the first token, as an earlier
            call returned it (or `turns_from_radians`); None is 0. No gradient passes through it.
        first_power: 0 or 1, the exponent of the first band.

    Returns:
        Rotated q and k, contiguous, in their dtype, and the carry after the last token.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    check(q, k, log_rates, carry, first_power)
    carry = None if carry is None else carry.contiguous()
    return _forward_op(q, k, log_rates, carry, first_power, False)[:3]


@backward_only
def carope_with_phases(
    q: Tensor,
    k: Tensor,
    log_rates: Tensor,
    carry: Tensor | None = None,
    *,
    first_power: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`carope`, with the phases of all tokens (B, G, T, D/2) in place of the last carry.

    For a cache that can forget any number of tokens: they are int64 turns, like `carry`.
    """
    check(q, k, log_rates, carry, first_power)
    carry = None if carry is None else carry.contiguous()
    q, k, _, phases, *_ = _forward_op(q, k, log_rates, carry, first_power, True)
    return q, k, phases


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches that between them use every configuration, for `inspect_sm90`."""
    for dtype in (torch.bfloat16, torch.float32):
        for dim, key_heads in ((16, 12), (64, 12), (64, 3), (100, 12), (128, 12), (256, 12)):
            packed = torch.empty(16, 1024, 12 + key_heads, dim, dtype=dtype, device="meta")
            q, k = packed.transpose(1, 2).split([12, key_heads], 1)
            log_rates = torch.empty(16, key_heads, 1024, dtype=torch.float64, device="meta")
            name = f"{str(dtype).removeprefix('torch.')} D={dim}" + " grouped" * (key_heads < 12)
            yield name, functools.partial(forward, q, k, log_rates, None, 0)
            yield f"{name} phases", functools.partial(forward, q, k, log_rates, None, 0, True)
            out, turned = (torch.empty(x.shape, dtype=dtype, device="meta") for x in (q, k))
            rates = torch.empty(16, key_heads, 1024, dtype=torch.int64, device="meta")
            _, carries = _phases(k, triton.cdiv(1024, blocks(dim, 0)["ROWS"]))
            yield name, functools.partial(backward, out, turned, out, turned, rates, carries, 0)
