"""RoPE's scalings as Hugging Face writes them: equal numbers, and nothing ignored."""

from typing import Any

import pytest
import torch

from posenc import RoPE

DIM, LONGEST = 64, 8192
LISTS = {"short_factor": [1 + 0.01 * i for i in range(32)],
         "long_factor": [2 + 0.1 * i for i in range(32)]}  # fmt: skip
SHORT = {"original_max_position_embeddings": 2048}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **SHORT}

#: A mapping as a config holds it, the length that is asked for, and what posenc takes beside it.
MAPPINGS: list[tuple[dict[str, Any], int | None, dict[str, Any]]] = [
    *(
        ({"rope_type": "linear", "factor": factor, "partial_rotary_factor": part}, None, {})
        for factor in (1.0, 8.0)
        for part in (None, 0.5, 1.0)
    ),
    *(
        ({"rope_type": "proportional", "partial_rotary_factor": part, **factor}, None, {})
        for part in (0.25, 0.5, 1.0)
        for factor in ({}, {"factor": 2.0})
    ),
    *(
        (
            {"rope_type": "dynamic", "factor": 4.0},
            length,
            {"original_max_position_embeddings": LONGEST, "target_length": length or LONGEST},
        )
        for length in (None, 100, 20_000)
    ),
    ({"rope_type": "llama3", "factor": 8.0, **LLAMA3}, None, {}),
    *(
        ({"rope_type": "yarn", "factor": 8.0, **SHORT, **options}, None, {})
        for options in (
            {},
            {"attention_factor": 1.3},
            {"mscale": 1.0, "mscale_all_dim": 0.8},
            {"truncate": False},
            {"beta_fast": 16, "beta_slow": 2},
            {"partial_rotary_factor": 0.5},
        )
    ),
    ({"rope_type": "yarn", "factor": None, **SHORT}, None, {"max_position_embeddings": LONGEST}),
    *(
        ({"rope_type": "longrope", "factor": 4.0, **SHORT, **LISTS}, n, {"target_length": n or 1})
        for n in (None, 1000, 5000)
    ),
]


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(("mapping", "length", "ours"), MAPPINGS, ids=lambda value: str(value)[:60])
def test_mappings_give_the_frequencies_of_transformers(
    mapping: dict[str, Any], length: int | None, ours: dict[str, Any], theta: float
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    mapping = {key: value for key, value in mapping.items() if key == "factor" or value is not None}
    mapping["rope_theta"] = theta
    config = transformers.LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        head_dim=DIM,
        max_position_embeddings=LONGEST,
        rope_parameters=dict(mapping),
    )
    expected, factor = ROPE_INIT_FUNCTIONS[mapping["rope_type"]](config, "cpu", seq_len=length)
    before = {**mapping, **ours}
    rope = RoPE(DIM, scaling=before)
    assert before == {**mapping, **ours}  # not written to
    frequencies, attention = rope.frequencies()
    assert rope.base == theta
    torch.testing.assert_close(frequencies, expected.double(), rtol=2e-6, atol=0)
    assert attention == pytest.approx(factor)
    of_config = RoPE.from_config(config, target_length=length)
    assert torch.equal(of_config.frequencies()[0], frequencies)
    assert of_config.frequencies()[1] == attention


def test_a_config_s_plain_mapping_holds_theta_and_the_rotated_share() -> None:
    rope = RoPE(DIM, scaling={"rope_type": "default", "rope_theta": 500_000.0})
    torch.testing.assert_close(rope.frequencies()[0], RoPE(DIM, base=500_000.0).frequencies()[0])
    part = RoPE(DIM, scaling={"rope_type": "default", "partial_rotary_factor": 0.25})
    assert (part.rotary_dim, part.base) == (16, 10_000.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": 1e4, "scaling": {"rope_type": "default", "rope_theta": 5e5}}, "contradicts base"),
        (
            {"rotary_dim": 16, "scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "contradicts rotary_dim=16",
        ),
        (
            {"scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
            r"does not use mrope_section.*layout='sections'",
        ),
        ({"scaling": {"rope_type": "default", "factor": 2.0}}, "does not use factor"),
        ({"scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "not use beta_fast"),
        ({"scaling": {"rope_type": "llama3"}}, "missing"),
        ({"scaling": {"rope_type": "linear", "factor": True}}, "factor must be a number"),
        (
            {"scaling": {"rope_type": "longrope", "factor": 2.0, "target_length": 9, **SHORT,
                         "short_factor": True, "long_factor": [1.0] * 32}},
            "32 positive factors in short_factor.*got True",
        ),
        ({"scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, **SHORT}}, "go together"),
        (
            {"scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0, "mscale": 1.0,
                         "mscale_all_dim": 1.0, **SHORT}},
            "contradicts mscale",
        ),
        ({"scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1, **SHORT}}, "truncate"),
        ({"scaling": "yarn"}, "must be a mapping"),
        ({"partial": "back"}, "unknown RoPE partial"),
        ({"partial": "front", "scaling": {"rope_type": "proportional"}}, "contradicts partial"),
        ({"rotary_dim": 16.0}, "rotary_dim must be even.*got 16.0"),
        ({"scaling": {}}, "needs its rope_type.*proportional"),
        ({"scaling": {"rope_type": ["default"]}}, r"unknown RoPE scaling .*\['default'\]"),
        ({"scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "contradicts type"),
        (
            {"scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, **SHORT}},
            "high_freq_factor above low_freq_factor; got 4.0 and 4.0",
        ),
        (
            {"scaling": {"rope_type": "longrope", "factor": 2.0, "target_length": 9, **LISTS,
                         "original_max_position_embeddings": 1}},
            "at least 2; got 1",
        ),
    ],
)  # fmt: skip
def test_what_a_mapping_would_ignore_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        RoPE(DIM, **arguments)
    assert "\n" not in str(refusal.value)


def test_both_keys_of_a_kind_may_agree_and_no_pair_need_turn() -> None:
    both = {"rope_type": "proportional", "type": "proportional", "partial_rotary_factor": 0.5}
    assert (RoPE(DIM, scaling=both).partial, RoPE(DIM, scaling=both).rotary_dim) == (
        "proportional",
        DIM // 2,
    )
    still = RoPE(DIM, scaling={"rope_type": "proportional", "partial_rotary_factor": 0.0})
    q, k = torch.randn(2, 1, 2, 5, DIM)
    for turned, x in zip(still.rotate(q, k), (q, k), strict=True):
        assert torch.equal(turned, x)
