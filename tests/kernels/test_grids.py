"""CUDA holds 65,535 programs in a grid's second and third dimension: sequences go in the first."""

import pytest
import torch
from torch import Tensor

from posenc.kernels import carope, inspect_sm90, polar, rates, rope

BATCH, HEADS, LENGTH, DIM = 70_000, 3, 9, 16


def heads(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape or (BATCH, HEADS, LENGTH, DIM), dtype=dtype, device="meta")


def run_carope() -> None:
    q, k = heads(), heads()
    log_rates = heads(BATCH, HEADS, LENGTH, dtype=torch.float32)
    q_out, k_out, _, _, rates, carries = carope.forward(q, k, log_rates, None, 1)
    carope.backward(q, k, q_out, k_out, rates, carries, 1)


def run_long_carope() -> None:
    """Of several tiles, whose sums and scans have kernels of their own."""
    x = heads(BATCH, 1, 4096, DIM)
    _, _, _, _, rates, carries = carope.forward(x, x, heads(BATCH, 1, 4096), None, 1)
    carope.backward(x, x, x, x, rates, carries, 1)


def run_polar() -> None:
    x, shift = heads(), heads(HEADS, DIM // 2, dtype=torch.float32)
    fractions = heads(DIM // 2, dtype=torch.int64)
    polar.forward(x, x, shift, shift, fractions, None)
    polar.backward(x, x, x, x, shift, shift, fractions, None)


def run_rope() -> None:
    x = heads()
    rope.launch(x, x, x, x, heads(DIM // 2, dtype=torch.int64), None, 1.0, False, False)


def run_rates() -> None:
    """A row a program at least: 16 tokens."""
    x = heads(BATCH, 16, DIM)
    weight = heads(DIM, HEADS, dtype=torch.float32)
    rates.columns(x, weight)


@pytest.mark.parametrize("run", [run_carope, run_long_carope, run_polar, run_rope, run_rates])
def test_more_sequences_than_a_second_dimension_holds(run) -> None:
    with inspect_sm90.caught() as launches:
        run()
    assert launches
    for launch in launches:
        first, *others = launch.grid
        assert first >= BATCH
        assert others in ([], [1], [HEADS]), launch.kernel.__name__


@pytest.mark.parametrize("family", inspect_sm90.families())
def test_no_example_has_sequences_beyond_the_first_dimension(family: str) -> None:
    for name, launch in inspect_sm90.launches(family):
        _, *others = launch.grid
        assert len(others) <= 1, name
        # A fixed number of programs a head; blocks of columns; or heads.
        most = {"conv": 4096, "rates": 64}.get(family, 12)
        assert not others or others[0] <= most, name
