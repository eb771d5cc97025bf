"""The machine and what is installed on it, by the names that files of measurements give them."""

import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The model of GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def driver_version(device: torch.device) -> str | None:
    """Of the GPU's driver; None for a processor, or where the system does not tell."""
    if device.type != "cuda":
        return None
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\d+(\.\d+)+", text)
    return found and found.group()


def package_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively: a GPU, or a CPU with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def cxx_compilers() -> list[str]:
    """The C++ compilers that torch.compile may take: $CXX, and those on the PATH."""
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl")
    return [name for name in names if name and shutil.which(name)]
