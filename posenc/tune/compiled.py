"""What launches ask of a GPU, by compiling them for it: spills and shared memory, before any runs.

The machine code is read as `posenc.kernels.inspect_sm90` reads it, so that the same check runs
where there is no GPU.
"""

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch

from posenc.kernels import inspect_sm90, tiles
from posenc.kernels.inspect_sm90 import SHARED_LIMIT, TARGET, Launch, caught, compiled, resources
from posenc.kernels.tiles import Kernel
from posenc.tune.measure import reason

Name = TypeVar("Name", bound=Hashable)
META = torch.device("meta")


class Gpu(NamedTuple):
    """What is compiled for, and the bytes of shared memory that a program may take there."""

    target: Any
    shared: int


H100 = Gpu(TARGET, SHARED_LIMIT)


def gpu_of(device: torch.device) -> Gpu:
    """A GPU of this machine."""
    from triton.runtime import driver

    with torch.cuda.device(device):
        target = driver.active.get_current_target()
        index = torch.cuda.current_device()
    return Gpu(target, driver.active.utils.get_device_properties(index)["max_shared_mem"])


class Change(NamedTuple):
    """A launch with other tiles, and the same one with the constant's, where there is one."""

    launch: Launch
    before: Launch | None


def launches(call: Callable[[], object]) -> list[Launch]:
    """Those of a call, which are not run: what it computes is not to be read."""
    with caught() as found:
        call()
    return found


def changes(launches: Sequence[Launch], before: Sequence[Launch]) -> list[Change]:
    """The launches that are compiled in another way than the same kernel's were before."""
    earlier: dict[str, Iterator[Launch]] = {}
    for launch in before:
        name = launch.kernel.__name__
        earlier.setdefault(name, iter([one for one in before if one.kernel.__name__ == name]))
    found = []
    for launch in launches:
        own = next(earlier.get(launch.kernel.__name__, iter(())), None)
        if own is None or own.kwargs != launch.kwargs:
            found.append(Change(launch, own))
    return found


def refusal(gpu: Gpu, change: Change) -> str | None:
    """Why a launch is not to be: it does not compile, asks for more shared memory than there is, or
    spills where the constant's does not.
    """
    name = change.launch.kernel.__name__
    try:
        result = compiled(change.launch, gpu.target)
        _, spilled = resources(result.asm["cubin"])
    except Exception as failure:  # Triton's, LLVM's or ptxas'
        return f"{name} does not compile: {reason(failure)}"
    if result.metadata.shared > gpu.shared:
        return (
            f"{name} takes {result.metadata.shared} bytes of shared memory; a program of this "
            f"device has {gpu.shared}"
        )
    if not spilled:
        return None
    allowed = 0
    if change.before is not None:
        allowed = resources(compiled(change.before, gpu.target).asm["cubin"])[1]
    return f"{name} spills {spilled} bytes a thread" if spilled > allowed else None


def refusals(gpu: Gpu, candidates: Mapping[Name, Sequence[Change]]) -> dict[Name, str]:
    """The first refusal of each candidate that has one. Compiles on all processors."""
    asked = [(name, change) for name, changes in candidates.items() for change in changes]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        answers = list(pool.map(partial(refusal, gpu), [change for _, change in asked]))
    found: dict[Name, str] = {}
    for (name, _), why in zip(asked, answers, strict=True):
        if why is not None:
            found.setdefault(name, why)
    return found


@cache
def examples() -> dict[Kernel, tuple[str, ...]]:
    """Of each kernel with tiles, the files whose examples launch it."""
    found: dict[Kernel, tuple[str, ...]] = {}
    for family in inspect_sm90.families():
        with tiles.recorded(META) as kernels:
            inspect_sm90.launches(family)
        for kernel in kernels:
            found[kernel] = (*found.get(kernel, ()), family)
    return found


def in_examples(kernel: Kernel, config: Any) -> list[Change]:
    """What a configuration changes in the examples of the kernel files."""
    found: list[Change] = []
    for family in examples().get(kernel, ()):
        with tiles.using(META, {kernel: tiles.constant(kernel)}):
            before = by_name(inspect_sm90.launches(family))
        with tiles.using(META, {kernel: config}):
            after = by_name(inspect_sm90.launches(family))
        for name, own in after.items():
            found += changes(own, before[name])
    return found


def by_name(named: Iterable[tuple[str, Launch]]) -> dict[str, list[Launch]]:
    """The launches of each example."""
    found: dict[str, list[Launch]] = {}
    for name, launch in named:
        found.setdefault(name, []).append(launch)
    return found
