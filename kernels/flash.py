"""Causal softmax attention in one pass over the keys, forward and backward (2205.14135).

    s[m,n] = scale q[m].k[n]        n <= S - T + m
    o[m] = sum_n exp2(c q[m].k[n] - L[m]) v[n]        c = scale log2 e
    L[m] = log2 sum_n exp2(c q[m].k[n])

q (B, H, T, D), k and v (B, G, S, D) with T <= S and G a divisor of H: query row i sits at key index
S - T + i, query head h reads key head h // (H/G). L, fp32 (B, H, T), is all the backward pass needs
besides the inputs and o: nothing of size T x S reaches memory.

Rows are read where they lie, whatever their strides: q, k and v may be views of one packed
projection (B, T, 3, H, D). o and the gradients are laid out (B, T, H, D), so that merging the heads
copies nothing. Sums are fp32; the weights are rounded to the input's dtype for their product with
v. fp32 inputs go through the tensor cores as three TF32 products: 22 bits of every factor count.

Rotations enter through `posenc.kernels.hooks`: where q is loaded, and where dq and dk are stored.
Biases of the logits enter where a tile of products is (`posenc.kernels.bias`).
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels.bias import NO_BIAS, Bias, add_bias, apart, as_columns, decay_at, head_at
from posenc.kernels.common import (
    OPTIONS,
    any_given,
    backward_only,
    block_of,
    device_of,
    head_of,
    leave_out,
    load_tile,
    of_one_output,
    require_runnable,
    rows_by_head,
    store_tile,
    strided,
    tile_options,
)
from posenc.kernels.flash_backward import delta_kernel, dkv_kernel, dq_kernel, scale_kernel
from posenc.kernels.hooks import LOAD, STORE, Hook
from posenc.kernels.mask import (
    CAUSAL,
    PLAIN,
    Arguments,
    Mask,
    along,
    arguments,
    check_mask,
    every_part,
    hide,
    key_bounds,
    lowest_seen,
    real_of,
    real_tile,
    start_of_peak,
)
from posenc.kernels.tiles import config_of

MAX_HEAD_DIM = 256
#: `deterministic=None` takes the one-kernel backward for more queries than this. Not measured:
#: counting (5 products instead of 7, against zeroing and converting dQ) puts the tie near 1400.
SPLIT_UP_TO = 2048
#: Rows of a program of the small kernels before and after the one-kernel backward.
SMALL_ROWS = 64


class Config(NamedTuple):
    """Queries and keys of a tile, and how the kernel is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    #: Most registers a thread may take: at 128 two programs of 256 threads share a processor. None
    #: leaves it to the compiler.
    registers: int | None = None


#: By kernel, bytes of an element, and the head dim rounded up to a power of two (at least 32).
CONFIGS = {
    ("forward", 2, 32): Config(128, 64, 8, 3, 128),
    ("forward", 2, 64): Config(128, 64, 8, 3, 128),
    ("forward", 2, 128): Config(128, 64, 8, 3),
    ("forward", 2, 256): Config(128, 64, 8, 2),
    ("forward", 4, 32): Config(64, 32, 4, 2),
    ("forward", 4, 64): Config(64, 32, 4, 2),
    ("forward", 4, 128): Config(16, 32, 4, 2),
    ("forward", 4, 256): Config(16, 16, 8, 1),
    ("dq", 2, 32): Config(128, 64, 8, 2, 128),
    ("dq", 2, 64): Config(128, 64, 8, 2, 128),
    ("dq", 2, 128): Config(128, 64, 8, 2),
    ("dq", 2, 256): Config(128, 32, 8, 2),
    ("dq", 4, 32): Config(64, 32, 4, 2),
    ("dq", 4, 64): Config(64, 32, 4, 2),
    ("dq", 4, 128): Config(16, 64, 8, 1),
    ("dq", 4, 256): Config(16, 16, 8, 1),
    ("dkv", 2, 32): Config(64, 128, 8, 2),
    ("dkv", 2, 64): Config(64, 128, 8, 2),
    ("dkv", 2, 128): Config(32, 128, 8, 2),
    ("dkv", 2, 256): Config(16, 64, 8, 2),
    ("dkv", 4, 32): Config(16, 32, 8, 2),
    ("dkv", 4, 64): Config(32, 32, 8, 2),
    ("dkv", 4, 128): Config(32, 16, 8, 1),
    ("dkv", 4, 256): Config(16, 16, 8, 1),
    ("dqkv", 2, 32): Config(64, 128, 8, 2),
    ("dqkv", 2, 64): Config(64, 128, 8, 2),
    ("dqkv", 2, 128): Config(32, 128, 8, 2),
    ("dqkv", 2, 256): Config(32, 32, 8, 2),
    ("dqkv", 4, 32): Config(16, 32, 8, 2),
    ("dqkv", 4, 64): Config(32, 32, 8, 2),
    ("dqkv", 4, 128): Config(16, 16, 8, 1),
    ("dqkv", 4, 256): Config(16, 16, 8, 1),
    # Masked, the tiles above would spill.
    ("masked forward", 2, 32): Config(128, 32, 8, 3, 128),
    ("masked forward", 2, 64): Config(128, 32, 8, 3, 128),
    ("masked dq", 2, 32): Config(128, 32, 8, 2, 128),
    ("masked dq", 2, 64): Config(128, 32, 8, 2, 128),
    # With a bias too; with a mask as well, one needs more registers.
    ("biased forward", 2, 32): Config(128, 32, 8, 3, 128),
    ("biased forward", 2, 64): Config(128, 32, 8, 3, 128),
    ("biased dq", 2, 32): Config(128, 32, 8, 2),
    ("biased dq", 2, 64): Config(128, 32, 8, 2),
}


@triton.jit
def add_keys(sums, total, peak, s, v, c, PRECISION: tl.constexpr):
    """Take the keys of one tile, with logits s and values v, into a softmax under way.

    c > 0. The peak is finite after a tile of which the row sees a key, or by `start_of_peak`.
    """
    new_peak = tl.maximum(peak, tl.max(s, 1) * c)
    p = tl.exp2(s * c - new_peak[:, None])
    fade = tl.exp2(peak - new_peak)
    total = total * fade + tl.sum(p, 1)
    sums = tl.dot(p.to(v.dtype), v, sums * fade[:, None], input_precision=PRECISION)
    return sums, total, new_peak


@triton.jit
def attend_keys(
    sums,
    total,
    peak,
    q,
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
    """Take keys start .. stop - 1 into the softmax of queries m under way.

    m, lo: columns, key indices. real: what is real among all keys, a pointer. Both may be None.
    bias, head, own, lowest: see `posenc.kernels.bias.add_bias`.
    """
    for first in range(start, stop, BLOCK_N):
        k_tile = load_tile(k, first, S, BLOCK_N, D, BLOCK_D, not MASK)
        s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        n = first + tl.arange(0, BLOCK_N)
        s, unit = add_bias(s, c, bias, head, own, lowest, first, S, BLOCK_M, BLOCK_N, not MASK)
        s = hide(s, m, n[None, :], lo, None, along(real_tile(real, first, BLOCK_N), 1), MASK)
        v_tile = load_tile(v, first, S, BLOCK_N, D, BLOCK_D, not MASK)
        sums, total, peak = add_keys(sums, total, peak, s, v_tile, unit, PRECISION)
    return sums, total, peak


@triton.jit
def attend(
    q,
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
    """The softmax of a tile q of rows m, between `lowest` and `highest`, over all that they see.

    head: `posenc.kernels.bias.head_at`. With a table, rows are consecutive from `lowest` on.
    """
    shift = S - T
    begin, inner, until, whole, stop = key_bounds(mask, b, lowest, highest, T, shift, BLOCK_N)
    real = real_of(mask, b, S)
    if any_given(mask.window, mask.first, mask.real):
        m = tl.minimum(m, T - 1)  # rows past the last repeat it: they too see a key
    lo = along(lowest_seen(mask, b, m, T, shift), 0)
    at = (m + shift)[:, None]
    base = decay_at(bias, head, lowest + shift)
    row = decay_at(bias, head, tl.minimum(m, T - 1) + shift)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = start_of_peak(mask, BLOCK_M)
    if lo is not None:
        sums, total, peak = attend_keys(
            sums, total, peak, q, k, v, at, lo, real, bias, head, base, lowest + shift,
            begin, inner, S, c, True, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    sums, total, peak = attend_keys(
        sums, total, peak, q, k, v, at, lo, real, bias, head, base, lowest + shift,
        inner, until, S, c, False, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    if bias.high is not None:
        peak += apart(row, base)  # no key so far comes after the first row
    sums, total, peak = attend_keys(
        sums, total, peak, q, k, v, at, lo, real, bias, head, as_columns(row), lowest + shift,
        whole, stop, S, c, True, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    return sums, total, peak


@triton.jit(do_not_specialize=["H", "T", "S"])
def forward_kernel(
    q,
    k,
    v,
    o,
    lse,
    extra,
    mask,
    bias,
    H,
    T,
    S,
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
    """Rows of o and L. q, k, v, o: `common.strided`; lse: contiguous fp32 (B, H, T)."""
    tiles = tl.cdiv(T, BLOCK_M)
    # Late rows see the most keys: they start first.
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    m = first + tl.arange(0, BLOCK_M)

    q_tile = HOOK(q, b, h, extra, first, T, OPTIONS, BLOCK_M, D, BLOCK_D)
    keys, values = head_of(k, b, h // GROUP), head_of(v, b, h // GROUP)
    sums, total, peak = attend(
        q_tile, keys, values, b, m, first, min(first + BLOCK_M, T) - 1, mask,
        bias, head_at(b, h, H, S), T, S, c, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    store_tile(head_of(o, b, h), sums / total[:, None], first, T, BLOCK_M, D, BLOCK_D)
    tl.store(lse + bh * T + m, peak + tl.log2(total), mask=m < T)


def launch(
    kernel: str, x: Tensor, mask: Arguments = PLAIN, bias: Bias = NO_BIAS
) -> tuple[Config, dict]:
    """The configuration of a kernel for tensors like x, and the launch's keyword arguments."""
    sizes = x.element_size(), max(32, block_of(x))
    kind = "biased " if any_given(*bias) else "masked " if any_given(*mask) else ""
    if (kind + kernel, *sizes) in CONFIGS:
        kernel = kind + kernel
    config = config_of("flash", CONFIGS, (kernel, *sizes), x.device)
    return config, {**tile_options(x, config), "maxnreg": config.registers}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    load: Hook = LOAD,
    mask: Arguments = PLAIN,
    bias: Bias = NO_BIAS,
) -> tuple[Tensor, Tensor]:
    """o (B, H, T, D) in q's dtype and L, fp32 (B, H, T), of checked arguments."""
    batch, heads, length, _ = q.shape
    o = rows_by_head(q)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    config, options = launch("forward", q, mask, bias)
    grid = (triton.cdiv(length, config.block_m) * batch * heads,)
    with device_of(q):
        forward_kernel[grid](
            strided(q), strided(k), strided(v), strided(o), lse, load.extra,
            mask, bias, heads, length, k.shape[2], scale * math.log2(math.e),
            HOOK=load.function, OPTIONS=load.options, GROUP=heads // k.shape[1], **options,
        )  # fmt: skip
    return o, lse


class Saved(NamedTuple):
    """What the backward pass reads: q and k as they met, and what the forward pass left."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor


def is_split(deterministic: bool | None, length: int) -> bool:
    """Whether the backward pass takes two kernels: True if asked to, None takes the faster way."""
    return length <= SPLIT_UP_TO if deterministic is None else deterministic


def backward_split(
    do: Tensor,
    saved: Saved,
    scale: float,
    store_q: Hook = STORE,
    store_k: Hook = STORE,
    mask: Arguments = PLAIN,
    bias: Bias = NO_BIAS,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by two kernels; `store_q` runs for all rows before `store_k` for any."""
    q, k, v, o, lse = saved
    batch, heads, length, _ = q.shape
    c = scale * math.log2(math.e)
    dq, delta = rows_by_head(q), torch.empty_like(lse)
    config, options = launch("dq", q, mask, bias)
    grid = (triton.cdiv(length, config.block_m) * batch * heads,)
    with device_of(q):
        dq_kernel[grid](
            strided(q), strided(k), strided(v), strided(o), strided(do), lse, delta, strided(dq),
            store_q.extra, mask, bias, heads, length, k.shape[2], scale, c,
            HOOK=store_q.function, OPTIONS=store_q.options, GROUP=heads // k.shape[1], **options,
        )  # fmt: skip
    return dq, *launch_dkv("dkv", do, saved, delta, delta, scale, store_k, mask, bias=bias)


def delta_of(o: Tensor, do: Tensor) -> Tensor:
    """delta alone, fp32 (B, H, T)."""
    batch, heads, length, dim = o.shape
    delta = torch.empty(o.shape[:-1], dtype=torch.float32, device=o.device)
    with device_of(o):
        delta_kernel[(triton.cdiv(length, SMALL_ROWS) * batch * heads,)](
            strided(o), strided(do), delta, heads, length,
            D=dim, BLOCK_D=block_of(o), BLOCK_M=SMALL_ROWS, **OPTIONS,
        )  # fmt: skip
    return delta


def scaled(sums: Tensor, scale: float, q: Tensor) -> Tensor:
    """dq of q from its sums, fp32 (B, H, T, D)."""
    batch, heads, length, dim = q.shape
    dq = rows_by_head(q)
    with device_of(q):
        scale_kernel[(triton.cdiv(length, SMALL_ROWS) * batch * heads,)](
            strided(sums), strided(dq), heads, length, scale,
            D=dim, BLOCK_D=block_of(q), BLOCK_M=SMALL_ROWS, **OPTIONS,
        )  # fmt: skip
    return dq


def backward_atomic(
    do: Tensor,
    saved: Saved,
    scale: float,
    store_k: Hook = STORE,
    mask: Arguments = PLAIN,
    bias: Bias = NO_BIAS,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq / scale in fp32, contiguous; dk, dv: by one kernel with atomics, and one for delta."""
    dq_sum = torch.zeros(saved.q.shape, dtype=torch.float32, device=saved.q.device)
    delta = delta_of(saved.o, do)
    return dq_sum, *launch_dkv("dqkv", do, saved, delta, dq_sum, scale, store_k, mask, bias=bias)


def launch_dkv(
    kernel: str,
    do: Tensor,
    saved: Saved,
    delta: Tensor,
    dq_sum: Tensor,
    scale: float,
    store_k: Hook,
    mask: Arguments = PLAIN,
    order: Tensor | None = None,
    ranks: Tensor | None = None,
    bias: Bias = NO_BIAS,
) -> tuple[Tensor, Tensor]:
    """dk and dv; "dqkv" adds dq to dq_sum, which "dkv" does not touch."""
    q, k, v, _, lse = saved
    batch, heads, length, _ = q.shape
    kv_heads, key_length = k.shape[1:3]
    dk, dv = rows_by_head(k), rows_by_head(v)
    config, options = launch(kernel, q, mask, bias)
    grid = (triton.cdiv(key_length, config.block_n) * batch * kv_heads,)
    with device_of(q):
        dkv_kernel[grid](
            strided(q), strided(k), strided(v), strided(do), lse, delta, strided(dk), strided(dv),
            dq_sum, order, ranks, store_k.extra, mask, bias, heads, length, key_length, scale,
            scale * math.log2(math.e),
            HOOK=store_k.function, OPTIONS=store_k.options, ADD_DQ=kernel == "dqkv",
            GROUP=heads // kv_heads, **options,
        )  # fmt: skip
    return dk, dv


def backward(
    do: Tensor,
    saved: Saved,
    scale: float,
    deterministic: bool | None,
    mask: Arguments = PLAIN,
    bias: Bias = NO_BIAS,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; deterministic False takes one kernel, True two, None the likely faster way."""
    if is_split(deterministic, saved.q.shape[2]):
        return backward_split(do, saved, scale, mask=mask, bias=bias)
    dq_sum, dk, dv = backward_atomic(do, saved, scale, mask=mask, bias=bias)
    return scaled(dq_sum, scale, saved.q), dk, dv


@torch.library.custom_op("posenc::flash_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    # `deterministic` is only passed on to the backward pass.
    mask = arguments(Mask(window, first, last, real), k.shape[2])
    return forward(q, k, v, scale, mask=mask)


@torch.library.custom_op("posenc::flash_backward", mutates_args=())
def _backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = arguments(Mask(window, first, last, real), k.shape[2])
    return backward(do, Saved(q, k, v, o, lse), scale, deterministic, mask)


@_forward_op.register_fake
def _(q, k, v, *options):
    return rows_by_head(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


@_backward_op.register_fake
def _(do, q, k, v, *options):
    return rows_by_head(q), rows_by_head(k), rows_by_head(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, ctx.deterministic, ctx.window, *mask = inputs
    o, lse = output
    leave_out(ctx, lse)
    ctx.save_for_backward(q, k, v, o, lse, *mask)


@of_one_output
def _differentiate(ctx, do):
    *tensors, first, last, real = ctx.saved_tensors
    mask = (ctx.window, first, last, real)
    grads = _backward_op(do, *tensors, ctx.scale, ctx.deterministic, *mask)
    return *grads, *(None,) * 6


_forward_op.register_autograd(_differentiate, setup_context=_save)


@backward_only
def flash_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Mask = CAUSAL,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """`flash_attention` and L, the base-2 log-sum-exp of its rows: fp32 (B, H, T), no gradient."""
    check(q, k, v, scale, mask)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if torch.are_deterministic_algorithms_enabled():
        deterministic = True
    return _forward_op(q, k, v, scale, deterministic, *mask)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Mask = CAUSAL,
    deterministic: bool | None = None,
) -> Tensor:
    """Causal softmax attention, differentiable once.

    Args:
        q: (B, H, T, D), D at most 256, in bfloat16, float16 or float32, any strides.
        k, v: (B, G, S, D), S >= T, G a divisor of H.
        scale: of the logits, positive; None is 1/sqrt(D).
        mask: `posenc.kernels.mask.Mask`: a window, segments, padding. Tiles that it empties are not
            computed.
        deterministic: True: the same gradient bits in every run. False: the backward pass in one
            kernel, with atomics. None: True under `torch.use_deterministic_algorithms`, otherwise
            whichever of the two should be faster at this length.

    Returns:
        (B, H, T, D) in q's dtype.

    Raises:
        ValueError: for other shapes, dtypes or devices.
    """
    return flash_attention_with_lse(q, k, v, scale=scale, mask=mask, deterministic=deterministic)[0]


def check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Mask = CAUSAL) -> None:
    """ValueError unless these arguments of `flash_attention` fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[0] == k.shape[0]):
        raise ValueError(f"expected q (B, H, T, D), k and v (B, G, S, D); got {shapes}.")
    if q.shape[3] != k.shape[3] or not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(
            f"flash attention needs one head dim of at most {MAX_HEAD_DIM}; got {shapes}. "
            "Use more heads, or impl='sdpa'."
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the key heads must divide the query heads; got {shapes}. "
            f"Choose k and v with a divisor of {q.shape[1]} heads."
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"causal attention needs at least as many keys as queries; got {shapes}. "
            "Pass the whole key sequence, the queries being its last tokens."
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}. Fold a sign into q.")
    require_runnable("flash attention", q, k, v)
    check_mask(mask, q.shape[0], q.shape[2], k.shape[2], q.device)


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches that between them use every configuration, for `inspect_sm90`."""
    half, single = torch.bfloat16, torch.float32
    masks = {"": PLAIN, " masked": every_part(16, 1024)}
    plain = [(dtype, dim, 12, "") for dtype in (half, single) for dim in (32, 64, 128, 256)]
    masked = [(half, dim, heads, " masked") for dim in (32, 64) for heads in (3, 12)]
    masked += [(half, 128, 12, " masked"), (single, 64, 12, " masked")]
    odd = [(half, dim, 12, "") for dim in (16, 40, 96, 100)]
    for dtype, dim, kv_heads, mask in [*plain, *odd, (half, 80, 3, ""), *masked]:
        packed = torch.empty(16, 1024, 12 + 2 * kv_heads, dim, dtype=dtype, device="meta")
        q, k, v = packed.transpose(1, 2).split([12, kv_heads, kv_heads], 1)
        o, lse = rows_by_head(q), torch.empty(q.shape[:-1], device="meta")
        name = f"{str(dtype).removeprefix('torch.')} D={dim}{mask}"
        options = {"mask": masks[mask]}
        yield name, functools.partial(forward, q, k, v, 0.125, **options)
        saved = Saved(q, k, v, o, lse)
        yield name, functools.partial(backward, o, saved, 0.125, True, **options)
        yield f"{name} atomic", functools.partial(backward, o, saved, 0.125, False, **options)
