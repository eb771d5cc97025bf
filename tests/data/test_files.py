import json
import threading

import pytest

from posenc.data.files import cached_folder
from posenc.files import atomic_file


def write(folder, text="content"):
    (folder / "file.txt").write_text(text)
    return {"length": len(text)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_file_appears_whole(tmp_path):
    with atomic_file(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("x")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert (tmp_path / "new" / "a.txt").read_text() == "x"
    assert names(tmp_path / "new") == ["a.txt"]


def test_atomic_file_keeps_the_old_file_on_failure(tmp_path):
    (tmp_path / "a.txt").write_text("old")

    def interrupted():
        with atomic_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_cached_folder_builds_once(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        return write(folder)

    for _ in range(3):
        assert cached_folder(tmp_path / "c", build) == {"length": 7}
    assert len(calls) == 1
    assert names(tmp_path) == ["c"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "file.txt").write_text("Content"),
        lambda folder: (folder / "file.txt").write_text("conten"),
        lambda folder: (folder / "file.txt").unlink(),
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: (folder / "meta.json").write_text("{"),
        lambda folder: (folder / "meta.json").write_text("[]"),
        lambda folder: (folder / "meta.json").write_text(json.dumps({"files": {}})),
    ],
)
def test_damage_is_noticed_and_mended(tmp_path, damage):
    folder = tmp_path / "c"
    cached_folder(folder, write)
    damage(folder)
    assert cached_folder(folder, write) == {"length": 7}
    assert (folder / "file.txt").read_text() == "content"
    assert names(tmp_path) == ["c"]


def test_failure_leaves_nothing_behind(tmp_path):
    def build(folder):
        write(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_folder(tmp_path / "c", build)
    assert names(tmp_path) == []


def test_concurrent_builders_agree(tmp_path):
    barrier = threading.Barrier(4)
    results = []

    def build(folder):
        description = write(folder)
        barrier.wait(timeout=10)  # all four are building before any of them is done
        return description

    def work():
        results.append(cached_folder(tmp_path / "c", build))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{"length": 7}] * 4
    assert names(tmp_path) == ["c"]
    assert names(tmp_path / "c") == ["file.txt", "meta.json"]


def test_an_unwritable_place_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        cached_folder(tmp_path / "file" / "c", write)
