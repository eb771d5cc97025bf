"""RoPE's kernel against the fp64 oracle: every option, every stride, every gradient."""

import math

import pytest
import torch

import oracles
from posenc.kernels.polar import polar
from posenc.kernels.rope import _rope, rope
from posenc.kernels.rope_attention import rope_attention
from posenc.kernels.turns import radians_from_turns, turns_from_radians

#: Error of a rotated feature, relative to its pair's norm: cosine and sine 1.3e-7 each, two
#: roundings of 6e-8; then half a unit of the last place of the result.
TURN = 4e-7
DTYPES = (torch.float32, torch.float16)


def frequencies(dim, device, base=10000.0):
    return torch.tensor(oracles.rope_frequencies(dim, base), dtype=torch.float64, device=device)


def expected(x, positions, omega, pairing="half", factor=1.0):
    """The oracle's rotation of fp64 x (B, H, T, D), all positions at once."""
    if positions is None:
        positions = torch.arange(x.shape[2])
    angles = positions.double()[..., None] * omega  # (T, R/2) or (B, T, R/2)
    if angles.ndim == 3:
        angles = angles[:, None]
    angles = angles.expand(*x.shape[:-1], -1)
    width = 2 * omega.shape[0]
    turned = oracles.rotate(x[..., :width], angles, pairing, factor)
    return torch.cat((turned, x[..., width:]), -1)


def check(actual, wanted, factor=1.0):
    assert actual.isfinite().all()
    size = math.sqrt(2) * wanted.abs().max().item()
    allowed = size * (TURN * factor + torch.finfo(actual.dtype).eps / 2)
    assert (actual.cpu().double() - wanted).abs().max().item() <= allowed


def packed(batch, length, heads, dim, dtype, device):
    """q and k as they lie in a projection (B, T, 3, H, D)."""
    qkv = torch.randn(batch, length, 3, heads, dim, dtype=dtype, device=device)
    return qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("batch", "heads", "length", "dim", "rotary", "given"),
    [
        (2, 1, 1, 16, 16, "rows"),
        (1, 12, 2, 64, 64, "shared"),
        (2, 3, 63, 40, 40, None),
        (2, 3, 63, 40, 24, "rows"),
        (1, 3, 100, 128, 128, None),
    ],
)
def test_forward_and_backward(dtype, pairing, batch, heads, length, dim, rotary, given, device):
    torch.manual_seed(0)
    q, k = packed(batch, length, heads, dim, dtype, device)
    positions = None
    if given:
        shape = (length,) if given == "shared" else (batch, length)
        positions = torch.randint(-5, 9000, shape, device=device)
    before = q.clone(), k.clone()
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    omega = frequencies(rotary, device)
    outputs = rope(*leaves, omega, positions, pairing=pairing, factor=1.25)
    upstream = [x.transpose(1, 2) for x in packed(batch, heads, length, dim, dtype, device)]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    for x, old, y, dy, dx in zip((q, k), before, outputs, upstream, gradients, strict=True):
        assert y.dtype == dx.dtype == dtype
        assert torch.equal(x, old)
        exact = x.detach().cpu().double().requires_grad_()
        where = None if positions is None else positions.cpu()
        wanted = expected(exact, where, omega.cpu(), pairing, 1.25)
        check(y.detach(), wanted.detach(), 1.25)
        check(dx, torch.autograd.grad(wanted, exact, dy.cpu().double())[0], 1.25)


@pytest.mark.parametrize("length", [1024, 4097])
def test_long(length, device):
    q, k = torch.randn(2, 1, 1, length, 16, device=device)
    omega = frequencies(16, device)
    for x, y in zip((q, k), rope(q, k, omega), strict=True):
        check(y, expected(x.cpu().double(), None, omega.cpu()))


def test_fewer_key_heads(device):
    q, k = torch.randn(2, 6, 9, 32, device=device), torch.randn(2, 2, 9, 32, device=device)
    omega = frequencies(32, device)
    for x, y in zip((q, k), rope(q, k, omega), strict=True):
        check(y, expected(x.cpu().double(), None, omega.cpu()))


def test_any_stride_of_features(device):
    x = torch.randn(2, 3, 16, 9, device=device).transpose(2, 3)
    omega = frequencies(16, device)
    y, z = rope(x, x, omega)
    assert torch.equal(y, z)
    check(y, expected(x.cpu().double(), None, omega.cpu()))


def test_expanded_and_missing_gradients(device):
    q = torch.randn(2, 3, 9, 16, device=device, requires_grad=True)
    k = torch.randn(2, 3, 9, 16, device=device, requires_grad=True)
    omega = frequencies(16, device)
    exact = q.detach().cpu().double().requires_grad_()
    wanted = torch.autograd.grad(expected(exact, None, omega.cpu()).sum(), exact)[0]
    y, _ = rope(q, k, omega)
    dq, dk = torch.autograd.grad(y.sum(), (q, k))
    check(dq, wanted)
    assert not dk.any()


def test_input_used_twice(device):
    x = torch.randn(1, 2, 5, 16, device=device, requires_grad=True)
    omega = frequencies(16, device)
    y, z = rope(x, x, omega)
    (dx,) = torch.autograd.grad(y.sum() + 2 * z.sum(), x)
    (one,) = torch.autograd.grad(rope(x, x, omega)[0].sum(), x)
    torch.testing.assert_close(dx, 3 * one)


def test_second_derivative(device):
    q, k, dy = torch.randn(3, 1, 1, 5, 16, device=device).unbind()
    dy.requires_grad_()
    q.requires_grad_()
    y, _ = rope(q, k, frequencies(16, device))
    (dx,) = torch.autograd.grad(y, q, dy, create_graph=True)
    (twice,) = torch.autograd.grad(dx, dy, y.detach())  # R(-a)^T R(a) x = R(2a) x
    check(twice, expected(y.detach().cpu().double(), None, frequencies(16, "cpu")))


@pytest.mark.parametrize("start", [1_000_000, 2**24 + 1, 2**30])
def test_phases_far_out(start, device):
    omega = frequencies(64, device)
    x = torch.zeros(1, 1, 33, 64, device=device)
    x[..., :32] = 1
    positions = torch.arange(start, start + 33, device=device)
    y, _ = rope(x, x, omega, positions)
    cos, sin = y[0, 0].cpu().double().split(32, -1)
    phase = positions.cpu().double()[:, None] * omega.cpu()
    error = torch.sin(torch.atan2(sin, cos) - phase).abs().max().item()
    # 1.3e-7 from the polynomials, 1e-16 relative from the fraction and from fp64 here
    assert error < 2e-7 + 5e-16 * start


def test_scores_do_not_depend_on_the_origin(device):
    q, k = torch.randn(2, 1, 2, 17, 32, device=device)
    omega = frequencies(32, device)
    near, far = (
        torch.matmul(*(x if i == 0 else x.mT for i, x in enumerate(rope(q, k, omega, positions))))
        for positions in (None, torch.arange(10**6, 10**6 + 17, device=device))
    )
    assert (near - far).abs().max() < 32 * 4 * TURN


def test_any_frequency_table(device):
    table, factor = oracles.yarn_frequencies(32, 4.0, 64)
    q, k = torch.randn(2, 1, 2, 40, 32, device=device)
    omega = torch.tensor(table, dtype=torch.float64, device=device)
    y, _ = rope(q, k, omega, factor=factor)
    check(y, expected(q.cpu().double(), None, omega.cpu(), factor=factor), factor)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("rotary", [40, 24])
def test_in_place(pairing, rotary, device):
    torch.manual_seed(1)
    omega = frequencies(rotary, device)
    source = torch.randn(2, 9, 3, 3, 40, device=device, requires_grad=True)
    weights = torch.randn(2, 2, 3, 9, 40, device=device)
    results = []
    for inplace in (False, True):
        qkv = source * 2  # not a leaf
        q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
        y, z = rope(q, k, omega, pairing=pairing, inplace=inplace)
        assert (y.data_ptr() == qkv.data_ptr()) == inplace
        values = y.detach().clone(), z.detach().clone()
        loss = (y * weights[0]).sum() + (z * weights[1]).sum() + qkv[:, :, 2].sum()
        results.append((*values, *torch.autograd.grad(loss, source)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_in_place_tells_autograd(device):
    omega = frequencies(16, device)
    leaf = torch.randn(1, 1, 5, 16, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        rope(leaf, torch.randn_like(leaf), omega, inplace=True)
    x = leaf * 1
    squares = (x * x).sum()  # saves x
    rope(x, torch.randn_like(x), omega, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_in_place_refuses_shared_elements(device):
    omega = frequencies(16, device)
    x = torch.randn(1, 2, 5, 16, device=device)
    for q, k in ((x, x), (x, x[:, :1].expand(1, 2, 5, 16))):
        with pytest.raises(ValueError, match="distinct"):
            rope(q, k, omega, inplace=True)


def test_same_bits_again_and_alone(device):
    q, k = packed(3, 21, 2, 32, torch.float32, device)
    omega = frequencies(32, device)
    positions = torch.randint(0, 10**6, (3, 21), device=device)
    y, z = rope(q, k, omega, positions)
    again = rope(q, k, omega, positions)
    alone = rope(q[1:2], k[1:2], omega, positions[1:2])
    assert torch.equal(y, again[0])
    assert torch.equal(z, again[1])
    assert torch.equal(y[1:2], alone[0])
    assert torch.equal(z[1:2], alone[1])


def test_frequencies_may_be_turns_already(device):
    q, k = packed(2, 5, 3, 16, torch.float32, device)
    omega, v = frequencies(16, device), torch.randn_like(q)
    fractions = turns_from_radians(omega)
    delta, b = torch.randn(2, 3, 8, device=device).unbind(0)
    for y, z in zip(rope(q, k, omega), rope(q, k, fractions), strict=True):
        assert torch.equal(y, z)
    for y, z in zip(polar(q, k, delta, b, omega), polar(q, k, delta, b, fractions), strict=True):
        assert torch.equal(y, z)
    assert torch.equal(rope_attention(q, k, v, omega), rope_attention(q, k, v, fractions))


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 2, 0, 16)])
def test_empty(shape, device):
    x = torch.randn(shape, device=device)
    assert rope(x, x, frequencies(16, device))[0].shape == shape


def test_operator_contract(device):
    fractions = turns_from_radians(frequencies(16, device))
    q, k = packed(2, 5, 3, 16, torch.float32, device)
    q, k = q.requires_grad_(), k.requires_grad_()
    positions = torch.arange(5, device=device)
    torch.library.opcheck(_rope, (q, k, fractions, None, 1.0, False, False))
    torch.library.opcheck(_rope, (q, k, fractions, positions, 1.5, True, True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, while tracing
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_whole(inplace, device):
    def function(x, omega):
        y, z = rope(x * 1, x * 2, omega, inplace=inplace)
        return y + z

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    omega = frequencies(16, device)
    for length in (5, 7, 12):
        x = torch.randn(2, 3, length, 16, device=device, requires_grad=True)
        wanted = function(x, omega)
        actual = compiled(x, omega)
        assert torch.equal(actual, wanted)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, wanted)]
        torch.testing.assert_close(*gradients)


def test_turns_and_radians():
    radians = torch.tensor([0.0, 1.0, -1.0, 3.0, 1e6, -7.5], dtype=torch.float64)
    back = radians_from_turns(turns_from_radians(radians))
    assert torch.sin((back - radians) / 2).abs().max() < 1e-10
    half = torch.tensor([math.pi], dtype=torch.float64)
    assert turns_from_radians(half).item() == -(2**63)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("agree", {"k": torch.zeros(1, 2, 6, 16)}),
        ("frequencies", {"frequencies": torch.zeros(9, dtype=torch.float64)}),
        ("radians in float64, or turns in int64", {"frequencies": torch.zeros(8)}),
        ("positions", {"positions": torch.zeros(4, dtype=torch.long)}),
        ("integers", {"positions": torch.zeros(5)}),
        ("pairing", {"pairing": "other"}),
        ("dtype", {"k": torch.zeros(1, 2, 5, 16, dtype=torch.float16)}),
        ("float64", {"q": torch.zeros(1, 2, 5, 16, dtype=torch.float64)}),
    ],
)
def test_bad_arguments(message, change, device):
    good = {"q": torch.zeros(1, 2, 5, 16), "k": torch.zeros(1, 2, 5, 16)}
    good["frequencies"] = torch.zeros(8, dtype=torch.float64)
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (good | change).items()
    }
    with pytest.raises(ValueError, match=message):
        rope(**arguments)
