"""Kills and full disks, from outside: the process dies, the run folder must not."""

import io
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from posenc.training import checkpoint as checkpoints
from training_runs import finished, flags, losses, resumed, run, start, train

KILLS = 4


def wait_until(condition, process: "subprocess.Popen[str]") -> None:
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("it did not happen within a minute")


@pytest.mark.slow
def test_killed_at_random_moments_it_resumes_to_the_same_end(folder):
    """A checkpoint every step, so that most kills meet one being written."""
    changes = {"embed_dim": 64, "layers": 4, "heads": 4, "save_every": 1, "steps": 100_000}
    generator = random.Random(1)
    argv = flags(folder, **changes)
    for _ in range(KILLS):
        before = checkpoints.latest(folder / "run/checkpoints")
        process = start(argv)
        wait_until(lambda b=before: checkpoints.latest(folder / "run/checkpoints") != b, process)
        time.sleep(generator.uniform(0, 0.3))
        process.kill()
        process.communicate()
        whole = checkpoints.latest(folder / "run/checkpoints")
        checkpoints.read_state(whole)
        # At most the step that was being saved is lost.
        assert len(losses(folder)) - int(whole.name[-8:]) in (0, 1)
        argv = resumed(folder)
    reached = int(whole.name[-8:]) + 2
    before = losses(folder)[: reached - 2]
    assert train.main([*argv, "--steps", str(reached), "--save-every", "0"]) == 0
    assert losses(folder)[: reached - 2] == before
    assert not list((folder / "run/checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_its_exit_code(folder, number):
    process = start(flags(folder, steps=100_000))
    metrics = folder / "run/metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, process)
    process.send_signal(number)
    out, err = finished(process, code=128 + number)
    assert f"python train.py --resume {folder / 'run'}" in out
    assert "Traceback" not in err
    assert int(checkpoints.latest(folder / "run/checkpoints").name[-8:]) == len(losses(folder))


def test_a_disk_that_fills_up_is_one_line_and_keeps_the_last_checkpoint(folder):
    """A limit on the size of files, as the kernel enforces it, stands in for a full disk."""
    run(flags(folder, steps=2))
    before = checkpoints.latest(folder / "run/checkpoints")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    process = start([*resumed(folder), "--steps", "4"], preexec_fn=limit)
    _, err = finished(process, code=1)
    assert err.splitlines()[-1].startswith("error: File too large. Checkpoint at step 2: ")
    assert "Traceback" not in err
    assert list((folder / "run/checkpoints").iterdir()) == [before]
    assert train.main([*resumed(folder), "--steps", "4"]) == 0
    assert len(losses(folder)) == 4


def test_a_disk_that_fills_up_at_the_export_is_one_line_that_says_how_to_resume(
    folder, monkeypatch, capsys
):
    def full(*_: object) -> None:
        raise train.SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(train.GPT, "save_pretrained", full)
    assert train.main(flags(folder, steps=2)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: Error while serializing: No space left on device Checkpoint at")
    assert f"--resume {folder / 'run'}" in last


def test_a_signal_during_an_evaluation_is_answered_between_its_batches(folder, monkeypatch):
    """Asked for after the first batch of the first evaluation, with what is due saved before."""
    asked = []

    def received(self) -> int:
        asked.append(len(losses(folder)))
        return signal.SIGTERM if len(asked) > 6 else 0

    monkeypatch.setattr(
        train.StopSignals, "received", property(received, lambda self, value: None), raising=False
    )
    code = train.main(flags(folder, steps=50, eval_every=2, save_every=2, eval_tokens=0))
    assert code == 128 + signal.SIGTERM
    newest = checkpoints.latest(folder / "run/checkpoints")
    assert int(newest.name[-8:]) == len(losses(folder)) == 2
    monkeypatch.undo()
    assert train.main([*resumed(folder), "--steps", "3", "--eval-tokens", "64"]) == 0


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_of_another_encoding_ends_no_run(folder, encoding, monkeypatch):
    text = "\N{SNOWMAN}\N{GREEK SMALL LETTER OMEGA} " * 4000
    (folder / "text.txt").write_text(text, encoding="utf-8")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
    assert train.main(flags(folder, steps=2, sample_tokens=20)) == 0
    sys.stdout.flush()
    assert b"\\u" in printed.getvalue()
    assert (folder / "run/summary.json").is_file()


def test_a_reader_that_has_gone_stops_nothing(folder):
    process = start(flags(folder, steps=3, sample_tokens=5))
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert (folder / "run/summary.json").is_file()
    assert "Error" not in process.stderr.read()
    process.stderr.close()


def test_large_seeds_work_and_larger_ones_are_refused(folder, capsys):
    assert train.main(flags(folder, steps=1, seed=20261127163647)) == 0
    assert train.main(flags(folder, steps=1, seed=2**63, out=folder / "other")) == 2
    assert "--seed must lie in 0 .. 2^63 - 1" in capsys.readouterr().err


def test_compilation_without_a_compiler_is_one_line_and_leaves_no_folder(
    folder, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    assert train.main([*flags(folder, steps=1), "--compile"]) == 2
    assert "--compile needs a C++ compiler" in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "run").exists()
