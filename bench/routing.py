"""What skipping dropped heads saves, against the share of active heads: `python -m bench.routing`.

    python -m bench.routing --out bench/results/cpu/routing.jsonl       on CPU
    python -m bench.routing --out bench/results/h100/routing.jsonl      on CUDA, where there is one

For every length and share of heads that a MoH router keeps active, the attention core with its
gates given, the projection of the queries, and a whole layer with its router, in inference, in
training (forward + backward) and while decoding one token after so many:

    dense     without a router
    masked    everything computed, then weighed by gates of which many are 0: the released code
    skipping  only what the gates keep; attention whether or not impl="auto" would choose it,
              the projections of a layer where it does

Every provider passes the gate of `bench.measure` first, at no more than 2048 tokens. On CPU they
take turns within a round. A plot of the ratios to dense is drawn beside the rows.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure  # without pyplot there is no display to look for
from torch import Tensor, nn
from torch.nn import functional as F

import posenc
from posenc.backends import choice
from posenc.backends import skipping as skipping_on_cpu
from posenc.backends.case import consecutive
from posenc.routing.gates import Gates, weigh
from posenc.tune.clock import take_turns

from .arguments import check_device, check_least
from .measure import (
    Case,
    Function,
    Gate,
    graphed,
    modes,
    one_head,
    peak_mib,
    timed,
    timing,
)
from .rows import Row, RowFile, read, written

#: Shared and selected heads of eight; the share of active heads.
SPLITS = {(2, 6): 1.0, (2, 4): 0.75, (2, 2): 0.5, (0, 3): 0.375, (0, 2): 0.25}
LENGTHS = (512, 1024, 2048, 4096, 8192)
GATE_UP_TO = 2048  # the definition needs memory for every pair of tokens, in fp64
LEVELS, MODES = ("core", "queries", "layer"), ("fwd", "fwd+bwd", "decode")
DENSE, MASKED, SKIPPING = "dense", "masked", "skipping"
#: How far above its share of active heads the core was designed to stay on a GPU, in training from
#: 2048 tokens on.
OVERHEAD, OVERHEAD_FROM = 0.12, 2048

Inputs = tuple[Tensor, ...]


@contextmanager
def always_skipping() -> Iterator[None]:
    """Inside, impl="auto" skips on CPU wherever it can."""
    names = ("SKIP_FROM", "SKIP_TOKEN_FROM", "SKIP_UP_TO")
    before = [getattr(skipping_on_cpu, name) for name in names]
    for name, value in zip(names, (0, 0, 1.0), strict=True):
        setattr(skipping_on_cpu, name, value)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(skipping_on_cpu, name, value)


def kept_only(gates: Tensor) -> Tensor:
    """The gates, of which those that are 0 have no gradient."""
    return torch.where(gates != 0, gates, gates.detach())


def definition(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None) -> Tensor:
    """Causal attention as written, weighed."""
    visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    hidden = ~visible.tril(k.shape[-2] - q.shape[-2])
    o = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return o if gates is None else weigh(o, kept_only(gates))


def masked(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """torch's attention, then the gates."""
    o = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2])
    return weigh(o, gates)


def whole(q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
    """Every head, without gates."""
    return choice.attend(consecutive(q, k, v), impl)


def skipping(always: int, active: int, on_cuda: bool) -> Callable[..., Tensor]:
    """What computes the kept pairs alone, for gates with so many heads always on and active."""
    if on_cuda:
        from posenc.kernels.routed import routed_attention

        return routed_attention

    def run(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        dense = partial(whole, impl="auto")
        return skipping_on_cpu.attend_kept(
            q, k, v, Gates(gates, always, active), q.shape[-1] ** -0.5, dense
        )

    return run


def core_case(
    split: tuple[int, int] | None,
    batch: int,
    dim: int,
    length: int,
    queries: int | None = None,
    **like: Any,
) -> Case:
    """The attention core of eight heads; without a split it is dense."""
    queries = length if queries is None else queries
    q = torch.randn(batch, queries, 8, dim, **like).transpose(1, 2)
    packed = torch.randn(batch, length, 2, 8, dim, **like)
    k, v = packed.permute(2, 0, 3, 1, 4)
    inputs: Inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
    on_cuda = q.is_cuda
    if split is None:
        dense = partial(whole, impl="fused" if on_cuda else "auto")
        return Case("routing", "moh core", inputs, definition, {DENSE: lambda: dense}, one_head)
    router = posenc.MoH(8 * dim, 8, shared=split[0], top_k=split[1]).to(q.device)
    x = torch.randn(batch, queries, 8 * dim, device=q.device)
    gates = router(x)[0].detach().requires_grad_()
    providers = {
        MASKED: lambda: masked,
        SKIPPING: lambda: skipping(split[0], sum(split), on_cuda),
    }
    return Case("routing", "moh core", (*inputs, gates), definition, providers, one_head)


def queries_case(
    split: tuple[int, int] | None, batch: int, dim: int, length: int, **like: Any
) -> Case:
    """The projection of the queries of eight heads."""
    width = 8 * dim
    x = torch.randn(batch, length, width, **like).requires_grad_()
    weight = (torch.randn(width, width, **like) / width**0.5).requires_grad_()

    def project(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight).unflatten(-1, (8, dim)).transpose(1, 2)

    if split is None:
        return Case(
            "routing", "moh queries", (x, weight), project, {DENSE: lambda: project}, lambda z: z
        )
    router = posenc.MoH(width, 8, shared=split[0], top_k=split[1]).to(x.device)
    gates = Gates(router(x.detach().float())[0].detach(), split[0], sum(split))
    kept = (gates.values != 0).unsqueeze(-1)

    def mask(x: Tensor, weight: Tensor) -> Tensor:
        return torch.where(kept, project(x, weight), 0.0)

    def skip(x: Tensor, weight: Tensor) -> Tensor:
        if not x.is_cuda:
            return skipping_on_cpu.project_kept(x, weight, None, gates)
        from posenc.kernels.projection import project_kept

        return project_kept(x, weight, None, gates.values)

    providers = {MASKED: lambda: mask, SKIPPING: lambda: skip}
    return Case("routing", "moh queries", (x, weight), mask, providers, lambda z: z)


def module(split: tuple[int, int] | None, width: int, impl: str, **like: Any) -> nn.Module:
    """A layer with RoPE, of eight heads; the same weights for the same width."""
    torch.manual_seed(0)
    if split is None:
        return posenc.attention("rope", width, 8, impl=impl).to(**like)
    options = {"shared": split[0], "top_k": split[1]}
    return posenc.attention("moh", width, 8, impl=impl, **options).to(**like)


def layer_case(
    split: tuple[int, int] | None, batch: int, dim: int, length: int, **like: Any
) -> Case:
    """A whole layer, from which weights and router do not differ between providers."""
    x = torch.randn(batch, length, 8 * dim, **like).requires_grad_()
    best = "fused" if x.is_cuda else "auto"
    reference = module(split, 8 * dim, "reference", **like)
    precise = copy.deepcopy(reference).double()

    def defined(x: Tensor) -> Tensor:
        return (precise if x.dtype == torch.float64 else reference)(x)

    build = partial(module, split, 8 * dim, **like)
    providers = (
        {DENSE: lambda: build(best)}
        if split is None
        else {MASKED: lambda: build("sdpa"), SKIPPING: lambda: build(best)}
    )
    return Case("routing", "moh layer", (x,), defined, providers, lambda x: x[-1:])


def decode_steps(
    level: str, split: tuple[int, int] | None, dim: int, length: int, **like: Any
) -> dict[str, Callable[[], Any]]:
    """By provider, one more token after `length` of them."""
    if level == "core":
        case = core_case(split, 1, dim, length, 1, **like)
        checked(case)
        return {name: modes(build(), case.inputs)["fwd"] for name, build in case.providers.items()}
    best = "fused" if torch.device(like["device"]).type == "cuda" else "auto"
    impls = {DENSE: best} if split is None else {MASKED: "sdpa", SKIPPING: best}
    layers = {name: module(split, 8 * dim, impl, **like) for name, impl in impls.items()}
    steps = {name: one_token(layer, length) for name, layer in layers.items()}
    first, *others = [step() for step in steps.values()]
    for other in others:  # on the same tokens; what each computes, the other modes have checked
        torch.testing.assert_close(other, first, rtol=0.05, atol=0.05 * first.abs().max().item())
    return steps


def one_token(layer: Any, length: int) -> Callable[[], Tensor]:
    """A step of a layer whose cache holds so many tokens, the same for every layer."""
    torch.manual_seed(0)
    weight = layer.c_attn.weight
    cache = layer.eval().make_cache(1, length + 1)
    with torch.no_grad():
        layer(torch.randn(1, length, layer.embed_dim).to(weight), cache=cache)
    token = torch.randn(1, 1, layer.embed_dim).to(weight)

    def step() -> Tensor:
        with torch.no_grad():
            y: Tensor = layer(token, cache=cache)
        cache.truncate(length)
        return y

    return step


CASES = {"core": core_case, "queries": queries_case, "layer": layer_case}


def checked(case: Case) -> dict[str, float]:
    """The error of every provider; ValueError where one is beyond what its dtype excuses."""
    gate = Gate(case)
    if case.name != "moh core" or DENSE in case.providers:
        return {name: gate.check(build()) for name, build in case.providers.items()}

    def with_kept_only(function: Function) -> Function:
        # The released code gives gates of 0 a gradient, which its router's product with 0 drops.
        return lambda q, k, v, gates: function(q, k, v, kept_only(gates))

    return {name: gate.check(with_kept_only(build())) for name, build in case.providers.items()}


def measure(
    level: str, mode: str, split: tuple[int, int] | None, length: int, args: argparse.Namespace
) -> Iterator[Row]:
    """The rows of one level, mode, split and length."""
    like = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    device, dim = torch.device(args.device), args.dim
    batch = 1 if mode == "decode" else max(1, args.tokens // length)
    torch.manual_seed(0)
    if mode == "decode":
        errors, runs = {}, decode_steps(level, split, dim, length, **like)
    else:
        make = CASES[level]
        errors = checked(make(split, 1, dim, min(length, GATE_UP_TO), **like))
        case = make(split, batch, dim, length, **like)
        runs = {name: modes(build(), case.inputs)[mode] for name, build in case.providers.items()}
    sizes = {"B": batch, "H": 8, "T": 1 if mode == "decode" else length, "D": dim}
    about = {"kind": "routing", "name": f"moh {level}", "dtype": args.dtype, "S": length, **sizes}
    options = "" if split is None else written({"shared": split[0], "top_k": split[1]})
    if device.type == "cuda":
        times = {name: timed(run, device) for name, run in runs.items()}
    else:
        times = take_turns(runs, args.rounds)
    for name, run in runs.items():
        error = errors.get(name)
        row = partial(timing, mode, implementation=name, options=options, error_vs_fp64=error)
        yield row("time", "ms", *times[name], **about)
        if device.type == "cuda":
            if mode != "decode":
                yield row("graph time", "ms", *graphed(run), **about)
            peak = peak_mib(run, device)
            yield row("memory", "MiB", peak, peak, peak, **about)


# What follows reads rows as they lie in the file, so that old runs can be drawn again.


def share(row: dict[str, Any]) -> float:
    """The share of active heads of a row; a dense one has all."""
    if not row["options"]:
        return 1.0
    options = dict(item.split("=") for item in row["options"].split())
    return (int(options["shared"]) + int(options["top_k"])) / row["H"]


def ratios(
    rows: Sequence[dict[str, Any]], level: str, mode: str, metric: str
) -> dict[int, dict[str, list[tuple[float, float]]]]:
    """By length and provider: (share, median over the dense median), falling. Of what a file holds
    twice, the last counts.
    """
    wanted = [
        row
        for row in rows
        if (row["name"], row["mode"], row["metric"]) == (f"moh {level}", mode, metric)
    ]
    dense = {row["S"]: row["p50"] for row in wanted if row["implementation"] == DENSE}
    found: dict[int, dict[str, dict[float, float]]] = {}
    for row in wanted:
        if row["implementation"] != DENSE and row["S"] in dense:
            line = found.setdefault(row["S"], {}).setdefault(row["implementation"], {})
            line[share(row)] = row["p50"] / dense[row["S"]]
    return {
        length: {name: sorted(line.items(), reverse=True) for name, line in by_name.items()}
        for length, by_name in sorted(found.items())
    }


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """The largest share at which the ratio is 1, interpolated; None if it is above 1 everywhere."""
    for (p, ratio), (q, below) in pairwise(points):
        if ratio <= 1:
            return p
        if below <= 1:
            return q + (p - q) * (1 - below) / (ratio - below)
    return points[-1][0] if points and points[-1][1] <= 1 else None


def report(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line a level, mode and length: ratios to dense, and where skipping breaks even."""
    for level in LEVELS:
        for mode in MODES:
            for length, lines in ratios(rows, level, mode, "time").items():
                points = lines.get(SKIPPING, [])
                even = break_even(points)
                text = " ".join(f"{p:.3f}:{ratio:.2f}" for p, ratio in points)
                at_half = dict(lines.get(MASKED, [])).get(0.5)
                over = dict(points).get(0.5)
                half = f"; at 0.5 {at_half / over:.2f}x masked" if at_half and over else ""
                where = "nowhere" if even is None else f"{even:.2f}"
                over_target = [p for p, ratio in points if ratio > p + OVERHEAD]
                target = f"; above share + {OVERHEAD} at {over_target or 'no share'}"
                designed = (level, mode) == ("core", "fwd+bwd") and length >= OVERHEAD_FROM
                yield (
                    f"{level} {mode} {length}: {text}; breaks even at {where}{half}"
                    f"{target if designed else ''}"
                )


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Ratios to dense over the share of active heads: a panel a level and mode, a line a length."""
    figure = Figure(figsize=(12, 10), layout="constrained", dpi=120)
    panels = figure.subplots(len(LEVELS), len(MODES), sharex=True, sharey=True)
    titles = {"fwd": "inference", "fwd+bwd": "training", "decode": "decoding"}
    colours = [f"C{i}" for i in range(10)]
    lengths = sorted({row["S"] for row in rows})
    for level, line in zip(LEVELS, panels, strict=True):
        for mode, axes in zip(MODES, line, strict=True):
            axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":")
            axes.axhline(1, color="0.6", linewidth=1)
            for length, lines in ratios(rows, level, mode, "time").items():
                colour = colours[lengths.index(length) % 10]
                for name, style in ((SKIPPING, "o-"), (MASKED, "--")):
                    p, ratio = zip(*lines.get(name, [(None, None)]), strict=True)
                    label = f"{length}" if name == SKIPPING else None
                    axes.plot(p, ratio, style, color=colour, markersize=3, label=label,
                              linewidth=1.5 if name == SKIPPING else 0.8)  # fmt: skip
            axes.set(title=f"{level}, {titles[mode]}", ylim=(0, 2), xlim=(0.2, 1.02))
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("share of active heads")
    for axes in panels[:, 0]:
        axes.set_ylabel("time / dense attention")
    handles, labels = panels[0][0].get_legend_handles_labels()
    style = "solid: skipping, dashed: masked, dotted: the share itself"
    figure.legend(handles, labels, title=f"tokens ({style})", loc="outside lower center",
                  ncols=len(lengths))  # fmt: skip
    first = rows[0]
    figure.suptitle(f"MoH on {first['device']}, {first['dtype']}, D={first['D']}, 8 heads")
    return figure


def parse() -> argparse.Namespace:
    """The command line; ValueError for what cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        default="bfloat16" if on_cuda else "float32")  # fmt: skip
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=16384 if on_cuda else 8192, help="a batch")
    parser.add_argument("--dim", type=int, default=64, help="of a head")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--rounds", type=int, default=3, help="on CPU")
    parser.add_argument("--out", type=Path, help="append the rows to this file, draw beside it")
    args = parser.parse_args()
    check_device(args.device)
    check_least(1, lengths=args.lengths, tokens=args.tokens, rounds=args.rounds)
    if args.dim < 2 or args.dim % 2:
        raise ValueError(f"--dim must be even and at least 2; got {args.dim}.")
    return args


def main() -> None:
    """Measure, print a line a row, then the ratios; draw the plot beside the rows."""
    try:
        args = parse()
        file = RowFile(args.out, torch.device(args.device))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    rows = []
    with always_skipping():
        for length in args.lengths:
            for level in args.levels:
                for mode in args.modes:
                    if (level, mode) == ("queries", "decode"):
                        continue  # one row: nothing to gather
                    for split in (None, *SPLITS):
                        for row in measure(level, mode, split, length, args):
                            rows.append(file.add(row))
                            print(
                                f"{row.name:10} {row.mode:8} T={length:<6} {row.options:16} "
                                f"{row.implementation:9} {row.p50:10.3f} {row.unit:4} {row.metric}",
                                flush=True,
                            )
    if args.out is not None:
        rows = read(args.out)
        figure(rows).savefig(args.out.with_suffix(".png"), format="png")
    print("\ntime over dense time, by share of active heads", *report(rows), sep="\n")


if __name__ == "__main__":
    main()
