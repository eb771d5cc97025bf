"""Copy and reverse beyond the training length: published shares (arXiv 2305.19466) beside ours.

Published are means and standard deviations of three models of 107 M parameters, trained for 40,000
steps on lengths up to 20 and asked longer ones; ours are what rows of `bench.tasks` hold at the
same multiple of their own training length, or the nearest that was asked. A small model can show
the order of methods, not the values: their own smallest model is right in 0.24 of `rdc` where the
large one is in 0.97.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import NamedTuple

from .scores import Asked, Scores, spread

#: The longest length of training there.
LONGEST = 20
#: Methods there by ours.
METHODS = {
    "nope": "NoPE",
    "t5": "T5",
    "alibi": "ALiBi",
    "sinusoidal": "sinusoidal",
    "rope:rotary_dim=4": "RoPE, 25%",
}
#: Shares of right answers by task and length: mean and standard deviation, by METHODS' order.
PUBLISHED: Mapping[tuple[str, int], Sequence[tuple[float, float]]] = {
    ("cmc", 25): [(0.70, 0.01), (0.73, 0.00), (0.73, 0.01), (0, 0), (0, 0)],
    ("cmc", 30): [(0.17, 0.10), (0.56, 0.02), (0.23, 0.07), (0, 0), (0, 0)],
    ("cmc2x", 25): [(0.90, 0.01), (0.94, 0.00), (0.96, 0.00), (0, 0), (0, 0)],
    ("cmc2x", 30): [(0.43, 0.05), (0.73, 0.05), (0.77, 0.03), (0, 0), (0, 0)],
    ("rsc", 30): [(0.99, 0.01), (0.94, 0.03), (0, 0), (0, 0), (0, 0)],
    ("rsc", 40): [(0.96, 0.02), (0.21, 0.11), (0, 0), (0, 0), (0, 0)],
    ("rdc", 30): [(0.97, 0.02), (0.92, 0.07), (0, 0), (0, 0), (0, 0)],
    ("rdc", 40): [(0.92, 0.03), (0.91, 0.10), (0, 0), (0, 0), (0, 0)],
    ("mc", 25): [(0.54, 0.06), (0.61, 0.14), (0.04, 0.05), (0, 0), (0.00, 0.01)],
    ("mc", 28): [(0.02, 0.01), (0.02, 0.02), (0, 0), (0, 0), (0, 0)],
    ("mc2x", 25): [(0.93, 0.01), (0.93, 0.02), (0.32, 0.29), (0, 0), (0, 0)],
    ("mc2x", 30): [(0.58, 0.03), (0.44, 0.13), (0, 0), (0, 0), (0, 0)],
}
#: Two methods are in an order there where they differ by more.
APART = 0.1


class Beside(NamedTuple):
    """A task at a length there and the nearest multiple of ours.

    Attributes:
        published: by our names.
        ours: seeds' shares, of the methods that have some.
    """

    task: str
    length: int
    own_length: int
    own_longest: int
    published: dict[str, tuple[float, float]]
    ours: dict[str, list[float]]

    @property
    def apart(self) -> float:
        """How far the two lengths are from each other, over those of training."""
        return abs(self.length / LONGEST - self.own_length / self.own_longest)

    @property
    def times(self) -> str:
        """The lengths over those of training, theirs and ours."""
        return f"{self.length / LONGEST:g}x, {self.own_length / self.own_longest:g}x"


def beside(found: Mapping[Asked, Scores]) -> list[Beside]:
    """What is both published and in rows."""
    lines = []
    for asked, scores in found.items():
        for (task, length), shares in PUBLISHED.items():
            lengths = {own for name in METHODS for own in scores.get(name, {})}
            # Beyond training: a length that was trained says nothing of the order.
            beyond = [own for own in lengths if own > asked.longest]
            if task != asked.task or not beyond:
                continue
            own = min(beyond, key=lambda own: abs(own / asked.longest - length / LONGEST))
            published = dict(zip(METHODS, shares, strict=True))
            ours = {
                name: list(scores[name][own].values())
                for name in METHODS
                if own in scores.get(name, {})
            }
            if ours:
                lines.append(Beside(task, length, own, asked.longest, published, ours))
    return lines


def agreement(lines: Sequence[Beside]) -> tuple[int, int, int]:
    """Of pairs of methods that are `APART` there: how many our medians put in the same order, in
    the other one, and at a tie. Of several lengths there that are nearest to one of ours, the
    nearest counts.
    """
    same = other = tied = 0
    nearest: dict[tuple[str, int], Beside] = {}
    for line in sorted(lines, key=lambda line: line.apart):
        nearest.setdefault((line.task, line.own_length), line)
    for line in nearest.values():
        for a, b in combinations(line.ours, 2):
            theirs = line.published[a][0] - line.published[b][0]
            own = median(line.ours[a]) - median(line.ours[b])
            if abs(theirs) <= APART:
                continue
            if own == 0:
                tied += 1
            elif (own > 0) == (theirs > 0):
                same += 1
            else:
                other += 1
    return same, other, tied


def cells(line: Beside) -> list[str]:
    """A line of a table: theirs, then ours, for each of METHODS."""
    found = [f"`{line.task}`", line.times]
    for name in METHODS:
        mean, deviation = line.published[name]
        theirs = f"{mean:.2f} ± {deviation:.2f}" if mean or deviation else "0"
        found.append(f"{theirs} / {spread(line.ours[name]) if name in line.ours else '-'}")
    return found
