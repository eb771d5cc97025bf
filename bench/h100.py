"""What a kernel should take on an H100 by counting alone: a model with nothing fitted.

A processor has three units that its programs ask in turn: the schedulers (four, an instruction a
cycle each), the tensor cores, and the special function units (exp2). Of a piece of work that asks
them for d_1, d_2, d_3 seconds:

    at best     max d                     everything overlaps with everything
    in turns    the time of N programs that go from unit to unit, one after another, and wait
                where another one is: the mean of a closed queueing network (Reiser and Lavenberg
                1980), N the programs that fit on a processor by registers and shared memory

Pieces of work are dealt out in the order of launch, each to the processor that is free first. A
kernel takes as long as the last processor, or as its bytes take from memory or from L2 if that is
longer, and one launch. Left out: latency that nothing hides, bank conflicts, barriers, power.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Machine(NamedTuple):
    """Rates in units a second, of the whole device unless said."""

    name: str
    processors: int = 132
    schedulers: int = 4  # of a processor, an instruction a cycle each
    #: Cycles a second under load; the boost clock of the H100's data sheets is 1.755 (PCIe) to 1.98
    #: (SXM), dense products are at 1.83 by 989 TFLOP/s.
    clock: float = 1.755e9
    #: FLOPs of bf16 products: a reading of a product of 8192 cubed by cuBLAS.
    product: float = 790e12
    #: Of that by mma.sync instead of wgmma: arXiv 2402.13499, recalled.
    mma_share: float = 0.62
    special: int = 16  # results a cycle and processor, CUDA C++ programming guide, table of 9.0
    memory: float = 3.0e12  # bytes, read and written: a reading of copies
    l2: float = 5.5e12  # bytes; read on the PCIe card by Chips and Cheese in 2023, recalled
    launch: float = 2e-6  # seconds from kernel to kernel in a CUDA graph, recalled


H100 = Machine("H100 SXM")
#: The same processors behind a faster memory.
H200 = Machine("H200", memory=4.3e12)
UNITS = ("issue", "tensor cores", "special functions")


class Demand(NamedTuple):
    """Seconds that a piece of work asks of each unit of one processor, and bytes through L2."""

    issue: float
    product: float
    special: float
    moved: float

    @property
    def units(self) -> tuple[float, float, float]:
        """In the order of UNITS."""
        return self[:3]


class Time(NamedTuple):
    """Seconds, and how many of those at best each unit, or memory, binds."""

    best: float
    turns: float
    bound: dict[str, float]

    def __add__(self, other: object) -> "Time":
        if not isinstance(other, Time):
            return NotImplemented
        names = dict.fromkeys((*self.bound, *other.bound))
        both = {name: self.bound.get(name, 0.0) + other.bound.get(name, 0.0) for name in names}
        return Time(self.best + other.best, self.turns + other.turns, both)

    @property
    def binds(self) -> str:
        """What most of the time at best is spent on."""
        return max(self.bound, key=lambda name: self.bound[name])


NOTHING = Time(0.0, 0.0, {})


def in_turns(demands: Sequence[float], programs: int) -> float:
    """Seconds from one piece of work done to the next where `programs` go from unit to unit.

    One alone takes the sum; very many take the largest; two of two equal units 3/2 of one.
    """
    waiting = [0.0] * len(demands)
    between = 0.0
    for present in range(1, programs + 1):
        stays = [own * (1 + queue) for own, queue in zip(demands, waiting, strict=True)]
        between = sum(stays) / present
        if not between:
            return 0.0
        waiting = [stay / between for stay in stays]
    return between


def last_done(pieces: Iterable[float], processors: int) -> float:
    """When the last piece is done, each in its turn given to the processor that is free first."""
    free = [0.0] * processors
    for piece in pieces:
        heapq.heapreplace(free, free[0] + piece)
    return max(free)


def kernel_time(
    pieces: Sequence[Demand], repeats: int, programs: int, bytes_: float, machine: Machine = H100
) -> Time:
    """A kernel that is launched over these pieces of work in their order, `repeats` times over.

    Args:
        programs: that a processor holds at a time.
        bytes_: of its tensors, each once.
    """
    count = repeats * len(pieces)
    held = max(1, min(programs, math.ceil(count / machine.processors)))

    def done(seconds: list[float]) -> float:
        return last_done(seconds * repeats, machine.processors)

    best = done([max(own.units) for own in pieces])
    turns = done([in_turns(own.units, held) for own in pieces])
    asked = [sum(own.units[unit] for own in pieces) for unit in range(len(UNITS))]
    moved = repeats * sum(own.moved for own in pieces)
    passing = {"L2": moved / machine.l2, "memory": bytes_ / machine.memory}
    slowest = max(passing, key=lambda name: passing[name])
    binds = slowest if passing[slowest] > best else UNITS[asked.index(max(asked))]
    best, turns = max(best, passing[slowest]), max(turns, passing[slowest])
    bound = {binds: best, "launches": machine.launch}
    return Time(best + machine.launch, turns + machine.launch, bound)


def operation_time(bytes_: float, flops: float, machine: Machine = H100) -> Time:
    """An operation of torch: its bytes or its products, whichever take longer, and one launch."""
    taken = {"memory": bytes_ / machine.memory, "tensor cores": flops / machine.product}
    binds = max(taken, key=lambda name: taken[name])
    seconds = taken[binds] + machine.launch
    return Time(seconds, seconds, {binds: taken[binds], "launches": machine.launch})


def row_turns(length: int, rows: int, keys: int, share: float = 1.0) -> list[tuple[int, int]]:
    """Turns without and with a mask of each tile of rows over what it sees, last tile first.

    Args:
        share: of the rows, evenly spread, that are gathered into tiles; the others cost nothing.
    """
    kept = round(length * share)
    found = []
    for first in range(0, kept, rows):
        lowest = int(first / share)
        highest = min(int((min(first + rows, kept) - 1) / share), length - 1)
        whole = (lowest + 1) // keys
        found.append((whole, math.ceil((highest + 1) / keys) - whole))
    return found[::-1]


def key_turns(length: int, keys: int, rows: int, share: float = 1.0) -> list[tuple[int, int]]:
    """Turns without and with a mask of each tile of keys over the rows that see it."""
    kept = round(length * share)
    found = []
    for first in range(0, length, keys):
        start = math.floor(first * share)
        seeing = math.ceil((min(first + keys, length) - 1) * share)  # from here on all see all keys
        masked = min(math.ceil((seeing - start) / rows), math.ceil((kept - start) / rows))
        found.append((max(0, math.ceil((kept - start) / rows) - masked), masked))
    return found
