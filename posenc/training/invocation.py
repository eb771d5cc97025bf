"""How the trainer was started, as its user would type it again: `train.py` of a clone, or the
command `posenc train`.
"""

import shlex
import sys
from pathlib import Path

SCRIPT = "train.py"


def program() -> str:
    """What usage lines call it."""
    return SCRIPT if Path(sys.argv[0]).name == SCRIPT else "posenc train"


def command(*arguments: object) -> str:
    """The command line with these arguments."""
    start = ["python", SCRIPT] if program() == SCRIPT else ["posenc", "train"]
    return shlex.join([*start, *map(str, arguments)])


def torchrun_target() -> str:
    """What follows torchrun's own flags."""
    return SCRIPT if program() == SCRIPT else "-m posenc train"
