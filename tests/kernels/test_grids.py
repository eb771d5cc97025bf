"""CUDA holds 65,535 programs in a grid's second and third dimension: sequences go in the first."""

import pytest
import torch
from torch import Tensor

from posenc.kernels import carope, decode, decode_relative, inspect_sm90, polar, rates, rope

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
    # Small kernels take several numbers, or a head of the weights, a program.
    assert max(launch.grid[0] for launch in launches) >= BATCH
    for launch in launches:
        _, *others = launch.grid
        assert others in ([], [1], [HEADS]), launch.kernel.__name__


@pytest.mark.parametrize("family", inspect_sm90.families())
def test_no_example_has_sequences_beyond_the_first_dimension(family: str) -> None:
    for name, launch in inspect_sm90.launches(family):
        _, *others = launch.grid
        assert len(others) <= 1, name
        # A fixed number of programs a head; blocks of columns; or heads.
        most = {"conv": 4096, "rates": 64}.get(family, 12)
        assert not others or others[0] <= most, name


@pytest.mark.parametrize(
    ("batch", "groups", "queries", "keys", "window", "programs"),
    [
        (1, 12, 1, 4096, None, [12 * 32, 12]),  # of 132 processors; a program a head were 12
        (1, 12, 1, 1024, None, [12 * 8, 12]),
        (1, 3, 1, 4096, None, [3 * 32, 12]),  # four heads share a tile
        (1, 1, 2, 4096, None, [2 * 32, 24]),  # 24 rows are two tiles
        (2, 12, 1, 32768, 256, [2 * 12 * 2, 24]),  # the last two pieces hold the window
        (2, 12, 1, 32769, 256, [2 * 12 * 3, 24]),
        (2, 12, 1, 32768, 100, [2 * 12]),
        (1, 12, 1, 100, None, [12]),
    ],
)
def test_a_step_of_decoding_fills_the_gpu(batch, groups, queries, keys, window, programs) -> None:
    q, k = heads(batch, 12, queries, 64), heads(batch, groups, keys, 64)
    with inspect_sm90.caught() as launches:
        decode.forward(q, k, k, 0.125, window=window)
    assert [launch.grid for launch in launches] == [(count,) for count in programs]
    names = ["decode_kernel", "combine_kernel"][: len(programs)]
    assert [launch.kernel.__name__ for launch in launches] == names


@pytest.mark.parametrize(("window", "programs"), [(None, 12 * 64), (300, 12 * 5)])
def test_a_relative_step_does_too(window, programs) -> None:
    q, table = heads(1, 12, 1, 64), heads(12, 4096, 64)
    with inspect_sm90.caught() as launches:
        decode_relative.forward(q, table, None, 4096, 0.125, window)
    assert [launch.grid for launch in launches] == [(programs,)]
