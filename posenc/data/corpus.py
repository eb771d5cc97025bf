"""A corpus ready for training: tokens of both splits, their tokenizer, and what identifies them.

Finite text is tokenised once into a cache folder; later runs and other ranks map the same file.
Ranks that build it at the same time are safe, but each does the whole work: let one go first.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from posenc.data.batches import Batches, check_context
from posenc.data.files import sha256_json
from posenc.data.hub import HubStream
from posenc.data.packed import PackedBatches
from posenc.data.prepare import SAMPLE_CHARACTERS, Preparation
from posenc.data.shards import Tokens, open_shards, scan_tokens
from posenc.data.sources import (
    Documents,
    documents,
    source_files,
    source_kind,
    standard_library_documents,
)
from posenc.data.splits import VALIDATION_SHARE, split_documents
from posenc.data.stream_batches import StreamBatches
from posenc.data.tokenizers import Tokenizer

STREAM_VALIDATION_CHARACTERS = 4_000_000  # about a million GPT-2 tokens


@dataclass(frozen=True)
class Corpus:
    """Training and validation data.

    Attributes:
        train: tokens, or the stream that they are made from on the fly.
        validation: tokens.
        tokenizer: None for token shards whose tokenizer is not known.
        vocab_size: all ids lie below it.
        fingerprint: sha256 over the text, or tokens, and the tokenizer; for a stream over its name,
            its validation text and the tokenizer.
        validation_bytes: UTF-8 bytes of the text that all validation tokens stand for, None where
            not known. Bits per byte = loss / ln 2 * len(validation) / validation_bytes.
        description: names, counts and the fingerprint as plain values, for a run's records; where
            text was split in a way that the user should know of, "notes" says so in sentences.
    """

    train: Tokens | HubStream
    validation: Tokens
    tokenizer: Tokenizer | None
    vocab_size: int
    fingerprint: str
    validation_bytes: int | None
    description: dict[str, Any]

    def batches(
        self,
        *,
        context: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pack: bool = False,
    ) -> Batches | StreamBatches | PackedBatches:
        """Return training batches from the beginning; see `Batches` for the arguments.

        A stream keeps the order in which it is published, whatever the seed.

        Args:
            pack: pack whole documents, see `PackedBatches`.

        Raises:
            ValueError: for pack where the documents are not known beforehand.
        """
        sizes = {"context": context, "batch_size": batch_size}
        ranks = {"rank": rank, "world_size": world_size}
        if pack:
            if not isinstance(self.train, Tokens):
                raise ValueError(
                    "packing needs all documents beforehand; a stream from the Hub gives them one "
                    "by one. Leave --pack out, or download the text."
                )
            return PackedBatches(self.train, self.end_of_text(), seed=seed, **sizes, **ranks)
        if isinstance(self.train, Tokens):
            return Batches(self.train, seed=seed, **sizes, **ranks)
        assert self.tokenizer is not None, "a stream of text always has a tokenizer"
        return StreamBatches(copy.copy(self.train), self.tokenizer, **sizes, **ranks)

    def end_of_text(self) -> int:
        """The token before each document.

        Raises:
            ValueError: it is not known, or the tokenizer has none.
        """
        end = None if self.tokenizer is None else self.tokenizer.end_of_text
        if end is None:
            raise ValueError(
                "documents are told apart by an end-of-text token, which this tokenizer lacks or "
                "is not known for these token files. Use --tokenizer bpe or gpt2, or the stream."
            )
        return end


def load_corpus(
    data: str | Path,
    *,
    val_data: str | Path | None = None,
    tokenizer: str | Path | Tokenizer = "bpe",
    vocab_size: int = 4096,
    context: int,
    cache_dir: str | Path,
    progress: bool = True,
) -> Corpus:
    """Prepare a corpus, or find it in the cache.

    Args:
        data: a source, see sources.py.
        val_data: a source of validation text, or of tokens if `data` is. Without it, text is split
            as `split_documents` says, shards after nine tenths of their tokens, and of a stream the
            first STREAM_VALIDATION_CHARACTERS are validation, which training then skips.
        tokenizer: "bpe" (trained on the training text), "char", "byte", "gpt2", the path of a saved
            one, or a `Tokenizer`. For token shards, the one that wrote them; there "bpe" and "char"
            mean that it is not known.
        vocab_size: of a trained bpe, and of token shards whose tokenizer is not known.
        context: the longest window that will be asked for.
        cache_dir: where tokens and trained tokenizers are kept.
        progress: show progress bars.

    Raises:
        ValueError: a source or tokenizer is unknown, missing, empty or damaged, or there is too
            little text for the context.
        StreamError: the Hub could not be reached.
    """
    check_context(context + 1, context)  # at least 1; its length is checked once that is known
    data, val_data = str(data), None if val_data is None else str(val_data)
    kind = source_kind(data)
    if val_data is not None and (source_kind(val_data) == "tokens") != (kind == "tokens"):
        raise ValueError(
            f"data and val_data must both be text or both be token shards; got {data!r} and "
            f"{val_data!r}. Give both in one form."
        )
    load = {"tokens": _load_shards, "hub": _load_stream}.get(kind, _load_text)
    cache = Path(cache_dir).expanduser()
    corpus = load(data, val_data, Preparation(tokenizer, vocab_size, cache, progress))
    if isinstance(corpus.train, Tokens):
        check_context(len(corpus.train), context, "the training split")
    check_context(len(corpus.validation), context, "the validation split")
    name = "given" if isinstance(tokenizer, Tokenizer) else str(tokenizer)
    corpus.description.update(
        data=data,
        val_data=val_data,
        tokenizer=name,
        vocab_size=corpus.vocab_size,
        fingerprint=corpus.fingerprint,
    )
    return corpus


def _load_text(data: str, val_data: str | None, prepare: Preparation) -> Corpus:
    if val_data is None:
        train, validation = split_documents(data)
    else:
        whole = documents(data)
        assert isinstance(whole, Documents)
        train, validation = whole, _validation_text(val_data)
    tokenizer = prepare.text_tokenizer(train, validation, complete=True)
    splits = {"train": train, "validation": validation}
    tokens, counts, fingerprint = prepare.tokens(splits, tokenizer)
    return Corpus(
        train=tokens["train"],
        validation=tokens["validation"],
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        fingerprint=fingerprint,
        validation_bytes=counts["validation"]["bytes"],
        description=counts,
    )


def _validation_text(source: str) -> Documents:
    """Return the documents of a source that is validation text as a whole."""
    if source == "stdlib":
        return standard_library_documents("validation")
    found = documents(source)
    if isinstance(found, Documents):
        return found
    return _in_memory(source, _take(found, STREAM_VALIDATION_CHARACTERS))


def _in_memory(source: str, texts: list[str]) -> Documents:
    return Documents(source, sha256_json(source, texts), lambda: iter(texts))


def _take(stream: Iterable[str], characters: int, *, label: str | None = None) -> list[str]:
    """Return the first documents of a stream, up to so many characters and a whole document."""
    texts: list[str] = []
    with tqdm(
        total=characters, desc=label, unit="char", unit_scale=True, disable=label is None
    ) as bar:
        total = 0
        for text in stream:
            texts.append(text)
            total += len(text)
            bar.update(len(text))
            if total >= characters:
                break
    return texts


def _load_stream(data: str, val_data: str | None, prepare: Preparation) -> Corpus:
    if val_data is None:
        stream = HubStream(data)
        label = "validation text" if prepare.progress else None
        texts = _take(stream, STREAM_VALIDATION_CHARACTERS, label=label)
        if sum(map(len, texts)) < STREAM_VALIDATION_CHARACTERS:
            raise ValueError(
                f"the first {STREAM_VALIDATION_CHARACTERS} characters of a stream are validation "
                f"text; {data!r} has {sum(map(len, texts))}. Give --val-data, or download it."
            )
        validation, skip = _in_memory(data, texts), stream.rows
    else:
        validation, skip = _validation_text(val_data), 0

    def sample() -> Iterator[str]:
        label = "tokenizer text" if prepare.progress else None
        return iter(_take(HubStream(data, skip=skip), SAMPLE_CHARACTERS, label=label))

    name = sha256_json(data, skip)
    train = Documents(data, name, sample)
    tokenizer = prepare.text_tokenizer(train, validation, complete=False)
    tokens, counts, fingerprint = prepare.tokens({"validation": validation}, tokenizer)
    return Corpus(
        train=HubStream(data, skip=skip),
        validation=tokens["validation"],
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        fingerprint=sha256_json(fingerprint, name),
        validation_bytes=counts["validation"]["bytes"],
        description=counts | {"skipped_rows": skip},
    )


def _load_shards(data: str, val_data: str | None, prepare: Preparation) -> Corpus:
    tokenizer = prepare.ready_tokenizer()
    vocab_size = tokenizer.vocab_size if tokenizer else prepare.vocab_size
    train = open_shards(source_files(data))
    if val_data is None:
        cut = int(len(train) * (1 - VALIDATION_SHARE))
        train, validation = train.part(0, cut), train.part(cut, len(train))
    else:
        validation = open_shards(source_files(val_data))
    digests = [scan_tokens(tokens, vocab_size) for tokens in (train, validation)]
    lengths = tokenizer.byte_lengths() if tokenizer else None
    size = None
    if lengths is not None:
        size = sum(int(lengths[chunk].sum()) for chunk in validation.chunks())
    return Corpus(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        fingerprint=sha256_json(digests, tokenizer.fingerprint if tokenizer else None),
        validation_bytes=size,
        description={
            "train": {"tokens": len(train)},
            "validation": {"tokens": len(validation), "bytes": size},
        },
    )
