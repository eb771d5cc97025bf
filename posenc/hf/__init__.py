"""Hugging Face models: another position scheme in theirs, and ours among them.

swap(model, name, **options)        in place
balance_loss(model)                 of the routers of a model with `moh`
PosencConfig, PosencForCausalLM     a GPT of ours, known to the Auto classes
"""

from posenc.hf.modeling import PosencConfig, PosencForCausalLM
from posenc.hf.swap import balance_loss, swap

__all__ = ["PosencConfig", "PosencForCausalLM", "balance_loss", "swap"]
