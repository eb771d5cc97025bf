"""Peak memory of one attention layer's training step against the length: `python -m bench.memory`.

Every figure is the peak resident memory of a fresh process during forward + backward, less what it
held with the layer and its input. On CPU, by Linux' /proc; `bench.kernels` measures it on CUDA.

    python -m bench.memory --names mha mdha rmha rcmha --impls reference auto --out rows.jsonl
    python -m bench.memory --names moh --options shared=2 top_k=2 --heads 8 --impls sdpa auto
"""

import argparse
import json
import multiprocessing
import re
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

import posenc
from bench.measure import timing
from bench.rows import Row, RowFile, written


def resident(field: str) -> int:
    """Bytes of this process by /proc: VmRSS now, VmHWM at most since the last reset."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def added_bytes(
    name: str,
    options: Mapping[str, Any],
    impl: str,
    length: int,
    embed_dim: int,
    heads: int,
    out: Connection,
) -> None:
    """Send the peak of one training step, less what was resident before it."""
    torch.manual_seed(0)
    if name in ("rmha", "rcmha"):
        options = {"max_distance": length, **options}
    layer = posenc.attention(name, embed_dim, heads, impl=impl, **options)
    # What libraries load and allocate at first use is not counted.
    short = torch.randn(1, 2, embed_dim)
    checkpoint(layer, short, use_reentrant=False).sum().backward()
    x = torch.randn(1, length, embed_dim, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    layer(x).square().mean().backward()
    out.send(resident("VmHWM") - before)


def measure(
    name: str, options: Mapping[str, Any], impl: str, length: int, embed_dim: int, heads: int
) -> int:
    """Bytes that a training step of one sequence adds."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=added_bytes, args=(name, options, impl, length, embed_dim, heads, sender)
    )
    process.start()
    sender.close()  # or a child that dies would leave the reader waiting
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        sys.exit(f"measuring {name} at T={length} failed, exit code {process.exitcode}")
    finally:
        process.join()


def main() -> None:
    """Print one row a name and back end: MiB at each length, and the bytes a token at the last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--names", nargs="+", default=list(posenc.names()))
    parser.add_argument("--impls", nargs="+", default=["auto"])
    parser.add_argument(
        "--options", nargs="+", type=option, default=[], metavar="KEY=VALUE", help="of the names"
    )
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    file = RowFile(args.out, torch.device("cpu"))
    print(
        f"B=1 C={args.embed_dim} H={args.heads} float32, forward + backward, torch "
        f"{torch.__version__}; MiB"
    )
    lengths = "".join(f"{f'T={length}':>10}" for length in args.lengths)
    print(f"{'layer':12}{'impl':10}{lengths}  B/token")
    for name in args.names:
        for impl in args.impls:
            cells = []
            for length in args.lengths:
                size = measure(name, dict(args.options), impl, length, args.embed_dim, args.heads)
                cells.append(f"{size / 2**20:10.1f}")
                file.add(row(f"{name} layer", impl, size / 2**20, length, args))
            print(f"{name:12}{impl:10}{''.join(cells)}{size / length:9.0f}", flush=True)


def option(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value read as JSON where it is."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def row(name: str, impl: str, mib: float, length: int, args: argparse.Namespace) -> Row:
    """One reading as a row."""
    sizes = {"B": 1, "H": args.heads, "T": length, "D": args.embed_dim // args.heads}
    options = written(dict(args.options))
    about = {"kind": "memory", "name": name, "implementation": impl, "dtype": "float32", **sizes}
    return timing("fwd+bwd", "memory", "MiB", mib, mib, mib, options=options, **about)


if __name__ == "__main__":
    main()
