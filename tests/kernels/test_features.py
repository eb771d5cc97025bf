"""Modules with grouped keys, windows, documents and padding: `impl="fused"` is the reference.

Small and odd; the kernels themselves are tested in test_masks.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import posenc
from combinations import combined

HEADS, WIDTH, LENGTH = 4, 32, 13
SEGMENTS = torch.tensor([[0] * 5 + [1] + [2] * 7, [3] * 9 + [4] * 4])
LEFT = torch.ones(2, LENGTH, dtype=torch.bool)
LEFT[0, :4] = False
HOLES = LEFT.clone()
HOLES[1, 6:8] = False
CALLS: dict[str, dict[str, Tensor]] = {
    "segments": {"segments": SEGMENTS},
    "left": {"mask": LEFT},
    "holes": {"mask": HOLES},
    "both": {"mask": LEFT, "segments": SEGMENTS},
}
SHAPES: dict[str, dict[str, Any]] = {
    "window": {"window": 4},
    "grouped": {"num_kv_heads": 2, "head_dim": 16, "qk_norm": "rms"},
}


def pair(name: str, device: torch.device, **options: Any) -> list[posenc.Attention]:
    """The same layer by the kernels and by the definition."""
    torch.manual_seed(0)
    layers = [posenc.attention(name, WIDTH, HEADS, impl=impl, **options)
              for impl in ("fused", "reference")]  # fmt: skip
    with torch.no_grad():
        for parameter in layers[0].parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    layers[1].load_state_dict(layers[0].state_dict())
    return [layer.to(device) for layer in layers]


def outputs(layer: posenc.Attention, x: Tensor, real: Tensor, **call: Tensor) -> list[Tensor]:
    """y at real tokens, and all gradients of its weighed sum."""
    x = x.detach().requires_grad_()
    y, aux = layer(x, return_aux=True, **call)
    y = y * real.unsqueeze(-1)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad((y * weights).sum() + aux, inputs, allow_unused=True)
    return [y, *(gradient for gradient in found if gradient is not None)]


@pytest.mark.parametrize(
    ("name", "call", "shape"),
    combined(["rope", "carope", "cmha", "mdha", "rcmha", "moh", "fox", "t5"], [*CALLS], [*SHAPES]),
)
def test_fused_layers_are_their_reference(
    name: str, call: str, shape: str, device: torch.device
) -> None:
    options = SHAPES[shape]
    if name in ("mdha", "rcmha") and "num_kv_heads" in options:
        with pytest.raises(ValueError, match=r"fewer key heads.*impl='sdpa'"):
            pair(name, device, **options)
        return
    fused, reference = pair(name, device, **options)
    x = torch.randn(2, LENGTH, WIDTH, device=device)
    given = {key: value.to(device) for key, value in CALLS[call].items()}
    real = given.get("mask", torch.ones(2, LENGTH, dtype=torch.bool, device=device))
    if name in ("rcmha", "t5") and call == "holes":
        with pytest.raises(ValueError, match=r"padding between tokens.*impl='sdpa'"):
            fused(x, **given)
        return
    results = [outputs(layer, x, real, **given) for layer in (fused, reference)]
    for actual, expected in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        assert (actual - expected).abs().max() < 2e-5 * scale


@pytest.mark.parametrize("name", ["rope", "carope", "mdha", "fox", "t5"])
def test_windows_decode_by_the_kernels(name: str, device: torch.device) -> None:
    fused, reference = pair(name, device, window=4)
    x = torch.randn(2, LENGTH, WIDTH, device=device)
    with torch.no_grad():
        cache = fused.make_cache(2, LENGTH)
        parts = [fused(part, cache=cache) for part in x.split((6, 1, 3, 3), dim=1)]
        expected = reference(x)
    assert (torch.cat(parts, dim=1) - expected).abs().max() < 2e-5


def test_both_ways_are_refused(device: torch.device) -> None:
    fused, _ = pair("rope", device, causal=False)
    with pytest.raises(ValueError, match=r"impl='fused' is causal.*impl='sdpa'"):
        fused(torch.randn(1, 5, WIDTH, device=device))
