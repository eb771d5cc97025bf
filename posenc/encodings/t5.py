"""T5's relative position bias (arXiv 1910.10683).

    bias[h, m, n] = t[bucket(d), h]         t (N, H), d = m - n
    causal:      n' = N,    x = max(d, 0)
    not causal:  n' = N/2,  x = |d|, and N/2 is added to the bucket where d < 0
    bucket = x                                                       where x < e = n'/2
             min(n' - 1, e + floor(ln(x/e) / ln(max_distance/e) (n' - e)))    beyond

Near distances have a row each, farther ones share rows that widen with the logarithm, up to
max_distance, from where on all share the last. Raw keys are cached.

Where T5 differs: its logits are not divided by sqrt(D), its table is drawn at N(0, 1/sqrt(C)) and
shared by all layers. Here, like every bias, it is added to q.k/sqrt(D); each layer has a table,
drawn at N(0, 0.02).
"""

import math

import torch
from torch import Tensor, nn

from posenc.accounting import Part, Sizes, weights
from posenc.checks import check_causal, check_sizes
from posenc.encodings.distance import DistanceBias


def bucket(distances: Tensor, buckets: int, max_distance: int, causal: bool = True) -> Tensor:
    """The row of the table for each integer distance, int64 of the same shape."""
    count = buckets if causal else buckets // 2
    exact = count // 2
    x = distances.clamp(min=0) if causal else distances.abs()
    # fp64: at exact powers an fp32 logarithm may fall on either side.
    ratio = torch.log(x.clamp(min=1).double() / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (count - exact)).long()
    row = torch.where(x < exact, x, far.clamp(max=count - 1))
    return row if causal else row + count * (distances < 0)


class T5(DistanceBias):
    """T5's bias: a trained number for each head and bucket of distances.

    Args:
        num_heads: H.
        buckets: N, rows of the table; even, and divisible by 4 where not causal.
        max_distance: from where on all distances share a row; above the buckets that hold one
            distance each.
        causal: distances from 0 on; else half of the rows are for keys after the query.

    Raises:
        ValueError: for buckets that cannot be halved, or a max_distance within the exact ones.
    """

    no_weight_decay = frozenset({"table"})

    def __init__(
        self, num_heads: int, *, buckets: int = 32, max_distance: int = 128, causal: bool = True
    ) -> None:
        super().__init__()
        check_sizes("T5", num_heads=num_heads, buckets=buckets, max_distance=max_distance)
        least = 2 if causal else 4
        if buckets % least:
            raise ValueError(
                f"T5 needs buckets divisible by {least}{'' if causal else ' where not causal'}; "
                f"got {buckets}."
            )
        exact = buckets // least
        if max_distance <= exact:
            raise ValueError(
                f"T5 needs a max_distance above its {exact} exact buckets; got {max_distance}. "
                "Enlarge it, or take fewer buckets."
            )
        self.num_heads, self.buckets, self.max_distance = num_heads, buckets, max_distance
        self.causal = check_causal(causal)
        self.table = self.float32_parameter(buckets, num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def of_distance(self, distances: Tensor) -> Tensor:
        """t[bucket] of integer distances (..): (H, ..)."""
        row = bucket(distances, self.buckets, self.max_distance, self.causal)
        return self.table.t()[:, row]

    def cost(self, s: Sizes) -> Part:
        """N H parameters, never below fp32."""
        return weights(self.buckets * s.H, s.precise)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, buckets={self.buckets}, "
            f"max_distance={self.max_distance}, causal={self.causal}"
        )
