"""One optimiser step."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from posenc.models.gpt import NO_TARGET
from posenc.routing.moh import AUX_WEIGHT
from posenc.training.parallel import Parallel, whole


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Sequence[Tensor]],
    *,
    grad_clip: float,
    aux_weight: float = AUX_WEIGHT,
    parallel: Parallel,
    autocast: AbstractContextManager[None],
) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of the micro-batches, clip it, and step.

    The loss is the mean over all targets of the step, of every micro-batch and rank, however many
    each holds; the balance loss of routers, which counts tokens, the mean over micro-batches.

    Args:
        module: what `Parallel.wrap` returned.
        batches: this rank's share of each micro-batch: inputs, targets and, packed, segments.
        grad_clip: largest norm, 0 for no limit.
        aux_weight: of the balance loss.

    Returns:
        This rank's share of the loss (cross entropy alone; the mean over ranks is the step's) and
        the gradient's norm before clipping, as tensors on the device: nothing here waits for it.
    """
    total = torch.zeros((), device=parallel.device)
    counts = [int((batch[1] != NO_TARGET).sum()) for batch in batches]
    all_targets = max(1, parallel.total(sum(counts)))
    for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
        # DDP and FSDP take the mean over ranks. By a division, as 1/n is rounded: equal counts
        # then give the bits of a mean over micro-batches.
        share = all_targets / (max(1, count) * parallel.world_size)
        with parallel.accumulating(module, last=i == len(batches) - 1):
            with autocast:
                inputs, targets, *packed = (_move(ids, parallel.device) for ids in batch)
                out = module(inputs, targets, segments=packed[0] if packed else None)
            (out.loss / share + aux_weight * out.aux_loss / len(batches)).backward()
        total += out.loss.detach() / share
    norm = nn.utils.clip_grad_norm_(module.parameters(), grad_clip or float("inf"), foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, whole(norm)


def _move(ids: Tensor, device: torch.device) -> Tensor:
    return ids if device.type == "cpu" else ids.pin_memory().to(device, non_blocking=True)
