"""CARoPE's kernels against the fp64 oracle: phases, carries, strides, every gradient."""

import math

import pytest
import torch

import oracles
from posenc.kernels import carope as kernel
from posenc.kernels.carope import (
    _backward_op,
    _forward_op,
    carope,
    carope_with_phases,
    rates_from_log,
)
from posenc.kernels.turns import radians_from_turns

#: Error of a rotated feature relative to its pair's norm, as for RoPE.
TURN = 4e-7
DTYPES = (torch.float32, torch.float16)
PI = math.pi


def inputs(batch, heads, length, dim, dtype, device):
    """q and k as they lie in a projection (B, T, 3, H, D), and log rates in fp64."""
    qkv = torch.randn(batch, length, 3, heads, dim, dtype=dtype, device=device)
    rates = torch.rand(batch, heads, length, dtype=torch.float64, device=device) * 0.98 + 0.01
    return qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2), rates.log()


def exact_phases(log_rates, dim, first_power=0, carry=None):
    phases = oracles.carope_steps(log_rates.exp(), dim, first_power).cumsum(2)
    return phases if carry is None else phases + radians_from_turns(carry)[:, :, None]


def close(actual, wanted, relative):
    assert actual.isfinite().all()
    allowed = relative * wanted.abs().max().item() + 1e-30
    assert (actual.cpu().double() - wanted).abs().max().item() <= allowed


def check(actual, wanted):
    close(actual, wanted, math.sqrt(2) * (TURN + torch.finfo(actual.dtype).eps / 2))


def angle(x):
    """The phases that a rotation gave to pairs (1, 0)."""
    cos, sin = x.cpu().double().chunk(2, -1)
    return torch.atan2(sin, cos)


def turned(phase):
    """Distance to the nearest whole turn."""
    return (phase - 2 * PI * torch.round(phase / (2 * PI))).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "length", "dim", "first_power"),
    [
        (2, 1, 1, 16, 0),
        (1, 12, 2, 64, 1),
        (2, 3, 63, 40, 0),
        (1, 3, 100, 128, 1),
        (1, 1, 300, 4, 0),
        (1, 1, 130, 64, 0),
    ],
)
def test_forward_and_backward(dtype, batch, heads, length, dim, first_power, device):
    torch.manual_seed(0)
    q, k, log_rates = inputs(batch, heads, length, dim, dtype, device)
    dy, dz, _ = inputs(batch, length, heads, dim, dtype, device)
    upstream = dy.transpose(1, 2), dz.transpose(1, 2)
    before = q.clone(), k.clone()
    leaves = [x.detach().requires_grad_() for x in (q, k, log_rates)]
    *outputs, _ = carope(*leaves, first_power=first_power)
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])

    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, log_rates)]
    phases = exact_phases(exact[2], dim, first_power)
    wanted = oracles.carope_rotate(exact[0], exact[1], phases)
    for y, w in zip(outputs, wanted, strict=True):
        assert y.dtype == dtype
        check(y.detach(), w.detach())
    wanted = torch.autograd.grad(wanted, exact, [g.cpu().double() for g in upstream])
    for dx, w in zip(gradients[:2], wanted[:2], strict=True):
        assert dx.dtype == dtype
        check(dx, w)
    assert gradients[2].dtype == torch.float64
    with torch.no_grad():
        rotated = oracles.carope_rotate(exact[0], exact[1], phases)
        noise = rate_noise(rotated, upstream, exact[2].exp(), first_power)
    unit = torch.finfo(dtype).eps / 2 + TURN
    assert ((gradients[2].cpu() - wanted[2]).abs() <= 6 * unit * noise).all()


def rate_noise(outputs, upstream, rates, first_power):
    """Standard deviation of dlog f where every product y dy' in it is off by a random unit.

    dlog f[t] = sum_i e_i step_i[t] sum over m >= t of dphi_i[m], products of rounded outputs.
    """
    squares = 0
    for y, dy in zip(outputs, upstream, strict=True):
        (y1, y2), (dy1, dy2) = y.chunk(2, -1), dy.cpu().double().chunk(2, -1)
        squares = squares + (y1 * dy2).square() + (y2 * dy1).square()
    later = squares.flip(2).cumsum(2).flip(2)
    weights = oracles.carope_steps(rates, 2 * later.shape[-1], first_power)
    weights = weights * torch.arange(first_power, first_power + later.shape[-1])
    return (weights.square() * later).sum(-1).sqrt()


def test_carry_is_an_input_and_an_output(device):
    torch.manual_seed(1)
    q, k, log_rates = inputs(2, 3, 70, 40, torch.float32, device)
    carry = torch.randint(-(2**62), 2**62, (2, 3, 20), device=device) * 2
    y, z, last = carope(q, k, log_rates, carry)
    phases = exact_phases(log_rates.cpu(), 40, 0, carry.cpu())
    exact = q.cpu().double(), k.cpu().double()
    for actual, wanted in zip((y, z), oracles.carope_rotate(*exact, phases), strict=True):
        check(actual, wanted)
    assert turned(radians_from_turns(last.cpu()) - phases[:, :, -1]) < 1e-12


def test_phases_are_those_of_all_tokens(device):
    torch.manual_seed(1)
    q, k, log_rates = inputs(2, 3, 70, 40, torch.float32, device)
    carry = torch.randint(-(2**62), 2**62, (2, 3, 20), device=device) * 2
    y, z, last = carope(q, k, log_rates, carry)
    *same, phases = carope_with_phases(q, k, log_rates, carry)
    assert all(map(torch.equal, same, (y, z)))
    assert torch.equal(phases[:, :, -1], last)
    wanted = exact_phases(log_rates.cpu(), 40, 0, carry.cpu())
    assert turned(radians_from_turns(phases.cpu()) - wanted) < 1e-12


@pytest.mark.parametrize("cuts", [(1,), (64,), (3, 64, 65, 130, 190), tuple(range(1, 200, 33))])
def test_chunks_equal_the_whole_to_the_last_bit(cuts, device):
    torch.manual_seed(2)
    q, k, log_rates = inputs(1, 2, 200, 64, torch.float32, device)
    *whole, last = carope(q, k, log_rates)
    parts, carry = [], None
    for a, b in zip((0, *cuts), (*cuts, 200), strict=True):
        *turned_part, carry = carope(q[:, :, a:b], k[:, :, a:b], log_rates[:, :, a:b], carry)
        parts.append(turned_part)
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts], 2), whole[i])
    assert torch.equal(carry, last)


@pytest.mark.parametrize("random", [False, True])
def test_phases_after_a_million_tokens(random, device, monkeypatch):
    if device.type == "cpu":  # the same sums in 16 large tiles: numpy is slow at 4000 small ones
        monkeypatch.setattr(kernel, "TILE", 2**19)
    length, dim = 1_000_003, 8
    log_rates = torch.full((1, 1, length), math.log(10000 ** (-2 / dim)), dtype=torch.float64)
    if random:
        log_rates = (0.4 + 0.55 * torch.rand_like(log_rates)).log()
    x = torch.zeros(1, 1, length, dim, device=device)
    x[..., : dim // 2] = 1
    y, _, last = carope(x, x, log_rates.to(device))
    steps = oracles.carope_steps(log_rates.exp(), dim)[0, 0]
    ends = torch.tensor([math.fsum(column) for column in steps.T.tolist()], dtype=torch.float64)
    assert turned(radians_from_turns(last.cpu())[0, 0] - ends) < 1e-9
    tail = ends - (steps[-40:].sum(0) - steps[-40:].cumsum(0))
    assert turned(angle(y[..., -40:, :])[0, 0] - tail) < 3e-7


def test_constant_rate_is_rope(device):
    dim, length = 64, 130
    omega = torch.tensor(oracles.rope_frequencies(dim), dtype=torch.float64)
    log_rates = torch.full((1, 2, length), math.log(omega[1]), dtype=torch.float64, device=device)
    q, k, _ = inputs(1, 2, length, dim, torch.float32, device)
    positions = torch.arange(1, length + 1)  # the sum includes the token itself
    for x, y in zip((q, k), carope(q, k, log_rates)[:2], strict=True):
        wanted = oracles.rotate(x.cpu().double(), (positions[:, None] * omega).expand(1, 2, -1, -1))
        check(y, wanted)


def test_padding_stands_still(device):
    torch.manual_seed(3)
    q, k, log_rates = inputs(1, 2, 9, 16, torch.float32, device)
    y, _, last = carope(q, k, log_rates)
    x = torch.randn(1, 2, 5, 16, device=device)
    still = torch.full((1, 2, 5), -math.inf, dtype=torch.float64, device=device)
    leaf = torch.cat((still, log_rates), 2).requires_grad_()
    y_padded, _, last_padded = carope(torch.cat((x, q), 2), torch.cat((x, k), 2), leaf)
    assert torch.equal(y_padded[:, :, 5:], y)
    assert torch.equal(y_padded[:, :, :5], x)
    assert torch.equal(last_padded, last)
    (gradient,) = torch.autograd.grad(y_padded.square().sum() + y_padded[..., 0].sum(), leaf)
    assert gradient.isfinite().all()
    assert not gradient[:, :, :5].any()


@pytest.mark.parametrize("rate", [0.0, -1e-9, -20.0, -600.0])
def test_extreme_rates(rate, device):
    q, k, log_rates = inputs(1, 1, 7, 16, torch.float32, device)
    log_rates = torch.full_like(log_rates, rate)
    y, _, _ = carope(q, k, log_rates)
    check(y, oracles.carope_rotate(*(q.cpu().double(),) * 2, exact_phases(log_rates.cpu(), 16))[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rates_as_fractions(dtype, device):
    log_rates = torch.tensor([0.0, math.log(0.5), -math.inf], dtype=torch.float64).to(dtype)
    rates = rates_from_log(log_rates.to(device).expand(2, 1, 3))
    half = 2**64 * math.exp(float(log_rates[1]))
    assert [x % 2**64 for x in rates[1, 0].tolist()] == [
        2**64 - 4,
        pytest.approx(half, rel=2**-51),
        0,
    ]


def test_any_strides_of_the_logarithms(device):
    log_rates = -torch.rand(5, 2, 3, dtype=torch.float64, device=device).permute(2, 1, 0)
    rates = rates_from_log(log_rates)
    assert rates.is_contiguous()
    for b, h, t in ((0, 1, 0), (2, 0, 4), (1, 1, 3)):
        unsigned = int(rates[b, h, t]) % 2**64
        assert unsigned / 2**64 == pytest.approx(math.exp(log_rates[b, h, t]), rel=2**-51)


def test_expanded_and_missing_gradients(device):
    q, k, log_rates = inputs(2, 2, 70, 16, torch.float32, device)
    leaves = [x.detach().requires_grad_() for x in (q, k, log_rates)]
    y, _, _ = carope(*leaves)
    gradients = torch.autograd.grad(y.sum(), leaves)
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, log_rates)]
    wanted, _ = oracles.carope_rotate(exact[0], exact[1], exact_phases(exact[2], 16))
    wanted = torch.autograd.grad(wanted.sum(), (exact[0], exact[2]))
    check(gradients[0], wanted[0])
    assert not gradients[1].any()
    close(gradients[2], wanted[1], 1e-5)


def test_input_used_twice(device):
    x, _, log_rates = inputs(1, 2, 5, 16, torch.float32, device)
    x = x.detach().requires_grad_()
    y, z, _ = carope(x, x, log_rates)
    assert torch.equal(y, z)
    (one,) = torch.autograd.grad(carope(x, x, log_rates)[0].sum(), x)
    (both,) = torch.autograd.grad(y.sum() + z.sum(), x)
    torch.testing.assert_close(both, 2 * one)


def test_first_token_has_no_say(device):
    """A scalar of the scores does not change when all phases shift: dlog f of the first token."""
    q, k, log_rates = inputs(1, 2, 100, 16, torch.float32, device)
    log_rates = log_rates.requires_grad_()
    y, z, _ = carope(q, k, log_rates)
    scores = torch.tril(y @ z.mT)
    (gradient,) = torch.autograd.grad(scores.square().sum(), log_rates)
    assert gradient[:, :, 0].abs().max() < 1e-5 * gradient.abs().max()


def test_same_bits_again_and_alone(device):
    q, k, log_rates = inputs(3, 2, 90, 32, torch.float32, device)
    results = []
    for rows in (slice(None), slice(None), slice(1, 2)):
        leaves = [x[rows].detach().requires_grad_() for x in (q, k, log_rates)]
        y, z, last = carope(*leaves)
        gradients = torch.autograd.grad((y * z).sum(), leaves)
        results.append((y, z, last, *gradients))
    for first, again, alone in zip(*results, strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first[1:2], alone)


def test_operator_contract(device):
    q, k, log_rates = inputs(2, 3, 5, 16, torch.float32, device)
    carry = torch.zeros(2, 3, 8, dtype=torch.int64, device=device)
    leaves = [x.detach().requires_grad_() for x in (q, k, log_rates)]
    torch.library.opcheck(_forward_op, (*leaves, None, 0, False))
    shallow = ("test_schema", "test_faketensor")
    torch.library.opcheck(_forward_op, (*leaves, carry, 1, True), test_utils=shallow)
    y, z, *_, rates, carries = _forward_op(q, k, log_rates, None, 0, False)
    torch.library.opcheck(_backward_op, (z, y, y, z, rates, carries, 0), test_utils=shallow)


def test_compiles_whole(device):
    def function(x, log_rates, carry):
        y, z, last = carope(x * 1, x * 2, log_rates, carry)
        return y + z, last

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    carry = torch.full((2, 3, 8), 2**61, device=device)
    for length in (5, 300):
        x, _, log_rates = inputs(2, 3, length, 16, torch.float32, device)
        leaves = x.detach().requires_grad_(), log_rates.requires_grad_()
        runs = [run(*leaves, carry) for run in (function, compiled)]
        for one, other in zip(*runs, strict=True):
            assert torch.equal(one, other)
        gradients = [torch.autograd.grad(y.square().sum(), leaves[0])[0] for y, _ in runs]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("needs q", {"k": torch.zeros(1, 2, 6, 16)}),
        ("needs q", {"q": torch.zeros(1, 2, 5, 15), "k": torch.zeros(1, 2, 5, 15)}),
        ("log_rates", {"log_rates": torch.zeros(1, 2, 6)}),
        ("log_rates", {"log_rates": torch.zeros(1, 2, 5, dtype=torch.bfloat16)}),
        ("carry", {"carry": torch.zeros(1, 2, 8)}),
        ("first_power", {"first_power": 2}),
        ("token", {name: torch.zeros(0, 2, 5, 16) for name in ("q", "k")}),
        ("dtype", {"k": torch.zeros(1, 2, 5, 16, dtype=torch.float16)}),
    ],
)
def test_bad_arguments(message, change, device):
    good = {"q": torch.zeros(1, 2, 5, 16), "k": torch.zeros(1, 2, 5, 16)}
    good["log_rates"] = torch.zeros(1, 2, 5)
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (good | change).items()
    }
    with pytest.raises(ValueError, match=message):
        carope(**arguments)
