"""Products of reflections (PaTH) in chunks: memory linear in the length, forward and backward.

A query u that has come back to the end of a chunk of L tokens (rows of K and R) meets its keys and
leaves it by one product with D x (L + D) numbers, which do not depend on u:

    Y   = (I + striu(R R^T))^-1 R             UT transform, see `posenc.reflections`
    u [ (K - striu(K R^T) Y)^T | I - Y^T R ]  = scores of the chunk | u before it

Queries go in blocks of a few chunks. A block sweeps back from its own last chunk to the first one,
its logits in memory; where they are wide the backward pass makes them anew. A decoding step is a
block of one query. Logits and softmax are fp32 whatever the inputs are.

Forward + backward of a layer on one CPU core, fp32, B=8 T=512 C=256 H=4: 317 ms, with RoPE 195. At
B=1 its memory grows by 100 KB a token, from 2k to 8k tokens. It has been timed on no GPU.
"""

import math
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from posenc.autocast import no_autocast
from posenc.backends.case import Case
from posenc.backends.mask import ALL, Piece
from posenc.backends.skipping import runs_eagerly
from posenc.reflections import solve
from posenc.routing.gates import weighed
from posenc.scores import add_per_head

#: Tokens of a chunk, and chunks of a block of queries: of 32 to 128 and 1 to 8 the fastest on CPU.
CHUNK, CHUNKS = 64, 2
#: Blocks that meet this many keys are recomputed in the backward pass: memory linear in T.
RECOMPUTE_FROM = 1024


def reason(case: Case) -> str | None:
    """None where it can and pays, else why not."""
    scores = case.scores
    if scores.reflections is None:
        return "computes products of reflections"
    if torch.compiler.is_compiling():
        return "a traced loop over chunks would make a graph of its own for every length"
    if not (scores._replace(reflections=None).plain and case.mask.causal):
        return "takes reflections without a further term, causal"
    return None if case.place.at is None else "reads the keys that there are"


def attend(case: Case) -> Tensor:
    """(B, H, T, D) in q's dtype."""
    case = case.turned()
    parts = groupby(_documents(case), key=lambda piece: piece.batch)
    outputs = [torch.cat([_attend(case, one) for one in pieces], dim=-2) for _, pieces in parts]
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return weighed(y.to(case.q.dtype), case.gates)


def _documents(case: Case) -> Iterable[Piece]:
    """Consecutive queries that are the last of consecutive keys."""
    mask = case.mask
    by_numbers = case.q.device.type == "cpu" and runs_eagerly(case.q)
    if mask.segments is None or by_numbers:
        return mask.pieces()
    return [Piece(ALL, slice(0, mask.length), slice(0, mask.key_length), square=False)]


class Chunks(NamedTuple):
    """A document in chunks of L tokens, N of keys, the last n of which are those of its queries.

    They begin at the first query, forwards and backwards; zeros fill the outer two. g counts the
    key heads of all sequences, h the query heads of each.
    """

    own: tuple[Tensor, ...]  # n: scores of queries and keys of one chunk (g, h, L, L), causal
    leaving: tuple[Tensor, ...]  # n: those queries before their chunk (g, h, L, D)
    across: tuple[Tensor, ...]  # N - 1: what each chunk does to later queries (g, D, L + D)
    size: int  # L
    front: int  # zeros in front of the first key


def chunks(q: Tensor, k: Tensor, r: Tensor) -> Chunks:
    """q (g, h, T, D), scaled; k and r (g, S, D)."""
    heads, length, key_length, dim = *q.shape[1:3], *k.shape[1:]
    size = min(CHUNK, key_length)
    front = (length - key_length) % size
    first = (key_length - length + front) // size

    def cut(x: Tensor, front: int) -> Tensor:
        """(g, .., t, D) -> (chunks, g, .., L, D)."""
        back = -(x.shape[-2] + front) % size
        x = F.pad(x, (0, 0, front, back)) if front or back else x
        return x.unflatten(-2, (-1, size)).movedim(-3, 0).contiguous()

    k, r = cut(k, front), cut(r, front)
    gram, before = r @ r.mT, (r @ k.mT).tril(-1)
    # Behind the last chunk there is no query.
    y = solve(gram[:-1], r[:-1].mT)  # Y^T: (N-1, g, D, L)
    unit = torch.eye(dim, dtype=r.dtype, device=r.device)
    across = torch.cat((k[:-1].mT - y @ before[:-1], unit - y @ r[:-1]), dim=-1)
    # The queries' own chunks: `posenc.reflections.correction`, and what is left of the query.
    k, r, gram, before = (x[first:] for x in (k, r, gram, before))
    rows = cut(q, 0).flatten(2, 3)  # (n, g, h L, D)
    c = solve(gram, (rows @ r.mT).unflatten(2, (heads, size)).tril().flatten(2, 3))
    own = (rows @ k.mT - c @ before).unflatten(2, (heads, size))
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    leaving = (rows - c @ r).unflatten(2, (heads, size))
    own = own.masked_fill(later, -math.inf)
    return Chunks(own.unbind(), leaving.unbind(), across.unbind(), size, front)


def sweep(parts: Chunks, start: int, stop: int, farthest: int) -> Tensor:
    """The logits (g, h, rows, keys) of the queries in their chunks start .. stop-1 with the keys
    from chunk `farthest` on.
    """
    first, heads, size = len(parts.across) + 1 - len(parts.own), parts.own[0].shape[1], parts.size
    u: Tensor | None = None  # the queries that have come back so far
    columns = []
    for chunk in range(first + stop - 1, farthest - 1, -1):
        scores: Tensor | None = None
        if u is not None:
            both = (u.flatten(1, 2) @ parts.across[chunk]).unflatten(1, (heads, -1))
            scores, u = both[..., :size], both[..., size:]
        at = chunk - first
        if at >= start:
            own, leaving = parts.own[at], parts.leaving[at]
            scores = own if scores is None else torch.cat((own, scores), dim=2)
            scores = F.pad(scores, (0, 0, (at - start) * size, 0), value=-math.inf)
            u = leaving if u is None else torch.cat((leaving, u), dim=2)
        assert scores is not None
        columns.append(scores)
    return torch.cat(columns[::-1], dim=-1)


def _attend(case: Case, piece: Piece) -> Tensor:
    """(B, H, T, D) of one document, in v's dtype."""
    mask, content, dropout_p = case.mask, case.scores.content, case.dropout_p
    assert case.scores.reflections is not None
    q = add_per_head(case.q[piece.batch, :, piece.rows], content)
    k, v, r = (x[piece.batch, :, piece.keys] for x in (case.k, case.v, case.scores.reflections))
    batch, heads, length, _ = q.shape
    groups, key_length = k.shape[1:3]
    precise = torch.promote_types(q.dtype, torch.float32)
    k, v, r = k.to(precise).flatten(0, 1), v.flatten(0, 1), r.to(precise).flatten(0, 1)
    with no_autocast(q.device):
        scaled = (q.to(precise) * case.scale).unflatten(1, (groups, -1)).flatten(0, 1)
        parts = chunks(scaled, k, r)
    size, past = parts.size, key_length - length

    def block(start: int) -> Tensor:
        stop = min(start + CHUNKS, len(parts.own))
        rows = slice(start * size, min(stop * size, length))
        seen = 0 if mask.window is None else max(0, past + rows.start - mask.window + 1)
        farthest = (seen + parts.front) // size
        zeros = max(0, parts.front - farthest * size)
        keys = slice(farthest * size + zeros - parts.front, past + rows.stop)
        with no_autocast(q.device):
            logits = sweep(parts, start, stop, farthest)
            logits = logits[:, :, : rows.stop - rows.start, zeros : zeros + keys.stop - keys.start]
            if not (piece.square or mask.only_order):
                hidden = ~mask.dense(
                    piece.batch, _later(rows, piece.rows.start), _later(keys, piece.keys.start)
                )
                logits = logits.unflatten(0, (batch, groups)).flatten(1, 2)
                logits = logits.masked_fill(hidden, -math.inf)
                logits = logits.unflatten(1, (groups, -1)).flatten(0, 1)
            weights = logits.softmax(-1).to(v.dtype)
            if dropout_p:
                weights = F.dropout(weights, dropout_p)
            return torch.bmm(weights.flatten(1, 2), v[:, keys]).unflatten(1, (-1, weights.shape[2]))

    recompute = torch.is_grad_enabled() and key_length >= RECOMPUTE_FROM
    # torch.func knows no checkpoints.
    recompute = recompute and not torch._C._are_functorch_transforms_active()
    outputs = []
    # The widest block first: where it lay the others fit.
    for start in reversed(range(0, len(parts.own), CHUNKS)):
        if recompute:
            random = dropout_p > 0
            y = checkpoint(block, start, use_reentrant=False, preserve_rng_state=random)
        else:
            y = block(start)
        outputs.append(y)
    return torch.cat(outputs[::-1], dim=-2).view(batch, heads, length, -1)


def _later(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)
