"""Memory of one attention layer beside what `posenc.cost` predicts: `python -m bench.memory`.

    activations     what autograd keeps for the backward pass, bytes a token: every storage once,
                    parameters aside
    decoding state  what `make_cache` allocates, bytes a token of its length
    peak            the most that forward + backward add to a layer and its input, MiB

    python -m bench.memory --out bench/results/cpu/memory.jsonl
    python -m bench.memory --names moh --options shared=2 top_k=2 --heads 8 --impls sdpa auto
    python -m bench.memory --device cuda --dtype bfloat16

A ratio of measured to predicted that is off by more than 5% is marked, and the exit code is 1. The
formulas of activations are those of impl="fused"; sdpa, and auto in fp32, keep as much where there
is neither rotation, relative term nor router. What they do not describe has its ratio in brackets.
Without CUDA the kernels run in Triton's interpreter, on a text cut short: what they
keep of a token does not depend on the length. Relative terms on CPU are not counted where `auto`
recomputes their blocks, which hides what these hold from autograd.

The peak has no formula: it depends on what the allocator reuses. On CPU it is the peak resident
memory of a fresh process, by Linux' /proc; on CUDA what torch allocates.
"""

import argparse
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import posenc
from posenc.backends.blockwise import RECOMPUTE_FROM
from posenc.show import option

from .arguments import check_device, check_least
from .measure import bytes_saved, peak_mib, timing
from .rows import Row, RowFile, written

QUANTITIES = ("activations", "state", "peak")
#: A prediction further off is marked.
TOLERANCE = 0.05
#: The longest text that the interpreter reads, in seconds a layer.
INTERPRETED_UP_TO = 256


@dataclass(frozen=True)
class Setting:
    """One layer, and the length of what it reads."""

    name: str
    impl: str
    length: int
    embed_dim: int
    heads: int
    options: Mapping[str, Any]
    device: str
    dtype: str

    def layer(self) -> posenc.Attention:
        """Built anew; learned relative tables are as long as the text. Raises ValueError."""
        options = dict(self.options)
        if self.name in ("rmha", "rcmha"):
            options.setdefault("max_distance", self.length)
        sizes = (self.embed_dim, self.heads)
        torch.manual_seed(0)
        layer = posenc.attention(self.name, *sizes, impl=self.impl, **options)
        return layer.to(self.device, getattr(torch, self.dtype))

    def x(self, length: int | None = None) -> Tensor:
        """What it reads: (1, T, C)."""
        dtype = getattr(torch, self.dtype)
        shape = (1, length or self.length, self.embed_dim)
        return torch.randn(shape, device=self.device, dtype=dtype, requires_grad=True)

    @property
    def interpreted(self) -> bool:
        """Whether its kernels run in Triton's interpreter."""
        return self.impl == "fused" and self.device == "cpu"

    @property
    def recomputed(self) -> bool:
        """Whether the backward pass forms blocks of its attention anew."""
        if (self.impl, self.device) != ("auto", "cpu") or self.length < RECOMPUTE_FROM:
            return False
        return self.layer().encoding.in_logits


class Reading(NamedTuple):
    """One quantity of one setting."""

    row: Row
    predicted: float | None = None
    described: bool = True  # whether the prediction is one of this implementation

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        assert self.predicted
        return self.row.p50 / self.predicted

    @property
    def off(self) -> bool:
        """Whether the model is further off than it may be."""
        return self.predicted is not None and self.described and abs(self.ratio - 1) > TOLERANCE

    def rows(self) -> Iterator[Row]:
        """The reading, and its ratio where the model claims to describe it."""
        yield self.row
        if self.predicted is not None and self.described:
            values = dict.fromkeys(("p20", "p50", "p80"), self.ratio)
            yield replace(self.row, metric=f"{self.row.metric} over predicted", unit="1", **values)

    def __str__(self) -> str:
        row = self.row
        text = f"{row.name:18}{row.implementation:10}{row.T:>8}{row.p50:12,.1f}"
        if self.predicted is None:
            return text
        ratio = f"{self.ratio:.3f}" if self.described else f"({self.ratio:.3f})"
        mark = f"  off by more than {TOLERANCE:.0%}" if self.off else ""
        return f"{text}{self.predicted:12,.1f}{ratio:>10}{mark}"


def describes(layer: posenc.Attention, x: Tensor) -> bool:
    """Whether `saved_bytes` of `posenc.cost` are those of this layer's implementation."""
    if layer.impl in ("fused", "reference"):
        return layer.impl == "fused"
    if layer.impl == "auto" and x.device.type == "cpu" and x.dtype.itemsize < 4:
        return False  # it computes short texts in fp32
    return type(layer.encoding) in (posenc.Encoding, posenc.NoPE) and layer.router is None


def activations(setting: Setting) -> Reading:
    """Bytes a token that autograd keeps of a forward pass."""
    layer, x = setting.layer(), setting.x()
    saved = bytes_saved(layer, lambda: layer(x, return_aux=True))
    predicted = posenc.attention_cost(layer, 1, setting.length).total.saved_bytes
    row = row_of(setting, "train", "activations", "B/token", saved / setting.length)
    return Reading(row, predicted / setting.length, describes(layer, x))


def state(setting: Setting) -> Reading:
    """Bytes a token of a full cache, which no implementation changes."""
    layer, length = setting.layer(), setting.length
    measured = layer.make_cache(1, length).nbytes / length
    predicted = posenc.attention_cost(layer, 1, 1, length).total.state_bytes
    row = row_of(setting, "decode", "decoding state", "B/token", measured)
    return Reading(replace(row, implementation="cache"), predicted)


def peak(setting: Setting) -> Reading:
    """MiB that a training step adds."""
    mib = peak_on_cuda(setting) if setting.device == "cuda" else in_fresh_process(setting) / 2**20
    row = row_of(setting, "fwd+bwd", "memory", "MiB", mib)
    return Reading(replace(row, name=f"{setting.name} layer"))


def row_of(setting: Setting, mode: str, metric: str, unit: str, value: float) -> Row:
    """One reading as a row."""
    about = {"kind": "memory", "name": setting.name, "implementation": setting.impl}
    sizes = {"H": setting.heads, "D": setting.embed_dim // setting.heads, "T": setting.length}
    options = {"options": written(setting.options), "dtype": setting.dtype}
    return timing(mode, metric, unit, value, value, value, B=1, **about, **sizes, **options)


def step(layer: posenc.Attention, x: Tensor) -> None:
    """Forward and backward, gradients of input and parameters."""
    layer(x).square().mean().backward()


def peak_on_cuda(setting: Setting) -> float:
    """MiB, in this process."""
    layer, x = setting.layer(), setting.x()
    step(layer, x)  # what libraries allocate at first use is not counted
    layer.zero_grad()
    x.grad = None
    return peak_mib(lambda: step(layer, x), torch.device(setting.device))


def resident(field: str) -> int:
    """Bytes of this process by /proc: VmRSS now, VmHWM at most since the last reset."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def send_peak(setting: Setting, out: Connection) -> None:
    """Send the peak of one training step, or in words why there is none."""
    try:
        out.send(peak_here(setting))
    except (OSError, RuntimeError) as error:  # a traceback would stand above the parent's line
        out.send(str(error))


def peak_here(setting: Setting) -> int:
    """Bytes at the peak of one training step, less what was resident before it."""
    layer = setting.layer()
    # What libraries load and allocate at first use is not counted.
    checkpoint(layer, setting.x(2), use_reentrant=False).sum().backward()
    x = setting.x()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    step(layer, x)
    return resident("VmHWM") - before


def in_fresh_process(setting: Setting) -> int:
    """Bytes that a training step adds to a process that did nothing before.

    Raises:
        RuntimeError: the process could not measure it.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_peak, args=(setting, sender))
    process.start()
    sender.close()  # or a child that dies would leave the reader waiting
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process ended with exit code {process.exitcode}") from None
    finally:
        process.join()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def tables(settings: list[Setting], quantities: list[str]) -> Iterator[tuple[str, list[Setting]]]:
    """The quantities, each with the settings that it is measured in."""
    cut = [
        replace(s, length=min(s.length, INTERPRETED_UP_TO)) if s.interpreted else s
        for s in settings
        if not s.recomputed
    ]
    # A cache is the same for every implementation, and numpy's memory says nothing of a kernel.
    one = [s for s in settings if s.impl == settings[0].impl]
    chosen = {"activations": cut, "state": one, "peak": [s for s in settings if not s.interpreted]}
    for quantity in quantities:
        unlike: list[Setting] = []
        for setting in chosen[quantity]:
            if setting not in unlike:
                unlike.append(setting)
        yield quantity, unlike


def main() -> None:
    """Print a table a quantity, write the rows; exit code 1 where the model is off."""
    args = parser().parse_args()
    if args.device == "cpu" and "fused" in args.impls:
        os.environ["TRITON_INTERPRET"] = "1"  # read where Triton is imported first
    settings = [
        Setting(name, impl, length, args.embed_dim, args.heads, dict(args.options), args.device,
                args.dtype)
        for name in args.names
        for impl in args.impls
        for length in args.lengths
    ]  # fmt: skip
    try:
        check_least(1, lengths=args.lengths)
        check_device(args.device)
        check(settings)
        file = RowFile(args.out, torch.device(args.device))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(
        f"B=1 C={args.embed_dim} H={args.heads} {args.dtype} on {args.device}, "
        f"torch {torch.__version__}"
    )
    off = []
    measures = {"activations": activations, "state": state, "peak": peak}
    titles = {"activations": "kept for the backward pass, B/token",
              "state": "decoding state, B/token",
              "peak": "peak of forward + backward, MiB"}  # fmt: skip
    for quantity, chosen in tables(settings, args.quantities):
        columns = "" if quantity == "peak" else f"{'predicted':>12}{'ratio':>10}"
        print(f"\n{titles[quantity]}\n{'layer':18}{'impl':10}{'T':>8}{'measured':>12}{columns}")
        for setting in chosen:
            try:
                reading = measures[quantity](setting)
            except (ValueError, RuntimeError) as error:  # RuntimeError: too little memory
                reason, _, _ = str(error).partition("\n")
                if reason.startswith("impl='fused' has no kernel"):
                    print(f"{setting.name:18}{setting.impl:10}{setting.length:>8}   no kernel")
                    continue
                sys.exit(f"{setting.name} at T={setting.length} cannot be measured: {reason}")
            for row in reading.rows():
                file.add(row)
            print(reading, flush=True)
            off += [f"{quantity} of {setting.name}"] if reading.off else []
    if off:
        sys.exit(f"\nposenc.cost is off by more than {TOLERANCE:.0%}: {', '.join(off)}")


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=list(QUANTITIES))
    made.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    made.add_argument("--embed-dim", type=int, default=256)
    made.add_argument("--heads", type=int, default=4)
    made.add_argument("--names", nargs="+", default=list(posenc.names()))
    made.add_argument("--impls", nargs="+", default=["auto", "fused"])
    made.add_argument("--device", choices=["cpu", "cuda"],
                      default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    made.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    made.add_argument(
        "--options", nargs="+", type=option, default=[], metavar="KEY=VALUE", help="of the names"
    )
    made.add_argument("--out", type=Path, help="append the rows to this file")
    return made


def check(settings: list[Setting]) -> None:
    """Raise ValueError where a setting cannot be built, before any is measured."""
    for setting in settings:
        try:
            with torch.device("meta"):
                replace(setting, device="meta").layer()
        except (TypeError, ValueError) as error:  # TypeError: a value of another type
            options = f" with {written(setting.options)}" if setting.options else ""
            raise ValueError(f"{setting.name}{options} cannot be measured: {error}") from error


if __name__ == "__main__":
    main()
