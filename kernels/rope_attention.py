"""Causal attention with RoPE in one op (arXiv 2104.09864, 2205.14135), forward and backward.

    y = attention(a R(m omega) q[m], a R(n omega) k[n], v)

Every tile of q has one owner, which turns it when it loads it; k is turned once before, because
every tile of it is read many times. In the backward pass dq and dk are turned back in the registers
that they were summed in. Against turning q, k, dq and dk in kernels of their own this saves reading
q once more, and reading and writing dq and dk.

Head dims that are not powers of two, rotations of a part of the features, and heads so wide that
the rotation would not fit the registers take those kernels.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels import flash, rope
from posenc.kernels.common import (
    backward_only,
    head_of,
    leave_out,
    load_tile,
    of_one_output,
    rows_by_head,
    store_tile,
    strided,
)
from posenc.kernels.hooks import Hook
from posenc.kernels.mask import CAUSAL, PLAIN, Arguments, Mask, arguments, every_part
from posenc.kernels.turns import fractions_of, position_arguments, rotate_rows


class Rotation(NamedTuple):
    """RoPE as the hooks take it."""

    fractions: Tensor  # int64 (D/2,), see `posenc.kernels.turns`
    positions: Tensor | None  # integer (T,) or (B, T); None is 0 .. T-1
    factor: float
    interleaved: bool

    def load(self, turned: Tensor) -> Hook:
        """Turn q as it is loaded, and keep it in `turned`."""
        return Hook(load_turned, (*self._extra(), strided(turned)), self._options())

    def store(self) -> Hook:
        """Turn a gradient back as it is stored."""
        return Hook(store_turned_back, self._extra(), self._options())

    def _extra(self) -> tuple:
        where = position_arguments(self.fractions, self.positions)
        return self.fractions, *where, self.factor

    def _options(self) -> tuple:
        return self.positions is not None, self.interleaved


@triton.jit
def load_turned(
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
    """A tile of q, turned."""
    tile = load_tile(head_of(x, b, h), first, length, ROWS, D, BLOCK_D)
    turned = rotate_rows(
        tile, extra[0], extra[1] + b * extra[2], extra[3], extra[4], first, length,
        False, OPTIONS[0], OPTIONS[1], ROWS, BLOCK_D,
    )  # fmt: skip
    target = head_of(extra[5], b, h)
    store_tile(target, turned, first, length, ROWS, D, BLOCK_D)
    # Read back, as every q tile is: a computed one would stay in registers, and at D=64 one program
    # would fit where two do.
    tl.debug_barrier()
    return load_tile(target, first, length, ROWS, D, BLOCK_D)


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
    """A tile of dq or dk, turned back."""
    tile = rotate_rows(
        tile, extra[0], extra[1] + b * extra[2], extra[3], extra[4], first, length,
        True, OPTIONS[0], OPTIONS[1], ROWS, BLOCK_D,
    )  # fmt: skip
    store_tile(head_of(x, b, h), tile, first, length, ROWS, D, BLOCK_D)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    rotation: Rotation,
    mask: Arguments = PLAIN,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o and L as `flash.forward`; turned q and k, which the backward pass takes."""
    k_turned = torch.empty_like(k, memory_format=torch.contiguous_format)
    rope.launch(k, k[:, :0], k_turned, k[:, :0], *rotation, inverse=False)
    q_turned = rows_by_head(q)
    o, lse = flash.forward(q, k_turned, v, scale, rotation.load(q_turned), mask)
    return o, lse, q_turned, k_turned


def backward(
    do: Tensor,
    saved: flash.Saved,
    scale: float,
    deterministic: bool | None,
    rotation: Rotation,
    mask: Arguments = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq and dk of q and k before they were turned, dv."""
    store = rotation.store()
    if flash.is_split(deterministic, saved.q.shape[2]):
        return flash.backward_split(do, saved, scale, store, store, mask)
    dq_sum, dk, dv = flash.backward_atomic(do, saved, scale, store, mask)
    dq = rows_by_head(saved.q)
    scaled = rotation._replace(factor=rotation.factor * scale)
    rope.launch(dq_sum, dq[:, :0], dq, dq[:, :0], *scaled, inverse=True)
    return dq, dk, dv


@torch.library.custom_op("posenc::rope_attention_forward", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fractions: Tensor,
    positions: Tensor | None,
    factor: float,
    interleaved: bool,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = arguments(Mask(window, first, last, real), k.shape[2])
    return forward(q, k, v, scale, Rotation(fractions, positions, factor, interleaved), mask)


@torch.library.custom_op("posenc::rope_attention_backward", mutates_args=())
def _backward_op(
    do: Tensor,
    q_turned: Tensor,
    k_turned: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    fractions: Tensor,
    positions: Tensor | None,
    factor: float,
    interleaved: bool,
    scale: float,
    deterministic: bool | None,
    window: int | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    saved = flash.Saved(q_turned, k_turned, v, o, lse)
    rotation = Rotation(fractions, positions, factor, interleaved)
    mask = arguments(Mask(window, first, last, real), v.shape[2])
    return backward(do, saved, scale, deterministic, rotation, mask)


@_forward_op.register_fake
def _(q, k, v, *options):
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    k_turned = torch.empty_like(k, memory_format=torch.contiguous_format)
    return rows_by_head(q), lse, rows_by_head(q), k_turned


@_backward_op.register_fake
def _(do, q_turned, k_turned, v, *options):
    return tuple(rows_by_head(x) for x in (q_turned, k_turned, v))


def _save(ctx, inputs, output) -> None:
    _, _, v, fractions, positions, *ctx.options, first, last, real = inputs
    o, lse, q_turned, k_turned = output
    leave_out(ctx, lse, q_turned, k_turned)
    tensors = (q_turned, k_turned, v, o, lse, fractions, positions, first, last, real)
    ctx.save_for_backward(*tensors)


@of_one_output
def _differentiate(ctx, do):
    *tensors, first, last, real = ctx.saved_tensors
    return *_backward_op(do, *tensors, *ctx.options, first, last, real), *(None,) * 10


_forward_op.register_autograd(_differentiate, setup_context=_save)


@backward_only
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frequencies: Tensor,
    positions: Tensor | None = None,
    *,
    factor: float = 1.0,
    pairing: str = "half",
    scale: float | None = None,
    mask: Mask = CAUSAL,
    deterministic: bool | None = None,
) -> Tensor:
    """Rotate q and k to their positions and attend causally; differentiable once.

    Args:
        q: (B, H, T, D), any strides, in bfloat16, float16 or float32; D at most 256.
        k, v: (B, G, T, D), G a divisor of H.
        frequencies, positions, factor, pairing: see `posenc.kernels.rope.rope`. The positions
            only turn: which keys a query sees goes by their order, and by the mask.
        scale, mask, deterministic: see `posenc.kernels.flash.flash_attention`.

    Returns:
        (B, H, T, D) in q's dtype.

    Raises:
        ValueError: for other shapes, dtypes or devices.
    """
    flash.check(q, k, v, scale, mask)
    rope.check(q, k, frequencies, positions, pairing)
    head_dim = q.shape[-1]
    if 2 * frequencies.shape[0] < head_dim or not fits(head_dim, q.dtype):
        q, k = rope.rope(q, k, frequencies, positions, factor=factor, pairing=pairing)
        return flash.flash_attention(q, k, v, scale=scale, mask=mask, deterministic=deterministic)
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    if torch.are_deterministic_algorithms_enabled():
        deterministic = True
    fractions, interleaved = fractions_of(frequencies), pairing == "interleaved"
    options = (fractions, positions, float(factor), interleaved, scale, deterministic)
    return _forward_op(q, k, v, *options, *mask)[0]


def fits(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the core can turn such heads: a power of two, and nothing spills."""
    return head_dim in (16, 32, 64, 128) and head_dim * dtype.itemsize <= 256


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches that between them use every configuration, for `inspect_sm90`."""
    for dtype in (torch.bfloat16, torch.float32):
        for dim, interleaved in ((16, False), (64, False), (64, True), (128, False)):
            if not fits(dim, dtype):
                continue
            packed = torch.empty(16, 1024, 3, 12, dim, dtype=dtype, device="meta")
            q, k, v = packed.permute(2, 0, 3, 1, 4)
            o, lse = rows_by_head(q), torch.empty(q.shape[:-1], device="meta")
            fractions = torch.empty(dim // 2, dtype=torch.int64, device="meta")
            positions = torch.empty(16, 1024, dtype=torch.int64, device="meta")
            plain = Rotation(fractions, None, 1.0, interleaved)
            placed = Rotation(fractions, positions, 1.0, interleaved)
            name = f"{str(dtype).removeprefix('torch.')} D={dim}" + " interleaved" * interleaved
            yield name, functools.partial(forward, q, k, v, 0.125, plain)
            back = functools.partial(backward, o, flash.Saved(q, k, v, o, lse), 0.125)
            yield name, functools.partial(back, True, placed)
            yield f"{name} atomic", functools.partial(back, False, plain)
            if dim == 64 and dtype == torch.bfloat16:
                mask = every_part(16, 1024)
                name = f"{name} masked"
                yield name, functools.partial(forward, q, k, v, 0.125, placed, mask)
                yield name, functools.partial(back, True, placed, mask)
                yield f"{name} atomic", functools.partial(back, False, placed, mask)
