"""Which back end computes a case: `impl`, and what "auto" takes.

    reference   materialises the definition, in fp32 or better
    sdpa        torch's scaled_dot_product_attention; a dense bias only where the logits need one
    fused       Triton kernels
    auto        the first of an ordered list that can and pays: `reflected` for products of
                reflections; on CPU `skipping` where gates drop enough, `contextual` for positions
                that gates count, `blockwise` for relative terms, packed documents and windows,
                `short` in half precision; else sdpa
Features that fade with the distance (xPos) are folded into q and k before, but for `reference`.
An explicit choice never falls back: a back end's `reason` is the error. The kernels have been timed
on no GPU yet, so `auto` leaves them out.
"""

from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from posenc.backends import (
    blockwise,
    contextual,
    faded,
    fused,
    reference,
    reflected,
    sdpa,
    short,
    skipping,
)
from posenc.backends.case import Case
from posenc.cache import Cache
from posenc.convolution import DepthwiseConv
from posenc.errors import unknown
from posenc.placement import Placement
from posenc.rotations import Rotation

IMPLS = ("auto", "reference", "sdpa", "fused")
EXPLICIT: dict[str, ModuleType] = {"reference": reference, "sdpa": sdpa, "fused": fused}
#: Tried in this order.
ON_CPU = (reflected, skipping, contextual, blockwise, short, sdpa)
#: Those of them that a case of nothing but its order may concern: most calls are one.
ON_CPU_PLAIN = (short, sdpa)
ELSEWHERE = (reflected, sdpa)


def check_impl(impl: str, dropout: float = 0.0, conv: DepthwiseConv | None = None) -> str:
    """`impl` itself, or ValueError with the choices; "fused" raises where no kernel can run, or for
    parts of a module that none computes.
    """
    if impl not in IMPLS:
        raise ValueError(unknown("impl", impl, IMPLS))
    if impl == "fused" and not torch.compiler.is_compiling():
        fused.check_available()
        fused.check_parts(dropout, conv)
    return impl


def choose(case: Case, impl: str) -> ModuleType:
    """The back end, or ValueError where the explicit one cannot."""
    if impl == "auto":
        candidates: tuple[ModuleType, ...] = ELSEWHERE
        if case.q.device.type == "cpu":
            candidates = ON_CPU_PLAIN if case.plain else ON_CPU
        return next(backend for backend in candidates if backend.reason(case) is None)
    backend = EXPLICIT[check_impl(impl)]
    if why := backend.reason(case):
        raise ValueError(f"impl={impl!r} {why}. {fused.REMEDY}")
    return backend


def explain(case: Case) -> tuple[str, dict[str, str]]:
    """The back end that "auto" takes, and why it passes over those before it in its list, by name;
    of a long text whose features fade, for its first rows.
    """
    case = case.turned()
    if case.scores.fading is not None:
        case = faded.parts(case)[0]
    passed: dict[str, str] = {}
    for backend in ON_CPU if case.q.device.type == "cpu" else ELSEWHERE:
        name = backend.__name__.rpartition(".")[2]
        if (why := backend.reason(case)) is None:
            return name, passed
        passed[name] = why
    raise AssertionError("sdpa computes every case")


def attend(case: Case, impl: str = "auto") -> Tensor:
    """Softmax attention: (B, H, T, D) in q's dtype.

    Raises:
        ValueError: for an unknown impl, a case that an explicit one cannot compute, or fewer keys
            than queries.
    """
    mask = case.mask
    if mask.length > mask.key_length:
        raise ValueError(
            f"attention needs at least as many keys as queries; got T={mask.length}, "
            f"S={mask.key_length}. Pass the whole key sequence, the queries being its last tokens."
        )
    fading = case.scores.fading is not None and impl != "reference"
    if case.rotation is not None and (fading or impl != "fused"):
        # Kernels turn inside; other back ends are chosen by what comes of it.
        q, k = turn(case.rotation, case.q, case.k, impl)
        case = case._replace(q=q, k=k, rotation=None)
    if fading:
        outputs = [attend(part, impl) for part in faded.parts(case)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)
    backend = choose(case, impl)
    if backend is skipping:
        return skipping.attend(case, partial(attend, impl="auto"))
    y: Tensor = backend.attend(case)
    return y


def turn(rotation: Rotation, q: Tensor, k: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """q and k turned, by a kernel or eagerly."""
    turned = fused.turn(rotation, q, k) if impl == "fused" else rotation.apply(q, k)
    q_turned, k_turned = turned
    assert q_turned is not None
    assert k_turned is not None
    return q_turned, k_turned


def convolve(
    conv: DepthwiseConv,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Placement,
    state: Cache | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v convolved along time."""
    by = fused.convolve if impl == "fused" else DepthwiseConv.__call__
    q, k, v = by(conv, q, k, v, real=place.here, segments=place.segments, state=state)
    return q, k, v
