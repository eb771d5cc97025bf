"""Batches of token windows: deterministic, the same on any number of ranks, resumable anywhere.

A window is context + 1 tokens: inputs are the first `context` of them, targets the last. Windows
side by side share one token, so that each token is a target once. `batch_size` counts the windows
of a *global* batch; with W ranks, rank r takes rows r*B/W to (r+1)*B/W of it. The sequence of
global batches depends on neither, and a position is the number of windows that all ranks have
consumed, so a run resumes on another number of ranks.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class TokenSequence(Protocol):
    """What batches are cut from: `Tokens`, or a one-dimensional integer array."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: slice, /) -> Any: ...


class Batches:
    """Endless training batches from tokens on disk or in memory.

    Epoch e lays windows side by side from a random offset on and visits them in a random order,
    both drawn from (seed, e) alone. Every epoch has the same number of windows: fewer than two
    contexts of tokens at the two ends sit out, others each time.

    Args:
        tokens: at least context + 1 of them.
        context: T, at least 1.
        batch_size: windows in a global batch, a multiple of world_size.
        seed: 0 or more.
        rank: this process, from 0.
        world_size: how many processes there are.

    Raises:
        ValueError: for any of these out of range.
    """

    def __init__(
        self,
        tokens: TokenSequence,
        *,
        context: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_context(len(tokens), context)
        if seed < 0:
            raise ValueError(f"seed must be 0 or more; got {seed}. Choose for example 0.")
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        self._rows = rank_rows(batch_size, rank, world_size)
        self.windows_per_epoch = max(1, (len(tokens) - context) // context)
        self.sequences = 0
        self._cached = (-1, np.empty(0, np.int64))

    def next_batch(self) -> Batch:
        """Return this rank's (inputs, targets): int64, (batch_size / world_size, context) each."""
        numbers = range(self.sequences + self._rows.start, self.sequences + self._rows.stop)
        places = (divmod(number, self.windows_per_epoch) for number in numbers)
        starts = [int(self._starts(epoch)[i]) for epoch, i in places]
        self.sequences += self.batch_size
        return _windows(self.tokens, starts, self.context)

    def _starts(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return where the windows of an epoch begin, in the order of visit."""
        if epoch != self._cached[0]:
            generator = np.random.default_rng((self.seed, epoch))
            offset = generator.integers(len(self.tokens) - self.windows_per_epoch * self.context)
            order = generator.permutation(self.windows_per_epoch)
            self._cached = (epoch, offset + order * self.context)
        return self._cached[1]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values that JSON can hold."""
        return {"sequences": self.sequences} | self._identity()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; batch_size and the ranks may differ.

        Raises:
            ValueError: the seed, the context or the number of tokens differs.
        """
        check_identity(state, self._identity())
        self.sequences = state["sequences"]

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "context": self.context, "tokens": len(self.tokens)}


def evaluation_windows(
    tokens: TokenSequence, context: int, max_tokens: int | None = None, *, batch_size: int = 8
) -> Iterator[Batch]:
    """Return batches (inputs, targets) of the windows of validation tokens, in order.

    No target is scored twice. The last tokens, too few for a window, are left out. The last batch
    may be smaller.

    Args:
        tokens: at least context + 1 of them.
        context: T, at least 1.
        max_tokens: score the first so many targets, rounded down to whole windows, but at least
            one window; None scores all.
        batch_size: windows in a batch, at least 1.

    Raises:
        ValueError: for any of these out of range.
    """
    check_context(len(tokens), context, "the validation split")
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}. Choose a larger one.")
    count = (len(tokens) - 1) // context
    if max_tokens is not None:
        count = min(count, max(1, max_tokens // context))
    starts = range(0, count * context, context)
    return (
        _windows(tokens, starts[i : i + batch_size], context) for i in range(0, count, batch_size)
    )


def check_context(length: int, context: int, what: str = "the data") -> None:
    """Refuse a context that does not fit.

    Raises:
        ValueError: context is below 1, or there are fewer than context + 1 tokens.
    """
    if context < 1:
        raise ValueError(f"context must be at least 1; got {context}. Choose for example 64.")
    if length < context + 1:
        shorter = f"a context of at most {length - 1} or " if length > 1 else ""
        raise ValueError(
            f"context {context} needs at least {context + 1} tokens; {what} has {length}. "
            f"Choose {shorter}longer text."
        )


def rank_rows(batch_size: int, rank: int, world_size: int) -> slice:
    """Return a rank's rows of a global batch.

    Raises:
        ValueError: the rank does not exist, or batch_size is no multiple of world_size.
    """
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank must lie in 0..{world_size - 1}; got {rank}. Let torchrun set both."
        )
    if batch_size < 1 or batch_size % world_size:
        nearest = max(1, round(batch_size / world_size)) * world_size
        raise ValueError(
            f"batch_size counts all {world_size} ranks and must be a positive multiple of that; "
            f"got {batch_size}. Choose {nearest}."
        )
    rows = batch_size // world_size
    return slice(rank * rows, (rank + 1) * rows)


def check_identity(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a position that was saved under other settings.

    Raises:
        ValueError: one differs.
    """
    for name, value in expected.items():
        if state[name] != value:
            raise ValueError(
                f"the saved data position has {name} {state[name]!r}; got {value!r}. "
                "Resume with the settings of the saved run."
            )


def _windows(tokens: TokenSequence, starts: range | list[int], context: int) -> Batch:
    """Gather windows: (inputs, targets), int64, (len(starts), context) each."""
    rows = np.empty((len(starts), context + 1), np.int64)
    for row, start in zip(rows, starts, strict=True):
        row[:] = tokens[start : start + context + 1]
    windows = torch.from_numpy(rows)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
