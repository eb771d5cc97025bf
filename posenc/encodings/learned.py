"""Learned absolute positions (GPT-2): x_t += P[t], P (max_length, C) ~ N(0, std), std 0.02.

An input-level encoding: the model adds it once to the token embedding. Nothing is stored while
decoding.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posenc.accounting import Part, Sizes, weights
from posenc.checks import check_sizes
from posenc.encodings.base import Encoding


class Learned(Encoding):
    """A trained table of positions.

    Args:
        max_length: rows of the table, the longest sequence it can place; at least 1.
        embed_dim: C, the width of the token embedding.
        std: of the table at its start; 0.02 is GPT-2's, and that of its token embeddings.

    Raises:
        ValueError: for a negative or infinite std; from `embed`, where a position lies beyond the
            table.
    """

    at_input = True
    relative = False

    def __init__(self, max_length: int, embed_dim: int, *, std: float = 0.02) -> None:
        super().__init__()
        check_sizes("Learned", max_length=max_length, embed_dim=embed_dim)
        if not 0 <= std < math.inf:
            raise ValueError(f"the std of a table must be finite and at least 0; got {std}.")
        self.max_length, self.std = max_length, std
        self.weight = nn.Parameter(torch.empty(max_length, embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def embed(self, positions: Tensor) -> Tensor:
        """P[positions]: (T,) -> (T, C), (B, T) -> (B, T, C); negatives of (B, T) are padding."""
        # On CUDA and inside torch.compile the lookup itself still fails hard; a check here would
        # sync or break the graph.
        if (
            positions.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and positions.numel()
        ):
            low, high = int(positions.min()), int(positions.max())
            if high >= self.max_length or (low < 0 and positions.ndim == 1):
                wrong = high if high >= self.max_length else low
                raise ValueError(
                    f"the learned table has {self.max_length} positions, 0 to "
                    f"{self.max_length - 1}; got {wrong}. Shorten the text or enlarge max_length."
                )
        rows = positions if positions.ndim == 1 else positions.clamp(min=0)
        return F.embedding(rows, self.weight)

    def cost(self, s: Sizes) -> Part:
        """A table of max_length C parameters, of which T rows are read and added."""
        return weights(self.max_length * s.C, s.e, read=s.T * s.C)

    def extra_repr(self) -> str:
        return f"max_length={self.max_length}, embed_dim={self.weight.shape[1]}, std={self.std}"
