"""Where text comes from: one string names a source, `documents` reads it.

| source | meaning |
|---|---|
| `stdlib` | the Python standard library's own sources (standard_library.py) |
| a file or glob of .txt .md | one file is one document |
| a file or glob of .jsonl .parquet | one row is one document, in the column `text` |
| `hf:REPO[:CONFIG]` | a dataset of the Hugging Face Hub, streamed (hub.py) |
| a file or glob of .bin .npy | token shards (shards.py) |

How files become text is in readers.py.
"""

import difflib
import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from posenc.data.files import sha256_file, sha256_json
from posenc.data.hub import HUB_PREFIX, HubStream
from posenc.data.readers import READERS, read_documents
from posenc.data.standard_library import standard_library

_TOKEN_SUFFIXES = (".bin", ".npy")
_SUFFIXES = (*READERS, *_TOKEN_SUFFIXES)


@dataclass(frozen=True)
class Documents:
    """A finite text source: an iterable of non-empty strings that can be read again and again.

    Attributes:
        source: the name that the user gave.
        fingerprint: sha256 that changes when the text does.
        read: opens the source anew.
        note: reads it, and says what the user should know of how it was split; "" for nothing.
    """

    source: str
    fingerprint: str
    read: Callable[[], Iterator[str]]
    note: Callable[[], str] = lambda: ""

    def __iter__(self) -> Iterator[str]:
        return self.read()


def documents(source: str) -> Documents | HubStream:
    """Return the documents of a text source; iterate over the result to get strings.

    Finite sources give `Documents`, which can be read again; `hf:` gives a `HubStream`, which has a
    position. `stdlib` gives its training split. Empty documents are skipped.

    Raises:
        ValueError: the source is unknown, or holds tokens; while reading, a file is damaged, not
            UTF-8, or without a column `text` of strings.
    """
    kind = source_kind(source)
    if kind == "hub":
        return HubStream(source)
    if kind == "stdlib":
        return standard_library_documents("train")
    if kind == "tokens":
        raise ValueError(f"expected text; {source!r} holds tokens. Choose {' '.join(READERS)}.")
    files = source_files(source)
    fingerprint = sha256_json([(file.suffix.lower(), sha256_file(file)) for file in files])
    return Documents(source, fingerprint, lambda: chain.from_iterable(map(read_documents, files)))


def standard_library_documents(split: Literal["train", "validation"]) -> Documents:
    """Return one split of `stdlib`."""
    library = standard_library(split)
    return Documents("stdlib", library.fingerprint, lambda: iter(library.texts))


def source_kind(source: str) -> Literal["stdlib", "hub", "text", "tokens"]:
    """Say what a source string names, without reading it.

    Raises:
        ValueError: nothing: see `source_files`, or an unknown suffix.
    """
    if source == "stdlib":
        return "stdlib"
    if source.startswith(HUB_PREFIX):
        return "hub"
    suffixes = {file.suffix.lower() for file in source_files(source)}
    if suffixes <= set(READERS):
        return "text"
    if suffixes <= set(_TOKEN_SUFFIXES):
        return "tokens"
    found = " ".join(sorted(suffix or "(none)" for suffix in suffixes))
    raise ValueError(
        f"data files must all be text ({' '.join(READERS)}) or all be token shards "
        f"({' '.join(_TOKEN_SUFFIXES)}); {source!r} has {found}. Narrow the glob or rename files."
    )


def source_files(source: str) -> list[Path]:
    """Return the files that a path or glob names (`**` descends into folders), sorted.

    Raises:
        ValueError: no such file, a folder, a glob without a match, or only empty files.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise ValueError(
            f"data {source!r} is a folder; expected a file or a glob. Choose for example "
            f"'{source.rstrip('/')}/*.txt'."
        )
    if path.is_file():
        files = [path]
    elif glob.has_magic(source):
        found = map(Path, sorted(glob.glob(str(path), recursive=True)))
        files = [file for file in found if file.is_file()]
        if not files:
            raise ValueError(f"data glob {source!r} matches no file. Check it, and quote it.")
    else:
        raise ValueError(f"data {source!r} is no file and no known source. {_hint(source, path)}")
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"data {source!r} is empty; expected text or tokens. Choose another file.")
    return files


def _hint(source: str, path: Path) -> str:
    """Return the nearest thing that the user may have meant."""
    names = {"stdlib": "stdlib"}
    if path.parent.is_dir():
        near = (file for file in path.parent.iterdir() if file.suffix.lower() in _SUFFIXES)
        names |= {file.name: str(file) for file in near}
    for name in difflib.get_close_matches(path.name, names, n=1):
        return f"Did you mean {names[name]!r}?"
    if source.count("/") == 1 and path.suffix.lower() not in _SUFFIXES:
        return f"For a dataset of the Hugging Face Hub write '{HUB_PREFIX}{source}'."
    return f"Choose stdlib, {HUB_PREFIX}REPO[:CONFIG], or files {' '.join(_SUFFIXES)}."
