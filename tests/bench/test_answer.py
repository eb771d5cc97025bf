"""bench.answer: what rows say of schemes, in words and tables."""

from pathlib import Path
from typing import Any

import pytest

from bench import answer, tables
from bench.rows import read
from measured_rows import perplexity_rows, throughput_rows, write


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    write(tmp_path, perplexity=perplexity_rows(), throughput=throughput_rows())
    return read(tmp_path / "perplexity.jsonl", tmp_path / "throughput.jsonl")


def test_the_answer_names_what_is_below_the_baseline_and_its_cost(rows: list[Any]) -> None:
    said = list(answer.sentences(rows))
    assert said[0] == (
        "At 8 tokens, the length of training, these come out below rope by an interval of their "
        "own, in nats: `carope` -0.200 (-0.225 .. -0.175)."
    )
    widths = sorted((gap.seeds.high - gap.seeds.low) / 2 for gap in
                    tables.gaps(rows, "tokens", "windows", 8).values())  # fmt: skip
    assert f"3 seeds: half of the intervals are wider than {widths[1]:.3f} nats" in said[1]
    assert said[2] == (
        "Corrected for the 3 methods compared (Holm), equal tokens, at any length: better than "
        "rope `carope`; worse `mha`."
    )
    assert said[3] == said[2].replace("tokens", "flops")
    assert said[4] == (
        "At 2 times that length rope's loss is +0.080 nats off; `mha` cannot be asked there."
    )
    assert said[5].startswith(
        "What was asked: models of 1,234 to 1,234 parameters, 432 tokens each of one text "
        "(books.txt), the learning rate 0.002 for all."
    )
    assert len(said) == 6


def test_costs_are_beside_what_was_timed(rows: list[Any]) -> None:
    slower = [row | {"name": "carope"} for row in rows if row["name"] == "nope"
              and row["kind"] == "throughput"]  # fmt: skip
    halved = [row | {"p50": row["p50"] / 2} for row in slower]
    first = next(answer.sentences([*rows, *halved]))
    assert first.endswith(
        "(-0.225 .. -0.175), training at 0.56 of the speed, decoding at 0.56 of the speed."
    )


def test_nothing_below_is_said(rows: list[Any]) -> None:
    others = [row for row in rows if row["name"] != "carope"]
    assert next(answer.sentences(others)) == (
        "At 8 tokens, the length of training, no method's interval lies below rope's loss: of 2 "
        "methods none is a reason to leave rope."
    )


def test_rates_of_their_own_are_said(rows: list[Any]) -> None:
    tuned = [
        row | {"recipe": row["recipe"] and row["recipe"] + " tuned=0.001,0.002"} for row in rows
    ]
    *_, last = answer.sentences(tuned)
    assert "each method's best of the learning rates 0.001, 0.002." in last


def test_what_stays_flat_beyond_the_length_is_named(rows: list[Any]) -> None:
    flat = [
        row | {"p50": row["p50"] - 0.08} if (row["name"], row["T"]) == ("nope", 16)
        and (row["mode"], row["metric"]) == ("windows", "loss") else row
        for row in rows
    ]  # fmt: skip
    assert "below +0.01 it stays for `nope`; `mha` cannot" in list(answer.sentences(flat))[4]


def test_verdicts_are_one_table(rows: list[Any]) -> None:
    table = answer.verdict_table(rows)
    assert table.header == ["method", "equal tokens, 8", "equal tokens, 16", "equal flops, 8",
                            "equal flops, 16"]  # fmt: skip
    assert table.lines == [
        ["`carope`", *["**better**"] * 4],
        ["`nope`", *["not seen"] * 4],
        ["`mha`", "**worse**", "", "**worse**", ""],
    ]


def test_an_interval_alone_is_no_verdict(rows: list[Any]) -> None:
    """The bootstrap over the text holds 0."""
    bounds = {"gap 2.5%": -1.0, "gap 97.5%": 1.0}
    wide = [row | {"p50": bounds.get(row["metric"], row["p50"])} for row in rows]
    assert answer.verdict_table(wide).lines[0][1] == "below"
    assert answer.verdict_table(wide).lines[2][1] == "above"
    assert "better than rope none; worse none." in list(answer.sentences(wide))[2]


def test_one_seed_is_no_verdict(rows: list[Any]) -> None:
    single = [row for row in rows if row["seed"] in (0, None)]
    assert {cell for line in answer.verdict_table(single).lines for cell in line[1:] if cell} == {
        "one seed"
    }
    assert next(answer.sentences(single)) == (
        "Of 3 methods beside rope none was trained under two seeds: one says nothing of a method."
    )


def test_the_costs_are_sorted_by_loss(rows: list[Any]) -> None:
    table = answer.cost_table(rows, {"rope": "[rope](rope.md)"})
    assert [line[0] for line in table.lines] == ["`carope`", "[rope](rope.md)", "`nope`", "`mha`"]
    by_title = dict(zip(table.header, table.lines[1], strict=True))
    assert by_title["training, rope's speed = 1"] == "1.00"
    assert by_title["decoding state, bytes a token"] == f"{2 * 768 * 4 + 8:,}"
    assert table.lines[0][-3:-1] == ["", ""]
    alone = [row for row in rows if row["kind"] == "perplexity"]
    assert not any("speed" in title for title in answer.cost_table(alone).header)
