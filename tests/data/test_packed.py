"""Packed documents: every token once, whole documents, nothing crosses, resumable anywhere."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posenc.data import PackedBatches, Tokens, packed_windows
from posenc.data.packed import PackedBatch, find_pieces, pack

END = 7


def documents(lengths: Sequence[int]) -> tuple[Tokens, list[list[int]]]:
    """Tokens of documents END, 100, 101, .. numbered through, in two arrays."""
    texts, number = [], 100
    for length in lengths:
        texts.append([END, *range(number, number + length)])
        number += length
    row = np.array([token for text in texts for token in text])
    return Tokens([row[: len(row) // 3], row[len(row) // 3 :]]), texts


def read(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    """The inputs and targets of every piece, padding left out."""
    found = []
    for inputs, targets, segments in zip(*batch, strict=True):
        for document in segments.unique():
            own = segments == document
            if (targets[own] != -100).any():
                found.append((inputs[own].tolist(), targets[own].tolist()))
    return found


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 9))
def test_every_token_is_an_input_once_and_meets_its_own_successor(
    lengths: list[int], context: int
) -> None:
    tokens, texts = documents(lengths)
    row = [token for text in texts for token in text]
    if len(row) < 2:
        return
    pieces = [piece for batch in packed_windows(tokens, END, context) for piece in read(batch)]
    following = dict(pairwise(row))
    seen = []
    for inputs, targets in pieces:
        assert len(inputs) <= context
        assert inputs[1:] == targets[:-1]
        seen += inputs
        if inputs[-1] != END:
            assert targets[-1] == following[inputs[-1]]
    assert sorted(seen) == sorted(row[:-1])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_rows_hold_no_more_than_fits_and_no_two_could_be_one(lengths: list[int]) -> None:
    rows = pack(np.array(lengths), 9)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert max(sums) <= 9
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > 9


def test_short_documents_stay_whole_and_long_ones_are_cut_at_the_context() -> None:
    tokens, _ = documents([3, 11, 2])
    assert find_pieces(tokens, END, 5).lengths.tolist() == [4, 5, 5, 2, 2]


def test_epochs_hold_the_same_rows_in_number_and_every_document() -> None:
    tokens, _ = documents([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
    batches = PackedBatches(tokens, END, context=8, batch_size=1, seed=3)
    epochs = []
    for _ in range(3):
        rows = [batches.next_batch() for _ in range(batches.windows_per_epoch)]
        epochs.append([piece for row in rows for piece in read(row)])
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1]


def test_ranks_and_batch_sizes_share_one_sequence_and_resume_in_it() -> None:
    tokens, _ = documents([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9])
    one = PackedBatches(tokens, END, context=8, batch_size=4, seed=3)
    expected = [one.next_batch() for _ in range(5)]
    ranks = [
        PackedBatches(tokens, END, context=8, batch_size=4, seed=3, rank=rank, world_size=2)
        for rank in range(2)
    ]
    for whole in expected[:2]:
        parts = [rank.next_batch() for rank in ranks]
        for field, *own in zip(whole, *parts, strict=True):
            assert torch.equal(field, torch.cat(own))
    later = PackedBatches(tokens, END, context=8, batch_size=2, seed=3)
    later.load_state_dict(ranks[0].state_dict())
    halves = [later.next_batch(), later.next_batch()]
    for field, *own in zip(expected[2], *halves, strict=True):
        assert torch.equal(field, torch.cat(own))


def test_positions_of_other_data_or_of_a_stream_are_refused() -> None:
    tokens, _ = documents([3, 1, 4])
    batches = PackedBatches(tokens, END, context=4, batch_size=1, seed=0)
    state = batches.state_dict()
    with pytest.raises(ValueError, match="did not pack"):
        batches.load_state_dict({key: value for key, value in state.items() if key != "pack"})
    with pytest.raises(ValueError, match="has seed 1; got 0"):
        batches.load_state_dict(state | {"seed": 1})
    with pytest.raises(ValueError, match="at least 2 tokens; got 1"):
        PackedBatches(tokens.part(0, 1), END, context=4, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="seed must be 0 or more; got -1"):
        PackedBatches(tokens, END, context=4, batch_size=1, seed=-1)


def test_a_limit_stops_after_the_batch_that_reaches_it() -> None:
    tokens, _ = documents([7] * 6)
    scored = [
        int((b.targets != -100).sum()) for b in packed_windows(tokens, END, 8, 9, batch_size=1)
    ]
    assert scored == [8, 8]
