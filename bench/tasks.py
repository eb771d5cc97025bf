"""Position schemes on tasks with one right answer, beyond the training length.

    python -m bench.tasks --mini --attention nope alibi rope:rotary_dim=4 --tasks cmc mc --seeds 5
    python -m bench.tasks --rows rows.jsonl                     the same tables from their rows

Trains a `posenc.GPT` on each of `posenc.tasks` with every method and seed, and asks it examples
that were never trained, at the longest length of training and at up to four times of it. Scores are
those of teacher forcing: exact match, the share of examples whose every scored token is right, and
accuracy, the share of scored tokens. Printed are medians over seeds with the least and the greatest
seed's. A seed fixes the initial weights and, the same for all methods, the data.

Every model is trained in a process of its own and leaves RUNS/TASK/METHOD-sSEED.json; after an
interruption the same command goes on with those that are not there. One that failed or diverged is
reported, and the rows of the others are written. Tables of positions, which end at the training
length, are not asked beyond it.

--mini is the suite for a processor: shorter texts, 2 layers of width 64.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import posenc
from posenc.errors import unknown
from posenc.files import atomic_file
from posenc.models.config import GPTConfig
from posenc.models.gpt import GPT
from posenc.tasks import FULL, MINI, Setting, accuracy, exact_match, train_batch
from posenc.tasks.suites import Suite
from posenc.training.optimizer import make_optimizer, set_learning_rate
from posenc.training.parallel import Parallel
from posenc.training.precision import autocast, choose_device, choose_dtype
from posenc.training.schedule import learning_rate
from posenc.training.step import train_step

from . import pool, scores
from .arguments import check_least
from .grid import MIN_SHARE, Method, method
from .rows import Row, RowFile, environment, rows_of_kind, single, written

SUITES: Mapping[str, Suite] = {"full": FULL, "mini": MINI}
WARMUP = 0.05  # of the steps
BETAS = (0.9, 0.98)
CLIP = 1.0
#: Of every recipe: the first two as shares of --steps and --lr.
FIXED = {"warmup": WARMUP, "min_lr": MIN_SHARE, "beta2": BETAS[1], "grad_clip": CLIP}
#: Streams of random numbers, apart from each other.
TRAIN, TEST, LOOK = range(3)
#: Steps between looks at the loss, and tokens scored at once.
EVERY, AT_ONCE = 50, 16384


@dataclass(frozen=True)
class Recipe:
    """How every model is trained: AdamW, warm-up, a cosine to a tenth of the learning rate.

    Attributes:
        suite: whose sizes the tasks have, "full" or "mini".
        examples: asked at each length.
    """

    suite: str
    layers: int
    heads: int
    embed_dim: int
    batch_size: int
    steps: int
    lr: float
    weight_decay: float
    examples: int
    dtype: str


RECIPES = {
    "full": Recipe("full", 4, 8, 256, 64, 20_000, 1e-3, 0.05, 1000, "auto"),
    "mini": Recipe("mini", 2, 4, 64, 32, 3000, 2e-3, 0.05, 256, "float32"),
}


@lru_cache(maxsize=32)
def setting(suite: str, task: str) -> Setting:
    """A task at a suite's sizes. Raises ValueError for an unknown one."""
    if task not in SUITES[suite]:
        raise ValueError(unknown("task", task, SUITES[suite]))
    return SUITES[suite][task]()


@lru_cache(maxsize=32)
def fingerprint(suite: str, task: str) -> str:
    """Changes when the examples do: of some of training and of each test."""
    asked, generator = setting(suite, task), np.random.default_rng(LOOK)
    found = [train_batch(asked.train, generator, asked.lengths, 8)]
    found += [one.sample(generator, asked.at[0], 8, "test") for one in asked.tests.values()]
    digest = hashlib.sha256()
    for sample in found:
        digest.update(torch.stack(sample).numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class Cell:
    """A model of one method, task and seed: a job of `bench.pool`."""

    runs: Path
    method: Method
    task: str
    seed: int
    recipe: Recipe
    device: str

    @property
    def path(self) -> Path:
        """Of the result."""
        name = re.sub(r"[^\w.=,-]+", "-", str(self.method))
        return self.runs / self.task / f"{name}-s{self.seed}.json"

    @property
    def log(self) -> Path:
        return self.path.with_suffix(".log")

    @property
    def total(self) -> int:
        return self.recipe.steps

    @property
    def setting(self) -> Setting:
        return setting(self.recipe.suite, self.task)

    @cached_property
    def asked(self) -> dict[str, Any]:
        """All that the result depends on, as plain values."""
        own = {"method": str(self.method), "task": self.task, "seed": self.seed}
        data = fingerprint(self.recipe.suite, self.task)
        return own | asdict(self.recipe) | FIXED | {"data": data}

    def __str__(self) -> str:
        return str(self.path.with_suffix(""))

    def config(self) -> GPTConfig:
        """Of the model: its context is the longest text of training."""
        asked, recipe = self.setting, self.recipe
        sample = asked.train.sample(np.random.default_rng(LOOK), asked.longest, 1)
        return GPTConfig(
            vocab_size=asked.train.vocab_size,
            context=sample.ids.shape[1],
            layers=recipe.layers,
            heads=recipe.heads,
            embed_dim=recipe.embed_dim,
            attention=self.method.name,
            attention_options=self.method.values,
        )

    def steps(self) -> int:
        return self.total if self.path.exists() else 0

    def done(self) -> bool:
        return self.result() is not None

    def result(self) -> dict[str, Any] | None:
        """What it found, None if there is nothing yet. A damaged file is named, and removed.

        Raises:
            ValueError: the file is of another recipe or other data.
        """
        if not self.path.exists():
            return None
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            stored = found["asked"]
            for score in found["scores"]:
                check_score(score)
        except (ValueError, KeyError, TypeError) as error:
            print(f"{self.path} is damaged, the model is trained anew: {error!r}", file=sys.stderr)
            self.path.unlink()
            return None
        for name, value in self.asked.items():
            if stored.get(name) != value:
                raise ValueError(
                    f"{self.path} has {name} {stored.get(name)}; this grid asks for {value}. "
                    "Choose another --runs, or delete it."
                )
        return dict(found)

    def work(self) -> None:
        """Train the model, ask it, write the result."""
        try:
            found = learn(self)
        except (ValueError, FloatingPointError) as error:
            sys.exit(f"error: {error}")
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")


def check_score(score: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no score."""
    if not all(0 <= score[metric] <= 1 for metric in scores.METRICS):
        raise ValueError(f"a share lies in [0, 1]; got {score}.")
    if not isinstance(score["length"], int) or not isinstance(score["test"], str):
        raise ValueError(f"expected the name of a test and a length; got {score}.")


def learn(cell: Cell) -> dict[str, Any]:
    """Train a cell's model and ask it: the result as it lies in its file.

    Raises:
        FloatingPointError: the loss is no number any more.
        ValueError: for a model that cannot be built.
    """
    recipe, asked, device = cell.recipe, cell.setting, choose_device(cell.device)
    dtype, since = choose_dtype(recipe.dtype, device), time.perf_counter()
    torch.manual_seed(cell.seed)
    model = GPT(cell.config()).to(device)
    optimizer = make_optimizer(
        model, lr=recipe.lr, betas=BETAS, weight_decay=recipe.weight_decay
    )  # fmt: skip
    generator = np.random.default_rng((TRAIN, cell.seed))
    loss = math.nan
    for step in range(recipe.steps):
        rate = learning_rate(
            step,
            lr=recipe.lr,
            min_lr=recipe.lr * MIN_SHARE,
            warmup=round(recipe.steps * WARMUP),
            decay_steps=recipe.steps,
        )
        set_learning_rate(optimizer, rate)
        batch = train_batch(asked.train, generator, asked.lengths, recipe.batch_size)
        found, _ = train_step(
            model,
            optimizer,
            [batch],
            grad_clip=CLIP,
            parallel=Parallel("none", device),
            autocast=autocast(device, dtype),
        )
        if step % EVERY == EVERY - 1 or step == recipe.steps - 1:
            loss = found.item()
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"diverged: the loss is {loss} at step {step + 1}. Lower --lr."
                )
            print(f"step {step + 1}: loss {loss:.4f}", flush=True)
    return {
        "asked": cell.asked,
        "parameters": model.num_parameters(),
        "loss": loss,
        "scores": list(examine(model, asked, recipe, device, dtype)),
        "seconds": time.perf_counter() - since,
        "environment": asdict(environment(device)) | {"dtype": str(dtype).removeprefix("torch.")},
    }


@torch.no_grad()
def examine(
    model: GPT, asked: Setting, recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """The scores of a model at each length of each test: the same examples for every model."""
    model.eval()
    for name, task in asked.tests.items():
        for length in asked.at:
            generator = np.random.default_rng((TEST, length))
            ids, targets = task.sample(generator, length, recipe.examples, "test")
            if model.max_length is not None and ids.shape[1] > model.max_length:
                continue
            said = []
            for rows in ids.split(max(1, AT_ONCE // ids.shape[1])):
                with autocast(device, dtype):
                    said.append(model(rows.to(device)).logits.argmax(-1).cpu())
            predicted = torch.cat(said)
            exact = exact_match(predicted, targets).double().mean().item()
            values = dict(zip(scores.METRICS, (exact, accuracy(predicted, targets)), strict=True))
            yield {"test": name, "length": length, **values}


def rows_of(cell: Cell, found: Mapping[str, Any]) -> Iterator[tuple[Row, dict[str, Any]]]:
    """The rows of a result, each with where it was measured."""
    where = dict(found["environment"])
    dtype, lengths = where.pop("dtype"), cell.setting.lengths
    recipe = asdict(cell.recipe) | FIXED | {"dtype": dtype, "data": cell.asked["data"]}
    recipe |= {"train": f"{min(lengths)}..{max(lengths)}"}
    for score in found["scores"]:
        for metric in scores.METRICS:
            row = single(
                f"{cell.task}/{score['test']}" if score["test"] else cell.task,
                metric,
                "share",
                score[metric],
                kind=scores.KIND,
                name=cell.method.name,
                implementation=cell.method.values.get("impl", "auto"),
                dtype=dtype,
                options=written(cell.method.values),
                recipe=written(recipe),
                H=cell.recipe.heads,
                D=cell.recipe.embed_dim // cell.recipe.heads,
                T=score["length"],
                seed=cell.seed,
            )
            yield row, where


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        prog="python -m bench.tasks", description=(__doc__ or "").splitlines()[0]
    )
    add = made.add_argument
    add("--attention", nargs="+", default=list(posenc.names()), metavar="NAME[:KEY=VALUE,..]")
    add("--tasks", nargs="+", default=list(FULL), metavar="TASK", help=", ".join(FULL))
    add("--mini", action="store_true", help="sizes for a processor")
    add("--seeds", type=int, default=5, help="models of each method and task")
    add("--first-seed", type=int, default=0, help="initial weights and data of the first")
    whole = {"layers": "of the model", "heads": "of attention", "embed_dim": "width of the model",
             "batch_size": "examples of a step", "steps": "of training",
             "examples": "asked at each length"}  # fmt: skip
    for name, text in whole.items():
        add(f"--{name.replace('_', '-')}", type=int, help=text)
    add("--lr", type=float, help="highest learning rate")
    add("--weight-decay", type=float)
    add("--dtype", choices=("auto", "float32", "bfloat16"), help="of products")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--runs", type=Path, default=Path("runs/tasks"), help="folder of the results")
    add("--jobs", type=int, help="models at a time; each gets its share of the processor's cores")
    add("--out", type=Path, help="write the rows to this file, anew")
    add("--rows", type=Path, nargs="+", metavar="FILE", help="print the tables of these rows")
    return made


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The suite's, with what the flags change. Raises ValueError for what cannot be trained."""
    preset = RECIPES["mini" if args.mini else "full"]
    names = [field.name for field in dataclasses.fields(Recipe) if field.name != "suite"]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    recipe = dataclasses.replace(preset, **given)
    whole = ("layers", "heads", "embed_dim", "batch_size", "steps", "examples")
    check_least(1, **{name: getattr(recipe, name) for name in whole})
    if not (recipe.lr > 0 and recipe.weight_decay >= 0):
        raise ValueError(
            f"--lr must be above 0 and --weight-decay at least 0; got {recipe.lr} and "
            f"{recipe.weight_decay}."
        )
    return recipe


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """The grid by seed, so that a part of it compares what it has.

    Raises:
        ValueError: for names twice, unknown tasks, and models that cannot be built.
    """
    recipe, methods = recipe_of(args), [method(text) for text in args.attention]
    for what, names in (("method", methods), ("task", args.tasks)):
        if len(set(names)) < len(names):
            raise ValueError(f"a {what} is named twice. Name each once.")
    found = [
        Cell(args.runs, own, task, args.first_seed + i, recipe, args.device)
        for i in range(args.seeds)
        for task in args.tasks
        for own in methods
    ]
    for cell in found[: len(methods) * len(args.tasks)]:
        with torch.device("meta"):
            GPT(cell.config())
    return found


def train_and_ask(args: argparse.Namespace) -> int:
    """Bring all cells to their end, print the tables, write the rows; the exit code.

    Raises:
        ValueError: for what cannot be trained, and a folder that holds other results.
        Stopped: by a signal.
    """
    check_least(1, seeds=args.seeds, **({} if args.jobs is None else {"jobs": args.jobs}))
    check_least(0, first_seed=args.first_seed)
    device = choose_device(args.device)
    if args.out is not None and args.out.exists():
        rows_of_kind(args.out, scores.KIND)  # it is written anew: not over rows of others
    cells = cells_of(args)
    jobs = args.jobs or (1 if device.type == "cuda" else min(pool.cores(), len(cells)))
    print(f"{len(cells)} models, {jobs} at a time", flush=True)
    with pool.held(args.runs):
        failed = pool.run(cells, at_once=jobs, threads=max(1, pool.cores() // jobs))
        found = [
            row
            for cell in cells
            if (result := cell.result()) is not None
            for row in rows_of(cell, result)
        ]
    if found:
        print(*scores.tables([row for row, _ in found]), sep="\n")
    if args.out is not None and found:
        with atomic_file(args.out) as temporary:
            file = RowFile(temporary, device)
            for row, where in found:
                file.add(row, **where)
    if failed:
        names = ", ".join(str(cell.path.relative_to(args.runs).with_suffix("")) for cell in failed)
        print(f"{len(failed)} of {len(cells)} models failed: {names}", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given flags; the exit code."""
    args = parser().parse_args(argv)
    try:
        if args.rows:
            if args.out is not None:
                raise ValueError("--rows only prints. Leave --out out.")
            print(
                *scores.tables(
                    [row for path in args.rows for row in rows_of_kind(path, scores.KIND)]
                ),
                sep="\n",
            )
            return 0
        return train_and_ask(args)
    except pool.Stopped as stop:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 128 + int(stop.args[0])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
