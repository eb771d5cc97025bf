"""bench.runs: intervals over seeds, pairing, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench import runs
from bench.rows import read

CPU = Path(__file__).parent.parent / "bench" / "results" / "cpu"


def run_folder(folder: Path, name: str, seed: int, loss: float, **changes: Any) -> Path:
    """A run folder as train.py leaves it, as far as it is read."""
    config = dict.fromkeys(runs.RECIPE, 8) | {"seed": seed}
    config |= {"attention": name, "attention_options": {}, "impl": "auto"}
    config |= {"data": "some/where/text.txt"} | changes
    evaluation = {"context": 8, "val_loss": loss, "targets": 100, "bits_per_byte": 1.0}
    summary = {"evaluations": [evaluation], "parameters": 7, "tokens": 512}
    about = {
        "corpus": {"fingerprint": "f"}, "device": "d", "threads": 3, "dtype": "float32",
        "versions": {"torch": "2", "python": "3"},
    }  # fmt: skip
    folder.mkdir(parents=True)
    for file, values in (("config", config), ("summary", summary), ("environment", about)):
        (folder / f"{file}.json").write_text(json.dumps(values))
    return folder


def test_interval_is_students() -> None:
    # t(2, 0.975) = 4.302653; s = 1
    found = runs.interval([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6)
    assert runs.interval([5.0]) == (5.0, -math.inf, math.inf)


def test_differences_are_paired_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {"rope": (3.0, 3.5, 4.0), "moh": (2.9, 3.4, 3.9)}
    folders = [
        run_folder(tmp_path / f"{name}{seed}", name, seed, loss)
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    out = tmp_path / "rows" / "runs.jsonl"
    monkeypatch.setattr("sys.argv", ["runs", *map(str, folders), "--out", str(out)])
    runs.main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[:2] == ["moh", "3"]
    assert last.endswith("-0.1000 (-0.1000 .. -0.1000)")
    monkeypatch.setattr("sys.argv", ["runs", str(out)])
    runs.main()
    assert capsys.readouterr().out.splitlines()[-1] == last
    rows = read(out)
    assert [row["p50"] for row in rows] == [*losses["rope"], *losses["moh"]]
    assert [row["seed"] for row in rows] == [0, 1, 2] * 2
    where = ("device", "threads", "torch", "python", "triton")
    assert {tuple(row[key] for key in where) for row in rows} == {("d", 3, "2", "3", None)}
    assert all("data=text.txt" in row["recipe"] for row in rows)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"name": "rope", "seed": 0}, "two runs of rope with seed 0"),
        ({"name": "moh", "seed": 1, "data_seed": 9}, r"differ in \['data_seed=8', 'data_seed=9'\]"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    second: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folders = [
        run_folder(tmp_path / "a", "rope", 0, 3.0),
        run_folder(tmp_path / "b", loss=3, **second),
    ]
    rows = [row for folder in folders for row in runs.finished(folder).rows]
    with pytest.raises(ValueError, match=message):
        list(runs.table(rows, "rope"))


def test_what_is_not_a_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["runs", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="nothing is not a finished run"):
        runs.main()
    monkeypatch.setattr("sys.argv", ["runs", str(CPU / "memory.jsonl"), "--baseline", "mha layer"])
    with pytest.raises(SystemExit, match="a row of kind 'memory' is no training run's"):
        runs.main()
    one = run_folder(tmp_path / "a", "moh", 0, 3.0)
    monkeypatch.setattr("sys.argv", ["runs", str(one)])
    with pytest.raises(SystemExit, match=r"no run of the baseline 'rope'; there are \['moh'\]"):
        runs.main()
