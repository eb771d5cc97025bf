"""Flip-flop language modelling, arXiv:2306.00946: one bit of memory among distractions.

    w 1 i 0 i 1 r 1 w 0 i 1 r 0

Pairs of an instruction and a bit. The bit after r is the last one written, all others are uniform.
The first instruction is w, the last r; of the others each is i with probability p, else w or r.
The bits after r are asked. Tokens: 0, 1, w, r, i.
"""

from dataclasses import dataclass

import numpy as np

from posenc.models.gpt import NO_TARGET
from posenc.tasks.base import Ids, Task

WRITE, READ, IGNORE = 2, 3, 4


@dataclass(frozen=True)
class FlipFlop(Task):
    """The length is the tokens of all pairs, even, at least 4; T is one less, as the last bit is
    asked.

    Args:
        ignore: p, in [0, 1).

    Raises:
        ValueError: for another p.
    """

    ignore: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.ignore < 1:
            raise ValueError(f"ignore must lie in [0, 1); got {self.ignore}. Choose 0.8.")

    @property
    def vocab_size(self) -> int:
        return 5

    def check(self, length: int) -> None:
        if length % 2 or length < 4:
            raise ValueError(f"FlipFlop needs an even length from 4; got {length}. Change it.")

    def draw(self, generator: np.random.Generator, length: int, batch: int) -> tuple[Ids, Ids]:
        rest = (1 - self.ignore) / 2
        shares = [rest, rest, self.ignore]
        instructions = generator.choice([WRITE, READ, IGNORE], size=(batch, length // 2), p=shares)
        instructions[:, 0], instructions[:, -1] = WRITE, READ
        bits = generator.integers(2, size=instructions.shape)
        # Where the last write was, at every pair.
        pairs = np.arange(length // 2)
        last = np.maximum.accumulate(np.where(instructions == WRITE, pairs, 0), axis=1)
        reads = instructions == READ
        bits = np.where(reads, np.take_along_axis(bits, last, axis=1), bits)
        ids = np.stack([instructions, bits], axis=2).reshape(batch, length)
        targets = np.full_like(ids, NO_TARGET)
        targets[:, 0::2][reads] = bits[reads]
        return ids[:, :-1], targets[:, :-1]
