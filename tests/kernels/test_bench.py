"""The kernel benchmark runs whole: every provider passes its gate and leaves its rows."""

import pytest
import torch

from bench import kernels, measure
from bench.rows import read
from posenc.kernels.common import INTERPRETED

LAYERS = ("mha", "rope", "carope", "cmha", "rmha", "mdha", "rcmha", "moh")


def test_every_provider_has_a_row(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows" / "kernels.jsonl"
    monkeypatch.setattr("sys.argv", ["kernels", "--shapes", "1,4,9,16", "--out", str(path)])
    monkeypatch.setattr(measure, "ROUNDS", 1)
    kernels.main()
    printed = capsys.readouterr().out
    assert "no row of" not in printed or torch.cuda.is_available()
    assert "CMHA over its direct form" in printed
    rows = read(path)
    timed = [row for row in rows if row["metric"] == "time"]
    assert {row["name"] for row in timed} == {
        "flash",
        *(name + end for name in ("rope", "carope", "polar") for end in ("", " + attention")),
        "conv",
        "conv per head",
        "rates",
        "relative + attention",
        "decay + attention",
        "table + attention",
        "decode",
        "decode grouped",
        *(f"{name} layer" for name in LAYERS),
    }
    for row in timed:
        queries = (1, 9) if row["name"].startswith("decode") else (9, None)
        assert (row["B"], row["H"], row["T"], row["S"], row["D"]) == (1, 4, *queries, 16)
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["error_vs_fp64"] < 1e-2
        assert row["torch"] == torch.__version__


@pytest.mark.parametrize("shape", ["1,4,9", "1,4,9,sixteen", "1,0,9,16", "1,4,9,15"])
def test_a_wrong_shape_is_named_before_any_measurement(shape, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kernels", "--shapes", shape])
    with pytest.raises(SystemExit) as stopped:
        kernels.main()
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert f"expected S1, S2, S3 or B,H,T,D, all positive, D even; got '{shape}'" in told.err
    assert not told.out


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels take bfloat16")
def test_bfloat16_in_the_interpreter_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kernels", "--shapes", "1,4,9,16", "--dtype", "bfloat16"])
    with pytest.raises(SystemExit, match=r"computes bfloat16 wrongly\. Use --dtype float32"):
        kernels.main()
    assert not capsys.readouterr().out


def test_gate_refuses_what_is_wrong(device):
    case = next(kernels.cases((1, 2, 9, 16), torch.float32, device))
    gate = measure.Gate(case)
    gate.check(case.definition)
    for wrong in (
        lambda q, k, v: case.definition(q, k, v) * 1.001,  # the output
        lambda q, k, v: case.definition(q, k.detach(), v) + 0 * k.sum(),  # a gradient
        lambda *x: case.definition(*x) * (1 if torch.is_grad_enabled() else 1.001),  # inferred
    ):
        with pytest.raises(ValueError, match="is off by"):
            gate.check(wrong)


def test_gate_of_a_case_without_gradients(device):
    case = next(kernels.decoding((2, 4, 9, 16), torch.float32, device))
    gate = measure.Gate(case)
    assert set(measure.modes(case.definition, case.inputs)) == {"fwd"}
    gate.check(case.definition)
    with pytest.raises(ValueError, match="is off by"):
        gate.check(lambda q, k, v: case.definition(q, k, v) * 1.001)
