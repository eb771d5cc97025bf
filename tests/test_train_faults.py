"""Kills and full disks, from outside: the process dies, the run folder must not."""

import random
import resource
import signal
import subprocess
import time

import pytest

from posenc.training import checkpoint as checkpoints
from training_runs import finished, flags, losses, resumed, run, start, train, write_text

KILLS = 4


@pytest.fixture
def folder(tmp_path):
    write_text(tmp_path / "text.txt")
    return tmp_path


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
