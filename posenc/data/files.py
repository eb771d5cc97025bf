"""Folders that appear whole or not at all, and a cache made of them.

Several processes may prepare the same corpus at once (the ranks of one run, two runs side by side),
and any of them may be killed. So nothing is written under its final name: it is written beside it
and renamed. Whoever renames first wins; the others find a good folder and drop their own.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posenc.files import beside

_CHUNK = 1 << 20
_META = "meta.json"


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(*values: Any) -> str:
    """Return the sha256 of plain values (strings, numbers, lists, dicts), in hex."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def cached_folder(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return the description of a cached folder, building it first where missing or damaged.

    Args:
        folder: where the finished folder lies; its name must identify its content.
        build: writes files into the empty folder it is given, and returns a description that JSON
            can hold.

    Raises:
        OSError: the folder cannot be written.
        Exception: whatever `build` raises; the cache is then as it was before.
    """
    description = _description(folder)
    if description is not None:
        return description
    temporary = beside(folder)
    temporary.mkdir(parents=True)
    try:
        description = build(temporary)
        files = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
        meta = json.dumps({"description": description, "files": files}, indent=1)
        (temporary / _META).write_text(meta, encoding="utf-8")
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return description


def _description(folder: Path) -> dict[str, Any] | None:
    """Return a cached folder's description, or None where it is missing, incomplete or damaged."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        if all(sha256_file(folder / name) == digest for name, digest in meta["files"].items()):
            return dict(meta["description"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # whatever is wrong with it, it is built again
    return None


def _publish(temporary: Path, folder: Path) -> None:
    """Give a finished folder its final name, unless another process put a good one there first."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
        if _description(folder) is None:
            damaged = beside(folder)
            os.rename(folder, damaged)
            os.rename(temporary, folder)
            shutil.rmtree(damaged, ignore_errors=True)
