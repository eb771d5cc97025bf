"""Tokens a second of attention layers and their peers: `python -m bench.throughput`.

    python -m bench.throughput --out bench/results/cpu/throughput.jsonl
    python -m bench.throughput --names rope --lengths 512 --modes train decode --impls auto

What is timed is a layer with its projections, for every implementation and sequence length:

    train      forward + backward, gradients of input and weights; MFU beside it
    prefill    a forward pass that also fills a fresh cache
    decode     one token of each sequence, with S - 1 of them in the cache
    recompute  what that token costs without a cache: a forward pass over all S

Each passes the gate of `bench.measure` first: outputs and gradients against the definition in fp64
on its own weights, and after a prefill of all tokens but one the cached step against the last row.
On CPU all candidates of a length and mode take turns within a round.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn

import posenc
from posenc.checks import check_heads
from posenc.cost import attention_cost
from posenc.errors import unknown
from posenc.tune.clock import take_turns

from .arguments import check_device, check_least
from .layers import Compile, Layer, Reference, as_is, one_row, zoo_case
from .measure import (
    Case,
    Function,
    Gate,
    allowed,
    errors,
    graphed,
    modes,
    reason,
    timed,
    timing,
)
from .peers import CUDA_PEERS, PEERS
from .rows import Row, RowFile

MODES = ("train", "prefill", "decode", "recompute")
IMPLS: dict[str, tuple[str, Compile]] = {
    "auto": ("auto", as_is),
    "sdpa": ("sdpa", as_is),
    "reference": ("reference", as_is),
    "fused": ("fused", as_is),
    "compiled sdpa": ("sdpa", torch.compile),
}
#: The longest text that "reference" is timed at: it holds every pair of tokens.
REFERENCE_UP_TO = 1024
#: Rounds on CPU go on for so long.
SECONDS = 1.0

Quantiles = tuple[float, float, float]


class Candidate(NamedTuple):
    """A layer that has passed its gate."""

    name: str
    implementation: str
    layer: nn.Module  # a `Layer` where it has an error of decode
    definition: Function
    errors: dict[str, float]  # by mode; one that it does not have is missing


def step_errors(case: Case, layer: Layer) -> Iterator[tuple[str, float, float]]:
    """Prefill with all but the last token of the case's x (B, T, C), then decode it: mode, error,
    and what the case excuses.
    """
    (x,), definition = case.inputs, case.definition
    with torch.no_grad():
        head, state = layer.prefill(x[:, :-1].contiguous(), x.shape[1])
        step = layer.decode(x[:, -1:].contiguous(), state)
        exact, plain = definition(one_row(x).double()), definition(one_row(x))
    last = x.shape[1] - 1
    for mode, y, tokens in (("prefill", head, slice(last)), ("decode", step, slice(last, None))):
        (error,) = errors([one_row(y)], [exact[:, tokens]])
        (most,) = allowed(errors([plain[:, tokens]], [exact[:, tokens]]), case)
        yield mode, error, most


def candidates(case: Case) -> Iterator[Candidate | str]:
    """The providers of a case that compute what it defines; a line for each of the others."""
    gate: Gate | None = None
    for label, build in case.providers.items():
        try:
            gate = gate or Gate(case)
            layer: Any = build()
            error = gate.check(layer)
        except Exception as failure:  # whatever a peer raises, the others are still measured
            yield f"{case.name}: no row of {label}: {reason(failure)}"
            continue
        passed = {"train": error, "recompute": error}
        if not isinstance(layer, Layer):
            yield f"{case.name}: no prefill and decode of {label}: it is measured without a cache"
            yield Candidate(case.name, label, layer, case.definition, passed)
            continue
        try:
            for mode, off, most in step_errors(case, layer):
                if off <= most:
                    passed[mode] = off
                else:
                    yield f"{case.name}: no {mode} of {label}: off by {off:.1e}; allowed {most:.1e}"
        except Exception as failure:
            yield f"{case.name}: no prefill and decode of {label}: {reason(failure)}"
        yield Candidate(case.name, label, layer, case.definition, passed)


def cases(x: Tensor, args: argparse.Namespace) -> Iterator[Case | str]:
    """Every name and peer on x (B, T, C); a line for each that is not installed."""
    for name in args.names:
        if name == "moh" and args.heads < 4:
            yield f"moh: left out, needs at least 4 heads; got {args.heads}"
            continue
        impls = {
            label: IMPLS[label]
            for label in args.impls
            if label != "reference" or x.shape[1] <= REFERENCE_UP_TO
        }
        yield zoo_case("throughput", name, name, impls, x, args.heads)
    peers = {**PEERS, **CUDA_PEERS} if x.is_cuda else PEERS
    for (name, label), build in peers.items() if args.peers else ():
        try:
            layer, definition = build(x.shape[-1], args.heads, x.device, x.dtype)
        except Exception as failure:
            yield f"{name}: {label} left out: {reason(failure)}"
            continue
        # Phases in fp32 are off by T times its rounding.
        slack = x.shape[1] * torch.finfo(torch.float32).eps if name == "rope" else 0.0
        providers = {label: lambda layer=layer: layer}
        yield Case("throughput", name, (x,), definition, providers, one_row, slack)


def forward(layer: nn.Module, x: Tensor) -> None:
    """In inference."""
    with torch.no_grad():
        layer(x)


def prefill(layer: Layer, x: Tensor) -> None:
    """In inference, with a fresh cache."""
    with torch.no_grad():
        layer.prefill(x, x.shape[1])


def one_token(layer: Layer, x: Tensor) -> Callable[[], None]:
    """A step by the last token of x, the others being cached."""
    with torch.no_grad():
        _, state = layer.prefill(x[:, :-1].contiguous(), x.shape[1])
    token = x[:, -1:].contiguous()

    def step() -> None:
        with torch.no_grad():
            layer.decode(token, state)

    return step


def call(mode: str, layer: Any, x: Tensor) -> Callable[[], Any]:
    """What is timed."""
    if mode == "train":
        return modes(layer, (x.detach().requires_grad_(),))["fwd+bwd"]
    x = x.detach()
    if mode == "decode":
        return one_token(layer, x)
    return partial(prefill if mode == "prefill" else forward, layer, x)


def time_all(
    runs: Sequence[tuple[Candidate, Callable[[], Any]]], device: torch.device, rounds: int
) -> Iterator[tuple[Candidate, str, Quantiles] | str]:
    """Milliseconds of each call by metric: in turns on CPU; one by one, and replayed from a graph,
    on CUDA.
    """
    if device.type != "cuda":
        turns = {f"{one.name} {one.implementation}": run for one, run in runs}
        for (candidate, _), times in zip(
            runs, take_turns(turns, rounds, SECONDS).values(), strict=True
        ):
            yield candidate, "throughput", times
        return
    for candidate, run in runs:
        for metric, measured in (
            ("throughput", lambda run=run: timed(run, device)),
            ("graph throughput", lambda run=run: graphed(run)),
        ):
            try:
                yield candidate, metric, measured()
            except Exception as failure:
                yield f"{candidate.name}: no {metric} of {candidate.implementation}: " + reason(
                    failure
                )


def rates(work: float, times: Quantiles) -> dict[str, float]:
    """p20, p50 and p80 of work a second, from milliseconds: the slowest call is the lowest rate."""
    low, middle, high = (1e3 * work / ms for ms in reversed(times))
    return {"p20": low, "p50": middle, "p80": high}


def measure(length: int, args: argparse.Namespace, peak: float) -> Iterator[Row | str]:
    """All rows of one length; a line for each thing left out."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    batch = max(1, args.tokens // length)
    torch.manual_seed(0)
    x = torch.randn(batch, length, args.embed_dim, device=device, dtype=dtype).requires_grad_()
    ready: list[Candidate] = []
    for case in cases(x, args):
        for found in [case] if isinstance(case, str) else candidates(case):
            if isinstance(found, str):
                yield found
            else:
                ready.append(found)
        if x.is_cuda:  # nobody takes turns there, and dynamo compiles one function so often only
            yield from timings(ready, x, args, peak)
            ready = []
            torch._dynamo.reset()
    yield from timings(ready, x, args, peak)


def timings(
    ready: Sequence[Candidate], x: Tensor, args: argparse.Namespace, peak: float
) -> Iterator[Row | str]:
    """The rows of these candidates on x (B, T, C); a line for each that fails."""
    batch, length, _ = x.shape
    sizes: dict[str, Any] = {"H": args.heads, "D": args.embed_dim // args.heads, "S": length}
    for mode in args.modes if ready else ():
        # Texts of a batch for training and prefill, few sequences where tokens come one by one.
        count = batch if mode in ("train", "prefill") else args.decode_batch
        given = x if count == batch else torch.randn_like(x[:1].expand(count, -1, -1))
        runs = []
        for one in (one for one in ready if mode in one.errors):
            try:
                runs.append((one, call(mode, one.layer, given)))
            except Exception as failure:  # at another batch than that of its gate
                yield f"{one.name}: no {mode} of {one.implementation}: {reason(failure)}"
        for result in time_all(runs, x.device, args.rounds) if runs else ():
            if isinstance(result, str):
                yield result
                continue
            candidate, metric, times = result
            row = partial(
                timing,
                mode,
                kind="throughput",
                name=candidate.name,
                implementation=candidate.implementation,
                B=count,
                T=1 if mode == "decode" else length,
                dtype=args.dtype,
                error_vs_fp64=candidate.errors[mode],
                **sizes,
            )
            tokens = count * (length if mode in ("train", "prefill") else 1)
            yield row(metric, "tokens/s", **rates(tokens, times))
            if (mode, metric) == ("train", "throughput") and isinstance(
                candidate.definition, Reference
            ):
                cost = attention_cost(candidate.definition.module, count, length)
                yield row("mfu", "1", **rates(cost.total.training_flops / peak, times))


def matmul_peak(args: argparse.Namespace) -> Row:
    """The rate of a large square product in the dtype of the layers."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind(0)
    run = partial(torch.matmul, a, b)
    on_cuda = device.type == "cuda"
    times = timed(run, device) if on_cuda else take_turns({"": run}, args.rounds, SECONDS)[""]
    about: dict[str, Any] = {"kind": "throughput", "name": "matmul peak", "implementation": "torch"}
    about |= {"T": side, "dtype": args.dtype}
    return timing("fwd", "FLOP/s", "FLOP/s", **rates(2 * side**3, times), **about)


def table(rows: Sequence[Row], mode: str) -> Iterator[str]:
    """Tokens a second: a line a name and implementation, a column a length."""
    found = medians(rows, mode)
    lengths = sorted({length for by_length in found.values() for length in by_length})
    yield f"{mode}, tokens/s".ljust(36) + "".join(f"{f'S={n}':>12}" for n in lengths)
    for (name, label), by_length in found.items():
        cells = (f"{by_length[n]:12,.0f}" if n in by_length else " " * 12 for n in lengths)
        yield f"{name:12}{label:24}" + "".join(cells)


def medians(rows: Sequence[Row], mode: str) -> dict[tuple[str, str], dict[int, float]]:
    """p50 of the throughput in a mode, by (name, implementation) and length."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if (row.mode, row.metric) == (mode, "throughput") and row.S is not None:
            found.setdefault((row.name, row.implementation), {})[row.S] = row.p50
    return found


def checks(rows: Sequence[Row]) -> Iterator[str]:
    """`rope` over every peer's RoPE, and from where on a cache pays."""
    for mode in MODES:
        found = medians(rows, mode)
        ours = {key: found[key] for key in found if key[0] == "rope" and key[1] in IMPLS}
        for (_, label), own in ours.items():
            for (name, peer), other in found.items():
                if name != "rope" or peer in IMPLS or label == "reference":
                    continue
                ratios = " ".join(f"{n}:{own[n] / other[n]:.2f}" for n in sorted(own) if n in other)
                yield f"rope {label} over {peer}, {mode}: {ratios}"
    without = medians(rows, "recompute")
    for key, cached in medians(rows, "decode").items():
        slower = [n for n in cached if cached[n] <= without.get(key, {}).get(n, 0.0)]
        first = [n for n in sorted(cached) if n > max(slower, default=0)]
        where = f"from S={first[0]} on" if first else "at no measured length"
        yield f"{' '.join(key)}: decoding beats recomputing {where}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        ValueError: for names, sizes or devices that cannot be measured.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--names", nargs="+", default=list(posenc.names()))
    parser.add_argument("--impls", nargs="+", help=f"of {', '.join(IMPLS)}")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--tokens", type=int, help="a batch of training and prefill")
    parser.add_argument("--decode-batch", type=int, default=1, help="sequences that decode")
    parser.add_argument("--embed-dim", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5, help="at least, on CPU")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default=default, help=f"{default} if not given")
    parser.add_argument(
        "--peak", type=float, metavar="FLOPS", help="a second; measured if not given"
    )
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    args = parser.parse_args(arguments)
    check_device(args.device)
    for option, value in DEFAULTS[args.device.partition(":")[0]].items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    for option, given, known in (
        ("name", args.names, posenc.names()),
        ("implementation", args.impls, IMPLS),
    ):
        for value in given:
            if value not in known:
                raise ValueError(unknown(option, value, known))
    if "fused" in args.impls:
        posenc.attention("nope", 2, 1, impl="fused")  # raises where no kernel can run
    check_least(1, tokens=args.tokens, decode_batch=args.decode_batch, rounds=args.rounds)
    check_least(2, lengths=args.lengths)
    if args.peak is not None and not args.peak > 0:
        raise ValueError(f"--peak must be above 0; got {args.peak}.")
    if check_heads(args.embed_dim, args.heads) % 2:
        raise ValueError("rotations need an even head dim. Choose --embed-dim divisible by 2 H.")
    return args


DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "impls": ["auto", "sdpa", "reference"],
        "lengths": [64, 128, 256, 512, 1024, 2048],
        "tokens": 4096,
        "embed_dim": 256,
        "heads": 4,
        "dtype": "float32",
    },
    "cuda": {
        "impls": ["auto", "sdpa", "reference", "fused", "compiled sdpa"],
        "lengths": [1024, 4096],
        "tokens": 16384,
        "embed_dim": 768,
        "heads": 12,
        "dtype": "bfloat16",
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; print what was left out, a table a mode, and the checks."""
    try:
        args = parse(arguments)
        file = RowFile(args.out, torch.device(args.device))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    # Gates and modes differentiate one compiled forward pass more than once.
    functorch_config.donated_buffer = False
    rows, peak = [], args.peak
    if peak is None:
        ceiling = matmul_peak(args)
        file.add(ceiling)
        peak = ceiling.p50
        print(f"peak: {peak:.3g} FLOP/s, of a product of T={ceiling.T}", flush=True)
    failed = False
    for length in args.lengths:
        for row in measure(length, args, peak):
            if isinstance(row, str):
                failed = failed or any(f" of {label}: " in row for label in args.impls)
                print(row, flush=True)
                continue
            file.add(row)
            rows.append(row)
        print(f"S={length} measured", flush=True)
    print(
        f"\nC={args.embed_dim} H={args.heads} {args.dtype}, {file.shared['device']}, "
        f"{file.shared['threads']} threads, torch {torch.__version__}"
    )
    for mode in args.modes:
        print("", *table(rows, mode), sep="\n")
    print("", *checks(rows), sep="\n")
    if failed:
        sys.exit("a layer of posenc was refused or failed, see above")


if __name__ == "__main__":
    main()
