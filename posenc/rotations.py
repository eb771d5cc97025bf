"""How q and k turn: a rotation is data that an encoding describes and a back end computes.

    q'[m] = R(angle_q[m]) q[m],   k'[n] = R(angle_k[n]) k[n]

    ByPosition    angle = position * frequency                                  RoPE
    ByContent     that, and a multiple of each pair's own angle                 CMHA
    ByRates       the running sum of powers of a rate that each token sets      CARoPE
    BySteps       the running sum of steps that each token sets          Selective RoPE, GRAPE
    ByPhase       given                                                         phases of a model
    ByFunction    whatever a function makes of q and k

`apply` computes any of them eagerly; a back end that has a kernel for one reads its numbers.
Shapes: q (B, H, T, D), k (B, G, T, D), G key heads of which each serves H/G query heads. q or k may
be None: what is None stays so.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from posenc.cache import Cache
from posenc.phase import (
    Layout,
    inverse_frequencies,
    pairs,
    phase_dtype,
    position_phases,
    repeat_heads,
    sines,
    turn,
    turn_by,
    wrap,
)
from posenc.placement import Placement
from posenc.rates import log_rates

Turned = tuple[Tensor | None, Tensor | None]


class Rotation(Protocol):
    """What `Encoding.rotation` describes."""

    def apply(self, q: Tensor | None, k: Tensor | None) -> Turned:
        """q and k, turned."""
        ...


class Spectrum(NamedTuple):
    """Frequencies, and the factor of cosine and sine; equal keys mean equal numbers."""

    key: Hashable
    make: Callable[[torch.device], tuple[Tensor, float]]  # (F,) in fp64
    axis: tuple[int, ...] | None = None  # the axis that each of F frequencies turns with

    def at(self, place: Placement) -> tuple[Tensor, float]:
        """The numbers, on the device of the positions, once a placement."""
        return place.once(self.key, lambda: self.make(place.positions.device))

    def phases(self, place: Placement) -> Tensor:
        """Positions times frequencies, fp64 modulo 2 pi: (T, F) or (B, 1, T, F)."""
        frequencies, _ = self.at(place)
        if self.axis is None:
            return position_phases(place.positions, frequencies)
        phase = wrap(place.positions[..., list(self.axis)] * frequencies)  # (.., T, F)
        return phase if phase.ndim == 2 else phase.unsqueeze(1)


def plain_spectrum(dim: int, base: float) -> Spectrum:
    """base^(-2i/dim) for i = 0 .. dim/2 - 1."""

    def make(device: torch.device) -> tuple[Tensor, float]:
        return inverse_frequencies(dim, base, device), 1.0

    return Spectrum(("plain", dim, base), make)


class ByPosition(NamedTuple):
    """R(position * frequency): RoPE."""

    place: Placement
    spectrum: Spectrum
    pairing: Layout = "half"

    def sines(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `turn` multiplies by: (T, R) or (B, 1, T, R) each, once a placement."""

        def make() -> tuple[Tensor, Tensor]:
            _, factor = self.spectrum.at(self.place)
            return sines(self.spectrum.phases(self.place).to(dtype), factor, self.pairing)

        return self.place.once((self.spectrum.key, self.pairing, dtype), make)

    def apply(self, q: Tensor | None, k: Tensor | None) -> Turned:
        if q is not None and k is not None and self.place.length == 1:
            size, dtype = q.shape[0], q.dtype
            if dtype == k.dtype and size == k.shape[0]:
                # A single token's time is that of starting each op: both in one, 6 us of 117 a
                # step saved. `split` is Python, and 3 us more than what it calls.
                both = turn(torch.cat((q, k), dim=1), *self.sines(phase_dtype(q)), self.pairing)
                q, k = both.split_with_sizes((q.shape[1], k.shape[1]), dim=1)
                return q, k
        one = q if q is not None else k
        assert one is not None
        cos, sin = self.sines(phase_dtype(one))
        q = None if q is None else turn(q, cos, sin, self.pairing)
        return q, None if k is None else turn(k, cos, sin, self.pairing)


class ByContent(NamedTuple):
    """R((delta - 1) th + b + position * frequency), th the pair's own angle; b turns q alone."""

    place: Placement
    spectrum: Spectrum
    delta: Tensor  # (G, D/2)
    b: Tensor  # (H, D/2)

    def apply(self, q: Tensor | None, k: Tensor | None) -> Turned:
        one = q if q is not None else k
        assert one is not None
        dtype = phase_dtype(one)
        turns = self.place.once(
            (self.spectrum.key, "phase", dtype),
            lambda: self.spectrum.phases(self.place).to(dtype),
        )
        return turn_by_content(q, k, self.delta, self.b, turns)


def content_angle(x: Tensor, delta: Tensor) -> Tensor:
    """(delta - 1) * atan2(x2, x1): x (B, H, T, D), delta (H, D/2) -> (B, H, T, D/2); 0 at x = 0."""
    first, second = pairs(x.to(phase_dtype(x)))
    # torch 2.11 exports no difference of a parameter itself and an integer to ONNX.
    return (delta.unsqueeze(-2) - 1) * torch.atan2(second, first)


def turn_by_content(
    q: Tensor | None, k: Tensor | None, delta: Tensor, b: Tensor, turns: Tensor
) -> Turned:
    """Rotate q and k (B, H, T, D) by their own angles and by `turns`, that of their positions.

    delta: (G, D/2); b: (H, D/2) turns q alone. turns: broadcastable to (B, H, T, D/2).
    """
    if q is not None:
        of_heads = repeat_heads(delta, len(b), dim=0)
        (q,) = turn_by(content_angle(q, of_heads) + (b.unsqueeze(-2) + turns), q)
    if k is not None:
        (k,) = turn_by(content_angle(k, delta) + turns, k)
    return q, k


class ByRates(NamedTuple):
    """R(running sum of f^(i + first_power)): CARoPE. The phases of a cached past go on."""

    x: Tensor  # (B, T, C), the tokens
    weight: Tensor  # (C, G), or (C, 1): one rate for all heads
    bias: Tensor | None  # as many
    heads: int  # G
    pairs: int
    first_power: int
    real: Tensor | None = None  # (B, T) bool, False where the phase stands still
    state: Cache | None = None  # its stream "phase": (B, G, T, D/2) in fp64

    def log_f(self) -> Tensor:
        """Logarithms of the rates, (B, G, T) in fp64."""
        return log_rates(self.x, self.weight, self.bias).expand(-1, self.heads, -1)

    def phases(self) -> Tensor:
        """(B, G, T, D/2), fp64 modulo 2 pi; `state` remembers them."""
        carry = None if self.state is None else self.state.recent("phase")
        phase = running_phase(self.log_f(), self.pairs, self.first_power, carry, self.real)
        if self.state is not None:
            self.state.append("phase", phase)
        return phase

    def apply(self, q: Tensor | None, k: Tensor | None) -> Turned:
        return turn_by_phase(q, k, self.phases())


class BySteps(NamedTuple):
    """R(running sum of steps), or of one step times frequencies. The sums of a cached past go on.

    Sums without frequencies are phases, and kept modulo 2 pi. Those that frequencies multiply are
    kept whole: over a million tokens the rounding of fp64 adds up to 1e-5 at most.
    """

    steps: Tensor  # (B, G, T, D/2), or (B, 1, T, 1) with frequencies; fp64
    frequencies: Tensor | None = None  # (D/2,) in fp64
    inclusive: bool = True  # whether a token's own step counts for it
    real: Tensor | None = None  # (B, T) bool, False where the sum stands still
    state: Cache | None = None  # its stream "sums": inclusive ones, of the steps' shape

    def phases(self) -> Tensor:
        """(B, G, T, D/2), fp64 modulo 2 pi; `state` remembers the sums."""
        steps = self.steps if self.real is None else self.steps * self.real[:, None, :, None]
        sums, carry = steps.cumsum(-2), None
        if self.state is not None:
            carry = self.state.recent("sums")
            sums = sums + carry
        if self.frequencies is None:
            sums = wrap(sums)
        if self.state is not None:
            self.state.append("sums", sums)
        if not self.inclusive:
            before = sums.new_zeros(()).expand_as(sums[..., :1, :]) if carry is None else carry
            sums = torch.cat((before, sums), dim=-2)[..., :-1, :]
        return sums if self.frequencies is None else wrap(sums * self.frequencies)

    def apply(self, q: Tensor | None, k: Tensor | None) -> Turned:
        return turn_by_phase(q, k, self.phases())


class ByPhase(NamedTuple):
    """R(phase), the same for q and k."""

    phase: Tensor  # (B, G, T, D/2)

    def apply(self, q: Tensor | None, k: Tensor | None) -> Turned:
        return turn_by_phase(q, k, self.phase)


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


def turn_by_phase(q: Tensor | None, k: Tensor | None, phase: Tensor) -> Turned:
    """Rotate q and k by one phase (B, G or 1, T, D/2), rounded to the dtype of sines first."""
    one = q if q is not None else k
    assert one is not None
    phase = phase.to(phase_dtype(one))
    shared = phase.shape[1] == 1
    if q is not None and k is not None and (shared or q.shape[1] == k.shape[1]):
        q, k = turn_by(phase, q, k)  # one pair of sines for both
        return q, k
    if q is not None:
        (q,) = turn_by(phase if shared else repeat_heads(phase, q.shape[1], dim=1), q)
    if k is not None:
        (k,) = turn_by(phase, k)
    return q, k


class ByFunction(NamedTuple):
    """What an encoding's own `rotate` does, for those that describe nothing."""

    function: Callable[..., Any]
    place: Placement
    x: Tensor | None
    state: Cache | None

    def apply(self, q: Tensor | None, k: Tensor | None) -> Turned:
        return self.function(q, k, self.place.positions, self.x, self.state)
