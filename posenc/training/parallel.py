"""Processes: one, or those of torchrun sharing the work by DDP or FSDP2.

All means over ranks are means of equal shares, so that losses and gradients are those of the global
batch. A router's balance loss is the exception: it is a mean over a rank's share, as its authors'.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from posenc.models.gpt import GPT
from posenc.training.errors import PeerFailed
from posenc.training.invocation import torchrun_target
from posenc.training.precision import choose_device

Result = TypeVar("Result")
_PATIENCE = timedelta(hours=2)  # others wait while rank 0 prepares a corpus


@dataclass(frozen=True)
class Parallel:
    """This process among its peers.

    Attributes:
        mode: "none", "ddp" or "fsdp".
        device: of this process.
        rank, world_size: this process, from 0, and how many there are.
    """

    mode: str
    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: GPT) -> nn.Module:
        """Shard `model` in place (fsdp) or wrap it (ddp); call the result to train."""
        if self.mode == "fsdp":
            mesh = init_device_mesh(self.device.type, (self.world_size,))
            for block in model.h:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        if self.mode == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        return model

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around each micro-batch: gradients are averaged over ranks at the last one.

        FSDP averages at every one, because whole gradients are what it has no memory for.
        """
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def total(self, number: int) -> int:
        """The sum of a number of all ranks, over the CPU: no GPU waits for it."""
        if self.world_size == 1:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared)
        return int(shared)

    def highest(self, number: int) -> int:
        """The largest number of all ranks, over the CPU: no GPU waits for it."""
        if self.world_size == 1:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared)

    def on_main(self, action: Callable[[], Result]) -> Result | None:
        """Do something on rank 0 while the others wait.

        Raises:
            PeerFailed: on the other ranks, where it raised on rank 0.
        """
        if self.world_size == 1:
            return action()
        result, failed = None, 1
        try:
            if self.is_main:
                result = action()
            failed = 0
        finally:
            failed = self.highest(failed if self.is_main else 0)
        if failed and not self.is_main:
            raise PeerFailed("rank 0 failed")
        return result

    def share(self, text: str) -> str:
        """Rank 0's text, on all ranks."""
        if self.world_size == 1:
            return text
        shared = [text]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ


@contextmanager
def connect(mode: str, device: str) -> Iterator[Parallel]:
    """Join the processes of torchrun, if --parallel says so, and part at the end.

    Raises:
        ValueError: --parallel and the number of processes do not fit, or there is no such device.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if mode == "none":
        if world_size > 1:
            raise ValueError(
                f"torchrun started {world_size} processes, but --parallel is none. "
                "Give --parallel ddp or fsdp."
            )
        yield Parallel(mode, choose_device(device))
        return
    if not under_torchrun():
        raise ValueError(
            f"--parallel {mode} needs torchrun. "
            f"Start it with: torchrun --nproc-per-node N {torchrun_target()} --parallel {mode} ..."
        )
    own = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if own.type == "cuda":
        torch.cuda.set_device(own)
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Parallel(mode, own, dist.get_rank(), world_size)
    finally:
        dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the ranks hold together; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
