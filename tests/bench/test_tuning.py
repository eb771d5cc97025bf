"""bench.tuning: the same trials for every method, decided by other text; kept and reused."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench import perplexity
from bench.grid import Cell, method
from bench.losses import Question, choose_text
from bench.rows import read
from bench.tuning import Trial, Tuning, loss_of
from grids import command, plan
from training_runs import ROOT, flags, write_text


def without_rate(words: list[str]) -> list[str]:
    """Flags without --lr and --min-lr."""
    places = {words.index(flag) for flag in ("--lr", "--min-lr")}
    return [w for i, w in enumerate(words) if i not in places and i - 1 not in places]


def trial(rate: float, loss: float | None) -> Trial:
    return Trial(None, rate, loss)  # type: ignore[arg-type]


def test_the_lowest_loss_decides_and_failures_are_out() -> None:
    rope, mha, nope = map(method, ("rope", "mha", "nope"))
    tuning = Tuning(None, {  # type: ignore[arg-type]
        rope: [trial(0.1, 3.0), trial(0.2, 2.5), trial(0.4, 2.75)],
        mha: [trial(0.1, 3.0), trial(0.2, None), trial(0.4, None)],
        nope: [trial(0.1, None), trial(0.2, None), trial(0.4, None)],
    })  # fmt: skip
    assert tuning.rates == {rope: 0.2, mha: 0.1}
    assert tuning.tried == [0.1, 0.2, 0.4]


def test_a_method_without_a_rate_is_left_out_and_a_baseline_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = plan(tmp_path, "rope", "mha", words=without_rate(flags(tmp_path)))
    rope, mha = asked.methods
    one = {rope: [trial(0.5, 1.0)], mha: [trial(0.5, None)]}
    tuned = perplexity.with_rates(asked, Tuning(None, one))  # type: ignore[arg-type]
    assert tuned.methods == [rope]
    assert "mha failed at every learning rate: left out" in capsys.readouterr().err
    cells = tuned.cells("tokens", 300)
    assert [c.folder.path.name for c in cells] == ["rope-lr0.5-s0", "rope-lr0.5-s1"]
    assert [(c.config.lr, c.config.min_lr) for c in cells] == [(0.5, 0.05)] * 2
    none = {rope: [trial(0.5, None)], mha: [trial(0.5, 1.0)]}
    with pytest.raises(ValueError, match="baseline rope failed at every rate"):
        perplexity.with_rates(asked, Tuning(None, none))  # type: ignore[arg-type]


def tuned_command(folder: Path, *rates: str) -> list[str]:
    words = command(folder, steps=40)
    cut = words.index("--")
    own, given = words[:cut], without_rate(words[cut:])
    own[own.index("--seeds") + 1] = "2"
    return [*own, "--tune", *rates, "--tune-data", str(folder / "other.txt"), *given]


@pytest.mark.slow
def test_a_tuned_grid(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = tuned_command(tmp_path, "0.0001", "0.01", "1e9")
    write_text(tmp_path / "other.txt", 3000)
    assert perplexity.main(words) == 0  # what diverges in a trial is out, the rest goes on
    said = capfd.readouterr()
    assert "learning rates: rope 0.01, mha 0.01" in said.out
    assert "rope-lr1e+09-s0 failed: error: the" in said.err
    folder = tmp_path / "grid" / "tokens"
    trained = sorted(path.name for path in folder.iterdir() if (path / "summary.json").exists())
    assert trained == [f"{name}-lr{tail}" for name in ("mha", "rope")
                       for tail in ("0.0001-s0", "0.01-s0", "0.01-s1")]  # fmt: skip
    rows = read(tmp_path / "rows.jsonl")
    assert {word for row in rows for word in row["recipe"].split() if "tuned" in word} == {
        "tuned=0.0001,0.01,1e+09"
    }
    trials = [row for row in rows if row["mode"] == "tune"]
    assert len(trials) == 4
    for name in ("rope", "mha"):
        worse, better = (row["p50"] for row in trials if row["name"] == name)
        assert better < worse
        stored = json.loads((folder / f"{name}-lr0.01-s0" / "tuning.json").read_text())
        assert better == pytest.approx(
            sum(stored["losses"]["windows"]["16"]) / len(stored["losses"]["windows"]["16"])
        )
    reported = [row for row in rows if row["mode"] == "windows" and row["metric"] == "loss"]
    assert {(row["name"], row["seed"]) for row in reported} == {
        (name, seed) for name in ("rope", "mha") for seed in (0, 1)
    }

    # Again: nothing is trained anew, the answers are the same.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("losses.json")}
    assert perplexity.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("losses.json")} == before
    assert read(tmp_path / "rows.jsonl")[0]["p50"] == rows[0]["p50"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tune", "0.1"], "--tune needs --tune-data"),
        (["--tune-data", "x"], "--tune needs --tune-data"),
        (["--tune", "0.1", "0.1", "--tune-data", "x"], "different rates above 0"),
        (["--tune", "-1", "--tune-data", "x"], "different rates above 0"),
        (["--tune", "nan", "--tune-data", "x"], "different rates above 0"),
        (["--tune", "1", "--tune-data", "x", "--finished", "r"], "--tune trains"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert perplexity.main(words) == 1
    assert message in capsys.readouterr().err


def test_the_deciding_text_is_not_the_reported_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = tuned_command(tmp_path, "0.01")
    write_text(tmp_path / "val.txt", 3000)
    words[words.index("--tune-data") + 1] = str(tmp_path / "val.txt")
    words += ["--val-data", str(tmp_path / "val.txt")]
    assert perplexity.main(words) == 1
    assert "is the text that is reported" in capfd.readouterr().err
    assert not list((tmp_path / "grid").glob("tokens/*"))


def test_rates_after_the_dashes_are_the_grid_s_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*tuned_command(tmp_path, "0.01"), "--lr", "0.5"]
    write_text(tmp_path / "other.txt", 3000)
    assert perplexity.main(words) == 1
    assert "--lr after -- is what the grid varies" in capfd.readouterr().err


def test_a_cell_without_an_answer_has_no_loss(tmp_path: Path) -> None:
    text = choose_text(np.arange(300), None, size=64, wanted=2, lead=4)
    cell: Cell = plan(tmp_path, "rope").cells("tokens", 300)[0]
    assert loss_of(cell, Question(text, 8, [8], "tuning")) is None
