"""CMHA's polar rotation."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
import posenc
from helpers import HEAD_DIM, HEADS, WIDTH, close, differs, perturb, randn, scores_of
from posenc import Polar

B, T, PAIRS = 2, 9, HEAD_DIM // 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def polar(**options: Any) -> Polar:
    return perturb(Polar(HEADS, HEAD_DIM, **options)).double()


def scores(part: Polar, q: Tensor, k: Tensor, positions: Tensor | None = None) -> Tensor:
    turned_q, turned_k = part.rotate(q, k, positions)
    return turned_q @ turned_k.mT


def queries_keys() -> Tensor:
    return randn(2, B, HEADS, T, HEAD_DIM)


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_scores_are_the_direct_cosine_form(base: float) -> None:
    part, (q, k) = polar(base=base), queries_keys()
    for positions in (None, torch.arange(T) + 40, torch.randint(90, (B, T))):
        expected = oracles.cmha_scores(q, k, part.delta, part.b, positions, positions, 1.0, base)
        close(scores(part, q, k, positions), expected)


def test_norms_are_kept() -> None:
    part, (q, k) = polar(), queries_keys()
    for before, after in zip((q, k), part.rotate(q, k), strict=True):
        close(after.norm(dim=-1), before.norm(dim=-1))


def test_scores_ignore_a_shift_of_all_positions() -> None:
    part, (q, k) = polar(), queries_keys()
    close(scores(part, q, k, torch.arange(T) + 17), scores(part, q, k))


def test_scaling_the_query_scales_the_scores() -> None:
    part, (q, k) = polar(), queries_keys()
    close(scores(part, 3 * q, k), 3 * scores(part, q, k))


def test_a_whole_turn_of_b_changes_nothing() -> None:
    part, (q, k) = polar(), queries_keys()
    before = scores(part, q, k)
    with torch.no_grad():
        part.b += 2 * math.pi
    close(scores(part, q, k), before)
    with torch.no_grad():
        part.b += 1
    differs(scores(part, q, k), before)


def test_without_delta_and_b_magnitudes_and_distance_are_all() -> None:
    part, (q, k) = polar(), queries_keys()
    with torch.no_grad():
        part.delta.zero_()
        part.b.zero_()
    turned_q, turned_k = (oracles.rotate(z, randn(T, PAIRS)) for z in (q, k))
    close(scores(part, turned_q, turned_k), scores(part, q, k))


def test_delta_and_b_of_a_head_touch_that_head_alone() -> None:
    part, (q, k) = polar(), queries_keys()
    before = scores(part, q, k)
    for parameter in (part.delta, part.b):
        with torch.no_grad():
            parameter[2] += 0.5
        after = scores(part, q, k)
        assert torch.equal(after[:, [0, 1, 3]], before[:, [0, 1, 3]])
        differs(after[:, 2], before[:, 2])
        before = after


def test_b_turns_the_query_alone() -> None:
    part, (q, k) = polar(), queries_keys()
    before = part.rotate(q, k)
    with torch.no_grad():
        part.b += 1
    after = part.rotate(q, k)
    differs(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_angle_difference_is_not_wrapped() -> None:
    part = Polar(1, 2).double()
    with torch.no_grad():
        part.delta.fill_(0.5)
    q, k = (torch.tensor([math.cos(a), math.sin(a)]).double() for a in (3.0, -3.0))
    still = torch.zeros(1, dtype=torch.long)
    score = scores(part, q[None, None, None], k[None, None, None], still)
    # half of 6 rad; wrapped it would be half of 6 - 2 pi
    assert score.item() == pytest.approx(math.cos(3.0), abs=1e-6)


def test_zero_vectors_have_finite_gradients() -> None:
    part, (q, k) = polar(), queries_keys()
    q[:, :, 2], k[:, :, 4] = 0, 0
    q, k = q.requires_grad_(), k.requires_grad_()
    s = scores(part, q, k)
    assert not s[:, :, 2].any()
    gradients = torch.autograd.grad(s.square().sum(), (q, k, part.delta, part.b))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("tiny", [1e-30, 1e-45])
def test_denormal_vectors_have_finite_gradients(tiny: float) -> None:
    part = polar().float()
    q, k = (tiny * queries_keys()).float().requires_grad_(), queries_keys()[0].float()
    gradients = torch.autograd.grad(scores(part, q, k).sum(), (q, part.delta, part.b))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_are_those_of_finite_differences() -> None:
    part, (q, k) = polar(), queries_keys()
    inputs = (q.requires_grad_(), k.requires_grad_(), *part.parameters())
    assert torch.autograd.gradcheck(lambda q, k, *_: scores(part, q, k), inputs, fast_mode=True)


def test_starts_at_rope_or_as_the_authors() -> None:
    rope = posenc.attention("cmha", 512, 4)
    assert (rope.encoding.delta == 1).all()
    assert not rope.encoding.b.any()
    authors = posenc.attention("cmha", 512, 4, init="authors")
    assert authors.encoding.delta.std().item() == pytest.approx((128 / 2) ** -0.5, rel=0.2)
    assert abs(authors.encoding.delta.mean().item()) < 0.03
    assert not authors.encoding.b.any()
    # Xavier-uniform, matrix by matrix
    bound = math.sqrt(6 / (512 + 512))
    for weight in (*authors.c_attn.weight.chunk(3), authors.c_proj.weight):
        assert bound * 0.99 < weight.abs().max() <= bound
    assert rope.c_attn.weight.abs().max() <= 512**-0.5


def test_authors_scale_is_one() -> None:
    part, (q, k) = polar(init="authors"), queries_keys()
    assert scores_of(part, q, k, torch.arange(T)).scale == 1.0


def test_every_argument_changes_the_rotation() -> None:
    changes = {"base": 100.0, "init": "authors"}
    # "shared" and "offset" start where others do, and are tested in test_shared_parameters.py
    elsewhere = {"num_heads", "num_kv_heads", "head_dim", "shared", "offset"}
    assert set(inspect.signature(Polar).parameters) == changes.keys() | elsewhere
    q, k = queries_keys()
    plain = Polar(HEADS, HEAD_DIM).double().rotate(q, k)[0]
    for name, value in changes.items():
        differs(Polar(HEADS, HEAD_DIM, **{name: value}).double().rotate(q, k)[0], plain)
    assert Polar(2, 10).delta.shape == Polar(2, 10).b.shape == (2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 7}, "even head dim .* got 7"),
        ({"init": "author"}, "Did you mean 'authors'"),
        ({"base": -1.0}, "base must be .*got -1.0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Polar(**({"num_heads": 4, "head_dim": 6} | options))


def test_odd_width_is_refused_by_the_zoo() -> None:
    for name in ("rope", "carope", "cmha", "moh"):
        with pytest.raises(ValueError, match="even head dim"):
            posenc.attention(name, 28, 4)
    assert WIDTH % 2 == 0
