"""Tiny grids of bench.perplexity."""

from pathlib import Path
from typing import Any

from bench.grid import Plan, method
from training_runs import flags, write_text

SEEDS = [(0, 5), (1, 6)]


def plan(folder: Path, *names: str, words: list[str] | None = None, **changes: Any) -> Plan:
    own = ("attention", "out", "seed", "data_seed")
    given = flags(folder, **changes) if words is None else words
    kept = []
    for i in range(0, len(given), 2):
        if given[i][2:] not in own:
            kept += given[i : i + 2]
    return Plan(folder / "grid", [method(name) for name in names], method("rope"), kept, SEEDS)


SCORING = ["--contexts", "1", "2", "--block", "64", "--blocks", "10", "--resamples", "99"]


def command(folder: Path, **changes: Any) -> list[str]:
    """The grid of a tiny text that takes some seconds."""
    if not (folder / "text.txt").exists():
        write_text(folder / "text.txt", 9000)
    words = list(plan(folder, "rope", **{"save_every": 100, "steps": 400} | changes).flags)
    own = ["--attention", "rope", "mha", "--seeds", "1", "--jobs", "2", *SCORING]
    own += ["--runs", str(folder / "grid"), "--out", str(folder / "rows.jsonl")]
    return [*own, "--", *words]
