"""Training and validation text out of one source."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

from posenc.data.files import sha256_json
from posenc.data.sources import Documents, documents, standard_library_documents

VALIDATION_SHARE = 0.1
MIN_DOCUMENTS = 20  # fewer are too few to deal out whole: the text is cut instead
_RULE = 2  # in every fingerprint: raise it when the rule changes

Split = Literal["train", "validation"]
# (where a document begins in the whole text, the document): how many characters are for training
Cut = Callable[[int, str], int]


def split_documents(source: str) -> tuple[Documents, Documents]:
    """Return the training and validation documents of a finite text source.

    `stdlib` splits by file. From MIN_DOCUMENTS documents on, those with the smallest hashes are
    validation, as many as fit into a tenth of the characters: the split does not depend on their
    order, and copies of a document stay together. A document that alone, or with its copies, holds
    more than that tenth is cut: its last tenth is validation, and the `note` of both halves says
    so. Of fewer documents, the last tenth of the characters is validation, and one document may be
    cut in two (nanoGPT's rule for a single text: tinyshakespeare gives 1,003,854 and 111,540
    characters).

    Raises:
        ValueError: as `documents`, and for a stream.
    """
    if source == "stdlib":
        return standard_library_documents("train"), standard_library_documents("validation")
    whole = documents(source)
    if not isinstance(whole, Documents):
        raise ValueError(f"expected finite text; {source!r} is a stream. Use load_corpus.")

    @lru_cache(maxsize=1)  # decided by the first reading, then known to both halves
    def plan() -> tuple[Cut, str]:
        return _plan(whole)

    def half(split: Split) -> Documents:
        return Documents(
            source,
            sha256_json(whole.fingerprint, split, _RULE),
            lambda: _read_split(whole, plan()[0], split),
            lambda: plan()[1],
        )

    return half("train"), half("validation")


def _plan(whole: Documents) -> tuple[Cut, str]:
    """Return where documents are cut, and what the user should know of it."""
    count = 0
    sizes: dict[bytes, int] = defaultdict(int)  # characters of a document and all its copies
    for text in whole:
        count += 1
        sizes[_hash(text)] += len(text)
    total = sum(sizes.values())
    if count < MIN_DOCUMENTS:
        end = _training_part(total)
        return lambda start, text: min(max(end - start, 0), len(text)), ""

    # Whole, one of these would be most of the validation text, or leave none to train on.
    large = {digest for digest, size in sizes.items() if size > total * VALIDATION_SHARE}
    left = VALIDATION_SHARE * sum(size for digest, size in sizes.items() if digest not in large)
    validation = set()
    for digest in sorted(sizes.keys() - large):
        if sizes[digest] <= left:
            validation.add(digest)
            left -= sizes[digest]

    def cut(_: int, text: str) -> int:
        digest = _hash(text)
        if digest in large:
            return _training_part(len(text))
        return 0 if digest in validation else len(text)

    return cut, _note(len(large), max(sizes.values())) if large else ""


def _training_part(characters: int) -> int:
    return int(characters * (1 - VALIDATION_SHARE))


def _note(count: int, largest: int) -> str:
    one = count == 1
    return (
        f"{count} of the documents, with its copies up to {largest:,} characters, "
        f"{'is' if one else 'are each'} more than a tenth of the text: the last tenth of "
        f"{'it' if one else 'each'} is validation text"
    )


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _read_split(whole: Documents, cut: Cut, split: Split) -> Iterator[str]:
    start = 0
    for text in whole:
        end = cut(start, text)
        start += len(text)
        if part := text[:end] if split == "train" else text[end:]:
            yield part
