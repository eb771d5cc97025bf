"""The tasks by name, with what is trained and what is tested, at two scales.

FULL has the sizes of the sources. MINI is for a processor: shorter texts, the same
multiples of the training length, 1 to 4, at test.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from posenc.tasks.addition import Addition
from posenc.tasks.base import Task
from posenc.tasks.copying import KINDS, Copy
from posenc.tasks.flipflop import FlipFlop
from posenc.tasks.groups import GROUPS, Group
from posenc.tasks.parity import Parity
from posenc.tasks.passkey import Passkey
from posenc.tasks.recall import Recall
from posenc.tasks.selective import SelectiveCopy
from posenc.tasks.sorting import Sort, SortNumbers


@dataclass(frozen=True)
class Setting:
    """What a model of one task is trained on, and what it is asked.

    Attributes:
        train: the task of training.
        lengths: those of training, see `posenc.tasks.train_batch`.
        tests: the tasks of the test by their names; the first has the name "".
        at: the lengths of the test, the first being the longest of training.
    """

    train: Task
    lengths: Sequence[int]
    at: Sequence[int]
    tests: Mapping[str, Task]

    @property
    def longest(self) -> int:
        """The longest length of training."""
        return max(self.lengths)


Suite = Mapping[str, Callable[[], Setting]]


def _plain(task: Task, shortest: int, at: Sequence[int]) -> Setting:
    """Trained on all lengths to the first of the test; the test is of the same task."""
    return Setting(task, range(shortest, at[0] + 1), at, {"": task})


def _one_length(task: Task, at: Sequence[int], **others: Task) -> Setting:
    """Trained on the first length of the test alone."""
    return Setting(task, at[:1], at, {"": task, **others})


def _flip_flop(at: Sequence[int]) -> Setting:
    return _one_length(FlipFlop(0.8), at, sparse=FlipFlop(0.98), dense=FlipFlop(0.1))


def _passkey(share: float, at: Sequence[int]) -> Setting:
    from posenc.data.standard_library import standard_library

    train, test = (
        "\n".join(standard_library(split).texts).encode() for split in ("train", "validation")
    )
    return Setting(Passkey(train, share), at[:1], at, {"": Passkey(test)})


def _suite(
    *,
    copy: tuple[int, int, Sequence[int]],
    addition: Sequence[int],
    sort: tuple[int, int, Sequence[int]],
    numbers: Sequence[int],
    parity: Sequence[int],
    recall: tuple[int, int, Sequence[int]],
    selective: tuple[int, Sequence[int]],
    flip_flop: Sequence[int],
    groups: Sequence[int],
    passkey: tuple[float, Sequence[int]],
) -> Suite:
    """All tasks: sizes of the task, the shortest length of training, the lengths of the test."""
    symbols, shortest, copied = copy
    alphabet, least, ordered = sort
    pairs, vocabulary, recalled = recall
    marks, scattered = selective
    return {
        **{kind: partial(_plain, Copy(kind, symbols), shortest, copied) for kind in KINDS},
        "addition": partial(_plain, Addition(), 1, addition),
        "sort": partial(_plain, Sort(alphabet), least, ordered),
        "sort-numbers": partial(_plain, SortNumbers(), least, numbers),
        "parity": partial(_plain, Parity(), 3, parity),
        "mqar": partial(_one_length, Recall(pairs, vocabulary), recalled),
        "selective-copy": partial(_one_length, SelectiveCopy(marks), scattered),
        "flip-flop": partial(_flip_flop, flip_flop),
        **{name: partial(_plain, Group(name), 2, groups) for name in GROUPS},
        "passkey": partial(_passkey, *passkey),
    }


FULL = _suite(
    copy=(100, 4, (20, 25, 28, 30, 40, 60, 80)),
    addition=(8, 9, 10, 12, 16, 24, 32),
    sort=(50, 4, (20, 25, 30, 40, 60, 80)),
    numbers=(20, 25, 30, 40, 60, 80),
    parity=(20, 25, 30, 40, 60, 80),
    recall=(16, 8192, (64, 128, 256)),
    selective=(16, (256, 512, 1024)),
    flip_flop=(512, 1024, 2048),
    groups=(20, 40, 80),
    passkey=(0.01, (512, 1024, 2048)),
)
MINI = _suite(
    copy=(100, 2, (10, 12, 15, 20, 30, 40)),
    addition=(3, 4, 6, 9, 12),
    sort=(20, 2, (10, 12, 15, 20, 30, 40)),
    numbers=(4, 5, 6, 8, 12, 16),
    parity=(8, 10, 12, 16, 24, 32),
    recall=(4, 64, (32, 64, 128)),
    selective=(4, (32, 64, 128)),
    flip_flop=(32, 64, 128),
    groups=(6, 12, 24),
    passkey=(1.0, (128, 256, 512)),
)
