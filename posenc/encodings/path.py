"""PaTH: position as a product of reflections between key and query (arXiv 2505.16381).

    y[t]       = x[t] W1 W2                                 W1 (C, 32), W2 (32, G*D)
    z[t]       = silu(sum_{j<3} kernel_j y[t-2+j])          kernel (G, D, 3), kernel_2 on t itself
    w[t]       = z[t] / sqrt(|z[t]|^2 + 1e-6)               a direction a token and key head
    beta[t]    = 2 sigmoid(x[t] . weight + bias)            weight (C, G), bias (G), in (0, 2)
    score[m,n] = k[n]^T H_{n+1} .. H_m q[m] / sqrt(D)       H_t = I - beta[t] w[t] w[t]^T

Key n is met before its own H_n: the diagonal is plain q.k, and a score never depends on w up to n.
beta = 2 reflects and keeps lengths, beta = 1 projects w out. Everything starts at N(0, 0.02) and
the bias at 0: beta near 1. Back ends take r = sqrt(beta) w, so that H_t = I - r r^T.

As in the authors' code (fla). PaTH-FoX is not taken: fla divides the sum of its gates by sqrt(D),
unlike FoX. Where attention is not causal it has no meaning: which keys would a query reflect?

Positions are not used: gaps in them do nothing. At padding beta is 0, and taps on padding, or
across the boundary of a document, read 0. r is fp32 at least with autocast off. While decoding fla
rewrites every past key, k[n] <- H_t k[n], which cannot be undone where beta = 1. Ours caches raw
keys, r and x W1 of every token (fp32 at least), so that any rollback is exact, and a step carries
its query back over them.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posenc.accounting import Part, Sizes, product, state, weights
from posenc.autocast import no_autocast
from posenc.cache import Cache, Stream
from posenc.checks import check_causal, check_heads, check_kv_heads, check_sizes, check_tokens
from posenc.convolution import gather_taps
from posenc.encodings.base import Encoding
from posenc.phase import Float32Parameters
from posenc.placement import Placement
from posenc.scores import Scores

#: The width between W1 and W2.
RANK = 32
#: Tokens that a direction reads.
TAPS = 3


def directions(
    narrow: Tensor,
    wide: Tensor,
    kernel: Tensor,
    past: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """w (B, G, T, D), 0 where z is.

    The taps are gathered before W2, where a token is 32 numbers.

    Args:
        narrow: x W1 (B, T, 32). wide: W2 (32, G*D). kernel: (G, D, 3).
        past: (B, 2, 32), the rows before; None is zeros.
        segments: (B, T), documents that no tap leaves.
    """
    groups, dim, taps = kernel.shape
    both = kernel.permute(2, 0, 1).unsqueeze(1) * wide.unflatten(1, (groups, dim))  # (3, 32, G, D)
    with no_autocast(narrow.device):
        z = gather_taps(narrow, taps, past, segments) @ both.flatten(0, 1).flatten(1)  # (B, T, G*D)
    z = F.silu(z).unflatten(-1, (groups, dim)).transpose(1, 2)
    return z * (z.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def root_beta(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sqrt(2 sigmoid(x W + b)): x (B, T, C), W (C, G) -> (B, G, T)."""
    with no_autocast(x.device):
        logits = (x @ weight + bias).mT
    # A root of a sigmoid that underflows has no gradient.
    return math.sqrt(2) * torch.exp(F.logsigmoid(logits) / 2)


class PaTH(Float32Parameters, Encoding):
    """Accumulated reflections along the tokens between key and query.

    Args:
        embed_dim: C, the width of x.
        num_heads: H.
        head_dim: D; embed_dim / num_heads if None.
        num_kv_heads: G, heads of k; the reflections are theirs. H if None.
        causal: must be True.

    Parameters, all fp32 at least: W1 (C, 32), W2 (32, G*D), kernel (G, D, 3), weight (C, G), bias
    (G).

    Raises:
        ValueError: for sizes below 1, heads that do not divide, causal=False, or, inside attention,
            an x of another width.
    """

    in_logits = True
    reads_positions = False
    no_weight_decay = frozenset({"W1", "W2", "kernel", "weight", "bias"})

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if not check_causal(causal):
            raise ValueError(
                f"PaTH reflects by the tokens between a key and a later query; got causal={causal}."
                " Leave it True, or choose another encoding."
            )
        head_dim = check_heads(embed_dim, num_heads) if head_dim is None else head_dim
        check_sizes("PaTH", embed_dim=embed_dim, num_heads=num_heads, head_dim=head_dim)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.num_kv_heads, self.causal = check_kv_heads(num_heads, num_kv_heads), causal
        self.W1 = self.float32_parameter(embed_dim, RANK)
        self.W2 = self.float32_parameter(RANK, self.num_kv_heads * head_dim)
        self.kernel = self.float32_parameter(self.num_kv_heads, head_dim, TAPS)
        self.weight = self.float32_parameter(embed_dim, self.num_kv_heads)
        self.bias = self.float32_parameter(self.num_kv_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.W1, self.W2, self.kernel, self.weight):
            nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.bias)

    def reflections(self, place: Placement, x: Tensor, state: Cache | None = None) -> Tensor:
        """r = sqrt(beta) w (B, G, S, D) of the tokens x (B, T, C) and of those in `state`."""
        x = x.to(torch.promote_types(x.dtype, self.W1.dtype))
        with no_autocast(x.device):
            narrow = x @ self.W1
        # Without a state x holds all keys.
        real, past = place.real if state is None else place.here, None
        if real is not None:
            narrow = narrow * real.unsqueeze(-1)
        if state is not None:
            past = state.recent("taps")
            state.append("taps", narrow)
        w = directions(narrow, self.W2, self.kernel, past, place.segments)
        root = root_beta(x, self.weight, self.bias)
        if real is not None:
            root = root * real.unsqueeze(1)
        r = root.unsqueeze(-1) * w
        return r if state is None else state.append("reflections", r)

    def scores(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> Scores:
        length = place.length if state is not None else place.key_length
        x = check_tokens("PaTH", x, length, self.embed_dim)
        return Scores(reflections=self.reflections(place, x, state))

    def streams(self) -> dict[str, Stream]:
        dtype = self.W1.dtype
        return {
            "reflections": Stream((self.num_kv_heads, self.head_dim), dtype),
            "taps": Stream((RANK,), dtype, history=TAPS - 1),
        }

    def cost(self, s: Sizes) -> Part:
        """32 (C + G D) + 3 G D + C G + G parameters, never below fp32; N 32 C + N 96 G D + N C G
        multiply-adds for r, and an exponential for every z and beta; then a pair of query and
        earlier key is a reflection, 2 B (P - T) H D.

        Keeps x in fp32, x W1 and its taps, z twice, w and r, and what W2 and the taps' weights
        make. State r and x W1.
        """
        width, streams = s.G * s.D, self.streams()
        count = RANK * (s.C + width) + TAPS * width + s.C * s.G + s.G
        before = s.B * (s.pairs - s.T)
        copied = s.N * s.C if s.e < 4 else 0
        kept = copied + s.N * ((1 + TAPS) * RANK + 4 * width) + (1 + TAPS) * RANK * width
        return (
            weights(count, s.precise)
            + product(s.N * s.C * RANK)
            + product(s.N * TAPS * RANK * width)
            + product(s.N * s.C * s.G)
            + product(2 * before * s.inner, kept=2 * before * s.A * s.D)
            + Part(elementwise=s.N * (width + s.G), saved_bytes=kept * s.precise)
            + state((streams["reflections"],), s, read=s.seen)
            + state((streams["taps"],), s, read=TAPS - 1)
        )

    def extra_repr(self) -> str:
        sizes = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        return f"{sizes}, head_dim={self.head_dim}"
