"""What was measured on this machine, and what "auto" takes of it. `posenc tune` measures.

The file holds a list of rows for each device. A row has one question (what is computed, in which
direction and dtype, of which sizes), and the ways that answered it rightly, the first to be taken
first. A case takes the row of its own op, direction and dtype whose sizes are nearest, within a
factor of two in each; it takes today's constants where there is none. Nothing here reads a number
on a device.

    step       one query; in inference
    forward    a text, in inference: measured with one
    train      forward and backward: measured with a batch

The file is `posenc.tuned`'s.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from posenc import tuned
from posenc.backends.case import Case
from posenc.backends.skipping import runs_eagerly
from posenc.rotations import ByContent, ByPosition, ByRates
from posenc.scores import Bias, ByDistance, Decay, Scores

T = TypeVar("T")

#: Turning q and k first, then what computes attention of what comes of it.
APART = "apart"
#: What may answer, and the settings that each takes.
SETTINGS: dict[str, tuple[str, ...]] = {
    "sdpa": (),
    "short": (),
    "reflected": (),
    "blockwise": ("rows",),
    "contextual": ("rows",),
    "skipping": ("rows",),
    "fused": ("deterministic",),
    APART: (),
}
#: Rotations that kernels know, and how ops are called.
ROTATIONS = {
    ByPosition: "turned by position",
    ByContent: "turned by content",
    ByRates: "turned by rates",
}


class Way(NamedTuple):
    """A back end and its settings; what they leave out are its constants."""

    backend: str
    settings: Mapping[str, int] = {}

    def __str__(self) -> str:
        return " ".join((self.backend, *(f"{key}={value}" for key, value in self.settings.items())))


class Question(NamedTuple):
    """What decides which way is the fastest."""

    op: str
    direction: str
    dtype: torch.dtype
    sizes: dict[str, int]


Settings = tuple[tuple[str, int], ...]
#: Of one op, direction and dtype: by each size's name low, past the high, and what was measured
#: between them; by the measured sizes, in that order, the ways. Nothing but tuples: these a
#: compiler takes as constants.
Ranks = tuple[
    tuple[tuple[str, tuple[tuple[int, int, int], ...]], ...],
    tuple[tuple[tuple[int, ...], tuple[tuple[str, Settings], ...]], ...],
]
Table = dict[tuple[str, str, torch.dtype], Ranks]


def nearest(ranks: Ranks, sizes: Mapping[str, int]) -> tuple[Way, ...]:
    """The ways of the nearest sizes, () beyond a factor of two."""
    bounds, found = ranks
    key: tuple[int, ...] = ()
    for name, of_name in bounds:
        size = sizes[name]
        for low, high, measured in of_name:
            if low <= size < high:
                key = (*key, measured)
    for sizes_of_row, ways in found:
        if sizes_of_row == key:
            return tuple([Way(backend, dict(settings)) for backend, settings in ways])
    return ()


# What a case asks


def question(case: Case) -> Question | None:
    """None for a case of a kind that nothing is measured of."""
    q, k, v, mask = case.q, case.k, case.v, case.mask
    if case.dropout_p or not mask.causal or case.place.at is not None:
        return None
    if not q.dtype == k.dtype == v.dtype:
        return None
    length, key_length = mask.length, mask.key_length
    direction = "train" if needs_gradient(q, k, v) else "step" if length == 1 else "forward"
    if direction != "step" and length != key_length:
        return None
    terms = of_scores(case.scores)
    if terms is None:
        return None
    sizes, parts = {"S": key_length, "D": v.shape[-1]}, list(terms)
    if case.rotation is not None:
        name = ROTATIONS.get(type(case.rotation))
        if name is None:
            return None
        parts.append(name)
    if case.gates is not None:
        if case.gates.need_every_output:
            return None
        parts.append("gates")
        sizes["kept %"] = round(100 * case.gates.kept)
    if mask.window is not None:
        parts.append("window")
        sizes["window"] = mask.window
    for present, name in (
        (mask.segments is not None, "documents"),
        (mask.real is not None, "padding"),
        (q.shape[1] != k.shape[1], "grouped keys"),
        (case.wide, "wide keys"),
    ):
        if present:
            parts.append(name)
    return Question(", ".join(parts) or "plain", direction, q.dtype, sizes)


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def of_scores(scores: Scores) -> list[str] | None:
    """The terms of the logits by name; None for some that nothing is measured of."""
    parts = []
    term, bias = scores.relative, scores.bias
    if term is not None:
        if term.distances is not None or term.two_sided:
            return None
        parts.append("relative sinusoid" if term.factors is not None else "relative table")
    if scores.contextual is not None:
        parts.append("contextual positions")
    if scores.reflections is not None:
        parts.append("reflections")
    if bias is not None:
        name = of_bias(bias)
        if name is None:
            return None
        parts.append(name)
    return parts


def of_bias(bias: Bias) -> str | None:
    """Its name, as that of `of_scores`."""
    if isinstance(bias, Decay):
        return None if bias.two_sided else "decay"
    if not isinstance(bias, ByDistance):
        return "bias"
    if bias.positions is not None:
        return None
    one = slice(0, 1)
    learns = torch.is_grad_enabled() and bias(one, one).requires_grad
    return "learned bias of distances" if learns else "bias of distances"


# What the file answers


def as_constant(function: Callable[..., T]) -> Callable[..., T]:
    """`torch.compiler.assume_constant_result`: called while tracing, not traced. That one imports
    the compiler, and with it seconds and numpy.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def ways(case: Case) -> tuple[Way, ...]:
    """Those that were right for such a case, the first to be taken first; () where nothing says.

    An exported program runs elsewhere; what watches or transforms the computation may not know
    what kernels and lists of rows do.
    """
    device = case.q.device
    if not anything(device.type, device.index):
        return ()
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return ()
    elif not runs_eagerly(case.q) or forward_ad._current_level >= 0:
        return ()
    asked = question(case)
    if asked is None:
        return ()
    found = ranks(device.type, device.index, asked.op, asked.direction, asked.dtype)
    return () if found is None else nearest(found, asked.sizes)


@as_constant
def anything(kind: str, index: int | None) -> bool:
    """Whether there are rows of the device."""
    return bool(table(kind, index))


@as_constant
def ranks(
    kind: str, index: int | None, op: str, direction: str, dtype: torch.dtype
) -> Ranks | None:
    """The device's rows of an op."""
    return table(kind, index).get((op, direction, dtype))


_tables: dict[tuple[str, int | None], Table] = tuned.cache()


def table(kind: str, index: int | None) -> Table:
    """The rows of a device, read once a process; {} where there are none that are right for it."""
    found = _tables.get((kind, index))
    if found is None:
        found = _tables[kind, index] = of_file(kind, index)
    return found


def take(device: torch.device, rows: Sequence[Mapping[str, Any]]) -> None:
    """From now on these rows of a device count, whatever the file says."""
    _tables[device.type, device.index] = ranked(rows)


def of_file(kind: str, index: int | None) -> Table:
    """`table` by the file; with a warning where that is of no use."""
    entry = tuned.entry(kind, index)
    try:
        return ranked(entry["rows"]) if entry else {}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        tuned.warn(f"{tuned.path()} is damaged in its rows ({type(error).__name__}: {error})")
        return {}


def ranked(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of the file, as they are asked.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: for what is none.
    """
    by_op: dict[tuple[str, str, torch.dtype], list[Mapping[str, Any]]] = {}
    for row in rows:
        dtype = getattr(torch, row["dtype"])
        by_op.setdefault((row["op"], row["direction"], dtype), []).append(row)
    return {key: _ranks(group) for key, group in by_op.items()}


def _ranks(rows: Sequence[Mapping[str, Any]]) -> Ranks:
    names = sorted(rows[0]["sizes"])
    if any(sorted(row["sizes"]) != names for row in rows):
        raise ValueError("rows of one op have the same sizes")
    bounds = tuple(
        [(name, tuple(between(sorted({row["sizes"][name] for row in rows})))) for name in names]
    )
    ways = [
        (tuple([row["sizes"][name] for name in names]), tuple(map(_way, row["ways"])))
        for row in rows
    ]
    return bounds, tuple(ways)


def between(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Low, past the high, and the size itself: from half of it to its double, those between two
    sizes going to the nearer by ratio.
    """
    lows, highs = [-(-size // 2) for size in sizes], [2 * size for size in sizes]
    for i, (a, b) in enumerate(pairwise(sizes)):
        border = math.isqrt(a * b)
        highs[i], lows[i + 1] = min(highs[i], border), max(lows[i + 1], border)
    return list(zip(lows, highs, sizes, strict=True))


def _way(stored: Mapping[str, Any]) -> tuple[str, Settings]:
    backend, settings = stored["backend"], stored["settings"]
    if unknown := set(settings) - set(SETTINGS[backend]):
        raise ValueError(f"{backend} has no setting {', '.join(sorted(unknown))}")
    return backend, tuple(settings.items())
