"""PoPE: polar coordinate position embedding (arXiv 2509.10534).

    score[m, n] = sum over c < D of sp(q_c) sp(k_c) cos( (n - m) theta_c + delta[h,c] ) / sqrt(D)
    q'[m] = sp(q) (cos, sin)(m theta - delta),   k'[n] = sp(k) (cos, sin)(n theta)
    sp(z) = log(1 + e^z),   theta_c = base^(-c/D), c = 0 .. D-1,   delta (H, D)

Every feature is a magnitude, and position alone its angle: content and position do not mix. q' and
k' are 2D wide, v stays D; the scale is 1/sqrt(D). q = k = 0 does not score 0 but up to sqrt(D)
(ln 2)^2. Acts on q and k after the projections; k' is cached, 2D wide, no further state.

The paper is known at second hand: two implementations (lucidrains/PoPE-pytorch, x-transformers) and
two accounts, which agree on the formula and on this scale; the paper's own scale is unread. They
put delta on k, clamped to [-2 pi, 0]. Ours: delta on q, per query head (the same for as many key
heads), and unclamped: the cosine is periodic, and a clamp has no gradient above 0, its start.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from posenc.accounting import Part, Sizes, product, state, weights
from posenc.cache import Cache, Stream
from posenc.checks import check_base, check_sizes
from posenc.encodings.base import Encoding
from posenc.phase import Float32Parameters, phase_dtype
from posenc.placement import Placement
from posenc.rates import softplus
from posenc.rotations import Spectrum, Turned, plain_spectrum
from posenc.scores import Scores


def directions(angle: Tensor) -> Tensor:
    """(cos, sin): (.., D) -> (.., 2, D)."""
    return torch.stack((angle.cos(), angle.sin()), dim=-2)


def polar(x: Tensor, towards: Tensor) -> Tensor:
    """sp(x) (cos, sin): x (B, H, T, D), directions broadcastable to (B, H, T, 2, D) -> (B, H, T,
    2D), all cosines before the sines.
    """
    magnitude = softplus(x.to(towards.dtype))
    return (magnitude.unsqueeze(-2) * towards).flatten(-2).to(x.dtype)


class ByMagnitude(NamedTuple):
    """Magnitudes at the angle of the position, that of q less delta: PoPE. Twice as wide."""

    place: Placement
    spectrum: Spectrum
    delta: Tensor  # (H, D)

    def apply(self, q: Tensor | None, k: Tensor | None) -> Turned:
        one = q if q is not None else k
        assert one is not None
        dtype, key = phase_dtype(one), self.spectrum.key
        angle = self.place.once(
            (key, "phase", dtype), lambda: self.spectrum.phases(self.place).to(dtype)
        )
        if q is not None:
            of_heads = angle - self.delta.to(dtype).unsqueeze(-2)  # (H, T, D) or (B, H, T, D)
            q = polar(q, directions(of_heads))
        if k is not None:
            k = polar(k, self.place.once((key, "directions", dtype), lambda: directions(angle)))
        return q, k


class PoPE(Float32Parameters, Encoding):
    """Polar coordinate position embedding: magnitudes from the content, angles from the position.

    Args:
        num_heads: H.
        head_dim: D, which may be odd.
        base: of the D frequencies.

    Raises:
        ValueError: for sizes below 1, or a base of 1 or less.
    """

    no_weight_decay = frozenset({"delta"})
    widening = 2

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        base: float = 10000.0,
    ) -> None:
        super().__init__()
        check_sizes("PoPE", num_heads=num_heads, head_dim=head_dim)
        check_base(base)
        self.num_heads, self.head_dim, self.base = num_heads, head_dim, base
        self.delta = self.float32_parameter(num_heads, head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.delta)

    def rotation(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> ByMagnitude:
        return ByMagnitude(place, plain_spectrum(2 * self.head_dim, self.base), self.delta)

    def scores(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> Scores:
        return Scores(scale=self.head_dim**-0.5)

    def cost(self, s: Sizes) -> Part:
        """delta: H D parameters, never below fp32. For every feature of q and of k an exponential
        and two products; sines and cosines of T D angles for k, of H times as many for q. The
        products of q' and k' are twice as wide: B P H D multiply-adds more, and G D of state.

        Keeps q' and k', and padded to their width v and o; of q the magnitudes and angles, of both
        the sines and cosines, and in half precision a copy.
        """
        pairs, angles = s.B * s.pairs, s.T * s.D
        kept = s.N * s.inner + angles * (2 + 3 * s.H) + (s.N * s.turned if s.e < 4 else 0)
        return (
            weights(s.inner, s.precise)
            + product(pairs * s.inner, kept=pairs * s.A * s.D)
            + Part(elementwise=3 * s.N * s.turned + angles * (2 + 3 * s.H))
            + Part(saved_bytes=4 * s.N * s.turned * s.e + kept * s.precise)
            + state((Stream((s.G, s.D)),), s, read=s.seen)
        )

    def replaces(self, s: Sizes) -> bool:
        return s.e < 4  # by copies

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, base={self.base}"
