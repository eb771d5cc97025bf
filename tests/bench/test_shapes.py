"""bench.shapes: gates, rows, and what it refuses."""

import pytest

from bench import shapes

SMALL = ["--length", "24", "--documents", "3", "--window", "5", "--batch", "1", "--rounds", "1",
         "--embed-dim", "24"]  # fmt: skip


def test_every_case_is_measured_beside_its_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shapes, "SECONDS", 0.0)
    shapes.main(["--names", "rope", "rcmha", *SMALL])
    lines = capsys.readouterr().out.splitlines()
    for label in ("x apart", "x whole", "x equal", "x grouped"):
        assert sum(line.endswith(label) for line in lines) >= 2, label


def test_a_layer_that_is_off_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shapes, "SECONDS", 0.0)
    monkeypatch.setattr(shapes, "off", lambda y, expected: 1.0)
    with pytest.raises(SystemExit, match="refused"):
        shapes.main(["--names", "nope", "--cases", "packed", *SMALL])
    assert "nope: no row of packed: off by 1.0e+00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--names", "ropes"], "Did you mean 'rope'"),
        (["--length", "25", "--documents", "3"], "multiple of --documents=3; got 25"),
        (["--window", "0"], "window"),
        (["--heads", "3", "--embed-dim", "24"], "must be even"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as refusal:
        shapes.main(arguments)
    assert "\n" not in str(refusal.value)
