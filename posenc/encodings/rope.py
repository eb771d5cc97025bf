"""RoPE: rotary position embedding (arXiv 2104.09864).

    q'[m] = R(m omega) q[m],   k'[n] = R(n omega) k[n],   omega_i = base^(-2i/D)
    score[m, n] = q'[m] . k'[n] / sqrt(D), a function of m - n

Acts on q and k after the projections; v is untouched; no parameters. Rotated keys are cached.
Pairs are half-split (i, i + D/2) as in GPT-NeoX and Llama, or interleaved (2i, 2i + 1) as in GPT-J
and the paper; the two agree when the features of q and k are permuted alike.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from posenc.cache import Cache
from posenc.checks import check_base, check_head_dim
from posenc.encodings.base import Encoding
from posenc.encodings.scaling import scaled_frequencies
from posenc.errors import unknown
from posenc.phase import PAIRINGS, Pairing
from posenc.placement import Placement
from posenc.rotations import ByPosition, Spectrum


class RoPE(Encoding):
    """Rotary position embedding.

    Args:
        head_dim: D, even, at least 2.
        base: of the geometric frequencies.
        pairing: "half" (GPT-NeoX, Llama in Hugging Face) or "interleaved" (GPT-J, the paper).
        rotary_dim: rotate only the first so many features (even, at most D); frequencies use it in
            place of D.
        scaling: a mapping for longer texts, see `posenc.encodings.scaling`.

    Raises:
        ValueError: for an odd or too large size, an unknown pairing or scaling.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        pairing: Pairing = "half",
        rotary_dim: int | None = None,
        scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_head_dim(head_dim, "RoPE")
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
            raise ValueError(
                f"rotary_dim must be even, between 2 and head_dim={head_dim}; got {rotary_dim}."
            )
        if pairing not in PAIRINGS:
            raise ValueError(unknown("pairing", pairing, PAIRINGS))
        check_base(base)
        scaled_frequencies(
            rotary_dim, base, scaling
        )  # a bad scaling fails here, not in the first forward
        self.head_dim, self.rotary_dim = head_dim, rotary_dim
        self.base, self.pairing = base, pairing
        self.scaling = None if scaling is None else dict(scaling)

    def frequencies(self, device: torch.device | None = None) -> tuple[Tensor, float]:
        """The frequencies (R/2,) in fp64, and the factor of cosine and sine."""
        return scaled_frequencies(self.rotary_dim, self.base, self.scaling, device)

    def rotation(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> ByPosition:
        scaling = None if self.scaling is None else repr(self.scaling)
        key = ("rope", self.rotary_dim, self.base, scaling)
        return ByPosition(place, Spectrum(key, self.frequencies), self.pairing)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, base={self.base}, pairing={self.pairing!r}, "
            f"rotary_dim={self.rotary_dim}, scaling={self.scaling}"
        )


def half_to_interleaved(weight: Tensor, num_heads: int, rotary_dim: int | None = None) -> Tensor:
    """Permute rows of a q or k projection (H*D, C): interleaved RoPE then scores as half-split.

    `rotary_dim` is RoPE's: rows beyond it stay in place. A bias (H*D,) is permuted alike.
    """
    return _permute(weight, num_heads, rotary_dim, (2, -1))


def interleaved_to_half(weight: Tensor, num_heads: int, rotary_dim: int | None = None) -> Tensor:
    """The inverse of `half_to_interleaved`."""
    return _permute(weight, num_heads, rotary_dim, (-1, 2))


def _permute(
    weight: Tensor, num_heads: int, rotary_dim: int | None, pairs: tuple[int, int]
) -> Tensor:
    heads = weight.unflatten(0, (num_heads, -1))  # (H, D, ..)
    turned, rest = (
        heads[:, :rotary_dim],
        heads[:, heads.shape[1] if rotary_dim is None else rotary_dim :],
    )
    turned = turned.unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
    return torch.cat((turned, rest), dim=1).flatten(0, 1)
