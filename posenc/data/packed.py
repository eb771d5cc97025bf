"""Documents packed whole into rows: nothing attends, and no loss goes, from one to another.

A document starts at its end-of-text token, which stands before it. One longer than a row is cut
into pieces of a row each, and a rest; pieces are packed into rows by best fit, longest first, so
that little is left over. What is left is padding: a document of its own, without targets. The
target of a document's last token is the end-of-text after it.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from posenc.data.batches import check_identity, rank_rows
from posenc.data.shards import Tokens

Ints = npt.NDArray[np.int64]


class PackedBatch(NamedTuple):
    """Rows of packed documents: int64 (B, T) each."""

    inputs: Tensor
    targets: Tensor  # -100 at padding
    segments: Tensor  # 0, 1, .. along a row, the last for padding


class Pieces(NamedTuple):
    """Where pieces of documents start in the tokens, and how many inputs they have."""

    starts: Ints
    lengths: Ints


def find_pieces(tokens: Tokens, end_of_text: int, context: int) -> Pieces:
    """The pieces of all documents, in order, of at most `context` inputs each.

    Every token but the last is an input.

    Raises:
        ValueError: there are fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"packing needs at least 2 tokens; got {len(tokens)}. Give more text.")
    starts, at = [np.zeros(1, np.int64)], 0
    for chunk in tokens.chunks():
        starts.append(np.flatnonzero(chunk == end_of_text) + at)
        at += len(chunk)
    first = np.unique(np.concatenate(starts))
    first = first[first < at - 1]
    whole = np.diff(np.append(first, at - 1))  # inputs of each document
    counts = -(-whole // context)
    owner = np.repeat(np.arange(len(first)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Pieces(
        first[owner] + number * context,
        np.minimum(whole[owner] - number * context, context),
    )


def pack(lengths: Ints, context: int) -> list[list[int]]:
    """Indices of pieces by row: best fit, longest first; equal lengths in the order given."""
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # by the room that is left
    rooms: list[int] = []  # sorted
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            rows.append([index])
            row, room = len(rows) - 1, context - length
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms.pop(at)
            rows[row].append(index)
            room -= length
        if room:
            if not open_rows.setdefault(room, []):
                insort(rooms, room)
            open_rows[room].append(row)
    return rows


class PackedBatches:
    """Endless training batches of packed documents; position and ranks as in `Batches`.

    Epoch e packs the pieces in a random order and visits the rows in a random order, both drawn
    from (seed, e) alone. Every epoch has the same number of rows.

    Args:
        tokens: of the documents, each after `end_of_text`.
        context: T, at least 1.
        batch_size: rows in a global batch, a multiple of world_size.
        seed: 0 or more.
        rank: this process, from 0.
        world_size: how many processes there are.

    Raises:
        ValueError: for any of these out of range.
    """

    def __init__(
        self,
        tokens: Tokens,
        end_of_text: int,
        *,
        context: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed must be 0 or more; got {seed}. Choose for example 0.")
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        self._rows = rank_rows(batch_size, rank, world_size)
        self._pieces = find_pieces(tokens, end_of_text, context)
        self._end = end_of_text
        self.sequences = 0
        self._epoch, self._packed = 0, self._pack(0)
        self.windows_per_epoch = len(self._packed)

    def next_batch(self) -> PackedBatch:
        """Return this rank's rows, batch_size / world_size of them."""
        numbers = range(self.sequences + self._rows.start, self.sequences + self._rows.stop)
        rows = []
        for number in numbers:
            epoch, i = divmod(number, self.windows_per_epoch)
            if epoch != self._epoch:
                self._epoch, self._packed = epoch, self._pack(epoch)
            rows.append(self._packed[i])
        self.sequences += self.batch_size
        return collate(self.tokens, self._pieces, rows, self.context)

    def _pack(self, epoch: int) -> list[list[int]]:
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self._pieces.lengths))
        rows = pack(self._pieces.lengths[order], self.context)
        return [order[rows[i]].tolist() for i in generator.permutation(len(rows))]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values that JSON can hold."""
        return {"sequences": self.sequences} | self._identity()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; batch_size and the ranks may differ.

        Raises:
            ValueError: the seed, the context or the tokens differ, or they were not packed.
        """
        if "pack" not in state:
            raise ValueError("the saved run did not pack documents; resume it without --pack.")
        check_identity(state, self._identity())
        self.sequences = state["sequences"]

    def _identity(self) -> dict[str, Any]:
        tokens = len(self.tokens)
        return {"pack": self._end, "seed": self.seed, "context": self.context, "tokens": tokens}


def packed_windows(
    tokens: Tokens,
    end_of_text: int,
    context: int,
    max_tokens: int | None = None,
    *,
    batch_size: int = 8,
) -> Iterator[PackedBatch]:
    """Return batches of all documents, packed in their order of length: each token is scored once,
    with its own document before it alone.

    Args:
        max_tokens: stop after the batch that reaches so many targets; None scores all.
        batch_size: rows in a batch.

    Raises:
        ValueError: there are fewer than two tokens.
    """
    pieces = find_pieces(tokens, end_of_text, context)
    rows = pack(pieces.lengths, context)
    scored = 0
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        yield collate(tokens, pieces, some, context)
        scored += int(sum(pieces.lengths[row].sum() for row in some))
        if max_tokens is not None and scored >= max_tokens:
            return


def collate(tokens: Tokens, pieces: Pieces, rows: list[list[int]], context: int) -> PackedBatch:
    """Rows of pieces as tensors."""
    shape = (len(rows), context)
    inputs, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    targets = np.full(shape, -100, np.int64)
    for b, row in enumerate(rows):
        at = 0
        for number, index in enumerate(row):
            start, length = int(pieces.starts[index]), int(pieces.lengths[index])
            text = tokens[start : start + length + 1]
            inputs[b, at : at + length], targets[b, at : at + length] = text[:-1], text[1:]
            segments[b, at : at + length] = number
            at += length
        segments[b, at:] = len(row)
    return PackedBatch(*map(torch.from_numpy, (inputs, targets, segments)))
