"""The folder of a run: its files, written whole or not at all."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from posenc.files import atomic_file
from posenc.training.config import TrainConfig
from posenc.training.lock import LOCK, hold

CONFIG, ENVIRONMENT, SUMMARY = "config.json", "environment.json", "summary.json"
METRICS, TOKENIZER, PLOT, SAMPLE = "metrics.jsonl", "tokenizer.json", "loss.png", "sample.txt"
CHECKPOINTS, MODEL = "checkpoints", "model"


class RunFolder:
    """Paths and plain files of one run.

    Args:
        path: the folder; `claimed` makes it.
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
        """See that there is no run here yet.

        Raises:
            ValueError: there is a run already.
        """
        if (self.path / CONFIG).exists():
            raise ValueError(
                f"{self.path} already holds a run. "
                f"Continue it with --resume {self.path}, or choose another --out."
            )

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

    def read_environment(self) -> dict[str, Any]:
        """What the last launch noted of itself; nothing where that is gone or damaged."""
        try:
            return dict(json.loads((self.path / ENVIRONMENT).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError):
            return {}


@contextmanager
def claimed(config: TrainConfig) -> Iterator[Path]:
    """The folder of a run, which nobody else trains in meanwhile.

    A new one is made, under a name that is free if `config` gives none, and removed again if no
    run came to be in it: config.json is the last file of its beginning.

    Raises:
        ValueError: a new run's folder holds a run, or another process is in it.
        OSError: it cannot be made.
    """
    if config.resume is not None:
        with hold(Path(config.resume)):
            yield Path(config.resume)
        return
    path = Path(config.out or f"runs/{config.attention}-{time.strftime('%Y%m%d-%H%M%S')}")
    check_place(path)
    if config.out is not None:
        RunFolder(path).check_new()
    with ExitStack() as stack:
        made = [folder for folder in path.parents if not folder.exists()]
        stack.callback(_remove_empty, made)
        path.parent.mkdir(parents=True, exist_ok=True)
        if config.out is None:
            path = _make_numbered(path)
            made.insert(0, path)
        elif not path.exists():
            path.mkdir(exist_ok=True)
            made.insert(0, path)
        stack.enter_context(hold(path))
        RunFolder(path).check_new()  # another run may have been here since
        if path in made:
            stack.callback(_empty_unused, path)
        yield path


def check_place(path: Path) -> None:
    """See that a run folder can be made or written to, without writing.

    Raises:
        OSError: the place is no folder, or not writable.
    """
    above = path
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise NotADirectoryError(
            f"{above} is not a folder; the run folder {path} cannot be made there."
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{above} is not writable; the run folder {path} cannot be made there."
        )


def _make_numbered(path: Path) -> Path:
    """Make a folder of this name, or with -2, -3, ... after it where others have it."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    for free in chain([path], numbered):
        with suppress(FileExistsError):
            free.mkdir()
            break
    return free


def _empty_unused(path: Path) -> None:
    """Delete all but the lock, which whoever holds it deletes."""
    if (path / CONFIG).exists():
        return
    for inner in path.iterdir():
        if inner.name != LOCK:
            shutil.rmtree(inner) if inner.is_dir() else inner.unlink()


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, up to one that is in use."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
