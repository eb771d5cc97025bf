"""Figures made of rows, for a file or a page; nothing is drawn on a screen."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot there is no display to look for
from matplotlib.ticker import MaxNLocator

import posenc

from .comparison import label
from .rows import row_of
from .scores import scores_of
from .tables import (
    Rows,
    baseline,
    gaps,
    is_peer,
    lengths,
    matches,
    of_match,
    original_length,
    where,
)

#: Of a loss: by seed.
Seeds = dict[int, float]

#: Okabe and Ito's colours, which the colour-blind tell apart, black and a grey; markers besides.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000",
           "#999999", "#7B3294")  # fmt: skip
MARKERS = "os^Dv<>PXh"
#: Entries of a legend that the lowest figure has room for.
IN_A_COLUMN = 16
DPI = 120


def panels(
    count: int, *, width: float = 10, height: float = 4, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A row of axes with a grid."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    found = list(figure.subplots(1, count, squeeze=False, **shared)[0])
    for axes in found:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def style(name: str) -> dict[str, Any]:
    """The same colour and marker for a name of the zoo in every figure; hollow with options."""
    names, (plain, _, options) = posenc.names(), name.partition(":")
    number = names.index(plain) if plain in names else 7
    again, colour = divmod(number, len(COLOURS))  # more names than colours: other markers
    marker = MARKERS[(colour + again) % len(MARKERS)]
    look = {"color": COLOURS[colour], "marker": marker, "markersize": 4}
    return look | ({"fillstyle": "none"} if options else {})


def legend_beside(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, where no data lies."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 + (len(labels) - 1) // IN_A_COLUMN
    figure.legend(
        handles, labels, loc="outside right center", frameon=False, ncols=columns, fontsize="small"
    )


def ticks(axes: Axes, at: Sequence[int]) -> None:
    """A logarithmic axis of lengths that names those that were measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(at), [str(n) for n in at])
    axes.minorticks_off()


def by_seed(rows: Rows, match: str, mode: str) -> dict[str, dict[int, Seeds]]:
    """Losses by method and length."""
    found: dict[str, dict[int, Seeds]] = {}
    for row in of_match(rows, match):
        if (row.mode, row.metric) == (mode, "loss") and row.T is not None:
            assert row.seed is not None
            name = label(row.name, row.options)
            found.setdefault(name, {}).setdefault(row.T, {})[row.seed] = row.p50
    return found


def beside(found: dict[str, dict[int, Seeds]], baseline: str) -> dict[str, dict[int, Seeds]]:
    """The same less the baseline's, by seed, at the lengths that it has too."""
    paired = {}
    for name, by_length in found.items():
        gaps = {
            length: {seed: own[seed] - other[seed] for seed in own if seed in other}
            for length, own in by_length.items()
            if (other := found.get(baseline, {}).get(length))
        }
        paired[name] = {length: each for length, each in gaps.items() if each}
    return paired


def lines(axes: Axes, found: dict[str, dict[int, Seeds]], shown: Any = float) -> None:
    """Means over seeds, with a band from the least to the greatest."""
    for name, by_length in found.items():
        at = sorted(by_length)
        mean = [shown(fmean(by_length[n].values())) for n in at]
        look = style(name)
        axes.plot(at, mean, label=name, linewidth=1.5, **look)
        least = [shown(min(by_length[n].values())) for n in at]
        most = [shown(max(by_length[n].values())) for n in at]
        axes.fill_between(at, least, most, color=look["color"], alpha=0.15, linewidth=0)


def perplexity(rows: Rows) -> Figure:
    """Perplexity against the length of the window, side by side and sliding."""
    modes = {"windows": "windows side by side", "sliding": "sliding windows, last half scored"}
    figure, found = panels(2, sharey=True)
    for axes, (mode, title) in zip(found, modes.items(), strict=True):
        lines(axes, by_seed(rows, "tokens", mode), math.exp)
        axes.set(title=title, xlabel="tokens in a window", yscale="log")
        axes.yaxis.set_major_locator(MaxNLocator(8))
        axes.yaxis.set_major_formatter("{x:g}")
        ticks(axes, lengths(rows, "windows"))
    found[0].set_ylabel("perplexity (band: least to greatest of the seeds)")
    legend_beside(figure, found[0])
    return figure


def differences(rows: Rows) -> Figure:
    """The gap of every method to the baseline: a panel a length, a row of points a match."""
    at, kinds = lengths(rows, "windows"), matches(rows)
    figure, found = panels(len(at), height=1.2 + 0.42 * len(posenc.names()), sharey=True)
    same = {length: gaps(rows, "tokens", "windows", length) for length in at}
    names = [name for name in by_seed(rows, "tokens", "windows") if name != baseline(rows)]
    shapes = dict(zip(("tokens", "parameters", "flops"), ("o", "s", "^"), strict=True))
    for axes, length in zip(found, at, strict=True):
        axes.axvline(0, color="0.4", linewidth=1)
        for place, match in enumerate(kinds):
            own = gaps(rows, match, "windows", length) if match != "tokens" else same[length]
            for number, name in enumerate(names):
                gap = own.get(name)
                if gap is None:
                    continue
                y = number + (place - (len(kinds) - 1) / 2) * 0.22
                colour = COLOURS[place]
                if gap.needed is not None:
                    axes.plot([gap.seeds.low, gap.seeds.high], [y, y], color=colour, linewidth=1)
                if gap.text is not None:
                    axes.plot(gap.text, [y, y], color=colour, linewidth=4, alpha=0.45)
                axes.plot(gap.seeds.mean, y, shapes[match], color=colour, markersize=5)
        axes.set(title=f"at {length} tokens", xlabel=f"loss minus {baseline(rows)}'s, nats")
    found[0].set_yticks(range(len(names)), names)
    found[0].invert_yaxis()
    for place, match in enumerate(kinds):
        found[0].plot([], [], shapes[match], color=COLOURS[place], label=f"equal {match}")
    found[0].plot([], [], color="0.3", linewidth=1, label="95% over seeds (t)")
    found[0].plot([], [], color="0.3", linewidth=4, alpha=0.45, label="95% over seeds\nand text")
    legend_beside(figure, found[0])
    return figure


def by_context(rows: Rows) -> Figure:
    """Loss on the same last tokens against their context, and beside the baseline by the position
    in a window: there every position has tokens of its own, whose mean says little.
    """
    figure, (left, right) = panels(2)
    lines(left, by_seed(rows, "tokens", "tail"))
    left.set(title="the same last tokens, more context", xlabel="tokens of context, at most")
    left.set_ylabel("loss, nats (dotted: the training length)")
    found, of = by_seed(rows, "tokens", "positions"), baseline(rows)
    right.set(title="by position in the longest window", xlabel="position, up to")
    right.set_ylabel(f"loss minus {of}'s, nats")
    lines(right, beside(found, of))
    for axes in (left, right):
        axes.axvline(lengths(rows, "windows")[0], color="0.4", linewidth=1, linestyle=":")
    legend_beside(figure, left)
    return figure


def pareto(rows: Rows) -> Figure:
    """Perplexity at the training length against the speed of training, of methods with a speed:
    rows of runs that something else ran beside have none.
    """
    figure, (axes,) = panels(1, width=7, height=4.5)
    at = lengths(rows, "windows")[0]
    own = of_match(rows, "tokens")
    points = {}
    for name, by_length in by_seed(rows, "tokens", "windows").items():
        speeds = [
            row.p50
            for row in own
            if row.metric == "throughput" and label(row.name, row.options) == name
        ]
        if speeds:
            points[name] = (fmean(speeds), math.exp(fmean(by_length[at].values())))
    for name, (x, y) in points.items():
        axes.plot(x, y, linestyle="none", **style(name) | {"markersize": 8})
        axes.annotate(name, (x, y), xytext=(7, 4), textcoords="offset points", fontsize=9)
    best = front(points.values())
    axes.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=0)
    axes.margins(x=0.12)
    title = "to the right is faster, below is better; the line is what nothing beats in both"
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="training, tokens/s", ylabel=f"perplexity at {at}")
    return figure


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points to which no other is both faster (x) and better (less y), by falling speed."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0], point[1])):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def throughput(rows: Rows) -> Figure:
    """Tokens a second of a layer against the length: ours by auto, peers dashed."""
    modes = {"train": "training", "prefill": "prefill", "decode": "decoding"}
    rows = where(rows, kind="throughput", metric="throughput")
    shown = [row for row in rows if is_peer(row) or row["implementation"] == "auto"]
    figure, found = panels(3, width=13, height=4.5)
    peers = list(dict.fromkeys((r["name"], r["implementation"]) for r in shown if is_peer(r)))
    for axes, (mode, title) in zip(found, modes.items(), strict=True):
        for name, by in dict.fromkeys((row["name"], row["implementation"]) for row in shown):
            own = {r["S"]: r for r in where(shown, name=name, implementation=by, mode=mode)}
            at = sorted(own)
            peer = (name, by) in peers
            look = (
                {"color": COLOURS[peers.index((name, by))], "linestyle": "--", "linewidth": 1}
                if peer
                else {**style(name), "linewidth": 1.5}
            )
            axes.plot(at, [own[n]["p50"] for n in at], label=f"{name}, {by}" if peer else name,
                      **look)  # fmt: skip
        axes.set(title=title, xlabel="tokens", yscale="log")
        ticks(axes, sorted({row["S"] for row in shown}))
        axes.tick_params(axis="x", labelsize=8)
    found[0].set_ylabel("tokens/s of one layer")
    legend_beside(figure, found[0])
    return figure


def memory(rows: Rows) -> Figure:
    """Bytes a token beside their predictions, and the peak of a training step by length."""
    rows = where(rows, kind="memory", options="")
    figure, found = panels(3, width=13, height=4.5)
    for axes, metric, by in (
        (found[0], "activations", "fused"),
        (found[1], "decoding state", "cache"),
    ):
        own = {row["name"]: row["p50"] for row in where(rows, metric=metric, implementation=by)}
        over = where(rows, metric=f"{metric} over predicted", implementation=by)
        ratios = {row["name"]: row["p50"] for row in over}  # as above, at the longest text
        names = [name for name in posenc.names() if name in own]
        axes.barh(names, [own[name] for name in names], color=COLOURS[0], alpha=0.75)
        for name, ratio in ratios.items():
            predicted = own[name] / ratio
            axes.plot(predicted, name, "|", color="black", markersize=14, markeredgewidth=2)
        axes.invert_yaxis()
        axes.set(title=f"{metric}, {by}", xlabel="bytes a token (black: predicted)")
    for name in posenc.names():
        own = {
            row["T"]: row["p50"]
            for row in where(rows, name=f"{name} layer", metric="memory", implementation="auto")
        }
        if own:
            found[2].plot(sorted(own), [own[n] for n in sorted(own)], label=name, **style(name))
            ticks(found[2], sorted(own))
    found[2].set(title="peak of a training step, auto", xlabel="tokens", ylabel="MiB", yscale="log")
    legend_beside(figure, found[2])
    return figure


def extended(rows: Rows) -> Figure:
    """Loss by position in texts longer than the model was trained for, a line a scaling; those of
    transformers are circles.
    """
    figure, (axes,) = panels(1, width=8, height=4.5)
    circles = {"linestyle": "none", "marker": "o", "fillstyle": "none"}
    for number, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        for implementation, look in (("posenc", {}), ("transformers", circles)):
            found: dict[int, list[float]] = {}
            for row in where(rows, name=name, implementation=implementation):
                found.setdefault(row["T"], []).append(row["p50"])
            at = sorted(found)
            if at:
                text = name if implementation == "posenc" else f"{name}, transformers"
                mean = [fmean(found[n]) for n in at]
                axes.plot(at, mean, color=COLOURS[number], label=text, **look)
    axes.axvline(original_length(rows), color="0.4", linewidth=1, linestyle=":")
    axes.set(xlabel="position, up to (dotted: the training length)", ylabel="loss, nats")
    legend_beside(figure, axes)
    return figure


def tasks(rows: Rows) -> Figure:
    """Exact match against the length: a panel a task, a line through the medians of the seeds, and
    a point for every seed; dotted is the longest length of training.
    """
    found = scores_of([row_of(row) for row in rows], "exact match")
    across = min(3, len(found))
    down = math.ceil(len(found) / across)
    figure = Figure(figsize=(4 * across + 2, 3.2 * down), layout="constrained", dpi=DPI)
    grid = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for axes in grid[len(found) :]:
        axes.set_axis_off()
    for axes, (asked, scores) in zip(grid, found.items(), strict=False):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for name, by_length in scores.items():
            at, look = sorted(by_length), style(name)
            middle = [median(by_length[n].values()) for n in at]
            axes.plot(at, middle, label=name, color=look["color"], linewidth=1.5)
            points = [(n, share) for n in at for share in by_length[n].values()]
            axes.plot(*zip(*points, strict=True), linestyle="none", alpha=0.6, **look)
        axes.axvline(asked.longest, color="0.4", linewidth=1, linestyle=":")
        axes.set(title=asked.task, ylim=(-0.05, 1.05))
        ticks(axes, sorted({n for by_length in scores.values() for n in by_length}))
    for axes in grid[: len(found)][-across:]:
        axes.set_xlabel("length")
    for axes in grid[::across]:
        axes.set_ylabel("exact match")
    known: dict[str, Any] = {}
    for axes in grid[: len(found)]:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(text, handle)
    figure.legend(known.values(), known, loc="outside right center", frameon=False)
    return figure
