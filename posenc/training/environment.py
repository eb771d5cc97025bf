"""What a run was made with: versions, hardware, command; and how much memory it took.

No host names and no paths but those that the user typed.
"""

import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import posenc
from posenc.machine import cxx_compilers, device_name, package_version
from posenc.training.invocation import command
from posenc.training.parallel import Parallel

PACKAGES = ("torch", "numpy", "einops", "triton", "tokenizers", "datasets", "safetensors")


def environment(
    argv: Sequence[str], parallel: Parallel, dtype: torch.dtype, corpus: Mapping[str, Any]
) -> dict[str, Any]:
    """Plain values for environment.json.

    Args:
        argv: the flags as typed.
        corpus: the corpus's description.
    """
    return {
        "command": command(*argv),
        "versions": {
            "posenc": posenc.__version__,
            "python": platform.python_version(),
            **{name: installed for name in PACKAGES if (installed := package_version(name))},
        },
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        **launch(parallel, dtype),
        "corpus": dict(corpus),
    }


def launch(parallel: Parallel, dtype: torch.dtype) -> dict[str, Any]:
    """What a run may change from one launch to the next."""
    return {
        "device": device_name(parallel.device),
        "dtype": str(dtype).removeprefix("torch."),
        "parallel": parallel.mode,
        "processes": parallel.world_size,
    }


def peak_memory(device: torch.device) -> int | None:
    """Most bytes held so far: by tensors on a GPU, by this process on a CPU. None: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def check_compiler() -> None:
    """Raise ValueError where torch.compile finds no C++ compiler."""
    if not cxx_compilers():
        raise ValueError(
            "--compile needs a C++ compiler; found none of g++, clang++ on the PATH, nor CXX. "
            "Install one, or leave --compile out."
        )
