"""Runs the parity tests in Triton's interpreter, which needs processes of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
NATIVE = {"test_interpreter.py", "test_compile_sm90.py"}
FILES = sorted(path.name for path in FOLDER.glob("test_*.py") if path.name not in NATIVE)


def interpret(name: str) -> subprocess.CompletedProcess[str]:
    """Run one file; a thread each, for the interpreter is numpy on small arrays."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / name)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """The files that were selected, as many at a time as there are processors."""
    names = [item.callspec.params["name"] for item in request.session.items if is_run(item)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(interpret, name) for name in names}


def is_run(item: pytest.Item) -> bool:
    return getattr(item, "function", None) is test_interpreted


@pytest.mark.parametrize("name", FILES)
def test_interpreted(name, runs):
    run = runs[name].result()
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
