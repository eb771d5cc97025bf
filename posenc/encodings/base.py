"""The encoding seam: what a positional scheme may do inside attention.

A scheme subclasses `Encoding` once and overrides what it needs; every default does nothing, so
`Encoding()` is NoPE.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

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
        """Initialise a (C, C) projection of the attention, where the scheme's source says how."""

    def reset_parameters(self) -> None:
        """Draw the scheme's own parameters anew (used after materialising a model from `meta`)."""


def check_even(head_dim: int, who: str) -> None:
    """Raise ValueError unless head_dim can be split into pairs."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(
            f"{who} needs an even head dim of at least 2; got {head_dim}. "
            "Choose embed_dim divisible by 2 * num_heads."
        )


def check_heads(embed_dim: int, num_heads: int) -> int:
    """The head dim embed_dim / num_heads, or ValueError."""
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        lower = embed_dim - embed_dim % max(num_heads, 1)
        raise ValueError(
            f"embed_dim must be a positive multiple of num_heads; got embed_dim={embed_dim}, "
            f"num_heads={num_heads}. "
            f"Choose for example embed_dim={max(lower, num_heads, 1)}."
        )
    return embed_dim // num_heads


def check_positions(
    positions: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor:
    """Integer positions (length,) or (batch, length); None is 0 .. length-1. Or ValueError."""
    if positions is None:
        return torch.arange(length, device=device)
    if not isinstance(positions, Tensor):
        raise ValueError(
            f"positions must be an integer tensor of shape ({length},) or ({batch}, {length}); got "
            f"{type(positions).__name__}. Pass torch.arange(start, start + {length})."
        )
    if (
        positions.dtype.is_floating_point
        or positions.dtype.is_complex
        or positions.dtype == torch.bool
    ):
        raise ValueError(
            f"positions must be integers; got {positions.dtype}. Pass a torch.long tensor."
        )
    if positions.shape not in ((length,), (batch, length)):
        raise ValueError(
            f"positions must have shape ({length},) or ({batch}, {length}); "
            f"got {tuple(positions.shape)}. "
            "Give one position per token."
        )
    return positions
