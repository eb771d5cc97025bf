"""Encodings at the input of the model: the learned table and the sinusoid."""

import inspect

import pytest
import torch

import oracles
from helpers import WIDTH, close, differs, randn, scores_of
from posenc import Encoding, Learned, NoPE, Sinusoidal


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_learned_rows_are_looked_up() -> None:
    table = Learned(10, WIDTH)
    for positions in (torch.arange(7), torch.tensor([3, 9, 0]), torch.randint(10, (2, 5))):
        assert torch.equal(table.embed(positions), table.weight[positions])
    assert table.weight.shape == (10, WIDTH)


def test_learned_table_starts_small() -> None:
    assert Learned(1024, 768).weight.std().item() == pytest.approx(0.02, rel=0.01)
    table = Learned(1024, 768, std=0.1)
    assert table.weight.std().item() == pytest.approx(0.1, rel=0.01)
    table.reset_parameters()
    assert table.weight.std().item() == pytest.approx(0.1, rel=0.01)
    assert not Learned(9, WIDTH, std=0).weight.any()


@pytest.mark.parametrize("std", [-0.1, float("inf"), float("nan")])
def test_an_impossible_std_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match=r"std of a table must be finite and at least 0; got"):
        Learned(9, WIDTH, std=std)


@pytest.mark.parametrize("positions", [[10], [3, 4, 11], [-1], [[0, 10], [0, 1]]])
def test_positions_beyond_the_learned_table_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="10 positions, 0 to 9; got"):
        Learned(10, WIDTH).embed(torch.tensor(positions))


def test_padding_takes_some_row_of_the_learned_table() -> None:
    rows = Learned(10, WIDTH).embed(torch.tensor([[-1, -1, 0], [0, 1, 2]]))
    assert rows.isfinite().all()
    with pytest.raises(ValueError, match=r"max_length.* at least 1.*got 0"):
        Learned(0, WIDTH)


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_sinusoid_is_the_oracle(base: float) -> None:
    part = Sinusoidal(10, base=base, scale=0.5)
    expected = 0.5 * oracles.sinusoidal(range(20), 10, base)
    close(part.embed(torch.arange(20)), expected, 1e-7)
    positions = torch.randint(20, (2, 5))
    close(part.embed(positions), expected[positions], 1e-7)


def test_sinusoid_is_exact_at_a_million() -> None:
    far = range(1_000_000, 1_000_020)
    close(Sinusoidal(64).embed(torch.tensor(far)), oracles.sinusoidal(far, 64), 1e-6)


def test_every_argument_of_the_sinusoid_changes_it() -> None:
    changes = {"base": 100.0, "scale": 0.02}
    assert set(inspect.signature(Sinusoidal).parameters) == changes.keys() | {"embed_dim"}
    positions = torch.arange(9)
    for name, value in changes.items():
        differs(
            Sinusoidal(WIDTH, **{name: value}).embed(positions), Sinusoidal(WIDTH).embed(positions)
        )
    assert not list(Sinusoidal(WIDTH).parameters())
    with pytest.raises(ValueError, match="even"):
        Sinusoidal(7)


def test_only_these_two_depend_on_absolute_positions() -> None:
    assert not Learned.relative
    assert not Sinusoidal.relative
    assert NoPE.relative


@pytest.mark.parametrize("part", [Encoding(), NoPE(), Learned(9, WIDTH), Sinusoidal(WIDTH)])
def test_they_leave_queries_keys_and_scores_alone(part: Encoding) -> None:
    q, k = randn(2, 2, 4, 9, 6)
    turned_q, turned_k = part.rotate(q, k, torch.arange(9), randn(2, 9, WIDTH))
    assert turned_q is q
    assert turned_k is k
    assert not any(term is not None for term in scores_of(part, q, k, torch.arange(9)))
    assert part.streams() == {}


def test_the_default_encoding_adds_nothing_to_the_input() -> None:
    assert Encoding().embed(torch.arange(9)) is None
    assert Encoding().no_weight_decay == frozenset()
