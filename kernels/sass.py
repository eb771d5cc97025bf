"""Loops of compiled kernels: what a tile costs in instructions, read from their machine code.

An innermost loop is the code between a backward branch and its target that holds no other. Its
instructions are those that every warp issues in one turn: what is skipped by a branch within counts
too.
"""

import re
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
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
    )


def tile(found: list[Loop]) -> list[Loop]:
    """The loops that a tile passes through: of those with the most products, which do the same with
    and without a mask, the shortest; and all others that have products.
    """
    most = max((loop.products for loop in found), default=0)
    if not most:
        return []
    whole = min(loop for loop in found if loop.products == most)
    return [whole, *(loop for loop in found if 0 < loop.products < most)]
