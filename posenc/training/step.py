"""One optimiser step."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from posenc.training.parallel import Parallel, whole

BALANCE = 0.01  # weight of a router's balance loss, from MoH


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    grad_clip: float,
    parallel: Parallel,
    autocast: AbstractContextManager[None],
) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of the micro-batches, clip it, and step.

    Args:
        module: what `Parallel.wrap` returned.
        batches: this rank's share of each micro-batch.
        grad_clip: largest norm, 0 for no limit.

    Returns:
        This rank's mean loss (cross entropy alone) and the gradient's norm before clipping, as
        tensors on the device: nothing here waits for it.
    """
    total = torch.zeros((), device=parallel.device)
    for i, (inputs, targets) in enumerate(batches):
        with parallel.accumulating(module, last=i == len(batches) - 1):
            with autocast:
                out = module(_move(inputs, parallel.device), _move(targets, parallel.device))
            ((out.loss + BALANCE * out.aux_loss) / len(batches)).backward()
        total += out.loss.detach() / len(batches)
    norm = nn.utils.clip_grad_norm_(module.parameters(), grad_clip or float("inf"), foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, whole(norm)


def _move(ids: Tensor, device: torch.device) -> Tensor:
    return ids if device.type == "cpu" else ids.pin_memory().to(device, non_blocking=True)
