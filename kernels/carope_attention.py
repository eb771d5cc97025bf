"""Causal attention with CARoPE in one op (arXiv 2507.23083, 2205.14135), forward and backward.

    y = attention(R(phi[m]) q[m], R(phi[n]) k[n], v)        phi as in `posenc.kernels.carope`

Forward, one launch turns q and k together, as the phases cost more than the bytes. Backward, the
owner of a tile of dq or dk turns it back right after it wrote it, while it is still in the cache,
and leaves what it means for the rates; a last small kernel adds what later tokens cause. The one-
kernel backward, whose dq is not complete until it ends, is followed by CARoPE's own.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels import carope, flash
from posenc.kernels.common import (
    backward_only,
    head_of,
    leave_out,
    of_one_output,
    rows_by_head,
    store_tile,
    strided,
)
from posenc.kernels.hooks import Hook
from posenc.kernels.mask import CAUSAL, PLAIN, Arguments, Mask, arguments, every_part
from posenc.kernels.turns import cos_sin, upper


@triton.jit
def store_turned_back(
    tile,
    x,
    b,
    h,
    extra,
    first,
    length,
    OPTIONS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of dq (ADD 0) or dk, turned back; its dlog f and sums of dphi.

    It is written, then taken in the smaller tiles of CARoPE, of which a flash tile holds several.
    ADD: how many heads of q leave their dlog f and sums in `parts`, for the head of k to add.
    """
    # Not by name: of a tuple that gets one, Triton makes numbers of the constants.
    rates, carries, dlog, sums, parts = extra[1], extra[2], extra[3], extra[4], extra[5]
    FIRST_POWER: tl.constexpr = OPTIONS[0]
    SMALL: tl.constexpr = OPTIONS[1]
    BLOCK_P: tl.constexpr = OPTIONS[2]
    HEADS: tl.constexpr = OPTIONS[3]
    GROUP: tl.constexpr = OPTIONS[4]
    ADD: tl.constexpr = OPTIONS[5]
    PAIRS: tl.constexpr = D // 2
    gradient = head_of(x, b, h)
    store_tile(gradient, tile, first, length, ROWS, D, BLOCK_D)
    tl.debug_barrier()
    head, tiles = b * HEADS + h, tl.cdiv(length, SMALL)
    key_head = b * (HEADS // GROUP) + h // GROUP
    bands = tl.arange(0, BLOCK_P)
    inside = bands < PAIRS
    for small in range(first // SMALL, tl.cdiv(min(first + ROWS, length), SMALL)):
        start = small * SMALL
        steps = carope.token_steps(rates, key_head, start, length, FIRST_POWER, SMALL, BLOCK_P)
        at = (key_head * tiles + small) * PAIRS + bands
        carry = tl.load(carries + at, mask=inside, other=0)
        cos, sin = cos_sin(upper(carry[None, :] + tl.cumsum(steps, 0)))
        dx1, dx2, dphi = carope.turn_back(
            head_of(extra[0], b, h), gradient, cos, sin, start, length, PAIRS, SMALL, BLOCK_P
        )
        tl.debug_barrier()  # a thread may overwrite what another reads
        carope.store_pairs(gradient, dx1, dx2, start, length, PAIRS, SMALL, BLOCK_P)
        own, tile_sum = carope.trace(dphi, steps, FIRST_POWER, BLOCK_P)
        rows = start + tl.arange(0, SMALL)
        for member in range(ADD):
            part = head * ADD + member
            own += tl.load(parts[0] + part * length + rows, mask=rows < length, other=0.0)
            at = (part * tiles + small) * PAIRS + bands
            tile_sum += tl.load(parts[1] + at, mask=inside, other=0.0)
        tl.store(dlog + head * length + rows, own, mask=rows < length)
        tl.store(sums + (head * tiles + small) * PAIRS + bands, tile_sum, mask=inside)


def fits(q: Tensor, first_power: int, mask: Arguments = PLAIN) -> bool:
    """Whether flash's tiles are made of whole tiles of CARoPE."""
    rows = carope.blocks(q.shape[-1], first_power)["ROWS"]
    sizes = flash.launch("dq", q, mask)[0].block_m, flash.launch("dkv", q, mask)[0].block_n
    return all(size % rows == 0 for size in sizes)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_rates: Tensor,
    first_power: int,
    scale: float,
    mask: Arguments = PLAIN,
) -> tuple[Tensor, ...]:
    """o and L as `flash.forward`; turned q and k, rates and carries, for the backward pass."""
    q_turned, k_turned, *_, rates, carries = carope.forward(q, k, log_rates, None, first_power)
    o, lse = flash.forward(q_turned, k_turned, v, scale, mask=mask)
    return o, lse, q_turned, k_turned, rates, carries


def backward(
    do: Tensor,
    saved: flash.Saved,
    rates: Tensor,
    carries: Tensor,
    first_power: int,
    scale: float,
    deterministic: bool | None,
    mask: Arguments = PLAIN,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq and dk of q and k before they were turned, dv, and dlog f (B, G, T) in fp32."""
    q, k = saved.q, saved.k
    if not (flash.is_split(deterministic, q.shape[2]) and fits(q, first_power, mask)):
        dq, dk, dv = flash.backward(do, saved, scale, deterministic, mask)
        dq, dk, dlog = carope.backward(dq, dk, q, k, rates, carries, first_power)
        return dq, dk, dv, dlog
    sizes = carope.blocks(q.shape[-1], first_power)
    group = q.shape[1] // k.shape[1]

    def traces(heads: int) -> tuple[Tensor, Tensor]:
        """Uninitialised dlog f and sums of dphi, of so many heads."""
        batch, _, tiles, pairs = carries.shape
        shapes = (batch, heads, q.shape[2]), (batch, heads, tiles, pairs)
        dlog, sums = (torch.empty(x, dtype=torch.float32, device=q.device) for x in shapes)
        return dlog, sums

    def hook(turned: Tensor, left: tuple, group: int, add: int) -> Hook:
        extra = (strided(turned), rates, carries, *left, parts)
        options = (first_power, sizes["ROWS"], sizes["BLOCK_P"], turned.shape[1], group, add)
        return Hook(store_turned_back, extra, options)

    parts = traces(q.shape[1])
    # A head of k that has q's to itself adds in place.
    dlog, sums = parts if group == 1 else traces(k.shape[1])
    of_q, of_k = hook(q, parts, group, 0), hook(k, (dlog, sums), 1, group)
    dq, dk, dv = flash.backward_split(do, saved, scale, of_q, of_k, mask)
    carope.add_later(dlog, sums, rates, sizes)
    return dq, dk, dv, dlog


@torch.library.custom_op("posenc::carope_attention_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_rates: Tensor,
    first_power: int,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mask = arguments(Mask(window, first, last, real), k.shape[2])
    return forward(q, k, v, log_rates, first_power, scale, mask)


@torch.library.custom_op("posenc::carope_attention_backward", mutates_args=())
def _backward_op(
    do: Tensor,
    q_turned: Tensor,
    k_turned: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rates: Tensor,
    carries: Tensor,
    first_power: int,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    saved = flash.Saved(q_turned, k_turned, v, o, lse)
    mask = arguments(Mask(window, first, last, real), v.shape[2])
    return backward(do, saved, rates, carries, first_power, scale, deterministic, mask)


@_forward_op.register_fake
def _(q, k, v, log_rates, first_power, *options):
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    q_turned, k_turned, *_, rates, carries = carope.fake_forward(q, k, log_rates, first_power)
    return rows_by_head(q), lse, q_turned, k_turned, rates, carries


@_backward_op.register_fake
def _(do, q_turned, k_turned, v, o, lse, rates, *options):
    dlog = torch.empty(rates.shape, dtype=torch.float32, device=rates.device)
    return *(rows_by_head(x) for x in (q_turned, k_turned, v)), dlog


def _save(ctx, inputs, output) -> None:
    _, _, v, log_rates, *ctx.options, first, last, real = inputs
    o, lse, q_turned, k_turned, rates, carries = output
    ctx.dtype = log_rates.dtype
    leave_out(ctx, *output[1:])
    ctx.save_for_backward(q_turned, k_turned, v, o, lse, rates, carries, first, last, real)


@of_one_output
def _differentiate(ctx, do):
    *tensors, first, last, real = ctx.saved_tensors
    *grads, dlog = _backward_op(do, *tensors, *ctx.options, first, last, real)
    return *grads, dlog.to(ctx.dtype), *(None,) * 7


_forward_op.register_autograd(_differentiate, setup_context=_save)


@backward_only
def carope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_rates: Tensor,
    *,
    first_power: int = 0,
    scale: float | None = None,
    mask: Mask = CAUSAL,
    deterministic: bool | None = None,
) -> Tensor:
    """Rotate q and k by the running phases of the tokens and attend causally; differentiable once.

    Args:
        q: (B, H, T, D), any strides, in bfloat16, float16 or float32; D even, at most 256.
        k, v: (B, G, T, D), G a divisor of H.
        log_rates, first_power: see `posenc.kernels.carope.carope`.
        scale, mask, deterministic: see `posenc.kernels.flash.flash_attention`. Phases run on
            across segments, for only their differences count.

    Returns:
        (B, H, T, D) in q's dtype.

    Raises:
        ValueError: for other shapes, dtypes or devices.
    """
    flash.check(q, k, v, scale, mask)
    carope.check(q, k, log_rates, None, first_power)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if torch.are_deterministic_algorithms_enabled():
        deterministic = True
    return _forward_op(q, k, v, log_rates, first_power, scale, deterministic, *mask)[0]


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches that between them use every configuration, for `inspect_sm90`."""
    half, single = torch.bfloat16, torch.float32
    plain = [
        (dtype, dim, 12, "", PLAIN)
        for dtype in (half, single)
        for dim in (16, 32, 64, 72, 96, 128, 256)
    ]
    every = every_part(16, 1024)
    more = [(half, 64, 3, " grouped", PLAIN), (half, 64, 12, " masked", every)]
    more += [(half, 64, 3, " grouped masked", every)]
    for dtype, dim, key_heads, kind, mask in [*plain, *more]:
        packed = torch.empty(16, 1024, 12 + 2 * key_heads, dim, dtype=dtype, device="meta")
        q, k, v = packed.transpose(1, 2).split([12, key_heads, key_heads], 1)
        log_rates = torch.empty(16, key_heads, 1024, dtype=torch.float64, device="meta")
        name = f"{str(dtype).removeprefix('torch.')} D={dim}{kind}"
        outputs = carope.fake_forward(q, k, log_rates, 0)
        q_turned, k_turned, *_, rates, carries = outputs
        lse = torch.empty(q.shape[:-1], device="meta")
        saved = flash.Saved(q_turned, k_turned, v, rows_by_head(q), lse)
        if fits(q, 0, mask):
            yield (
                name,
                functools.partial(backward, saved.o, saved, rates, carries, 0, 0.125, True, mask),
            )
