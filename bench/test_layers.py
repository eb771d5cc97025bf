"""pytest-benchmark: forward + backward of one layer of every name. `pytest bench`."""

import pytest
import torch

import posenc
from bench.layer import posenc_layer, step

BATCH, LENGTH, WIDTH, HEADS = 2, 256, 256, 4


@pytest.mark.parametrize("name", posenc.names())
def test_layer(benchmark, name):
    torch.manual_seed(0)
    layer = posenc_layer(name, WIDTH, HEADS, LENGTH)
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    benchmark(step(layer, x, torch.float32))
