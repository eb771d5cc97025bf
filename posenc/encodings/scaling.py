"""RoPE scalings: other frequencies for texts longer than the training length.

    w_i = base^(-2i/D), s = factor, L0 = original length, a multiplies cos and sin (logits get a^2)

    linear    w_i / s, a = 1                                                    arXiv 2306.15595
    ntk       base' = base s^(D/(D-2)), a = 1
    dynamic   base' = base (s L/L0 - (s-1))^(D/(D-2)), L = max(target, L0), a = 1
    yarn      (w_i/s)(1-e_i) + w_i e_i, a = 0.1 ln s + 1                        arXiv 2309.00071
              e_i = 1 - clamp((i-lo)/(hi-lo), 0, 1), dim(r) = D ln(L0/(2 pi r)) / (2 ln base),
              lo = max(floor dim(32), 0), hi = min(ceil dim(1), D-1); truncate=False rounds neither
              with mscale m and mscale_all_dim n: a = (0.1 m ln s + 1) / (0.1 n ln s + 1)
    longrope  w_i / lambda_i: the long list if target > L0, else the short one  arXiv 2402.13753
              a = sqrt(1 + ln s / ln L0)
    llama3    wavelength 2 pi/w: below L0/high keep; above L0/low w/s; between (1-u) w/s + u w,
              u = (L0/wavelength - low)/(high - low), a = 1

`dynamic` and `longrope` are often decided by the running length, which changes the rotation of rows
already cached. Here both take an explicit, fixed `target_length`, so a prefix never changes and
decoding equals the full forward.

A scaling is written as in Hugging Face configurations: `{"rope_type": "yarn", "factor": 4.0,
"original_max_position_embeddings": 2048}`; `target_length` is ours, and where a factor is left out
`max_position_embeddings` over the original length gives it. `rope_theta` and
`partial_rotary_factor`, which live there too, are the encoding's base and rotary_dim, and
"proportional" its partial: see `read_mapping`. What a mapping holds is used or refused.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posenc.errors import unknown
from posenc.phase import inverse_frequencies

DEFAULT_BASE = 10000.0
_GIVEN = ("dim", "base", "device")  # of a scaling, by the encoding

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
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> Scaled:
    """Fast bands kept, slow bands interpolated, a ramp between; the logits are sharpened by a^2."""

    def band(rotations: float) -> float:
        return (
            dim
            * math.log(original_max_position_embeddings / (2 * math.pi * rotations))
            / (2 * math.log(base))
        )

    def sharpness(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    low, high = band(beta_fast), band(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float64, device=device)
    # A ramp of no width would divide by zero; 0.001 is the usual guard.
    keep = 1 - ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = inverse_frequencies(dim, base, device)
    if (mscale is None) != (mscale_all_dim is None):
        raise ValueError(
            "yarn's mscale and mscale_all_dim go together; got "
            f"{mscale} and {mscale_all_dim}. Give both, or attention_factor."
        )
    made = sharpness(1.0)
    if mscale is not None and mscale_all_dim is not None:
        made = sharpness(mscale) / sharpness(mscale_all_dim)
        if attention_factor is not None and not math.isclose(made, attention_factor, rel_tol=1e-4):
            raise ValueError(
                f"yarn's attention_factor={attention_factor} contradicts mscale and "
                f"mscale_all_dim, which make {made:.6g}. Give one of the two."
            )
    a = made if attention_factor is None else attention_factor
    return frequencies / factor * (1 - keep) + frequencies * keep, a


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
    if original_max_position_embeddings < 2:
        raise ValueError(
            "longrope needs original_max_position_embeddings of at least 2; got "
            f"{original_max_position_embeddings}. Give the length of training."
        )
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
    factor: float,
    original_max_position_embeddings: int,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Scaled:
    """Short wavelengths kept, long ones interpolated, those between blended."""
    if high_freq_factor <= low_freq_factor:
        raise ValueError(
            f"llama3 needs high_freq_factor above low_freq_factor; got {high_freq_factor} and "
            f"{low_freq_factor}. The release has 4 and 1."
        )
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
            arguments; `rope_theta` must be the base. Values of None count as left out.

    Raises:
        ValueError: for an unknown `rope_type` or argument, a missing one, or a factor below 1.
    """
    if scaling is None:
        return inverse_frequencies(dim, base, device), 1.0
    options = {key: value for key, value in scaling.items() if value is not None}
    name = rope_type(options)
    if options.pop("rope_theta", base) != base:
        raise ValueError(f"the scaling's rope_theta contradicts base={base}: got {dict(scaling)}.")
    if name == "default":
        if options:
            raise ValueError(unused(name, options))
        return inverse_frequencies(dim, base, device), 1.0
    for key, value in options.items():
        _check_option(key, value, dim)
    _derive_factor(name, options)
    known = inspect.signature(SCALINGS[name]).parameters
    if strange := {key: value for key, value in options.items() if key not in known}:
        raise ValueError(unused(name, strange))
    try:
        return SCALINGS[name](dim, base, device, **options)
    except TypeError as error:
        reason = str(error).split("() ", 1)[-1]
        raise ValueError(f"RoPE scaling {name!r}: {reason}.") from None


def _derive_factor(name: str, options: dict[str, Any]) -> None:
    """Take a factor that is left out from the lengths, where both are there."""
    longest = options.get("max_position_embeddings")
    original = options.get("original_max_position_embeddings")
    if name in ("yarn", "longrope") and longest is not None and original is not None:
        del options["max_position_embeddings"]
        derived = max(longest / original, 1.0)
        given = options.setdefault("factor", derived)
        if not math.isclose(given, derived, rel_tol=1e-4):
            raise ValueError(
                f"RoPE scaling {name!r}: factor={given} contradicts max_position_embeddings="
                f"{longest} over {original}. Leave one of them out."
            )


def rope_type(options: dict[str, Any]) -> str:
    """Take the kind of a mapping out of it, or ValueError."""
    kinds = [options.pop(key) for key in ("rope_type", "type") if key in options]
    known = ("default", *SCALINGS, "proportional")
    if not kinds:
        raise ValueError(
            f"a RoPE scaling needs its rope_type; got {options}. Known: {', '.join(known)}."
        )
    if kinds[0] != kinds[-1]:
        raise ValueError(
            f"the RoPE scaling's rope_type={kinds[0]!r} contradicts type={kinds[-1]!r}. "
            "Give one of the two."
        )
    if kinds[0] not in known:
        raise ValueError(unknown("RoPE scaling (rope_type)", kinds[0], known))
    return str(kinds[0])


def unused(name: str, options: Mapping[str, Any]) -> str:
    """What a mapping holds that its kind does not use, and what to do."""
    known = (
        [key for key in inspect.signature(SCALINGS[name]).parameters if key not in _GIVEN]
        if name in SCALINGS
        else []
    )
    remedy = f"It takes {', '.join(known) or 'nothing'}."
    if "mrope_section" in options:
        remedy = "Sections are RoPE(axes=.., layout='sections'), twice the pairs of each."
    return f"RoPE scaling {name!r} does not use {', '.join(sorted(options))}. {remedy}"


class Mapped(NamedTuple):
    """What a mapping and the arguments beside it say together."""

    base: float
    rotary_dim: int
    partial: str
    scaling: dict[str, Any] | None


def read_mapping(
    head_dim: int,
    base: float | None,
    rotary_dim: int | None,
    partial: str | None,
    scaling: Mapping[str, Any] | None,
) -> Mapped:
    """Take base, rotary_dim and partial from a mapping where the arguments are not given.

    Hugging Face keeps `rope_theta` and `partial_rotary_factor` there; its "proportional" is
    partial="proportional", and its factor a linear scaling.

    Raises:
        ValueError: the mapping contradicts an argument, or is no mapping.
    """
    if scaling is not None and not isinstance(scaling, Mapping):
        raise ValueError(f"scaling must be a mapping with a rope_type; got {scaling!r}.")
    options = {key: value for key, value in (scaling or {}).items() if value is not None}
    if options and rope_type(dict(options)) == "proportional":
        options.pop("type", None)
        if partial == "front":
            raise ValueError(
                "the scaling's rope_type='proportional' contradicts partial='front'. Give one of "
                "the two."
            )
        partial, factor = "proportional", options.pop("factor", None)
        options["rope_type"] = "default" if factor is None else "linear"
        if factor is not None:
            options["factor"] = factor
    theta = options.pop("rope_theta", None)
    if theta is not None and base is not None and theta != base:
        raise ValueError(
            f"the scaling's rope_theta={theta} contradicts base={base}. Give one of the two."
        )
    share = options.pop("partial_rotary_factor", None)
    if share is not None:
        none_turn = partial == "proportional" and share == 0 and not isinstance(share, bool)
        if not none_turn and (not _is_positive(share) or share > 1):
            raise ValueError(
                f"the RoPE scaling's partial_rotary_factor must lie in (0, 1]; got {share!r}."
            )
        whole = int(head_dim * share)
        features = 2 * (whole // 2) if partial == "proportional" else whole
        if rotary_dim not in (None, features):
            raise ValueError(
                f"the scaling's partial_rotary_factor={share} makes rotary_dim={features}, which "
                f"contradicts rotary_dim={rotary_dim}. Give one of the two."
            )
        rotary_dim = features
    base = theta if theta is not None else base
    return Mapped(
        DEFAULT_BASE if base is None else base,
        head_dim if rotary_dim is None else rotary_dim,
        partial or "front",
        None if scaling is None else options,
    )


def _check_option(key: str, value: Any, dim: int) -> None:
    """Every option is a finite number above 0, a factor and a length at least 1; or a list."""
    if key == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"the RoPE scaling's truncate must be True or False; got {value!r}.")
        return
    if key in ("short_factor", "long_factor"):
        row = isinstance(value, Sequence) and not isinstance(value, str)
        if not row or len(value) != dim // 2 or not all(map(_is_positive, value)):
            raise ValueError(
                f"longrope needs {dim // 2} positive factors in {key}, one a pair of features; "
                f"got {value!r}."
            )
        return
    if key == "mrope_section":
        return  # refused by name
    least = 1 if key == "factor" or "length" in key or "embeddings" in key else 0
    if not _is_positive(value) or value < least:
        bound = "at least 1" if least else "above 0"
        raise ValueError(f"the RoPE scaling's {key} must be a number {bound}; got {value!r}.")


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf
