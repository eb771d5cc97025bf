"""The device of a run, and the precision of its products."""

from contextlib import AbstractContextManager, nullcontext

import torch

from posenc.machine import has_bfloat16


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` names; "auto" is a GPU where there is one.

    Raises:
        ValueError: for a name that torch does not know, or a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}. Use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"training runs on cpu or cuda; got {name!r}. Phases need float64.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU. Use --device cpu.")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"--device {device}: torch sees {torch.cuda.device_count()} GPUs, from cuda:0 on."
            )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of products: "float32", "bfloat16", or "auto"."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Products in `dtype`; weights, sums and phases stay in float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
