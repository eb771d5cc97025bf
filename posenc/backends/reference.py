"""The definition, materialised, in fp32 or better."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from posenc.autocast import no_autocast
from posenc.backends.case import Case
from posenc.fading import faded_logits
from posenc.reflections import sweep
from posenc.routing.gates import weighed
from posenc.scores import add_per_head, contextual_logits, relative_logits


def reason(case: Case) -> str | None:
    """None: it computes every case."""
    return None


def attend(case: Case) -> Tensor:
    """(B, H, T, D) in q's dtype; T x S in memory."""
    case = case.repeated()
    with no_autocast(case.q.device):
        weights = torch.softmax(logits(case), dim=-1)
        if case.dropout_p:
            weights = F.dropout(weights, case.dropout_p)
        return weighed((weights @ case.v.to(weights.dtype)).to(case.q.dtype), case.gates)


def logits(case: Case) -> Tensor:
    """What the softmax sees of turned q and k with a key head for every query head: (B, H, T, S)
    in fp32 or better, -inf where hidden.
    """
    q, scores = case.q, case.scores
    dtype = torch.promote_types(q.dtype, torch.float32)
    with no_autocast(q.device):
        query, key = q.to(dtype), case.k.to(dtype)
        content = add_per_head(query, scores.content)
        if scores.reflections is not None:
            products = sweep(content, key, scores.reflections.to(dtype))
        elif scores.fading is not None:
            products = faded_logits(content, key, scores.fading, case.place)
        else:
            products = content @ key.transpose(-1, -2)
        total, seen = products, case.mask.whole()
        if scores.relative is not None:
            total = total + relative_logits(query, scores.relative, key.shape[-2])
        if scores.contextual is not None:
            term = contextual_logits(products, query, scores.contextual, seen, case.scale)
            total = total + term
        total = total * case.scale
        bias = scores.added()
        total = total if bias is None else total + bias
        return total.masked_fill(~seen, -math.inf)
