"""`posenc.hf.swap` where models, masks, positions and caches are not the usual ones."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from hf_families import GROUPED, SIZES, build, off, other  # noqa: E402
from posenc.hf import swap  # noqa: E402
from posenc.hf.call import Scheme  # noqa: E402

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")

CLOSE = 1e-5
torch.manual_seed(1)
IDS = torch.randint(2, 61, (2, 19))


def of(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**GROUPED, **arguments})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def logits(model: Any, ids: Tensor = IDS, **arguments: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, **arguments).logits
        return found


READING_ROWS = ["carope", "selective", "grape", "fox", "cope", "path"]
BY_POSITION = ["rope", "cmha", "alibi", "t5", "kerple", "fire", "xpos", "rmha", "fope", "pope"]


@pytest.mark.parametrize("name", READING_ROWS + BY_POSITION)
def test_packed_documents_are_documents_alone(name: str) -> None:
    for family in ("llama", "gpt2", "gptj"):
        if (family, name) == ("gptj", "xpos"):
            continue
        model = other(build(family), name)
        positions = torch.cat((torch.arange(7), torch.arange(12))).unsqueeze(0)
        packed = logits(model, IDS[:1], position_ids=positions, use_cache=False)
        for part in (slice(0, 7), slice(7, 19)):
            alone = logits(model, IDS[:1, part], use_cache=False)
            assert off(packed[:, part], alone) < CLOSE, family


@pytest.mark.parametrize("name", BY_POSITION)
def test_padding_between_turns_counts_for_nothing(name: str) -> None:
    model = other(build("llama"), name)
    real = torch.tensor([[1] * 6 + [0] * 3 + [1] * 10, [1] * 19])
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        past = model(
            IDS[:, :12], attention_mask=real[:, :12], position_ids=positions[:, :12]
        ).past_key_values
        rest = model(
            IDS[:, 12:], attention_mask=real, position_ids=positions[:, 12:], past_key_values=past
        ).logits
    alone = logits(model, IDS[:1, real[0].bool()])
    assert off(rest[:1], alone[:, 9:]) < CLOSE


@pytest.mark.parametrize("name", ["rope", "alibi", "t5", "fox"])
def test_numbers_of_a_mask_count(name: str) -> None:
    model = other(build("llama"), name)
    hidden = torch.full((19, 19), torch.finfo(torch.float32).min).triu(1)[None, None]
    lowered = hidden.clone()
    lowered[..., :5] -= 3
    lowered = lowered.clamp(min=torch.finfo(torch.float32).min)
    plain = logits(model, attention_mask=hidden)
    assert off(plain, logits(model)) < CLOSE
    assert off(plain, logits(model, attention_mask=lowered)) > 1e-3


@pytest.mark.parametrize("name", ["rope", "carope", "alibi", "t5", "fox"])
def test_what_sees_both_sides_goes_on_to(name: str) -> None:
    model = other(of("Llama", is_causal=False), name)
    changed = IDS.clone()
    changed[:, -1] = 5 + (IDS[:, -1] == 5).long()
    assert off(logits(model)[:, 0], logits(model, changed)[:, 0]) > 0


@pytest.mark.parametrize("name", ["pope", "cmha", "alibi"])
def test_the_models_own_scale_counts(name: str) -> None:
    low, high = (
        logits(other(build("granite", attention_multiplier=scale), name)) for scale in (0.02, 0.5)
    )
    assert off(low, high) > 1e-3


def test_a_capped_model_refuses_xpos() -> None:
    with pytest.raises(ValueError, match="softcapping"):
        swap(build("gemma2"), "xpos")


@pytest.mark.parametrize(
    ("name", "arguments", "scheme", "said"),
    [
        ("Falcon", {"alibi": True, "multi_query": False}, "rope", "no layer of .* turns"),
        ("Falcon", {}, "rope", "heads"),
        ("DiffLlama", {}, "fox", "2 times a call"),
        ("GPT2", {"reorder_and_upcast_attn": True}, "rope", "reordered"),
    ],
)
def test_a_model_that_goes_another_way_is_refused_and_stays(
    name: str, arguments: dict[str, Any], scheme: str, said: str
) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    model = of(name, **sizes, **arguments)
    keys, plain = set(model.state_dict()), logits(model)
    with pytest.raises(ValueError, match=said):
        swap(model, scheme)
    assert logits(model).equal(plain)
    assert set(model.state_dict()) == keys
    assert not any(isinstance(module, Scheme) for module in model.modules())


def test_names_of_arguments_may_be_given() -> None:
    """Doge calls its attention function by keyword."""
    model = of("Doge", num_experts=4, keep_window_size=64)
    plain = logits(model)
    swap(model, "moh", router="query_norm", shared=0, top_k=4)
    assert off(logits(model), plain) < CLOSE


def test_a_shared_config_stays_that_of_the_other_model(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**GROUPED)
    one, two = (transformers.LlamaForCausalLM(config) for _ in range(2))
    swap(one, "nope")
    two.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, Scheme) for module in loaded.modules())
    assert one.model.config is one.config
    assert one.model.layers[0].self_attn.config is one.config


@pytest.mark.parametrize("name", ["carope", "cope", "fire", "moh"])
def test_what_a_checkpoint_lacks_starts_as_new(name: str, tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    swap(model, name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=model.config)
    fresh = {key: one for key, one in loaded.named_parameters() if "posenc" in key}
    assert fresh
    assert all(one.isfinite().all() and one.abs().max() < 20 for one in fresh.values())
    assert logits(loaded).isfinite().all()


def test_classes_keep_their_names_and_files() -> None:
    model = build("llama")
    swap(model, "carope")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert isinstance(model, transformers.LlamaForCausalLM)


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
def test_pickled_models_configs_and_caches(family: str) -> None:
    model = other(build(family), "carope")
    again = pickle.loads(pickle.dumps(model))
    assert logits(again).equal(logits(model))
    assert pickle.loads(pickle.dumps(model.config)).posenc == model.config.posenc
    with torch.no_grad():
        past = model(IDS[:, :9], use_cache=True).past_key_values
        past = pickle.loads(pickle.dumps(past))
        rest = model(IDS[:, 9:], past_key_values=past).logits
    assert off(rest, logits(model)[:, 9:]) < CLOSE


@pytest.mark.parametrize(
    ("before", "after"), [(None, "alibi"), ("rope", "alibi"), ("carope", "fox")]
)
def test_a_cache_of_another_scheme_is_refused(before: str | None, after: str) -> None:
    model = build("llama")
    if before is not None:
        swap(model, before)
    past = model(IDS, use_cache=True).past_key_values
    swap(model, after)
    with pytest.raises(ValueError, match="before this scheme was swapped in"):
        model(IDS, past_key_values=past)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_length_that_is_not_followed_is_told(kind: str) -> None:
    scaling: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    if kind == "longrope":
        scaling |= {
            "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
            "original_max_position_embeddings": 32,
        }  # fmt: skip
    with pytest.warns(UserWarning, match="target_length"):
        swap(of("Llama", rope_parameters=scaling), "rope")


def test_a_model_cast_to_half_precision() -> None:
    model = build("llama").to(torch.bfloat16)
    plain = logits(model).float()
    swap(model, "rope")
    assert off(logits(model).float(), plain) < 0.1


def test_offloaded_parameters_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = other(build("llama"), "cope")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded"):
        model(IDS)


def test_quantised_layers_stay_and_nothing_is_half_done() -> None:
    model = build("llama")
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    plain = logits(quantised)
    swap(quantised, "carope")
    assert off(logits(quantised), plain) < CLOSE


def test_smoothed_labels_are_shifted(tmp_path: Path) -> None:
    from posenc.hf import PosencConfig, PosencForCausalLM

    ours = PosencForCausalLM(
        PosencConfig(vocab_size=61, context=32, layers=2, heads=4, embed_dim=24)
    )
    for model in (swap(build("llama"), "rope"), ours.eval()):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), label_smoothing_factor=1e-9, report_to=[], use_cpu=True
        )
        trainer = transformers.Trainer(model, arguments)
        inputs = {"input_ids": IDS, "labels": IDS}
        expected = model(**inputs).loss
        assert off(trainer.compute_loss(model, dict(inputs)), expected) < 1e-4


def test_bad_input() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="one name for all layers"):
        swap(model, ["rope"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scaling must be a mapping"):
        swap(model, "rope", scaling=3)
    with pytest.raises(ValueError, match="a compiled model"):
        swap(torch.compile(model), "rope")
