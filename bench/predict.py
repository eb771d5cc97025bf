"""What the kernels should take on an H100, before one has run: `python -m bench.predict`.

    python -m bench.predict                     every target, what should come out, and how sure
    python -m bench.predict --page              also the tables of docs/predictions.md
    python -m bench.predict --against bench/results/h100/kernels.jsonl ..
                                                predictions beside rows that were measured

The model is `bench.h100`, the code that it counts `bench.launches`, the peers `bench.published`.
Kernels are compiled anew, so that the tables are those of the code and the triton that are here.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posenc.files import atomic_file
from posenc.kernels.common import INTERPRETED
from posenc.kernels.flash import SPLIT_UP_TO

from .clone import DOCS, check_clone
from .h100 import H100, H200, Machine, Time
from .kernels import DIRECT, EAGER, OURS, SHAPES, TARGETS, cases
from .launches import OURS as CALLS
from .launches import Shape, call_time, plain
from .published import FORWARD, SURE, core, peer
from .rows import read
from .tables import Table

PAGE = DOCS / "predictions.md"
#: A table of the page.
MADE = re.compile(r"(<!-- predicted: ([\w ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NAMES = {**{shape: name for name, shape in SHAPES.items()}, DIRECT: "B1 H12 T1024"}
S1, S2 = SHAPES["S1"], SHAPES["S2"]
WIDE, WIDE_LONG = (16, 6, 1024, 128), (4, 6, 4096, 128)
NAMES |= {WIDE: "B16 H6 T1024 D128", WIDE_LONG: "B4 H6 T4096 D128"}


class Key(NamedTuple):
    """Of a time: the names of its rows, and the share of rows that MoH keeps."""

    name: str
    provider: str
    share: float = 1.0


class Goal(NamedTuple):
    """A target: the time of `over` by that of `under`."""

    what: str
    over: Key
    under: Key
    mode: str
    bound: str  # ">= 1.15"
    shape: Shape = S1

    def meets(self, ratio: float) -> bool:
        """Whether a ratio is within the bound."""
        sense, _, number = self.bound.partition(" ")
        return ratio >= float(number) if sense == ">=" else ratio <= float(number)

    @property
    def own(self) -> Key:
        """The kernel that the target is set for."""
        return self.under if self.bound.startswith(">=") else self.over

    @property
    def beside(self) -> Key:
        """What it is compared with."""
        return self.over if self.bound.startswith(">=") else self.under


def ours(key: Key) -> bool:
    """Whether this project computes it by kernels."""
    return (key.name, key.provider) in CALLS or key in (DENSE, *PARTS)


DENSE = Key("moh core", "dense")
#: What are two calls of ours, one after another.
PARTS = {Key("polar + attention", OURS): (Key("polar", OURS), Key("flash", OURS))}


def own_goals() -> Iterator[Goal]:
    """Those that stand in no row of `bench.kernels.TARGETS`."""
    plain_core, both = Key("flash", OURS), "fwd+bwd"
    for shape in (S2, WIDE, WIDE_LONG):
        bounds = (">= 1.15", ">= 0.90") if shape == S2 else (">= 1.00", ">= 0.65")
        for name, library, bound in zip(("FA2", "cuDNN"), ("fa2", "cudnn"), bounds, strict=True):
            other = Key("flash", f"sdpa-{library}")
            yield Goal(f"core over {name}", other, plain_core, "fwd", bound, shape)
    rope, whole = Key("rope", OURS), Key("rope + attention", OURS)
    yield Goal("RoPE over a copy", Key("rope", "copy"), rope, "fwd", ">= 0.90")
    first = "liger, tokens first"
    yield Goal(f"RoPE over {first}", Key("rope", first), rope, both, ">= 1.00")
    other = Key("rope + attention", f"{first} + fa2")
    yield Goal(f"RoPE + core over {first} + FA2", other, whole, both, ">= 1.20")
    carope, polar = Key("carope + attention", OURS), Key("polar + attention", OURS)
    yield Goal("CARoPE to RoPE", carope, whole, both, "<= 1.05", S2)
    for name, key, bound in (("CARoPE", carope, ">= 1.80"), ("CMHA", polar, ">= 1.20")):
        other = Key(key.name, "torch.compile + fa2")
        yield Goal(f"{name} + core over compiled + FA2", other, key, both, bound)
    for mode in ("fwd", "bwd"):
        yield Goal("conv over a copy", Key("conv", "copy"), Key("conv", OURS), mode, ">= 0.85")
    half, most = Key("moh core", "skipping", 0.5), Key("moh core", "skipping", 0.75)
    yield Goal("MoH, half of the heads, to all", half, DENSE, both, "<= 0.62", S2)
    yield Goal("MoH, 3/4 of the heads, to all", most, DENSE, both, "<= 0.87", S2)
    yield Goal("MoH, all heads over 3/4", DENSE, most, both, ">= 1.05")
    other = Key("moh core", "masked", 0.5)
    yield Goal("MoH, half, over masks after FA2", other, half, both, ">= 1.50")


def goals() -> list[Goal]:
    """Every target of the kernels that the model can speak of."""
    found = []
    for target in TARGETS:
        if target.kernel == DECODING:
            continue
        over, under = map(Key, target.kernel, target.provider)
        shape = DIRECT if over.provider == "direct" else S1
        found.append(Goal(target.what, over, under, target.mode, target.bound, shape))
    return [*found, *own_goals()]


#: Of `bench.kernels.TARGETS`, what has other tiles than the model counts.
DECODING = ("decode", "decode")
#: Targets that it cannot speak of, and why.
UNSAID = [
    *((target.what, target.bound, "pieces of the keys are not in the model; `bench/LOG.md` counts")
      for target in TARGETS if target.kernel == DECODING),
    ("RoPE + core over any RoPE + FA3, S1, fwd+bwd", ">= 0.85",
     "no causal backward rate of FA3 with D = 64 is public"),
    ("peak memory of CARoPE over RoPE's", "<= 1.05", "memory, which `bench.kernels` measures"),
    ("memory of CMHA", "O(T)", "memory, which `bench.kernels` measures"),
    ("memory of RCMHA", "O(T) + 48 MB", "memory, which `bench.kernels` measures"),
    ("cross entropy in place, to unchunked", "<= 1.05", "there is no kernel of ours"),
    ("training step of RoPE, tokens/s", ">= 430 k",
     "most of a step are torch's products and what its compiler fuses; neither is in the model"),
    ("training step of CARoPE, CMHA, MoH, RCMHA, to RoPE's", ">= 0.95, 0.93, 0.97, 0.70",
     "as for RoPE's"),
]  # fmt: skip

#: What the model leaves out or is not sure of, by what a kernel does besides attention.
LEFT_OUT = {
    "flash": (),
    "rope": ("bytes alone",),
    "carope": ("each instruction once",),
    "polar": ("each instruction once",),
    "conv": ("bytes alone",),
    "relative": ("L2's rate recalled", "partial sectors left out"),
    "moh core": ("kept rows lie evenly",),
}
BACKWARD = "no published backward to compare with"
ATOMICS = "atomics as bytes"
COUNTED = "peer one operation at a time, by bytes: no faster"
NO_FIGURE = {
    "fla": "no figure of this shape is public",
    "torch.compile": "what the compiler fuses of it is not known",
}


@cache
def own_time(key: Key, mode: str, shape: Shape, machine: Machine) -> Time:
    """Of our kernels."""
    if key in PARTS:
        first, *rest = (own_time(part, mode, shape, machine) for part in PARTS[key])
        return sum(rest, first)
    if key == DENSE:
        return own_time(Key("flash", OURS), mode, shape, machine)
    calls = dict(zip(("fwd", "bwd"), CALLS[key.name, key.provider](shape), strict=True))
    first, *rest = (call_time(calls[each], shape, key.share, machine) for each in mode.split("+"))
    return sum(rest, first)


@cache
def counted(key: Key, mode: str, shape: Shape, machine: Machine) -> Time | None:
    """A definition as torch runs it, an operation at a time; None where there is none."""
    if key.provider not in (EAGER, "direct"):
        return None
    for case in cases(shape, torch.bfloat16, torch.device("meta")):
        if case.name == key.name and key.provider in case.providers:
            break
    else:
        return None
    run, inputs = case.providers[key.provider](), case.inputs

    def forward() -> None:
        with torch.no_grad():
            run(*inputs)

    def both() -> None:
        outputs = run(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        torch.autograd.grad(outputs, inputs, [torch.empty_like(x) for x in outputs])

    ahead = call_time(forward, shape, machine=machine)
    if mode == "fwd":
        return ahead
    whole = call_time(both, shape, machine=machine)
    if mode == "fwd+bwd":
        return whole
    seconds = whole.best - ahead.best
    return Time(seconds, seconds, whole.bound)


class Said(NamedTuple):
    """Seconds at best and in turns; what binds, of ours; why they are not sure; whether another's
    may well take longer.
    """

    best: float
    turns: float
    binds: str
    sure: tuple[str, ...]
    least: bool = False


def said(key: Key, mode: str, shape: Shape, machine: Machine = H100) -> Said | None:
    """What the model, or a figure of others, says of a row; None where neither does."""
    if ours(key):
        time = own_time(key, mode, shape, machine)
        return Said(time.best, time.turns, time.binds, left_out(key, mode, shape))
    time = counted(key, mode, shape, machine)
    if time is not None:
        return Said(time.best, time.turns, "", (COUNTED,), least=True)
    found = peer(key.name, key.provider, mode, shape, machine)
    if found is None:
        return None
    sure = tuple(SURE[kind] for kind in found.sure)
    return Said(found.seconds, found.seconds, "", sure, found.least)


def left_out(key: Key, mode: str, shape: Shape) -> tuple[str, ...]:
    """Of the model, for a kernel of ours."""
    kind, _, with_core = key.name.partition(" + ")
    attends = bool(with_core) or kind in ("flash", "moh core")
    found = () if with_core and kind == "rope" else LEFT_OUT[kind]
    if attends and "bwd" in mode:
        found += (BACKWARD, ATOMICS) if shape[2] > SPLIT_UP_TO else (BACKWARD,)
    return (*found, "latency") if attends else found


def micro(best: float, turns: float) -> str:
    """Microseconds at best and in turns."""
    low, high = (f"{x * 1e6:,.0f}" for x in (best, turns))
    return low if low == high else f"{low} .. {high}"


def verdict(goal: Goal, ratios: tuple[float, float], least: bool) -> str:
    """Met or missed where both ends of the model agree; not missed by a peer's least time."""
    met = [goal.meets(ratio) for ratio in ratios]
    if all(met):
        return "met"
    return "open" if any(met) or least else "missed"


def ratios_of(goal: Goal, over: Said, under: Said) -> tuple[float, float]:
    """At best, in turns."""
    return over.best / under.best, over.turns / under.turns


def target_table() -> Table:
    """Every target, with what is predicted or why nothing is."""
    lines = []
    for goal in goals():
        own, beside = (said(key, goal.mode, goal.shape) for key in (goal.own, goal.beside))
        assert own is not None
        head = [goal.what, NAMES[goal.shape], goal.mode, micro(own.best, own.turns)]
        if beside is None:
            why = NO_FIGURE[goal.beside.provider]
            lines.append([*head, "-", "-", goal.bound, "-", own.binds, why])
            continue
        over, under = (own, beside) if goal.own is goal.over else (beside, own)
        ratios = ratios_of(goal, over, under)
        shown = " .. ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in ratios))
        sure, says = dict.fromkeys((*own.sure, *beside.sure)), verdict(goal, ratios, beside.least)
        lines.append([
            *head, micro(beside.best, beside.turns), shown, goal.bound, says, own.binds,
            "; ".join(sure),
        ])  # fmt: skip
    lines += [[what, "", "", "-", "-", "-", bound, "-", "-", why] for what, bound, why in UNSAID]
    header = ["target", "at", "mode", "ours, µs", "beside it, µs", "ratio", "asked", "predicted",
              "binds", "left out, not sure"]  # fmt: skip
    note = (
        "Predicted, not measured: at best (everything overlaps) .. in turns (programs wait for one "
        "another's units). "
        + "; ".join(f"{name} is B{b} H{h} T{t} D{d}" for name, (b, h, t, d) in SHAPES.items())
        + "; bf16, causal, times of a CUDA graph. Predicted: met or missed by both ends, open "
        "otherwise, and instead of missed where the peer's is the least that it can take. "
        f"{compiler()}"
    )
    return Table(header, lines, note, words=True)


def call_table() -> Table:
    """Every call of ours at the three shapes."""
    lines = []
    for name, provider in CALLS:
        for mode in ("fwd", "bwd"):
            shares = (0.5, 0.75, 1.0) if name == "moh core" else (1.0,)
            for share in shares:
                times = [own_time(Key(name, provider, share), mode, shape, H100)
                         for shape in SHAPES.values()]  # fmt: skip
                part = f", {share:g} of the rows" if name == "moh core" else ""
                cells = [f"{micro(*time[:2])}, {time.binds}" for time in times]
                lines.append([name, provider + part, mode, *cells])
    note = f"Microseconds, predicted, at best .. in turns, and what binds. {compiler()}"
    return Table(["call", "by", "mode", *SHAPES], lines, note, words=True)


def known_table() -> Table:
    """The model of our forward pass beside what is published of Triton's tutorial kernel."""
    lines = []
    for dim, rates in FORWARD["triton"].items():
        for length, rate in rates.items():
            shape = (16384 // length, 2048 // dim, length, dim)
            there = core("triton", "fwd", shape)
            assert there is not None
            time = call_time(plain(shape)[0], shape)
            tflops = [rate * there.seconds / each for each in time[:2]]
            lines.append([
                f"D = {dim}, T = {length}", str(rate), *(f"{each:.0f}" for each in tflops),
                *(f"{each / rate:.2f}" for each in tflops), time.binds,
            ])  # fmt: skip
    header = ["forward", "published", "at best", "in turns", "at best / published",
              "in turns / published", "binds at best"]  # fmt: skip
    note = (
        "TFLOP/s, causal, 16,384 tokens, H D = 2048. Published: Triton's tutorial kernel in fp16 "
        "on an H100 SXM5 (Dao-AILab/flash-attention, arXiv 2407.08608, read off a figure). The "
        f"model: of our kernel in bf16, whose tiles need not be the tutorial's. {compiler()}"
    )
    return Table(header, lines, note)


def machine_table() -> Table:
    """The constants."""
    rows = [
        ("processors, schedulers of each", f"{H100.processors}, {H100.schedulers}",
         "H100 SXM5; an instruction a cycle and scheduler"),
        ("clock", f"{H100.clock / 1e9:g} GHz", "recalled; boost is 1.98 on an SXM5"),
        ("products by wgmma", f"{H100.product / 1e12:g} TFLOP/s",
         "one reading of a bf16 product of 8192 cubed; the data sheet has 989"),
        ("products by mma.sync", f"{H100.mma_share:g} of that", "arXiv 2402.13499, recalled"),
        ("special functions", f"{H100.special} a cycle and processor",
         "CUDA C++ Programming Guide, compute capability 9.0"),
        ("memory", f"{H100.memory / 1e12:g} TB/s ({H200.memory / 1e12:g} on an H200)",
         "one reading of a copy, both ways counted"),
        ("L2", f"{H100.l2 / 1e12:g} TB/s", "Chips and Cheese 2023, of the PCIe card, recalled"),
        ("a launch", f"{H100.launch * 1e6:g} µs", "in a CUDA graph, recalled"),
        ("programs of a processor", "by kernel",
         "65,536 registers, 227 KB of shared memory, 64 warps"),
    ]  # fmt: skip
    return Table(["what", "taken as", "from"], [list(row) for row in rows], "", words=True)


def compiler() -> str:
    """What the counts are of."""
    import triton

    return f"Compiled by triton {triton.__version__} for sm_90."


TABLES: dict[str, Callable[[], Table]] = {
    "machine": machine_table,
    "known": known_table,
    "targets": target_table,
    "calls": call_table,
}


def filled(text: str) -> str:
    """A page with its tables made anew.

    Raises:
        ValueError: it asks for others than there are, or lacks one.
    """
    asked = [name for _, name, _, _ in MADE.findall(text)]
    if asked != list(TABLES):
        raise ValueError(
            f"{PAGE.name} must have <!-- predicted: NAME --> .. <!-- end --> for "
            f"{', '.join(TABLES)} in this order; got {', '.join(asked) or 'none'}."
        )
    return MADE.sub(
        lambda found: f"{found[1]}{TABLES[found[2]]().markdown().strip()}\n{found[4]}", text
    )


def machine_of(devices: Sequence[str]) -> Machine:
    """Of the rows' devices.

    Raises:
        ValueError: they are several, or none that the model knows.
    """
    for part, machine in (("H100", H100), ("H200", H200)):
        if len(devices) == 1 and part in devices[0]:
            return machine
    raise ValueError(
        f"the model knows the H100 and the H200; the rows are of {', '.join(devices) or 'nothing'}."
        " Give rows that were measured on one of them."
    )


def key_of(row: dict[str, Any]) -> Key:
    """Of a row of kind kernel or routing."""
    options = dict(part.split("=") for part in row["options"].split())
    kept = [int(options[name]) for name in ("shared", "top_k") if name in options]
    return Key(row["name"], row["implementation"], sum(kept) / row["H"] if kept else 1.0)


Measured = dict[tuple[Key, str, Shape], tuple[float, str]]


def measured(rows: Sequence[dict[str, Any]]) -> Measured:
    """Seconds by key, mode and shape, and the metric: graph times where there are any."""
    found: Measured = {}
    for metric in ("time", "graph time"):
        for row in rows:
            if row["metric"] == metric and row["dtype"] == "bfloat16" and row["mode"] != "decode":
                shape = tuple(row[size] for size in "BHTD")
                found[key_of(row), row["mode"], shape] = row["p50"] / 1e3, metric
    return found


def against(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Predictions beside measured rows, then targets; lines of text.

    Raises:
        ValueError: no row can be compared.
    """
    rows = [row for row in rows if row["kind"] in ("kernel", "routing", "ceiling")]
    devices = list(dict.fromkeys(row["device"] for row in rows))
    machine, times, unsaid, off = machine_of(devices), measured(rows), 0, []
    yield f"measured on {devices[0]}; the model is of an {machine.name}"
    for row in rows:
        if row["kind"] == "ceiling":
            model = machine.product if row["unit"] == "TFLOP/s" else machine.memory
            yield (f"{row['name']} {row['implementation']}: measured {row['p50']:.2f} "
                   f"{row['unit']}, in the model {model / 1e12:g}")  # fmt: skip
    head = "{:<22} {:<26} {:<8} {:<18} {:>9} {:>9} {:>10} {:>9}  {}"
    yield head.format("kernel", "by", "mode", "BxHxTxD", "best, µs", "turns, µs", "measured",
                      "of turns", "metric")  # fmt: skip
    for (key, mode, shape), (seconds, metric) in times.items():
        found = said(key, mode, shape, machine)
        if found is None:
            unsaid += 1
            continue
        provider = key.provider + (f" {key.share:g}" if key.share < 1 else "")
        micros = (f"{x * 1e6:.1f}" for x in (found.best, found.turns, seconds))
        yield head.format(key.name, provider, mode, "x".join(map(str, shape)), *micros,
                          f"{seconds / found.turns:.2f}", metric)  # fmt: skip
        if ours(key):
            off.append(seconds / found.turns)
    yield f"rows without a prediction: {unsaid}"
    if off:
        yield (f"ours, measured over in turns: median {statistics.median(off):.2f}, "
               f"{min(off):.2f} to {max(off):.2f} of {len(off)}")  # fmt: skip
    yield from targets_against(times, machine)


def targets_against(times: Measured, machine: Machine) -> Iterator[str]:
    """Every target whose two sides were measured."""
    for goal in goals():
        both = [times.get((key, goal.mode, goal.shape)) for key in (goal.over, goal.under)]
        predicted = [said(key, goal.mode, goal.shape, machine) for key in (goal.over, goal.under)]
        if both[0] is None or both[1] is None:
            continue
        shown = "nothing"
        if predicted[0] is not None and predicted[1] is not None:
            shown = " .. ".join(f"{r:.2f}" for r in ratios_of(goal, *predicted))
        ratio = both[0][0] / both[1][0]
        yield (f"{goal.what}, {NAMES[goal.shape]}, {goal.mode}: asked {goal.bound}, predicted "
               f"{shown}, measured {ratio:.2f}")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print predictions, or them beside measured rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--page", action="store_true", help="fill the tables of docs/predictions.md"
    )
    parser.add_argument("--against", type=Path, nargs="+", metavar="FILE", help="measured rows")
    args = parser.parse_args(arguments)
    try:
        if INTERPRETED:
            raise ValueError("Interpreted kernels do not compile: unset TRITON_INTERPRET.")
        if args.against:
            for line in against(read(*args.against)):
                print(line, flush=True)
        if args.page:
            check_clone("--page")
            text = filled(PAGE.read_text(encoding="utf-8"))
            with atomic_file(PAGE) as temporary:
                temporary.write_text(text, encoding="utf-8")
            print(PAGE)
        if not (args.against or args.page):
            for make in TABLES.values():
                print(make().markdown(), end="\n\n", flush=True)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
