"""posenc.tasks: each is solved from its ids, is chance without what it asks about, and keeps the
examples of training and test apart.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import task_solvers as solvers
from posenc.tasks import (
    FULL,
    MINI,
    Addition,
    Copy,
    FlipFlop,
    Group,
    Parity,
    Passkey,
    Recall,
    Sample,
    SelectiveCopy,
    Sort,
    SortNumbers,
    Task,
    accuracy,
    exact_match,
    held_out,
    train_batch,
)
from posenc.tasks.base import Split
from posenc.tasks.copying import KINDS
from posenc.tasks.groups import GROUPS

TEXT = bytes(range(97, 123)) * 20
NONE = -100

Solver = Callable[[list[int]], solvers.Said]
#: Every task, what solves it, and how a number from 0 on becomes one of its lengths.
CASES: dict[str, tuple[Task, Solver, Callable[[int], int]]] = {
    **{k: (Copy(k, 50), partial(solvers.copying, k, 50), lambda n: n + 3) for k in KINDS},
    "addition": (Addition(), solvers.addition, lambda n: n + 1),
    "sort": (Sort(7), partial(solvers.sort, 7), lambda n: n + 2),
    "sort-numbers": (SortNumbers(), solvers.sort_numbers, lambda n: n + 1),
    "parity": (Parity(), solvers.parity, lambda n: n + 5),
    "mqar": (Recall(3, 40), partial(solvers.recall, 3, 40), lambda n: 12 + 2 * n),
    "selective": (SelectiveCopy(3, 5), partial(solvers.selective, 3, 5), lambda n: n + 7),
    "flip-flop": (FlipFlop(0.5), solvers.flip_flop, lambda n: 8 + 2 * n),
    **{g: (Group(g), partial(solvers.group, g), lambda n: n + 3) for g in GROUPS},
    "passkey": (Passkey(TEXT), solvers.passkey, lambda n: n + 70),
}
SPLITS = get_args(Split)


def examples(name: str, size: int, seed: int, count: int, split: Split = "train") -> Sample:
    task, _, length = CASES[name]
    return task.sample(np.random.default_rng(seed), length(size), count, split)


@pytest.mark.parametrize("name", CASES)
@settings(deadline=None, max_examples=8)
@given(size=st.integers(0, 40), seed=st.integers(0, 2**40), split=st.sampled_from(SPLITS))
def test_a_solver_that_reads_ids_alone_is_always_right(
    name: str, size: int, seed: int, split: Split
) -> None:
    task, solve, _ = CASES[name]
    ids, targets = examples(name, size, seed, 3, split)
    assert ids.shape == targets.shape
    assert ids.shape[0] == 3
    assert ids.dtype == targets.dtype == torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < task.vocab_size
    said = torch.tensor([list(solvers.tokens(solve(row))) for row in ids.tolist()])
    assert torch.equal(said, targets)
    scored = targets[targets != NONE]
    assert len(scored)
    assert 0 <= int(scored.min()) <= int(scored.max()) < task.vocab_size


@pytest.mark.parametrize("name", CASES)
def test_a_seed_fixes_the_data_and_nothing_else_does(name: str) -> None:
    first = examples(name, 20, 5, 4)
    np.random.seed(1)  # noqa: NPY002  no task may read it
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again, other = examples(name, 20, 5, 4), examples(name, 20, 6, 4)
    assert torch.equal(state, torch.get_rng_state())
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.ids, other.ids)


# The splits


@pytest.mark.parametrize("name", CASES)
@settings(deadline=None, max_examples=5)
@given(size=st.integers(0, 30), seeds=st.lists(st.integers(0, 2**40), min_size=2, max_size=2))
def test_no_example_is_of_both_splits(name: str, size: int, seeds: list[int]) -> None:
    train, test = (
        {tuple(row) for row in examples(name, size, seed, 20, split).ids.tolist()}
        for seed, split in zip(seeds, SPLITS, strict=True)
    )
    assert train
    assert test
    assert not train & test


def test_the_splits_are_a_partition_where_all_examples_can_be_counted() -> None:
    generator, every = np.random.default_rng(0), 2**7
    both = [Parity().sample(generator, 7, 5000, split).ids for split in SPLITS]
    train, test = ({tuple(row) for row in ids.tolist()} for ids in both)
    assert len(train) + len(test) == every
    assert not train & test
    rows = {(2, *bits, 3) for bits in itertools.product((0, 1), repeat=7)}
    assert test == {row for row in rows if held_out(np.array(row))}
    assert 3 <= len(test) <= 25  # about one in ten


@pytest.mark.parametrize("suite", [FULL, MINI], ids=["full", "mini"])
@pytest.mark.parametrize("name", FULL)
def test_a_suite_trains_short_and_tests_long_on_other_examples(suite: dict, name: str) -> None:
    asked = suite[name]()
    assert max(asked.lengths) == asked.longest == asked.at[0]
    assert max(asked.at) == 4 * asked.longest
    assert list(asked.at) == sorted(set(asked.at))
    assert next(iter(asked.tests)) == ""
    generator = np.random.default_rng(0)
    rows = set()
    for _ in range(5):
        batch = train_batch(asked.train, generator, asked.lengths, 8)
        rows |= {tuple(row) for row in batch.ids.tolist()}
    for task in asked.tests.values():
        assert task.vocab_size == asked.train.vocab_size
        # Rows of other lengths differ in T: what could be shared is of this one.
        tested = task.sample(generator, asked.longest, 8, "test").ids
        assert not rows & {tuple(row) for row in tested.tolist()}
        assert not any(map(held_out, map(np.array, rows)))
    lengths = [asked.train.sample(generator, n, 1).ids.shape[1] for n in (asked.at[0], asked.at[1])]
    assert lengths[0] < lengths[1]


def test_a_split_without_an_example_says_so() -> None:
    with pytest.raises(ValueError, match=r"Copy has no example of length 4 in the test split"):
        Copy("rsc", 2).sample(np.random.default_rng(0), 4, 1, "test")


# What is hidden cannot be said


def rate(
    task: Task, length: int, hide: Callable[[np.ndarray], np.ndarray], place: int, count: int = 6000
) -> tuple[float, int]:
    """How often the likeliest answer is right, of the scored place, to one who sees what comes
    before it but not what is hidden: a table of half of the examples, asked of the others.
    """
    ids, targets = task.draw(np.random.default_rng(0), length, count)
    seen: dict[bytes, Counter[int]] = defaultdict(Counter)
    right = asked = 0
    for i, (row, target) in enumerate(zip(ids, targets, strict=True)):
        at = np.flatnonzero(target != NONE)[place]
        visible = np.where(hide(row), -1, row)[: at + 1].tobytes()
        if i < count // 2:
            seen[visible][int(target[at])] += 1
        elif visible in seen:
            asked += 1
            right += seen[visible].most_common(1)[0][0] == target[at]
    return right / asked, asked


def before(token: int) -> Callable[[np.ndarray], np.ndarray]:
    """Hides all before the first of a token."""
    return lambda row: np.arange(len(row)) < np.flatnonzero(row == token)[0]


def among(*places: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda row: np.isin(np.arange(len(row)), places)


def digits_of_the_passkey(row: np.ndarray) -> np.ndarray:
    text = bytes(row.tolist())
    start = text.index(b"key is ") + 7
    return (np.arange(len(row)) >= start) & (np.arange(len(row)) < text.index(b".]"))


def symbols_below(count: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda row: row < count


HIDDEN = {
    "cmc": (Copy("cmc", 4), 3, before(5), 0, 1 / 4),
    "cmc2x": (Copy("cmc2x", 4), 3, before(5), 0, 1 / 4),
    "rsc": (Copy("rsc", 4), 3, before(5), 0, 1 / 4),
    "rsc2x": (Copy("rsc2x", 4), 3, before(5), 0, 1 / 4),
    "rdc": (Copy("rdc", 4), 3, before(5), 0, 1 / 4),
    "mc": (Copy("mc", 4), 3, before(5), 0, 1 / 4),
    "mc2x": (Copy("mc2x", 4), 3, before(5), 0, 1 / 4),
    "mcrv": (Copy("mcrv", 4), 3, before(5), 0, 1 / 4),
    # a + b of one digit, a hidden: what the sum begins with. From b = 2 on it is likeliest 1, in b
    # of ten cases; of 1 in two (0 + 1 and 9 + 1), of 0 each digit in one.
    "addition": (Addition(), 1, among(1), 0, (1 + 2 + sum(range(2, 10))) / 100),
    "parity": (Parity(), 5, among(2), 0, 1 / 2),
    "mqar": (Recall(2, 8), 8, among(1, 3), 0, 1 / 4),
    "selective": (SelectiveCopy(2, 4), 5, symbols_below(4), 0, 1 / 4),
    # Every write, the first one too: its bit follows the instruction 2.
    "flip-flop": (FlipFlop(0.5), 6, lambda row: np.roll(row == 2, 1), 0, 1 / 2),
    "a5": (Group("a5"), 2, among(0), -1, 1 / 60),
    "s5": (Group("s5"), 2, among(0), -1, 1 / 120),
    "z60": (Group("z60"), 2, among(0), -1, 1 / 60),
    "s3": (Group("s3"), 3, among(0), -1, 1 / 6),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_without_what_is_asked_about_the_best_guess_is_chance(name: str) -> None:
    task, length, hide, place, chance = HIDDEN[name]
    count = 12_000 if name in ("a5", "s5", "z60") else 6000
    found, asked = rate(task, length, hide, place, count)
    assert asked > 1000
    # The table's choice among near-equal counts is itself a guess: 4 sigma of the asked ones.
    assert abs(found - chance) < 4 * (chance * (1 - chance) / asked) ** 0.5
    seen, asked = rate(task, length, lambda row: np.zeros(len(row), bool), place, count)
    assert asked > 100
    assert seen == 1  # and nothing else is missing


@pytest.mark.parametrize(
    ("task", "ask"), [(Sort(3), 4), (SortNumbers(), 12)], ids=["sort", "sort-numbers"]
)
def test_sorting_without_the_numbers_is_the_likeliest_minimum(task: Task, ask: int) -> None:
    length = 2 if ask == 4 else 1
    found, asked = rate(task, length, before(ask), 0)
    # Of two symbols of three, 0 is the least 5 times in 9; 10 .. 9999 begin with each digit alike.
    chance = 5 / 9 if ask == 4 else 1 / 9
    assert asked > 1000
    assert abs(found - chance) < 4 * (chance * (1 - chance) / asked) ** 0.5 + 0.01
    assert rate(task, length, lambda row: np.zeros(len(row), bool), 0)[0] == 1


def test_a_passkey_without_its_digits_is_a_uniform_number() -> None:
    task = Passkey(b"." * 400)
    ids, targets = task.draw(np.random.default_rng(0), 80, 8000)
    first = np.array([target[target != NONE][0] for target in targets])
    of_five = np.array([(target != NONE).sum() == 6 for target in targets])
    hidden = np.where([digits_of_the_passkey(row) for row in ids], -1, ids)
    kept = {bytes(row[row >= 0].astype(np.uint8)).split(b"[What")[1] for row in hidden}
    assert len(kept) > 1000  # the answer's own beginning alone
    # The leading digit of a number of five digits up to 50000: 1 .. 4 alike, 5 once.
    shares = [np.mean(first[of_five] == ord(str(digit))) for digit in range(1, 6)]
    assert max(abs(share - 0.25) for share in shares[:4]) < 0.025
    assert shares[4] < 0.01


# What each definition says


def test_addition_has_all_pairs_of_sizes_alike() -> None:
    generator, counts = np.random.default_rng(0), Counter()
    lengths = range(1, 4)
    for _ in range(1800):
        row = train_batch(Addition(), generator, lengths, 1).ids[0].tolist()
        plus, equals = row.index(11), row.index(12)
        counts[plus - 1, equals - plus - 1] += 1
    assert len(counts) == 9
    assert all(130 < count < 270 for count in counts.values())  # 200, 5 sigma


def test_recall_asks_for_near_keys_more_often() -> None:
    _, targets = Recall(1, 8).draw(np.random.default_rng(0), 42, 4000)
    slots = np.flatnonzero(targets != NONE) % 42 // 2 - 1
    counts = np.bincount(slots, minlength=20)
    weights = np.arange(1, 21) ** -0.99
    expected = 4000 * weights / weights.sum()
    assert (np.abs(counts - expected) < 5 * expected**0.5).all()


def test_recall_draws_its_fillers_from_all_tokens_but_the_keys() -> None:
    ids, targets = Recall(2, 12).draw(np.random.default_rng(0), 60, 400)
    for row, target in zip(ids[:20], targets[:20], strict=True):
        fillers = set(row[4:][target[4:] == NONE].tolist())
        assert not fillers & {row[0], row[2]}
    counts = np.bincount(ids[:, 4:].ravel(), minlength=12)
    assert counts.min() > 0.5 * counts.mean()


def test_selected_symbols_lie_anywhere() -> None:
    ids, _ = SelectiveCopy(2, 3).draw(np.random.default_rng(0), 8, 3000)
    counts = (ids < 3)[:, :6].sum(0)
    assert (np.abs(counts - 1000) < 5 * 1000**0.5).all()  # the last place before the marks too


@pytest.mark.parametrize("ignore", [0.1, 0.8, 0.98])
def test_flip_flops_are_as_sparse_as_they_say(ignore: float) -> None:
    ids, _ = FlipFlop(ignore).draw(np.random.default_rng(0), 512, 60)
    inner = ids[:, 2:-1:2]
    shares = [np.mean(inner == instruction) for instruction in (4, 2, 3)]
    assert shares == pytest.approx([ignore, (1 - ignore) / 2, (1 - ignore) / 2], abs=0.015)
    assert (ids[:, 0] == 2).all()
    assert (ids[:, -1] == 3).all()


def test_groups_are_groups() -> None:
    from posenc.tasks.groups import products

    for name, order in zip(GROUPS, (60, 120, 60, 6), strict=True):
        table = products(name)
        assert Group(name).vocab_size == order == len(table)
        for lines in (table, table.T):
            assert (np.sort(lines, 1) == np.arange(order)).all()
        commutes = np.array_equal(table, table.T)
        assert commutes == (name == "z60")
        for g, h, k in np.random.default_rng(0).integers(order, size=(50, 3)):
            assert table[g, table[h, k]] == table[table[g, h], k]


def test_passkeys_in_language_modelling_are_as_rare_as_they_say() -> None:
    ids, targets = Passkey(TEXT, 0.25).draw(np.random.default_rng(0), 90, 400)
    holds = [b"pass key" in bytes(row.tolist()) for row in ids]
    assert 70 < sum(holds) < 130
    assert (targets != NONE).all()
    assert (targets[:, :-1] == ids[:, 1:]).all()
    depths = [bytes(row.tolist()).find(b"[The") for row in Passkey(TEXT).draw(
        np.random.default_rng(0), 90, 400)[0]]  # fmt: skip
    assert min(depths) == 0
    assert np.ptp(depths) > 25


# Scores


def test_scores_count_what_is_asked_alone() -> None:
    targets = torch.tensor([[NONE, 3, 4], [NONE, 1, NONE], [2, 2, 2]])
    predicted = torch.tensor([[9, 3, 4], [9, 0, 9], [2, 2, 1]])
    assert exact_match(predicted, targets).tolist() == [True, False, False]
    assert accuracy(predicted, targets) == pytest.approx(4 / 6)
    assert Sample(predicted, targets).scored.tolist() == (targets != NONE).tolist()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Copy("cmx"), "unknown kind of copy: 'cmx'"),
        (lambda: Copy("cmc", 1), "at least 2 symbols; got 1"),
        (lambda: Sort(1), "at least 2 symbols; got 1"),
        (lambda: Group("a4"), "unknown group: 'a4'"),
        (lambda: FlipFlop(1.0), r"ignore must lie in \[0, 1\); got 1.0"),
        (lambda: Recall(4, 9), "even vocab_size of 2 pairs"),
        (lambda: SelectiveCopy(0), "copied from 1"),
        (lambda: Passkey(TEXT, 0), r"share must lie in \(0, 1\]; got 0"),
        (lambda: draw(Recall(4, 20), 14), "even length of 16 or more; got 14"),
        (lambda: draw(SelectiveCopy(4), 7), "a length of 8 or more; got 7"),
        (lambda: draw(FlipFlop(), 5), "even length from 4; got 5"),
        (lambda: draw(Passkey(TEXT), 30), "a length from 60 to 519"),
        (lambda: draw(Passkey(TEXT), 520), "a length from 60 to 519"),
        (lambda: draw(Parity(), 0), "length must be at least 1; got 0"),
        (lambda: draw(Parity(), 9, batch=0), "batch must be at least 1; got 0"),
        (lambda: draw(Parity(), 9, split="trian"), "Did you mean 'train'"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def draw(task: Task, length: int, batch: int = 1, split: Split = "train") -> Sample:
    return task.sample(np.random.default_rng(0), length, batch, split)
