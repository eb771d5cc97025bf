"""Reference definitions in float64, written from the papers: what the library is tested against.

Every function states its formula and source, then computes it with plain loops, so that a reader
can check one against the other in a minute. Nothing of the library is imported: an error there
cannot hide here. All of it is differentiable by autograd and far too slow for anything but tests.

    B batch   T query length   S key length   H heads   C embed_dim   D head_dim, C = H*D
    m query position   n key position   h head   i pair index 0..D/2-1

q is (B, H, T, D), k and v are (B, H, S, D), scores are (B, H, T, S). With T < S the queries are the
last T of the S tokens: query row j sits at index S-T+j. Feature c = h*D + d belongs to head h.
Positions are integer tensors (T,) or (B, T); None means the index. Weights are stored as in
nn.Linear, (out, in), except CARoPE's W (C, H).
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def require_float64(*tensors: Tensor | None) -> None:
    """An oracle in lower precision would share the rounding errors that it exists to show."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype != torch.float64:
            raise TypeError(f"oracles take float64 tensors; got {tensor.dtype}: call .double()")


def position_rows(positions: Tensor | None, batch: int, length: int, total: int) -> list[list[int]]:
    """Positions as B lists of Python ints; None: the last `length` of the indices 0..total-1."""
    if positions is None:
        return [list(range(total - length, total))] * batch
    if positions.dim() == 1:
        return [positions.tolist()] * batch
    return positions.tolist()


def score_matrix(q: Tensor, k: Tensor, entry: Callable[[int, int, int], Tensor]) -> Tensor:
    """Scores (B, H, T, S) from entry(b, m, n) -> (H,), m and n row indices of q and k."""
    require_float64(q, k)
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    return torch.stack(
        [
            torch.stack(
                [torch.stack([entry(b, m, n) for n in range(keys)], -1) for m in range(queries)], -2
            )
            for b in range(batch)
        ]
    )


def project(x: Tensor, W: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    """Head projections: out[b,h,t] = W[h] x[b,t] + bias[h], W[h] the rows h*D..(h+1)*D-1.

    x (B, T, C), W (H*D, C), bias (H*D,) or None -> (B, H, T, D). Attention of 1706.03762.
    """
    require_float64(x, W, bias)
    dim = W.shape[0] // num_heads
    heads = []
    for h in range(num_heads):
        rows = slice(h * dim, (h + 1) * dim)
        out = x @ W[rows].T
        heads.append(out if bias is None else out + bias[rows])
    return torch.stack(heads, 1)


def merge(o: Tensor, W_o: Tensor, bias: Tensor | None = None) -> Tensor:
    """Output projection: y[b,t] = sum_h W_o[:, h] o[b,h,t] + bias, W_o[:, h] head h's D columns.

    o (B, H, T, D), W_o (C, H*D), bias (C,) or None -> (B, T, C). Attention of 1706.03762.
    """
    require_float64(o, W_o, bias)
    dim = o.shape[3]
    y = sum(o[:, h] @ W_o[:, h * dim : (h + 1) * dim].T for h in range(o.shape[1]))
    return y if bias is None else y + bias


def dot_scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Plain attention logits (1706.03762): score[m,n] = scale * q[m].k[n], scale 1/sqrt(D).

    This alone is NoPE (2305.19466): position enters through the causal mask only.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return score_matrix(q, k, lambda b, m, n: scale * (q[b, :, m] * k[b, :, n]).sum(-1))


def causal_attention(scores: Tensor, v: Tensor) -> Tensor:
    """Causal attention (1706.03762): o[m] = sum_{n<=m} softmax_{n<=m}(score[m,n]) v[n].

    scores (B, H, T, S), v (B, H, S, D) -> (B, H, T, D). Row j sees the keys 0..S-T+j: the future
    is left out of the sum, not masked.
    """
    require_float64(scores, v)
    queries, keys = scores.shape[2:]
    rows = []
    for j in range(queries):
        seen = keys - queries + j + 1
        weights = torch.softmax(scores[:, :, j, :seen], -1)
        rows.append((weights[..., None] * v[:, :, :seen]).sum(2))
    return torch.stack(rows, 2)


def sinusoidal(positions: Iterable[int], embed_dim: int, base: float = 10000.0) -> Tensor:
    """Sinusoidal table (1706.03762), positions t -> (T, C), to be added to the embeddings.

    PE[t,2j] = sin(t / base^(2j/C)),  PE[t,2j+1] = cos(t / base^(2j/C))
    """
    rows = []
    for t in positions:
        row = []
        for j in range(embed_dim // 2):
            angle = t / base ** (2 * j / embed_dim)
            row += [math.sin(angle), math.cos(angle)]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def rope_frequencies(dim: int, base: float = 10000.0) -> list[float]:
    """RoPE's frequencies (2104.09864): omega_i = base^(-2i/dim), i = 0..dim/2-1.

    dim is head_dim, or rotary_dim where only the first rotary_dim features turn.
    """
    return [base ** (-2 * i / dim) for i in range(dim // 2)]


def rotate(
    x: Tensor, angles: Tensor, pairing: str = "half", attention_factor: float = 1.0
) -> Tensor:
    """Rotation of every pair (2104.09864): (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    x (..., D), angles (..., R/2): the first R features turn, the rest pass through. Pair i is
    (i, i + R/2) for pairing="half", (2i, 2i+1) for "interleaved". attention_factor multiplies cos
    and sin, hence the turned features only.
    """
    require_float64(x, angles)
    pairs = angles.shape[-1]
    features = list(x.unbind(-1))
    for i in range(pairs):
        first, second = {"half": (i, i + pairs), "interleaved": (2 * i, 2 * i + 1)}[pairing]
        cos = attention_factor * torch.cos(angles[..., i])
        sin = attention_factor * torch.sin(angles[..., i])
        x1, x2 = x[..., first], x[..., second]
        features[first] = x1 * cos - x2 * sin
        features[second] = x2 * cos + x1 * sin
    return torch.stack(features, -1)


def rope_rotate(
    x: Tensor,
    positions: Tensor | None = None,
    *,
    base: float = 10000.0,
    pairing: str = "half",
    rotary_dim: int | None = None,
    frequencies: Sequence[float] | None = None,
    attention_factor: float = 1.0,
) -> Tensor:
    """RoPE (2104.09864): x'[m] = R(m omega) x[m] for x = q or k (B, H, T, D); v is untouched.

    frequencies and attention_factor: a scaled table, as the `*_frequencies` functions return it;
    by default rope_frequencies(rotary_dim or D, base). positions None: 0..T-1.
    """
    batch, _, length, dim = x.shape
    if frequencies is None:
        frequencies = rope_frequencies(rotary_dim or dim, base)
    omega = torch.tensor(frequencies, dtype=torch.float64)
    rows = position_rows(positions, batch, length, length)
    out = [
        torch.stack(
            [
                rotate(x[b, :, j], rows[b][j] * omega, pairing, attention_factor)
                for j in range(length)
            ],
            1,
        )
        for b in range(batch)
    ]
    return torch.stack(out)


def rope_scores(
    q: Tensor,
    k: Tensor,
    positions_q: Tensor | None = None,
    positions_k: Tensor | None = None,
    *,
    scale: float | None = None,
    base: float = 10000.0,
    pairing: str = "half",
    rotary_dim: int | None = None,
    frequencies: Sequence[float] | None = None,
    attention_factor: float = 1.0,
) -> Tensor:
    """RoPE's logits (2104.09864): score[m,n] = (R(m omega) q[m]).(R(n omega) k[n]) / sqrt(D).

    positions_q None: the last T of 0..S-1. The other arguments are those of rope_rotate.
    """
    queries, keys = q.shape[2], k.shape[2]
    if positions_q is None:
        positions_q = torch.arange(keys - queries, keys)

    def turn(x: Tensor, positions: Tensor | None) -> Tensor:
        return rope_rotate(
            x,
            positions,
            base=base,
            pairing=pairing,
            rotary_dim=rotary_dim,
            frequencies=frequencies,
            attention_factor=attention_factor,
        )

    return dot_scores(turn(q, positions_q), turn(k, positions_k), scale)


def proportional_frequencies(
    dim: int, rotary_dim: int, *, base: float = 10000.0
) -> tuple[list[float], float]:
    """Proportional RoPE (p-RoPE, 2410.06205; Gemma 4): the r = rotary_dim/2 fastest pairs turn.

    omega_i = base^(-2i/D) for i < r, 0 for the others: frequencies and pairs of the whole head.
    """
    whole = rope_frequencies(dim, base)
    turning = rotary_dim // 2
    return whole[:turning] + [0.0] * (len(whole) - turning), 1.0


def axis_of_pair(i: int, axes: Sequence[int], layout: str) -> int:
    """The axis whose position turns pair i of the head, for a layout with one spectrum.

    "sections" (Qwen2-VL): axes[0]/2 pairs of the first axis, then axes[1]/2 of the second, ...
    "interleaved" (Qwen3-VL): axis k = i mod A if i < A axes[k]/2, else the first
    """
    if layout == "sections":
        return [axis for axis, features in enumerate(axes) for _ in range(features // 2)][i]
    axis = i % len(axes)
    return axis if i < len(axes) * axes[axis] // 2 else 0


def axial_rotate(
    x: Tensor,
    positions: Tensor,
    axes: Sequence[int],
    layout: str = "blocks",
    *,
    base: float = 10000.0,
    pairing: str = "half",
) -> Tensor:
    """RoPE over A axes; x (B, H, T, D), positions (T, A) or (B, T, A), axes[k] features an axis.

    "blocks" (rope-vit, 2403.13298): axes[k] features next to each other are a RoPE of that width,
    turned by the position on axis k: angle base^(-2j/axes[k]) pos_k of the block's pair j.
    "sections", "interleaved": angle base^(-2i/D) pos_k of the head's pair i, k = axis_of_pair(i).
    """
    require_float64(x)
    batch, _, length, dim = x.shape
    positions = positions.expand(batch, length, len(axes))
    if layout == "blocks":
        blocks = x.split(list(axes), -1)
        options = {"base": base, "pairing": pairing}
        turned = [rope_rotate(z, positions[..., k], **options) for k, z in enumerate(blocks)]
        return torch.cat(turned, -1)
    angles = [
        omega * positions[:, :, axis_of_pair(i, axes, layout)].double()
        for i, omega in enumerate(rope_frequencies(dim, base))
    ]
    return rotate(x, torch.stack(angles, -1)[:, None], pairing)


def linear_frequencies(
    dim: int, factor: float, *, base: float = 10000.0
) -> tuple[list[float], float]:
    """Position interpolation (2306.15595): omega_i / s, s = factor; attention factor 1."""
    return [w / factor for w in rope_frequencies(dim, base)], 1.0


def ntk_frequencies(dim: int, factor: float, *, base: float = 10000.0) -> tuple[list[float], float]:
    """Static NTK-aware scaling (described in 2309.00071): base' = base * s^(D/(D-2)), a = 1.

    The slowest band turns s times slower, the fastest is kept.
    """
    return rope_frequencies(dim, base * factor ** (dim / (dim - 2))), 1.0


def dynamic_frequencies(
    dim: int,
    factor: float,
    original_length: int,
    target_length: int,
    *,
    base: float = 10000.0,
) -> tuple[list[float], float]:
    """Dynamic NTK (described in 2309.00071), for one fixed target length:

    base' = base * (s L / L0 - (s - 1))^(D/(D-2)),  L = max(target_length, L0);  a = 1
    """
    length = max(target_length, original_length)
    stretch = factor * length / original_length - (factor - 1)
    return rope_frequencies(dim, base * stretch ** (dim / (dim - 2))), 1.0


def yarn_bounds(dim: int, original_length: int, *, base: float = 10000.0) -> tuple[int, int]:
    """Ends of YaRN's ramp (2309.00071): the pair that turns r times in L0 tokens, r = 32 and 1.

    dim(r) = D ln(L0 / (2 pi r)) / (2 ln base)
    lo = max(floor dim(32), 0),  hi = min(ceil dim(1), D - 1)
    """

    def pair_index(turns: float) -> float:
        return dim * math.log(original_length / (2 * math.pi * turns)) / (2 * math.log(base))

    return max(math.floor(pair_index(32)), 0), min(math.ceil(pair_index(1)), dim - 1)


def yarn_frequencies(
    dim: int, factor: float, original_length: int, *, base: float = 10000.0
) -> tuple[list[float], float]:
    """YaRN (2309.00071): fast bands kept, slow bands interpolated, a linear ramp between.

    (omega_i / s)(1 - e_i) + omega_i e_i,  e_i = 1 - clamp((i - lo)/(hi - lo), 0, 1)
    a = 0.1 ln s + 1
    """
    low, high = yarn_bounds(dim, original_length, base=base)
    # lo = hi makes the ramp a step just after lo, as transformers' hi + 0.001 does
    width = high - low or 0.001
    frequencies = []
    for i, w in enumerate(rope_frequencies(dim, base)):
        keep = 1 - min(max((i - low) / width, 0), 1)
        frequencies.append(w / factor * (1 - keep) + w * keep)
    return frequencies, 0.1 * math.log(factor) + 1


def longrope_frequencies(
    dim: int,
    factor: float,
    original_length: int,
    target_length: int,
    short: Sequence[float],
    long: Sequence[float],
    *,
    base: float = 10000.0,
) -> tuple[list[float], float]:
    """LongRoPE (2402.13753): omega_i / lambda_i, a list lambda of D/2 numbers per regime.

    lambda = long if target_length > L0 else short
    a = sqrt(1 + ln s / ln L0), 1 if s <= 1; whichever list is used
    """
    divisors = long if target_length > original_length else short
    frequencies = [w / d for w, d in zip(rope_frequencies(dim, base), divisors, strict=True)]
    if factor <= 1:
        return frequencies, 1.0
    return frequencies, math.sqrt(1 + math.log(factor) / math.log(original_length))


def llama3_frequencies(
    dim: int,
    factor: float = 8.0,
    original_length: int = 8192,
    *,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    base: float = 10000.0,
) -> tuple[list[float], float]:
    """Llama 3.1's scaling (2407.21783), by wavelength wl = 2 pi / omega; attention factor 1.

    wl < L0/4: omega      wl > L0: omega / s      between: (1-u) omega/s + u omega,
    u = (L0/wl - 1) / (4 - 1); here 1 is low_freq_factor and 4 high_freq_factor
    """
    frequencies = []
    for w in rope_frequencies(dim, base):
        wavelength = 2 * math.pi / w
        if wavelength < original_length / high_freq_factor:
            frequencies.append(w)
        elif wavelength > original_length / low_freq_factor:
            frequencies.append(w / factor)
        else:
            u = original_length / wavelength - low_freq_factor
            u /= high_freq_factor - low_freq_factor
            frequencies.append((1 - u) * w / factor + u * w)
    return frequencies, 1.0


def carope_bias(dim: int, base: float = 10000.0) -> float:
    """The bias at which W = 0 makes CARoPE (2507.23083) equal to RoPE: f = theta_1 = base^(-2/D).

    1 + softplus(bias) = base^(2/D),  hence  bias = log(expm1(base^(2/D) - 1))
    """
    return math.log(math.expm1(base ** (2 / dim) - 1))


def carope_rates(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """CARoPE's rate per token and head (2507.23083): f = 1 / (1 + softplus(z)), in (0, 1).

    z[b,h,t] = sum_c x[b,t,c] W[c,h] (+ bias[h]).  x (B, T, C), W (C, H), bias (H,) -> (B, H, T)
    """
    require_float64(x, W, bias)
    rates = []
    for h in range(W.shape[1]):
        z = (x * W[:, h]).sum(-1)
        if bias is not None:
            z = z + bias[h]
        # log(e^z + e^0): F.softplus drops 2e-9 at its threshold, too much for float64
        softplus = torch.logaddexp(z, torch.zeros_like(z))
        rates.append(1 / (1 + softplus))
    return torch.stack(rates, 1)


def carope_steps(rates: Tensor, dim: int, first_power: int = 0) -> Tensor:
    """CARoPE's step of every pair (2507.23083): step_i[t] = f[t]^(i + first_power).

    rates (B, H, T) -> (B, H, T, D/2), i = 0..D/2-1. first_power=0 holds RoPE as a special case.
    """
    require_float64(rates)
    return torch.stack([rates ** (i + first_power) for i in range(dim // 2)], -1)


def carope_phases(steps: Tensor) -> Tensor:
    """CARoPE's phases (2507.23083): phi_i[m] = sum_{t<=m} step_i[t], token m included.

    steps and phases (B, H, T, D/2). Each row is summed afresh, so no error travels along.
    """
    require_float64(steps)
    return torch.stack([steps[:, :, : m + 1].sum(2) for m in range(steps.shape[2])], 2)


def exact_running_sums(values: Iterable[float]) -> list[float]:
    """Inclusive running sums of Python floats, each correct to its last bit or so, in linear time.

    For phases over a million tokens, where a running sum in float64 drifts by some 1e-5: the
    rounding error of a constant step is the same at every addition, so it does not average out.
    """
    sums, total, remainder = [], 0.0, 0.0
    for value in values:
        terms = (total, remainder, value)
        total = math.fsum(terms)
        remainder = math.fsum((*terms, -total))
        sums.append(total)
    return sums


def carope_rotate(
    q: Tensor, k: Tensor, phases: Tensor, pairing: str = "half"
) -> tuple[Tensor, Tensor]:
    """CARoPE's rotation (2507.23083): q'[m] = R(phi[m]) q[m], k'[n] = R(phi[n]) k[n].

    phases (B, H, S, D/2) of all S tokens; the T queries take the last T of them.
    """
    queries, keys = q.shape[2], k.shape[2]
    return rotate(q, phases[:, :, keys - queries :], pairing), rotate(k, phases, pairing)


def carope_scores(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    W: Tensor,
    bias: Tensor | None = None,
    *,
    first_power: int = 0,
    scale: float | None = None,
) -> Tensor:
    """CARoPE's logits (2507.23083): score[m,n] = (R(phi[m]) q[m]).(R(phi[n]) k[n]) / sqrt(D).

    x (B, S, C) holds all S tokens: the layer's normed input, or for source="token" the token
    embeddings with the shared W.
    """
    phases = carope_phases(carope_steps(carope_rates(x, W, bias), q.shape[-1], first_power))
    return dot_scores(*carope_rotate(q, k, phases), scale)


def cmha_scores(
    q: Tensor,
    k: Tensor,
    delta: Tensor,
    b: Tensor,
    positions_q: Tensor | None = None,
    positions_k: Tensor | None = None,
    scale: float | None = None,
    base: float = 10000.0,
) -> Tensor:
    """CMHA's logits (2505.10222), in the direct cosine form; delta and b are (H, D/2).

    pair i of q: (r, p) = (q_i, q_{i+D/2}),  lam = sqrt(r^2 + p^2),  th = atan2(p, r);  k alike
    score[m,n] = scale * sum_i lam_q lam_k cos(delta_i (th_q - th_k) + b_i + (m-n) omega_i)

    The angle difference is not wrapped to (-pi, pi]. scale None: 1/sqrt(D).
    """
    require_float64(delta, b)
    batch, _, queries, dim = q.shape
    keys = k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    omega = torch.tensor(rope_frequencies(dim, base), dtype=torch.float64)
    rows_q = position_rows(positions_q, batch, queries, keys)
    rows_k = position_rows(positions_k, batch, keys, keys)
    half = dim // 2
    lam_q, th_q = (
        torch.hypot(q[..., :half], q[..., half:]),
        torch.atan2(q[..., half:], q[..., :half]),
    )
    lam_k, th_k = (
        torch.hypot(k[..., :half], k[..., half:]),
        torch.atan2(k[..., half:], k[..., :half]),
    )

    def entry(batch_index: int, m: int, n: int) -> Tensor:
        at_m, at_n = (batch_index, slice(None), m), (batch_index, slice(None), n)
        distance = rows_q[batch_index][m] - rows_k[batch_index][n]
        angle = delta * (th_q[at_m] - th_k[at_n]) + b + distance * omega
        return scale * (lam_q[at_m] * lam_k[at_n] * torch.cos(angle)).sum(-1)

    return score_matrix(q, k, entry)


def relative_learned_scores(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    R: Tensor,
    S: Tensor,
    positions_q: Tensor | None = None,
    positions_k: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Learned relative logits of RCMHA (2308.03429); u (H, D), R (H, P, D), S (H, P).

    score[m,n] = ((q[m] + u_h).k[n] + q[m].R[h,dist] + S[h,dist]) / sqrt(D)
    dist = m - n, clamped to 0..P-1: farther keys use the last row; below 0 is the masked future

    causal=False: R (H, 2P-1, D), S (H, 2P-1); m - n is clamped to -(P-1)..P-1 and its row is
    m - n + P-1.
    """
    require_float64(u, R, S)
    batch, _, queries, dim = q.shape
    rows_q = position_rows(positions_q, batch, queries, k.shape[2])
    rows_k = position_rows(positions_k, batch, k.shape[2], k.shape[2])
    last = R.shape[1] - 1
    zero = 0 if causal else last // 2  # the row of distance 0

    def entry(b: int, m: int, n: int) -> Tensor:
        row = min(max(rows_q[b][m] - rows_k[b][n] + zero, 0), last)
        content = ((q[b, :, m] + u) * k[b, :, n]).sum(-1)
        position = (q[b, :, m] * R[:, row]).sum(-1)
        return (content + position + S[:, row]) / math.sqrt(dim)

    return score_matrix(q, k, entry)


def relative_sinusoid(distance: int, embed_dim: int, base: float = 10000.0) -> Tensor:
    """Transformer-XL's vector of a distance (1901.02860), (C,): sines first, then cosines.

    r[t] = concat(sin(t w), cos(t w)),  w_j = base^(-2j/C),  j = 0..C/2-1
    """
    angles = [distance * base ** (-2 * j / embed_dim) for j in range(embed_dim // 2)]
    sines, cosines = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
    return torch.tensor(sines + cosines, dtype=torch.float64)


def relative_rows(
    W_R: Tensor, distances: Iterable[int], num_heads: int, base: float = 10000.0
) -> Tensor:
    """(W_R r[t])_h of 1901.02860 for each distance t: (H, number of distances, D); W_R (H*D, C).

    With distances 0..P-1 this is the table R at which the learned form equals the sinusoidal one.
    """
    rows = [W_R @ relative_sinusoid(t, W_R.shape[1], base) for t in distances]
    return torch.stack([row.reshape(num_heads, -1) for row in rows], 1)


def relative_sinusoidal_scores(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    W_R: Tensor,
    positions_q: Tensor | None = None,
    positions_k: Tensor | None = None,
    base: float = 10000.0,
    causal: bool = True,
) -> Tensor:
    """Sinusoidal relative logits of Transformer-XL (1901.02860); u, v (H, D), W_R (H*D, C).

    score[m,n] = ((q[m] + u_h).k[n] + (q[m] + v_h).(W_R r[dist])_h) / sqrt(D)
    dist = m - n, negative ones (the masked future) taken as 0; no upper limit

    causal=False: r[dist] of negative distances too.
    """
    require_float64(u, v, W_R)
    batch, heads, queries, dim = q.shape
    rows_q = position_rows(positions_q, batch, queries, k.shape[2])
    rows_k = position_rows(positions_k, batch, k.shape[2], k.shape[2])

    @functools.cache
    def row(distance: int) -> Tensor:  # (H, D)
        return relative_rows(W_R, [distance], heads, base)[:, 0]

    def entry(b: int, m: int, n: int) -> Tensor:
        distance = rows_q[b][m] - rows_k[b][n]
        distance = max(distance, 0) if causal else distance
        content = ((q[b, :, m] + u) * k[b, :, n]).sum(-1)
        return (content + ((q[b, :, m] + v) * row(distance)).sum(-1)) / math.sqrt(dim)

    return score_matrix(q, k, entry)


def depthwise_conv(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Causal depthwise convolution of q, k or v: Primer (2109.08668), RCMHA (2308.03429).

    y[t,c] = sum_j w_j[c] x[t-(k-1)+j, c] (+ bias[c]),  x[<0] = 0; the last tap is the present

    x (B, H, T, D); w (H, D, k) per head, or (D, k) shared by the heads; bias (H, D) or (D,).
    """
    require_float64(x, w, bias)
    taps = w.shape[-1]
    rows = []
    for t in range(x.shape[2]):
        y = torch.zeros_like(x[:, :, t])
        for j in range(taps):
            source = t - (taps - 1) + j
            if source >= 0:
                y = y + w[..., j] * x[:, :, source]
        rows.append(y if bias is None else y + bias)
    return torch.stack(rows, 2)


class Gates(NamedTuple):
    """A router's result: the gates of all heads, and what the balance loss needs."""

    gates: Tensor  # (B, H, T), shared heads first
    probabilities: Tensor  # (B, T, E), p over the routed heads
    selected: Tensor  # (B, T, E), M: 1 where the head is among the K largest p, else 0


def top_k_mask(p: Tensor, top_k: int) -> Tensor:
    """One-hot of the K largest entries of p (E,); among equals the lowest index wins."""
    values = p.detach().tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    mask = torch.zeros_like(p)
    mask[order[:top_k]] = 1
    return mask


def moh_linear_token(
    x: Tensor,
    W_s: Tensor | None,
    W_r: Tensor | None,
    W_h: Tensor | None,
    shared: int,
    top_k: int,
    scaling: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """moh_linear_gates for one token x (C,): gates (H,), p (E,), M (E,)."""
    s = torch.softmax(W_s @ x, 0) if shared > 1 else x.new_ones(shared)
    p = torch.softmax(W_r @ x, 0) if top_k else x.new_zeros(0)
    mask = top_k_mask(p, top_k)
    if shared and top_k:
        groups, (a0, a1) = 2, torch.softmax(W_h @ x, 0)
    else:
        groups, a0, a1 = 1, 1.0, 1.0  # the softmax over a lone group
    if scaling == "paper":
        return torch.cat([a0 * s, a1 * p * mask]), p, mask
    routed = p * mask
    if top_k:
        routed = groups * a1 * top_k * routed / routed.sum()  # the sum is at least 1/E
    return torch.cat([groups * a0 * shared * s, routed]), p, mask


def moh_linear_gates(
    x: Tensor,
    W_s: Tensor | None,
    W_r: Tensor | None,
    W_h: Tensor | None,
    *,
    shared: int,
    top_k: int,
    scaling: str = "authors",
) -> Gates:
    """MoH's learned router (2410.11842), hs = shared, K = top_k; x (B, T, C), the layer's input.

    a = softmax(W_h x)   s = softmax(W_s x)   p = softmax(W_r x)   M = one-hot of the K largest p
    "paper" (Eq. 5-6):   shared g = a0 s          routed g = a1 p M
    "authors" (code):    shared g = 2 a0 hs s     routed g = 2 a1 K p M / sum(p M)

    W_s (hs, C), W_r (E, C), W_h (2, C). A lone group has no W_h: its a is 1 and so is the 2, i.e.
    hs = 0: routed g = K p M / sum(p M).   K = 0 (then E = 0): shared g = hs s.
    hs = 1: s = 1, no W_s.
    """
    require_float64(x, W_s, W_r, W_h)
    if (top_k == 0) != (W_r is None):
        raise ValueError("K = 0 leaves no routed head, so W_r is None exactly then")
    tokens = [
        [moh_linear_token(token, W_s, W_r, W_h, shared, top_k, scaling) for token in row]
        for row in x
    ]
    return stack_gates(tokens)


def moh_query_norm_token(
    q: Tensor, shared: int, top_k: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """moh_query_norm_gates for one token q (H, D): gates (H,), p (E,), M (E,)."""
    norms = torch.linalg.vector_norm(q[shared:], dim=-1)
    spread = norms.std(correction=1).clamp_min(eps)
    p = torch.softmax(norms / spread, 0)
    mask = top_k_mask(p, top_k)
    # the brackets matter: (mask + p) - p is not exactly 0 or 1
    return torch.cat([q.new_ones(shared), mask + (p - p.detach())]), p, mask


def moh_query_norm_gates(q: Tensor, *, shared: int, top_k: int, eps: float = 1e-6) -> Gates:
    """MoH's router without parameters (2410.11842, continue-tuning); q (B, H, T, D).

    shared heads: g = 1.   routed: l_i = |q_i|_2 / max(std of the norms of the E routed heads, eps)
    p = softmax(l),  M = one-hot of the K largest p,  g = M + (p - stopgrad(p))

    The std is the unbiased one, so E >= 2. Forward 0 or 1 exactly, backward the softmax's gradient.
    """
    require_float64(q)
    tokens = [
        [moh_query_norm_token(q[b, :, t], shared, top_k, eps) for t in range(q.shape[2])]
        for b in range(q.shape[0])
    ]
    return stack_gates(tokens)


def stack_gates(tokens: list[list[tuple[Tensor, Tensor, Tensor]]]) -> Gates:
    """Gates of a batch from those of its tokens, tokens[b][t] = gates (H,), p (E,), M (E,)."""
    gates, p, mask = (
        torch.stack([torch.stack([token[part] for token in row]) for row in tokens])
        for part in range(3)
    )
    return Gates(gates.transpose(1, 2), p, mask)


def moh_aux(probabilities: Tensor, selected: Tensor, aux_scale: str = "paper") -> Tensor:
    """MoH's balance loss (2410.11842, Eq. 7-8), before its coefficient: aux = sum_i P_i f_i.

    P_i mean over tokens of p_i, f_i fraction of tokens that select i, i over the E routed heads.
    aux_scale="authors" multiplies by E. Without routed heads (K = 0) it is 0.
    """
    require_float64(probabilities, selected)
    experts = probabilities.shape[-1]
    aux = probabilities.new_zeros(())
    for i in range(experts):
        aux = aux + probabilities[..., i].mean() * selected[..., i].mean()
    return experts * aux if aux_scale == "authors" else aux


def weigh_heads(o: Tensor, gates: Tensor) -> Tensor:
    """MoH's weighted heads (2410.11842): g[b,h,t] o[b,h,t,:], to be merged by W_O.

    o (B, H, T, D), gates (B, H, T) -> (B, H, T, D)
    """
    require_float64(o, gates)
    return torch.stack([gates[:, h, :, None] * o[:, h] for h in range(o.shape[1])], 1)
