"""Decoding state: named per-token streams in preallocated memory.

A stream is a tensor (B, *lead, history + max_length, F); the token at position t of the sequence
owns row history + t, and the `history` rows in front are zeros, so that what looks back from the
first token reads the same number of rows. The length is one host integer that all streams share:
truncation moves it, and nothing syncs with the device.

The past is a constant: rows are stored without their graph, and gradients flow through the current
call only.

Where no later query can see further back than a window, the rows before it are forgotten: memory is
bounded by the window, and truncation reaches back as far as rows are kept.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posenc.checks import check_ascending, check_mask, check_positions, concrete
from posenc.placement import Placement


class Stream(NamedTuple):
    """What one stream holds for each token."""

    shape: tuple[int, ...]  # (*lead, F): the batch comes before it, time before F
    dtype: torch.dtype | None = None  # None: the cache's
    history: int = 0  # rows of zeros before the first token


POSITIONS = Stream((1,), torch.int64)


class Cache:
    """The decoding state of one attention module.

    Args:
        batch_size: B, fixed.
        max_length: the most tokens it can hold.
        streams: what to remember, by name.
        device, dtype: of the streams that name no dtype.
        window: how many tokens a query sees, itself among them; None is all.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        streams: Mapping[str, Stream],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        window: int | None = None,
    ) -> None:
        self.streams = {"positions": POSITIONS, **streams}
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"a cache holds floating-point numbers; got {dtype}.")
        if batch_size < 1 or max_length < 1:
            raise ValueError(
                "a cache needs batch_size and max_length of at least 1; "
                f"got {batch_size}, {max_length}."
            )
        self.batch_size, self.max_length = batch_size, max_length
        self.length = 0
        #: Tokens in front that are forgotten.
        self.start = 0
        # Rows that a query may still read; as many again are kept for truncation, and room for as
        # many more, so that rows move once in so many tokens.
        self._history = {name: stream.history for name, stream in self.streams.items()}
        self._keep = None if window is None else max(window - 1, *self._history.values(), 1)
        self._room = max_length
        if self._keep is not None:
            self._room = min(max_length, 3 * self._keep)
        self._pending: dict[str, Tensor] = {}
        # Whether the caller gave positions, and whether a row of them for each sequence: for the
        # tokens so far, and with those of the present call.
        self._given = self._ragged = False
        self._next = (False, False)
        # What lies beyond the length is never read; only the rows in front of it must be zeros.
        self._rows = {
            name: torch.empty(
                (batch_size, *stream.shape[:-1], stream.history + self._room, stream.shape[-1]),
                dtype=stream.dtype or dtype,
                device=device,
            )
            for name, stream in self.streams.items()
        }
        for name, history in self._history.items():
            self._rows[name].narrow(-2, 0, history).zero_()

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        return True  # an empty cache is still a cache

    def check(self, streams: Mapping[str, Stream], batch_size: int, tokens: int) -> None:
        """ValueError unless made for these streams, and `tokens` more of `batch_size` fit."""
        if {"positions": POSITIONS, **streams} != self.streams:
            raise ValueError(
                f"the cache holds the streams {sorted(self.streams)} of another module; "
                f"expected {sorted(streams)}. Use this module's make_cache."
            )
        if batch_size != self.batch_size:
            raise ValueError(
                f"the cache was made for batch size {self.batch_size}; got {batch_size}. "
                "Make a cache for this batch."
            )
        if self.length + tokens > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens; got {self.length} + {tokens}. "
                "Make it with a larger max_length."
            )

    @property
    def seen(self) -> int:
        """How many past tokens the next call's queries can meet."""
        kept = self.length - self.start
        return kept if self._keep is None else min(kept, self._keep)

    def place(self, positions: Tensor | None, tokens: int, mask: Tensor | None = None) -> Placement:
        """Placement of the next `tokens` tokens among those stored.

        Args:
            positions: checked ones; None continues what is stored.
            mask: bool (B, tokens), False for padding.
        """
        self._next = (self._given, self._ragged)  # whatever a call that failed had left
        self._pending.clear()
        rows = self._rows["positions"]  # (B, room, 1)
        count = self.seen + tokens
        if positions is None and mask is None and not self._given:
            where = torch.arange(self.length, self.length + tokens, device=rows.device)
            return Placement(where, length=tokens, key_length=count)
        if not self._given:
            rows[:, : self.length - self.start, 0] = torch.arange(
                self.start, self.length, device=rows.device
            )
        ragged = self._ragged or mask is not None or (positions is not None and positions.ndim == 2)
        if positions is None:
            past = rows[:, : self.length - self.start, 0]
            last = (
                past.amax(1, keepdim=True) if past.shape[1] else past.new_full((len(past), 1), -1)
            )
            real = torch.ones_like(last).expand(-1, tokens) if mask is None else mask.long()
            positions = last + real.cumsum(1)
            positions = positions if ragged else positions[0]
        if mask is not None:
            positions = positions.expand(self.batch_size, tokens).masked_fill(~mask, -1)
        stored = positions.expand(self.batch_size, tokens).unsqueeze(-1)
        keys = self.append("positions", stored).squeeze(-1)
        check_ascending(keys, keys >= 0 if ragged else None)
        self._next = (True, ragged)  # counts once the tokens do
        return Placement(
            positions,
            length=tokens,
            key_length=count,
            keys=keys,
            real=keys >= 0 if ragged else None,
        )

    def append(self, name: str, rows: Tensor) -> Tensor:
        """Store the new tokens' rows (B, *lead, T, F) and return those of all tokens that the
        queries can meet, in rows' dtype.

        The length moves when `advance` says that every stream has been appended to.
        """
        stored, count = self._rows[name], rows.shape[-2]
        end = self._history[name] + self.length - self.start
        seen, with_graph = self.seen, torch.is_grad_enabled()
        if end + count > stored.shape[-2]:
            # Forgetting waits for `advance`: a call that fails loses nothing.
            self._pending[name] = rows.detach()
            past = stored.narrow(-2, end - seen, seen).to(rows.dtype)
            return torch.cat((past, rows.to(stored.dtype).to(rows.dtype)), dim=-2)
        stored.narrow(-2, end, count).copy_(rows.detach() if with_graph else rows)
        if with_graph:
            # A copy: what autograd saves must not be overwritten by the next call.
            before = stored.narrow(-2, end - seen, seen).to(rows.dtype)
            return torch.cat((before, rows.to(stored.dtype).to(rows.dtype)), dim=-2)
        kept = stored.narrow(-2, end - seen, seen + count)
        return kept if kept.dtype == rows.dtype else kept.to(rows.dtype)

    def recent(self, name: str) -> Tensor:
        """The last `history` rows (B, *lead, history, F), zeros before the first token."""
        at = self.length - self.start
        return self._rows[name].narrow(-2, at, self._history[name]).clone()

    def advance(self, tokens: int) -> None:
        """Count `tokens` appended tokens."""
        if self.length - self.start + tokens > self._room:
            self._forget(tokens)
        self.length += tokens
        self._given, self._ragged = self._next

    def _forget(self, tokens: int) -> None:
        """Make room for pending rows, keeping twice what a query may read."""
        assert self._keep is not None
        start = max(self.start, self.length + tokens - 2 * self._keep)
        for name, stored in self._rows.items():
            end = self._history[name] + self.length - self.start
            past = stored.narrow(-2, 0, end)
            if name in self._pending:
                rows = self._pending[name].to(stored.dtype)
                past = torch.cat((past, rows), dim=-2)
            elif name == "positions":
                continue  # nobody gave any
            # Of each stream the rows from its history before `start` on.
            past = past[..., start - self.start :, :].clone()
            stored.narrow(-2, 0, past.shape[-2]).copy_(past)
        self._pending.clear()
        self.start = start

    def check_truncation(self, length: int) -> None:
        """Raise ValueError beyond the present length, or back to where a window has forgotten what
        the next query would see.
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"a cache of {self.length} tokens truncates to 0 .. {self.length}; got {length}."
            )
        least = self.start + self._keep if self._keep is not None and self.start else 0
        if 0 < length < least:
            raise ValueError(
                f"with its window this cache has forgotten the tokens before {self.start}: it "
                f"truncates to {least} .. {self.length}, or to 0; got {length}. "
                "Decode the text anew."
            )

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on; errors as `check_truncation`'s."""
        self.check_truncation(length)
        self.length = length
        if length == 0:
            self.start = 0
            for name, history in self._history.items():
                self._rows[name].narrow(-2, 0, history).zero_()
            self._given = self._ragged = False
        self._next = (self._given, self._ragged)

    def reorder(self, index: Tensor) -> None:
        """Let row b go on with what row index[b] holds (beam search).

        Args:
            index: integer (B,), rows of the batch.

        Raises:
            ValueError: for another shape or dtype.
        """
        check_index(index, self.batch_size)
        index = index.to(self._rows["positions"].device)
        for name, stored in self._rows.items():
            used = stored.narrow(-2, 0, self._history[name] + self.length - self.start)
            used.copy_(used.index_select(0, index))

    def select(self, index: Tensor) -> None:
        """Go on with a batch of which row b is row index[b] of the present one.

        Args:
            index: integer (N,), rows of the batch; N becomes the batch size.

        Raises:
            ValueError: for another shape or dtype.
        """
        check_rows(index, self.batch_size)
        index = index.to(self._rows["positions"].device)
        self._rows = {name: rows.index_select(0, index) for name, rows in self._rows.items()}
        self.batch_size = len(index)

    def extend(self, max_length: int) -> None:
        """Make room for so many tokens in all, at least as many as before; what is stored stays.

        Raises:
            ValueError: for less room, or no whole number.
        """
        if not isinstance(max_length, int) or max_length < self.max_length:
            raise ValueError(
                f"extend takes the new max_length, at least {self.max_length}; got {max_length!r}."
            )
        self.max_length = max_length
        room = self.max_length if self._keep is None else min(self.max_length, 3 * self._keep)
        more, self._room = room - self._room, room
        if more > 0:
            # Beyond the length nothing is read.
            self._rows = {
                name: torch.cat((rows, rows.new_empty(*rows.shape[:-2], more, rows.shape[-1])), -2)
                for name, rows in self._rows.items()
            }

    @property
    def nbytes(self) -> int:
        """Bytes of all streams, at full length."""
        return sum(rows.nbytes for rows in self._rows.values())


def check_index(index: Tensor, batch_size: int) -> None:
    """Raise ValueError unless integer (B,), of rows 0 .. B-1."""
    if not isinstance(index, Tensor) or index.shape != (batch_size,):
        got = tuple(index.shape) if isinstance(index, Tensor) else repr(index)
        raise ValueError(
            f"reorder takes an integer tensor of shape ({batch_size},), a row of the batch each; "
            f"got {got}."
        )
    check_rows(index, batch_size)


def check_rows(index: Tensor, batch_size: int) -> None:
    """Raise ValueError unless integer (N,), of rows 0 .. B-1."""
    whole = isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64)
    if not whole or index.ndim != 1 or not len(index):
        got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else repr(index)
        raise ValueError(f"an index of rows must be an integer tensor (N,); got {got}.")
    if index.device.type == "cpu" and concrete(index):
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= batch_size:
            raise ValueError(
                f"an index of rows must be of 0 .. {batch_size - 1}; got "
                f"{low if low < 0 else high}. Give the row that each goes on with."
            )


def cache_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which projections by `weight` come: autocast's where it is on."""
    kind = weight.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def check_cache(cache: object, kind: type) -> None:
    """Raise ValueError for a cache of another kind."""
    if not isinstance(cache, kind):
        raise ValueError(
            f"cache must be a {kind.__name__}; got {type(cache).__name__}. "
            "Make it with this module's make_cache."
        )


class ModelCache:
    """The decoding state of a model: one cache a layer, and the model's own."""

    def __init__(self, own: Cache, layers: Sequence[Cache]) -> None:
        self.own, self.layers = own, tuple(layers)

    @property
    def length(self) -> int:
        return self.own.length

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        return True

    @property
    def max_length(self) -> int:
        return self.own.max_length

    @property
    def nbytes(self) -> int:
        return self.own.nbytes + sum(layer.nbytes for layer in self.layers)

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on, in every layer; all or, with an error, none."""
        for cache in (self.own, *self.layers):
            cache.check_truncation(length)
        for cache in (self.own, *self.layers):
            cache.truncate(length)

    def reorder(self, index: Tensor) -> None:
        """Let row b go on with what row index[b] holds, in every layer (beam search)."""
        for cache in (self.own, *self.layers):
            cache.reorder(index)

    def select(self, index: Tensor) -> None:
        """Go on with a batch of which row b is row index[b] of the present one, in every layer."""
        for cache in (self.own, *self.layers):
            cache.select(index)

    def extend(self, max_length: int) -> None:
        """Make room for so many tokens in all, in every layer; what is stored stays."""
        for cache in (self.own, *self.layers):
            cache.extend(max_length)


def check_no_segments(segments: Tensor | None) -> None:
    """Raise ValueError for segments beside a cache."""
    if segments is not None:
        raise ValueError(
            "segments do not go with a cache, which holds one document a row; got both. Decode "
            "documents as rows of a batch, of different lengths by mask=."
        )


def place_after(
    cache: Cache,
    batch: int,
    length: int,
    device: torch.device,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    axes: int | None = None,
    continuous: bool = False,
) -> Placement:
    """Placement of the tokens of a call after those of a cache; arguments as in `place`.

    Where positions are no counts of tokens (several axes, floating-point numbers) the cache counts
    tokens, and the caller gives their positions at every call.
    """
    if mask is not None:
        check_mask(mask, batch, length)
    if positions is None and axes is None:
        return cache.place(None, length, mask)
    positions = check_positions(positions, batch, length, device, axes=axes, continuous=continuous)
    if axes is None and not continuous:
        return cache.place(positions, length, mask)
    where = cache.place(None, length, mask)
    return Placement(positions, length=length, key_length=where.key_length, real=where.real)
