"""What a synthetic task is: a source of examples with one right answer each, and how it is scored.

    ids[b, t]      the token at t                                     int64 (B, T), 0 .. V-1
    targets[b, t]  what is to be said after reading ids[b, : t + 1]   int64 (B, T), -100: not asked

`model(ids, targets)` takes both as they are: nothing is to be shifted. In a task that is answered
token by token targets[b, t] is ids[b, t + 1], and the last token of the answer is in no ids; where
the answer is not read again (states of a group, associative recall) it is in targets alone.

An example is the row of ids. One in ten, chosen by a hash of the row, is of the test split, the
others of the training split: no row is ever in both, whatever the seeds, the lengths and the order
in which they are drawn. Where a length has few rows (100 of one repeated symbol, 2^L of parity)
both splits repeat theirs.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from posenc.errors import unknown
from posenc.models.gpt import NO_TARGET

Split = Literal["train", "test"]
Ids = npt.NDArray[np.int64]
#: One row in so many is of the test split.
ONE_IN = 10
#: Draws without a row of the split asked for, after which there is taken to be none.
PATIENCE = 1000


class Sample(NamedTuple):
    """Examples of one length; see the module for what the tensors hold."""

    ids: Tensor  # (B, T)
    targets: Tensor  # (B, T)

    @property
    def scored(self) -> Tensor:
        """Where something is asked: bool (B, T)."""
        return self.targets != NO_TARGET


class Task(ABC):
    """Examples of any length, drawn from a generator that is given: the same one, the same data."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V, how many tokens there are."""

    @abstractmethod
    def draw(self, generator: np.random.Generator, length: int, batch: int) -> tuple[Ids, Ids]:
        """Examples of either split: ids and targets, (B, T) each, T a function of the length."""

    def weight(self, length: int) -> float:
        """How often a length is trained, relative to the others."""
        return 1.0

    def check(self, length: int) -> None:
        """Raise ValueError for a length of which there are no examples."""
        if length < 1:
            raise ValueError(f"length must be at least 1; got {length}. Choose a longer one.")

    def sample(
        self, generator: np.random.Generator, length: int, batch: int, split: Split = "train"
    ) -> Sample:
        """Examples of one length and split.

        Args:
            generator: all that is random is drawn from it.
            length: what it counts is the task's to say.
            batch: B, at least 1.

        Raises:
            ValueError: for an unknown split, sizes too small, or a length that has no example in
                this split.
        """
        if split not in get_args(Split):
            raise ValueError(unknown("split", split, get_args(Split)))
        if batch < 1:
            raise ValueError(f"batch must be at least 1; got {batch}. Ask for one example.")
        self.check(length)
        found: list[tuple[Ids, Ids]] = []
        count = draws = 0
        while count < batch:
            ids, targets = self.draw(generator, length, batch)
            own = np.array([held_out(row) == (split == "test") for row in ids])
            found.append((ids[own], targets[own]))
            count += int(own.sum())
            draws += 1
            if not count and draws == PATIENCE:
                raise ValueError(
                    f"{type(self).__name__} has no example of length {length} in the {split} "
                    "split. Choose a longer length, of which there are more."
                )
        both = (np.concatenate(parts)[:batch] for parts in zip(*found, strict=True))
        return Sample(*map(torch.from_numpy, both))


def held_out(row: Ids) -> bool:
    """Whether an example is of the test split."""
    digest = hashlib.blake2b(row.astype("<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % ONE_IN == 0


def train_batch(
    task: Task, generator: np.random.Generator, lengths: Sequence[int], batch: int
) -> Sample:
    """A batch of the training split, all of one length: each drawn by its weight.

    Raises:
        ValueError: see `Task.sample`.
    """
    weights = np.array([task.weight(length) for length in lengths])
    length = generator.choice(np.asarray(lengths), p=weights / weights.sum())
    return task.sample(generator, int(length), batch)


def answered(
    questions: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    begin: int,
    ask: int,
    end: int,
    width: int,
) -> tuple[Ids, Ids]:
    """Ids and targets of questions that are answered token by token: (B, width) each.

    A row is `begin question ask answer end`; the answer and its `end` are asked. Of a row that is
    shorter than `width` the rest is `end`, which is not asked.
    """
    ids = np.full((len(questions), width + 1), end, np.int64)
    targets = np.full((len(questions), width), NO_TARGET, np.int64)
    for row, target, question, answer in zip(ids, targets, questions, answers, strict=True):
        whole = [begin, *question, ask, *answer, end]
        row[: len(whole)] = whole
        target[len(question) + 1 : len(whole) - 1] = whole[len(question) + 2 :]
    return ids[:, :-1], targets


def exact_match(predicted: Tensor, targets: Tensor) -> Tensor:
    """Of which examples every scored token is right: bool (B,).

    Args:
        predicted: (B, T), the likeliest token after each; where nothing is asked it is not read.
        targets: (B, T), with -100 where nothing is asked.

    Where an answer is read token by token this is what greedy generation makes of it: the first
    wrong token is wrong in both, and a right beginning is the one that is read here.
    """
    return ((predicted == targets) | (targets == NO_TARGET)).all(1)


def accuracy(predicted: Tensor, targets: Tensor) -> float:
    """The share of scored tokens that are right; arguments as in `exact_match`."""
    scored = targets != NO_TARGET
    return (predicted == targets)[scored].double().mean().item()
