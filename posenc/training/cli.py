"""The command line: flags, presets and --resume into one `TrainConfig`."""

import argparse
import contextlib
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro

from posenc.errors import unknown
from posenc.training import initial
from posenc.training.config import TrainConfig, flag, from_mapping, preset_values
from posenc.training.invocation import program
from posenc.training.parallel import under_torchrun
from posenc.training.run_folder import RunFolder

#: What the weights, or the order of the data, depend on: a resumed run keeps it.
FIXED = [
    "attention",
    "attention_options",
    "layers",
    "heads",
    "embed_dim",
    "context",
    "bias",
    "mlp_dim",
    "vocab_size",
    "tokenizer",
    "seed",
    "data_seed",
]


class _Early(argparse.ArgumentParser):
    """Reads the flags that decide the defaults of all others."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("--preset")
        self.add_argument("--out")
        self.add_argument("--resume", nargs="?", const="")
        self.add_argument("--init-from", "--init_from")

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(argv: Sequence[str]) -> TrainConfig:
    """The configuration that the flags ask for.

    Raises:
        ValueError: for unknown flags or values, in one line, with the nearest spelling.
        SystemExit: after --help.
    """
    check_flags(argv)
    early, rest = _Early().parse_known_args(argv)
    if early.resume is None:
        default = TrainConfig(**preset_values(early.preset or "demo"), **_launch())
        if early.init_from is not None:
            default = dataclasses.replace(default, **_initial(early.init_from, rest))
        config = dataclasses.replace(_flags(rest, default), out=early.out)
        if early.init_from is not None:
            initial.check(config, chosen=_names("--tokenizer", rest))
    elif early.resume and early.out and Path(early.resume).resolve() != Path(early.out).resolve():
        raise ValueError(
            f"a resumed run stays in its folder; got --resume {early.resume} and --out {early.out}."
            " Leave --out out, or copy the folder and resume the copy."
        )
    else:
        for name, given in (("--preset", early.preset), ("--init-from", early.init_from)):
            if given is not None:
                raise ValueError(f"{name} cannot change a run that is resumed. Leave it out.")
        config = _resumed(early.resume or early.out, rest)
    if config.data is None:
        raise ValueError(
            f"the preset {config.preset!r} needs its text: --data PATH/input.txt. Tiny Shakespeare "
            "is data/tinyshakespeare/input.txt in github.com/karpathy/char-rnn."
        )
    return config


def _resumed(folder: str | None, rest: Sequence[str]) -> TrainConfig:
    """The stored configuration with the launch's own, then the flags, over it."""
    if folder is None:
        raise ValueError("--resume needs a run folder. Give --resume DIR, or --out DIR --resume.")
    stored = from_mapping(RunFolder(Path(folder)).read_config())
    own = RunFolder(Path(folder)).tokenizer
    if stored.init_from is not None and own.is_file():
        # The source's has been copied, and may be gone.
        stored = dataclasses.replace(stored, tokenizer=str(own.resolve()))
    default = dataclasses.replace(stored, **_launch())
    config = dataclasses.replace(_flags(rest, default), out=folder, resume=folder)
    for name in FIXED:
        was, asked = getattr(stored, name), getattr(config, name)
        if was != asked:
            raise ValueError(
                f"{flag(name)} is {was!r} in the run that is resumed; got {asked!r}. "
                "Leave it out, or start a new run."
            )
    return config


def _initial(source: str, rest: Sequence[str]) -> dict[str, Any]:
    """The fields that the weights of --init-from decide. Options are those of their attention."""
    place = str(Path(source).resolve()) if Path(source).exists() else source  # else of the Hub
    values = {"init_from": place, **initial.read(place).values}
    if _names("--attention", rest):
        del values["attention_options"]
    return values


def _names(name: str, words: Sequence[str]) -> bool:
    """Whether a flag is given."""
    return any(word.partition("=")[0] == name for word in words)


def _launch() -> dict[str, Any]:
    """What belongs to a launch, not to the run: it follows from how this process was started."""
    return {
        "parallel": "ddp" if under_torchrun() else TrainConfig.parallel,
        "device": TrainConfig.device,
        "tracker": TrainConfig.tracker,
    }


def check_flags(argv: Sequence[str]) -> None:
    """Refuse words that look like flags but are none; suggest the nearest.

    Raises:
        ValueError: for the first of them.
    """
    names = [flag(field.name) for field in dataclasses.fields(TrainConfig)]
    known = [*names, "--help", *(f"--no-{name[2:]}" for name in names)]
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if word.startswith("--") and name not in known:
            raise ValueError(unknown("flag", name, known[: len(names) + 1]))


def _flags(argv: Sequence[str], default: TrainConfig) -> TrainConfig:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(TrainConfig, args=list(argv), default=default, prog=program())
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(one_line(said.getvalue())) from None


def one_line(box: str) -> str:
    """The message inside the box that tyro draws around an error."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    message = []
    for line in lines:
        if line.startswith("──"):
            break
        message.append(line)
    text = " ".join(message) or box.strip()
    # tyro opens with the name of what it could not build; the class is ours, not the user's.
    return text.removeprefix(f"Error parsing {TrainConfig.__name__}: ")
