"""Runs the parity tests in Triton's interpreter, which needs processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import COMPILED_ONLY

FOLDER = Path(__file__).parent
#: The longest first, which take minutes.
PATHS = sorted(FOLDER.glob("test_*.py"), key=lambda path: -path.stat().st_size)
FILES = [path.name for path in PATHS if path.name not in COMPILED_ONLY]
#: A process takes seconds to start: short files share one.
ALONE, SHARED = 9, 5
GROUPS = [[name] for name in FILES[:ALONE]] + [FILES[ALONE + i :: SHARED] for i in range(SHARED)]


def test_every_file_is_in_one_group():
    assert sorted(name for group in GROUPS for name in group) == sorted(FILES)


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_interpreted(group):
    """One thread: the interpreter is numpy on small arrays, and pytest -n runs files together."""
    files = [str(FOLDER / name) for name in group]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
