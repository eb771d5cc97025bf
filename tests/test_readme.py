"""The README is right: its code runs, its table is the zoo, its commands are the ones CI runs."""

import re
import subprocess
from pathlib import Path

import pytest

import posenc
from pages import README as PAGE
from pages import ROOT, Block, blocks

README = PAGE.read_text(encoding="utf-8")
METHODS = README[README.index("\n## The methods\n") : README.index("\n## Which one?\n")]
ROWS = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", METHODS, re.MULTILINE))
BLOCKS = blocks(PAGE, "python")
#: A screen and a half, and the table.
LINES = 100


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_python_blocks_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if not block.can_run:
        pytest.skip(f"{block.needs} is not installed")
    exec(compile(block.text, "README.md", "exec"), {})


def test_it_is_short() -> None:
    assert len(README.splitlines()) - len(ROWS) < LINES


def test_table_lists_the_zoo() -> None:
    assert tuple(ROWS) == posenc.names()


@pytest.mark.parametrize("name", posenc.names())
def test_table_gives_paper_and_state(name: str) -> None:
    from posenc.zoo import ZOO

    assert ZOO[name].paper in ROWS[name]
    streams = posenc.attention(name, 768, 12).streams().keys() - {"k", "v"}
    state, _ = ROWS[name].split("|")[-2:]
    assert set(re.findall(r"\w+", state)) == streams


def test_table_says_which_have_no_kernel() -> None:
    """Those that tests/kernels finds refused."""
    assert {name for name in ROWS if ROWS[name].endswith("| - ")} == {"cope", "fire", "path"}


def test_ci_runs_the_test_command_as_written() -> None:
    shown = re.search(r"<!-- test command -->\n```sh\n(.*)\n```", README)
    assert shown is not None
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extract = re.search(r"^command=\$\((.*)\)$", script, re.MULTILINE)
    assert extract is not None
    found = subprocess.run(
        ["bash", "-c", extract[1]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == shown[1]
