"""RoPE scalings: other frequencies for texts longer than the training length.

    w_i = base^(-2i/D), s = factor, L0 = original length, a multiplies cos and sin (logits get a^2)

    linear    w_i / s, a = 1                                                    arXiv 2306.15595
    ntk       base' = base s^(D/(D-2)), a = 1
    dynamic   base' = base (s L/L0 - (s-1))^(D/(D-2)), L = max(target, L0), a = 1
    yarn      (w_i/s)(1-e_i) + w_i e_i, a = 0.1 ln s + 1                        arXiv 2309.00071
              e_i = 1 - clamp((i-lo)/(hi-lo), 0, 1), dim(r) = D ln(L0/(2 pi r)) / (2 ln base),
              lo = max(floor dim(32), 0), hi = min(ceil dim(1), D-1)
    longrope  w_i / lambda_i: the long list if target > L0, else the short one  arXiv 2402.13753
              a = sqrt(1 + ln s / ln L0)
    llama3    wavelength 2 pi/w: below L0/high keep; above L0/low w/s; between (1-u) w/s + u w,
              u = (L0/wavelength - low)/(high - low), a = 1

`dynamic` and `longrope` are often decided by the running length, which changes the rotation of rows
already cached. Here both take an explicit, fixed `target_length`, so a prefix never changes and
decoding equals the full forward.

A scaling is written as in Hugging Face configurations: `{"rope_type": "yarn", "factor": 4.0,
"original_max_position_embeddings": 2048}`; `target_length` is ours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from posenc.errors import unknown
from posenc.phase import inverse_frequencies

#: Frequencies (fp64, on the device) and the attention factor a.
Scaled = tuple[Tensor, float]


def linear(dim: int, base: float, device: torch.device | None, *, factor: float) -> Scaled:
    """Position interpolation: every position is divided by the factor."""
    return inverse_frequencies(dim, base, device) / factor, 1.0


def ntk(dim: int, base: float, device: torch.device | None, *, factor: float) -> Scaled:
    """A larger base: the slowest band is stretched by the factor, the fastest is kept."""
    return inverse_frequencies(dim, base * factor ** _ntk_power(dim), device), 1.0


def dynamic(
    dim: int,
    base: float,
    device: torch.device | None,
    *,
    factor: float,
    original_max_position_embeddings: int,
    target_length: int,
) -> Scaled:
    """NTK for one target length, fixed in advance; plain RoPE up to the original length."""
    ratio = max(target_length, original_max_position_embeddings) / original_max_position_embeddings
    stretch = factor * ratio - (factor - 1)
    return inverse_frequencies(dim, base * stretch ** _ntk_power(dim), device), 1.0


def yarn(
    dim: int,
    base: float,
    device: torch.device | None,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
) -> Scaled:
    """Fast bands kept, slow bands interpolated, a ramp between; the logits are sharpened by a^2."""

    def band(rotations: float) -> float:
        return (
            dim
            * math.log(original_max_position_embeddings / (2 * math.pi * rotations))
            / (2 * math.log(base))
        )

    low = max(math.floor(band(beta_fast)), 0)
    high = min(math.ceil(band(beta_slow)), dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float64, device=device)
    # A ramp of no width would divide by zero; 0.001 is the usual guard.
    keep = 1 - ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = inverse_frequencies(dim, base, device)
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return frequencies / factor * (1 - keep) + frequencies * keep, attention_factor


def longrope(
    dim: int,
    base: float,
    device: torch.device | None,
    *,
    factor: float,
    original_max_position_embeddings: int,
    target_length: int,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    attention_factor: float | None = None,
) -> Scaled:
    """One searched divisor a band: the long list past the original length, else the short one."""
    divisors = long_factor if target_length > original_max_position_embeddings else short_factor
    if attention_factor is None:
        logs = math.log(factor) / math.log(original_max_position_embeddings)
        attention_factor = math.sqrt(1 + logs) if factor > 1 else 1.0
    scale = torch.tensor(list(divisors), dtype=torch.float64, device=device)
    return inverse_frequencies(dim, base, device) / scale, attention_factor


def llama3(
    dim: int,
    base: float,
    device: torch.device | None,
    *,
    factor: float = 8.0,
    original_max_position_embeddings: int = 8192,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Scaled:
    """Short wavelengths kept, long ones interpolated, those between blended."""
    frequencies = inverse_frequencies(dim, base, device)
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)  # L0 / wavelength
    blend = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - blend) * frequencies / factor + blend * frequencies, 1.0


def _ntk_power(dim: int) -> float:
    if dim < 4:
        raise ValueError(f"NTK scalings need a rotary dim of at least 4; got {dim}.")
    return dim / (dim - 2)


SCALINGS: dict[str, Callable[..., Scaled]] = {
    "linear": linear,
    "ntk": ntk,
    "dynamic": dynamic,
    "yarn": yarn,
    "longrope": longrope,
    "llama3": llama3,
}


def scaled_frequencies(
    dim: int, base: float, scaling: Mapping[str, Any] | None, device: torch.device | None = None
) -> Scaled:
    """The frequencies (dim/2,) in fp64 and the factor of cos and sin.

    Args:
        dim: the number of rotated features, even.
        scaling: None for plain RoPE, else a mapping with `rope_type` and that scaling's own
            arguments.

    Raises:
        ValueError: for an unknown `rope_type` or argument, a missing one, or a factor below 1.
    """
    if scaling is None:
        return inverse_frequencies(dim, base, device), 1.0
    options = dict(scaling)
    kinds = {options.pop(key) for key in ("rope_type", "type") if key in options}
    name = kinds.pop() if len(kinds) == 1 else None
    options.pop("rope_theta", None)  # Hugging Face repeats the base there
    if name == "default":
        return inverse_frequencies(dim, base, device), 1.0
    if name not in SCALINGS:
        raise ValueError(unknown("RoPE scaling (rope_type)", name, SCALINGS))
    for key, value in options.items():
        _check_option(key, value, dim)
    try:
        return SCALINGS[name](dim, base, device, **options)
    except TypeError as error:
        reason = str(error).split("() ", 1)[-1]
        raise ValueError(f"RoPE scaling {name!r}: {reason}.") from None


def _check_option(key: str, value: Any, dim: int) -> None:
    """Every option is a finite number above 0, a factor and a length at least 1; or a list."""
    if value is None:
        return
    if key in ("short_factor", "long_factor"):
        if len(value) != dim // 2 or not all(map(_is_positive, value)):
            raise ValueError(
                f"longrope needs {dim // 2} positive factors in {key}, one a pair of features; "
                f"got {list(value)}."
            )
        return
    least = 1 if key == "factor" or "length" in key or "embeddings" in key else 0
    if not _is_positive(value) or value < least:
        bound = "at least 1" if least else "above 0"
        raise ValueError(f"the RoPE scaling's {key} must be a number {bound}; got {value!r}.")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf
