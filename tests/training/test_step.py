"""A step's loss is the mean over its targets, however they are spread."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from helpers import tiny_gpt
from posenc.models.gpt import NO_TARGET
from posenc.training.parallel import Parallel
from posenc.training.step import train_step

ALONE = Parallel("none", torch.device("cpu"))


class Recorded(torch.optim.SGD):
    """Keeps the gradients that a step would take."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.taken = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def texts() -> tuple[Tensor, Tensor]:
    """Rows of which some have few targets, and the last none."""
    torch.manual_seed(0)
    ids, targets = torch.randint(29, (2, 6, 7))
    for row, count in enumerate((7, 1, 3, 6, 2, 0)):
        targets[row, count:] = NO_TARGET
    return ids, targets


def gradients(rows: list[slice], ids: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    model = tiny_gpt("rope")
    optimizer = Recorded(model.parameters(), lr=0.1)
    batches = [(ids[part], targets[part]) for part in rows]
    loss, _ = train_step(
        copy.copy(model), optimizer, batches, grad_clip=0.0, parallel=ALONE, autocast=nullcontext()
    )
    return loss, optimizer.taken


@pytest.mark.parametrize(
    "rows",
    [
        [slice(0, 2), slice(2, 4), slice(4, 6)],
        [slice(0, 1), slice(1, 5), slice(5, 6)],
        [slice(i, i + 1) for i in range(6)],
    ],
)
def test_micro_batches_with_unequal_targets_are_one_batch(rows: list[slice]) -> None:
    ids, targets = texts()
    loss, whole = gradients([slice(0, 6)], ids, targets)
    split_loss, split = gradients(rows, ids, targets)
    torch.testing.assert_close(split_loss, loss)
    for actual, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


def test_no_target_at_all_is_a_loss_of_0_without_gradient() -> None:
    ids, targets = texts()
    loss, taken = gradients([slice(0, 3), slice(3, 6)], ids, targets.fill_(NO_TARGET))
    assert loss == 0
    assert not any(gradient.any() for gradient in taken)
    out = tiny_gpt("moh")(ids, targets)
    assert out.loss == 0
    assert out.loss.isfinite()


class TwoRanks(Parallel):
    """One of two ranks whose other one is known: sums as they would be."""

    def __init__(self, others: int) -> None:
        super().__init__("none", torch.device("cpu"), 0, 2)
        object.__setattr__(self, "others", others)

    def total(self, number: int) -> int:
        return number + self.others  # type: ignore[attr-defined]


def test_ranks_with_unequal_targets_weigh_by_them() -> None:
    """The mean over ranks, which DDP takes, is the gradient of all targets."""
    ids, targets = texts()
    loss, whole = gradients([slice(0, 6)], ids, targets)
    counts = [(targets[part] != NO_TARGET).sum().item() for part in (slice(0, 4), slice(4, 6))]
    shares, losses = [], []
    for part, others in ((slice(0, 4), counts[1]), (slice(4, 6), counts[0])):
        torch.manual_seed(1)
        model = tiny_gpt("rope")
        optimizer = Recorded(model.parameters(), lr=0.1)
        found, _ = train_step(
            model, optimizer, [(ids[part], targets[part])], grad_clip=0.0,
            parallel=TwoRanks(int(others)), autocast=nullcontext(),
        )  # fmt: skip
        shares.append(optimizer.taken)
        losses.append(found)
    torch.testing.assert_close(sum(losses) / 2, loss)
    for first, second, expected in zip(*shares, whole, strict=True):
        torch.testing.assert_close((first + second) / 2, expected, rtol=1e-6, atol=1e-9)
