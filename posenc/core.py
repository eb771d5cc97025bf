"""attend(): one entry to softmax attention, its back ends, and the causal mask's one owner.

    y[m] = sum over n of softmax_n(logits[m, n]) v[n]      over the keys that query m may see

Shapes: q (B, H, T, D), k and v (B, H, S, D) with T <= S; query row i sits at key index S - T + i.

Back ends (`impl`):
    reference   materialises the definition, in fp32 or better
    sdpa        torch's scaled_dot_product_attention; a dense bias only where the logits need one
    fused       Triton kernels, see `posenc.fused`
    auto        the fastest measured: on CPU `posenc.blockwise` for relative terms and
                `posenc.skipping` where gates drop enough, else sdpa
An explicit choice never falls back. The kernels have been timed on no GPU yet, so `auto` leaves
them out.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from posenc import fused
from posenc.autocast import no_autocast
from posenc.blockwise import attend_blockwise
from posenc.errors import unknown
from posenc.routing import Gates, weigh
from posenc.scores import Scores, add_per_head, relative_logits
from posenc.skipping import attend_kept, runs_eagerly

IMPLS = ("auto", "reference", "sdpa", "fused")
#: Up to this length torch's attention on CPU is faster in fp32 than in bf16, casts included:
#: forward + backward at B=16 H=4 D=48 T=128 takes 6 and 11 ms, at B=8 D=64 T=512 46 ms both.
UPCAST_TO = 512
#: Skipping what gates drop pays on CPU from so many queries x features of a head on, or so many
#: keys of a single query, and up to this share of kept rows in the heads that may be dropped.
#: Routed heads at B=1 T=1024 D=64 fp32, a third kept: 7.4 ms dense, 4.6 skipping; two thirds kept,
#: a tie. T=512 D=32, half kept: 0.92 of the dense speed. One query of 4096 keys, half of 8 heads
#: kept: 205 us dense, 105 skipping.
SKIP_FROM, SKIP_TOKEN_FROM, SKIP_UP_TO = 512 * 64, 2048, 0.4


def check_impl(impl: str) -> str:
    """`impl` itself, or ValueError with the choices; "fused" raises where no kernel can run."""
    if impl not in IMPLS:
        raise ValueError(unknown("impl", impl, IMPLS))
    if impl == "fused" and not torch.compiler.is_compiling():
        fused.check_available()
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
    gates: Gates | None = None,
    real: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Causal softmax attention.

    Args:
        q: (B, H, T, D). k, v: (B, H, S, D), S >= T.
        scores: how the logits differ from q . k / sqrt(D).
        gates: weights of the outputs; fused and auto need not compute what they drop.
        real: (B, S) bool, False for padded keys.
        dropout_p: of the attention weights, applied whenever it is not 0.
        impl: see the module's docstring.

    Returns:
        (B, H, T, D) in q's dtype.

    Raises:
        ValueError: for an unknown impl, a case that "fused" has no kernel for, or fewer keys than
            queries.
    """
    check_impl(impl)
    scores = scores or Scores()
    if q.shape[-2] > k.shape[-2]:
        raise ValueError(
            f"causal attention needs at least as many keys as queries; got T={q.shape[-2]}, "
            f"S={k.shape[-2]}. Pass the whole key sequence, the queries being its last tokens."
        )
    if impl == "fused":
        return fused.attend(q, k, v, scores, gates, real, dropout_p)
    on_cpu = impl == "auto" and q.device.type == "cpu" and real is None
    if on_cpu and gates is not None and not dropout_p and _skips(q, k, scores, gates):
        scale = scores.factor(q.shape[-1])
        dense = partial(_on_cpu, scores=Scores(scale=scale), dropout_p=0.0)
        return attend_kept(add_per_head(q, scores.content), k, v, gates, scale, dense)
    if impl == "reference":
        y = _reference(q, k, v, scores, real, dropout_p)
    elif on_cpu:
        y = _on_cpu(q, k, v, scores, dropout_p)
    else:
        y = _sdpa(q, k, v, scores, real, dropout_p)
    return y if gates is None else weigh(y, gates.values)


def _skips(q: Tensor, k: Tensor, scores: Scores, gates: Gates) -> bool:
    """Whether it is faster on CPU not to compute what the gates drop."""
    if scores.relative is not None or scores.bias is not None or not runs_eagerly(q):
        return False
    if q.shape[-2] == 1:
        pays = k.shape[-2] >= SKIP_TOKEN_FROM and not torch.is_grad_enabled()
    else:
        pays = q.shape[-2] * q.shape[-1] >= SKIP_FROM
    return pays and gates.kept <= SKIP_UP_TO and not gates.need_every_output


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, scores: Scores, dropout_p: float) -> Tensor:
    """The fastest for consecutive keys on CPU, never less exact than sdpa."""
    length, key_length, term = q.shape[-2], k.shape[-2], scores.relative
    if term is not None and term.distances is None and scores.bias is None and length > 1:
        # Traced, the loop over blocks would make a graph of its own for every length.
        if not torch.compiler.is_compiling():
            return attend_blockwise(q, k, v, scores, term, dropout_p=dropout_p)
    elif q.dtype.itemsize < 4 and length == key_length <= UPCAST_TO:
        with no_autocast(q.device):
            y = _sdpa(q.float(), k.float(), v.float(), scores, None, dropout_p)
        return y.to(q.dtype)
    return _sdpa(q, k, v, scores, None, dropout_p)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, real: Tensor | None, dropout_p: float
) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = scores.factor(q.shape[-1])
    allowed = visible(q.shape[-2], k.shape[-2], real, q.device)
    with no_autocast(q.device):
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
        # In bf16 a bias loses its distances above 256; torch takes an fp32 one on CPU alone.
        on_cpu = q.device.type == "cpu"
        bias = bias.to(torch.promote_types(q.dtype, torch.float32) if on_cpu else q.dtype)
        mask = bias.masked_fill(~mask, -math.inf)
    y = sdpa(content, k, v, attn_mask=mask)
    if bias is not None and torch.compiler.is_exporting():
        # Where a mask needs a gradient torch lays y out otherwise. An exporter that looks at the
        # graph with and without gradients (ONNX's does) would differ about what is a view of it.
        y = y.clone(memory_format=torch.contiguous_format)
    return y
