"""Text to token ids and back.

Every tokenizer is a pipeline of the `tokenizers` library, so that one tokenizer.json, one loader
and one class serve all kinds (vocabularies.py makes them), and other programs read what we save.
Loading a tokenizer never executes code.

The text `<|endoftext|>` inside a document is ordinary text, never the special token: data cannot
fake the end of a document.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from posenc.files import atomic_file

END_OF_TEXT = "<|endoftext|>"
# What other families call it.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|eos|>", "<eos>", "</s>", "[SEP]")
_BPE_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))

# What some models add to symbols inside, or at the end, of words.
_MARKS = ("continuing_subword_prefix", "end_of_word_suffix")

Ids = npt.NDArray[np.int64]


class Tokenizer:
    """A text tokenizer.

    Args:
        backend: the pipeline; its truncation and padding are switched off.

    Attributes:
        vocab_size: one more than the largest id.
        end_of_text: the id before each document, or None.
        fingerprint: sha256 of the pipeline.
        is_byte_level: words are spelled with one character for each byte.
        can_cut: long texts are encoded in pieces, see `pieces`.

    Raises:
        ValueError: the vocabulary is empty.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # that is: as ordinary text
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError("a tokenizer needs at least one symbol; got none. Give it text.")
        self.backend = backend
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text = next((vocabulary[n] for n in _END_NAMES if n in vocabulary), None)
        saved = backend.to_str()
        self.fingerprint = hashlib.sha256(saved.encode()).hexdigest()
        model, pre = json.loads(saved)["model"], backend.pre_tokenizer
        plain, alone = backend.normalizer is None, _spells_by_character(model)
        # Found in text, wherever they stand; special tokens are not.
        added = [
            token for token in backend.get_added_tokens_decoder().values() if not token.special
        ]
        strips = any(token.lstrip or token.rstrip for token in added)
        fuse = plain and pre is None and isinstance(backend.decoder, decoders.Fuse)
        self._is_char = fuse and alone and not added
        self.is_byte_level = plain and isinstance(pre, pre_tokenizers.ByteLevel)
        # Else the beginning of a piece, or its end, is encoded as nothing inside a text is.
        anywhere = self.is_byte_level and not pre.add_prefix_space and not strips
        marked = any(model.get(mark) for mark in _MARKS)
        self._has_byte_lengths = self._is_char or (anywhere and not marked)
        self.can_cut = self._is_char or (
            anywhere
            and (pre.use_regex or alone)
            and not any("\n" in token.content for token in added)
        )

    def encode(self, text: str) -> Ids:
        """Return the ids of a text, without special tokens.

        Raises:
            ValueError: text that is not Unicode (a lone surrogate), or, where a character tokenizer
                has no unknown symbol, a character that it does not know.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of several texts, on all processor cores. Raises as `encode`."""
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                text.encode()  # says what is wrong with a lone surrogate, as a ValueError
            raise
        ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        if self._is_char:
            for text, row in zip(texts, ids, strict=True):
                if len(row) != len(text):  # the library drops unknown characters without a word
                    self._refuse_characters(text)
        return ids

    def _refuse_characters(self, text: str) -> None:
        new = "".join(sorted(set(text) - set(self.backend.get_vocab())))
        raise ValueError(
            f"the character tokenizer knows {self.vocab_size} characters; got {new[:20]!r} too. "
            "Leave them out, or choose --tokenizer byte or bpe."
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        row = [int(i) for i in ids]
        if row and not (min(row) >= 0 and max(row) < self.vocab_size):
            raise ValueError(
                f"token ids must lie in 0..{self.vocab_size - 1}; got {min(row)}..{max(row)}. "
                "Decode with the tokenizer that made them."
            )
        return str(self.backend.decode(row, skip_special_tokens=False))

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as tokenizer.json, atomically."""
        with atomic_file(path) as temporary:
            temporary.write_text(self.backend.to_str(), encoding="utf-8")

    def byte_lengths(self) -> Ids | None:
        """Return how many bytes of text each id stands for, special tokens none.

        None where that is not fixed: only byte-level and character tokenizers know.
        """
        if not self._has_byte_lengths:
            return None
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, i in self.backend.get_vocab(with_added_tokens=False).items():
            # A byte-level symbol is written with one character for each byte.
            lengths[i] = len(token) if self.is_byte_level else len(token.encode())
        for i, added in self.backend.get_added_tokens_decoder().items():
            lengths[i] = 0 if added.special else len(added.content.encode())
        return lengths

    def pieces(self, text: str, size: int = 1 << 16) -> Iterator[str]:
        """Cut a long text where that changes no token: to encode it in parallel, in little memory.

        GPT-2's pattern neither joins a line end to anything but white space before it, nor looks
        back, so a cut between the two is safe; so it is where each character is a token by itself.
        All other tokenizers get the text whole: those with other patterns, or with merges across
        words; those that put a space before a text; and those with added tokens that reach over a
        line end.
        """
        start = 0
        while self.can_cut and len(text) - start > size:
            cut = text.find("\n", start + size)
            while cut > 0 and text[cut - 1].isspace():
                cut = text.find("\n", cut + 1)
            if cut < 0:
                break
            yield text[start:cut]
            start = cut
        yield text[start:]


def _spells_by_character(model: dict[str, Any]) -> bool:
    """Say whether each character of a word is a token, whatever stands beside it."""
    across = ("merges", "ignore_merges", "fuse_unk", "byte_fallback", *_MARKS)
    return model["type"] == "BPE" and not any(model.get(name) for name in across)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a saved tokenizer.

    Args:
        path: a tokenizer.json, or a folder that holds one, or encoder.json and vocab.bpe (OpenAI's
            names of GPT-2's files), or vocab.json and merges.txt (the Hub's).

    Raises:
        ValueError: nothing of that is there, or it is damaged.
    """
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file():
            return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))
        for vocabulary, merges in _BPE_FILES:
            if (path / vocabulary).is_file() and (path / merges).is_file():
                return _load_bpe(path / vocabulary, path / merges)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"expected a tokenizer in {path}; reading it failed: {error}. Save it again."
        ) from error
    raise ValueError(
        f"expected a tokenizer in {path}: tokenizer.json, encoder.json with vocab.bpe, or "
        "vocab.json with merges.txt; found none of them. Check the path."
    )


def _load_bpe(vocabulary: Path, merges: Path) -> Tokenizer:
    backend = byte_level(models.BPE.from_file(str(vocabulary), str(merges)))
    if END_OF_TEXT in backend.get_vocab():
        backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def byte_level(model: models.BPE, *, use_regex: bool = True) -> tokenizers.Tokenizer:
    """Return GPT-2's pipeline over bytes; without use_regex it does not split words first."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return backend
