"""CARoPE and CMHA whose heads share parameters: the same as heads that hold copies."""

from typing import Any

import pytest
import torch
from torch import nn

import posenc
from bench.mechanisms import figure

B, T, C, H = 2, 7, 24, 4
CASES = {
    "carope": ("carope", {"shared": True}),
    "carope, paper": ("carope", {"shared": True, "init": "paper"}),
    "cmha": ("cmha", {"shared": True}),
    "cmha, no offset": ("cmha", {"shared": True, "offset": False}),
    "cmha, own, no offset": ("cmha", {"offset": False, "init": "authors"}),
}
GROUPS = pytest.mark.parametrize("kv_heads", [1, 2, 4])


def pair(case: str, kv_heads: int, impl: str = "auto") -> tuple[posenc.Attention, posenc.Attention]:
    """A layer that shares, trained somewhere, and one that has copies."""
    name, options = CASES[case]
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_kv_heads": kv_heads, "impl": impl}
    own = posenc.attention(name, C, H, **sizes, **options).double()
    plain = {key: value for key, value in options.items() if key == "init"}
    copies = posenc.attention(name, C, H, **sizes, **plain).double()
    with torch.no_grad():
        for parameter in own.encoding.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, parameter in copies.named_parameters():
            value = dict(own.named_parameters()).get(name)
            if value is None:  # b, where there is none
                parameter.zero_()
            elif name == "encoding.bias" or name == "encoding.weight":
                parameter.copy_(value.expand_as(parameter))
            else:
                parameter.copy_(value)
    return own, copies


@GROUPS
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_sharing_is_having_copies(case: str, impl: str, kv_heads: int) -> None:
    own, copies = pair(case, kv_heads, impl)
    x = torch.randn(B, T, C, dtype=torch.float64)
    outputs = [layer(x) for layer in (own, copies)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    others = dict(copies.named_parameters())
    for name, parameter in own.named_parameters():
        expected = others[name].grad
        assert expected is not None
        if expected.shape != parameter.shape:  # what heads share sums over them
            dim = 1 if case.startswith("carope") and name == "encoding.weight" else 0
            expected = expected.sum(dim, keepdim=True)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-11)


@GROUPS
@pytest.mark.parametrize("case", CASES)
def test_decoding(case: str, kv_heads: int) -> None:
    layer, _ = pair(case, kv_heads)
    x = torch.randn(B, T, C, dtype=torch.float64)
    cache = layer.make_cache(B, T)
    with torch.no_grad():
        parts = [layer(piece, cache=cache) for piece in x.split((3, 1, 3), dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_costs_count_what_there_is(case: str) -> None:
    name, options = CASES[case]
    layer = posenc.attention(name, C, H, num_kv_heads=2, **options)
    counted = sum(parameter.numel() for parameter in layer.parameters())
    assert posenc.attention_cost(layer, 1, T).total.parameters == counted


@pytest.mark.parametrize("name", ["carope", "cmha"])
def test_a_shared_start_is_rope(name: str) -> None:
    torch.manual_seed(0)
    layer = posenc.attention(name, C, H, shared=True).double()
    rope = posenc.attention("rope", C, H).double()
    rope.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(B, T, C, dtype=torch.float64)
    # The start of CARoPE's bias is rounded to fp32: its rates are 6e-8 off, over 7 tokens.
    torch.testing.assert_close(layer(x), rope(x), rtol=0, atol=1e-6)


def test_a_model_of_one_phase_shares_too() -> None:
    options = {"source": "token", "shared": True}
    config = posenc.GPTConfig(31, T, 2, H, C, "carope", options)
    model = posenc.GPT(config)
    (encoding,) = (m for m in model.modules() if isinstance(m, posenc.CARoPE))
    assert encoding.weight.shape == (C, 1)
    assert model(torch.randint(31, (B, T)))[0].shape[:2] == (B, T)
    assert isinstance(encoding.bias, nn.Parameter)


@pytest.mark.parametrize("case", CASES)
def test_mechanisms_of_a_model_are_drawn(case: str) -> None:
    name, options = CASES[case]
    model = posenc.GPT(posenc.GPTConfig(31, T, 2, H, C, name, options))
    assert figure(model, torch.randint(31, (B, T))) is not None
