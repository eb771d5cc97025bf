"""Several processes (pytest -n) end together: the longest tests start first, and a process that has
none left takes some of another's.

What was measured on this machine (`posenc tune`) is left out: tests name a folder of
their own where they want some.
"""

import os
from pathlib import Path
from typing import Any

import pytest

os.environ["POSENC_CACHE"] = str(Path(__file__).parent / "nothing-measured")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_interpreter.py")
