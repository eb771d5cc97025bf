"""What the peers of our kernels take on an H100: published, guessed, or no less than by bytes.

Times are for bf16 and none was measured here. TFLOP/s count 4 B H T^2 D FLOPs forward, halved for
causal attention, and 2.5 times as many backward.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from .h100 import H100, Machine
from .launches import Shape
from .roofline import work

#: Causal forward, fp16, 16,384 tokens, H D = 2048, on an H100 SXM5: read off the figures of
#: Dao-AILab/flash-attention (assets/flash3_fp16_fwd.png; 2407.08608). By library, D, then length.
FORWARD = {
    "triton": {
        64: {512: 152, 1024: 291, 2048: 342, 4096: 363, 8192: 376, 16384: 363},
        128: {1024: 273, 2048: 323, 4096: 353, 8192: 369, 16384: 378},
    },
    "sdpa-fa2": {
        64: {512: 180, 1024: 229, 2048: 262, 4096: 284, 8192: 295, 16384: 299},
        128: {1024: 260, 2048: 298, 4096: 319, 8192: 333, 16384: 335},
    },
    "sdpa-cudnn": {
        64: {512: 225, 1024: 288, 2048: 334, 4096: 363, 8192: 379, 16384: 388},
        128: {1024: 410, 2048: 484, 4096: 518, 8192: 529, 16384: 539},
    },
}
#: Causal backward: no figure for D = 64 is public, these are guesses for 1024 tokens.
BACKWARD = {"sdpa-fa2": {64: {1024: 180}}, "sdpa-cudnn": {64: {1024: 265}}}
#: How much longer Inductor takes for RoPE than Helion, which copies no faster: 0.046 over 0.0405 ms
#: (pytorch/helion PR 2415).
INDUCTOR = 0.046 / 0.0405


class Peer(NamedTuple):
    """Seconds of a call, how sure they are (keys of SURE), and whether it may well take longer."""

    seconds: float
    sure: tuple[str, ...]
    least: bool = False


#: In words.
SURE = {
    "published": "peer published, of more heads, fp16",
    "copy": "a copy as one was read",
    "bytes": "peer by bytes: no faster",
    "copies": "peer by bytes and copies that it makes in other layouts: no faster if here too",
    "guessed": "peer's backward a guess",
}


def together(*parts: Peer | None) -> Peer | None:
    """One after another; None where there is no figure of one."""
    if any(part is None for part in parts):
        return None
    found = [part for part in parts if part is not None]
    sure = tuple(dict.fromkeys(kind for part in found for kind in part.sure))
    return Peer(sum(part.seconds for part in found), sure, any(part.least for part in found))


def core(name: str, mode: str, shape: Shape) -> Peer | None:
    """Causal attention of a library, at the lengths with a figure."""
    batch, heads, length, dim = shape
    unit = batch * heads * length**2 * dim
    rates, units, sure = (FORWARD, 2, "published") if mode == "fwd" else (BACKWARD, 5, "guessed")
    rate = rates.get(name, {}).get(dim, {}).get(length)
    return Peer(units * unit / (rate * 1e12), (sure,)) if rate else None


def moved(
    tensors: float, shape: Shape, machine: Machine, factor: float = 1.0, sure: str = "bytes"
) -> Peer:
    """So many tensors (B, H, T, D) of bf16 read or written."""
    batch, heads, length, dim = shape
    bytes_ = tensors * 2 * batch * heads * length * dim
    return Peer(factor * bytes_ / machine.memory + machine.launch, (sure,), least=True)


def copied(name: str, mode: str, shape: Shape, machine: Machine) -> Peer:
    """A copy of what a kernel cannot avoid to move."""
    least = work(name, mode, shape, "bfloat16")
    assert least is not None
    return Peer(least.bytes / machine.memory, ("copy",))


def compiled(name: str, mode: str, shape: Shape, machine: Machine) -> Peer | None:
    """What torch.compile cannot avoid to move of an operation's definition."""
    forward = mode == "fwd"
    if name == "rope":
        return moved(4, shape, machine, INDUCTOR)
    if name == "carope":  # fp64 phases (B, H, T, D/2) are two tensors of bf16, a sum is in and out
        return moved(4 + 4 if forward else 6 + 8, shape, machine)
    if name in ("polar", "conv"):
        return moved({"polar": (4, 6), "conv": (6, 9)}[name][not forward], shape, machine)
    return None


def with_bias(mode: str, shape: Shape, machine: Machine) -> Peer | None:
    """FA2, had it a bias, and a bias (B, H, T, T) in bf16 that is written and read."""
    return together(core("sdpa-fa2", mode, shape), moved(2 * shape[2] / shape[3], shape, machine))


def masked(mode: str, shape: Shape, machine: Machine) -> Peer | None:
    """MoH as released: FA2, then the gates on its output."""
    gates = moved(2 if mode == "fwd" else 3, shape, machine)
    return together(core("sdpa-fa2", mode, shape), gates)


def one_way(name: str, provider: str, mode: str, shape: Shape, machine: Machine) -> Peer | None:
    """Forward or backward."""
    rotation, _, with_core = name.partition(" + ")
    first, _, then = provider.partition(" + ")
    cores = {"fa2": "sdpa-fa2", "cudnn": "sdpa-cudnn"}
    if with_core and then in cores:
        after = core(cores[then], mode, shape)
        return together(one_way(rotation, first, mode, shape, machine), after)
    ways: dict[tuple[str, str], Callable[[], Peer | None]] = {
        ("flash", "sdpa-fa2"): partial(core, "sdpa-fa2", mode, shape),
        ("flash", "sdpa-cudnn"): partial(core, "sdpa-cudnn", mode, shape),
        # It was seen to transpose and copy q and k first (pytorch/pytorch 141265).
        ("rope", "liger"): partial(moved, 8, shape, machine, sure="copies"),
        ("rope", "liger, tokens first"): partial(moved, 4, shape, machine),
        ("relative + attention", "sdpa + bias"): partial(with_bias, mode, shape, machine),
        ("relative + attention", "flex + bias"): partial(with_bias, mode, shape, machine),
        ("moh core", "masked"): partial(masked, mode, shape, machine),
    }
    if provider == "copy":
        return copied(name, mode, shape, machine)
    if provider == "torch.compile":
        return compiled(name, mode, shape, machine)
    way = ways.get((name, provider))
    return way() if way else None


def peer(name: str, provider: str, mode: str, shape: Shape, machine: Machine = H100) -> Peer | None:
    """A peer by the names of its rows, or None where nothing is published or follows from bytes."""
    passes = mode.split("+")
    return together(*(one_way(name, provider, each, shape, machine) for each in passes))
