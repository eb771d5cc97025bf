"""ALiBi: attention with linear biases (arXiv 2108.12409).

    bias[h, m, n] = -s_h |m - n|
    s_h = 2^(-8h/p), h = 1 .. p, p the largest power of two up to H; the other H - p heads
          2^(-8j/(2p)), j = 1, 3, 5, ..

Added to q.k/sqrt(D). No parameters; raw keys are cached. The authors add s_h n, which is equal
under a causal softmax, and have no other attention: |m - n| where it is not causal is ours. Heads
keep this order of slopes, which is not sorted unless H is a power of two.
"""

import torch
from torch import Tensor

from posenc.checks import check_sizes
from posenc.encodings.distance import DistanceBias


def slopes(num_heads: int) -> list[float]:
    """s_h of every head."""
    power = 1 << (num_heads.bit_length() - 1)
    first = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    return first + [2.0 ** (-8 * j / (2 * power)) for j in range(1, 2 * (num_heads - power), 2)]


class ALiBi(DistanceBias):
    """Attention with linear biases: every head prefers what is near, at a slope of its own.

    Args:
        num_heads: H.

    Raises:
        ValueError: for less than one head.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        check_sizes("ALiBi", num_heads=num_heads)
        self.num_heads = num_heads

    def of_distance(self, distances: Tensor) -> Tensor:
        """-s_h |d| of integer distances (..): (H, ..) in fp64."""
        slope = torch.tensor(slopes(self.num_heads), dtype=torch.float64, device=distances.device)
        return -slope.view(-1, *(1,) * distances.ndim) * distances.abs()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
