"""PoPE: magnitudes and angles, twice the width in every back end, and what it does not change."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import posenc
from helpers import HEADS, WIDTH, build, close, differs, error, oracle_layer, perturb, randn
from posenc import PoPE, RoPE
from posenc.backends import blockwise

D, T, S, FAR = 12, 9, 14, 1_000_000


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made() -> PoPE:
    return perturb(PoPE(HEADS, D)).double()


def scores(pope: PoPE, q: Tensor, k: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
    turned_q, turned_k = pope.rotate(q, k, positions, key_positions=keys)
    assert turned_q.shape[-1] == turned_k.shape[-1] == 2 * D
    return turned_q @ turned_k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / math.sqrt(D)


def test_turned_vectors_are_the_formula_s() -> None:
    pope, q, k = made(), randn(2, HEADS, T, D), randn(2, 2, S, D)
    positions, keys = torch.arange(T) + 3, torch.randint(50, (2, S))
    theta = torch.tensor([10000 ** (-c / D) for c in range(D)], dtype=torch.float64)
    angle = keys[:, None, None, :, None] - positions[:, None, None]  # (2, 1, T, S, 1)
    angle = angle * theta + pope.delta[:, None, None]
    of_heads = F.softplus(k, threshold=40).repeat_interleave(2, 1).unsqueeze(-3)
    products = F.softplus(q, threshold=40).unsqueeze(-2) * of_heads
    expected = (products * angle.cos()).sum(-1) / math.sqrt(D)
    close(scores(pope, q, k, positions, keys), expected)


def test_a_turn_of_delta_changes_nothing_and_no_clamp_stops_its_gradient() -> None:
    pope, q, k, where = made(), randn(2, HEADS, T, D), randn(2, HEADS, T, D), torch.arange(T)
    before = scores(pope, q, k, where, where)
    with torch.no_grad():
        pope.delta += 2 * math.pi
    close(scores(pope, q, k, where, where), before)
    (gradient,) = torch.autograd.grad(scores(pope, q, k, where, where).square().sum(), pope.delta)
    assert (gradient != 0).all()
    assert not PoPE(HEADS, D).delta.any()


@pytest.mark.parametrize("shift", [17, FAR])
def test_shifts_change_no_score(shift: int) -> None:
    pope, q, k, where = made(), randn(2, HEADS, T, D), randn(2, HEADS, T, D), torch.arange(T)
    expected = scores(pope, q, k, where, where)
    close(scores(pope, q, k, where + shift, where + shift), expected, 1e-9)


def test_zero_vectors_score_more_than_zero() -> None:
    zero = torch.zeros(1, HEADS, 1, D).double()
    where = torch.zeros(1).long()
    same = scores(PoPE(HEADS, D).double(), zero, zero, where, where)
    close(same, torch.full_like(same, math.sqrt(D) * math.log(2) ** 2))


def test_scale_and_width_are_what_flex_attention_is_told() -> None:
    pope, q, k = made(), randn(2, HEADS, T, D), randn(2, 2, T, D)
    where = torch.arange(T)
    turned_q, turned_k = pope.rotate(q, k, where)
    modify = pope.score_mod(turned_q, turned_k, where)
    divided = turned_q @ turned_k.repeat_interleave(2, 1).mT / math.sqrt(2 * D)
    index = torch.zeros((), dtype=torch.long)
    ours = modify(divided, index, index, index, index)
    close(ours, scores(pope, q, k, where, where))
    assert pope.score_bias(where, where) is None


def test_odd_head_dims_turn_too() -> None:
    module, x = build("pope", head_dim=7), randn(2, T, 7 * HEADS)
    close(module(x), oracle_layer(module, x)[0])


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 40}, {"num_kv_heads": 2}])
@pytest.mark.parametrize("dropped", ["", "padding", "documents"])
def test_back_ends_agree_past_blocks(options: dict[str, object], dropped: str) -> None:
    """Also where blocks are made anew in the backward pass, and heads are dropped."""
    length, call = blockwise.ROWS * 2 + 33, {}
    if dropped == "padding":
        call["mask"] = torch.arange(length).expand(2, length) >= torch.tensor([[0], [70]])
    if dropped == "documents":
        call["segments"] = posenc.segments([100, length - 100]).expand(2, length)
    real = call.get("mask", torch.ones(2, length, dtype=torch.bool))
    x = randn(2, length, WIDTH)
    results = []
    for impl in ("auto", "sdpa", "reference"):
        torch.manual_seed(1)
        module, given = build("pope", impl=impl, **options), x.clone().requires_grad_()
        y = module(given, **call)[real]
        loss = y.square().sum()
        results.append((y, *torch.autograd.grad(loss, [given, *module.parameters()])))
    for ours in results[:2]:
        for one, other in zip(ours, results[2], strict=True):
            close(one, other)


def test_recomputed_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = build("pope"), randn(1, 300, WIDTH).requires_grad_()
    results = []
    for least in (1, 1000):
        monkeypatch.setattr(blockwise, "RECOMPUTE_FROM", least)
        results.append(torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()]))
    for one, other in zip(*results, strict=True):
        close(one, other, 1e-12)


def test_routers_drop_heads_of_wide_keys() -> None:
    outputs = []
    for impl in ("auto", "reference"):
        torch.manual_seed(1)
        options = {"encoding": "pope", "shared": 1, "top_k": 2, "impl": impl}
        module = build("moh", heads=8, head_dim=64, noise=0.02, dtype=torch.float32, **options)
        x = randn(1, 600, 512, dtype=torch.float32).requires_grad_()
        y = module(x)
        outputs.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for ours, theirs in zip(*outputs, strict=True):
        close(ours, theirs, 1e-5)


def test_cached_keys_are_twice_as_wide() -> None:
    module = build("pope", num_kv_heads=2)
    cache = module.make_cache(2, 5)
    assert cache._rows["k"].shape == (2, 2, 5, 2 * cache._rows["v"].shape[-1])
    plain = build("rope", num_kv_heads=2)
    with pytest.raises(ValueError, match="of another module"):
        plain(randn(2, 1, WIDTH), cache=cache)


def test_far_positions_in_bfloat16_lose_nothing() -> None:
    pope, positions = perturb(PoPE(HEADS, 16)), FAR + torch.arange(64)
    q, k = randn(2, 1, HEADS, 64, 16, dtype=torch.bfloat16)
    ours = pope.to(torch.bfloat16).rotate(q, k, positions)
    exact = pope.double().rotate(q.double(), k.double(), positions)
    for one, other in zip(ours, exact, strict=True):
        half_ulp = torch.finfo(torch.bfloat16).eps / 2
        assert ((one - other).abs() <= half_ulp * other.abs() + 1e-5).all()


def test_large_features_are_exact() -> None:
    """No threshold shows in fp64, and nothing overflows."""
    pope, where = PoPE(1, 4).double(), torch.zeros(1).long()
    q = torch.tensor([20.5, -40.0, 700.0, 1e4]).double().reshape(1, 1, 1, 4)
    turned, _ = pope.rotate(q, None, where)
    assert error(turned[..., :4], torch.logaddexp(q, torch.zeros_like(q))) < 1e-15


def test_it_is_not_rope() -> None:
    x = randn(2, T, WIDTH)
    differs(build("pope")(x), build("rope")(x))
    assert type(build("pope").encoding) is PoPE is not RoPE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 0}, "head_dim of at least 1"),
        ({"num_heads": 0}, "num_heads of at least 1"),
        ({"base": 1}, "base must be"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        PoPE(**{"num_heads": HEADS, "head_dim": D, **options})
    assert "\n" not in str(refusal.value)
