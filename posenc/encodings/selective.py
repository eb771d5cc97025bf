"""Selective RoPE: every pair turns at a rate that the last four tokens set (arXiv 2511.17388).

    x^[t]    = x[t] cut into pieces of D, each over sqrt(|piece|^2 + 1e-6)
    u[t]     = x^[t] W1 W2                               W1 (C, 32), W2 (32, G*D/2), pairs by head
    rate[t]  = sum_{j<4} w_j u[t-3+j] (+ exp(beta))      w (G, D/2, 4), beta (G, D/2); w_3 on t
    phi_i[m] = omega_i * sum over t <= m of rate_i[t]    inclusive, modulo 2 pi
    q'[m] = R(phi[m]) q[m],  k'[n] = R(phi[n]) k[n]      half-split; v untouched
    omega_i = base^(-2i/D), fixed

Rates may be negative, and are those of a key head. The paper's rate is a convolution of W q[t]; the
authors' code, and ours, read x. The code's optional sigmoid gate, off in its language models, is
not taken. Theirs has a base of 500,000 and cuts x into H pieces, ours 10,000 and D features a
piece: the same unless head_dim is given.

`init="rope"` is ours: with exp(beta), the code's optional bias, beta = 0 and W2 = 0 it is RoPE
(vectors at position m + 1, the same scores). W2 alone learns at the first step; W1 and w, whose
gradients W2 multiplies, from the second on. `init="authors"`: N(0, 0.02) and no beta; rates start
near 3e-4, almost NoPE.

Integer positions are not used: a gap in `positions` does not move the phase. At padding (negative
positions) it stands still, exp(beta) too; taps on padding, or across the boundary of a document,
read 0. Everything up to the phase is fp64 with autocast off. While decoding, rotated keys are
cached, the phase of every token and x^ W1 of every token (fp64 both), so that any rollback is
exact.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posenc.accounting import Part, Sizes, product, rotation_by_angles, state, weights
from posenc.autocast import no_autocast
from posenc.cache import Cache, Stream
from posenc.checks import (
    check_base,
    check_head_dim,
    check_heads,
    check_kv_heads,
    check_sizes,
    check_tokens,
)
from posenc.convolution import gather_taps
from posenc.encodings.running import RunningRotation
from posenc.errors import unknown
from posenc.phase import inverse_frequencies
from posenc.placement import Placement
from posenc.rotations import BySteps

#: r, the width between W1 and W2.
RANK = 32
#: Tokens that a rate reads.
TAPS = 4


def narrowed(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """x^ W1: x (B, T, C) in pieces of `width`, each of length 1; W1 (C, r) -> (B, T, r) in fp64."""
    pieces = x.double().unflatten(-1, (-1, width))
    # Of the norm, not of a sum of squares: 4 of 22 ms less where x is (8, 512, 256).
    norm = torch.linalg.vector_norm(pieces, dim=-1, keepdim=True)
    with no_autocast(x.device):
        return (pieces * (norm.square() + 1e-6).rsqrt()).flatten(-2) @ weight.double()


def pair_steps(
    narrow: Tensor,
    wide: Tensor,
    kernel: Tensor,
    beta: Tensor | None,
    frequencies: Tensor,
    past: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """omega_i rate_i[t], in fp64: (B, G, T, D/2).

    The taps are gathered before W2, where a token is r numbers: convolution and W2 are one product.

    Args:
        narrow: x^ W1 (B, T, r), fp64.
        wide: W2 (r, G*D/2). kernel: w (G, D/2, 4). beta: (G, D/2) or None.
        frequencies: omega (D/2,), fp64.
        past: (B, 3, r), the rows before; None is zeros.
        segments: (B, T), documents that no tap leaves.
    """
    groups, pairs, taps = kernel.shape
    by_pair = wide.double().unflatten(1, (groups, pairs)) * frequencies
    both = kernel.double().permute(2, 0, 1).unsqueeze(1) * by_pair  # (4, r, G, D/2)
    both, read = both.flatten(0, 1).flatten(1), gather_taps(narrow, taps, past, segments)
    still = None if beta is None else (beta.double().exp() * frequencies).flatten()
    with no_autocast(narrow.device):
        steps = F.linear(read, both.mT, still)  # (B, T, G*D/2)
    return steps.unflatten(-1, (groups, pairs)).transpose(1, 2)


class SelectiveRoPE(RunningRotation):
    """Selective RoPE: a rate for every token, key head and pair.

    Args:
        embed_dim: C, the width of x.
        num_heads: H.
        head_dim: D, even, must divide C; embed_dim / num_heads if None.
        num_kv_heads: G, heads of k; the rates are theirs. H if None.
        base: of the fixed frequencies.
        init: "rope" (beta and W2 = 0, exactly RoPE) or "authors" (N(0, 0.02), no beta).

    Parameters, all fp32: W1 (C, 32), W2 (32, G*D/2), kernel (G, D/2, 4), the last tap on the token
    itself, and beta (G, D/2), None with init="authors".

    Raises:
        ValueError: for an odd head dim or one that does not divide C, heads that do not divide, or
            an unknown option.
    """

    no_weight_decay = frozenset({"W1", "W2", "kernel", "beta"})

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        base: float = 10000.0,
        init: Literal["rope", "authors"] = "rope",
    ) -> None:
        super().__init__()
        head_dim = check_heads(embed_dim, num_heads) if head_dim is None else head_dim
        check_sizes("SelectiveRoPE", embed_dim=embed_dim, num_heads=num_heads)
        check_head_dim(head_dim, "SelectiveRoPE")
        check_base(base)
        if embed_dim % head_dim:
            raise ValueError(
                f"SelectiveRoPE cuts x into pieces of head_dim, which must divide embed_dim; got "
                f"head_dim={head_dim}, embed_dim={embed_dim}. Choose a divisor."
            )
        if init not in ("rope", "authors"):
            raise ValueError(unknown("SelectiveRoPE init", init, ("rope", "authors")))
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.num_kv_heads = check_kv_heads(num_heads, num_kv_heads)
        self.base, self.init = base, init
        groups, pairs = self.num_kv_heads, head_dim // 2
        self.W1 = self.float32_parameter(embed_dim, RANK)
        self.W2 = self.float32_parameter(RANK, groups * pairs)
        self.kernel = self.float32_parameter(groups, pairs, TAPS)
        self.beta = self.float32_parameter(groups, pairs) if init == "rope" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.W1, self.W2, self.kernel):
            nn.init.normal_(weight, std=0.02)
        if self.beta is not None:
            nn.init.zeros_(self.W2)
            nn.init.zeros_(self.beta)

    def rotation(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> BySteps:
        x = check_tokens("SelectiveRoPE", x, place.length, self.embed_dim)
        narrow, past = narrowed(x, self.W1, self.head_dim), None
        if place.here is not None:
            narrow = narrow * place.here.unsqueeze(-1)
        if state is not None:
            past = state.recent("taps")
            state.append("taps", narrow)
        frequencies = inverse_frequencies(self.head_dim, self.base, x.device)
        own = (self.W2, self.kernel, self.beta)
        steps = pair_steps(narrow, *own, frequencies, past, place.segments)
        return BySteps(steps, real=place.here, state=state)

    def streams(self) -> dict[str, Stream]:
        return {
            "sums": Stream((self.num_kv_heads, self.head_dim // 2), torch.float64, history=1),
            "taps": Stream((RANK,), torch.float64, history=TAPS - 1),
        }

    def cost(self, s: Sizes) -> Part:
        """x^ W1 and its taps by W2: C r + r G D/2 + 4 G D/2 (+ G D/2) parameters, r = 32, and N C r
        + N 4 r G D/2 multiply-adds; then for every token, key head and pair an addition, a sine and
        a cosine; and the rotation.

        Keeps in fp64 x, x^ and its taps, W1 and what W2 and the taps' weights make (5 r G D/2);
        phase, sine and cosine in fp32 or better. Its parameters are never below fp32; state G D/2
        + r in fp64.
        """
        streams, pairs = self.streams(), s.G * s.D // 2
        count = s.C * RANK + (RANK + TAPS) * pairs + (pairs if self.beta is not None else 0)
        copied = s.N * s.C + s.C * RANK if s.e < 8 else 0
        doubles = copied + s.N * (s.C + TAPS * RANK) + (1 + TAPS) * RANK * pairs
        return (
            weights(count, s.precise)
            + product(s.N * s.C * RANK)
            + product(s.N * TAPS * RANK * pairs)
            + Part(elementwise=3 * s.N * pairs)
            + Part(saved_bytes=8 * doubles + 3 * s.N * pairs * s.precise)
            + state((streams["sums"],), s, read=1)
            + state((streams["taps"],), s, read=TAPS - 1)
            + rotation_by_angles(s)
        )

    def replaces(self, s: Sizes) -> bool:
        return s.e < 4  # by copies

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"base={self.base}, init={self.init!r}"
        )
