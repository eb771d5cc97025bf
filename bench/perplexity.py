"""Perplexity of attention methods, compared over seeds and text: `python -m bench.perplexity`.

    python -m bench.perplexity --attention rope carope moh:shared=2,top_k=2 --seeds 3 -- --steps 400
    python -m bench.perplexity --finished runs/rope-* runs/moh-*     runs of train.py
    python -m bench.perplexity --rows rows.jsonl                     the same tables from their rows

Trains every method under every seed in the same data order, scores the same text with all of them
by the protocols of `bench.losses`, and prints for each length: loss and perplexity over seeds, and
the difference to the baseline with two 95% intervals, Student's t over the seeds, paired, and a
bootstrap over seeds and text, or how many seeds it would take to see it. The three matches are of
equal tokens, equal parameters (by the width of the MLPs) and equal training FLOPs (by the number of
steps). Flags after `--` are those of train.py, for every run.

With --tune every method gets its own learning rate, of the same few for all: the one that did best
under the first seed on --tune-data, which is not the text that is reported.

A run that is trained and scored is kept: after an interruption the same command goes on. One that
failed is reported, and the rows of the others are written.

All ten names on books, of which train.parquet and validation.parquet hold one a row, in 15 minutes
on two cores: 1.0 M tokens a run, scored on 18 blocks of 4096 tokens from 9 books.

    python -m bench.perplexity --runs runs/books --out books.jsonl -- \\
        --data PATH/train.parquet --val-data PATH/validation.parquet --vocab-size 1024 \\
        --layers 3 --heads 4 --embed-dim 128 --context 128 --batch-size 16 --steps 500 --warmup 50
"""

import argparse
import dataclasses
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import posenc
from posenc.cost import model_flops_per_token
from posenc.data import Corpus
from posenc.errors import unknown
from posenc.files import atomic_file
from posenc.training.config import TrainConfig
from posenc.training.precision import choose_device
from posenc.training.run_folder import ENVIRONMENT, SUMMARY
from posenc.training.text import corpus_of

from .comparison import MATCHES, gap_of, match_of, recipe, tables
from .grid import Cell, Plan, finished, method, run
from .losses import Losses, Question, ask
from .pool import Stopped, cores, held
from .rows import Row, RowFile, rows_of_kind, single, written
from .statistics import paired_bootstrap
from .tuning import Tuning, tune

KIND = "perplexity"
RECIPE = ("layers", "heads", "embed_dim", "mlp_dim", "context", "batch_size", "grad_accum", "steps",
          "lr", "min_lr", "warmup", "weight_decay", "beta2", "dropout", "bias")  # fmt: skip
GAPS = ("windows", "sliding")  # protocols that are compared
SHAPES = ("positions", "tail")  # those whose shape matters, which a match hardly changes


class Result(NamedTuple):
    """A cell that is trained and scored."""

    cell: Cell
    losses: Losses
    summary: Mapping[str, Any]
    about: Mapping[str, Any]  # environment.json
    metrics: Sequence[Mapping[str, Any]]

    @property
    def config(self) -> TrainConfig:
        return self.cell.config

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of its steps but the first fifth, which compile and warm up."""
        found = [row["tokens_per_second"] for row in self.metrics if "tokens_per_second" in row]
        return found[len(found) // 5 :]

    @property
    def name(self) -> str:
        return str(self.cell.method)


class Comparison(NamedTuple):
    """The results of one match."""

    match: str
    baseline: str  # a label
    results: Sequence[Result]
    question: Question
    symbols: int  # of the vocabulary
    bytes: float | None  # of text behind all targets
    tuning: Tuning | None = None


def bytes_of(question: Question, corpus: Corpus) -> float | None:
    """Bytes of text behind the targets; where tokens have no fixed length, at the corpus's rate."""
    lengths = corpus.tokenizer.byte_lengths() if corpus.tokenizer else None
    targets = question.text.targets
    if lengths is not None:
        return float(lengths[targets].sum())
    if corpus.validation_bytes is None:
        return None
    return corpus.validation_bytes / len(corpus.validation) * len(targets)


def read_result(cell: Cell, question: Question) -> Result | None:
    """A cell's result, None while there is none."""
    found = cell.losses(question)
    if found is None:
        return None
    files = (cell.read(SUMMARY), cell.read(ENVIRONMENT), cell.folder.read_metrics())
    return Result(cell, found, *files)


def shared_columns(result: Result, compared: Comparison) -> dict[str, Any]:
    """What the rows of a cell have in common."""
    config, text = result.config, compared.question.text
    data_seeds = {r.config.seed: r.config.data_seed for r in compared.results}
    own = {key: getattr(config, key) for key in RECIPE}
    own |= {"mlp_dim": config.mlp_dim or 4 * config.embed_dim}
    own |= {"data_seeds": ",".join(str(data_seeds[seed]) for seed in sorted(data_seeds))}
    if config.aux_weight != TrainConfig.aux_weight:
        own |= {"aux_weight": config.aux_weight}
    own |= {"dtype": result.about["dtype"], "data": Path(config.data or "").name}
    own |= {"fingerprint": result.about["corpus"]["fingerprint"][:12]}
    own |= {"match": compared.match, "baseline": compared.baseline}
    own |= {"targets": len(text.targets), "units": len(text.blocks), "unit": text.unit}
    own |= {"documents": text.documents}
    if compared.tuning is not None:
        own |= {"tuned": ",".join(f"{rate:g}" for rate in compared.tuning.tried)}
    return {
        "kind": KIND,
        "name": config.attention,
        "implementation": config.impl,
        "dtype": result.about["dtype"],
        "options": written(config.attention_options),
        "recipe": written(own),
        "H": config.heads,
        "D": config.embed_dim // config.heads,
    }


def cell_rows(result: Result, compared: Comparison) -> list[Row]:
    """What one run measured."""
    config, question = result.config, compared.question
    about = shared_columns(result, compared) | {"seed": config.seed}
    found = []
    for protocol, by_length in result.losses.items():
        if protocol in SHAPES and compared.match != "tokens":
            continue
        for length, values in by_length.items():
            loss = float(np.mean(values))
            found.append(single(protocol, "loss", "nats", loss, T=length, **about))
            if protocol == "windows" and compared.bytes:
                bits = loss * len(question.text.targets) / math.log(2) / compared.bytes
                found.append(single(protocol, "bits per byte", "bits", bits, T=length, **about))
    summary, model = result.summary, config.model(compared.symbols)
    flops = summary["tokens"] * model_flops_per_token(model).exact
    about |= {"mode": "train", "T": config.context}
    found.append(
        single(metric="parameters", unit="parameters", value=summary["parameters"], **about)
    )
    found.append(single(metric="training FLOPs", unit="FLOP", value=flops, **about))
    low, middle, high = np.quantile(result.speeds, (0.2, 0.5, 0.8)).tolist()
    speed = {"p20": low, "p50": middle, "p80": high}
    found.append(Row(metric="throughput", unit="tokens/s", **speed, **about))
    loads = [load for of in summary.get("routing") or [] if of for load in of["load"]]
    for metric, value in (("least load", min), ("greatest load", max)) if loads else ():
        found.append(single(metric=metric, unit="of balance", value=value(loads), **about))
    return found


def tuning_rows(compared: Comparison) -> list[tuple[Row, dict[str, Any]]]:
    """The loss on the deciding text under every learning rate, of the methods that are compared."""
    tuning, found = compared.tuning, []
    if tuning is None:
        return []
    for trials in tuning.trials.values():
        for trial in trials:
            result = read_result(trial.cell, tuning.question)
            if result is not None and trial.loss is not None:
                about = shared_columns(result, compared) | {"seed": trial.cell.config.seed}
                at = {"mode": "tune", "T": trial.cell.config.context}
                row = single(metric="loss", unit="nats", value=trial.loss, **at, **about)
                found.append((row, measured_on(result)))
    return found


def gap_rows(name: str, compared: Comparison, resamples: int) -> list[Row]:
    """What the runs of a method differ by from the baseline's, paired by seed and unit of text."""
    own = {r.config.seed: r for r in compared.results if r.name == name}
    baseline = {r.config.seed: r for r in compared.results if r.name == compared.baseline}
    seeds = sorted(own.keys() & baseline.keys())
    if name == compared.baseline or not seeds:
        return []
    about = shared_columns(own[seeds[0]], compared)
    found = []
    for protocol in GAPS:
        lengths = (of[seeds[0]].losses[protocol] for of in (own, baseline))
        for length in sorted(set.intersection(*map(set, lengths))):
            sides = [
                np.array([of[seed].losses[protocol][length] for seed in seeds])  # (seeds, units)
                for of in (own, baseline)
            ]
            drawn = paired_bootstrap(sides[0] - sides[1], resamples)
            means = [dict(zip(seeds, side.mean(1).tolist(), strict=True)) for side in sides]
            gap = gap_of(means[0], means[1], (drawn.low, drawn.high))
            assert gap is not None
            values = {"gap 2.5%": drawn.low, "gap 97.5%": drawn.high}
            if gap.needed is not None:
                values |= {"gap 2.5% over seeds": gap.seeds.low}
                values |= {"gap 97.5% over seeds": gap.seeds.high}
            at = {"mode": protocol, "T": length, **about}
            _, p20, p50, p80, _ = drawn
            found.append(Row(metric="gap", unit="nats", p20=p20, p50=p50, p80=p80, **at))
            found += [single(metric=key, unit="nats", value=v, **at) for key, v in values.items()]
            if gap.needed is not None and math.isfinite(gap.needed):
                found.append(single(metric="seeds needed", unit="seeds", value=gap.needed, **at))
    return found


def measured_on(result: Result) -> dict[str, Any]:
    """Columns of `bench.rows.Environment` of the run itself."""
    about = result.about
    versions = {name: about["versions"].get(name) for name in ("torch", "triton", "python")}
    return {name: about[name] for name in ("device", "threads")} | versions


def compare(compared: Comparison, resamples: int) -> list[tuple[Row, dict[str, Any]]]:
    """All rows of a comparison, each with where it was measured."""
    found = [
        (row, measured_on(result))
        for result in compared.results
        for row in cell_rows(result, compared)
    ]
    if compared.match == "tokens":
        found += tuning_rows(compared)
    for name in dict.fromkeys(result.name for result in compared.results):
        where = measured_on(next(r for r in compared.results if r.name == name))
        found += [(row, where) for row in gap_rows(name, compared, resamples)]
    return found


def read_rows(path: Path, *kinds: str) -> list[Row]:
    """The rows of a file of comparisons. Raises ValueError for any other."""
    rows = rows_of_kind(path, *kinds)
    for number, row in enumerate(rows, start=1):
        if match_of(row) not in MATCHES or "targets" not in recipe(row):
            raise ValueError(
                f"{path}:{number} has no recipe of a comparison: {row.recipe!r}. "
                "Choose another file."
            )
    return rows


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        prog="python -m bench.perplexity",
        description=__doc__.splitlines()[0],
        epilog="Flags after -- are those of train.py.",
    )
    add = made.add_argument
    add("--attention", nargs="+", default=list(posenc.names()), metavar="NAME[:KEY=VALUE,..]")
    add("--baseline", default="rope", metavar="NAME[:KEY=VALUE,..]")
    add("--seeds", type=int, default=3, help="runs of each method")
    add("--first-seed", type=int, default=0, help="initial weights of the first run")
    add("--first-data-seed", type=int, default=0, help="order of the first run's data")
    add("--contexts", type=int, nargs="+", default=[1, 2, 4], help="in training contexts")
    add("--tune", type=float, nargs="+", metavar="RATE", help="learning rates that are tried")
    add("--tune-data", metavar="TEXT", help="validation text that decides; see --val-data")
    add("--match", nargs="+", default=["tokens"], metavar="{" + ",".join(MATCHES) + "}")
    add("--block", type=int, default=4096, help="targets in a block of scored text")
    add("--blocks", type=int, default=18, help="about how many of them, of fewer than 30 documents")
    add("--resamples", type=int, default=10_000, help="of the bootstrap")
    add("--runs", type=Path, default=Path("runs/perplexity"), help="folder of the run folders")
    add("--jobs", type=int, help="runs at a time; each gets its share of the processor's cores")
    add("--out", type=Path, help="write the rows to this file, anew")
    add("--finished", type=Path, nargs="+", metavar="RUN", help="score these, train nothing")
    add("--rows", type=Path, nargs="+", metavar="FILE", help="print the tables of these rows")
    return made


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers below 1, unknown matches, and what is not installed."""
    if importlib.util.find_spec("scipy") is None:
        raise ValueError("the intervals need scipy. Install it: pip install posenc[bench]")
    for name in ("seeds", "block", "blocks", "resamples"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1; got {getattr(args, name)}.")
    if min(args.contexts) < 1 or (args.jobs is not None and args.jobs < 1):
        raise ValueError("--contexts and --jobs must be at least 1. Raise them.")
    for match in args.match:
        if match not in MATCHES:
            raise ValueError(unknown("match", match, MATCHES))
    if bool(args.tune) != bool(args.tune_data):
        raise ValueError("--tune needs --tune-data, other text than is reported. Give both.")
    if args.tune and (args.finished or args.rows):
        raise ValueError("--tune trains: it goes with neither --finished nor --rows.")
    if args.tune and (len(set(args.tune)) < len(args.tune) or not all(r > 0 for r in args.tune)):
        raise ValueError(f"--tune takes different rates above 0; got {args.tune}.")
    if args.rows and (args.finished or args.out):
        raise ValueError("--rows only prints. Leave --finished and --out out.")


def train_and_compare(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Bring all cells to their end, print the tables, write the rows; the exit code.

    Raises:
        ValueError: for what cannot be compared.
        Stopped: by a signal.
    """
    if args.out is not None and args.out.exists():
        read_rows(args.out, KIND)  # it is written anew: not over rows of others
    baseline, plan = method(args.baseline), None
    if args.finished:
        if flags:
            raise ValueError(f"--finished trains nothing; got the flags {' '.join(flags)}.")
        grids = {"tokens": finished(args.finished)}
        first = grids["tokens"][0]
    else:
        seeds = [(args.first_seed + i, args.first_data_seed + i) for i in range(args.seeds)]
        plan = Plan(args.runs, [method(name) for name in args.attention], baseline, flags, seeds)
        first = plan.cell(baseline, seeds[0])
    corpus = corpus_of(first.config)
    question = ask(
        (corpus.validation, corpus.tokenizer.end_of_text if corpus.tokenizer else None),
        context=first.config.context,
        times=args.contexts,
        size=args.block,
        wanted=args.blocks,
    )
    device = choose_device(first.config.device)
    on_gpu = device.type == "cuda"

    def bring(cells: Sequence[Cell], asked: Question) -> list[Cell]:
        """Train and ask what is not yet; what failed."""
        for cell in cells:
            check_corpus(cell, corpus)
        # On two cores, two runs of one thread do 1.35 times the tokens of one run of two.
        jobs = args.jobs or (1 if on_gpu else min(cores(), len(cells)))
        print(f"{len(cells)} runs, {jobs} at a time; scored on {asked.text}", flush=True)
        return run(cells, asked, jobs=jobs, threads=max(1, cores() // jobs))

    tuning = None
    with nullcontext() if plan is None else held(plan.runs):
        if args.tune:
            assert plan is not None
            deciding = deciding_question(args, first.config, corpus)
            tuning = tune(plan, args.tune, deciding, corpus.vocab_size, bring)
            plan = with_rates(plan, tuning)
        if plan is not None:
            matches = dict.fromkeys(args.match)
            grids = {match: plan.cells(match, corpus.vocab_size) for match in matches}
        cells = list({str(cell): cell for grid in grids.values() for cell in grid}.values())
        failed = bring(cells, question)

    found, size = [], bytes_of(question, corpus)
    for match, grid in grids.items():
        results = [result for cell in grid if (result := read_result(cell, question))]
        if any(result.name == str(baseline) for result in results):
            compared = Comparison(
                match, str(baseline), results, question, corpus.vocab_size, size, tuning
            )
            found += compare(compared, args.resamples)
        elif results:
            print(f"equal {match}: no run of the baseline {baseline} is left", file=sys.stderr)
    print(*tables([row for row, _ in found]), sep="\n")
    if args.out is not None and found:
        with atomic_file(args.out) as temporary:
            file = RowFile(temporary, device)
            for row, where in found:
                file.add(row, **where | ({"threads": None} if on_gpu else {}))
    if failed:
        names = ", ".join(cell.folder.path.name for cell in failed)
        print(f"{len(failed)} of {len(cells)} runs failed: {names}", file=sys.stderr)
        return 1
    return 0


def deciding_question(args: argparse.Namespace, config: TrainConfig, corpus: Corpus) -> Question:
    """Of --tune-data, in the reported corpus's tokens.

    Raises:
        ValueError: it is the reported text.
    """
    other = corpus_of(dataclasses.replace(config, val_data=args.tune_data))
    if other.fingerprint == corpus.fingerprint:
        raise ValueError(f"{args.tune_data} is the text that is reported. Give other --tune-data.")
    return ask(
        (other.validation, other.tokenizer.end_of_text if other.tokenizer else None),
        context=config.context,
        times=[1],
        size=args.block,
        wanted=args.blocks,
        name="tuning",
    )


def with_rates(plan: Plan, tuning: Tuning) -> Plan:
    """The plan of the methods that have a rate, each with its own.

    Raises:
        ValueError: the baseline has none.
    """
    rates = tuning.rates
    left = [own for own in plan.methods if own in rates]
    for lost in set(plan.methods) - set(left):
        print(f"{lost} failed at every learning rate: left out", file=sys.stderr)
    if plan.baseline not in rates:
        raise ValueError(f"the baseline {plan.baseline} failed at every rate. Give lower ones.")
    print("learning rates: " + ", ".join(f"{own} {rates[own]:g}" for own in left))
    return dataclasses.replace(plan, methods=left, rates=rates)


def check_corpus(cell: Cell, corpus: Corpus) -> None:
    """Raise ValueError for a finished run of other text, or whose text has changed since."""
    if cell.trained and cell.read(ENVIRONMENT)["corpus"]["fingerprint"] != corpus.fingerprint:
        raise ValueError(
            f"{cell} was trained on other text than {corpus.description['data']} is now. "
            "Restore the text, or train it again elsewhere."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given flags; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args, flags = parser().parse_args(words[:cut]), words[cut + 1 :]
    try:
        check_args(args)
        if args.rows:
            rows = [row for path in args.rows for row in read_rows(path, KIND, "run")]
            print(*tables(rows, args.baseline), sep="\n")
            return 0
        return train_and_compare(args, flags)
    except Stopped as stop:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 128 + stop.args[0]
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
