"""posenc bench: which benchmarks there are, and that they run as they do in a clone."""

import sys
from pathlib import Path

import pytest

from posenc.commands import bench

BENCH = Path(__file__).parents[2] / "bench"


def test_every_module_that_is_a_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    listed = capsys.readouterr().out
    assert (
        "\n  perplexity  Perplexity of attention methods, compared over seeds and text\n" in listed
    )
    known = bench.benchmarks()
    mains = {path.stem for path in BENCH.glob("*.py") if "def main(" in path.read_text("utf-8")}
    assert set(known) == mains
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
