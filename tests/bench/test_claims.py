"""bench.claims: the rule, the files, what rows say, and that everything committed fits together."""

import math
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

from bench import extend, memory, perplexity, report, routing, throughput
from bench.claims import exact, ledger, reading
from bench.claims.__main__ import main
from bench.claims.evidence import Evidence
from bench.claims.reading import Buckets, Load, Loss, Published, Ratio, read_commands, read_papers
from bench.claims.verdict import CONTRADICTED, OPEN, REPRODUCED, WITHIN_NOISE, combine, judge
from bench.grid import Plan, method
from bench.rows import Row, RowFile
from bench.statistics import Interval, seeds_needed, student
from posenc.models.gpt import GPT

PAPERS, COMMANDS = read_papers(), read_commands()
CHECKS = [
    pytest.param(paper, claim, scale, id=f"{claim.id} {scale}")
    for paper in PAPERS.values()
    for claim in paper.claim
    for scale in ("mini", "full")
]


# The rule.


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.30, REPRODUCED),
        (0.11, 0.30, REPRODUCED),
        (0.01, 0.10, REPRODUCED),  # it reaches h
        (0.01, 0.0999, CONTRADICTED),  # an effect, of less than half the claimed size
        (0.0, 0.30, WITHIN_NOISE),  # 0 is inside
        (-0.30, 0.10, WITHIN_NOISE),
        (-0.30, 0.0999, CONTRADICTED),
        (-0.30, -0.10, CONTRADICTED),
        (-math.inf, math.inf, WITHIN_NOISE),  # one seed
    ],
)
def test_the_rule_of_one_interval(low: float, high: float, verdict: str) -> None:
    assert judge(Interval((low + high) / 2, low, high), half=0.1) == verdict


def test_without_a_published_size_the_sign_decides() -> None:
    assert judge(Interval(0.1, 0.01, 0.2), 0.0) == REPRODUCED
    assert judge(Interval(0.1, -0.01, 0.2), 0.0) == WITHIN_NOISE
    assert judge(Interval(-0.1, -0.2, 0.0), 0.0) == WITHIN_NOISE
    assert judge(Interval(-0.1, -0.2, -0.01), 0.0) == CONTRADICTED


def test_a_tolerance_is_how_much_worse_is_as_good() -> None:
    nearly = Interval(-0.002, -0.009, 0.005)
    assert judge(nearly, 0.0, tolerance=0.01) == REPRODUCED
    assert judge(nearly, 0.0, tolerance=0.009) == WITHIN_NOISE
    assert judge(nearly, 0.0) == WITHIN_NOISE
    assert judge(Interval(-0.02, -0.03, -0.011), 0.0, tolerance=0.01) == CONTRADICTED


def test_all_comparisons_must_bear_a_claim_out() -> None:
    assert combine([REPRODUCED, REPRODUCED]) == REPRODUCED
    assert combine([REPRODUCED, WITHIN_NOISE]) == WITHIN_NOISE
    assert combine([WITHIN_NOISE, OPEN, REPRODUCED]) == OPEN
    assert combine([OPEN, CONTRADICTED, REPRODUCED]) == CONTRADICTED
    with pytest.raises(ValueError, match="no comparison decides"):
        combine([])


@pytest.mark.parametrize(
    ("own", "other", "unit", "effect"),
    [
        (20.0, 25.0, "perplexity", math.log(1.25)),
        (2.0, 2.5, "nats", 0.5),
        (30.0, 20.0, "tokens/s", math.log(1.5)),
        (20.0, 30.0, "ms", math.log(1.5)),
        (64.0, 61.5, "points", 2.5),
    ],
)
def test_effects_are_in_the_claims_favour(
    own: float, other: float, unit: str, effect: float
) -> None:
    assert Published(of="x", own=own, other=other, unit=unit).effect == pytest.approx(effect)


# What rows say.

RECIPE = {
    "layers": 2, "heads": 4, "embed_dim": 8, "context": 16, "batch_size": 2, "grad_accum": 1,
    "steps": 5, "lr": 0.1, "min_lr": 0.01, "data": "text", "fingerprint": "0123456789ab",
    "match": "tokens", "baseline": "rope", "targets": 64,
}  # fmt: skip


def one(value: float) -> dict[str, float]:
    return {"p20": value, "p50": value, "p80": value}


def losses(
    name: str, values: list[float], *, T: int = 16, mode: str = "windows", **recipe: object
) -> Iterator[Row]:
    name, _, options = name.partition(":")
    words = " ".join(f"{key}={value}" for key, value in {**RECIPE, **recipe}.items())
    for seed, value in enumerate(values):
        yield Row(kind="perplexity", name=name, options=options.replace(",", " "), mode=mode, T=T,
                  implementation="auto", metric="loss", unit="nats", dtype="float32", seed=seed,
                  recipe=words, **one(value))  # fmt: skip


def bootstrap(name: str, low: float, high: float) -> Iterator[Row]:
    row = next(losses(name, [0.0]))
    for metric, value in (("gap 2.5%", low), ("gap 97.5%", high)):
        yield replace(row, metric=metric, seed=None, **one(value))


def extended(
    name: str, text: int, values: list[float], implementation: str = "posenc"
) -> Iterator[Row]:
    for part, value in enumerate(values, start=1):
        yield Row(kind="extend", name=name, implementation=implementation, mode="evaluate", B=1,
                  metric="loss", unit="nats", dtype="float32", T=4 * part, S=4 * len(values),
                  seed=text, options="model=m original=8 bucket=4 text=t",
                  **one(value))  # fmt: skip


def timed(name: str, p20: float, p50: float, p80: float) -> Row:
    return Row(kind="throughput", name=name, implementation="auto", mode="train", T=8, S=8,
               metric="throughput", unit="tokens/s", dtype="float32",
               p20=p20, p50=p50, p80=p80)  # fmt: skip


Write = Callable[..., Evidence]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def made(*rows: Iterator[Row], file: str = "cpu/rows.jsonl") -> Evidence:
        held = RowFile(tmp_path / file, torch.device("cpu"))
        for each in rows:
            for row in each:
                held.add(row)
        return Evidence(tmp_path)

    return made


def test_a_gain_is_the_others_loss_minus_the_methods_paired_by_seed(write: Write) -> None:
    rope, own = [3.0, 3.2, 3.4], [2.9, 3.0, 3.35]
    evidence = write(losses("rope", [*rope, 9.0]), losses("carope:init=paper", own))
    compare = Loss(own="carope:init=paper", other="rope", rows="cpu/rows.jsonl")
    found = evidence.measure(compare)
    assert found is not None
    assert found.gap == pytest.approx(student([0.1, 0.2, 0.05]))
    assert found.source == "3 seeds"
    assert str(found).startswith("`carope:init=paper` over `rope`, windows of 16: +0.117 (")
    assert "learning rate 0.1 for all" in found.recipe
    against = evidence.measure(replace(compare, own="rope", other="carope:init=paper"))
    assert against is not None
    assert against.gap.mean == pytest.approx(-found.gap.mean)


def test_an_interval_is_as_wide_as_both_seeds_and_text_say(write: Write) -> None:
    evidence = write(
        losses("rope", [3.0, 3.0]), losses("carope", [2.9, 2.898]), losses("mha", [4.0, 4.0]),
        bootstrap("carope", -0.4, 0.2),
    )  # fmt: skip
    compare = Loss(own="carope", other="rope", rows="cpu/rows.jsonl")
    found = evidence.measure(compare)
    assert found is not None
    assert (found.gap.low, found.gap.high) == (-0.2, 0.4)
    beside = evidence.measure(replace(compare, other="mha"))  # the bootstrap is against rope
    assert beside is not None
    assert beside.gap == pytest.approx(student([1.1, 1.102]))


def test_lengths_protocols_and_matches_are_told_apart(write: Write) -> None:
    evidence = write(
        losses("rope", [3.0]), losses("carope", [2.0]),
        losses("rope", [3.0], T=32), losses("carope", [2.5], T=32),
        losses("rope", [3.0], T=32, mode="tail"), losses("carope", [2.75], T=32, mode="tail"),
        losses("rope", [3.0], match="flops"), losses("carope", [2.875], match="flops"),
    )  # fmt: skip
    compare = Loss(own="carope", other="rope", rows="cpu/rows.jsonl")

    def mean(**changes: object) -> float | None:
        found = evidence.measure(replace(compare, **changes))  # type: ignore[arg-type]
        return None if found is None else found.gap.mean

    assert mean() == 1.0
    assert mean(length=2) == 0.5
    assert mean(length=2, protocol="tail") == 0.25
    assert mean(match="flops") == 0.125
    assert mean(match="parameters") is None
    assert mean(length=3) is None
    assert mean(own="nope") is None
    assert mean(rows="cpu/none.jsonl") is None


def test_each_methods_own_learning_rate_is_said_and_other_recipes_are_refused(write: Write) -> None:
    evidence = write(losses("rope", [3.0], tuned="0.1,0.2"),
                     losses("carope", [2.0], tuned="0.1,0.2", lr=0.2, min_lr=0.02))  # fmt: skip
    compare = Loss(own="carope", other="rope", rows="cpu/rows.jsonl")
    found = evidence.measure(compare)
    assert found is not None
    assert "the best of the learning rates 0.1, 0.2" in found.recipe
    evidence = write(losses("nope", [3.0], steps=6, tuned="0.1,0.2"))
    with pytest.raises(ValueError, match="the runs differ in"):
        evidence.measure(replace(compare, other="nope"))


def test_parts_of_one_text_or_several_texts_are_the_pairs_of_a_scaling(write: Write) -> None:
    evidence = write(extended("none", 0, [1, 1, 5, 6]), extended("yarn", 0, [1, 1, 3, 2]),
                     extended("yarn", 0, [0, 0, 0, 0], "transformers"))  # fmt: skip
    compare = Buckets(own="yarn", other="none", rows="cpu/rows.jsonl")
    found = evidence.measure(compare)
    assert found is not None
    assert found.gap == student([2.0, 4.0])
    assert found.source == "2 parts of one text"
    evidence = write(extended("none", 1, [1, 1, 5, 6]), extended("yarn", 1, [1, 1, 3, 6]))
    found = evidence.measure(compare)
    assert found is not None
    assert found.gap == student([3.0, 1.0])
    assert found.source == "2 texts"
    evidence = write(extended("yarn", 0, [1, 1, 1]))
    with pytest.raises(ValueError, match=r"S=12 and .* S=16: keep one model and length"):
        evidence.measure(compare)


def test_a_ratio_spans_the_percentiles_and_the_last_row_counts(write: Write) -> None:
    evidence = write(
        iter([timed("rope", 1, 1, 1), timed("rope", 80, 100, 125), timed("carope", 50, 80, 100)])
    )
    both = {"kind": "throughput", "mode": "train"}
    compare = Ratio(rows="cpu/rows.jsonl", better="higher", both=both, own={"name": "carope"},
                    other={"name": "rope"})  # fmt: skip
    found = evidence.measure(compare)
    assert found is not None
    assert [math.exp(x) for x in found.gap] == pytest.approx([0.8, 0.4, 1.25])
    assert str(found) == "`carope` over `rope`, throughput (train): 0.80 times (0.40 .. 1.25)"
    found = evidence.measure(replace(compare, better="lower"))
    assert found is not None
    assert [math.exp(x) for x in found.gap] == pytest.approx([1.25, 0.8, 2.5])
    assert evidence.measure(replace(compare, own={"name": "nope"})) is None


def loads(values: list[float], metric: str = "least load", **recipe: object) -> Iterator[Row]:
    for row in losses("moh:top_k=2", values, **recipe):
        yield replace(row, mode="train", metric=metric, unit="of balance")


def test_loads_under_two_weights_are_paired_by_seed(write: Write) -> None:
    write(loads([0.7, 0.8, 0.9]), loads([1.1, 1.2, 1.3], "greatest load"), losses("rope", [3.0]))
    evidence = write(loads([0.1, 0.4], aux_weight=0.0), loads([0.5, 0.5], aux_weight=0.1),
                     file="cpu/other.jsonl")  # fmt: skip
    compare = Load(rows="cpu/rows.jsonl", other_rows="cpu/other.jsonl", of="moh:top_k=2", own=0.01,
                   other=0.0)  # fmt: skip
    found = evidence.measure(compare)
    assert found is not None
    assert found.gap == pytest.approx(student([0.6, 0.4]))
    assert str(found).startswith("least load of a head of `moh:top_k=2` under 0.01 over that under "
                                 "0 (0.75 and 0.25): +0.500 (")  # fmt: skip
    assert str(found).endswith(" of balance")
    assert found.source == "2 seeds"
    assert evidence.measure(replace(compare, of="moh")) is None
    assert evidence.measure(replace(compare, other=0.5)) is None
    assert evidence.measure(replace(compare, match="flops")) is None
    assert ledger.Finding(compare, found).source == ("`cpu/rows.jsonl`, `cpu/other.jsonl`, 2 seeds")
    evidence = write(loads([0.1], aux_weight=0.0, lr=0.2), file="cpu/faster.jsonl")
    with pytest.raises(ValueError, match=r"and cpu/faster.jsonl differ in \['lr=0.1', 'lr=0.2'\]"):
        evidence.measure(replace(compare, other_rows="cpu/faster.jsonl"))


# A ledger of made files and rows.

COMMAND = """
[grid]
about = "made"
rows = "cpu/rows.jsonl"
command = "python -m bench.perplexity"
[grid_full]
about = "made"
rows = "full/rows.jsonl"
command = "python -m bench.perplexity"
"""
PAPER = """
title = "A paper"
arxiv = "0000.00000"
source = "made"
deviations = ["smaller"]

[[claim]]
id = "XX1"
claim = "Better."
where = "Table 1"
published = [{ of = "size", own = 10.0, other = 12.0, unit = "perplexity" }]

[claim.mini]
commands = ["grid"]
compare = [
    { kind = "loss", rows = "cpu/rows.jsonl", own = "carope", other = "rope", effect = "size" },
]

[claim.full]
commands = ["grid_full"]
compare = [
    { kind = "loss", rows = "full/rows.jsonl", own = "carope", other = "rope", effect = "size" },
]
"""
LOSS = 'kind = "loss", rows = "cpu/rows.jsonl", own = "carope", other = "rope", effect = "size"'
RATIO = (
    'kind = "ratio", rows = "cpu/rows.jsonl", better = "lower", both = { S = 8 }, '
    'own = { name = "carope" }, other = { name = "rope" }'
)
LOAD = (
    'kind = "load", rows = "cpu/rows.jsonl", other_rows = "cpu/other.jsonl", of = "moh", '
    "own = 0.01, other = 0"
)
MADE = LOAD.replace("other.jsonl", "rows.jsonl")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "claims"
    folder.mkdir()
    (folder / "commands.toml").write_text(COMMAND)
    (folder / "paper.toml").write_text(PAPER)
    return folder


def evaluated(folder: Path, evidence: Evidence, scale: str | None = None) -> ledger.Entry:
    paper = read_papers(folder)["paper"]
    return ledger.evaluate(paper, paper.claim[0], scale, evidence)


@pytest.mark.parametrize(
    ("own", "verdict"),
    [
        ([2.90, 2.89, 2.91], "reproduced (mini)"),  # h is ln(1.2) / 2 = 0.091
        ([2.97, 2.80, 3.01], "within noise (mini)"),
        ([2.99, 2.98, 2.99], "contradicted (mini)"),
        ([3.20, 3.21, 3.19], "contradicted (mini)"),
        ([], "open: no rows"),
    ],
)
def test_verdicts_come_from_rows(files: Path, write: Write, own: list[float], verdict: str) -> None:
    evidence = write(losses("rope", [3.0, 3.0, 3.0]), losses("carope", own))
    entry = evaluated(files, evidence)
    assert entry.verdict == verdict
    line = ledger.table([entry]).lines[0]
    assert line[4] == f"**{verdict}**"
    if own:
        assert line[5] == "`cpu/rows.jsonl`, 3 seeds"
        assert "h = 0.091 nats" in line[3]
        gains = [3.0 - loss for loss in own]
        needed = f", needs {seeds_needed(fmean(gains), stdev(gains))} seeds"
        assert (needed in line[3]) == verdict.startswith("within")
    else:
        assert line[5] == "`python -m bench.claims XX1` says how"


def test_the_full_check_counts_where_its_rows_exist(files: Path, write: Write) -> None:
    evidence = write(losses("rope", [3.0, 3.0]), losses("carope", [2.9, 2.899]))
    assert evaluated(files, evidence, "full").verdict == OPEN
    assert evaluated(files, evidence).verdict == "reproduced (mini)"
    evidence = write(losses("rope", [3.0, 3.0]), losses("carope", [3.1, 3.101]),
                     file="full/rows.jsonl")  # fmt: skip
    assert evaluated(files, evidence).verdict == "contradicted"
    assert evaluated(files, evidence, "mini").verdict == "reproduced (mini)"


def test_what_is_not_runnable_says_why_and_shows_what_was_run(files: Path, write: Write) -> None:
    text = PAPER.replace('where = "Table 1"', 'where = "Table 1"\nnot_runnable = "no data"')
    (files / "paper.toml").write_text(text)
    evidence = write(losses("rope", [3.0, 3.0]), losses("carope", [2.9, 2.899]))
    entry = evaluated(files, evidence)
    assert entry.verdict == "not runnable as stated"
    cell = ledger.table([entry]).lines[0][3]
    assert cell.startswith("no data; ran instead: `carope` over `rope`, windows of 16: +0.1")
    assert cell.endswith("reproduced (mini)")


def test_a_premise_that_does_not_hold_is_an_error(
    files: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PAPER.replace(
        'where = "Table 1"',
        'where = "Table 1"\nnot_runnable = "no data"\npremise = "heads_do_not_divide"',
    )
    (files / "paper.toml").write_text(text)
    monkeypatch.setitem(exact.EXACT, "heads_do_not_divide", lambda _: exact.Found(False, "they do"))
    with pytest.raises(ValueError, match=r"paper.toml, XX1 .* does not hold: they do"):
        evaluated(files, write())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('where = "Table 1"', 'were = "Table 1"', "unknown key: 'were'. Did you mean 'where'"),
        ('where = "Table 1"', "", r"claim 1: the key 'where' is missing"),
        ('where = "Table 1"', "where = 1", r"where must be str; got 1"),
        ('where = "Table 1"', 'where = "T"\nverdict = "reproduced"', "unknown key: 'verdict'"),
        ('title = "A paper"', 'titel = "A paper"', "Did you mean 'title'"),
        ('title = "A paper"', 'title = "A paper"\nname = "x"', "unknown key: 'name'"),
        ('kind = "loss"', 'kind = "losses"', "unknown kind of a comparison: 'losses'. Did you"),
        ('kind = "loss", ', "", "unknown kind of a comparison: None"),
        ('own = "carope"', 'won = "carope"', "unknown key: 'won'. Did you mean 'own'"),
        ('own = "carope"', 'own = "carope", length = 1.5', "length must be int"),
        ('own = "carope"', 'own = "carope", decides = 1', "decides must be bool"),
        ('own = "carope"', 'own = "carope", protocol = "window"', "Did you mean 'windows'"),
        ('own = "carope"', 'own = "carope", match = "token"', "Did you mean 'tokens'"),
        ('own = "carope"', 'own = "carope", tolerance = -1', "tolerance must be 0 or more"),
        ('own = "carope"', 'own = "carope", decides = false', "no comparison decides"),
        ('effect = "size"', 'effect = "sizes"', "unknown effect: 'sizes'. Did you mean 'size'"),
        ('unit = "perplexity"', 'unit = "perplexities"', "Did you mean 'perplexity'"),
        ('unit = "perplexity"', 'unit = "points"', "is in points; rows of this kind"),
        ("own = 10.0", "own = 13.0", "not in the claim's favour"),
        (", other = 12.0", "", "has no `other`"),
        ('commands = ["grid"]', 'commands = ["grids"]', "Did you mean 'grid'"),
        ('commands = ["grid"]', "commands = []", "no command of it makes the rows"),
        ('commands = ["grid"]', 'commands = "grid"', "commands must be a list"),
        ("[claim.full]", "[claim.any]", "needs the checks mini and full"),
        ("[claim.full]", 'premise = "x"\n[claim.full]', "unknown key: 'premise'"),
        ('where = "Table 1"', 'where = "T"\npremise = "x"', "a premise is of not_runnable"),
        ('where = "Table 1"', 'where = "T"\nnot_runnable = "y"\npremise = "x"', "unknown premise"),
        ("[claim.mini]", '[claim.mini]\nnone = "why"', "needs comparisons, or the reason"),
        ("[[claim]]", "[[claim]", "paper.toml is no TOML"),
        (LOSS, 'kind = "exact", function = "cut"', "unknown function: 'cut'"),
        (LOSS, 'kind = "exact", function = "cmha_factorises", rows = "x"', "unknown key: 'rows'"),
        (LOSS, RATIO.replace("both = { S = 8 }", "both = { sed = 8 }"), "Did you mean 'seed'"),
        (LOSS, RATIO.replace("both = { S = 8 }", 'both = { S = "8" }'), "S must be"),
        (LOSS, RATIO.replace("both = { S = 8 }", "both = 8"), "both must be"),
        (LOSS, RATIO.replace('"lower"', '"less"'), "unknown value: 'less'"),
        (LOSS, LOAD, "no command of it makes the rows 'cpu/other.jsonl'"),
        (LOSS, LOAD.replace("own = 0.01", 'own = "0.01"'), "own must be float"),
        (LOSS, f'{MADE}, effect = "size"', "are held against no published number"),
    ],
)
def test_files_are_read_strictly(files: Path, old: str, new: str, message: str) -> None:
    assert old in PAPER
    (files / "paper.toml").write_text(PAPER.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        read_papers(files)
    assert "paper.toml" in str(error.value)


def test_an_id_is_one_claims(files: Path) -> None:
    (files / "second.toml").write_text(PAPER)
    with pytest.raises(ValueError, match=r"second.toml, XX1: paper.toml has a claim of this id"):
        read_papers(files)


def test_commands_are_read_strictly(files: Path) -> None:
    (files / "commands.toml").write_text(COMMAND.replace("about", "abuot", 1))
    with pytest.raises(ValueError, match="Did you mean 'about'"):
        read_papers(files)


# What is committed.


def test_every_claim_is_there() -> None:
    found = {name: [claim.id for claim in paper.claim] for name, paper in PAPERS.items()}
    assert found == {
        "carope": [f"CA{i}" for i in range(1, 8)],
        "cmha": [f"CM{i}" for i in range(1, 5)],
        "moh": [f"MO{i}" for i in range(1, 7)],
        "rcmha": [f"RC{i}" for i in range(1, 4)],
        "rope_scaling": [f"RS{i}" for i in range(1, 5)],
    }


@pytest.mark.parametrize(("paper", "claim", "scale"), CHECKS)
def test_commands_train_and_measure_what_a_check_compares(
    paper: reading.Paper, claim: reading.Claim, scale: str
) -> None:
    check = claim.check(scale)
    by_rows = {COMMANDS[name].rows: COMMANDS[name].command for name in check.commands}
    for each in check.compare:
        if not isinstance(each, Loss) or each.rows not in by_rows:
            assert not isinstance(each, Loss) or not each.decides
            continue
        args = perplexity.parser().parse_args(words_of(by_rows[each.rows])[0])
        labels = [str(method(name)) for name in args.attention]
        assert each.own in labels
        assert each.other in labels
        assert each.match in args.match
        assert each.length in args.contexts
        assert args.seeds >= 5
        assert args.out == Path("bench/results", each.rows)


def words_of(command: str) -> tuple[list[str], list[str], str]:
    """Arguments of a command, those after --, and its module."""
    python, flag, module, *words = shlex.split(command)
    assert (python, flag) == ("python", "-m")
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :], module


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_what_their_benchmarks_take(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = COMMANDS[name]
    words, flags, module = words_of(command.command)
    assert f"bench/results/{command.rows}" in words
    if module == "bench.perplexity":
        args = perplexity.parser().parse_args(words)
        perplexity.check_args(args)
        methods = [method(label) for label in args.attention]
        plan = Plan(tmp_path, methods, method(args.baseline), flags, [(0, 0)])
        for each in methods:
            config = plan.cell(each, (0, 0)).config
            with torch.device("meta"):
                GPT(replace(config.model(1024), layers=1))
    elif module == "bench.throughput":
        throughput.parse(words)
    elif module == "bench.memory":
        memory.parser().parse_args(words)
    elif module == "bench.extend":
        extend.parse(words)
    else:
        assert module == "bench.routing"
        monkeypatch.setattr("sys.argv", ["routing", *words])
        routing.parse()


def test_every_command_is_some_checks() -> None:
    claims = [claim for paper in PAPERS.values() for claim in paper.claim]
    checks = [claim.check(scale) for claim in claims for scale in ledger.SCALES]
    assert {name for check in checks for name in check.commands} == COMMANDS.keys()


def test_identities_and_arithmetic_hold() -> None:
    numbers = {claim.id: {each.of: each for each in claim.published}
               for paper in PAPERS.values() for claim in paper.claim}  # fmt: skip
    assert exact.carope_starts_as_rope({}).holds
    found = exact.carope_bias_free_is_not_rope({})
    assert found.holds
    assert "0.5906" in found.words
    assert "2.1e+07" in found.words
    assert exact.heads_do_not_divide(numbers["CA6"]) == (True, "768 / 10 = 76.8 features a head")
    assert exact.cut_in_the_table(numbers["CA7"]).words.startswith("tiny at 1024: 54.8%")
    assert not exact.cut_in_the_table(numbers["CA7"]).holds
    assert exact.cmha_factorises({}).holds
    assert exact.rcmha_adds_to_rmha({}).holds
    assert not exact.gain_over_the_control(numbers["MO2"]).holds


def test_an_identity_that_fails_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "turned", lambda encoding, q, k, positions: torch.stack([q, k]))
    found = exact.cmha_factorises({})
    assert not found.holds
    assert "only" in found.words


def test_the_published_effects_are_those_of_the_papers_tables() -> None:
    claims = {claim.id: claim for paper in PAPERS.values() for claim in paper.claim}
    for claim, of, effect in (
        ("CA1", "small at 512", 0.0038), ("CA1", "tiny at 512", 0.0117),
        ("CA2", "small at 1024", 0.973), ("CA2", "tiny at 1024", 0.794),
    ):  # fmt: skip
        assert claims[claim].numbers(of).effect == pytest.approx(effect, abs=5e-4)


def test_the_committed_ledger_is_whole() -> None:
    entries = {entry.claim.id: entry for entry in ledger.entries()}
    assert len(entries) == 24
    verdicts = {name: entry.verdict for name, entry in entries.items()}
    judged = [f"{what}{scale}" for what in (REPRODUCED, WITHIN_NOISE, CONTRADICTED)
              for scale in ("", " (mini)")]  # fmt: skip
    assert set(verdicts.values()) <= {*judged, "not runnable as stated", OPEN}
    for name in ("CA5", "CA6", "CM1", "CM2", "MO2", "MO3", "MO4", "RC1", "RC2"):
        assert verdicts[name] == "not runnable as stated"
    assert (verdicts["CA7"], verdicts["CM4"]) == ("contradicted", "reproduced")
    for entry in ledger.entries(scale="mini"):
        for each in entry.findings:  # what is trained joins one by one; all else has been measured
            assert isinstance(each.compare, Loss | Load) or each.found is not None
    for entry in entries.values():  # a verdict has an interval and evidence
        for each in entry.findings:
            assert each.found is None or each.source
    assert ledger.table(list(entries.values())).markdown().count("\n| ") == 25


# The command.


def test_a_claim_a_paper_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ca7"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("CA7  contradicted\n")
    assert "36.74 against 81.27 perplexity" in printed
    assert main(["rcmha", "--table"]) == 0
    table = capsys.readouterr().out
    assert re.findall(r"^\| (RC\d)", table, re.MULTILINE) == ["RC1", "RC2", "RC3"]
    assert main(["MO5", "--scale", "full"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("MO5  open: no rows\n")
    assert f"    {COMMANDS['moh_small'].command}\n" in printed


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["carop"]) == 1
    assert "Did you mean 'carope'" in capsys.readouterr().err
    assert main(["--results", str(tmp_path / "none")]) == 1
    assert "must be a folder of rows" in capsys.readouterr().err
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "perplexity.jsonl").write_text("{}\n")
    assert main(["CA1", "--results", str(tmp_path)]) == 1
    assert "perplexity.jsonl:1 is no row" in capsys.readouterr().err


def test_the_report_shows_all_papers() -> None:
    section = report.claims()
    for claim in (claim for paper in PAPERS.values() for claim in paper.claim):
        assert f"<td>{claim.id}</td>" in section.below
    assert "no effect of half the claimed size" in section.below
