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
        shared: one delta and one b for all heads, as EulerFormer has them (arXiv 2403.17729).
        offset: whether there is a b; without one it is 0.

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
        shared: bool = False,
        offset: bool = True,
    ) -> None:
        super().__init__()
        check_sizes("Polar (CMHA)", num_heads=num_heads)
        check_head_dim(head_dim, "Polar (CMHA)")
        if init not in ("rope", "authors"):
            raise ValueError(unknown("Polar init", init, ("rope", "authors")))
        check_base(base)
        self.num_heads, self.head_dim, self.base, self.init = num_heads, head_dim, base, init
        self.num_kv_heads = check_kv_heads(num_heads, num_kv_heads)
        self.shared = shared
        pairs = head_dim // 2
        self.delta = self.float32_parameter(1 if shared else self.num_kv_heads, pairs)
        self.b = self.float32_parameter(1 if shared else num_heads, pairs) if offset else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.b is not None:
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
        delta = self.delta.expand(self.num_kv_heads, -1)
        b = self.delta.new_zeros(1, delta.shape[1]) if self.b is None else self.b
        b = b.expand(self.num_heads, -1)
        return ByContent(place, plain_spectrum(self.head_dim, self.base), delta, b)

    def scores(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> Scores:
        return Scores(scale=1.0 if self.init == "authors" else None)

    def cost(self, s: Sizes) -> Part:
        """delta and b: (G + H) D/2 parameters, D if shared, fewer without b; never below fp32.

        For each pair of q and of k an arctangent, a sine and a cosine; and the rotation.
        """
        sines = Part(elementwise=3 * s.N * s.turned // 2)
        size = self.delta.numel() + (0 if self.b is None else self.b.numel())
        return weights(size, s.precise) + sines + rotation(s, s.D)

    def extra_repr(self) -> str:
        sizes = f"num_heads={self.num_heads}, head_dim={self.head_dim}"
        options = f"base={self.base}, init={self.init!r}, shared={self.shared}"
        return f"{sizes}, {options}, offset={self.b is not None}"
