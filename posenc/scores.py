"""How an encoding enters the logits.

    logits[m, n] = scale * ((q[m] + content_h) . k[n] + relative[m, n]) + bias[m, n]
    relative     = (q[m] + query_h) . table[h, d] + offset[h, d],    d the distance of m and n

The relative term stays factored until a back end needs it. Shapes: q (B, H, T, D), keys S >= T.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RelativeTerm(NamedTuple):
    """A query-dependent term of the distance; distances beyond the table use its last row."""

    table: Tensor  # (H, P, D)
    query: Tensor | None = None  # (H, D)
    offset: Tensor | None = None  # (H, P)
    distances: Tensor | None = None  # integer (T, S) or (B, 1, T, S); None: consecutive keys


class Scores(NamedTuple):
    """What changes plain q . k / sqrt(D); every default leaves it."""

    scale: float | None = None  # None is 1/sqrt(D)
    content: Tensor | None = None  # (H, D)
    bias: Tensor | None = None  # broadcastable to (B, H, T, S)
    relative: RelativeTerm | None = None

    def factor(self, head_dim: int) -> float:
        """The scale as a number."""
        return head_dim**-0.5 if self.scale is None else self.scale


def add_per_head(q: Tensor, bias: Tensor | None) -> Tensor:
    """q (B, H, T, D) plus a vector a head (H, D), in q's dtype."""
    return q if bias is None else q + bias.unsqueeze(-2).to(q.dtype)


def falling_table(
    term: RelativeTerm, key_length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The table (H, D, S + 1) and its offsets (H, 1, S + 1) at the distances S, S-1, .. 0."""
    falling = torch.arange(key_length, -1, -1, device=term.table.device)
    falling = falling.clamp(max=term.table.shape[-2] - 1)
    columns = term.table[:, falling].to(dtype).transpose(1, 2)
    if term.offset is None:
        return columns, None
    return columns, term.offset[:, falling].to(dtype).unsqueeze(1)


def skew(by_distance: Tensor) -> Tensor:
    """From columns of falling distance to columns of keys: (.., T, S + 1) -> (.., T, S), a view.

    Row i is the query at key index S - T + i, so key n lies at distance S-T+i-n, in column T-i+n,
    hence at flat index i*S + n + T: reading rows one element shorter puts every key in its place.
    Entries with n > S - T + i hold other rows' values and must be masked.
    """
    length, key_length = by_distance.shape[-2], by_distance.shape[-1] - 1
    return by_distance.flatten(-2)[..., length:].unflatten(-1, (length, key_length))


def relative_logits(q: Tensor, term: RelativeTerm, key_length: int) -> Tensor:
    """The relative term, unscaled: (B, H, T, S). Entries above the diagonal must be masked."""
    query = add_per_head(q, term.query)
    if term.distances is None:
        columns, offset = falling_table(term, key_length, q.dtype)
        by_distance = query @ columns  # (B, H, T, S + 1)
        return skew(by_distance if offset is None else by_distance + offset)
    by_distance = query @ term.table.to(q.dtype).transpose(-1, -2)  # (B, H, T, P)
    if term.offset is not None:
        by_distance = by_distance + term.offset.to(q.dtype).unsqueeze(-2)
    distances = term.distances.clamp(0, term.table.shape[-2] - 1)
    return by_distance.gather(-1, distances.expand(*q.shape[:2], *distances.shape[-2:]))
