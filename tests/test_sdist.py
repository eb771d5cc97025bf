"""The sdist is the repository: what its tests need is in it."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"


def tracked() -> set[str]:
    """The files under version control, as they are now."""
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_the_sdist_holds_every_file(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("an unpacked sdist has no list of its files")
    names = tracked()
    source, out = tmp_path / "source", tmp_path / "out"
    for name in names:  # a copy: building leaves files behind
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    out.mkdir()
    subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, check=True
    )
    (archive,) = out.iterdir()
    with tarfile.open(archive) as file:
        found = {member.partition("/")[2] for member in file.getnames()}
    # The link to the kernels is the folder itself there.
    expected = {f"posenc/{name}" if name.startswith("kernels/") else name for name in names}
    assert expected - found == set()
