"""Causal attention with a trained, query-dependent relative term: Transformer-XL (arXiv 1901.02860)
and RCMHA (arXiv 2308.03429), forward and backward in memory linear in T.

    s[m,n] = scale ((q[m] + u_h).k[n] + (q[m] + v_h).R[h,d] + S[h,d])       d = m - n >= 0
    o = softmax(s) values

R (H, P, D) holds a row a distance, learned or a projected sinusoid; distances of P and beyond use
the last. Row tiles take their keys in segments: first the term of a segment goes, in its keys'
order, to a scratch of the program's own (see `posenc.kernels.skew`), then the loop of flash
attention adds it tile by tile. Programs are as many as run at a time and draw tiles from a counter,
so the scratch does not grow with the sequence.

Half-precision inputs meet in products of their own dtype with fp32 sums; the scratch is fp16, eight
times finer than bf16, and what overflows it, far beyond where a softmax has saturated, is clamped.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels import flash
from posenc.kernels.common import (
    any_given,
    backward_only,
    block_of,
    device_of,
    head_of,
    leave_out,
    load_tile,
    of_one_output,
    rows_by_head,
    store_tile,
    strided,
    tile_options,
)
from posenc.kernels.flash import add_keys
from posenc.kernels.mask import (
    CAUSAL,
    PLAIN,
    Arguments,
    Mask,
    along,
    arguments,
    hide,
    key_bounds,
    lowest_seen,
    real_of,
    real_tile,
    start_of_peak,
)
from posenc.kernels.relative_backward import dkv_kernel, dq_kernel
from posenc.kernels.skew import load_bias, store_bias
from posenc.kernels.tiles import config_of
from posenc.scores import add_per_head

PROCESSORS = 132  # of an H100, where no device can be asked
PROCESSOR_REGISTERS = 65_536  # of 32 bits, since the V100


class Config(NamedTuple):
    """Tiles, segments, and how the kernel is compiled."""

    block_m: int
    block_n: int
    #: Keys (of a row tile) or queries (of a key tile) whose bias a program holds at a time; whole
    #: tiles.
    segment: int
    num_warps: int
    num_stages: int
    #: Programs that one multiprocessor runs at a time.
    resident: int


@triton.jit(do_not_specialize=["work", "H", "T", "S", "P"])
def forward_kernel(
    content,
    relative,
    k,
    v,
    table,
    offsets,
    o,
    lse,
    counter,
    scratch,
    mask,
    work,
    H,
    T,
    S,
    P,
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
    """Rows of o and L = log2 sum exp2. content: q + u, relative: q + v_h."""
    tiles = tl.cdiv(T, BLOCK_M)
    shift = S - T
    WIDTH: tl.constexpr = SEGMENT + 2 * BLOCK_M
    MASK: tl.constexpr = any_given(mask.window, mask.first, mask.real)
    scratch += tl.program_id(0).to(tl.int64) * (BLOCK_M * WIDTH)
    turn = tl.atomic_add(counter, 1)
    while turn < work:
        # Late rows see the most keys: they are drawn first.
        first = (tiles - 1 - turn % tiles) * BLOCK_M
        bh = (turn // tiles).to(tl.int64)
        b, h = bh // H, bh % H
        m = first + tl.arange(0, BLOCK_M)
        q = load_tile(head_of(content, b, h), first, T, BLOCK_M, D, BLOCK_D)
        r = load_tile(head_of(relative, b, h), first, T, BLOCK_M, D, BLOCK_D)
        keys, values = head_of(k, b, h // GROUP), head_of(v, b, h // GROUP)
        rows_of_table = table + h * P * D
        offsets_of_head = offsets
        if offsets is not None:
            offsets_of_head = offsets + h * P
        sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        peak = start_of_peak(mask, BLOCK_M)
        start, _, _, _, stop = key_bounds(
            mask, b, first, min(first + BLOCK_M, T) - 1, T, shift, BLOCK_N
        )
        row = tl.minimum(m, T - 1)  # rows past the last repeat it: they too see a key
        lo = along(lowest_seen(mask, b, row, T, shift), 0)
        real = real_of(mask, b, S)
        for begin in tl.range(start, stop, SEGMENT, disable_licm=True):
            count = tl.cdiv(min(stop - begin, SEGMENT), BLOCK_N) * BLOCK_N
            store_bias(
                scratch, r, first + shift, begin, count, rows_of_table, offsets_of_head, P, c,
                WIDTH, BLOCK_M, BLOCK, D, BLOCK_D, PRECISION, MASK,
            )  # fmt: skip
            tl.debug_barrier()
            for at in range(0, count, BLOCK_N):
                k_tile = load_tile(keys, begin + at, S, BLOCK_N, D, BLOCK_D)
                s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
                # Not s += bias: that is folded into the product, and its load is then not started
                # early.
                s = s * c + load_bias(scratch, at, WIDTH, BLOCK_M, BLOCK_N)
                n = begin + at + tl.arange(0, BLOCK_N)[None, :]
                real_here = along(real_tile(real, begin + at, BLOCK_N), 1)
                s = hide(s, (row + shift)[:, None], n, lo, None, real_here, MASK)
                v_tile = load_tile(values, begin + at, S, BLOCK_N, D, BLOCK_D)
                sums, total, peak = add_keys(sums, total, peak, s, v_tile, 1.0, PRECISION)
            tl.debug_barrier()
        store_tile(head_of(o, b, h), sums / total[:, None], first, T, BLOCK_M, D, BLOCK_D)
        tl.store(lse + bh * T + m, peak + tl.log2(total), mask=m < T)
        turn = tl.atomic_add(counter, 1)


#: By kernel, bytes of an element, and the head dim rounded up to a power of two (at least 32).
CONFIGS = {
    ("forward", 2, 32): Config(64, 64, 384, 4, 2, 4),
    ("forward", 2, 64): Config(64, 64, 512, 4, 2, 3),
    ("forward", 2, 128): Config(128, 64, 512, 8, 2, 1),
    ("dq", 2, 32): Config(64, 64, 256, 4, 2, 2),
    ("dq", 2, 64): Config(64, 64, 256, 4, 2, 2),
    ("dq", 2, 128): Config(128, 64, 512, 8, 2, 1),
    ("dkv", 2, 32): Config(64, 128, 512, 8, 2, 1),
    ("dkv", 2, 64): Config(64, 128, 512, 8, 2, 1),
    ("dkv", 2, 128): Config(32, 128, 512, 8, 2, 1),
    ("forward", 4, 32): Config(32, 32, 256, 4, 2, 2),
    ("forward", 4, 64): Config(32, 32, 256, 4, 2, 2),
    ("forward", 4, 128): Config(16, 32, 256, 4, 2, 2),
    ("dq", 4, 32): Config(16, 32, 256, 4, 2, 2),
    ("dq", 4, 64): Config(16, 32, 256, 8, 1, 1),
    ("dq", 4, 128): Config(16, 32, 256, 8, 1, 1),
    ("dkv", 4, 32): Config(32, 16, 256, 4, 2, 2),
    ("dkv", 4, 64): Config(32, 16, 256, 4, 2, 2),
    ("dkv", 4, 128): Config(16, 16, 256, 8, 1, 1),
}
MAX_HEAD_DIM = 128
LOG2_E = math.log2(math.e)
#: Bytes that the shares of dR may take when no atomics are allowed; fewer shares beyond.
SHARES_LIMIT = 256 * 2**20


def launch(kernel: str, x: Tensor) -> tuple[Config, dict]:
    """The configuration of a kernel for tensors like x, and the launch's keyword arguments."""
    key = kernel, x.element_size(), max(32, block_of(x))
    config = config_of("relative", CONFIGS, key, x.device)
    block = min(config.block_m, config.block_n)
    own = {"BLOCK": block, "SEGMENT": config.segment, "maxnreg": registers(config)}
    return config, {**tile_options(x, config), **own}


def registers(config: Config) -> int:
    """That a thread may take so that `resident` programs share a processor's, given by eights."""
    threads = 32 * config.num_warps * config.resident
    return min(255, PROCESSOR_REGISTERS // threads // 8 * 8)


def programs(config: Config, device: torch.device) -> int:
    """How many programs run at a time on the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count * config.resident
    return PROCESSORS * config.resident


def bias_size(config: Config, rows: int, keys: int) -> int:
    """Elements that the biases of so many rows and keys take, margins included."""
    return rows * (keys + 2 * config.block_m)


def bias_scratch(x: Tensor, elements: int) -> Tensor:
    """Uninitialised, for biases of inputs like x."""
    return scratch(torch.float32 if x.dtype == torch.float32 else torch.float16, x, elements)


def scratch(dtype: torch.dtype, x: Tensor, elements: int) -> Tensor:
    """Uninitialised numbers on x's device."""
    return torch.empty(elements, dtype=dtype, device=x.device)


def drawn(config: Config, work: int, x: Tensor, size: int) -> tuple[int, Tensor, Tensor]:
    """For programs that draw `work` tiles: how many, the counter, biases of `size` for each."""
    count = min(work, programs(config, x.device))
    counter = torch.zeros(1, dtype=torch.int32, device=x.device)
    return count, counter, bias_scratch(x, count * size)


class Term(NamedTuple):
    """The relative term as kernels take it."""

    content: Tensor  # q + u
    relative: Tensor  # q + v_h
    table: Tensor  # contiguous (H, P, D)
    offsets: Tensor | None  # contiguous (H, P), fp32, as c S


def term(
    q: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    content_bias: Tensor | None,
    relative_bias: Tensor | None,
    scale: float,
) -> Term:
    """Add the biases of the heads to q, round the table to its dtype, and lay out both tables."""
    if offsets is not None:
        offsets = (offsets.float() * (scale * LOG2_E)).contiguous()
    content, relative = add_per_head(q, content_bias), add_per_head(q, relative_bias)
    return Term(content, relative, table.to(q.dtype).contiguous(), offsets)


def forward(
    q: Term, k: Tensor, v: Tensor, scale: float, mask: Arguments = PLAIN
) -> tuple[Tensor, Tensor]:
    """o (B, H, T, D) in k's dtype and L, fp32 (B, H, T), of checked arguments."""
    batch, heads, length, _ = q.content.shape
    o = rows_by_head(q.content)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=k.device)
    config, options = launch("forward", k)
    work = triton.cdiv(length, config.block_m) * batch * heads
    size = bias_size(config, config.block_m, config.segment)
    count, counter, biases = drawn(config, work, k, size)
    with device_of(k):
        forward_kernel[(count,)](
            strided(q.content), strided(q.relative), strided(k), strided(v), q.table, q.offsets,
            strided(o), lse, counter, biases, mask, work,
            heads, length, k.shape[2], q.table.shape[1], scale * LOG2_E,
            GROUP=heads // k.shape[1], **options,
        )  # fmt: skip
    return o, lse


class Gradients(NamedTuple):
    """Of the tensors that met; dR and dS_d in fp32, a row for each of S distances."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    d_table: Tensor
    d_offsets: Tensor


def backward(
    do: Tensor,
    q: Term,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    deterministic: bool,
    mask: Arguments = PLAIN,
) -> Gradients:
    """Gradients of `forward`; `deterministic` gives each share of the work its own sums of dR."""
    batch, heads, length, dim = q.content.shape
    kv_heads, key_length = k.shape[1:3]
    device, group = k.device, heads // kv_heads
    numbers = (heads, length, key_length, q.table.shape[1], scale, scale * LOG2_E)
    dq, dk, dv = (rows_by_head(x) for x in (q.content, k, v))
    delta = flash.delta_of(o, do)

    config, options = launch("dq", k)
    tiles = triton.cdiv(length, config.block_m) * batch
    # No more than run at a time: the work is dealt out beforehand.
    shares = min(tiles, max(1, programs(config, device) // heads))
    if deterministic:
        size = 4 * heads * max(1, key_length) * dim
        shares = min(shares, max(1, SHARES_LIMIT // size))
    slices = shares if deterministic else 1
    sums = {"dtype": torch.float32, "device": device}
    d_table = torch.zeros((slices, heads, key_length, dim), **sums)
    d_offsets = torch.zeros((slices, heads, key_length), **sums)
    size = shares * heads * bias_size(config, config.block_m, config.segment)
    biases, by_distance = bias_scratch(k, size), scratch(k.dtype, k, size)
    with device_of(k):
        dq_kernel[shares, heads](
            strided(q.content), strided(q.relative), strided(k), strided(v), q.table, q.offsets,
            strided(do), lse, delta, strided(dq), d_table, d_offsets,
            heads if deterministic else 0, biases, by_distance, mask, batch, *numbers,
            GROUP=group, **options,
        )  # fmt: skip

    config, options = launch("dkv", k)
    work = triton.cdiv(key_length, config.block_n) * batch * kv_heads
    size = bias_size(config, config.segment, config.block_n)
    count, counter, biases = drawn(config, work, k, size)
    with device_of(k):
        dkv_kernel[(count,)](
            strided(q.content), strided(q.relative), strided(k), strided(v), q.table, q.offsets,
            strided(do), lse, delta, strided(dk), strided(dv), counter, biases, mask, work,
            *numbers, GROUP=group, **options,
        )  # fmt: skip
    return Gradients(dq, dk, dv, d_table.sum(0) * scale, d_offsets.sum(0) * scale)


def fold(by_distance: Tensor, rows: int) -> Tensor:
    """A gradient (H, S, ..) for every distance as one for `rows` rows, the last of all beyond."""
    heads, distances, *rest = by_distance.shape
    folded = by_distance.new_zeros(heads, rows, *rest)
    near = min(rows, distances)
    folded[:, :near] = by_distance[:, :near]
    folded[:, -1] += by_distance[:, near:].sum(1)
    return folded


@torch.library.custom_op("posenc::relative_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    content_bias: Tensor | None,
    relative_bias: Tensor | None,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    # `deterministic` is only passed on to the backward pass.
    mask = arguments(Mask(window, first, last, real), k.shape[2])
    return forward(term(q, table, offsets, content_bias, relative_bias, scale), k, v, scale, mask)


@torch.library.custom_op("posenc::relative_backward", mutates_args=())
def _backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    content_bias: Tensor | None,
    relative_bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    query = term(q, table, offsets, content_bias, relative_bias, scale)
    mask = arguments(Mask(window, first, last, real), k.shape[2])
    found = backward(do, query, k, v, o, lse, scale, bool(deterministic), mask)
    d_table, d_offsets = (fold(x, table.shape[1]) for x in (found.d_table, found.d_offsets))
    # Of q + v_h only the sum over all rows is wanted: that of dB R, hence of dB's own sums.
    # As a sum of products, which autocast leaves alone.
    d_relative = (d_offsets.unsqueeze(-1) * query.table.float()).sum(1)
    d_content = found.dq.sum((0, 2), dtype=torch.float32) - d_relative
    return found.dq, found.dk, found.dv, d_table, d_offsets, d_content, d_relative


@_forward_op.register_fake
def _(q, k, v, *options):
    return rows_by_head(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


@_backward_op.register_fake
def _(do, q, k, v, table, *options):
    def single(*shape):
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    heads, rows, dim = table.shape
    return (
        *(rows_by_head(x) for x in (q, k, v)),
        *(single(heads, rows, dim), single(heads, rows)),
        *(single(heads, dim), single(heads, dim)),
    )


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.deterministic, ctx.window, first, last, real = inputs
    o, lse = output
    leave_out(ctx, lse)
    ctx.save_for_backward(*tensors, o, lse, first, last, real)


@of_one_output
def _differentiate(ctx, do):
    *tensors, first, last, real = ctx.saved_tensors
    mask = (ctx.window, first, last, real)
    grads = _backward_op(do, *tensors, ctx.scale, ctx.deterministic, *mask)
    wanted = [
        None if x is None else grad.to(x.dtype) for grad, x in zip(grads, tensors[:7], strict=True)
    ]
    return *wanted, *(None,) * 6


_forward_op.register_autograd(_differentiate, setup_context=_save)


@backward_only
def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    offsets: Tensor | None = None,
    content_bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    mask: Mask = CAUSAL,
    deterministic: bool | None = None,
) -> Tensor:
    """Causal softmax attention with a relative term, differentiable once.

    Args:
        q: (B, H, T, D), D at most 128, in bfloat16, float16 or float32, any strides.
        k, v: (B, G, S, D), G a divisor of H, S >= T: query row i sits at key index S - T + i.
        table: R (H, P, D), row d for distance d; its own dtype, fp32 gradients.
        offsets: S (H, P), added to the products with the table.
        content_bias: u (H, D), added to q where it meets k.
        relative_bias: v (H, D), added to q where it meets the table.
        scale: of the logits, positive; None is 1/sqrt(D).
        mask: see `posenc.kernels.flash.flash_attention`. Distances are those of indices.
        deterministic: True: the same gradient bits in every run, at the price of fp32 sums of the
            table's gradient for up to 264 programs (256 MiB, or one of (H, S, D) where that is
            more). False, None: atomics, except
            that None is True under `torch.use_deterministic_algorithms`.

    Returns:
        (B, H, T, D) in q's dtype.

    Raises:
        ValueError: for other shapes, dtypes or devices.
    """
    check(q, k, v, table, offsets, content_bias, relative_bias, scale, mask)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if torch.are_deterministic_algorithms_enabled():
        deterministic = True
    biases = (offsets, content_bias, relative_bias)
    return _forward_op(q, k, v, table, *biases, scale, deterministic, *mask)[0]


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    content_bias: Tensor | None,
    relative_bias: Tensor | None,
    scale: float | None,
    mask: Mask = CAUSAL,
) -> None:
    """ValueError unless these arguments of `relative_attention` fit together."""
    flash.check(q, k, v, scale, mask)
    heads, dim = q.shape[1], q.shape[3]
    if dim > MAX_HEAD_DIM:
        raise ValueError(
            f"relative attention needs a head dim of at most {MAX_HEAD_DIM}; got {dim}. "
            "Use more heads, or impl='sdpa'."
        )
    if table.dim() != 3 or table.shape[0] != heads or table.shape[2] != dim or not table.shape[1]:
        raise ValueError(f"table must be (H={heads}, P, D={dim}); got {tuple(table.shape)}.")
    for name, bias, shape in (
        ("offsets", offsets, (heads, table.shape[1])),
        ("content_bias", content_bias, (heads, dim)),
        ("relative_bias", relative_bias, (heads, dim)),
    ):
        if bias is not None and bias.shape != shape:
            raise ValueError(f"{name} must be {shape}; got {tuple(bias.shape)}.")
        if bias is not None and bias.device != q.device:
            raise ValueError(f"{name} is on {bias.device}, q on {q.device}. Move it there.")
    if table.device != q.device:
        raise ValueError(f"table is on {table.device}, q on {q.device}. Move it there.")


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches that between them use every configuration, for `inspect_sm90`."""
    for dtype in (torch.bfloat16, torch.float32):
        for dim, learned in ((32, True), (64, True), (64, False), (72, True), (128, False)):
            packed = torch.empty(16, 1024, 3, 12, dim, dtype=dtype, device="meta")
            q, k, v = packed.permute(2, 0, 3, 1, 4)
            table = torch.empty(12, 1024, dim, dtype=dtype, device="meta")
            offsets = torch.empty(12, 1024, device="meta") if learned else None
            query = Term(rows_by_head(q), q if learned else rows_by_head(q), table, offsets)
            o, lse = rows_by_head(q), torch.empty(q.shape[:-1], device="meta")
            name = f"{str(dtype).removeprefix('torch.')} D={dim}" + " no offsets" * (not learned)
            yield name, functools.partial(forward, query, k, v, 0.125)
            yield name, functools.partial(backward, o, query, k, v, o, lse, 0.125, False)
