"""FIRE: functional interpolation for relative positions (arXiv 2310.04418).

    z[m, n]       = ln(1 + |c| d) / ( ln(1 + |c| max(m, |a L|)) + 1e-6 )     d = |m - n|
    bias[h, m, n] = ( W2 relu(W1 z + b1) + b2 )[h]      W1 (w, 1), W2 (H, w), added to q.k/sqrt(D)

c starts at 0.1 and a at 1, both learned; L is `length`, fixed. For queries up to |a L| the bias is
one of the distance; from there on distances count relative to the query's own position, an absolute
one. It is therefore the position in the document that counts, and a decoding step passes it on.

Known at second hand: the code of DAPE and three more copies of the paper's appendix agree on this
form, not on L, which is half of the training length in one and 512 in the others; ours is the
length that is given. Where attention is not causal: max(m, n, |a L|) (ours). Raw keys are cached.
"""

import math

import torch
from torch import Tensor, nn

from posenc.accounting import Part, Sizes, product, weights
from posenc.autocast import no_autocast
from posenc.checks import check_causal, check_sizes
from posenc.encodings.base import Encoding
from posenc.phase import Float32Parameters
from posenc.scores import batch_first

EPSILON = 1e-6


class FIRE(Float32Parameters, Encoding):
    """A small network of the distance over the length, both by their logarithms.

    Args:
        num_heads: H.
        length: L, from which query on distances count relative to its position; in a model its
            context, if left out.
        hidden: w, width of the network.
        causal: keys after the query are hidden; else the later of both counts.

    Raises:
        ValueError: for sizes below 1.
    """

    in_logits = True
    relative = False
    context_option = "length"
    no_weight_decay = frozenset({"c", "a", "W1", "b1", "W2", "b2"})

    def __init__(
        self, num_heads: int, *, length: int = 512, hidden: int = 32, causal: bool = True
    ) -> None:
        super().__init__()
        check_sizes("FIRE", num_heads=num_heads, length=length, hidden=hidden)
        self.num_heads, self.length, self.hidden = num_heads, length, hidden
        self.causal = check_causal(causal)
        self.c = self.float32_parameter()
        self.a = self.float32_parameter()
        self.W1 = self.float32_parameter(hidden, 1)
        self.b1 = self.float32_parameter(hidden)
        self.W2 = self.float32_parameter(num_heads, hidden)
        self.b2 = self.float32_parameter(num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.c, 0.1)
        nn.init.constant_(self.a, 1.0)
        for weight, bias in ((self.W1, self.b1), (self.W2, self.b2)):  # torch's start of a Linear
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def score_bias(
        self, positions: Tensor, key_positions: Tensor, x: Tensor | None = None
    ) -> Tensor:
        m, n = positions.unsqueeze(-1), key_positions.unsqueeze(-2)
        c = self.c.abs()
        reached = m if self.causal else torch.maximum(m, n)
        reach = torch.maximum(reached.to(c.dtype), self.a.abs() * self.length)
        z = torch.log1p(c * (m - n).abs()) / (torch.log1p(c * reach) + EPSILON)
        with no_autocast(z.device):
            inner = torch.addmm(self.b1.unsqueeze(1), self.W1, z.reshape(1, -1)).relu()
            bias = torch.addmm(self.b2.unsqueeze(1), self.W2, inner)
        bias = bias.view(self.num_heads, *z.shape)
        return batch_first(bias)

    def cost(self, s: Sizes) -> Part:
        """2 + 2 w + w H + H parameters, never below fp32; for every pair of a query and a key, seen
        or not, w + w H multiply-adds, once for all sequences.
        """
        own = self.hidden * (s.H + 1)
        return weights(2 + self.hidden + s.H + own, s.precise) + product(s.T * s.S * own)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, length={self.length}, hidden={self.hidden}, "
            f"causal={self.causal}"
        )
