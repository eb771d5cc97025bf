"""Training and validation text out of one source."""

from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

import numpy as np

from posenc.data.files import sha256_json
from posenc.data.sources import Documents, documents, standard_library_documents

VALIDATION_SHARE = 0.1
MIN_DOCUMENTS = 20  # fewer are too few to deal out whole: the text is cut instead
_RULE = 1  # in every fingerprint: raise it when the rule changes

Split = Literal["train", "validation"]


def split_documents(source: str) -> tuple[Documents, Documents]:
    """Return the training and validation documents of a finite text source.

    `stdlib` splits by file. From MIN_DOCUMENTS documents on, those with the smallest hashes are
    validation, up to a tenth of the characters: the split does not depend on their order, and
    copies of a document stay together. Of fewer, the last tenth of the characters is validation,
    and one document may be cut in two (nanoGPT's rule for a single text: tinyshakespeare gives
    1,003,854 and 111,540 characters).

    Raises:
        ValueError: as `documents`, and for a stream.
    """
    if source == "stdlib":
        return standard_library_documents("train"), standard_library_documents("validation")
    whole = documents(source)
    if not isinstance(whole, Documents):
        raise ValueError(f"expected finite text; {source!r} is a stream. Use load_corpus.")

    @lru_cache(maxsize=1)  # decided by the first reading, then known to both halves
    def plan() -> int | frozenset[bytes]:
        return _plan(whole)

    def half(split: Split) -> Documents:
        fingerprint = sha256_json(whole.fingerprint, split, _RULE)
        return Documents(source, fingerprint, lambda: _read_split(whole, plan(), split))

    return half("train"), half("validation")


def _plan(whole: Documents) -> int | frozenset[bytes]:
    """Return where to cut, in characters, or the hashes of the validation documents."""
    hashes, lengths = [], []
    for text in whole:
        hashes.append(_hash(text))
        lengths.append(len(text))
    total = sum(lengths)
    if len(hashes) < MIN_DOCUMENTS:
        return int(total * (1 - VALIDATION_SHARE))
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    running = np.cumsum([lengths[i] for i in order])
    count = int(np.searchsorted(running, total * VALIDATION_SHARE, side="right"))
    return frozenset(hashes[i] for i in order[: max(1, count)])


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _read_split(whole: Documents, plan: int | frozenset[bytes], split: Split) -> Iterator[str]:
    start = 0
    for text in whole:
        if isinstance(plan, frozenset):
            if (_hash(text) in plan) == (split == "validation"):
                yield text
            continue
        cut = min(max(plan - start, 0), len(text))
        start += len(text)
        if part := text[:cut] if split == "train" else text[cut:]:
            yield part
