"""The README is right: its code runs, its table is the zoo, its commands are the ones CI runs."""

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest

import posenc

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS = README[README.index("\n## The methods\n") : README.index("\n## Measure\n")]
ROWS = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", METHODS, re.MULTILINE))


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


BLOCKS = re.findall(r"(?:<!-- needs ([\w-]+) -->\n)?```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(("needed", "block"), BLOCKS, ids=range(len(BLOCKS)))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_python_blocks_run(
    needed: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if needed and not installed(needed):
        pytest.skip(f"{needed} is not installed")
    exec(compile(block, "README.md", "exec"), {})


def test_table_lists_the_zoo() -> None:
    assert tuple(ROWS) == posenc.names()


@pytest.mark.parametrize("name", posenc.names())
def test_table_gives_paper_and_parameters(name: str) -> None:
    from posenc.zoo import ZOO

    assert ZOO[name].paper in ROWS[name]
    plain = sum(p.numel() for p in posenc.attention("nope", 768, 12).parameters())
    layer = sum(p.numel() for p in posenc.attention(name, 768, 12).parameters())
    assert f" {layer - plain:,} " in ROWS[name]


def test_tables_are_made_of_the_committed_rows() -> None:
    from bench.report import MARKED, readme

    assert MARKED.search(README)
    assert readme(README) == README, "stale; python -m bench.report --readme"


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
