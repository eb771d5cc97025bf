"""The projection of kept heads against the dense product in fp64, with its gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import counted, outputs_and_gradients
from posenc.kernels import common, flash, projection

DTYPES = (torch.float32, torch.float16)


@pytest.fixture
def small_tiles(monkeypatch):
    config = flash.Config(16, 16, 4, 1)
    monkeypatch.setattr(projection, "CONFIGS", dict.fromkeys(projection.CONFIGS, config))


def random_inputs(batch, heads, length, width, dim, dtype, device):
    torch.manual_seed(0)
    x = torch.randn(batch, length, width, device=device).to(dtype)
    weight = (torch.randn(heads * dim, width, device=device) / width**0.5).to(dtype)
    bias = torch.randn(heads * dim, device=device).to(dtype)
    gates = torch.rand(batch, heads, length, device=device)
    gates = torch.where(gates < 0.4, 0.0, gates)
    gates[:, :1], gates[:, 1:2] = 1.0, 0.0
    return (x, weight, bias), gates


def definition(x, weight, bias, gates):
    """The whole product, then a mask."""
    y = x @ weight.T if bias is None else x @ weight.T + bias
    y = y.unflatten(-1, (gates.shape[1], -1)).transpose(1, 2)
    return torch.where((gates != 0).unsqueeze(-1), y, 0.0)


def check(inputs, gates):
    (x, *_), heads = inputs, gates.shape[1]
    dy = torch.randn(x.shape[0], heads, x.shape[1], inputs[1].shape[0] // heads).to(x)
    actual = outputs_and_gradients(lambda *a: projection.project_kept(*a, gates), inputs, dy)
    plain = outputs_and_gradients(lambda *a: definition(*a, gates), inputs, dy)
    double = [z.double() for z in inputs]
    exact = outputs_and_gradients(lambda *a: definition(*a, gates), double, dy)
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert (a.shape, a.dtype) == (p.shape, p.dtype)
        # Three TF32 products keep 22 bits of a factor, and sums may come in another order.
        rounding = (torch.finfo(a.dtype).eps + 2**-20) * e.abs().max()
        assert (a.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 16), (2, 3, 37, 50, 40), (1, 4, 20, 33, 64), (1, 2, 17, 20, 256)]
)
@pytest.mark.usefixtures("small_tiles")
def test_outputs_and_gradients(sizes, dtype, device):
    check(*random_inputs(*sizes, dtype, device))


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_the_table(dim, dtype, device):
    check(*random_inputs(1, 3, 150, 100, dim, dtype, device))


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 80), width=st.integers(1, 70), dim=st.integers(1, 40))
def test_any_size(length, width, dim, device):
    check(*random_inputs(1, 3, length, width, dim, torch.float32, device))


@pytest.mark.usefixtures("small_tiles")
def test_without_bias_from_a_view(device):
    (x, weight, _), gates = random_inputs(2, 3, 21, 30, 16, torch.float32, device)
    wide = torch.randn(2, 21, 60, device=device)
    wide[..., ::2] = x
    view = wide[..., ::2]
    y = projection.project_kept(view, weight, None, gates)
    torch.testing.assert_close(y, definition(x, weight, None, gates), rtol=1e-5, atol=1e-5)
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.usefixtures("small_tiles")
def test_opcheck_and_compile(device):
    inputs, gates = random_inputs(1, 3, 9, 20, 16, torch.float32, device)
    leaves = [z.requires_grad_() for z in inputs]
    torch.library.opcheck(projection._forward_op, (*leaves, gates))
    with counted() as (compiled, counter):
        y = compiled(projection.project_kept)(*leaves, gates)
        assert counter.frame_count == 1
    torch.testing.assert_close(y, projection.project_kept(*leaves, gates))


def test_bad_arguments(device, monkeypatch):
    (x, weight, bias), gates = random_inputs(1, 3, 9, 20, 16, torch.float32, device)
    for arguments, message in (
        ((x, weight[:, 1:], bias, gates), "expected x"),
        ((x, weight[1:], bias[1:], gates), "expected x"),
        ((x, weight, bias, gates[..., 1:]), "expected x"),
        ((x, weight, bias[1:], gates), "bias must be"),
        ((x, weight.half(), bias, gates), "one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            projection.project_kept(*arguments)
    monkeypatch.setattr(common, "INTERPRETED", False)
    if not x.is_cuda:
        with pytest.raises(ValueError, match="needs CUDA tensors"):
            projection.project_kept(x, weight, bias, gates)
