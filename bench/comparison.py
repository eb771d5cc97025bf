"""Losses of several runs a method, as rows, compared over seeds: the printed tables."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from .rows import Row
from .statistics import MOST_SEEDS, Interval, holm, p_value, seeds_needed, student

#: Keys of a recipe in which a match lets methods differ.
TURNED = {"parameters": {"mlp_dim"}, "flops": {"steps", "warmup"}}
#: What is equal under a match.
MATCHES = {"tokens": "tokens", "parameters": "parameters", "flops": "training FLOPs"}
#: Modes that get a table a length, and those that get one in all.
LONG, SHORT = ("evaluate", "windows", "sliding"), ("tail", "positions")
TITLES = {
    "evaluate": "windows of {} tokens side by side",
    "windows": "windows of {} tokens side by side",
    "sliding": "windows of {} tokens, the last half of each scored",
    "tail": "loss of the same last tokens after so many of context, mean over seeds",
    "positions": "loss by the position in a window, up to, mean over seeds",
}
LEVEL = 0.05
COLUMNS = 8  # of the tables of several lengths
Losses = dict[str, dict[int, float]]  # by method and seed


def recipe(row: Row) -> dict[str, str]:
    """The recipe of a row by its keys."""
    return {key: value for key, _, value in (word.partition("=") for word in row.recipe.split())}


def match_of(row: Row) -> str:
    """What the runs of a comparison have in common."""
    return recipe(row).get("match", "tokens")


def label(name: str, options: str) -> str:
    """A method as it is typed: NAME, or NAME:KEY=VALUE,KEY=VALUE."""
    return f"{name}:{options.replace(' ', ',')}" if options else name


def common_recipe(row: Row) -> dict[str, str]:
    """What runs that are compared have in common: the recipe without what the match turns, and
    without a rate that is the best of the same ones for each.
    """
    left_out = {*TURNED.get(match_of(row), ())}
    if "tuned" in recipe(row):
        left_out |= {"lr", "min_lr"}
    return {key: value for key, value in recipe(row).items() if key not in left_out}


def losses_of(rows: Sequence[Row]) -> Losses:
    """The losses of one comparison.

    Raises:
        ValueError: the runs are not of one recipe, or two are of one method and seed.
    """
    found: Losses = {}
    first: dict[str, str] = {}
    for row in rows:
        own = common_recipe(row)
        first = first or own
        if different := sorted(set(own.items()) ^ set(first.items())):
            words = [f"{key}={value}" for key, value in different]
            raise ValueError(f"the runs differ in {words}: compare runs of one recipe.")
        assert row.seed is not None
        seeds = found.setdefault(label(row.name, row.options), {})
        if row.seed in seeds:
            raise ValueError(
                f"there are two runs of {label(row.name, row.options)} with seed {row.seed}."
            )
        seeds[row.seed] = row.p50
    return found


@dataclass(frozen=True)
class Gap:
    """Loss minus the baseline's.

    Attributes:
        seeds: the interval over the seeds that both have.
        text: 95% bounds of the bootstrap over seeds and text, where there is one.
        needed: seeds that a test of it needs, None with fewer than two.
        p: of the paired t test over the seeds, corrected by Holm for all that are compared with
            the same baseline; None with fewer than two.
    """

    seeds: Interval
    count: int
    text: tuple[float, float] | None
    needed: float | None
    p: float | None

    @property
    def verdict(self) -> str:
        """Lower and higher only where p is below 5% and the text's interval leaves 0 out."""
        direction = "lower" if self.seeds.mean < 0 else "higher"
        clear = self.text is None or not self.text[0] <= 0 <= self.text[1]
        if self.needed is None or self.p is None:
            seen = clear and self.text is not None
            return f"{direction if seen else 'no difference'} over the text; seeds: one only"
        if self.p < LEVEL:
            return direction if clear else "no difference that so much text can see"
        if not self.seeds.low <= 0 <= self.seeds.high:
            return "no difference among so many comparisons"
        count = f"more than {MOST_SEEDS:,}" if math.isinf(self.needed) else f"{self.needed:.0f}"
        return f"no difference that {self.count} seeds can see; this gap needs {count} seeds"


def gap_of(
    own: dict[int, float], baseline: dict[int, float], text: tuple[float, float] | None = None
) -> Gap | None:
    """The gap over the seeds that both have, None without any."""
    pairs = [own[seed] - baseline[seed] for seed in sorted(own.keys() & baseline.keys())]
    if not pairs:
        return None
    if len(pairs) < 2:
        return Gap(student(pairs), len(pairs), text, None, None)
    needed = seeds_needed(fmean(pairs), stdev(pairs))
    return Gap(student(pairs), len(pairs), text, needed, p_value(pairs))


def gaps_of(
    losses: Losses, baseline: str, text: Mapping[str, tuple[float, float]]
) -> dict[str, Gap]:
    """The gap of every method but the baseline; p corrected for their number.

    Args:
        text: 95% bounds of the bootstrap, of those that have them.
    """
    found = {}
    for name, by_seed in losses.items():
        gap = gap_of(by_seed, losses.get(baseline, {}), text.get(name))
        if name != baseline and gap is not None:
            found[name] = gap
    tested = {name: gap.p for name, gap in found.items() if gap.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {name: replace(gap, p=corrected.get(name)) for name, gap in found.items()}


def shown(found: Interval, form: str) -> str:
    """An interval as text; a mean alone where one value has none."""
    if math.isinf(found.low):
        return f"{found.mean:{form}}"
    return f"{found.mean:{form}} ({found.low:{form}} .. {found.high:{form}})"


def tables(rows: Sequence[Row], baseline: str = "rope") -> Iterator[str]:
    """The printed lines.

    Args:
        rows: of kind perplexity, or run, which knows no text to resample.
        baseline: a method's label, for rows that do not say.

    Raises:
        ValueError: for runs that cannot be compared, and without a baseline.
    """
    yield from _rates(rows)
    for match in dict.fromkeys(map(match_of, rows)):
        own = [row for row in rows if match_of(row) == match]
        wanted = recipe(own[0]).get("baseline", baseline)
        names = sorted({label(row.name, row.options) for row in own})
        if wanted not in names:
            raise ValueError(f"no run of the baseline {wanted!r}; there are {names}.")
        for mode in LONG:
            for length in sorted({row.T or 0 for row in own if row.mode == mode}):
                at = [row for row in own if (row.mode, row.T) == (mode, length)]
                yield from _one_length(at, wanted)
        for mode in SHORT:
            yield from _all_lengths([row for row in own if row.mode == mode])


def _rates(rows: Sequence[Row]) -> Iterator[str]:
    """The learning rates that were tried, and what each gave."""
    tried: dict[str, dict[float, float]] = {}
    for row in rows:
        if row.mode == "tune":
            own = tried.setdefault(label(row.name, row.options), {})
            own[float(recipe(row)["lr"])] = row.p50
    if not tried:
        return
    rates, width = sorted({rate for own in tried.values() for rate in own}), max(map(len, tried))
    yield "\nloss on the text that decides the learning rate, one seed; * is what the runs take"
    yield f"  {'':{width}}" + "".join(f"{rate:11g}" for rate in rates)
    for name, own in tried.items():
        best = min(own, key=own.__getitem__)
        cells = [f"{own[r]:.4f}{'*' if r == best else ' '}" if r in own else "-" for r in rates]
        yield f"  {name:{width}}" + "".join(f"{cell:>11}" for cell in cells)


def _one_length(rows: Sequence[Row], baseline: str) -> Iterator[str]:
    first = rows[0]
    losses = losses_of([row for row in rows if row.metric == "loss"])
    about, width = recipe(first), max(map(len, [*losses, "method"]))
    text = f", {about['units']} {about['unit']}s" if "units" in about else ""
    yield (
        f"\nequal {MATCHES[match_of(first)]}, {TITLES[first.mode].format(first.T)}; "
        f"{int(about['targets']):,} targets{text}; 95% intervals"
    )
    yield (
        f"  {'method':{width}} seeds  {'loss, over seeds':24}  {'perplexity':24}  bits/byte  "
        f"{f'loss - {baseline}, over seeds':28}  p, Holm  over seeds and text"
    )
    bounds = {name: found for name in losses if (found := bounds_of(rows, name)) is not None}
    gaps = gaps_of(losses, baseline, bounds)
    for name, by_seed in losses.items():
        loss = student(list(by_seed.values()))
        perplexity = Interval(*(math.exp(min(x, 700)) for x in loss))
        if len(by_seed) < 2:
            perplexity = Interval(perplexity.mean, -math.inf, math.inf)
        each = [
            row.p50
            for row in rows
            if row.metric == "bits per byte" and label(row.name, row.options) == name
        ]
        byte = f"{fmean(each):.3f}" if each else ""
        line = f"  {name:{width}} {len(by_seed):5}  {shown(loss, '.4f'):24}  "
        line += f"{shown(perplexity, '.2f'):24}  {byte:9}  "
        if (gap := gaps.get(name)) is not None:
            over = "" if gap.text is None else "({:+.4f} .. {:+.4f})".format(*gap.text)
            p = "" if gap.p is None else f"{gap.p:.4f}"
            line += f"{shown(gap.seeds, '+.4f'):28}  {p:7}  {over:21} {gap.verdict}"
        yield line.rstrip()


def bounds_of(rows: Sequence[Row], name: str) -> tuple[float, float] | None:
    """95% of the bootstrap over seeds and text of a method's gap, None where rows have none.

    Args:
        rows: of one match, mode and length.
        name: a label.
    """
    found = {row.metric: row.p50 for row in rows if label(row.name, row.options) == name}
    if "gap 2.5%" not in found:
        return None
    return found["gap 2.5%"], found["gap 97.5%"]


def _all_lengths(rows: Sequence[Row]) -> Iterator[str]:
    """One line a method; of many lengths, some."""
    losses = [row for row in rows if row.metric == "loss"]
    if not losses:
        return
    lengths = sorted({row.T or 0 for row in losses})
    count = min(COLUMNS, len(lengths))
    chosen = [lengths[(i + 1) * len(lengths) // count - 1] for i in range(count)]
    yield f"\nequal {MATCHES[match_of(losses[0])]}, {TITLES[losses[0].mode]}"
    names = list(dict.fromkeys(label(row.name, row.options) for row in losses))
    width = max(map(len, [*names, "method"]))
    yield f"  {'method':{width}}" + "".join(f"{length:9}" for length in chosen)
    for name in names:
        own = [row for row in losses if label(row.name, row.options) == name]
        cells = []
        for length in chosen:
            each = [row.p50 for row in own if length == row.T]
            cells.append(f"{fmean(each):9.4f}" if each else f"{'-':>9}")
        yield f"  {name:{width}}" + "".join(cells)
