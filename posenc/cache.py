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


class Placement(NamedTuple):
    """Where the queries and keys of one call sit."""

    positions: Tensor  # (T,) or (B, T)
    keys: Tensor | None = None  # (S,) or (B, S); None: consecutive, ending with the queries
    real: Tensor | None = None  # (B, S) bool, False for padding; None: no padding


def place(positions: Tensor, *, given: bool) -> Placement:
    """Placement without a past. A negative entry of (B, T) positions marks padding."""
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
        streams = {"positions": Stream((1,), torch.int64), **streams}
        if batch_size < 1 or max_length < 1:
            raise ValueError(
                "a cache needs batch_size and max_length of at least 1; "
                f"got {batch_size}, {max_length}."
            )
        self.batch_size, self.max_length = batch_size, max_length
        self.length = 0
        self._given = self._ragged = (
            False  # whether the caller gave positions, and a row of them for each sequence
        )
        self._history = {name: stream.history for name, stream in streams.items()}
        self._rows = {
            name: torch.zeros(
                (batch_size, *stream.shape[:-1], stream.history + max_length, stream.shape[-1]),
                dtype=stream.dtype or dtype,
                device=device,
            )
            for name, stream in streams.items()
        }

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        return True  # an empty cache is still a cache

    def check(self, batch_size: int, tokens: int) -> None:
        """ValueError unless `tokens` more tokens of `batch_size` sequences fit."""
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
        if positions is None and not self._given:
            return place(
                torch.arange(self.length, self.length + tokens, device=rows.device), given=False
            )
        if not self._given:
            rows[:, : self.length, 0] = torch.arange(self.length, device=rows.device)
        if positions is None:
            last = rows[:, self.length - 1]  # (B, 1)
            positions = last + torch.arange(1, tokens + 1, device=rows.device)
            positions = positions if self._ragged else positions[0]
        self._given = True
        self._ragged = self._ragged or positions.ndim == 2
        keys = self.append(
            "positions", positions.expand(self.batch_size, tokens).unsqueeze(-1)
        ).squeeze(-1)
        return Placement(positions, keys, keys >= 0 if self._ragged else None)

    def append(self, name: str, rows: Tensor) -> Tensor:
        """Store the new tokens' rows (B, *lead, T, F) and return those of all tokens so far, in
        rows' dtype.

        The length moves when `advance` says that every stream has been appended to.
        """
        stored, start = self._rows[name], self._history[name] + self.length
        count = rows.shape[-2]
        stored.narrow(-2, start, count).copy_(rows.detach())
        past = self._history[name]
        if torch.is_grad_enabled() and rows.requires_grad:
            return torch.cat((stored.narrow(-2, past, self.length).to(rows.dtype), rows), dim=-2)
        return stored.narrow(-2, past, self.length + count).to(rows.dtype)

    def recent(self, name: str) -> Tensor:
        """The last `history` rows (B, *lead, history, F), zeros before the first token."""
        return self._rows[name].narrow(-2, self.length, self._history[name]).clone()

    def advance(self, tokens: int) -> None:
        """Count `tokens` appended tokens."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on. Raises ValueError beyond the present length."""
        if not 0 <= length <= self.length:
            raise ValueError(
                f"a cache of {self.length} tokens truncates to 0 .. {self.length}; got {length}."
            )
        self.length = length
        if length == 0:
            self._given = self._ragged = False

    @property
    def nbytes(self) -> int:
        """Bytes of all streams, at full length."""
        return sum(rows.nbytes for rows in self._rows.values())


class ModelCache:
    """The decoding state of a model: one cache a layer, and the model's own."""

    def __init__(self, own: Cache, layers: Sequence[Cache]) -> None:
        self.own, self.layers = own, tuple(layers)

    @property
    def length(self) -> int:
        return self.own.length

    def __len__(self) -> int:
        return self.length

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
