"""What the tests of runs share."""

from pathlib import Path

import pytest

from training_runs import train, write_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a text, for the run that `training_runs.flags` describe."""
    write_text(tmp_path / "text.txt")
    return tmp_path


@pytest.fixture
def drawn() -> None:
    """The plots of runs in this process, which take as long as the runs: where tests name this."""


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(train, "loss_plot", lambda rows, path, title: None)
