"""xPos: powers about a position near the query, at any position, in blocks where they must be."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import posenc
from helpers import HEADS, WIDTH, build, close, copy_shared, oracle_layer, perturb, randn, trained
from posenc import RoPE, XPos
from posenc.backends import faded
from posenc.backends.case import consecutive
from posenc.fading import blocks
from posenc.placement import place

D, T, FAR = 12, 9, 1_000_000
#: fp32 then reaches 17 tokens, fp64 141.
STEEP = 0.5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def exact_scores(q: Tensor, k: Tensor, positions: Tensor, keys: Tensor, s: float) -> Tensor:
    """(B, H, T, S) of one row of positions, in fp64; hidden pairs as those of distance 0."""
    q, k = RoPE(q.shape[-1]).rotate(q, k, positions, key_positions=keys)
    half = q.shape[-1] // 2
    zeta = (2 * torch.arange(half).double() + 0.8 * half) / (2.8 * half)
    apart = (positions[:, None] - keys).clamp(min=0)
    power = (zeta ** (apart[..., None] / s)).repeat(1, 1, 2)  # (T, S, D)
    return torch.einsum("bhtd,bhsd,tsd->bhts", q, k, power) / math.sqrt(q.shape[-1])


@pytest.mark.parametrize("positions", [None, FAR + torch.tensor([0, 1, 2, 9, 30, 31, 32, 99, 400])])
def test_without_fading_it_is_rope(positions: Tensor | None) -> None:
    xpos, rope, x = build("xpos", scale_base=1e13), build("rope"), randn(2, T, WIDTH)
    copy_shared(xpos, rope)
    close(xpos(x, positions=positions), rope(x, positions=positions))


@pytest.mark.parametrize("shift", [100_000, FAR, 10**9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_shifts_change_nothing(shift: int, dtype: torch.dtype) -> None:
    module, x = build("xpos", dtype=dtype), randn(2, T, WIDTH, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6 if shift == 10**9 else 1e-9
    close(module(x, positions=torch.arange(T) + shift), module(x), tolerance)


CALLS: dict[str, dict[str, Any]] = {
    "whole": {},
    "left": {"mask": torch.arange(40).expand(2, 40) >= torch.tensor([[0], [15]])},
    "holes": {"mask": torch.arange(40).expand(2, 40) % torch.tensor([[7], [3]]) > 0},
    "documents": {"segments": posenc.segments([1, 20, 19]).expand(2, 40)},
    "gaps": {"positions": torch.arange(40) + torch.arange(40) // 6 * 10**6},
    "one gap": {"positions": torch.arange(40).expand(2, 40) + FAR * (torch.arange(40) > 30)},
    "far and near documents": {
        "segments": posenc.segments([20, 20]).expand(2, 40),
        "positions": torch.cat([FAR + torch.arange(20), torch.arange(20)]).expand(2, 40),
    },
}


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("options", [{}, {"window": 11, "num_kv_heads": 2}], ids=str)
@pytest.mark.parametrize("arrangement", CALLS)
def test_blocks_are_the_definition(arrangement: str, options: dict[str, Any], impl: str) -> None:
    call, x = CALLS[arrangement], randn(2, 40, WIDTH)
    module = build("xpos", scale_base=STEEP, impl=impl, dtype=torch.float32, **options)
    real = call.get("mask", torch.ones(2, 40, dtype=torch.bool))
    y = module(x.float(), **call)
    assert y.isfinite().all()
    expected, _ = oracle_layer(module, x.float().double(), **options, **call)
    close(y[real], expected[real], 1e-5)


def test_gradients_pass_blocks() -> None:
    steep, x = build("xpos", scale_base=0.05), randn(1, 40, WIDTH).requires_grad_()
    assert len(blocks(steep.encoding.scores(place(1, 40, x.device)).fading,
                      place(1, 40, x.device), x.dtype)) == 3  # fmt: skip
    weights = {name: w.detach().clone().requires_grad_() for name, w in trained(steep).items()}
    probe = randn(1, 40, WIDTH)
    expected, _ = oracle_layer(steep, x, weights=weights)
    ours = torch.autograd.grad((steep(x) * probe).sum(), [x, *steep.parameters()])
    theirs = torch.autograd.grad((expected * probe).sum(), [x, *weights.values()])
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)


def test_a_block_a_token_where_nothing_reaches_further() -> None:
    module, x = build("xpos", scale_base=1e-3), randn(2, T, WIDTH)
    positions = torch.tensor([0, 1, 2, 3, 10, 20, 30, 10**6, 10**9])
    for given in (None, positions):
        y = module(x, positions=given)
        close(y, oracle_layer(module, x, given)[0])


def test_routed_heads_pass_blocks() -> None:
    options = {"encoding": "xpos", "scale_base": STEEP, "shared": 1, "top_k": 2}
    module, x = build("moh", dtype=torch.float32, **options), randn(2, 60, WIDTH)
    close(module(x.float()), oracle_layer(module, x.float().double())[0], 1e-5)


def test_texts_that_one_position_serves_are_one_case() -> None:
    def parts(length: int, dtype: torch.dtype, past: int = 0, s: float = 512) -> list[int]:
        q, k = torch.zeros(1, 1, length, 2, dtype=dtype), torch.zeros(1, 1, past + length, 2)
        case = consecutive(q, k.to(dtype), k.to(dtype), XPos(2, scale_base=s).scores(None))
        return [part.mask.length for part in faded.parts(case)]

    assert parts(18_000, torch.float32) == [18_000]
    assert parts(18_000, torch.bfloat16) == [18_000]
    assert parts(2_200, torch.float16, past=40_000) == [2_200]
    assert parts(2_400, torch.float16) == [2_267, 133]
    assert parts(1, torch.float32, past=40_000, s=1e-3) == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("start", [0, FAR])
def test_a_long_cache_is_met_exactly(dtype: torch.dtype, length: int, start: int) -> None:
    """40,000 keys that one power could not hold; what is cached has turned, without its power."""
    count, rope = 40_000, RoPE(6)
    module = build("xpos", heads=2, noise=0.3, dtype=torch.float32).to(dtype)
    cache = module.make_cache(1, count + length)
    k, v = randn(2, 1, 2, count, 6).to(dtype).double()
    turned = rope.rotate(None, k, start + torch.arange(count))[1]
    cache._rows["k"][:, :, :count], cache._rows["v"][:, :, :count] = turned, v
    cache.length, x = count, randn(1, length, 12).to(dtype)
    if start:
        cache._rows["positions"][0, :count, 0] = start + torch.arange(count)
        cache._given = True
    with torch.no_grad():
        y = module(x, cache=cache)
    weights = {name: w.detach().double() for name, w in module.named_parameters()}
    new = x.double() @ weights["c_attn.weight"].T
    q, new_k, new_v = (z.unflatten(-1, (2, 6)).transpose(1, 2) for z in new.chunk(3, -1))
    stored = cache._rows["k"][:, :, :count].double()
    back = rope.rotate(None, stored, -(start + torch.arange(count)))[1]
    keys, values = torch.cat((back, new_k), 2), torch.cat((v, new_v), 2)
    positions = start + torch.arange(count + length)
    scores = exact_scores(q, keys, positions[count:], positions, 512)
    seen = positions <= positions[count:, None]
    o = scores.masked_fill(~seen, -math.inf).softmax(-1) @ values
    expected = o.transpose(1, 2).flatten(2) @ weights["c_proj.weight"].T
    assert y.isfinite().all()
    close(y, expected, 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_neither_overflows_nor_drifts(dtype: torch.dtype) -> None:
    """Past 4,532 tokens a power from 0 overflows in fp16."""
    low = build("xpos", heads=1, noise=0.2, dtype=torch.float32).to(dtype)
    x = randn(1, 4_700, 6).to(dtype)
    with torch.no_grad():
        y = low(x)
        exact = low.double()(x.double())
    assert y.isfinite().all()
    error = (y.double() - exact)[:, -500:].square().mean().sqrt()
    assert error <= 4 * torch.finfo(dtype).eps * exact[:, -500:].square().mean().sqrt()


def test_memory_of_a_step_holds_no_power() -> None:
    module, rope, x = build("xpos", num_kv_heads=2), build("rope", num_kv_heads=2), randn(2, 5, 24)
    copy_shared(module, rope)
    caches = [layer.make_cache(2, 5) for layer in (module, rope)]
    with torch.no_grad():
        for layer, cache in zip((module, rope), caches, strict=True):
            layer(x, cache=cache)
    assert torch.equal(caches[0]._rows["k"], caches[1]._rows["k"])


@pytest.mark.parametrize("s", [512, STEEP])
def test_flex_attention_is_told_the_powers(s: float) -> None:
    xpos, q, k = XPos(D, scale_base=s).double(), randn(2, HEADS, 5, D), randn(2, 2, T, D)
    positions = FAR + torch.tensor([4, 5, 6, 1007, 200_000])
    keys = FAR + torch.tensor([0, 1, 2, 3, 4, 5, 6, 1007, 200_000])
    turned = xpos.rotate(q, k, positions, key_positions=keys)
    for ours, theirs in zip(turned, RoPE(D).rotate(q, k, positions, key_positions=keys),
                            strict=True):  # fmt: skip
        assert torch.equal(ours, theirs)
    modify = xpos.score_mod(*turned, positions, keys)
    b, h, m, n = (torch.arange(size) for size in (2, HEADS, 5, T))
    index = (b[:, None, None, None], h[:, None, None], m[:, None], n)
    ours = modify(randn(2, HEADS, 5, T), *index)
    seen = keys <= positions[:, None]
    expected = exact_scores(q, k.repeat_interleave(2, 1), positions, keys, s)
    close(ours[..., seen], expected[..., seen], 1e-8)
    assert ours.isfinite().all()
    assert xpos.score_bias(positions, keys) is None


def test_given_positions_compile_as_far_as_one_position_serves() -> None:
    module, x = build("xpos", scale_base=STEEP), randn(2, T, WIDTH)
    positions = torch.tensor([0, 1, 2, 9, 30, 31, 32, 99, 130])
    run = torch.compile(module, backend="eager", fullgraph=True)
    close(run(x, positions=positions), oracle_layer(module, x, positions)[0])
    torch._dynamo.reset()


def test_fastest_pairs_fade_fastest() -> None:
    rates = XPos(D).rates()
    assert (rates[: D // 2].diff() < 0).all()
    assert rates[0].item() == pytest.approx(-math.log(0.2857142857) / 512)
    assert torch.equal(rates[: D // 2], rates[D // 2 :])
    assert not list(perturb(XPos(D)).parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 7}, "even head dim"),
        ({"base": 1}, "base must be"),
        ({"scale_base": 0}, "scale_base must be a finite number above 0"),
        ({"scale_base": math.inf}, "scale_base must be a finite number above 0"),
        ({"scale_base": "512"}, "scale_base must be"),
        ({"causal": False}, "no meaning with causal=False"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        XPos(**{"head_dim": D, **options})
    assert "\n" not in str(refusal.value)


def test_padding_far_into_a_long_text_has_finite_gradients() -> None:
    layer = posenc.attention("xpos", 8, 2, encoding_scale_base=64)
    x = torch.randn(1, 3000, 8, requires_grad=True)
    mask = torch.ones(1, 3000, dtype=torch.bool)
    mask[:, -100:-90] = False
    y = layer(x, mask=mask)
    (gradient,) = torch.autograd.grad(y[mask].sum(), x)
    assert y.isfinite().all()
    assert gradient.isfinite().all()


def test_long_padded_texts_are_right_where_nobody_looks() -> None:
    """Under a compiler blocks are cut by rows, as padded tokens do not count."""
    torch.manual_seed(0)
    layer = posenc.attention("xpos", 8, 2, encoding_scale_base=8)
    x, mask = torch.randn(1, 600, 8), (torch.arange(600) < 590)[None]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(x, mask=mask)[mask], layer(x, mask=mask)[mask], 1e-5)
