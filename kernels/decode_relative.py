"""The relative term of few queries, by key: what `posenc.kernels.decode` adds to its logits where
they have one (1901.02860, 2308.03429). Inference alone: there is no gradient.

    term[b, h, m, n] = scale (q[b, h, m].R[h, m - n] + S[h, m - n])        n <= m, key indices

R (H, P, D) holds a row a distance; distances of P and beyond use the last. A program takes some
distances of one head, reads their rows once for all sequences and queries, and writes every product
where its key stands: at n = m - d, another place in each row. What is written for a query are 4
bytes a key, which is itself 2 D numbers.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels.common import (
    block_of,
    check_weights,
    device_of,
    inference_only,
    require_runnable,
    rows_at,
    strided,
    tile_options,
)
from posenc.kernels.flash import Config
from posenc.kernels.skew import load_rows_at
from posenc.kernels.tiles import config_of

MAX_HEAD_DIM = 128
#: By bytes of an element, and the head dim rounded up to a power of two (at least 32).
CONFIGS = {
    (2, 32): Config(16, 64, 4, 2),
    (2, 64): Config(16, 64, 4, 2),
    (2, 128): Config(16, 64, 4, 2),
    (4, 32): Config(16, 32, 4, 2),
    (4, 64): Config(16, 32, 4, 2),
    (4, 128): Config(16, 32, 4, 1),
}


@triton.jit(do_not_specialize=["B", "H", "T", "S", "P", "distances"])
def term_kernel(
    q,
    table,
    offsets,
    term,
    B,
    H,
    T,
    S,
    P,
    distances,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Distances from BLOCK_N p on, of `distances`, for all queries of a head.

    q: `common.strided`. table: contiguous (H, P, D). offsets: contiguous (H, P), or None. term:
    contiguous fp32 (B, H, T, S), of which keys further away or after the query are left as they
    are.
    """
    blocks = tl.cdiv(distances, BLOCK_N)
    h = (tl.program_id(0) // blocks).to(tl.int64)
    distance = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = load_rows_at(table + h * P * D, distance, P, D, BLOCK_D, False)
    rows = rows.to(q[0].dtype.element_ty)
    own = None
    if offsets is not None:
        own = tl.load(offsets + h * P + tl.minimum(distance, P - 1)).to(tl.float32)[None, :]
    columns = tl.arange(0, BLOCK_D)
    for first in range(0, B * T, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        inside = place < B * T
        b, t = (place // T).to(tl.int64), place % T
        at = rows_at(q, b, h, t.to(tl.int64), columns)
        q_tile = tl.load(at, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
        s = tl.dot(q_tile, tl.trans(rows), input_precision=PRECISION)
        if own is not None:
            s += own
        n = (t + (S - T))[:, None] - distance[None, :]
        to = term + (((b * H + h) * T + t) * S)[:, None] + n
        written = inside[:, None] & (n >= 0) & (distance < distances)[None, :]
        tl.store(to, s * scale, mask=written)


def forward(
    q: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    keys: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """The term of checked arguments."""
    batch, heads, length, _ = q.shape
    term = q.new_empty((batch, heads, length, keys), dtype=torch.float32)
    key = q.element_size(), max(32, block_of(q))
    config = config_of("decode_relative", CONFIGS, key, q.device)
    distances = keys if window is None else min(window, keys)
    offsets = None if offsets is None else offsets.contiguous()
    with device_of(q):
        term_kernel[(triton.cdiv(distances, config.block_n) * heads,)](
            strided(q), table.contiguous(), offsets, term,
            batch, heads, length, keys, table.shape[1], distances, scale,
            **tile_options(q, config),
        )  # fmt: skip
    return term


@torch.library.custom_op("posenc::relative_by_key", mutates_args=())
def _op(
    q: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    keys: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    return forward(q, table, offsets, keys, scale, window)


@_op.register_fake
def _(q, table, offsets, keys, *options):
    return q.new_empty((*q.shape[:3], keys), dtype=torch.float32)


@inference_only
def relative_by_key(
    q: Tensor,
    table: Tensor,
    offsets: Tensor | None = None,
    *,
    keys: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """The relative term of the last few of so many tokens, without a gradient.

    Args:
        q: (B, H, T, D) with what is added to it for this term, D at most 128, in bfloat16, float16
            or float32, any strides.
        table: R (H, P, D), floating point; rounded to q's dtype for the product.
        offsets: S (H, P), floating point.
        keys: S, T at least: query row i sits at key index S - T + i.
        scale: of the term.
        window: keys so many tokens away, or more, are left out.

    Returns:
        fp32 (B, H, T, S); what no query sees, after it or beyond the window, is not initialised.

    Raises:
        ValueError: for other shapes, dtypes or devices, and where anything is to be differentiated.
    """
    require_runnable("relative_by_key", q)
    heads, dim = q.shape[1], q.shape[3]
    if table.dim() != 3 or not table.shape[1]:
        raise ValueError(f"table must be (H={heads}, P, D={dim}); got {tuple(table.shape)}.")
    if dim > MAX_HEAD_DIM:
        raise ValueError(
            f"relative terms need a head dim of at most {MAX_HEAD_DIM}; got {dim}. "
            "Use more heads, or impl='sdpa'."
        )
    if q.shape[2] > keys:
        raise ValueError(f"expected at least as many keys as queries; got {q.shape[2]}, {keys}.")
    check_weights("table", table, q.device, (heads, table.shape[1], dim))
    check_weights("offsets", offsets, q.device, (heads, table.shape[1]))
    y: Tensor = _op(q, table, offsets, keys, scale, window)
    return y


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named launches that between them use every configuration, for `inspect_sm90`."""
    half, single = torch.bfloat16, torch.float32
    for dtype in (half, single):
        for dim in (32, 64, 100, 128):
            q = torch.empty(16, 12, 1, dim, dtype=dtype, device="meta")
            table = torch.empty(12, 4096, dim, device="meta")
            name = f"{str(dtype).removeprefix('torch.')} D={dim}"
            offsets = None if dim == 128 else table[..., 0]
            yield name, functools.partial(forward, q, table, offsets, 4096, 0.125)
