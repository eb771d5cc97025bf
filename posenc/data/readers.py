"""Text files to documents.

Only the column `text` is read, and nothing guesses what it holds: strings are strings, whatever
they look like, and anything else is refused where it stands. Each file is read by itself, so what
one holds says nothing about another; all but .txt and .md may be larger than memory.
"""

import json
import shlex
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posenc.data.hub import check_text_column, text_of

_ROWS = 256  # of a parquet file in memory at once: books of 1 MB take 256 MB


def read_documents(file: Path) -> Iterator[str]:
    """Yield the non-empty documents of a file of one of the READERS, in order.

    Raises:
        ValueError: it is damaged, not UTF-8, or without a column `text` of strings.
    """
    return filter(None, READERS[file.suffix.lower()](file))


def _read_text(file: Path) -> Iterator[str]:
    """Yield the whole file; all line ends become "\\n"."""
    try:
        yield file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, str(file), error) from error


def _read_jsonl(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            if line.isspace():
                continue
            try:
                row = json.loads(line.rstrip(b"\r\n").decode(), object_pairs_hook=_unambiguous)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, where, error) from error
            except (ValueError, RecursionError) as error:
                at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                raise ValueError(
                    f"expected .jsonl rows in {where}; reading it failed: "
                    f"{getattr(error, 'msg', error)}{at}. Write one JSON object a line."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"expected a JSON object in {where}; got {type(row).__name__}. "
                    'Write {"text": ...}, one a line.'
                )
            text = text_of(row, where)
            try:
                text.encode()  # an escape, "\\ud800", can spell half a character
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"expected Unicode text in {where}; got {text[error.start]!r}, half of a "
                    "surrogate pair. Write the whole character, or leave it out."
                ) from error
            yield text


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object that has at most one text: of two, Python would drop the first."""
    if [key for key, _ in pairs].count("text") > 1:
        raise ValueError("'text' is there twice")
    return dict(pairs)


def _read_parquet(file: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            check_text_column(schema.names, str(file))
            kind = schema.field("text").type
            if not _is_text(kind):
                raise ValueError(
                    f"expected strings in the column 'text' of {file}; got {kind}. Convert them."
                )
            for batch in table.iter_batches(_ROWS, columns=["text"]):
                yield from batch.column("text").to_pylist()
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(
            f"expected .parquet rows in {file}; reading it failed: {error}. Replace the file."
        ) from error


def _is_text(kind: Any) -> bool:
    """Say whether a column of this type of pyarrow holds strings, or nothing but nulls."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    strings = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(is_one(kind) for is_one in strings)


def _not_utf8(file: Path, where: str, error: UnicodeDecodeError) -> ValueError:
    """Return the error that says how to convert a file."""
    utf16 = error.object.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
    encoding = "UTF-16" if utf16 else "CP1252"
    hint = "" if utf16 else ", with the encoding that it has after -f"
    return ValueError(
        f"expected UTF-8 text in {where}; got the byte 0x{error.object[error.start]:02x} at "
        f"position {error.start}. Convert it: iconv -f {encoding} -t UTF-8 "
        f"{shlex.quote(str(file))} > NEW{hint}."
    )


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
