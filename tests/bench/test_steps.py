"""bench.steps: gates, rows, and what it refuses."""

import pytest
import torch

from bench import steps

SMALL = ["--layers", "2", "--embed-dim", "16", "--heads", "2", "--past", "7", "--rounds", "1"]


def test_a_step_is_timed_beside_its_rotations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "SECONDS", 0.0)
    steps.main(["--names", "rope", "carope", "--no-compile", *SMALL])
    out = capsys.readouterr().out
    for label in ("rope        eager", "rope        rotations", "carope      eager"):
        assert label in out
    assert "carope      rotations" not in out  # they turn by what the tokens say


def test_a_compiled_step_is_that_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "compiled_step", lambda device: steps_of_python)
    args = steps.parse(["--no-peers", *SMALL])
    monkeypatch.setattr(steps, "SECONDS", 0.0)
    rows = list(steps.measure("rope", args))
    assert [row.implementation for row in rows] == ["eager", "compiled", "rotations"]


def steps_of_python(model: object, token: torch.Tensor, memory: object) -> torch.Tensor:
    from posenc.models.gpt import step

    return step(model, token, memory)


def test_a_step_that_is_off_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "SECONDS", 0.0)
    monkeypatch.setattr(steps, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="refused"):
        steps.main(["--names", "nope", "--no-compile", *SMALL])
    assert "no row of nope, eager: off by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--names", "ropes"], "Did you mean 'rope'"),
        (["--past", "0"], "past"),
        (["--heads", "3", "--embed-dim", "16"], "heads"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as refusal:
        steps.main(arguments)
    assert "\n" not in str(refusal.value)
