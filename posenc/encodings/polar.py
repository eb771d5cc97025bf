"""Polar: the complex multi-head attention (CMHA) of ComplexFormer (arXiv 2505.10222, withdrawn;
abstract and code only).

    pair i of q: (r, p) = (q_i, q_{i+D/2}),  lam = sqrt(r^2 + p^2),  th = atan2(p, r);  likewise k
    score[m, n] = scale * sum_i lam_q lam_k cos( delta_i (th_q[m] - th_k[n]) + b_i + (m - n) omega_i
    )

The angle difference is not wrapped, therefore the score factorises, and this is what is computed,
in linear time:

    q'[m] = R((delta-1) th_q + b + m omega) q[m],    k'[n] = R((delta-1) th_k + n omega) k[n]
    score = scale q'.k'

So CMHA is RoPE plus an angle that the content sets: no square root, norms kept, and RoPE bit for
bit at delta = 1, b = 0. For non-integer delta, q' jumps where th crosses +-pi; that belongs to the
method. Acts on q and k after the projections, v untouched. Rotated keys are cached; no further
state.
"""

import math
from typing import Literal

from torch import Tensor, nn

from posenc.accounting import Part, Sizes, rotation, weights
from posenc.cache import Cache
from posenc.checks import check_base, check_head_dim, check_kv_heads, check_sizes
from posenc.encodings.base import Encoding
from posenc.errors import unknown
from posenc.phase import Float32Parameters
from posenc.placement import Placement
from posenc.rotations import ByContent, plain_spectrum
from posenc.scores import Scores


class Polar(Float32Parameters, Encoding):
    """CMHA's polar rotation: position plus a learned multiple of each pair's own angle.

    Args:
        num_heads: H.
        head_dim: D, even.
        num_kv_heads: G, heads of k; delta is theirs. H if None.
        base: of RoPE's frequencies.
        init: "rope" (delta = 1, b = 0, scale 1/sqrt(D): exactly RoPE) or "authors" (delta ~ N(0,
            std (D/2)^-1/2), b = 0, scale 1, Xavier-uniform projections).

    Raises:
        ValueError: for an odd head dim or an unknown init.
    """

    no_weight_decay = frozenset({"delta", "b"})

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        base: float = 10000.0,
        init: Literal["rope", "authors"] = "rope",
    ) -> None:
        super().__init__()
        check_sizes("Polar (CMHA)", num_heads=num_heads)
        check_head_dim(head_dim, "Polar (CMHA)")
        if init not in ("rope", "authors"):
            raise ValueError(unknown("Polar init", init, ("rope", "authors")))
        check_base(base)
        self.num_heads, self.head_dim, self.base, self.init = num_heads, head_dim, base, init
        self.num_kv_heads = check_kv_heads(num_heads, num_kv_heads)
        self.delta = self.float32_parameter(self.num_kv_heads, head_dim // 2)
        self.b = self.float32_parameter(num_heads, head_dim // 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.b)
        if self.init == "rope":
            nn.init.ones_(self.delta)
        else:
            nn.init.normal_(self.delta, std=(self.head_dim / 2) ** -0.5)

    def init_projection(self, weight: Tensor) -> None:
        if self.init == "authors":
            # Xavier of each (C, C) block; on the whole, as a sharded weight cannot be split.
            bound = math.sqrt(3 / weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)

    def rotation(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> ByContent:
        return ByContent(place, plain_spectrum(self.head_dim, self.base), self.delta, self.b)

    def scores(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> Scores:
        return Scores(scale=1.0 if self.init == "authors" else None)

    def cost(self, s: Sizes) -> Part:
        """delta and b: (G + H) D/2 parameters, never below fp32. For each pair of q and of k an
        arctangent, a sine and a cosine; and the rotation.
        """
        pairs = s.turned // 2
        return weights(pairs, s.precise) + Part(elementwise=3 * s.N * pairs) + rotation(s, s.D)

    def extra_repr(self) -> str:
        sizes = f"num_heads={self.num_heads}, head_dim={self.head_dim}"
        return f"{sizes}, base={self.base}, init={self.init!r}"
