"""Tables made of rows, as Markdown for the README and the site, and as HTML for the report."""

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn

import posenc
from posenc.backends import fused
from posenc.backends.case import consecutive
from posenc.cache import Stream
from posenc.encodings.learned import Learned
from posenc.zoo import ZOO

from . import copying, routing
from .comparison import Gap, gaps_of, label, losses_of, match_of, recipe
from .roofline import percent_of_roofline
from .rows import Row, row_of
from .scores import fewer, scores_of, seeds_of, spread
from .statistics import MOST_SEEDS

Rows = Sequence[dict[str, Any]]  # as they lie in a file
GPT_2 = (
    "https://cdn.openai.com/better-language-models/"
    "language_models_are_unsupervised_multitask_learners.pdf"
)


class Table(NamedTuple):
    """Cells as Markdown, the first column being names."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str
    words: bool = False  # cells of text, not of numbers

    def markdown(self) -> str:
        """As the README and the site show it."""
        rule = ["---", *["---" if self.words else "---:"] * (len(self.header) - 1)]
        lines = [f"| {' | '.join(line)} |" for line in (self.header, rule, *self.lines)]
        return "\n".join([*lines, "", self.note])

    def html(self) -> str:
        """As the report shows it."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html_of(cell)}</td>" for cell in line) + "</tr>"
            for line in self.lines
        )
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            f"<p class=note>{escape(self.note)}</p>"
        )


def html_of(text: str) -> str:
    """Markdown of cells and of sentences as HTML."""
    html = re.sub(r"`(.*?)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", html)


def where(rows: Rows, **columns: Any) -> list[dict[str, Any]]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in columns.items())]


def measured_on(rows: Rows) -> str:
    """Device and number format of the rows of one table.

    Raises:
        ValueError: they do not share them.
    """
    for column in ("device", "dtype"):
        found = list(dict.fromkeys(row[column] for row in rows))
        if len(found) > 1:
            raise ValueError(
                f"rows of kind {rows[0]['kind']} are of {' and '.join(found)}: one table cannot "
                "show both. Keep them in folders of their own."
            )
    first = rows[0]
    count = first["threads"]
    threads = "" if count is None else f", {count} thread{'' if count == 1 else 's'}"
    return f"{first['device']}{threads}, {first['dtype']}"


def gaps(rows: Rows, match: str, mode: str, length: int) -> dict[str, Gap]:
    """Of every method but the baseline, its loss minus the baseline's."""
    own = [
        row_of(row)
        for row in where(rows, kind="perplexity", mode=mode, T=length)
        if match_of(row_of(row)) == match
    ]
    losses = losses_of([row for row in own if row.metric == "loss"])
    bounds = {(label(row.name, row.options), row.metric): row.p50 for row in own}
    text = {name: (bounds[name, "gap 2.5%"], bounds[name, "gap 97.5%"])
            for name in losses if (name, "gap 2.5%") in bounds}  # fmt: skip
    return gaps_of(losses, baseline(rows), text)


def baseline(rows: Rows) -> str:
    """What the methods of perplexity rows were compared with."""
    return recipe(row_of(where(rows, kind="perplexity")[0]))["baseline"]


def matches(rows: Rows) -> list[str]:
    """By what methods were matched, in the order of the rows."""
    own = where(rows, kind="perplexity", metric="loss")
    return list(dict.fromkeys(match_of(row_of(row)) for row in own))


def lengths(rows: Rows, mode: str) -> list[int]:
    """At which the loss of a mode was measured."""
    return sorted({row["T"] for row in where(rows, kind="perplexity", mode=mode, metric="loss")})


def of_match(rows: Rows, match: str) -> list[Row]:
    """The perplexity rows of one match."""
    own = [row_of(row) for row in where(rows, kind="perplexity")]
    return [row for row in own if match_of(row) == match]


def mean_losses(rows: Rows, match: str, mode: str, length: int) -> dict[str, float]:
    """Of every method that was scored at the length, over its seeds."""
    own = [row for row in of_match(rows, match) if (row.mode, row.metric) == (mode, "loss")]
    losses = losses_of([row for row in own if length == row.T])
    return {name: fmean(by_seed.values()) for name, by_seed in losses.items()}


def gap_cell(gap: Gap | None) -> str:
    """A difference with its interval over seeds; stars where it is clear."""
    if gap is None:
        return ""
    mean = f"{gap.seeds.mean:+.3f}"
    if gap.needed is None:
        return mean
    spread = f" ({gap.seeds.low:+.3f} .. {gap.seeds.high:+.3f})"
    if gap.verdict in ("lower", "higher"):
        return f"**{mean}**{spread}"
    if not gap.seeds.low <= 0 <= gap.seeds.high:
        return f"{mean}{spread}"
    seeds = f"over {MOST_SEEDS:,}" if math.isinf(gap.needed) else f"{gap.needed:.0f}"
    return f"{mean}{spread}, needs {seeds} seeds"


def perplexity_table(rows: Rows) -> Table:
    """Mean perplexity by length, and the gap at the training length under every match.

    Raises:
        ValueError: nothing was trained on equal tokens.
    """
    rows = where(rows, kind="perplexity")
    if "tokens" not in matches(rows):
        raise ValueError(
            f"rows of kind perplexity are of equal {', '.join(matches(rows))} alone. "
            "Measure with --match tokens too."
        )
    own, at = of_match(rows, "tokens"), lengths(rows, "windows")
    losses = {length: mean_losses(rows, "tokens", "windows", length) for length in at}
    sizes = {label(row.name, row.options): row.p50 for row in own if row.metric == "parameters"}
    found = {match: gaps(rows, match, "windows", at[0]) for match in matches(rows)}
    scored = [row for row in own if (row.mode, row.metric) == ("windows", "loss")]
    recipes = {label(row.name, row.options): recipe(row) for row in scored}
    tried = recipe(scored[0]).get("tuned", "").replace(",", ", ")
    lines = []
    for name in losses[at[0]]:
        cells = [f"`{name}`", f"{sizes[name]:,.0f}"]
        cells += [recipes[name]["lr"]] if tried else []
        for length in at:
            loss = losses[length].get(name)
            cells.append("-" if loss is None else f"{math.exp(loss):.2f}")
        lines.append([*cells, *(gap_cell(by_name.get(name)) for by_name in found.values())])
    of = baseline(rows)
    titles = [f"loss - {of}'s at {at[0]}, equal {match}" for match in found]
    seeds = len({row.seed for row in scored})
    note = (
        f"Windows side by side; perplexity = exp(mean loss of {seeds} seeds); trained at {at[0]} "
        f"tokens, - where a table of positions ends there. Differences in nats, paired by seed, "
        f"with 95% intervals over seeds; bold where the paired t test over seeds gives p < .05 "
        f"after Holm's correction for all methods of the column, and the bootstrap over seeds and "
        f"text leaves 0 out. {measured_on(rows)}."
    )
    head = ["method", "parameters"]
    if tried:
        head.append("learning rate")
        note += f" Learning rates: the best of {tried}, by other text."
    return Table([*head, *(f"at {n}" for n in at), *titles], lines, note)


TIMED_AT = 1024  # tokens
THROUGHPUT = {"train": "training", "prefill": "prefill", "decode": "decoding",
              "recompute": "without cache"}  # fmt: skip


def throughput_table(rows: Rows) -> Table:
    """Thousands of tokens a second of the layers chosen by auto, of those by kernels and of all
    peers, at `TIMED_AT` tokens or the nearest length.

    Raises:
        ValueError: none of them was timed.
    """
    rows = where(rows, kind="throughput", metric="throughput")
    rows = [row for row in rows if is_peer(row) or row["implementation"] in ("auto", "fused")]
    if not rows:
        raise ValueError(
            "rows of kind throughput hold no layer by auto, and no peer's. Measure with "
            "--impls auto."
        )
    at = min({row["S"] for row in rows}, key=lambda length: abs(length - TIMED_AT))
    order = {name: place for place, name in enumerate(posenc.names())}
    shown = where(rows, S=at)
    shown.sort(key=lambda row: (is_peer(row), order.get(row["name"], len(order))))
    cells = {(row["name"], row["implementation"], row["mode"]): row["p50"] for row in shown}
    lines = []
    for name, by in dict.fromkeys((row["name"], row["implementation"]) for row in shown):
        who = f"`{name}`" if by == "auto" else f"{name}, {by}"
        rates = [cells.get((name, by, mode)) for mode in THROUGHPUT]
        lines.append([who, *("" if rate is None else thousands(rate) for rate in rates)])
    first, width = shown[0], shown[0]["H"] * shown[0]["D"]
    batches = sorted({row["B"] for row in where(shown, mode="decode")})
    counts = " or ".join(map(str, batches))
    whose = "one sequence" if batches in ([], [1]) else f"each of {counts} sequences"
    note = (
        f"One attention layer, C={width}, H={first['H']}, {at} tokens; decoding is one token of "
        f"{whose} after {at - 1}. {measured_on(shown)}."
    )
    return Table(["layer", *(f"{title}, k tokens/s" for title in THROUGHPUT.values())], lines, note)


def is_peer(row: dict[str, Any]) -> bool:
    """Whether a throughput row is of another library."""
    ours = ("auto", "sdpa", "reference", "fused", "compiled sdpa", "torch")
    return row["implementation"] not in ours


def thousands(rate: float) -> str:
    """Three digits of a thousandth."""
    return f"{rate / 1e3:.3g}" if rate < 1e6 else f"{rate / 1e3:,.0f}"


def memory_table(rows: Rows) -> Table:
    """Bytes a token and peaks of a layer; measured over predicted where a formula covers it.

    Raises:
        ValueError: every layer was measured with options, which the table does not name.
    """
    rows = where(rows, kind="memory", options="")
    if not rows:
        raise ValueError("rows of kind memory all have options. Measure without --options.")
    longest = max(row["T"] for row in rows)

    def cell(name: str, metric: str, implementation: str) -> str:
        found = where(rows, name=name, metric=metric, implementation=implementation)
        ratio = where(rows, name=name, metric=f"{metric} over predicted",
                      implementation=implementation)  # fmt: skip
        if not found:
            return ""
        over = f" ({ratio[-1]['p50']:.3f})" if ratio else ""
        return f"{found[-1]['p50']:,.0f}{over}"

    lines = []
    for name in posenc.names():
        peak = where(rows, name=f"{name} layer", metric="memory", implementation="auto", T=longest)
        lines.append([
            f"`{name}`",
            *(cell(name, "activations", by) for by in ("fused", "auto")),
            cell(name, "decoding state", "cache"),
            f"{peak[-1]['p50']:,.0f}" if peak else "",
        ])  # fmt: skip
    first = rows[0]
    note = (
        f"One layer, C={first['H'] * first['D']}, H={first['H']}; in brackets measured over "
        f"predicted by posenc/cost.py. {measured_on(rows)}."
    )
    header = ["layer", "activations, fused, B/token", "activations, auto, B/token",
              "decoding state, B/token", f"peak of a training step at {longest}, MiB"]  # fmt: skip
    return Table(header, lines, note)


def kernel_table(rows: Rows) -> Table:
    """Times of kernels beside their peers, and how much of the device's ceilings they reach."""
    own = [row for row in rows if row["metric"] in ("time", "graph time")]
    lines = []
    for row in own:
        share = percent_of_roofline(row, rows)
        queries = row["T"] if row["S"] is None else f"{row['T']} of {row['S']}"
        shape = f"{row['B']}x{row['H']}x{queries}x{row['D']}"
        lines.append([
            row["name"], row["implementation"], row["mode"], shape, row["metric"],
            f"{row['p50']:.4f}", "" if share is None else f"{share:.0f}%",
        ])  # fmt: skip
    header = ["kernel", "implementation", "mode", "BxHxTxD", "metric", "ms", "of the roofline"]
    return Table(header, lines, f"{measured_on(own)}." if own else "")


def savings_table(rows: Rows) -> Table:
    """Of MoH: masked time over skipping time with half of the heads active, by length."""
    columns = [(level, mode) for level in ("core", "layer") for mode in routing.MODES]
    lines = []
    for length in sorted({row["S"] for row in rows}):
        cells = [str(length)]
        for level, mode in columns:
            found = routing.ratios(rows, level, mode, "time").get(length, {})
            both = [dict(found.get(by, [])).get(0.5) for by in (routing.MASKED, routing.SKIPPING)]
            cells.append(f"{both[0] / both[1]:.2f}" if both[0] and both[1] else "")
        lines.append(cells)
    note = (
        "Times as fast as computing every head (torch's attention, then the gates); training is "
        f"forward + backward. {measured_on(rows)}, D={rows[0]['D']}."
    )
    titles = {"fwd": "inference", "fwd+bwd": "training", "decode": "decoding"}
    header = ["tokens", *(f"{level}, {titles[mode]}" for level, mode in columns)]
    return Table(header, lines, note)


SHAPES = {
    "packed": "documents packed in a row",
    "window": "window",
    "grouped": "grouped keys, 3:1",
    "transformers llama, 3:1": "transformers llama, 3:1",
}


def shapes_table(rows: Rows) -> Table:
    """Milliseconds of packed rows, windows and grouped keys, in brackets over their measure."""
    measures = {"packed": "apart", "window": "whole", "grouped": "equal"}
    times = {(row["name"], row["implementation"], row["mode"]): row["p50"] for row in rows}
    names = list(dict.fromkeys(row["name"] for row in rows))

    def cell(name: str, label: str, mode: str) -> str:
        ms = times.get((name, label, mode))
        if ms is None:
            return ""
        measure = times.get((name, measures.get(label, ""), mode))
        return f"{ms:.0f}" + ("" if measure is None else f" ({ms / measure:.2f})")

    columns = [(label, mode) for label in SHAPES for mode in ("fwd", "fwd+bwd")]
    columns = [(c, mode) for c, mode in columns if any((name, c, mode) in times for name in names)]
    lines = [[f"`{name}`", *(cell(name, *column) for column in columns)] for name in names]
    titles = {"fwd": "inference", "fwd+bwd": "training"}
    header = ["layer", *(f"{SHAPES[label]}, {titles[mode]}" for label, mode in columns)]
    options = " ".join(dict.fromkeys(row["options"] for row in rows))
    note = (
        "ms; in brackets over the same documents as a batch, no window, a key head for each query "
        f"head. {options}; grouped keys at 512 tokens. {measured_on(rows)}."
    )
    return Table(header, lines, note)


def original_length(rows: Rows) -> int:
    """Tokens that the model of rows of kind extend was trained for."""
    (found,) = {re.findall(r"original=(\d+)", row["options"])[0] for row in rows}
    return int(found)


def extend_table(rows: Rows) -> Table:
    """Loss by position under each scaling of RoPE, and how far transformers' own is off."""
    original, longest = original_length(rows), max(row["T"] for row in rows)
    spans = list(pairwise((0, original // 4, original, longest)))

    def mean(name: str, implementation: str, span: tuple[int, int]) -> str:
        own = where(rows, name=name, implementation=implementation)
        losses = [row["p50"] for row in own if span[0] < row["T"] <= span[1]]
        return f"{fmean(losses):.3f}" if losses else ""

    both = ("posenc", "transformers")
    names = dict.fromkeys(row["name"] for row in rows)
    lines = [[f"`{name}`", *(mean(name, by, span) for span in spans for by in both)]
             for name in names]  # fmt: skip
    header = ["scaling"]
    for start, stop in spans:
        header += [f"{start:,} to {stop:,}", "transformers'"]
    texts = len({row["seed"] for row in rows})
    model = re.findall(r"model=(\S+)", rows[0]["options"])[0]
    note = (
        f"Loss in nats of the tokens at these positions; {model}, trained for {original:,} tokens, "
        f"on {texts} {'text' if texts == 1 else 'texts'} of {longest:,}, scaled by "
        f"{longest / original:g}; {measured_on(rows)}."
    )
    return Table(header, lines, note)


def steps_table(rows: Rows) -> Table:
    """Milliseconds of a model's decoding step."""
    first = rows[0]
    lines = [
        [f"`{row['name']}`", row["implementation"], f"{row['p50']:.3f}", f"{row['p20']:.3f}"]
        for row in rows
    ]
    width = first["H"] * first["D"]
    note = (
        f"One token of one sequence after {first['S'] - 1}, {first['options']}, C={width}, "
        f"H={first['H']}; {measured_on(rows)}."
    )
    return Table(["model", "by", "ms, median", "p20"], lines, note)


def tasks_table(rows: Rows) -> Table:
    """Exact match on every task by method and multiple of the training length, over seeds."""
    found = scores_of([row_of(row) for row in rows], "exact match")
    at = sorted({
        length / asked.longest
        for asked, scores in found.items()
        for by_length in scores.values()
        for length in by_length
    })  # fmt: skip
    lines = []
    for asked, scores in found.items():
        for name, by_length in scores.items():
            shares = (list(by_length.get(round(times * asked.longest), {}).values())
                      if (times * asked.longest).is_integer() else [] for times in at)  # fmt: skip
            cells = (spread(each) if each else "" for each in shares)
            lines.append([str(asked), f"`{name}`{fewer(name, scores)}", *cells])
    seeds = max(map(seeds_of, found.values()))
    first = recipe(row_of(rows[0]))
    note = (
        f"The share of examples whose every asked token is right: median of "
        f"{seeds} {'seed' if seeds == 1 else 'seeds (least..greatest)'}, by the length over the "
        f"longest of training; {first['layers']} layers of width {first['embed_dim']}, "
        f"{int(first['steps']):,} steps; {measured_on(rows)}."
    )
    return Table(["task", "method", *(f"{times:g}x" for times in at)], lines, note)


def copying_table(rows: Rows) -> Table:
    """Exact match on copy and reverse beside what is published of the same tasks."""
    lines = copying.beside(scores_of([row_of(row) for row in rows], "exact match"))
    same, other, tied = copying.agreement(lines)
    first = recipe(row_of(rows[0]))
    note = (
        f"Theirs (three models of 107 M parameters, mean ± standard deviation) / ours (median, "
        f"least and greatest of the seeds; {first['layers']} layers of width "
        f"{first['embed_dim']}, {int(first['steps']):,} steps), at the length over the longest of "
        f"training, theirs and ours. Of {same + other + tied} pairs of methods that are more than "
        f"{copying.APART:g} apart there, ours have {same} in the same order, {other} in the other, "
        f"{tied} at a tie."
    )
    names = copying.METHODS.values()
    return Table(["task", "length", *names], [copying.cells(line) for line in lines], note)


#: Of rows, by the name in the markers of a page.
TABLES: dict[str, Callable[[Rows], Table]] = {
    "perplexity": perplexity_table,
    "throughput": throughput_table,
    "memory": memory_table,
    "moh savings": savings_table,
    "shapes": shapes_table,
    "extend": extend_table,
    "steps": steps_table,
    "tasks": tasks_table,
    "copying": copying_table,
}


def methods() -> Table:
    """Every name of the zoo: what it is, and what it costs a layer of GPT-2 small."""
    plain = count_parameters(posenc.attention("nope", 768, 12))
    lines = []
    for name, row in ZOO.items():
        layer = posenc.attention(name, 768, 12)
        extra = f"{count_parameters(layer) - plain:,}"
        if row.embedding is Learned:
            extra += f" (one table, {1024 * 768:,})"
        what = f"{row.summary}, {paper(row.paper)}"
        lines.append((f"`{name}`", what, row.acts, extra, state_beside_keys(layer)))
    header = ("name", "method", "acts on", "parameters a layer", "decoding state beside k, v")
    return Table(header, lines, "GPT-2 small: C = 768, 12 heads; state in fp32.", words=True)


def state_beside_keys(layer: posenc.Attention) -> str:
    """Its streams, and their bytes a token."""
    kept = {name: held for name, held in layer.streams().items() if name not in ("k", "v")}
    words = (f"{name}, {row_bytes(held)} bytes a token" for name, held in kept.items())
    return "; ".join(words) or "none"


def count_parameters(module: nn.Module) -> int:
    """All of them."""
    return sum(parameter.numel() for parameter in module.parameters())


def row_bytes(stream: Stream) -> str:
    """Of fp32 where the stream is in the layer's dtype."""
    return f"{math.prod(stream.shape) * (stream.dtype or torch.float32).itemsize:,}"


def paper(source: str) -> str:
    """A link to it."""
    if source == "GPT-2":
        return f"[GPT-2]({GPT_2})"
    return f"[{source}](https://arxiv.org/abs/{source})"


def names() -> Table:
    """Every name of the zoo in short: where it acts, what decoding remembers, if by kernels."""
    lines = []
    for name, row in ZOO.items():
        layer = posenc.attention(name, 768, 12)
        kept = [stream for stream in layer.streams() if stream not in ("k", "v")]
        what = f"{row.summary}, {paper(row.paper)}"
        fused = "yes" if has_kernels(layer) else "-"
        lines.append((f"`{name}`", what, row.acts, ", ".join(kept) or "-", fused))
    header = ("name", "method", "acts on", "state beside k, v", "fused")
    note = 'Fused: `impl="fused"` computes it by Triton kernels, forward and backward.'
    return Table(header, lines, note, words=True)


def has_kernels(layer: posenc.Attention) -> bool:
    """Whether `impl="fused"` computes a causal layer."""
    heads = (1, layer.num_heads, 2, layer.head_dim)
    q, k, v = (torch.zeros(heads) for _ in range(3))
    x = torch.zeros(1, 2, layer.embed_dim)
    case = consecutive(q, k, v)
    rotation = layer.encoding.describe_rotation(case.place, x)
    case = case._replace(rotation=rotation, scores=layer.encoding.scores(case.place, x))
    return fused.reason(case) is None


#: Of the code alone, by the name in the markers of a page.
OF_CODE: dict[str, Callable[[], Table]] = {"methods": methods, "names": names}
