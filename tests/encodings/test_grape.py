"""GRAPE: rates, exclusive running phases, and their precision over a million tokens."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
import posenc
from helpers import HEAD_DIM, HEADS, WIDTH, attend, close, copy_shared, differs, perturb, randn
from posenc import GRAPE, RoPE
from posenc.rotations import BySteps

B, T, PAIRS = 2, 12, HEAD_DIM // 2
MILLION = 1_000_000


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def grape(**options: Any) -> GRAPE:
    return perturb(GRAPE(WIDTH, HEADS, **options)).double()


def rates_of(part: GRAPE, x: Tensor) -> Tensor:
    """(B, T), token by token."""
    z = (x @ part.weight + part.bias).squeeze(-1).tolist()
    rates = [[1 / (1 + math.exp(-value / 16)) for value in text] for text in z]
    return torch.tensor(rates, dtype=torch.float64)


def same_angle(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal modulo 2 pi."""
    turns = (actual - expected) / (2 * math.pi)
    assert ((turns - turns.round()).abs() * 2 * math.pi).max() <= tolerance


def test_phases_are_sums_over_the_tokens_before() -> None:
    part, x = grape(), 5 * randn(B, T, WIDTH)
    rates, theta = rates_of(part, x), part.log_frequencies.exp()
    actual = part.phases(x)
    assert actual.shape == (B, 1, T, PAIRS)
    assert actual.abs().max() <= math.pi + 1e-9
    for t in range(T):
        same_angle(actual[:, 0, t], rates[:, :t].sum(-1, keepdim=True) * theta)
    assert not actual[:, :, 0].any()


def test_a_token_does_not_turn_itself() -> None:
    part, x = grape(), randn(B, T, WIDTH)
    changed = torch.cat([x[:, :5], randn(B, 1, WIDTH), x[:, 6:]], 1)
    assert torch.equal(part.phases(changed)[:, :, :6], part.phases(x)[:, :, :6])
    differs(part.phases(changed)[:, :, 6], part.phases(x)[:, :, 6])


@pytest.mark.parametrize("base", [10000.0, 500.0])
@pytest.mark.parametrize("init", ["rope", "authors"])
def test_still_weights_are_rope_of_their_frequencies(init: str, base: float) -> None:
    part = GRAPE(WIDTH, HEADS, init=init, base=base).double()
    q, k = randn(2, B, HEADS, T, HEAD_DIM)
    x = randn(B, T, WIDTH)
    frequencies = part.log_frequencies.exp() * torch.sigmoid(part.bias / 16)
    plain = [base ** (-2 * i / HEAD_DIM) for i in range(PAIRS)]
    speed = 1.0 if init == "rope" else 0.39372
    assert frequencies.tolist() == pytest.approx([speed * w for w in plain], rel=3e-5)
    if init == "rope":
        assert frequencies.tolist() == pytest.approx(plain, rel=1e-6)  # of fp32 parameters
    with torch.no_grad():
        part.bias.add_(randn(1))
        frequencies = part.log_frequencies.exp() * torch.sigmoid(part.bias / 16)
    for ours, z in zip(part.rotate(q, k, x=x), (q, k), strict=True):
        expected = oracles.rope_rotate(z, torch.arange(T), frequencies=frequencies.tolist())
        close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_start_is_rope(dtype: torch.dtype) -> None:
    ours, rope = (posenc.attention(name, WIDTH, HEADS).to(dtype) for name in ("grape", "rope"))
    assert isinstance(rope.encoding, RoPE)
    copy_shared(ours, rope)
    x = randn(B, 23, WIDTH, dtype=dtype)
    close(ours(x), rope(x), 1e-5)  # of fp32 parameters
    rope = posenc.attention("rope", WIDTH, HEADS, num_kv_heads=2).to(dtype)
    ours = posenc.attention("grape", WIDTH, HEADS, num_kv_heads=2).to(dtype)
    copy_shared(ours, rope)
    close(ours(x), rope(x), 1e-5)


def test_start_is_the_authors() -> None:
    part = GRAPE(768, 12, init="authors")
    assert part.bias.item() == pytest.approx(-6.90726, abs=5e-6)
    assert torch.sigmoid(part.bias / 16).item() == pytest.approx(0.39372, abs=5e-6)
    assert sum(parameter.numel() for parameter in part.parameters()) == 801


def test_phase_differences_forget_what_came_before() -> None:
    part, x = grape(), randn(B, T, WIDTH)
    n, m = 4, 10
    difference = part.phases(x)[:, :, m] - part.phases(x)[:, :, n]
    other = torch.cat([randn(B, n, WIDTH), x[:, n:]], 1)
    same_angle(part.phases(other)[:, :, m] - part.phases(other)[:, :, n], difference)
    longer = part.phases(torch.cat([randn(B, 7, WIDTH), x], 1))
    same_angle(longer[:, :, m + 7] - longer[:, :, n + 7], difference)


def test_padding_stops_the_phase_and_gaps_do_not_move_it() -> None:
    part, x = grape(), randn(B, T, WIDTH)
    positions = torch.arange(T).expand(B, T).clone()
    positions[0] -= 4
    padded = part.phases(x, positions)
    assert not padded[0, :, :5].any()
    same_angle(padded[0, :, 4:], part.phases(x[:1, 4:])[0])
    same_angle(padded[1], part.phases(x[1:])[0])
    assert torch.equal(part.phases(x, 3 * torch.arange(T)), part.phases(x))


def test_gradients_are_those_of_finite_differences() -> None:
    part = grape()
    q, k, x = randn(1, HEADS, 4, HEAD_DIM), randn(1, HEADS, 4, HEAD_DIM), randn(1, 4, WIDTH)

    def run(q: Tensor, k: Tensor, x: Tensor, *_: Tensor) -> Tensor:
        turned_q, turned_k = part.rotate(q, k, x=x)
        return turned_q @ turned_k.mT

    inputs = [value.requires_grad_() for value in (q, k, x)]
    assert torch.autograd.gradcheck(run, (*inputs, *part.parameters()), fast_mode=True)


@pytest.mark.parametrize("rates", ["random", "constant"])
def test_phase_stays_exact_over_a_million_tokens(rates: str) -> None:
    steps = torch.full((1, 1, MILLION, 1), 0.39372, dtype=torch.float64)
    if rates == "random":
        steps = 0.05 + 0.9 * torch.rand(1, 1, MILLION, 1, dtype=torch.float64)
    theta = torch.tensor([2.5, 1.0, 1e-4], dtype=torch.float64)
    sums = oracles.exact_running_sums([0.0, *steps.flatten()[:-1].tolist()])
    exact = torch.tensor(sums, dtype=torch.float64)[:, None] * theta
    same_angle(BySteps(steps, theta, inclusive=False).phases()[0, 0], exact, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_stays_exact_after_a_million_tokens(dtype: torch.dtype) -> None:
    """The last tokens of a long text, decoded in `dtype` chunks, against the exact sums."""
    late, chunk, head_dim = 64, 250_000, 4
    part = perturb(GRAPE(4, 1, init="authors"))
    x = 3 * randn(1, MILLION, 4, dtype=dtype)
    q, k = (2 * randn(1, 1, 1, head_dim, dtype=dtype) for _ in range(2))
    v = randn(1, 1, late, head_dim, dtype=dtype)
    cache = posenc.Cache(1, MILLION, part.streams())
    turned: list[Tensor] = []
    with torch.no_grad():
        for now in x.split(chunk, dim=1):
            tokens = (z.expand(1, 1, chunk, head_dim) for z in (q, k))
            turned = [z[:, :, -late:] for z in part.rotate(*tokens, x=now, state=cache)]
            cache.advance(chunk)
        y = attend(*turned, v)
        rates = torch.sigmoid((x.double() @ part.weight.double() + part.bias.double()) / 16)
        sums = oracles.exact_running_sums([0.0, *rates[0, :-1, 0].tolist()])
        sums = torch.tensor(sums[-late:], dtype=torch.float64)
        phase = (sums[:, None] * part.log_frequencies.double().exp())[None, None]
        tokens = [z.double().expand(1, 1, late, head_dim) for z in (q, k)]
        expected = [oracles.rotate(z, phase) for z in tokens]
        exact = oracles.causal_attention(oracles.dot_scores(*expected), v.double())
        if dtype == torch.float32:
            close(y, exact, 1e-5)
            return
        rounded = [z.to(dtype).double() for z in expected]
        plain = oracles.causal_attention(oracles.dot_scores(*rounded), v.double())
        band = torch.finfo(dtype).eps / 2 * exact.abs().max()
        assert (y - exact).abs().max() <= 2 * ((plain - exact).abs().max() + band)


@pytest.mark.parametrize("autocast", [False, True])
def test_phases_ignore_autocast_and_low_precision_inputs(autocast: bool) -> None:
    part, x = perturb(GRAPE(WIDTH, HEADS)), randn(B, 600, WIDTH, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        phase = part.phases(x)
    exact = part.double().phases(x.double())
    same_angle(phase, exact, 1e-9)


def test_every_argument_changes_the_rotation() -> None:
    changes: dict[str, Any] = {"base": 500.0, "init": "authors", "head_dim": 12}
    sizes = {"embed_dim", "num_heads"}
    assert set(inspect.signature(GRAPE).parameters) == changes.keys() | sizes
    x, plain = randn(B, T, WIDTH), GRAPE(WIDTH, HEADS).double()
    for name, value in changes.items():
        part = GRAPE(WIDTH, HEADS, **{name: value}).double()
        differs(part.phases(x)[..., :PAIRS], plain.phases(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((28, 4), "even head dim .* got 7"),
        ((25, 4), "multiple of num_heads"),
        ((24, 4, {"init": "author"}), "Did you mean 'authors'"),
        ((24, 4, {"base": 1.0}), "base must be .*got 1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    sizes, options = arguments[:2], arguments[2] if len(arguments) > 2 else {}
    with pytest.raises(ValueError, match=message) as refusal:
        GRAPE(*sizes, **options)
    assert "\n" not in str(refusal.value)


def test_rotation_without_its_tokens_is_refused() -> None:
    q, k = randn(2, B, HEADS, T, HEAD_DIM)
    for x in (None, randn(B, T, WIDTH + 1), randn(B, T - 1, WIDTH), randn(1, T, WIDTH)):
        with pytest.raises(ValueError, match="needs x of shape"):
            grape().rotate(q, k, x=x)
