import http.client
import json
import logging

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posenc.data import HubStream, StreamBatches, StreamError, byte_tokenizer, char_tokenizer
from posenc.data.hub import is_network_error, parse_hub_source

TEXTS = [f"document {i} " + "x" * (i % 11) for i in range(50)]
SOURCE = "hf:user/data:config"


class Network:
    """A Hub with one dataset in two files, which breaks on demand.

    `failures` maps a row (-1: opening) to the errors that the next reads of it raise, one each.
    """

    def __init__(self, folder, rows):
        half = len(rows) // 2
        self.paths = []
        for i, part in enumerate((rows[:half], rows[half:])):
            self.paths.append(str(folder / f"{i}.parquet"))
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), self.paths[-1])
        self.numbers = {row.get("text"): row["id"] for row in rows}
        self.failures = {}
        self.opened = []

    def fail(self, row):
        if self.failures.get(row):
            raise self.failures[row].pop(0)

    def load_dataset_builder(self, *arguments):
        self.opened.append(arguments)
        self.fail(-1)
        return Builder(self)


class Builder:
    """A builder of the `datasets` library whose streams may break."""

    def __init__(self, network):
        self.network, self.builder = network, Parquet(data_files={"train": network.paths})
        self.config = self.builder.config

    def as_streaming_dataset(self, *, split):
        return Breaking(self.network, self.builder.as_streaming_dataset(split=split))


class Breaking:
    """A streaming dataset of the `datasets` library whose rows may fail to arrive."""

    def __init__(self, network, dataset):
        self.network, self.dataset, self.features = network, dataset, dataset.features
        self.state_dict, self.load_state_dict = dataset.state_dict, dataset.load_state_dict

    def __iter__(self):
        for row in self.dataset:
            self.network.fail(self.network.numbers[row.get("text")])
            yield row


@pytest.fixture
def network(tmp_path, monkeypatch):
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    found = Network(tmp_path, rows)
    monkeypatch.setattr(datasets, "load_dataset_builder", found.load_dataset_builder)
    return found


def stream(**options):
    waits = []
    found = HubStream(SOURCE, sleep=waits.append, **options)
    return found, waits


def test_documents_in_order(network):
    hub, _ = stream()
    assert list(hub) == TEXTS
    assert list(hub) == TEXTS  # the next epoch
    assert network.opened == [("user/data", "config")] * 2


def test_names():
    assert parse_hub_source("hf:user/data") == ("user/data", None)
    assert parse_hub_source("hf:user/data:a:b") == ("user/data", "a:b")
    for source in ("hf:", "hf::x", "hf:user/data:", "user/data"):
        with pytest.raises(ValueError, match=r"expected hf:REPO\[:CONFIG\]"):
            parse_hub_source(source)
    with pytest.raises(ValueError, match="attempts must be at least 1"):
        HubStream(SOURCE, attempts=0)


def test_skipped_rows_and_empty_texts(network):
    hub, _ = stream(skip=7)
    assert list(hub) == TEXTS[7:]
    assert list(hub) == TEXTS[7:]


def test_null_texts_are_skipped(tmp_path, monkeypatch):
    rows = [{"id": i, "text": t} for i, t in enumerate(["a", None, "", "b"])]
    found = Network(tmp_path, rows)
    monkeypatch.setattr(datasets, "load_dataset_builder", found.load_dataset_builder)
    assert list(stream()[0]) == ["a", "b"]


def test_a_dataset_without_text(tmp_path, monkeypatch):
    found = Network(tmp_path, [{"id": i, "body": "x"} for i in range(4)])
    monkeypatch.setattr(datasets, "load_dataset_builder", found.load_dataset_builder)
    with pytest.raises(ValueError, match="column 'text' in hf:user/data:config; it has 'id', 'b"):
        list(stream()[0])


def test_only_text_is_read_and_other_columns_may_differ(tmp_path, monkeypatch):
    """On the Hub too a column that nobody reads may have another type in every file."""
    rows = [{"id": i, "text": f"t{i}", "year": year} for i, year in enumerate([1, 2, "c", "d"])]
    found = Network(tmp_path, rows)
    monkeypatch.setattr(datasets, "load_dataset_builder", found.load_dataset_builder)
    assert list(stream()[0]) == ["t0", "t1", "t2", "t3"]


def test_other_formats_are_read_whole(tmp_path, monkeypatch):
    """Only parquet can leave columns out; a repository's JSON still streams."""
    path = tmp_path / "a.jsonl"
    path.write_text('[{"text": "a"}, {"text": "b"}]')  # an array: no features before it is read
    builder = Json(data_files={"train": [str(path)]})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder)
    assert list(stream()[0]) == ["a", "b"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=4), skip=st.integers(0, 9))
def test_resume_again_and_again(network, cuts, skip):
    """Every resume is of a stream that was itself resumed."""
    state, seen = stream(skip=skip)[0].state_dict(), []
    for count in cuts:
        hub, _ = stream(skip=skip)
        hub.load_state_dict(json.loads(json.dumps(state)))
        documents = iter(hub)
        for _ in range(count):
            seen += [next(documents, None) or next(documents := iter(hub))]
        state = hub.state_dict()
    assert seen == ((TEXTS[skip:]) * 4)[: len(seen)]


@pytest.mark.parametrize("row", [-1, 0, 1, 24, 25, 49])
@pytest.mark.parametrize(
    "error", [ConnectionError("reset"), TimeoutError(), http.client.IncompleteRead(b"")], ids=repr
)
def test_a_broken_stream_goes_on_at_the_next_document(network, caplog, row, error):
    network.failures = {row: [error, error]}
    hub, waits = stream(wait=0.5)
    with caplog.at_level(logging.WARNING):
        assert list(hub) == TEXTS
    assert waits == [0.5, 1.0]
    assert len(network.opened) == 3
    assert "Trying again in 0.5 s" in caplog.text
    assert f"after row {max(row, 0)}" in caplog.text


def test_progress_forgives_earlier_failures(network):
    network.failures = {row: [OSError("reset")] * 2 for row in range(0, 50, 5)}
    hub, waits = stream(attempts=3, wait=1)
    assert list(hub) == TEXTS
    assert waits == [1, 2] * 10


@pytest.mark.parametrize("row", [-1, 30])
def test_giving_up_keeps_the_position(network, row):
    network.failures = {row: [ConnectionError("no\nroute.")] * 4}
    hub, waits = stream(attempts=4, wait=1)
    seen = []
    with pytest.raises(StreamError, match=r"ConnectionError: no route\. Gave up after 4 attempts"):
        seen.extend(hub)  # extend keeps nothing of an iterable that raises
    assert waits == [1, 2, 4]
    assert issubclass(StreamError, RuntimeError)
    resumed, _ = stream()
    resumed.load_state_dict(hub.state_dict())
    assert list(resumed) == TEXTS[max(row, 0) :]


def test_what_is_missing_is_not_tried_again(network):
    network.failures = {-1: [DatasetNotFoundError("no such dataset"), PermissionError("gated")]}
    for message in ("no such dataset", "gated"):
        hub, waits = stream()
        with pytest.raises(ValueError, match=rf"{message}\. Check the name, or log in"):
            list(hub)
        assert waits == []
    network.failures = {3: [ZeroDivisionError()]}
    hub, waits = stream()
    with pytest.raises(ZeroDivisionError):
        list(hub)
    assert waits == []


def test_what_counts_as_the_network():
    class Timeout(Exception):
        __module__ = "httpx._exceptions"

    for error in (OSError(), ConnectionResetError(), Timeout(), http.client.HTTPException()):
        assert is_network_error(error)
    for error in (FileNotFoundError(), PermissionError(), ValueError(), KeyError()):
        assert not is_network_error(error)


def test_a_position_in_another_source_is_refused():
    state = HubStream("hf:user/other").state_dict()
    with pytest.raises(ValueError, match="lies in 'hf:user/other'; got 'hf:user/data:config'"):
        HubStream(SOURCE).load_state_dict(state)


# Batches from a stream

BYTE = byte_tokenizer()


def batches(context=16, batch_size=4, tokenizer=BYTE, hub=None, **ranks):
    hub = hub or stream()[0]
    return StreamBatches(hub, tokenizer, context=context, batch_size=batch_size, **ranks)


def take(source, count):
    """Return all inputs of the next batches, in one row."""
    return torch.cat([source.next_batch()[0].flatten() for _ in range(count)]).tolist()


def packed(tokenizer, epochs):
    start = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    return [i for text in TEXTS * epochs for i in start + tokenizer.encode(text).tolist()]


@pytest.mark.parametrize("tokenizer", [BYTE, char_tokenizer(TEXTS)], ids=["byte", "char"])
def test_stream_batches_pack_documents_in_order(network, tokenizer):
    source = batches(tokenizer=tokenizer)
    expected = packed(tokenizer, 4)
    seen, count = [], 3 * len(expected) // 4 // 64
    for _ in range(count):
        inputs, targets = source.next_batch()
        assert inputs.shape == targets.shape == (4, 16)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])
        seen += inputs.flatten().tolist()
        assert targets[-1, -1] == expected[len(seen)]
    assert seen == expected[: len(seen)]
    assert source.epoch >= 2
    assert source.sequences == 4 * count


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from([1, 2, 4])), max_size=4))
def test_stream_batches_resume_on_any_number_of_ranks(network, legs):
    whole, state = batches(), batches().state_dict()
    for steps, world_size in legs:
        rank = world_size - 1
        resumed = batches(rank=rank, world_size=world_size)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(steps):
            expected = [x[rank * (4 // world_size) :] for x in whole.next_batch()]
            for a, b in zip(resumed.next_batch(), expected, strict=True):
                assert torch.equal(a, b)
        state = resumed.state_dict()
    assert state["sequences"] == whole.sequences
    assert state["epoch"] == whole.epoch


@pytest.mark.parametrize("row", [0, 3, 15, 16, 17, 49])
def test_stream_batches_lose_nothing_when_the_network_breaks(network, row):
    expected = take(batches(), 30)
    network.failures = {row: [ConnectionError("reset")] * 3}
    source = batches(hub=stream(attempts=1)[0])
    seen, errors = [], 0
    while len(seen) < len(expected):
        try:
            seen += take(source, 1)
        except StreamError:
            errors += 1
            resumed = batches(hub=stream(attempts=1)[0])  # as after saving and stopping
            resumed.load_state_dict(source.state_dict())
            source = resumed if errors == 2 else source
    assert errors == 3
    assert seen == expected


def test_stream_batches_refuse(network, tmp_path):
    with pytest.raises(ValueError, match="context must be at least 1"):
        batches(context=0)
    with pytest.raises(ValueError, match="positive multiple"):
        batches(world_size=3)
    with pytest.raises(ValueError, match="the stream has no text"):
        batches(hub=stream(skip=50)[0]).next_batch()
    state = batches().state_dict()
    for other in (batches(context=15), batches(tokenizer=char_tokenizer(TEXTS))):
        with pytest.raises(ValueError, match="Resume with the settings"):
            other.load_state_dict(state)


def test_one_document_may_fill_many_batches(network):
    source = batches(context=1, batch_size=1)
    assert take(source, 400) == packed(BYTE, 1)[:400]
    source = batches(context=1000, batch_size=2)
    assert np.array_equal(take(source, 2), packed(BYTE, 9)[:4000])
