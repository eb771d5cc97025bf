"""FoPE: its bands, its frozen series, and what it becomes where these are the identity."""

import math

import pytest
import torch
from torch import Tensor

import posenc
from helpers import HEADS, WIDTH, build, close, copy_shared, differs, perturb, randn, trained
from posenc import FoPE, RoPE
from posenc.training.optimizer import make_optimizer, split_parameters

D, T, FAR = 12, 9, 1_000_000


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def identity(fope: FoPE) -> FoPE:
    with torch.no_grad():
        for series in (fope.cos_series, fope.sin_series):
            series.copy_(torch.eye(fope.bands))
    return fope.double()


def turned(encoding: posenc.Encoding, q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    return torch.cat(encoding.rotate(q, k, positions), dim=1)


@pytest.mark.parametrize(
    ("head_dim", "length", "bands"), [(64, 512, 16), (64, 1024, 18), (64, 7, 1), (2, 512, 1)]
)
def test_bands_are_those_that_turn_once(head_dim: int, length: int, bands: int) -> None:
    fope = FoPE(HEADS, head_dim, length=length)
    assert fope.cos_series.shape == fope.sin_series.shape == (HEADS, bands, bands)


@pytest.mark.parametrize("positions", [torch.arange(T), FAR + 3 * torch.arange(T).expand(2, T)])
@pytest.mark.parametrize("length", [7, 60, 512, 10**6])
def test_identity_is_rope_whose_slow_bands_stand(length: int, positions: Tensor) -> None:
    fope = identity(FoPE(HEADS, D, length=length))
    rope = RoPE(D, partial="proportional", rotary_dim=2 * fope.bands)
    q, k = randn(2, HEADS, T, D), randn(2, HEADS, T, D)
    close(turned(fope, q, k, positions), turned(rope, q, k, positions))
    if length == 10**6:
        assert fope.bands == D // 2
        close(turned(fope, q, k, positions), turned(RoPE(D), q, k, positions))


def test_a_layer_of_the_identity_is_rope() -> None:
    fope, rope = build("fope", length=10**6), build("rope")
    identity(fope.encoding)
    copy_shared(fope, rope)
    x = randn(2, T, WIDTH)
    close(fope(x), rope(x))


def test_still_pairs_stay_and_the_others_are_no_rotation() -> None:
    fope = FoPE(HEADS, D).double()
    still = [*range(fope.bands, D // 2), *range(D // 2 + fope.bands, D)]
    assert 0 < len(still) < D
    q, k, positions = randn(1, HEADS, T, D), randn(1, HEADS, T, D), torch.arange(T)
    y, z = fope.rotate(q, k, positions)
    assert torch.equal(y[..., still], q[..., still])
    differs(y.norm(dim=-1), q.norm(dim=-1))
    far, near = fope.rotate(q, k, positions + 5)
    differs(far @ near.mT, y @ z.mT)
    assert not FoPE.relative


def test_series_are_the_identity_and_noise() -> None:
    fope = FoPE(12, 64)
    for series in (fope.cos_series, fope.sin_series):
        noise = series - torch.eye(16)
        expected = 0.3 * math.sqrt(2 / (16 * (16 + 12)))
        assert noise.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * noise.numel()))
        assert abs(noise.mean().item()) < 5 * expected / math.sqrt(noise.numel())
    differs(fope.cos_series, fope.sin_series, 1e-3)
    differs(fope.cos_series[0], fope.cos_series[1], 1e-3)


def test_series_are_frozen_wherever_they_go() -> None:
    model = posenc.GPT(posenc.GPTConfig(29, 16, 1, HEADS, WIDTH, "fope"))
    series = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert series == {f"h.0.attn.encoding.{name}_series" for name in ("cos", "sin")}
    assert series <= model.state_dict().keys()
    before = {name: model.state_dict()[name].clone() for name in series}
    decayed, _ = split_parameters(model)
    assert not any(weight is model.get_parameter(name) for weight in decayed for name in series)
    ids = torch.randint(29, (2, T))
    model(ids, ids).loss.backward()
    make_optimizer(model, lr=0.1, betas=(0.9, 0.95), weight_decay=0.5).step()
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)
    with torch.device("meta"):
        empty = posenc.GPT(model.config)
    assert trained(empty.to_empty(device="cpu")).keys() == trained(model).keys()


def test_unfrozen_series_learn() -> None:
    module = build("fope").requires_grad_(True)
    series = [module.encoding.cos_series, module.encoding.sin_series]
    gradients = torch.autograd.grad(module(randn(2, T, WIDTH)).square().sum(), series)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_length_is_the_context_of_a_model_unless_given() -> None:
    assert posenc.attention("fope", WIDTH, HEADS).encoding.length == 512
    for options, length in (({}, 33), ({"length": 99}, 99)):
        config = posenc.GPTConfig(29, 33, 2, HEADS, WIDTH, "fope", options)
        assert {block.attn.encoding.length for block in posenc.GPT(config).h} == {length}
    mixed = posenc.GPTConfig(29, 33, 2, HEADS, WIDTH, ("fope:length=50", "moh:encoding=fope"))
    assert [block.attn.encoding.length for block in posenc.GPT(mixed).h] == [50, 33]


def test_texts_longer_than_the_length_go_on() -> None:
    module, x = build("fope", length=16), randn(1, 70, WIDTH)
    close(module(x)[:, :40], module(x[:, :40]))


def test_far_positions_in_bfloat16_lose_nothing() -> None:
    fope = perturb(FoPE(HEADS, 16))
    q, k = randn(2, 1, HEADS, 64, 16, dtype=torch.bfloat16)
    positions = FAR + torch.arange(64)
    ours = turned(fope.to(torch.bfloat16), q, k, positions)
    exact = turned(fope.double(), q.double(), k.double(), positions)
    half_ulp = torch.finfo(torch.bfloat16).eps / 2
    assert ((ours - exact).abs() <= half_ulp * exact.abs() + 1e-5).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 7}, "even head dim"),
        ({"length": 6}, "at least 7.*got 6"),
        ({"length": 0}, "length of at least 1"),
        ({"length": 51.2}, "length of at least 1, an integer"),
        ({"base": 1}, "base must be"),
        ({"num_kv_heads": 3}, "must divide"),
        ({"num_heads": 0}, "num_heads of at least 1"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        FoPE(**{"num_heads": HEADS, "head_dim": D, **options})
    assert "\n" not in str(refusal.value)
