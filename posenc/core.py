"""attend(): one entry to softmax attention, its back ends, and the causal mask's one owner.

    y[m] = sum over n of softmax_n(logits[m, n]) v[n]      over the keys that query m may see

Shapes: q (B, H, T, D), k and v (B, H, S, D) with T <= S; query row i sits at key index S - T + i.

Back ends (`impl`):
    reference   materialises the definition, in fp32 or better
    sdpa        torch's scaled_dot_product_attention; a dense bias only where the logits need one
    fused       Triton kernels
    auto        the fastest that supports the case; on CPU that may be `posenc.blockwise`
An explicit choice never falls back.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from posenc.blockwise import attend_blockwise
from posenc.errors import unknown
from posenc.scores import Scores, add_per_head, relative_logits

IMPLS = ("auto", "reference", "sdpa", "fused")


def check_impl(impl: str) -> str:
    """`impl` itself, or ValueError with the choices; "fused" raises where no kernel can run it."""
    if impl not in IMPLS:
        raise ValueError(unknown("impl", impl, IMPLS))
    if impl == "fused":
        raise ValueError(
            "impl='fused' asks for a Triton kernel; this version has none. "
            "Use impl='sdpa' (torch's fused attention), 'reference' or 'auto'."
        )
    return impl


def causal_mask(length: int, key_length: int, device: torch.device | None = None) -> Tensor:
    """True where query row i may see key n, n <= S - T + i: (T, S), aligned at the lower right."""
    ones = torch.ones(length, key_length, dtype=torch.bool, device=device)
    return ones.tril(key_length - length)


def visible(length: int, key_length: int, real: Tensor | None, device: torch.device) -> Tensor:
    """The causal mask (T, S) or, less the padded keys (`real` (B, S) is False), (B, 1, T, S).

    A row always sees itself: a padded query has no other key, and a softmax over nothing is NaN.
    """
    causal = causal_mask(length, key_length, device)
    if real is None:
        return causal
    itself = causal.triu(key_length - length)
    return causal & (real[:, None, None, :] | itself)


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
    scores = scores or Scores()
    if q.shape[-2] > k.shape[-2]:
        raise ValueError(
            f"causal attention needs at least as many keys as queries; got T={q.shape[-2]}, "
            f"S={k.shape[-2]}. Pass the whole key sequence, the queries being its last tokens."
        )
    if impl == "reference":
        return _reference(q, k, v, scores, real, dropout_p)
    if impl == "auto" and real is None and _blockwise_is_faster(q, scores):
        return attend_blockwise(q, k, v, scores, dropout_p=dropout_p)
    return _sdpa(q, k, v, scores, real, dropout_p)


def _blockwise_is_faster(q: Tensor, scores: Scores) -> bool:
    """On CPU: with a relative term, and in low precision, as measured in `posenc.blockwise`."""
    # Traced, its loop over blocks would make a graph of its own for every length.
    if q.device.type != "cpu" or q.shape[-2] == 1 or torch.compiler.is_compiling():
        return False
    if scores.bias is not None:
        return False
    if scores.relative is not None:
        return scores.relative.distances is None
    return q.dtype in (torch.bfloat16, torch.float16)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, real: Tensor | None, dropout_p: float
) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = scores.factor(q.shape[-1])
    allowed = visible(q.shape[-2], k.shape[-2], real, q.device)
    with torch.autocast(q.device.type, enabled=False):
        query, key, value = q.to(dtype), k.to(dtype), v.to(dtype)
        logits = add_per_head(query, scores.content) @ key.transpose(-1, -2)
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
    scale = scores.factor(q.shape[-1])
    content = add_per_head(q, scores.content)
    sdpa = partial(F.scaled_dot_product_attention, dropout_p=dropout_p, scale=scale)
    bias = scores.bias
    if scores.relative is not None:
        relative = scale * relative_logits(q, scores.relative, key_length)
        bias = relative if bias is None else bias + relative
    if bias is None and real is None:
        if length == 1:  # a single query sees every key
            return sdpa(content, k, v)
        if length == key_length:  # torch aligns is_causal at the top left: right here alone
            return sdpa(content, k, v, is_causal=True)
    mask = visible(length, key_length, real, q.device)
    if bias is not None:
        mask = bias.to(q.dtype).masked_fill(~mask, -math.inf)
    return sdpa(content, k, v, attn_mask=mask)
