"""Names of weights as they are without the wrappers that a part of a model may stand in."""

#: What torch.compile, activation checkpointing, FSDP's first version and DDP add to a name.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")


def plain_name(name: str) -> str:
    """ "h.0._orig_mod.ln_1.weight" -> "h.0.ln_1.weight"."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
