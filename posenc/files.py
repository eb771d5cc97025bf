"""Files that appear whole or not at all, whatever fails or is killed while they are written."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def beside(path: Path) -> Path:
    """An unused hidden name in the same folder: a rename within one disk is atomic."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path`, or vanishes on any error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # a new file's; what is written may be made private instead
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:  # a name must not reach the disk before its content
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
