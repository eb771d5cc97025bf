"""Token shards: files of token ids, memory-mapped, one after the other.

| format | bytes |
|---|---|
| llm.c `.bin` | 256 int32 (magic 20240520, version 1, token count, zeros), then uint16 |
| llm.c `.bin`, Llama 3 | 256 int32 (magic 20240801, version 7, token count, zeros), then uint32 |
| nanoGPT `.bin` | uint16 without a header |
| `.npy` | one dimension of integers |

All little-endian. The magic number tells the `.bin` forms apart: read as uint16, both magic numbers
hold an id beyond GPT-2's vocabulary, so no GPT-2 shard without a header begins with one.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posenc.files import atomic_file

_HEADER_BYTES = 256 * 4
_FORMS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: (version, dtype)
_CHUNK = 1 << 22

Array = npt.NDArray[Any]


class Tokens:
    """Token ids of several arrays, as if they were one.

    `len(tokens)` counts them; `tokens[start:stop]` copies nothing where one array holds the range.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        # asarray drops the memmap subclass, which is ten times slower to slice; the map stays.
        self._arrays = [np.asarray(array) for array in arrays if len(array)]
        self._ends = np.cumsum([len(array) for array in self._arrays], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._arrays else 0

    def __getitem__(self, key: slice) -> Array:
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError(f"Tokens take slices of step 1; got {step}. Slice the result again.")
        parts = list(self._parts(start, stop))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

    def part(self, start: int, stop: int) -> "Tokens":
        """Return the tokens from start to stop (not included), still mapped."""
        return Tokens(list(self._parts(start, stop)))

    def chunks(self) -> Iterator[Array]:
        """Yield all tokens, some megabytes at a time."""
        for array in self._arrays:
            for start in range(0, len(array), _CHUNK):
                yield array[start : start + _CHUNK]

    def _parts(self, start: int, stop: int) -> Iterator[Array]:
        """Yield the share that each array has in a range."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        for array, end in zip(self._arrays[first:], self._ends[first:].tolist(), strict=True):
            offset = end - len(array)
            if offset >= stop:
                return
            yield array[max(start - offset, 0) : stop - offset]


def open_shards(paths: Sequence[str | Path]) -> Tokens:
    """Map token shards, in the order given.

    Raises:
        ValueError: a file is empty, truncated, of an unknown version, or not of integers.
    """
    files = map(Path, paths)
    return Tokens([_open_npy(f) if f.suffix.lower() == ".npy" else _open_bin(f) for f in files])


def _open_bin(path: Path) -> Array:
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) == 256 and int(header[0]) in _FORMS:
        version, dtype = _FORMS[int(header[0])]
        if header[1] != version:
            raise ValueError(
                f"expected format version {version} in {path}; got {header[1]}. Write it again."
            )
        offset = _HEADER_BYTES
        expected = offset + int(header[2]) * np.dtype(dtype).itemsize
        if size != expected:
            raise ValueError(
                f"expected {expected} bytes for the {header[2]} tokens of {path}; got {size}. "
                "The file is damaged: copy or write it again."
            )
    else:
        dtype, offset = "<u2", 0
        if size % 2:
            raise ValueError(
                f"expected a known header or uint16 tokens in {path}; got {size} bytes, an odd "
                "number. The file is damaged, or no token shard."
            )
    if size == offset:
        raise ValueError(f"expected tokens in {path}; it holds none. Choose another file.")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset)


def _open_npy(path: Path) -> Array:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"expected a .npy array in {path}; reading it failed: {error}. Write it again."
        ) from error
    if not (isinstance(array, np.ndarray) and _is_row_of_integers(array)):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(
            f"expected one row of integers in {path}; got {found}. Save token ids as uint16."
        )
    return array


def _is_row_of_integers(array: Array) -> bool:
    return array.ndim == 1 and array.dtype.kind in "iu" and len(array) > 0


def scan_tokens(tokens: Tokens, vocab_size: int) -> str:
    """Read all tokens once: check that every id lies in the vocabulary, and return their sha256.

    Raises:
        ValueError: an id is negative or too large.
    """
    digest, low, high = hashlib.sha256(), 0, -1
    for chunk in tokens.chunks():
        low, high = min(low, int(chunk.min())), max(high, int(chunk.max()))
        digest.update(np.ascontiguousarray(chunk).data)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token ids must lie in 0..{vocab_size - 1}; got {low if low < 0 else high}. "
            "Choose the tokenizer that wrote them, or --vocab-size (GPT-2's is 50257)."
        )
    return digest.hexdigest()


def write_bin(path: str | Path, tokens: npt.ArrayLike) -> None:
    """Write tokens as an llm.c shard, atomically.

    Args:
        path: the file, usually .bin.
        tokens: one row of 1 to 2^31 - 1 ids. A uint32 array, or an id above 65535, takes the
            Llama 3 form.

    Raises:
        ValueError: not that.
    """
    array = np.asarray(tokens)
    if not _is_row_of_integers(array) or len(array) >= 2**31:
        raise ValueError(
            f"expected one row of 1 to 2^31 - 1 integers; got {array.dtype} {array.shape}. "
            "Pass token ids, in several shards if need be."
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= 2**32:
        raise ValueError(f"token ids must lie in 0..2^32-1; got {low}..{high}. Check them.")
    magic = 20240801 if high >= 2**16 or array.dtype == np.uint32 else 20240520
    version, dtype = _FORMS[magic]
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(array)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        header.tofile(file)
        array.astype(dtype).tofile(file)
