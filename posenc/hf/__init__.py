"""Hugging Face models: another position scheme in theirs, and ours among them.

swap(model, name, **options)        in place
balance_loss(model)                 of the routers of a model with `moh`
"""

from posenc.hf.swap import balance_loss, swap

__all__ = ["balance_loss", "swap"]
