"""Relative position in the logits: Transformer-XL (arXiv 1901.02860) and RCMHA's learned form
(arXiv 2308.03429).

    learned      score[m,n] = ( (q[m] + u_h).k[n] + q[m].R[h,d] + S[h,d] ) / sqrt(D)
                 R (H,P,D), S (H,P), u (H,D)
    sinusoidal   score[m,n] = ( (q[m] + u_h).k[n] + (q[m] + v_h).(W_R r[d])_h ) / sqrt(D)
                 u, v (H,D), W_R (H*D,C), r[t] = concat(sin(t w), cos(t w)), not learned
                 w_j = 10000^(-2j/C), j = 0 .. C/2-1
    d = m - n >= 0; in the learned form distances of P = max_distance and beyond use the last row.
    not causal: d = -(P-1) .. P-1, R (H,2P-1,D), S (H,2P-1), row P-1 the distance 0

Acts in the logits only; values are untouched, and there is no absolute position beside it. Every
term is divided by sqrt(D). RCMHA's code holds 2 * 4096 rows a layer, of which a causal model can
reach half; ours holds P. Its tables start at 0, Transformer-XL's u and v at N(0, 0.02) (there one
pair for all layers, here one a layer). Raw keys are cached; no further state.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from posenc.accounting import Part, Sizes, product, weights
from posenc.cache import Cache
from posenc.checks import check_causal, check_even, check_sizes
from posenc.encodings.base import Encoding
from posenc.errors import unknown
from posenc.linear import effective_weight, floating_dtype
from posenc.phase import inverse_frequencies, pairs, position_phases
from posenc.placement import Placement
from posenc.scores import RelativeTerm, Scores


def sinusoid(distances: Tensor, embed_dim: int) -> Tensor:
    """r[t] = concat(sin(t w), cos(t w)) for integer t (N,): (N, C) in fp64."""
    phase = position_phases(distances, inverse_frequencies(embed_dim, 10000.0, distances.device))
    return torch.cat((phase.sin(), phase.cos()), dim=-1)


def distances(positions: Tensor, key_positions: Tensor) -> Tensor:
    """positions (T,) or (B, T) less key_positions (S,) or (B, S): (T, S) or (B, 1, T, S)."""
    apart = positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    return apart if apart.ndim == 2 else apart.unsqueeze(1)


def factors(
    query: Tensor, weight: Tensor, positions: Tensor, key_positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Vectors whose products are query[m] . (W_R r[m - n])_h, for any integer positions.

    sin and cos of a difference split into products, so r[m - n] turns W_R^T query by m and meets a
    data-free key. No table of distances, and no limit to them.

    Args:
        query: (B, H, T, D); weight: W_R (H*D, C); positions: (T,) or (B, T); key_positions: (S,) or
            (B, S).

    Returns:
        (B, H, T, C), and (S, C) or (B, 1, S, C).
    """
    heads, embed_dim = query.shape[1], weight.shape[1]
    frequencies = inverse_frequencies(embed_dim, 10000.0, query.device)
    angle = position_phases(positions, frequencies)
    cos, sin = angle.cos().to(query.dtype), angle.sin().to(query.dtype)
    on_sin, on_cos = pairs(query @ weight.unflatten(0, (heads, -1)))  # (B, H, T, C/2) each
    turned = torch.cat((on_sin * sin + on_cos * cos, on_cos * sin - on_sin * cos), dim=-1)
    key_angle = position_phases(key_positions, frequencies)
    return turned, torch.cat((key_angle.cos(), key_angle.sin()), dim=-1).to(query.dtype)


class Relative(Encoding):
    """Relative scores of the query with a table of distances.

    Args:
        num_heads: H.
        head_dim: D.
        kind: "learned" (RCMHA; Transformer-XL's attn_type 1) or "sinusoidal" (Transformer-XL's
            paper).
        max_distance: P, rows of the learned table; required there. The sinusoidal form has no limit
            and ignores it.
        embed_dim: C, width of the sinusoid, even; H*D if None.
        causal: distances from 0 on; else the learned table has rows for both sides.

    Raises:
        ValueError: for an unknown kind, a missing or non-positive max_distance, an odd embed_dim.
    """

    in_logits = True
    context_option = "max_distance"

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        kind: Literal["learned", "sinusoidal"] = "learned",
        max_distance: int | None = None,
        embed_dim: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        check_sizes("Relative", num_heads=num_heads, head_dim=head_dim)
        if kind not in ("learned", "sinusoidal"):
            raise ValueError(unknown("Relative kind", kind, ("learned", "sinusoidal")))
        if kind == "learned" and (max_distance is None or max_distance < 1):
            raise ValueError(
                f"Relative(kind='learned') needs max_distance of at least 1; got {max_distance}."
            )
        self.num_heads, self.head_dim, self.kind = num_heads, head_dim, kind
        self.max_distance, self.causal = max_distance, check_causal(causal)
        self.sinusoid_dim = num_heads * head_dim if embed_dim is None else embed_dim
        self.u = nn.Parameter(torch.empty(num_heads, head_dim))
        if kind == "learned":
            assert max_distance is not None
            rows = max_distance if causal else 2 * max_distance - 1
            self.R = nn.Parameter(torch.empty(num_heads, rows, head_dim))
            self.S = nn.Parameter(torch.empty(num_heads, rows))
        else:
            who = "Relative(kind='sinusoidal') needs an even embed_dim"
            check_even(self.sinusoid_dim, who, "Choose an even one.")
            self.v = nn.Parameter(torch.empty(num_heads, head_dim))
            self.W_R = nn.Linear(self.sinusoid_dim, num_heads * head_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.kind == "learned":
            for table in (self.R, self.S, self.u):
                nn.init.zeros_(table)
        else:
            for bias in (self.u, self.v):
                nn.init.normal_(bias, std=0.02)
            self.W_R.reset_parameters()

    def scores(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> Scores:
        positions, keys, apart = place.positions, place.keys, None
        if keys is not None:
            apart = place.once("distances", partial(distances, positions, keys))
        if self.kind == "learned":
            sides = not self.causal
            term = RelativeTerm(self.R, offset=self.S, distances=apart, two_sided=sides)
            return Scores(content=self.u, relative=term)
        if keys is None:
            keys = torch.arange(place.key_length, device=positions.device)
            positions = keys[place.key_length - place.length :]

        def factored(query: Tensor) -> tuple[Tensor, Tensor]:
            weight = effective_weight(self.W_R, self.sinusoid_dim, query)
            return factors(query, weight, positions, keys)

        term = RelativeTerm(
            self._rows,
            query=self.v,
            distances=apart,
            factors=factored,
            width=self.sinusoid_dim,
            two_sided=not self.causal,
        )
        return Scores(content=self.u, relative=term)

    def _rows(self, length: int) -> Tensor:
        """A projected row of the sinusoid for each of `length` distances: (H, length, D)."""
        r = sinusoid(torch.arange(length, device=self.u.device), self.sinusoid_dim)
        rows = self.W_R(r.to(floating_dtype(self.W_R)))
        return rows.unflatten(-1, (self.num_heads, self.head_dim)).transpose(0, 1)

    def cost(self, s: Sizes) -> Part:
        """learned: R, S and u, P' (H D + H) + H D parameters for P' rows, of which those of S
        distances at most are read; q.R: B P H D multiply-adds.

        sinusoidal, W the sinusoid's width: W H D + 2 H D parameters; W_R r for S distances: S W H
        D, without a gradient to r, and as above B P H D. While decoding fewer than D tokens, and
        where not causal, the sinusoid splits into products: N H D W + B P H W. Keeps r and W_R r.
        (H = 1, which the kernels split too, keeps more.)
        """
        by_distance = product(s.B * s.pairs * s.inner, kept=s.B * s.pairs * s.A * s.D)
        if self.kind == "learned":
            rows, width = self.R.shape[1], s.inner + s.H
            tables = weights(rows * width, s.e, read=min(rows, s.seen) * width)
            return tables + weights(s.inner, s.e) + by_distance
        width = self.sinusoid_dim
        part = weights(width * s.inner + 2 * s.inner, s.e)
        if min(s.S, s.D) > s.T or not self.causal:
            angles = (s.T + s.S) * width
            on_sines = product(s.N * s.inner * width, kept=s.N * s.A * s.D * width)
            pairs = s.B * s.pairs * width
            factored = product(pairs * s.H, pairs * s.A, gradients=1)
            return part + Part(elementwise=angles) + on_sines + factored
        saved = s.S * (width + s.inner) * s.e
        rows_made = Part(elementwise=s.S * width, saved_bytes=saved)
        return part + rows_made + product(s.S * width * s.inner, gradients=1) + by_distance

    def extra_repr(self) -> str:
        sizes = f"num_heads={self.num_heads}, head_dim={self.head_dim}"
        return (
            f"{sizes}, kind={self.kind!r}, max_distance={self.max_distance}, causal={self.causal}"
        )
