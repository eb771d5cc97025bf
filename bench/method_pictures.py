"""What each method does to the logits, drawn for its page: `python -m bench.method_pictures`.

Writes docs/methods/img/NAME.png, what `posenc.show` measures, and NAME-small.png, its first panel
without words. Many schemes start neutral, as RoPE or as none; `NOISE` says what they are drawn
with. The same numbers give the same bytes, on one version of matplotlib.
"""

import io
import sys
from collections.abc import Callable, Mapping

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

import posenc
from posenc import show
from posenc.encodings.sinusoidal import Sinusoidal
from posenc.files import atomic_file
from posenc.zoo import EMBEDDING_DEFAULTS, ZOO

from .clone import DOCS, check_clone

FOLDER = DOCS / "methods" / "img"
WIDTH, HEADS, LENGTH, TEXTS = 256, 4, 128, 16
#: Standard deviation of a GPT's token embeddings and of a learned table.
EMBEDDING_STD = 0.02
#: What is added to parameters of the encoding that start where nothing of the method is seen:
#: their names and the standard deviation.
NOISE: dict[str, Mapping[str, float]] = {
    "carope": {"weight": 0.02},
    "cmha": {"delta": 0.3, "b": 0.3},
    "rcmha": {"R": 0.3},
    "t5": {"table": 1.0},
    "cope": {"table": 1.0},
    "pope": {"delta": 1.0},
    "selective": {"W2": 3.0, "kernel": 0.3},
    "grape": {"weight": 1.0},
}


def table_of(name: str) -> Callable[[Tensor], Tensor] | None:
    """How tokens N(0, 1) enter the first layer of a GPT of this name: embeddings of their size plus
    the table, through the norm; None where nothing is added.
    """
    part = ZOO[name].embedding
    if part is None:
        return None
    if part is Sinusoidal:
        table = Sinusoidal(WIDTH, **EMBEDDING_DEFAULTS[part]).embed(torch.arange(LENGTH))
    else:
        table = EMBEDDING_STD * torch.randn(LENGTH, WIDTH)

    def enter(x: Tensor) -> Tensor:
        return F.layer_norm(EMBEDDING_STD * x + table.to(x.dtype), (WIDTH,))

    return enter


def noise_of(name: str) -> str:
    """What the picture's parameters differ by from those of a new layer, in words."""
    return ", ".join(
        f"{parameter} + N(0, {std:g})" for parameter, std in NOISE.get(name, {}).items()
    )


@torch.no_grad()
def look(name: str) -> show.Seen:
    """What is drawn of a name."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layer = posenc.attention(name, WIDTH, HEADS).double()
        x = torch.randn(TEXTS, LENGTH, WIDTH, dtype=torch.float64)
        enter = table_of(name)
        for parameter, std in NOISE.get(name, {}).items():
            values = layer.encoding.get_parameter(parameter)
            values.add_(std * torch.randn_like(values))
    noise = noise_of(name)
    seen = show.look_at(layer, x, f"{name}, {noise}" if noise else name, enter)
    assert isinstance(seen, show.Seen)
    return seen


def large(seen: show.Seen) -> Figure:
    """Three panels: equal tokens, one head, and the bias or the rates where there are such."""
    equal, random, one, *own = show.panels(seen)
    made = Figure(figsize=(10.5, 3.3), dpi=100, layout="constrained")
    made.suptitle(seen.title)
    for axes, draw in zip(made.subplots(1, 3), (equal, one, (own or [random])[-1]), strict=True):
        draw(axes)
    return made


def small(seen: show.Seen) -> Figure:
    """Logits of equal tokens over the distance."""
    made = Figure(figsize=(2.0, 0.8), dpi=100)
    axes = made.add_axes((0.02, 0.04, 0.96, 0.92))
    show.lines(axes, seen.equal, "", "")
    axes.get_legend().remove()
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
    return made


def png(figure: Figure) -> bytes:
    """A file of 128 colours; lines keep theirs, of which there are few pixels."""
    drawn, held = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as image:
        fewer = image.convert("RGB").quantize(
            128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
    by = PngInfo()
    by.add_text("Software", f"matplotlib {matplotlib.__version__}")
    fewer.save(held, "PNG", optimize=True, pnginfo=by)
    return held.getvalue()


def main() -> None:
    """Draw all names."""
    if len(sys.argv) > 1:
        sys.exit(f"bench.method_pictures takes no arguments; got {sys.argv[1:]}.")
    try:
        check_clone("bench.method_pictures")
    except ValueError as error:
        sys.exit(str(error))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in posenc.names():
        seen = look(name)
        for path, figure in ((f"{name}.png", large(seen)), (f"{name}-small.png", small(seen))):
            with atomic_file(FOLDER / path) as temporary:
                temporary.write_bytes(png(figure))
            print(FOLDER / path)


if __name__ == "__main__":
    main()
