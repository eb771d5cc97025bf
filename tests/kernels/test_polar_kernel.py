"""CMHA's kernel against fp64: the direct cosine form's scores, and autograd for every gradient."""

import math

import pytest
import torch

import oracles
from posenc.kernels.polar import _backward_op, _forward_op, polar
from posenc.kernels.rope import rope
from posenc.kernels.turns import turns_from_radians

#: Error of a rotated feature relative to its pair's norm, as for RoPE.
TURN = 4e-7
#: fp32 error of the content angle (delta - 1) th + b: one unit of the last place below 4 radians.
ANGLE = 5e-7
DTYPES = (torch.float32, torch.float16)


def inputs(batch, heads, length, dim, dtype, device):
    """q and k as they lie in a projection (B, T, 3, H, D)."""
    qkv = torch.randn(batch, length, 3, heads, dim, dtype=dtype, device=device)
    return qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)


def parameters(heads, dim, device):
    delta = 1 + 0.5 * torch.randn(heads, dim // 2, device=device)
    b = torch.randn(heads, dim // 2, device=device)
    return delta, b, frequencies(dim, device)


def frequencies(dim, device):
    return torch.tensor(oracles.rope_frequencies(dim), dtype=torch.float64, device=device)


def expected(q, k, delta, b, omega, positions=None):
    """METHODS' factorised form with magnitudes, in fp64: lam (cos a, sin a)."""
    positions = torch.arange(q.shape[2]) if positions is None else positions
    position = positions.double()[..., None] * omega
    if position.ndim == 3:
        position = position[:, None]

    def turn(x, offset):
        first, second = x.chunk(2, -1)
        theta = torch.atan2(second, first)
        return oracles.rotate(x, (delta - 1)[:, None] * theta + offset + position)

    return turn(q, b[:, None]), turn(k, torch.zeros_like(b)[:, None])


def check(actual, wanted, turn=TURN + 2 * ANGLE):
    assert actual.isfinite().all()
    allowed = math.sqrt(2) * wanted.abs().max().item() * (turn + torch.finfo(actual.dtype).eps / 2)
    assert (actual.cpu().double() - wanted).abs().max().item() <= allowed


def exact(*tensors):
    return [x.detach().cpu().double().requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "length", "dim", "given"),
    [
        (2, 1, 1, 16, "rows"),
        (1, 12, 2, 64, "shared"),
        (2, 3, 63, 40, None),
        (1, 3, 100, 128, "rows"),
        (1, 1, 300, 16, None),
    ],
)
def test_forward_and_backward(dtype, batch, heads, length, dim, given, device):
    torch.manual_seed(0)
    q, k = inputs(batch, heads, length, dim, dtype, device)
    delta, b, omega = parameters(heads, dim, device)
    positions = None
    if given:
        shape = (length,) if given == "shared" else (batch, length)
        positions = torch.randint(-5, 9000, shape, device=device)
    upstream = [x.transpose(1, 2) for x in inputs(batch, length, heads, dim, dtype, device)]
    before = q.clone(), k.clone()
    leaves = [x.detach().requires_grad_() for x in (q, k, delta, b)]
    outputs = polar(*leaves, omega, positions)
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])

    precise = exact(q, k, delta, b)
    where = None if positions is None else positions.cpu()
    wanted = expected(*precise, omega.cpu(), where)
    for y, w in zip(outputs, wanted, strict=True):
        assert y.dtype == dtype
        check(y.detach(), w.detach())
    wanted = torch.autograd.grad(wanted, precise, [g.cpu().double() for g in upstream])
    for dx, w in zip(gradients[:2], wanted[:2], strict=True):
        assert dx.dtype == dtype
        check(dx, w)
    with torch.no_grad():
        noise = parameter_noise(precise[:2], upstream)
    for dx, w, deviation in zip(gradients[2:], wanted[2:], noise, strict=True):
        assert dx.dtype == torch.float32
        assert ((dx.cpu() - w).abs() <= 6 * (TURN + ANGLE) * deviation).all()


def parameter_noise(inputs, upstream):
    """Standard deviations of ddelta and db where every product |x| |dx'| is off by a random unit.

    ddelta = sum th dpsi over q and k, db = sum dpsi over q, |dpsi| at most |x| |dx'|.
    """
    angles, sizes = [], []
    for x, dy in zip(inputs, upstream, strict=True):
        (r, p), (d1, d2) = x.chunk(2, -1), dy.cpu().double().chunk(2, -1)
        angles.append(torch.atan2(p, r))
        sizes.append((r.square() + p.square()) * (d1.square() + d2.square()))
    ddelta = sum(angle.square() * size for angle, size in zip(angles, sizes, strict=True))
    return ddelta.sum((0, 2)).sqrt(), sizes[0].sum((0, 2)).sqrt()


def test_scores_are_the_direct_form(device):
    torch.manual_seed(1)
    q, k = inputs(2, 2, 5, 8, torch.float32, device)
    delta, b, omega = parameters(2, 8, device)
    y, z = polar(q, k, delta, b, omega)
    with torch.no_grad():
        wanted = oracles.cmha_scores(*exact(q, k, delta, b))
    actual = (y @ z.mT).cpu().double() / math.sqrt(8)
    size = math.sqrt(8) * q.abs().max().item() * k.abs().max().item()
    assert (actual - wanted).abs().max().item() < size * 2 * (TURN + 2 * ANGLE)


def test_delta_one_is_rope_bit_for_bit(device):
    q, k = inputs(1, 3, 70, 40, torch.float32, device)
    delta, b, omega = torch.ones(3, 20, device=device), torch.zeros(3, 20, device=device), None
    omega = frequencies(40, device)
    positions = torch.randint(0, 10**6, (1, 70), device=device)
    for actual, wanted in zip(
        polar(q, k, delta, b, omega, positions), rope(q, k, omega, positions), strict=True
    ):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-25, 1e15])
def test_zero_tiny_and_huge_vectors(value, device):
    """torch.atan2's gradient at zero is 0, so the angle counts as constant there."""
    q, k = torch.full((2, 1, 2, 3, 16), value, device=device)
    delta, b, omega = parameters(2, 16, device)
    leaves = [x.detach().requires_grad_() for x in (q, k, delta, b)]
    outputs = polar(*leaves, omega)
    gradients = torch.autograd.grad([y.sum() for y in outputs], leaves)
    precise = exact(q, k, delta, b)
    wanted = expected(*precise, omega.cpu())
    if value in (0.0, 1e-25, 1e15):
        for dx, w in zip(
            gradients[:2],
            torch.autograd.grad([y.sum() for y in wanted], precise[:2]),
            strict=True,
        ):
            check(dx, w)
    for y, w in zip(outputs, wanted, strict=True):
        assert (y.cpu().double() - w).abs().max() <= max(2e-30, 8e-6 * value)
    assert all(dx.isfinite().all() for dx in gradients)


def test_angles_of_the_axes(device):
    """Every quadrant, both axes and both sides of the branch cut have torch.atan2's angle."""
    grid = torch.tensor([-2.0, -1.0, -0.4142, -1e-3, -0.0, 0.0, 1e-3, 0.4142, 1.0, 2.0])
    r, p = (x.flatten() for x in torch.meshgrid(grid, grid, indexing="ij"))
    x = torch.stack((r, p), -1)[None, None].to(device)  # (1, 1, 100, 2)
    delta = torch.full((1, 1), 1.5, device=device)
    zero = torch.zeros(1, 1, device=device)
    y, _ = polar(x, x, delta, zero, torch.zeros(1, dtype=torch.float64, device=device))
    angle = 0.5 * torch.atan2(p, r).double()[:, None]
    check(y[0, 0], oracles.rotate(x[0, 0].cpu().double(), angle))


def test_far_positions(device):
    q, k = inputs(1, 1, 33, 16, torch.float32, device)
    delta, b, omega = parameters(1, 16, device)
    positions = torch.arange(10**6, 10**6 + 33, device=device)
    precise = exact(q, k, delta, b)
    for y, w in zip(
        polar(q, k, delta, b, omega, positions),
        expected(*precise, omega.cpu(), positions.cpu()),
        strict=True,
    ):
        check(y, w.detach())


def test_expanded_and_missing_gradients(device):
    q, k = inputs(2, 2, 9, 16, torch.float32, device)
    delta, b, omega = parameters(2, 16, device)
    leaves = [x.detach().requires_grad_() for x in (q, k, delta, b)]
    gradients = torch.autograd.grad(polar(*leaves, omega)[0].sum(), leaves)
    precise = exact(q, k, delta, b)
    wanted = expected(*precise, omega.cpu())[0].sum()
    wanted = torch.autograd.grad(wanted, precise, allow_unused=True)
    check(gradients[0], wanted[0])
    assert not gradients[1].any()
    check(gradients[2], wanted[2], 1e-5)
    check(gradients[3], wanted[3], 1e-5)


def test_same_bits_again_and_alone(device):
    q, k = inputs(3, 2, 90, 32, torch.float32, device)
    delta, b, omega = parameters(2, 32, device)
    results = []
    for rows in (slice(None), slice(None), slice(1, 2)):
        leaves = [x.detach().requires_grad_() for x in (q[rows], k[rows], delta, b)]
        y, z = polar(*leaves, omega)
        results.append((y, z, *torch.autograd.grad((y * z).sum(), leaves)))
    for first, again in zip(*results[:2], strict=True):
        assert torch.equal(first, again)
    for first, alone in zip(results[0][:4], results[2][:4], strict=True):
        assert torch.equal(first[1:2], alone)


def test_operator_contract(device):
    q, k = inputs(2, 3, 5, 16, torch.float32, device)
    delta, b, omega = parameters(3, 16, device)
    leaves = [x.detach().requires_grad_() for x in (q, k, delta, b)]
    fractions = turns_from_radians(omega)
    torch.library.opcheck(_forward_op, (*leaves, fractions, None))
    shallow = ("test_schema", "test_faketensor")
    positions = torch.arange(5, device=device)
    torch.library.opcheck(_forward_op, (*leaves, fractions, positions), test_utils=shallow)
    arguments = (k, q, q, k, delta, b, fractions, None)
    torch.library.opcheck(_backward_op, arguments, test_utils=shallow)


def test_compiles_whole(device):
    def function(x, delta, b, omega):
        y, z = polar(x * 1, x * 2, delta, b, omega)
        return y + z

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    delta, b, omega = parameters(3, 16, device)
    for length in (5, 150):
        leaves = [torch.randn(2, 3, length, 16, device=device), delta.clone(), b.clone()]
        leaves = [x.requires_grad_() for x in leaves]
        runs = [run(*leaves, omega) for run in (function, compiled)]
        assert torch.equal(*runs)
        gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in runs]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("one shape", {"k": torch.zeros(1, 1, 5, 16)}),
        ("one shape", {name: torch.zeros(1, 2, 5, 15) for name in ("q", "k")}),
        ("one shape", {name: torch.zeros(1, 2, 0, 16) for name in ("q", "k")}),
        ("delta", {"delta": torch.zeros(8)}),
        ("b must", {"b": torch.zeros(2, 8, dtype=torch.float64)}),
        ("frequencies", {"frequencies": torch.zeros(4, dtype=torch.float64)}),
        ("positions", {"positions": torch.zeros(4, dtype=torch.long)}),
        ("integers", {"positions": torch.zeros(5)}),
        ("dtype", {"k": torch.zeros(1, 2, 5, 16, dtype=torch.float16)}),
    ],
)
def test_bad_arguments(message, change, device):
    good = {name: torch.zeros(1, 2, 5, 16) for name in ("q", "k")}
    good |= {name: torch.zeros(2, 8) for name in ("delta", "b")}
    good["frequencies"] = torch.zeros(8, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        polar(**{name: value.to(device) for name, value in (good | change).items()})
