"""Decoding state of one fixed shape, for a step that is compiled once.

A `Cache` grows: its views change size with every token, and compiled code would be made anew. Here
each stream is read whole, its length is a number on the device, and the mask hides what lies
beyond: no shape and no Python number changes from step to step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from posenc.cache import Cache, ModelCache, Stream
from posenc.placement import Placement


class StepCache(Cache):
    """Continues a `Cache` by single tokens, in its memory. The other one is not to be used on.

    Args:
        cache: without a window, as nothing is forgotten here.
        length: () int64, tokens so far; of a model's caches one, which the model's own moves on.
    """

    def __init__(self, cache: Cache, length: Tensor) -> None:
        assert cache._keep is None
        self.streams, self._rows, self._history = cache.streams, cache._rows, cache._history
        self.batch_size, self.max_length = cache.batch_size, cache.max_length
        self._at, self._ragged = length, cache._ragged
        self._given = cache._given
        # A hidden value counts 0 times, and 0 times the NaN of unwritten memory would be NaN.
        for name, rows in self._rows.items():
            rows[..., self._history[name] + cache.length :, :].zero_()
        if cache._given:
            used = cache._rows["positions"][:, : cache.length, 0]
            self._last = used.amax(1, keepdim=True)  # (B, 1)

    @property
    def seen(self) -> int:
        return self.max_length - 1

    def check(self, streams: Mapping[str, Stream], batch_size: int, tokens: int) -> None:
        """Nothing: the cache that this one continues was checked."""

    def place(self, positions: Tensor | None, tokens: int, mask: Tensor | None = None) -> Placement:
        assert positions is mask is None
        assert tokens == 1
        at = self._at.reshape(1)
        count = self.max_length
        if not self._given:
            every = torch.arange(self.max_length, device=at.device)
            return Placement(at, length=1, key_length=count, keys=every, at=at)
        self._last += 1
        keys = self.append("positions", self._last.unsqueeze(-1)).squeeze(-1)
        where = self._last if self._ragged else self._last[0]
        real = keys >= 0 if self._ragged else None
        return Placement(where, length=1, key_length=count, keys=keys, real=real, at=at)

    def append(self, name: str, rows: Tensor) -> Tensor:
        """Store the token's rows (B, *lead, 1, F) and return the whole stream, in rows' dtype."""
        stored, past = self._rows[name], self._history[name]
        stored.index_copy_(-2, self._at.reshape(1) + past, rows.to(stored.dtype))
        return stored.narrow(-2, past, self.max_length).to(rows.dtype)

    def recent(self, name: str) -> Tensor:
        rows = torch.arange(self._history[name], device=self._at.device) + self._at
        return self._rows[name].index_select(-2, rows)

    def advance(self, tokens: int) -> None:
        """Nothing: `StepModelCache.advance` moves the shared length."""


class StepModelCache(ModelCache):
    """The same for a model."""

    def __init__(self, cache: ModelCache) -> None:
        device = cache.own._rows["positions"].device
        self.at = torch.full((), cache.length, device=device)
        self.own = StepCache(cache.own, self.at)
        self.layers = tuple(StepCache(layer, self.at) for layer in cache.layers)

    def advance(self) -> None:
        """Count a token."""
        self.at += 1
