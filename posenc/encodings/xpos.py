"""xPos: extrapolatable position embedding (arXiv 2212.10554).

    q' = zeta_i^(m/s) R(m omega_i) q,   k' = zeta_i^(-n/s) R(n omega_i) k,   s = scale_base
    score[m, n] = sum over i of zeta_i^((m-n)/s) (R(m omega_i) q_i) . (R(n omega_i) k_i) / sqrt(D)
    omega_i = base^(-2i/D),   zeta_i = (2i + 0.4 D) / (1.4 D) < 1,   i = 0 .. D/2-1

RoPE whose pairs fade with the distance, the fastest ones fastest; no parameters. Pairs are
half-split (the authors' are interleaved). Implementations centre the exponent at half the current
length, which cancels in a score but not against cached keys. Ours: no centre at all. What is cached
is R(n omega) k without its power, which alone would overflow (fp16 from n = 4,532 on, fp32 from
36,260); the powers are part of the logits (`posenc.fading`), about a position near the query. So
`rotate` turns as RoPE does, and `score_mod` has the powers.
"""

import math

import torch
from torch import Tensor

from posenc.accounting import Part, Sizes, rotation
from posenc.cache import Cache
from posenc.checks import check_base, check_causal, check_head_dim
from posenc.encodings.base import Encoding
from posenc.fading import Fading
from posenc.placement import Placement
from posenc.rotations import ByPosition, plain_spectrum
from posenc.scores import Scores


class XPos(Encoding):
    """RoPE whose scores fade with the distance.

    Positions may be anything; those given to one call with gaps of more than 18,000 (fp16: 2,200;
    in proportion to scale_base) between its queries need to be looked at: on CPU, not compiled.
    Elsewhere such a call is wrong; padding and long texts are not concerned.

    Args:
        head_dim: D, even.
        base: of RoPE's frequencies.
        scale_base: s, tokens in which a pair fades by zeta_i: the fastest to 0.29.
        causal: must be True.

    Raises:
        ValueError: for an odd head dim, a scale_base that is not a positive number, or
            causal=False: towards later keys the powers would grow.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        scale_base: float = 512,
        causal: bool = True,
    ) -> None:
        super().__init__()
        check_head_dim(head_dim, "XPos")
        check_base(base)
        if not isinstance(scale_base, int | float) or not 0 < scale_base < math.inf:
            raise ValueError(
                f"scale_base must be a finite number above 0, tokens; got {scale_base}."
            )
        if not check_causal(causal):
            raise ValueError(
                "XPos has no meaning with causal=False: later keys would grow with their distance; "
                "got causal=False. Use RoPE."
            )
        self.head_dim, self.base = head_dim, base
        self.scale_base, self.causal = scale_base, causal

    def rates(self, device: torch.device | None = None) -> Tensor:
        """How fast features fade, -log(zeta) / s: (D,) in fp64."""
        pairs = torch.arange(self.head_dim // 2, dtype=torch.float64, device=device)
        zeta = (2 * pairs + 0.4 * self.head_dim) / (1.4 * self.head_dim)
        return (-zeta.log() / self.scale_base).repeat(2)

    def rotation(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> ByPosition:
        return ByPosition(place, plain_spectrum(self.head_dim, self.base))

    def scores(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> Scores:
        key = ("xpos", self.head_dim, self.scale_base)
        return Scores(fading=Fading(key, self.rates, math.log(3.5) / self.scale_base))

    def cost(self, s: Sizes) -> Part:
        """The rotation, a sine and a cosine for each position and pair; an exponential for each
        query and key and feature, which are kept, and q and k times these, k from the cache on.
        """
        features = (s.T + s.S) * s.D + s.B * (s.T * s.H + s.S * s.G) * s.D
        kept = (s.T + s.S) * s.D * s.precise
        return rotation(s, s.D) + Part(elementwise=s.T * s.D + features, saved_bytes=kept)

    def replaces(self, s: Sizes) -> bool:
        return True

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, base={self.base}, scale_base={self.scale_base}"
