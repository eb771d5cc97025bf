"""Compile every kernel and configuration for an H100 (sm_90), on any machine, and look inside.

    python -m posenc.kernels.inspect_sm90 [FAMILY ...]

A family is a kernel file. Its `examples()` yields names and launches on meta tensors. A launch is
caught before it reaches the device and specialised by Triton's own rules, so what is compiled here
is what a GPU would be given. Printed per kernel: registers a thread, bytes spilled or on the stack,
shared memory a program, warps, stages, and the tensor-core instructions in its PTX.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from posenc.errors import unknown
from posenc.kernels.common import INTERPRETED

TARGET = GPUTarget("cuda", 90, 32)
#: Shared memory that one program may use on an H100.
SHARED_LIMIT = 227 * 1024


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


def compiled(launch: Launch) -> triton.compiler.CompiledKernel:
    """Compile as `JITFunction.run` would on the target."""
    kernel, backend = launch.kernel, make_backend(TARGET)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = launch.kwargs | {"debug": False}
    bound, specialization, _ = bind(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, None
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGET, options=options.__dict__)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes a thread of stack and local memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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
    chosen = parser.parse_args().family
    for family in chosen:
        if family not in known:
            parser.error(unknown("family", family, known))
    row = "{:<28} {:<16} {:>9} {:>7} {:>9} {:>5} {:>6}  {}"
    heads = ("example", "kernel", "registers", "spilled", "shared", "warps", "stages", "cores")
    print(row.format(*heads))
    for family in chosen or known:
        for example, launch in launches(family):
            *fields, _, _ = report(f"{family} {example}", launch)
            print(row.format(*fields), flush=True)


if __name__ == "__main__":
    main()
