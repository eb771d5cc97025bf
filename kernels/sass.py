"""Loops of compiled kernels: what a tile costs in instructions, read from their machine code.

An innermost loop is the code between a backward branch and its target that holds no other. Its
instructions are those that every warp issues in one turn: what is skipped by a branch within counts
too.
"""

import re
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
#: Products of four warps (64 rows), and of one (16); columns, and the depth.
_WGMMA = re.compile(r"\bHGMMA\.64x(\d+)x(\d+)\b")
_MMA = re.compile(r"\bHMMA\.16(8)(\d+)\b")
#: What passes to or from global memory; words of 4 bytes where it says nothing.
_COPY = re.compile(r"\bLDGSTS\b(\S*)")
_MEMORY = re.compile(r"\b(?:LDG\.\S*\b128|STG|RED|REDG|ATOMG)\b(\S*)")
_WIDTHS = {".128": 16, ".64": 8, "F32x4": 16, "F32x2": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}


class Loop(NamedTuple):
    """One turn of an innermost loop, per warp."""

    instructions: int
    wgmma: int  # products of 64 rows, by four warps
    mma: int  # products of 16 rows, by one
    copies: int  # loads that are started early, to shared memory
    loads: int  # other loads from global memory
    stores: int  # to global memory
    barriers: int
    work: float  # FLOPs of its products

    @property
    def products(self) -> int:
        return self.wgmma + self.mma


class Use(NamedTuple):
    """What a warp asks of a processor's units when it passes through some code once."""

    instructions: int
    special: int  # exp2, sin, rsqrt ..: of the special function units
    wgmma: float  # FLOPs, a warp's quarter of them
    mma: float  # FLOPs
    copied: int  # bytes of global memory, by copies that are started early
    moved: int  # bytes to and from global memory, otherwise


def use(body: list[str]) -> Use:
    """Of these instructions; all lanes move something. Loads of less than 16 bytes a lane are left
    out: they are vectors of which many lanes, and most warps, take the same.
    """
    wgmma = [_WGMMA.search(text) for text in body]
    mma = [_MMA.search(text) for text in body]
    copies, memory = ([kind.search(text) for text in body] for kind in (_COPY, _MEMORY))
    return Use(
        instructions=sum(not text.startswith("NOP") for text in body),
        special=sum("MUFU" in text for text in body),
        wgmma=sum(2 * 16 * int(found[1]) * int(found[2]) for found in wgmma if found),
        mma=sum(2 * 16 * int(found[1]) * int(found[2]) for found in mma if found),
        copied=sum(32 * _width(found[0]) for found in copies if found),
        moved=sum(32 * _width(found[0]) for found in memory if found),
    )


def _width(text: str) -> int:
    return next((size for part, size in _WIDTHS.items() if part in text), 4)


def loops(sass: str) -> list[Loop]:
    """The innermost loops of a kernel that `cuobjdump -sass` has printed, in their order."""
    return [_count(body) for body in split(sass)[0]]


def split(sass: str) -> tuple[list[list[str]], list[str]]:
    """The instructions of each innermost loop, and those outside all of them, in their order."""
    code = [(int(at, 16), text) for at, text in _LINE.findall(sass)]
    spans = []
    for at, text in code:
        found = _BRANCH.search(text)
        if found and int(found[1], 16) < at:
            spans.append((int(found[1], 16), at))
    spans = sorted(set(spans))
    inner = [
        (start, stop)
        for start, stop in spans
        if not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in spans)
    ]
    bodies = [[text for at, text in code if start <= at <= stop] for start, stop in inner]
    rest = [text for at, text in code if not any(start <= at <= stop for start, stop in inner)]
    return bodies, rest


def _count(body: list[str]) -> Loop:
    def of(pattern: str) -> int:
        return sum(re.search(pattern, text) is not None for text in body)

    used = use(body)
    return Loop(
        instructions=len(body),
        wgmma=of(r"\bHGMMA\b"),
        mma=of(r"\bHMMA\b"),
        copies=of(r"\bLDGSTS\b"),
        loads=of(r"\bLDG\b"),
        stores=of(r"\b(STG|RED|ATOMG)\b"),
        barriers=of(r"\bBAR\b"),
        work=used.wgmma + used.mma,
    )


def tile(found: list[Loop]) -> list[Loop]:
    """The loops that a tile passes through: those with products, and of several whose products
    do the same work, which differ by their masks, the shortest.
    """
    shortest: dict[float, Loop] = {}
    for loop in found:
        if loop.products:
            shortest[loop.work] = min(loop, shortest.get(loop.work, loop))
    return [shortest[work] for work in sorted(shortest, reverse=True)]
