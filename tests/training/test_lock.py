"""One process at a time in a folder, and folders that two runs never share."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posenc.training import lock
from posenc.training.cli import parse
from posenc.training.lock import LOCK, hold
from posenc.training.run_folder import RunFolder, claimed
from training_runs import ROOT

#: Holds the folder of its argument until it is told to go on; without torch, which takes seconds.
HOLDER = f"""
import runpy, sys
from pathlib import Path
hold = runpy.run_path({str(ROOT / "posenc/training/lock.py")!r})["hold"]
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_process_is_refused_and_told_of_the_first(tmp_path, holder):
    with pytest.raises(ValueError, match="is in use by process") as refusal, hold(tmp_path):
        pass
    assert f"{tmp_path} is in use by process {holder.pid} on " in str(refusal.value)
    assert f" since {time.strftime('%Y-')}" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    holder.communicate("")
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path):
        pass


def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with hold(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()} "), hold(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_note_refuses_nobody_and_hides_nothing(tmp_path):
    (tmp_path / LOCK).write_bytes(b"\xff\n" * 2000)
    with hold(tmp_path):
        (tmp_path / LOCK).write_bytes(b"")
        with pytest.raises(ValueError, match="is in use by another process"), hold(tmp_path):
            pass


def test_a_lock_file_that_its_holder_just_deleted_is_not_the_lock(tmp_path, monkeypatch):
    """Between opening and locking: who locked a deleted file would not keep the next one out."""
    original, lost = lock._try_lock, []

    def late(descriptor, path):
        if not lost:
            path.unlink()
            lost.append(path)
        return original(descriptor, path)

    monkeypatch.setattr(lock, "_try_lock", late)
    with hold(tmp_path), pytest.raises(ValueError, match="in use"), hold(tmp_path):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="fcntl")
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match=r"cannot be locked \(.*not supported\)"), hold(tmp_path):
        pass


def test_runs_started_together_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-120000")
    with claimed(parse([])) as one, claimed(parse([])) as two:
        RunFolder(two).write_config(parse([]))
        with claimed(parse([])) as three:
            names = [path.name for path in (one, two, three)]
            assert names == [f"rope-20260101-120000{end}" for end in ("", "-2", "-3")]
            assert {path.parent for path in (one, two, three)} == {Path("runs")}
            assert all(path.is_dir() for path in (one, two, three))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [two.name]
    assert [path.name for path in two.iterdir()] == ["config.json"]


def test_a_folder_that_no_run_began_in_is_not_left_behind(tmp_path):
    config = dataclasses.replace(parse([]), out=str(tmp_path / "above/new"))

    def fill(path):
        (path / "checkpoints").mkdir()
        (path / "metrics.jsonl").touch()
        raise OSError("full")

    with pytest.raises(OSError, match="full"), claimed(config) as path:
        fill(path)
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "above/new").mkdir(parents=True)  # the user's own
    (tmp_path / "above/new/notes.txt").touch()
    with pytest.raises(OSError, match="full"), claimed(config):
        raise OSError("full")
    assert [path.name for path in (tmp_path / "above/new").iterdir()] == ["notes.txt"]
    shutil.rmtree(tmp_path / "above")
    with claimed(config) as path:
        RunFolder(path).write_config(config)
    assert [path.name for path in path.iterdir()] == ["config.json"]


def test_two_runs_into_one_new_folder(tmp_path):
    config = dataclasses.replace(parse([]), out=str(tmp_path / "new"))
    with (
        claimed(config) as path,
        pytest.raises(ValueError, match="new is in use by process"),
        claimed(config),
    ):
        pass
    with claimed(config) as path:
        RunFolder(path).write_config(config)
    with pytest.raises(ValueError, match="already holds a run"), claimed(config):
        pass
