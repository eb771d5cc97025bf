"""Parity, as in arXiv:2305.19466: the sum of L bits modulo 2.

    BEGIN 1 0 1 1 ASK -> 1

Tokens: 0, 1, BEGIN, ASK. One token is asked; a guess is right half of the time.
"""

from dataclasses import dataclass

import numpy as np

from posenc.models.gpt import NO_TARGET
from posenc.tasks.base import Ids, Task

BEGIN, ASK = 2, 3


@dataclass(frozen=True)
class Parity(Task):
    """The length is L; T is L + 2."""

    @property
    def vocab_size(self) -> int:
        return 4

    def draw(self, generator: np.random.Generator, length: int, batch: int) -> tuple[Ids, Ids]:
        bits = generator.integers(2, size=(batch, length))
        ids = np.pad(bits, ((0, 0), (1, 1)), constant_values=((0, 0), (BEGIN, ASK)))
        targets = np.full_like(ids, NO_TARGET)
        targets[:, -1] = bits.sum(1) % 2
        return ids, targets
