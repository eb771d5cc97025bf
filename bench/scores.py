"""What rows of bench.tasks say: every seed's scores by task, method and length; their tables."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from .comparison import label, recipe
from .rows import Row

KIND = "tasks"
METRICS = ("exact match", "accuracy")
#: By method, length and seed.
Scores = dict[str, dict[int, dict[int, float]]]


class Asked(NamedTuple):
    """A task of the test, as rows have it, and what was trained for it."""

    task: str  # NAME, or NAME/TEST where it is another distribution than that of training
    shortest: int
    longest: int

    def __str__(self) -> str:
        several = self.shortest < self.longest
        trained = f"{self.shortest} to {self.longest}" if several else str(self.longest)
        return f"{self.task}, trained at {trained}"


def scores_of(rows: Sequence[Row], metric: str) -> dict[Asked, Scores]:
    """The scores of every task by one metric.

    Raises:
        ValueError: the models of one task are not of one recipe, or two are of one method and seed.
    """
    found: dict[Asked, Scores] = {}
    recipes: dict[str, str] = {}
    for row in rows:
        if row.metric != metric:
            continue
        first = recipes.setdefault(row.mode, row.recipe)
        if row.recipe != first:
            own, other = (set(text.split()) for text in (row.recipe, first))
            raise ValueError(
                f"models of {row.mode} differ in {sorted(own ^ other)}: compare one recipe's."
            )
        shortest, longest = (int(end) for end in recipe(row)["train"].split(".."))
        assert row.T is not None
        assert row.seed is not None
        name = label(row.name, row.options)
        by_length = found.setdefault(Asked(row.mode, shortest, longest), {}).setdefault(name, {})
        seeds = by_length.setdefault(row.T, {})
        if row.seed in seeds:
            raise ValueError(
                f"there are two scores of {name} on {row.mode} at {row.T} with seed {row.seed}."
            )
        seeds[row.seed] = row.p50
    return found


def spread(values: Sequence[float]) -> str:
    """The median and, of several, the least and the greatest."""
    middle = f"{median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}..{max(values):.2f})"


def seeds_of(scores: Scores) -> int:
    """The most seeds that a method has."""
    return max(len(seeds) for by_length in scores.values() for seeds in by_length.values())


def fewer(name: str, scores: Scores) -> str:
    """Of how many seeds a method is, "" unless others have more."""
    own, most = seeds_of({name: scores[name]}), seeds_of(scores)
    return "" if own == most else f", {own} of {most} seeds"


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """A table for every task and metric, as lines of text."""
    by_metric = {metric: scores_of(rows, metric) for metric in METRICS}
    for asked in by_metric[METRICS[0]]:
        for metric, found in by_metric.items():
            scores = found[asked]
            seeds = seeds_of(scores)
            of = "one seed" if seeds == 1 else f"median of {seeds} seeds (least..greatest)"
            lengths = sorted({length for by_length in scores.values() for length in by_length})
            lines = [["", *map(str, lengths)]]
            for name, by_length in scores.items():
                cells = (list(by_length.get(length, {}).values()) for length in lengths)
                lines.append(
                    [name + fewer(name, scores), *(spread(c) if c else "-" for c in cells)]
                )
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            yield f"{asked}: {metric}, {of}"
            for first, *rest in lines:
                right = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
                yield f"  {first.ljust(widths[0])}  {'  '.join(right)}"
            yield ""
