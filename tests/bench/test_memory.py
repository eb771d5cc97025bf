"""bench.memory: rows, ratios to the cost model within its tolerance, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import posenc
from bench import memory
from bench.measure import bytes_saved
from bench.rows import read

ROOT = Path(__file__).parents[2]


def run(monkeypatch: pytest.MonkeyPatch, arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["memory", *arguments.split()])
    memory.main()


def test_the_model_holds_at_odd_sizes(tmp_path: Path) -> None:
    """In a process of its own: Triton decides once whether kernels are interpreted."""
    out = tmp_path / "new" / "rows.jsonl"
    # What every name keeps is tests/kernels/test_cost.py's.
    names, plain = ("nope", "carope", "rcmha", "moh", "fire", "selective"), ("nope",)
    arguments = "--quantities activations state --lengths 71 --embed-dim 230 --heads 5 --names "
    command = [sys.executable, "-m", "bench.memory", *arguments.split(), *names, "--out", str(out)]
    # More than one thread only waits at these sizes.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(out)
    ratios = {
        (row["name"], row["implementation"], row["mode"]): row["p50"]
        for row in rows
        if row["metric"].endswith("over predicted")
    }
    without = {line.split()[0] for line in done.stdout.splitlines() if line.endswith("no kernel")}
    assert without <= {name for name in names if posenc.attention(name, 8, 4).encoding.in_logits}
    expected = {(name, "fused", "train") for name in names if name not in without}
    expected |= {(name, "auto", "train") for name in plain}
    expected |= {(name, "cache", "decode") for name in names}
    assert ratios.keys() == expected
    assert all(abs(ratio - 1) <= 0.05 for ratio in ratios.values()), ratios
    units = {(row["mode"], row["metric"], row["unit"]) for row in rows}
    assert units == {
        ("train", "activations", "B/token"), ("train", "activations over predicted", "1"),
        ("decode", "decoding state", "B/token"), ("decode", "decoding state over predicted", "1"),
    }  # fmt: skip
    assert {(row["kind"], row["H"], row["D"], row["T"]) for row in rows} == {("memory", 5, 46, 71)}


def test_bytes_saved_counts_storages_once_and_no_parameters() -> None:
    linear = torch.nn.Linear(3, 5)
    x = torch.randn(7, 3, requires_grad=True)
    # x twice; the product, which the square keeps; not the weight.
    saved = bytes_saved(linear, lambda: linear(x).square() + linear(x.view(7, 3)).sum())
    assert saved == 4 * (7 * 3 + 7 * 5)
    assert bytes_saved(linear, lambda: linear(x).square(), lambda kept: kept.numel() > 21) == 4 * 35


def test_the_peak_is_at_least_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    run(
        monkeypatch,
        f"--quantities peak --names rope --impls sdpa --lengths 3000 --out {out} --device cpu",
    )
    (row,) = read(out)
    assert (row["name"], row["mode"], row["metric"]) == ("rope layer", "fwd+bwd", "memory")
    layer = posenc.attention("rope", 256, 4)
    kept = posenc.attention_cost(layer, 1, 3000).total.saved_bytes - 3000 * 256 * 4  # less x
    assert kept / 2**20 < row["p50"] < 10 * kept / 2**20


def test_a_model_that_is_off_is_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match=r"posenc.cost is off .*: activations of nope$"):
        run(
            monkeypatch,
            "--quantities activations --names nope rope --impls sdpa --lengths 9 --device cpu",
        )
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "off by more than" in lines["nope"]
    assert "off by more than" not in lines["rope"]
    assert lines["rope"].endswith(")")  # a ratio that the model does not claim


def test_what_is_recomputed_is_not_counted() -> None:
    about = {"impl": "auto", "embed_dim": 24, "heads": 4, "options": {}, "device": "cpu"}
    settings = [
        memory.Setting(name=name, length=length, dtype="float32", **about)
        for name in ("rmha", "rope")
        for length in (1023, 1024)
    ]
    ((_, counted),) = memory.tables(settings, ["activations"])
    assert counted == [settings[0], *settings[2:]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--names ropes", "ropes cannot be measured: .*'rope'"),
        ("--names rope --options top_k=2", "rope with top_k=2 cannot be measured: .*option"),
        (
            "--names moh --options shared=2 top_k=two",
            "moh with shared=2 top_k=two cannot be",
        ),
        ("--embed-dim 10 --heads 4", "cannot be measured: "),
        ("--lengths 4 0", "--lengths must be at least 1; got 0"),
        ("--impls quick", "cannot be measured: unknown impl: 'quick'"),
        ("--names nope --out .", "Is a directory: '.'"),
    ],
)
def test_wrong_input_is_one_line_before_any_measurement(
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match=message) as error:
        run(monkeypatch, f"--impls auto --device cpu {arguments}")
    assert "\n" not in str(error.value)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("quantity", ["activations", "peak"])
def test_too_long_a_text_is_one_line(
    quantity: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = f"--quantities {quantity} --names nope --impls sdpa --lengths {10**12} --device cpu"
    with pytest.raises(SystemExit, match=r"nope at T=10{12} cannot be measured: .*memory") as error:
        run(monkeypatch, arguments)
    assert "\n" not in str(error.value)
    assert not capfd.readouterr().err  # of the process that measures a peak, too


def test_an_option_needs_a_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--names moh --options shared")
    assert "expected KEY=VALUE; got 'shared'" in capsys.readouterr().err
