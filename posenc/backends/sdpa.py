"""torch's scaled_dot_product_attention; a dense mask or bias only where the case needs one."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from posenc.backends.case import Case
from posenc.routing.gates import weighed
from posenc.scores import add_per_head, added_logits


def reason(case: Case) -> str | None:
    """None: it computes every case."""
    return None


def attend(case: Case) -> Tensor:
    """(B, H, T, D) in q's dtype."""
    return weighed(attend_dense(case), case.gates)


def attend_dense(case: Case) -> Tensor:
    """Without gates, of turned q and k."""
    if case.wide:  # torch's flash attention wants equal widths: twice as fast, zeros included
        width = case.v.shape[-1]
        padded = F.pad(case.v, (0, case.k.shape[-1] - width))
        return attend_dense(case._replace(v=padded))[..., :width]
    q, k, v, scores, mask = case.q, case.k, case.v, case.scores, case.mask
    length, key_length = mask.length, mask.key_length
    content = add_per_head(q, scores.content)
    sdpa = partial(
        F.scaled_dot_product_attention,
        dropout_p=case.dropout_p,
        scale=case.scale,
        enable_gqa=bool(q.shape[1] != k.shape[1]),  # traced, sizes are tensors
    )
    bias = None
    if not scores.plain:
        bias = added_logits(q, k, scores, case.scale, mask.whole)
    if bias is None and mask.only_order:
        if length == 1 or not mask.causal:  # a single query sees every key
            return sdpa(content, k, v)
        if length == key_length:  # torch aligns is_causal at the top left: right here alone
            return sdpa(content, k, v, is_causal=True)
    allowed = mask.whole()
    if bias is not None:
        # In bf16 a bias loses its distances above 256; torch takes an fp32 one on CPU alone.
        on_cpu = q.device.type == "cpu"
        bias = bias.to(torch.promote_types(q.dtype, torch.float32) if on_cpu else q.dtype)
        allowed = bias.masked_fill(~allowed, -math.inf)
    y = sdpa(content, k, v, attn_mask=allowed)
    if bias is not None and torch.compiler.is_exporting():
        # Where a mask needs a gradient torch lays y out otherwise. An exporter that looks at the
        # graph with and without gradients (ONNX's does) would differ about what is a view of it.
        y = y.clone(memory_format=torch.contiguous_format)
    return y
