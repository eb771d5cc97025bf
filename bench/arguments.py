"""What the benchmarks check of their command lines before they measure anything."""

from collections.abc import Sequence

import torch

from posenc.errors import unknown


def check_least(least: int, **flags: int | Sequence[int]) -> None:
    """Raise ValueError for the first flag, one number or several, with one below `least`."""
    for name, given in flags.items():
        smallest = given if isinstance(given, int) else min(given)
        if smallest < least:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least {least}; got {smallest}.")


def check_device(name: str) -> None:
    """Raise ValueError unless tensors can live on this device, "cpu", "cuda" or "cuda:N"."""
    known = ["cpu"]
    if torch.cuda.is_available():
        known += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    elif name.startswith("cuda"):
        raise ValueError(f"--device {name} needs a CUDA device; there is none. Use --device cpu.")
    if name not in known:
        raise ValueError(unknown("device", name, known))
