"""Contextual positions on CPU: a query's gates, summed from its own key back, in blocks of rows.

    logits[m, n] = scale * (q[m].k[n] + q[m].table[p[m, n]])    `posenc.scores.contextual_logits`

T x S gates are the definition; here they are those of one block of query rows at a time, of the
keys up to its last row, and recomputed in the backward pass where texts are long: memory linear in
T. Keys lie reversed: what is summed from a query back is then a running sum. Forward + backward on
one CPU core, fp32, B=8 H=4 T=512 D=64, P=64: 270 ms; dense 1230; attention without positions 110.
"""

import math
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from posenc.autocast import no_autocast
from posenc.backends.blockwise import ROWS, in_blocks
from posenc.backends.case import Case
from posenc.backends.mask import Piece
from posenc.backends.skipping import runs_eagerly
from posenc.routing.gates import weighed
from posenc.scores import add_per_head, at_places


def reason(case: Case) -> str | None:
    """None where it can and pays, else why not."""
    scores, mask = case.scores, case.mask
    if scores.contextual is None:
        return "computes contextual positions alone"
    if torch.compiler.is_compiling():
        return "a traced loop over blocks would make a graph of its own for every length"
    if mask.length == 1:
        return "a single query has no blocks"
    if scores.bias is not None or scores.relative is not None or not mask.causal:
        return "takes contextual positions without a further term, causal"
    by_numbers = case.q.device.type == "cpu" and runs_eagerly(case.q)
    if mask.segments is not None and not by_numbers:
        return "packed documents are cut by their numbers, which are not to be had here"
    return None


def attend(case: Case, rows: int | None = None) -> Tensor:
    """(B, H, T, D) in q's dtype.

    Args:
        rows: of a block; None is `posenc.backends.blockwise.ROWS`.
    """
    case = case.turned().repeated()
    parts = groupby(case.mask.pieces(rows or ROWS), key=lambda piece: piece.batch)
    outputs = [_rows(case, batch, list(pieces)) for batch, pieces in parts]
    return weighed(outputs[0] if len(outputs) == 1 else torch.cat(outputs), case.gates)


def _rows(case: Case, batch: slice, pieces: list[Piece]) -> Tensor:
    """Some rows of the batch."""
    q, k, v, scores, mask = case.q[batch], case.k[batch], case.v[batch], case.scores, case.mask
    assert scores.contextual is not None
    table, dropout_p, heads = scores.contextual, case.dropout_p, q.shape[:2]
    precise, key_length = torch.promote_types(q.dtype, torch.float32), mask.key_length
    with no_autocast(q.device):
        query = q.to(precise) * case.scale
        by_place = (query @ table.to(precise).mT).flatten(0, 1)  # (B * H, T, P)
    content = None if scores.content is None else scores.content * case.scale
    query = add_per_head(query, content).flatten(0, 1)
    keys, values = (z.flip(-2).flatten(0, 1) for z in (k.to(precise), v))
    keys = keys.mT
    longest = max(piece.rows.stop - piece.rows.start for piece in pieces)
    later = torch.ones(longest, longest, dtype=torch.bool, device=q.device).triu(1)

    def block(piece: Piece) -> Tensor:
        rows = piece.rows.stop - piece.rows.start
        seen = slice(key_length - piece.keys.stop, key_length - piece.keys.start)  # reversed
        with no_autocast(q.device):
            logits = torch.bmm(query[:, piece.rows], keys[..., seen])
            # Before the gates: what is hidden counts 0.
            if mask.real is None and mask.window is None:
                logits[..., :rows].masked_fill_(later[:rows, :rows].flip(-1), -math.inf)
            else:
                hidden = ~mask.dense(batch, piece.rows, piece.keys).flip(-1)
                logits.unflatten(0, heads).masked_fill_(hidden, -math.inf)
            places = logits.sigmoid().cumsum(-1).clamp(max=len(table) - 1)
            logits = logits + at_places(by_place[:, piece.rows], places)
            weights = logits.softmax(-1).to(v.dtype)
            if dropout_p:
                weights = F.dropout(weights, dropout_p)
            return torch.bmm(weights, values[:, seen])

    return in_blocks(block, pieces, random=dropout_p > 0).unflatten(0, heads)
