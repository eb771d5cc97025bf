"""Which keys a query may see: one object, dense on demand, or the few numbers that a kernel needs.

query row i of T sits at key index m = i + S - T (aligned at the lower right); key n is seen if
n <= m                             causal
|m - n| < window                   counted in tokens of the row
segments[m] == segments[n]
real[n], or n == m                 a padded query sees itself: a softmax over nothing is NaN
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from posenc.placement import Placement, segment_bounds

ALL = slice(None)


class Piece(NamedTuple):
    """A rectangle of queries and keys outside which these queries see nothing."""

    batch: slice
    rows: slice
    keys: slice
    square: bool  # plainly causal, as many keys as rows: needs no dense mask


class Mask:
    """What the queries of one call may see of its keys.

    Args:
        place: lengths, padding and segments.
        causal: hide what comes later.
        window: hide what lies so many tokens away, or more.
    """

    def __init__(self, place: Placement, *, causal: bool = True, window: int | None = None) -> None:
        self.place, self.causal = place, causal
        self.length, self.key_length = place.length, place.key_length
        self.real, self.segments = place.real, place.segments
        # A window that hides nothing is none.
        self.window = None if window is None or window >= self.key_length else window

    @property
    def only_order(self) -> bool:
        """Whether nothing is hidden but, if causal, what comes later."""
        whole = self.real is None and self.segments is None and self.window is None
        return whole and self.place.at is None

    @property
    def key(self) -> tuple[bool, int | None]:
        """What tells masks of one placement apart."""
        return (self.causal, self.window)

    def whole(self) -> Tensor:
        """`dense` of everything, made once a placement."""
        return self.place.once(("mask", *self.key), self.dense)

    def dense(
        self, batch: slice | None = None, rows: slice | None = None, keys: slice | None = None
    ) -> Tensor:
        """True where a query sees a key: (T, S), or (B, 1, T, S) where rows of the batch differ."""
        every = slice(None)  # torch 2.11 compiles no slice as a default
        batch, rows, keys = batch or every, rows or every, keys or every
        device = self.place.positions.device
        at = self.place.at
        if at is None:
            at = torch.arange(self.key_length - self.length, self.key_length, device=device)
        m = at[rows].unsqueeze(-1)
        n = torch.arange(self.key_length, device=device)[keys]
        seen = m >= n if self.causal else torch.ones_like(m >= n)
        if self.window is not None:
            seen = seen & (m - n < self.window) & (n - m < self.window)
        if self.segments is not None:
            of_queries = self.segments[:, self.key_length - self.length :]
            of_rows, of_keys = of_queries[batch, rows], self.segments[batch, keys]
            seen = seen & (of_rows.unsqueeze(-1) == of_keys.unsqueeze(-2)).unsqueeze(1)
        if self.real is not None:
            seen = seen & (self.real[batch, None, None, keys] | (m == n))
        return seen

    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """The first and the last token of each token's own segment: int32 (B, S) each, or None."""
        segments = self.segments
        if segments is None:
            return None
        return self.place.once("bounds", lambda: segment_bounds(segments))

    def pieces(self, rows: int | None = None) -> Iterator[Piece]:
        """Cut T x S into rectangles that hold all that is seen, documents and windows apart.

        Syncs with the device where there are segments.

        Args:
            rows: the most rows of a piece; None cuts no more than segments do.
        """
        past = self.key_length - self.length  # the first query's own key
        behind = (self.window or self.key_length) - 1
        for batch, start, stop in self._documents():
            ahead = 0 if self.causal else (self.window or stop - start) - 1
            first = max(start, past)
            for at in range(first, stop, rows or max(stop - first, 1)):
                until = min(at + (rows or stop - first), stop)
                low, high = max(start, at - behind), min(stop, until + ahead)
                square = (
                    self.causal
                    and self.real is None
                    and high - low == until - at
                    and behind >= until - at - 1
                )
                yield Piece(batch, slice(at - past, until - past), slice(low, high), square)

    def _documents(self) -> list[tuple[slice, int, int]]:
        """Batch rows, and first and past-the-last key of every document; all rows at once where
        they agree.
        """
        segments = self.segments
        if segments is None:
            return [(ALL, 0, self.key_length)]
        return self.place.once("documents", lambda: documents(segments))


def documents(segments: Tensor) -> list[tuple[slice, int, int]]:
    """Batch rows, start and stop of every document; all rows at once where they agree."""
    edges = segments[:, 1:] != segments[:, :-1]
    if not (edges != edges[:1]).any():
        return [(ALL, *span) for span in _spans(edges[0])]
    return [(slice(b, b + 1), *span) for b, row in enumerate(edges) for span in _spans(row)]


def _spans(edges: Tensor) -> list[tuple[int, int]]:
    cuts = [0, *(edges.nonzero().flatten() + 1).tolist(), len(edges) + 1]
    return list(pairwise(cuts))
