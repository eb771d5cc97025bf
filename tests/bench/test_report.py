"""The report: figures, tables and page from rows, the README's tables, the roofline."""

import base64
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench import answer, figures, report, tables
from bench.comparison import recipe
from bench.roofline import percent_of_roofline, work
from bench.rows import read, row_of
from bench.statistics import student
from measured_rows import (
    GAPS,
    kernel_row,
    kernel_rows,
    memory_rows,
    perplexity_rows,
    throughput_rows,
    write,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "cpu", perplexity=perplexity_rows(), throughput=throughput_rows(),
                 memory=memory_rows(), kernels=kernel_rows())  # fmt: skip


class Page(HTMLParser):
    """What a browser would load, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.targets: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.sources += [value for key, value in attrs if key == "src" and value]
        self.targets += [value for key, value in attrs if key == "href" and value]
        self.ids += [given["id"]] if given.get("id") else []  # type: ignore[list-item]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.main([str(folder)])
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    assert page.targets == [f"#{name}" for name in page.ids]
    assert len(page.sources) == 6
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"https?://|<script|@import", html)
    drawn = sorted(path.stem for path in (folder / "plots").iterdir())
    assert drawn == ["context", "differences", "memory", "pareto", "perplexity", "throughput"]
    assert "No rows of kind routing" in html
    assert str(folder / "report.html") in capsys.readouterr().out


def test_the_page_begins_with_the_answer(folder: Path) -> None:
    report.main([str(folder)])
    html = (folder / "report.html").read_text(encoding="utf-8")
    first = html[html.index("<h2") : html.index("<h2", html.index("<h2") + 1)]
    rows = read(folder / "perplexity.jsonl", folder / "throughput.jsonl")
    for line in answer.sentences(rows):
        assert f"<li>{tables.html_of(line)}</li>" in first
    assert answer.verdict_table(rows).html() in html.replace("<div class=wide>", "").replace(
        "</table></div>", "</table>"
    )


def test_gaps_are_those_of_seeds_and_text(folder: Path) -> None:
    found = tables.gaps(read(folder / "perplexity.jsonl"), "flops", "windows", 8)
    assert found["carope"].seeds == pytest.approx(student(GAPS["carope"]))
    assert found["carope"].text == (-0.21, -0.19)


def test_mechanisms_are_shown_where_they_were_drawn(folder: Path) -> None:
    figure = figures.memory(read(folder / "memory.jsonl"))
    (folder / "carope-mechanism.png").write_bytes(report.png(figure))
    report.main([str(folder)])
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert len(page.sources) == 7


def test_the_perplexity_table(folder: Path) -> None:
    table = tables.perplexity_table(read(folder / "perplexity.jsonl"))
    lines = {line[0]: line for line in table.lines}
    mean = math.exp(3 + 0.1 + 8 / 100)
    assert lines["`rope`"][1:3] == ["1,234", f"{mean:.2f}"]
    assert lines["`rope`"][4:] == ["", ""]
    assert lines["`mha`"][3] == "-"
    assert lines["`carope`"][4].startswith("**-0.200** (-0.225 .. -0.175)")
    assert re.fullmatch(r"\+0\.007 \(-0\.\d+ \.\. \+0\.\d+\), needs \d+ seeds", lines["`nope`"][4])
    assert "3 seeds" in table.note
    first, rule, *_ = table.markdown().splitlines()
    assert first.count("|") == rule.count("|")
    assert "<code>rope</code>" in table.html()
    assert "<b>-0.200</b> (" in table.html()


def test_the_perplexity_table_names_rates_that_were_chosen(folder: Path) -> None:
    rows = read(folder / "perplexity.jsonl")
    for row in rows:
        row["recipe"] = f"{row['recipe']} tuned=0.1,0.2"
    trial = dict(rows[0], mode="tune", recipe=rows[0]["recipe"].replace("lr=", "lr=9"))
    table = tables.perplexity_table([*rows, trial])
    assert list(table.header[1:3]) == ["parameters", "learning rate"]
    rates = {recipe(row_of(row))["lr"] for row in rows}
    assert {line[2] for line in table.lines} == rates
    assert table.note.endswith("Learning rates: the best of 0.1, 0.2, by other text.")


def test_the_throughput_table_shows_auto_and_peers(folder: Path) -> None:
    table = tables.throughput_table(read(folder / "throughput.jsonl"))
    assert [line[0] for line in table.lines] == ["`nope`", "`rope`", "rope, x-transformers"]
    assert table.lines[1][1:] == ["90", "90", "90", "0.176"]
    assert "512 tokens" in table.note


def test_the_memory_table(folder: Path) -> None:
    table = tables.memory_table(read(folder / "memory.jsonl"))
    lines = {line[0]: line[1:] for line in table.lines}
    assert lines["`rope`"] == ["700 (1.020)", "", "350", "70"]
    assert lines["`moh`"] == ["", "", "", ""]


def test_the_kernel_table_has_the_share_of_the_roofline(folder: Path) -> None:
    table = tables.kernel_table(read(folder / "kernels.jsonl"))
    (line,) = table.lines
    assert line[:6] == ["rope", "posenc", "fwd", "2x3x5x8", "time", "1.0000"]
    step = read(
        write(folder, steps=iter([kernel_row(1.0, name="decode", T=1, S=70)])) / "steps.jsonl"
    )
    assert tables.kernel_table(step).lines[0][3] == "2x3x1 of 70x8"


def test_whole_layers_have_a_table(tmp_path: Path) -> None:
    about = {"kind": "layer", "name": "rope layer"}
    rows = [kernel_row(2.0, **about), kernel_row(9.0, metric="memory", unit="MiB", **about)]
    report.main([str(write(tmp_path, layers=iter(rows)))])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>rope layer</td><td>posenc</td>" in html
    assert html.count("<tr><td>rope layer") == 1


def test_what_nothing_beats_in_both() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 4.5), (3.0, 6.0), (0.5, 4.0)]
    assert figures.front(points) == [(3.0, 4.5), (2.0, 4.0)]


@pytest.mark.parametrize(
    ("name", "mode", "flops", "tensors"),
    [
        ("flash", "fwd", 2, 4),
        ("flash", "bwd", 5, 8),
        ("rope + attention", "fwd+bwd", 7, 12),
        ("relative + attention", "fwd", 3, 4),
        ("rope", "fwd+bwd", 0, 8),
        ("conv per head", "bwd", 0, 9),
        ("decode", "fwd", 0, 2),  # T being the keys
    ],
)
def test_the_work_of_a_kernel(name: str, mode: str, flops: int, tensors: int) -> None:
    batch, heads, length, dim = 3, 5, 7, 11
    found = work(name, mode, (batch, heads, length, dim), "bfloat16")
    assert found is not None
    assert found.flops == flops * batch * heads * length**2 * dim
    assert found.bytes == tensors * batch * heads * length * dim * 2


def test_percent_of_the_roofline(tmp_path: Path) -> None:
    rows = read(write(tmp_path, kernels=kernel_rows()) / "kernels.jsonl")
    moved = 4 * 2 * 3 * 5 * 8 * 2  # q and k in and out, bf16
    assert percent_of_roofline(rows[0], rows) == pytest.approx(100 * moved / 2e12 / 1e-3)
    assert percent_of_roofline(rows[0], rows[:1]) is None
    assert percent_of_roofline(rows[0] | {"name": "direct"}, rows) is None
    step = rows[0] | {"name": "decode", "T": 1, "S": 70}
    moved = 2 * 2 * 3 * 70 * 8 * 2  # keys and values
    assert percent_of_roofline(step, rows) == pytest.approx(100 * moved / 2e12 / 1e-3)


def test_differences_by_position_are_paired_by_seed() -> None:
    rope = {8: {0: 3.0, 1: 4.0}, 16: {0: 2.0, 1: 2.0}}
    other = {8: {1: 4.5, 2: 9.0}, 12: {1: 1.0}, 16: {2: 1.0}}
    found = figures.beside({"moh": other, "rope": rope}, "rope")
    assert found["moh"] == {8: {1: 0.5}}
    assert found["rope"] == {8: {0: 0.0, 1: 0.0}, 16: {0: 0.0, 1: 0.0}}


@pytest.mark.parametrize("of", ["rope", "mha"])
def test_the_context_is_drawn_for_seeds_in_any_order(of: str, tmp_path: Path) -> None:
    """And for a baseline, mha, that has no second length."""
    rows = [row for row in perplexity_rows() if row.seed is not None]
    rows = [replace(row, recipe=row.recipe.replace("=rope", f"={of}")) for row in rows]
    rows.sort(key=lambda row: (row.name, -row.seed if row.name == "nope" else row.seed))
    found = read(write(tmp_path, perplexity=iter(rows)) / "perplexity.jsonl")
    right = figures.by_context(found).axes[1]
    drawn = {line.get_label(): line.get_ydata() for line in right.get_lines()}
    at = 1 if of == "mha" else 2
    gap = sum(GAPS["nope"]) / 3 - sum(GAPS[of]) / 3
    assert list(drawn["nope"]) == pytest.approx([gap] * at)


def test_methods_of_one_name_look_unlike() -> None:
    assert figures.style("moh") != figures.style("moh:top_k=1")
    assert figures.style("moh")["color"] == figures.style("moh:top_k=1")["color"]


def test_what_a_table_cannot_show_is_refused(folder: Path) -> None:
    every = {kind: read(folder / f"{kind}.jsonl") for kind in ("throughput", "memory")}
    every["perplexity"] = read(folder / "perplexity.jsonl")
    for kind, change, message in (
        ("throughput", {"device": "another"}, "rows of kind throughput are of .* and another"),
        ("memory", {"dtype": "bfloat16"}, "are of float32 and bfloat16: one table cannot"),
    ):
        (*rest, last) = every[kind]
        with pytest.raises(ValueError, match=message):
            getattr(tables, f"{kind}_table")([*rest, last | change])
    peak = [row | {"metric": "FLOP/s"} for row in every["throughput"]]
    with pytest.raises(ValueError, match="no layer by auto"):
        tables.throughput_table(peak)
    with pytest.raises(ValueError, match="all have options"):
        tables.memory_table([row | {"options": "shared=2"} for row in every["memory"]])
    of_flops = [row for row in every["perplexity"] if "match=flops" in row["recipe"]]
    with pytest.raises(ValueError, match="of equal flops alone"):
        tables.perplexity_table(of_flops)


def test_the_batch_of_decoding_is_said(folder: Path) -> None:
    rows = read(folder / "throughput.jsonl")
    assert "one token of one sequence after 511" in tables.throughput_table(rows).note
    several = tables.throughput_table([row | {"B": 8} for row in rows])
    assert "one token of each of 8 sequences after 511" in several.note


def test_an_empty_folder_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no rows"):
        report.main([str(tmp_path)])
    (tmp_path / "other.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(SystemExit, match=r"other.jsonl:1 is no row"):
        report.main([str(tmp_path)])
    (tmp_path / "other.jsonl").unlink()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(SystemExit, match=r"Is a directory: .*folder.jsonl"):
        report.main([str(tmp_path)])


@pytest.mark.parametrize("asked", ["nothing, cpu/routing.jsonl", "memory, cpu/nothing.jsonl"])
def test_markers_of_what_is_not_there_are_refused(asked: str) -> None:
    with pytest.raises(ValueError, match="a page asks for the table"):
        report.readme(f"<!-- table: {asked} -->\nold\n<!-- end -->")


def test_the_readme_is_filled_between_its_markers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", folder.parent)
    text = "a\n<!-- table: memory, cpu/memory.jsonl -->\nold\n<!-- end -->\nb"
    filled = report.readme(text)
    table = tables.memory_table(read(folder / "memory.jsonl")).markdown()
    assert filled == text.replace("old", table)
    assert report.readme(filled) == filled
