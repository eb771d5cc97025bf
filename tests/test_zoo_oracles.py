"""Self-checks of the wider zoo's oracles: second formulations, and limits that are other methods.

Nothing of the library takes part.
"""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import oracles
import zoo_oracles
from helpers import close, differs, randn
from layer_oracle import Call, attention_layer, per_query_head, place

B, T, C, H, G, D = 2, 9, 12, 4, 2, 6
#: Public options; at these, F = 2 of 3 bands turn in FoPE.
OPTIONS: dict[str, Any] = {
    "base": 100.0,
    "buckets": 8,
    "max_distance": 20,
    "kind": "log",
    "length": 30,
    "scale_base": 10.0,
    "max_positions": 4,
}
CAUSAL_ALONE = ("CoPE", "XPos", "PaTH")
WITH_TAPS = ("SelectiveRoPE", "PaTH")
ABSOLUTE = ("FIRE", "FoPE")
BOTH_SIDES = [
    *((name, True) for name in zoo_oracles.SCORES),
    *((name, False) for name in zoo_oracles.SCORES if name not in CAUSAL_ALONE),
]
EVERY = pytest.mark.parametrize("name", zoo_oracles.SCORES)
EVERY_SIDE = pytest.mark.parametrize(("name", "causal"), BOTH_SIDES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def draw(name: str, groups: int = H) -> dict[str, Tensor]:
    """Random weights of an encoding."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "ALiBi": {},
        "T5": {"table": (OPTIONS["buckets"], H)},
        "Kerple": {"r1": (H,), "r2": (H,)},
        "FIRE": {"c": (), "a": (), "W1": (5, 1), "b1": (5,), "W2": (H, 5), "b2": (H,)},
        "FoX": {"weight": (C, H), "bias": (H,)},
        "CoPE": {"table": (OPTIONS["max_positions"], D)},
        "XPos": {},
        "PoPE": {"delta": (H, D)},
        "SelectiveRoPE": {
            "W1": (C, 5),
            "W2": (5, groups * D // 2),
            "kernel": (groups, D // 2, 4),
            "beta": (groups, D // 2),
        },
        "GRAPE": {"weight": (C, 1), "bias": (1,), "log_frequencies": (D // 2,)},
        "PaTH": {
            "W1": (C, 32),
            "W2": (32, groups * D),
            "kernel": (groups, D, 3),
            "weight": (C, groups),
            "bias": (groups,),
        },
        "FoPE": {"cos_series": (groups, 2, 2), "sin_series": (groups, 2, 2)},
    }
    return {which: torch.randn(shape).double() for which, shape in shapes[name].items()}


def encoding(name: str, **options: Any) -> Any:
    """What an oracle knows of an encoding: the name of its class, and its options."""
    return type(name, (SimpleNamespace,), {})(**OPTIONS | options)


def make(
    name: str,
    weights: dict[str, Tensor] | None = None,
    *,
    causal: bool = True,
    positions: Tensor | None = None,
    heads: int = H,
    **options: Any,
) -> Call:
    """A call with random q, k (B, H, T, D) and x (B, T, C)."""
    q, k, x = randn(B, heads, T, D), randn(B, heads, T, D), randn(B, T, C)
    tokens = place(x, positions, None, None, causal, None)
    weights = draw(name) if weights is None else weights
    return Call(encoding(name, **options), weights, q, k, x, tokens)


def score(call: Call, **changes: Any) -> Tensor:
    call = call._replace(**changes)
    return zoo_oracles.SCORES[type(call.encoding).__name__](call)


def bias_of(call: Call) -> Tensor:
    """What is added to q.k/sqrt(D)."""
    return score(call) - oracles.dot_scores(call.q, call.k)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def past(scores: Tensor) -> Tensor:
    """Entries with n <= m, zeros elsewhere."""
    return scores.tril()


def apart() -> Tensor:
    """m - n (T, T)."""
    return torch.arange(T)[:, None] - torch.arange(T)


# what all of them do with a row of tokens


def layer(x: Tensor, name: str, weights: dict[str, Tensor], **features: Any) -> Tensor:
    """Output of a layer with G key heads, where `weights` are not of H of them."""
    groups = features.pop("num_kv_heads", G)
    sizes = {"num_heads": H, "num_kv_heads": groups, "head_dim": D}
    return attention_layer(x, weights, encoding=encoding(name), **sizes | features)[0]


def layer_weights(name: str) -> dict[str, Tensor]:
    own = {f"encoding.{which}": w for which, w in draw(name, G).items()}
    return own | {"c_attn.weight": randn((H + 2 * G) * D, C) / 2, "c_proj.weight": randn(C, H * D)}


@EVERY_SIDE
def test_packed_documents_are_documents_alone(name: str, causal: bool) -> None:
    x, weights = randn(1, T, C), layer_weights(name)
    features = {"causal": causal, "window": 4}
    y = layer(x, name, weights, segments=torch.tensor([[4, 4, 4, 0, 9, 9, 9, 9, 9]]), **features)
    for start, stop in pairwise((0, 3, 4, 9)):
        close(y[:, start:stop], layer(x[:, start:stop], name, weights, **features))


@EVERY_SIDE
@pytest.mark.parametrize("places", ["000111111", "111111000", "101100110"])
def test_padded_rows_are_rows_alone(name: str, causal: bool, places: str) -> None:
    x, weights = randn(1, T, C), layer_weights(name)
    mask = torch.tensor([[place == "1" for place in places]])
    y = layer(x, name, weights, mask=mask, causal=causal)[mask][None]
    alone = layer(x[mask][None], name, weights, causal=causal)
    if name in WITH_TAPS and "101" in places:  # a tap on padding reads 0, it skips none
        differs(y, alone)
    else:
        close(y, alone)


@EVERY
def test_groups_are_repeated_key_heads(name: str) -> None:
    x, weights = randn(1, T, C), layer_weights(name)
    repeated, times = dict(weights), H // G
    q, k, v = weights["c_attn.weight"].unflatten(0, (H + 2 * G, D)).split((H, G, G))
    heads = (q, k.repeat_interleave(times, 0), v.repeat_interleave(times, 0))
    repeated["c_attn.weight"] = torch.cat(heads).flatten(0, 1)
    for which in ("cos_series", "sin_series", "kernel", "beta", "bias", "weight", "W2"):
        if (weight := weights.get(f"encoding.{which}")) is None or name in ("FoX", "FIRE", "GRAPE"):
            continue  # what acts on the logits, and GRAPE's rate, know no key heads
        dim = -1 if which in ("weight", "W2") else 0
        split = weight.movedim(dim, 0).unflatten(0, (G, -1)).repeat_interleave(times, 0)
        repeated[f"encoding.{which}"] = split.flatten(0, 1).movedim(0, dim)
    close(layer(x, name, weights), layer(x, name, repeated, num_kv_heads=H))


@EVERY_SIDE
def test_shift_of_all_positions(name: str, causal: bool) -> None:
    x, weights, where = randn(1, T, C), layer_weights(name), torch.arange(T)
    y = layer(x, name, weights, causal=causal)
    shifted = layer(x, name, weights, causal=causal, positions=where + 70)
    if name in ABSOLUTE:
        differs(shifted, y)
    else:
        close(shifted, y)


@EVERY
def test_last_token_of_a_window_is_that_of_a_short_row(name: str) -> None:
    x, weights = randn(1, T, C), layer_weights(name)
    y, where = layer(x, name, weights, window=4)[:, -1], torch.arange(T)[-4:]
    short = layer(x[:, -4:], name, weights, positions=where)[:, -1]
    if name in WITH_TAPS:  # which reach past the window
        differs(y, short)
    else:
        close(y, short)


@EVERY
def test_later_tokens_change_nothing_before_them(name: str) -> None:
    x, weights = randn(1, T, C), layer_weights(name)
    changed = torch.cat([x[:, :5], randn(1, T - 5, C)], 1)
    close(layer(changed, name, weights)[:, :5], layer(x, name, weights)[:, :5], 1e-12)


# biases


def test_alibi_slopes_by_hand() -> None:
    assert zoo_oracles.alibi_slopes(1) == [2**-8]
    assert zoo_oracles.alibi_slopes(8) == [2**-h for h in range(1, 9)]
    more = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert zoo_oracles.alibi_slopes(12) == [2**-h for h in range(1, 9)] + more


def test_alibi_is_the_authors_bias_of_keys_alone() -> None:
    call = make("ALiBi")
    slopes = tensor([2**-2, 2**-4, 2**-6, 2**-8])
    theirs = oracles.dot_scores(call.q, call.k) + slopes[:, None, None] * torch.arange(T)
    v = randn(B, H, T, D)
    close(oracles.causal_attention(score(call), v), oracles.causal_attention(theirs, v))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [(32, 128), (32, 256), (16, 64), (8, 64), (64, 1024)])
def test_t5_buckets_are_those_of_transformers(sizes: tuple[int, int], causal: bool) -> None:
    pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = range(-3000, 3001)
    ours = [zoo_oracles.t5_bucket(d, *sizes, causal) for d in distances]
    theirs = T5Attention._relative_position_bucket(-torch.tensor(distances), not causal, *sizes)
    assert ours == theirs.tolist()


def test_t5_buckets_by_hand() -> None:
    distances = (-5, 0, 15, 16, 18, 19, 31, 63, 112, 113, 10**6)
    buckets = [zoo_oracles.t5_bucket(d, 32, 128, True) for d in distances]
    assert buckets == [0, 0, 15, 16, 16, 17, 21, 26, 30, 31, 31]
    both = [zoo_oracles.t5_bucket(d, 8, 20, False) for d in (-100, -3, -2, -1, 0, 1, 2, 100)]
    assert both == [7, 6, 6, 5, 0, 1, 2, 3]


def test_t5_adds_the_bucket_s_row() -> None:
    call = make("T5", causal=False)
    buckets = [[zoo_oracles.t5_bucket(m - n, 8, 20, False) for n in range(T)] for m in range(T)]
    expected = call.weights["table"][torch.tensor(buckets)].permute(2, 0, 1)
    close(bias_of(call), expected.expand(B, H, T, T))
    zero = {"table": torch.zeros(8, H).double()}
    close(score(call, weights=zero), oracles.dot_scores(call.q, call.k))


def test_kerple_power_of_one_is_alibi() -> None:
    slopes = tensor(zoo_oracles.alibi_slopes(H))
    weights = {"r1": 4 * slopes, "r2": torch.ones(H).double()}  # the least is not clamped
    call = make("Kerple", weights, kind="power")
    close(bias_of(call), 4 * bias_of(call._replace(encoding=encoding("ALiBi"))))


@pytest.mark.parametrize("kind", ["log", "power"])
def test_kerple_falls_from_zero_and_clamps_straight_through(kind: str) -> None:
    r1, r2 = (tensor([-1.0, 0.5, 1.0, 3.0]).requires_grad_() for _ in range(2))
    call = make("Kerple", {"r1": r1, "r2": r2}, kind=kind)
    bias, d = bias_of(call), apart().abs()
    close(bias.diagonal(dim1=-2, dim2=-1), torch.zeros(B, H, T).double())
    assert (bias[..., -1, :].diff() > 0).all()
    c1, c2 = (
        tensor([0.01, 0.5, 1.0, most])[:, None, None].requires_grad_()
        for most in (3.0, 2.0 if kind == "power" else 3.0)
    )
    expected = -c1 * d**c2 if kind == "power" else -c1 * torch.log1p(c2 * d)
    close(bias, expected.expand_as(bias))
    ours = torch.autograd.grad(bias.sum(), (r1, r2))
    theirs = torch.autograd.grad(B * expected.sum(), (c1, c2))
    for one, other in zip(ours, theirs, strict=True):
        close(one, other.flatten())


def test_fire_is_its_two_layers() -> None:
    call = make("FIRE")
    w = call.weights
    c, threshold = w["c"].abs(), (w["a"] * call.encoding.length).abs()
    m, d = torch.arange(T)[:, None].double(), apart().abs().double()
    z = torch.log1p(c * d) / (torch.log1p(c * m.maximum(threshold)) + 1e-6)
    hidden = F.relu(F.linear(z[..., None], w["W1"], w["b1"]))
    expected = F.linear(hidden, w["W2"], w["b2"]).permute(2, 0, 1)
    close(past(bias_of(call)), past(expected.expand(B, H, T, T)))


@pytest.mark.parametrize("causal", [True, False])
def test_fire_distance_lies_below_one_and_shifts_below_its_threshold(causal: bool) -> None:
    c, a = tensor(-0.4), tensor(0.5)

    def z(m: int, n: int) -> float:
        return zoo_oracles.fire_distance(m, n, c, a, 20, causal).item()

    for m in (1, 7, 10, 11, 3000):
        row = [z(m, n) for n in range(m, -1, -1)]
        assert row == sorted(set(row))
        assert row[0] == 0
        assert row[-1] < 1
    assert z(3, 0) == z(10, 7) > z(11, 8)
    if not causal:
        assert z(3, 11) == z(11, 3)


# running decays


@pytest.mark.parametrize("causal", [True, False])
def test_fox_is_a_difference_of_running_sums(causal: bool) -> None:
    call = make("FoX", causal=causal)
    gates = F.logsigmoid(call.x @ call.weights["weight"] + call.weights["bias"]).mT
    c = gates.cumsum(-1)
    expected = c[..., :, None] - c[..., None, :]
    close(bias_of(call), -expected.abs())
    close(past(bias_of(call)), past(expected))


def test_fox_constant_gates_are_alibi_and_open_ones_nothing() -> None:
    slopes = tensor(zoo_oracles.alibi_slopes(H))
    bias = -torch.log(torch.expm1(slopes))  # -log sigmoid(bias) = log(1 + e^-bias) = slope
    call = make("FoX", {"weight": torch.zeros(C, H).double(), "bias": bias})
    close(score(call), score(call, encoding=encoding("ALiBi")))
    call.weights["bias"] = bias + 50
    close(score(call), oracles.dot_scores(call.q, call.k))


def test_cope_is_the_authors_flipped_sum() -> None:
    call = make("CoPE")
    table, last = call.weights["table"], call.encoding.max_positions - 1
    gates = past(torch.sigmoid(call.q @ call.k.mT / math.sqrt(D)))
    p = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=last)
    logits = call.q @ table.T / math.sqrt(D)  # (B, H, T, P)
    below, above = (logits.gather(-1, side.long()) for side in (p.floor(), p.ceil()))
    expected = torch.lerp(below, above, p - p.floor())
    assert (p == last).any()
    close(past(bias_of(call)), past(expected))
    call.weights["table"] = torch.zeros_like(table)
    close(score(call), oracles.dot_scores(call.q, call.k))


def test_cope_gates_of_one_are_learned_distances() -> None:
    call = make("CoPE")
    q, k = call.q.abs(), 1e3 * call.k.abs()  # sigmoids of 40 and more are 1
    table, zero = call.weights["table"], torch.zeros(H, D).double()
    R = torch.stack([table[min(d + 1, 3)] for d in range(4)]).expand(H, 4, D)
    expected = oracles.relative_learned_scores(q, k, zero, R, R[..., 0] * 0)
    close(past(score(call, q=q, k=k)), past(expected), 1e-12)


# turns


def rope(call: Call, frequencies: Any = None, base: float = 100.0) -> Tensor:
    where = call.tokens.positions
    return oracles.rope_scores(call.q, call.k, where, where, frequencies=frequencies, base=base)


def test_xpos_without_decay_is_rope() -> None:
    call = make("XPos", scale_base=math.inf)
    close(score(call), rope(call))


def test_xpos_is_powers_on_both_sides_and_shifts_far() -> None:
    call = make("XPos")
    i = torch.arange(D // 2).double()
    zeta = ((2 * i + 0.4 * D) / (1.4 * D)).repeat(2)
    power = zeta ** (torch.arange(T).double() / call.encoding.scale_base)[:, None]
    q, k = (oracles.rope_rotate(z, base=100.0) for z in (call.q, call.k))
    close(past(score(call)), past(oracles.dot_scores(q * power, k / power)))
    far = place(call.x, torch.arange(T) + 10**5, None, None, True, None)
    close(score(call, tokens=far), score(call), 1e-9)


def test_pope_is_a_product_of_twice_the_width() -> None:
    call = make("PoPE", causal=False)
    theta = 100.0 ** (-torch.arange(D).double() / D)
    angle = torch.arange(T).double()[:, None] * theta
    delta = call.weights["delta"]

    def wide(z: Tensor, angle: Tensor) -> Tensor:
        sp = torch.log1p(z.exp())
        return torch.cat((sp * angle.cos(), sp * angle.sin()), -1)

    q, k = wide(call.q, angle - delta[:, None]), wide(call.k, angle)
    close(score(call), q @ k.mT / math.sqrt(D))
    close(score(call, weights={"delta": delta + 2 * math.pi}), score(call))


def test_pope_is_that_of_x_transformers() -> None:
    theirs = pytest.importorskip("x_transformers.x_transformers")
    call = make("PoPE")
    delta = -call.weights["delta"].abs()  # theirs is clamped to [-2 pi, 0]
    module = theirs.PolarEmbedding(D, H, base=100)
    with torch.no_grad():
        module.learned_bias.copy_(delta[:, None])
    angle, shift = module(torch.arange(T))
    q = theirs.apply_polar_pos_emb(call.q, angle)
    k = theirs.apply_polar_pos_emb(call.k, angle + shift)
    close(score(call, weights={"delta": delta}), q @ k.mT / math.sqrt(D), 1e-5)


def test_selective_of_rates_of_one_is_rope() -> None:
    call = make("SelectiveRoPE")
    for which in ("beta", "W2"):
        call.weights[which].zero_()
    close(score(call), rope(call))
    close(zoo_oracles.selective_rates(call), torch.ones(B, H, T, D // 2).double())


def test_selective_of_one_token_is_rope_from_the_fourth_on() -> None:
    call = make("SelectiveRoPE")
    del call.weights["beta"]
    x = call.x[:, :1].expand(B, T, C)
    rates = zoo_oracles.selective_rates(call._replace(x=x))
    pieces = F.normalize(x[:, 0].unflatten(-1, (C // D, D)), dim=-1).flatten(1)
    u = (pieces @ call.weights["W1"] @ call.weights["W2"]).unflatten(-1, (H, D // 2))
    expected = (u * call.weights["kernel"].sum(-1))[:, :, None].expand(B, H, T - 3, D // 2)
    close(rates[:, :, 3:], expected, 1e-5)  # of the 1e-6 in their norm
    omega = tensor(oracles.rope_frequencies(D, 100.0))
    angle = torch.arange(T - 3).double()[:, None] * (omega * rates[:, :, -1:])
    q, k = (oracles.rotate(z[:, :, 3:], angle) for z in (call.q, call.k))
    close(score(call, x=x)[..., 3:, 3:], oracles.dot_scores(q, k))


def test_selective_is_a_convolution_and_a_running_sum() -> None:
    call = make("SelectiveRoPE")
    w = call.weights
    pieces = call.x.unflatten(-1, (C // D, D))
    u = (pieces * torch.rsqrt(pieces.square().sum(-1, keepdim=True) + 1e-6)).flatten(2)
    u = F.pad((u @ (w["W1"] @ w["W2"])).mT, (3, 0))
    taps = F.conv1d(u, w["kernel"].flatten(0, 1)[:, None], groups=H * D // 2)
    rates = taps.unflatten(1, (H, D // 2)).mT + w["beta"].exp()[:, None]
    omega = tensor(oracles.rope_frequencies(D, 100.0))
    phases = (omega * rates).cumsum(2)
    close(score(call), oracles.dot_scores(*oracles.carope_rotate(call.q, call.k, phases)))


def test_grape_of_constant_rates_is_rope() -> None:
    call = make("GRAPE")
    call.weights["weight"].zero_()
    rate = torch.sigmoid(call.weights["bias"] / 16)
    close(score(call), rope(call, (call.weights["log_frequencies"].exp() * rate).tolist()))
    published = torch.sigmoid(tensor(math.log(math.expm1(0.001)) / 16))
    assert published.item() == pytest.approx(0.39372, abs=5e-6)


def test_grape_turns_by_the_rates_before_a_token() -> None:
    call = make("GRAPE")
    rates = torch.sigmoid((call.x @ call.weights["weight"] + call.weights["bias"]) / 16)
    sums = rates.cumsum(1) - rates  # (B, T, 1)
    turn = torch.polar(torch.ones_like(sums), sums * call.weights["log_frequencies"].exp())
    q, k = (torch.complex(*z.chunk(2, -1)) * turn[:, None] for z in (call.q, call.k))
    close(score(call), (q @ k.mH).real / math.sqrt(D))


def test_fope_of_one_wave_each_is_rope_whose_slow_bands_stand() -> None:
    one = torch.eye(2).double().expand(H, 2, 2)
    call = make("FoPE", {"cos_series": one, "sin_series": one})
    fast = oracles.rope_frequencies(D, 100.0)[:2]
    close(score(call), rope(call, [*fast, 0.0]))
    one = torch.eye(3).double().expand(H, 3, 3)
    whole = make("FoPE", {"cos_series": one, "sin_series": one}, length=1000)
    close(score(whole), rope(whole))


def test_fope_is_a_sum_over_waves() -> None:
    call = make("FoPE")
    fast = tensor(oracles.rope_frequencies(D, 100.0)[:2])
    angle = torch.arange(T).double()[:, None] * fast
    A = F.pad(angle.cos() @ call.weights["cos_series"], (0, 1), value=1.0)
    S = F.pad(angle.sin() @ call.weights["sin_series"], (0, 1))
    q, k = (torch.complex(*z.chunk(2, -1)) * torch.complex(A, S) for z in (call.q, call.k))
    close(score(call), (q @ k.mH).real / math.sqrt(D))


# reflections


def test_path_is_a_product_of_matrices() -> None:
    call = make("PaTH", draw("PaTH", G))
    w, beta = (per_query_head(z, H) for z in zoo_oracles.path_reflections(call))
    y = F.pad((call.x @ (call.weights["W1"] @ call.weights["W2"])).mT, (2, 0))
    taps = F.conv1d(y, call.weights["kernel"].flatten(0, 1)[:, None], groups=G * D)
    z = F.silu(taps.unflatten(1, (G, D)).mT)
    close(w, per_query_head(z * torch.rsqrt(z.square().sum(-1, keepdim=True) + 1e-6), H))
    householder = torch.eye(D).double() - beta[..., None, None] * w[..., None] * w[..., None, :]
    expected = torch.zeros(B, H, T, T).double()
    for m in range(T):
        for n in range(m + 1):
            product = torch.eye(D).double()
            for t in range(n + 1, m + 1):
                product = product @ householder[:, :, t]
            expected[:, :, m, n] = (call.k[:, :, None, n] @ product @ call.q[:, :, m, :, None])[
                ..., 0, 0
            ] / math.sqrt(D)
    close(past(score(call)), expected)


def test_path_without_reflections_is_nope() -> None:
    call = make("PaTH")
    call.weights["weight"].zero_()
    call.weights["bias"].fill_(-800)
    close(past(score(call)), past(oracles.dot_scores(call.q, call.k)), 1e-12)


def test_path_of_whole_reflections_keeps_lengths() -> None:
    """beta = 2, unit w: at k all unit vectors the scores of a key are a turned q's coordinates."""
    call = make("PaTH", heads=D, weights=draw("PaTH", 1))
    call.weights["weight"].zero_()
    call.weights["bias"].fill_(800)
    call.weights["W1"].mul_(1e4)  # lets the 1e-6 in their norm vanish
    k = torch.eye(D).double()[None, :, None].expand(B, D, T, D)
    q = call.q[:, :1].expand(B, D, T, D)
    lengths = score(call, q=q, k=k).square().sum(1) * D
    close(past(lengths), past(q[:, 0].square().sum(-1)[..., None].expand(B, T, T)), 1e-7)
