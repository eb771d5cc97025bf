"""Which scheme for a small model, at what cost, and how sure that is: what rows answer.

In words and two tables. The report opens with it, and so does the gallery of methods.
"""

from collections.abc import Iterator, Mapping
from statistics import median

import posenc
from posenc.zoo import ZOO

from . import tables
from .comparison import Gap, recipe
from .tables import Rows, Table, where

#: Of the model whose state is counted: GPT-2's.
WIDTH, HEADS = 768, 12
SPEEDS = {"train": "training", "decode": "decoding"}


def sentences(rows: Rows) -> Iterator[str]:
    """The answer, how sure it is, what lies beyond the length of training, and what was asked.

    Raises:
        ValueError: nothing was trained on equal tokens.
    """
    base, at = tables.baseline(rows), tables.lengths(rows, "windows")
    gaps = {length: tables.gaps(rows, "tokens", "windows", length) for length in at}
    yield from _best(gaps[at[0]], base, at[0], speeds(rows, base))
    yield from _told_apart(rows, base)
    if len(at) > 1 and gaps[at[-1]]:
        yield _beyond(rows, base, at[0], at[-1])
    yield _asked(rows)


def _best(
    gaps: Mapping[str, Gap], base: str, length: int, speed: Mapping[str, dict[str, float]]
) -> Iterator[str]:
    below = [name for name in _sorted(gaps) if gaps[name].seeds.high < 0]
    if not any(gap.needed for gap in gaps.values()):
        yield (
            f"Of {len(gaps)} methods beside {base} none was trained under two seeds: one says "
            "nothing of a method."
        )
    elif not below:
        yield (
            f"At {length} tokens, the length of training, no method's interval lies below {base}'s "
            f"loss: of {len(gaps)} methods none is a reason to leave {base}."
        )
    else:
        listed = "; ".join(_costing(name, gaps[name], speed.get(name, {})) for name in below)
        yield (
            f"At {length} tokens, the length of training, these come out below {base} by an "
            f"interval of their own, in nats: {listed}."
        )
    widths = [(gap.seeds.high - gap.seeds.low) / 2 for gap in gaps.values() if gap.needed]
    if widths:
        seeds = max(gap.count for gap in gaps.values())
        yield (
            f"{seeds} seeds: half of the intervals are wider than {median(widths):.3f} nats to "
            "either side; a smaller difference is not seen, and not seen is not the same as none."
        )


def _costing(name: str, gap: Gap, speed: Mapping[str, float]) -> str:
    found = f"`{name}` {gap.seeds.mean:+.3f} ({gap.seeds.low:+.3f} .. {gap.seeds.high:+.3f})"
    costs = [f"{SPEEDS[mode]} at {ratio:.2f} of the speed" for mode, ratio in speed.items()]
    return found + "".join(f", {cost}" for cost in costs)


def _told_apart(rows: Rows, base: str) -> Iterator[str]:
    for match in tables.matches(rows):
        found: dict[str, dict[str, None]] = {"lower": {}, "higher": {}}
        most = 0
        for length in tables.lengths(rows, "windows"):
            gaps = tables.gaps(rows, match, "windows", length)
            most = max(most, len(gaps))
            for name in _sorted(gaps):
                if gaps[name].verdict in found:
                    found[gaps[name].verdict][name] = None
        lower, higher = (", ".join(f"`{name}`" for name in found[way]) or "none" for way in found)
        yield (
            f"Corrected for the {most} methods compared (Holm), equal {match}, at any length: "
            f"better than {base} {lower}; worse {higher}."
        )


def _beyond(rows: Rows, base: str, short: int, long: int) -> str:
    at, beyond = (tables.mean_losses(rows, "tokens", "windows", at) for at in (short, long))
    rises = {name: beyond[name] - at[name] for name in beyond if name in at}
    steady = [name for name in sorted(rises, key=rises.__getitem__) if rises[name] < 0.01]
    cannot = [name for name in at if name not in beyond]
    said = f"At {long // short} times that length {base}'s loss is {rises[base]:+.3f} nats off"
    if steady:
        said += f"; below +0.01 it stays for {', '.join(f'`{name}`' for name in steady)}"
    if cannot:
        said += f"; {', '.join(f'`{name}`' for name in cannot)} cannot be asked there"
    return f"{said}."


def _asked(rows: Rows) -> str:
    own = tables.of_match(where(rows, metric="loss", mode="windows"), "tokens")
    about = recipe(own[0])
    tokens = int(about["steps"]) * int(about["batch_size"]) * int(about["grad_accum"])
    tokens *= int(about["context"])
    counts = [row["p50"] for row in where(rows, kind="perplexity", metric="parameters")]
    rate = f"the learning rate {about['lr']} for all"
    if "tuned" in about:
        rate = f"each method's best of the learning rates {about['tuned'].replace(',', ', ')}"
    return (
        f"What was asked: models of {min(counts):,.0f} to {max(counts):,.0f} parameters, "
        f"{tokens:,} tokens each of one text ({about['data']}), {rate}. Nothing here says what "
        "larger models, longer training or other texts do."
    )


def _sorted(gaps: Mapping[str, Gap]) -> list[str]:
    """The lowest first."""
    return sorted(gaps, key=lambda name: gaps[name].seeds.mean)


def speeds(rows: Rows, base: str) -> dict[str, dict[str, float]]:
    """Tokens a second of each layer that auto computes, over the baseline's, by mode; {} where
    nothing was timed.
    """
    timed = where(rows, kind="throughput", metric="throughput", implementation="auto")
    if not timed:
        return {}
    at = min({row["S"] for row in timed}, key=lambda length: abs(length - tables.TIMED_AT))
    rates = {(row["name"], row["mode"]): row["p50"] for row in where(timed, S=at)}
    return {
        name: {
            mode: rates[name, mode] / rates[base, mode]
            for mode in SPEEDS
            if (name, mode) in rates and (base, mode) in rates
        }
        for name in dict.fromkeys(name for name, _ in rates)
    }


#: What a verdict is called in a cell.
CELLS = {"lower": "**better**", "higher": "**worse**"}


def verdict_table(rows: Rows) -> Table:
    """Of each method beside the baseline, for every match and length, the lowest first."""
    base = tables.baseline(rows)
    found = {
        (match, length): tables.gaps(rows, match, "windows", length)
        for match in tables.matches(rows)
        for length in tables.lengths(rows, "windows")
    }
    found = {column: gaps for column, gaps in found.items() if gaps}
    order = list(dict.fromkeys(name for gaps in found.values() for name in _sorted(gaps)))
    lines = [
        [f"`{name}`", *(_verdict(gaps.get(name)) for gaps in found.values())] for name in order
    ]
    note = (
        f"Beside {base}: better and worse where the paired t test over seeds gives p < .05 after "
        "Holm's correction for all methods of the column, and the bootstrap over seeds and text "
        "leaves 0 out; below and above where an interval of its own leaves 0 out, of which one in "
        "twenty does so by chance; else a difference was not seen. Empty: not trained."
    )
    return Table(
        ["method", *(f"equal {match}, {length}" for match, length in found)], lines, note, True
    )


def _verdict(gap: Gap | None) -> str:
    if gap is None:
        return ""
    if gap.needed is None:
        return "one seed"
    if gap.verdict in CELLS:
        return CELLS[gap.verdict]
    return "below" if gap.seeds.high < 0 else "above" if gap.seeds.low > 0 else "not seen"


def cost_table(rows: Rows, linked: Mapping[str, str] = {}) -> Table:
    """Perplexities, the difference at the length of training, speeds and what decoding keeps, the
    lowest first.

    Args:
        linked: what a method is called in the table, by name; `name` if not given.
    """
    base, at = tables.baseline(rows), tables.lengths(rows, "windows")
    perplexity = tables.perplexity_table(rows)
    cells = {line[0]: dict(zip(perplexity.header, line, strict=True)) for line in perplexity.lines}
    first = tables.mean_losses(rows, "tokens", "windows", at[0])
    speed = speeds(rows, base)
    columns = [*(f"at {length}" for length in at), f"loss - {base}'s at {at[0]}, equal tokens"]
    modes = [mode for mode in SPEEDS if any(mode in own for own in speed.values())]
    lines = []
    for name in sorted(first, key=first.__getitem__):
        rates = [speed.get(name, {}).get(mode) for mode in modes]
        shown = [cells[f"`{name}`"][title] for title in columns]
        ratios = ["" if rate is None else f"{rate:.2f}" for rate in rates]
        lines.append([linked.get(name, f"`{name}`"), *shown, *ratios, _state(name)])
    header = [
        "method", *(f"perplexity {title}" for title in columns[:-1]), columns[-1],
        *(f"{SPEEDS[mode]}, {base}'s speed = 1" for mode in modes),
        "decoding state, bytes a token",
    ]  # fmt: skip
    note = perplexity.note
    if modes:
        timed = tables.throughput_table(rows).note
        note += f" Speeds: {timed[0].lower()}{timed[1:]}"
    note += f" State: C = {WIDTH}, {HEADS} heads, fp32, with k, v and the position."
    return Table(header, lines, note)


def _state(name: str) -> str:
    """Of a plain name of the zoo; of others, which have options, it is not counted."""
    if name not in ZOO:
        return ""
    layer = posenc.attention(name, WIDTH, HEADS)
    return f"{posenc.attention_cost(layer, 1, 1).total.state_bytes:,}"
