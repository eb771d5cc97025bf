"""Addition of whole numbers in decimal digits, most significant first, as in arXiv:2305.19466.

    BEGIN 4 7 + 9 3 8 = 9 8 5 END

No number of two digits or more begins with 0. Tokens: the digits 0 .. 9, BEGIN, +, =, END; see
`posenc.tasks.base.answered`.
"""

from dataclasses import dataclass

import numpy as np

from posenc.tasks.base import Ids, Task, answered

BEGIN, PLUS, EQUALS, END = range(10, 14)


@dataclass(frozen=True)
class Addition(Task):
    """The length n is that of the longer number: either, or both, have n digits.

    All pairs of numbers of digits are equally likely: of the 2n - 1 pairs of one length, and in
    training, where `weight` makes longer numbers more frequent, of all. T is 3n + 4; what is
    shorter ends in END.
    """

    @property
    def vocab_size(self) -> int:
        return END + 1

    def weight(self, length: int) -> float:
        return 2 * length - 1

    def draw(self, generator: np.random.Generator, length: int, batch: int) -> tuple[Ids, Ids]:
        questions, answers = [], []
        for _ in range(batch):
            sizes = [length, length]
            # 0 .. n-1 are sizes of the second number, n .. 2n-2 smaller ones of the first.
            other = int(generator.integers(2 * length - 1))
            sizes[int(other < length)] = other % length + 1
            first, second = (_number(generator, size) for size in sizes)
            total = sum(int("".join(map(str, digits))) for digits in (first, second))
            questions.append([*first, PLUS, *second])
            answers.append([int(digit) for digit in str(total)])
        width = 3 * length + 4
        return answered(questions, answers, begin=BEGIN, ask=EQUALS, end=END, width=width)


def _number(generator: np.random.Generator, size: int) -> list[int]:
    """Digits, uniform over all numbers of so many."""
    digits = generator.integers(10, size=size)
    if size > 1:
        digits[0] = generator.integers(1, 10)
    return [int(digit) for digit in digits]
