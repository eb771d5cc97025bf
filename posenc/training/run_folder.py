"""The folder of a run: its files, written whole or not at all."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posenc.files import atomic_file
from posenc.training.config import TrainConfig

CONFIG, ENVIRONMENT, SUMMARY = "config.json", "environment.json", "summary.json"
METRICS, TOKENIZER, PLOT, SAMPLE = "metrics.jsonl", "tokenizer.json", "loss.png", "sample.txt"
CHECKPOINTS, MODEL = "checkpoints", "model"


class RunFolder:
    """Paths and plain files of one run.

    Args:
        path: the folder; it is made by `create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / METRICS
        self.tokenizer = path / TOKENIZER
        self.plot = path / PLOT
        self.sample = path / SAMPLE
        self.checkpoints = path / CHECKPOINTS
        self.model = path / MODEL

    def check_new(self) -> None:
        """See that a new run can be written here, without writing.

        Raises:
            ValueError: there is a run already.
            OSError: the place is no folder, or not writable.
        """
        if (self.path / CONFIG).exists():
            raise ValueError(
                f"{self.path} already holds a run. "
                f"Continue it with --resume {self.path}, or choose another --out."
            )
        above = self.path
        while not above.exists():
            above = above.parent
        if not above.is_dir():
            raise NotADirectoryError(
                f"{above} is not a folder; the run folder {self.path} cannot be made there."
            )
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(
                f"{above} is not writable; the run folder {self.path} cannot be made there."
            )

    @contextmanager
    def creating(self) -> Iterator[None]:
        """Make the folders and fill them; what fails leaves no new folder behind."""
        new = not self.path.exists()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            yield
        except BaseException:
            if new:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def write_text(self, path: Path, text: str) -> None:
        """Replace a file, whole or not at all."""
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        text = json.dumps(values, indent=2, allow_nan=False) + "\n"
        self.write_text(self.path / name, text)

    def read_config(self) -> dict[str, Any]:
        """The stored configuration.

        Raises:
            ValueError: there is no run, or its config.json is damaged.
        """
        try:
            values = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        except OSError:
            raise ValueError(
                f"{self.path} holds no run to resume: no {CONFIG}. Check the folder."
            ) from None
        except ValueError as error:
            raise ValueError(f"{self.path / CONFIG} is not valid JSON: {error}.") from None
        if not isinstance(values, dict):
            raise ValueError(
                f"{self.path / CONFIG} must hold a JSON object; got {type(values).__name__}."
            )
        return values

    def write_config(self, config: TrainConfig) -> None:
        """Store what a resumed run starts from: all fields but `resume` itself."""
        self.write_json(CONFIG, {**dataclasses.asdict(config), "resume": None})

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(lines)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows so far; a last line that a crash cut off is left out."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run writes again."""
        kept = [row for row in self.read_metrics() if row["step"] <= step]
        self.write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
