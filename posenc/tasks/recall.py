"""Multi-query associative recall (MQAR), arXiv:2312.04927.

    k1 v1 k2 v2 .. kN vN   then slots of two tokens: N times `key filler`, else `filler filler`

Each key is asked once more, after which its value is to be said; the value does not follow in the
text. Slot g = 1, 2, .. after the pairs gets a key with a weight of g^(a - 1), a = 0.01: near ones
are likely. Keys are distinct and of the lower half of the tokens, values distinct and of the upper
half. Fillers are of the whole vocabulary but the row's keys: with those among them, as in the
released generator, a key could be asked where nothing is scored.
"""

from dataclasses import dataclass

import numpy as np

from posenc.models.gpt import NO_TARGET
from posenc.tasks.base import Ids, Task

POWER = 0.01


@dataclass(frozen=True)
class Recall(Task):
    """The length is T, even and at least 4N.

    Args:
        pairs: N, at least 1.
        vocab_size: V, even, at least 2N + 2.

    Raises:
        ValueError: for other sizes.
    """

    pairs: int = 16
    vocab_size: int = 8192

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.vocab_size % 2 or self.vocab_size < 2 * self.pairs + 2:
            raise ValueError(
                f"Recall needs pairs from 1 and an even vocab_size of 2 pairs + 2 or more; got "
                f"{self.pairs} and {self.vocab_size}. Choose for example 16 and 8192."
            )

    def check(self, length: int) -> None:
        if length % 2 or length < 4 * self.pairs:
            raise ValueError(
                f"Recall of {self.pairs} pairs needs an even length of {4 * self.pairs} or more; "
                f"got {length}. Choose another, or fewer pairs."
            )

    def draw(self, generator: np.random.Generator, length: int, batch: int) -> tuple[Ids, Ids]:
        count, half = self.pairs, self.vocab_size // 2
        rows = np.arange(batch)[:, None]
        lower = generator.permuted(np.tile(np.arange(half), (batch, 1)), axis=1)
        values = half + generator.permuted(np.tile(np.arange(half), (batch, 1)), axis=1)[:, :count]
        # What is no key of its row: the lower tokens that are left, and all upper ones.
        left = half - count
        numbers = generator.integers(left + half, size=(batch, length))
        low = lower[rows, count + np.minimum(numbers, left - 1)]
        ids = np.where(numbers < left, low, numbers - left + half)
        ids[:, 0 : 2 * count : 2], ids[:, 1 : 2 * count : 2] = lower[:, :count], values

        slots = length // 2 - count
        # The N largest of log w + Gumbel noise are a draw without replacement by the weights.
        weights = (POWER - 1) * np.log(np.arange(1, slots + 1))
        noisy = weights + generator.gumbel(size=(batch, slots))
        chosen = np.argsort(-noisy, axis=1, kind="stable")[:, :count]
        asked = generator.permuted(np.tile(np.arange(count), (batch, 1)), axis=1)
        places = 2 * (count + chosen)
        ids[rows, places] = lower[rows, asked]
        targets = np.full_like(ids, NO_TARGET)
        targets[rows, places] = values[rows, asked]
        return ids, targets
