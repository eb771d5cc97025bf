"""Where other kernels enter the flash core: how q comes in, how gradients of q and k go out.

A hook is a `triton.jit` function that the launch hands over as a constant, with arguments of its
own. The core calls it where it would load a tile of q, or store one of dq or dk; a hook reads and
writes the same rows and no others.

    load(x, b, h, extra, first, length, OPTIONS, ROWS, D, BLOCK_D) -> tile
    store(tile, x, b, h, extra, first, length, OPTIONS, ROWS, D, BLOCK_D)

x is `common.strided`, the tile fp32 (ROWS, BLOCK_D) when it is stored, rows `first` on of head h.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from posenc.kernels.common import head_of, load_tile, store_tile


class Hook(NamedTuple):
    """A hook and what it is called with."""

    function: triton.runtime.jit.KernelInterface
    extra: tuple = ()  # numbers and tensors
    options: tuple = ()  # compile-time constants


@triton.jit
def load_plain(
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
    """The tile as it lies."""
    return load_tile(head_of(x, b, h), first, length, ROWS, D, BLOCK_D)


@triton.jit
def store_plain(
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
    """The tile as it is."""
    store_tile(head_of(x, b, h), tile, first, length, ROWS, D, BLOCK_D)


LOAD, STORE = Hook(load_plain), Hook(store_plain)
