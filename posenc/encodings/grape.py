"""GRAPE-M, contextual: a rotation whose speed each token sets (arXiv 2512.07805).

    rate[t]  = sigmoid((x[t] . W + b) / 16)               W (C, 1), b (1): one for all heads
    phi_i[m] = theta_i * sum over t < m of rate[t]        exclusive, modulo 2 pi
    theta_i  = exp(a_i)                                   a (D/2), learned
    q'[m] = R(phi[m]) q[m],  k'[n] = R(phi[n]) k[n]       half-split; v untouched

The paper has no formula for this form; it is that of the authors' code. There comments promise a
softplus and rates of 1e-3, but the code is this sigmoid: with b = log(expm1(0.001)) = -6.90726 a
rate of 0.39372. Where the comments and the code disagree ours is the code, but for two things:

- It turns by -phi, the mirror image; ours by +phi, as every rotation here.
- Its weighted norm of q and k after the turn breaks the relative law, and is left out.

`init="rope"` is ours: W = 0 and a_i = log(omega_i / 0.39372), exactly RoPE, omega_i = base^(-2i/D).
`init="authors"`: W = 0 and a_i = log omega_i, RoPE of frequencies 0.39372 omega_i.

Integer positions are not used: a gap in `positions` does not move the phase; negative ones
(padding) stop it. Rates, sums and phases are fp64 with autocast off. While decoding, rotated keys
are cached, and the running sum (fp64, one number a token), so that any rollback is exact.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from posenc.accounting import Part, Sizes, product, rotation_by_angles, state, weights
from posenc.cache import Cache, Stream
from posenc.checks import check_base, check_head_dim, check_heads, check_sizes, check_tokens
from posenc.encodings.running import RunningRotation
from posenc.errors import unknown
from posenc.phase import inverse_frequencies
from posenc.placement import Placement
from posenc.precise import precise_columns
from posenc.rotations import BySteps

#: What the logit of a rate is divided by.
TEMPERATURE = 16
#: The bias that every GRAPE starts from.
START = math.log(math.expm1(0.001))


def token_rates(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sigmoid((x W + b) / 16): x (B, T, C), W (C, 1), b (1) -> (B, 1, T) in fp64."""
    return torch.sigmoid((precise_columns(x, weight) + bias.double()) / TEMPERATURE)


class GRAPE(RunningRotation):
    """GRAPE-M, contextual: all heads turn at one rate, which the token sets.

    Args:
        embed_dim: C, the width of x.
        num_heads: H; any number of key heads turns alike.
        head_dim: D, even; embed_dim / num_heads if None.
        base: of the frequencies it starts from.
        init: "rope" (exactly RoPE) or "authors" (at 0.39372 of its speed).

    Parameters, all fp32: weight (C, 1), bias (1), log_frequencies (D/2).

    Raises:
        ValueError: for an odd head dim, heads that do not divide, or an unknown option.
    """

    no_weight_decay = frozenset({"weight", "bias", "log_frequencies"})

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        base: float = 10000.0,
        init: Literal["rope", "authors"] = "rope",
    ) -> None:
        super().__init__()
        head_dim = check_heads(embed_dim, num_heads) if head_dim is None else head_dim
        check_sizes("GRAPE", embed_dim=embed_dim, num_heads=num_heads)
        check_head_dim(head_dim, "GRAPE")
        check_base(base)
        if init not in ("rope", "authors"):
            raise ValueError(unknown("GRAPE init", init, ("rope", "authors")))
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.base, self.init = base, init
        self.weight = self.float32_parameter(embed_dim, 1)
        self.bias = self.float32_parameter(1)
        self.log_frequencies = self.float32_parameter(head_dim // 2)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, START)
        a = inverse_frequencies(self.head_dim, self.base, self.weight.device).log()
        if self.init == "rope":
            a = a + math.log1p(math.exp(-START / TEMPERATURE))  # - log sigmoid(b / 16)
        self.log_frequencies.copy_(a)

    def rotation(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> BySteps:
        x = check_tokens("GRAPE", x, place.length, self.embed_dim)
        steps = token_rates(x, self.weight, self.bias).unsqueeze(-1)  # (B, 1, T, 1)
        frequencies = self.log_frequencies.double().exp()
        return BySteps(steps, frequencies, inclusive=False, real=place.here, state=state)

    def streams(self) -> dict[str, Stream]:
        return {"sums": Stream((1, 1), torch.float64, history=1)}

    def cost(self, s: Sizes) -> Part:
        """rate = sigmoid(x W + b): C + 1 + D/2 parameters, N C multiply-adds and an exponential;
        for every token and pair a sine and a cosine; and the rotation.

        Keeps a token's rate and sum in fp64, its phases, sines and cosines in fp32 or better. Its
        parameters are never below fp32; state one sum in fp64.
        """
        angles = (3 if s.e < 8 else 2) * s.D // 2
        return (
            weights(s.C + 1 + s.D // 2, s.precise)
            + product(s.N * s.C)
            + Part(elementwise=s.N * (2 + s.D))  # exponential, addition; sine, cosine
            + Part(saved_bytes=s.N * (angles * s.precise + 16))
            + state(self.streams().values(), s, read=1)
            + rotation_by_angles(s)
        )

    def replaces(self, s: Sizes) -> bool:
        return s.e < 4  # by copies

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"base={self.base}, init={self.init!r}"
        )
