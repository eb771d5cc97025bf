"""Where autocast must not reach: phases, routers, and attention that was given fp32 on purpose."""

from contextlib import AbstractContextManager, nullcontext

import torch


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Switch autocast off; casting the inputs alone does not stop it. `meta` has none."""
    # Asked of others alone: torch 2.11 cannot compile the question.
    known = device.type in ("cpu", "cuda")
    if not known and not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
