"""CARoPE: context-aware rotary position embedding (arXiv 2507.23083).

    z[b,h,t]  = x[b,t] . W[:,h] (+ bias[h])               W (C, H)
    f[t]      = 1 / (1 + softplus(z[t]))                  in (0, 1), one rate per token and head
    step_i[t] = f[t]^(i + first_power)                    i = 0 .. D/2-1
    phi_i[m]  = sum over t <= m of step_i[t]              inclusive, modulo 2 pi
    q'[m] = R(phi[m]) q[m],  k'[n] = R(phi[n]) k[n]       v untouched, score q'.k'/sqrt(D)

With constant f = base^(-2/D) it is RoPE (vectors at position m + 1, the same scores). The paper's
bias-free f cannot be: at W = 0 it is 0.59, a base of 2e7 at D = 64. `init="rope"` therefore adds a
bias and starts exactly at RoPE; `init="paper"` is the paper's form, W ~ N(0, 0.02) and no bias. The
paper's theta_1^i leaves open whether i starts at 0 (needed to contain RoPE, our default) or 1:
`first_power`.

Integer positions are not used: a gap in `positions` does not move the phase; negative ones
(padding) stop it. Rates, steps and sums are fp64 with autocast off: the phase error does not grow
with the length. While decoding, rotated keys are cached, and the phase of every token (fp64), so
that any rollback is exact.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from posenc.accounting import Part, Sizes, product, rotation, rotation_by_angles, state, weights
from posenc.cache import Cache, Stream
from posenc.checks import (
    check_base,
    check_head_dim,
    check_heads,
    check_kv_heads,
    check_sizes,
    check_tokens,
)
from posenc.encodings.base import Encoding
from posenc.encodings.running import RunningRotation
from posenc.errors import unknown
from posenc.placement import Placement
from posenc.rotations import ByPhase, ByRates


class CARoPE(RunningRotation):
    """Context-aware rotary position embedding: every head turns at a rate that the token sets.

    Args:
        embed_dim: C, the width of x.
        num_heads: H.
        head_dim: D, even; embed_dim / num_heads if None.
        num_kv_heads: G, heads of k; the rates are theirs. H if None.
        base: the RoPE that init="rope" starts from.
        init: "rope" (W = 0 and a bias, exactly RoPE) or "paper" (W ~ N(0, 0.02), no bias).
        first_power: 0 (bands f^0 .. f^(D/2-1)) or 1 (f^1 .. f^(D/2)).
        source: "layer" reads the attention module's own input. "token" reads the token embeddings:
            inside GPT one CARoPE serves all layers; alone, the module's input is all there is, and
            both read it.
        shared: one rate a token for all heads, W (C, 1) and one bias.

    Raises:
        ValueError: for an odd head dim, heads that do not divide, or an unknown option.
    """

    no_weight_decay = frozenset({"weight", "bias"})

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        base: float = 10000.0,
        init: Literal["rope", "paper"] = "rope",
        first_power: int = 0,
        source: Literal["layer", "token"] = "layer",
        shared: bool = False,
    ) -> None:
        super().__init__()
        head_dim = check_heads(embed_dim, num_heads) if head_dim is None else head_dim
        check_sizes("CARoPE", embed_dim=embed_dim, num_heads=num_heads)
        check_head_dim(head_dim, "CARoPE")
        check_base(base)
        if init not in ("rope", "paper"):
            raise ValueError(unknown("CARoPE init", init, ("rope", "paper")))
        if source not in ("layer", "token"):
            raise ValueError(unknown("CARoPE source", source, ("layer", "token")))
        if first_power not in (0, 1):
            raise ValueError(f"first_power must be 0 or 1; got {first_power}.")
        self.num_heads, self.head_dim, self.base = num_heads, head_dim, base
        self.num_kv_heads = check_kv_heads(num_heads, num_kv_heads)
        self.init, self.first_power, self.source = init, first_power, source
        self.embed_dim = embed_dim
        self.shared = shared
        rates = 1 if shared else self.num_kv_heads
        self.weight = self.float32_parameter(embed_dim, rates)
        self.bias = self.float32_parameter(rates) if init == "rope" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.bias is None:
            nn.init.normal_(self.weight, std=0.02)
        else:
            nn.init.zeros_(self.weight)
            # softplus(bias) = y with 1 + y = base^(2/D), hence f = base^(-2/D). The bias is
            # log(e^y - 1), written so that a large y cannot overflow.
            y = math.expm1(2 * math.log(self.base) / self.head_dim)
            nn.init.constant_(self.bias, y + math.log(-math.expm1(-y)))

    def rotation(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> ByRates:
        x = check_tokens("CARoPE", x, place.length, self.embed_dim)
        tokens = x, self.weight, self.bias, self.num_kv_heads
        return ByRates(*tokens, self.head_dim // 2, self.first_power, place.here, state)

    def streams(self) -> dict[str, Stream]:
        return {"phase": Stream((self.num_kv_heads, self.head_dim // 2), torch.float64, history=1)}

    def cost(self, s: Sizes) -> Part:
        """z = x W: C G (+ G) parameters, N C G multiply-adds, of one head if shared; then for every
        token, key head and pair an exponential, an addition, a sine and a cosine; and the rotation.

        Its parameters are never below fp32; state the phase, G D/2 in fp64.
        """
        sines = Part(elementwise=s.N * s.G * s.D)
        return self.phase_cost(s) + sines + rotation(s, s.D)

    def phase_cost(self, s: Sizes) -> Part:
        """The same without turning q and k."""
        rates = self.weight.shape[1]
        return (
            weights((s.C + (self.bias is not None)) * rates, s.precise)
            + product(s.N * s.C * rates)
            + Part(elementwise=s.N * s.G * s.D)  # exponential, addition
            + state(self.streams().values(), s, read=1)
        )

    def replaces(self, s: Sizes) -> bool:
        return True

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.weight.shape[0]}, num_heads={self.num_heads}, "
            f"head_dim={self.head_dim}, base={self.base}, init={self.init!r}, "
            f"first_power={self.first_power}, source={self.source!r}, shared={self.shared}"
        )


class SharedPhase(Encoding):
    """A layer's part of CARoPE(source="token"): rotates by phases that the model computed once.

    Its `x`, the phase that a model shares, is what `CARoPE.phases` made of the token embeddings:
    (B, G, T, D/2).
    """

    reads_phase = True
    reads_positions = False

    def rotation(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> ByPhase:
        assert x is not None
        return ByPhase(x)

    def cost(self, s: Sizes) -> Part:
        """A layer's share: sine and cosine of the phase, and the rotation.

        No kernel does it: it keeps phase, sine and cosine, fp32 or better, and q and k in that
        dtype.
        """
        angles = (3 if s.e < 8 else 2) * s.N * s.G * s.D // 2  # fp64 layers share the phase
        sines = Part(elementwise=s.N * s.G * s.D, saved_bytes=angles * s.precise)
        return rotation_by_angles(s) + sines

    def replaces(self, s: Sizes) -> bool:
        return s.e < 4  # by copies
