"""Softmax attention of few queries over many keys: a step of decoding (Flash-Decoding, 2023;
arXiv 2205.14135 over pieces of the keys). Inference alone: there is no gradient.

    logits[m, n] = scale q[m].k[n] + bias[m, n]        n <= m, key indices; a window, padding
    y[h, m] = g[h, m] softmax_n(logits[m, n]) v[n]     a gate is optional; 0 drops the pair

One query gives a program of `posenc.kernels.flash` one row of 128, and one program a head leaves
most of a GPU idle. Here a tile has 16 rows, the least of a product, which are the queries of all
heads that share keys: these are read once. The keys are cut into pieces by the lengths alone, so
that a sequence has the same bits alone and in a batch, and each piece is a program's:

    peak_p = max_n s[n]        total_p = sum_n exp2(s[n] - peak_p)        n in piece p
    sums_p = sum_n exp2(s[n] - peak_p) v[n]

A second launch puts the pieces of a row together, in one order:

    y = g sum_p exp2(peak_p - peak) sums_p / sum_p exp2(peak_p - peak) total_p       peak = max_p

Keys of one piece take one launch. Nothing depends on what tensors hold: CUDA graphs can have it.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels import flash
from posenc.kernels.common import (
    OPTIONS,
    block_of,
    check_weights,
    device_of,
    head_of,
    inference_only,
    load_tile,
    require_runnable,
    rows_at,
    strided,
    tile_options,
)
from posenc.kernels.flash import Config, add_keys
from posenc.kernels.mask import CAUSAL, FLOOR, Mask, along, hide
from posenc.kernels.routed import dropped
from posenc.kernels.tiles import config_of

#: More queries than this are `posenc.kernels.flash`'s, whose tiles they begin to fill.
MAX_QUERIES = 16
#: The three TF32 products of wider heads spill.
MAX_PRECISE_HEAD_DIM = 128
#: Keys of a piece: a power of two, at least `SHORTEST`, and so many that no more than `MOST` pieces
#: of queries wait to be put together. Not measured: at B=1, H=12 1024 keys are 96 programs and 4096
#: are 384, of 132 processors.
SHORTEST, MOST = 128, 128
#: Pieces that are put together at a time.
PIECES = 32
LOG2E = tl.constexpr(math.log2(math.e))

#: By bytes of an element, and the wider head dim rounded up to a power of two (at least 32).
CONFIGS = {
    (2, 32): Config(16, 64, 4, 3),
    (2, 64): Config(16, 64, 4, 3),
    (2, 128): Config(16, 64, 4, 3),
    (2, 256): Config(16, 64, 4, 2),
    (4, 32): Config(16, 32, 4, 3),
    (4, 64): Config(16, 32, 4, 3),
    (4, 128): Config(16, 32, 4, 2),
}


@triton.jit
def gate_of(gates, row):
    """The gates of rows, None where there are none."""
    if gates is not None:
        return tl.load(gates + row)


@triton.jit
def output(sums, total, gate):
    """g sums / total, which broadcast; 0 where dropped, of which no key may have been summed."""
    if gate is None:
        y = sums / total
    else:
        keep = ~dropped(gate)
        y = tl.where(keep, sums * (gate / tl.where(keep, total, 1.0)), 0.0)
    return y


@triton.jit(do_not_specialize=["of_batch", "window", "G", "T", "S", "first", "size", "pieces"])
def decode_kernel(
    q,
    k,
    v,
    bias,
    of_batch,
    gates,
    real,
    window,
    o,
    sums,
    peaks,
    totals,
    G,
    T,
    S,
    first,
    size,
    pieces,
    c,
    WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys (first + p) size .. of piece p of `pieces`, for all queries of a group of heads.

    q, k, v, o: `common.strided`. Contiguous are all others: bias fp32 (B or 1, H, T, S), one of
    the batch `of_batch` numbers after the other; gates fp32 (B, H, T); real bool (B, S); sums
    (B, H, T, pieces, E), peaks and totals (B, H, T, pieces), fp32. bias, gates, real and window may
    be None. WHOLE: there is one piece, whose rows go to o; else they go to the three.
    """
    piece, program = tl.program_id(0) % pieces, tl.program_id(0) // pieces
    tiles = tl.cdiv(GROUP * T, BLOCK_M)
    bg = (program // tiles).to(tl.int64)
    b, g = bg // G, bg % G
    place = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < GROUP * T
    place = tl.minimum(place, GROUP * T - 1)  # rows past the last repeat it: they too see a key
    h, t = g * GROUP + place // T, place % T
    row = (b * (G * GROUP) + h) * T + t

    start = (first + piece) * size
    stop = tl.minimum(start + size, S)
    m = t + (S - T)
    lo = None
    if window is not None:
        lo = along(m - window + 1, 0)
        start = tl.maximum(start, tl.maximum(S - T - window + 1, 0) // BLOCK_N * BLOCK_N)
    gate = gate_of(gates, row)
    if gate is not None:
        stop = tl.where(tl.min(dropped(gate).to(tl.int32), 0) == 1, start, stop)

    t = t.to(tl.int64)
    q_at = rows_at(q, b, h, t, tl.arange(0, BLOCK_D))
    q_tile = tl.load(q_at, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    keys, values = head_of(k, b, g), head_of(v, b, g)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], FLOOR, tl.float32)
    part = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for at in range(start, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        k_tile = load_tile(keys, at, S, BLOCK_N, D, BLOCK_D)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * c
        if bias is not None:
            seen = n[None, :] <= m[:, None]  # of the others there may be no bias
            if lo is not None:
                seen = seen & (n[None, :] >= lo)
            added = (bias + b * of_batch) + ((h * T + t) * S)[:, None] + n[None, :]
            s += tl.load(added, mask=seen, other=0.0) * LOG2E
        real_here = None
        if real is not None:
            real_here = along(tl.load(real + b * S + n, mask=n < S, other=False), 1)
        s = hide(s, m[:, None], n[None, :], lo, None, real_here, True)
        v_tile = load_tile(values, at, S, BLOCK_N, E, BLOCK_E)
        part, total, peak = add_keys(part, total, peak, s, v_tile, 1.0, PRECISION)

    columns = tl.arange(0, BLOCK_E)
    written = inside[:, None] & (columns < E)[None, :]
    if WHOLE:
        y = output(part, total[:, None], along(gate, 0))
        tl.store(rows_at(o, b, h, t, columns), y.to(o[0].dtype.element_ty), mask=written)
    else:
        row = row * pieces + piece
        tl.store(sums + (row[:, None] * E + columns[None, :]), part, mask=written)
        tl.store(peaks + row, peak, mask=inside)
        tl.store(totals + row, total, mask=inside)


@triton.jit(do_not_specialize=["H", "T", "pieces"])
def combine_kernel(
    sums,
    peaks,
    totals,
    gates,
    o,
    H,
    T,
    pieces,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One row of o from its pieces, see `decode_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    t, bh = row % T, row // T
    b, h = bh // H, bh % H
    columns = tl.arange(0, BLOCK_E)
    gate = gate_of(gates, row)
    stop = pieces
    if gate is not None:
        stop = tl.where(dropped(gate), 0, pieces)
    y = tl.zeros([BLOCK_E], tl.float32)
    total, peak = tl.full([], 0.0, tl.float32), tl.full([], FLOOR, tl.float32)
    for at in range(0, stop, PIECES):
        p = at + tl.arange(0, PIECES)
        here = row * pieces + p
        own = tl.load(peaks + here, mask=p < pieces, other=FLOOR)
        weights = tl.load(totals + here, mask=p < pieces, other=0.0)
        inside = (p < pieces)[:, None] & (columns < E)[None, :]
        part = tl.load(sums + (here[:, None] * E + columns[None, :]), mask=inside, other=0.0)
        top = tl.maximum(peak, tl.max(own, 0))
        fade, share = tl.exp2(peak - top), tl.exp2(own - top)
        y = y * fade + tl.sum(part * share[:, None], 0)
        total = total * fade + tl.sum(weights * share, 0)
        peak = top
    head, stride, step = head_of(o, b, h)
    y = output(y, total, gate).to(head.dtype.element_ty)
    tl.store(head + t * stride + columns.to(tl.int64) * step, y, mask=columns < E)


def cut(queries: int, keys: int, window: int | None) -> tuple[int, int, int]:
    """Keys of a piece, the first piece that a query sees a key of, and how many there are."""
    seen = keys if window is None else min(keys, window + queries - 1)
    size = max(SHORTEST, triton.next_power_of_2(triton.cdiv(queries * seen, MOST)))
    first = (keys - seen) // size
    return size, first, triton.cdiv(keys, size) - first


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    gates: Tensor | None = None,
    real: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """y (B, H, T, E) in q's dtype, of checked arguments."""
    batch, heads, length, _ = q.shape
    groups, keys = k.shape[1:3]
    y = output_like(q, v)
    size, first, pieces = cut(length, keys, window)
    key = q.element_size(), max(32, block_of(q), block_of(v))
    config = config_of("decode", CONFIGS, key, q.device)
    single = {"dtype": torch.float32, "device": q.device}
    whole, rows = pieces == 1, batch * heads * length
    parts: tuple[Tensor | None, ...] = (None, None, None)
    if not whole:
        parts = tuple(torch.empty(rows * pieces * n, **single) for n in (v.shape[3], 1, 1))
    of_batch = 0
    if bias is not None:
        bias = bias.float().contiguous()
        of_batch = bias[0].numel() if len(bias) > 1 else 0
    gates = None if gates is None else gates.float().contiguous()
    real = None if real is None else real.contiguous()
    tiles = triton.cdiv(heads // groups * length, config.block_m)
    of_values = {"E": v.shape[3], "BLOCK_E": block_of(v)}
    with device_of(q):
        decode_kernel[(pieces * tiles * batch * groups,)](
            strided(q), strided(k), strided(v), bias, of_batch, gates, real, window,
            strided(y), *parts,
            groups, length, keys, first, size, pieces, scale * math.log2(math.e),
            WHOLE=whole, GROUP=heads // groups, **of_values, **tile_options(q, config),
        )  # fmt: skip
        if not whole:
            combine_kernel[(rows,)](
                *parts, gates, strided(y), heads, length, pieces, **of_values, PIECES=PIECES,
                **OPTIONS,
            )  # fmt: skip
    return y


def output_like(q: Tensor, v: Tensor) -> Tensor:
    """Uninitialised (B, H, T, E), laid out (B, T, H, E)."""
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)


@torch.library.custom_op("posenc::decode", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    gates: Tensor | None,
    scale: float,
    window: int | None = None,
    real: Tensor | None = None,
) -> Tensor:
    return forward(q, k, v, scale, bias, gates, real, window)


@_op.register_fake
def _(q, k, v, *options):
    return output_like(q, v)


@inference_only
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    gates: Tensor | None = None,
    *,
    scale: float | None = None,
    mask: Mask = CAUSAL,
) -> Tensor:
    """Causal softmax attention of the last few tokens, without a gradient.

    Args:
        q: (B, H, T, D), T at most 16, in bfloat16, float16 or float32, any strides. D at most 256,
            in float32 128.
        k: (B, G, S, D), S >= T, G a divisor of H: query row i sits at key index S - T + i.
        v: (B, G, S, E), E as D.
        bias: (B or 1, H, T, S), added to the scaled products; fp32 inside. Not read where causality
            or the window hides the key.
        gates: (B, H, T), not negative, weights of the output; 0 drops the pair, and where all
            queries of the heads that share keys are dropped none is read. fp32 inside.
        scale: of the products, positive; None is 1/sqrt(D).
        mask: a window, padding; no segments.

    Returns:
        (B, H, T, E) in q's dtype: the same bits in every run, and for a sequence alone as in a
        batch.

    Raises:
        ValueError: for other shapes, dtypes or devices, and where anything is to be differentiated.
    """
    check(q, k, v, bias, gates, scale, mask)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    y: Tensor = _op(q, k, v, bias, gates, scale, mask.window, mask.real)
    return y


def fits(q: Tensor, v: Tensor) -> bool:
    """Whether tiles hold the queries (B, H, T, D), and values (B, G, S, E)."""
    most = MAX_PRECISE_HEAD_DIM if q.dtype == torch.float32 else flash.MAX_HEAD_DIM
    return q.shape[2] <= MAX_QUERIES and max(q.shape[3], v.shape[3]) <= most


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    gates: Tensor | None,
    scale: float | None,
    mask: Mask,
) -> None:
    """ValueError unless these arguments of `decode_attention` fit together."""
    flash.check(q, k, k, scale, mask._replace(first=None, last=None))
    batch, heads, length, _ = q.shape
    if mask.first is not None or mask.last is not None:
        raise ValueError(
            "decode_attention takes no segments: what follows several documents belongs to the "
            "last. Use flash_attention, or hide the others by `real`."
        )
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"expected v (B, G, S, E) with k {tuple(k.shape)}; got {tuple(v.shape)}.")
    if not fits(q, v):
        raise ValueError(
            f"decode_attention takes at most {MAX_QUERIES} queries and heads of at most "
            f"{flash.MAX_HEAD_DIM}, in float32 {MAX_PRECISE_HEAD_DIM}; got q {tuple(q.shape)}, "
            f"v {tuple(v.shape)} in {q.dtype}. Use flash_attention."
        )
    require_runnable("decode_attention", q, v)
    of_one = (heads, length, k.shape[2])
    check_weights("bias", bias, q.device, (1, *of_one), (batch, *of_one))
    check_weights("gates", gates, q.device, (batch, heads, length))


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches that between them use every configuration, for `inspect_sm90`."""
    half, single = torch.bfloat16, torch.float32
    plain = [(half, dim, 12, "") for dim in (32, 64, 128, 256)]
    plain += [(single, dim, 12, "") for dim in (32, 64, 128)]
    more = [(half, 64, 12, kind) for kind in (" short", " masked", " bias", " gates")]
    grouped = [(half, dim, 3, kind) for dim in (64, 128) for kind in (" grouped", " every part")]
    for dtype, dim, groups, kind in [*plain, *more, *grouped, (half, 72, 3, " every part")]:
        keys = 100 if kind == " short" else 4096
        every = kind == " every part"

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q, k = new(2, 12, 1, dim), new(2, groups, keys, dim)
        options: dict = {}
        if every or kind == " bias":
            options["bias"] = new(2, 12, 1, keys, dtype=single)
        if every or kind == " gates":
            options["gates"] = new(2, 12, 1, dtype=single)
        if every or kind == " masked":
            options |= {"real": new(2, keys, dtype=torch.bool), "window": 4001}
        name = f"{str(dtype).removeprefix('torch.')} D={dim}{kind}"
        yield name, functools.partial(forward, q, k, k, 0.125, **options)
