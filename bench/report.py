"""Measured rows as a page to look at: `python -m bench.report [FOLDER]`.

    python -m bench.report                          bench/results/cpu: report.html and plots/*.png
    python -m bench.report --readme                 also the tables of README.md and docs/, between
                                                    their markers

The page is one file that needs no network; its figures are the PNGs beside it. All that it shows is
read from the folder: rows, and the NAME-mechanism.png that `bench.mechanisms` drew there.
"""

import argparse
import base64
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from types import MappingProxyType
from typing import NamedTuple

from matplotlib.figure import Figure

from posenc.files import atomic_file

from . import answer, comparison, figures, scores, tables
from .claims import ledger, verdict
from .clone import DOCS, RESULTS, ROOT, check_clone
from .rows import read, row_of
from .tables import Rows, where

#: What is read and holds tables: the README and the site.
PAGES = (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
#: A table of a page: its name and the file, below the results, that it is made of.
MARKED = re.compile(
    r"(<!-- table: ([\w ]+), (the code|the ledger|[\w/.-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL
)


class Section(NamedTuple):
    """Of the page."""

    title: str
    text: str  # HTML
    drawn: Mapping[str, Figure] = MappingProxyType({})
    below: str = ""  # HTML


def which(rows: Rows) -> Section:
    """The answer before its evidence."""
    said = (tables.html_of(line) for line in answer.sentences(rows))
    return Section(
        "Which scheme for a small model?",
        f"<ul>{''.join(f'<li>{line}</li>' for line in said)}</ul>",
        below=answer.cost_table(rows).html(),
    )


def perplexity(rows: Rows) -> Section:
    """Which encoding predicts best."""
    return Section(
        "Perplexity",
        "<p>Every method beside the baseline, at every length and under every match.</p>",
        {
            "perplexity": figures.perplexity(rows),
            "differences": figures.differences(rows),
            "context": figures.by_context(rows),
            "pareto": figures.pareto(rows),
        },
        answer.verdict_table(rows).html()
        + tables.perplexity_table(rows).html()
        + details("All tables", printed(rows)),
    )


def printed(rows: Rows) -> str:
    """The tables of bench.perplexity."""
    return "\n".join(comparison.tables([row_of(row) for row in rows])).strip()


def runs(rows: Rows) -> Section:
    """Finished runs of the trainer."""
    text = "<p>Finished runs of the trainer, compared over seeds.</p>"
    return Section("Training runs", text, below=f"<pre>{escape(printed(rows))}</pre>")


def throughput(rows: Rows) -> Section:
    """What an attention layer costs in time, beside other libraries' layers."""
    from .throughput import checks

    return Section(
        "Throughput",
        "<p>One attention layer with its projections; every layer passed a comparison with its "
        "definition in fp64 before it was timed.</p>",
        {"throughput": figures.throughput(rows)},
        tables.throughput_table(rows).html()
        + details("RoPE beside every peer's, and where a cache pays",
                  "\n".join(checks([row_of(row) for row in rows]))),
    )  # fmt: skip


def memory(rows: Rows) -> Section:
    """What it costs in memory."""
    return Section(
        "Memory",
        "<p>What autograd keeps, what decoding keeps, and the peak of a training step.</p>",
        {"memory": figures.memory(rows)},
        tables.memory_table(rows).html(),
    )


def savings(rows: Rows) -> Section:
    """What dropping heads saves."""
    from .routing import figure, report

    return Section(
        "Heads that a router drops",
        "<p>Time over that of dense attention against the share of active heads.</p>",
        {"routing": figure(rows)},
        tables.savings_table(rows).html()
        + details("Where it breaks even", "\n".join(report(rows))),
    )


def kernels(rows: Rows) -> Section:
    """Triton kernels beside their peers, and the share of the roofline that they reach."""
    from .kernels import ratios

    return Section(
        "Kernels",
        "<p>Of the roofline: the larger of FLOPs over the rate of a large product and bytes over "
        "the rate of a copy, measured in the same run, over the time.</p>",
        below=tables.kernel_table(rows).html()
        + details("Targets", "\n".join(ratios([row_of(row) for row in rows]))),
    )


def layers(rows: Rows) -> Section:
    """Whole layers by kernels, eager and compiled."""
    return Section("Layers on a GPU", "<p>Attention layers with their projections.</p>",
                   below=tables.kernel_table(rows).html())  # fmt: skip


def extend(rows: Rows) -> Section:
    """A trained model on texts longer than it was trained for."""
    return Section(
        "Beyond the training length",
        "<p>A trained model's RoPE under each scaling; circles are transformers' own.</p>",
        {"extend": figures.extended(rows)},
        tables.extend_table(rows).html(),
    )


def claims() -> Section:
    """What papers claim, and what all rows below bench/results say of it."""
    found = ledger.entries()
    parts = {entry.paper.name: entry.paper for entry in found}
    below = "".join(
        f"<h3>{escape(paper.title)}</h3><p class=note>arXiv {escape(paper.arxiv)}. "
        f"{escape(paper.source)}</p>"
        + ledger.table([entry for entry in found if entry.paper is paper]).html()
        for paper in parts.values()
    )
    return Section(
        "Claims of the papers",
        "<p>Verdicts are computed by one rule from these rows; (mini) is a small experiment, which "
        "supports or weakens a claim and does not settle it.</p>",
        below=below + details("The rule", (verdict.__doc__ or "").strip()),
    )


def tasks(rows: Rows) -> Section:
    """Tasks with one right answer, beyond the training length."""
    return Section(
        "Synthetic tasks",
        "<p>Trained on short texts, asked longer ones; a point is a seed, a line goes through the "
        "medians, dotted is the longest length of training.</p>",
        {"tasks": figures.tasks(rows)},
        tables.tasks_table(rows).html()
        + details("All tables", "\n".join(scores.tables([row_of(row) for row in rows]))),
    )


#: By the kind of its rows, in the order of the page.
SECTIONS: dict[str, Callable[[Rows], Section]] = {
    "perplexity": perplexity,
    "tasks": tasks,
    "throughput": throughput,
    "memory": memory,
    "routing": savings,
    "extend": extend,
    "kernel": kernels,
    "layer": layers,
    "run": runs,
}


def details(title: str, text: str) -> str:
    """Text that opens on a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def sections(rows: Rows, folder: Path) -> Iterator[Section]:
    """The answer, one for every kind that has rows, and the mechanisms."""
    trained = where(rows, kind="perplexity")
    if trained and "tokens" in tables.matches(trained):
        yield which(rows)
    for kind, make in SECTIONS.items():
        own = where(rows, kind=kind)
        if kind == "kernel":
            own += where(rows, kind="ceiling")
        if not where(rows, kind=kind):
            yield Section(kind.capitalize(), f"<p>No rows of kind {kind} in this folder.</p>")
            continue
        section = make(own)
        yield section._replace(below=section.below + provenance(own))
    if folder.resolve().parent == RESULTS:
        yield claims()
    drawn = sorted(folder.glob("*-mechanism.png"))
    if drawn:
        images = "".join(image(path.read_bytes(), path.stem) for path in drawn)
        yield Section("What the layers learned", "<p>From the trained models.</p>", below=images)


def provenance(rows: Rows) -> str:
    """Where, on what and when rows were measured."""
    values = {
        column: ", ".join(dict.fromkeys(str(row[column])[:40] for row in rows))
        for column in ("device", "torch", "triton")
    }
    values["commit"] = ", ".join(dict.fromkeys(str(row["commit"])[:10] for row in rows))
    text = "; ".join(f"{column} {value}" for column, value in values.items())
    times = sorted(row["time"] for row in rows)
    span = times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"
    return f"<p class=note>{len(rows)} rows; {escape(text)}; {escape(span)}.</p>"


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a file."""
    held = io.BytesIO()
    figure.savefig(held, format="png")
    return held.getvalue()


def image(data: bytes, title: str) -> str:
    """An image within the page."""
    text = base64.b64encode(data).decode("ascii")
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{text}">'


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 0 auto;
       max-width: 1080px; padding: 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; padding-top: .8rem; border-top: 1px solid #ddd; }
nav a { margin-right: 1.1rem; color: #0072b2; text-decoration: none; white-space: nowrap; }
nav a:hover { text-decoration: underline; }
img { display: block; max-width: 100%; height: auto; margin: 1.2rem auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; margin: 1rem 0 .3rem;
        font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid #e6e6e6; }
th { vertical-align: bottom; border-bottom: 2px solid #999; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
tbody tr:hover { background: #f4f8fb; }
pre { font-size: .76rem; line-height: 1.4; overflow-x: auto; background: #f6f6f6; padding: .8rem; }
summary { cursor: pointer; color: #0072b2; margin: .6rem 0; }
.note { color: #666; font-size: .82rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="note">$about</p>
<nav>$links</nav>
$body
</body>
</html>
""")


def page(parts: Sequence[Section], images: dict[str, bytes], about: str) -> str:
    """The HTML."""
    body, links = [], []
    for number, section in enumerate(parts):
        drawn = "".join(image(images[name], name) for name in section.drawn)
        below = section.below.replace("<table>", "<div class=wide><table>")
        below = below.replace("</table>", "</table></div>")
        links.append(f'<a href="#s{number}">{escape(section.title)}</a>')
        body.append(f'<h2 id="s{number}">{escape(section.title)}</h2>{section.text}{drawn}{below}')
    title = "posenc: position in attention, measured"
    return PAGE.substitute(
        title=title, about=escape(about), links="".join(links), body="\n".join(body)
    )


def write(folder: Path) -> list[Path]:
    """Draw the figures and write the page into a folder of rows; the files written.

    Raises:
        ValueError: the folder holds no rows, or a file with a line that is none.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder} holds no rows: no .jsonl file. Give a folder of bench/results.")
    rows = read(*files)
    parts = list(sections(rows, folder))
    images = {name: png(figure) for part in parts for name, figure in part.drawn.items()}
    (folder / "plots").mkdir(exist_ok=True)
    written = []
    for name, data in images.items():
        written.append(folder / "plots" / f"{name}.png")
        with atomic_file(written[-1]) as temporary:
            temporary.write_bytes(data)
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    written.append(folder / "report.html")
    with atomic_file(written[-1]) as temporary:
        temporary.write_text(page(parts, images, f"{len(rows)} rows; {devices}"), encoding="utf-8")
    return written


def readme(text: str) -> str:
    """The text of a page, the README or one of docs/, with its tables made anew.

    Raises:
        ValueError: a marker names no table, or a file that is missing or damaged.
    """

    def table(found: re.Match[str]) -> str:
        begin, name, file, _, end = found.groups()
        if file == "the ledger":
            return begin + ledger.table(ledger.entries(name)).markdown() + "\n" + end
        if name in tables.OF_CODE and file == "the code":
            return begin + tables.OF_CODE[name]().markdown() + "\n" + end
        path = RESULTS / file
        if name not in tables.TABLES or not path.is_file():
            known = ", ".join((*tables.OF_CODE, *tables.TABLES))
            raise ValueError(
                f"a page asks for the table {name!r} of {file}; there are {known}, and files "
                f"below {RESULTS.relative_to(ROOT)}."
            )
        return begin + tables.TABLES[name](read(path)).markdown() + "\n" + end

    return MARKED.sub(table, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, and the tables of README.md and docs/ if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS / "cpu",
                        help="of rows, bench/results/cpu if not given")  # fmt: skip
    parser.add_argument("--readme", action="store_true",
                        help="also fill the tables of README.md and docs/")  # fmt: skip
    args = parser.parse_args(arguments)
    try:
        if args.readme:
            check_clone("--readme")
        written = write(args.folder)
        for path in PAGES if args.readme else ():
            path.write_text(readme(path.read_text(encoding="utf-8")), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
