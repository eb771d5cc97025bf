"""The command `posenc`: what it dispatches to, what it refuses, and how it ends."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import posenc
from posenc.commands import dispatch
from posenc.commands.dispatch import COMMANDS, main
from training_runs import ROOT, flags, write_text

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def python(code: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """A new interpreter, in a folder that is not the clone's."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def run(*words: str, cwd: Path) -> str:
    """What `python -m posenc` prints."""
    command = [sys.executable, "-m", "posenc", *words]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^  (\w+) ", shown, re.MULTILINE) == list(COMMANDS)
    assert all(command.summary in shown for command in COMMANDS.values())
    assert main([]) == 2
    assert capsys.readouterr().out == shown
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == posenc.__version__ + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nmaes"], "unknown command: 'nmaes'. Did you mean 'names'?"),
        (["bench", "memroy"], "unknown benchmark: 'memroy'. Did you mean 'memory'?"),
        (["--completion", "bsh"], "unknown shell: 'bsh'. Did you mean 'bash'?"),
        (["--completion"], "unknown shell: ''. Known: bash, zsh, fish."),
        (["train", "--atention", "rope"], "unknown flag: '--atention'. Did you mean '--attention'"),
    ],
)
def test_what_is_unknown_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) != 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {message}")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("name", ["train", "--completion"])
def test_a_missing_extra_is_named(name: str, tmp_path: Path) -> None:
    done = python(
        "import sys; from posenc.commands.dispatch import main; sys.modules['tyro'] = None\n"
        f"sys.exit(main([{name!r}, 'bash']))",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"error: posenc {name} needs tyro, which is not installed. pip install 'posenc[train]'\n"
    )


def test_no_extra_is_named_for_what_none_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(words: object) -> int:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    module = type("Module", (), {"main": staticmethod(lacking)})
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    with pytest.raises(ModuleNotFoundError, match="triton"):
        main(["bench", "predict"])


def test_a_missing_module_of_ours_is_our_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "names", dispatch.Command("posenc.nowhere", "", "train"))
    with pytest.raises(ModuleNotFoundError, match=r"posenc\.nowhere"):
        main(["names"])


def test_names_and_doctor_load_nothing_of_the_extras(tmp_path: Path) -> None:
    done = python(
        "import sys; from posenc.commands.dispatch import main; main(['names'])\n"
        "import posenc.commands.doctor\n"
        "heavy = {'tyro', 'datasets', 'transformers', 'matplotlib', 'tokenizers', 'triton'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_is_no_error(tmp_path: Path) -> None:
    code = (
        "import sys; from posenc.commands import names; from posenc.commands.dispatch import main\n"
        "names.rows = lambda: [('x' * 99,) * 5] * 2000\n"  # more than a pipe holds
        "sys.exit(main(['names']))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_completion_knows_the_commands_and_every_flag(tmp_path: Path) -> None:
    script = run("--completion", "bash", cwd=tmp_path)
    (tmp_path / "posenc.bash").write_text(script)
    ask = (
        ". ./posenc.bash; COMP_WORDS=(posenc {}); COMP_CWORD={}; "
        "_tyro_posenc; echo ${{COMPREPLY[@]}}"
    )
    for words, at, expected in (("d", 1, "doctor"), ("train --data-s", 2, "--data-seed")):
        done = subprocess.run(
            ["bash", "-c", ask.format(words, at)],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == expected


def test_train_is_train_py(tmp_path: Path) -> None:
    """One file, under two names; each says how it was started."""
    inside = ROOT / "posenc/training/main.py"
    if (ROOT / ".git").exists():
        assert inside.readlink() == Path("../../train.py")
    assert inside.read_bytes() == (ROOT / "train.py").read_bytes()
    write_text(tmp_path / "text.txt")
    run("train", *flags(tmp_path, steps=1), cwd=tmp_path)
    assert (tmp_path / "run/summary.json").exists()
    assert '"command": "posenc train --data' in (tmp_path / "run/environment.json").read_text()
