"""bench.tasks: tiny models, trained and asked; a grid that is stopped, damaged, and goes on."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from bench import copying, figures, report, scores, tables, tasks
from bench.grid import method
from bench.pool import held
from bench.rows import Row, RowFile, read
from bench.tasks import RECIPES, Cell, examine, learn, rows_of
from posenc.tasks import MINI, Parity, Setting
from training_runs import ROOT

TINY = ["--mini", "--layers", "1", "--heads", "2", "--embed-dim", "16", "--batch-size", "4",
        "--steps", "12", "--examples", "6", "--device", "cpu", "--jobs", "2"]  # fmt: skip


def command(folder: Path, *more: str) -> list[str]:
    own = ["--runs", str(folder / "grid"), "--out", str(folder / "rows.jsonl")]
    return [*TINY, "--attention", "rope", "--tasks", "parity", "s3", "--seeds", "1", *own, *more]


def cell(
    folder: Path, name: str = "nope", task: str = "parity", seed: int = 0, **changes: object
) -> Cell:
    sizes = {"layers": 1, "heads": 2, "embed_dim": 16, "batch_size": 4, "steps": 3, "examples": 6}
    recipe = dataclasses.replace(RECIPES["mini"], **sizes | changes)  # type: ignore[arg-type]
    return Cell(folder, method(name), task, seed, recipe, "cpu")


# One model


def test_the_same_seed_learns_the_same_and_another_does_not(tmp_path: Path) -> None:
    found = [learn(cell(tmp_path, seed=seed)) for seed in (0, 0, 1)]
    assert found[0]["loss"] == found[1]["loss"] != found[2]["loss"]
    assert found[0]["scores"] == found[1]["scores"]


class Said(torch.nn.Module):
    """A model that says what a solver of parity does, right up to a length, and 1 beyond it."""

    max_length = None

    def __init__(self, upto: int) -> None:
        super().__init__()
        self.upto = upto

    def forward(self, ids: torch.Tensor) -> object:
        logits = torch.zeros(*ids.shape, 4)
        odd = (ids == 1).sum(1) % 2
        right = odd if ids.shape[1] - 2 <= self.upto else torch.ones_like(odd)
        logits[:, -1].scatter_(1, right[:, None], 1.0)
        return type("Output", (), {"logits": logits})


def test_scores_are_those_of_what_a_model_says() -> None:
    asked = Setting(Parity(), range(3, 9), (8, 16, 20), {"": Parity(), "again": Parity()})
    recipe = dataclasses.replace(RECIPES["mini"], examples=400)
    found = list(examine(Said(8), asked, recipe, torch.device("cpu"), torch.float32))  # type: ignore[arg-type]
    assert [(score["test"], score["length"]) for score in found] == [
        (name, length) for name in ("", "again") for length in (8, 16, 20)
    ]
    assert found[0]["exact match"] == found[0]["accuracy"] == 1
    assert all(0.4 < score["exact match"] < 0.6 for score in found[1:3])
    # The same examples for every model.
    _, targets = Parity().sample(np.random.default_rng((tasks.TEST, 16)), 16, 400, "test")
    assert found[1]["exact match"] == pytest.approx((targets[:, -1] == 1).double().mean().item())


def test_a_small_model_learns(tmp_path: Path) -> None:
    own = cell(tmp_path, "rope", "s3", embed_dim=32, steps=250, batch_size=32, lr=1e-2)
    found = learn(own)
    # The first state is the element itself, the others chance: 1/6 and what of it is learned.
    assert found["scores"][0]["accuracy"] > 0.4
    assert found["loss"] < math.log(6) - 0.5


def test_a_table_of_positions_is_not_asked_beyond_its_end(tmp_path: Path) -> None:
    lengths = [score["length"] for score in learn(cell(tmp_path, "mha"))["scores"]]
    assert lengths == [MINI["parity"]().longest]


def test_a_model_that_diverges_says_when(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"diverged: the loss is nan at step \d+\. Lower"):
        learn(cell(tmp_path, lr=1e30, steps=60))
    with pytest.raises(SystemExit, match=r"^error: diverged: the loss is nan"):
        cell(tmp_path, lr=1e30, steps=60).work()
    assert not list(tmp_path.iterdir())


def test_rows_say_what_was_asked(tmp_path: Path) -> None:
    own = cell(tmp_path, "rope:rotary_dim=4", "flip-flop")
    found = learn(own)
    rows = [row for row, _ in rows_of(own, found)]
    assert {row.mode for row in rows} == {"flip-flop", "flip-flop/sparse", "flip-flop/dense"}
    assert {row.metric for row in rows} == {"exact match", "accuracy"}
    assert {row.T for row in rows} == set(MINI["flip-flop"]().at)
    assert {(r.kind, r.name, r.options, r.seed) for r in rows} == {
        ("tasks", "rope", "rotary_dim=4", 0)
    }
    assert "train=32..32" in rows[0].recipe
    assert f"data={own.asked['data']}" in rows[0].recipe


# The grid


def test_a_grid_is_stopped_goes_on_and_keeps_what_did_not_fail(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.tasks", *command(tmp_path, "--jobs", "1")], cwd=ROOT,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not (tmp_path / "grid" / "parity" / "rope-s0.log").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped; the same command goes on from here" in said
    assert "Warning" not in said
    assert not (tmp_path / "rows.jsonl").exists()

    (tmp_path / "grid" / "s3").write_text("")  # no folder: what is trained there cannot be kept
    monkeypatch.chdir(ROOT)
    assert tasks.main(command(tmp_path)) == 1
    printed, said = capfd.readouterr()
    assert "s3/rope-s0 failed: exit code 1" in said
    assert "1 of 2 models failed: s3/rope-s0" in said
    assert "parity, trained at 3 to 8: exact match, one seed" in printed
    rows = read(tmp_path / "rows.jsonl")
    assert {(row["mode"], row["T"]) for row in rows} == {
        ("parity", length) for length in MINI["parity"]().at
    }

    # What is there is not trained again, and prints the same.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").rglob("*.json")}
    assert len(before) == 1
    words = [word for word in command(tmp_path) if word != "s3"]
    assert tasks.main(words) == 0
    assert capfd.readouterr().out.partition("\n")[2] == printed.partition("\n")[2]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "grid").rglob("*.json")} == before
    assert tasks.main(["--rows", str(tmp_path / "rows.jsonl")]) == 0
    assert capfd.readouterr().out == printed.partition("\n")[2]

    # Another recipe in this folder; a row file of somebody else's.
    assert tasks.main([*words, "--lr", "0.1"]) == 1
    said = capfd.readouterr().err
    assert "rope-s0.json has lr 0.002; this grid asks for 0.1. Choose another --runs" in said
    rows[1]["kind"] = "memory"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tasks.main(words) == 1
    assert "rows.jsonl:2 is a row of kind 'memory'; expected tasks" in capfd.readouterr().err


def test_a_second_grid_in_the_same_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path / "grid"):
        assert tasks.main(command(tmp_path)) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: {tmp_path / 'grid'} is in use by process {os.getpid()} on ")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"exact match": 0.', '"exact match": 7.'),
        lambda text: text.replace('"accuracy"', '"acuracy"', 1),
    ],
)
def test_a_damaged_result_is_named_and_trained_anew(
    damage: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = cell(tmp_path)
    score = {"test": "", "length": 8, "exact match": 0.5, "accuracy": 0.5}
    whole = json.dumps({"asked": own.asked, "scores": [score]})
    own.path.parent.mkdir()
    own.path.write_text(whole)
    assert own.done()
    own.path.write_text(damage(whole))
    assert not own.done()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{own.path} is damaged, the model is trained anew: ")
    assert not own.path.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1; got 0."),
        (["--jobs", "0"], "--jobs must be at least 1; got 0."),
        (["--steps", "0"], "--steps must be at least 1; got 0."),
        (["--first-seed", "-1"], "--first-seed must be at least 0; got -1."),
        (["--lr", "0"], "--lr must be above 0"),
        (["--tasks", "cnc"], "unknown task: 'cnc'. Did you mean 'cmc'?"),
        (["--tasks", "mc", "mc"], "a task is named twice"),
        (["--attention", "rop"], "Did you mean 'rope'"),
        (["--attention", "nope", "nope"], "a method is named twice"),
        (["--attention", "rope:rotary_dim=3"], "rotary_dim must be even"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--rows", "nowhere.jsonl"], "No such file"),
        (["--rows", "x", "--out", "y"], "--rows only prints"),
    ],
)
def test_bad_flags_are_one_line(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tasks.main(["--mini", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


# Tables and plot


def made(task: str, name: str, seed: int, length: int, share: float, **changes: object) -> Row:
    values: dict[str, object] = {
        "kind": "tasks", "name": name, "implementation": "auto", "mode": task, "unit": "share",
        "metric": "exact match", "p20": share, "p50": share, "p80": share, "dtype": "float32",
        "recipe": "layers=2 embed_dim=64 steps=3000 train=2..10", "T": length, "seed": seed,
    }  # fmt: skip
    return Row(**values | changes)  # type: ignore[arg-type]


SHARES = {"nope": (0.5, 0.9, 0.1), "alibi": (1.0, 1.0)}


def rows(*metrics: str) -> list[Row]:
    return [
        made(task, name, seed, length, share / (length / 10), metric=metric)
        for task in ("cmc", "mc")
        for name, shares in SHARES.items()
        for seed, share in enumerate(shares)
        for length in (10, 15, 40)
        for metric in metrics
    ]


def test_tables_show_medians_and_extremes_and_how_many_seeds() -> None:
    lines = list(scores.tables(rows(*scores.METRICS)))
    assert lines[0] == "cmc, trained at 2 to 10: exact match, median of 3 seeds (least..greatest)"
    assert lines[1].split() == ["10", "15", "40"]
    assert "  nope" in lines[2]
    assert "0.50 (0.10..0.90)  0.33 (0.07..0.60)" in lines[2]
    assert lines[3].startswith("  alibi, 2 of 3 seeds")
    assert len(lines) == 4 * 5


def test_the_report_has_a_table_and_a_plot(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "tasks.jsonl", torch.device("cpu"))
    for row in rows(*scores.METRICS):
        file.add(row)
    table = tables.tasks_table(read(tmp_path / "tasks.jsonl"))
    assert table.header == ["task", "method", "1x", "1.5x", "4x"]
    assert table.lines[0][1:] == ["`nope`", "0.50 (0.10..0.90)", "0.33 (0.07..0.60)",
                                  "0.12 (0.03..0.23)"]  # fmt: skip
    assert table.lines[1][1] == "`alibi`, 2 of 3 seeds"
    assert len(table.lines) == 4
    assert "2 layers of width 64, 3,000 steps" in table.note
    figure = figures.tasks(read(tmp_path / "tasks.jsonl"))
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in drawn] == ["cmc", "mc"]
    medians, points = drawn[0].get_lines()[:2]
    assert list(medians.get_ydata()) == pytest.approx([0.5, 0.5 / 1.5, 0.125])
    assert len(points.get_xdata()) == 3 * 3  # every seed's
    assert median(SHARES["nope"]) == 0.5
    report.main([str(tmp_path)])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Synthetic tasks" in html
    assert (tmp_path / "plots" / "tasks.png").exists()


def test_published_shares_stand_beside_those_at_the_nearest_length(tmp_path: Path) -> None:
    lines = copying.beside(scores.scores_of(rows("exact match"), "exact match"))
    assert [(line.task, line.length, line.own_length) for line in lines] == [
        ("cmc", 25, 15), ("cmc", 30, 15), ("mc", 25, 15), ("mc", 28, 15)
    ]  # fmt: skip
    assert lines[1].times == "1.5x, 1.5x"
    assert lines[1].published["t5"] == (0.56, 0.02)
    assert lines[1].ours.keys() == SHARES.keys() == {"nope", "alibi"}
    assert copying.cells(lines[1])[2] == "0.17 ± 0.10 / 0.33 (0.07..0.60)"
    assert copying.cells(lines[1])[3] == "0.56 ± 0.02 / -"
    assert copying.cells(lines[0])[5] == "0 / -"
    # Of these pairs mc at 25 alone is apart there, .54 against .04; 28 is nearer to our 15.
    assert copying.agreement(lines) == (0, 0, 0)
    for own, expected in ((0.0, (1, 0, 0)), (0.2, (0, 1, 0)), (0.1, (0, 0, 1))):
        ours = {"nope": [0.1], "alibi": [own, own, 0.5]}
        asked = lines[2]._replace(ours=ours, own_length=12)
        assert copying.agreement([*lines, asked]) == expected
    file = RowFile(tmp_path / "tasks.jsonl", torch.device("cpu"))
    for row in rows(*scores.METRICS):
        file.add(row)
    table = tables.TABLES["copying"](read(tmp_path / "tasks.jsonl"))
    assert table.header == ["task", "length", *copying.METHODS.values()]
    assert len(table.lines) == 4
    assert "Of 0 pairs of methods" in table.note


def test_scores_that_cannot_stand_together_are_refused() -> None:
    first = made("cmc", "nope", 0, 10, 0.5)
    with pytest.raises(ValueError, match=r"two scores of nope on cmc at 10 with seed 0"):
        scores.scores_of([first, first], "exact match")
    other = made("cmc", "nope", 1, 10, 0.5, recipe=first.recipe.replace("3000", "9"))
    with pytest.raises(ValueError, match=r"differ in \['steps=3000', 'steps=9'\]"):
        scores.scores_of([first, other], "exact match")
    assert scores.scores_of([made("mc", "nope", 0, 10, 0.5), first], "accuracy") == {}
