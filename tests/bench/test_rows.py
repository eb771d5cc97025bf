"""Rows: what is committed is valid, what is no row is refused by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.rows import Row, RowFile, read

RESULTS = Path(__file__).parents[2] / "bench" / "results"
FILES = sorted(RESULTS.rglob("*.jsonl"))


def a_row(**changes: Any) -> Row:
    about = {"kind": "layer", "name": "rope", "implementation": "auto", "mode": "fwd"}
    about |= {"metric": "time", "unit": "ms", "dtype": "float32"}
    return Row(**about | {"p20": 1.0, "p50": 2.0, "p80": 3.0} | changes)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RESULTS)))
def test_committed_files_are_valid(path: Path) -> None:
    rows = read(path)
    assert rows
    assert not [row for row in rows if row["dirty"]], "measured with uncommitted changes"


def test_there_are_committed_files() -> None:
    assert FILES


def test_a_row_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    file = RowFile(path, torch.device("cpu"))
    written = [file.add(a_row()), file.add(a_row(T=9, seed=2))]
    assert read(path) == written
    assert written[1]["torch"] == torch.__version__
    RowFile(path, torch.device("cpu")).add(a_row(T=17))
    assert read(path)[:2] == written


def test_rows_are_not_appended_to_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine\n")
    with pytest.raises(ValueError, match=r"notes.txt:1 is no row of measurements"):
        RowFile(path, torch.device("cpu"))
    assert path.read_text() == "mine\n"


def test_a_file_that_cannot_be_written_is_refused_before_the_first_row(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        RowFile(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p50": "2"}, "p50 is '2'"),
        ({"T": 1.5}, "T is 1.5"),
        ({"T": True}, "T is True"),
        ({"p50": 9.0}, "do not rise"),
        ({"p80": float("nan")}, "do not rise"),
        ({"extra": 1}, r"missing \[\], unknown \['extra'\]"),
        ({"unit": None}, "unit is None"),
    ],
)
def test_what_is_no_row_is_named_by_file_and_line(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    good = RowFile(path, torch.device("cpu")).add(a_row())
    with path.open("a") as file:
        file.write(json.dumps(good | change) + "\n")
    with pytest.raises(ValueError, match=rf"rows.jsonl:2 is no row of measurements: .*{message}"):
        read(path)


@pytest.mark.parametrize("line", ["", "[]", "{", "{}", "what?"])
def test_foreign_files_are_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"other.jsonl:1 is no row"):
        read(path)
