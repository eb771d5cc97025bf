"""bench.perplexity and bench.grid: matching, rows, and a grid that is interrupted and goes on."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posenc
from bench import grid, perplexity
from bench.grid import Cell, Method, Plan, matched, method
from bench.losses import Question, choose_text
from bench.perplexity import Comparison, Result, cell_rows, gap_rows
from bench.pool import held, reason
from bench.rows import read
from bench.statistics import paired_bootstrap, student
from grids import SCORING, SEEDS, command, plan
from posenc.cost import model_flops_per_token
from posenc.training.cli import parse
from training_runs import ROOT

# Cells


def test_methods_are_read_with_their_options() -> None:
    assert method("rope") == Method("rope")
    found = method('moh:shared=2,scaling="paper",encoding=carope')
    assert found.values == {"shared": 2, "scaling": "paper", "encoding": "carope"}
    assert method("moh:shared=2,scaling=paper,encoding=carope") == found
    lists = method("rope:scaling={},base=[1,2],rotary_dim=4")
    assert lists.values == {"scaling": {}, "base": [1, 2], "rotary_dim": 4}
    with pytest.raises(ValueError, match="expected KEY=VALUE; got 'shared'"):
        method("moh:shared")


def test_cells_differ_in_method_and_seeds_alone(tmp_path: Path) -> None:
    cells = plan(tmp_path, "rope", "carope:init=paper").cells("tokens", 300)
    assert [(c.config.seed, c.config.data_seed) for c in cells] == [(0, 5)] * 2 + [(1, 6)] * 2
    assert [str(c)[len(str(tmp_path)) :] for c in cells] == [
        f"/grid/tokens/{name}-s{seed}" for seed in (0, 1) for name in ("rope", "carope-init=paper")
    ]
    values = [dataclasses.asdict(c.config) for c in cells]
    differ = {key for key in values[0] if len({str(v[key]) for v in values}) > 1}
    assert differ == {"attention", "attention_options", "seed", "data_seed", "out"}


@pytest.mark.parametrize("name", posenc.names())
def test_parameters_are_matched_by_the_mlp(name: str) -> None:
    sizes = ["--heads", "4", "--embed-dim", "64", "--context", "64", "--layers", "3"]
    baseline = parse(sizes)
    config = parse([*sizes, "--attention", name])
    extra = matched(config, baseline, "parameters", 2048)
    sized = parse([*sizes, "--attention", name, *extra])
    counts = [posenc.GPT(c.model(2048)).num_parameters() for c in (baseline, sized, config)]
    assert abs(counts[1] - counts[0]) <= 1e-3 * counts[0]
    assert bool(extra) == (abs(counts[2] - counts[0]) > 1e-3 * counts[0])
    if extra:  # one unit more or less is no nearer
        for width in (sized.mlp_dim - 1, sized.mlp_dim + 1):
            other = posenc.GPT(dataclasses.replace(sized, mlp_dim=width).model(2048))
            assert abs(other.num_parameters() - counts[0]) >= abs(counts[1] - counts[0])


def test_parameters_that_no_width_matches_are_an_error() -> None:
    sizes = ["--heads", "4", "--embed-dim", "16", "--context", "4096", "--layers", "1"]
    config = parse([*sizes, "--attention", "rcmha"])
    with pytest.raises(ValueError, match=r"rcmha has [\d,]+ parameters, the baseline .* 0\.1%"):
        matched(config, parse(sizes), "parameters", 300)


@pytest.mark.parametrize("name", ["rcmha", "cmha", "carope"])
def test_flops_are_matched_by_the_steps(name: str) -> None:
    words = ["--context", "64", "--steps", "5000", "--warmup", "500"]
    baseline, config = parse(words), parse([*words, "--attention", name])
    extra = matched(config, baseline, "flops", 300)
    sized = parse([*words, "--attention", name, *extra])
    each = [model_flops_per_token(c.model(300)).exact for c in (baseline, config)]
    assert abs(sized.steps * each[1] / (5000 * each[0]) - 1) <= 0.5 / sized.steps + 1e-12
    assert sized.warmup == round(500 * each[0] / each[1])
    assert sized.decay_steps == 0
    assert (extra == []) == (name == "cmha")  # whose extra work is no product
    few = [parse(["--context", "64", "--steps", "5", "--attention", x]) for x in (name, "rope")]
    assert matched(few[0], few[1], "flops", 300) == []  # rounds to the same steps


def test_what_needs_no_match_is_not_trained_twice(tmp_path: Path) -> None:
    sizes = {"embed_dim": 32, "heads": 4, "steps": 5000}
    made = plan(tmp_path, "rope", "nope", "rcmha", **sizes)
    plain = {str(cell) for cell in made.cells("tokens", 300)}
    for match in ("parameters", "flops"):
        sized = {str(cell) for cell in made.cells(match, 300)}
        assert {Path(x).name for x in sized - plain} == {"rcmha-s0", "rcmha-s1"}


@pytest.mark.parametrize(
    ("names", "words", "message"),
    [
        (["mha"], [], "the baseline rope is not among mha"),
        (["rope", "rope"], [], "a method is named twice"),
        (["rope"], ["--seed", "3"], "--seed after -- is what the grid varies"),
        (["rope"], ["--data_seed=3"], "--data-seed after -- is what the grid varies"),
        (["rope"], ["--lyers", "3"], "Did you mean '--layers'"),
        (["rope", "rop"], [], "Did you mean 'rope'"),
        (["rope", "moh:shred=2"], [], "Did you mean 'shared'"),
        (["rope", "moh"], ["--heads", "2"], "moh needs at least 4 heads"),
    ],
)
def test_grids_that_cannot_be_are_refused_before_they_begin(
    names: list[str], words: list[str], message: str, tmp_path: Path
) -> None:
    methods = [method(name) for name in names]
    with pytest.raises(ValueError, match=message):
        Plan(tmp_path, methods, method("rope"), words, SEEDS).cells("tokens", 300)


def test_a_folder_of_another_run_is_not_continued(tmp_path: Path) -> None:
    cell = plan(tmp_path, "rope").cells("tokens", 300)[0]
    cell.folder.path.mkdir(parents=True)
    cell.folder.write_config(cell.config)
    cell.check()
    other = Cell(dataclasses.replace(cell.config, steps=7, resume="x", cache_dir="y"))
    with pytest.raises(
        ValueError, match=r"rope-s0 holds a run with --steps 6; this grid asks .* 7"
    ):
        other.check()


def test_steps_are_read_from_a_growing_file(tmp_path: Path) -> None:
    cell = plan(tmp_path, "rope").cells("tokens", 300)[0]
    assert cell.steps() == 0
    cell.folder.path.mkdir(parents=True)
    cell.folder.append_metrics({"step": i, "loss": 1 / 3} for i in range(1, 1000))
    with cell.folder.metrics.open("a") as file:
        file.write('{"step": 10')
    assert cell.steps() == 999


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({}, "are both rope with seed 0"),
        ({"lr": 1e-3}, r"differ in --lr: 0\.002 and 0\.001"),
        ({"attention": "nope", "data_seed": 9}, "differ in --data-seed: 0 and 9"),
        ({"seed": 1, "steps": 9}, "differ in --steps: 800 and 9"),
    ],
)
def test_finished_runs_that_cannot_be_compared_are_refused(
    second: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folders = []
    for name, changes in (("a", {}), ("b", second)):
        config = dataclasses.replace(parse([]), out=str(tmp_path / name), **changes)
        folder = Cell(config).folder
        folder.path.mkdir()
        folder.write_config(config)
        folders.append(folder.path)
    with pytest.raises(ValueError, match="a is not a finished run"):
        grid.finished(folders)
    for folder in folders:
        steps = json.loads((folder / "config.json").read_text())["steps"]
        (folder / "summary.json").write_text(json.dumps({"steps": steps}))
    with pytest.raises(ValueError, match=message):
        grid.finished(folders)


def test_a_run_that_goes_on_is_not_finished_and_is_scored_anew(tmp_path: Path) -> None:
    question = compared(tmp_path)[0].question
    cell = Cell(dataclasses.replace(parse([]), out=str(tmp_path / "a"), steps=6))
    cell.folder.path.mkdir()
    cell.folder.write_config(cell.config)
    cell.folder.write_json("summary.json", {"steps": 6})
    cell.folder.write_json("losses.json", {"question": question.digest(), "losses": {}})
    assert cell.losses(question) == {}
    more = Cell(dataclasses.replace(cell.config, steps=9))
    more.folder.write_config(more.config)
    with pytest.raises(ValueError, match=r"no summary\.json of its 9 steps"):
        grid.finished([more.folder.path])
    assert more.losses(question) is None
    more.folder.write_json("summary.json", {"steps": 9})
    later = time.time() + 9
    os.utime(more.folder.path / "summary.json", (later, later))
    assert grid.finished([more.folder.path])
    assert more.losses(question) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: '{"losses": {}}',
        lambda text: text.replace("3.5", "null", 1),
        lambda text: text.replace("3.5, ", "", 1),
    ],
)
def test_a_damaged_answer_is_named_once_and_scored_anew(
    damage: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = compared(tmp_path)[0].question
    cell = Cell(dataclasses.replace(parse([]), out=str(tmp_path / "a"), steps=6))
    cell.folder.path.mkdir()
    cell.folder.write_json("summary.json", {"steps": 6})
    losses = {"windows": {"8": [3.5] * len(question.text.blocks)}}
    path = cell.folder.path / "losses.json"
    whole = json.dumps({"question": question.digest(), "losses": losses})
    path.write_text(whole)
    assert cell.losses(question) == {"windows": {8: losses["windows"]["8"]}}
    path.write_text(damage(whole))
    assert cell.losses(question) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path} is damaged and will be scored anew: ")
    assert cell.losses(question) is None
    path.write_text(json.dumps({"question": "another", "losses": losses}))
    assert cell.losses(question) is None
    assert path.exists()
    assert not capsys.readouterr().err


# Rows


def compared(tmp_path: Path, gap: float = 0.1) -> tuple[Comparison, np.ndarray]:
    """Three seeds of rope and two of carope, whose loss is higher by `gap` and some noise."""
    text = choose_text(np.arange(1, 300), None, size=64, wanted=4, lead=8)
    question = Question(text, 8, [8, 16])
    generator, results = np.random.default_rng(0), []
    noise = generator.normal(0, 0.01, (3, len(text.blocks)))
    for seed in range(3):
        for name in ("rope", "carope")[: 2 if seed < 2 else 1]:
            config = dataclasses.replace(
                parse(["--context", "8", "--attention", name]), seed=seed, data_seed=10 + seed,
                out=str(tmp_path / name),
            )  # fmt: skip
            losses = {
                protocol: {
                    length: list(3 + (noise[seed] + gap if name == "carope" else 0 * noise[seed]))
                    for length in (8, 16)
                }
                for protocol in ("windows", "sliding", "positions", "tail")
            }
            about = {"dtype": "float32", "corpus": {"fingerprint": "f"}, "device": "d",
                     "threads": 3, "versions": {"torch": "2", "python": "3"}}  # fmt: skip
            summary = {"parameters": 77, "tokens": 640}
            speeds = [1.0, 30.0, 10.0, 20.0, 40.0]  # the first compiles
            metrics = [{"step": i, "tokens_per_second": speeds[i]} for i in range(5)]
            metrics.append({"step": 4, "val_loss": 3.0})
            results.append(Result(Cell(config), losses, summary, about, metrics))
    return Comparison("tokens", "rope", results, question, 300, 1000.0), noise


def test_rows_of_a_cell(tmp_path: Path) -> None:
    found, noise = compared(tmp_path)
    rows = cell_rows(found.results[1], found)
    losses = [(r.mode, r.T) for r in rows if r.metric == "loss"]
    protocols = ("windows", "sliding", "positions", "tail")
    assert losses == [(protocol, length) for protocol in protocols for length in (8, 16)]
    by_metric = {row.metric: row for row in rows}
    assert by_metric["loss"].p50 == pytest.approx(3.1 + noise[0].mean())
    targets = 64 * 4
    expected = by_metric["loss"].p50 * targets / math.log(2) / 1000
    assert by_metric["bits per byte"].p50 == pytest.approx(expected)
    assert by_metric["parameters"].p50 == 77
    speed = by_metric["throughput"]
    assert (speed.p20, speed.p50, speed.p80) == pytest.approx((16, 25, 34))
    flops = model_flops_per_token(found.results[1].config.model(300)).exact
    assert by_metric["training FLOPs"].p50 == 640 * flops
    for row in rows:
        assert (row.kind, row.name, row.seed, row.H, row.D) == ("perplexity", "carope", 0, 4, 48)
        for word in (f"targets={targets}", "units=4", "unit=block", "match=tokens", "mlp_dim=768",
                     "baseline=rope", "data_seeds=10,11,12"):  # fmt: skip
            assert word in row.recipe.split()


def test_rows_of_a_router(tmp_path: Path) -> None:
    found, _ = compared(tmp_path)
    result = found.results[1]
    assert not [row for row in cell_rows(result, found) if row.metric.endswith("load")]
    used = {"routing": [None, {"load": [0.5, 1.5]}, {"load": [0.25, 1.75]}]}
    loads = {
        row.metric: (row.mode, row.unit, row.p50)
        for row in cell_rows(result._replace(summary=result.summary | used), found)
        if row.metric.endswith("load")
    }
    assert loads == {
        "least load": ("train", "of balance", 0.25), "greatest load": ("train", "of balance", 1.75)
    }  # fmt: skip


def test_the_weight_of_the_balance_loss_is_part_of_a_recipe(tmp_path: Path) -> None:
    """Where it is not that of every run before there was a choice."""
    found, _ = compared(tmp_path)
    words = []
    for weight in (0.01, 0.0):
        first = found.results[1]
        config = dataclasses.replace(first.config, attention="moh", aux_weight=weight)
        own = first._replace(cell=Cell(config))
        words.append(cell_rows(own, found)[0].recipe.split())
    assert [word for word in words[0] if word.startswith("aux")] == []
    assert [word for word in words[1] if word.startswith("aux")] == ["aux_weight=0.0"]


def test_the_shape_over_positions_is_that_of_equal_tokens_alone(tmp_path: Path) -> None:
    found, _ = compared(tmp_path)
    rows = cell_rows(found.results[1], found._replace(match="flops"))
    assert {row.mode for row in rows} == {"windows", "sliding", "train"}


def test_rows_of_a_gap(tmp_path: Path) -> None:
    found, noise = compared(tmp_path)
    rows = gap_rows("carope", found, 500)
    assert gap_rows("rope", found, 500) == []
    places = {(row.mode, row.T) for row in rows}
    assert places == {(mode, t) for mode in ("windows", "sliding") for t in (8, 16)}
    own = {row.metric: row for row in rows if (row.mode, row.T) == ("sliding", 16)}
    drawn = paired_bootstrap(noise[:2] + 0.1, 500)
    assert (own["gap"].p20, own["gap"].p80) == pytest.approx((drawn.p20, drawn.p80))
    assert own["gap 2.5%"].p50 == pytest.approx(drawn.low)
    assert own["gap 97.5%"].p50 == pytest.approx(drawn.high)
    over = student([0.1 + float(row.mean()) for row in noise[:2]])
    assert own["gap 2.5% over seeds"].p50 == pytest.approx(over.low)
    assert own["gap 97.5% over seeds"].p50 == pytest.approx(over.high)
    assert own["seeds needed"].p50 >= 2
    assert {row.seed for row in rows} == {None}
    metrics = {row.metric for row in gap_rows("carope", compared(tmp_path, gap=0)[0], 50)}
    assert "gap" in metrics


# The whole


def steps(folder: Path) -> list[int]:
    return [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_an_interrupted_grid_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.perplexity", *words], cwd=ROOT, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    cells = [tmp_path / "grid" / "tokens" / name for name in ("rope-s0", "mha-s0")]
    end = time.monotonic() + 120
    metrics = [cell / "metrics.jsonl" for cell in cells]
    while not all(path.exists() and path.stat().st_size for path in metrics):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)  # all of its processes hear it, as of `timeout`
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped; the same command goes on from here" in said
    for cell in cells:
        assert list((cell / "checkpoints").iterdir())
        assert not (cell / "summary.json").exists()
    assert not (tmp_path / "rows.jsonl").exists()

    monkeypatch.chdir(ROOT)
    assert perplexity.main(words) == 0
    printed = capfd.readouterr().out
    logs = [cell.with_name(f"{cell.name}.log").read_text() for cell in cells]
    assert all("from step" in log for log in logs)
    assert [sorted(set(steps(cell))) for cell in cells] == [list(range(1, 401))] * 2
    rows = read(tmp_path / "rows.jsonl")
    keys = [{key: row[key] for key in row if key not in ("p20", "p50", "p80")} for row in rows]
    assert len({json.dumps(key) for key in keys}) == len(rows)
    by_name = defaultdict(set)
    for row in rows:
        if row["mode"] == "windows":
            by_name[row["name"], row["metric"]].add(row["T"])
    assert by_name["rope", "loss"] == {16, 32}
    assert by_name["mha", "loss"] == by_name["mha", "gap"] == {16}  # its table is no longer
    for part in ("equal tokens, windows of 32 tokens", "seeds: one only", "  mha "):
        assert part in printed

    # What is done is neither trained nor scored again, and prints the same.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").rglob("*")}
    assert perplexity.main(words) == 0
    assert capfd.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").rglob("*")} == before
    for source in (["--rows", str(tmp_path / "rows.jsonl")], ["--finished", *map(str, cells)]):
        more = [] if "--rows" in source else SCORING
        assert perplexity.main([*source, *more]) == 0
        assert capfd.readouterr().out.splitlines()[-3:] == printed.splitlines()[-3:]

    # Nor are its weights needed.
    for cell in cells:
        shutil.rmtree(cell / "model")
        shutil.rmtree(cell / "checkpoints")
    assert perplexity.main(words) == 0
    assert capfd.readouterr().out == printed
    assert not any((cell / "model").exists() for cell in cells)

    # Other text under the same name; another grid; a row file of somebody else's.
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text[::-1])
    assert perplexity.main(words) == 1
    assert "rope-s0 was trained on other text than" in capfd.readouterr().err
    (tmp_path / "text.txt").write_text(text)
    assert perplexity.main(command(tmp_path, lr=1e-3)) == 1
    assert "rope-s0 holds a run with --lr 0.01; this grid asks for 0.001" in capfd.readouterr().err
    rows[3]["kind"] = "memory"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert perplexity.main(words) == 1
    assert "rows.jsonl:4 is a row of kind 'memory'; expected perplexity" in capfd.readouterr().err


def test_a_cell_that_fails_does_not_stop_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = command(tmp_path, steps=20)
    broken = tmp_path / "grid" / "tokens" / "mha-s0"
    broken.mkdir(parents=True)
    (broken / "metrics.jsonl").mkdir()  # which cannot be written
    assert perplexity.main(words) == 1
    said = capfd.readouterr()
    assert "mha-s0 failed: error: Is a directory" in said.err
    assert "1 of 2 runs failed: mha-s0" in said.err
    assert "  rope " in said.out
    assert {row["name"] for row in read(tmp_path / "rows.jsonl")} == {"rope"}
    assert perplexity.main(["--baseline", "mha", *words]) == 1
    assert "no run of the baseline mha is left" in capfd.readouterr().err
    assert {row["name"] for row in read(tmp_path / "rows.jsonl")} == {"rope"}


def test_a_second_grid_in_the_same_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path / "grid"):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        words = command(tmp_path)
        assert perplexity.main(words) == 1
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith(f"error: {tmp_path / 'grid'} is in use by process {os.getpid()} on ")
        after = {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").rglob("*")}
        assert after.items() <= before.items()


def test_the_reason_of_a_failure_is_that_of_the_process_itself(tmp_path: Path) -> None:
    log = tmp_path / "cell.log"
    whole = f" (all of it: {log})"
    assert reason(log, 0, 3) == "exit code 3" + whole
    log.write_text("error: of an earlier attempt\n")
    begin = log.stat().st_size
    assert reason(log, begin, 3) == "exit code 3" + whole
    bar = "\r 12%|#2   | 96/800 [00:01<00:09, 72.11step/s, loss 3.1]"
    for lines, expected in (
        (["Traceback", "KeyError: 'x'", bar], "KeyError: 'x'"),
        (
            [bar, "error: x is in use.", bar, "step 9: validation loss 3", bar],
            "error: x is in use.",
        ),
    ):
        with log.open("a") as file:
            file.write("\n".join(lines))
        assert reason(log, begin, 1) == expected + whole
    assert reason(log, begin, -9) == "ended by signal 9" + whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--match", "flop"], "unknown match: 'flop'. Did you mean 'flops'?"),
        (["--seeds", "0"], "--seeds must be at least 1; got 0."),
        (["--contexts", "0"], "--contexts and --jobs must be at least 1."),
        (["--finished", "nowhere"], "nowhere holds no run"),
        (["--rows", "nowhere.jsonl"], "No such file"),
        (["--rows", "x", "--out", "y"], "--rows only prints."),
        (["--baseline", "rop"], "the baseline rop is not among"),
        (["--finished", "x", "--", "--lr", "1"], "--finished trains nothing; got the flags --lr 1"),
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
    assert perplexity.main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
