"""The encoding seam: what a positional scheme may do inside attention.

A scheme subclasses `Encoding` once and overrides what it needs; every default does nothing, so
`Encoding()` is NoPE.
"""

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from posenc.routing.moh import Gates
from posenc.scores import Scores

if TYPE_CHECKING:
    from posenc.cache import Cache, Stream


class Encoding(nn.Module):
    """Position in attention, at one or more of three places.

    Shapes: q, k (B, H, T, D); positions integer (T,) or (B, T); x (B, T, C), the attention module's
    own input.
    """

    #: Own parameters that must not be decayed (decay would pull them away from the encoding they
    #: stand for).
    no_weight_decay: ClassVar[frozenset[str]] = frozenset()
    #: Whether it acts where tokens enter the model (`embed`) and not inside attention.
    at_input: ClassVar[bool] = False
    #: Whether shifting all positions leaves the output unchanged.
    relative: ClassVar[bool] = True

    def embed(self, positions: Tensor) -> Tensor | None:
        """What is added once to the token embedding: (T, C) or (B, T, C), or None."""
        return None

    def rotate(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor | None = None,
        x: Tensor | None = None,
        state: "Cache | None" = None,
    ) -> tuple[Tensor, Tensor]:
        """Transform q and k, in time linear in T; `state` is given while decoding."""
        return q, k

    def rotate_fused(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor | None = None,
        x: Tensor | None = None,
        state: "Cache | None" = None,
    ) -> tuple[Tensor, Tensor]:
        """`rotate` by a Triton kernel where the scheme has one (`impl="fused"`)."""
        return self.rotate(q, k, positions, x, state)

    def attend_fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        x: Tensor,
        gates: Gates | None = None,
    ) -> Tensor | None:
        """Position and attention in one kernel where the scheme has one, else None.

        With `gates`, outputs come weighed, and None where `rotate_fused` and the kernel that skips
        what they drop are better.
        """
        return None

    def scores(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor,
        key_positions: Tensor | None = None,
        x: Tensor | None = None,
        state: "Cache | None" = None,
    ) -> Scores:
        """How the scheme enters the logits of rotated q (B, H, T, D) and k (B, H, S, D).

        `key_positions` is None when the S keys sit at consecutive positions that end with the
        queries', and (S,) or (B, S) where the caller gave positions of its own.
        """
        return Scores()

    def streams(self) -> "dict[str, Stream]":
        """The per-token tensors that decoding must remember beside k and v, by name."""
        return {}

    def init_projection(self, weight: Tensor) -> None:
        """Initialise (C, C) projections, stacked (n C, C), where the scheme's source says how."""

    def reset_parameters(self) -> None:
        """Draw the scheme's own parameters anew (used after materialising a model from `meta`)."""
