"""Decoding state: named per-token streams in preallocated memory.

A stream is a tensor (B, *lead, history + max_length, F); the token at position t of the sequence
owns row history + t, and the `history` rows in front are zeros, so that what looks back from the
first token reads the same number of rows. The length is one host integer that all streams share:
truncation moves it, and nothing syncs with the device.

The past is a constant: rows are stored without their graph, and gradients flow through the current
call only.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Stream(NamedTuple):
    """What one stream holds for each token."""

    shape: tuple[int, ...]  # (*lead, F): the batch comes before it, time before F
    dtype: torch.dtype | None = None  # None: the cache's
    history: int = 0  # rows of zeros before the first token


POSITIONS = Stream((1,), torch.int64)


class Placement(NamedTuple):
    """Where the queries and keys of one call sit."""

    positions: Tensor  # (T,) or (B, T)
    keys: Tensor | None = None  # (S,) or (B, S); None: consecutive, ending with the queries
    real: Tensor | None = None  # (B, S) bool, False for padding; None: no padding


def place(positions: Tensor, *, given: bool = False) -> Placement:
    """Placement without a past. A negative entry of given (B, T) positions marks padding."""
    if not given:
        return Placement(positions)
    return Placement(positions, positions, positions >= 0 if positions.ndim == 2 else None)


class Cache:
    """The decoding state of one attention module.

    Args:
        batch_size: B, fixed.
        max_length: the most tokens it can hold.
        streams: what to remember, by name.
        device, dtype: of the streams that name no dtype.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        streams: Mapping[str, Stream],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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
        # Whether the caller gave positions, and whether a row of them for each sequence: for the
        # tokens so far, and with those of the present call.
        self._given = self._ragged = False
        self._next = (False, False)
        self._history = {name: stream.history for name, stream in self.streams.items()}
        # What lies beyond the length is never read; only the rows in front of it must be zeros.
        self._rows = {
            name: torch.empty(
                (batch_size, *stream.shape[:-1], stream.history + max_length, stream.shape[-1]),
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

    def place(self, positions: Tensor | None, tokens: int) -> "Placement":
        """Positions of the next `tokens` tokens and of all keys; None continues what is stored."""
        rows = self._rows["positions"]  # (B, max_length, 1)
        self._next = (self._given, self._ragged)  # whatever a call that failed had left
        if positions is None and not self._given:
            return place(torch.arange(self.length, self.length + tokens, device=rows.device))
        if not self._given:
            rows[:, : self.length, 0] = torch.arange(self.length, device=rows.device)
        ragged = self._ragged or (positions is not None and positions.ndim == 2)
        if positions is None:
            last = rows[:, self.length - 1]  # (B, 1)
            positions = last + torch.arange(1, tokens + 1, device=rows.device)
            positions = positions if ragged else positions[0]
        stored = positions.expand(self.batch_size, tokens).unsqueeze(-1)
        keys = self.append("positions", stored).squeeze(-1)
        self._next = (True, ragged)  # counts once the tokens do
        return Placement(positions, keys, keys >= 0 if ragged else None)

    def append(self, name: str, rows: Tensor) -> Tensor:
        """Store the new tokens' rows (B, *lead, T, F) and return those of all tokens so far, in
        rows' dtype.

        The length moves when `advance` says that every stream has been appended to.
        """
        stored, start = self._rows[name], self._history[name] + self.length
        count = rows.shape[-2]
        past, with_graph = self._history[name], torch.is_grad_enabled()
        stored.narrow(-2, start, count).copy_(rows.detach() if with_graph else rows)
        if with_graph:
            # A copy: what autograd saves must not be overwritten by the next call.
            before = stored.narrow(-2, past, self.length).to(rows.dtype)
            return torch.cat((before, rows.to(stored.dtype).to(rows.dtype)), dim=-2)
        return stored.narrow(-2, past, self.length + count).to(rows.dtype)

    def recent(self, name: str) -> Tensor:
        """The last `history` rows (B, *lead, history, F), zeros before the first token."""
        return self._rows[name].narrow(-2, self.length, self._history[name]).clone()

    def advance(self, tokens: int) -> None:
        """Count `tokens` appended tokens."""
        self.length += tokens
        self._given, self._ragged = self._next

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on. Raises ValueError beyond the present length."""
        if not 0 <= length <= self.length:
            raise ValueError(
                f"a cache of {self.length} tokens truncates to 0 .. {self.length}; got {length}."
            )
        self.length = length
        if length == 0:
            self._given = self._ragged = False
        self._next = (self._given, self._ragged)

    @property
    def nbytes(self) -> int:
        """Bytes of all streams, at full length."""
        return sum(rows.nbytes for rows in self._rows.values())


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
        """Forget every token from `length` on, in every layer."""
        for cache in (self.own, *self.layers):
            cache.truncate(length)
