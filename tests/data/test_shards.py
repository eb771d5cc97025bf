import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posenc.data import Tokens, open_shards, write_bin
from posenc.data.shards import scan_tokens


def header(magic=20240520, version=1, count=0):
    values = np.zeros(256, "<i4")
    values[:3] = magic, version, count
    return values.tobytes()


@pytest.mark.parametrize(("dtype", "size"), [("uint16", 2), ("int64", 2), ("uint32", 4)])
def test_write_bin_is_llm_c(tmp_path, dtype, size):
    ids = np.array([50256, 0, 1, 65535], dtype)
    write_bin(tmp_path / "a.bin", ids)
    raw = (tmp_path / "a.bin").read_bytes()
    form = {2: (20240520, 1), 4: (20240801, 7)}[size]
    assert tuple(np.frombuffer(raw, "<i4", 3)) == (*form, 4)
    assert np.frombuffer(raw[1024:], f"<u{size}").tolist() == ids.tolist()
    tokens = open_shards([tmp_path / "a.bin"])
    assert tokens[:].tolist() == ids.tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin"]


def test_large_ids_take_the_wide_form(tmp_path):
    write_bin(tmp_path / "a.bin", [1, 128_000])
    assert open_shards([tmp_path / "a.bin"])[:].tolist() == [1, 128_000]


@pytest.mark.parametrize("ids", [[], [[1, 2]], [0.5], [-1], [2**32], np.array(["a"])], ids=repr)
def test_write_bin_refuses(tmp_path, ids):
    with pytest.raises(ValueError, match=r"expected one row|must lie in"):
        write_bin(tmp_path / "a.bin", ids)
    assert not list(tmp_path.iterdir())


def test_headerless_uint16(tmp_path):
    ids = np.arange(2000, dtype="<u2")
    ids.tofile(tmp_path / "a.bin")
    ids[:3].tofile(tmp_path / "short.bin")  # shorter than a header
    assert open_shards([tmp_path / "a.bin"])[:].tolist() == ids.tolist()
    assert open_shards([tmp_path / "short.bin"])[:].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64", ">u2"])
def test_npy(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.array([3, 1, 2], dtype))
    assert open_shards([tmp_path / "a.npy"])[:].tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"abc", "odd number"),
        ("a.bin", header(count=2) + b"abc", "expected 1028 bytes for the 2 tokens"),
        ("a.bin", header(count=2) + b"abcdef", "expected 1028 bytes"),
        ("a.bin", header(count=-2), "expected 1020 bytes"),
        ("a.bin", header(version=2, count=1) + b"ab", "expected format version 1 .* got 2"),
        ("a.bin", header(magic=20240801, version=1, count=1), "expected format version 7"),
        ("a.bin", header(magic=20240801, version=7, count=1) + b"ab", "expected 1028 bytes"),
        ("a.bin", header(), "holds none"),
        ("a.bin", b"", "holds none"),
        ("a.npy", b"", r"expected a \.npy array"),
        ("a.npy", b"not an array at all", r"expected a \.npy array"),
    ],
)
def test_damaged_shards(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_shards([tmp_path / name])


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2), np.uint16), np.zeros(3), np.zeros(0, np.uint16)], ids=str
)
def test_npy_of_something_else(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match="expected"):
        open_shards([tmp_path / "a.npy"])


def test_npy_never_unpickles(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("code was executed",))

    np.save(tmp_path / "a.npy", np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"expected a \.npy array"):
        open_shards([tmp_path / "a.npy"])


def test_truncated_npy_and_archives(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.arange(100, dtype=np.uint16))
    (tmp_path / "a.npy").write_bytes(buffer.getvalue()[:-50])
    with pytest.raises(ValueError, match=r"expected a \.npy array"):
        open_shards([tmp_path / "a.npy"])
    with (tmp_path / "b.npy").open("wb") as file:
        np.savez(file, a=np.arange(3))
    with pytest.raises(ValueError, match="archive"):
        open_shards([tmp_path / "b.npy"])


@given(
    lengths=st.lists(st.integers(0, 7), max_size=6),
    cut=st.tuples(st.integers(-25, 45), st.integers(-25, 45)),
)
def test_tokens_slice_like_one_array(lengths, cut):
    ends = np.cumsum([0, *lengths])
    tokens = Tokens([np.arange(a, b, dtype=np.uint16) for a, b in pairwise(ends)])
    whole = np.arange(ends[-1])
    assert len(tokens) == len(whole)
    assert tokens[slice(*cut)].tolist() == whole[slice(*cut)].tolist()
    start, stop, _ = slice(*cut).indices(len(whole))
    assert tokens.part(start, stop)[:].tolist() == whole[start:stop].tolist()
    assert sum(map(len, tokens.chunks())) == len(whole)


def test_tokens_stay_on_disk_and_refuse_steps(tmp_path):
    write_bin(tmp_path / "a.bin", np.arange(10))
    tokens = open_shards([tmp_path / "a.bin", tmp_path / "a.bin"])
    assert not tokens[2:5].flags.owndata
    with pytest.raises(ValueError, match="step 1"):
        tokens[::2]


def test_scan_checks_every_id():
    tokens = Tokens([np.arange(5, dtype=np.uint16), np.array([7, 3], np.int64)])
    assert scan_tokens(tokens, 8) == scan_tokens(tokens, 9)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.6; got 7"):
        scan_tokens(tokens, 7)
    with pytest.raises(ValueError, match="got -2"):
        scan_tokens(Tokens([np.array([1, -2, 50])]), 10)
    assert scan_tokens(Tokens([np.array([1, 2])]), 9) != scan_tokens(Tokens([np.array([1, 3])]), 9)
