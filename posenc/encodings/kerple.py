"""KERPLE: kernelized relative position (arXiv 2205.09921).

    log      bias[h, m, n] = -r1 ln(1 + r2 |d|)     start r1 ~ U(0, 2), r2 ~ U(0, 1); both >= 0.01
    power    bias[h, m, n] = -r1 |d|^r2             start r1 ~ U(0, 1), r2 ~ U(0, 2);
                                                    r1 >= 0.01, r2 in [0.01, 2]

d = m - n; added to q.k/sqrt(D). Raw keys are cached. The authors clamp the parameters themselves in
the forward pass, and keep one pair for all layers; here they are clamped where they are used, the
gradient passing as if they were not (a write into a parameter breaks compilation and
recomputation), and each layer has its own. |d| where attention is not causal is ours.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from posenc.accounting import Part, Sizes, weights
from posenc.checks import check_sizes
from posenc.encodings.distance import DistanceBias
from posenc.errors import unknown

LEAST = 0.01


def clamped(x: Tensor, low: float, high: float) -> Tensor:
    """x within the bounds; the gradient is that of x."""
    return x.clamp(low, high).detach() + (x - x.detach())


class Kerple(DistanceBias):
    """KERPLE: a bias that falls with the logarithm, or a power, of the distance.

    Args:
        num_heads: H.
        kind: "log" or "power".

    Raises:
        ValueError: for another kind, or less than one head.
    """

    no_weight_decay = frozenset({"r1", "r2"})

    def __init__(self, num_heads: int, *, kind: Literal["log", "power"] = "log") -> None:
        super().__init__()
        check_sizes("Kerple", num_heads=num_heads)
        if kind not in ("log", "power"):
            raise ValueError(unknown("Kerple kind", kind, ("log", "power")))
        self.num_heads, self.kind = num_heads, kind
        #: Within which the parameters are used.
        self.bounds = {"r1": (LEAST, math.inf), "r2": (LEAST, 2.0 if kind == "power" else math.inf)}
        self.r1 = self.float32_parameter(num_heads)
        self.r2 = self.float32_parameter(num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        one, two = (2, 1) if self.kind == "log" else (1, 2)
        nn.init.uniform_(self.r1, 0, one)
        nn.init.uniform_(self.r2, 0, two)

    def of_distance(self, distances: Tensor) -> Tensor:
        """The bias of integer distances (..): (H, ..)."""
        far = distances.abs()
        shape = (-1, *(1,) * distances.ndim)
        r1 = clamped(self.r1, *self.bounds["r1"]).view(shape)
        r2 = clamped(self.r2, *self.bounds["r2"]).view(shape)
        if self.kind == "log":
            return -r1 * torch.log1p(r2 * far)
        # At 0 the derivative for r2 is 0 ln 0: taken of 1 instead, whose logarithm is 0.
        power = far.clamp(min=1).to(r1.dtype) ** r2
        return -r1 * torch.where(far > 0, power, 0.0)

    def cost(self, s: Sizes) -> Part:
        """2 H parameters, never below fp32."""
        return weights(2 * s.H, s.precise)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kind={self.kind!r}"
