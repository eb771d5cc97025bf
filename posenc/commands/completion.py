"""Completion for the shell, by tyro: `posenc --completion SHELL` prints the script.

It knows the commands, and every flag of `posenc train`.
"""

import sys
from collections.abc import Sequence

import tyro

from posenc.commands.dispatch import COMMANDS
from posenc.errors import unknown
from posenc.training.config import TrainConfig

SHELLS = ("bash", "zsh", "fish")


def nothing() -> None:
    """A command whose words are not completed."""


def main(argv: Sequence[str]) -> int:
    """Print the script of a shell."""
    if len(argv) != 1 or argv[0] not in SHELLS:
        print(f"error: {unknown('shell', ' '.join(argv), SHELLS)}", file=sys.stderr)
        return 2
    commands = {name: TrainConfig if name == "train" else nothing for name in COMMANDS}
    words = ["--tyro-write-completion", argv[0], "-"]
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="posenc", args=words)
    except SystemExit as stop:  # tyro's way to end
        return int(stop.code or 0)
    raise AssertionError("tyro printed no script")
