"""FoPE: Fourier position embedding (arXiv 2412.17739).

    F bands      omega_i = base^(-2i/D) >= 2 pi / length, those that turn once within `length`
    A_i[m]       = sum_f a[h,f,i] cos(m omega_f),   S_i[m] = sum_f s[h,f,i] sin(m omega_f)
    pair i < F   (x1, x2) -> (x1 A - x2 S,  x2 A + x1 S), q and k alike; the others stand still
    score[m, n]  = q'[m] . k'[n] / sqrt(D)

Each band is a series about its own frequency: a, s (G, F, F) are the identity plus fixed noise,
frozen parameters. With a = s = 1 it is RoPE whose slow bands stand still. Not a rotation: norms
change, and a score depends on both positions, not on their distance alone. Acts on q and k after
the projections, v untouched; turned keys are cached, no further state.

Disagreement: the authors' code gives a series to min(F, D/4) pairs and sets A and S of the others
to 1, a turn by 45 degrees that doubles their scores. Ours gives one to all F pairs, and lets the
others stand (A = 1, S = 0), as a frequency of zero means.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posenc.accounting import Part, Sizes, product, rotation, weights
from posenc.cache import Cache
from posenc.checks import check_base, check_head_dim, check_kv_heads, check_sizes
from posenc.encodings.base import Encoding
from posenc.phase import Float32Parameters, phase_dtype, repeat_heads, turn
from posenc.placement import Placement
from posenc.rotations import Spectrum, Turned, plain_spectrum


def turning_bands(head_dim: int, base: float, length: int) -> int:
    """F: of the frequencies base^(-2i/D) those that turn at least once in `length` tokens."""
    slowest = 2 * math.pi / length
    return sum(base ** (-2 * i / head_dim) >= slowest for i in range(head_dim // 2))


def series_factors(
    cos: Tensor, sin: Tensor, cos_series: Tensor, sin_series: Tensor, pairs: int
) -> tuple[Tensor, Tensor]:
    """What `turn` multiplies each feature and its partner by.

    Args:
        cos, sin: of the bands, (T, F) or (B, 1, T, F) in fp64. cos_series, sin_series: (G, F, F).
        pairs: D/2; those beyond F stand still.

    Returns:
        (G, T, D) or (B, G, T, D) each, in fp64: T G F^2 multiply-adds, which neither TF32 nor
        autocast can reach.
    """
    a, s = cos @ cos_series.double(), sin @ sin_series.double()
    still = (0, pairs - a.shape[-1])
    a, s = F.pad(a, still, value=1.0), F.pad(s, still)
    return torch.cat((a, a), dim=-1), torch.cat((-s, s), dim=-1)


class BySeries(NamedTuple):
    """Each pair by a series of cosines and one of sines: FoPE."""

    place: Placement
    spectrum: Spectrum
    cos_series: Tensor  # (G, F, F)
    sin_series: Tensor
    pairs: int

    def _bands(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the F bands, which all layers share."""
        phase = self.spectrum.phases(self.place)[..., : self.cos_series.shape[-1]]
        return phase.cos(), phase.sin()

    def apply(self, q: Tensor | None, k: Tensor | None) -> Turned:
        one = q if q is not None else k
        assert one is not None
        key = (self.spectrum.key, "bands", self.cos_series.shape[-1])
        bands = self.place.once(key, self._bands)
        made = series_factors(*bands, self.cos_series, self.sin_series, self.pairs)
        cos, sin = (factor.to(phase_dtype(one)) for factor in made)
        if q is not None:
            of_heads, of_sines = (repeat_heads(x, q.shape[1], dim=-3) for x in (cos, sin))
            q = turn(q, of_heads, of_sines)
        return q, None if k is None else turn(k, cos, sin)


class FoPE(Float32Parameters, Encoding):
    """Fourier position embedding: every band of RoPE becomes a fixed series of all of them.

    Args:
        num_heads: H.
        head_dim: D, even.
        num_kv_heads: G, heads of k; the series are theirs. H if None.
        length: of the texts, which says how many bands turn; inside GPT its context.
        base: of RoPE's frequencies.

    Raises:
        ValueError: for an odd head dim, heads that do not divide, or a length below 7, in which no
            band turns once.
    """

    no_weight_decay = frozenset({"cos_series", "sin_series"})
    relative = False
    context_option = "length"

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        length: int = 512,
        base: float = 10000.0,
    ) -> None:
        super().__init__()
        check_sizes("FoPE", num_heads=num_heads, length=length)
        check_head_dim(head_dim, "FoPE")
        check_base(base)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.length, self.base = length, base
        self.num_kv_heads = check_kv_heads(num_heads, num_kv_heads)
        self.bands = turning_bands(head_dim, base, length)
        if not self.bands:
            raise ValueError(
                f"FoPE needs a length of at least 7, the period of its fastest band; got {length}. "
                "Give length=, or the model a larger context."
            )
        shape = (self.num_kv_heads, self.bands, self.bands)
        self.cos_series = self.float32_parameter(*shape).requires_grad_(False)
        self.sin_series = self.float32_parameter(*shape).requires_grad_(False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # 0.3 is the authors' at 60M parameters; they take 0.4 and 0.6 for larger models.
        std = 0.3 * math.sqrt(2 / (self.bands * (self.bands + self.num_heads)))
        for series in (self.cos_series, self.sin_series):
            nn.init.normal_(series, std=std)
            series.diagonal(dim1=-2, dim2=-1).add_(1)

    def rotation(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> BySeries:
        spectrum = plain_spectrum(self.head_dim, self.base)
        return BySeries(place, spectrum, self.cos_series, self.sin_series, self.head_dim // 2)

    def cost(self, s: Sizes) -> Part:
        """2 G F^2 frozen parameters, F bands; a cosine and a sine for each position and band, 2 T G
        F^2 multiply-adds, and the rotation. Keeps A and S of each key head, and of each query head
        where these are more.
        """
        series = self.num_kv_heads * self.bands**2
        heads = s.G if s.G == s.H else s.G + s.H
        return (
            weights(2 * series, s.precise)
            + product(2 * s.T * series, gradients=0)
            + Part(elementwise=2 * s.T * self.bands)
            + Part(saved_bytes=2 * s.T * heads * s.D * s.precise)
            + rotation(s, s.D)
        )

    def replaces(self, s: Sizes) -> bool:
        return True

    def extra_repr(self) -> str:
        sizes = f"num_heads={self.num_heads}, head_dim={self.head_dim}"
        return f"{sizes}, length={self.length}, base={self.base}, bands={self.bands}"
