import json
import os

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from posenc.data import (
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    train_bpe,
)

TEXTS = [
    "the cat sat on the mat, and the dog didn't.\n" * 20,
    "Größe, naïve, 日本語 — emoji 🙂🙂\n\n\tdef f(x):\n        return x + 1  \n" * 10,
]
BPE = train_bpe(TEXTS, 320)
BYTE = byte_tokenizer()
CHAR = char_tokenizer(TEXTS)
UNKNOWN = char_tokenizer(TEXTS, unknown_symbol=True)
ALL = {"bpe": BPE, "byte": BYTE, "char": CHAR, "unknown": UNKNOWN}


def saved(base, pre=None, added=(), **model):
    """One of ours with other values in its saved form, and tokens added to it."""
    state = json.loads(base.backend.to_str())
    state["pre_tokenizer"] = state["pre_tokenizer"] and state["pre_tokenizer"] | (pre or {})
    state["model"] |= model
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.add_tokens(list(added))
    return Tokenizer(backend)


def byte_symbols(*more):
    """The vocabulary of all bytes and some more symbols."""
    symbols = [*pre_tokenizers.ByteLevel.alphabet(), *more]
    return {symbol: i for i, symbol in enumerate(sorted(symbols))}


LINES = {"vocab": byte_symbols("aĊ", "aĊa", "##a", "##Ċ"), "merges": [["a", "Ċ"]]}
SPELLED = LINES | {"merges": []}
FUSED = {"vocab": {"a": 0, "\n": 1, "a\n": 2, "?": 3}, "merges": []}
# Each of these would encode "a" and "\na" apart in another way than "a\na".
WHOLE = {
    "prefix space": saved(BPE, {"add_prefix_space": True}),
    "prefix space, bytes": saved(BYTE, {"add_prefix_space": True}),
    "merges across words": saved(BYTE, **LINES),
    "whole texts are symbols": saved(BYTE, **SPELLED, ignore_merges=True),
    "marks inside words": saved(BYTE, **SPELLED, continuing_subword_prefix="##"),
    "marks at the end": saved(BYTE, vocab=byte_symbols("a</w>"), end_of_word_suffix="</w>"),
    "an added line end": saved(BPE, added=["a\na"]),
    "strips to the right": saved(BPE, added=[AddedToken("a", rstrip=True)]),
    "characters and merges": saved(CHAR, **FUSED | {"merges": [["a", "\n"]]}),
    "unknown ones become one": saved(CHAR, vocab={"b": 0}, unk_token="b", fuse_unk=True),
    "added to characters": saved(CHAR, **FUSED, added=["a\na"]),
}
# These are as safe to cut as our own.
CUT = {
    "other merges": saved(BPE, **LINES),
    "marks, by words": saved(BPE, **SPELLED, continuing_subword_prefix="##"),
    "added words": saved(BPE, added=["a.", "1,a"]),
    "special tokens are text": saved(BPE, added=[AddedToken("a\na", rstrip=True, special=True)]),
}


@pytest.fixture(params=ALL)
def tokenizer(request):
    return ALL[request.param]


@given(st.text())
def test_any_text_round_trips(text):
    for tokenizer in (BPE, BYTE):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.byte_lengths()[tokenizer.encode(text)].sum() == len(text.encode())


@given(st.text(st.sampled_from(sorted(set().union(*TEXTS)))))
def test_known_characters_round_trip(text):
    for tokenizer in (CHAR, UNKNOWN):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


@settings(deadline=None)
@given(
    st.text(st.sampled_from(" \n\t\r\x0b\x1c\x85\u2028aé1.,'s<|>"), max_size=60), st.integers(1, 9)
)
def test_pieces_change_no_token(text, size):
    for tokenizer in (*ALL.values(), *CUT.values(), *WHOLE.values()):
        known = "".join(c for c in text if c in "".join(TEXTS))
        usable = text if tokenizer not in (CHAR, UNKNOWN) else known
        pieces = list(tokenizer.pieces(usable, size))
        assert "".join(pieces) == usable
        rows = [tokenizer.encode(piece) for piece in pieces]
        assert np.concatenate(rows).tolist() == tokenizer.encode(usable).tolist()


@pytest.mark.parametrize("name", WHOLE)
def test_texts_are_whole_where_a_cut_changes_tokens(name):
    tokenizer = WHOLE[name]
    assert list(tokenizer.pieces("a\na" * 9, 1)) == ["a\na" * 9]
    apart = [*tokenizer.encode("a"), *tokenizer.encode("\na")]
    assert apart != tokenizer.encode("a\na").tolist()


@pytest.mark.parametrize("name", CUT)
def test_other_tokenizers_are_cut_where_that_changes_none(name):
    assert list(CUT[name].pieces("a\na\na", 1)) == ["a", "\na", "\na"]


def test_byte_lengths_of_other_tokenizers():
    for name in ("prefix space", "marks inside words", "strips to the right"):
        assert WHOLE[name].byte_lengths() is None
    for tokenizer in (WHOLE["an added line end"], WHOLE["merges across words"], *CUT.values()):
        if (lengths := tokenizer.byte_lengths()) is not None:
            for text in ("a\na", "é1,a.\n"):
                assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_long_texts_are_cut_into_short_pieces():
    pieces = list(BPE.pieces(TEXTS[0] * 10, 100))
    assert len(pieces) > 20
    assert max(map(len, pieces)) < 200


def test_sizes_and_special_ids():
    assert (BPE.vocab_size, BPE.end_of_text) == (320, 0)
    assert (BYTE.vocab_size, BYTE.end_of_text) == (257, 256)
    assert (CHAR.vocab_size, CHAR.end_of_text) == (len(set().union(*TEXTS)), None)
    assert UNKNOWN.vocab_size == CHAR.vocab_size + 1
    assert BYTE.encode("aé").tolist() == list("aé".encode())
    assert BYTE.encode(bytes(range(128)).decode()).tolist() == list(range(128))
    assert CHAR.encode("".join(sorted(set().union(*TEXTS)))).tolist() == [*range(CHAR.vocab_size)]


def test_encode_gives_int64(tokenizer):
    for text in ("", "the"):
        ids = tokenizer.encode(text)
        assert (ids.dtype, ids.ndim) == (np.int64, 1)
    assert [row.tolist() for row in tokenizer.encode_batch(["the", "", "cat"])] == [
        tokenizer.encode(text).tolist() for text in ("the", "", "cat")
    ]
    assert tokenizer.encode_batch([]) == []


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    for path in (tmp_path / "run" / "tokenizer.json", tmp_path / "run"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.vocab_size == tokenizer.vocab_size
        assert loaded.end_of_text == tokenizer.end_of_text
        for text in TEXTS:
            assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
            assert loaded.decode(loaded.encode(text)) == text
        assert loaded.byte_lengths().tolist() == tokenizer.byte_lengths().tolist()


def test_training_is_deterministic():
    again = train_bpe(iter(TEXTS), 320)
    assert again.fingerprint == BPE.fingerprint
    assert train_bpe(TEXTS, 319).fingerprint != BPE.fingerprint
    assert train_bpe(TEXTS[:1], 320).fingerprint != BPE.fingerprint


def test_little_text_gives_a_small_bpe():
    assert train_bpe(["ab"], 4096).vocab_size < 300
    assert train_bpe([], 4096).vocab_size == 257


def test_documents_cannot_fake_an_end():
    for tokenizer in (BPE, BYTE):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == "a<|endoftext|>b"
        assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"
        assert tokenizer.byte_lengths()[tokenizer.end_of_text] == 0


def test_unknown_characters():
    with pytest.raises(ValueError, match="got '§±' too"):
        CHAR.encode("the ±§ cat")
    ids = UNKNOWN.encode("the ±§ cat")
    assert len(ids) == 10
    assert UNKNOWN.decode(ids) == "the \ufffd\ufffd cat"
    # U+FFFD in the text is a character like any other, and the unknown symbol at once
    assert char_tokenizer(["a\ufffd"], unknown_symbol=True).vocab_size == 2


def test_bytes_that_are_no_text_decode_to_the_replacement():
    assert BYTE.decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert BYTE.decode(np.array([0x61])) == "a"


def test_wrong_input(tokenizer):
    for ids in ([tokenizer.vocab_size], [-1], [0, 10**9]):
        with pytest.raises(ValueError, match=r"must lie in 0\.\."):
            tokenizer.decode(ids)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("\ud800")
    with pytest.raises(ValueError, match="257 or more; got 256"):
        train_bpe(TEXTS, 256)
    with pytest.raises(ValueError, match="at least one symbol"):
        char_tokenizer([])


def test_bpe_files_under_both_names(tmp_path, monkeypatch):
    """Both forms of GPT-2's files give GPT-2's pipeline."""
    model = json.loads(BPE.backend.to_str())["model"]
    merges = "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"])
    for vocabulary, merge in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        folder = tmp_path / vocabulary
        folder.mkdir()
        (folder / vocabulary).write_text(json.dumps(model["vocab"]))
        (folder / merge).write_text(merges, encoding="utf-8")
        loaded = load_tokenizer(folder)
        assert (loaded.vocab_size, loaded.end_of_text) == (320, 0)
        for text in (*TEXTS, "a<|endoftext|>b"):
            assert loaded.encode(text).tolist() == BPE.encode(text).tolist()
    monkeypatch.setenv("POSENC_GPT2", str(folder))
    assert gpt2_tokenizer().fingerprint == loaded.fingerprint


def test_gpt2_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.delenv("POSENC_GPT2", raising=False)
    BPE.save(tmp_path / "tokenizer.json")
    asked = []

    def download(*name):
        asked.append(name)
        return str(tmp_path / "tokenizer.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert gpt2_tokenizer().fingerprint == BPE.fingerprint
    assert asked == [("openai-community/gpt2", "tokenizer.json")]

    def fail(*_):
        raise ConnectionError("no network.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"no network\. Choose --tokenizer FOLDER, or set POSENC"):
        gpt2_tokenizer()


@pytest.mark.skipif("POSENC_GPT2" not in os.environ, reason="POSENC_GPT2 names no folder")
def test_the_real_gpt2():
    tokenizer = gpt2_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode("Hello, world!").tolist() == [15496, 11, 995, 0]


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="expected a tokenizer in"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="expected a tokenizer in"):
        load_tokenizer(tmp_path / "none.json")
    for content in ("", "{", "{}", '{"model": null}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="reading it failed"):
            load_tokenizer(tmp_path / "tokenizer.json")


def test_tokenizers_of_other_families():
    """A pipeline that is not ours encodes plainly, whatever it was saved with."""
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 5}, unk_token="a"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("B b A b").tolist() == [1, 1, 0, 1]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (6, 5)
    assert tokenizer.byte_lengths() is None
    text = "a b\n" * 1000
    assert list(tokenizer.pieces(text, 10)) == [text]
