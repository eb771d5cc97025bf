import json
import math
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
from datasets.packaged_modules.parquet.parquet import Parquet
from tokenizers import models, pre_tokenizers, trainers

from posenc.data import (
    Batches,
    StreamBatches,
    Tokenizer,
    Tokens,
    byte_tokenizer,
    corpus,
    load_corpus,
    prepare,
    split_documents,
    train_bpe,
    write_bin,
)
from posenc.data.files import sha256_json
from posenc.data.tokenizers import byte_level
from posenc.training.config import TrainConfig
from posenc.training.report import heading

WORDS = "the cat sat on a mat and then it went to see the other cat\n"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 100, encoding="utf-8")
    return path


@pytest.fixture
def load(tmp_path):
    def load(data, **options):
        defaults = {"context": 8, "cache_dir": tmp_path / "cache", "progress": False}
        return load_corpus(data, **(defaults | options))

    return load


def cache_names(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_tokens_are_the_text(source, load, kind):
    found = load(source, tokenizer=kind, vocab_size=300)
    whole = WORDS * 100
    cut = int(len(whole) * 0.9)
    for tokens, text in ((found.train, whole[:cut]), (found.validation, whole[cut:])):
        ids = tokens[:].tolist()
        if found.tokenizer.end_of_text is not None:
            assert ids.pop(0) == found.tokenizer.end_of_text
        assert found.tokenizer.decode(ids) == text
    assert found.validation_bytes == len(whole) - cut
    assert found.vocab_size == found.tokenizer.vocab_size
    assert found.description["data"] == str(source)
    assert found.description["train"]["documents"] == 1
    assert found.description["validation"]["characters"] == len(whole) - cut
    json.dumps(found.description)
    inputs, _ = found.batches(context=8, batch_size=4, seed=1).next_batch()
    assert inputs.shape == (4, 8)


def test_end_of_text_precedes_each_document(tmp_path, load):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n" * 20)
    found = load(str(tmp_path / "[012].txt"), tokenizer="byte", val_data=tmp_path / "0.txt")
    pieces = "".join(f"<|endoftext|>{f'text {i}' + chr(10)}" + f"text {i}\n" * 19 for i in range(3))
    assert found.tokenizer.decode(found.train[:]) == pieces
    assert found.description["val_data"] == str(tmp_path / "0.txt")


def test_many_long_documents_in_odd_batches(tmp_path, load, monkeypatch):
    monkeypatch.setattr("posenc.data.encode._BATCH_CHARACTERS", 1000)
    texts = ["".join(f"{WORDS}{i} é\n" for i in range(j)) for j in (0, 1, 5000, 3)]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = load(tmp_path / "a.parquet", tokenizer="byte", val_data=tmp_path / "a.parquet")
    expected = [i for t in texts if t for i in (256, *t.encode())]
    assert found.train[:].tolist() == expected
    assert found.description["train"] == {
        "documents": 3,
        "characters": sum(map(len, texts)),
        "bytes": sum(len(t.encode()) for t in texts),
        "tokens": len(expected),
    }


@pytest.mark.parametrize("use_regex", [True, False])
def test_long_documents_of_other_tokenizers_keep_their_tokens(tmp_path, load, use_regex):
    """A saved tokenizer may put a space before every text, or merge across words."""
    text = "".join(f"{i} {WORDS}" for i in range(1200))
    (tmp_path / "a.txt").write_text(text)
    assert len(text) > 1 << 16
    state = train_bpe([text], 400).backend.to_str()
    if use_regex:
        state = state.replace('"add_prefix_space":false', '"add_prefix_space":true')
    else:
        backend = byte_level(models.BPE(), use_regex=False)
        backend.train_from_iterator([WORDS * 3], trainers.BpeTrainer(show_progress=False))
        backend.add_special_tokens(["<|endoftext|>"])
        state = backend.to_str()
    (tmp_path / "saved.json").write_text(state)
    found = load(tmp_path / "a.txt", tokenizer=tmp_path / "saved.json", val_data=tmp_path / "a.txt")
    whole = tokenizers.Tokenizer.from_str(state).encode(text).ids
    assert found.train[1:].tolist() == whole


def test_tokens_that_were_cut_wrongly_are_made_anew(source, load):
    """What older versions kept is used again, but not of tokenizers whose texts they cut."""
    first = load(source, tokenizer=byte_tokenizer())
    train, validation = split_documents(str(source))
    split = {"train": train.fingerprint, "validation": validation.fingerprint}
    assert first.fingerprint == sha256_json(1, split, byte_tokenizer().fingerprint)
    backend = byte_tokenizer().backend
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    padded = Tokenizer(backend)
    again = load(source, tokenizer=padded)
    assert again.fingerprint == sha256_json(2, split, padded.fingerprint)


def test_an_unusual_split_is_named_to_the_user(tmp_path, load):
    """In the run's records and above the first step, from the cache too."""
    rows = [{"text": f"{i} {WORDS}"} for i in range(24)] + [{"text": WORDS * 200}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        found = load(tmp_path / "a.jsonl", tokenizer="byte")
        (note,) = found.description["notes"]
        assert note.startswith("1 of the documents, with its copies up to 11,800 characters, is m")
        json.dumps(found.description)
    job = SimpleNamespace(
        config=TrainConfig(data="a.jsonl"),
        corpus=found,
        parallel=SimpleNamespace(world_size=1, device="cpu"),
        model=SimpleNamespace(num_parameters=lambda: 1),
        folder=SimpleNamespace(path="run"),
        dtype=torch.float32,
        step=0,
        tokens=0,
    )
    assert f"\nnote: {note}\n" in heading(job)


def test_a_usual_split_has_no_notes(source, load):
    assert "notes" not in load(source, tokenizer="byte").description


def test_the_cache_is_used_and_mended(source, load, tmp_path, monkeypatch):
    first = load(source, vocab_size=300)
    names = cache_names(tmp_path)
    assert [name.split("-")[0] for name in names] == ["tokenizer", "tokens"]
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_tokens", lambda *_, **__: pytest.fail("tokenised again"))
        patch.setattr(prepare, "train_bpe", lambda *_, **__: pytest.fail("trained again"))
        second = load(source, vocab_size=300)
    assert second.fingerprint == first.fingerprint
    assert second.description == first.description
    assert np.array_equal(second.train[:], first.train[:])

    for name in ("tokenizer.json", "train.bin"):
        (path,) = (tmp_path / "cache").glob(f"*/{name}")
        raw = path.read_bytes()
        path.write_bytes(raw[:-2] + b"!!")
        assert load(source, vocab_size=300).description == first.description
        assert path.read_bytes() == raw
    assert cache_names(tmp_path) == names


def test_a_saved_tokenizer_finds_the_same_tokens(source, load, tmp_path):
    """A resumed run passes the tokenizer of its folder."""
    first = load(source, vocab_size=300)
    first.tokenizer.save(tmp_path / "run" / "tokenizer.json")
    names = cache_names(tmp_path)
    for tokenizer in (tmp_path / "run" / "tokenizer.json", str(tmp_path / "run"), first.tokenizer):
        again = load(source, tokenizer=tokenizer)
        assert again.fingerprint == first.fingerprint
    assert cache_names(tmp_path) == names


def test_the_fingerprint_follows_text_and_tokenizer(source, load):
    prints = [load(source, vocab_size=size).fingerprint for size in (300, 270)]
    prints.append(load(source, tokenizer="byte").fingerprint)
    source.write_text(WORDS * 99 + WORDS.upper())
    prints.append(load(source, tokenizer="byte").fingerprint)
    prints.append(load(source, tokenizer="byte", val_data=source).fingerprint)
    assert len(set(prints)) == 5


def test_failure_leaves_nothing_behind(source, load, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(prepare.Tokens, "__init__", fail)  # after the tokens are complete
    with pytest.raises(OSError, match="disk full"):
        load(source, tokenizer="byte")
    assert len(cache_names(tmp_path)) == 1
    monkeypatch.undo()
    monkeypatch.setattr("posenc.data.encode.np.concatenate", fail)  # in the middle
    with pytest.raises(OSError, match="disk full"):
        load(source, tokenizer="char")
    assert sum(name.startswith("tokens-") for name in cache_names(tmp_path)) == 1
    assert not [name for name in cache_names(tmp_path) if name.startswith(".")]


FINGERPRINTS = """
import sys
from posenc.data import split_documents, train_bpe

train, validation = split_documents("stdlib")
assert "datasets" not in sys.modules  # slow to import, and not needed here
fingerprints = (train.fingerprint, validation.fingerprint, train_bpe(validation, 1000).fingerprint)
"""


def test_another_process_agrees():
    """Order of the files, BPE training and hashes depend on nothing that processes differ in."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", FINGERPRINTS + "print(*fingerprints)"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    train, validation = split_documents("stdlib")
    bpe = train_bpe(validation, 1000)
    assert run.stdout.split() == [train.fingerprint, validation.fingerprint, bpe.fingerprint]


def test_char_has_an_unknown_symbol_only_where_needed(tmp_path, load):
    (tmp_path / "train.txt").write_text("abcd" * 30)
    (tmp_path / "same.txt").write_text("dcba" * 30)
    (tmp_path / "other.txt").write_text("abcé" * 30, encoding="utf-8")
    options = {"data": tmp_path / "train.txt", "tokenizer": "char"}
    same = load(**options, val_data=tmp_path / "same.txt")
    assert same.vocab_size == 4
    other = load(**options, val_data=tmp_path / "other.txt")
    assert other.vocab_size == 5
    assert other.tokenizer.decode(other.validation[:8]) == "abc\ufffdabc\ufffd"
    assert other.validation_bytes == 150


def test_bpe_is_trained_on_a_sample_of_every_document(tmp_path, load, monkeypatch):
    seen = []

    def train(texts, *arguments, **options):
        seen.extend(texts)
        return train_bpe(seen, *arguments, **options)

    monkeypatch.setattr(prepare, "train_bpe", train)
    monkeypatch.setattr(prepare, "SAMPLE_CHARACTERS", 600)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(str(i) * 1000)
    load(str(tmp_path / "?.txt"), val_data=tmp_path / "0.txt")
    assert seen == [str(i) * 201 for i in range(3)]


def test_large_vocabularies_are_stored_wide(source, load, tmp_path):
    saved = json.loads(byte_tokenizer().backend.to_str())
    saved["model"]["vocab"]["t"] = 70_000
    (tmp_path / "wide.json").write_text(json.dumps(saved))
    found = load(source, tokenizer=tmp_path / "wide.json")
    assert found.vocab_size == 70_001
    assert found.train[:3].tolist() == [256, 70_000, ord("h")]


def test_stdlib(load):
    found = load("stdlib", tokenizer="byte", context=1024)
    assert len(found.train) > 1_000_000
    assert len(found.validation) > 100_000
    assert found.train[0:1][0] == 256
    text = load("stdlib", tokenizer="byte", val_data="stdlib")
    assert text.fingerprint == found.fingerprint


def test_progress_bars(source, load, capsys):
    load(source, progress=True, tokenizer="char")
    assert "tokenise validation: 100%" in capsys.readouterr().err
    load(source, progress=False, tokenizer="byte")
    assert capsys.readouterr() == ("", "")


# Token shards


def test_shards_of_a_known_tokenizer(tmp_path, load):
    tokenizer = byte_tokenizer()
    ids = np.concatenate([[256], tokenizer.encode(WORDS * 10)])
    write_bin(tmp_path / "0.bin", ids[:300])
    np.save(tmp_path / "1.npy", ids[300:].astype(np.uint16))
    found = load(str(tmp_path / "*.*"), tokenizer="byte")
    assert (len(found.train), len(found.validation)) == (531, 60)
    assert found.train[:].tolist() + found.validation[:].tolist() == ids.tolist()
    assert found.validation_bytes == 60
    assert found.vocab_size == 257
    assert isinstance(found.batches(context=8, batch_size=2, seed=0), Batches)
    whole = load(str(tmp_path / "*.*"), val_data=tmp_path / "0.bin", tokenizer="byte")
    assert (len(whole.train), len(whole.validation)) == (591, 300)
    assert whole.validation_bytes == 299  # end of text has none
    assert whole.fingerprint != found.fingerprint


def test_shards_of_an_unknown_tokenizer(tmp_path, load):
    write_bin(tmp_path / "a.bin", np.arange(100))
    found = load(tmp_path / "a.bin", vocab_size=100)
    assert (found.tokenizer, found.validation_bytes, found.vocab_size) == (None, None, 100)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"must lie in 0\.\.98; got 99.*--vocab-size"):
        load(tmp_path / "a.bin", vocab_size=99)


def test_text_and_shards_do_not_mix(source, tmp_path, load):
    write_bin(tmp_path / "a.bin", np.arange(100))
    for data, val_data in ((source, tmp_path / "a.bin"), (tmp_path / "a.bin", source)):
        with pytest.raises(ValueError, match="both be text or both be token shards"):
            load(data, val_data=val_data)


# Streams


@pytest.fixture
def hub(tmp_path, monkeypatch):
    texts = [f"document {i}: {WORDS}" for i in range(60)]
    path = str(tmp_path / "hub.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    builder = partial(Parquet, data_files={"train": [path]})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder())
    monkeypatch.setattr(corpus, "STREAM_VALIDATION_CHARACTERS", len(texts[0]) * 4)
    return texts


@pytest.mark.parametrize("kind", ["bpe", "char", "byte"])
def test_a_stream_is_split_at_its_beginning(hub, load, kind):
    found = load("hf:user/data", tokenizer=kind, vocab_size=300)
    prefix = "" if kind == "char" else "<|endoftext|>"
    assert found.tokenizer.decode(found.validation[:]) == "".join(prefix + t for t in hub[:4])
    assert found.validation_bytes == sum(map(len, hub[:4]))
    assert found.description["skipped_rows"] == 4
    batches = found.batches(context=8, batch_size=2, seed=0)
    assert isinstance(batches, StreamBatches)
    ids = torch.cat([batches.next_batch()[0].flatten() for _ in range(12)]).tolist()
    assert "".join(prefix + t for t in hub[4:]).startswith(found.tokenizer.decode(ids))
    again = load("hf:user/data", tokenizer=kind, vocab_size=300)
    assert again.fingerprint == found.fingerprint
    fresh = found.batches(context=8, batch_size=2, seed=0)
    assert fresh.next_batch()[0].flatten().tolist() == ids[:16]


def test_a_stream_with_validation_text_of_its_own(hub, load, source):
    found = load("hf:user/data", val_data=source, tokenizer="byte")
    assert len(found.validation) == len(WORDS) * 100 + 1
    batches = found.batches(context=8, batch_size=2, seed=0)
    ids = batches.next_batch()[0].flatten().tolist()
    assert found.tokenizer.decode(ids) == ("<|endoftext|>" + hub[0])[: 13 + 15]
    streamed = load(source, val_data="hf:user/data", tokenizer="byte")
    assert streamed.description["validation"]["documents"] == 4


def test_char_of_a_stream_has_an_unknown_symbol(hub, load):
    """It has not seen all of the training text."""
    found = load("hf:user/data", tokenizer="char")
    assert found.tokenizer.decode(found.tokenizer.encode("cat é")) == "cat \ufffd"


def test_a_stream_too_short_to_split(hub, load, monkeypatch):
    monkeypatch.setattr(corpus, "STREAM_VALIDATION_CHARACTERS", 10**6)
    with pytest.raises(ValueError, match=r"the first 1000000 characters .* Give --val-data"):
        load("hf:user/data", tokenizer="byte")


# Wrong input


def test_a_context_longer_than_the_data(source, load):
    message = (
        "context 4096 needs at least 4097 tokens; the validation split has 591. "
        "Choose a context of at most 590 or longer text."
    )
    with pytest.raises(ValueError, match=message):
        load(source, tokenizer="byte", context=4096)
    with pytest.raises(ValueError, match="the training split has 5311"):
        load(source, tokenizer="byte", context=10_000)
    with pytest.raises(ValueError, match="context must be at least 1; got 0"):
        load(source, context=0)


def test_too_little_text(tmp_path, load):
    (tmp_path / "a.txt").write_text("x")
    for kind in ("byte", "bpe", "char"):
        with pytest.raises(ValueError, match=r"the training split has 0\. Choose longer text"):
            load(tmp_path / "a.txt", tokenizer=kind)


def test_wrong_names(source, load, tmp_path):
    with pytest.raises(ValueError, match=r"unknown tokenizer: 'bqe'\. Did you mean 'bpe'"):
        load(source, tokenizer="bqe")
    with pytest.raises(ValueError, match="expected a tokenizer in"):
        load(source, tokenizer=tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'stdlib'"):
        load("stdlb")
    with pytest.raises(ValueError, match="matches no file"):
        load(source, val_data=str(tmp_path / "*.md"))
    with pytest.raises(ValueError, match="257 or more"):
        load(source, vocab_size=100)


def test_names_of_the_folder():
    import posenc.data

    assert sorted(posenc.data.__all__) == posenc.data.__all__
    assert all(hasattr(posenc.data, name) for name in posenc.data.__all__)
    assert posenc.data.Tokens is Tokens


def test_bits_per_byte_of_uniform_bytes(source, load):
    """The formula in Corpus's docstring: a model that knows nothing needs 8 bits a byte."""
    found = load(source, tokenizer="byte")
    loss = math.log(256)
    bits = loss / math.log(2) * len(found.validation) / found.validation_bytes
    assert bits == pytest.approx(8 * 591 / 590)
