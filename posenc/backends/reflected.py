"""Products of reflections (PaTH) in chunks: memory linear in the length, forward and backward.

A query u that has come back to the end of a chunk of L tokens (rows of K and R) meets its keys and
leaves it by one product with D x (L + D) numbers, which do not depend on u:

    Y   = (I + striu(R R^T))^-1 R             UT transform, see `posenc.reflections`
    u [ (K - striu(K R^T) Y)^T | I - Y^T R ]  = scores of the chunk | u before it

Queries go in blocks of a few chunks. A block sweeps back from its own last chunk to the first one
that it sees, its logits in memory; where they are wide the backward pass makes them anew. A
decoding step is a block of one query, and transforms all chunks anew. Logits and softmax are fp32
whatever the inputs are.

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

from posenc.autocast import no_autocast
from posenc.backends.blockwise import in_blocks
from posenc.backends.case import Case
from posenc.backends.mask import ALL, Piece
from posenc.backends.skipping import runs_eagerly
from posenc.reflections import solve
from posenc.routing.gates import weighed
from posenc.scores import add_per_head

#: Tokens of a chunk, and chunks of a block of queries: of 32 to 128 and 1 to 8 the fastest on CPU.
CHUNK, CHUNKS = 64, 2


def reason(case: Case) -> str | None:
    """None where it can and pays, else why not."""
    scores = case.scores
    if scores.reflections is None:
        return "computes products of reflections alone"
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


def _blocks(parts: Chunks, document: Piece, window: int | None) -> list[Piece]:
    """A document's queries, so many chunks at a time, and all chunks of keys that they see."""
    length = document.rows.stop - document.rows.start
    past = document.keys.stop - document.keys.start - length
    blocks = []
    for start in range(0, length, CHUNKS * parts.size):
        stop = min(start + CHUNKS * parts.size, length)
        low = 0 if window is None else max(0, past + start - window + 1)
        low = max(0, low - (low + parts.front) % parts.size)
        rows = slice(document.rows.start + start, document.rows.start + stop)
        keys = slice(document.keys.start + low, document.keys.start + past + stop)
        blocks.append(Piece(document.batch, rows, keys, square=False))
    return blocks


def _attend(case: Case, document: Piece) -> Tensor:
    """(B, H, T, D) of one document, in v's dtype."""
    mask, scores, dropout_p = case.mask, case.scores, case.dropout_p
    assert scores.reflections is not None
    q = add_per_head(case.q[document.batch, :, document.rows], scores.content)
    of_keys = (x[document.batch, :, document.keys] for x in (case.k, case.v, scores.reflections))
    k, v, r = (x.flatten(0, 1) for x in of_keys)
    batch, groups = len(q), case.k.shape[1]
    precise = torch.promote_types(q.dtype, torch.float32)
    with no_autocast(q.device):
        scaled = (q.to(precise) * case.scale).unflatten(1, (groups, -1)).flatten(0, 1)
        parts = chunks(scaled, k.to(precise), r.to(precise))

    def block(piece: Piece) -> Tensor:
        rows, width = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
        start = (piece.rows.start - document.rows.start) // parts.size
        low = piece.keys.start - document.keys.start
        farthest = (low + parts.front) // parts.size
        zeros = 0 if low else parts.front
        with no_autocast(q.device):
            logits = sweep(parts, start, min(start + CHUNKS, len(parts.own)), farthest)
            logits = logits[:, :, :rows, zeros : zeros + width]
            if not (document.square or mask.only_order):
                hidden = ~mask.dense(piece.batch, piece.rows, piece.keys)
                by_query_head = logits.unflatten(0, (batch, groups)).flatten(1, 2)
                logits = by_query_head.masked_fill(hidden, -math.inf).reshape(logits.shape)
            weights = logits.softmax(-1).to(v.dtype)
            if dropout_p:
                weights = F.dropout(weights, dropout_p)
            y = torch.bmm(weights.flatten(1, 2), v[:, low : low + width])
            return y.unflatten(1, (-1, rows))

    y = in_blocks(block, _blocks(parts, document, mask.window), random=dropout_p > 0)
    return y.unflatten(0, (batch, groups)).flatten(1, 2)
