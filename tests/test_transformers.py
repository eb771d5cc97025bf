"""Third-party comparison: RoPE, its scalings and GPT-2 against Hugging Face transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import close, differs, randn
from posenc import GPT, RoPE
from posenc.encodings.rope import half_to_interleaved
from posenc.encodings.scaling import scaled_frequencies

pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as turn_interleaved
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

HEADS, DIM = 4, 16

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.1 * i for i in range(DIM // 2)],
        "long_factor": [1.0 + i for i in range(DIM // 2)],
    },
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def llama(base: float = 10000.0, length: int = 64, **scaling: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": base, **scaling},
    )


@pytest.mark.parametrize("base", [10000.0, 500_000.0])
def test_rotated_vectors_are_those_of_llama(base: float) -> None:
    q, k = randn(2, 2, HEADS, 50, DIM, dtype=torch.float32)
    positions = torch.arange(50) + 3
    cos, sin = LlamaRotaryEmbedding(llama(base))(q, positions[None])
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    for ours, theirs in zip(RoPE(DIM, base=base).rotate(q, k, positions), expected, strict=True):
        close(ours, theirs, 1e-5)
    # cos and sin themselves: where (1, 0) turns to
    unit = torch.cat([torch.ones(1, 1, 50, DIM // 2), torch.zeros(1, 1, 50, DIM // 2)], -1)
    turned, _ = RoPE(DIM, base=base).rotate(unit, unit, positions)
    close(turned[0, 0, :, : DIM // 2], cos[0, :, : DIM // 2], 1e-5)
    close(turned[0, 0, :, DIM // 2 :], sin[0, :, : DIM // 2], 1e-5)


def test_interleaved_vectors_are_those_of_gptj() -> None:
    q, k = randn(2, 2, HEADS, 50, DIM, dtype=torch.float32)
    angle = torch.arange(50.0)[:, None] * 10000 ** (-torch.arange(0, DIM, 2) / DIM)
    sin, cos = angle.sin()[None], angle.cos()[None]
    for ours, x in zip(RoPE(DIM, pairing="interleaved").rotate(q, k), (q, k), strict=True):
        theirs = turn_interleaved(x.transpose(1, 2), sin, cos).transpose(1, 2)
        close(ours, theirs, 1e-5)


def test_permuted_rows_carry_llama_weights_to_interleaved_rope() -> None:
    x = randn(2, 20, 24, dtype=torch.float32)
    wq, wk = (randn(HEADS * DIM, 24, dtype=torch.float32) for _ in range(2))

    def heads(weight: torch.Tensor) -> torch.Tensor:
        return (x @ weight.T).unflatten(-1, (HEADS, DIM)).transpose(1, 2) / 5

    cos, sin = LlamaRotaryEmbedding(llama())(x, torch.arange(20)[None])
    q, k = apply_rotary_pos_emb(heads(wq), heads(wk), cos, sin)
    permuted = (heads(half_to_interleaved(weight, HEADS)) for weight in (wq, wk))
    ours_q, ours_k = RoPE(DIM, pairing="interleaved").rotate(*permuted)
    close(ours_q @ ours_k.mT, q @ k.mT, 1e-5)


def test_every_scaling_of_both_is_compared() -> None:
    theirs = set(ROPE_INIT_FUNCTIONS) - {"default", "proportional"}
    assert theirs == SCALINGS.keys()


@pytest.mark.parametrize("base", [10000.0, 500_000.0])
@pytest.mark.parametrize("target", [64, 200])
@pytest.mark.parametrize("rope_type", SCALINGS)
def test_scaled_tables_are_theirs(rope_type: str, target: int, base: float) -> None:
    scaling = {"rope_type": rope_type, **SCALINGS[rope_type]}
    config = llama(base, **scaling)
    config.original_max_position_embeddings = 64
    expected, expected_factor = ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=target)
    if rope_type in ("dynamic", "longrope"):
        scaling |= {"original_max_position_embeddings": 64, "target_length": target}
    frequencies, factor = scaled_frequencies(DIM, base, scaling)
    assert ((frequencies / expected).log().abs() < 1e-5).all()
    assert factor == pytest.approx(expected_factor, rel=1e-6)


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_scaled_vectors_are_those_of_llama(rope_type: str) -> None:
    scaling = {"rope_type": rope_type, **SCALINGS[rope_type]}
    q, k = randn(2, 2, HEADS, 50, DIM, dtype=torch.float32)
    cos, sin = LlamaRotaryEmbedding(llama(**scaling))(q, torch.arange(50)[None])
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    ours = RoPE(DIM, scaling=scaling).rotate(q, k)
    for a, b in zip(ours, expected, strict=True):
        close(a, b, 1e-5)
    differs(ours[0], RoPE(DIM).rotate(q, k)[0])


def gpt2(**changes: Any) -> GPT2Config:
    sizes = {"vocab_size": 31, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4}
    return GPT2Config(**sizes | changes)


def write(folder: Path, config: GPT2Config, kind: Any = GPT2LMHeadModel) -> Any:
    """A random GPT-2 of theirs with non-trivial biases and norms, written as safetensors."""
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("activation", "inner"), [("gelu_new", 50), ("gelu", None), ("gelu_pytorch_tanh", 96)]
)
def test_gpt2_checkpoint_gives_equal_logits(
    tmp_path: Path, activation: str, inner: int | None
) -> None:
    theirs = write(tmp_path, gpt2(activation_function=activation, n_inner=inner))
    ours, ids = GPT.from_pretrained(tmp_path), torch.randint(31, (2, 16))
    with torch.no_grad():
        close(ours(ids).logits, theirs(ids).logits, 1e-5)
        loss = theirs(ids, labels=ids).loss
        close(ours(ids[:, :-1], ids[:, 1:]).loss, loss, 1e-5)
    assert ours.config.attention == "mha"
    assert ours.config.gelu == ("none" if activation == "gelu" else "tanh")
    assert ours.num_parameters() == theirs.num_parameters()
    prompt = ids[:, :4]
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    greedy = theirs.generate(prompt, max_new_tokens=6, **options)
    assert torch.equal(ours.generate(prompt, 6, temperature=0), greedy)


def test_gpt2_without_its_output_layer_loads(tmp_path: Path) -> None:
    theirs = write(tmp_path, gpt2(), GPT2Model)
    ours, ids = GPT.from_pretrained(tmp_path), torch.randint(31, (2, 16))
    with torch.no_grad():
        close(ours(ids).logits, theirs(ids).last_hidden_state @ theirs.wte.weight.T, 1e-5)


def test_left_padded_gpt2_gives_equal_logits(tmp_path: Path) -> None:
    theirs = write(tmp_path, gpt2())
    ours, ids = GPT.from_pretrained(tmp_path), torch.randint(31, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    positions = mask.cumsum(1) - 1
    with torch.no_grad():
        options = {"attention_mask": mask, "position_ids": positions.clamp(min=0)}
        expected = theirs(ids, **options).logits
        logits = ours(ids, positions=positions).logits
    close(logits[mask.bool()], expected[mask.bool()], 1e-5)


def test_our_checkpoint_of_a_loaded_gpt2_is_ours(tmp_path: Path) -> None:
    write(tmp_path / "theirs", gpt2())
    ours, ids = GPT.from_pretrained(tmp_path / "theirs"), torch.randint(31, (2, 16))
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(GPT.from_pretrained(tmp_path / "ours")(ids).logits, ours(ids).logits)


def test_dropouts_of_gpt2(tmp_path: Path) -> None:
    write(tmp_path, gpt2(attn_pdrop=0.2, resid_pdrop=0.3, embd_pdrop=0.3))
    ours = GPT.from_pretrained(tmp_path)
    assert (ours.dropout.p, ours.h[0].dropout.p, ours.h[0].attn.dropout) == (0.3, 0.3, 0.2)
    write(tmp_path, gpt2(embd_pdrop=0.4))
    with pytest.warns(UserWarning, match=r"embd_pdrop=0\.4 beside resid_pdrop=0\.1; .* 0\.1 in"):
        ours = GPT.from_pretrained(tmp_path)
    assert (ours.dropout.p, ours.h[0].attn.dropout) == (0.1, 0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"layer_norm_epsilon": 1e-3},
        {"tie_word_embeddings": False},
        {"add_cross_attention": True},
        {"activation_function": "relu"},
        {"attn_pdrop": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_functions_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path, gpt2())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=next(iter(change))):
        GPT.from_pretrained(tmp_path)
