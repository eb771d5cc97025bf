"""RoPE: rotary position embedding (arXiv 2104.09864).

    q'[m] = R(m omega) q[m],   k'[n] = R(n omega) k[n],   omega_i = base^(-2i/D)
    score[m, n] = q'[m] . k'[n] / sqrt(D), a function of m - n

Acts on q and k after the projections; v is untouched; no parameters. Rotated keys are cached.
Pairs are half-split (i, i + D/2) as in GPT-NeoX and Llama, or interleaved (2i, 2i + 1) as in GPT-J
and the paper; the two agree when the features of q and k are permuted alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from posenc.accounting import Part, Sizes, rotation
from posenc.cache import Cache
from posenc.checks import check_base, check_head_dim
from posenc.encodings.base import Encoding
from posenc.encodings.configs import rope_arguments
from posenc.encodings.scaling import read_mapping, scaled_frequencies
from posenc.errors import unknown
from posenc.phase import PAIRINGS, Layout, Pairing, inverse_frequencies
from posenc.placement import Placement
from posenc.rotations import ByPosition, Spectrum

Partial = Literal["front", "proportional"]
PARTIALS: tuple[str, ...] = get_args(Partial)
Layouts = Literal["blocks", "sections", "interleaved"]
LAYOUTS: tuple[str, ...] = get_args(Layouts)


class RoPE(Encoding):
    """Rotary position embedding.

    Args:
        head_dim: D, even, at least 2.
        base: of the geometric frequencies; None is the scaling's rope_theta, else 10000.
        pairing: "half" (GPT-NeoX, Llama in Hugging Face) or "interleaved" (GPT-J, the paper).
        rotary_dim: R, rotate only so many features (even, at most D); None is D, or what the
            scaling's partial_rotary_factor makes of it.
        partial: which ones; None is the mapping's, else "front". "front": the first R, frequencies
            use R in place of D. "proportional" (p-RoPE, arXiv 2410.06205): the R/2 fastest pairs of
            the whole head, at its frequencies; the others stand still.
        scaling: a mapping for longer texts, see `posenc.encodings.scaling`. Whatever it holds is
            used or refused.
        axes: features of each of A axes (even, in all rotary_dim); positions are then (T, A) or
            (B, T, A): images, video. None is one axis, positions without that dimension.
        layout: which features turn with which axis, see `axis_of_pairs`.
        continuous: positions may be floating-point numbers; negative ones are then no padding.

    Raises:
        ValueError: for an odd or too large size, an unknown pairing, scaling or layout, axes that
            do not add up or have no place in the layout.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float | None = None,
        pairing: Pairing = "half",
        rotary_dim: int | None = None,
        partial: Partial | None = None,
        scaling: Mapping[str, Any] | None = None,
        axes: Sequence[int] | None = None,
        layout: Layouts = "blocks",
        continuous: bool = False,
    ) -> None:
        super().__init__()
        check_head_dim(head_dim, "RoPE")
        if partial not in (None, *PARTIALS):
            raise ValueError(unknown("RoPE partial", partial, PARTIALS))
        mapped = read_mapping(head_dim, base, rotary_dim, partial, scaling)
        base, rotary_dim = mapped.base, mapped.rotary_dim
        least = 0 if mapped.partial == "proportional" else 2
        whole = isinstance(rotary_dim, int)
        if not whole or rotary_dim < least or rotary_dim % 2 or rotary_dim > head_dim:
            raise ValueError(
                f"rotary_dim must be even, between {least} and head_dim={head_dim}; "
                f"got {rotary_dim}."
            )
        if pairing not in PAIRINGS:
            raise ValueError(unknown("pairing", pairing, PAIRINGS))
        check_base(base)
        self.head_dim, self.rotary_dim, self.partial = head_dim, rotary_dim, mapped.partial
        self.base, self.pairing, self.scaling = base, pairing, mapped.scaling
        if axes is None and layout != "blocks":
            raise ValueError(
                f"layout={layout!r} says which features turn with which axis; got axes=None. "
                "Give axes=, the features of each."
            )
        if axes is not None and not isinstance(axes, Sequence):
            raise ValueError(f"axes must be numbers of features, one an axis; got {axes!r}.")
        self.axes = None if axes is None else tuple(axes)
        self.layout, self.continuous = layout, continuous
        self.axes_count = None if self.axes is None else len(self.axes)
        if layout not in LAYOUTS:
            raise ValueError(unknown("RoPE layout", layout, LAYOUTS))
        self._axis = None
        if self.axes is not None:
            self._axis = axis_of_pairs(self.axes, layout, rotary_dim)
            if layout == "blocks" and self.scaling is not None:
                raise ValueError(
                    "layout='blocks' has a spectrum of its own for each axis, which no scaling "
                    "describes; got scaling. Use layout='sections' or 'interleaved', or base."
                )
        self.frequencies()  # a bad scaling fails here, not in the first forward

    @classmethod
    def from_config(
        cls, config: Any, layer_type: str | None = None, *, target_length: int | None = None
    ) -> "RoPE":
        """The RoPE that a Hugging Face text config describes, see `posenc.encodings.configs`.

        Args:
            config: of a model (its text part is taken), or the mapping of a config.json.
            layer_type: one of the config's layer_types, for models whose types turn differently
                (Gemma 3: "sliding_attention", "full_attention").
            target_length: of the texts that "dynamic" and "longrope" are for; None: they fit into
                the original length.

        Raises:
            ValueError: for a layer_type that the config does not have or that turns nothing, none
                where types differ; for values that make no RoPE, or one of another formula. Keys
                that a rope_type does not use are named in a warning.
        """
        return cls(**rope_arguments(config, layer_type, target_length))

    def frequencies(self, device: torch.device | None = None) -> tuple[Tensor, float]:
        """The frequencies (R/2,) in fp64, and the factor of cosine and sine."""
        if self.axes is not None and self.layout == "blocks":
            blocks = [inverse_frequencies(width, self.base, device) for width in self.axes]
            return torch.cat(blocks), 1.0
        if self.partial == "front":
            return scaled_frequencies(self.rotary_dim, self.base, self.scaling, device)
        frequencies, factor = scaled_frequencies(self.head_dim, self.base, self.scaling, device)
        turning = torch.arange(self.head_dim // 2, device=device) < self.rotary_dim // 2
        return frequencies * turning, factor

    def rotation(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> ByPosition:
        scaling = None if self.scaling is None else repr(self.scaling)
        key = ("rope", self.rotary_dim, self.base, scaling, self.partial, self.axes, self.layout)
        blocks = self.axes is not None and self.layout == "blocks" and self.pairing == "half"
        pairing: Layout = self.axes if blocks and self.axes is not None else self.pairing
        return ByPosition(place, Spectrum(key, self.frequencies, self._axis), pairing)

    def cost(self, s: Sizes) -> Part:
        """The rotation; a sine and a cosine for each position and pair of rotary_dim features."""
        return rotation(s, self.rotary_dim) + Part(elementwise=s.T * self.rotary_dim)

    def replaces(self, s: Sizes) -> bool:
        return True

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, base={self.base}, pairing={self.pairing!r}, "
            f"rotary_dim={self.rotary_dim}, scaling={self.scaling}"
            + ("" if self.partial == "front" else f", partial={self.partial!r}")
            + ("" if self.axes is None else f", axes={self.axes}, layout={self.layout!r}")
            + (", continuous=True" if self.continuous else "")
        )


def axis_of_pairs(axes: tuple[int, ...], layout: str, rotary_dim: int) -> tuple[int, ...]:
    """The axis that each of rotary_dim/2 pairs turns with.

    "blocks"       a block of a_k features an axis, one after the other, a spectrum each: axial RoPE
                   (arXiv 2403.13298)
    "sections"     a_0/2 pairs, then a_1/2, ..; one spectrum over all pairs (M-RoPE of Qwen2-VL)
    "interleaved"  pair i turns with axis i mod A while that one has pairs left (i < A a_k/2), else
                   with axis 0; one spectrum (Qwen3-VL)

    Raises:
        ValueError: for widths that are odd, below 2, do not add up, or do not fit the layout.
    """
    whole = all(isinstance(width, int) and width >= 2 and width % 2 == 0 for width in axes)
    if not axes or not whole or sum(axes) != rotary_dim:
        raise ValueError(
            f"axes must be even numbers of features that add up to {rotary_dim}; got {axes}."
        )
    if layout != "interleaved":
        return tuple(axis for axis, width in enumerate(axes) for _ in range(width // 2))
    count, pairs = len(axes), rotary_dim // 2
    for axis, width in enumerate(axes[1:], start=1):
        if count * (width // 2 - 1) + axis >= pairs:
            raise ValueError(
                f"layout='interleaved' has no room for {width} features of axis {axis} among "
                f"{pairs} pairs; got axes={axes}. Give axis 0 more of them."
            )
    own = (i % count if i < count * (axes[i % count] // 2) else 0 for i in range(pairs))
    return tuple(own)


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
