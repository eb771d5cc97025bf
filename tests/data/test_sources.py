import datetime
import json
import os
import shlex
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posenc.data import HubStream, documents, split_documents
from posenc.data import standard_library as library_module
from posenc.data.sources import source_files, source_kind
from posenc.data.standard_library import is_validation, standard_library


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# Files


def test_one_text_file_is_one_document(tmp_path):
    source = text(tmp_path / "a.txt", "one\n\ntwo\nthré\n")
    assert list(documents(source)) == ["one\n\ntwo\nthré\n"]
    assert list(documents(source)) == list(documents(source))


def test_documents_can_be_read_again(tmp_path):
    found = documents(text(tmp_path / "a.md", "hello"))
    assert list(found) == list(found) == ["hello"]


def test_globs_are_sorted_and_mix_text_formats(tmp_path):
    text(tmp_path / "b.md", "second")
    text(tmp_path / "a.txt", "first")
    text(tmp_path / "sub" / "e.txt", "fifth")
    jsonl(tmp_path / "c.jsonl", {"text": "third", "id": 1}, {"text": "", "id": 2})
    parquet(tmp_path / "d.parquet", title=["x", "y"], text=["fourth", None])
    found = list(documents(str(tmp_path / "**" / "*.*")))
    assert found == ["first", "second", "third", "fourth", "fifth"]


@pytest.mark.parametrize("name", ["a[1].txt", "x?*.txt", ".hidden.txt", "a b.TXT", "[d]/é.txt"])
def test_odd_file_names_are_names_not_patterns(tmp_path, name):
    source = text(tmp_path / name, "content")
    text(tmp_path / "a1.txt", "another")
    assert list(documents(source)) == ["content"]


def test_relative_paths_and_home(tmp_path, monkeypatch):
    text(tmp_path / "a.txt", "content")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(documents("a.txt")) == list(documents("~/a.txt")) == ["content"]


def test_fingerprint_follows_the_content_only(tmp_path):
    first = documents(text(tmp_path / "a.txt", "content")).fingerprint
    assert documents(text(tmp_path / "b.txt", "content")).fingerprint == first
    assert documents(text(tmp_path / "a.txt", "contend")).fingerprint != first
    os.remove(tmp_path / "a.txt")
    assert documents(str(tmp_path / "*.txt")).fingerprint == first
    text(tmp_path / "c.txt", "content")
    assert documents(str(tmp_path / "*.txt")).fingerprint != first


def test_bytes_that_are_not_utf8_name_the_file(tmp_path):
    text(tmp_path / "a.txt", "fine")
    text(tmp_path / "b.txt", b"caf\xe9")
    with pytest.raises(
        ValueError, match=r"expected UTF-8 text in .*b\.txt; got the byte 0xe9 at p"
    ):
        list(documents(str(tmp_path / "*.txt")))


@pytest.mark.parametrize(
    ("encoding", "command"),
    [("utf-16", "iconv -f UTF-16 -t UTF-8"), ("cp1252", "iconv -f CP1252 -t UTF-8")],
)
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_text_that_is_not_utf8_says_how_to_convert_it(tmp_path, encoding, command, suffix):
    content = '{"text": "naïve “café”"}\n'
    source = text(tmp_path / f"a b.{suffix}", content.encode(encoding))
    with pytest.raises(ValueError, match=rf"{command} '.*a b\.{suffix}' > NEW") as refused:
        list(documents(source))
    command = str(refused.value).partition("Convert it: ")[2].partition(" > NEW")[0]
    converted = subprocess.run(shlex.split(command), capture_output=True, check=True).stdout
    assert converted.decode() == content


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_damaged_rows_name_the_file(tmp_path, suffix):
    source = text(tmp_path / f"a.{suffix}", '{"text": "x"\n{"text')
    with pytest.raises(ValueError, match=rf"expected \.{suffix} rows in .*a\.{suffix}"):
        list(documents(source))


def test_a_missing_text_column_lists_the_others(tmp_path):
    source = parquet(tmp_path / "a.parquet", title=["x"], body=["y"])
    with pytest.raises(ValueError, match=r"column 'text' in .*a\.parquet; it has 'title', 'body'"):
        list(documents(source))
    source = jsonl(tmp_path / "a.jsonl", {"text": "x"}, {"body": "y"})
    with pytest.raises(ValueError, match=r"column 'text' in .*a\.jsonl, line 2; it has 'body'"):
        list(documents(source))


DATE = datetime.date(2020, 1, 1)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], "int64"),
        ([DATE], "date32"),
        ([True], "bool"),
        ([["x"]], "list"),
        ([b"x"], "binary"),
    ],
)
def test_text_must_be_text(tmp_path, values, kind):
    """In the second file too, where the first says what to expect."""
    parquet(tmp_path / "a.parquet", text=["x"])
    parquet(tmp_path / "b.parquet", text=values)
    with pytest.raises(
        ValueError, match=rf"strings in the column 'text' of .*b\.parquet; got {kind}"
    ):
        list(documents(str(tmp_path / "*.parquet")))


@pytest.mark.parametrize("value", [1, 1.5, True, ["x"], {"x": "y"}], ids=str)
def test_text_in_json_must_be_text(tmp_path, value):
    jsonl(tmp_path / "a.jsonl", {"text": "x"})
    jsonl(tmp_path / "b.jsonl", {"text": "x"}, {"text": None}, {"text": value})
    name = type(value).__name__
    with pytest.raises(ValueError, match=rf"'text' of .*b\.jsonl, line 3; got {name}\. Convert"):
        list(documents(str(tmp_path / "*.jsonl")))


@pytest.mark.parametrize(
    "texts",
    [
        ["2020-01-01", "2021-12-31"],
        ["2020-01-01T00:00:00Z"],
        ["12:30:00"],
        ["1", "2"],
        ["1.5", "NaN"],
        ["true", "false"],
        ["null"],
        ['{"a": 1}', "[1]"],
    ],
    ids=str,
)
def test_strings_are_strings_whatever_they_look_like(tmp_path, texts):
    jsonl(tmp_path / "a.jsonl", *({"text": t} for t in texts))
    parquet(tmp_path / "b.parquet", text=texts)
    assert list(documents(str(tmp_path / "*.*"))) == texts * 2


def test_strings_are_strings_however_they_are_stored(tmp_path):
    strings = pyarrow.array(["a", None, "b"])
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()]
    for i, stored in enumerate([*map(strings.cast, kinds), strings.dictionary_encode()]):
        parquet(tmp_path / f"{i}.parquet", text=stored)
    parquet(tmp_path / "9.parquet", text=pyarrow.nulls(3))
    assert list(documents(str(tmp_path / "*.parquet"))) == ["a", "b"] * 4


def test_columns_that_are_not_text_may_differ(tmp_path):
    for i, value in enumerate([1, "one", [1], {"a": 1}, None]):
        jsonl(tmp_path / f"{i}.jsonl", {"text": f"j{i}", "id": value}, {"text": f"k{i}"})
        parquet(tmp_path / f"{i}.parquet", id=[value], text=[f"p{i}"])
    names = [f"{kind}{i}" for i in range(5) for kind in "jk"]
    assert list(documents(str(tmp_path / "*.jsonl"))) == names
    assert list(documents(str(tmp_path / "*.parquet"))) == [f"p{i}" for i in range(5)]


def test_more_rows_than_are_in_memory_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("posenc.data.readers._ROWS", 3)
    texts = [f"text {i}" for i in range(10)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", 4)
    assert list(documents(str(tmp_path / "a.parquet"))) == texts


def test_json_lines_as_other_programs_write_them(tmp_path):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"n": NaN, "text": "b\\r\\n\\ud83d\\ude42"}'
    assert list(documents(text(tmp_path / "a.jsonl", content))) == ["a", "b\r\n🙂"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["x"]', "expected a JSON object in .*, line 2; got list"),
        ('"x"', "expected a JSON object in .*, line 2; got str"),
        ("{", "line 2; reading it failed: Expecting property name.* at column 2. Write one JSON"),
        ('{"text": "x"} {}', "line 2; reading it failed: Extra data at column 15"),
        ('{"text": "x", "text": "y"}', "line 2; reading it failed: 'text' is there twice. Write"),
        ("[" * 200_000, "line 2; reading it failed: "),
        ('{"text": "a\\ud800"}', r"expected Unicode text in .*, line 2; got '\\ud800'"),
    ],
)
def test_damaged_json_names_the_line(tmp_path, line, message):
    source = text(tmp_path / "a.jsonl", f'{{"text": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        list(documents(source))


# What a source string names


def test_kinds(tmp_path):
    assert source_kind("stdlib") == "stdlib"
    assert source_kind("hf:user/data") == "hub"
    assert source_kind(text(tmp_path / "a.TXT", "x")) == "text"
    assert source_kind(text(tmp_path / "a.bin", "xx")) == "tokens"
    assert isinstance(documents("hf:user/data:config"), HubStream)


def test_unknown_sources_say_what_was_meant(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'stdlib'"):
        source_kind("stdlb")
    text(tmp_path / "input.txt", "x")
    with pytest.raises(ValueError, match=r"Did you mean '.*input\.txt'"):
        source_kind(str(tmp_path / "imput.txt"))
    with pytest.raises(ValueError, match="write 'hf:user/dataset'"):
        source_kind("user/dataset")
    with pytest.raises(ValueError, match=r"Choose stdlib, hf:REPO\[:CONFIG\], or files \.txt"):
        source_kind(str(tmp_path / "nothing.zip"))


def test_folders_empty_globs_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        source_files(str(tmp_path))
    with pytest.raises(ValueError, match="matches no file"):
        source_files(str(tmp_path / "*.txt"))
    with pytest.raises(ValueError, match="is empty"):
        source_files(text(tmp_path / "a.txt", ""))
    text(tmp_path / "b.txt", "x")
    assert len(source_files(str(tmp_path / "*.txt"))) == 2


def test_text_and_tokens_do_not_mix(tmp_path):
    text(tmp_path / "a.txt", "x")
    text(tmp_path / "b.bin", "xx")
    with pytest.raises(ValueError, match=r"has \.bin \.txt"):
        source_kind(str(tmp_path / "*"))
    with pytest.raises(ValueError, match="holds tokens"):
        documents(str(tmp_path / "b.bin"))
    with pytest.raises(ValueError, match=r"has \(none\)"):
        source_kind(text(tmp_path / "noname", "x"))


# Splits


def test_one_text_is_cut_as_nanogpt_cuts_it(tmp_path):
    # 1,115,394 is tinyshakespeare's length; nanoGPT: data[:int(n * 0.9)]
    whole = "abcdefghij" * 111_539 + "wxyz"
    train, validation = split_documents(text(tmp_path / "a.txt", whole))
    assert (len(whole), [*map(len, train)], [*map(len, validation)]) == (
        1_115_394,
        [1_003_854],
        [111_540],
    )
    assert "".join(train) + "".join(validation) == whole


@pytest.mark.parametrize("count", [1, 2, 7, 19])
def test_few_documents_are_cut_by_characters(tmp_path, count):
    texts = [chr(97 + i) * (i + 3) for i in range(count)]
    train, validation = split_documents(jsonl(tmp_path / "a.jsonl", *({"text": t} for t in texts)))
    joined = "".join(texts)
    assert "".join(train) == joined[: int(len(joined) * 0.9)]
    assert "".join(train) + "".join(validation) == joined
    assert all(train)
    assert all(validation)


def test_many_documents_are_split_whole(tmp_path):
    texts = [f"document {i} " + "x" * (i % 50) for i in range(400)]
    train, validation = split_documents(jsonl(tmp_path / "a.jsonl", *({"text": t} for t in texts)))
    set_of_validation = set(validation)
    assert set(train) | set_of_validation == set(texts)
    assert list(train) == [t for t in texts if t not in set_of_validation]
    share = sum(map(len, validation)) / sum(map(len, texts))
    assert 0.09 < share <= 0.1


def test_split_does_not_depend_on_order_and_keeps_copies_together(tmp_path):
    texts = [f"document {i}" for i in range(50)]
    rows = [{"text": t} for t in texts]
    _, validation = split_documents(jsonl(tmp_path / "a.jsonl", *rows))
    _, again = split_documents(jsonl(tmp_path / "b.jsonl", *rows[::-1], *rows[:30]))
    assert set(validation) <= set(again) | set(texts[:30])
    train, doubled = split_documents(jsonl(tmp_path / "c.jsonl", *rows, *rows))
    assert set(doubled) == set(validation)
    assert not set(train) & set(doubled)


def test_a_large_document_is_cut(tmp_path):
    """24 small documents and a large one: neither half is all of the small or all of the large."""
    small = [f"document {i} " + "y" * (7 * i) for i in range(24)]
    large = "x" * 28_835 + "z" * 3_204
    assert (sum(map(len, small)), len(large)) == (2_210, 32_039)
    rows = [{"text": t} for t in (*small[:9], large, *small[9:])]
    train, validation = split_documents(jsonl(tmp_path / "a.jsonl", *rows))
    dealt = [t for t in validation if t in small]
    assert 176 < sum(map(len, dealt)) <= 221
    assert [t for t in validation if t not in small] == ["z" * 3_204]
    assert list(train) == [t.rstrip("z") for r in rows if (t := r["text"]) not in dealt]
    note = (
        "1 of the documents, with its copies up to 32,039 characters, is more than a tenth of the "
        "text: the last tenth of it is validation text"
    )
    assert train.note() == validation.note() == note


def test_many_copies_of_a_document_are_cut_alike(tmp_path):
    rows = [{"text": "training. " * 9 + "validate. "}] * 20
    train, validation = split_documents(jsonl(tmp_path / "a.jsonl", *rows))
    assert list(train) == ["training. " * 9] * 20
    assert list(validation) == ["validate. "] * 20
    assert "with its copies up to 2,000 characters, is more" in train.note()
    rows += [{"text": "Training. " * 18 + "Validate. " * 2}] * 10
    train, validation = split_documents(jsonl(tmp_path / "b.jsonl", *rows))
    assert list(validation) == ["validate. "] * 20 + ["Validate. " * 2] * 10
    assert "2 of the documents" in train.note()
    assert "are each more" in train.note()


@settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(st.integers(10, 300), st.integers(1, 12)), min_size=20, max_size=40))
def test_whatever_their_sizes_both_halves_have_text(tmp_path, kinds):
    """`kinds` has the length and the number of copies of each document."""
    texts = [f"{i:09} " + "x" * (size - 10) for i, (size, _) in enumerate(kinds)]
    rows = [{"text": t} for t, (_, copies) in zip(texts, kinds, strict=True) for _ in range(copies)]
    train, validation = split_documents(jsonl(tmp_path / "a.jsonl", *rows))
    total, held = sum(len(row["text"]) for row in rows), sum(map(len, validation))
    assert sum(map(len, train)) + held == total
    assert held <= total / 10 + len(rows)  # what is cut is rounded to characters
    whole = set(validation) & set(texts)
    assert not whole & set(train)
    # What was left out did not fit, and what was cut needed to be.
    cut = [t for t in train if t not in texts]
    assert bool(cut) == bool(train.note())
    room = total / 10 - held
    left = [t for t in texts if t in set(train)]
    assert cut or all(len(t) * kinds[texts.index(t)][1] > room for t in left)


def test_usual_documents_are_not_cut(tmp_path):
    train, validation = split_documents(
        jsonl(tmp_path / "a.jsonl", *({"text": f"document {i:2}"} for i in range(20)))
    )
    assert (len([*train]), len([*validation]), train.note()) == (18, 2, "")


def test_halves_have_fingerprints_of_their_own(tmp_path):
    train, validation = split_documents(text(tmp_path / "a.txt", "x" * 100))
    again, _ = split_documents(text(tmp_path / "b.txt", "x" * 100))
    assert train.fingerprint != validation.fingerprint
    assert train.fingerprint == again.fingerprint


def test_a_stream_has_no_halves():
    with pytest.raises(ValueError, match="is a stream"):
        split_documents("hf:user/data")


# The standard library


def test_standard_library_splits_by_file():
    train, validation = standard_library("train"), standard_library("validation")
    assert not set(train.paths) & set(validation.paths)
    assert len(validation.paths) > 10
    assert all(map(is_validation, validation.paths))
    assert not any(map(is_validation, train.paths))
    assert "argparse.py" in train.paths + validation.paths
    size = sum(len(t.encode()) for t in train.texts)
    assert 1_000_000 < size < library_module.TRAIN_BYTES + 1_000_000
    assert train.fingerprint != validation.fingerprint
    assert [*documents("stdlib")] == [*train.texts]
    assert [*map(list, split_documents("stdlib"))] == [[*train.texts], [*validation.texts]]


def test_standard_library_leaves_out_what_is_not_its_own_text():
    paths = standard_library("train").paths + standard_library("validation").paths
    parts = {part for path in paths for part in path.split("/")}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    assert not any(part.startswith("_sysconfigdata") for part in parts)


def test_standard_library_of_a_folder(tmp_path, monkeypatch):
    for i in range(60):
        text(tmp_path / "package" / f"m{i}.py", f"x = {i}\n" * 20)
    text(tmp_path / "package" / "__init__.py", "")
    text(tmp_path / "package" / "test" / "t.py", "left out")
    text(tmp_path / "site-packages" / "p.py", "left out")
    text(tmp_path / "latin.py", b"# coding: latin-1\n# caf\xe9\n")
    train = standard_library("train", tmp_path)
    validation = standard_library("validation", tmp_path)
    assert len(train.paths) + len(validation.paths) == 60
    assert "left out" not in "".join(train.texts + validation.texts)

    moved = tmp_path / "moved"
    (tmp_path / "package").rename(moved)
    moved.rename(tmp_path / "package")
    library_module.standard_library.cache_clear()
    assert standard_library("train", tmp_path) == train

    text(tmp_path / train.paths[0], "changed")
    library_module.standard_library.cache_clear()
    assert standard_library("train", tmp_path).fingerprint != train.fingerprint

    monkeypatch.setattr(library_module, "TRAIN_BYTES", 300)
    library_module.standard_library.cache_clear()
    short = standard_library("train", tmp_path)
    assert short.paths == train.paths[: len(short.paths)]
    assert 300 <= sum(map(len, short.texts)) < 500
    library_module.standard_library.cache_clear()


def test_a_python_without_sources(tmp_path):
    with pytest.raises(ValueError, match="found none in"):
        standard_library("train", tmp_path)
