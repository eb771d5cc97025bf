"""Rows of measurements: one flat JSON object a line, with where and on what they were measured.

A row is made by a benchmark only, never by hand. `read` refuses a file with a line that is none.
"""

import dataclasses
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import torch

from posenc.machine import device_name

from .clone import ROOT


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured quantity. p20, p50 and p80 are over repetitions, or one reading three times."""

    kind: str  # the benchmark: kernel, layer, routing, memory, run ..
    name: str  # what is computed: a name of the zoo, an op, a ceiling
    implementation: str  # by what
    mode: str  # fwd, bwd, fwd+bwd, decode, evaluate ..
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    dtype: str
    options: str = ""  # of what is computed, KEY=VALUE ..
    recipe: str = ""  # of a training run, KEY=VALUE ..
    B: int | None = None  # batch
    H: int | None = None  # heads
    T: int | None = None  # queries, or the context of an evaluation
    S: int | None = None  # keys, where they are not T
    D: int | None = None  # of a head
    seed: int | None = None
    error_vs_fp64: float | None = None  # of the output, relative to its root mean square


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The columns that all rows of a run share."""

    device: str
    threads: int | None  # of the processor, None where it does not compute
    driver: str | None
    torch: str
    triton: str | None
    cuda: str | None
    python: str
    commit: str | None
    dirty: bool
    time: str  # ISO 8601, UTC


def single(mode: str, metric: str, unit: str, value: float, **about: Any) -> Row:
    """A row of one value."""
    return Row(mode=mode, metric=metric, unit=unit, p20=value, p50=value, p80=value, **about)


def written(values: Mapping[str, Any]) -> str:
    """Options or a recipe as a row holds them: KEY=VALUE KEY=VALUE .."""
    return " ".join(f"{key}={value}" for key, value in values.items())


COLUMNS = {field.name: field.type for kind in (Row, Environment) for field in
           dataclasses.fields(kind)}  # fmt: skip


def _git(*command: str) -> str:
    if not (ROOT / ".git").exists():  # installed, any repository around it is another's
        return ""
    found = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def environment(device: torch.device) -> Environment:
    """Where this process measures."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    driver, on_cuda = None, device.type == "cuda"
    if on_cuda:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return Environment(
        device=device_name(device),
        threads=None if on_cuda else torch.get_num_threads(),
        driver=driver,
        torch=torch.__version__,
        triton=triton_version,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        commit=_git("rev-parse", "HEAD") or None,
        dirty=bool(_git("status", "--porcelain", "--untracked-files=no")),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


class RowFile:
    """Appends rows to a file as they are measured, so that a run that breaks off keeps its rows.

    Raises:
        OSError: for a file that cannot be written.
        ValueError: for one that holds anything but rows.
    """

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self.path, self.shared = path, asdict(environment(device))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # What cannot be written fails now, not once it is measured.
            path.open("a").close()
            read(path)

    def add(self, row: Row, **measured_on: Any) -> dict[str, Any]:
        """Write one row; returns it as it lies in the file.

        Args:
            measured_on: columns of `Environment` in place of this process's, for what another one
                measured.
        """
        values = {**asdict(row), **self.shared, **measured_on}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        return values


def collect(measured: Iterable[Row | str], file: RowFile, rows: list[Row]) -> bool:
    """Write rows as they come, and add them to `rows`; print the lines that say why there is none.
    Whether there was such a line.
    """
    refused = False
    for row in measured:
        if isinstance(row, str):
            print(row, flush=True)
            refused = True
        else:
            file.add(row)
            rows.append(row)
    return refused


def row_of(values: dict[str, Any]) -> Row:
    """The columns of a read row that a benchmark fills."""
    return Row(**{field.name: values[field.name] for field in dataclasses.fields(Row)})


def read(*paths: Path) -> list[dict[str, Any]]:
    """The rows of files, in order.

    Raises:
        ValueError: for a line that is no row, naming file and line.
    """
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                rows.append(checked(json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{path}:{number} is no row of measurements: {error}") from error
    return rows


def rows_of_kind(path: Path, *kinds: str) -> list[Row]:
    """The rows of a file. Raises ValueError for one that is none, or of another kind."""
    rows = [row_of(values) for values in read(path)]
    for number, row in enumerate(rows, start=1):
        if row.kind not in kinds:
            raise ValueError(
                f"{path}:{number} is a row of kind {row.kind!r}; expected {' or '.join(kinds)}. "
                "Choose another file."
            )
    return rows


def checked(values: Any) -> dict[str, Any]:
    """The row itself; ValueError for missing or unknown columns and values of another type."""
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object.")
    if values.keys() != COLUMNS.keys():
        missing, unknown = COLUMNS.keys() - values.keys(), values.keys() - COLUMNS.keys()
        raise ValueError(f"missing {sorted(missing)}, unknown {sorted(unknown)}.")
    for name, kind in COLUMNS.items():
        allowed: Sequence[Any] = get_args(kind) or (kind,)
        value = values[name]
        fits = isinstance(value, tuple(allowed)) or (float in allowed and type(value) is int)
        if not fits or (isinstance(value, bool) and bool not in allowed):
            raise ValueError(f"{name} is {value!r}; expected {kind}.")
    if not values["p20"] <= values["p50"] <= values["p80"] < math.inf:
        raise ValueError("p20, p50 and p80 do not rise.")
    return values
