"""Finished training runs compared over seeds: `python -m bench.runs RUN [RUN ...]`.

    python -m bench.runs runs/* --baseline rope --out bench/results/cpu/moh_runs.jsonl

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


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each context at which a finished run was evaluated.

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
    options = " ".join(f"{key}={value}" for key, value in config["attention_options"].items())
    sizes = ("layers", "heads", "embed_dim", "context", "batch_size", "steps", "seed", "data_seed")
    for evaluation in summary["evaluations"]:
        yield {
            "kind": "run",
            "name": config["attention"],
            "options": options,
            "metric": "loss",
            "unit": "nats",
            "value": evaluation["val_loss"],
            "at": evaluation["context"],
            "targets": evaluation["targets"],
            "bits_per_byte": evaluation["bits_per_byte"],
            "parameters": summary["parameters"],
            "tokens": summary["tokens"],
            **{key: config[key] for key in sizes},
            "data": Path(config["data"]).name,
            "fingerprint": about["corpus"]["fingerprint"],
            "device": about["device"],
            "dtype": about["dtype"],
            **about["versions"],
        }


Losses = dict[str, dict[int, float]]  # by method and seed


def losses_at(rows: Sequence[dict[str, Any]], context: int) -> Losses:
    """The losses at one context. Raises ValueError for runs that cannot be compared."""
    found: Losses = {}
    same = ("fingerprint", "context", "tokens", "targets", "data_seed")
    wanted = [row for row in rows if row["at"] == context]
    for key in same:
        if len({row[key] for row in wanted}) > 1:
            raise ValueError(f"the runs differ in {key}: compare runs of one recipe.")
    for row in wanted:
        seeds = found.setdefault(f"{row['name']} {row['options']}".strip(), {})
        if row["seed"] in seeds:
            raise ValueError(f"{row['name']} {row['options']} has seed {row['seed']} twice.")
        seeds[row["seed"]] = row["value"]
    return found


def table(rows: Sequence[dict[str, Any]], baseline: str) -> Iterator[str]:
    """The printed lines."""
    for context in sorted({row["at"] for row in rows}):
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
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of train.py")
    parser.add_argument("--baseline", default="rope", help="a method, with its options if any")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    try:
        rows = [row for folder in args.runs for row in rows_of(folder)]
        lines = list(table(rows, args.baseline))
    except ValueError as error:
        sys.exit(str(error))
    print(*lines, sep="\n")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
