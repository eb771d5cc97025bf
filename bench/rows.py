"""Rows of measurements: one flat JSON object a line, with where and on what they were measured.

A row is made by a benchmark only, never by hand.
"""

import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from posenc.training.environment import device_name


@dataclass(frozen=True)
class Row:
    """One measured quantity. p20, p50 and p80 are over repetitions."""

    kernel: str  # what is computed
    provider: str  # by which implementation
    mode: str  # fwd, bwd or fwd+bwd
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    B: int
    H: int
    T: int
    D: int
    dtype: str
    error_vs_fp64: float | None  # of the output, relative to its root mean square
    S: int | None = None  # keys, where they are not T
    options: str = ""  # of what is computed, as KEY=VALUE


def _git(*command: str) -> str:
    root = Path(__file__).parent.parent
    found = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True)
    return found.stdout.strip()


def environment(device: torch.device) -> dict[str, Any]:
    """The columns that all rows of a run share."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    driver = None
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD") or None,
        "dirty": bool(_git("status", "--porcelain")),
    }


class RowFile:
    """Appends rows to a file as they are measured, so that a run that breaks off keeps its rows."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self.path, self.shared = path, environment(device)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> dict[str, Any]:
        """Write one row; returns it as it lies in the file."""
        values = {**asdict(row), **self.shared}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        return values
