"""RoPE: rotary position embedding (arXiv 2104.09864), q and k in one launch.

    q'[m] = a R(m omega) q[m],  k'[n] = a R(n omega) k[n],  a = 1 without a scaling
    backward: dq = a R(-m omega) dq', dk = a R(-n omega) dk'

Phases are exact integers (see `posenc.kernels.turns`), formed from D/2 fractions: no table of
cosines, nothing saved for the backward pass beyond the positions. A program computes the cosines of
one tile of tokens and turns that tile in several heads of q and of k.
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
    load_tile,
    place_of,
    require_runnable,
    store_tile,
    strided,
)
from posenc.kernels.turns import (
    check_positions,
    columns_from,
    cos_sin,
    fractions_of,
    position_arguments,
    position_turns,
    rotate,
)

PAIRINGS = ("half", "interleaved")
NUM_WARPS = 4
#: Pairs of features a program holds per head: eight a thread, 16-byte accesses in half precision.
TILE = 1024
#: Programs wanted before several heads share one program's cosines; an H100 has 132 processors.
PROGRAMS = 1024
UNSPECIALIZED = ["length", "tiles", "q_heads", "k_heads", "group", "position_b"]


@triton.jit
def _turn_heads(
    x,
    y,
    cos,
    sin,
    batch,
    begin,
    end,
    first,
    length,
    INTERLEAVED: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Turn a tile of tokens in the heads begin .. end - 1; copy the features past the pairs."""
    head = begin.to(tl.int64)
    for _ in range(begin, end):
        source = head_of(x, batch, head)
        target = head_of(y, batch, head)
        if INTERLEAVED:
            tile = load_tile(source, first, length, ROWS, 2 * PAIRS, 2 * BLOCK_P).to(tl.float32)
            x1, x2 = tl.split(tl.reshape(tile, (ROWS, BLOCK_P, 2)))
            y1, y2 = rotate(x1, x2, cos, sin)
            tile = tl.reshape(tl.join(y1, y2), (ROWS, 2 * BLOCK_P))
            store_tile(target, tile, first, length, ROWS, 2 * PAIRS, 2 * BLOCK_P)
        else:
            x1 = load_tile(source, first, length, ROWS, PAIRS, BLOCK_P).to(tl.float32)
            second = columns_from(source, PAIRS)
            x2 = load_tile(second, first, length, ROWS, PAIRS, BLOCK_P).to(tl.float32)
            y1, y2 = rotate(x1, x2, cos, sin)
            store_tile(target, y1, first, length, ROWS, PAIRS, BLOCK_P)
            store_tile(columns_from(target, PAIRS), y2, first, length, ROWS, PAIRS, BLOCK_P)
        if REST > 0:
            rest = load_tile(columns_from(source, 2 * PAIRS), first, length, ROWS, REST, BLOCK_R)
            store_tile(columns_from(target, 2 * PAIRS), rest, first, length, ROWS, REST, BLOCK_R)
        head += 1


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rope_kernel(
    q,
    k,
    q_out,
    k_out,
    fractions,
    positions,
    position_b,
    position_t,
    length,
    tiles,
    q_heads,
    k_heads,
    group,
    factor,
    HAS_POSITIONS: tl.constexpr,
    INVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (tile of ROWS tokens of a sequence, group of heads)."""
    tile, _, batch = place_of(tiles)
    first, begin = tile * ROWS, tl.program_id(1) * group
    if HAS_POSITIONS:
        positions += batch * position_b
    turns = position_turns(
        fractions, positions, position_t, first, length, HAS_POSITIONS, ROWS, PAIRS, BLOCK_P
    )
    cos, sin = cos_sin(turns)
    cos *= factor
    sin *= -factor if INVERSE else factor
    end = tl.minimum(begin + group, q_heads)
    _turn_heads(
        q, q_out, cos, sin, batch, begin, end, first, length,
        INTERLEAVED, REST, BLOCK_R, ROWS, PAIRS, BLOCK_P,
    )  # fmt: skip
    end = tl.minimum(begin + group, k_heads)
    _turn_heads(
        k, k_out, cos, sin, batch, begin, end, first, length,
        INTERLEAVED, REST, BLOCK_R, ROWS, PAIRS, BLOCK_P,
    )  # fmt: skip


def blocks(head_dim: int, pairs: int) -> dict[str, int]:
    """The compile-time sizes of the kernel for one head dim and number of turned pairs."""
    block = triton.next_power_of_2(pairs)
    rest = head_dim - 2 * pairs
    return {
        "REST": rest,
        "BLOCK_R": triton.next_power_of_2(max(rest, 1)),
        "ROWS": max(TILE // block, 1),
        "PAIRS": pairs,
        "BLOCK_P": block,
    }


def launch(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    fractions: Tensor,
    positions: Tensor | None,
    factor: float,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Write rotated q and k to q_out and k_out, which may be q and k themselves."""
    batch, q_heads, length, head_dim = q.shape
    k_heads = k.shape[1]
    if not (batch and length and q_heads):
        return
    sizes = blocks(head_dim, fractions.shape[0])
    tiles = triton.cdiv(length, sizes["ROWS"])
    heads = max(q_heads, k_heads)
    groups = min(heads, triton.cdiv(PROGRAMS, tiles * batch))
    group = triton.cdiv(heads, groups)
    groups = triton.cdiv(heads, group)
    with device_of(q):
        rope_kernel[tiles * batch, groups](
            strided(q),
            strided(k),
            strided(q_out),
            strided(k_out),
            fractions,
            *position_arguments(fractions, positions),
            length,
            tiles,
            q_heads,
            k_heads,
            group,
            factor,
            HAS_POSITIONS=positions is not None,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            **sizes,
            num_warps=NUM_WARPS,
            **OPTIONS,
        )


@torch.library.custom_op("posenc::rope", mutates_args=())
def _rope(
    q: Tensor,
    k: Tensor,
    fractions: Tensor,
    positions: Tensor | None,
    factor: float,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    launch(q, k, q_out, k_out, fractions, positions, factor, interleaved, inverse)
    return q_out, k_out


@_rope.register_fake
def _(q, k, fractions, positions, factor, interleaved, inverse):
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )


def _save(ctx, inputs, output):
    _, _, fractions, positions, ctx.factor, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(fractions, positions)


def _backward(ctx, dq, dk):
    fractions, positions = ctx.saved_tensors
    options = (ctx.factor, ctx.interleaved, not ctx.inverse)
    return *_rope(dq, dk, fractions, positions, *options), None, None, None, None, None


_rope.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("posenc::rope_inplace", mutates_args=("x",))
def _rope_inplace(
    x: Tensor,
    fractions: Tensor,
    positions: Tensor | None,
    factor: float,
    interleaved: bool,
) -> None:
    none = x[:, :0]  # no heads of k
    launch(x, none, x, none, fractions, positions, factor, interleaved, inverse=False)


class _InPlace(torch.autograd.Function):
    """An op that mutates its input cannot have its gradient registered: hence a Function.

    One tensor at a time: autograd wants a single output where the input is a view, as q is of a
    packed projection.
    """

    @staticmethod
    def forward(ctx, x, fractions, positions, factor, interleaved):
        ctx.mark_dirty(x)
        ctx.save_for_backward(fractions, positions)
        ctx.factor, ctx.interleaved = factor, interleaved
        _rope_inplace(x, fractions, positions, factor, interleaved)
        return x

    @staticmethod
    def backward(ctx, dy):
        options = (ctx.factor, ctx.interleaved, True)
        dx, _ = _rope(dy, dy[:, :0], *ctx.saved_tensors, *options)
        return dx, None, None, None, None


def check(
    q: Tensor, k: Tensor, frequencies: Tensor, positions: Tensor | None, pairing: str
) -> None:
    """ValueError unless these arguments of `rope` fit together."""
    require_runnable("rope", q, k)
    batch, _, length, head_dim = q.shape
    if k.shape[0] != batch or k.shape[2:] != q.shape[2:]:
        raise ValueError(
            f"q and k must agree in batch, length and head dim; got {tuple(q.shape)} and "
            f"{tuple(k.shape)}."
        )
    if frequencies.ndim != 1 or not 2 <= 2 * frequencies.shape[0] <= head_dim:
        raise ValueError(
            f"frequencies must be (R/2,) with R at most the head dim, {head_dim}; got "
            f"{tuple(frequencies.shape)}."
        )
    check_positions(positions, batch, length)
    if pairing not in PAIRINGS:
        raise ValueError(f"unknown pairing: {pairing!r}. Known: {', '.join(PAIRINGS)}.")


@backward_only
def rope(
    q: Tensor,
    k: Tensor,
    frequencies: Tensor,
    positions: Tensor | None = None,
    *,
    factor: float = 1.0,
    pairing: str = "half",
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k to their positions.

    Args:
        q: (B, H, T, D), any strides.
        k: (B, K, T, D), any strides; K may differ from H (grouped queries).
        frequencies: (R/2,) on the device of q, fp64 radians a position or int64 turns, see
            `posenc.kernels.turns.fractions_of`. The first R features turn,
            the rest pass through.
        positions: integers (T,) or (B, T), below 2^31 in size; None is 0 .. T-1.
        factor: multiplies the turned features (the attention factor of a scaling).
        pairing: "half" (i, i + R/2) or "interleaved" (2i, 2i + 1).
        inplace: overwrite q and k, in one launch each. As with every in-place operation, neither
            may be a leaf that requires a gradient, nor one of several views of one operation
            (`unbind`, `chunk`): index the packed projection instead.

    Returns:
        Rotated q and k in their dtype; contiguous, unless in place.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    check(q, k, frequencies, positions, pairing)
    interleaved = pairing == "interleaved"
    fractions = fractions_of(frequencies)
    if inplace and (q is k or any(0 in x.stride() for x in (q, k) if x.numel())):
        raise ValueError(
            "in place, q and k must be two tensors whose elements are all distinct. "
            "Use inplace=False, or clone them."
        )
    if inplace:
        options = (fractions, positions, float(factor), interleaved)
        return _InPlace.apply(q, *options), _InPlace.apply(k, *options)
    return _rope(q, k, fractions, positions, float(factor), interleaved, False)


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches that between them use every configuration, for `inspect_sm90`."""
    for dtype in (torch.bfloat16, torch.float32):
        for dim, rotary, interleaved in (
            (64, 64, False),
            (64, 64, True),
            (64, 32, False),
            (40, 40, True),
            (128, 128, False),
            (128, 128, True),
            (256, 256, False),
        ):
            packed = torch.empty(16, 1024, 3, 12, dim, dtype=dtype, device="meta")
            q, k, _ = packed.permute(2, 0, 3, 1, 4)
            out = torch.empty(q.shape, dtype=dtype, device="meta")
            fractions = torch.empty(rotary // 2, dtype=torch.int64, device="meta")
            positions = torch.empty(16, 1024, dtype=torch.int64, device="meta")
            name = f"{str(dtype).removeprefix('torch.')} D={dim}"
            name += f" R={rotary}" * (rotary < dim) + " interleaved" * interleaved
            turn = functools.partial(launch, q, k, out, out, fractions)
            yield name, functools.partial(turn, None, 1.0, interleaved, False)
            yield f"{name} back", functools.partial(turn, positions, 1.0, interleaved, True)
