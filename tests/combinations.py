"""Which combinations of parameters a test runs: all on a GPU; interpreted, where each takes
seconds, few in which every two values of two parameters meet.
"""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

from posenc.kernels.common import INTERPRETED


def combined(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """A tuple a run, with a value of each axis."""
    return in_pairs(*axes) if INTERPRETED else list(product(*axes))


def in_pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Of all combinations, greedily, until every two values of two axes have met."""
    every = [tuple(enumerate(c)) for c in product(*(range(len(axis)) for axis in axes))]
    missing = {pair for c in every for pair in combinations(c, 2)}
    chosen = []
    while missing:
        best = max(every, key=lambda c: len(missing.intersection(combinations(c, 2))))
        missing.difference_update(combinations(best, 2))
        chosen.append(tuple(axes[axis][value] for axis, value in best))
    return chosen
