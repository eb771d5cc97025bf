"""attend(): one entry to softmax attention, its back ends, and the one place that aligns the causal mask.

    y[m] = sum_n softmax_n(logits[m, n]) v[n]      over the keys that query m may see

Shapes: q (B, H, T, D), k and v (B, H, S, D) with T <= S; query row i sits at key index S - T + i.

Back ends (`impl`):
    reference   materialises the definition, in fp32 or better
    sdpa        torch's scaled_dot_product_attention, with a dense bias only where the logits need one
    fused       Triton kernels
    auto        the fastest of them that supports the case
An explicit choice never falls back.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from posenc.errors import unknown

IMPLS = ("auto", "reference", "sdpa", "fused")


class RelativeTerm(NamedTuple):
    """(q[m] + query_h) . table[h, d] + offset[h, d], multiplied by the scale, d the distance of m and n.

    Distances beyond the table use its last row. Kept factored: no back end needs T x S of it.
    """

    table: Tensor  # (H, P, D)
    query: Tensor | None = None  # (H, D)
    offset: Tensor | None = None  # (H, P)
    distances: Tensor | None = (
        None  # integer (T, S) or (B, 1, T, S); None: keys at consecutive positions
    )


class Scores(NamedTuple):
    """How an encoding enters the logits: scale * ((q + content_h) . k + relative) + bias."""

    scale: float | None = None  # None is 1/sqrt(D)
    content: Tensor | None = None  # (H, D)
    bias: Tensor | None = None  # broadcastable to (B, H, T, S)
    relative: RelativeTerm | None = None


def check_impl(impl: str) -> str:
    """`impl` itself, or ValueError with the choices; "fused" raises where no kernel can run it."""
    if impl not in IMPLS:
        raise ValueError(unknown("impl", impl, IMPLS))
    if impl == "fused":
        raise ValueError(
            "impl='fused' has no Triton kernel in this version; got a request for one. "
            "Use impl='sdpa' (torch's fused attention), 'reference' or 'auto'."
        )
    return impl


def causal_mask(length: int, key_length: int, device: torch.device | None = None) -> Tensor:
    """True where query row i may see key n: n <= S - T + i. (T, S), aligned at the lower right."""
    return torch.ones(length, key_length, dtype=torch.bool, device=device).tril(key_length - length)


def visible(length: int, key_length: int, real: Tensor | None, device: torch.device) -> Tensor:
    """The causal mask, less the padded keys: (T, S), or (B, 1, T, S) where `real` (B, S) marks the true tokens.

    A row always sees itself: a padded query has no other key, and a softmax over nothing is NaN.
    """
    causal = causal_mask(length, key_length, device)
    if real is None:
        return causal
    itself = causal.triu(key_length - length)
    return causal & (real[:, None, None, :] | itself)


def relative_logits(q: Tensor, term: RelativeTerm, key_length: int) -> Tensor:
    """The relative term (B, H, T, S), unscaled; entries with n > m are arbitrary (finite) and must be masked.

    For consecutive keys a product with the table in falling order of distance is skewed into place by reading its
    rows one element further apart: a view, no gather and no copy.
    """
    query = q if term.query is None else q + term.query.unsqueeze(-2).to(q.dtype)
    length, rows = q.shape[-2], term.table.shape[-2]
    if term.distances is not None:
        by_distance = query @ term.table.to(q.dtype).transpose(-1, -2)  # (B, H, T, P)
        if term.offset is not None:
            by_distance = by_distance + term.offset.unsqueeze(-2)
        distances = term.distances.clamp(0, rows - 1)
        shape = (*by_distance.shape[:2], *distances.shape[-2:])
        return by_distance.gather(-1, distances.expand(shape))
    falling = torch.arange(key_length, -1, -1, device=q.device).clamp(
        max=rows - 1
    )  # distances S, S-1, .. 0
    by_distance = query @ term.table[:, falling].to(q.dtype).transpose(-1, -2)  # (B, H, T, S + 1)
    if term.offset is not None:
        by_distance = by_distance + term.offset[:, falling].unsqueeze(-2)
    # Element (i, n) lies at distance S-T+i-n, column T-i+n, hence at flat index i*S + n + T.
    return by_distance.flatten(-2)[..., length:].unflatten(-1, (length, key_length))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Scores | None = None,
    *,
    real: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Causal softmax attention.

    Args:
        q: (B, H, T, D). k, v: (B, H, S, D), S >= T.
        scores: how the logits differ from q . k / sqrt(D).
        real: (B, S) bool, False for padded keys.
        dropout_p: of the attention weights, applied whenever it is not 0.
        impl: see the module's docstring.

    Returns:
        (B, H, T, D) in q's dtype.

    Raises:
        ValueError: for an unknown impl, "fused" without a kernel, or fewer keys than queries.
    """
    check_impl(impl)
    if q.shape[-2] > k.shape[-2]:
        raise ValueError(
            f"causal attention needs at least as many keys as queries; got T={q.shape[-2]}, S={k.shape[-2]}. "
            "Pass the whole key sequence, the queries being its last tokens."
        )
    run = _reference if impl == "reference" else _sdpa
    return run(q, k, v, scores or Scores(), real, dropout_p)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, real: Tensor | None, dropout_p: float
) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = scores.scale or 1 / math.sqrt(q.shape[-1])
    allowed = visible(q.shape[-2], k.shape[-2], real, q.device)
    with torch.autocast(q.device.type, enabled=False):
        query, key, value = q.to(dtype), k.to(dtype), v.to(dtype)
        content = (
            query if scores.content is None else query + scores.content.unsqueeze(-2).to(dtype)
        )
        logits = content @ key.transpose(-1, -2)
        if scores.relative is not None:
            logits = logits + relative_logits(query, scores.relative, k.shape[-2])
        logits = logits * scale
        if scores.bias is not None:
            logits = logits + scores.bias
        weights = torch.softmax(logits.masked_fill(~allowed, -math.inf), dim=-1)
        if dropout_p:
            weights = F.dropout(weights, dropout_p)
        return (weights @ value).to(q.dtype)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, real: Tensor | None, dropout_p: float
) -> Tensor:
    length, key_length = q.shape[-2], k.shape[-2]
    scale = scores.scale or 1 / math.sqrt(q.shape[-1])
    content = q if scores.content is None else q + scores.content.unsqueeze(-2).to(q.dtype)
    dense = scores.bias is not None or scores.relative is not None
    if not dense and real is None and length in (1, key_length):
        # torch aligns is_causal at the top left, which is right for T = S alone; one query sees every key.
        return F.scaled_dot_product_attention(
            content, k, v, is_causal=length > 1, dropout_p=dropout_p, scale=scale
        )
    mask = visible(length, key_length, real, q.device)
    if dense:
        bias = (
            torch.zeros((), dtype=q.dtype, device=q.device) if scores.bias is None else scores.bias
        )
        if scores.relative is not None:
            bias = bias + scale * relative_logits(q, scores.relative, key_length)
        mask = bias.to(q.dtype).masked_fill(~mask, -math.inf)
    return F.scaled_dot_product_attention(
        content, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale
    )
