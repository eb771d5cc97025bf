"""Selective copying in the form of MAD, arXiv:2403.17844: find the symbols among blanks.

    _ b _ _ a c _ _ MARK MARK MARK  ->  after the marks: b a c

K symbols lie at random places before the marks, with blanks between, before and after them. After
the i-th mark the i-th symbol is to be said. Tokens: the symbols 0 .. N-1, a blank, MARK.
"""

from dataclasses import dataclass

import numpy as np

from posenc.models.gpt import NO_TARGET
from posenc.tasks.base import Ids, Task


@dataclass(frozen=True)
class SelectiveCopy(Task):
    """The length is T, at least 2K.

    Args:
        copied: K, at least 1.
        symbols: N, at least 2.

    Raises:
        ValueError: for less.
    """

    copied: int = 16
    symbols: int = 14

    def __post_init__(self) -> None:
        if self.copied < 1 or self.symbols < 2:
            raise ValueError(
                f"SelectiveCopy needs copied from 1 and symbols from 2; got {self.copied} and "
                f"{self.symbols}. Raise them."
            )

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    def check(self, length: int) -> None:
        if length < 2 * self.copied:
            raise ValueError(
                f"SelectiveCopy of {self.copied} symbols needs a length of {2 * self.copied} or "
                f"more; got {length}. Choose another, or copy fewer."
            )

    def draw(self, generator: np.random.Generator, length: int, batch: int) -> tuple[Ids, Ids]:
        blank, mark = self.symbols, self.symbols + 1
        front = length - self.copied
        order = generator.permuted(np.tile(np.arange(front), (batch, 1)), axis=1)
        places = np.sort(order[:, : self.copied], axis=1)
        symbols = generator.integers(self.symbols, size=(batch, self.copied))
        ids = np.full((batch, length), blank, np.int64)
        ids[np.arange(batch)[:, None], places] = symbols
        ids[:, front:] = mark
        targets = np.full_like(ids, NO_TARGET)
        targets[:, front:] = symbols
        return ids, targets
