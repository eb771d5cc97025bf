"""What a trained model's position scheme has learned, drawn: `python -m bench.mechanisms RUN ..`.

    carope          rate f of every head over tokens of text, and the wavelengths that follow
    cmha            delta and b of every head and frequency
    mdha, rcmha     taps of the convolutions of q, k and v
    rmha, rcmha     what the relative term adds at each distance
    moh             share of tokens that keep each head

A crossing of them has the pictures of each; rope, nope, mha and sinusoidal learn nothing of the
kind. Every picture is a pure function from a model (and token ids) to arrays, and one from arrays
to axes. For the run folders of train.py the text is the beginning of their validation tokens.

    python -m bench.mechanisms runs/carope runs/moh --out plots        plots/carope-mechanism.png ..

Legend: L layers, H heads, D head dim, N tokens, P distances, k taps.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import posenc
from posenc.attention import Attention
from posenc.encodings.relative import sinusoid
from posenc.rates import log_rates
from posenc.training.run_folder import CONFIG, ENVIRONMENT, RunFolder

WIDTH, DPI = 10.0, 120  # inches, dots an inch
COLUMNS = 4  # panels, one a layer, in a row at most
TOKENS = 8192  # of a run's text that are looked at, in windows of its training context
#: Of Okabe and Ito: told apart by colour-blind readers too.
Q_K_V = {"q": "#0072B2", "k": "#D55E00", "v": "#009E73"}


class Rates(NamedTuple):
    """CARoPE's rates."""

    f: Tensor  # (L, H, N), one layer where all share the token embedding's
    rope: float  # the rate at which it is RoPE
    powers: Tensor  # (D/2,), a band turns by f to this power

    @property
    def wavelength(self) -> Tensor:
        """Tokens a full turn takes on average, 2 pi / mean over tokens of f^power: (L, H, D/2)."""
        turns = [self.f.pow(power).mean(2) for power in self.powers]  # one band at a time: memory
        return 2 * math.pi / torch.stack(turns, dim=-1)

    @property
    def rope_wavelength(self) -> Tensor:
        """RoPE's: (D/2,)."""
        return 2 * math.pi * self.rope ** -torch.arange(len(self.powers), dtype=torch.float64)


class PolarParameters(NamedTuple):
    """CMHA's parameters, (L, H, D/2) each, H = 1 if shared; RoPE is delta = 1, b = 0."""

    delta: Tensor
    b: Tensor


class HeadUse(NamedTuple):
    """What MoH's routers keep."""

    share: Tensor  # (L, H), of the tokens
    shared: int  # heads that every token keeps, the first ones
    top_k: int


class RelativeTables(NamedTuple):
    """What the relative term adds to the logits at the distances 0 .. P-1, (L, H, P) each."""

    logit: Tensor  # ((q + v) . r_d + S_d) / sqrt(D), mean over the queries of the text
    norm: Tensor  # of r_d, the table's or the projected row


def attention_inputs(model: posenc.GPT, ids: Tensor) -> list[Tensor]:
    """What each layer's attention reads, (B, T, C)."""
    found: list[Tensor] = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        for block in model.blocks
    ]
    try:
        with torch.no_grad():
            model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def carope_rates(model: posenc.GPT, ids: Tensor) -> Rates:
    """Over the tokens ids (B, T)."""
    if model.phase is not None:
        parts, inputs = [model.phase], [model.wte(ids)]
    else:
        parts = [block.attn.encoding for block in model.blocks]
        inputs = attention_inputs(model, ids)
    rates = [
        log_rates(x, part.weight, part.bias).exp().transpose(0, 1).flatten(1)
        for part, x in zip(parts, inputs, strict=True)
    ]
    first = parts[0]
    powers = torch.arange(first.head_dim // 2, dtype=torch.float64) + first.first_power
    return Rates(torch.stack(rates).cpu(), first.base ** (-2 / first.head_dim), powers)


@torch.no_grad()
def polar_parameters(model: posenc.GPT) -> PolarParameters:
    """Of every layer."""
    parts = [block.attn.encoding for block in model.blocks]
    none = torch.zeros_like(parts[0].delta)  # the b of a model without
    delta = [part.delta for part in parts]
    b = [none if part.b is None else part.b for part in parts]
    return PolarParameters(*(torch.stack(values).double().cpu() for values in (delta, b)))


@torch.no_grad()
def head_use(model: posenc.GPT, ids: Tensor) -> HeadUse:
    """Over the tokens ids (B, T)."""
    with posenc.record_routing(model) as routing:
        model.hidden(ids)
    share = torch.stack([stats.utilisation for stats in routing.values()]).cpu()
    router = model.blocks[0].attn.router
    assert router is not None
    return HeadUse(share, router.shared, router.top_k)


@torch.no_grad()
def convolution_filters(model: posenc.GPT) -> Tensor:
    """Taps of q, k and v for every channel, (L, 3, channels, k); the last meets the token itself.

    Channels are D that all heads share, or H D.
    """
    taps = [block.attn.conv.weight.flatten(1, -2) for block in model.blocks if block.attn.conv]
    return torch.stack(taps).double().cpu()


@torch.no_grad()
def relative_tables(model: posenc.GPT, ids: Tensor) -> RelativeTables:
    """For distances within the text ids (B, T), and within a learned table."""
    logits, norms = [], []
    for block, x in zip(model.blocks, attention_inputs(model, ids), strict=True):
        encoding = block.attn.encoding
        # The mean of the products is the product with the mean query.
        query = queries(block.attn, x).double().mean((0, 2))  # (H, D)
        count, offset = ids.shape[1], 0
        if encoding.kind == "learned":
            count = min(count, encoding.max_distance)
            table, offset = encoding.R[:, :count].double(), encoding.S[:, :count].double()
        else:
            r = sinusoid(torch.arange(count, device=x.device), encoding.sinusoid_dim)
            rows = r @ encoding.W_R.weight.double().T  # (P, H D)
            table = rows.unflatten(-1, query.shape).transpose(0, 1)  # (H, P, D)
            query = query + encoding.v.double()
        products = (table @ query.unsqueeze(-1)).squeeze(-1) + offset
        logits.append(products / math.sqrt(query.shape[1]))
        norms.append(table.norm(dim=-1))
    return RelativeTables(torch.stack(logits).cpu(), torch.stack(norms).cpu())


def queries(attn: Attention, x: Tensor) -> Tensor:
    """The queries that meet the relative term, (B, H, T, D), after a convolution if any."""
    heads = (attn.num_heads, attn.head_dim)
    parts = (z.unflatten(-1, heads).transpose(1, 2) for z in attn.c_attn(x).chunk(3, dim=-1))
    q, k, v = parts
    return q if attn.conv is None else attn.conv(q, k, v)[0]


# Pictures: `where` is a matplotlib figure or subfigure. Each is drawn by one function.


def panels(where: Any, count: int, title: str, xlabel: str, ylabel: str) -> list[Any]:
    """Axes, one a layer, that share their scales."""
    rows = rows_of_panels(count)
    columns = -(-count // rows)
    grid = where.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    for number, one in enumerate(axes[:count]):
        one.set_title(f"layer {number}" if count > 1 else "all layers", fontsize=9)
        one.grid(alpha=0.25)
        one.tick_params(labelsize=8)
        if number + columns >= count:
            one.tick_params(labelbottom=True)
            one.set_xlabel(xlabel)
        if number % columns == 0:
            one.set_ylabel(ylabel)
    where.suptitle(title, fontsize=11)
    return axes[:count]


def whole_numbers(axis: Any) -> None:
    """Ticks at heads and bands, as many as there is room for."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(6, integer=True))


def rows_of_panels(count: int) -> int:
    """How many rows `panels` takes."""
    return -(-count // COLUMNS)


def head_colours(heads: int) -> list[Any]:
    """One a head, from dark to light."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * h / max(heads - 1, 1)) for h in range(heads)]


def name_heads(where: Any, axes: Any, heads: int) -> None:
    """A legend beside the panels."""
    handles, labels = axes.get_legend_handles_labels()
    where.legend(handles, labels, loc="outside right center", fontsize=8,
                 ncols=1 + heads // 13)  # fmt: skip


def draw_rates(where: Any, rates: Rates) -> None:
    """Median and 10-90% of the tokens for each head."""
    heads = range(rates.f.shape[1])
    title = "CARoPE: rate f of each head over tokens (median, 10% to 90%)"
    for one, f in zip(panels(where, len(rates.f), title, "head", "f"), rates.f, strict=True):
        low, middle, high = f.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=f.dtype), dim=1)
        bars = torch.stack((middle - low, high - middle))
        one.errorbar(heads, middle, bars, fmt="o", color=Q_K_V["q"], markersize=4, capsize=2,
                     label="CARoPE")  # fmt: skip
        one.axhline(rates.rope, linestyle=":", color="0.2", label="RoPE")
        whole_numbers(one.xaxis)
    name_heads(where, one, 2)


def draw_wavelengths(where: Any, rates: Rates) -> None:
    """Against the band, a line a head."""
    found = rates.wavelength
    bands, heads = range(found.shape[2]), found.shape[1]
    colours, title = head_colours(heads), "CARoPE: tokens that a full turn takes on average"
    for one, layer in zip(panels(where, len(found), title, "band", "tokens"), found, strict=True):
        for head, (line, colour) in enumerate(zip(layer, colours, strict=True)):
            one.plot(bands, line, color=colour, linewidth=1.3, label=f"head {head}")
        one.plot(bands, rates.rope_wavelength, ":", color="0.2", label="RoPE")
        one.set_yscale("log")
    name_heads(where, one, heads)


def draw_polar(where: Any, values: Tensor, rest: float, title: str) -> None:
    """A heat map a layer, head by band; white is `rest`."""
    furthest = max((values - rest).abs().max().item(), 1e-6)
    limits = {"vmin": rest - furthest, "vmax": rest + furthest}
    axes = panels(where, len(values), title, "band", "head")
    for one, layer in zip(axes, values, strict=True):
        image = one.imshow(
            layer.numpy(), cmap="RdBu_r", aspect="auto", interpolation="nearest", **limits
        )
        one.grid(False)
        whole_numbers(one.yaxis)
    where.colorbar(image, ax=axes, pad=0.01)


def draw_head_use(where: Any, use: HeadUse) -> None:
    """One heat map with numbers, layer by head."""
    layers, heads = use.share.shape
    axes = where.subplots()
    image = axes.imshow(use.share.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for layer in range(layers):
        for head in range(heads):
            share = use.share[layer, head].item()
            axes.text(head, layer, f"{share:.2f}", ha="center", va="center", fontsize=8,
                      color="white" if share > 0.6 else "black")  # fmt: skip
    axes.set(xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
    if 0 < use.shared < heads:
        axes.axvline(use.shared - 0.5, color="#D55E00", linewidth=2)
    routed = max(heads - use.shared, 1)
    where.suptitle(
        f"MoH: share of tokens that keep each head; {use.shared} shared, left of the line, "
        f"the others at balance {use.top_k / routed:.2f}",
        fontsize=11,
    )
    where.colorbar(image, ax=axes, pad=0.01)


def draw_filters(where: Any, filters: Tensor) -> None:
    """Mean and 10-90% of the channels for each tap."""
    taps = filters.shape[-1]
    title = f"Convolution: taps over {filters.shape[2]} channels (mean, 10% to 90%)"
    lags = torch.arange(taps)
    axes = panels(where, len(filters), title, "token", "weight")
    for one, layer in zip(axes, filters, strict=True):
        one.axhline(0, color="0.5", linewidth=0.8)
        for number, (name, colour) in enumerate(Q_K_V.items()):
            mean = layer[number].mean(0)
            low, high = layer[number].quantile(torch.tensor([0.1, 0.9], dtype=mean.dtype), dim=0)
            # A mean may lie outside the quantiles: the bar is drawn on its own.
            at = lags + 0.18 * (number - 1)
            one.vlines(at, low, high, color=colour, linewidth=2.5, alpha=0.45)
            one.plot(at, mean, "o-", color=colour, markersize=4, linewidth=1, label=name)
        one.set_xticks(lags, ["t" if lag == taps - 1 else f"t-{taps - 1 - lag}" for lag in lags])
    name_heads(where, one, 3)


def binned(values: Tensor) -> tuple[Tensor, Tensor]:
    """Means (.., bins) of values (.., P) over bins that widen with the distance, and their middles.

    The first eight distances stand alone; from there on there are eight bins an octave at most.
    """
    count = values.shape[-1]
    edges = [int(8 * 2 ** (i / 8)) for i in range(8 * 24)]
    edges = sorted({*range(min(8, count)), *(edge for edge in edges if edge < count), count})
    parts = values.split([b - a for a, b in pairwise(edges)], dim=-1)
    middles = torch.tensor([(a + b - 1) / 2 for a, b in pairwise(edges)])
    return middles, torch.stack([part.mean(-1) for part in parts], dim=-1)


def draw_by_distance(where: Any, values: Tensor, title: str, ylabel: str) -> None:
    """(L, H, P) against the distance, a line a head; far distances in bins."""
    heads, (distances, means) = values.shape[1], binned(values)
    colours, axes = head_colours(heads), panels(where, len(values), title, "distance", ylabel)
    for one, layer in zip(axes, means, strict=True):
        for head, (line, colour) in enumerate(zip(layer, colours, strict=True)):
            one.plot(distances, line, color=colour, linewidth=1.2, label=f"head {head}")
        one.set_xscale("symlog", linthresh=1)  # 0 is a distance, too
        one.xaxis.set_major_formatter("{x:.0f}")
        one.set_xlim(0, max(values.shape[2] - 1, 1))
    name_heads(where, one, heads)


class Section(NamedTuple):
    """One picture of a figure."""

    height: float  # inches
    draw: Callable[[Any], None]


def by_layer(layers: int, draw: Callable[[Any], None]) -> Section:
    """A picture of a panel a layer."""
    return Section(0.7 + 1.9 * rows_of_panels(layers), draw)


def sections(model: posenc.GPT, ids: Tensor) -> list[Section]:
    """The pictures of a model: of its encoding, its convolution, its router."""
    attn, layers = model.blocks[0].attn, len(model.blocks)
    found: list[Section] = []
    if model.phase is not None or isinstance(attn.encoding, posenc.CARoPE):
        rates = carope_rates(model, ids)
        for picture in (draw_rates, draw_wavelengths):
            found.append(by_layer(len(rates.f), partial(picture, rates=rates)))
    if isinstance(attn.encoding, posenc.Polar):
        delta, b = polar_parameters(model)
        for values, rest, title in (
            (delta, 1.0, "CMHA: delta of each head and band (RoPE: 1)"),
            (b, 0.0, "CMHA: b of each head and band, radians (RoPE: 0)"),
        ):
            draw = partial(draw_polar, values=values, rest=rest, title=title)
            found.append(by_layer(layers, draw))
    if isinstance(attn.encoding, posenc.Relative):
        tables = relative_tables(model, ids)
        for values, title, ylabel in (
            (tables.logit, "Relative term: mean logit of the text's queries", "logit"),
            (tables.norm, "Relative term: norm of the row of each distance", "norm"),
        ):
            draw = partial(draw_by_distance, values=values, title=title, ylabel=ylabel)
            found.append(by_layer(layers, draw))
    if attn.conv is not None:
        draw = partial(draw_filters, filters=convolution_filters(model))
        found.append(by_layer(layers, draw))
    if attn.router is not None:
        use = head_use(model, ids)
        found.append(Section(1.1 + 0.35 * len(use.share), partial(draw_head_use, use=use)))
    return found


def figure(model: posenc.GPT, ids: Tensor) -> Any | None:
    """What the model's position scheme has learned, or None where there is nothing to learn.

    Args:
        ids: integer (B, T), text of the model's kind.
    """
    from matplotlib.figure import Figure  # without pyplot there is no display to look for

    found = sections(model, ids)
    if not found:
        return None
    heights = [section.height for section in found]
    made = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
    parts = made.subfigures(len(found), 1, height_ratios=heights, squeeze=False)
    for section, where in zip(found, parts.flat, strict=True):
        section.draw(where)
    return made


def of_run(folder: Path) -> tuple[posenc.GPT, Tensor]:
    """The model of a run folder, and the first windows (B, T) of its validation tokens.

    Raises:
        ValueError: for a folder that is no finished run, or whose text is gone or another.
    """
    from posenc.training.config import from_mapping
    from posenc.training.text import corpus_of

    run = RunFolder(folder)
    for path in (folder / CONFIG, folder / ENVIRONMENT, run.model):
        if not path.exists():
            raise ValueError(f"{folder} is no finished run of train.py: it holds no {path.name}.")
    config = from_mapping(run.read_config())
    model = posenc.GPT.from_pretrained(run.model)
    corpus = corpus_of(config)
    about = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    if corpus.fingerprint != about["corpus"]["fingerprint"]:
        raise ValueError(f"{config.data} is no longer the text that {folder} was trained on.")
    length = min(config.context, len(corpus.validation))
    count = max(min(TOKENS, len(corpus.validation)) // length, 1)
    tokens = [int(token) for token in corpus.validation[: count * length]]
    return model, torch.tensor(tokens).view(count, length)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw NAME-mechanism.png for each run folder NAME."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of train.py")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the pictures")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for folder in args.runs:
            drawn = figure(*of_run(folder))
            if drawn is None:
                print(f"{folder}: its attention learns no mechanism to draw")
                continue
            path = args.out / f"{folder.resolve().name}-mechanism.png"
            drawn.savefig(path, format="png")
            print(path)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
