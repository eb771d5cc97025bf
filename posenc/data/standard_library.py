"""Text that every machine has: the sources of Python's own standard library.

Files are taken in the order of the sha256 of their relative path, which mixes the packages evenly
and does not depend on the file system. About one file in ten, again by that hash, is validation
text, so a file keeps its side when another Python version adds or drops others. Training text stops
at TRAIN_BYTES: with a BPE of 4096 symbols that is about 2.2 million tokens, and takes seconds.

Left out: installed packages, tests, generated tables (`encodings`), `lib2to3` (gone in Python
3.13), and build records that hold paths of the machine that compiled Python.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

TRAIN_BYTES = 8_000_000
_ONE_IN = 10
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_SKIPPED |= {"lib2to3", "encodings"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class StandardLibrary:
    """One split of the standard library's sources, in memory (about 8 MB at most).

    Attributes:
        paths: the files, relative to the library's folder, in the order of the text.
        texts: their text.
        fingerprint: sha256 over (relative path, bytes) of every file.
    """

    paths: tuple[str, ...]
    texts: tuple[str, ...]
    fingerprint: str


@lru_cache(maxsize=4)
def standard_library(
    split: Literal["train", "validation"], folder: Path | None = None
) -> StandardLibrary:
    """Read one split of the standard library's sources.

    Args:
        split: "train" (TRAIN_BYTES, rounded up to a whole file) or "validation".
        folder: where the sources lie; None asks this Python.

    Raises:
        ValueError: there are none (some embedded Pythons ship bytecode only).
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    paths, texts, digest, total = [], [], hashlib.sha256(), 0
    for path in sorted(_source_paths(folder), key=_path_hash):
        if is_validation(path) != (split == "validation"):
            continue
        if split == "train" and total >= TRAIN_BYTES:
            break
        raw = (folder / path).read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue  # a few sources declare another encoding on purpose
        if not text:
            continue  # an empty __init__.py
        digest.update(f"{path}\0{len(raw)}\0".encode())
        digest.update(raw)
        paths.append(path)
        texts.append(text)
        total += len(raw)
    if not texts:
        raise ValueError(
            "data 'stdlib' needs the .py sources of Python's standard library; found none in "
            f"{folder}. Choose --data FILE."
        )
    return StandardLibrary(tuple(paths), tuple(texts), digest.hexdigest())


def is_validation(path: str) -> bool:
    """Say whether a file, relative to the library and with forward slashes, is validation text."""
    return int.from_bytes(_path_hash(path)[:8], "big") % _ONE_IN == 0


def _path_hash(path: str) -> bytes:
    return hashlib.sha256(path.encode()).digest()


def _source_paths(folder: Path) -> Iterator[str]:
    """Yield the .py files below a folder, as relative paths with forward slashes."""
    for parent, folders, files in os.walk(folder):
        folders[:] = filter(_is_wanted, folders)  # in place: the walk skips the others
        for file in filter(_is_wanted, files):
            if file.endswith(".py"):
                yield Path(parent, file).relative_to(folder).as_posix()


def _is_wanted(name: str) -> bool:
    return name not in _SKIPPED and not name.startswith(_SKIPPED_PREFIXES)
