"""Cells of a comparison: a training run for each match, method and seed, and their losses.

    RUNS/MATCH/METHOD[-lrRATE]-sSEED/      a run folder of train.py, and losses.json once scored
    RUNS/MATCH/METHOD[-lrRATE]-sSEED.log   what the trainer said

Every cell runs in a process of its own. One that is trained and scored is never touched again, one
with a checkpoint goes on from it. RUNS is one grid's at a time.
"""

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from posenc.cost import model_cost, model_flops_per_token
from posenc.models.gpt import GPT
from posenc.training.cli import check_flags, parse
from posenc.training.config import TrainConfig, flag, format_options, from_mapping, parse_options
from posenc.training.precision import autocast, choose_device, choose_dtype
from posenc.training.run_folder import CONFIG, SUMMARY, RunFolder

from . import pool
from .comparison import label
from .losses import Losses, Question, losses, read_losses
from .rows import written

CLOSE = 1e-3  # relative: what counts as matched
#: Of a cell where the user says nothing else: it is scored by this benchmark, not by the trainer.
QUIET = ["--eval-every", "0", "--eval-tokens", "8192", "--sample-tokens", "0"]
MIN_SHARE = TrainConfig.min_lr / TrainConfig.lr
#: Flags that are the grid's own.
OWN = ("attention", "attention_options", "seed", "data_seed", "out", "resume", "parallel")
#: Fields in which a folder may differ from what is asked.
PLACE = ("out", "resume", "cache_dir")


@dataclass(frozen=True)
class Method:
    """A name of the zoo with its options, written NAME or NAME:KEY=VALUE,KEY=VALUE."""

    name: str
    options: tuple[str, ...] = ()  # KEY=VALUE, the value as JSON

    @property
    def values(self) -> dict[str, Any]:
        """The options as values."""
        return parse_options(self.options)

    def __str__(self) -> str:
        return label(self.name, written(self.values))


def method(text: str) -> Method:
    """Read NAME:KEY=VALUE,KEY=VALUE. Raises ValueError for anything else."""
    name, _, options = text.partition(":")
    words = re.split(r",(?=\w+=)", options) if options else []
    return Method(name, tuple(format_options(parse_options(words))))


def method_of(config: TrainConfig) -> Method:
    """The method that a run trains."""
    return Method(config.attention, tuple(format_options(config.attention_options)))


@dataclass(frozen=True, eq=False)
class Cell:
    """One training run.

    Attributes:
        config: what it trains.
        argv: the flags that start it; None for a finished one.
    """

    config: TrainConfig
    argv: Sequence[str] | None = None

    @property
    def folder(self) -> RunFolder:
        assert self.config.out is not None
        return RunFolder(Path(self.config.out))

    @property
    def method(self) -> Method:
        return method_of(self.config)

    @property
    def log(self) -> Path:
        return self.folder.path.with_name(f"{self.folder.path.name}.log")

    @property
    def trained(self) -> bool:
        """Whether it took all its steps: a run may go on after its summary, to more of them."""
        return (self.folder.path / SUMMARY).exists() and (
            self.read(SUMMARY).get("steps") == self.config.steps
        )

    def __str__(self) -> str:
        return str(self.folder.path)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run folder. Raises ValueError if it is none."""
        path = self.folder.path / name
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder.path} is not a finished run: {error}") from error

    def steps(self) -> int:
        """Steps taken so far."""
        if self.trained:
            return self.config.steps
        try:
            with self.folder.metrics.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().split(b"\n")[:-1]  # what follows the last is cut off
        except OSError:
            return 0
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def losses(self, question: Question) -> Losses | None:
        """What it answered, None if it was not asked this question since it was trained.

        A damaged answer is named once, and removed.
        """
        answered = self.folder.path / f"{question.name}.json"
        trained = self.folder.path / SUMMARY
        if not (answered.exists() and self.trained):
            return None
        if answered.stat().st_mtime_ns < trained.stat().st_mtime_ns:
            return None  # of the run as it was before it went on
        try:
            return read_losses(answered.read_text(encoding="utf-8"), question)
        except ValueError as error:
            print(f"{answered} is damaged and will be scored anew: {error}", file=sys.stderr)
            answered.unlink()
            return None

    def check(self) -> None:
        """Raise ValueError where the folder holds another run than is asked."""
        if not (self.folder.path / CONFIG).exists():
            return
        stored = dataclasses.asdict(from_mapping(self.folder.read_config()))
        for name, asked in dataclasses.asdict(self.config).items():
            if name not in PLACE and stored[name] != asked:
                raise ValueError(
                    f"{self} holds a run with {flag(name)} {stored[name]}; this grid asks for "
                    f"{asked}. Choose another --runs, or delete it."
                )


def matched(config: TrainConfig, baseline: TrainConfig, match: str, symbols: int) -> list[str]:
    """The flags that match a method to the baseline; none where nothing need change.

    parameters: the MLPs are as wide as gives the baseline's number. flops: as many steps as cost
    the baseline's training FLOPs, and warm-up and decay in proportion.

    Args:
        symbols: of the vocabulary.

    Raises:
        ValueError: no width of the MLPs gives the number of parameters.
    """
    own, other = config.model(symbols), baseline.model(symbols)
    if match == "parameters":
        sizes = [
            model_cost(shape, 1, config.context).total.parameters
            for shape in (other, own, dataclasses.replace(own, mlp_dim=own.mlp_width + 1))
        ]
        target, size, slope = sizes[0], sizes[1], sizes[2] - sizes[1]
        added = round((target - size) / slope)
        left = target - size - added * slope
        if abs(target - size) <= CLOSE * target:
            return []
        if own.mlp_width + added < 1 or abs(left) > CLOSE * target:
            raise ValueError(
                f"{method_of(config)} has {size:,} parameters, the baseline {target:,}: no width "
                f"of the MLPs comes within {CLOSE:.1%}. Leave --match parameters out."
            )
        return ["--mlp-dim", str(own.mlp_width + added)]
    if match == "flops":
        ratio = model_flops_per_token(other).exact / model_flops_per_token(own).exact
        if abs(ratio - 1) > CLOSE and round(config.steps * ratio) != config.steps:
            scaled = {name: getattr(config, name) for name in ("steps", "warmup", "decay_steps")}
            return [
                word
                for name, value in scaled.items()
                for word in (flag(name), str(round(value * ratio)))
            ]
    return []


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Args:
        runs: the folder of all cells.
        flags: of train.py, for every cell.
        seeds: pairs (initial weights, data).
        rates: the learning rate of each method; none where `flags` has that of all.
    """

    runs: Path
    methods: Sequence[Method]
    baseline: Method
    flags: Sequence[str]
    seeds: Sequence[tuple[int, int]]
    rates: Mapping[Method, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_flags(self.flags)
        for name in (*OWN, *(("lr", "min_lr") if self.rates else ())):
            if any(word.partition("=")[0].replace("_", "-") == flag(name) for word in self.flags):
                raise ValueError(f"{flag(name)} after -- is what the grid varies. Leave it out.")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError("a method is named twice. Name each once.")
        if self.baseline not in self.methods:
            raise ValueError(
                f"the baseline {self.baseline} is not among {', '.join(map(str, self.methods))}. "
                "Name it, or choose another --baseline."
            )

    def cell(self, method: Method, seeds: tuple[int, int], match: str = "tokens",
             extra: Sequence[str] = ()) -> Cell:  # fmt: skip
        """A cell. Raises ValueError for flags that cannot be."""
        name, rate = re.sub(r"[^\w.=,-]+", "-", str(method)), self.rates.get(method)
        if rate is not None:  # decaying to the share of it that is the trainer's default
            extra = [*extra, "--lr", f"{rate:g}", "--min-lr", f"{rate * MIN_SHARE:g}"]
            name += f"-lr{rate:g}"
        name += f"-s{seeds[0]}"
        argv = [*QUIET, *self.flags, *extra, "--attention", method.name, "--attention-options",
                *method.options, "--seed", str(seeds[0]), "--data-seed", str(seeds[1]),
                "--out", str(self.runs / match / name)]  # fmt: skip
        return Cell(parse(argv), argv)

    def cells(self, match: str, symbols: int) -> list[Cell]:
        """The cells of a match, by seed: the mix of fast and slow methods stays the same.

        Raises:
            ValueError: for a model that cannot be built, or matched.
        """
        for method in self.methods:
            with torch.device("meta"):
                GPT(self.cell(method, self.seeds[0]).config.model(symbols))
        found = []
        for seeds in self.seeds:
            baseline = self.cell(self.baseline, seeds)
            for method in self.methods:
                plain = self.cell(method, seeds)
                extra = matched(plain.config, baseline.config, match, symbols)
                found.append(self.cell(method, seeds, match, extra) if extra else plain)
        return found


def finished(folders: Sequence[Path]) -> list[Cell]:
    """Run folders of train.py.

    Raises:
        ValueError: one is not finished, or they are not runs of one recipe.
    """
    cells = []
    for folder in folders:
        stored = from_mapping(RunFolder(folder).read_config())
        cell = Cell(dataclasses.replace(stored, out=str(folder)))
        if not cell.trained:
            raise ValueError(
                f"{folder} is not a finished run: no {SUMMARY} of its {stored.steps} steps. "
                "Train it to its end."
            )
        cells.append(cell)
    check_one_recipe(cells)
    return cells


#: What runs that are compared may differ in.
FREE = (*PLACE, "attention", "attention_options", "seed", "preset", "eval_every", "eval_tokens",
        "log_every", "save_every", "sample_tokens", "tracker", "compile")  # fmt: skip


def check_one_recipe(cells: Sequence[Cell]) -> None:
    """Raise ValueError unless they share recipe and text, and those of one seed the data order."""
    first, by_seed, seen = cells[0], dict[int, Cell](), dict[tuple[Method, int], Cell]()
    for cell in cells:
        same = by_seed.setdefault(cell.config.seed, cell)
        fields = {f.name: first for f in dataclasses.fields(TrainConfig) if f.name not in FREE}
        for name, other in (fields | {"data_seed": same}).items():
            pair = getattr(other.config, name), getattr(cell.config, name)
            if pair[0] != pair[1]:
                raise ValueError(
                    f"{other} and {cell} differ in {flag(name)}: {pair[0]} and {pair[1]}. "
                    "Compare runs of one recipe."
                )
        twin = seen.setdefault((cell.method, cell.config.seed), cell)
        if twin is not cell:
            raise ValueError(
                f"{twin} and {cell} are both {cell.method} with seed {cell.config.seed}. "
                "Give one of them."
            )


@dataclass(frozen=True, eq=False)
class Asked:
    """A cell that is to answer a question: a job of `bench.pool`."""

    cell: Cell
    question: Question

    @property
    def log(self) -> Path:
        return self.cell.log

    @property
    def total(self) -> int:
        return self.cell.config.steps

    def __str__(self) -> str:
        return str(self.cell)

    def steps(self) -> int:
        return self.cell.steps()

    def done(self) -> bool:
        return self.cell.losses(self.question) is not None

    def work(self) -> None:
        """Train the cell if it is not trained, then ask it."""
        cell = self.cell
        if not cell.trained:
            from posenc.training import main as train  # the program, as `python train.py` runs it

            assert cell.argv is not None
            resumed = ["--resume", str(cell), "--device", cell.config.device]
            resumed += ["--tracker", cell.config.tracker]  # which a launch does not inherit
            started = (cell.folder.path / CONFIG).exists()
            if code := train.main(resumed if started else cell.argv):
                sys.exit(code)
        answer(cell, self.question)


def answer(cell: Cell, question: Question) -> None:
    """Score a cell's trained model, in the precision of its training, into the question's file."""
    config, since = cell.config, time.perf_counter()
    device = choose_device(config.device)
    model = GPT.from_pretrained(cell.folder.model).to(device)
    for block in model.blocks:  # a checkpoint holds no back end
        block.attn.impl = config.attention_options.get("impl", config.impl)
    found = losses(
        model,
        question,
        tokens_per_batch=max(config.batch_size * config.context, question.lengths[-1]),
        autocast=partial(autocast, device, choose_dtype(config.dtype, device)),
    )
    seconds = time.perf_counter() - since
    values = {"question": question.digest(), "seconds": seconds, "losses": found}
    cell.folder.write_json(f"{question.name}.json", values)


def run(cells: Sequence[Cell], question: Question, *, jobs: int, threads: int) -> list[Cell]:
    """Train and score the cells that are not yet; those that failed.

    Raises:
        Stopped: by a signal; what was running is saved.
        ValueError: a folder holds another run.
    """
    for cell in cells:
        cell.check()
    asked = [Asked(cell, question) for cell in cells]
    return [job.cell for job in pool.run(asked, at_once=jobs, threads=threads)]
