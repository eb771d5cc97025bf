"""bench.runs: intervals over seeds, pairing, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench import runs


def finished(folder: Path, name: str, seed: int, loss: float, **changes: Any) -> Path:
    """A run folder as train.py leaves it, as far as it is read."""
    sizes = ("layers", "heads", "embed_dim", "context", "batch_size", "steps", "data_seed")
    config = dict.fromkeys(sizes, 8) | {"attention": name, "attention_options": {}, "seed": seed}
    config |= {"data": "some/where/text.txt"} | changes
    evaluation = {"context": 8, "val_loss": loss, "targets": 100, "bits_per_byte": 1.0}
    summary = {"evaluations": [evaluation], "parameters": 7, "tokens": 512}
    about = {
        "corpus": {"fingerprint": "f"}, "device": "d", "dtype": "float32",
        "versions": {"torch": "2"},
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
        finished(tmp_path / f"{name}{seed}", name, seed, loss)
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    out = tmp_path / "rows" / "runs.jsonl"
    monkeypatch.setattr("sys.argv", ["runs", *map(str, folders), "--out", str(out)])
    runs.main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[:2] == ["moh", "3"]
    assert last.endswith("-0.1000 (-0.1000 .. -0.1000)")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["value"] for row in rows] == [*losses["rope"], *losses["moh"]]
    assert {row["data"] for row in rows} == {"text.txt"}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"name": "rope", "seed": 0}, "has seed 0 twice"),
        ({"name": "moh", "seed": 1, "data_seed": 9}, "the runs differ in data_seed"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    second: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folders = [finished(tmp_path / "a", "rope", 0, 3.0), finished(tmp_path / "b", loss=3, **second)]
    rows = [row for folder in folders for row in runs.rows_of(folder)]
    with pytest.raises(ValueError, match=message):
        list(runs.table(rows, "rope"))


def test_what_is_not_a_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["runs", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="nothing is not a finished run"):
        runs.main()
    one = finished(tmp_path / "a", "moh", 0, 3.0)
    monkeypatch.setattr("sys.argv", ["runs", str(one)])
    with pytest.raises(SystemExit, match=r"no run of the baseline 'rope'; there are \['moh'\]"):
        runs.main()
