"""Tiles of the kernels: neighbours of each constant, those that compile well through the gate,
those that are right side by side with the constant; the rows of the file.

A kernel is timed where it is first used, forward or backward, at one length. What wins there must
hold wherever else the kernel is used: in every work of the plan, and in every example of the kernel
files, such as heads of 40 and all kinds of masks.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from posenc import tuned
from posenc.backends import choice
from posenc.backends.measured import Way
from posenc.kernels import tiles
from posenc.kernels.common import INTERPRETED
from posenc.kernels.tiles import Kernel
from posenc.tune.cases import Asked, Plan, Sizes, Work, ask
from posenc.tune.compiled import Change, changes, gpu_of, in_examples, launches, refusals
from posenc.tune.gate import Gate, results
from posenc.tune.measure import BACKWARD, Clock, Times, planned_clock, ranking, reason, why

Name = TypeVar("Name", bound=Hashable)
Row = dict[str, Any]


class Question(NamedTuple):
    """What the gate answers once for all ways."""

    work: Work
    direction: str
    dtype: torch.dtype
    dim: int

    def ask(self, sizes: Sizes, device: torch.device) -> Asked | None:
        """Of these sizes."""
        return ask(self.work, sizes, self.direction, self.dtype, device)


class Use(NamedTuple):
    """Where a kernel is used, and whether in the backward pass alone."""

    question: Question
    way: Way
    backward: bool

    def __str__(self) -> str:
        work, direction, dtype, dim = self.question
        name = f"{work.name} {work.call}".strip()
        return f"{name}, {direction}, {str(dtype).removeprefix('torch.')}, D={dim}, {self.way}"


# What uses which kernel


def uses(plan: Plan, device: torch.device) -> dict[Kernel, list[Use]]:
    """By kernel, where the works of a plan use it. It is timed in the first place, whose heads are
    of the kernel's size; that of heads twice as wide, which some works form, comes with theirs.
    """
    found: dict[Kernel, list[Use]] = {}
    for work, direction, dtype, dim in plan.cells():
        question = Question(work, direction, dtype, dim)
        asked = question.ask(Sizes(1, plan.checked, dim), device)
        if asked is None:
            continue
        for settings in BACKWARD if asked.leaves else ({},):
            way = Way("fused", settings)
            if not choice.can(way, asked.case):
                continue
            for kernel, backward in used(way, asked).items():
                found.setdefault(kernel, []).append(Use(question, way, backward))
    ordered = {}
    for kernel, places in found.items():
        own = [use for use in places if padded(use.question.dim) == kernel.key[-1]]
        if own:
            ordered[kernel] = [*own, *(use for use in places if use not in own)]
    return ordered


def padded(dim: int) -> int:
    """A head dim as kernels are listed by."""
    return max(32, 1 << (dim - 1).bit_length())


def used(way: Way, asked: Asked) -> dict[Kernel, bool]:
    """The kernels that a way launches, and whether only its backward pass does."""
    forward: list[Kernel] = []

    def both() -> None:
        with torch.set_grad_enabled(bool(asked.leaves)):
            y = choice.by(way, asked.case)
        forward.extend(found)
        if asked.leaves:
            torch.autograd.grad(
                y, asked.leaves, torch.zeros_like(y), retain_graph=True, allow_unused=True
            )

    with tiles.recorded(asked.case.q.device) as found:
        try:
            launches(both)
        except Exception:  # the comparison of back ends says why
            return {}
    return {kernel: kernel not in forward for kernel in found}


# Candidates


def neighbours(kernel: Kernel) -> list[Any]:
    """Configurations around a kernel's constant, the likeliest first, as far as it can have them.

    In half precision a warp of a product has 16 rows: no more warps than that, unless the constant
    has. Where warps double, half as many programs of `relative` share a processor.
    """
    own = tiles.constant(kernel)
    rows: tuple[str, ...] = ("block_m",)
    columns: tuple[str, ...] = ("block_n",)
    if kernel.key[0] in ("dkv", "dqkv"):
        rows, columns = columns, rows
    elif kernel.family == "by_distance":
        rows = columns = ("block_m", "block_n")

    def scaled(more: Sequence[str], less: Sequence[str]) -> Any:
        sizes = own._asdict()
        sizes |= {name: 2 * sizes[name] for name in more}
        sizes |= {name: sizes[name] // 2 for name in less}
        if "resident" in sizes:
            sizes["resident"] = max(1, own.resident * own.num_warps // max(1, sizes["num_warps"]))
        return type(own)(**sizes)

    def load(config: Any) -> float:
        """Rows that warps want, over those that a tile has."""
        return config.num_warps * 16 / getattr(config, rows[0])

    warps = ("num_warps",)
    found = [
        scaled(columns, ()),
        scaled((), columns),
        scaled((), rows + warps),
        own._replace(num_stages=own.num_stages + 1),
        own._replace(num_stages=own.num_stages - 1),
        scaled(rows + warps, ()),
        scaled((), warps),
        scaled(warps, ()),
    ]
    half = kernel.key[-2] == 2
    return [
        config
        for config in found
        if tiles.why_not(kernel, config) is None
        and not (half and load(config) > max(1.0, load(own)))
    ]


def name_of(config: Any) -> str:
    """In words."""
    return tuned.described(config._asdict())


# The rows


class Sweep:
    """Of a plan, on a device. What was found before counts no longer."""

    def __init__(self, plan: Plan, device: torch.device, clock: Clock | None = None) -> None:
        self.plan, self.device = plan, torch.empty(0, device=device).device
        self.turns = clock or planned_clock(plan, device)
        self.gpu = None if INTERPRETED else gpu_of(device)
        tiles.take(self.device, {})
        self.uses = uses(plan, device)
        self._gates: dict[Question, Gate] = {}

    def rows(self) -> Iterator[Row]:
        """A row of the file for each kernel. What was found so far counts for what comes next."""
        found: dict[Kernel, Any] = {}
        for kernel in self.uses:
            row = self.row(kernel)
            found |= tiles.checked([row])
            tiles.take(self.device, found)
            self._gates.clear()
            yield row

    def row(self, kernel: Kernel) -> Row:
        """Of one kernel."""
        own, first = tiles.constant(kernel), self.uses[kernel][0]
        today, others = name_of(own), neighbours(kernel)[: self.plan.neighbours]
        configs = {name_of(config): config for config in (own, *others)}
        errors, refused = self.judge(kernel, {name: (x, first) for name, x in configs.items()})
        found = self.time(kernel, {name: configs[name] for name in errors})
        times = {name: middle for name, (_, middle, _) in found.items()}
        while times and (best := ranking(times, today)[0]) != today:
            wrong = self.elsewhere(kernel, configs[best])
            if wrong is None:
                break
            refused[best] = wrong
            del times[best]
        order = ranking(times, today) if times else []
        return {
            "kernel": str(kernel),
            "family": kernel.family,
            "key": list(kernel.key),
            "config": configs[order[0]]._asdict() if order and order[0] != today else None,
            "why": why(order, times, today) if order else "no tiles were right",
            "tried": [
                {"config": configs[name]._asdict(), "ms": list(found[name]), "error": errors[name]}
                for name in order
            ],
            "refused": refused,
        }

    def judge(
        self, kernel: Kernel, trials: Mapping[Name, tuple[Any, Use]]
    ) -> tuple[dict[Name, float], dict[Name, str]]:
        """Of configurations in some places: the errors of what is right, why the rest is refused.
        All are compiled before any runs.
        """
        errors: dict[Name, float] = {}
        refused: dict[Name, str] = {}
        changed: dict[Name, list[Change]] = {}
        for name, trial in trials.items():
            try:
                changed[name] = self.changes(kernel, *trial)
            except Exception as failure:  # whatever one raises, the others are still judged
                refused[name] = reason(failure)
        refused |= self.refusals(changed)
        for name, trial in trials.items():
            if name not in refused:
                try:
                    errors[name] = self.error(kernel, *trial)
                except Exception as failure:
                    refused[name] = reason(failure)
        return errors, refused

    def changes(self, kernel: Kernel, config: Any, use: Use) -> list[Change]:
        """What a configuration changes in the launches of a use; [] for interpreted ones."""
        if self.gpu is None:
            return []
        sides = []
        call = partial(results, partial(choice.by, use.way), self.gate(use.question).asked)
        for each in (config, tiles.constant(kernel)):
            with tiles.using(self.device, {kernel: each}):
                sides.append(launches(call))
        return changes(*sides)

    def refusals(self, candidates: Mapping[Name, Sequence[Change]]) -> dict[Name, str]:
        """Of the compiler."""
        return {} if self.gpu is None else refusals(self.gpu, candidates)

    def error(self, kernel: Kernel, config: Any, use: Use) -> float:
        """Of the output where the kernel is used; ValueError where anything is off."""
        with tiles.using(self.device, {kernel: config}):
            return self.gate(use.question).check(partial(choice.by, use.way))

    def gate(self, question: Question) -> Gate:
        """Made when it is first needed."""
        if question not in self._gates:
            asked = question.ask(Sizes(1, self.plan.checked, question.dim), self.device)
            assert asked is not None
            self._gates[question] = Gate(asked)
        return self._gates[question]

    def time(self, kernel: Kernel, configs: Mapping[str, Any]) -> Times:
        """Side by side where the kernel is first used: a batch as in training, or a step."""
        if not configs:
            return {}
        use, lengths = self.uses[kernel][0], self.plan.lengths
        size = "step" if use.question.direction == "step" else "train"
        sizes = self.plan.sizes(size, lengths[len(lengths) // 2], use.question.dim)
        asked = use.question.ask(sizes, self.device)
        assert asked is not None
        call = timed(use, asked)

        def run(config: Any) -> None:
            with tiles.using(self.device, {kernel: config}):
                call()

        return self.turns({name: partial(run, config) for name, config in configs.items()})

    def elsewhere(self, kernel: Kernel, config: Any) -> str | None:
        """Why the kernel cannot have the configuration in another place than the first, where the
        constant can be.
        """
        if self.gpu is not None:
            for found in self.refusals({"": in_examples(kernel, config)}).values():
                return f"in other calls {found}"
        places = dict(enumerate(self.uses[kernel][1:]))
        _, wrong = self.judge(kernel, {place: (config, use) for place, use in places.items()})
        own = tiles.constant(kernel)
        _, before = self.judge(kernel, {place: (own, places[place]) for place in wrong})
        news = (f"{places[place]}: {why}" for place, why in wrong.items() if place not in before)
        return next(news, None)


def timed(use: Use, asked: Asked) -> Callable[[], object]:
    """The forward pass, or the backward pass where a kernel is used in that alone."""
    case, leaves = asked

    def forward() -> torch.Tensor:
        with torch.set_grad_enabled(bool(leaves)):
            return choice.by(use.way, case)

    if not use.backward:
        return forward
    y = forward()
    probe = torch.ones_like(y)
    return partial(torch.autograd.grad, y, leaves, probe, retain_graph=True, allow_unused=True)
