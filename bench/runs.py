"""Finished training runs compared over seeds: `python -m bench.runs RUN [RUN ...]`.

    python -m bench.runs runs/* --baseline rope --out bench/results/cpu/moh_runs.jsonl
    python -m bench.runs bench/results/cpu/moh_runs.jsonl           the same table from its rows

Runs of one attention and one set of options are one method; its runs differ in their seeds. Printed
per method and context: the mean loss and perplexity = exp(mean loss) with a 95% interval of
Student's t over seeds, and the difference to the baseline, paired by seed, with its own. An
interval that holds 0 is a difference that so many seeds do not see.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

from bench.rows import Row, RowFile, read, row_of, written

#: What runs that are compared have in common, beside their data.
RECIPE = ("layers", "heads", "embed_dim", "context", "batch_size", "grad_accum", "steps", "lr",
          "warmup", "data_seed")  # fmt: skip


class Interval(NamedTuple):
    """A mean and its 95% interval; infinitely wide for a single value."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Mean +- t(n-1, 0.975) s / sqrt(n)."""
    from scipy.stats import t

    mean, n = fmean(values), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


class Finished(NamedTuple):
    """A run: a row of the loss for each context at which it was evaluated, and where it ran."""

    rows: list[Row]
    measured_on: dict[str, Any]  # columns of `bench.rows.Environment`


def finished(folder: Path) -> Finished:
    """Read a run folder.

    Raises:
        ValueError: for a folder that is no finished run.
    """
    try:
        config, summary, about = (
            json.loads((folder / f"{name}.json").read_text())
            for name in ("config", "summary", "environment")
        )
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is not a finished run: {error}") from error
    recipe = {key: config[key] for key in RECIPE}
    recipe |= {"dtype": about["dtype"], "data": Path(config["data"]).name}
    recipe |= {"fingerprint": about["corpus"]["fingerprint"]}
    rows = []
    for evaluation in summary["evaluations"]:
        loss = evaluation["val_loss"]
        row = Row(
            kind="run",
            name=config["attention"],
            implementation=config["impl"],
            mode="evaluate",
            metric="loss",
            unit="nats",
            p20=loss,
            p50=loss,
            p80=loss,
            dtype=about["dtype"],
            options=written(config["attention_options"]),
            recipe=written(recipe | {"targets": evaluation["targets"]}),
            H=config["heads"],
            T=evaluation["context"],
            D=config["embed_dim"] // config["heads"],
            seed=config["seed"],
        )
        rows.append(row)
    versions = {name: about["versions"].get(name) for name in ("torch", "triton", "python")}
    return Finished(rows, {name: about[name] for name in ("device", "threads")} | versions)


Losses = dict[str, dict[int, float]]  # by method and seed


def losses_at(rows: Sequence[Row], context: int) -> Losses:
    """The losses at one context. Raises ValueError for runs that cannot be compared."""
    found: Losses = {}
    wanted = [row for row in rows if context == row.T]
    recipes = {row.recipe for row in wanted}
    if len(recipes) > 1:
        one, other = (set(recipe.split()) for recipe in sorted(recipes)[:2])
        raise ValueError(f"the runs differ in {sorted(one ^ other)}: compare runs of one recipe.")
    for row in wanted:
        if row.kind != "run" or row.seed is None:
            raise ValueError(f"a row of kind {row.kind!r} is no training run's: {row.name}.")
        method = f"{row.name} {row.options}".strip()
        seeds = found.setdefault(method, {})
        if row.seed in seeds:
            raise ValueError(f"there are two runs of {method} with seed {row.seed}.")
        seeds[row.seed] = row.p50
    return found


def table(rows: Sequence[Row], baseline: str) -> Iterator[str]:
    """The printed lines."""
    for context in sorted({row.T for row in rows if row.T}):
        losses = losses_at(rows, context)
        if baseline not in losses:
            raise ValueError(f"no run of the baseline {baseline!r}; there are {sorted(losses)}.")
        yield f"context {context}, 95% intervals over seeds"
        yield f"  {'method':28} seeds  {'loss':24} {'perplexity':24} loss - {baseline}'s, paired"
        for method, by_seed in losses.items():
            loss = interval(list(by_seed.values()))
            shared = sorted(by_seed.keys() & losses[baseline].keys())
            gap = [by_seed[seed] - losses[baseline][seed] for seed in shared]
            difference = "" if method == baseline or not gap else shown(interval(gap), "+.4f")
            text = shown(Interval(*(math.exp(min(x, 700)) for x in loss)), ".2f")
            yield f"  {method:28} {len(by_seed):5}  {shown(loss, '.4f'):24} {text:24} {difference}"


def shown(found: Interval, form: str) -> str:
    """An interval as text; a mean alone where one value has none."""
    if found.low in (0, -math.inf):
        return f"{found.mean:{form}}"
    return f"{found.mean:{form}} ({found.low:{form}} .. {found.high:{form}})"


def main() -> None:
    """Print the table; write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", help="run folders of train.py, or files of rows"
    )
    parser.add_argument("--baseline", default="rope", help="a method, with its options if any")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    try:
        folders = [path for path in args.runs if path.suffix != ".jsonl"]
        runs = [finished(folder) for folder in folders]
        rows = [row for run in runs for row in run.rows]
        rows += [
            row_of(values) for path in args.runs if path not in folders for values in read(path)
        ]
        lines = list(table(rows, args.baseline))
    except ValueError as error:
        sys.exit(str(error))
    print(*lines, sep="\n")
    file = RowFile(args.out, torch.device("cpu"))
    for run in runs:
        for row in run.rows:
            file.add(row, **run.measured_on)


if __name__ == "__main__":
    main()
