"""Batches from a stream of documents, tokenised on the fly."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch

from posenc.data.batches import Batch, check_context, check_identity, rank_rows
from posenc.data.tokenizers import Tokenizer

_DOCUMENTS_PER_READ = 16  # encoded together, on several cores


class DocumentStream(Protocol):
    """What is read: `HubStream`, or anything else that iterates on from its own position."""

    def __iter__(self) -> Iterator[str]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class StreamBatches:
    """Endless training batches from a stream, with the interface of `Batches`.

    Documents are packed in order, each after end-of-text where the tokenizer has one; at the end of
    the data they start again. Every rank reads the whole stream and keeps its rows: reading and
    tokenising are cheap beside training, and the batches do not depend on how files hold the data.

    Args:
        stream: the documents. It is moved along: give each `StreamBatches` its own.
        tokenizer: encodes them.
        context: T, at least 1.
        batch_size: windows in a global batch, a multiple of world_size.
        rank: this process, from 0.
        world_size: how many processes there are.

    Raises:
        ValueError: for any of these out of range.
    """

    def __init__(
        self,
        stream: DocumentStream,
        tokenizer: Tokenizer,
        *,
        context: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_context(context + 1, context)  # a stream is as long as it needs to be
        self.stream, self.tokenizer = stream, tokenizer
        self.context, self.batch_size = context, batch_size
        self._rows = rank_rows(batch_size, rank, world_size)
        self.sequences = 0
        self.epoch = 0  # passes over the data that are complete
        self._documents: Iterator[str] | None = None
        # Tokens that are read but not used, and the stream's position after them.
        self._leftover = np.empty(0, np.int64)
        self._position = stream.state_dict()

    def next_batch(self) -> Batch:
        """Return this rank's (inputs, targets): int64, (batch_size / world_size, context) each.

        Raises:
            StreamError: the network stayed broken. The position is intact: it can be saved, and
                calling again tries again.
            ValueError: the stream holds no text.
        """
        used = self.batch_size * self.context
        empty_reads = 0
        while (length := len(self._leftover)) < used + 1:
            self._read()
            # One is the end of the data, a second in a row all there is of it.
            empty_reads = empty_reads + 1 if len(self._leftover) == length else 0
            if empty_reads == 2:
                raise ValueError("the stream has no text; expected some. Choose another source.")
        shape = (self.batch_size, self.context)
        inputs = self._leftover[:used].reshape(shape)[self._rows]
        targets = self._leftover[1 : used + 1].reshape(shape)[self._rows]
        self._leftover = self._leftover[used:]
        self.sequences += self.batch_size
        return torch.tensor(inputs), torch.tensor(targets)

    def _read(self) -> None:
        """Tokenise the next documents; leftover and position move on together, or not at all."""
        if self._documents is None:
            self._documents = iter(self.stream)
        try:
            texts = list(islice(self._documents, _DOCUMENTS_PER_READ))
        except BaseException:
            self._documents = None
            self.stream.load_state_dict(self._position)
            raise
        end = self.tokenizer.end_of_text
        start = np.array([] if end is None else [end], np.int64)
        parts = [part for ids in self.tokenizer.encode_batch(texts) for part in (start, ids)]
        self._leftover = np.concatenate([self._leftover, *parts])
        self._position = self.stream.state_dict()
        if len(texts) < _DOCUMENTS_PER_READ:
            self._documents = None
            self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values that JSON can hold."""
        position = {"sequences": self.sequences, "epoch": self.epoch, "stream": self._position}
        return position | {"leftover": self._leftover.tolist()} | self._identity()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; batch_size and the ranks may differ.

        Raises:
            ValueError: the context, the tokenizer or the source differs.
        """
        check_identity(state, self._identity())
        self.stream.load_state_dict(state["stream"])
        self._documents, self._position = None, state["stream"]
        self._leftover = np.array(state["leftover"], np.int64)
        self.sequences, self.epoch = state["sequences"], state["epoch"]

    def _identity(self) -> dict[str, Any]:
        return {"context": self.context, "tokenizer": self.tokenizer.fingerprint}
