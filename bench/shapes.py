"""What packing, windows and grouped keys cost a layer, on CPU: `python -m bench.shapes`.

    python -m bench.shapes --out bench/results/cpu/shapes.jsonl
    python -m bench.shapes --names rope carope --length 4096 --documents 8 --window 256

One row of T tokens, in inference ("fwd") and training ("fwd+bwd"), each beside its measure:

    packed    n documents of T/n tokens in one row    apart   the same documents as a batch
    window    a query sees w tokens                   whole   it sees all before it
    grouped   a key head for three query heads        equal   as many of both; Llama's, 3:1

All take turns within a round. Before anything is timed the packed row must equal the documents
apart, a window the dense band, and Llama's layer ours on the same weights, in fp64.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import posenc
from posenc.checks import check_heads
from posenc.errors import unknown
from posenc.tune.clock import take_turns

from .arguments import check_least
from .measure import modes, timing
from .peers import grouped_llama
from .rows import Row, RowFile, collect

MODES = ("fwd", "fwd+bwd")
#: Largest difference in fp64, relative to the largest entry.
TOLERANCE = 1e-9
SECONDS = 1.0

Function = Callable[[Tensor], Tensor]


def off(y: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return ((y - expected).abs().max() / expected.abs().max()).item()


def packed(name: str, args: argparse.Namespace) -> Iterator[tuple[str, Function, Tensor, float]]:
    """A packed row, and its documents as a batch: label, what is timed, on what, error."""
    layer = posenc.attention(name, args.embed_dim, args.heads)
    lengths = [args.length // args.documents] * args.documents
    x = torch.randn(1, args.length, args.embed_dim)
    apart, documents = x.view(args.documents, -1, args.embed_dim), posenc.segments(lengths)
    exact = layer.double()
    with torch.no_grad():
        whole = exact(x.double(), segments=documents).view(apart.shape)
        error = off(whole, exact(apart.double()))
    layer.float()
    yield "packed", lambda x: layer(x, segments=documents), x, error
    yield "apart", layer, apart, 0.0


def window(name: str, args: argparse.Namespace) -> Iterator[tuple[str, Function, Tensor, float]]:
    """A window, and the whole; the gate is the dense band of a shorter row."""
    whole = posenc.attention(name, args.embed_dim, args.heads)
    banded = posenc.attention(name, args.embed_dim, args.heads, window=args.window)
    dense = posenc.attention(name, args.embed_dim, args.heads, window=args.window, impl="reference")
    for layer in (banded, dense):
        layer.load_state_dict(whole.state_dict())
    few = torch.randn(1, min(args.length, 2 * args.window + 3), args.embed_dim)
    with torch.no_grad():
        error = off(banded.double()(few.double()), dense.double()(few.double()))
    x = torch.randn(1, args.length, args.embed_dim)
    yield "window", banded.float(), x, error
    yield "whole", whole, x, 0.0


def grouped(name: str, args: argparse.Namespace) -> Iterator[tuple[str, Function, Tensor, float]]:
    """A key head for three query heads, as many of both, and transformers' Llama at 3:1."""
    heads, dim = 3 * args.heads // 2, args.embed_dim // args.heads
    sizes = {"embed_dim": heads * dim, "num_heads": heads}
    shared = posenc.attention(name, **sizes, num_kv_heads=heads // 3)
    x = torch.randn(args.batch, 512, heads * dim)
    yield "grouped", shared, x, 0.0
    yield "equal", posenc.attention(name, **sizes), x, 0.0
    if name == "rope":
        peer, twin = grouped_llama(heads * dim, heads, heads // 3)
        few = x[:1, :37].double()
        with torch.no_grad():
            error = off(peer.double()(few), twin.double()(few))
        # Its phases are fp32.
        yield "transformers llama, 3:1", peer.float(), x, error - 37 * torch.finfo(x.dtype).eps


CASES = {"packed": packed, "window": window, "grouped": grouped}


def measure(kind: str, name: str, args: argparse.Namespace) -> Iterator[Row | str]:
    """The rows of one case; a line for what its gate refuses."""
    torch.manual_seed(0)
    ready: dict[str, tuple[Function, Tensor]] = {}
    errors: dict[str, float] = {}
    for label, run, x, error in CASES[kind](name, args):
        if error > TOLERANCE:
            yield f"{name}: no row of {label}: off by {error:.1e}; allowed {TOLERANCE:.0e}"
            continue
        ready[label], errors[label] = (run, x), max(error, 0.0)
    for mode in MODES:
        runs: dict[str, Callable[[], Any]] = {}
        for label, (run, x) in ready.items():
            given = x.detach().requires_grad_(mode != "fwd")
            runs[label] = modes(run, (given,))["fwd+bwd"] if mode != "fwd" else inference(run, x)
        for label, (low, middle, high) in take_turns(runs, args.rounds, SECONDS).items():
            _, x = ready[label]
            yield timing(
                mode,
                "time",
                "ms",
                low,
                middle,
                high,
                kind="shapes",
                name=name,
                implementation=label,
                options=f"T={args.length} documents={args.documents} window={args.window}",
                dtype="float32",
                B=x.shape[0],
                H=args.heads,
                T=x.shape[1],
                D=args.embed_dim // args.heads,
                error_vs_fp64=errors[label],
            )


def inference(run: Function, x: Tensor) -> Callable[[], None]:
    """A forward pass without a graph."""

    def forward() -> None:
        with torch.no_grad():
            run(x)

    return forward


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Milliseconds, and the ratio to the case's measure."""
    measures = {"packed": "apart", "window": "whole", "grouped": "equal"}
    measures["transformers llama, 3:1"] = "grouped"
    found = {(row.name, row.mode, row.implementation): row.p50 for row in rows}
    for (name, mode, label), ms in found.items():
        beside = measures.get(label)
        ratio = f"{ms / found[name, mode, beside]:.2f} x {beside}" if beside else ""
        yield f"{name:12}{mode:9}{label:26}{ms:9.1f} ms   {ratio}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        ValueError: for names or sizes that cannot be measured.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", default=["nope", "rope", "carope", "rcmha"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="of the grouped case, at 512 tokens")
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="at least")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    args = parser.parse_args(arguments)
    for name in args.names:
        if name not in posenc.names():
            raise ValueError(unknown("name", name, posenc.names()))
    sizes = {"documents": args.documents, "window": args.window, "batch": args.batch}
    check_least(1, length=args.length, rounds=args.rounds, **sizes)
    if args.length % args.documents:
        raise ValueError(
            f"--length must be a multiple of --documents={args.documents}; got {args.length}."
        )
    if check_heads(args.embed_dim, args.heads) % 2 or args.heads % 2:
        raise ValueError(
            f"--heads must be even, and of an even head dim; got {args.heads} of {args.embed_dim}."
        )
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    try:
        args = parse(arguments)
        file = RowFile(args.out, torch.device("cpu"))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    rows: list[Row] = []
    refused = False
    for kind in args.cases:
        for name in args.names:
            refused |= collect(measure(kind, name, args), file, rows)
        print(f"{kind} measured", flush=True)
    print(f"\n{file.shared['device']}, {file.shared['threads']} threads, float32")
    print(*table(rows), sep="\n")
    if refused:
        sys.exit("a layer was refused, see above")


if __name__ == "__main__":
    main()
