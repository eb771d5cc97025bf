"""What a scheme does to the logits, drawn: `posenc show NAME [KEY=VALUE ..]`.

    posenc show rope --out rope.png
    posenc show kerple kind=power --heads 8 --length 256

Logits are those of a new layer of NAME (`Attention.logits`) whose keys are projected like its
queries, so that equal tokens match:

    equal tokens     one token again and again: all that is left is position
    random tokens    what independent tokens meet on average, over many texts
    one head         the logits of one text, query by key
    by position      the bias alone, or how far each pair turns a token, where there is such

    posenc show rope axes=[32,32] base=100

draws a scheme of two axes: the logits of equal tokens, from the middle of an image to all of it.

Needs matplotlib, which the extra `train` has.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import posenc
from posenc.attention import Attention
from posenc.placement import Placement
from posenc.zoo import ZOO, parse_value

#: Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999", "#000000")
FORMATS = (".png", ".svg", ".pdf")


class Seen(NamedTuple):
    """What is drawn of one layer.

    Attributes:
        title: of the scheme.
        equal: mean logit of equal tokens by distance, (H, T).
        random: the same of random tokens, nan at distance 0, where a token meets itself.
        one: logits of the first head on one text, (T, T), nan where hidden.
        bias: what is added to the logits by distance alone, (H, T), or None.
        turns: radians that each pair of each head turns from token to token, (H, D/2), or None.
    """

    title: str
    equal: Tensor
    random: Tensor
    one: Tensor
    bias: Tensor | None
    turns: Tensor | None


class Image(NamedTuple):
    """What is drawn of a layer of two axes.

    Attributes:
        title: of the scheme.
        logits: of equal tokens, from the middle to everywhere, (H, side, side).
    """

    title: str
    logits: Tensor


@torch.no_grad()
def look(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    embed_dim: int = 256,
    heads: int = 4,
    length: int = 128,
    texts: int = 16,
    seed: int = 0,
) -> Seen | Image:
    """Measure a new layer of a name of the zoo.

    Args:
        options: of `posenc.attention`.
        length: T, tokens of a text; of two axes a square of at most as many. texts: how many of
            random tokens.

    Raises:
        ValueError: for what cannot be built, more axes than two, or sizes below 1 (2 for the
            length).
    """
    for what, value, least in (("length", length, 2), ("texts", texts, 1)):
        if value < least:
            raise ValueError(f"{what} must be at least {least}; got {value}.")
    options = dict(options or {})
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layer = posenc.attention(name, embed_dim, heads, **options).double()
        x = torch.randn(texts, length, embed_dim, dtype=torch.float64)
    return look_at(layer, x, title_of(name, options))


@torch.no_grad()
def look_at(
    layer: Attention, x: Tensor, title: str, enter: Callable[[Tensor], Tensor] | None = None
) -> Seen | Image:
    """Measure a layer, whose keys are then projected like its queries.

    Args:
        x: texts of tokens (B, T, C) in the layer's dtype; of two axes the squares in them.
        enter: what a model makes of its tokens before the layer, a table of positions for example;
            None is nothing.

    Raises:
        ValueError: for more axes than two.
    """
    match_keys(layer)
    if layer.encoding.axes_count is not None:
        return image_of(title, layer, x)
    same = x[:, :1].expand_as(x)
    if enter is not None:
        x, same = enter(x), enter(same)
    random = layer.logits(x)
    met = by_distance(random)
    met[:, 0] = math.nan
    return Seen(
        title,
        by_distance(layer.logits(same)),
        met,
        random[0, 0].masked_fill(random[0, 0].isinf(), math.nan),
        bias_of(layer, x),
        turns_of(layer, x),
    )


def image_of(title: str, layer: Attention, x: Tensor) -> Image:
    """From the middle of a square image of equal tokens, each as in the first text."""
    if layer.encoding.axes_count != 2:
        raise ValueError(
            f"two axes can be drawn, or none; got {layer.encoding.axes_count}. Give axes=[A,B]."
        )
    side = math.isqrt(x.shape[1])
    layer.causal = False  # everything is seen from the middle
    every = torch.arange(side)
    same = x[:1, :1].expand(1, side * side, -1)
    logits = layer.logits(same, positions=torch.cartesian_prod(every, every))
    middle = side // 2 * side + side // 2
    return Image(title, logits[0, :, middle].unflatten(-1, (side, side)))


def title_of(name: str, options: Mapping[str, Any]) -> str:
    """NAME:KEY=VALUE,.. as patterns of layers write it."""
    given = ",".join(f"{key}={value}" for key, value in options.items())
    title = f"{name}:{given}" if given else name
    if ZOO[name].embedding is not None and "encoding" not in options:
        title += ", whose table is at the model's input: plain attention"
    return title


def match_keys(layer: Attention) -> None:
    """Give every key head the projection of the first query head that reads it."""
    dim, heads, groups = layer.head_dim, layer.num_heads, layer.num_kv_heads
    for values in (layer.c_attn.weight, layer.c_attn.bias):
        if values is not None:
            q, k, _ = values.split((heads * dim, groups * dim, groups * dim))
            k.copy_(q.unflatten(0, (heads, dim))[:: heads // groups].flatten(0, 1))


def by_distance(logits: Tensor) -> Tensor:
    """Mean over texts and queries of logits (B, H, T, T) at each distance 0 .. T-1: (H, T)."""
    length = logits.shape[-1]
    diagonals = [logits.diagonal(-d, -2, -1).mean((0, 2)) for d in range(length)]
    return torch.stack(diagonals, -1)


def bias_of(layer: Attention, x: Tensor) -> Tensor | None:
    """What is added to the logits, whatever q and k are, by distance: (H, T), or None."""
    place = Placement(torch.arange(x.shape[1]))
    added = layer.encoding.scores(place, x).added()
    if added is None:
        return None
    shape = (len(x), layer.num_heads, x.shape[1], x.shape[1])
    return by_distance(added.double().expand(shape))


def turns_of(layer: Attention, x: Tensor) -> Tensor | None:
    """Radians from token to token, the mean of all texts: (G, D/2), or None where q and k do not
    turn, or not alike.
    """
    rotation = layer.encoding.describe_rotation(Placement(torch.arange(x.shape[1])), x)
    if rotation is None:
        return None
    # Every pair at angle 0, whichever way features pair up.
    groups, dim = layer.num_kv_heads, layer.head_dim
    along = torch.zeros(dim, dtype=x.dtype)
    pairing = getattr(layer.encoding, "pairing", "half")
    first = slice(0, None, 2) if pairing == "interleaved" else slice(dim // 2)
    second = slice(1, None, 2) if pairing == "interleaved" else slice(dim // 2, None)
    along[first] = 1
    _, turned = rotation.apply(None, along.expand(len(x), groups, x.shape[1], dim))
    assert turned is not None
    if turned.shape[-1] != dim:
        return None
    angle = torch.atan2(turned[..., second], turned[..., first])
    step = angle.diff(dim=2)
    # The shortest way: a pair turns by less than half a circle a token.
    step = (step + math.pi) % (2 * math.pi) - math.pi
    return step.mean((0, 2))


def figure(seen: Seen | Image) -> Any:
    """The picture, a matplotlib Figure."""
    from matplotlib.figure import Figure  # without pyplot there is no display to look for

    draws = panels(seen) if isinstance(seen, Seen) else maps(seen)
    made = Figure(figsize=(4.2 * len(draws), 3.8), dpi=120, layout="constrained")
    made.suptitle(seen.title)
    for axes, draw in zip(made.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
        draw(axes)
    return made


def panels(seen: Seen) -> list[Callable[[Any], None]]:
    """What is drawn of text."""
    bias, turns = seen.bias, seen.turns
    draws: list[Callable[[Any], None]] = [
        lambda axes: lines(axes, seen.equal, "equal tokens", "logit"),
        lambda axes: lines(axes, seen.random, "random tokens, on average", "logit"),
        lambda axes: heat(axes, seen.one, "head 0 on random tokens", "key", "query"),
    ]
    if bias is not None:
        draws.append(lambda axes: lines(axes, bias, "the bias alone", "added to the logit"))
    if turns is not None:
        draws.append(lambda axes: rates(axes, turns))
    return draws


def maps(seen: Image) -> list[Callable[[Any], None]]:
    """What is drawn of images: a map a head, of the first four."""
    return [
        partial(heat, logits=logits, title=f"head {head}, equal tokens", x="column", y="row")
        for head, logits in enumerate(seen.logits[:4])
    ]


def lines(axes: Any, values: Tensor, title: str, label: str) -> None:
    """A line a head over distances."""
    for head, line in enumerate(values.tolist()):
        colour = COLOURS[head % len(COLOURS)]
        axes.plot(range(len(line)), line, color=colour, linewidth=1.2, label=f"head {head}")
    axes.set(title=title, xlabel="distance", ylabel=label)
    axes.set_xlim(0, values.shape[1] - 1)
    axes.grid(alpha=0.25)
    if len(values) <= len(COLOURS):
        axes.legend(frameon=False, fontsize="small")


def heat(axes: Any, logits: Tensor, title: str, x: str, y: str) -> None:
    """Logits of one head as colours."""
    seen = logits[~logits.isnan()].abs()
    most = float(seen.quantile(0.99)) or 1.0  # tokens that meet themselves stand out anyway
    image = axes.imshow(
        logits.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest"
    )
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def rates(axes: Any, turns: Tensor) -> None:
    """How far each pair turns a token, by head."""
    for head, line in enumerate(turns.abs().tolist()):
        colour = COLOURS[head % len(COLOURS)]
        axes.plot(range(len(line)), line, color=colour, linewidth=1.2, label=f"key head {head}")
    if float(turns.abs().max()) > 0:
        axes.set_yscale("log")
    axes.set(title="how far a pair turns", xlabel="pair", ylabel="radians a token")
    axes.grid(alpha=0.25)
    if len(turns) <= len(COLOURS):
        axes.legend(frameon=False, fontsize="small")


def option(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value read as JSON where it is."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE; got {text!r}")
    return key, parse_value(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw one name into a file."""
    parser = argparse.ArgumentParser(
        prog="posenc show", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(posenc.names()))
    parser.add_argument("options", metavar="KEY=VALUE", nargs="*", default=[], type=option)
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=16, help="of random tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="NAME.png if not given; .svg and .pdf too")
    args = parser.parse_args(arguments)
    out = args.out or Path(f"{args.name}.png")
    try:
        if out.suffix not in FORMATS:
            raise ValueError(f"--out must end with {', '.join(FORMATS)}; got {out}.")
        sizes = {"embed_dim": args.embed_dim, "heads": args.heads, "length": args.length}
        seen = look(args.name, dict(args.options), **sizes, texts=args.texts, seed=args.seed)
        figure(seen).savefig(out)
    except ImportError as error:
        sys.exit(f"posenc.show draws with matplotlib: {error}. pip install 'posenc[train]'")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(out)


if __name__ == "__main__":
    main()
