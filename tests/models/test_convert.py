"""posenc.convert: what a model keeps when its attention changes, and what it says of it."""

import logging

import pytest
import torch

import posenc
from helpers import NAMES, close, differs, tiny_gpt
from posenc.zoo import ENCODINGS


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


IDS = torch.arange(13)[None] * 5 % 29
#: Starts that are RoPE.
ROPES = [
    ("carope", {}),
    ("cmha", {}),
    ("grape", {}),
    ("selective", {}),
    ("moh", {"router": "query_norm", "shared": 0, "top_k": 4}),
    ("rope", {}),
]


@pytest.mark.parametrize(("to", "options"), ROPES, ids=lambda value: str(value))
@pytest.mark.parametrize("source", ["rope", "rope:base=500.0,pairing=interleaved,qk_norm=rms",
                                    "rope:num_kv_heads=2,head_dim=8,window=5"])  # fmt: skip
def test_what_starts_as_rope_has_its_logits(
    source: str, to: str, options: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_gpt(source)
    if "qk_norm" in source:
        with torch.no_grad():
            for block in model.h:
                block.attn.q_norm.weight.uniform_(0.5, 2)
                block.attn.k_norm.weight.uniform_(0.5, 2)
    with caplog.at_level(logging.INFO, logger="posenc"):
        made = posenc.convert(model, to, **options)
    # fp32 starts of rates are off by 1e-8
    close(made(IDS).logits, model(IDS).logits, 1e-6)
    (record,) = caplog.records
    assert "logits are equal to rounding" in record.message
    attn, old = made.h[0].attn, model.h[0].attn
    assert (attn.num_kv_heads, attn.head_dim, attn.window) == (
        old.num_kv_heads, old.head_dim, old.window,
    )  # fmt: skip
    assert attn.encoding.base == old.encoding.base
    again = posenc.GPT(made.config).double()
    again.load_state_dict(made.state_dict())
    close(again(IDS).logits, made(IDS).logits)


@pytest.mark.parametrize("to", NAMES)
def test_every_name_follows_rope(to: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_gpt("rope:num_kv_heads=2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="posenc"):
        made = posenc.convert(model, to)
    state = made.state_dict()
    for name, value in before.items():
        assert torch.equal(value, model.state_dict()[name])
        if "encoding" not in name:
            assert torch.equal(value, state[name]), name
    assert made.wte.weight.data_ptr() != model.wte.weight.data_ptr()
    assert made.config.attention == to
    equal = "equal to rounding" in caplog.text
    same = (made(IDS).logits - model(IDS).logits).abs().max() < 1e-5
    assert equal == same
    assert f'converted "rope:num_kv_heads=2" to "{to}"' in caplog.text


def test_parts_that_both_have_are_kept() -> None:
    model = tiny_gpt("moh", attention_options={"encoding": "carope", "shared": 1, "top_k": 2})
    with torch.no_grad():
        model.h[0].attn.encoding.weight.normal_()
    inner = posenc.convert(model, "carope")
    assert torch.equal(inner.h[0].attn.encoding.weight, model.h[0].attn.encoding.weight)
    other = posenc.convert(model, "moh", encoding="rope")
    assert isinstance(other.h[1].attn.encoding, posenc.RoPE)
    assert (other.h[1].attn.router.shared, other.h[1].attn.router.top_k) == (1, 2)
    assert torch.equal(other.h[1].attn.router.W_r.weight, model.h[1].attn.router.W_r.weight)


def test_weights_of_one_name_and_another_meaning_are_not_copied() -> None:
    """CARoPE and FoX both have (C, H) and (H,): rates are no gates."""
    model = tiny_gpt("carope")
    made = posenc.convert(model, "fox")
    differs(made.h[0].attn.encoding.weight, model.h[0].attn.encoding.weight)
    assert made.h[0].attn.encoding.bias.abs().max() == 0


def test_scalings_go_with_rope_into_moh() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    model = tiny_gpt("rope", attention_options={"scaling": scaling})
    made = posenc.convert(model, "moh", router="query_norm", shared=0, top_k=4)
    assert made.h[0].attn.encoding.scaling == model.h[0].attn.encoding.scaling
    close(made(IDS).logits, model(IDS).logits)


def test_patterns_keep_each_layer_s_window() -> None:
    model = tiny_gpt(("rope:window=3", "nope"), layers=3)
    made = posenc.convert(model, "carope")
    assert [block.attn.window for block in made.h] == [3, None, 3]
    assert all(isinstance(block.attn.encoding, posenc.CARoPE) for block in made.h)
    mixed = posenc.convert(model, ("rope", "alibi", "rope:base=100.0"))
    assert [block.attn.window for block in mixed.h] == [3, None, 3]
    assert mixed.h[2].attn.encoding.base == 100.0
    assert isinstance(mixed.h[1].attn.encoding, ENCODINGS["alibi"])


def test_tables_at_the_input_come_and_go(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_gpt("mha")
    with caplog.at_level(logging.INFO, logger="posenc"):
        made = posenc.convert(model, "rope")
    assert made.wpe is None
    assert "not those of before: train on" in caplog.text
    back = posenc.convert(made, "mha")
    assert back.wpe.weight.shape == model.wpe.weight.shape
    differs(back.wpe.weight, model.wpe.weight)
    same = posenc.convert(model, "mha")
    close(same(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("source", "to"),
    [("rmha", "rcmha"), ("rcmha", "rmha"), ("mdha", "rcmha"), ("rcmha", "mdha"),
     ("rope:conv=true", "mdha"), ("t5:buckets=16", "t5:buckets=8")],
)  # fmt: skip
def test_parts_of_other_shapes_start_anew(
    source: str, to: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_gpt(source)
    with caplog.at_level(logging.INFO, logger="posenc"):
        made = posenc.convert(model, to)
    assert "parameters, anew: " in caplog.text
    assert torch.equal(made.h[1].attn.c_attn.weight, model.h[1].attn.c_attn.weight)


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"bias": True}, {}])
def test_options_of_the_module_stay_or_change(options: dict[str, object]) -> None:
    model = tiny_gpt("rope", attention_options={"dropout": 0.1}, bias=True)
    made = posenc.convert(model, "rope:window=4", **options)
    assert made.h[0].attn.dropout == options.get("dropout", 0.1)
    assert made.h[0].attn.window == 4
    assert made.config.attention == "rope"


def test_a_phase_of_the_tokens_keeps_its_base() -> None:
    model = tiny_gpt("carope", attention_options={"source": "token", "base": 500.0})
    assert posenc.convert(model, "rope").h[0].attn.encoding.base == 500.0


def test_images_are_converted_without_being_tried(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_gpt("rope", attention_options={"axes": [4, 2]})
    with caplog.at_level(logging.INFO, logger="posenc"):
        made = posenc.convert(model, "rope", base=50.0)
    assert "not compared" in caplog.text
    assert made.h[0].attn.encoding.axes == (4, 2)


def test_frozen_weights_and_wider_norms_stay() -> None:
    model = tiny_gpt("rope", torch.bfloat16)
    model.wte.requires_grad_(False)
    model.ln_f.float()
    made = posenc.convert(model, "nope")
    assert not made.wte.weight.requires_grad
    assert made.ln_f.weight.dtype == torch.float32
    assert made.h[0].mlp.c_fc.weight.requires_grad


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes a posenc.GPT; got Linear"):
        posenc.convert(torch.nn.Linear(2, 2), "rope")


def test_dtype_and_mode_stay() -> None:
    model = tiny_gpt("rope", torch.bfloat16).train()
    made = posenc.convert(model, "carope")
    assert made.training
    assert made.wte.weight.dtype == torch.bfloat16
    assert made.h[0].attn.encoding.weight.dtype == torch.float32
    assert not posenc.convert(model.eval(), "nope").training


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("ropes", {}, "Did you mean 'rope'"),
        ("rope", {"bases": 3}, "Did you mean 'base'"),
        ("rope", {"num_kv_heads": 2}, "convert keeps the projections; the options change c_attn"),
        (("rope", "mha"), {}, "one table at its input"),
    ],
)
def test_what_cannot_be_is_one_line(to: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        posenc.convert(tiny_gpt("rope"), to, **options)
    assert "\n" not in str(refused.value)
