"""A passkey in text: one sentence with a number, somewhere in text that has nothing to do with it.

    text .. [The pass key is 31415.] .. text [What is the pass key? It is ]31415.

Tokens are bytes. The number is uniform in 1 .. 50000, its place in the text too; its digits and the
full stop are asked. The text is yours: give the tasks of training and test texts that differ.
"""

from dataclasses import dataclass, field

import numpy as np

from posenc.models.gpt import NO_TARGET
from posenc.tasks.base import Ids, Task

SENTENCE, QUESTION = b"[The pass key is %d.]", b"[What is the pass key? It is ]%d."
HIGHEST = 50_000
#: Bytes of all but the text, with the longest number twice.
_ROOM = len(SENTENCE % HIGHEST) + len(QUESTION % HIGHEST)


@dataclass(frozen=True)
class Passkey(Task):
    """The length is T, the bytes of a row less the full stop; numbers of fewer digits have more
    text.

    Args:
        text: at least as many bytes as the length.
        share: of the rows that hold a passkey, above 0. Below 1 this is language modelling: the
            other rows are text alone, and every next byte is asked, in all rows.

    Raises:
        ValueError: for another share.
    """

    text: bytes = field(repr=False)
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1]; got {self.share}. Choose 1.")

    @property
    def vocab_size(self) -> int:
        return 256

    def check(self, length: int) -> None:
        if not _ROOM <= length < len(self.text):
            raise ValueError(
                f"Passkey needs a length from {_ROOM} to {len(self.text) - 1}, less than its text "
                f"has bytes; got {length}. Choose another, or more text."
            )

    def draw(self, generator: np.random.Generator, length: int, batch: int) -> tuple[Ids, Ids]:
        whole = np.empty((batch, length + 1), np.int64)
        targets = np.full((batch, length), NO_TARGET, np.int64)
        for row, target in zip(whole, targets, strict=True):
            start = int(generator.integers(len(self.text) - length))
            text = self.text[start : start + length + 1]
            if generator.random() < self.share:
                number = int(generator.integers(1, HIGHEST + 1))
                sentence, question = SENTENCE % number, QUESTION % number
                text = text[: len(text) - len(sentence) - len(question)]
                place = int(generator.integers(len(text) + 1))
                text = text[:place] + sentence + text[place:] + question
            row[:] = np.frombuffer(text, np.uint8)
            asked = length if self.share < 1 else len(str(number)) + 1
            target[-asked:] = row[-asked:]
        return whole[:, :-1], targets
