"""Synthetic tasks with one right answer, also beyond the training length (needs posenc[train])."""

from posenc.tasks.addition import Addition
from posenc.tasks.base import (
    Sample,
    Task,
    accuracy,
    exact_match,
    held_out,
    train_batch,
)
from posenc.tasks.copying import Copy
from posenc.tasks.flipflop import FlipFlop
from posenc.tasks.groups import Group
from posenc.tasks.parity import Parity
from posenc.tasks.passkey import Passkey
from posenc.tasks.recall import Recall
from posenc.tasks.selective import SelectiveCopy
from posenc.tasks.sorting import Sort, SortNumbers
from posenc.tasks.suites import FULL, MINI, Setting

__all__ = [
    "FULL",
    "MINI",
    "Addition",
    "Copy",
    "FlipFlop",
    "Group",
    "Parity",
    "Passkey",
    "Recall",
    "Sample",
    "SelectiveCopy",
    "Setting",
    "Sort",
    "SortNumbers",
    "Task",
    "accuracy",
    "exact_match",
    "held_out",
    "train_batch",
]
