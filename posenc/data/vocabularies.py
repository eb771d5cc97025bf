"""The tokenizers that need no file of their own: `bpe`, `char`, `byte`, and `gpt2`.

`bpe`, `byte` and `gpt2` round-trip any text, `char` text of the characters it knows.
"""

import os
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from posenc.data.tokenizers import END_OF_TEXT, Tokenizer, byte_level, load_tokenizer

KINDS = ("bpe", "char", "byte", "gpt2")
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
GPT2_REPO = "openai-community/gpt2"
GPT2_FOLDER = "POSENC_GPT2"


def train_bpe(texts: Iterable[str], vocab_size: int, *, progress: bool = False) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's pattern. The same texts give the same tokenizer.

    Args:
        texts: training text.
        vocab_size: at least 257: `<|endoftext|>` is id 0, then come the 256 bytes, then merges.
            Little text gives fewer.
        progress: show a progress bar.

    Raises:
        ValueError: vocab_size is too small.
    """
    if vocab_size < 257:
        raise ValueError(
            f"a bpe needs vocab_size 257 or more; got {vocab_size}. Choose --tokenizer byte."
        )
    backend = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def char_tokenizer(texts: Iterable[str], *, unknown_symbol: bool = False) -> Tokenizer:
    """Return the character tokenizer of some texts: their distinct characters, sorted.

    Args:
        texts: their characters are the vocabulary.
        unknown_symbol: also have U+FFFD, which all other characters become; else they are an error.

    Raises:
        ValueError: there is no character.
    """
    characters = sorted(set().union(*texts))
    if unknown_symbol and UNKNOWN not in characters:
        characters.append(UNKNOWN)
    # A BPE without merges splits text into characters, and faster than a pattern does.
    vocabulary = {character: i for i, character in enumerate(characters)}
    unknown = UNKNOWN if unknown_symbol else None
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


def byte_tokenizer() -> Tokenizer:
    """Return the byte tokenizer: an id is a byte, and 256 is `<|endoftext|>`."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    backend = byte_level(models.BPE(vocab=vocabulary, merges=[]), use_regex=False)
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def gpt2_tokenizer() -> Tokenizer:
    """Return GPT-2's BPE, 50257 symbols.

    It is read from the folder that the environment variable POSENC_GPT2 names, else from the Hub
    (or what the Hub's client has kept of it).

    Raises:
        ValueError: it is in neither place.
    """
    if folder := os.environ.get(GPT2_FOLDER):
        return load_tokenizer(folder)
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(GPT2_REPO, "tokenizer.json")
    except Exception as error:  # a dozen unrelated types, none worth telling apart here
        raise ValueError(
            f"expected GPT-2's tokenizer from {GPT2_REPO} on the Hub; that failed: "
            f"{str(error).rstrip('.')}. Choose "
            f"--tokenizer FOLDER, or set {GPT2_FOLDER}=FOLDER, with encoder.json and vocab.bpe."
        ) from error
    return load_tokenizer(path)


def _byte_characters() -> list[str]:
    """Return the character that GPT-2 writes for each byte: itself, or from U+0100 on the next."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + n) for n in range(256))
    return [chr(byte) if byte in visible else next(others) for byte in range(256)]
