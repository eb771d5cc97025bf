"""What an issue should say about the machine, in Markdown: `posenc doctor`.

Versions, devices, compilers, extras, and what `impl="auto"` takes here for each name in a few kinds
of call, with the reasons. No user or host names, and of paths only what follows the home folder.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import posenc
from posenc import tuned
from posenc.attention import Attention
from posenc.backends import fused, measured
from posenc.machine import cxx_compilers, device_name, has_bfloat16, package_version

WIDTH, HEADS, LENGTH = 256, 4, 1024
CACHE = "~/.cache/posenc"
#: Variables that change what torch or Triton computes with.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")


def facts() -> Iterator[tuple[str, str]]:
    """What is here, by name."""
    yield "posenc", posenc.__version__
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    yield "triton", package_version("triton") or "not installed"
    for device in devices():
        yield str(device), about(device)
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    set_here = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield "variables", ", ".join(set_here) or "none of " + ", ".join(VARIABLES)
    yield "C++ compilers", ", ".join(map(version_of, cxx_compilers())) or "none: no torch.compile"
    yield "impl='fused'", kernels()
    for extra, packages in extras().items():
        yield f"extra {extra}", packages
    yield "cache", cache()
    for device in devices():
        yield f"posenc tune on {device}", measurements(device)


def devices() -> list[torch.device]:
    """The processor and every GPU that torch sees."""
    return [
        torch.device("cpu"),
        *(torch.device("cuda", i) for i in range(torch.cuda.device_count())),
    ]


def about(device: torch.device) -> str:
    """Model, size and whether it multiplies bfloat16."""
    words = [device_name(device)]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        words.append(f"sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB")
    words.append("bfloat16" if has_bfloat16(device) else "no bfloat16 in hardware")
    return ", ".join(words)


def version_of(compiler: str) -> str:
    """Its name and the first line of what it says of itself."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    first = (done.stdout or done.stderr).strip().partition("\n")[0]
    return f"{Path(compiler).name} ({first})"


def kernels() -> str:
    """Whether the Triton kernels can run here, or why not."""
    try:
        fused.check_available()
    except ValueError as error:
        return f"no: {str(error).removesuffix(fused.REMEDY).strip()}"
    return "yes"


def extras() -> dict[str, str]:
    """The packages of each extra that are missing, or their versions."""
    try:
        wanted = importlib.metadata.requires("posenc") or []
    except importlib.metadata.PackageNotFoundError:
        return {"..": "not known: posenc runs from a folder, not installed"}
    found: dict[str, list[str]] = {}
    for line in wanted:
        package, extra = re.match(r"[\w.-]+", line), re.search(r"extra == .([\w-]+).", line)
        if package and extra and package[0] != "posenc":
            found.setdefault(extra[1], []).append(package[0])
    return {extra: state(packages) for extra, packages in found.items()}


def state(packages: Sequence[str]) -> str:
    """What of these packages is there."""
    versions = {package: package_version(package) for package in packages}
    missing = [package for package, version in versions.items() if version is None]
    if missing:
        return f"without {', '.join(missing)}"
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def cache() -> str:
    """The folder of tokenised texts, and how much is in it."""
    files = [path for path in Path(CACHE).expanduser().rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return f"{CACHE}, {len(files)} files, {size / 2**20:.0f} MiB"


def measurements(device: torch.device) -> str:
    """What "auto" takes from the file of `posenc tune`, or why nothing."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tuned.forget()  # what was read before was warned of before
        found = measured.of_file(device.type, device.index)
        kernels = tiles_of(device)
    if said:
        return str(said[0].message)
    words = [f"kinds of call: {len(found)}"] if found else []
    words += [f"kernels with other tiles: {kernels}"] if kernels else []
    return ", ".join(words) or "nothing was measured"


def tiles_of(device: torch.device) -> int:
    """How many kernels have others than their constants."""
    if not fused.runs_on(device):
        return 0
    from posenc.kernels import tiles

    return len(tiles.table(device))


Call = Callable[[str, torch.device], tuple[str, dict[str, str]]]


def layer_of(name: str, device: torch.device, **options: Any) -> Attention:
    """A new layer, the same whenever it is asked for."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return posenc.attention(name, WIDTH, HEADS, **options).to(device)


def training(name: str, device: torch.device) -> tuple[str, dict[str, str]]:
    """A training pass in fp32."""
    return layer_of(name, device).explain(torch.zeros(1, LENGTH, WIDTH, device=device))


@torch.no_grad()
def half(name: str, device: torch.device) -> tuple[str, dict[str, str]]:
    """A short text in bfloat16."""
    x = torch.zeros(1, LENGTH // 4, WIDTH, device=device, dtype=torch.bfloat16)
    return layer_of(name, device).to(torch.bfloat16).explain(x)


def packed(name: str, device: torch.device) -> tuple[str, dict[str, str]]:
    """Four documents in a row."""
    x = torch.zeros(1, LENGTH, WIDTH, device=device)
    return layer_of(name, device).explain(x, segments=posenc.segments([LENGTH // 4] * 4).to(device))


def windowed(name: str, device: torch.device) -> tuple[str, dict[str, str]]:
    """A window of an eighth of the text."""
    x = torch.zeros(1, LENGTH, WIDTH, device=device)
    return layer_of(name, device, window=LENGTH // 8).explain(x)


@torch.no_grad()
def decoding(name: str, device: torch.device) -> tuple[str, dict[str, str]]:
    """One token after a past."""
    layer = layer_of(name, device)
    past = torch.zeros(1, 64, WIDTH, device=device)
    state = layer.make_cache(1, 65)
    layer(past, cache=state)
    return layer.explain(past[:, :1], cache=state)


#: Kinds of call that are explained.
CALLS: dict[str, Call] = {
    f"training, {LENGTH} tokens, float32": training,
    f"inference, {LENGTH // 4} tokens, bfloat16": half,
    f"training, {LENGTH} tokens, 4 documents": packed,
    f"training, {LENGTH} tokens, window {LENGTH // 8}": windowed,
    "decoding 1 token after 64, float32": decoding,
}


def choices(device: torch.device) -> Iterator[str]:
    """A table of what "auto" takes for each name, and below it why it passes over others."""
    notes: dict[tuple[tuple[str, str], ...], int] = {}
    lines = []
    for name in posenc.names():
        cells = [f"`{name}`"]
        for call in CALLS.values():
            taken, passed = call(name, device)
            if passed:
                number = notes.setdefault(tuple(passed.items()), len(notes) + 1)
                taken = f"{taken} ({number})"
            cells.append(taken)
        lines.append(cells)
    yield from table(["name", *CALLS], lines)
    yield ""
    for reasons, number in notes.items():
        yield f"({number}) " + "; ".join(f"not {other}: {why}" for other, why in reasons)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Of Markdown."""
    for line in (header, ["---"] * len(header), *lines):
        yield f"| {' | '.join(line)} |"


def report() -> Iterator[str]:
    """The lines."""
    yield "### posenc doctor"
    yield ""
    yield from table(["what", "here"], list(facts()))
    seen = set()
    for device in devices():
        if device_name(device) in seen:
            continue
        seen.add(device_name(device))
        yield ""
        yield f"#### What impl='auto' takes on {device}, width {WIDTH}, {HEADS} heads"
        yield ""
        yield from choices(device)


def main(argv: Sequence[str]) -> int:
    """Print it."""
    argparse.ArgumentParser(
        prog="posenc doctor", description=(__doc__ or "").splitlines()[0]
    ).parse_args(argv)
    home = str(Path.home()).rstrip("/")
    whole = re.compile(re.escape(home) + r"(?![\w.-])") if home else None
    for line in report():
        print(whole.sub("~", line) if whole else line)
    return 0
