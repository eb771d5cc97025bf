"""The least time that a kernel can take: its products at the measured rate of a large product, or
its bytes at the measured rate of a copy, whichever is longer.

    roofline = max(FLOPs / peak, bytes / bandwidth)

A causal product of T x T pairs over D is one unit, B H T^2 D FLOPs. Bytes are those that must move
once: every input read, every output written; of a step of decoding the keys and values, which are
nearly all. Both ceilings are rows of the same device.
"""

from collections.abc import Sequence
from operator import mul
from typing import Any, NamedTuple

#: Units of attention forward and backward: scores and values; both again, and the gradients of q, k
#: and v. A relative term adds its logits; those again, and the gradients of q and the table.
UNITS = {"": (2, 5), "relative": (3, 8)}
#: Tensors (B, H, T, D), decoding (B, H, S, D), that are read or written, forward and backward.
MOVED: dict[str, tuple[int, int]] = {
    "flash": (4, 8),
    "decode": (2, 0),
    "rope": (4, 4),
    "carope": (4, 6),
    "polar": (4, 6),
    "conv": (6, 9),
    "conv per head": (6, 9),
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Work(NamedTuple):
    """What a call cannot avoid."""

    flops: float
    bytes: float


def work(name: str, mode: str, shape: tuple[int, int, int, int], dtype: str) -> Work | None:
    """Of a kernel by the name of its rows; None for a name without a formula.

    Args:
        shape: (B, H, T, D), decoding (B, H, S, D).
    """
    batch, heads, length, dim = shape
    attends = name == "flash" or name.endswith("+ attention")
    moved = MOVED.get("flash" if attends else name)
    if moved is None:
        return None
    units = UNITS["relative" if name.startswith("relative") else ""] if attends else (0, 0)
    passes = {"fwd": (1, 0), "bwd": (0, 1), "fwd+bwd": (1, 1)}[mode]
    elements = batch * heads * length * dim
    flops = sum(map(mul, passes, units)) * elements * length
    return Work(flops, sum(map(mul, passes, moved)) * elements * BYTES[dtype])


def percent_of_roofline(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    """100 roofline / measured time; None without a formula or without ceilings of its device."""
    own = [r for r in rows if r["kind"] == "ceiling" and r["device"] == row["device"]]
    peaks = [r["p50"] * 1e12 for r in own if r["unit"] == "TFLOP/s"]
    bandwidths = [r["p50"] * 1e12 for r in own if r["unit"] == "TB/s"]
    shape = (row["B"], row["H"], row["S"] or row["T"], row["D"])
    least = work(row["name"], row["mode"], shape, row["dtype"])
    if least is None or not peaks or not bandwidths:
        return None
    seconds = max(least.flops / max(peaks), least.bytes / max(bandwidths))
    return 100 * seconds / (row["p50"] * 1e-3)
