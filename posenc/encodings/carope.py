"""CARoPE: context-aware rotary position embedding (arXiv 2507.23083).

    z[b,h,t]  = x[b,t] . W[:,h] (+ bias[h])               W (C, H)
    f[t]      = 1 / (1 + softplus(z[t]))                  in (0, 1), one rate per token and head
    step_i[t] = f[t]^(i + first_power)                    i = 0 .. D/2-1
    phi_i[m]  = sum over t <= m of step_i[t]              inclusive, modulo 2 pi
    q'[m] = R(phi[m]) q[m],  k'[n] = R(phi[n]) k[n]       v untouched, score q'.k'/sqrt(D)

With constant f = base^(-2/D) it is RoPE (vectors at position m + 1, the same scores). The paper's
bias-free f cannot be: at W = 0 it is 0.59, a base of 2e7 at D = 64. `init="rope"` therefore adds a
bias and starts exactly at RoPE; `init="paper"` is the paper's form, W ~ N(0, 0.02) and no bias. The
paper's theta_1^i leaves open whether i starts at 0 (needed to contain RoPE, our default) or 1:
`first_power`.

Integer positions are not used: a gap in `positions` does not move the phase; negative ones
(padding) stop it. Rates, steps and sums are fp64 with autocast off: the phase error does not grow
with the length. While decoding, rotated keys are cached, and the phase of every token (fp64), so
that any rollback is exact.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posenc.autocast import no_autocast
from posenc.cache import Stream
from posenc.checks import check_base, check_head_dim, check_heads, check_pair, check_sizes
from posenc.encodings.base import Encoding
from posenc.errors import unknown
from posenc.phase import Float32Parameters, phase_dtype, turn_by, wrap
from posenc.routing import Gates


def log_rates(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """log f = -log1p(softplus(x W + bias)): x (B, T, C), W (C, H) -> (B, H, T) in fp64.

    The logarithm, never log of a computed f, which is 0 for large z and has a NaN gradient there.
    """
    with no_autocast(x.device):
        # fp64, H columns wide: cheap, and TF32, which a trainer may allow, cannot reach it.
        z = weight.double().mT @ x.double().mT  # (B, H, T)
    z = z if bias is None else z + bias.double().unsqueeze(-1)
    return -torch.log1p(softplus(z))


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), of fp64."""
    if torch.compiler.is_exporting():
        # onnxruntime has no Softplus in fp64. At 0 the gradient of a maximum, unlike a clamp's, is
        # one half, as it should be.
        return torch.maximum(z, torch.zeros_like(z)) + torch.log1p(torch.exp(-z.abs()))
    # It turns linear past its threshold; the default, 20, is 2e-9 off there.
    return F.softplus(z, threshold=40)


def running_phase(
    log_f: Tensor,
    pairs: int,
    first_power: int = 0,
    carry: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Inclusive sums of f^(i + first_power) over tokens, modulo 2 pi.

    Args:
        log_f: (B, H, T) fp64.
        pairs: D/2, the number of bands.
        carry: (B, H, 1, D/2) fp64, the phase before the first token; None is 0.
        real: (B, T) bool, False where the phase must stand still; None is everywhere.

    Returns:
        (B, H, T, D/2) fp64 in [-pi, pi].
    """
    powers = torch.arange(first_power, first_power + pairs, dtype=log_f.dtype, device=log_f.device)
    steps = torch.exp(log_f.unsqueeze(-1) * powers)  # (B, H, T, D/2)
    if real is not None:
        steps = steps * real[:, None, :, None]
    phase = steps.cumsum(-2)
    return wrap(phase if carry is None else phase + carry)


class CARoPE(Float32Parameters, Encoding):
    """Context-aware rotary position embedding: every head turns at a rate that the token sets.

    Args:
        embed_dim: C, the width of x.
        num_heads: H.
        head_dim: D, even; embed_dim / num_heads if None.
        base: the RoPE that init="rope" starts from.
        init: "rope" (W = 0 and a bias, exactly RoPE) or "paper" (W ~ N(0, 0.02), no bias).
        first_power: 0 (bands f^0 .. f^(D/2-1)) or 1 (f^1 .. f^(D/2)).
        source: "layer" reads the attention module's own input. "token" reads the token embeddings:
            inside GPT one CARoPE serves all layers; alone, the module's input is all there is, and
            both read it.

    Raises:
        ValueError: for an odd head dim, heads that do not divide, or an unknown option.
    """

    no_weight_decay = frozenset({"weight", "bias"})

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        base: float = 10000.0,
        init: Literal["rope", "paper"] = "rope",
        first_power: int = 0,
        source: Literal["layer", "token"] = "layer",
    ) -> None:
        super().__init__()
        head_dim = check_heads(embed_dim, num_heads) if head_dim is None else head_dim
        check_sizes("CARoPE", embed_dim=embed_dim, num_heads=num_heads)
        check_head_dim(head_dim, "CARoPE")
        check_base(base)
        if init not in ("rope", "paper"):
            raise ValueError(unknown("CARoPE init", init, ("rope", "paper")))
        if source not in ("layer", "token"):
            raise ValueError(unknown("CARoPE source", source, ("layer", "token")))
        if first_power not in (0, 1):
            raise ValueError(f"first_power must be 0 or 1; got {first_power}.")
        self.num_heads, self.head_dim, self.base = num_heads, head_dim, base
        self.init, self.first_power, self.source = init, first_power, source
        self.embed_dim = embed_dim
        self.weight = self.float32_parameter(embed_dim, num_heads)
        self.bias = self.float32_parameter(num_heads) if init == "rope" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.bias is None:
            nn.init.normal_(self.weight, std=0.02)
        else:
            nn.init.zeros_(self.weight)
            # softplus(bias) = y with 1 + y = base^(2/D), hence f = base^(-2/D). The bias is
            # log(e^y - 1), written so that a large y cannot overflow.
            y = math.expm1(2 * math.log(self.base) / self.head_dim)
            nn.init.constant_(self.bias, y + math.log(-math.expm1(-y)))

    def phases(self, x: Tensor, positions: Tensor | None = None, state: Any = None) -> Tensor:
        """The running phase (B, H, T, D/2), fp64 modulo 2 pi, of the tokens x (B, T, C)."""
        log_f = log_rates(x, self.weight, self.bias)
        real = positions >= 0 if positions is not None and positions.ndim == 2 else None
        carry = None if state is None else state.recent("phase")
        phase = running_phase(log_f, self.head_dim // 2, self.first_power, carry, real)
        if state is not None:
            state.append("phase", phase)
        return phase

    def rotate(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor | None = None,
        x: Tensor | None = None,
        state: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotate q and k (B, H, T, D) by the phases of x (B, T, C)."""
        x = self._checked(q, k, x)
        return turn_by_phase(q, k, self.phases(x, positions, state))

    def rotate_fused(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor | None = None,
        x: Tensor | None = None,
        state: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """`rotate` by the kernel, which writes the phases of the tokens only for a cache."""
        from posenc.kernels.carope import carope, carope_with_phases
        from posenc.kernels.turns import radians_from_turns, turns_from_radians

        log_f = log_rates(self._checked(q, k, x), self.weight, self.bias)
        if positions is not None and positions.ndim == 2:
            log_f = log_f.masked_fill((positions < 0).unsqueeze(1), -math.inf)
        if state is None:
            q, k, _ = carope(q, k, log_f, first_power=self.first_power)
            return q, k
        carry = turns_from_radians(state.recent("phase").squeeze(-2))
        q, k, phases = carope_with_phases(q, k, log_f, carry, first_power=self.first_power)
        state.append("phase", radians_from_turns(phases))
        return q, k

    def attend_fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        x: Tensor,
        gates: Gates | None = None,
    ) -> Tensor | None:
        if gates is not None:
            return None
        from posenc.kernels.carope_attention import carope_attention

        log_f = log_rates(self._checked(q, k, x), self.weight, self.bias)
        return carope_attention(q, k, v, log_f, first_power=self.first_power)

    def _checked(self, q: Tensor, k: Tensor, x: Tensor | None) -> Tensor:
        """x itself, or ValueError for what does not fit."""
        check_pair(q, k, self.head_dim)
        shape = (q.shape[0], q.shape[-2], self.embed_dim)
        if x is None or x.shape != shape:
            got = None if x is None else tuple(x.shape)
            raise ValueError(
                f"CARoPE turns by the tokens: rotate(q, k, positions, x) needs x of shape {shape}; "
                f"got {got}. Pass the attention's input."
            )
        return x

    def streams(self) -> dict[str, Stream]:
        return {"phase": Stream((self.num_heads, self.head_dim // 2), torch.float64, history=1)}

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.weight.shape[0]}, num_heads={self.num_heads}, "
            f"head_dim={self.head_dim}, base={self.base}, init={self.init!r}, "
            f"first_power={self.first_power}, source={self.source!r}"
        )


def turn_by_phase(q: Tensor, k: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k by one phase (B, H, T, D/2), rounded to the dtype of sines first."""
    q, k = turn_by(phase.to(phase_dtype(q)), q, k)
    return q, k


class SharedPhase(Encoding):
    """A layer's part of CARoPE(source="token"): rotates by phases that the model computed once.

    Its `x`, attention's `phase`, is what `CARoPE.phases` made of the token embeddings: (B, H, T,
    D/2).
    """

    def rotate(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor | None = None,
        x: Tensor | None = None,
        state: Any = None,
    ) -> tuple[Tensor, Tensor]:
        assert x is not None
        return turn_by_phase(q, k, x)
