"""CARoPE's rates from the tokens against fp64, with their gradients."""

import pytest
import torch

import posenc
from posenc import rates as definition
from posenc.kernels import rates
from posenc.kernels.rates import _backward_op, _forward_op, log_rates

DTYPES = (torch.float32, torch.float16)
SIZES = [(1, 1, 1, 1), (2, 5, 7, 3), (1, 37, 100, 5), (3, 17, 72, 17), (1, 3, 768, 12)]


def inputs(batch, length, width, heads, dtype, device):
    torch.manual_seed(0)
    x = torch.randn(batch, length, width, device=device).to(dtype)
    return x, torch.randn(width, heads, device=device), torch.randn(heads, device=device)


def columns(x, weight):
    return rates.columns(x, weight).sum(0, dtype=torch.float64)


def exact(x, weight):
    return torch.einsum("btc,ch->bht", x.double(), weight.double())


def bound(x, weight):
    """The worst of roundings, as derived in the kernel's file; fp64's own are 2^-53 each."""
    return 2**-37 * weight.shape[0] * (x.abs().max().double() * weight.abs().max()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_columns_are_nearly_those_of_fp64(sizes, dtype, device):
    x, weight, _ = inputs(*sizes, dtype, device)
    z, expected = columns(x, weight), exact(x, weight)
    assert (z.shape, z.dtype) == (expected.shape, torch.float64)
    off = (z - expected).abs()
    assert off.max() <= bound(x, weight)
    # Random roundings cancel: of one in 2000, as of a sum in fp32, there is no trace.
    assert off.square().mean().sqrt() <= bound(x, weight) / 2**8


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_cancels_leaves_the_rest(dtype, device):
    """Sums 10^6 times smaller than their terms, in an order that no rounding of fp32 survives."""
    x, weight, _ = inputs(2, 9, 400, 3, dtype, device)
    x, weight = torch.cat((x, -x), 2), torch.cat((weight, weight), 0)
    x[..., 800 // 2 - 1] += 2**-8
    z, expected = columns(x, weight), exact(x, weight)
    assert 0 < expected.abs().max() < 1e-2
    assert (z - expected).abs().max() <= bound(x, weight) / 2**8


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-20, 2.0**20, 2.0**100])
def test_any_scale(scale, device):
    x, weight, _ = inputs(1, 6, 50, 2, torch.float32, device)
    assert (columns(scale * x, weight) - exact(scale * x, weight)).abs().max() <= bound(
        scale * x, weight
    )
    assert torch.equal(columns(0 * x, weight), torch.zeros_like(exact(x, weight)))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # the interpreter's
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 2.0**125])
def test_a_token_that_is_no_number_spoils_itself_alone(bad, device):
    x, weight, bias = inputs(1, 20, 50, 2, torch.float32, device)
    clean = log_rates(x, weight, bias)
    x[0, 3, 7] = bad
    found = log_rates(x, weight, bias)
    assert found[:, :, 3].isnan().all()
    assert torch.equal(found[:, :, 4:], clean[:, :, 4:])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_rates_and_gradients(sizes, dtype, biased, device):
    leaves = [z.requires_grad_() for z in inputs(*sizes, dtype, device)[: 2 + biased]]
    doubled = [z.detach().double().requires_grad_() for z in leaves]
    log = log_rates(*leaves)
    expected = definition.log_rates(*doubled, *(None,) * (not biased))
    # The slope of log f is at most 1 in z.
    assert (log - expected).abs().max() <= bound(*leaves[:2]) + 1e-14
    upstream = torch.randn_like(log)
    found = torch.autograd.grad(log, leaves, upstream)
    wanted = torch.autograd.grad(expected, doubled, upstream)
    for leaf, own, other in zip(leaves, found, wanted, strict=True):
        assert (own.shape, own.dtype) == (leaf.shape, leaf.dtype)
        # Sums of fp32 numbers with 22 bits or more, rounded once to the dtype.
        unit = torch.finfo(own.dtype).eps / 2 + 2**-20
        assert (own.double() - other).abs().max() <= unit * other.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_summed_alike_among_any_others(dtype, device):
    # The columns: what torch's CPU makes of one in its last bit depends on those beside it.
    x, weight, _ = inputs(2, 35, 100, 5, dtype, device)
    whole = columns(x, weight)
    for part in (3, 16, 33):
        pieces = [columns(piece, weight) for piece in x.split(part, 1)]
        assert torch.equal(torch.cat(pieces, 2), whole)
    assert torch.equal(columns(x[1:2], weight), whole[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype, device):
    x, weight, bias = inputs(2, 9, 40, 3, dtype, device)
    packed = torch.full((3, 9, 83), torch.nan, dtype=dtype, device=device)
    views = packed[1:, :, 3:43], packed[1:, :, 2:82:2]
    for view in (*views, torch.empty(9, 40, 2, dtype=dtype, device=device).permute(2, 0, 1)):
        view.copy_(x)
        wide = torch.zeros(40, 6, device=device)
        wide[:, ::2] = weight
        leaves = view.detach().requires_grad_(), wide[:, ::2].detach().requires_grad_(), bias
        log = log_rates(*leaves)
        # In another order: elements are read side by side where they lie side by side.
        torch.testing.assert_close(log, log_rates(x, weight, bias), rtol=1e-12, atol=1e-12)
        dx, dw = torch.autograd.grad(
            log, leaves[:2], torch.ones_like(log[:1, :1, :1]).expand_as(log)
        )
        assert dx.isfinite().all()
        assert dw.shape == weight.shape


def test_padding_stands_still(device):
    x, weight, bias = inputs(2, 9, 40, 3, torch.float32, device)
    real = torch.ones(9, 2, dtype=torch.bool, device=device).T
    real[0, :4] = False
    x.requires_grad_()
    log, whole = log_rates(x, weight, bias, real), log_rates(x, weight, bias)
    expected = whole.masked_fill(~real[:, None], -torch.inf)
    assert torch.equal(log, expected)
    upstream = torch.randn_like(log)
    found, wanted = (torch.autograd.grad(y, x, upstream)[0] for y in (log, expected))
    assert torch.equal(found, wanted)
    assert not found[0, :4].any()


def test_slopes_at_the_ends(device):
    """f is 1 within 2^-40 to 2^-300, or nearly 0."""
    _, weight, bias = inputs(1, 1, 2, 4, torch.float32, device)
    bias = torch.tensor([-30.0, -200.0, 60.0, 2.0**100], device=device).requires_grad_()
    log = log_rates(torch.zeros(1, 1, 2, device=device), weight, bias)
    doubled = bias.detach().double().requires_grad_()
    z = doubled.view(1, 4, 1)
    expected = -torch.log1p(torch.where(z > 40, z, torch.log1p(z.clamp(max=40).exp())))
    torch.testing.assert_close(log, expected, rtol=1e-14, atol=0)
    found = torch.autograd.grad(log.sum(), bias)[0]
    wanted = torch.autograd.grad(expected.sum(), doubled)[0]
    torch.testing.assert_close(found.double(), wanted, rtol=2**-22, atol=2**-149)


def test_the_weights_gradient_is_the_same_every_time(device):
    x, weight, bias = inputs(2, 97, 70, 5, torch.float32, device)
    weight.requires_grad_()
    first, second = (
        torch.autograd.grad(log_rates(x, weight, bias).square().sum(), weight)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_x_alone_is_kept(device):
    x, weight, bias = inputs(2, 19, 64, 3, torch.float16, device)
    x.requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        log_rates(x, weight, bias)
    large = [t for t in kept if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"num_kv_heads": 2}])
def test_a_fused_layer_takes_it(options, device, monkeypatch):
    taken = []
    monkeypatch.setattr(rates, "log_rates", lambda *given: taken.append(given) or log_rates(*given))
    layer = posenc.attention("carope", 32, 4, impl="fused", **options).to(device)
    layer(torch.randn(2, 5, 32, device=device)).sum().backward()
    (given,) = taken
    encoding = layer.encoding
    assert given[1] is encoding.weight
    assert encoding.weight.grad.isfinite().all()
    assert encoding.bias.grad.isfinite().all()


def test_operator_contract(device):
    leaves = [z.requires_grad_() for z in inputs(2, 5, 24, 3, torch.float32, device)]
    torch.library.opcheck(_forward_op, tuple(leaves))
    torch.library.opcheck(_forward_op, (*leaves[:2], None))
    real = torch.ones(2, 5, dtype=torch.bool, device=device)
    torch.library.opcheck(_forward_op, (*leaves, real))
    x, weight, bias = (z.detach() for z in leaves)
    log = log_rates(x, weight, bias)
    torch.library.opcheck(_backward_op, (torch.ones_like(log), x, weight, log))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, while tracing
def test_compiles_whole(device):
    def function(x, weight, bias):
        return log_rates(x * 1, weight, bias).exp()

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 7, 12):
        leaves = [z.requires_grad_() for z in inputs(2, length, 24, 3, torch.float32, device)]
        actual, wanted = compiled(*leaves), function(*leaves)
        assert torch.equal(actual, wanted)
        gradients = [torch.autograd.grad(y.sum(), leaves) for y in (actual, wanted)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("needs x", {"x": torch.zeros(5, 8)}),
        ("needs x", {"x": torch.zeros(1, 5, 9)}),
        ("none of them empty", {"x": torch.zeros(1, 0, 8)}),
        ("none of them empty", {"weight": torch.zeros(8, 0)}),
        ("needs x", {"weight": torch.zeros(8)}),
        ("bias must be", {"bias": torch.zeros(3)}),
        ("must be float32", {"weight": torch.zeros(8, 2, dtype=torch.float64)}),
        ("must be float32", {"bias": torch.zeros(2, dtype=torch.float16)}),
        ("real must be bool", {"real": torch.ones(1, 4, dtype=torch.bool)}),
        ("float64", {"x": torch.zeros(1, 5, 8, dtype=torch.float64)}),
    ],
)
def test_bad_arguments(message, change, device):
    good = {"x": torch.zeros(1, 5, 8), "weight": torch.zeros(8, 2), "bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        log_rates(**{name: value.to(device) for name, value in (good | change).items()})
