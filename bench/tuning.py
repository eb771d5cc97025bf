"""The learning rate of each method of a comparison: the same trials for all, on other text.

Every method is trained under the grid's first seed with every rate; the one whose loss over windows
of the training context is lowest is its rate under all seeds. The text that decides is not the text
that is reported. Runs that diverged are out; the chosen runs are the grid's own of the first seed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .grid import Cell, Method, Plan
from .losses import Question


class Trial(NamedTuple):
    """A run with one of the rates, and its loss on the deciding text; None where it failed."""

    cell: Cell
    rate: float
    loss: float | None


class Tuning(NamedTuple):
    """What decided.

    Attributes:
        trials: of each method, by rate.
    """

    question: Question
    trials: dict[Method, list[Trial]]

    @property
    def rates(self) -> dict[Method, float]:
        """The best of each method that has a run which did not fail."""
        found = {}
        for method, trials in self.trials.items():
            losses = [(trial.loss, trial.rate) for trial in trials if trial.loss is not None]
            if losses:
                found[method] = min(losses)[1]
        return found

    @property
    def tried(self) -> list[float]:
        """All rates."""
        return [trial.rate for trial in next(iter(self.trials.values()))]


def tune(
    plan: Plan, rates: Sequence[float], question: Question, symbols: int,
    run: Callable[[Sequence[Cell], Question], Sequence[Cell]],
) -> Tuning:  # fmt: skip
    """Train the trials that are not yet, and choose.

    Args:
        question: of the deciding text.
        symbols: of the vocabulary.
        run: trains cells and asks them; what `bench.grid.run` returns.

    Raises:
        ValueError: a folder holds another run. Stopped: by a signal.
    """
    cells: dict[Method, list[tuple[Cell, float]]] = {method: [] for method in plan.methods}
    for rate in rates:
        one = dataclasses.replace(
            plan, seeds=plan.seeds[:1], rates=dict.fromkeys(plan.methods, rate)
        )
        for method, cell in zip(plan.methods, one.cells("tokens", symbols), strict=True):
            cells[method].append((cell, rate))
    failed = set(run([pair[i][0] for i in range(len(rates)) for pair in cells.values()], question))
    return Tuning(question, {
        method: [
            Trial(cell, rate, None if cell in failed else loss_of(cell, question))
            for cell, rate in pairs
        ]
        for method, pairs in cells.items()
    })  # fmt: skip


def loss_of(cell: Cell, question: Question) -> float | None:
    """Mean nats a target in windows of the training context; None while there is no answer."""
    found = cell.losses(question)
    if found is None:
        return None
    loss = float(np.mean(found["windows"][question.context]))
    return loss if np.isfinite(loss) else None
