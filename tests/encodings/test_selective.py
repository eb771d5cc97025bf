"""Selective RoPE: rates of four tokens, running phases, their precision over a million tokens."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
import posenc
from helpers import HEAD_DIM, HEADS, WIDTH, attend, close, copy_shared, differs, perturb, randn
from posenc import SelectiveRoPE
from posenc.rotations import BySteps

B, T, PAIRS, TAPS = 2, 12, HEAD_DIM // 2, 4
MILLION = 1_000_000
OMEGA = torch.tensor([10000.0 ** (-2 * i / HEAD_DIM) for i in range(PAIRS)], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def selective(**options: Any) -> SelectiveRoPE:
    return perturb(SelectiveRoPE(WIDTH, HEADS, **options)).double()


def rates_of(part: SelectiveRoPE, x: Tensor) -> Tensor:
    """(T, H, D/2) of one text (T, C), token by token and tap by tap."""
    u = []
    for token in x:
        pieces = [piece / (piece @ piece + 1e-6) ** 0.5 for piece in token.split(part.head_dim)]
        u.append((torch.cat(pieces) @ part.W1 @ part.W2).view(HEADS, -1))
    rates = []
    for t in range(len(x)):
        rate = torch.zeros_like(u[0]) if part.beta is None else part.beta.exp()
        for j in range(TAPS):
            if t - 3 + j >= 0:
                rate = rate + part.kernel[..., j] * u[t - 3 + j]
        rates.append(rate)
    return torch.stack(rates)


def same_angle(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal modulo 2 pi."""
    turns = (actual - expected) / (2 * math.pi)
    assert ((turns - turns.round()).abs() * 2 * math.pi).max() <= tolerance


@pytest.mark.parametrize("init", ["rope", "authors"])
def test_phases_are_sums_of_rates_of_four_tokens(init: str) -> None:
    part, x = selective(init=init), randn(B, T, WIDTH)
    actual = part.phases(x)
    assert actual.shape == (B, HEADS, T, PAIRS)
    assert actual.abs().max() <= math.pi + 1e-9
    for b in range(B):
        sums = rates_of(part, x[b]).cumsum(0) * OMEGA
        same_angle(actual[b], sums.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"base": 500.0}], ids=str)
def test_start_is_rope(options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, rope = (
        posenc.attention(name, WIDTH, HEADS, **options).to(dtype) for name in ("selective", "rope")
    )
    copy_shared(ours, rope)
    x = randn(B, 23, WIDTH, dtype=dtype)
    close(ours(x), rope(x), 1e-10 if dtype == torch.float64 else 1e-5)


def test_start_turns_vectors_to_the_next_position() -> None:
    q, k = randn(2, B, HEADS, T, HEAD_DIM)
    ours = SelectiveRoPE(WIDTH, HEADS).double().rotate(q, k, x=randn(B, T, WIDTH))
    for a, z in zip(ours, (q, k), strict=True):
        close(a, oracles.rope_rotate(z, torch.arange(T) + 1))


def test_constant_tokens_are_rope_from_the_fourth_on() -> None:
    part, (q, k) = selective(), randn(2, 1, HEADS, T, HEAD_DIM)
    x = randn(1, 1, WIDTH).expand(1, T, WIDTH)
    rate = rates_of(part, x[0, :4])[3]  # (H, D/2)
    scores = torch.stack(part.rotate(q, k, x=x))[..., 3:, :]
    scores = scores[0] @ scores[1].mT
    for h in range(HEADS):
        own = (rate[h] * OMEGA).tolist()
        alone = [
            oracles.rope_rotate(z[:, h : h + 1, 3:], torch.arange(T - 3), frequencies=own)
            for z in (q, k)
        ]
        close(scores[:, h : h + 1], alone[0] @ alone[1].mT)


def test_length_of_a_token_s_pieces_does_not_matter() -> None:
    part, x = selective(), randn(B, T, WIDTH)
    size = (1 + torch.rand(B, T, WIDTH // HEAD_DIM, dtype=torch.float64)) * 1e3
    close(part.phases(x * 1e3), part.phases(x * size.repeat_interleave(HEAD_DIM, -1)), 1e-9)
    swapped = torch.cat([x[..., HEAD_DIM:], x[..., :HEAD_DIM]], -1)
    differs(part.phases(swapped), part.phases(x))


def test_start_of_the_authors_is_almost_nope() -> None:
    part = SelectiveRoPE(768, 12, init="authors")
    assert part.beta is None
    steps = part.phases(randn(1, 400, 768))[0, :, :, 0].diff(dim=-1)  # omega is 1
    assert 1e-4 < steps.std() < 6e-4
    assert sum(parameter.numel() for parameter in part.parameters()) == 38_400
    assert sum(p.numel() for p in SelectiveRoPE(768, 12).parameters()) == 38_784


def test_rope_start_learns_w2_first() -> None:
    module, x = posenc.attention("selective", WIDTH, HEADS), randn(B, T, WIDTH, dtype=torch.float32)
    part = module.encoding
    module(x).square().sum().backward()
    assert part.W2.grad.abs().min() > 0
    assert part.beta.grad.abs().min() > 0
    assert not part.W1.grad.any()
    with torch.no_grad():
        part.W2.add_(part.W2.grad)
    module(x).square().sum().backward()
    assert part.W1.grad.abs().max() > 0
    assert part.kernel.grad.abs().max() > 0


def test_phases_read_four_tokens_and_the_sums_before() -> None:
    part, x = selective(), randn(B, T, WIDTH)
    present = torch.cat([x[:, :5], randn(B, 1, WIDTH), x[:, 6:]], 1)
    was, now = part.phases(x), part.phases(present)
    assert torch.equal(now[:, :, :5], was[:, :, :5])
    differs(now[:, :, 5], was[:, :, 5])
    # from four tokens later on it has shifted all phases alike
    same_angle(now[:, :, 9:] - now[:, :, 8:9], was[:, :, 9:] - was[:, :, 8:9])
    differs(now[:, :, 8] - now[:, :, 7], was[:, :, 8] - was[:, :, 7])


def test_padding_stops_phase_and_taps_and_gaps_do_not_move_it() -> None:
    part, x = selective(), randn(B, T, WIDTH)
    positions = torch.arange(T).expand(B, T).clone()
    positions[0] -= 4
    padded = part.phases(x, positions)
    assert not padded[0, :, :4].any()
    same_angle(padded[0, :, 4:], part.phases(x[:1, 4:])[0])
    same_angle(padded[1], part.phases(x[1:])[0])
    assert torch.equal(part.phases(x, 3 * torch.arange(T)), part.phases(x))


def test_taps_stop_where_a_document_does() -> None:
    module, x = perturb(posenc.attention("selective", WIDTH, HEADS)).double(), randn(1, T, WIDTH)
    packed = module(x, segments=posenc.segments([2, 1, 5, 4]))
    for start, stop in ((0, 2), (2, 3), (3, 8), (8, 12)):
        close(packed[:, start:stop], module(x[:, start:stop]))


@pytest.mark.parametrize("chunks", [[1] * T, [2, 1, 5, 4], [3, 9]], ids=str)
def test_chunks_carry_phase_and_taps(chunks: list[int]) -> None:
    part, x = selective(), randn(B, T, WIDTH)
    cache, parts = posenc.Cache(B, T, part.streams()), []
    for now in x.split(chunks, dim=1):
        parts.append(part.phases(now, state=cache))
        cache.advance(now.shape[1])
    same_angle(torch.cat(parts, 2), part.phases(x))
    cache.truncate(5)
    same_angle(part.phases(x[:, 5:], state=cache), part.phases(x)[:, :, 5:])


def test_gradients_are_those_of_finite_differences() -> None:
    part = selective()
    q, k, x = randn(1, HEADS, 6, HEAD_DIM), randn(1, HEADS, 6, HEAD_DIM), randn(1, 6, WIDTH)

    def run(q: Tensor, k: Tensor, x: Tensor, *_: Tensor) -> Tensor:
        turned_q, turned_k = part.rotate(q, k, x=x)
        return turned_q @ turned_k.mT

    inputs = [value.requires_grad_() for value in (q, k, x)]
    assert torch.autograd.gradcheck(run, (*inputs, *part.parameters()), fast_mode=True)


def test_negative_rates_stay_exact_over_a_million_tokens() -> None:
    steps = 3 * torch.randn(1, 1, MILLION, 1, dtype=torch.float64)
    exact = torch.tensor(oracles.exact_running_sums(steps.flatten().tolist()), dtype=torch.float64)
    same_angle(BySteps(steps).phases().flatten(), exact, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_stays_exact_after_a_million_tokens(dtype: torch.dtype) -> None:
    """One token again and again: no error averages out. Decoded in `dtype` chunks."""
    late, chunk, head_dim, count = 64, 250_000, 4, MILLION
    part = perturb(SelectiveRoPE(4, 1))
    token = randn(1, 1, 4, dtype=dtype)
    q, k = (2 * randn(1, 1, 1, head_dim, dtype=dtype) for _ in range(2))
    v = randn(1, 1, late, head_dim, dtype=dtype)
    cache, turned = posenc.Cache(1, count, part.streams()), []
    with torch.no_grad():
        for _ in range(count // chunk):
            tokens = (z.expand(1, 1, chunk, head_dim) for z in (q, k))
            now = token.expand(1, chunk, 4)
            turned = [z[:, :, -late:] for z in part.rotate(*tokens, x=now, state=cache)]
            cache.advance(chunk)
        y = attend(*turned, v)
        part = part.double()
        x = token[0].double() / (token[0].double().square().sum() + 1e-6).sqrt()
        u = (x @ part.W1 @ part.W2)[0]
        rate = (u * part.kernel[0].sum(-1) + part.beta[0].exp()).tolist()
        steps = torch.arange(count - late, count)
        frequencies = [rate[0], rate[1] / 100]
        expected = [
            oracles.rope_rotate(z.double().expand(1, 1, late, -1), steps, frequencies=frequencies)
            for z in (q, k)
        ]
        exact = oracles.causal_attention(oracles.dot_scores(*expected), v.double())
        if dtype == torch.float32:
            close(y, exact, 1e-5)
            return
        rounded = [z.to(dtype).double() for z in expected]
        plain = oracles.causal_attention(oracles.dot_scores(*rounded), v.double())
        band = torch.finfo(dtype).eps * exact.abs().max()
        assert (y - exact).abs().max() <= 2 * ((plain - exact).abs().max() + band)


@pytest.mark.parametrize("autocast", [False, True])
def test_phases_ignore_autocast_and_low_precision_inputs(autocast: bool) -> None:
    part, x = perturb(SelectiveRoPE(WIDTH, HEADS)), randn(B, 600, WIDTH, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        phase = part.phases(x)
    same_angle(phase, part.double().phases(x.double()), 1e-9)


def test_every_argument_changes_the_rotation() -> None:
    changes: dict[str, Any] = {"base": 500.0, "init": "authors", "head_dim": 12}
    sizes = {"embed_dim", "num_heads", "num_kv_heads"}
    assert set(inspect.signature(SelectiveRoPE).parameters) == changes.keys() | sizes
    x, plain = randn(B, T, WIDTH), SelectiveRoPE(WIDTH, HEADS).double()
    for name, value in changes.items():
        part = SelectiveRoPE(WIDTH, HEADS, **{name: value}).double()
        differs(part.phases(x)[..., :PAIRS], plain.phases(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((28, 4), "even head dim .* got 7"),
        ((25, 4), "multiple of num_heads"),
        ((24, 4, {"init": "author"}), "Did you mean 'authors'"),
        ((24, 4, {"base": 1.0}), "base must be .*got 1.0"),
        ((24, 4, {"head_dim": 10}), "must divide embed_dim; got head_dim=10, embed_dim=24"),
        ((24, 4, {"num_kv_heads": 3}), "num_kv_heads"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    sizes, options = arguments[:2], arguments[2] if len(arguments) > 2 else {}
    with pytest.raises(ValueError, match=message) as refusal:
        SelectiveRoPE(*sizes, **options)
    assert "\n" not in str(refusal.value)


def test_rotation_without_its_tokens_is_refused() -> None:
    q, k = randn(2, B, HEADS, T, HEAD_DIM)
    for x in (None, randn(B, T, WIDTH + 1), randn(B, T - 1, WIDTH), randn(1, T, WIDTH)):
        with pytest.raises(ValueError, match="needs x of shape"):
            selective().rotate(q, k, x=x)
