"""pytest-benchmark: training and decode steps of every name, and the rotations: `pytest bench`."""

import pytest
import torch

import posenc
from posenc.phase import inverse_frequencies, position_phases, sines, turn
from posenc.rotations import running_phase

from .layers import as_is, zoo_case
from .throughput import call

WIDTH, HEADS = 256, 4


@pytest.mark.parametrize("mode", ["train", "decode"])
@pytest.mark.parametrize("name", posenc.names())
def test_layer(benchmark, name, mode):
    torch.manual_seed(0)
    benchmark.group = mode
    x = torch.randn(2, 256, WIDTH)
    case = zoo_case("throughput", name, name, {"auto": ("auto", as_is)}, x, HEADS)
    benchmark(call(mode, case.providers["auto"](), x))


def by_position():
    return position_phases(torch.arange(1024), inverse_frequencies(64, 10000.0))


def by_content():
    return running_phase(-torch.rand(2, HEADS, 1024, dtype=torch.float64), 32)


@pytest.mark.parametrize("phase", [by_position, by_content])
def test_phase(benchmark, phase):
    benchmark.group = "phase"
    benchmark(phase)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_turn(benchmark, pairing):
    benchmark.group = "turn"
    x = torch.randn(2, 1024, HEADS, 64).transpose(1, 2)
    cos, sin = sines(by_position().float(), pairing=pairing)
    benchmark(turn, x, cos, sin, pairing)
