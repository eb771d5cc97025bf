"""Peak memory of one attention layer's training step against the length: `python -m bench.memory`.

Every figure is the peak resident memory of a fresh process that runs forward + backward once, less
that of a process that only builds the layer and its input. CPU only; `bench.kernels` measures the
same on CUDA.

    python -m bench.memory --names mha mdha rmha rcmha --impls reference auto --out rows.jsonl
"""

import argparse
import multiprocessing
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import posenc
from bench.rows import Row, RowFile


def peak_bytes(
    name: str, impl: str, length: int, embed_dim: int, heads: int, train: bool, out: Connection
) -> None:
    """Send this process's peak resident bytes after the step (or, without it, before)."""
    torch.manual_seed(0)
    options = {"max_distance": length} if name in ("rmha", "rcmha") else {}
    layer = posenc.attention(name, embed_dim, heads, impl=impl, **options)
    # The smallest step first: what libraries allocate once is then in both figures.
    layer(torch.randn(1, 2, embed_dim)).sum().backward()
    x = torch.randn(1, length, embed_dim, requires_grad=True)
    if train:
        layer(x).square().mean().backward()
    out.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure(name: str, impl: str, length: int, embed_dim: int, heads: int) -> int:
    """Bytes that a training step of one sequence adds."""
    context = multiprocessing.get_context("spawn")
    peaks = []
    for train in (False, True):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=peak_bytes, args=(name, impl, length, embed_dim, heads, train, sender)
        )
        process.start()
        sender.close()  # or a child that dies would leave the reader waiting
        try:
            peaks.append(receiver.recv())
        except EOFError:
            process.join()
            sys.exit(f"measuring {name} at T={length} failed, exit code {process.exitcode}")
        process.join()
    return peaks[1] - peaks[0]


def main() -> None:
    """Print one row a name and back end: MiB at each length, and the bytes a token at the last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--names", nargs="+", default=list(posenc.names()))
    parser.add_argument("--impls", nargs="+", default=["auto"])
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
                size = measure(name, impl, length, args.embed_dim, args.heads)
                cells.append(f"{size / 2**20:10.1f}")
                file.add(row(f"{name} layer", impl, size / 2**20, length, args))
            print(f"{name:12}{impl:10}{''.join(cells)}{size / length:9.0f}", flush=True)


def row(kernel: str, impl: str, mib: float, length: int, args: argparse.Namespace) -> Row:
    """One reading as a row."""
    sizes = {"B": 1, "H": args.heads, "T": length, "D": args.embed_dim // args.heads}
    about = {"dtype": "float32", "error_vs_fp64": None}
    return Row(
        kernel, impl, "fwd+bwd", "memory", "MiB", p20=mib, p50=mib, p80=mib, **sizes, **about
    )


if __name__ == "__main__":
    main()
