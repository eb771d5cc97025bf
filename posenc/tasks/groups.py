"""State tracking, arXiv:2404.08819: the product so far of elements of a group.

    s_1 = g_1        s_t = g_t * s_(t-1)        after reading g_1 .. g_t, s_t is to be said

(g * h)(x) = g(h(x)): permutations act in the order in which they are read, g_1 first. A permutation
of 0 .. k-1 is the tuple (p(0), .., p(k-1)); the tokens number a group's permutations in the order
of these tuples. A5 and S5 are not solvable, which is what makes them hard; S3 is, and Z60 is
commutative. The states are in no ids: each is to be found from the elements alone.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np

from posenc.errors import unknown
from posenc.tasks.base import Ids, Task

GROUPS = ("a5", "s5", "z60", "s3")


def elements(group: str) -> list[tuple[int, ...]]:
    """The permutations of "a5", "s5" or "s3", in the order of their tokens."""
    every = list(permutations(range(int(group[1:]))))
    return [p for p in every if _even(p)] if group[0] == "a" else every


def _even(p: tuple[int, ...]) -> bool:
    swaps = sum(p[i] > p[j] for j in range(len(p)) for i in range(j))
    return swaps % 2 == 0


@lru_cache(maxsize=len(GROUPS))
def products(group: str) -> Ids:
    """The token of g * h by those of g and h: (V, V)."""
    if group == "z60":
        return np.add.outer(np.arange(60), np.arange(60)) % 60
    own = elements(group)
    number = {p: i for i, p in enumerate(own)}
    return np.array([[number[tuple(g[x] for x in h)] for h in own] for g in own])


@dataclass(frozen=True)
class Group(Task):
    """Uniform elements of a group; the length is T.

    Args:
        name: "a5", "s5", "z60" (numbers modulo 60 under +) or "s3".

    Raises:
        ValueError: for another name.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in GROUPS:
            raise ValueError(unknown("group", self.name, GROUPS))

    @property
    def vocab_size(self) -> int:
        return len(products(self.name))

    def draw(self, generator: np.random.Generator, length: int, batch: int) -> tuple[Ids, Ids]:
        table = products(self.name)
        ids = generator.integers(len(table), size=(batch, length))
        states = ids.copy()
        for t in range(1, length):
            states[:, t] = table[ids[:, t], states[:, t - 1]]
        return ids, states
