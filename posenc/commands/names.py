"""The names of the zoo as a table: `posenc names`."""

import argparse
from collections.abc import Iterator, Sequence

import posenc
from posenc.zoo import ZOO

HEADER = ("name", "paper", "acts on", "remembers", "what it is")


def rows() -> Iterator[tuple[str, ...]]:
    """A name, its paper (arXiv id), where it acts, what decoding remembers beside k and v, and what
    it is.
    """
    for name, recipe in ZOO.items():
        streams = posenc.attention(name, 64, 4).streams()
        beside = ", ".join(stream for stream in streams if stream not in ("k", "v"))
        yield name, recipe.paper, recipe.acts, beside or "-", recipe.summary


def table(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        [f"{word:<{width}}" for word, width in zip(line, widths, strict=True)] for line in lines
    )
    return "\n".join("  ".join(words).rstrip() for words in padded)


def main(argv: Sequence[str]) -> int:
    """Print them."""
    argparse.ArgumentParser(
        prog="posenc names", description=(__doc__ or "").splitlines()[0]
    ).parse_args(argv)
    print(table([HEADER, *rows()]))
    return 0
