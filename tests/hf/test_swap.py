"""`posenc.hf.swap`: what a model computes with another scheme in it, over families and caches."""

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import posenc
from helpers import NAMES

transformers = pytest.importorskip("transformers")

from hf_families import FAMILIES, build, off, other  # noqa: E402
from posenc.hf import balance_loss, swap  # noqa: E402
from posenc.hf.call import Scheme  # noqa: E402

transformers.logging.set_verbosity_error()

NEUTRAL: dict[str, dict[str, Any]] = {
    "rope": {},
    "carope": {},
    "cmha": {},
    "selective": {},
    "grape": {},
    "moh": {"router": "query_norm", "shared": 0, "top_k": 4},
}
SCALED = ("llama3", "gpt-oss")
#: Names that enter a model's own attention.
ENTERING = [name for name in NAMES if name not in ("mha", "sinusoidal", "mdha", "rcmha")]
#: One of each way in which a model takes position, and one with sliding windows.
KINDS = ("llama", "gptj", "gpt2", "gemma3")
#: fp32 through two layers at logits of about 1.
CLOSE = 1e-5

torch.manual_seed(1)
IDS = torch.randint(2, 61, (3, 19))
MASK = torch.ones_like(IDS)
MASK[1, :5] = MASK[2, :2] = 0


def logits(model: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**{"input_ids": IDS, **arguments}).logits
        return found


def generated(model: Any, *, tokens: int = 8, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The text that a left-padded batch goes on with, and its logits."""
    made = model.generate(
        IDS[:, :9], attention_mask=MASK[:, :9], max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, output_logits=True, return_dict_in_generate=True, disable_compile=True,
        **arguments,
    )  # fmt: skip
    return made.sequences, torch.stack(made.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_starts_leave_the_logits(family: str) -> None:
    model = build(family)
    plain, padded = logits(model), logits(model, attention_mask=MASK)
    assert plain.std() > 0.02
    for name, options in NEUTRAL.items():
        if family == "gpt2" or (family in SCALED and name not in ("rope", "moh")):
            continue
        swap(model, name, **options)
        assert off(logits(model), plain) < CLOSE, name
        masked = (logits(model, attention_mask=MASK) - padded) * MASK.unsqueeze(-1)
        assert masked.abs().max() < CLOSE, name


@pytest.mark.parametrize("family", SCALED)
def test_scaling_that_is_lost_is_told(family: str) -> None:
    with pytest.warns(UserWarning, match="scaled"):
        swap(build(family), "carope")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["rope", "carope", "cmha", "moh"])
def test_generating_with_a_cache_equals_without(family: str, name: str) -> None:
    model = other(build(family), name)
    text, scores = generated(model, use_cache=False)
    again, cached = generated(model)
    assert text.equal(again)
    assert off(scores, cached) < CLOSE


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("name", ENTERING)
def test_every_name_padded_cached_and_in_beams(family: str, name: str) -> None:
    model = build(family)
    if name == "xpos" and family == "gptj":
        with pytest.raises(ValueError, match="turns 8 of 12"):
            swap(model, name)
        return
    other(model, name)
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    padded = logits(model, attention_mask=MASK, position_ids=positions)
    for row, kept in enumerate(MASK.bool()):
        alone = logits(model, input_ids=IDS[row, kept].unsqueeze(0))
        assert off(padded[row, kept], alone[0]) < CLOSE
    text, scores = generated(model, use_cache=False)
    again, cached = generated(model)
    assert text.equal(again)
    assert off(scores, cached) < CLOSE
    reads_all = name == "path" or (name == "fox" and family == "gemma3")
    if reads_all:
        with pytest.raises(ValueError, match="DynamicCache"):
            generated(model, cache_implementation="static")
    else:
        _, static = generated(model, cache_implementation="static")
        assert off(scores, static) < CLOSE
    beams, _ = generated(model, num_beams=3, use_cache=False)
    again, _ = generated(model, num_beams=3)
    assert beams.equal(again)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # of a name in transformers
@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
@pytest.mark.parametrize("name", ["rope", "carope", "moh", "fox"])
def test_checkpointed_gradients_are_equal(family: str, name: str) -> None:
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model = other(build(family), name).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
        return {key: parameter.grad for key, parameter in model.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)
    assert all(gradient is not None for gradient in plain.values())
    assert all(off(gradient, recomputed[key]) < CLOSE for key, gradient in plain.items())
    assert any("posenc" in key for key in plain) or name == "rope"


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
@pytest.mark.parametrize("name", ["carope", "fox"])
def test_compiles_whole(family: str, name: str) -> None:
    torch._dynamo.reset()
    model = other(build(family), name)
    plain = logits(model, attention_mask=MASK, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert off(logits(compiled, attention_mask=MASK, use_cache=False), plain) < CLOSE


@pytest.mark.parametrize("name", ["rope", "carope", "alibi"])
def test_a_static_cache_compiles_its_step_once(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = other(build("llama"), name)
    text, _ = generated(model, use_cache=False)
    compiled = model.generate(
        IDS[:, :9], attention_mask=MASK[:, :9], max_new_tokens=8, min_new_tokens=8,
        do_sample=False, cache_implementation="static",
        compile_config=transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None),
    )  # fmt: skip
    assert compiled.equal(text)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("name", ["rope", "carope", "moh", "t5"])
def test_saved_and_loaded(family: str, name: str, tmp_path: Any) -> None:
    model = other(build(family), name)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.model_type == model.config.model_type
    assert off(logits(loaded), logits(model)) == 0
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert sum(isinstance(module, Scheme) for module in base.modules()) == 2


def test_phases_of_a_loaded_model_are_not_rounded(tmp_path: Any) -> None:
    other(build("llama"), "carope").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    encodings = [m.encoding for m in loaded.modules() if isinstance(m, Scheme)]
    assert {p.dtype for one in encodings for p in one.parameters()} == {torch.float32}


def test_nobody_loads_a_swapped_model_without_its_scheme(tmp_path: Any) -> None:
    other(build("llama"), "nope").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "posenc_swapped"
    code = (
        f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "posenc_swapped" in run.stderr


def test_a_cropped_cache_goes_on_as_if_never_longer() -> None:
    for name in ("carope", "fox"):
        model = other(build("llama"), name)
        with torch.no_grad():
            past = model(IDS, use_cache=True).past_key_values
            past.crop(-6)
            after = model(IDS[:, 13:], past_key_values=past).logits
        assert off(after, logits(model)[:, 13:]) < CLOSE, name


def test_swapping_again_replaces_the_scheme() -> None:
    model = build("llama")
    plain, keys = logits(model), set(model.state_dict())
    other(model, "alibi")
    other(model, "carope")
    assert any("posenc" in key for key in model.state_dict())
    swap(model, "rope")
    assert off(logits(model), plain) < CLOSE
    assert set(model.state_dict()) == keys


def test_a_failed_swap_changes_nothing() -> None:
    model = other(build("llama"), "carope")
    plain = logits(model)
    for name, options in (("mdha", {}), ("rope", {"head_dim": 12}), ("carope", {"init": "no"})):
        with pytest.raises(ValueError):
            swap(model, name, **options)
    assert logits(model).equal(plain)


def test_options_of_rope_go_before_those_of_the_config() -> None:
    model = build("llama")
    plain = logits(model)
    swap(model, "rope", scaling={"rope_type": "linear", "factor": 2.0})
    halved = logits(model)
    assert off(halved, plain) > 1e-3
    scaled = build("llama", rope_parameters={
        "rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0,
    })  # fmt: skip
    assert off(halved, logits(scaled)) < CLOSE
    swap(model, "rope", base=500.0)
    theta = build("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert off(logits(model), logits(theta)) < CLOSE


def test_a_bias_is_that_of_posenc() -> None:
    """ALiBi's layer, by hand, from the model's own projections."""
    model = swap(build("llama"), "alibi")
    layer, x = model.model.layers[0].self_attn, torch.randn(2, 7, 48)
    heads = [p(x).unflatten(-1, (-1, 12)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj)]
    v = layer.v_proj(x).unflatten(-1, (-1, 12)).transpose(1, 2).repeat_interleave(2, 1)
    q, k = heads[0], heads[1].repeat_interleave(2, 1)
    at = torch.arange(7)
    bias = posenc.ALiBi(4).score_bias(at, at)
    scores = (q @ k.mT / 12**0.5 + bias.float()).masked_fill(at > at[:, None], -torch.inf)
    y = layer.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    place, _ = model.model.rotary_emb(x, at.unsqueeze(0))
    assert off(layer(x, position_embeddings=(place, None), attention_mask=None)[0], y) < CLOSE


def test_layers_without_position_stay_so() -> None:
    model = build("smollm3")
    other(model, "alibi")
    layer, x = model.model.layers[1].self_attn, torch.randn(1, 7, 48)
    place, _ = model.model.rotary_emb(x, torch.arange(7).unsqueeze(0))
    y, _ = layer(x, position_embeddings=(place, None), attention_mask=None)
    other(model, "nope")
    again, _ = layer(x, position_embeddings=(place, None), attention_mask=None)
    assert y.equal(again)


def test_the_balance_loss_trains_the_router() -> None:
    model = swap(build("llama"), "moh").train()
    with pytest.raises(ValueError, match="no balance loss yet"):
        balance_loss(model)
    model(IDS)
    balance_loss(model).backward()
    routers = [m.router for m in model.modules() if isinstance(m, Scheme)]
    assert all(router.W_r.weight.grad.abs().sum() > 0 for router in routers)
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None  # through the second layer


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # of a name in transformers
@pytest.mark.parametrize("name", ["alibi", "carope"])
def test_lora_and_another_attention_function(name: str) -> None:
    peft = pytest.importorskip("peft")
    model = other(build("llama"), name)
    plain = logits(model)
    model.set_attn_implementation("eager")
    assert off(logits(model), plain) < CLOSE
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert off(logits(adapted), plain) < CLOSE
    adapted.train()(IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None for k, p in adapted.named_parameters() if "lora_B" in k)


def test_bad_input() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="a model of transformers"):
        swap(torch.nn.Linear(2, 2), "rope")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown attention"):
        swap(model, "ropee")
    with pytest.raises(ValueError, match="convolves"):
        swap(model, "rcmha")
    with pytest.raises(ValueError, match="at the model's input"):
        swap(model, "mha")
    with pytest.raises(ValueError, match="stays as it is"):
        swap(model, "rope", window=4)
    with pytest.raises(ValueError, match="what the model turns"):
        swap(model, "rope", rotary_dim=4)
    model.model.layers[1].self_attn.forward = model.model.layers[1].self_attn.forward
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn .*wrapped"):
        swap(model, "rope")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Bloom", {"hidden_size": 48, "n_head": 4, "n_layer": 2, "vocab_size": 61}),
        ("OPT", {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
                 "ffn_dim": 40, "vocab_size": 61, "word_embed_proj_dim": 48}),
        ("DeepseekV3", {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
                        "vocab_size": 61, "n_routed_experts": 4, "num_experts_per_tok": 2,
                        "n_group": 1, "topk_group": 1, "intermediate_size": 40}),
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_taken_is_named(name: str, arguments: dict[str, Any]) -> None:
    config = getattr(transformers, f"{name}Config")(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=rf"layers|h\.0.* \({name}.*Attention\) cannot be swapped"):
        swap(model, "rope")


def test_a_rotation_that_its_config_does_not_tell_is_refused() -> None:
    model = build("llama")
    model.model.rotary_emb.inv_freq *= 1.5
    with pytest.raises(ValueError, match="another formula"):
        swap(model, "rope")


def test_a_cache_with_a_past_of_another_model_is_refused() -> None:
    model = build("llama")
    past = model(IDS, use_cache=True).past_key_values
    swap(model, "carope")
    with pytest.raises(ValueError, match="before this scheme was swapped in"):
        model(IDS, past_key_values=past)


def test_copies_are_apart() -> None:
    model = other(build("llama"), "carope")
    twin = copy.deepcopy(model)
    swap(twin, "nope")
    assert off(logits(twin), logits(model)) > 1e-3
