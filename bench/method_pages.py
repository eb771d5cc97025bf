"""The gallery docs/methods, a page a name: `python -m bench.method_pages`.

Fills what lies between the markers `<!-- made: BLOCK -->` and `<!-- end -->` of every page and of
index.md: from the zoo's rows, the signatures and docstrings of their parts, the cost model, and the
committed rows of bench/results/cpu. Formulas, what to see and disagreements are written by hand.
`python -m bench.method_pictures` draws.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import posenc
from posenc.accounting import Part
from posenc.attention import Attention
from posenc.convolution import DepthwiseConv
from posenc.encodings.learned import Learned
from posenc.files import atomic_file
from posenc.routing.moh import MoH
from posenc.zoo import EMBEDDING_DEFAULTS, MODULE_OPTIONS, ZOO, Recipe, options_of, sort_options

from . import answer, tables
from . import method_pictures as pictures
from .clone import DOCS, RESULTS, check_clone
from .rows import read
from .tables import Rows, Table, count_parameters, paper, row_bytes

FOLDER = DOCS / "methods"
CPU = RESULTS / "cpu"
BLOCK = re.compile(r"(<!-- made: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
#: The shape of every cost: a layer of GPT-2 small, one text.
WIDTH, HEADS, TOKENS = 768, 12, 1024
#: What every page says, in this order.
HEADINGS = (
    "Formula", "What its logits look like", "Options", "Decoding and cost",
    "Where sources disagree", "Claimed and known", "In code", "Identities",
)  # fmt: skip


def about(name: str) -> str:
    """Summary, paper, where it acts, what it adds to a layer and to its decoding state."""
    row, layer = ZOO[name], posenc.attention(name, WIDTH, HEADS)
    extra = f"{count_parameters(layer) - count_parameters(plain()):,}"
    if row.embedding is Learned:
        extra += f"; one table in the model, {TOKENS * WIDTH:,} at {TOKENS:,} positions"
    acting = row.embedding or row.encoding
    shifts = "changes nothing" if acting.relative else "is seen"
    gaps = "are seen" if acting.reads_positions else "are not seen: tokens are counted"
    facts = [
        ("paper", paper(row.paper)),
        ("acts on", row.acts),
        ("parameters a layer, beside attention's own", extra),
        ("decoding state beside k, v", state_of(layer)),
        ("a shift of all positions", shifts),
        ("gaps in `positions`", gaps),
        ("`causal=False`", both_directions(name)),
    ]
    return f"{sentence(row.summary)}\n\n" + table((name_of(name), "at C = 768, 12 heads"), facts)


@cache
def plain() -> Attention:
    """Attention without position, of the shape of all costs."""
    return posenc.attention("nope", WIDTH, HEADS)


def name_of(name: str) -> str:
    """As code."""
    return f"`{name}`"


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def state_of(layer: Attention) -> str:
    """The streams that decoding keeps beside k and v, what a token of each is, and its bytes."""
    kept = {name: held for name, held in layer.streams().items() if name not in ("k", "v")}
    words = (
        f"`{name}`, {' x '.join(map(str, held.shape))}: {row_bytes(held)} bytes a token"
        for name, held in kept.items()
    )
    said = "; ".join(words) or "none"
    width = layer.streams()["k"].shape[-1]
    return said if width == layer.head_dim else f"{said}, but a head's k is {width} numbers"


def both_directions(name: str) -> str:
    """Whether a name attends without a causal order."""
    try:
        posenc.attention(name, 24, 4, causal=False)
    except ValueError:
        return "refused"
    return "works"


class Option(NamedTuple):
    """An option of one name."""

    spelled: str
    default: str
    meaning: str


#: The part of a name, its class, and what the name's row sets of it.
Filled = tuple[str, Callable[..., Any], Mapping[str, Any]]


def parts_of(row: Recipe) -> Iterator[Filled]:
    """What fills the seams."""
    if row.router is not None:
        yield "router", MoH, row.router(HEADS)
    if row.conv is not None:
        yield "conv", DepthwiseConv, row.conv
    yield "encoding", row.encoding, row.encoding_defaults
    if row.embedding is not None:
        yield "embedding", row.embedding, EMBEDDING_DEFAULTS.get(row.embedding, {})


def options_for(name: str) -> list[Option]:
    """The options of a name's own parts, as `posenc.attention` spells them.

    Raises:
        ValueError: an option that its class does not document.
    """
    found = []
    for part, kind, row in parts_of(ZOO[name]):
        said = arguments_of(kind)
        signature = inspect.signature(kind).parameters
        for option in options_of(kind):
            if option not in said:
                raise ValueError(
                    f"{kind.__name__} does not say what {option} is. Add it to the Args of the "
                    "class's docstring."
                )
            taken = sort_options(name, {option: None}).options[part]
            spelled = option if option in taken else f"{part}_{option}"
            default = row.get(option, signature[option].default)
            shown = f"`{shown_value(default)}`"
            if part == "router" and option in row:
                shown += f" of {HEADS} heads"
            if option == getattr(kind, "context_option", None):
                shown += "; in `GPT` its context"
            found.append(Option(f"`{spelled}`", shown, cell(said[option])))
    return found


def shown_value(value: object) -> str:
    """As code writes it, strings in double quotes."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def arguments_of(kind: Callable[..., Any]) -> dict[str, str]:
    """What the docstring of a class says of each argument; an entry begins with NAME: four
    spaces in, and goes on eight spaces in.
    """
    text = f"{inspect.getdoc(kind)}\n"
    found = re.search(r"^Args:\n((?:    .*\n)+)", text, re.MULTILINE)
    given = "" if found is None else found[1]
    entries = re.findall(r"^    (\w+): ((?:.*\n)(?:        .*\n)*)", given, re.MULTILINE)
    return {name: " ".join(meaning.split()).removesuffix(".") for name, meaning in entries}


def cell(text: str) -> str:
    """Text of a docstring within a table of Markdown."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([|*<])", r"\\\1", p) for p in pieces)


def table(header: tuple[str, ...], lines: list[Any]) -> str:
    """Of words."""
    return Table(header, lines, "", words=True).markdown().rstrip()


def options(name: str) -> str:
    """The table of a name's own options."""
    own = options_for(name)
    shared = "[those of every name](index.md#options-of-every-name)"
    if not own:
        return f"None of its own, and {shared}."
    where = f'`posenc.attention("{name}", C, H, ...)`'
    if ZOO[name].embedding is not None:
        where = f'`GPTConfig(attention="{name}", attention_options={{...}})`'
    return f"{table(('option', 'default', 'meaning'), own)}\n\nOf {where}, beside {shared}."


def cost(name: str) -> str:
    """What a layer costs a token by part, beside attention without position."""
    found = posenc.attention_cost(posenc.attention(name, WIDTH, HEADS), 1, TOKENS)
    nope = posenc.attention_cost(plain(), 1, TOKENS).total
    rows = [(part, value) for part, value in found.parts.items() if value != Part()]
    rows += [("all", found.total), ("`nope`, all", nope)]

    def line(part: str, value: Part) -> list[str]:
        counts = (value.flops, value.elementwise, value.saved_bytes)
        of_token = [f"{count / TOKENS:,.0f}" for count in counts]
        return [part, f"{value.parameters:,}", *of_token, f"{value.state_bytes:,}"]

    header = (
        "part", "parameters", "FLOPs", "single operations", "bytes kept for the backward pass",
        "bytes of decoding state",
    )  # fmt: skip
    ratio = found.total.flops / nope.flops
    note = (
        f"Each token of {TOKENS:,}, C = {WIDTH}, {HEADS} heads, fp32, by `posenc.attention_cost`: "
        "forward FLOPs of products, "
        f"{ratio:.3f} times those of `nope`; the state holds k, v and the position too"
    )
    kept = found.total.kept_flops / found.total.flops
    if kept < 1:
        note += f"; skipping the heads that a token drops leaves {kept:.0%} of them"
    return Table(header, [line(*row) for row in rows], f"{note}.").markdown()


def picture(name: str) -> str:
    """The drawing, and how it came about."""
    heads, length, noise = pictures.HEADS, pictures.LENGTH, pictures.noise_of(name)
    drawn = [f"A new layer of {heads} heads of {pictures.WIDTH // heads} on {length} tokens"]
    if noise:
        drawn.append(f"with `{noise}`, as its start shows nothing of its own")
    if ZOO[name].embedding is not None:
        drawn.append("behind a GPT's table of positions and first norm")
    text = f"![Logits of {name} by distance and on one text](img/{name}.png)\n\n"
    text += f"{', '.join(drawn)}; keys are projected like queries, so that equal tokens match."
    learned = sorted(CPU.glob(f"{name}-s*-mechanism.png"))
    if learned:
        text += f" What a trained one learned: `bench/results/cpu/{learned[0].name}`."
    return text


@cache
def rows_of(file: str) -> Rows:
    """Committed rows."""
    return read(CPU / file)


@cache
def measured() -> tuple[Table, Table]:
    """Perplexity and throughput, as the README has them."""
    return (
        tables.perplexity_table(rows_of("perplexity.jsonl")),
        tables.throughput_table(rows_of("throughput.jsonl")),
    )


def of_name(made: Table, name: str) -> dict[str, str]:
    """The line of a name, by column; nothing where it was not measured."""
    for line in made.lines:
        if line[0] == name_of(name):
            cells = zip(made.header[1:], line[1:], strict=True)
            return {re.sub("^at ", "perplexity at ", title): text for title, text in cells if text}
    return {}


def known(name: str) -> str:
    """What the committed rows say of a name, beside the baseline."""
    base = tables.baseline(rows_of("perplexity.jsonl"))
    lines = []
    for made in measured():
        own, other = of_name(made, name), of_name(made, base)
        for title, text in own.items():
            lines.append([title, text] if name == base else [title, text, other.get(title, "")])
    if not lines:
        return (
            f"Not measured here yet: `python -m bench.perplexity --attention {base} {name}`, "
            "`python -m bench.throughput`."
        )
    header = ("measured here", name_of(name), name_of(base))[: len(lines[0])]
    made = Table(header, lines, "Small models and CPU: [how to read it](index.md#how-to-choose).")
    return made.markdown()


def gallery() -> str:
    """Every name: its small picture, and its line."""
    lines = [
        (f"[{name_of(name)}]({name}.md)", f"![{name}](img/{name}-small.png)",
         f"{row.summary} ({paper(row.paper)})")
        for name, row in ZOO.items()
    ]  # fmt: skip
    return table(("name", "equal tokens, by distance", "what it does"), lines)


def shared() -> str:
    """The options that every name has."""
    said, signature = arguments_of(Attention), inspect.signature(Attention).parameters
    lines = [
        (f"`{option}`", f"`{shown_value(signature[option].default)}`", cell(said[option]))
        for option in MODULE_OPTIONS
    ]
    return table(("option", "default", "meaning"), lines)


def choose() -> str:
    """What the committed rows say of all names: the answer, the verdicts, and what each costs."""
    rows = [*rows_of("perplexity.jsonl"), *rows_of("throughput.jsonl")]
    linked = {name: f"[{name_of(name)}]({name}.md)" for name in ZOO}
    return "\n\n".join(
        [
            "\n".join(f"- {line}" for line in answer.sentences(rows)),
            answer.cost_table(rows, linked).markdown(),
            answer.verdict_table(rows).markdown(),
        ]
    )


OF_NAME: dict[str, Callable[[str], str]] = {
    "about": about, "picture": picture, "options": options, "cost": cost, "known": known,
}  # fmt: skip
OF_INDEX: dict[str, Callable[[], str]] = {"gallery": gallery, "choose": choose, "shared": shared}


def filled(path: Path) -> str:
    """A page with its blocks made anew.

    Raises:
        ValueError: the page is missing, or has other blocks than it should.
    """
    name = path.stem
    blocks: dict[str, Callable[[], str]] = OF_INDEX
    if name != "index":
        blocks = {block: lambda make=make: make(name) for block, make in OF_NAME.items()}
    if not path.is_file():
        raise ValueError(
            f"{path} is missing. Write it as the other pages are, with {', '.join(blocks)} as "
            "<!-- made: BLOCK --> and <!-- end -->."
        )
    text = path.read_text(encoding="utf-8")
    there = [block for _, block, _, _ in BLOCK.findall(text)]
    if there != list(blocks):
        raise ValueError(
            f"{path} must have the blocks {', '.join(blocks)} in this order; got {there}."
        )
    return BLOCK.sub(lambda found: f"{found[1]}{blocks[found[2]]().strip()}\n{found[4]}", text)


def pages(folder: Path = FOLDER) -> list[Path]:
    """The index, and a page for each name of the zoo."""
    return [folder / f"{name}.md" for name in ("index", *posenc.names())]


def main() -> None:
    """Fill all pages."""
    if len(sys.argv) > 1:
        sys.exit(f"bench.method_pages takes no arguments; got {sys.argv[1:]}.")
    try:
        check_clone("bench.method_pages")
        made = {path: filled(path) for path in pages()}
        for path, text in made.items():
            with atomic_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(*made, sep="\n")


if __name__ == "__main__":
    main()
