"""Measure this machine, so that impl="auto" takes what is the fastest here.

    posenc tune            minutes; --quick: one length and head dim, fewer tiles
    posenc tune --show     what was measured, what is chosen, and why

Where Triton kernels run, their tiles come first: of each kernel up to eight neighbours of its
constant are compiled, those that neither spill nor ask for too much are compared with the
definition in fp64, and those that are right are timed beside the constant. These are some 350
compilations of 1 to 10 seconds on a GPU (with --quick 50), which all processors share, and some ten
more for each kernel that gets other tiles.

Then for each kind of attention, direction, dtype and size, every back end that can compute it, in
every setting that it has, is compared with the definition in fp64; those that are right are timed
side by side. One file holds the results, an entry a device (`posenc.tuned`): on the next start of
Python `auto` reads it. What an explicit impl takes is never affected, but for the tiles: those
count for every launch on the device, and change nothing but how sums are rounded. To have the
constants back, delete the file, or name another folder by POSENC_CACHE.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from posenc import tuned
from posenc.backends import fused, measured
from posenc.files import atomic_file
from posenc.tune.cases import Plan, plan
from posenc.tune.measure import measure


def devices(kind: str | None) -> list[torch.device]:
    """One of each model in this machine, the processor last.

    Raises:
        ValueError: for a kind that is not here.
    """
    found: dict[str, torch.device] = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        found.setdefault(tuned.name_of(device), device)
    every = [*found.values(), torch.device("cpu")]
    chosen = [device for device in every if kind in (None, device.type)]
    if not chosen:
        raise ValueError(f"--device {kind}: torch sees none. Leave --device out.")
    return chosen


def tune(device: torch.device, plan: Plan) -> dict[str, Any]:
    """Measure a device, with bars: its entry of the file. Back ends meet kernels that have the
    tiles which were found.
    """
    from tqdm import tqdm

    name, total = tuned.name_of(device), len(list(plan.cells())) * len(plan.lengths)
    tiles = []
    with torch.random.fork_rng([]):
        if fused.runs_on(device):
            from posenc.tune.tiles import Sweep

            sweep = Sweep(plan, device)
            bar = tqdm(sweep.rows(), total=len(sweep.uses), desc=f"{name}, tiles", unit="kernel")
            tiles = list(bar)
        bar = tqdm(measure(plan, device), total=total, desc=name, unit="case")
        rows = [row for row in bar if row is not None]
    return {
        "made_with": tuned.made_with(device),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "tiles": tiles,
        "rows": rows,
    }


def write(file: Path, device: torch.device, entry: dict[str, Any]) -> None:
    """Put a device's entry into the file, which keeps those of others.

    Raises:
        OSError: where it cannot be written.
    """
    try:
        found = tuned.entries(file)
    except (FileNotFoundError, ValueError):  # a damaged one has nothing to keep
        found = {}
    found[tuned.name_of(device)] = entry
    text = json.dumps({"format": tuned.FORMAT, "devices": found}, indent=1)
    with atomic_file(file) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def shown(file: Path) -> Iterator[str]:
    """The choices of every device, and why."""
    yield str(file)
    for name, entry in tuned.entries(file).items():
        versions = ", ".join(f"{key} {value}" for key, value in entry["made_with"].items() if value)
        yield f"\n{name}, {entry['time']}, {versions}"
        for row in entry["tiles"]:
            config = "as built in" if row["config"] is None else tuned.described(row["config"])
            yield f"  tiles of {row['kernel']}: {config}, {row['why']}"
            yield from refusals(row)
        for row in entry["rows"]:
            best = row["ways"][0]
            sizes = " ".join(f"{key}={value}" for key, value in row["sizes"].items())
            way = measured.Way(best["backend"], best["settings"])
            question = f"{row['op']}, {row['direction']}, {row['dtype']}, {sizes}"
            yield f"  {question}: {way}, {row['why']}"
            yield from refusals(row)


def refusals(row: dict[str, Any]) -> Iterator[str]:
    """What was not timed, or not taken, and why."""
    for other, reason in row["refused"].items():
        yield f"    refused {other}: {reason}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or show."""
    parser = argparse.ArgumentParser(
        prog=tuned.COMMAND, description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one length and head dim, fewer tiles")
    parser.add_argument("--show", action="store_true", help="print what was measured, and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="all if not given")
    args = parser.parse_args(arguments)
    file = tuned.path()
    try:
        if args.show:
            print("\n".join(shown(file)))
            return
        for device in devices(args.device):
            write(file, device, tune(device, plan(device, args.quick)))
        print(file)
    except FileNotFoundError:
        sys.exit(f"{file} is not there: nothing was measured yet. Run {tuned.COMMAND}.")
    except ImportError as error:
        sys.exit(f"posenc.tune shows a bar: {error}. pip install 'posenc[train]'")
    except (OSError, ValueError) as error:
        if not args.show:
            sys.exit(str(error))
        sys.exit(f"{file} cannot be read ({error}). Measure anew: {tuned.COMMAND}.")
    except (KeyError, TypeError, AttributeError) as error:
        if not args.show:
            raise
        sys.exit(f"{file} is damaged ({error!r}). Measure anew: {tuned.COMMAND}.")


if __name__ == "__main__":
    main()
