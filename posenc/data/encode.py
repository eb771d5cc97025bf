"""Documents to one file of token ids."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from posenc.data.tokenizers import Tokenizer

_BATCH_CHARACTERS = 1 << 20  # bounds the memory of one call into the tokenizer to about 100 MB

Piece = tuple[bool, str]  # (begins a document, text)


def token_dtype(vocab_size: int) -> str:
    """Return the narrowest integer type that files of a vocabulary's ids take."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def write_tokens(
    documents: Iterable[str], tokenizer: Tokenizer, path: Path, *, label: str, progress: bool
) -> dict[str, int]:
    """Write documents as raw token ids, each after end-of-text where the tokenizer has one.

    Args:
        documents: their texts; read twice where a progress bar is shown.
        tokenizer: encodes them.
        path: the file to write (nanoGPT's form for up to 65536 symbols, uint32 beyond).
        label: names the progress bar.
        progress: show it.

    Returns:
        The counts of documents, characters, UTF-8 bytes and tokens.
    """
    counts = dict.fromkeys(("documents", "characters", "bytes", "tokens"), 0)
    dtype = token_dtype(tokenizer.vocab_size)
    end = tokenizer.end_of_text
    start = np.array([] if end is None else [end], np.int64)
    total = sum(map(len, documents)) if progress else None
    bar = tqdm(total=total, desc=label, unit="char", unit_scale=True, disable=not progress)
    with bar, path.open("wb") as file:
        for batch in _batches(documents, tokenizer):
            ids: list[np.ndarray] = []
            rows = tokenizer.encode_batch([text for _, text in batch])
            for (begins, text), row in zip(batch, rows, strict=True):
                ids += [start, row] if begins else [row]
                counts["documents"] += begins
                counts["characters"] += len(text)
                counts["bytes"] += len(text.encode())
            tokens = np.concatenate(ids).astype(dtype)
            tokens.tofile(file)
            counts["tokens"] += len(tokens)
            bar.update(counts["characters"] - bar.n)
    return counts


def _batches(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[Piece]]:
    """Group the pieces of documents into lists of about _BATCH_CHARACTERS."""
    batch: list[Piece] = []
    size = 0
    for document in documents:
        for i, text in enumerate(tokenizer.pieces(document)):
            batch.append((i == 0, text))
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
