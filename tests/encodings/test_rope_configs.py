"""`RoPE.from_config`: what configs of today and of before say, as transformers reads them."""

import importlib
import warnings
from typing import Any

import pytest
import torch

from posenc import RoPE

#: A model_type, a type of its layers, and the pairs that its attention turns.
MODELS = [
    *((name, None, "half") for name in (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "gpt_oss",
        "gpt_neox", "stablelm", "persimmon", "nemotron", "qwen3_next",
    )),
    *((name, None, "interleaved") for name in ("cohere", "glm", "deepseek_v3", "llama4_text")),
    *((name, kind, "half") for name in ("gemma3_text", "gemma4_text", "modernbert")
      for kind in ("sliding_attention", "full_attention")),
]  # fmt: skip
#: What releases held before `rope_parameters`, as a config.json.
LLAMA = {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 4096}
GEMMA3 = {
    **LLAMA,
    "head_dim": 32,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "layer_types": ["sliding_attention", "full_attention"],
}
NESTED = {**LLAMA, "rope_parameters": {"full": {"rope_theta": 5e5}, "none": None}}


@pytest.mark.parametrize(("name", "layer_type", "pairing"), MODELS)
def test_frequencies_are_those_of_the_model(
    name: str, layer_type: str | None, pairing: str
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[name]()
    package = type(config).__module__.split(".")[-2]
    code = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    embedding = next(
        found for key, found in vars(code).items()
        if key.endswith("RotaryEmbedding") and "Vision" not in key
    )(config.get_text_config())  # fmt: skip
    prefix = "" if layer_type is None else f"{layer_type}_"
    rope = RoPE.from_config(config, layer_type)
    frequencies, factor = rope.frequencies()
    expected = getattr(embedding, f"{prefix}inv_freq").double()
    torch.testing.assert_close(frequencies, expected, rtol=2e-6, atol=0)
    assert factor == pytest.approx(getattr(embedding, f"{prefix}attention_scaling"))
    assert rope.pairing == pairing


@pytest.mark.parametrize(
    ("config", "layer_type", "expected"),
    [
        (LLAMA, None, {"head_dim": 64}),
        ({**LLAMA, "rope_theta": 5e5}, None, {"head_dim": 64, "base": 5e5}),
        (
            {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
            None,
            {"head_dim": 64, "scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {**LLAMA, "model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 500},
            None,
            {"head_dim": 64, "rotary_dim": 16, "base": 500.0},
        ),
        (
            {"model_type": "gptj", "n_embd": 256, "n_head": 4, "rotary_dim": 32},
            None,
            {"head_dim": 64, "rotary_dim": 32, "pairing": "interleaved"},
        ),
        (
            {**LLAMA, "qk_rope_head_dim": 16, "rope_interleave": True},
            None,
            {"head_dim": 16, "pairing": "interleaved"},
        ),
        (GEMMA3, "sliding_attention", {"head_dim": 32}),
        (
            GEMMA3,
            "full_attention",
            {"head_dim": 32, "base": 1e6, "scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        (NESTED, "full", {"head_dim": 64, "base": 5e5}),
        ({"text_config": NESTED}, "full", {"head_dim": 64, "base": 5e5}),
        (
            {**LLAMA, "rope_scaling": {"type": "mrope", "mrope_section": [16, 8, 8]}},
            None,
            {"head_dim": 64, "axes": (32, 16, 16), "layout": "sections"},
        ),
        (
            {**LLAMA, "rope_parameters": {"mrope_section": [12, 10, 10], "mrope_interleaved": True,
                                          "rope_theta": 5e6}},
            None,
            {"head_dim": 64, "base": 5e6, "axes": (24, 20, 20), "layout": "interleaved"},
        ),
        (
            {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            None,
            {"head_dim": 64, "scaling": {"rope_type": "dynamic", "factor": 2.0, "target_length":
             4096, "original_max_position_embeddings": 4096}},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_json_is_read_whole(
    config: dict[str, Any], layer_type: str | None, expected: dict[str, Any]
) -> None:
    made = RoPE.from_config(config, layer_type)
    assert repr(made) == repr(RoPE(**expected)) or made.scaling is not None
    ours, theirs = made.frequencies(), RoPE(**expected).frequencies()
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    assert (made.pairing, made.axes, made.layout) == (
        expected.get("pairing", "half"), expected.get("axes"), expected.get("layout", "blocks"),
    )  # fmt: skip


def test_lengths_are_for_texts_beyond_the_original() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
    config = {**LLAMA, "rope_scaling": scaling, "original_max_position_embeddings": 1024}
    short, long = RoPE.from_config(config), RoPE.from_config(config, target_length=4096)
    torch.testing.assert_close(short.frequencies()[0], 4 * long.frequencies()[0])
    assert short.frequencies()[1] == long.frequencies()[1] > 1


def test_what_a_kind_does_not_use_is_named() -> None:
    config = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32,
                                        "original_max_position_embeddings": 1024}}  # fmt: skip
    with pytest.warns(UserWarning, match="'linear' does not use beta_fast: left out"):
        made = RoPE.from_config(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = RoPE(64, scaling={"rope_type": "linear", "factor": 2.0})
    assert torch.equal(made.frequencies()[0], plain.frequencies()[0])


@pytest.mark.filterwarnings("ignore:.*does not use mscale")
@pytest.mark.parametrize(
    "extra",
    [{"attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 0.5}, {"mscale": 0.7}],
    ids=str,
)
def test_yarn_takes_what_transformers_takes(extra: dict[str, float]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    mapping = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    config = transformers.LlamaConfig(
        **LLAMA, rope_parameters={**mapping, **extra, "rope_theta": 1e4}
    )
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    frequencies, ours = RoPE.from_config(config).frequencies()
    torch.testing.assert_close(frequencies, expected.double(), rtol=2e-6, atol=0)
    assert ours == pytest.approx(factor)


@pytest.mark.parametrize(
    ("config", "layer_type", "message"),
    [
        (NESTED, None, r"turn differently; got layer_type=None.*'full', 'none'"),
        (NESTED, "none", "turn nothing"),
        (NESTED, "sliding", r"no layers of type 'sliding'; it has \['full', 'none'\]"),
        (GEMMA3, None, r"turn differently.*'full_attention', 'sliding_attention'"),
        (LLAMA, "full_attention", r"no layers of type 'full_attention'; it has \[\]"),
        ({"vocab_size": 3}, None, "neither head_dim nor hidden_size"),
        ({**LLAMA, "rope_scaling": {"type": "linaer", "factor": 2.0}}, None, "Did you mean"),
        ({**LLAMA, "rope_scaling": "linear"}, None, "must be a mapping; got 'linear'"),
        ({**LLAMA, "rope_scaling": {"type": "yarn"}, "max_position_embeddings": None}, None,
         "missing"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_configs_say_what_to_do(
    config: dict[str, Any], layer_type: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RoPE.from_config(config, layer_type)


def test_a_released_qwen2_vl_has_sections() -> None:
    transformers = pytest.importorskip("transformers")
    scaling = {"type": "mrope", "mrope_section": [16, 24, 24]}
    config = transformers.CONFIG_MAPPING["qwen2_vl"](
        text_config={"hidden_size": 1024, "num_attention_heads": 8, "rope_scaling": scaling}
    )
    assert RoPE.from_config(config).axes == (32, 48, 48)
