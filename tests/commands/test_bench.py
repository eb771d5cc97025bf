"""posenc bench: which benchmarks there are, and that they run as they do in a clone."""

import ast
import re
import sys
from pathlib import Path

import pytest

from posenc.commands import bench

BENCH = Path(__file__).parents[2] / "bench"


def test_every_module_that_is_a_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    listed = capsys.readouterr().out
    title = "Perplexity of attention methods, compared over seeds and text"
    assert re.search(rf"^  perplexity +{title}$", listed, re.MULTILINE)
    known = bench.benchmarks()
    mains = {path.stem for path in BENCH.glob("*.py") if "def main(" in path.read_text("utf-8")}
    assert set(known) == mains | {path.parent.name for path in BENCH.glob("*/__main__.py")}
    assert all(what and "`" not in what.partition(" ")[0] for what in known.values())


def test_a_benchmark_runs_with_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told of wrong words, and its exit code and message are passed on."""
    before = list(sys.argv)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert bench.main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path} holds no rows")
    assert bench.main(["report", "--help"]) == 0
    assert "--readme" in capsys.readouterr().out
    assert bench.main(["report", "--no-such"]) == 2
    assert sys.argv == before


def test_bench_is_in_the_package_under_one_name() -> None:
    """In a wheel its modules are `posenc.bench`'s: one that imported `bench` would not be found."""
    inside = Path(__file__).parents[2] / "posenc/bench"
    if (BENCH.parent / ".git").exists():  # an sdist holds copies
        assert inside.readlink() == Path("../bench")
    modules = sorted(BENCH.rglob("*.py"))
    assert [path.read_bytes() for path in modules] == [
        (inside / path.relative_to(BENCH)).read_bytes() for path in modules
    ]
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            absolute = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            level = node.level if isinstance(node, ast.ImportFrom) else 0
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in (absolute, *names):
                assert level or name.partition(".")[0] != "bench", f"{path.name}: from .x import y"
