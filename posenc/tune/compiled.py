"""What launches ask of a GPU, by compiling them for it: spills and shared memory, before any runs.

The machine code is read as `posenc.kernels.inspect_sm90` reads it, so that the same check runs
where there is no GPU.
"""

import ast
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
    spills. Where the constant's cannot be either, or spills as much, nothing is lost.
    """
    why, spilled = judged(gpu, change.launch)
    if why is None and not spilled:
        return None
    if change.before is not None:
        why_before, allowed = judged(gpu, change.before)
        if why_before is not None or (why is None and spilled <= allowed):
            return None
    return why or f"{change.launch.kernel.__name__} spills {spilled} bytes a thread"


def judged(gpu: Gpu, launch: Launch) -> tuple[str | None, int]:
    """Why a launch is impossible, None where it is not, and the bytes a thread that it spills."""
    name = launch.kernel.__name__
    try:
        result = compiled(launch, gpu.target)
        _, spilled = resources(result.asm["cubin"])
    except Exception as failure:  # Triton's, LLVM's or ptxas'
        return f"{name} does not compile: {reason(failure)}", 0
    if result.metadata.shared > gpu.shared:
        return (
            f"{name} takes {result.metadata.shared} bytes of shared memory; a program of this "
            f"device has {gpu.shared}"
        ), spilled
    return None, spilled


@contextmanager
def parsing_in_turn() -> Iterator[None]:
    """Inside, threads parse one after the other: CPython 3.11 has one depth for the trees of all
    threads, and raises SystemError where two build some at a time.
    """
    parse, lock = ast.parse, threading.Lock()

    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return parse(*args, **kwargs)

    ast.parse = locked
    try:
        yield
    finally:
        ast.parse = parse


def refusals(gpu: Gpu, candidates: Mapping[Name, Sequence[Change]]) -> dict[Name, str]:
    """The first refusal of each candidate that has one. Compiles on all processors."""
    asked = [(name, change) for name, changes in candidates.items() for change in changes]
    with parsing_in_turn(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
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
