"""Several processes (pytest -n) end together: the longest tests start first, and a process that has
none left takes some of another's.

What was measured on this machine (`posenc tune`) is left out: tests name a folder of
their own where they want some.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["POSENC_CACHE"] = str(Path(__file__).parent / "nothing-measured")


@pytest.fixture
def tuned_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the file of `posenc tune` would lie; nothing has been read."""
    from posenc import tuned

    monkeypatch.setenv("POSENC_CACHE", str(tmp_path))
    tuned.forget()
    yield tuned.path()
    tuned.forget()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_interpreter.py")
