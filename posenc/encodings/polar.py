"""Polar: the complex multi-head attention (CMHA) of ComplexFormer (arXiv 2505.10222, withdrawn;
abstract and code only).

    pair i of q: (r, p) = (q_i, q_{i+D/2}),  lam = sqrt(r^2 + p^2),  th = atan2(p, r);  likewise k
    score[m, n] = scale * sum_i lam_q lam_k cos( delta_i (th_q[m] - th_k[n]) + b_i + (m - n) omega_i
    )

The angle difference is not wrapped, therefore the score factorises, and this is what is computed,
in linear time:

    q'[m] = R((delta-1) th_q + b + m omega) q[m],    k'[n] = R((delta-1) th_k + n omega) k[n]
    score = scale q'.k'

So CMHA is RoPE plus an angle that the content sets: no square root, norms kept, and RoPE bit for
bit at delta = 1, b = 0. For non-integer delta, q' jumps where th crosses +-pi; that belongs to the
method. Acts on q and k after the projections, v untouched. Rotated keys are cached; no further
state.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posenc.checks import check_base, check_head_dim, check_pair, check_positions, check_sizes
from posenc.encodings.base import Encoding
from posenc.errors import unknown
from posenc.phase import (
    Float32Parameters,
    inverse_frequencies,
    pairs,
    phase_dtype,
    position_phases,
    turn_by,
)
from posenc.scores import Scores


def content_angle(x: Tensor, delta: Tensor) -> Tensor:
    """(delta - 1) * atan2(x2, x1): x (B, H, T, D), delta (H, D/2) -> (B, H, T, D/2); 0 at x = 0."""
    first, second = pairs(x.to(phase_dtype(x)))
    # torch 2.11 exports no difference of a parameter itself and an integer to ONNX.
    return (delta.unsqueeze(-2) - 1) * torch.atan2(second, first)


def turn_by_content(
    q: Tensor, k: Tensor, delta: Tensor, b: Tensor, turns: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate q and k (B, H, T, D) by their own angles and by `turns`, that of their positions.

    delta, b: (H, D/2); b turns q alone. turns: broadcastable to (B, H, T, D/2).
    """
    q_angle = content_angle(q, delta) + (b.unsqueeze(-2) + turns)
    k_angle = content_angle(k, delta) + turns
    (q,), (k,) = turn_by(q_angle, q), turn_by(k_angle, k)
    return q, k


class Polar(Float32Parameters, Encoding):
    """CMHA's polar rotation: position plus a learned multiple of each pair's own angle.

    Args:
        num_heads: H.
        head_dim: D, even.
        base: of RoPE's frequencies.
        init: "rope" (delta = 1, b = 0, scale 1/sqrt(D): exactly RoPE) or "authors" (delta ~ N(0,
            std (D/2)^-1/2), b = 0, scale 1, Xavier-uniform projections).

    Raises:
        ValueError: for an odd head dim or an unknown init.
    """

    no_weight_decay = frozenset({"delta", "b"})

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        base: float = 10000.0,
        init: Literal["rope", "authors"] = "rope",
    ) -> None:
        super().__init__()
        check_sizes("Polar (CMHA)", num_heads=num_heads)
        check_head_dim(head_dim, "Polar (CMHA)")
        if init not in ("rope", "authors"):
            raise ValueError(unknown("Polar init", init, ("rope", "authors")))
        check_base(base)
        self.num_heads, self.head_dim, self.base, self.init = num_heads, head_dim, base, init
        self.delta = self.float32_parameter(num_heads, head_dim // 2)
        self.b = self.float32_parameter(num_heads, head_dim // 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.b)
        if self.init == "rope":
            nn.init.ones_(self.delta)
        else:
            nn.init.normal_(self.delta, std=(self.head_dim / 2) ** -0.5)

    def init_projection(self, weight: Tensor) -> None:
        if self.init == "authors":
            # Xavier of each (C, C) block; on the whole, as a sharded weight cannot be split.
            bound = math.sqrt(3 / weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)

    def rotate(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor | None = None,
        x: Tensor | None = None,
        state: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotate q, k (B, H, T, D) by their angles and positions (T,), (B, T) or None: 0 .. T-1."""
        check_pair(q, k, self.head_dim)
        positions = check_positions(positions, q.shape[0], q.shape[-2], q.device)
        frequencies = inverse_frequencies(self.head_dim, self.base, q.device)
        turns = position_phases(positions, frequencies).to(phase_dtype(q))  # (T, D/2)
        return turn_by_content(q, k, self.delta, self.b, turns)

    def rotate_fused(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor | None = None,
        x: Tensor | None = None,
        state: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """`rotate` by the kernel: one launch for q and k."""
        from posenc.kernels.polar import polar

        check_pair(q, k, self.head_dim)
        positions = check_positions(positions, q.shape[0], q.shape[-2], q.device).long()
        frequencies = inverse_frequencies(self.head_dim, self.base, q.device)
        return polar(q, k, self.delta, self.b, frequencies, positions)

    def scores(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor,
        key_positions: Tensor | None = None,
        x: Tensor | None = None,
        state: Any = None,
    ) -> Scores:
        return Scores(scale=1.0 if self.init == "authors" else None)

    def extra_repr(self) -> str:
        sizes = f"num_heads={self.num_heads}, head_dim={self.head_dim}"
        return f"{sizes}, base={self.base}, init={self.init!r}"
