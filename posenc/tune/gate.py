"""What a way must compute before it is timed: outputs and gradients of the definition in fp64.

Its errors may be twice those of the definition in the inputs' own dtype, two roundings to that
dtype (the definition makes them in fp32: one of a result between, one of what comes out) and, for
sums over S keys in another order, S roundings in fp32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from posenc.backends import reference
from posenc.backends.case import Case
from posenc.scores import Bias, ByDistance, Decay, RelativeTerm
from posenc.tune.cases import Asked

Attend = Callable[[Case], Tensor]
#: Gradients whose root mean square is below this share of the largest count as that large: exact
#: zeros have no relative error.
LEAST = 1e-3


def definition(case: Case) -> Tensor:
    """The reference, q and k turned first."""
    return reference.attend(case.turned())


def precise(case: Case) -> Case:
    """The same numbers in fp64."""
    scores, gates = case.scores, case.gates
    return case._replace(
        q=case.q.double(),
        k=case.k.double(),
        v=case.v.double(),
        scores=scores._replace(
            content=_double(scores.content),
            contextual=_double(scores.contextual),
            reflections=_double(scores.reflections),
            bias=_precise_bias(scores.bias),
            relative=_precise_term(scores.relative),
        ),
        gates=gates and gates._replace(values=gates.values.double()),
    )


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def _precise_bias(bias: Bias | None) -> Bias | None:
    if isinstance(bias, ByDistance | Decay):
        return bias._replace(dtype=torch.float64)
    return bias


def _precise_term(term: RelativeTerm | None) -> RelativeTerm | None:
    if term is None:
        return None
    table = term.table
    rows = table.double() if isinstance(table, Tensor) else lambda length: table(length).double()
    return term._replace(table=rows, query=_double(term.query), offset=_double(term.offset))


def results(attend: Attend, asked: Asked, case: Case | None = None) -> list[Tensor]:
    """The output, and the gradients of a random projection of it, 0 where a leaf has no part."""
    with torch.set_grad_enabled(bool(asked.leaves)):  # as it is timed: some ways infer alone
        y = attend(asked.case if case is None else case)
    if not asked.leaves:
        return [y]
    generator = torch.Generator(y.device).manual_seed(0)
    probe = torch.randn(y.shape, generator=generator, device=y.device, dtype=torch.float32)
    probe = probe.to(asked.case.q.dtype).to(y.dtype)
    gradients = torch.autograd.grad(
        y, asked.leaves, probe, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return [y, *gradients]


def errors(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Root mean squares of the differences, relative to those of the exact tensors."""
    sizes = [x.double().square().mean().sqrt().item() for x in exact]
    floor = LEAST * max(sizes[1:], default=0.0)
    return [
        (a.double() - e.double()).square().mean().sqrt().item() / max(size, floor, 1e-30)
        for a, e, size in zip(actual, exact, sizes, strict=True)
    ]


class Gate:
    """The definition's results for one case, and how far off others may be."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.exact = results(definition, asked, precise(asked.case))
        dtype, keys = asked.case.q.dtype, asked.case.mask.key_length
        rounding = 2 * torch.finfo(dtype).eps + keys * torch.finfo(torch.float32).eps
        plain = errors(results(definition, asked), self.exact)
        self.allowed = [2 * error + rounding for error in plain]

    def check(self, attend: Attend) -> float:
        """The error of the output; ValueError where anything is worse than allowed."""
        found = errors(results(attend, self.asked), self.exact)
        for number, (error, allowed) in enumerate(zip(found, self.allowed, strict=True)):
            if not error <= allowed:
                what = f"gradient {number}" if number else "the output"
                raise ValueError(f"{what} is off by {error:.1e}; allowed {allowed:.1e}")
        return found[0]
