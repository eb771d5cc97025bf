"""bench.predict: every target, the page as the code makes it, predictions beside rows."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.rows import Environment, Row, environment

triton = pytest.importorskip("triton")
from bench import launches, predict, published  # noqa: E402
from bench.h100 import H100, H200  # noqa: E402
from bench.kernels import SHAPES, TARGETS  # noqa: E402
from bench.predict import Goal, Key  # noqa: E402
from posenc.kernels.common import INTERPRETED  # noqa: E402

compiles = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do not compile")
of_page = pytest.mark.skipif(
    triton.__version__ != "3.7.1" or not torch.__version__.startswith("2.13."),
    reason="the page is of triton 3.7.1 and torch 2.13",
)
SMALL = (1, 2, 256, 64)


def test_every_target_is_there_once() -> None:
    found = predict.goals()
    assert len(set(found)) == len(found)
    for target in TARGETS:
        same = [goal for goal in found if (goal.what, goal.mode) == (target.what, target.mode)
                and goal.bound == target.bound]  # fmt: skip
        assert same or (target.what, target.bound) in [row[:2] for row in predict.UNSAID], target
    assert all(why for *_, why in predict.UNSAID)


def test_every_target_has_a_prediction_or_a_reason() -> None:
    for goal in predict.goals():
        assert predict.ours(goal.own), goal
        key = goal.beside
        known = predict.ours(key) or key.provider in ("eager", "direct")
        if not known and published.peer(key.name, key.provider, goal.mode, goal.shape) is None:
            assert predict.NO_FIGURE[key.provider]


@pytest.mark.parametrize(
    ("bound", "ratios", "least", "expected"),
    [
        (">= 1.15", (1.2, 1.15), False, "met"),
        (">= 1.15", (1.2, 1.1), False, "open"),
        (">= 1.15", (1.1, 1.0), False, "missed"),
        (">= 1.15", (1.1, 1.0), True, "open"),
        ("<= 1.12", (1.12, 1.0), False, "met"),
        ("<= 1.12", (1.2, 1.13), False, "missed"),
    ],
)
def test_verdicts(bound: str, ratios: tuple[float, float], least: bool, expected: str) -> None:
    goal = Goal("a over b", Key("flash", "a"), Key("flash", "b"), "fwd", bound)
    assert predict.verdict(goal, ratios, least) == expected
    assert goal.own == (goal.under if bound[0] == ">" else goal.over)
    assert {goal.own, goal.beside} == {goal.over, goal.under}


def test_published_rates_are_times() -> None:
    # 2 B H T^2 D FLOPs at 229 TFLOP/s
    found = published.peer("flash", "sdpa-fa2", "fwd", SHAPES["S1"])
    assert found == published.Peer(2 * 16 * 12 * 1024**2 * 64 / 229e12, ("published",))
    both = published.peer("flash", "sdpa-fa2", "fwd+bwd", SHAPES["S1"])
    assert both is not None
    assert both.sure == ("published", "guessed")
    assert both.seconds == pytest.approx(found.seconds + 5 * 16 * 12 * 1024**2 * 64 / 180e12)
    assert published.peer("flash", "sdpa-fa2", "bwd", SHAPES["S2"]) is None
    assert published.peer("flash", "flex", "fwd", SHAPES["S1"]) is None


def test_a_sum_is_as_sure_as_its_parts() -> None:
    found = published.peer("rope + attention", "liger + fa2", "fwd", SHAPES["S1"])
    # 8 tensors of 25 MB and a launch, then FA2
    core = published.core("sdpa-fa2", "fwd", SHAPES["S1"])
    assert core is not None
    assert found == published.Peer(
        8 * 25165824 / 3.0e12 + 2e-6 + core.seconds, ("copies", "published"), True
    )


def test_operations_of_torch_are_counted_by_bytes_and_products() -> None:
    a, b = launches.meta(8, 16), launches.meta(16, 4)
    with launches.counting() as found:
        torch.empty_like(a).zero_()
        (a @ b).T.contiguous()
        a[:1].expand(8, 16) + a
    sizes = [each.bytes for each in found]
    assert sizes == [4 * 128, 4 * (128 + 64 + 32), 4 * (32 + 32), 4 * (16 + 128 + 128)]
    assert [each.flops for each in found] == [0, 2 * 8 * 16 * 4, 0, 0]


def test_a_definition_is_counted_one_operation_at_a_time() -> None:
    key = Key("rope", "eager")
    ahead, back, both = (predict.said(key, mode, SMALL) for mode in ("fwd", "bwd", "fwd+bwd"))
    assert ahead is not None
    assert back is not None
    assert both is not None
    assert ahead.sure == (predict.COUNTED,)
    assert ahead.least
    assert ahead.best > 5 * H100.launch  # none of them moves much at this size
    assert ahead.best + back.best == pytest.approx(both.best)
    assert predict.said(Key("rope", "a library"), "fwd", SMALL) is None


@compiles
def test_products_of_the_code_are_those_of_the_formula() -> None:
    """Two products forward over the tiles that the triangle touches."""
    forward, backward = launches.plain(SMALL)
    with launches.counting() as found:
        forward()
    (launch,) = found
    code = launches.code(launch)
    assert code.programs == 2
    turns = launches.row_turns(256, launch.kwargs["BLOCK_M"], launch.kwargs["BLOCK_N"])
    uses = [launches.passed(code, launch, *each) for each in turns]
    flops = sum(code.warps * times * launches.products(use) for tile in uses for times, use in tile)
    tiles = sum(map(sum, turns))
    assert flops == 2 * 2 * 128 * 64 * 64 * tiles
    # And K and V pass L2 once for each of them.
    copied = sum(code.warps * times * use.copied for tile in uses for times, use in tile)
    assert copied == 2 * 64 * 64 * 2 * tiles
    time = launches.call_time(backward, SMALL)
    assert time.bound["launches"] == pytest.approx(2 * H100.launch)


@compiles
def test_longer_and_wider_calls_take_longer() -> None:
    times = [launches.call_time(launches.plain(shape)[0], shape).turns
             for shape in ((4, 12, 1024, 64), (4, 12, 2048, 64), (8, 12, 2048, 64))]  # fmt: skip
    assert times == sorted(times)
    half, whole = (launches.call_time(launches.gathered(SHAPES["S1"])[0], SHAPES["S1"], share).turns
                   for share in (0.5, 1.0))  # fmt: skip
    assert half < whole


@compiles
def test_a_loop_of_unknown_turns_is_refused() -> None:
    with launches.counting() as found:
        launches.by_distance(SMALL)[0]()
    (launch,) = (each for each in found if not isinstance(each, launches.Operation))
    code = launches.code(launch)
    assert sum(times for times, _ in launches.passed(code, launch, 3, 1)) == 1 + 4 + 5
    with pytest.raises(ValueError, match="no loop with products and exp2"):
        launches.passed(code._replace(loops=()), launch, 3, 1)
    del launch.kwargs["SEGMENT"]
    with pytest.raises(ValueError, match="expected BLOCK and SEGMENT among its sizes"):
        launches.passed(code, launch, 3, 1)


@compiles
@of_page
@pytest.mark.slow
def test_the_page_is_what_the_code_makes() -> None:
    text = predict.PAGE.read_text(encoding="utf-8")
    assert predict.filled(text) == text, "stale; python -m bench.predict --page"


def test_a_page_without_its_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="machine, known, targets, calls in this order; got none"):
        predict.filled("# Predictions\n")


def rows(path: Path, device: str, *about: dict[str, Any]) -> Path:
    """A file of rows as that device would leave it."""
    measured_on: Environment = replace(environment(torch.device("cpu")), device=device)
    with path.open("w", encoding="utf-8") as file:
        for values in about:
            ms = values.pop("ms")
            row = Row(**{"kind": "kernel", "metric": "graph time", "unit": "ms", "p20": ms,
                         "p50": ms, "p80": ms, "dtype": "bfloat16",
                         **dict(zip("BHTD", SHAPES["S1"], strict=True)), **values})  # fmt: skip
            file.write(json.dumps({**asdict(row), **asdict(measured_on)}) + "\n")
    return path


SXM = "NVIDIA H100 80GB HBM3"


@compiles
def test_predictions_beside_measured_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = Key("flash", "posenc")
    time = predict.own_time(key, "fwd", SHAPES["S1"], H100)
    ours = {"name": "flash", "implementation": "posenc", "mode": "fwd"}
    path = rows(
        tmp_path / "kernels.jsonl", SXM,
        {"kind": "ceiling", "name": "copy", "implementation": "64 MiB", "mode": "fwd",
         "metric": "rate", "unit": "TB/s", "ms": 2.9},
        {**ours, "metric": "time", "ms": 9.0},
        {**ours, "ms": 1.5e3 * time.turns},
        {**ours, "implementation": "sdpa-fa2", "ms": 3e3 * time.turns},
        {**ours, "implementation": "flex", "ms": 1.0},
        {**ours, "mode": "fwd+bwd", "metric": "memory", "unit": "MiB", "ms": 1.0},
    )  # fmt: skip
    predict.main(["--against", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"measured on {SXM}; the model is of an H100 SXM"
    assert lines[1] == "copy 64 MiB: measured 2.90 TB/s, in the model 3"
    (own,) = (line for line in lines if line.startswith("flash") and " posenc " in line)
    assert own.split()[-3:] == ["1.50", "graph", "time"]
    assert f"{time.best * 1e6:.1f}" in own
    assert "rows without a prediction: 1" in lines
    assert "ours, measured over in turns: median 1.50, 1.50 to 1.50 of 1" in lines
    (target,) = (line for line in lines if line.startswith("core over FA2"))
    assert target.startswith("core over FA2, S1, fwd: asked >= 1.15, predicted ")
    assert target.endswith("measured 2.00")


@compiles
def test_rows_of_moh_are_those_of_its_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = (2, 8, 2048, 64)
    about = {"kind": "routing", "name": "moh core", "mode": "fwd", "B": 2, "H": 8, "T": 2048}
    path = rows(
        tmp_path / "routing.jsonl", "NVIDIA H200",
        {**about, "implementation": "skipping", "options": "shared=2 top_k=2", "ms": 1.0},
        {**about, "implementation": "dense", "ms": 2.0},
    )  # fmt: skip
    predict.main(["--against", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("the model is of an H200")
    half = predict.own_time(Key("moh core", "skipping", 0.5), "fwd", shape, H200)
    (own,) = (line for line in lines if "skipping 0.5" in line)
    assert f"{half.turns * 1e6:.1f}" in own
    assert "rows without a prediction: 0" in lines


@pytest.mark.skipif(INTERPRETED, reason="is refused for that before")
@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB", "some processor"])
def test_rows_of_another_device_are_refused(tmp_path: Path, device: str) -> None:
    ours = {"name": "flash", "implementation": "posenc", "mode": "fwd", "ms": 1.0}
    path = rows(tmp_path / "kernels.jsonl", device, ours)
    with pytest.raises(SystemExit, match=f"the rows are of {device}"):
        predict.main(["--against", str(path)])


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="the rows are of nothing"):
        list(predict.against([]))


def test_interpreted_kernels_are_refused_in_one_line() -> None:
    command = [sys.executable, "-m", "bench.predict"]
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env={"TRITON_INTERPRET": "1", "PATH": "", "PYTHONPATH": ""},
    )  # fmt: skip
    assert ran.returncode == 1
    assert ran.stderr == "Interpreted kernels do not compile: unset TRITON_INTERPRET.\n"
