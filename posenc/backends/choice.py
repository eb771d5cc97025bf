"""Which back end computes a case: `impl`, and what "auto" takes.

    reference   materialises the definition, in fp32 or better
    sdpa        torch's scaled_dot_product_attention; a dense bias only where the logits need one
    fused       Triton kernels
    auto        what `posenc tune` found the fastest for such a case on this machine;
                where it has not measured any (`posenc.backends.measured`), the first of an ordered
                list that can and pays: `reflected` for products of reflections; on CPU `skipping`
                where gates drop enough, `contextual` for positions that gates count, `blockwise`
                for relative terms, packed documents and windows, `short` in half precision; else
                sdpa
Features that fade with the distance (xPos) are folded into q and k before, but for `reference`.
An explicit choice never falls back: a back end's `reason` is the error; nor is it touched by what
was measured, which for kernels is their tiles alone (`posenc.kernels.tiles`). Kernels that were not
measured where they are to run are left out of `auto`.
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
    measured,
    reference,
    reflected,
    sdpa,
    short,
    skipping,
)
from posenc.backends.case import Case
from posenc.backends.measured import APART, Way
from posenc.cache import Cache
from posenc.convolution import DepthwiseConv
from posenc.errors import unknown
from posenc.placement import Placement
from posenc.rotations import Rotation
from posenc.tuned import COMMAND

IMPLS = ("auto", "reference", "sdpa", "fused")
EXPLICIT: dict[str, ModuleType] = {"reference": reference, "sdpa": sdpa, "fused": fused}
#: Those that can be measured: all but the definition, which holds T x S.
MEASURABLE: dict[str, ModuleType] = {
    "sdpa": sdpa,
    "short": short,
    "reflected": reflected,
    "blockwise": blockwise,
    "contextual": contextual,
    "skipping": skipping,
    "fused": fused,
}
#: Tried in this order where nothing was measured.
ON_CPU = (reflected, skipping, contextual, blockwise, short, sdpa)
#: Those of them that a case of nothing but its order may concern: most calls are one.
ON_CPU_PLAIN = (short, sdpa)
ELSEWHERE = (reflected, sdpa)
#: Those of them that can where they do not pay.
PAYING = (skipping, blockwise, short)


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


def candidates(case: Case) -> tuple[ModuleType, ...]:
    """What "auto" tries in this order where nothing was measured."""
    if case.q.device.type != "cpu":
        return ELSEWHERE
    return ON_CPU_PLAIN if case.plain else ON_CPU


def why_not(backend: ModuleType, case: Case) -> str | None:
    """Why "auto" passes over a back end where nothing was measured; None where it takes it."""
    why: str | None = backend.reason(case)
    if why is None and backend in PAYING and not backend.pays(case):
        return "another is faster at these sizes"
    return why


def choose(case: Case, impl: str) -> ModuleType:
    """The back end where nothing was measured, or ValueError where the explicit one cannot."""
    if impl == "auto":
        return next(backend for backend in candidates(case) if why_not(backend, case) is None)
    backend = EXPLICIT[check_impl(impl)]
    if why := backend.reason(case):
        raise ValueError(f"impl={impl!r} {why}. {fused.REMEDY}")
    return backend


def chosen(case: Case) -> Way | None:
    """The fastest way that was measured for such a case and can compute it; None: none was."""
    return next((way for way in measured.ways(case) if can(way, case)), None)


def can(way: Way, case: Case) -> bool:
    """Whether it computes the case."""
    if way.backend == APART:
        return True
    if way.backend == "fused" and fused.too_large(case):
        return False
    return MEASURABLE[way.backend].reason(case) is None


def by(way: Way, case: Case) -> Tensor:
    """Attention of q and k that are turned, but for `fused`, which turns them inside; of any case
    where q and k turn first.
    """
    if way.backend == APART:
        return attend(case.turned(), "auto")
    if way.backend == "skipping":
        return skipping.attend(case, partial(attend, impl="auto"), **way.settings)
    y: Tensor = MEASURABLE[way.backend].attend(case, **way.settings)
    return y


def explain(case: Case) -> tuple[str, dict[str, str]]:
    """The back end that "auto" takes, and why it passes over others of its list, by name: those
    before it, or all where it was measured. Of a long text whose features fade, for its first rows.
    """
    if case.scores.fading is not None:
        case = faded.parts(case.turned())[0]
    way = chosen(case)
    if way is None or way.backend == APART:
        case = case.turned()
        way = chosen(case)
    backend = choose(case, "auto") if way is None else MEASURABLE[way.backend]
    passed: dict[str, str] = {}
    for other in candidates(case):
        if other is not backend:
            passed[name_of(other)] = why_not(other, case) or f"{COMMAND} found {way} faster here"
        elif way is None:
            break
    return name_of(backend), passed


def name_of(backend: ModuleType) -> str:
    """Of its module in `posenc.backends`."""
    return backend.__name__.rpartition(".")[2]


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
    # Compiled, a rotation is part of what surrounds it, which was not measured.
    whole = case.rotation is not None and not fading and not torch.compiler.is_compiling()
    if whole and impl == "auto" and (way := chosen(case)) and way.backend != APART:
        return by(way, case)
    if case.rotation is not None and (fading or impl != "fused"):
        # Kernels turn inside; other back ends are chosen by what comes of it.
        q, k = turn(case.rotation, case.q, case.k, impl)
        case = case._replace(q=q, k=k, rotation=None)
    if fading:
        outputs = [attend(part, impl) for part in faded.parts(case)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)
    if impl == "auto" and (way := chosen(case)):
        return by(way, case)
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
