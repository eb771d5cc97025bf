"""Self-checks of the oracles: anchors worked out by hand, and identities between definitions."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oracles import (
    axial_rotate,
    axis_of_pair,
    carope_bias,
    carope_phases,
    carope_rates,
    carope_rotate,
    carope_scores,
    carope_steps,
    causal_attention,
    cmha_scores,
    depthwise_conv,
    dot_scores,
    dynamic_frequencies,
    exact_running_sums,
    linear_frequencies,
    llama3_frequencies,
    longrope_frequencies,
    merge,
    moh_aux,
    moh_linear_gates,
    moh_query_norm_gates,
    ntk_frequencies,
    project,
    proportional_frequencies,
    relative_learned_scores,
    relative_rows,
    relative_sinusoid,
    relative_sinusoidal_scores,
    rope_frequencies,
    rope_rotate,
    rope_scores,
    rotate,
    sinusoidal,
    weigh_heads,
    yarn_bounds,
    yarn_frequencies,
)

B, T, S, H, D, C = 2, 3, 7, 3, 8, 24
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def queries_keys() -> tuple[Tensor, Tensor]:
    return randn(B, H, T, D), randn(B, H, S, D)


def test_float32_is_refused() -> None:
    q, k = queries_keys()
    with pytest.raises(TypeError, match="float64"):
        dot_scores(q.float(), k.float())


@pytest.mark.parametrize("queries", [1, 3, S])
def test_causal_attention_is_sdpa_aligned_bottom_right(queries: int) -> None:
    q, k, v = randn(B, H, queries, D), randn(B, H, S, D), randn(B, H, S, D)
    allowed = torch.ones(queries, S, dtype=torch.bool).tril(S - queries)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    close(causal_attention(dot_scores(q, k), v), expected)


def test_layer_is_torch_multihead_attention() -> None:
    x, weights = randn(B, S, C), [randn(C, C) for _ in range(4)]
    biases = [randn(C) for _ in range(4)]
    q, k, v = (project(x, W, b, H) for W, b in zip(weights[:3], biases[:3], strict=True))
    y = merge(causal_attention(dot_scores(q, k), v), weights[3], biases[3])
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    expected, _ = F.multi_head_attention_forward(
        *[x.transpose(0, 1)] * 3,
        C,
        H,
        torch.cat(weights[:3]),
        torch.cat(biases[:3]),
        None,
        None,
        False,
        0.0,
        weights[3],
        biases[3],
        attn_mask=future,
    )
    close(y, expected.transpose(0, 1))


def test_sinusoidal_shift_is_a_rotation() -> None:
    omega = float64(rope_frequencies(C))
    shift, table, moved = 5, sinusoidal(range(4), C), sinusoidal(range(5, 9), C)
    # (sin, cos) turns against the direction of (cos, sin)
    close(moved, rotate(table, -shift * omega, "interleaved"))
    close(table[:, :2], float64([[math.sin(t), math.cos(t)] for t in range(4)]))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_rotation_keeps_norms_and_composes(pairing: str) -> None:
    x, a, b = randn(H, D), randn(D // 2), randn(D // 2)
    close(rotate(x, a, pairing).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, 0 * a, pairing), x)
    close(rotate(rotate(x, a, pairing), b, pairing), rotate(x, a + b, pairing))


def test_rotation_by_a_right_angle_in_both_pairings() -> None:
    x, quarter = float64([1.0, 2, 3, 4]), float64([math.pi / 2] * 2)
    close(rotate(x, quarter), float64([-3.0, -4, 1, 2]))
    close(rotate(x, quarter, "interleaved"), float64([-2.0, 1, -4, 3]))


def test_partial_rotation_and_attention_factor_touch_the_first_features_only() -> None:
    x = randn(B, H, T, D)
    turned = rope_rotate(x, rotary_dim=4, attention_factor=2.0)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    close(turned[..., :4], 2 * rope_rotate(x[..., :4]))


def test_rope_scores_are_relative() -> None:
    q, k = queries_keys()
    shifted = rope_scores(q, k, torch.arange(S - T, S) + 17, torch.arange(S) + 17)
    close(shifted, rope_scores(q, k))


def test_rope_positions_per_row() -> None:
    q, k = queries_keys()
    positions_q = torch.stack([torch.arange(S - T, S), torch.arange(S - T, S) + 2])
    scores = rope_scores(q, k, positions_q)
    close(scores[:1], rope_scores(q[:1], k[:1]))
    close(scores[1:], rope_scores(q[1:], k[1:], torch.arange(S - T, S) + 2))


def test_interleaved_is_half_under_a_permutation() -> None:
    q, k = queries_keys()
    order = [*range(0, D, 2), *range(1, D, 2)]
    close(rope_scores(q, k, pairing="interleaved"), rope_scores(q[..., order], k[..., order]))


def test_scalings_with_factor_one_are_rope() -> None:
    plain, ones = rope_frequencies(64), [1.0] * 32
    tables = [
        linear_frequencies(64, 1.0),
        ntk_frequencies(64, 1.0),
        dynamic_frequencies(64, 4.0, 2048, 1000),
        yarn_frequencies(64, 1.0, 2048),
        longrope_frequencies(64, 1.0, 2048, 4096, ones, ones),
        llama3_frequencies(64, 1.0),
    ]
    for frequencies, factor in tables:
        assert frequencies == pytest.approx(plain, rel=1e-14)
        assert factor == 1.0


def test_yarn_anchor() -> None:
    plain = rope_frequencies(64)
    scaled, factor = yarn_frequencies(64, 4.0, 2048)
    assert yarn_bounds(64, 2048) == (8, 21)
    assert factor == pytest.approx(1.13863, abs=5e-6)
    ratios = [w / s for w, s in zip(plain, scaled, strict=True)]
    assert ratios[:9] == pytest.approx([1.0] * 9)
    assert ratios[21:] == pytest.approx([4.0] * 11)
    between = ratios[9:21]
    assert sorted(set(between)) == between
    assert 1 < between[0] < between[-1] < 4


def test_yarn_with_equal_bounds_is_a_step() -> None:
    assert yarn_bounds(4, 6) == (0, 0)
    scaled, _ = yarn_frequencies(4, 4.0, 6)
    assert scaled == pytest.approx([1.0, rope_frequencies(4)[1] / 4])


def test_ntk_keeps_the_fastest_band_and_slows_the_last_by_the_factor() -> None:
    plain, (scaled, _) = rope_frequencies(64), ntk_frequencies(64, 4.0)
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 4)
    # s L / L0 - (s - 1) = 4 * 2 - 3 = 5
    assert dynamic_frequencies(64, 4.0, 2048, 4096) == ntk_frequencies(64, 5.0)


def test_longrope_switches_by_the_target_length() -> None:
    short, long = [2.0] * 4, [3.0] * 4
    at_limit, a = longrope_frequencies(8, 4.0, 256, 256, short, long)
    beyond, b = longrope_frequencies(8, 4.0, 256, 257, short, long)
    assert at_limit == [w / 2 for w in rope_frequencies(8)]
    assert beyond == [w / 3 for w in rope_frequencies(8)]
    assert a == b == pytest.approx(math.sqrt(1.25))  # ln 4 / ln 256 = 1/4


def test_llama3_bands() -> None:
    base = 500000.0
    plain, (scaled, _) = rope_frequencies(128, base), llama3_frequencies(128, base=base)
    kinds = set()
    for w, s in zip(plain, scaled, strict=True):
        turns = 8192 * w / (2 * math.pi)
        if turns > 4:
            kinds.add("kept")
            assert s == w
        elif turns < 1:
            kinds.add("divided")
            assert s == w / 8
        else:
            kinds.add("between")
            assert s / w == pytest.approx(1 / 8 + (turns - 1) / 3 * 7 / 8)
    assert kinds == {"kept", "divided", "between"}


def test_proportional_frequencies_between_rope_and_none() -> None:
    assert proportional_frequencies(8, 8) == (rope_frequencies(8), 1.0)
    assert proportional_frequencies(8, 0) == ([0.0] * 4, 1.0)
    assert proportional_frequencies(8, 4)[0] == [*rope_frequencies(8)[:2], 0.0, 0.0]
    x = randn(B, H, T, D)
    turned = rope_rotate(x, frequencies=proportional_frequencies(D, 4)[0])
    still = [2, 3, 6, 7]  # both members of the slow pairs of the whole head
    assert torch.equal(turned[..., still], x[..., still])
    close(turned[..., [0, 1, 4, 5]], rope_rotate(x)[..., [0, 1, 4, 5]])


def test_axes_of_the_named_models() -> None:
    sections = [axis_of_pair(i, (32, 48, 48), "sections") for i in range(64)]
    assert sections == [0] * 16 + [1] * 24 + [2] * 24  # Qwen2-VL
    interleaved = [axis_of_pair(i, (48, 40, 40), "interleaved") for i in range(64)]
    assert interleaved == [0, 1, 2] * 20 + [0] * 4  # Qwen3-VL


LAYOUTS = pytest.mark.parametrize("layout", ["blocks", "sections", "interleaved"])
PAIRED = pytest.mark.parametrize("pairing", ["half", "interleaved"])


@LAYOUTS
@PAIRED
def test_one_axis_is_rope(layout: str, pairing: str) -> None:
    x, where = randn(B, H, T, D), torch.randint(99, (B, T))
    turned = axial_rotate(x, where[..., None], (D,), layout, pairing=pairing)
    close(turned, rope_rotate(x, where, pairing=pairing))


@LAYOUTS
@PAIRED
def test_equal_positions_on_all_axes(layout: str, pairing: str) -> None:
    """RoPE again where the head has one spectrum; blocks have a spectrum each."""
    x, where = randn(B, H, T, D), torch.arange(T) + 1
    turned = axial_rotate(x, where[:, None].expand(T, 2), (4, 4), layout, pairing=pairing)
    plain = rope_rotate(x, where, pairing=pairing)
    assert (layout == "blocks") != torch.allclose(turned, plain)
    if layout == "blocks":
        halves = [rope_rotate(z, where, pairing=pairing) for z in x.split(4, -1)]
        close(turned, torch.cat(halves, -1))


@pytest.mark.parametrize(("dim", "bias"), [(64, -0.92666), (96, -1.44577), (128, -1.78735)])
def test_carope_bias_starts_at_rope(dim: int, bias: float) -> None:
    assert carope_bias(dim) == pytest.approx(bias, abs=5e-6)
    rates = carope_rates(randn(1, 2, C), 0 * randn(C, 1), float64([carope_bias(dim)]))
    close(rates, torch.full_like(rates, 10000 ** (-2 / dim)))


def test_carope_without_bias_starts_far_from_rope() -> None:
    rates = carope_rates(randn(1, 2, C), 0 * randn(C, 1))
    assert rates[0, 0, 0].item() == pytest.approx(0.59062, abs=5e-6)
    assert rates[0, 0, 0].item() ** -32 == pytest.approx(2.08e7, rel=2e-3)


def test_carope_rates_follow_softplus_far_out() -> None:
    rates = carope_rates(float64([[[-40.0], [25.0]]]), float64([[1.0]]))
    assert 1 / rates[0, 0, 0].item() - 1 == pytest.approx(math.exp(-40), abs=1e-15)
    assert 1 / rates[0, 0, 1].item() == pytest.approx(26 + math.log1p(math.exp(-25)), rel=1e-15)


def test_carope_at_constant_rate_is_rope() -> None:
    q, k = queries_keys()
    bias = torch.full((H,), carope_bias(D), dtype=torch.float64)
    W, x = torch.zeros(C, H, dtype=torch.float64), randn(B, S, C)
    close(carope_scores(q, k, x, W, bias), rope_scores(q, k))
    # the sum includes the token itself, so vectors are RoPE's one position later
    phases = carope_phases(carope_steps(carope_rates(x, W, bias), D))
    rotated_q, rotated_k = carope_rotate(q, k, phases)
    close(rotated_q, rope_rotate(q, torch.arange(S - T, S) + 1))
    close(rotated_k, rope_rotate(k, torch.arange(S) + 1))


def test_carope_band_zero_counts_tokens_and_first_power_shifts_bands() -> None:
    rates = carope_rates(randn(B, S, C), randn(C, H))
    phases = carope_phases(carope_steps(rates, D))
    close(phases[..., 0], torch.arange(1.0, S + 1).double().expand(B, H, S))
    assert (phases.diff(dim=2) > 0).all()
    assert torch.equal(
        carope_steps(rates, D, first_power=1)[..., :-1], carope_steps(rates, D)[..., 1:]
    )


def test_carope_phase_difference_forgets_the_prefix() -> None:
    x, W = randn(B, S, C), randn(C, H)
    other = torch.cat([randn(B, 3, C), x[:, 3:]], 1)
    first, second = (carope_phases(carope_steps(carope_rates(z, W), D)) for z in (x, other))
    close(first[:, :, 3:] - first[:, :, 2:3], second[:, :, 3:] - second[:, :, 2:3])


def test_carope_gradients_at_the_rope_start() -> None:
    q, k, x = *queries_keys(), randn(B, S, C)
    W = torch.zeros(C, H, dtype=torch.float64, requires_grad=True)
    bias = torch.full((H,), carope_bias(D), dtype=torch.float64)
    steps = carope_steps(carope_rates(x, W, bias), D)
    steps.retain_grad()
    scores = dot_scores(*carope_rotate(q, k, carope_phases(steps)))
    (scores * randn(B, H, T, S)).sum().backward()
    assert W.grad.abs().max() > 1e-3
    # a step of the first token shifts every phase alike, so it cannot change a score
    close(steps.grad[:, :, 0], torch.zeros(B, H, D // 2).double())
    assert steps.grad[:, :, 1].abs().max() > 1e-3


def test_exact_running_sums() -> None:
    values = torch.rand(500, dtype=torch.float64).tolist()
    total, expected = Fraction(0), []
    for value in values:
        total += Fraction(value)
        expected.append(float(total))
    assert exact_running_sums(values) == expected
    steps = float64(values)[None, None, :, None]
    close(carope_phases(steps)[0, 0, :, 0], float64(expected))
    constant = 0.7499
    exact = float(Fraction(constant) * 100_000)
    assert exact_running_sums([constant] * 100_000)[-1] == exact


def cmha_factorised(q: Tensor, k: Tensor, delta: Tensor, b: Tensor) -> Tensor:
    """The form without magnitudes: q^ = R((delta-1) th_q + b + m omega) q, k^ alike without b."""
    omega = float64(rope_frequencies(D))
    angles = [torch.atan2(x[..., D // 2 :], x[..., : D // 2]) for x in (q, k)]
    extra = [(delta[:, None] - 1) * th for th in angles]
    m, n = (torch.arange(S - x.shape[2], S - x.shape[2] + x.shape[2])[:, None] for x in (q, k))
    return dot_scores(rotate(q, extra[0] + b[:, None] + m * omega), rotate(k, extra[1] + n * omega))


def test_cmha_direct_form_factorises() -> None:
    q, k, delta, b = *queries_keys(), randn(H, D // 2), randn(H, D // 2)
    close(cmha_scores(q, k, delta, b), cmha_factorised(q, k, delta, b))


def test_cmha_special_cases() -> None:
    q, k = queries_keys()
    one, zero = torch.ones(H, D // 2).double(), torch.zeros(H, D // 2).double()
    close(cmha_scores(q, k, one, zero), rope_scores(q, k))
    # equal positions switch the positional angle off: no position
    still_q, still_k = torch.zeros(T, dtype=torch.int64), torch.zeros(S, dtype=torch.int64)
    close(cmha_scores(q, k, one, zero, still_q, still_k), dot_scores(q, k))
    close(cmha_scores(q, k, one, zero, scale=1.0), cmha_scores(q, k, one, zero) * math.sqrt(D))


def test_cmha_invariances() -> None:
    q, k, delta, b = *queries_keys(), randn(H, D // 2), randn(H, D // 2)
    scores = cmha_scores(q, k, delta, b)
    close(cmha_scores(q, k, delta, b, torch.arange(S - T, S) + 9, torch.arange(S) + 9), scores)
    close(cmha_scores(q, k, delta, b + 2 * math.pi), scores)
    close(cmha_scores(3 * q, k, delta, b), 3 * scores)
    turned = rotate(q, randn(D // 2))
    close(cmha_scores(turned, k, 0 * delta, b), cmha_scores(q, k, 0 * delta, b))


def test_relative_terms_add_up() -> None:
    q, k, u, R, bias = *queries_keys(), randn(H, D), randn(H, S, D), randn(H, S)
    zero_u, zero_R, zero_bias = 0 * u, 0 * R, 0 * bias
    plain = dot_scores(q, k)
    close(relative_learned_scores(q, k, zero_u, zero_R, zero_bias), plain)
    parts = [
        relative_learned_scores(q, k, u, zero_R, zero_bias) - plain,
        relative_learned_scores(q, k, zero_u, R, zero_bias) - plain,
        relative_learned_scores(q, k, zero_u, zero_R, bias) - plain,
    ]
    close(relative_learned_scores(q, k, u, R, bias), plain + sum(parts))
    # query row 1 is token S-T+1 = 5: distance 3 to token 2; every term is scaled
    close(parts[2][0, :, 1, 2], bias[:, 3] / math.sqrt(D))


def test_relative_sinusoidal_is_learned_with_its_own_table() -> None:
    q, k, u, v, W_R = *queries_keys(), randn(H, D), randn(H, D), randn(C, C)
    R = relative_rows(W_R, range(S), H)
    bias = (v[:, None] * R).sum(-1)
    close(relative_sinusoidal_scores(q, k, u, v, W_R), relative_learned_scores(q, k, u, R, bias))
    zero = torch.zeros(H, D).double()
    close(relative_sinusoidal_scores(q, k, zero, v, 0 * W_R), dot_scores(q, k))


def test_relative_sinusoid_has_sines_first() -> None:
    slow = 3 * 10000 ** (-2 / 4)
    close(
        relative_sinusoid(3, 4), float64([math.sin(3), math.sin(slow), math.cos(3), math.cos(slow)])
    )


def test_relative_clamps_far_distances_and_the_future() -> None:
    q, k, u, R, bias = *queries_keys(), randn(H, D), randn(H, 4, D), randn(H, 4)
    scores = relative_learned_scores(q, k, u, R, bias)
    longer_R = torch.cat([R, R[:, -1:].expand(H, S - 4, D)], 1)
    longer_bias = torch.cat([bias, bias[:, -1:].expand(H, S - 4)], 1)
    close(scores, relative_learned_scores(q, k, u, longer_R, longer_bias))
    moved = relative_learned_scores(
        q, k, u, R, bias, torch.arange(S - T, S) + 50, torch.arange(S) + 50
    )
    close(moved, scores)
    still = relative_learned_scores(q, k, u, R, bias, torch.zeros(T, dtype=torch.int64))
    close(still, relative_learned_scores(q, k, u, R[:, :1], bias[:, :1]))


def test_conv_is_torch_conv1d() -> None:
    x, w, bias = randn(B, H, S, D), randn(H, D, 3), randn(H, D)
    channels = x.transpose(2, 3).reshape(B, H * D, S)
    expected = F.conv1d(
        F.pad(channels, (2, 0)), w.reshape(H * D, 1, 3), bias.reshape(-1), groups=H * D
    )
    close(depthwise_conv(x, w, bias), expected.reshape(B, H, D, S).transpose(2, 3))


def test_conv_taps() -> None:
    x, w, bias = randn(B, H, S, D), randn(D, 3), randn(D)
    identity = float64([0.0, 0, 1]).expand(D, 3)
    delay = float64([1.0, 0, 0]).expand(D, 3)
    assert torch.equal(depthwise_conv(x, identity), x)
    assert torch.equal(depthwise_conv(x, delay)[:, :, 2:], x[:, :, :-2])
    assert not depthwise_conv(x, delay)[:, :, :2].any()
    close(depthwise_conv(x, w, bias), depthwise_conv(x, w.expand(H, D, 3), bias.expand(H, D)))


def routers(shared: int, routed: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(shared, C), randn(routed, C), randn(2, C)


@pytest.mark.parametrize("scaling", ["authors", "paper"])
def test_moh_gates_sums_and_counts(scaling: str) -> None:
    x, (W_s, W_r, W_h) = randn(B, S, C), routers(2, 5)
    gates, p, selected = moh_linear_gates(x, W_s, W_r, W_h, shared=2, top_k=3, scaling=scaling)
    assert gates.shape == (B, 7, S)
    assert ((gates > 0).sum(1) == 5).all()
    assert torch.equal(gates[:, 2:].transpose(1, 2) > 0, selected.bool())
    close(p.sum(-1), torch.ones(B, S).double())
    a0, a1 = torch.softmax(x @ W_h.T, -1).unbind(-1)
    if scaling == "authors":
        close(gates[:, :2].sum(1), 2 * a0 * 2)
        close(gates[:, 2:].sum(1), 2 * a1 * 3)
    else:
        close(gates[:, :2].sum(1), a0)
        close(gates[:, 2:].sum(1), a1 * (p * selected).sum(-1))
        assert (gates.sum(1) <= 1).all()


@pytest.mark.parametrize(
    ("scaling", "shared", "routed"), [("authors", 1, 1), ("paper", 1 / 4, 0.1)]
)
def test_moh_zero_routers(scaling: str, shared: float, routed: float) -> None:
    x, weights = randn(B, S, C), [0 * w for w in routers(2, 5)]
    gates, p, selected = moh_linear_gates(x, *weights, shared=2, top_k=3, scaling=scaling)
    close(gates[:, :2], torch.full((B, 2, S), shared, dtype=torch.float64))
    close(gates[:, 2:], routed * selected.transpose(1, 2))
    # ties go to the lowest indices; at uniform p the balance loss is K/E whoever is chosen
    assert selected[..., :3].all()
    close(moh_aux(p, selected), float64(3 / 5))
    close(moh_aux(p, selected, "authors"), float64(3.0))


def test_moh_single_groups() -> None:
    x, (W_s, W_r, W_h) = randn(B, S, C), routers(4, 5)
    gates, p, selected = moh_linear_gates(x, None, W_r, None, shared=0, top_k=3)
    expected = 3 * p * selected / (p * selected).sum(-1, keepdim=True)
    close(gates, expected.transpose(1, 2))
    gates, p, selected = moh_linear_gates(x, W_s, None, None, shared=4, top_k=0)
    close(gates, 4 * torch.softmax(x @ W_s.T, -1).transpose(1, 2))
    assert p.shape == selected.shape == (B, S, 0)
    assert moh_aux(p, selected) == 0
    gates, _, _ = moh_linear_gates(x, None, W_r, W_h, shared=1, top_k=3)
    close(gates[:, 0], 2 * torch.softmax(x @ W_h.T, -1)[..., 0])


def test_moh_permuting_routed_heads_permutes_gates() -> None:
    x, (W_s, W_r, W_h) = randn(B, S, C), routers(2, 5)
    order = torch.randperm(5)
    first = moh_linear_gates(x, W_s, W_r, W_h, shared=2, top_k=3)
    second = moh_linear_gates(x, W_s, W_r[order], W_h, shared=2, top_k=3)
    close(second.gates[:, 2:], first.gates[:, 2:][:, order])
    close(moh_aux(*second[1:]), moh_aux(*first[1:]))


def test_moh_aux_at_full_collapse() -> None:
    p = float64([0.5, 0.3, 0.15, 0.05]).expand(B, S, 4)
    selected = float64([1.0, 1, 0, 0]).expand(B, S, 4)
    close(moh_aux(p, selected), float64(0.8))
    close(moh_aux(p, selected, "authors"), float64(3.2))


def test_moh_query_norm_is_straight_through() -> None:
    q = randn(B, H + 2, S, D).requires_grad_()
    gates, p, selected = moh_query_norm_gates(q, shared=2, top_k=2)
    assert torch.equal(gates[:, :2], torch.ones(B, 2, S).double())
    assert torch.equal(gates[:, 2:], selected.transpose(1, 2))
    assert (selected.sum(-1) == 2).all()
    norms = q[:, 2:].norm(dim=-1)
    assert torch.equal(
        norms.transpose(1, 2).topk(2).indices.sort().values, selected.topk(2).indices.sort().values
    )
    probe = randn(B, S, H)
    hard, soft = (
        torch.autograd.grad((out * probe).sum(), q, retain_graph=True)[0]
        for out in (gates[:, 2:].transpose(1, 2), p)
    )
    assert hard.abs().max() > 0
    close(hard, soft)
    every = moh_query_norm_gates(q, shared=2, top_k=H)
    assert torch.equal(every.gates, torch.ones(B, H + 2, S).double())


def test_moh_query_norm_survives_zero_queries() -> None:
    q = torch.zeros(1, 4, 1, D, dtype=torch.float64)
    gates, p, _ = moh_query_norm_gates(q, shared=1, top_k=2)
    assert gates[0, :, 0].tolist() == [1, 1, 1, 0]
    close(p, torch.full((1, 1, 3), 1 / 3, dtype=torch.float64))


def test_weigh_heads_then_merge_is_the_gated_sum() -> None:
    o, gates, W_o = randn(B, H, S, D), torch.rand(B, H, S, dtype=torch.float64), randn(C, C)
    expected = torch.einsum("bht,bhtd,chd->btc", gates, o, W_o.reshape(C, H, D))
    close(merge(weigh_heads(o, gates), W_o), expected)
