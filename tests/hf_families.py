"""Small models of the families that `posenc.hf.swap` takes, with odd numbers of everything."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers

from posenc.hf import swap
from posenc.hf.call import Scheme

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT = {
    "n_embd": 48, "n_head": 4, "n_layer": 2, "vocab_size": 61, "n_positions": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
GEMMA = {**GROUPED, "head_dim": 16}
MIXED = ["sliding_attention", "full_attention"]
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False,
    "rope_theta": 10000.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOWS = {"sliding_window": 7, "layer_types": MIXED}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

#: Name, config class, its arguments.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "llama3": ("Llama", {**GROUPED, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 7}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 16}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", {**GEMMA, **WINDOWS}),
    "gemma3": ("Gemma3Text", {**GEMMA, **WINDOWS}),
    "phi": ("Phi", SIZES),
    "phi3": ("Phi3", GROUPED),
    "gpt-oss": ("GptOss", {**GEMMA, **WINDOWS, **EXPERTS, "rope_parameters": YARN}),
    "gpt-neox": ("GPTNeoX", {**SIZES, "rope_parameters": HALF}),
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 8}),
    "gpt2": ("GPT2", GPT),
    "codegen": ("CodeGen", {**GPT, "n_ctx": 128, "rotary_dim": 8}),
    "cohere": ("Cohere", GROUPED),
    "glm": ("Glm", {**GROUPED, "head_dim": 16}),
    "olmo2": ("Olmo2", GROUPED),
    "smollm3": ("SmolLM3", {**GROUPED, "no_rope_layers": [1, 0]}),
    "stablelm": ("StableLm", {**GROUPED, "rope_parameters": HALF}),
    "granite": ("Granite", GROUPED),
    "starcoder2": ("Starcoder2", GROUPED),
}


def build(family: str, **more: Any) -> transformers.PreTrainedModel:
    """A model with random weights, equal at each call, in evaluation mode."""
    name, arguments = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**arguments, **more})
    torch.manual_seed(0)
    make: Callable[[Any], Any] = transformers.AutoModelForCausalLM.from_config
    model = make(config).eval()
    with torch.no_grad():  # as far from zero as trained ones: positions have to count
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def other(model: Any, name: str, **options: Any) -> Any:
    """The model with a scheme whose parameters are not those that it starts from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scaling
        swap(model, name, **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Scheme):
                for parameter in module.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return float((a - b).detach().abs().max())
