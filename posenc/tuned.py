"""The file of what was measured on this machine: `posenc tune` writes it, an entry a device.

`posenc.backends.measured` takes its rows, `posenc.kernels.tiles` its tiles; this module knows
neither. An entry is read at the first question, once a process. One that was made with another
driver or other versions says nothing of this machine, nor does one of another device: it is left
out, with one warning. So is a file that cannot be read.
"""

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import posenc
from posenc.machine import device_name, driver_version, package_version

FORMAT = 2
COMMAND = "posenc tune"
#: Names the folder of the file, where it is not to be `FOLDER`.
VARIABLE, FOLDER = "POSENC_CACHE", "~/.cache/posenc"

_caches: list[dict[Any, Any]] = []


def cache() -> dict[Any, Any]:
    """A new dict for what comes of the file, which `forget` empties."""
    _caches.append({})
    return _caches[-1]


_entries: dict[tuple[str, int | None], Mapping[str, Any]] = cache()


def entry(kind: str, index: int | None) -> Mapping[str, Any]:
    """That of a device, read once a process; {} where there is none that is right for it."""
    if (kind, index) not in _entries:
        _entries[kind, index] = {}  # also where the warning is made an error
        _entries[kind, index] = _of_file(kind, index)
    return _entries[kind, index]


def forget() -> None:
    """Read the file at the next question."""
    for made in _caches:
        made.clear()


def _of_file(kind: str, index: int | None) -> Mapping[str, Any]:
    if kind not in ("cpu", "cuda"):
        return {}
    try:
        devices = entries(path())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warn(f"{path()} cannot be read ({error})")
        return {}
    device = torch.device(kind) if index is None else torch.device(kind, index)
    name = name_of(device)
    if name not in devices:
        warn(f"{path()} holds no measurements of {name}, but of {', '.join(devices)}")
        return {}
    found: Mapping[str, Any] = devices[name]
    other = [
        f"{key} {found['made_with'].get(key)} (now {value})"
        for key, value in made_with(device).items()
        if found["made_with"].get(key) != value
    ]
    if other:
        warn(f"{path()} was measured on {name} with {', '.join(other)}")
        return {}
    return found


def warn(what: str) -> None:
    """Say why no measurements count, and what to do."""
    warnings.warn(
        f"{what}: it is left out. Measure anew: {COMMAND}. Or delete the file.", stacklevel=2
    )


def path() -> Path:
    """Where it lies. A user without a home has none but by `VARIABLE`."""
    return Path(os.path.expanduser(os.environ.get(VARIABLE) or FOLDER)) / "tuned.json"


def entries(file: Path) -> dict[str, Any]:
    """What it says of each device.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is none of `posenc.tune`, or of another format.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected a file of format {FORMAT} from {COMMAND}")
    devices = content.get("devices")
    if not isinstance(devices, dict) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("made_with"), dict)
        and {"tiles", "rows"} <= entry.keys()
        for entry in devices.values()
    ):
        raise ValueError("expected made_with, tiles and rows of each device")
    return devices


def described(config: Mapping[str, int | None]) -> str:
    """Tiles in words."""
    return " ".join(f"{name}={value}" for name, value in config.items() if value is not None)


def name_of(device: torch.device) -> str:
    """A device in the file: a model, for a processor with its threads."""
    name = device_name(device)
    return name if device.type == "cuda" else f"{name}, threads: {torch.get_num_threads()}"


def made_with(device: torch.device) -> dict[str, str | None]:
    """What else must be as it was."""
    interpreted = " (interpreted)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    triton = package_version("triton")
    return {
        "driver": driver_version(device),
        "torch": torch.__version__,
        "triton": triton and triton + interpreted,
        "posenc": f"{posenc.__version__} {code()}",
    }


@functools.cache
def code() -> str:
    """A digest of what computes attention, which an editable install changes without a version."""
    folders = (Path(__file__).parent / name for name in ("kernels", "backends"))
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
