"""One whole attention layer in float64, with loops: the definition of what layers can do.

    q, k, v   rows q | k | v of c_attn                              (B, H, T, D), (B, G, T, D) twice
    conv      y[t] = sum_j w_j z[t + j - present] (+ bias)          q, k and v; see `convolve`
    qk-norm   z / sqrt(mean(z^2) + 1e-6) * weight                   q and k, over D
    scores    the encoding's: query head h, key head h // (H/G)     (B, H, T, T)
    o[m]      sum over visible n of softmax(score[m, .])[n] v[n]    see `Tokens.sees`
    y         sum_h gate_h o_h W_o[h]                               gates of MoH, else 1

Nothing of the library is imported. Weights carry the names of its state dict, but are plain
tensors. `encoding` and `router` are read for their public options alone (base, kind, top_k, ...):
any object with these will do. Legend: see `oracles`; G key heads; x is (B, T, C).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import oracles
import zoo_oracles

EPSILON = 1e-6


class Tokens(NamedTuple):
    """Where the tokens of a batch stand, and which of them meet."""

    positions: Tensor  # (B, T); (B, T, A) for a grid
    real: Tensor  # (B, T) bool, False for padding
    documents: list[list[int]]  # B lists of T numbers, equal inside a document
    causal: bool
    window: int | None

    def together(self, b: int, m: int, n: int) -> bool:
        """Whether tokens m and n of row b are real tokens of one document."""
        same = self.documents[b][m] == self.documents[b][n]
        return same and bool(self.real[b, m]) and bool(self.real[b, n])

    def sees(self, b: int, m: int, n: int) -> bool:
        """Whether query m sees key n in row b; distances count tokens of the row, padding too.

        A padded query sees itself alone, as a softmax over nothing would be NaN.
        """
        if m == n:
            return True
        if self.causal and n > m:
            return False
        near = self.window is None or abs(m - n) < self.window
        return near and self.together(b, m, n)


def place(
    x: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    segments: Tensor | None,
    causal: bool,
    window: int | None,
) -> Tokens:
    """Tokens of x (B, T, C). A negative entry of (B, T) positions is padding, as a mask's False is.

    Positions left out count the real tokens before, from 0 in each document.
    """
    batch, length = x.shape[:2]
    real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    documents = [[0] * length] * batch if segments is None else segments.tolist()
    if positions is None:
        rows = []
        for b in range(batch):
            row: list[int] = []
            for t in range(length):
                before = [n for n in range(t) if documents[b][n] == documents[b][t] and real[b, n]]
                row.append(len(before))
            rows.append(row)
        positions = torch.tensor(rows)
    elif positions.shape == (batch, length) and not positions.is_floating_point():
        real = real & (positions >= 0)
    if positions.shape[0] != batch or positions.ndim < 2 or positions.shape[1] != length:
        positions = positions.expand(batch, *positions.shape)
    return Tokens(positions, real, documents, causal, window)


def heads_of_keys(num_heads: int, num_kv_heads: int) -> list[int]:
    """The key head that each query head reads: h // (H/G)."""
    return [h // (num_heads // num_kv_heads) for h in range(num_heads)]


def per_query_head(z: Tensor, num_heads: int, dim: int = 1) -> Tensor:
    """A tensor with G entries along `dim`, one a key head, as seen from the H query heads."""
    return z.index_select(dim, torch.tensor(heads_of_keys(num_heads, z.shape[dim])))


def convolve(z: Tensor, w: Tensor, bias: Tensor | None, tokens: Tokens) -> Tensor:
    """Depthwise convolution of z (B, N, T, D) with w (N, D, k) or (D, k), bias (N, D) or (D,).

    y[t] = sum_j w_j z[t + j - present] (+ bias); the tap `present` meets the token itself: the last
    one (k-1) where causal, else the middle one, (k-1)//2. A tap outside the row, on padding or in
    another document reads zero.
    """
    oracles.require_float64(z, w, bias)
    taps, length = w.shape[-1], z.shape[2]
    present = taps - 1 if tokens.causal else (taps - 1) // 2
    rows = []
    for b in range(z.shape[0]):
        outputs = []
        for t in range(length):
            y = torch.zeros_like(z[b, :, t])
            for j in range(taps):
                source = t + j - present
                if 0 <= source < length and tokens.together(b, t, source):
                    y = y + w[..., j] * z[b, :, source]
            outputs.append(y if bias is None else y + bias)
        rows.append(torch.stack(outputs, 1))
    return torch.stack(rows)


def convolve_heads(
    heads: Sequence[Tensor], w: Tensor, bias: Tensor | None, tokens: Tokens
) -> list[Tensor]:
    """q, k and v convolved, each by its kernels.

    Shared by the heads: w (3, D, k), bias (3, D). Of its own for each head: rows q | k | v, w
    (H + 2G, D, k) and bias (H + 2G, D); stored as (3, H, D, k) and (3, H, D) where G = H.
    """
    if w.ndim == 3 and w.shape[0] != 3:
        counts = [z.shape[1] for z in heads]
        kernels: Sequence[Tensor] = w.split(counts)
        shifts: Sequence[Tensor | None] = [None] * 3 if bias is None else bias.split(counts)
    else:
        kernels, shifts = w.unbind(0), [None] * 3 if bias is None else bias.unbind(0)
    return [
        convolve(z, kernel, shift, tokens)
        for z, kernel, shift in zip(heads, kernels, shifts, strict=True)
    ]


def rms_norm(z: Tensor, weight: Tensor) -> Tensor:
    """Root mean square norm over features: z / sqrt(mean(z^2) + 1e-6) * weight, weight (D,)."""
    return z / torch.sqrt((z * z).sum(-1, keepdim=True) / z.shape[-1] + EPSILON) * weight


def attend(scores: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
    """o[m] = sum_n softmax(score[m, n]) v[n], n over what m sees; hidden keys are left out, not
    masked. scores (B, H, T, T), v (B, H, T, D) -> (B, H, T, D).
    """
    oracles.require_float64(scores, v)
    batch, length = v.shape[0], v.shape[2]
    rows = []
    for b in range(batch):
        outputs = []
        for m in range(length):
            seen = [n for n in range(length) if tokens.sees(b, m, n)]
            weights = torch.softmax(scores[b, :, m, seen], -1)
            outputs.append((weights[..., None] * v[b, :, seen]).sum(1))
        rows.append(torch.stack(outputs, 1))
    return torch.stack(rows)


class Call(NamedTuple):
    """What an encoding's scores are made of."""

    encoding: Any  # its public options
    weights: Mapping[str, Tensor]  # its own, by their names in it
    q: Tensor  # (B, H, T, D)
    k: Tensor  # (B, H, T, D): each query head's own view of its key head
    x: Tensor  # (B, T, C)
    tokens: Tokens


def _nope(call: Call) -> Tensor:
    return oracles.dot_scores(call.q, call.k)


def _rope(call: Call) -> Tensor:
    part, positions = call.encoding, call.tokens.positions
    assert part.scaling is None
    options: dict[str, Any] = {"base": part.base, "pairing": part.pairing}
    axes = getattr(part, "axes", None)
    if axes is not None:
        grid = (positions, axes, part.layout)
        q, k = (oracles.axial_rotate(z, *grid, **options) for z in (call.q, call.k))
        return oracles.dot_scores(q, k)
    if getattr(part, "partial", "front") == "proportional":
        dim, base = call.q.shape[-1], part.base
        options["frequencies"], _ = oracles.proportional_frequencies(
            dim, part.rotary_dim, base=base
        )
    else:
        options["rotary_dim"] = part.rotary_dim
    return oracles.rope_scores(call.q, call.k, positions, positions, **options)


def _carope(call: Call) -> Tensor:
    part, heads, dim = call.encoding, call.q.shape[1], call.q.shape[-1]
    rates = oracles.carope_rates(call.x, call.weights["weight"], call.weights.get("bias"))
    steps = oracles.carope_steps(rates, dim, part.first_power)  # (B, G, T, D/2)
    steps = steps * call.tokens.real[:, None, :, None]  # padding adds nothing
    phases = per_query_head(oracles.carope_phases(steps), heads)
    return oracles.dot_scores(*oracles.carope_rotate(call.q, call.k, phases))


def _polar(call: Call) -> Tensor:
    part, positions = call.encoding, call.tokens.positions
    delta = per_query_head(call.weights["delta"], call.q.shape[1], dim=0)
    scale = 1.0 if part.init == "authors" else None
    where = (positions, positions, scale, part.base)
    return oracles.cmha_scores(call.q, call.k, delta, call.weights["b"], *where)


def _relative(call: Call) -> Tensor:
    weights, positions, causal = call.weights, call.tokens.positions, call.tokens.causal
    where = {"positions_q": positions, "positions_k": positions, "causal": causal}
    if call.encoding.kind == "learned":
        terms = (weights["u"], weights["R"], weights["S"])
        return oracles.relative_learned_scores(call.q, call.k, *terms, **where)
    terms = (weights["u"], weights["v"], weights["W_R.weight"])
    return oracles.relative_sinusoidal_scores(call.q, call.k, *terms, **where)


#: Logits (B, H, T, T) of every encoding class, hidden pairs included; a new method adds its own.
SCORES: dict[str, Callable[[Call], Tensor]] = {
    "Encoding": _nope,
    "NoPE": _nope,
    "RoPE": _rope,
    "CARoPE": _carope,
    "Polar": _polar,
    "Relative": _relative,
    **zoo_oracles.SCORES,
}


def gates_of(
    router: Any, weights: Mapping[str, Tensor], x: Tensor, q: Tensor, real: Tensor
) -> tuple[Tensor, Tensor]:
    """MoH's gates (B, H, T), and its balance loss over the real tokens alone."""
    split = {"shared": router.shared, "top_k": router.top_k}
    if router.router == "linear":
        matrices = (weights.get(f"{name}.weight") for name in ("W_s", "W_r", "W_h"))
        gates = oracles.moh_linear_gates(x, *matrices, scaling=router.scaling, **split)
    else:
        gates = oracles.moh_query_norm_gates(q, **split)
    counted = (gates.probabilities[real], gates.selected[real])  # (real tokens, E)
    return gates.gates, oracles.moh_aux(*counted, router.aux_scale)


def attention_layer(
    x: Tensor,
    weights: Mapping[str, Tensor],
    *,
    num_heads: int,
    encoding: Any,
    router: Any = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    qk_norm: str | None = None,
    causal: bool = True,
    window: int | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, T, C) and balance loss of a layer; rows of padding are arbitrary.

    weights: c_attn.weight ((H + 2G) D, C), c_proj.weight (C, H D), biases of both or none; conv.*
    where there is a convolution; q_norm.weight and k_norm.weight (D,) with qk_norm; encoding.* and
    router.* as the parts name them.
    """
    oracles.require_float64(x, *weights.values())
    groups = num_heads if num_kv_heads is None else num_kv_heads
    dim = x.shape[-1] // num_heads if head_dim is None else head_dim
    if positions is not None and getattr(encoding, "continuous", False):
        positions = positions.double()  # below 0 they are positions like others, not padding
    tokens = place(x, positions, mask, segments, causal, window)

    def part(name: str) -> dict[str, Tensor]:
        prefix = f"{name}."
        return {key[len(prefix) :]: w for key, w in weights.items() if key.startswith(prefix)}

    counts = (num_heads, groups, groups)
    rows = [count * dim for count in counts]
    shift = weights.get("c_attn.bias")
    q, k, v = (
        oracles.project(x, W, bias, count)
        for W, bias, count in zip(
            weights["c_attn.weight"].split(rows),
            [None] * 3 if shift is None else shift.split(rows),
            counts,
            strict=True,
        )
    )
    if part("conv"):
        q, k, v = convolve_heads(
            (q, k, v), weights["conv.weight"], weights.get("conv.bias"), tokens
        )
    unnormed = q
    if qk_norm is not None:
        assert qk_norm == "rms"
        q, k = rms_norm(q, weights["q_norm.weight"]), rms_norm(k, weights["k_norm.weight"])
    k, v = per_query_head(k, num_heads), per_query_head(v, num_heads)
    score = SCORES[type(encoding).__name__]
    o = attend(score(Call(encoding, part("encoding"), q, k, x, tokens)), v, tokens)
    aux = x.new_zeros(())
    if router is not None:
        gates, aux = gates_of(router, part("router"), x, unnormed, tokens.real)
        o = oracles.weigh_heads(o, gates)
    return oracles.merge(o, weights["c_proj.weight"], weights.get("c_proj.bias")), aux
