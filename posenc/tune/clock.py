"""Times side by side."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

#: Short calls are repeated up to so many times as often as long ones.
MORE = 20


def take_turns(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    seconds: float = 0.0,
    *,
    wait: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[float, float, float]]:
    """p20, p50 and p80 in milliseconds over rounds.

    The candidates take turns within every round, so that a slow moment of the machine hits all of
    them, in an order drawn anew: a call after one that runs the same code finds it cached, which
    makes a step of decoding 15% faster.

    Args:
        seconds: to go on for, where the rounds take less, up to `MORE` times as many.
        wait: for the device, after each call.
        clock: seconds.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2):  # warm-up
        begin = clock()
        for run in runs.values():
            run()
        wait()
    once = clock() - begin
    order, draw = list(runs), random.Random(0)
    for _ in range(max(rounds, min(int(seconds / once), MORE * rounds))):
        draw.shuffle(order)
        for name in order:
            run = runs[name]
            start = clock()
            run()
            wait()
            taken[name].append((clock() - start) * 1e3)
    found = {}
    for name, values in taken.items():
        low, middle, high = (sorted(values)[int(len(values) * p)] for p in (0.2, 0.5, 0.8))
        found[name] = (low, middle, high)
    return found
