import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posenc.data import Batches, Tokens, evaluation_windows

TOKENS = np.arange(1000, dtype=np.uint16)
SIZES = st.tuples(st.integers(1, 40), st.integers(0, 300)).map(lambda s: (s[0], s[0] + 1 + s[1]))


def make(tokens=TOKENS, context=16, batch_size=6, seed=0, **ranks):
    return Batches(tokens, context=context, batch_size=batch_size, seed=seed, **ranks)


def rows(batches, count):
    """Return the first token of each of the next windows."""
    return [int(x) for _ in range(count) for x in batches.next_batch()[0][:, 0]]


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_shapes_types_and_shift():
    inputs, targets = make().next_batch()
    assert inputs.shape == targets.shape == (6, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(inputs + 1, targets)  # the tokens count up


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**40))
def test_an_epoch_scores_no_target_twice(sizes, seed):
    context, length = sizes
    batches = make(np.arange(length), context, 1, seed)
    windows = batches.windows_per_epoch
    for _ in range(3):
        targets = torch.cat([batches.next_batch()[1] for _ in range(windows)])
        assert targets.unique().numel() == windows * context
        assert length - 1 - windows * context < 2 * context
        assert int(targets.min()) >= 1
        assert int(targets.max()) < length


def test_every_offset_and_token_turns_up():
    batches = make(np.arange(50), 4, 1)
    assert batches.windows_per_epoch == 11
    seen = [batches.next_batch() for _ in range(11 * 30)]
    assert {int(x[0, 0]) % 4 for x, _ in seen} == {0, 1, 2, 3}
    assert {int(t) for _, y in seen for t in y.flatten()} == set(range(1, 50))


def test_the_smallest_data():
    batches = make(np.array([7, 8]), 1, 3)
    for _ in range(5):
        inputs, targets = batches.next_batch()
        assert (inputs.tolist(), targets.tolist()) == ([[7]] * 3, [[8]] * 3)


def test_seeds_and_epochs_shuffle_differently():
    first = rows(make(), 20)
    assert first == rows(make(), 20)
    assert first != rows(make(seed=1), 20)
    epoch = make().windows_per_epoch
    assert epoch == 61
    assert first[:epoch] != sorted(first[:epoch])
    assert [x % 16 for x in first[:epoch]] != [x % 16 for x in first[epoch : 2 * epoch]]


@settings(deadline=None)
@given(SIZES, st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6]), st.data())
def test_ranks_share_one_sequence(sizes, per_rank, world_size, data):
    context, length = sizes
    tokens = np.arange(length)
    batch_size = per_rank * world_size
    alone = make(tokens, context, batch_size)
    ranks = [
        make(tokens, context, batch_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for _ in range(data.draw(st.integers(1, 5))):
        parts = [rank.next_batch() for rank in ranks]
        together = [torch.cat(halves) for halves in zip(*parts, strict=True)]
        assert_equal(together, alone.next_batch())
    assert {json.dumps(r.state_dict()) for r in ranks} == {json.dumps(alone.state_dict())}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from([1, 2, 3, 6])), max_size=4))
def test_resume_anywhere_on_any_number_of_ranks(legs):
    whole = make(TOKENS[:100], 7, 6)
    state = make(TOKENS[:100], 7, 6).state_dict()
    for steps, world_size in legs:
        rank = world_size - 1
        resumed = make(TOKENS[:100], 7, 6, rank=rank, world_size=world_size)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        share = 6 // world_size
        for _ in range(steps):
            expected = whole.next_batch()
            assert_equal(resumed.next_batch(), [x[rank * share :] for x in expected])
        state = resumed.state_dict()
    assert state == whole.state_dict()


def test_batch_size_may_change_on_resume():
    whole, small = make(batch_size=6), make(batch_size=2)
    whole.next_batch()
    small.load_state_dict(whole.state_dict())
    parts = [small.next_batch() for _ in range(3)]
    assert_equal([torch.cat(x) for x in zip(*parts, strict=True)], whole.next_batch())


def test_shards_are_one_sequence():
    shards = Tokens([TOKENS[:10], TOKENS[10:11], TOKENS[11:300], TOKENS[300:]])
    one, several = make(), make(shards)
    for _ in range(30):
        assert_equal(one.next_batch(), several.next_batch())


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", ">u4"])
def test_stored_types(dtype):
    assert_equal(make(TOKENS.astype(dtype)).next_batch(), make().next_batch())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context must be at least 1; got 0"),
        ({"context": 1000}, "context 1000 needs at least 1001 tokens; the data has 1000"),
        ({"tokens": TOKENS[:1]}, "the data has 1. Choose longer text"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"batch_size": 0}, "positive multiple.*got 0. Choose 1"),
        ({"batch_size": 7, "world_size": 4}, "all 4 ranks.*got 7. Choose 8"),
        ({"batch_size": 1, "world_size": 4}, "got 1. Choose 4"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in 0\.\.1; got 2"),
        ({"rank": -1}, r"rank must lie in 0\.\.0; got -1"),
        ({"world_size": 0}, "rank must lie in"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize("other", [{"seed": 1}, {"context": 15}, {"tokens": TOKENS[:999]}], ids=str)
def test_a_position_of_other_data_is_refused(other):
    with pytest.raises(ValueError, match="Resume with the settings of the saved run"):
        make(**other).load_state_dict(make().state_dict())


# Evaluation


@given(SIZES, st.none() | st.integers(1, 400), st.integers(1, 9))
def test_evaluation_scores_in_order_and_once(sizes, max_tokens, batch_size):
    context, length = sizes
    batches = list(
        evaluation_windows(np.arange(length), context, max_tokens, batch_size=batch_size)
    )
    inputs, targets = (torch.cat(x) for x in zip(*batches, strict=True))
    assert inputs.flatten().tolist() == list(range(inputs.numel()))
    assert torch.equal(inputs + 1, targets)
    limit = length - 1 if max_tokens is None else min(length - 1, max(max_tokens, context))
    assert targets.numel() == limit // context * context
    assert all(len(x) == batch_size for x, _ in batches[:-1])
    assert all(x.dtype == torch.int64 for batch in batches for x in batch)


def test_evaluation_refuses_at_once():
    message = "context 4096 needs at least 4097 tokens; the validation split has 1000. Choose a con"
    with pytest.raises(ValueError, match=message):
        evaluation_windows(TOKENS, 4096)
    with pytest.raises(ValueError, match="max_tokens must be at least 1; got 0"):
        evaluation_windows(TOKENS, 16, 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        evaluation_windows(TOKENS, 16, batch_size=0)
