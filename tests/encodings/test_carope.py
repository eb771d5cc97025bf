"""CARoPE: rates, running phases, and their precision over a million tokens."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
import posenc
from helpers import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    attend,
    build,
    close,
    copy_shared,
    differs,
    perturb,
    randn,
)
from posenc import CARoPE
from posenc.rates import log_rates
from posenc.rotations import running_phase

B, T, PAIRS = 2, 12, HEAD_DIM // 2
MILLION = 1_000_000


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def carope(**options: Any) -> CARoPE:
    return perturb(CARoPE(WIDTH, HEADS, **options)).double()


def exact_sums(steps: Tensor) -> Tensor:
    return torch.tensor(oracles.exact_running_sums(steps.tolist()), dtype=torch.float64)


def same_angle(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal modulo 2 pi."""
    turns = (actual - expected) / (2 * math.pi)
    assert ((turns - turns.round()).abs() * 2 * math.pi).max() <= tolerance


@pytest.mark.parametrize("init", ["rope", "paper"])
@pytest.mark.parametrize("first_power", [0, 1])
def test_phases_are_those_of_the_oracle(init: str, first_power: int) -> None:
    part, x = carope(init=init, first_power=first_power), randn(B, T, WIDTH)
    rates = oracles.carope_rates(x, part.weight, part.bias)
    expected = oracles.carope_phases(oracles.carope_steps(rates, HEAD_DIM, first_power))
    actual = part.phases(x)
    assert actual.shape == (B, HEADS, T, PAIRS)
    assert actual.abs().max() <= math.pi + 1e-9
    same_angle(actual, expected)
    q, k = randn(2, B, HEADS, T, HEAD_DIM)
    for ours, theirs in zip(
        part.rotate(q, k, x=x), oracles.carope_rotate(q, k, expected), strict=True
    ):
        close(ours, theirs)


def test_rates_lie_between_zero_and_one_and_survive_extremes() -> None:
    z = torch.tensor([-1e4, -800.0, -40.0, -1.0, 0.0, 1.0, 25.0, 35.0, 800.0, 1e4]).double()
    weight = torch.ones(1, 1).double().requires_grad_()
    log_f = log_rates(z[None, :, None], weight, None)
    assert log_f.isfinite().all()
    assert (log_f <= 0).all()
    assert (log_f[..., 2:] < 0).all()
    expected = oracles.carope_rates(z[None, 2:8, None], weight.detach())
    close(log_f[..., 2:8].exp(), expected, 1e-13)
    phase = running_phase(log_f, 32)
    (gradient,) = torch.autograd.grad(phase.sum(), weight)
    assert gradient.isfinite().all()


def test_phases_only_grow_and_the_first_band_counts_tokens() -> None:
    part, x = carope(), randn(B, T, WIDTH)
    steps = part.phases(x).diff(dim=2, prepend=torch.zeros(B, HEADS, 1, PAIRS).double())
    steps = steps % (2 * math.pi)
    assert (steps > 0).all()
    assert (steps <= 1 + 1e-9).all()
    same_angle(part.phases(x)[..., 0], torch.arange(1.0, T + 1).double().expand(B, HEADS, T))
    # the powers of one rate
    close(steps[..., 2], steps[..., 1] ** 2, 1e-9)


def test_phases_read_the_present_and_the_past_alone() -> None:
    part, x = carope(), randn(B, T, WIDTH)
    changed = torch.cat([x[:, :6], randn(B, T - 6, WIDTH)], 1)
    assert torch.equal(part.phases(x)[:, :, :6], part.phases(changed)[:, :, :6])
    # the sum includes the token itself
    present = torch.cat([x[:, :5], randn(B, 1, WIDTH), x[:, 6:]], 1)
    differs(part.phases(present)[:, :, 5, 1:], part.phases(x)[:, :, 5, 1:])


def test_phase_differences_forget_what_came_before() -> None:
    part, x = carope(), randn(B, T, WIDTH)
    n, m = 4, 10
    difference = part.phases(x)[:, :, m] - part.phases(x)[:, :, n]
    other = torch.cat([randn(B, n + 1, WIDTH), x[:, n + 1 :]], 1)
    same_angle(part.phases(other)[:, :, m] - part.phases(other)[:, :, n], difference)
    longer = part.phases(torch.cat([randn(B, 7, WIDTH), x], 1))
    same_angle(longer[:, :, m + 7] - longer[:, :, n + 7], difference)


def test_phase_differences_ignore_the_order_between() -> None:
    part, x = carope(), randn(B, T, WIDTH)
    n, m = 3, 10
    order = torch.cat([torch.arange(n + 1), n + 1 + torch.randperm(m - n - 1), torch.arange(m, T)])
    shuffled = part.phases(x[:, order])
    same_angle(
        shuffled[:, :, m] - shuffled[:, :, n], part.phases(x)[:, :, m] - part.phases(x)[:, :, n]
    )


def test_equal_columns_give_equal_phases() -> None:
    part = carope()
    with torch.no_grad():
        part.weight[:, 1], part.bias[1] = part.weight[:, 0], part.bias[0]
    first, second, third, _ = part.phases(randn(B, T, WIDTH)).unbind(1)
    close(first, second, 1e-14)
    differs(first, third)


def test_chunks_carry_the_phase() -> None:
    log_f = -torch.rand(B, HEADS, T, dtype=torch.float64)
    whole, carry, parts = running_phase(log_f, PAIRS), None, []
    for part in log_f.split(5, dim=-1):
        parts.append(running_phase(part, PAIRS, carry=carry))
        carry = parts[-1][:, :, -1:]
    same_angle(torch.cat(parts, 2), whole)


def test_padding_stops_the_phase_and_gaps_do_not_move_it() -> None:
    part, x = carope(), randn(B, T, WIDTH)
    positions = torch.arange(T).expand(B, T).clone()
    positions[0] -= 4
    padded = part.phases(x, positions)
    assert not padded[0, :, :4].any()
    same_angle(padded[0, :, 4:], part.phases(x[:1, 4:])[0])
    same_angle(padded[1], part.phases(x[1:])[0])
    assert torch.equal(part.phases(x, 3 * torch.arange(T)), part.phases(x))


@pytest.mark.parametrize("base", [10000.0, 500.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [2, 4, 6, 64, 128])
def test_start_is_rope(head_dim: int, base: float) -> None:
    module = CARoPE(2 * head_dim, 2, base=base)
    assert not module.weight.any()
    log_f = log_rates(randn(1, 3, 2 * head_dim), module.weight, module.bias)
    # the bias is a fp32 number
    close(log_f, torch.full_like(log_f, -2 / head_dim * math.log(base)), 1e-6)


@pytest.mark.parametrize(("dim", "bias"), [(64, -0.92666), (96, -1.44577), (128, -1.78735)])
def test_start_has_the_published_bias(dim: int, bias: float) -> None:
    module = CARoPE(2 * dim, 2)
    assert module.bias.tolist() == pytest.approx([bias] * 2, abs=5e-6)
    assert module.bias.tolist() == pytest.approx([oracles.carope_bias(dim)] * 2, rel=1e-6)


def test_paper_start_has_no_bias_and_small_weights() -> None:
    module = CARoPE(768, 12, init="paper")
    assert module.bias is None
    assert module.weight.shape == (768, 12)
    assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
    f = log_rates(torch.zeros(1, 1, 768), module.weight, None).exp()
    assert f[0, 0, 0].item() == pytest.approx(0.59062, abs=5e-6)


def test_rope_start_is_no_dead_point() -> None:
    module, x = posenc.attention("carope", WIDTH, HEADS), randn(B, T, WIDTH, dtype=torch.float32)
    module(x).square().sum().backward()
    assert module.encoding.weight.grad.abs().min() > 0
    assert module.encoding.bias.grad.abs().min() > 0


def test_first_step_has_no_gradient() -> None:
    """It shifts all phases alike, which no score can see."""
    q, k, v = randn(3, B, HEADS, T, HEAD_DIM)
    log_f = (-torch.rand(B, HEADS, T, dtype=torch.float64)).requires_grad_()
    phase = running_phase(log_f, PAIRS)
    y = attend(oracles.rotate(q, phase), oracles.rotate(k, phase), v)
    (gradient,) = torch.autograd.grad((y * randn(*y.shape)).sum(), log_f)
    close(gradient[..., 0], torch.zeros(B, HEADS).double(), 1e-12)
    assert (gradient[..., 1:].abs() > 1e-9).all()


def test_first_token_has_no_gradient_through_the_phase() -> None:
    part, x = carope(), randn(B, T, WIDTH).requires_grad_()
    q, k, v = randn(3, B, HEADS, T, HEAD_DIM)
    y = attend(*part.rotate(q, k, x=x), v)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    close(gradient[:, 0], torch.zeros(B, WIDTH).double(), 1e-12)
    assert gradient[:, 1:].abs().amax(-1).min() > 1e-6


def test_gradients_are_those_of_finite_differences() -> None:
    part = carope()
    q, k, x = randn(1, HEADS, 4, HEAD_DIM), randn(1, HEADS, 4, HEAD_DIM), randn(1, 4, WIDTH)

    def run(q: Tensor, k: Tensor, x: Tensor, *_: Tensor) -> Tensor:
        turned_q, turned_k = part.rotate(q, k, x=x)
        return turned_q @ turned_k.mT

    inputs = [value.requires_grad_() for value in (q, k, x)]
    assert torch.autograd.gradcheck(run, (*inputs, *part.parameters()), fast_mode=True)


@pytest.mark.parametrize("rates", ["random", "constant"])
def test_phase_stays_exact_over_a_million_tokens(rates: str) -> None:
    log_f = torch.full((1, 1, MILLION), math.log(0.7499), dtype=torch.float64)
    if rates == "random":
        log_f = (0.4 + 0.55 * torch.rand(1, 1, MILLION, dtype=torch.float64)).log()
    exact = exact_sums(log_f[0, 0].exp())
    same_angle(running_phase(log_f, 2)[0, 0, :, 1], exact, 1e-4)
    # chunks, the phase carried from one to the next modulo 2 pi
    carry, parts = None, []
    for part in log_f.split(100_000, dim=-1):
        parts.append(running_phase(part, 2, carry=carry))
        carry = parts[-1][:, :, -1:]
    chunked = torch.cat(parts, 2)[0, 0]
    same_angle(chunked[:, 1], exact, 1e-4)
    same_angle(chunked[:, 0], torch.arange(1.0, MILLION + 1).double(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_stays_exact_after_a_million_tokens(dtype: torch.dtype) -> None:
    """The last tokens of a long text, in `dtype` behind a running phase, against the exact sums."""
    late, head_dim = 64, 4
    part = perturb(CARoPE(4, 1, base=2.0))  # rates about 0.7
    x = randn(1, MILLION, 4, dtype=dtype)
    q, k = (2 * randn(1, 1, 1, head_dim, dtype=dtype) for _ in range(2))
    q, k = (z.expand(1, 1, MILLION, head_dim) for z in (q, k))
    v = randn(1, 1, late, head_dim, dtype=dtype)
    with torch.no_grad():
        turned = [z[:, :, -late:] for z in part.rotate(q, k, x=x)]
        y = attend(*turned, v)
        rates = oracles.carope_rates(x.double(), part.weight.double(), part.bias.double())
        exact = exact_sums(rates[0, 0])[-late:]
        count = torch.arange(MILLION - late + 1, MILLION + 1)
        phase = torch.stack([count.double(), exact], -1)[None, None]
        expected = [oracles.rotate(z[:, :, -late:].double(), phase) for z in (q, k)]
        exact_y = oracles.causal_attention(oracles.dot_scores(*expected), v.double())
        if dtype == torch.float32:
            close(y, exact_y, 1e-4)
        else:
            rounded = [z.to(dtype).double() for z in expected]
            plain = oracles.causal_attention(oracles.dot_scores(*rounded), v.double())
            band = torch.finfo(dtype).eps / 2 * exact_y.abs().max()
            assert (y - exact_y).abs().max() <= 2 * ((plain - exact_y).abs().max() + band)


@pytest.mark.parametrize("autocast", [False, True])
def test_phases_ignore_autocast_and_low_precision_inputs(autocast: bool) -> None:
    part, x = CARoPE(WIDTH, HEADS), randn(B, 600, WIDTH, dtype=torch.bfloat16)
    perturb(part)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        phase = part.phases(x)
    rates = oracles.carope_rates(x.double(), part.weight.double(), part.bias.double())
    exact = oracles.carope_steps(rates, HEAD_DIM).cumsum(2)
    same_angle(phase.double(), exact, 1e-4)


def test_every_argument_changes_the_rotation() -> None:
    changes: dict[str, Any] = {"base": 500.0, "init": "paper", "first_power": 1, "head_dim": 12}
    # "token" differs inside a model, where it is tested; "shared" starts as one rate a head does
    # (test_shared_parameters.py); the sizes change shapes
    elsewhere = {"source", "shared", "embed_dim", "num_heads", "num_kv_heads"}
    assert set(inspect.signature(CARoPE).parameters) == changes.keys() | elsewhere
    x, plain = randn(B, T, WIDTH), CARoPE(WIDTH, HEADS).double()
    for name, value in changes.items():
        part = CARoPE(WIDTH, HEADS, **{name: value}).double()
        differs(part.phases(x)[..., :PAIRS], plain.phases(x))


def test_head_dim_may_differ_from_the_share_of_a_head() -> None:
    part, (q, k) = carope(head_dim=10), randn(2, B, HEADS, T, 10)
    x = randn(B, T, WIDTH)
    rates = oracles.carope_rates(x, part.weight, part.bias)
    expected = oracles.carope_phases(oracles.carope_steps(rates, 10))
    close(part.rotate(q, k, x=x)[0], oracles.carope_rotate(q, k, expected)[0])


def test_source_changes_nothing_in_a_lone_module() -> None:
    layer, token = build("carope"), build("carope", source="token")
    copy_shared(layer, token)
    x = randn(B, T, WIDTH)
    assert torch.equal(layer(x), token(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((28, 4), "even head dim .* got 7"),
        ((25, 4), "multiple of num_heads"),
        ((24, 4, {"init": "papers"}), "Did you mean 'paper'"),
        ((24, 4, {"source": "tokens"}), "Did you mean 'token'"),
        ((24, 4, {"first_power": 2}), "first_power must be 0 or 1; got 2"),
        ((24, 4, {"base": 1.0}), "base must be .*got 1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    sizes, options = arguments[:2], arguments[2] if len(arguments) > 2 else {}
    with pytest.raises(ValueError, match=message):
        CARoPE(*sizes, **options)


def test_rotation_without_its_tokens_is_refused() -> None:
    q, k = randn(2, B, HEADS, T, HEAD_DIM)
    for x in (None, randn(B, T, WIDTH + 1), randn(B, T - 1, WIDTH), randn(1, T, WIDTH)):
        with pytest.raises(ValueError, match="needs x of shape"):
            carope().rotate(q, k, x=x)
    with pytest.raises(ValueError, match="same T"):
        carope().rotate(q[:, :, :1], k, x=randn(B, T, WIDTH))
