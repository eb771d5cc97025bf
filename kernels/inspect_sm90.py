"""Compile every kernel and configuration for an H100 (sm_90), on any machine, and look inside.

    python -m posenc.kernels.inspect_sm90 [FAMILY ...]

A family is a kernel file. Its `examples()` yields names and launches on meta tensors. A launch is
caught before it reaches the device and specialised by Triton's own rules, so what is compiled here
is what a GPU would be given. Printed per kernel: registers a thread, bytes spilled or on the stack,
shared memory a program, warps, stages, and the tensor-core instructions in its PTX.

    python -m posenc.kernels.inspect_sm90 --instructions [FAMILY ...]

prints for the kernels of half precision that multiply matrices what a tile costs, by their machine
code (see `posenc.kernels.sass`): the instructions that a warp issues for 16 rows and 64 columns,
that number over plain flash attention's, and how many programs a processor holds. Without a GPU it
is what can be known of speed; it knows neither latency nor memory. `kernels/sm90.md` keeps it.
"""

import argparse
import functools
import importlib
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from posenc.errors import unknown
from posenc.kernels import sass
from posenc.kernels.common import INTERPRETED

TARGET = GPUTarget("cuda", 90, 32)
#: Shared memory that one program may use on an H100.
SHARED_LIMIT = 227 * 1024
#: Of one processor, of 32 bits.
REGISTERS = 65_536


class Report(NamedTuple):
    """What a compiled kernel asks of the GPU."""

    example: str
    kernel: str
    registers: int
    spilled: int
    shared: int
    num_warps: int
    num_stages: int
    tensor_cores: str  # "wgmma", "mma" or "-"
    products: bool  # whether the kernel multiplies matrices
    ptx: str


class Tile(NamedTuple):
    """What a kernel issues for 16 rows and 64 columns a warp, and how it fits a processor."""

    example: str
    kernel: str
    instructions: float
    ratio: float  # to plain flash attention of the same head dim
    products: str
    copies: int
    loads: int
    stores: int
    barriers: int
    registers: int
    shared: int
    programs: int  # that one processor holds at a time


class Launch(NamedTuple):
    """A caught launch: the kernel, its grid and its arguments."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict


@contextmanager
def caught() -> Iterator[list[Launch]]:
    """Collect the launches inside instead of running them."""
    launches: list[Launch] = []

    def run(self, *args, grid, warmup, **kwargs):
        launches.append(Launch(self, grid, args, kwargs))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def compiled(launch: Launch, target: GPUTarget = TARGET) -> triton.compiler.CompiledKernel:
    """Compile as `JITFunction.run` would on the target."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = launch.kwargs | {"debug": False}
    bound, specialization, _ = bind(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, None
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def disassembled(cubin: bytes) -> str:
    """Its machine code as text."""
    return _cuobjdump(cubin, "-sass")


def _cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, what, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes a thread of stack and local memory."""
    text = _cuobjdump(cubin, "-res-usage")
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def report(example: str, launch: Launch) -> Report:
    """Compile a launch and read what it uses."""
    result = compiled(launch)
    registers, spilled = resources(result.asm["cubin"])
    ptx = result.asm["ptx"]
    cores = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "-"
    meta = result.metadata
    return Report(
        example=example,
        kernel=launch.kernel.__name__,
        registers=registers,
        spilled=spilled,
        shared=meta.shared,
        num_warps=meta.num_warps,
        num_stages=meta.num_stages,
        tensor_cores=cores,
        products="tt.dot" in result.asm["ttir"],
        ptx=ptx,
    )


def programs(registers: int, warps: int, shared: int) -> int:
    """That one processor holds: 65,536 registers, by eights a thread, 64 warps, 32 programs."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    # A kilobyte of every program's shared memory is the system's.
    by_shared = (SHARED_LIMIT + 1024) // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32)


def shape(launch: Launch) -> tuple[int, int]:
    """Rows that a turn of its loop gives each warp, and columns that it takes. Where warps share
    rows and divide the columns (16 rows), their share of both.
    """
    rows, columns = launch.kwargs["BLOCK_M"], launch.kwargs["BLOCK_N"]
    if launch.kernel.__name__ == "dkv_kernel":  # its rows are keys, its columns queries
        rows, columns = columns, rows
    return rows // launch.kwargs["num_warps"], columns


def cost(launch: Launch, turn: Sequence[sass.Loop]) -> float:
    """Instructions of a warp for 16 rows and 64 columns, of the loops that a tile passes."""
    rows, columns = shape(launch)
    return sum(loop.instructions for loop in turn) * (16 / rows) * (64 / columns)


def tiles(family: str, dims: Sequence[int] = (64, 128), skip: str | None = None) -> Iterator[Tile]:
    """Of the half-precision examples of a family with these head dims, `skip` not in their name."""
    for name, launch in launches(family):
        if skip is not None and skip in name:
            continue
        dim = re.search(r"bfloat16 D=(\d+)", name)
        plain = "BLOCK_N" in launch.kwargs and "delta" not in launch.kernel.__name__
        if dim is None or int(dim[1]) not in dims or not plain:
            continue
        result = compiled(launch)
        turn = sass.tile(sass.loops(disassembled(result.asm["cubin"])))
        if not turn:
            continue
        registers, _ = resources(result.asm["cubin"])
        meta, each = result.metadata, cost(launch, turn)
        kinds = [kind for kind in ("wgmma", "mma") if any(getattr(x, kind) for x in turn)]
        yield Tile(
            f"{family} {name}", launch.kernel.__name__, each,
            each / plain_flash(int(dim[1]), launch.kernel.__name__), " + ".join(kinds),
            *(sum(getattr(x, count) for x in turn) for count in ("copies", "loads", "stores")),
            sum(x.barriers for x in turn), registers, meta.shared,
            programs(registers, meta.num_warps, meta.shared),
        )  # fmt: skip


@functools.cache
def plain_flash(dim: int, kernel: str) -> float:
    """Instructions for 16 rows and 64 columns of the plain kernel of that name; NaN without one."""
    for name, launch in launches("flash"):
        if (name, launch.kernel.__name__) == (f"bfloat16 D={dim}", kernel):
            return cost(launch, sass.tile(sass.loops(disassembled(compiled(launch).asm["cubin"]))))
    return math.nan


def launches(family: str) -> list[tuple[str, Launch]]:
    """Name and launch of every kernel that the examples of a family run."""
    examples: Callable[[], Iterator] = importlib.import_module(f"posenc.kernels.{family}").examples
    found = []
    for name, run in examples():
        with caught() as caught_here:
            run()
        found += [(name, launch) for launch in caught_here]
    return found


def families() -> list[str]:
    """The kernel files that have examples; RuntimeError where kernels are interpreted."""
    if INTERPRETED:
        raise RuntimeError("Interpreted kernels do not compile: unset TRITON_INTERPRET.")
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [path.stem for path in files if "\ndef examples(" in path.read_text()]


def table(names: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown: a row for each kernel of these families that multiplies matrices."""
    titles = [field.replace("_", " ") for field in Tile._fields]
    yield f"| {' | '.join(titles)} |"
    yield f"| {' | '.join(['---', '---', *['---:'] * (len(titles) - 2)])} |"
    for family in names:
        yield from rows_of(tiles(family))


def rows_of(found: Iterable[Tile]) -> Iterator[str]:
    """A line of the table for each."""
    for own in found:
        ratio = "" if math.isnan(own.ratio) else f"{own.ratio:.2f}"
        shown = (*own[:2], f"{own.instructions:.0f}", ratio, *own[4:])
        yield f"| {' | '.join(map(str, shown))} |"


def main() -> None:
    """Print the table."""
    try:
        known = families()
    except RuntimeError as error:
        sys.exit(str(error))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # No `choices`: argparse compares the empty list with them where no family is named.
    parser.add_argument(
        "family", nargs="*", metavar="FAMILY", help=f"of {', '.join(known)}; all if none is named"
    )
    parser.add_argument("--instructions", action="store_true", help="what a tile costs")
    args = parser.parse_args()
    chosen = args.family
    for family in chosen:
        if family not in known:
            parser.error(unknown("family", family, known))
    if args.instructions:
        for line in table(chosen or known):
            print(line, flush=True)
        return
    row = "{:<28} {:<16} {:>9} {:>7} {:>9} {:>5} {:>6}  {}"
    heads = ("example", "kernel", "registers", "spilled", "shared", "warps", "stages", "cores")
    print(row.format(*heads))
    for family in chosen or known:
        for example, launch in launches(family):
            *fields, _, _ = report(f"{family} {example}", launch)
            print(row.format(*fields), flush=True)


if __name__ == "__main__":
    main()
