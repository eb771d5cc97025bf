"""`PosencForCausalLM`: our GPT as a model of transformers, for every name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import posenc
from helpers import NAMES

transformers = pytest.importorskip("transformers")

from posenc.hf import PosencConfig, PosencForCausalLM  # noqa: E402

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 61, "context": 40, "layers": 2, "heads": 4, "embed_dim": 24,
}  # fmt: skip
torch.manual_seed(1)
IDS = torch.randint(1, 61, (3, 17))
MASK = torch.ones_like(IDS)
MASK[1, :5] = MASK[2, :2] = 0


def config(name: str, **more: Any) -> PosencConfig:
    # rows of relative tables beyond the text are never read, and have no gradient
    options = {"max_distance": 40} if name in ("rmha", "rcmha") else {}
    return PosencConfig(**SIZES, attention=name, attention_options=options, **more)


def build(name: str, **more: Any) -> PosencForCausalLM:
    torch.manual_seed(0)
    return PosencForCausalLM(config(name, **more)).eval()


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_padding_are_those_of_gpt(name: str) -> None:
    model = build(name)
    plain = model(IDS, labels=IDS)
    ours = model.model(IDS[:, :-1], IDS[:, 1:])
    assert off(plain.logits[:, :-1], ours.logits) < 1e-5
    assert off(plain.loss, ours.loss) < 1e-5
    padded = model(IDS, attention_mask=MASK).logits
    positions = (MASK.cumsum(1) - 1).clamp(min=0)  # as generate gives them
    assert off(padded, model(IDS, attention_mask=MASK, position_ids=positions).logits) == 0
    for row, kept in enumerate(MASK.bool()):
        assert off(padded[row, kept], model(IDS[row, kept][None]).logits[0]) < 1e-5
    assert off(model(IDS, logits_to_keep=2).logits, plain.logits[:, -2:]) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_generates_padded_in_beams_and_by_sampling(name: str) -> None:
    model = build(name)
    given = {"input_ids": IDS[:, :9], "attention_mask": MASK[:, :9], "max_new_tokens": 9}
    greedy = model.generate(**given, do_sample=False)
    assert greedy.equal(model.generate(**given, do_sample=False, use_cache=False))
    ours = model.model.generate(IDS[:, :9], 9, temperature=0, mask=MASK[:, :9].bool())
    assert greedy.equal(ours)
    beams = model.generate(**given, do_sample=False, num_beams=3)
    assert beams.equal(model.generate(**given, do_sample=False, num_beams=3, use_cache=False))
    torch.manual_seed(3)
    drawn = model.generate(**given, do_sample=True, num_return_sequences=2)
    assert drawn.shape == (6, 18)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_by_both(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "theirs")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert type(loaded) is PosencForCausalLM
    assert off(loaded(IDS).logits, model(IDS).logits) == 0
    assert loaded.lm_head.weight is loaded.model.wte.weight
    ours = posenc.GPT.from_pretrained(tmp_path / "theirs")
    assert ours.config == model.model.config
    assert off(ours(IDS).logits, model(IDS).logits) < 1e-6
    model.model.save_pretrained(tmp_path / "run" / "model")
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        again = PosencForCausalLM.from_pretrained(folder)
        assert off(again(IDS).logits, model(IDS).logits) == 0
    half = PosencForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    ours = posenc.GPT.from_pretrained(tmp_path / "theirs").to(torch.bfloat16)
    kinds = {key: one.dtype for key, one in ours.state_dict().items()}
    assert {key: half.model.state_dict()[key].dtype for key in kinds} == kinds
    half(IDS)


@pytest.mark.parametrize("name", NAMES)
def test_trains_checkpointed_and_in_half_precision(name: str) -> None:
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model = build(name).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
        return {key: one.grad for key, one in model.named_parameters() if one.requires_grad}

    plain, again = gradients(False), gradients(True)
    assert all(gradient is not None for gradient in plain.values())
    assert all(off(gradient, again[key]) < 1e-5 for key, gradient in plain.items())
    half = build(name).train().to(torch.bfloat16)
    half(IDS, labels=IDS).loss.backward()


def test_the_balance_loss_is_in_the_loss_of_training() -> None:
    model = build("moh", aux_weight=0.5)
    silent = model(IDS, labels=IDS)
    trained = model.train()(IDS, labels=IDS)
    assert silent.aux_loss > 0
    assert off(trained.loss, silent.loss + 0.5 * silent.aux_loss) < 1e-6
    assert build("rope")(IDS).aux_loss is None


def test_trainer_with_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("carope"), peft.LoraConfig(target_modules="all-linear"))
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=0.05,
        gradient_checkpointing=True, bf16=True, report_to=[], use_cpu=True, logging_steps=1,
        disable_tqdm=True, save_strategy="no", gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_caches_grow_crop_and_change_their_batch() -> None:
    for name in ("carope", "fox", "rcmha"):
        model = build(name)
        whole = model(IDS).logits
        with torch.no_grad():
            past = model(IDS[:, :9], use_cache=True).past_key_values
            past.crop(-3)
            past.batch_select_indices(torch.tensor([2, 0]))
            past.batch_repeat_interleave(2)
            after = model(IDS[[2, 2, 0, 0], 6:], past_key_values=past).logits
            assert off(after, whole[[2, 2, 0, 0], 6:]) < 1e-5
            long = model(IDS[[2, 2, 0, 0]].repeat(1, 9)[:, : 23 if name == "mha" else 130],
                         past_key_values=past)  # fmt: skip
            assert long.past_key_values.get_seq_length() == 17 + 130


def test_patterns_and_grouped_heads(tmp_path: Path) -> None:
    made = PosencConfig(
        **SIZES, attention=("rope:window=5", "nope"), attention_options={"num_kv_heads": 2}
    )
    model = PosencForCausalLM(made).eval()
    model.save_pretrained(tmp_path)
    loaded = PosencForCausalLM.from_pretrained(tmp_path)
    assert off(loaded(IDS).logits, model(IDS).logits) == 0
    assert loaded.generate(IDS, max_new_tokens=12, do_sample=False).equal(
        model.generate(IDS, max_new_tokens=12, do_sample=False, use_cache=False)
    )
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "posenc"


def test_packed_documents_are_documents_alone() -> None:
    positions = torch.cat((torch.arange(5), torch.arange(12))).unsqueeze(0)
    for name in ("rope", "carope", "rcmha", "mha", "fire"):
        model = build(name)
        packed = model(IDS[:1], position_ids=positions).logits
        for part in (slice(0, 5), slice(5, 17)):
            assert off(packed[:, part], model(IDS[:1, part]).logits) < 1e-5, name


def test_micro_batches_share_the_balance_loss() -> None:
    model = build("moh", aux_weight=0.5).train()
    whole = model(IDS, labels=IDS)
    half = model(IDS, labels=IDS, num_items_in_batch=2 * IDS[:, 1:].numel())
    assert off(half.loss, whole.loss / 2) < 1e-6


def test_what_transformers_adds_to_a_config_is_no_part_of_the_model(tmp_path: Path) -> None:
    made = PosencConfig(**SIZES, num_labels=5, output_hidden_states=False, return_dict=False)
    model = PosencForCausalLM(made).eval()
    assert isinstance(model(IDS), tuple)
    model.save_pretrained(tmp_path)
    assert off(posenc.GPT.from_pretrained(tmp_path)(IDS).logits, model(IDS)[0]) < 1e-6
    PosencForCausalLM(PosencConfig(**SIZES, tie_word_embeddings=False)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        posenc.GPT.from_pretrained(tmp_path)


def test_bad_input() -> None:
    model = build("rope")
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=torch.randn(1, 3, 24))
    with pytest.raises(ValueError, match="has no foo, output_attentions"):
        model(IDS, foo=3, output_attentions=True)
    with pytest.raises(ValueError, match="position_ids must have shape"):
        model(IDS, position_ids=torch.arange(17))
    with pytest.raises(ValueError, match="negative"):
        model(IDS, use_cache=True).past_key_values.crop(3)
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        model(IDS, attention_mask=MASK[:, :4])
    with pytest.raises(ValueError, match="leave past_key_values"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="unknown attention"):
        PosencForCausalLM(PosencConfig(**SIZES, attention="ropee"))
