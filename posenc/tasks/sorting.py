"""Sorting, as in arXiv:2305.19466: single tokens of an ordered alphabet, or numbers of digits.

BEGIN 7 3 7 1 ASK 1 3 7 7 END                 Sort: tokens are the symbols
BEGIN 4 1 , 3 0 2 , ASK 4 1 , 3 0 2 , END     SortNumbers: 10 .. 9999, a comma after each
"""

from dataclasses import dataclass

import numpy as np

from posenc.tasks.base import Ids, Task, answered

LOWEST, HIGHEST = 10, 9999
_DIGITS = len(str(HIGHEST))


@dataclass(frozen=True)
class Sort(Task):
    """The length is how many symbols; T is 2L + 2.

    Args:
        symbols: N, at least 2; tokens are 0 .. N-1 in their order, BEGIN, ASK, END.

    Raises:
        ValueError: for fewer symbols.
    """

    symbols: int = 50

    def __post_init__(self) -> None:
        if self.symbols < 2:
            raise ValueError(f"Sort needs at least 2 symbols; got {self.symbols}. Give more.")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 3

    def draw(self, generator: np.random.Generator, length: int, batch: int) -> tuple[Ids, Ids]:
        begin, ask, end = range(self.symbols, self.symbols + 3)
        drawn = generator.integers(self.symbols, size=(batch, length))
        both = drawn.tolist(), np.sort(drawn, 1).tolist()
        return answered(*both, begin=begin, ask=ask, end=end, width=2 * length + 2)


@dataclass(frozen=True)
class SortNumbers(Task):
    """The length is how many numbers, uniform in 10 .. 9999; T is 10L + 2, and what is shorter ends
    in END. Tokens: the digits 0 .. 9, a comma, BEGIN, ASK, END.
    """

    @property
    def vocab_size(self) -> int:
        return 14

    def draw(self, generator: np.random.Generator, length: int, batch: int) -> tuple[Ids, Ids]:
        comma, begin, ask, end = range(10, 14)

        def written(numbers: list[int]) -> list[int]:
            return [
                token for number in numbers for token in (*map(int, str(number)), comma)
            ]  # fmt: skip

        drawn = generator.integers(LOWEST, HIGHEST + 1, size=(batch, length))
        questions = [written(row) for row in drawn.tolist()]
        answers = [written(row) for row in np.sort(drawn, 1).tolist()]
        width = 2 * (_DIGITS + 1) * length + 2
        return answered(questions, answers, begin=begin, ask=ask, end=end, width=width)
