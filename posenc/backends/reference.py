"""The definition, materialised, in fp32 or better."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from posenc.autocast import no_autocast
from posenc.backends.case import Case
from posenc.reflections import sweep
from posenc.routing.gates import weighed
from posenc.scores import add_per_head, contextual_logits, relative_logits


def reason(case: Case) -> str | None:
    """None: it computes every case."""
    return None


def attend(case: Case) -> Tensor:
    """(B, H, T, D) in q's dtype; T x S in memory."""
    case = case.repeated()
    q, k, v, scores = case.q, case.k, case.v, case.scores
    dtype = torch.promote_types(q.dtype, torch.float32)
    with no_autocast(q.device):
        query, key, value = q.to(dtype), k.to(dtype), v.to(dtype)
        content = add_per_head(query, scores.content)
        if scores.reflections is None:
            products = content @ key.transpose(-1, -2)
        else:
            products = sweep(content, key, scores.reflections.to(dtype))
        logits, seen = products, case.mask.whole()
        if scores.relative is not None:
            logits = logits + relative_logits(query, scores.relative, k.shape[-2])
        if scores.contextual is not None:
            term = contextual_logits(products, query, scores.contextual, seen, case.scale)
            logits = logits + term
        logits = logits * case.scale
        bias = scores.added()
        logits = logits if bias is None else logits + bias
        weights = torch.softmax(logits.masked_fill(~seen, -math.inf), dim=-1)
        if case.dropout_p:
            weights = F.dropout(weights, case.dropout_p)
        return weighed((weights @ value).to(q.dtype), case.gates)
