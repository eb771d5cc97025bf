"""FoX: the forgetting attention of the Forgetting Transformer (arXiv 2503.02130).

    l[b,h,t] = log sigmoid( x[b,t] . W[:,h] + bias[h] )      W (C, H): a gate a token and head
    c[b,h,t] = sum over s <= t of l[b,h,s]
    bias[b,h,m,n] = c[m] - c[n] = sum over t = n+1 .. m of l[t]      added to q.k/sqrt(D)

The gate of key n is not in its own sum. W starts at N(0, 0.02) and the gates' bias at 0: gates near
1/2. The output gate, norms and shifts of k and v of the authors' "Pro" block are not part of it.
Where attention is not causal: -|c[m] - c[n]| (ours).

Positions are not used: gaps in them do nothing, padding has gate 1. Gates and sums are fp64 with
autocast off, and differences come before rounding: at a million tokens c is near -7e5, where
neighbours in fp32 are 0.06 apart. While decoding raw keys are cached, and c of every token (fp64),
so that any rollback is exact.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posenc.accounting import Part, Sizes, product, state, weights
from posenc.cache import Cache, Stream
from posenc.checks import check_causal, check_sizes, check_tokens
from posenc.encodings.base import Encoding
from posenc.phase import Float32Parameters
from posenc.placement import Placement, given
from posenc.precise import precise_columns
from posenc.scores import Decay, Scores


def log_gates(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """log sigmoid(x W + bias): x (B, T, C), W (C, H) -> (B, H, T) in fp64; never log of a gate."""
    return F.logsigmoid(precise_columns(x, weight) + bias.double().unsqueeze(-1))


class FoX(Float32Parameters, Encoding):
    """Forgetting attention: each head forgets what lies before a token by what the token says.

    Args:
        embed_dim: C, the width of x.
        num_heads: H; gates are per query head.
        causal: a key's decay is that of the tokens after it up to the query; else between the two.

    Raises:
        ValueError: for sizes below 1, or, inside attention, an x of another width.
    """

    in_logits = True
    reads_positions = False
    no_weight_decay = frozenset({"weight", "bias"})

    def __init__(self, embed_dim: int, num_heads: int, *, causal: bool = True) -> None:
        super().__init__()
        check_sizes("FoX", embed_dim=embed_dim, num_heads=num_heads)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.causal = check_causal(causal)
        self.weight = self.float32_parameter(embed_dim, num_heads)
        self.bias = self.float32_parameter(num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def scores(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> Scores:
        tokens = place.key_length if state is None else place.length  # a cache has those before
        x = check_tokens("FoX", x, tokens, self.embed_dim)
        gates = log_gates(x, self.weight, self.bias)
        real = place.real if state is None else place.here
        if real is not None:
            gates = gates * real.unsqueeze(1)
        keys = gates.cumsum(-1)
        sums = keys[..., tokens - place.length :]
        if state is not None:
            sums = sums + state.recent("decay").squeeze(-1)
            keys = state.append("decay", sums.unsqueeze(-1)).squeeze(-1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return Scores(bias=Decay(sums, keys, dtype, two_sided=not self.causal))

    def score_bias(
        self, positions: Tensor, key_positions: Tensor, x: Tensor | None = None
    ) -> Tensor:
        """c[m] - c[n] of the tokens x (B, S, C), the last T of which are the queries."""
        added = self.scores(given(positions, key_positions), x).added()
        assert added is not None
        return added

    def streams(self) -> dict[str, Stream]:
        return {"decay": Stream((self.num_heads, 1), torch.float64, history=1)}

    def cost(self, s: Sizes) -> Part:
        """C H + H parameters, never below fp32; N C H multiply-adds; an exponential and a sum for
        every token and head. State c, H in fp64.
        """
        return (
            weights(s.C * s.H + s.H, s.precise)
            + product(s.N * s.C * s.H)
            + Part(elementwise=2 * s.N * s.H)
            + state(self.streams().values(), s, read=s.seen)
        )

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, causal={self.causal}"
