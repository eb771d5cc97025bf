"""Which tiles a launch takes: those that `posenc tune` found for the kernel on this device, else
the constant of the kernel's own file, from its `CONFIGS`.

Tiles that were found count for every launch on the device, whether `auto`, impl="fused" or the op
itself asks: they change how sums are rounded, and nothing else. None outlives its launch (what a
forward pass leaves has a number a row, or goes by constants), so a backward pass may have others
than the forward pass before it.

They are the entry `tiles` of the device in the file of `posenc.tuned`, which is read at the first
launch, once a process. Where one is not possible, all are left out, with one warning.
"""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch

from posenc import tuned

#: The kernel files that have `CONFIGS`.
FAMILIES = (
    "by_distance",
    "decode",
    "decode_relative",
    "flash",
    "projection",
    "relative",
    "routed",
)
#: Least and most of each number of a configuration: beyond them Triton compiles nothing useful, or
#: for minutes.
BOUNDS = {
    "block_m": (16, 256),
    "block_n": (16, 256),
    "segment": (16, 4096),
    "num_warps": (1, 16),
    "num_stages": (1, 8),
    "resident": (1, 8),
    "registers": (24, 255),
}
POWERS_OF_TWO = ("block_m", "block_n", "num_warps")

Config = TypeVar("Config", bound=tuple)


class Kernel(NamedTuple):
    """A line of a family's `CONFIGS`."""

    family: str
    key: tuple[str | int, ...]

    def __str__(self) -> str:
        *name, size, dim = self.key
        return f"{' '.join((self.family, *map(str, name)))}, {8 * size} bits, D <= {dim}"


_tables: dict[torch.device, Mapping[tuple, Any]] = tuned.cache()


def config_of(
    family: str, constants: Mapping[Any, Config], key: tuple, device: torch.device
) -> Config:
    """The configuration of a kernel for launches on the device; `constants`: CONFIGS."""
    found = _tables.get(device)
    if found is None:
        found = table(device)
    config = found.get((family, key))
    return constants[key] if config is None else config


def table(device: torch.device) -> Mapping[tuple, Any]:
    """The tiles found for a device by `Kernel`, read once a process."""
    if device not in _tables:
        _tables[device] = _of_file(device)
    return _tables[device]


def take(device: torch.device, configs: Mapping[Kernel, Any]) -> None:
    """From now on these count on the device, and the constants of other kernels."""
    _tables[device] = configs


@contextmanager
def using(device: torch.device, configs: Mapping[Kernel, Any]) -> Iterator[None]:
    """Inside, these count on the device beside those that counted before."""
    before = table(device)
    take(device, {**before, **configs})
    try:
        yield
    finally:
        take(device, before)


class _Recorder(dict):
    def __init__(self, configs: Mapping[Kernel, Any], asked: dict[Kernel, None]) -> None:
        super().__init__(configs)
        self.asked = asked

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked[Kernel(*key)] = None
        return super().get(key, default)


@contextmanager
def recorded(device: torch.device) -> Iterator[dict[Kernel, None]]:
    """The kernels whose tiles are asked for inside, in order."""
    asked: dict[Kernel, None] = {}
    before = table(device)
    take(device, _Recorder(before, asked))
    try:
        yield asked
    finally:
        take(device, before)


def _of_file(device: torch.device) -> dict[Kernel, Any]:
    entry = tuned.entry(device.type, device.index)
    try:
        return checked(entry["tiles"]) if entry else {}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        tuned.warn(f"{tuned.path()} is damaged in its tiles ({type(error).__name__}: {error})")
        return {}


def checked(rows: Iterable[Mapping[str, Any]]) -> dict[Kernel, Any]:
    """Rows of the file as they are asked; those that keep the constant are none.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: for what is no row, and for tiles that the
            kernel cannot have.
    """
    found = {}
    for row in rows:
        if row["config"] is None:
            continue
        kernel = Kernel(row["family"], tuple(row["key"]))
        if kernel.family not in FAMILIES or kernel.key not in family_of(kernel).CONFIGS:
            raise ValueError(f"no kernel {kernel.family} {list(kernel.key)}")
        config = type(constant(kernel))(**row["config"])
        if why := why_not(kernel, config):
            raise ValueError(f"{kernel}: {why}")
        found[kernel] = config
    return found


def family_of(kernel: Kernel) -> ModuleType:
    """Its file. Imported here, as they import this one."""
    return importlib.import_module(f"posenc.kernels.{kernel.family}")


def constant(kernel: Kernel) -> Any:
    """What its file has."""
    return family_of(kernel).CONFIGS[kernel.key]


def why_not(kernel: Kernel, config: Any) -> str | None:
    """Why a kernel cannot have the configuration, as far as that is known without compiling."""
    for name, value in config._asdict().items():
        if name == "registers" and value is None:
            continue
        low, high = BOUNDS[name]
        if type(value) is not int or not low <= value <= high:
            return f"{name} must be an integer from {low} to {high}; got {value!r}"
        if name in POWERS_OF_TWO and value & (value - 1):
            return f"{name} must be a power of two; got {value}"
    m, n = config.block_m, config.block_n
    if kernel.family == "by_distance" and m != n:
        return f"block_m and block_n must be equal; got {m} and {n}"
    if kernel.family == "relative" and family_of(kernel).registers(config) < BOUNDS["registers"][0]:
        return f"{config.num_warps} warps of {config.resident} programs leave a thread no registers"
    if kernel.family == "relative" and (config.segment % m or config.segment % n):
        return f"segment must be whole tiles; got {config.segment}, tiles of {m} x {n}"
    if kernel.family in ("decode", "decode_relative") and m != constant(kernel).block_m:
        return f"block_m must be {constant(kernel).block_m}, the least of a product; got {m}"
    if kernel.family == "decode" and family_of(kernel).SHORTEST % n:
        return f"a piece of keys must be whole tiles: at most {family_of(kernel).SHORTEST}; got {n}"
    return None
