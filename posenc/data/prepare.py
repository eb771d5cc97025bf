"""The two steps of preparing text that are worth keeping: the tokenizer and the tokens.

Each is a cache folder named by what it is made from, so later runs and other ranks find it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posenc.data.encode import token_dtype, write_tokens
from posenc.data.files import cached_folder, sha256_json
from posenc.data.shards import Tokens
from posenc.data.sources import Documents
from posenc.data.tokenizers import Tokenizer, load_tokenizer
from posenc.data.vocabularies import (
    KINDS,
    byte_tokenizer,
    char_tokenizer,
    gpt2_tokenizer,
    train_bpe,
)
from posenc.errors import unknown

SAMPLE_CHARACTERS = 16_000_000  # of training text, to train a BPE: more changes the merges little
_LAYOUT = 1  # in every cache key: raise it when the meaning of a cached file changes


@dataclass(frozen=True)
class Preparation:
    """What the steps have in common; the fields are arguments of `load_corpus`."""

    tokenizer: str | Path | Tokenizer
    vocab_size: int
    cache_dir: Path
    progress: bool

    def ready_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer, or None where it has yet to be made from text.

        Raises:
            ValueError: there is none of that name or path, or it is damaged.
        """
        if isinstance(self.tokenizer, Tokenizer):
            return self.tokenizer
        if self.tokenizer in ("bpe", "char"):
            return None
        if self.tokenizer in ("byte", "gpt2"):
            return byte_tokenizer() if self.tokenizer == "byte" else gpt2_tokenizer()
        if not Path(self.tokenizer).expanduser().exists():
            name = str(self.tokenizer)
            raise ValueError(f"{unknown('tokenizer', name, KINDS)} Or the path of a saved one.")
        return load_tokenizer(self.tokenizer)

    def text_tokenizer(
        self, train: Documents, validation: Documents, *, complete: bool
    ) -> Tokenizer:
        """Return the tokenizer, made from training text if need be.

        The vocabulary of "char" is that of the training text. An unknown symbol is added only where
        it is needed: the validation text has other characters, or `train` is not complete.
        """
        if ready := self.ready_tokenizer():
            return ready

        def build(folder: Path) -> dict[str, Any]:
            if self.tokenizer == "bpe":
                made = train_bpe(_sample(train), self.vocab_size, progress=self.progress)
            else:
                seen = set().union(*train)
                known = complete and seen.issuperset(set().union(*validation))
                made = char_tokenizer(seen, unknown_symbol=not known)
            made.save(folder / "tokenizer.json")
            return {}

        texts = (train.fingerprint, validation.fingerprint)
        key = sha256_json(_LAYOUT, str(self.tokenizer), self.vocab_size, texts)
        folder = self.cache_dir / f"tokenizer-{key[:32]}"
        cached_folder(folder, build)
        return load_tokenizer(folder)

    def tokens(
        self, splits: dict[str, Documents], tokenizer: Tokenizer
    ) -> tuple[dict[str, Tokens], dict[str, Any], str]:
        """Return the tokens of named splits, their counts, and the sha256 of text and tokenizer.

        Beside the counts are the "notes" of the splits, where they have any.
        """

        def build(folder: Path) -> dict[str, Any]:
            counts = {
                name: write_tokens(
                    texts,
                    tokenizer,
                    folder / f"{name}.bin",
                    label=f"tokenise {name}",
                    progress=self.progress,
                )
                for name, texts in splits.items()
            }
            notes = sorted({split.note() for split in splits.values()} - {""})
            return counts | ({"notes": notes} if notes else {})

        texts = {name: split.fingerprint for name, split in splits.items()}
        # Long texts of these were once cut, which changed tokens: what was cached then is wrong.
        mended = tokenizer.is_byte_level and not tokenizer.can_cut
        layout = _LAYOUT + mended
        fingerprint = sha256_json(layout, texts, tokenizer.fingerprint)
        folder = self.cache_dir / f"tokens-{fingerprint[:32]}"
        counts = cached_folder(folder, build)
        dtype = token_dtype(tokenizer.vocab_size)
        return {name: _map(folder / f"{name}.bin", dtype) for name in splits}, counts, fingerprint


def _map(path: Path, dtype: str) -> Tokens:
    """Map a file of raw ids; an empty one cannot be mapped."""
    return Tokens([np.memmap(path, dtype=dtype, mode="r")] if path.stat().st_size else [])


def _sample(texts: Documents) -> Iterator[str]:
    """Yield about SAMPLE_CHARACTERS: the same leading share of every document."""
    share = SAMPLE_CHARACTERS / max(1, sum(map(len, texts)))
    return (text[: 1 + int(len(text) * share)] for text in texts)
