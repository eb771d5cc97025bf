"""Candidates of every case through the gate, then side by side; the rows of the file."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from posenc.backends import blockwise, choice, fused, measured
from posenc.backends.case import Case
from posenc.backends.measured import APART, Way
from posenc.tune.cases import Asked, Plan, Sizes, ask
from posenc.tune.clock import take_turns
from posenc.tune.gate import Gate

#: What is not so much faster is not taken: today's way stays.
MARGIN = 0.05
#: Settings that are tried beside a back end's constants.
TRIED: dict[str, tuple[dict[str, int], ...]] = {
    "blockwise": ({"rows": 64}, {"rows": 256}, {"rows": 512}),
    "contextual": ({"rows": 64}, {"rows": 256}),
    "skipping": ({"rows": 64}, {"rows": 128}),
}
#: The two backward passes of kernels; without a setting they take one by the length.
BACKWARD: tuple[dict[str, int], ...] = ({"deterministic": True}, {"deterministic": False})

Times = dict[str, tuple[float, float, float]]
Clock = Callable[[Mapping[str, Callable[[], Any]]], Times]


def today(case: Case) -> Way:
    """What auto takes where nothing was measured."""
    if case.rotation is not None:
        return Way(APART)
    backend = choice.choose(case, "auto")
    return Way(next(name for name, module in choice.MEASURABLE.items() if module is backend))


def candidates(case: Case) -> list[Way]:
    """Today's way first, then the others that can compute the case.

    Where memory is linear in the length today, what forms T x S is none.
    """
    first = today(case)
    if case.rotation is not None:
        found = []
    else:
        linear = first.backend in ("blockwise", "contextual", "reflected")
        long = case.mask.length > 1 and case.mask.key_length >= blockwise.RECOMPUTE_FROM
        left_out = ("sdpa", "short") if linear and long else ()
        names = (name for name in choice.MEASURABLE if name not in (*left_out, "fused"))
        found = [Way(name, settings) for name in names for settings in ({}, *TRIED.get(name, ()))]
    if fused.runs_on(case.q.device):
        trains = measured.needs_gradient(case.q, case.k, case.v)
        found += [Way("fused", settings) for settings in (BACKWARD if trains else ({},))]
    return [first, *(way for way in found if way != first and choice.can(way, case))]


class Checked:
    """The candidates of a work so far: the errors of those that passed the gate, and why others did
    not. The gate is made when the first one comes.
    """

    def __init__(self, make: Callable[[], Asked | None]) -> None:
        self._make = make
        self._gate: Gate | None = None
        self.right: dict[str, float] = {}
        self.refused: dict[str, str] = {}

    def check(self, ways: list[Way]) -> list[Way]:
        """Those that are right."""
        for way in ways:
            name = str(way)
            if name in self.right or name in self.refused:
                continue
            try:
                self.right[name] = self.gate.check(partial(choice.by, way))
            except Exception as failure:  # whatever one raises, the others are still measured
                self.refused[name] = reason(failure)
        return [way for way in ways if str(way) in self.right]

    @property
    def gate(self) -> Gate:
        """Of the work."""
        if self._gate is None:
            asked = self._make()
            assert asked is not None
            self._gate = Gate(asked)
        return self._gate


def reason(failure: BaseException) -> str:
    """The first line of what went wrong first. Triton puts the place in the source before it, and
    before what ptxas says the command.
    """
    while failure.__cause__ is not None:
        failure = failure.__cause__
    lines = str(getattr(failure, "error_message", None) or failure).strip().splitlines()
    fatal = [line for line in lines if line.startswith(("ptxas fatal", "ptxas error"))]
    return next(iter((*fatal, *lines)), type(failure).__name__)


def runs(ways: list[Way], asked: Asked) -> dict[str, Callable[[], Any]]:
    """What is timed of each: forward, and backward where there are leaves."""
    case, leaves = asked

    def forward(way: Way) -> None:
        with torch.no_grad():
            choice.by(way, case)

    def both(way: Way) -> None:
        y = choice.by(way, case)
        torch.autograd.grad(y, leaves, probe, retain_graph=True, allow_unused=True)

    probe = torch.ones((*case.q.shape[:-1], case.v.shape[-1])).to(case.q)
    return {str(way): partial(both if leaves else forward, way) for way in ways}


def ranking(times: Mapping[str, float], first: str) -> list[str]:
    """Names by time; the one of today before all where nothing is faster by the margin."""
    order = sorted(times, key=lambda name: times[name])
    if first in times and times[order[0]] > (1 - MARGIN) * times[first]:
        order.remove(first)
        return [first, *order]
    return order


def why(order: list[str], times: Mapping[str, float], first: str) -> str:
    """The choice in words."""
    best = order[0]
    if len(order) == 1:
        return f"alone right, {times[best]:.3g} ms"
    if best == first:
        other = order[1]
        return f"{times[best]:.3g} ms; {other} takes {times[other]:.3g} ms"
    if first not in times:
        return f"{times[best]:.3g} ms; {first}, the way without a measurement, was refused"
    ratio = times[first] / times[best]
    return f"{times[best]:.3g} ms; {first} takes {times[first]:.3g} ms: {ratio:.2f} times as fast"


def measure(
    plan: Plan, device: torch.device, clock: Clock | None = None
) -> Iterator[dict[str, Any] | None]:
    """The rows of a device, one after the other; None where there is nothing to choose.

    What was measured so far counts for what is measured next.

    Args:
        clock: times candidates; `take_turns` as planned if None.
    """
    turns = clock or planned_clock(plan, device)
    rows: list[dict[str, Any]] = []
    measured.take(device, rows)
    for work, direction, dtype, dim in plan.cells():
        check = partial(ask, work, Sizes(1, plan.checked, dim), direction, dtype, device)
        checked = Checked(check)
        for length in plan.lengths:
            asked = ask(work, plan.sizes(direction, length, dim), direction, dtype, device)
            row = None if asked is None else _row(asked, checked, turns)
            if row is not None and not any(_same(row, other) for other in rows):
                rows.append(row)
                measured.take(device, rows)
            else:
                row = None
            yield row


def planned_clock(plan: Plan, device: torch.device) -> Clock:
    """`take_turns` as planned."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else _nothing
    return partial(take_turns, rounds=plan.rounds, seconds=plan.seconds, wait=wait)


def _nothing() -> None:
    pass


def _same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row[key] == other[key] for key in ("op", "direction", "dtype", "sizes"))


def _row(asked: Asked, checked: Checked, turns: Clock) -> dict[str, Any] | None:
    """None where there is nothing to choose, or nothing would ask for it."""
    question, ways = measured.question(asked.case), candidates(asked.case)
    if question is None or len(ways) == 1:
        return None
    right, first = checked.check(ways), str(ways[0])
    if not right:
        return None
    found = turns(runs(right, asked))
    times = {name: middle for name, (_, middle, _) in found.items()}
    order, by_name = ranking(times, first), {str(way): way for way in right}
    refused = {str(way): checked.refused[str(way)] for way in ways if way not in right}
    return {
        "op": question.op,
        "direction": question.direction,
        "dtype": str(question.dtype).removeprefix("torch."),
        "sizes": question.sizes,
        "batch": asked.case.q.shape[0],
        "heads": asked.case.q.shape[1],
        "why": why(order, times, first),
        "ways": [
            {
                "backend": by_name[name].backend,
                "settings": dict(by_name[name].settings),
                "ms": list(found[name]),
                "error": checked.right[name],
            }
            for name in order
        ],
        "refused": refused,
    }
