"""The command `posenc`, which is also `python -m posenc`.

    posenc train --attention carope     train a GPT with any name
    posenc bench                        list the benchmarks; posenc bench NAME .. runs one
    posenc tune                         measure this machine, so that impl="auto" takes the fastest
    posenc show kerple kind=power       draw what a scheme does to the logits
    posenc names                        the names, their papers and what decoding remembers
    posenc doctor                       versions, devices and choices, to paste into an issue
    posenc --completion bash            a completion script for the shell

A subcommand's module is imported when it is called: only `train` loads what training needs.
"""

import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import posenc
from posenc.errors import unknown


class Command(NamedTuple):
    """A subcommand: the module whose `main(argv)` runs it, what it does, the extra it needs."""

    module: str
    summary: str
    extra: str | None = None


COMMANDS = {
    "train": Command("posenc.training.main", "train a GPT with any name", "train"),
    "bench": Command(
        "posenc.commands.bench", "measure; without a name, list what there is", "bench"
    ),
    "tune": Command("posenc.tune.__main__", "measure this machine for impl='auto'", "train"),
    "show": Command("posenc.show", "draw what a scheme does to the logits", "train"),
    "names": Command("posenc.commands.names", "list the names that there are"),
    "doctor": Command("posenc.commands.doctor", "describe this machine, to paste into an issue"),
}
COMPLETION = Command("posenc.commands.completion", "print a completion script", "train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand with its words; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        print(posenc.__version__)
        return 0
    if name == "--completion":
        return call(name, COMPLETION, rest)
    if name not in COMMANDS:
        print(f"error: {unknown('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    return call(name, COMMANDS[name], rest)


def in_an_extra(package: str) -> bool:
    """Whether an extra of this project brings what is imported by that name."""
    try:
        wanted = importlib.metadata.requires("posenc") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder: not known
        return True
    names = {re.split(r"[^\w.-]", line)[0].replace("-", "_") for line in wanted if "extra" in line}
    return package in names


def usage() -> str:
    """What there is, a line a subcommand."""
    lines = [f"  {name:<8}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"posenc {posenc.__version__}: position in attention",
            "",
            "posenc COMMAND ..",
            *lines,
            "",
            "posenc COMMAND --help says more; posenc --version; posenc --completion bash|zsh|fish.",
        ]
    )


def call(name: str, command: Command, words: Sequence[str]) -> int:
    """Import the module and run it; its exit code.

    What is not installed is said in one line, a reader that has gone (`| head`) in none.
    """
    try:
        module = importlib.import_module(command.module)
        code: int | None = module.main(words)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        missing = (error.name or "posenc").partition(".")[0]
        if command.extra is None or missing == "posenc" or not in_an_extra(missing):
            raise
        print(
            f"error: posenc {name} needs {missing}, which is not installed. "
            f"pip install 'posenc[{command.extra}]'",
            file=sys.stderr,
        )
        return 1
    except BrokenPipeError:
        # Python flushes once more at its end: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code or 0
