"""Phases and rotations."""

import math
from fractions import Fraction

import pytest
import torch

import oracles
from helpers import close, randn
from posenc import CARoPE
from posenc.phase import (
    PAIRINGS,
    Float32Parameters,
    inverse_frequencies,
    join,
    pairs,
    phase_dtype,
    position_phases,
    sines,
    turn,
    wrap,
)

PAIRED = pytest.mark.parametrize("pairing", PAIRINGS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dim", [2, 6, 64])
@pytest.mark.parametrize("base", [100.0, 10000.0, 500000.0])
def test_frequencies_are_those_of_the_oracle(dim: int, base: float) -> None:
    expected = torch.tensor(oracles.rope_frequencies(dim, base), dtype=torch.float64)
    close(inverse_frequencies(dim, base), expected, 1e-15)


def test_wrapped_phases_lie_in_one_turn_and_keep_their_direction() -> None:
    phase = 1000 * randn(500)
    wrapped = wrap(phase)
    assert wrapped.abs().max() <= math.pi + 1e-12
    close(wrapped.cos(), phase.cos(), 1e-12)
    close(wrapped.sin(), phase.sin(), 1e-12)


def test_wrapping_passes_the_gradient() -> None:
    phase = (1000 * randn(50)).requires_grad_()
    (gradient,) = torch.autograd.grad(wrap(phase).sum(), phase)
    assert torch.equal(gradient, torch.ones(50).double())


@pytest.mark.parametrize("start", [0, 1_000_000, 2**31])
def test_phases_are_exact_at_any_position(start: int) -> None:
    positions, frequencies = start + torch.arange(50), inverse_frequencies(64, 10000.0)
    phases = position_phases(positions, frequencies)
    assert phases.dtype == torch.float64
    turn_length = 2 * Fraction(math.pi) + Fraction(2.4492935982947064e-16)  # pi's next digits
    for row, position in zip(phases.tolist(), positions.tolist(), strict=True):
        for phase, frequency in zip(row, frequencies.tolist(), strict=True):
            exact = position * Fraction(frequency)
            off = float((Fraction(phase) - exact) / turn_length) % 1
            assert min(off, 1 - off) * 2 * math.pi < 1e-6


def test_positions_of_a_batch_get_a_head_dimension() -> None:
    positions = torch.randint(100, (3, 5))
    phases = position_phases(positions, inverse_frequencies(8, 100.0))
    assert phases.shape == (3, 1, 5, 4)
    close(phases[1, 0], position_phases(positions[1], inverse_frequencies(8, 100.0)), 0)


def test_sines_are_taken_in_float32_or_better() -> None:
    kinds = {dtype: phase_dtype(torch.zeros(1, dtype=dtype)) for dtype in (torch.half, torch.float)}
    assert set(kinds.values()) == {torch.float32}
    assert phase_dtype(torch.zeros(1, dtype=torch.bfloat16)) == torch.float32
    assert phase_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64


@PAIRED
def test_pairs_and_join_are_inverses(pairing: str) -> None:
    x = randn(2, 3, 5, 6)
    first, second = pairs(x, pairing)
    assert first.shape == second.shape == (2, 3, 5, 3)
    assert torch.equal(join(first, second, pairing), x)
    expected = x[..., :3] if pairing == "half" else x[..., ::2]
    assert torch.equal(first, expected)


@PAIRED
@pytest.mark.parametrize("width", [2, 4, 6])
def test_turn_is_the_oracle(pairing: str, width: int) -> None:
    x, angle = randn(2, 3, 5, 6), randn(5, width // 2)
    y = turn(x, *sines(angle, pairing=pairing), pairing)
    close(y, oracles.rotate(x, angle, pairing))
    assert torch.equal(
        turn(x, *sines(angle, pairing=pairing), pairing)[..., width:], x[..., width:]
    )


@PAIRED
def test_rotations_keep_norms_compose_and_start_at_the_identity(pairing: str) -> None:
    x, a, b = randn(2, 3, 5, 6), randn(5, 3), randn(5, 3)

    def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        return turn(x, *sines(angle, pairing=pairing), pairing)

    close(rotate(x, a).norm(dim=-1), x.norm(dim=-1))
    close(rotate(rotate(x, a), b), rotate(x, a + b))
    assert torch.equal(rotate(x, 0 * a), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    x, angle = randn(2, 3, 50, 64).to(dtype), 3 * randn(50, 32)
    y = turn(x, *sines(angle.float()))
    assert y.dtype == dtype
    exact = oracles.rotate(x.double(), angle)
    # half a unit in the last place of the result, and the fp32 sines' own error
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6
    assert ((y.double() - exact).abs() <= bound + torch.finfo(dtype).smallest_normal).all()


def test_turn_leaves_its_input_alone() -> None:
    x, angle = randn(2, 3, 5, 6).requires_grad_(), randn(5, 3)
    before = x.detach().clone()
    turn(x, *sines(angle)).sum().backward()
    assert torch.equal(x, before)
    assert x.grad is not None


def test_turn_differentiates_angles_and_features() -> None:
    x, angle = randn(1, 2, 3, 6).requires_grad_(), randn(2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: turn(x, *sines(a)), (x, angle))


@PAIRED
def test_angles_alone_may_be_mapped_over(pairing: str) -> None:
    x, angles = randn(2, 3, 5, 6), randn(4, 5, 3)

    def rotate(angle: torch.Tensor) -> torch.Tensor:
        return turn(x, *sines(angle, pairing=pairing), pairing)

    for mapped, angle in zip(torch.func.vmap(rotate)(angles), angles, strict=True):
        assert torch.equal(mapped, rotate(angle))


def test_float32_parameters_refuse_lower_precision_only() -> None:
    class Part(Float32Parameters):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1 + 2**-20]))

    model = torch.nn.Sequential(Part(), torch.nn.Linear(1, 1))
    for cast in (model.bfloat16, model.half, lambda: model.to(torch.bfloat16)):
        cast()
        assert model[0].weight.dtype == torch.float32
        assert model[0].weight.item() == 1 + 2**-20
        assert model[1].weight.dtype.itemsize == 2
    assert model.double()[0].weight.dtype == torch.float64
    assert model.float()[0].weight.dtype == torch.float32
    assert model.to("meta")[0].weight.is_meta


def test_float32_parameters_are_made_and_loaded_in_float32() -> None:
    part = CARoPE(8, 2)
    low = {name: value.bfloat16() for name, value in part.state_dict().items()}
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        made = CARoPE(8, 2)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(made.bias, part.bias)
    for assign in (False, True):
        made.load_state_dict(low, assign=assign)
        assert {value.dtype for value in made.parameters()} == {torch.float32}
