"""What rows say about a comparison, turned so that positive is in the claim's favour."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from posenc.routing.moh import AUX_WEIGHT

from ..comparison import bounds_of, common_recipe, gap_of, label, losses_of, match_of, recipe, shown
from ..rows import Row, read, row_of
from ..statistics import Interval, student
from .reading import Buckets, Load, Loss, OfRows, Ratio

#: What rows call otherwise.
PROTOCOLS = {"evaluate": "windows", "sliding": "sliding windows", "tail": "tail after a context"}


@dataclass(frozen=True)
class Measured:
    """An interval and where it comes from.

    Attributes:
        gap: in `unit`, or the logarithm of a ratio; the wider of what seeds and text give.
        what: the two that are compared.
        source: over what the interval is.
        recipe: of the runs, or what was timed on.
        needed: seeds that a test of such a gap needs, where there are several.
    """

    gap: Interval
    what: str
    times: bool
    source: str
    recipe: str
    needed: float | None = None
    unit: str = "nats"

    def __str__(self) -> str:
        if not self.times:
            return f"{self.what}: {shown(self.gap, '+.3f')} {self.unit}"
        mean, low, high = (math.exp(value) for value in self.gap)
        return f"{self.what}: {mean:.2f} times ({low:.2f} .. {high:.2f})"


class Evidence:
    """The row files below a folder, each read once."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self._files: dict[str, list[dict[str, Any]]] = {}

    def rows(self, file: str) -> list[dict[str, Any]]:
        """Of a file, none where there is none. Raises ValueError for a damaged one."""
        if file not in self._files:
            path = self.results / file
            self._files[file] = read(path) if path.is_file() else []
        return self._files[file]

    def measure(self, compare: OfRows) -> Measured | None:
        """What the rows say; None where they hold nothing of it.

        Raises:
            ValueError: the runs cannot be compared.
        """
        rows = self.rows(compare.rows)
        if isinstance(compare, Loss):
            return loss(compare, rows)
        if isinstance(compare, Buckets):
            return buckets(compare, rows)
        if isinstance(compare, Load):
            return load(compare, rows, self.rows(compare.other_rows))
        assert isinstance(compare, Ratio)
        return ratio(compare, rows)


def loss(compare: Loss, rows: list[dict[str, Any]]) -> Measured | None:
    """The other's loss minus the method's, over the seeds that both have.

    The interval is the hull of Student's over seeds and the bootstrap's over seeds and text, where
    the rows have one: only a difference that both see counts.
    """
    names = (compare.own, compare.other)
    at = [
        row
        for row in (row_of(values) for values in rows if values["mode"] == compare.protocol)
        if row.kind in ("perplexity", "run") and match_of(row) == compare.match
        if label(row.name, row.options) in names
        if compare.length * int(recipe(row)["context"]) == row.T
    ]
    held = [row for row in at if row.metric == "loss"]
    losses = losses_of(held)
    if len(losses) < 2:
        return None
    bounds = bounds_of(at, compare.own)
    if recipe(held[0]).get("baseline") != compare.other or bounds is None:
        text = None
    else:
        text = (-bounds[1], -bounds[0])
    gap = gap_of(losses[compare.other], losses[compare.own], text)
    if gap is None:
        return None
    low, high = gap.seeds.low, gap.seeds.high
    if text is not None:
        low, high = min(low, text[0]), max(high, text[1])
    where = f"{PROTOCOLS.get(compare.protocol, compare.protocol)} of {held[0].T}"
    return Measured(
        Interval(gap.seeds.mean, low, high),
        f"`{compare.own}` over `{compare.other}`, {where}",
        False,
        f"{gap.count} seed{'' if gap.count == 1 else 's'}",
        trained(held[0]),
        gap.needed,
    )


def trained(row: Row) -> str:
    """How the runs of a row were trained."""
    own = recipe(row)
    sizes = [int(own[key]) for key in ("steps", "batch_size", "grad_accum", "context")]
    rate = own["lr"]
    rates = f"learning rate {rate} for all"
    if "tuned" in own:
        rates = f"each method at the best of the learning rates {own['tuned'].replace(',', ', ')}"
    return (
        f"{math.prod(sizes) / 1e6:.1f} M tokens of {own['data']} ({own['fingerprint'][:8]}) a run, "
        f"{own['layers']} layers, {own['heads']} heads, width {own['embed_dim']}, context "
        f"{own['context']}, {rates}, scored on {int(own['targets']):,} targets"
    )


def buckets(compare: Buckets, rows: list[dict[str, Any]]) -> Measured | None:
    """The other's loss minus the method's at positions beyond the training length: over texts, or
    over the parts of a single one.

    Raises:
        ValueError: the rows are of several models or lengths.
    """
    found: dict[str, dict[tuple[int, int], float]] = {compare.own: {}, compare.other: {}}
    about = ""
    own_rows = [row for row in rows if row["name"] in found and row["implementation"] == "posenc"]
    if len(kinds := {f"{row['options']} S={row['S']}" for row in own_rows}) > 1:
        raise ValueError(
            f"rows of {compare.own} and {compare.other} are of {' and '.join(sorted(kinds))}: keep "
            "one model and length in a file."
        )
    for row in own_rows:
        original = int(re.findall(r"original=(\d+)", row["options"])[0])
        if row["T"] > compare.beyond * original:
            found[row["name"]][row["seed"], row["T"]] = row["p50"]
            about = f"{row['options']}, texts of {row['S']}"
    own, other = found[compare.own], found[compare.other]
    gaps: dict[int, list[float]] = {}
    for key in sorted(own.keys() & other.keys()):
        gaps.setdefault(key[0], []).append(other[key] - own[key])
    if not gaps:
        return None
    single = len(gaps) == 1
    parts = next(iter(gaps.values())) if single else [fmean(each) for each in gaps.values()]
    return Measured(
        student(parts),
        f"`{compare.own}` over `{compare.other}`, beyond the training length",
        False,
        f"{len(parts)} parts of one text" if single else f"{len(parts)} texts",
        about,
    )


def load(
    compare: Load, rows: list[dict[str, Any]], other_rows: list[dict[str, Any]]
) -> Measured | None:
    """The least load under the first weight minus that under the other, over the seeds of both.

    Raises:
        ValueError: the two were not trained alike.
    """
    own, other = (
        {row.seed: row for row in map(row_of, held) if _weighs(row, compare, weight)}
        for held, weight in ((rows, compare.own), (other_rows, compare.other))
    )
    seeds = sorted(own.keys() & other.keys(), key=str)
    if not seeds:
        return None
    for seed in seeds:
        if different := sorted(_apart_from_weight(own[seed]) ^ _apart_from_weight(other[seed])):
            raise ValueError(
                f"the runs of {compare.rows} and {compare.other_rows} differ in {different}: "
                "compare runs of one recipe."
            )
    gap = student([own[seed].p50 - other[seed].p50 for seed in seeds])
    means = (fmean(side[seed].p50 for seed in seeds) for side in (own, other))
    return Measured(
        gap,
        f"{compare.what} ({' and '.join(f'{mean:.2f}' for mean in means)})",
        False,
        f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}",
        trained(own[seeds[0]]),
        unit="of balance",
    )


def _weighs(row: Row, compare: Load, weight: float) -> bool:
    """Whether a row is the least load of the method under a weight of the balance loss."""
    if row.metric != "least load" or label(row.name, row.options) != compare.of:
        return False
    own = float(recipe(row).get("aux_weight", AUX_WEIGHT))
    return own == weight and match_of(row) == compare.match


def _apart_from_weight(row: Row) -> set[str]:
    """How a run was trained, but for the weight; each has a baseline among its own runs."""
    own = common_recipe(row).items()
    return {f"{key}={value}" for key, value in own if key not in ("aux_weight", "baseline")}


def ratio(compare: Ratio, rows: list[dict[str, Any]]) -> Measured | None:
    """By how many times the method is better; from the 20th to the 80th percentiles of repetitions,
    the worse of one against the better of the other.
    """
    found = [last(rows, {**compare.both, **side}) for side in (compare.own, compare.other)]
    if found[0] is None or found[1] is None:
        return None
    own, other = found[0], found[1]
    middle, low, high = (
        math.log(own[p] / other[q]) for p, q in (("p50", "p50"), ("p20", "p80"), ("p80", "p20"))
    )
    if compare.better == "lower":
        middle, low, high = -middle, -high, -low
    at = [
        f"{key}={value}" if key in ("S", "T") else str(value)
        for key, value in compare.both.items()
        if key in ("name", "mode", "S", "T", "options")
    ]
    exact = own["p20"] == own["p80"] and other["p20"] == other["p80"]
    return Measured(
        Interval(middle, low, high),
        f"`{named(compare.own)}` over `{named(compare.other)}`, {own['metric']}"
        + (f" ({', '.join(at)})" if at else ""),
        True,
        "one reading" if exact else "percentiles 20 to 80 of repetitions",
        f"{own['kind']} on {own['device']}, {own['dtype']}",
    )


def named(side: str | float | Mapping[str, Any]) -> str:
    """A side of a comparison: a label, a weight, or the values of its columns."""
    if isinstance(side, str | float):
        return str(side)
    return ", ".join(str(v) for v in side.values() if v != "")


def last(rows: list[dict[str, Any]], wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last row whose columns have these values."""
    held = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return held[-1] if held else None
