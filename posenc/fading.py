"""Features whose products fade with the distance, folded into q and k.

    logits[m, n] = scale * sum over c of q_c exp(-rate_c (m - n)) k_c,   n <= m
                 = scale * sum over c of (q_c exp(rate_c (x - m))) (k_c exp(rate_c (n - x)))

whatever x is. Absolute powers (x = 0) overflow, and a cached one cannot be moved; about an x amid
the queries both factors are moderate at every position, and that of a key far before them vanishes
as its product does. Queries too far apart for one x go in blocks, each with its own.
"""

import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from posenc.checks import concrete
from posenc.phase import repeat_heads
from posenc.placement import Placement

#: Factors stay within this root of the largest number, or of its inverse: the products of keys
#: after the query, which are hidden, within the square root.
ROOT = 4


class Fading(NamedTuple):
    """How fast features fade; equal keys mean equal numbers."""

    key: Hashable
    make: Callable[[torch.device], Tensor]  # rates (D,) a token, above 0, in fp64
    fastest: float  # of them

    def reach(self, dtype: torch.dtype) -> int:
        """How far apart queries may stand that one x serves."""
        return int(2 * _most(dtype) / self.fastest)


def _most(dtype: torch.dtype) -> float:
    """The largest exponent of a factor."""
    return math.log(torch.finfo(dtype).max) / ROOT


def powers(fading: Fading, place: Placement, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors of q and k, about an x amid the queries: (T, D) or (B, 1, T, D), (S, D) or (B, 1, S,
    D), in fp32 or better, once a placement.

    Args:
        dtype: of q and k, which must hold them.
    """

    def make() -> tuple[Tensor, Tensor]:
        rates, most = fading.make(place.positions.device), _most(dtype)
        queries, keys = _from_middle(place)
        if place.here is not None:  # what padding sees counts nowhere, but has to stay finite
            queries = queries.where(place.here, 0.0)
        on_q, on_k = ((x.unsqueeze(-1) * rates).clamp(max=most) for x in (-queries, keys))
        on_q = on_q.clamp(min=-most)
        factors = (x.to(torch.promote_types(dtype, torch.float32)).exp() for x in (on_q, on_k))
        on_q, on_k = (x if x.ndim == 2 else x.unsqueeze(1) for x in factors)
        return on_q, on_k

    return place.once(("fading", fading.key, dtype), make)


def _from_middle(place: Placement) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys less that amid the queries, in fp64."""
    if place.keys is None:
        twice = 2 * torch.arange(place.key_length, device=place.positions.device)
        keys = (twice - (2 * place.key_length - place.length - 1)).double() / 2
        return keys[place.key_length - place.length :], keys
    first, last = _ends(place)
    middle = ((first + last) / 2).nan_to_num(0, 0, 0)  # of rows of padding alone
    return place.positions - middle, place.keys - middle


def _ends(place: Placement) -> tuple[Tensor, Tensor]:
    """The lowest and highest position of real queries: (1,) or (B, 1) each, in fp64."""
    positions, real = place.positions.double(), place.here
    if real is None:
        return positions.amin(-1, keepdim=True), positions.amax(-1, keepdim=True)
    low, high = positions.where(real, math.inf), positions.where(real, -math.inf)
    return low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)


def fade(q: Tensor, k: Tensor, fading: Fading, place: Placement) -> tuple[Tensor, Tensor]:
    """Turned q (B, H, T, D) and k (B, G, S, D) times their powers, in their dtype."""
    on_q, on_k = powers(fading, place, q.dtype)
    if torch.compiler.is_compiling():  # else a step that fills a cache would be a graph of its own
        k = k.clone(memory_format=torch.contiguous_format)
    return (q.to(on_q.dtype) * on_q).to(q.dtype), (k.to(on_k.dtype) * on_k).to(k.dtype)


def blocks(fading: Fading, place: Placement, dtype: torch.dtype) -> list[slice]:
    """The queries in blocks that one x serves each.

    Positions that count tokens rise by at most one a row. Given ones are looked at on CPU alone;
    elsewhere, and under a compiler, they are taken for such, which is right while no block of
    `Fading.reach` rows spans more.
    """
    length, reach = place.length, fading.reach(dtype)
    rows = reach + 1
    looks = place.positions.device.type == "cpu" and concrete(place.positions)
    if length > 1 and place.keys is not None and looks:
        starts = place.once(("apart", reach), lambda: _starts(place, reach))
    elif length <= rows:
        return [slice(0, length)]
    else:
        starts = [i * rows for i in range(-(-length // rows))]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], length], strict=True)]


def _starts(place: Placement, reach: int) -> list[int]:
    """Where blocks start whose real queries lie within `reach` of each other, in every row."""
    positions, real = place.positions.double(), place.here
    low = positions if real is None else positions.where(real, math.inf)
    high = positions if real is None else positions.where(real, -math.inf)
    starts, start = [], 0
    while start < place.length:
        starts.append(start)
        lowest = low[..., start:].cummin(-1).values
        within = high[..., start:].cummax(-1).values - lowest <= reach
        start += int(within.reshape(-1, within.shape[-1]).all(0).sum())
    return starts


def faded_logits(q: Tensor, k: Tensor, fading: Fading, place: Placement) -> Tensor:
    """The products, unscaled: (B, H, T, S); keys after the query must be masked."""
    k, parts, later = repeat_heads(k, q.shape[1], dim=1), [], 0
    for rows in blocks(fading, place, q.dtype):
        if place.keys is None or place.real is not None:  # the queries are the last of the keys
            later = place.length - rows.stop
        keys = slice(0, place.key_length - later)
        query, key = fade(q[..., rows, :], k[..., keys, :], fading, place.block(rows, keys))
        parts.append(F.pad(query @ key.mT, (0, later)))
    return torch.cat(parts, dim=-2)
