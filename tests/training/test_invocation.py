"""How the trainer was started is how it says that it is started again."""

import sys

import pytest

from posenc.training.cli import parse
from posenc.training.invocation import command, torchrun_target
from posenc.training.parallel import connect


@pytest.mark.parametrize(
    ("started", "program", "again", "target"),
    [
        ("/clone/train.py", "train.py", "python train.py --resume 'a b'", "train.py"),
        ("/bin/posenc", "posenc train", "posenc train --resume 'a b'", "-m posenc train"),
        ("posenc/__main__.py", "posenc train", "posenc train --resume 'a b'", "-m posenc train"),
    ],
)
def test_it_is_named_as_it_was_started(
    started: str,
    program: str,
    again: str,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.delenv("RANK", raising=False)
    assert command("--resume", "a b") == again
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: {program} ")
    with pytest.raises(ValueError, match=f"torchrun --nproc-per-node N {torchrun_target()} --par"):
        connect("ddp", "cpu").__enter__()
    assert torchrun_target() == target
