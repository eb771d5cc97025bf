"""Phases and rotations: what every rotary scheme shares.

    R(a):  (x1, x2) -> (x1 cos a - x2 sin a,  x2 cos a + x1 sin a)      for every pair of features

Phases are formed in fp64 and reduced modulo 2 pi before anything rounds them to fp32: the fp32
product position * frequency is off by 0.04 rad at a million positions, the reduced phase by 2e-7
rad at any. Only (T, D/2) or (B, H, T, D/2) numbers are touched, so fp64 costs next to nothing.

Shapes: x (B, H, T, D), angles broadcastable to (B, H, T, D/2).
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

Pairing = Literal["half", "interleaved"]
PAIRINGS: tuple[Pairing, ...] = ("half", "interleaved")
#: How features pair up; widths are blocks side by side, half-split inside each.
Layout = Pairing | tuple[int, ...]


def inverse_frequencies(dim: int, base: float, device: torch.device | None = None) -> Tensor:
    """omega_i = base^(-2i/dim) for i = 0 .. dim/2 - 1, in fp64, from Python numbers (no buffer)."""
    last = (2 - dim) / dim
    return torch.logspace(0, last, dim // 2, base=base, dtype=torch.float64, device=device)


def wrap(phase: Tensor) -> Tensor:
    """Reduce radians to [-pi, pi]; the gradient passes unchanged."""
    # Detached: rounding has a gradient of zeros, which four more passes would carry back.
    return (phase.detach() / (2 * math.pi)).round_().mul_(-2 * math.pi).add_(phase)


def position_phases(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Positions (T,) or (B, T) times frequencies (F,), fp64 modulo 2 pi: (T, F) or (B, 1, T, F)."""
    phase = wrap(positions.unsqueeze(-1) * frequencies)
    return phase if positions.ndim == 1 else phase.unsqueeze(1)


def phase_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sines are taken for x: fp64 for fp64 inputs, else fp32."""
    dtype = x.dtype
    return dtype if dtype.itemsize >= 4 else torch.float32


def repeat_heads(x: Tensor, heads: int, dim: int) -> Tensor:
    """x with each of its G heads (along `dim`) repeated for the heads/G that share it."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim=dim)


def pairs(x: Tensor, pairing: Layout = "half") -> tuple[Tensor, Tensor]:
    """The two members of every pair of features, each (..., D/2)."""
    if isinstance(pairing, tuple):
        halves = [half for block in x.split(pairing, -1) for half in block.chunk(2, -1)]
        return torch.cat(halves[::2], dim=-1), torch.cat(halves[1::2], dim=-1)
    first, second = x.chunk(2, -1) if pairing == "half" else x.unflatten(-1, (-1, 2)).unbind(-1)
    return first, second


def join(first: Tensor, second: Tensor, pairing: Layout = "half") -> Tensor:
    """The inverse of `pairs`."""
    if isinstance(pairing, tuple):
        widths = [width // 2 for width in pairing]
        halves = zip(first.split(widths, -1), second.split(widths, -1), strict=True)
        return torch.cat([half for block in halves for half in block], dim=-1)
    if pairing == "half":
        return torch.cat((first, second), dim=-1)
    return torch.stack((first, second), dim=-1).flatten(-2)


def swap(x: Tensor, pairing: Layout = "half") -> Tensor:
    """The partner of every feature, in its place: (..., D)."""
    if pairing == "half":
        return x.roll(x.shape[-1] // 2, -1)
    first, second = pairs(x, pairing)
    return join(second, first, pairing)


def sines(angle: Tensor, factor: float = 1.0, pairing: Layout = "half") -> tuple[Tensor, Tensor]:
    """What `turn` multiplies each feature and its partner by, factor times: cos a for both, -sin a
    for the first of a pair and sin a for the second; angle (..., R/2) -> (..., R) each.
    """
    cos, sin = angle.cos(), angle.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return join(cos, cos, pairing), join(-sin, sin, pairing)


def turn(x: Tensor, cos: Tensor, sin: Tensor, pairing: Layout = "half") -> Tensor:
    """Rotate the first cos.shape[-1] features of x, in cos's precision; the result has x's dtype.

    x (B, H, T, D); cos, sin of `sines`, broadcastable to (B, H, T, R) with R <= D. Features beyond
    R pass through.
    """
    width, dtype = cos.shape[-1], x.dtype
    rotated, rest = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    if dtype != cos.dtype:
        rotated = rotated.to(cos.dtype)
    partners = swap(rotated, pairing)
    # Whole rows, not halves: on CPU 2x faster. In place where autograd allows it: fresh memory is
    # what costs. No fused multiply-add, whose rounding depends on how the operands are laid out:
    # schemes that meet at the same angles agree bit for bit.
    partners = partners.mul_(sin) if _may_write(sin) else partners * sin
    y = partners.add_(rotated * cos)
    if dtype != cos.dtype:
        y = y.to(dtype)
    return y if rest is None else torch.cat((y, rest), dim=-1)


def _may_write(factor: Tensor) -> bool:
    """Whether a fresh tensor may be multiplied in place: not where its old values are needed, nor
    under torch.func.vmap, whose batch `factor` alone may have. A compiler sees to it itself.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not factor.requires_grad


def turn_by(angle: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rotate tensors (B, H, T, D) by an angle (.., D/2) that may have a gradient; bit for bit as
    `turn` does.
    """
    if not angle.requires_grad:
        cos, sin = sines(angle)
        return tuple(turn(x, cos, sin) for x in tensors)
    # By halves: in the same time the backward pass of the angle keeps half as much.
    cos, sin = angle.cos(), angle.sin()
    turned = []
    for x in tensors:
        first, second = pairs(x.to(cos.dtype))
        y = join((first * cos).sub_(second * sin), (second * cos).add_(first * sin))
        turned.append(y.to(x.dtype))
    return tuple(turned)


class Float32Parameters(nn.Module):
    """A module whose parameters ignore casts below fp32.

    A phase parameter rounded to bf16 is another encoding (CARoPE's bias at D=64 becomes RoPE of
    base 10060), so `model.to(torch.bfloat16)` and `model.half()` move such a module without
    rounding it.
    """

    @staticmethod
    def float32_parameter(*shape: int) -> nn.Parameter:
        """An uninitialised parameter in the default dtype, but never below fp32."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        return nn.Parameter(torch.empty(shape, dtype=dtype))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # With assign=True a checkpoint's bf16 tensor would take the parameter's place.
        for name, _ in self.named_parameters(prefix.rstrip("."), recurse=False):
            if name in state_dict:
                tensor = state_dict[name]
                state_dict[name] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            low = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if low else moved

        return super()._apply(keep, *args, **kwargs)
