"""`posenc.cost`: what the kernels keep for the backward pass, of every name and their crosses.

Tensors of more than H numbers a token are compared; of the others it counts the log-sum-exp, which
is H of them, the two numbers of a norm, and xPos's powers of every query and key position.
"""

import pytest
import torch

import posenc
from bench.measure import bytes_saved
from helpers import NAMES
from posenc.kernels.common import INTERPRETED

BATCH, LENGTH, HEADS, WIDTH = 2, 19, 4, 32  # more tokens than C: copies of W (C, H) stay below
TOKENS = BATCH * LENGTH
LAYERS = {
    **{name: (name, {}) for name in NAMES},
    "partial": ("rope", {"rotary_dim": 4}),
    "short table": ("rcmha", {"max_distance": 5}),
    "convolved rope": ("rope", {"conv": True}),
    "convolved grape": ("grape", {"conv": True}),
    "convolved selective": ("selective", {"conv": True, "encoding_init": "authors"}),
    "norms": ("moh", {"router": "query_norm"}),
    "all shared": ("moh", {"shared": 4, "top_k": 0}),
    "all shared, norms": ("moh", {"shared": 4, "top_k": 0, "router": "query_norm"}),
    "moh of relative": ("moh", {"encoding": "relative"}),
    "moh of carope": ("moh", {"encoding": "carope", "conv": True}),
    "moh of polar": ("moh", {"encoding": "cmha", "conv": True}),
    "pope, convolved": ("pope", {"conv": True}),
    "norms, convolved": ("moh", {"router": "query_norm", "conv": True}),
    "norms of relative": ("moh", {"router": "query_norm", "encoding": "rmha", "conv": True}),
}
MODELS = {
    **{name: (name, {}) for name in ("mha", "sinusoidal", "rope", "moh")},
    "one phase": ("carope", {"source": "token"}),
    "convolved phase": ("mdha", {"encoding": "carope", "encoding_source": "token"}),
}
#: In half precision it shows what is kept in fp32 all the same.
HALF = pytest.mark.parametrize("dtype", [torch.float16] + [torch.float32] * (not INTERPRETED))


def large(tensor):
    return tensor.is_floating_point() and tensor.numel() > TOKENS * HEADS


@HALF
@pytest.mark.parametrize("variant", LAYERS)
def test_bytes_kept_by_a_layer(variant, dtype, device):
    name, options = LAYERS[variant]
    layer = posenc.attention(name, WIDTH, HEADS, impl="fused", **options).to(device, dtype)
    x = torch.randn(BATCH, LENGTH, WIDTH, device=device, dtype=dtype, requires_grad=True)
    saved = bytes_saved(layer, lambda: layer(x, return_aux=True), large)
    powers = 2 * 4 * LENGTH * layer.head_dim if name == "xpos" else 0
    small = 4 * TOKENS * HEADS + powers
    if name == "grape":  # one head's phases, sines and cosines, its rates and sums
        small += TOKENS * (3 * 4 * layer.head_dim // 2 + 16)
    assert saved == posenc.attention_cost(layer, BATCH, LENGTH).total.saved_bytes - small


@HALF
@pytest.mark.parametrize("variant", MODELS)
def test_bytes_kept_by_a_model(variant, dtype, device):
    name, options = MODELS[variant]
    config = posenc.GPTConfig(31, LENGTH, 2, HEADS, WIDTH, name, {**options, "impl": "fused"})
    model = posenc.GPT(config).to(device, dtype)
    ids = torch.randint(31, (BATCH, LENGTH), device=device)
    saved = bytes_saved(model, lambda: model(ids, ids), large)
    small = 4 * TOKENS * (2 * HEADS + 5 * 2)
    assert saved == posenc.model_cost(model, BATCH, LENGTH).total.saved_bytes - small
