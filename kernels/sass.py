"""Loops of compiled kernels: what a tile costs in instructions, read from their machine code.

An innermost loop is the code between a backward branch and its target that holds no other. Its
instructions are those that every warp issues in one turn: what is skipped by a branch within counts
too.
"""

import re
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
#: Of a product: HGMMA.64x128x16, HMMA.16816, HMMA.1688.
_COLUMNS = re.compile(r"\b(?:HGMMA\.64x|HMMA\.16(?=8))(\d+?)(?=x|16|8\b)")
_BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")


class Loop(NamedTuple):
    """One turn of an innermost loop, per warp."""

    instructions: int
    wgmma: int  # products of 64 rows, by four warps
    mma: int  # products of 16 rows, by one
    copies: int  # loads that are started early, to shared memory
    loads: int  # other loads from global memory
    stores: int  # to global memory
    barriers: int
    work: int  # multiply-adds of its products, for each of 16 rows and 16 terms of a sum

    @property
    def products(self) -> int:
        return self.wgmma + self.mma


def loops(sass: str) -> list[Loop]:
    """The innermost loops of a kernel that `cuobjdump -sass` has printed, in their order."""
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
    return [_count([text for at, text in code if start <= at <= stop]) for start, stop in inner]


def _count(body: list[str]) -> Loop:
    def of(pattern: str) -> int:
        return sum(re.search(pattern, text) is not None for text in body)

    return Loop(
        instructions=len(body),
        wgmma=of(r"\bHGMMA\b"),
        mma=of(r"\bHMMA\b"),
        copies=of(r"\bLDGSTS\b"),
        loads=of(r"\bLDG\b"),
        stores=of(r"\b(STG|RED|ATOMG)\b"),
        barriers=of(r"\bBAR\b"),
        work=sum(int(found[1]) for text in body if (found := _COLUMNS.search(text))),
    )


def tile(found: list[Loop]) -> list[Loop]:
    """The loops that a tile passes through: those with products, and of several whose products
    do the same work, which differ by their masks, the shortest.
    """
    shortest: dict[int, Loop] = {}
    for loop in found:
        if loop.products:
            shortest[loop.work] = min(loop, shortest.get(loop.work, loop))
    return [shortest[work] for work in sorted(shortest, reverse=True)]
