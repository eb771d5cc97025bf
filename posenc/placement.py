"""Where the queries and keys of one call sit, and what was computed of that alone.

A model makes one placement a forward pass and hands it to all layers: what depends on positions
alone (cosines and sines, masks) is then computed once and serves every layer that asks for the
same, see `Placement.once`.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from posenc.checks import check_ascending, check_mask, check_positions, check_segments

T = TypeVar("T")
_NOTHING = object()


class Placement:
    """Positions of T queries and S keys, and what hides some of them.

    Attributes:
        positions: of the queries, (T,) or (B, T); with axes (T, A) or (B, T, A).
        keys: of the keys, (S,) or (B, S); None: consecutive tokens, ending with the queries.
        real: (B, S) bool, False for padding; None: no padding.
        segments: of the keys, integer (B, S), equal within a document; None: one document a row.
        length, key_length: T and S.
        at: of the queries among the keys, (T,); None: they are the last.
    """

    def __init__(
        self,
        positions: Tensor,
        *,
        length: int | None = None,
        key_length: int | None = None,
        keys: Tensor | None = None,
        real: Tensor | None = None,
        segments: Tensor | None = None,
        at: Tensor | None = None,
    ) -> None:
        self.at = at
        self.positions, self.keys = positions, keys
        self.real, self.segments = real, segments
        self.length = positions.shape[-1] if length is None else length
        self.key_length = self.length if key_length is None else key_length
        self._made: dict[Hashable, Any] = {}

    @property
    def here(self) -> Tensor | None:
        """`real` of the queries' own tokens: (B, T)."""
        return None if self.real is None else self.real[:, -self.length :]

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made at the first call with this key.

        The key holds every argument that the result depends on beside the placement.
        """
        made = self._made.get(key, _NOTHING)
        if made is _NOTHING:
            made = self._made[key] = make()
        return made

    def ending(self, key_length: int) -> "Placement":
        """The same queries over the last `key_length` keys alone."""
        if key_length == self.key_length:
            return self

        def shorten() -> Placement:
            last = slice(self.key_length - key_length, None)
            return Placement(
                self.positions,
                length=self.length,
                key_length=key_length,
                keys=None if self.keys is None else self.keys[..., last],
                real=None if self.real is None else self.real[:, last],
            )

        return self.once(("ending", key_length), shorten)

    def block(self, rows: slice, keys: slice) -> "Placement":
        """Some queries over some keys, of which they are the last where positions were not given.

        Both slices have a start and a stop.
        """

        def cut() -> Placement:
            return Placement(
                self.positions[..., rows],
                length=rows.stop - rows.start,
                key_length=keys.stop - keys.start,
                keys=None if self.keys is None else self.keys[..., keys],
                real=None if self.real is None else self.real[:, keys],
                segments=None if self.segments is None else self.segments[:, keys],
            )

        return self.once(("block", rows.start, rows.stop, keys.start, keys.stop), cut)


def place(
    batch: int,
    length: int,
    device: torch.device,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    *,
    axes: int | None = None,
    continuous: bool = False,
    ordered: bool = True,
) -> Placement:
    """Placement without a past, from what a user gave.

    Args:
        positions: (T,), (1, T) or (B, T), with axes (.., A); None counts real tokens, from 0 in
            each document. A negative entry of integers (B, T) is padding.
        mask: bool (B, T), False for padding.
        segments: integer (B, T), equal within a document.
        axes: A, coordinates of a position; None is one, without a dimension of its own.
        continuous: take floating-point positions.
        ordered: refuse positions that fall within a document (looked at on CPU).

    Raises:
        ValueError: for wrong shapes or dtypes, documents that come back, and positions that fall
            where no segments say why.
    """
    if mask is not None:
        check_mask(mask, batch, length)
    if segments is not None:
        check_segments(segments, batch, length)
    if positions is None:
        if axes is not None:
            check_positions(None, batch, length, device, axes=axes)
        counted = count(batch, length, device, mask, segments)
        keys = counted if mask is not None and may_have_holes(mask) else None
        return Placement(counted, length=length, keys=keys, real=mask, segments=segments)
    positions = check_positions(positions, batch, length, device, axes=axes, continuous=continuous)
    real = mask
    if positions.ndim == 2 and axes is None and not continuous:
        real = positions >= 0 if mask is None else mask & (positions >= 0)
        real = real.expand(batch, length)
    if ordered and axes is None and segments is None and not continuous:
        check_ascending(positions, real)
    keys = positions if axes is None else None
    return Placement(positions, length=length, keys=keys, real=real, segments=segments)


def given(
    positions: Tensor, keys: Tensor, axes: int | None = None, continuous: bool = False
) -> Placement:
    """Placement at positions of queries and keys; negative entries of integers (B, S) are padding.

    Args:
        positions: (T,) or (B, T), with axes (.., A). keys: (S,) or (B, S), with axes (.., A).
    """
    time = -1 if axes is None else -2
    counts = axes is None and not continuous and keys.ndim == 2
    return Placement(
        positions,
        length=positions.shape[time],
        key_length=keys.shape[time],
        keys=keys,
        real=keys >= 0 if counts else None,
    )


def count(
    batch: int, length: int, device: torch.device, mask: Tensor | None, segments: Tensor | None
) -> Tensor:
    """Positions that count real tokens, from 0 in each document: (T,) or (B, T), -1 at padding."""
    if mask is None and segments is None:
        return torch.arange(length, device=device)
    if mask is None:
        assert segments is not None
        first, _ = segment_bounds(segments)
        return torch.arange(length, device=device) - first
    counted = mask.long().cumsum(1)
    if segments is not None:
        first, _ = segment_bounds(segments)
        before = counted - mask.long()  # real tokens in front
        counted = counted - before.gather(1, first.long())
    return torch.where(mask, counted - 1, -1)


def may_have_holes(mask: Tensor) -> bool:
    """Whether padding may stand between real tokens of a row: looked at on CPU alone."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    rises = (mask[:, 1:] > mask[:, :-1]).sum(1) + mask[:, 0]
    return bool((rises > 1).any())


def segment_bounds(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first and the last token of each token's own document, (B, T) int32 each."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    edge = segments[:, 1:] != segments[:, :-1]
    outer = edge.new_ones(len(segments), 1)
    starts, ends = torch.cat((outer, edge), dim=1), torch.cat((edge, outer), dim=1)
    first = index.where(starts, 0).cummax(1).values
    last = index.where(ends, segments.shape[1]).flip(1).cummin(1).values.flip(1)
    return first.int(), last.int()


def segments(
    lengths: Sequence[int] | Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The documents of one packed row: 0, .., 0, 1, .., 1, 2, .. of shape (1, T), int64.

    Args:
        lengths: of the documents, in their order; or
        cu_seqlens: integer (N + 1,), where they start, and T: 0, .., T.

    Raises:
        ValueError: for both or neither, a length below 1, or cumulated lengths that do not rise
            from 0.
    """
    if (lengths is None) == (cu_seqlens is None):
        raise ValueError("segments takes the documents' lengths or cu_seqlens=, one of the two.")
    if cu_seqlens is not None:
        bounds = torch.as_tensor(cu_seqlens)
        whole = not (bounds.dtype.is_floating_point or bounds.dtype == torch.bool)
        row = whole and bounds.ndim == 1 and len(bounds) > 1
        if not row or bounds[0] != 0 or (bounds.diff() < 1).any():
            raise ValueError(
                "cu_seqlens must be integers (N + 1,) that rise from 0 to the number of tokens; "
                f"got {cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens}. "
                "Leave empty documents out."
            )
        counts = bounds.diff()
    else:
        counts = torch.as_tensor(lengths)
        whole = not (counts.dtype.is_floating_point or counts.dtype == torch.bool)
        if not whole or counts.ndim != 1 or not len(counts) or (counts < 1).any():
            raise ValueError(
                "the lengths of documents must be integers of at least 1; "
                f"got {counts.tolist()}. Leave empty documents out."
            )
    index = torch.arange(len(counts), device=counts.device)
    return index.repeat_interleave(counts.long()).unsqueeze(0)
