"""The kernel benchmark runs whole: every provider passes its gate and leaves its rows."""

import pytest
import torch

from bench import kernels, measure
from bench.rows import read

LAYERS = ("mha", "rope", "carope", "cmha", "rmha", "mdha", "rcmha", "moh")


def test_every_provider_has_a_row(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows" / "kernels.jsonl"
    monkeypatch.setattr("sys.argv", ["kernels", "--shapes", "1,4,9,16", "--out", str(path)])
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
        "relative + attention",
        *(f"{name} layer" for name in LAYERS),
    }
    for row in timed:
        assert (row["B"], row["H"], row["T"], row["D"]) == (1, 4, 9, 16)
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["error_vs_fp64"] < 1e-2
        assert row["torch"] == torch.__version__


def test_gate_refuses_what_is_wrong(device):
    case = next(kernels.cases((1, 2, 9, 16), torch.float32, device))
    gate = measure.Gate(case)
    gate.check(case.definition)
    for wrong in (
        lambda q, k, v: case.definition(q, k, v) * 1.001,  # the output
        lambda q, k, v: case.definition(q, k.detach(), v) + 0 * k.sum(),  # a gradient
    ):
        with pytest.raises(ValueError, match="is off by"):
            gate.check(wrong)
