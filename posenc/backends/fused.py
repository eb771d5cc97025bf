"""The Triton kernels as a back end, `impl="fused"`: where they run, what they compute.

The only importer of `posenc.kernels`, and only when this back end is chosen: posenc itself needs no
Triton. Which description has a kernel, alone or inside the core, is decided here and nowhere else.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from posenc.backends.case import Case
from posenc.cache import Cache
from posenc.convolution import DepthwiseConv
from posenc.placement import segment_bounds
from posenc.rotations import ByContent, ByPosition, ByRates, Rotation
from posenc.routing.gates import Gates, weighed
from posenc.scores import Bias, ByDistance, Decay, RelativeTerm, Scores, add_per_head

REMEDY = "Use impl='sdpa' (torch's fused attention), 'reference' or 'auto'."


def check_available() -> None:
    """Raise ValueError unless Triton has a CUDA device, or its interpreter is on."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"impl='fused' asks for a Triton kernel; Triton is not installed. {REMEDY}"
        )
    from posenc.kernels.common import INTERPRETED

    if not (INTERPRETED or torch.cuda.is_available()):
        raise ValueError(
            "impl='fused' asks for a Triton kernel, which needs a CUDA device, or for a test "
            f"TRITON_INTERPRET=1 before Python starts. {REMEDY}"
        )


def runs_on(device: torch.device) -> bool:
    """Whether kernels run on tensors of a device."""
    if importlib.util.find_spec("triton") is None:
        return False
    from posenc.kernels.common import INTERPRETED

    return INTERPRETED if device.type == "cpu" else device.type == "cuda"


def check_parts(dropout: float, conv: DepthwiseConv | None) -> None:
    """Raise ValueError for parts of a module that no kernel computes. Needs Triton."""
    if dropout:
        raise ValueError(f"impl='fused' {NO_DROPOUT}. {REMEDY}")
    if conv is not None and (conv.grouped or not conv.causal):
        raise ValueError(
            "impl='fused' has no kernel for a convolution of fewer key heads, nor for a centred "
            f"one (causal=False). {REMEDY}"
        )
    if conv is not None:
        from posenc.kernels.conv import MAX_TAPS

        if conv.kernel_size > MAX_TAPS:
            raise ValueError(
                f"impl='fused' has no kernel for a convolution of kernel_size={conv.kernel_size}; "
                f"it holds up to {MAX_TAPS} taps. {REMEDY}"
            )


#: Features of a head that a tile holds: beyond them impl="fused" fails, and "auto" goes elsewhere.
MAX_DIM = 256

NO_DROPOUT = "drops no attention weights; got dropout"


def reason(case: Case) -> str | None:
    """Why no kernel computes the case, or None."""
    if case.dropout_p:
        return NO_DROPOUT
    if not case.mask.causal:
        return "is causal attention; got causal=False"
    if case.place.at is not None:
        return "reads the keys that there are, not a memory of fixed size (generate(compile=True))"
    if case.scores.contextual is not None:
        return "has no kernel for positions that gates count (CoPE)"
    if case.mask.segments is not None and case.mask.length < case.mask.key_length:
        return "takes packed documents whole, not in blocks of queries as xPos does for long texts"
    if case.scores.reflections is not None:
        return "has no kernel for products of reflections"
    term = case.scores.relative
    given = term is not None and term.distances is not None and not _joins(case, term)
    bias = case.scores.bias
    if given or (isinstance(bias, ByDistance) and bias.positions is not None):
        return (
            "has no kernel for a relative term or a bias of distance at given positions or over "
            "padding between tokens; leave positions out where they are consecutive"
        )
    if _is_dense(case.scores):
        return "has no kernel for this bias of the logits"
    return None


def too_large(case: Case) -> bool:
    """Whether the kernels' tiles do not reach: another back end is then to be found."""
    dim = case.q.shape[-1]
    widest = 2 * dim if case.scores.relative is not None else max(dim, case.k.shape[-1])
    return widest > MAX_DIM


def _is_dense(scores: Scores) -> bool:
    """Whether the logits have a bias that no kernel makes."""
    bias = scores.bias
    decays = isinstance(bias, Decay) and not bias.two_sided
    made = decays or isinstance(bias, ByDistance)
    return bias is not None and not (made and scores.relative is None)


def attend(case: Case, deterministic: bool | None = None) -> Tensor:
    """(B, H, T, D) in q's dtype. What gates drop is skipped, but with a bias or relative term of
    more than a few queries.

    Args:
        deterministic: of those backward passes that take it, see
            `posenc.kernels.flash.flash_attention`.
    """
    from posenc.kernels.biased_attention import biased_attention
    from posenc.kernels.relative import relative_attention

    if _decodes(case) and (y := _decode(case)) is not None:
        return y
    mask = _kernel_mask(case)
    # Gates that drop nothing only weigh what the kernels without gates give.
    drops = case.gates is not None and case.gates.kept < 1
    q, k, v, scores, scale = case.q, case.k, case.v, case.scores, case.scale
    rotation = case.rotation
    plain = scores.plain and scores.content is None and scores.scale is None
    if rotation is not None and not drops and plain:
        whole = _turn_and_attend(rotation, q, k, v, mask, deterministic)
        if whole is not None:
            return weighed(whole, case.gates)
    if rotation is not None:
        q, k = turn(rotation, q, k)
    term, options = scores.relative, {"scale": scale, "mask": mask, "deterministic": deterministic}
    query = add_per_head(q, scores.content)
    if scores.bias is not None:
        decay, table = _parts(scores.bias)
        y = biased_attention(query, k, v, decay, table, **options)
        return weighed(y, case.gates)
    if term is None:
        return _plain(query, k, v, case.gates, options)
    if _joins(case, term):
        assert term.factors is not None
        on_query, on_key = term.factors(add_per_head(q, term.query))
        queries = torch.cat((query, on_query), dim=-1)
        keys = torch.cat((k, on_key.expand(*k.shape[:-1], on_query.shape[-1])), dim=-1)
        return _plain(queries, keys, v, case.gates, options)
    table = term.rows(k.shape[-2])
    biases = (term.offset, scores.content, term.query)
    y = relative_attention(q, k, v, table, *biases, **options)
    return weighed(y, case.gates)


def _decodes(case: Case) -> bool:
    """Whether these are few queries, q and k turned: a step, if no gradient is wanted."""
    if case.rotation is not None or case.mask.segments is not None:
        return False
    from posenc.kernels.common import differentiated
    from posenc.kernels.decode import fits

    if differentiated(case.q, case.k, case.v):
        return False
    term = case.scores.relative
    if term is not None and _joins(case, term):
        return False
    return fits(case.q, case.v)


def _decode(case: Case) -> Tensor | None:
    """By the kernel that splits the keys; None where a gradient of the terms is wanted. A bias of
    few queries is no larger than what makes it.
    """
    from posenc.kernels.common import differentiated
    from posenc.kernels.decode import decode_attention
    from posenc.kernels.decode_relative import relative_by_key
    from posenc.kernels.mask import Mask

    bias, term, keys = case.scores.added(), case.scores.relative, case.mask.key_length
    query = add_per_head(case.q, case.scores.content)
    # Those that drop nothing only weigh, as in `attend`.
    gates = case.gates if case.gates is not None and case.gates.kept < 1 else None
    parts: list[Any] = [query, case.k, case.v, bias, None if gates is None else gates.values]
    of_term: list[Any] = []
    if term is not None:
        of_term = [add_per_head(case.q, term.query), term.rows(keys), term.offset]
    if differentiated(*parts, *of_term):
        return None
    if bias is not None:
        parts[3] = bias.expand(-1, *case.q.shape[1:3], keys)
    if term is not None:  # beside a bias there is none
        window = case.mask.window
        parts[3] = relative_by_key(*of_term, keys=keys, scale=case.scale, window=window)
    mask = Mask(case.mask.window, real=case.mask.real)
    y: Tensor = decode_attention(*parts, scale=case.scale, mask=mask)
    return y if gates is not None else weighed(y, case.gates)


def _parts(bias: Bias) -> tuple[Tensor | None, Tensor | None]:
    """What kernels take of a bias that is not dense: a decay, or a table of distances."""
    if isinstance(bias, Decay):
        return bias.keys, None
    assert isinstance(bias, ByDistance)
    return None, bias.of(torch.arange(bias.key_length, device=bias.device))


def _kernel_mask(case: Case) -> Any:
    """What a case hides besides the future, as kernels take it."""
    from posenc.kernels.mask import Mask

    first, last = case.mask.bounds() or (None, None)
    return Mask(case.mask.window, first, last, case.mask.real)


def _joins(case: Case, term: RelativeTerm) -> bool:
    """Whether a sinusoid no wider than a head joins q and k as features of plain attention."""
    whole = case.mask.length == case.mask.key_length
    return term.factors is not None and term.width <= case.q.shape[-1] and whole


def _plain(q: Tensor, k: Tensor, v: Tensor, gates: Gates | None, options: dict[str, Any]) -> Tensor:
    """Attention without terms in the logits, dense or of what the gates keep."""
    if k.shape[-1] > v.shape[-1]:  # kernels take equal widths
        padded = F.pad(v, (0, k.shape[-1] - v.shape[-1]))
        return _plain(q, k, padded, gates, options)[..., : v.shape[-1]]
    from posenc.kernels.flash import flash_attention
    from posenc.kernels.routed import routed_attention

    if gates is None or gates.kept == 1:
        return weighed(flash_attention(q, k, v, **options), gates)
    every, whole = gates.need_every_output, {key: options[key] for key in ("scale", "mask")}
    y: Tensor = routed_attention(q, k, v, gates.values, straight_through=every, **whole)
    return y


def _turn_and_attend(
    rotation: Rotation,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    deterministic: bool | None,
) -> Tensor | None:
    """Rotation and attention in one kernel where there is one, else None."""
    if isinstance(rotation, ByPosition) and _has_kernel(rotation):
        from posenc.kernels.rope_attention import rope_attention

        _, factor = rotation.spectrum.at(rotation.place)
        positions = _positions(rotation)
        pairing = str(rotation.pairing)
        options = {"factor": factor, "pairing": pairing, "mask": mask}
        options["deterministic"] = deterministic
        return rope_attention(q, k, v, _fractions(rotation), positions, **options)
    if isinstance(rotation, ByRates) and rotation.state is None:
        from posenc.kernels.carope_attention import carope_attention

        log_f, power = _log_rates(rotation), rotation.first_power
        options = {"first_power": power, "mask": mask, "deterministic": deterministic}
        return carope_attention(q, k, v, log_f, **options)
    return None


def _has_kernel(rotation: ByPosition) -> bool:
    """Integer positions of one axis; others turn eagerly."""
    integers = not rotation.place.positions.dtype.is_floating_point
    return rotation.spectrum.axis is None and isinstance(rotation.pairing, str) and integers


def _positions(rotation: ByPosition | ByContent) -> Tensor:
    """(T,), or (B, T) where rows differ."""
    positions = rotation.place.positions
    return positions[0] if positions.ndim == 2 and len(positions) == 1 else positions


def _fractions(rotation: ByPosition | ByContent) -> Tensor:
    """Its frequencies as kernels take them, once a placement, which all layers of a model share."""
    from posenc.kernels.turns import turns_from_radians

    spectrum, place = rotation.spectrum, rotation.place
    return place.once((spectrum.key, "turns"), lambda: turns_from_radians(spectrum.at(place)[0]))


def turn(rotation: Rotation, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k turned by a kernel, in one launch, or eagerly where there is none."""
    if isinstance(rotation, ByPosition) and _has_kernel(rotation):
        from posenc.kernels.rope import rope

        _, factor = rotation.spectrum.at(rotation.place)
        where, pairing = (_fractions(rotation), _positions(rotation)), str(rotation.pairing)
        return rope(q, k, *where, factor=factor, pairing=pairing)
    if isinstance(rotation, ByContent) and len(rotation.delta) == len(rotation.b):
        from posenc.kernels.polar import polar

        where = (_fractions(rotation), _positions(rotation))
        return polar(q, k, rotation.delta, rotation.b, *where)
    if isinstance(rotation, ByRates):
        return _turn_by_rates(rotation, q, k)
    turned_q, turned_k = rotation.apply(q, k)
    assert turned_q is not None
    assert turned_k is not None
    return turned_q, turned_k


def _log_rates(rotation: ByRates) -> Tensor:
    """The logarithms of the rates by their kernel; at padding those with which no phase moves."""
    from posenc.kernels.rates import log_rates

    bias = None if rotation.bias is None else rotation.bias.float()  # casts may have passed by
    log_f: Tensor = log_rates(rotation.x, rotation.weight.float(), bias, rotation.real)
    return log_f.expand(-1, rotation.heads, -1)


def _turn_by_rates(rotation: ByRates, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """By the kernel, which writes the phases of the tokens only for a cache."""
    from posenc.kernels.carope import carope, carope_with_phases
    from posenc.kernels.turns import radians_from_turns, turns_from_radians

    log_f, first_power, state = _log_rates(rotation), rotation.first_power, rotation.state
    if state is None:
        q, k, _ = carope(q, k, log_f, first_power=first_power)
        return q, k
    carry = turns_from_radians(state.recent("phase").squeeze(-2))
    q, k, phases = carope_with_phases(q, k, log_f, carry, first_power=first_power)
    state.append("phase", radians_from_turns(phases))
    return q, k


def convolve(
    conv: DepthwiseConv,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    real: Tensor | None = None,
    segments: Tensor | None = None,
    state: Cache | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`DepthwiseConv` by its kernel, q, k and v in one launch."""
    from posenc.kernels.conv import conv as kernel

    past = None if state is None else state.recent("conv").to(q.dtype)
    first = None if segments is None else segment_bounds(segments)[0]
    outputs = kernel(q, k, v, conv.weight, conv.bias, past, first=first, real=real)
    if state is not None:
        inputs = (q, k, v) if real is None else (z * real[:, None, :, None] for z in (q, k, v))
        state.append("conv", torch.stack(tuple(inputs), dim=1))
    return outputs
