"""bench.comparison: pairing, verdicts, and what is not compared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from bench.comparison import Gap, gap_of, gaps_of, label, tables
from bench.perplexity import main, read_rows
from bench.rows import Row
from bench.statistics import Interval

CPU = Path(__file__).parents[2] / "bench" / "results" / "cpu"
RECIPE = "layers=2 data=a book.txt targets=100 units=5 unit=block baseline=rope match=tokens"


def row(name: str, seed: int | None, loss: float, **changes: Any) -> Row:
    values = {
        "kind": "perplexity", "name": name, "implementation": "auto", "mode": "windows",
        "metric": "loss", "unit": "nats", "p20": loss, "p50": loss, "p80": loss,
        "dtype": "float32", "recipe": RECIPE, "T": 8, "seed": seed,
    }  # fmt: skip
    return Row(**values | changes)


def rows_of(**losses: tuple[float, ...]) -> list[Row]:
    return [
        row(name, seed, loss) for name, each in losses.items() for seed, loss in enumerate(each)
    ]


def test_differences_are_paired_by_seed() -> None:
    rows = rows_of(rope=(3.0, 3.5, 4.0), moh=(2.9, 3.4, 3.9, 9.0))
    bounds = [row("moh", None, x, metric=f"gap {p}%") for p, x in ((2.5, -0.15), (97.5, -0.05))]
    *_, last = tables(rows + bounds)
    assert last.split()[:2] == ["moh", "4"]
    assert "-0.1000 (-0.1000 .. -0.1000)" in last
    assert last.endswith("(-0.1500 .. -0.0500)  lower")
    title, _, baseline, _ = tables(rows)
    assert "equal tokens, windows of 8 tokens side by side; 100 targets, 5 blocks" in title
    # Mean 3.5, t(2, 0.975) s / sqrt(3) = 4.302653 * 0.5 / sqrt(3)
    assert "3.5000 (2.2579 .. 4.7421)" in baseline
    assert "33.12 (9.56 .. 114.67)" in baseline


def test_bits_and_tails_are_means_over_seeds() -> None:
    bits = [row("rope", i, 1.5 + i, metric="bits per byte", unit="bits") for i in range(2)]
    tail = [row("rope", i, 4.0 + i, mode="tail", T=t) for i in range(2) for t in (4, 6)]
    tail += [row("mha", i, 5.0 + i, mode="tail", T=4) for i in range(2)]
    lines = list(tables([*rows_of(rope=(3.0, 4.0)), *bits, *tail]))
    assert " 2.000" in lines[2]
    assert [line.split() for line in lines[-3:]] == [
        ["method", "4", "6"],
        ["rope", "4.5000", "4.5000"],
        ["mha", "5.5000", "-"],
    ]


@pytest.mark.parametrize(
    ("seeds", "text", "needed", "p", "verdict"),
    [
        ((-0.2, -0.3, -0.1), (-0.25, -0.05), 3, 0.01, "lower"),
        ((0.2, 0.1, 0.3), (0.05, 0.25), 3, 0.01, "higher"),
        ((0.2, 0.1, 0.3), None, 3, 0.01, "higher"),
        (
            (0.2, 0.1, 0.3),
            (0.05, 0.25),
            3,
            0.06,
            "no difference among so many comparisons",
        ),
        ((0.2, 0.1, 0.3), (-0.05, 0.25), 3, 0.01, "no difference that so much text can see"),
        (
            (0.2, -0.1, 0.5),
            (0.05, 0.25),
            7,
            0.1,
            "no difference that 3 seeds can see; this gap needs 7 seeds",
        ),
        (
            (0.0, -0.1, 0.1),
            None,
            float("inf"),
            1.0,
            "no difference that 3 seeds can see; this gap needs more than 10,000 seeds",
        ),
        ((-0.2, -9e9, 9e9), (-0.3, -0.1), None, None, "lower over the text; seeds: one only"),
        (
            (-0.2, -9e9, 9e9),
            (-0.3, 0.1),
            None,
            None,
            "no difference over the text; seeds: one only",
        ),
        ((-0.2, -9e9, 9e9), None, None, None, "no difference over the text; seeds: one only"),
    ],
)
def test_verdicts(
    seeds: tuple[float, ...], text: Any, needed: Any, p: float | None, verdict: str
) -> None:
    assert Gap(Interval(*seeds), 3, text, needed, p).verdict == verdict


def test_each_gap_is_one_of_many() -> None:
    own = {0: 2.0, 1: 2.5, 2: 1.0}
    losses = {"rope": own}
    losses |= {f"m{k}": {s: x + 0.1 + k * s / 100 for s, x in own.items()} for k in (1, 2, 3)}
    losses["one"] = {0: 1.0}
    found = gaps_of(losses, "rope", {"m1": (0.05, 0.2)})
    assert list(found) == ["m1", "m2", "m3", "one"]
    assert found["one"].p is None
    alone = [stats.ttest_rel(list(losses[f"m{k}"].values()), list(own.values())).pvalue
             for k in (1, 2, 3)]  # fmt: skip
    assert alone == sorted(alone)
    expected = [3 * alone[0], max(3 * alone[0], 2 * alone[1]), max(2 * alone[1], alone[2])]
    assert [found[f"m{k}"].p for k in (1, 2, 3)] == pytest.approx(expected)
    assert (found["m1"].text, found["m2"].text) == ((0.05, 0.2), None)


def test_learning_rates_may_differ_where_they_were_tuned() -> None:
    recipes = [f"{RECIPE} lr={rate} min_lr={rate}" for rate in (1, 2)]
    apart = [row("rope", 0, 3.0, recipe=recipes[0]), row("mha", 0, 3.0, recipe=recipes[1])]
    with pytest.raises(ValueError, match="differ in"):
        list(tables(apart))
    tuned = [replace(r, recipe=f"{r.recipe} tuned=1,2") for r in apart]
    tried = [
        row("rope", 0, loss, mode="tune", recipe=f"{recipe} tuned=1,2")
        for loss, recipe in zip((3.5, 3.25), recipes, strict=True)
    ]
    lines = list(tables([*tuned, *tried]))
    assert [line.split() for line in lines[1:3]] == [["1", "2"], ["rope", "3.5000", "3.2500*"]]


def test_a_gap_needs_seeds_of_both() -> None:
    assert gap_of({1: 2.0}, {2: 2.0}) is None
    found = gap_of({1: 2.0, 2: 2.5, 3: 1.0}, {2: 2.0, 1: 1.4, 5: 0.0})
    assert found is not None
    assert (found.count, found.seeds.mean) == (2, pytest.approx(0.55))
    assert found.needed is not None
    assert found.needed >= 2


def test_labels_are_what_is_typed() -> None:
    assert label("rope", "") == "rope"
    assert label("moh", "shared=2 top_k=1") == "moh:shared=2,top_k=1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "rope"}, "two runs of rope with seed 0"),
        ({"recipe": RECIPE.replace("layers=2", "layers=3")}, r"'layers=2', 'layers=3'"),
        (
            {"recipe": RECIPE + " mlp_dim=9"},
            r"differ in \['mlp_dim=9'\]: compare runs of one recipe",
        ),
        ({"recipe": RECIPE.replace("=rope", "=nope")}, "'baseline=nope', 'baseline=rope'"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(
            tables(
                [*rows_of(rope=(3.0,)), row(**{"name": "moh", "seed": 0, "loss": 3.0} | changes)]
            )
        )


def test_a_match_may_change_what_it_turns() -> None:
    recipe = RECIPE.replace("tokens", "parameters")
    rows = [row(name, 0, 3.0, recipe=f"{recipe} mlp_dim={len(name)}") for name in ("rope", "moh")]
    title, *_ = tables(rows)
    assert title.startswith("\nequal parameters")


def test_a_missing_baseline_is_named() -> None:
    with pytest.raises(ValueError, match=r"no run of the baseline 'rope'; there are \['moh'\]"):
        list(tables(rows_of(moh=(3.0,))))


def test_foreign_and_broken_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory\.jsonl:1 is a row of kind 'memory'; expected"):
        read_rows(CPU / "memory.jsonl", "perplexity", "run")
    lines = (CPU / "moh_runs.jsonl").read_text().splitlines()
    broken = tmp_path / "rows.jsonl"
    broken.write_text("\n".join([lines[0], lines[1][:-9]]))
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 is no row of measurements"):
        read_rows(broken, "run")
    broken.write_text(lines[0] + "\n" + lines[1].replace("targets=", "tokens="))
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 has no recipe of a comparison"):
        read_rows(broken, "run")


def test_rows_of_older_runs_have_the_interval_over_seeds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = read_rows(CPU / "moh_runs.jsonl", "run")
    assert main(["--rows", str(CPU / "moh_runs.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("equal tokens") == len({row.T for row in rows})
    assert "over the text" not in printed
    for kind in ("lower", "seeds can see; this gap needs"):
        assert kind in printed
