"""RoPE and its scalings."""

import inspect
import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import oracles
from helpers import close, differs, error, randn
from posenc import RoPE
from posenc.encodings.rope import half_to_interleaved, interleaved_to_half
from posenc.encodings.scaling import SCALINGS, scaled_frequencies

B, H, T, D = 2, 3, 9, 12

#: A scaling as a Hugging Face configuration writes it, and the same from the oracles.
SCALED: dict[str, tuple[dict[str, Any], tuple[list[float], float]]] = {
    "linear": ({"factor": 4.0}, oracles.linear_frequencies(D, 4.0)),
    "ntk": ({"factor": 4.0}, oracles.ntk_frequencies(D, 4.0)),
    "dynamic": (
        {"factor": 4.0, "original_max_position_embeddings": 64, "target_length": 200},
        oracles.dynamic_frequencies(D, 4.0, 64, 200),
    ),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 2048},
        oracles.yarn_frequencies(D, 4.0, 2048),
    ),
    "longrope": (
        {
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "target_length": 65,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        },
        oracles.longrope_frequencies(
            D, 4.0, 64, 65, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        ),
    ),
    "llama3": (
        {"factor": 8.0, "original_max_position_embeddings": 512},
        oracles.llama3_frequencies(D, 8.0, 512),
    ),
}
TYPES = pytest.mark.parametrize("rope_type", SCALINGS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def scaling(rope_type: str, **changes: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, **SCALED[rope_type][0], **changes}


def rotated(rope: RoPE, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Queries and keys, always the same ones, turned and stacked."""
    torch.manual_seed(1)
    return torch.stack(rope.rotate(*randn(2, B, H, T, rope.head_dim), positions))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [None, 2, 8])
@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_vectors_are_those_of_the_oracle(pairing: str, rotary_dim: int | None, base: float) -> None:
    options = {"base": base, "pairing": pairing, "rotary_dim": rotary_dim}
    q, k = randn(2, B, H, T, D)
    rope = RoPE(D, **options)
    for positions in (None, torch.arange(T) + 5, torch.randint(1000, (B, T))):
        for ours, x in zip(rope.rotate(q, k, positions), (q, k), strict=True):
            close(ours, oracles.rope_rotate(x, positions, **options))


def test_norms_are_kept_and_position_zero_is_the_identity() -> None:
    q, k = randn(2, B, H, T, D)
    for before, after in zip((q, k), RoPE(D).rotate(q, k), strict=True):
        close(after.norm(dim=-1), before.norm(dim=-1))
        assert torch.equal(after[:, :, 0], before[:, :, 0])


def test_rotations_add_up() -> None:
    q, k = randn(2, B, H, T, D)
    rope, a, b = RoPE(D), torch.arange(T), torch.randint(50, (T,))
    close(torch.stack(rope.rotate(*rope.rotate(q, k, a), b)), torch.stack(rope.rotate(q, k, a + b)))


@pytest.mark.parametrize("shift", [17, 100_000])
def test_scores_ignore_a_shift_of_all_positions(shift: int) -> None:
    q, k = randn(2, B, H, T, D)
    positions = torch.arange(T)
    (a, b), (c, d) = (RoPE(D).rotate(q, k, positions + s) for s in (0, shift))
    close(a @ b.mT, c @ d.mT, 1e-9)


def test_million_positions_in_float32_are_those_in_float64() -> None:
    q, k = randn(2, B, H, 64, 64, dtype=torch.float32)
    positions = 1_000_000 - 32 + torch.arange(64)
    for ours, x in zip(RoPE(64).rotate(q, k, positions), (q, k), strict=True):
        close(ours, oracles.rope_rotate(x.double(), positions), 1e-6)


@pytest.mark.parametrize(
    ("heads", "batch", "dtype"),
    [(1, B, torch.float64), (2, 1, torch.float64), (H, B, torch.float32), (1, 1, torch.bfloat16)],
)
def test_a_single_token_turns_as_among_others(heads: int, batch: int, dtype: torch.dtype) -> None:
    """Keys of fewer heads, of one sequence for all, or of another dtype too."""
    rope, q, k = RoPE(D), randn(B, H, T, D), randn(batch, heads, T, D).to(dtype)
    whole = rope.rotate(q, k)
    for t in (0, T - 1):
        one = rope.rotate(q[..., t : t + 1, :], k[..., t : t + 1, :], torch.tensor([t]))
        for single, among in zip(one, whole, strict=True):
            assert torch.equal(single, among[..., t : t + 1, :])
            assert single.dtype == among.dtype


def test_row_permutations_of_projections_are_inverses() -> None:
    weight = randn(H * D, 7)
    assert torch.equal(interleaved_to_half(half_to_interleaved(weight, H), H), weight)
    moved = half_to_interleaved(weight, H).view(H, D, 7)
    for i in range(D // 2):
        assert torch.equal(moved[:, 2 * i], weight.view(H, D, 7)[:, i])
        assert torch.equal(moved[:, 2 * i + 1], weight.view(H, D, 7)[:, i + D // 2])


def test_interleaved_scores_are_half_split_ones_after_the_permutation() -> None:
    x, wq, wk = randn(B, T, 20), randn(H * D, 20), randn(H * D, 20)

    def scores(pairing: str, *weights: torch.Tensor) -> torch.Tensor:
        q, k = (oracles.project(x, weight, None, H) for weight in weights)
        q, k = RoPE(D, pairing=pairing).rotate(q, k)
        return q @ k.mT

    permuted = (half_to_interleaved(weight, H) for weight in (wq, wk))
    close(scores("interleaved", *permuted), scores("half", wq, wk))


def test_permutation_leaves_features_that_do_not_turn_and_takes_biases() -> None:
    x, turned = randn(B, T, 20), []
    weights, biases = randn(2, H * D, 20), randn(2, H * D)
    for pairing in ("half", "interleaved"):
        heads = []
        for weight, bias in zip(weights, biases, strict=True):
            if pairing == "interleaved":
                weight, bias = (half_to_interleaved(z, H, rotary_dim=8) for z in (weight, bias))
            heads.append(oracles.project(x, weight, bias, H))
        q, k = RoPE(D, pairing=pairing, rotary_dim=8).rotate(*heads)
        turned.append(q @ k.mT)
    close(*turned)
    back = interleaved_to_half(half_to_interleaved(weights[0], H, rotary_dim=8), H, rotary_dim=8)
    assert torch.equal(back, weights[0])


def test_other_shapes_are_refused() -> None:
    q, k = randn(2, B, H, T, D)
    for bad in ((q[..., :4], k), (q, k[..., :4]), (q[:, :, :3], k)):
        with pytest.raises(ValueError, match=f"shape .B, H, T, {D}."):
            RoPE(D).rotate(*bad)


def test_every_argument_changes_the_rotation() -> None:
    changes = {
        "base": 500.0,
        "pairing": "interleaved",
        "rotary_dim": 4,
        "scaling": scaling("linear"),
    }
    elsewhere = {"head_dim", "partial", "axes", "layout", "continuous"}
    assert set(inspect.signature(RoPE).parameters) == changes.keys() | elsewhere
    for name, value in changes.items():
        differs(rotated(RoPE(D, **{name: value})), rotated(RoPE(D)))


def test_two_bases_do_not_share_a_table() -> None:
    first, second = RoPE(D), RoPE(D, base=500_000.0)
    before = rotated(first)
    differs(rotated(second), before)
    assert torch.equal(rotated(first), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 7}, "even head dim .* got 7.* divisible by 2"),
        ({"head_dim": 0}, "even head dim"),
        ({"head_dim": 8, "rotary_dim": 3}, "rotary_dim must be even.*got 3"),
        ({"head_dim": 8, "rotary_dim": 10}, "between 2 and head_dim=8; got 10"),
        ({"head_dim": 8, "rotary_dim": 0}, "rotary_dim"),
        ({"head_dim": 8, "pairing": "halve"}, "Did you mean 'half'"),
        ({"head_dim": 8, "base": 0.0}, "base must be .*got 0.0"),
        ({"head_dim": 8, "base": float("nan")}, "base must be .*got nan"),
        ({"head_dim": 8, "scaling": {"rope_type": "yarm", "factor": 2}}, "Did you mean 'yarn'"),
        ({"head_dim": 8, "scaling": {"rope_type": "linear"}}, "factor"),
        ({"head_dim": 8, "scaling": {"rope_type": "linear", "factor": 0.5}}, "at least 1; got 0.5"),
        ({"head_dim": 8, "scaling": {"rope_type": "linear", "factor": 2, "beta": 1}}, "beta"),
        ({"head_dim": 8, "scaling": {"factor": 2.0}}, "rope_type"),
        ({"head_dim": 8, "scaling": {"rope_type": "linear", "factor": float("inf")}}, "factor"),
        ({"head_dim": 8, "scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoPE(**arguments)


def test_every_scaling_has_an_oracle() -> None:
    assert SCALED.keys() == SCALINGS.keys()


@TYPES
def test_scaled_table_is_the_oracle(rope_type: str) -> None:
    frequencies, factor = scaled_frequencies(D, 10000.0, scaling(rope_type))
    expected, expected_factor = SCALED[rope_type][1]
    close(frequencies, torch.tensor(expected, dtype=torch.float64), 1e-14)
    assert factor == pytest.approx(expected_factor, rel=1e-14)
    assert error(frequencies, scaled_frequencies(D, 10000.0, None)[0]) > 1e-3


@TYPES
def test_scaled_vectors_are_those_of_the_oracle(rope_type: str) -> None:
    frequencies, factor = SCALED[rope_type][1]
    q, k = randn(2, B, H, T, D)
    for ours, x in zip(RoPE(D, scaling=scaling(rope_type)).rotate(q, k), (q, k), strict=True):
        close(ours, oracles.rope_rotate(x, frequencies=frequencies, attention_factor=factor))


@TYPES
def test_scalings_use_the_rotated_width(rope_type: str) -> None:
    rope = RoPE(2 * D, rotary_dim=D, scaling=scaling(rope_type))
    frequencies, factor = SCALED[rope_type][1]
    q, k = randn(2, B, H, T, 2 * D)
    ours, _ = rope.rotate(q, k)
    close(ours, oracles.rope_rotate(q, frequencies=frequencies, attention_factor=factor))
    assert torch.equal(ours[..., D:], q[..., D:])


@TYPES
def test_a_prefix_turns_alike_in_texts_of_any_length(rope_type: str) -> None:
    rope, (q, k) = RoPE(D, scaling=scaling(rope_type)), randn(2, 1, H, 300, D)
    for whole, part in zip(rope.rotate(q, k), rope.rotate(q[:, :, :7], k[:, :, :7]), strict=True):
        assert torch.equal(whole[:, :, :7], part)


@pytest.mark.parametrize(
    ("rope_type", "changes"),
    [
        ("linear", {"factor": 2.0}),
        ("ntk", {"factor": 2.0}),
        ("dynamic", {"factor": 2.0}),
        ("dynamic", {"original_max_position_embeddings": 100}),
        ("dynamic", {"target_length": 100}),
        ("yarn", {"factor": 2.0}),
        ("yarn", {"original_max_position_embeddings": 100}),
        ("yarn", {"beta_fast": 200.0}),
        ("yarn", {"beta_slow": 30.0}),
        ("yarn", {"attention_factor": 1.5}),
        ("yarn", {"mscale": 0.7, "mscale_all_dim": 0.2}),
        ("yarn", {"truncate": False, "original_max_position_embeddings": 2000}),
        ("longrope", {"factor": 2.0}),
        ("longrope", {"original_max_position_embeddings": 32}),
        ("longrope", {"target_length": 64}),
        ("longrope", {"long_factor": [7.0] * 6}),
        ("longrope", {"target_length": 64, "short_factor": [7.0] * 6}),
        ("longrope", {"attention_factor": 1.5}),
        ("llama3", {"factor": 2.0}),
        ("llama3", {"original_max_position_embeddings": 64}),
        ("llama3", {"low_freq_factor": 0.01}),
        ("llama3", {"high_freq_factor": 100.0}),
    ],
)
def test_every_argument_of_a_scaling_changes_it(rope_type: str, changes: Mapping[str, Any]) -> None:
    differs(
        rotated(RoPE(D, scaling=scaling(rope_type, **changes))),
        rotated(RoPE(D, scaling=scaling(rope_type))),
        1e-6,
    )


@TYPES
def test_scalings_are_tested_in_every_argument(rope_type: str) -> None:
    arguments = set(inspect.signature(SCALINGS[rope_type]).parameters) - {"dim", "base", "device"}
    (marks,) = test_every_argument_of_a_scaling_changes_it.pytestmark
    assert {
        key for kind, changes in marks.args[1] if kind == rope_type for key in changes
    } == arguments


def test_yarn_anchor() -> None:
    options = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    frequencies, factor = scaled_frequencies(64, 10000.0, options)
    ratios = (scaled_frequencies(64, 10000.0, None)[0] / frequencies).tolist()
    assert factor == pytest.approx(1.13863, abs=5e-6)
    assert ratios[:9] == pytest.approx([1.0] * 9)
    assert ratios[21:] == pytest.approx([4.0] * 11)
    assert all(a < b for a, b in itertools.pairwise(ratios[8:22]))


def test_yarn_with_a_ramp_of_no_width_stays_finite() -> None:
    options = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}
    frequencies, _ = scaled_frequencies(4, 10000.0, options)
    expected, _ = oracles.yarn_frequencies(4, 4.0, 6)
    close(frequencies, torch.tensor(expected, dtype=torch.float64), 1e-14)


def test_llama3_defaults_are_those_of_the_release() -> None:
    lengths = {"factor": 8.0, "original_max_position_embeddings": 8192}
    ours = scaled_frequencies(128, 500_000.0, {"rope_type": "llama3", **lengths})
    expected, _ = oracles.llama3_frequencies(128, base=500_000.0)
    close(ours[0], torch.tensor(expected, dtype=torch.float64), 1e-14)


def test_longrope_takes_the_long_list_past_the_original_length() -> None:
    at, beyond = (
        scaled_frequencies(D, 10000.0, scaling("longrope", target_length=length))[0]
        for length in (64, 65)
    )
    plain = scaled_frequencies(D, 10000.0, None)[0]
    close(plain / at, torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], dtype=torch.float64))
    close(plain / beyond, torch.arange(1.0, 7).double())
    with pytest.raises(ValueError, match=r"needs 6 .*factors in long_factor"):
        RoPE(D, scaling=scaling("longrope", long_factor=[1.0] * 5))
    factor = scaled_frequencies(D, 10000.0, scaling("longrope", factor=64.0))[1]
    assert factor == pytest.approx(math.sqrt(2))


def test_ntk_needs_two_bands() -> None:
    with pytest.raises(ValueError, match="rotary dim of at least 4; got 2"):
        RoPE(2, scaling={"rope_type": "ntk", "factor": 2.0})


def test_the_older_key_of_a_scaling_is_read() -> None:
    old = {"type": "linear", "factor": 4.0}
    assert torch.equal(rotated(RoPE(D, scaling=old)), rotated(RoPE(D, scaling=scaling("linear"))))
    assert torch.equal(rotated(RoPE(D, scaling={"rope_type": "default"})), rotated(RoPE(D)))
    repeated = scaling("linear", rope_theta=10000.0)
    assert torch.equal(rotated(RoPE(D, scaling=repeated)), rotated(RoPE(D, scaling=old)))


def test_a_scaling_changed_later_changes_nothing() -> None:
    given = scaling("linear")
    rope = RoPE(D, scaling=given)
    before = rotated(rope)
    given["factor"] = 100.0
    assert torch.equal(rotated(rope), before)
