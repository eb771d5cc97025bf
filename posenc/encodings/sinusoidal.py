"""Sinusoidal absolute positions (arXiv 1706.03762).

    PE[t, 2j] = sin(t / base^(2j/C)),   PE[t, 2j+1] = cos(t / base^(2j/C))

An input-level encoding without parameters or limit. The original multiplies token embeddings by
sqrt(C); unscaled, the table's rms of 0.71 swamps embeddings drawn from N(0, 0.02), so `scale` sets
the ratio from the table's side.
"""

import torch
from torch import Tensor

from posenc.accounting import Part, Sizes
from posenc.checks import check_even
from posenc.encodings.base import Encoding
from posenc.phase import inverse_frequencies, position_phases


class Sinusoidal(Encoding):
    """The fixed table of sines and cosines.

    Args:
        embed_dim: C, even.
        base: the longest wavelength is 2 pi base.
        scale: multiplies the table; 0.02 beside embeddings of std 0.02 is the original's ratio.
    """

    at_input = True
    relative = False

    def __init__(self, embed_dim: int, *, base: float = 10000.0, scale: float = 1.0) -> None:
        super().__init__()
        check_even(embed_dim, "Sinusoidal needs an even embed_dim", "Choose an even one.")
        self.embed_dim, self.base, self.scale = embed_dim, base, scale

    def embed(self, positions: Tensor) -> Tensor:
        """scale * PE[positions]: (T,) -> (T, C), (B, T) -> (B, T, C), in the default dtype."""
        frequencies = inverse_frequencies(self.embed_dim, self.base, positions.device)
        phase = position_phases(positions.reshape(-1), frequencies).unflatten(0, positions.shape)
        table = torch.stack((phase.sin(), phase.cos()), dim=-1).flatten(-2)
        return (self.scale * table).to(torch.get_default_dtype())

    def cost(self, s: Sizes) -> Part:
        """A sine or a cosine for each position and feature."""
        return Part(elementwise=s.T * s.C)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, base={self.base}, scale={self.scale}"
