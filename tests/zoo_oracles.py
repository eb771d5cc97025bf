"""The wider zoo in float64, with loops: logits of whole rows, straight from the papers.

Every function takes a `layer_oracle.Call` and returns scores (B, H, T, T), their 1/sqrt(D)
included. Entries that a query does not see are finite and otherwise arbitrary. Nothing of the
library is imported; of `call.encoding` only public options are read (base, kind, length, ...).

    d = m - n   G key heads, query head h reads h // (H/G)   other letters: see `oracles`

What runs along tokens (FoX, CoPE, SelectiveRoPE, GRAPE, PaTH) counts tokens and never reads
positions; padding adds nothing to it, and a tap on padding or on another document reads 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

import oracles

if TYPE_CHECKING:  # layer_oracle imports this file
    from layer_oracle import Call, Tokens


def with_bias(call: Call, bias: Callable[[int, int, int], Tensor]) -> Tensor:
    """score[m,n] = q[m].k[n] / sqrt(D) + bias(b, m, n), a (H,) for tokens m and n of row b."""
    return oracles.dot_scores(call.q, call.k) + oracles.score_matrix(call.q, call.k, bias)


def per_query_head(z: Tensor, num_heads: int, dim: int = 1) -> Tensor:
    """One entry a key head along `dim`, as the query heads see them."""
    return z.repeat_interleave(num_heads // z.shape[dim], dim)


def heads(z: Tensor, count: int) -> Tensor:
    """Features (B, T, N * R) of N heads -> (B, N, T, R)."""
    return torch.stack(z.split(z.shape[-1] // count, -1), 1)


def real_only(z: Tensor, tokens: Tokens) -> Tensor:
    """z (B, N, T), 0 at padding."""
    return z * tokens.real[:, None]


def running_sums(rates: Tensor, tokens: Tokens, *, inclusive: bool) -> Tensor:
    """sum[m] of rates[t] (B, N, T, R) over the real tokens t <= m, or t < m, of m's document."""
    rows = []
    for b, documents in enumerate(tokens.documents):
        sums = []
        for m, document in enumerate(documents):
            before = range(m + 1 if inclusive else m)
            counted = [t for t in before if documents[t] == document and tokens.real[b, t]]
            sums.append(rates[b][:, counted].sum(1))
        rows.append(torch.stack(sums, 1))
    return torch.stack(rows)


def causal_taps(z: Tensor, kernel: Tensor, tokens: Tokens) -> Tensor:
    """y[t] = sum_j kernel[..., j] z[t - (k-1) + j], z (B, N, T, R), kernel (N, R, k); padding and
    other documents read 0. Causal in both directions of attention.
    """
    taps = kernel.shape[-1]
    rows = []
    for b in range(z.shape[0]):
        outputs = []
        for t in range(z.shape[2]):
            y = torch.zeros_like(z[b, :, t])
            for j in range(taps):
                source = t - (taps - 1) + j
                if source >= 0 and tokens.together(b, t, source):
                    y = y + kernel[..., j] * z[b, :, source]
            outputs.append(y)
        rows.append(torch.stack(outputs, 1))
    return torch.stack(rows)


def straight_through(value: Tensor, low: float, high: float = math.inf) -> Tensor:
    """value clamped, with the gradient of the value itself."""
    return value + (value.clamp(low, high) - value).detach()


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes (2108.12409), p the largest power of 2 up to H.

    s_h = 2^(-8h/p), h = 1..p; the other H-p heads: 2^(-8j/(2p)), j = 1, 3, 5, ..
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return slopes + [2 ** (-8 * j / (2 * power)) for j in range(1, 2 * (num_heads - power), 2)]


def alibi(call: Call) -> Tensor:
    """ALiBi (2108.12409): bias = -s_h |d|."""
    slopes = torch.tensor(alibi_slopes(call.q.shape[1]), dtype=torch.float64)
    p = call.tokens.positions.tolist()
    return with_bias(call, lambda b, m, n: -slopes * abs(p[b][m] - p[b][n]))


def t5_bucket(distance: int, buckets: int, max_distance: int, causal: bool) -> int:
    """T5's bucket of d = m - n (1910.10683), N = buckets.

    causal: n' = N, x = max(d, 0);  else n' = N/2, x = |d|, and N/2 is added where d < 0
    e = n'/2;  x if x < e else min(n'-1, e + floor( ln(x/e) / ln(max_distance/e) * (n'-e) ))
    """
    count = buckets if causal else buckets // 2
    first = 0 if causal or distance >= 0 else count
    x = max(distance, 0) if causal else abs(distance)
    exact = count // 2
    if x < exact:
        return first + x
    share = math.log(x / exact) / math.log(max_distance / exact)
    return first + min(count - 1, exact + math.floor(share * (count - exact)))


def t5(call: Call) -> Tensor:
    """T5 (1910.10683): bias = table[bucket(d), h]; the logits stay scaled."""
    part, table, p = call.encoding, call.weights["table"], call.tokens.positions.tolist()
    where = (part.buckets, part.max_distance, call.tokens.causal)
    return with_bias(call, lambda b, m, n: table[t5_bucket(p[b][m] - p[b][n], *where)])


def kerple(call: Call) -> Tensor:
    """KERPLE (2205.09921), parameters clamped at use, gradients straight through.

    log    bias = -r1 ln(1 + r2 |d|)     r1, r2 >= 0.01
    power  bias = -r1 |d|^r2             r1 >= 0.01, r2 in [0.01, 2]
    """
    p, power = call.tokens.positions.tolist(), {"log": False, "power": True}[call.encoding.kind]
    r1 = straight_through(call.weights["r1"], 0.01)
    r2 = straight_through(call.weights["r2"], 0.01, 2.0 if power else math.inf)

    def bias(b: int, m: int, n: int) -> Tensor:
        d = abs(p[b][m] - p[b][n])
        if d == 0:  # 0 for any r1, r2, and so are its derivatives
            return torch.zeros_like(r1)
        return -r1 * d**r2 if power else -r1 * torch.log(1 + r2 * d)

    return with_bias(call, bias)


def fire_distance(m: int, n: int, c: Tensor, a: Tensor, length: int, causal: bool) -> Tensor:
    """FIRE's normalised distance (2310.04418), in [0, 1).

    z = ln(1 + |c| |d|) / ( ln(1 + |c| max(m, |a L|)) + 1e-6 );  two-sided: max(m, n, |a L|)
    """
    farthest = torch.maximum((a * length).abs(), a.new_tensor(m if causal else max(m, n)))
    return torch.log(1 + c.abs() * abs(m - n)) / (torch.log(1 + c.abs() * farthest) + 1e-6)


def fire(call: Call) -> Tensor:
    """FIRE (2310.04418): bias[h] = ( W2 relu(W1 z + b1) + b2 )[h], z by `fire_distance`."""
    w, p = call.weights, call.tokens.positions.tolist()

    def bias(b: int, m: int, n: int) -> Tensor:
        where = (w["c"], w["a"], call.encoding.length, call.tokens.causal)
        z = fire_distance(p[b][m], p[b][n], *where)
        return w["W2"] @ torch.relu(w["W1"][:, 0] * z + w["b1"]) + w["b2"]

    return with_bias(call, bias)


def fox(call: Call) -> Tensor:
    """FoX (2503.02130): bias = sum_{t=n+1..m} l[t] = c[m] - c[n], l = log sigmoid(x W + b).

    Key n's own gate is not in its sum. Two-sided, the later of the two tokens is m: the bias is
    -|c[m] - c[n]|. Gates are per query head.
    """
    z = call.x @ call.weights["weight"] + call.weights["bias"]  # (B, T, H)
    gates = real_only(F.logsigmoid(z).transpose(1, 2), call.tokens)

    def bias(b: int, m: int, n: int) -> Tensor:
        return gates[b, :, min(m, n) + 1 : max(m, n) + 1].sum(-1)

    return with_bias(call, bias)


def cope(call: Call) -> Tensor:
    """CoPE (2405.18719); e the table (P, D), causal only.

    g[m,j] = sigmoid(q_m.k_j / sqrt(D)), 0 where m does not see j
    p = min( sum_{j=n..m} g[m,j], P-1 ),  f = floor p,  w = p - f
    score = ( q_m.k_n + (1-w) q_m.e[f] + w q_m.e[ceil p] ) / sqrt(D)
    """
    tokens, table, last = call.tokens, call.weights["table"], call.encoding.max_positions - 1
    assert tokens.causal
    plain, (batch, _, length, dim) = oracles.dot_scores(call.q, call.k), call.q.shape
    seen = [
        [[tokens.sees(b, m, j) for j in range(length)] for m in range(length)] for b in range(batch)
    ]
    gates = torch.sigmoid(plain) * torch.tensor(seen)[:, None]

    def bias(b: int, m: int, n: int) -> Tensor:
        p = gates[b, :, m, n : m + 1].sum(-1).clamp(max=last)  # (H,)
        below, above = p.floor().long(), p.ceil().long()
        w = (p - below)[:, None]
        e = (1 - w) * table[below] + w * table[above]
        return (call.q[b, :, m] * e).sum(-1) / math.sqrt(dim)

    return with_bias(call, bias)


def xpos(call: Call) -> Tensor:
    """xPos (2212.10554), causal only, half-split pairs, s = scale_base.

    score = sum_i zeta_i^(d/s) (R(m omega_i) q_i).(R(n omega_i) k_i) / sqrt(D)
    zeta_i = (2i + 0.4 D)/(1.4 D)
    """
    part, positions = call.encoding, call.tokens.positions
    assert call.tokens.causal
    p, dim = positions.tolist(), call.q.shape[-1]
    q, k = (oracles.rope_rotate(z, positions, base=part.base) for z in (call.q, call.k))
    zeta = torch.tensor(
        [(2 * i + 0.4 * dim) / (1.4 * dim) for i in range(dim // 2)], dtype=torch.float64
    )

    def entry(b: int, m: int, n: int) -> Tensor:
        d = max(p[b][m] - p[b][n], 0)  # hidden keys after the query would overflow
        products = q[b, :, m] * k[b, :, n]
        products = products[:, : dim // 2] + products[:, dim // 2 :]
        return (zeta ** (d / part.scale_base) * products).sum(-1) / math.sqrt(dim)

    return oracles.score_matrix(call.q, call.k, entry)


def pope(call: Call) -> Tensor:
    """PoPE (2509.10534); delta (H, D), theta_c = base^(-c/D), sp(z) = ln(1 + e^z).

    score = sum_{c<D} sp(q_c) sp(k_c) cos( (n-m) theta_c + delta[h,c] ) / sqrt(D)
    """
    p, dim, delta = call.tokens.positions.tolist(), call.q.shape[-1], call.weights["delta"]
    # log(e^z + e^0): F.softplus drops 2e-9 at its threshold
    q, k = (torch.logaddexp(z, torch.zeros_like(z)) for z in (call.q, call.k))
    frequencies = [call.encoding.base ** (-c / dim) for c in range(dim)]
    theta = torch.tensor(frequencies, dtype=torch.float64)

    def entry(b: int, m: int, n: int) -> Tensor:
        angle = (p[b][n] - p[b][m]) * theta + delta
        return (q[b, :, m] * k[b, :, n] * torch.cos(angle)).sum(-1) / math.sqrt(dim)

    return oracles.score_matrix(call.q, call.k, entry)


def selective_rates(call: Call) -> Tensor:
    """Selective RoPE's rates (2511.17388), (B, G, T, D/2); kernel (G, D/2, 4).

    x^ = x cut into pieces of D, each over sqrt(|piece|^2 + 1e-6);  u = x^ W1 W2
    rate[t] = sum_{j<4} kernel_j u[t-3+j] (+ exp(beta))
    """
    w, dim = call.weights, call.q.shape[-1]
    pieces = [
        piece / torch.sqrt((piece * piece).sum(-1, keepdim=True) + 1e-6)
        for piece in call.x.split(dim, -1)
    ]
    u = heads(torch.cat(pieces, -1) @ w["W1"] @ w["W2"], w["kernel"].shape[0])
    rates = causal_taps(u, w["kernel"], call.tokens)
    return rates + w["beta"].exp()[:, None] if "beta" in w else rates


def selective(call: Call) -> Tensor:
    """Selective RoPE (2511.17388): phase[m] = omega_i sum_{t<=m} rate[t], q'.k' / sqrt(D)."""
    dim = call.q.shape[-1]
    omega = torch.tensor(oracles.rope_frequencies(dim, call.encoding.base), dtype=torch.float64)
    sums = running_sums(selective_rates(call), call.tokens, inclusive=True)
    phases = per_query_head(omega * sums, call.q.shape[1])
    return oracles.dot_scores(oracles.rotate(call.q, phases), oracles.rotate(call.k, phases))


def grape(call: Call) -> Tensor:
    """GRAPE-M, contextual (2512.07805): one rate a token for all heads, an exclusive sum.

    rate[t] = sigmoid( (x_t W + b)/16 ),  phase[m] = theta_i sum_{t<m} rate[t],  theta = exp(a)
    """
    w = call.weights
    rates = torch.sigmoid((call.x @ w["weight"] + w["bias"]) / 16)[:, None]  # (B, 1, T, 1)
    phases = running_sums(rates, call.tokens, inclusive=False) * w["log_frequencies"].exp()
    return oracles.dot_scores(oracles.rotate(call.q, phases), oracles.rotate(call.k, phases))


def path_reflections(call: Call) -> tuple[Tensor, Tensor]:
    """PaTH's w (B, G, T, D) and beta (B, G, T) (2505.16381); H_t = I - beta_t w_t w_t^T.

    z = silu( kernel of 3 causal taps over y ),  y = x W1 W2;  w = z / sqrt(|z|^2 + 1e-6)
    beta = 2 sigmoid(x W + b), 0 at padding
    """
    w = call.weights
    y = heads(call.x @ w["W1"] @ w["W2"], w["kernel"].shape[0])
    z = F.silu(causal_taps(y, w["kernel"], call.tokens))
    beta = 2 * torch.sigmoid(call.x @ w["weight"] + w["bias"]).transpose(1, 2)
    unit = z / torch.sqrt((z * z).sum(-1, keepdim=True) + 1e-6)
    return unit, real_only(beta, call.tokens)


def path(call: Call) -> Tensor:
    """PaTH (2505.16381), causal only: score[m,n] = k_n^T H_{n+1} .. H_m q_m / sqrt(D).

    u = q_m;  for n = m, m-1, ..: score = u.k_n / sqrt(D), then u = H_n u
    """
    assert call.tokens.causal
    _, num_heads, length, dim = call.q.shape
    w, beta = (per_query_head(z, num_heads) for z in path_reflections(call))
    rows = []
    for m in range(length):
        u, row = call.q[:, :, m], [torch.zeros_like(beta[..., 0])] * length
        for n in range(m, -1, -1):
            row[n] = (u * call.k[:, :, n]).sum(-1) / math.sqrt(dim)
            along = (w[:, :, n] * u).sum(-1, keepdim=True)
            u = u - beta[:, :, n, None] * along * w[:, :, n]
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def fope_rotate(z: Tensor, a: Tensor, s: Tensor, positions: Tensor, omega: list[float]) -> Tensor:
    """FoPE's turn of z (B, H, T, D) (2412.17739), half-split pairs; a, s (H, F, F).

    A_i[m] = sum_f a[h,f,i] cos(m omega_f),  S_i[m] = sum_f s[h,f,i] sin(m omega_f)
    pair i < F: (x1,x2) -> (x1 A - x2 S, x2 A + x1 S);  pairs i >= F stand still
    """
    half, features = z.shape[-1] // 2, list(z.unbind(-1))
    cos = [torch.cos(positions * w)[:, None] for w in omega]  # (B, 1, T) each
    sin = [torch.sin(positions * w)[:, None] for w in omega]
    for i in range(len(omega)):
        A = sum(a[:, f, i, None] * cos[f] for f in range(len(omega)))
        S = sum(s[:, f, i, None] * sin[f] for f in range(len(omega)))
        x1, x2 = z[..., i], z[..., i + half]
        features[i], features[i + half] = x1 * A - x2 * S, x2 * A + x1 * S
    return torch.stack(features, -1)


def fope(call: Call) -> Tensor:
    """FoPE (2412.17739): q and k by `fope_rotate`, over the F bands with omega_i >= 2 pi/length."""
    part, num_heads, dim = call.encoding, call.q.shape[1], call.q.shape[-1]
    whole = oracles.rope_frequencies(dim, part.base)
    omega = [w for w in whole if w >= 2 * math.pi / part.length]
    series = [call.weights[name] for name in ("cos_series", "sin_series")]
    assert all(table.shape[1:] == (len(omega), len(omega)) for table in series)
    a, s = (per_query_head(table, num_heads, dim=0) for table in series)
    positions = call.tokens.positions.double()
    return oracles.dot_scores(
        *(fope_rotate(z, a, s, positions, omega) for z in (call.q, call.k)),
    )


#: By the names of the classes, see `layer_oracle.SCORES`.
SCORES: dict[str, Callable[[Call], Tensor]] = {
    "ALiBi": alibi,
    "T5": t5,
    "Kerple": kerple,
    "FIRE": fire,
    "FoX": fox,
    "CoPE": cope,
    "XPos": xpos,
    "PoPE": pope,
    "SelectiveRoPE": selective,
    "GRAPE": grape,
    "PaTH": path,
    "FoPE": fope,
}
