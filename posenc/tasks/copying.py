"""Copy and reverse, arXiv:2305.19466: say again, once or twice, what was read.

    cmc     s1 .. sL -> s1 .. sL                    symbols drawn with repetition
    cmc2x   s1 .. sL -> s1 .. sL NEXT s1 .. sL
    rsc     a .. a (L) -> a .. a (L)                one symbol
    rsc2x   a .. a (L) -> a .. a (2L)
    rdc     a .. a (L) NEXT b -> b .. b (L)         a and b differ
    mc      s1 .. sL -> sL .. s1
    mc2x    s1 .. sL -> sL .. s1 NEXT sL .. s1
    mcrv    s1 .. sL -> sL .. s1 NEXT s1 .. sL

A row is BEGIN question ASK answer END, see `posenc.tasks.base.answered`; to stop in time is part of
the answer. Tokens: the symbols 0 .. N-1, then BEGIN, ASK, NEXT, END. The paper's text does not say
which b its rdc wants; here the question does.
"""

from dataclasses import dataclass

import numpy as np

from posenc.errors import unknown
from posenc.tasks.base import Ids, Task, answered

#: How long question and answer of length L are: (a L + b, c L + d).
_SIZES = {
    "cmc": ((1, 0), (1, 0)),
    "cmc2x": ((1, 0), (2, 1)),
    "rsc": ((1, 0), (1, 0)),
    "rsc2x": ((1, 0), (2, 0)),
    "rdc": ((1, 2), (1, 0)),
    "mc": ((1, 0), (1, 0)),
    "mc2x": ((1, 0), (2, 1)),
    "mcrv": ((1, 0), (2, 1)),
}
KINDS = tuple(_SIZES)


@dataclass(frozen=True)
class Copy(Task):
    """One of the eight.

    Args:
        kind: see the module.
        symbols: N, at least 2.

    The length is L. T is 2L + 2 to 3L + 3.

    Raises:
        ValueError: for an unknown kind or fewer symbols.
    """

    kind: str
    symbols: int = 100

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(unknown("kind of copy", self.kind, KINDS))
        if self.symbols < 2:
            raise ValueError(f"Copy needs at least 2 symbols; got {self.symbols}. Give more.")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 4

    def draw(self, generator: np.random.Generator, length: int, batch: int) -> tuple[Ids, Ids]:
        begin, ask, following, end = range(self.symbols, self.symbols + 4)
        if self.kind == "rdc":
            pair = generator.integers(self.symbols, size=(batch, 2))
            # One of the others: as many steps on as are not all the way round.
            pair[:, 1] = (pair[:, 0] + 1 + pair[:, 1] % (self.symbols - 1)) % self.symbols
            questions = [[a] * length + [following, b] for a, b in pair.tolist()]
            answers = [[b] * length for _, b in pair.tolist()]
        else:
            one = self.kind in ("rsc", "rsc2x")
            drawn = generator.integers(self.symbols, size=(batch, 1 if one else length))
            questions = [row * length if one else row for row in drawn.tolist()]
            answers = [self._answer(row, following) for row in questions]
        (a, b), (c, d) = _SIZES[self.kind]
        width = (a + c) * length + b + d + 2
        return answered(questions, answers, begin=begin, ask=ask, end=end, width=width)

    def _answer(self, question: list[int], following: int) -> list[int]:
        back = question[::-1]
        match self.kind:
            case "cmc" | "rsc":
                return question
            case "rsc2x":
                return question * 2
            case "cmc2x":
                return [*question, following, *question]
            case "mc":
                return back
            case "mc2x":
                return [*back, following, *back]
            case _:
                return [*back, following, *question]
