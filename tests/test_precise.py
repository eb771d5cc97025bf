"""posenc.precise: the product and all its derivatives, and what is kept for them."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from posenc.precise import precise_columns

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7).to(dtype).requires_grad_()
    return x, torch.randn(7, 3).requires_grad_()


def definition(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("btc,ch->bht", x.double(), weight.double())


@DTYPES
def test_the_product_and_two_derivatives(dtype: torch.dtype) -> None:
    found = []
    for function in (precise_columns, definition):
        x, weight = inputs(dtype)
        z = function(x, weight)
        first = torch.autograd.grad(z.square().sum(), (x, weight), create_graph=True)
        second = torch.autograd.grad(sum(g.double().square().sum() for g in first), (x, weight))
        assert [g.dtype for g in (*first, *second)] == [dtype, torch.float32] * 2
        found.append((z, *first, *second))
    assert found[0][0].dtype == torch.float64
    for own, expected in zip(*found, strict=True):
        # fp64 sums in another order; gradients of two ways, each rounded, that may cancel.
        error = 4 * torch.finfo(own.dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(own, expected, rtol=0, atol=error)


def test_autocast_does_not_reach_it() -> None:
    x, weight = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z = precise_columns(x, weight)
        torch.testing.assert_close(z, definition(x, weight), rtol=1e-14, atol=1e-14)
        z.sum().backward()
    expected = torch.autograd.grad(definition(x, weight).sum(), (x, weight))
    torch.testing.assert_close((x.grad, weight.grad), expected)


@DTYPES
def test_nothing_wide_is_kept(dtype: torch.dtype) -> None:
    x, weight = inputs(dtype)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        precise_columns(x, weight)
    assert {t.untyped_storage().data_ptr() for t in kept if t.shape[:2] == x.shape[:2]} <= {
        x.untyped_storage().data_ptr()
    }
    assert sum(t.numel() * t.itemsize for t in kept) <= (
        x.numel() * x.itemsize + 8 * weight.numel()
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_has_none(frozen: int) -> None:
    tensors = inputs(torch.float32)
    tensors[frozen].requires_grad_(False)
    precise_columns(*tensors).sum().backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad is not None


# torch scripts its forward mode, and deprecates that.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_transforms_see_through() -> None:
    x, weight = (t.detach() for t in inputs(torch.float32))
    tangent = torch.ones_like(x)
    expected = definition(tangent, weight)
    torch.testing.assert_close(
        torch.func.jvp(lambda x: precise_columns(x, weight), (x,), (tangent,))[1], expected
    )
    with forward_ad.dual_level():
        dual = precise_columns(forward_ad.make_dual(x, tangent), weight.requires_grad_())
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    weight = weight.detach()
    by_x = torch.func.grad(lambda x: precise_columns(x, weight).sum())(x)
    torch.testing.assert_close(by_x, weight.sum(1).expand_as(x))
    rows = torch.func.vmap(lambda x: precise_columns(x[None], weight)[0])(x)
    torch.testing.assert_close(rows, definition(x, weight))
