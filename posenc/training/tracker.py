"""Metrics to TensorBoard, Weights & Biases or trackio: one small class each."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from posenc.training.errors import Refused


class Tracker:
    """Receives the numbers of every row of metrics.jsonl; this one forgets them."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Take one row: `step` and numbers (None is left out)."""

    def close(self) -> None:
        """Send what is left."""


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker plots of a row."""
    return {
        key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)
    }


class TensorBoard(Tracker):
    """Event files under the run folder. A resumed run replaces the steps after its first one."""

    def __init__(self, folder: Path, start: int) -> None:
        writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=start + 1)

    def log(self, row: Mapping[str, Any]) -> None:
        for key, value in numbers(row).items():
            self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class Service(Tracker):
    """Weights & Biases, or trackio, which copies its interface."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._service = _module(name, name)
        # trackio finds a run to resume by its name, wandb by its id.
        own = {"id": folder.name, "dir": str(folder)} if name == "wandb" else {}
        self._service.init(
            project="posenc", name=folder.name, config=dict(config), resume="allow", **own
        )

    def log(self, row: Mapping[str, Any]) -> None:
        self._service.log(numbers(row), step=row["step"])

    def close(self) -> None:
        self._service.finish()


def check_tracker(name: str) -> None:
    """See that a tracker's package is installed, before anything is written.

    Raises:
        Refused: it is not.
    """
    if name == "tensorboard":
        _module("torch.utils.tensorboard", name)
    elif name != "none":
        _module(name, name)


def make_tracker(name: str, folder: Path, config: Mapping[str, Any], start: int) -> Tracker:
    """The tracker that `--tracker` names.

    Args:
        start: the step that a resumed run continues after.
    """
    if name == "none":
        return Tracker()
    if name == "tensorboard":
        return TensorBoard(folder, start)
    return Service(name, folder, config)


def _module(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise Refused(
            f"--tracker {package} needs the package {package}, which is not installed. "
            "Install it: pip install posenc[log]"
        ) from None
