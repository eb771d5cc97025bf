"""Attention piece by piece: the fast path on CPU where T x S holds less than it spans.

With a relative term, a bias, or keys wider than values it forms the logits itself: blocks of query
rows that see the keys up to their last row only, so the half of T x S above the diagonal is never
formed, and the logits of one block at a time where blocks are recomputed in the backward pass.
Forward + backward on 2 CPU cores, fp32, B=8 H=4 T=512 D=64, with a relative term: 63 ms; as a dense
bias to torch's attention 170 ms. With a bias: as long as torch's attention without. Keys of 2D: 71
ms; in torch's attention, which on CPU wants equal widths, 106 ms with values padded.
Logits and softmax are fp32 whatever the inputs are.

Otherwise packed documents one by one and windows as a band of blocks, each by torch's attention; a
padded text in blocks whose masks are small, and a bias of distances that does not learn (ALiBi) in
blocks that share a mask.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from posenc.autocast import no_autocast
from posenc.backends.case import Case
from posenc.backends.mask import Piece
from posenc.backends.short import UPCAST_TO
from posenc.backends.skipping import runs_eagerly
from posenc.routing.gates import weighed
from posenc.scores import Bias, ByDistance, Decay, Scores, add_per_head, falling_table, skew

#: Rows of a block of logits where nothing was measured; of 64 to 512 the fastest on CPU.
ROWS = 128
#: Blocks that meet this many keys are recomputed in the backward pass: memory linear in T.
RECOMPUTE_FROM = 1024
#: Rows of a block where a window or padding calls for blocks, and nothing was measured.
BAND_ROWS = 256
#: From so many queries on a padded text goes in blocks where nothing was measured: below, one dense
#: mask is as fast.
PADDED_FROM = 1024


def reason(case: Case) -> str | None:
    """None where it can, else why not."""
    if torch.compiler.is_compiling():
        return "a traced loop over pieces would make a graph of its own for every length"
    mask, term = case.mask, case.scores.relative
    if case.scores.contextual is not None:
        return "knows no positions that gates count"
    if case.scores.reflections is not None:
        return "takes no reflections"
    if mask.length == 1:
        return "a single query has no blocks"
    if term is not None and (term.distances is not None or term.two_sided):
        return "takes relative terms of consecutive keys, causal"
    by_numbers = case.q.device.type == "cpu" and runs_eagerly(case.q)
    if mask.segments is not None and not by_numbers:
        return "packed documents are cut by their numbers, which are not to be had here"
    if _forms_logits(case):
        return None
    if mask.segments is not None or mask.window is not None:
        return None if runs_eagerly(case.q) else "pieces are cut by numbers not to be had here"
    return "T x S is full: one piece" if mask.real is None else None


def pays(case: Case) -> bool:
    """Whether it is the faster way where nothing was measured."""
    mask = case.mask
    cut = mask.segments is not None or mask.window is not None
    return cut or _forms_logits(case) or mask.length >= PADDED_FROM


def attend(case: Case, rows: int | None = None) -> Tensor:
    """(B, H, T, D) in q's dtype.

    Args:
        rows: of a block; None is `ROWS`, or `BAND_ROWS` where torch's attention takes the blocks.
    """
    one: Callable[[Case, slice, list[Piece]], Tensor]
    if _forms_logits(case) and not _fixed_bias(case):
        one, rows = _by_logits, rows or ROWS
    else:
        one, rows = _plain, _band_rows(case, rows or BAND_ROWS)
    parts = groupby(case.mask.pieces(rows), key=lambda piece: piece.batch)
    outputs = [one(case, batch, list(pieces)) for batch, pieces in parts]
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return weighed(y, case.gates)


def _forms_logits(case: Case) -> bool:
    """Whether torch's attention has no fast path for it."""
    return case.wide or not case.scores.plain


def _fixed_bias(case: Case) -> bool:
    """Whether all there is is a bias of distances that has no gradient, of whole rows: torch's
    attention takes it, with one mask for all blocks, where `_by_logits` would recompute its own.

    Training is then 1.25 to 1.45 times as fast. Not with dropout, for which torch forms T x S, and
    not under transforms, of which it has no derivatives.
    """
    bias, mask, one = case.scores.bias, case.mask, slice(0, 1)
    if not isinstance(bias, ByDistance) or bias.positions is not None:
        return False
    if case.wide or case.dropout_p or not case.scores._replace(bias=None).plain:
        return False
    if case.mask.key_length < RECOMPUTE_FROM or torch._C._are_functorch_transforms_active():
        return False
    return mask.only_order and mask.causal and not bias(one, one).requires_grad


def _band_rows(case: Case, least: int) -> int | None:
    """None where documents alone cut the rows."""
    mask = case.mask
    if mask.window is not None:
        return max(least, mask.window // 2)
    return None if mask.real is None and case.scores.bias is None else least


def _plain(case: Case, batch: slice, pieces: list[Piece]) -> Tensor:
    """Some rows of the batch, each piece by torch's attention."""
    q, dtype = add_per_head(case.q[batch], case.scores.content), case.q.dtype
    k, v = case.k[batch], case.v[batch]
    wide = dtype.itemsize < 4 and all(
        piece.keys.stop - piece.keys.start <= UPCAST_TO for piece in pieces
    )
    if wide:
        q, k, v = q.float(), k.float(), v.float()
    sdpa = partial(
        F.scaled_dot_product_attention,
        dropout_p=case.dropout_p,
        scale=case.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    queries = q.split([piece.rows.stop - piece.rows.start for piece in pieces], dim=-2)
    # Of the last rows, and as far as distances reach: a mask a block would be T x S.
    longest = max(piece.rows.stop - piece.rows.start for piece in pieces)
    last = slice(max(case.mask.length - longest, 0), case.mask.length)
    by_distance = case.scores.added(last)
    if by_distance is not None:
        by_distance = by_distance.masked_fill(~case.mask.dense(rows=last), -math.inf)
    outputs = []
    with no_autocast(q.device) if wide else nullcontext():
        for piece, query, key, value in zip(
            pieces, queries, _spans(k, pieces), _spans(v, pieces), strict=True
        ):
            if by_distance is not None:
                # Distances from the last key on are those of every block.
                shown: dict[str, Any] = {
                    "attn_mask": by_distance[..., -query.shape[-2] :, -key.shape[-2] :]
                }
            elif piece.square:
                shown = {"is_causal": True}
            else:
                shown = {"attn_mask": case.mask.dense(batch, piece.rows, piece.keys)}
            outputs.append(sdpa(query, key, value, **shown))
    return torch.cat(outputs, dim=-2).to(dtype)


def _spans(x: Tensor, pieces: list[Piece]) -> Iterator[Tensor]:
    """The keys of each piece.

    Cut once, for the gradients of slices would be as large as x each; but not where every piece
    begins with the first key: kept for the backward pass, copies would be as large as T x S.
    """
    if len(pieces) > 1 and all(piece.keys.start == 0 for piece in pieces):
        yield from (x[..., piece.keys, :] for piece in pieces)
        return
    cuts = sorted({0, x.shape[-2], *(edge for p in pieces for edge in (p.keys.start, p.keys.stop))})
    parts = x.split([b - a for a, b in pairwise(cuts)], dim=-2)
    index = {cut: i for i, cut in enumerate(cuts)}
    for piece in pieces:
        own = parts[index[piece.keys.start] : index[piece.keys.stop]]
        yield own[0] if len(own) == 1 else torch.cat(own, dim=-2)


def _by_logits(case: Case, batch: slice, pieces: list[Piece]) -> Tensor:
    """Some rows of the batch, the logits of one block after the other."""
    case = case.repeated()
    q, k, v, scores, scale = case.q[batch], case.k[batch], case.v[batch], case.scores, case.scale
    term, mask, dropout_p = scores.relative, case.mask, case.dropout_p
    rows_in_batch, heads, _, dim = q.shape
    precise = torch.promote_types(q.dtype, torch.float32)

    def by_head(x: Tensor) -> Tensor:
        # Heads before the batch: one product then serves all sequences that share a head's table.
        return x.transpose(0, 1).reshape(heads * rows_in_batch, x.shape[-2], x.shape[-1])

    query = q.to(precise)
    on_keys, keys = by_head(add_per_head(query, scores.content)), by_head(k.to(precise)).mT
    values = by_head(v)
    widest = max(piece.keys.stop - piece.keys.start for piece in pieces)
    if term is not None:
        on_table = add_per_head(query, term.query).transpose(0, 1)  # (H, B, T, D)
        columns, offset = falling_table(term, widest, precise)
    else:
        on_keys = on_keys * scale
    longest = max(piece.rows.stop - piece.rows.start for piece in pieces)
    above = torch.ones(longest, longest, dtype=torch.bool, device=q.device).triu(1)

    def relative(piece: Piece) -> Tensor:
        """The relative term (H * B, rows, keys)."""
        rows, width = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
        flat = on_table[:, :, piece.rows].reshape(heads, rows_in_batch * rows, dim)
        by_distance = torch.bmm(flat, columns[..., widest - width :])  # (H, B * rows, width+1)
        if offset is not None:
            by_distance = by_distance + offset[..., widest - width :]
        return skew(by_distance.view(heads * rows_in_batch, rows, width + 1))

    def block(piece: Piece) -> Tensor:
        rows, width = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
        with no_autocast(q.device):
            query, key = on_keys[:, piece.rows], keys[..., piece.keys]
            if term is None:
                logits = torch.bmm(query, key)
            else:
                logits = torch.baddbmm(relative(piece), query, key, beta=scale, alpha=scale)
            split = logits.unflatten(0, (heads, rows_in_batch))
            _add(scores.bias, split, batch, piece, mask.key_length - mask.length)
            if mask.only_order and mask.causal:
                logits[..., width - rows :].masked_fill_(above[:rows, :rows], -math.inf)
            elif not mask.only_order:
                hidden = ~mask.dense(batch, piece.rows, piece.keys)
                split.masked_fill_(hidden.squeeze(1) if hidden.ndim == 4 else hidden, -math.inf)
            weights = logits.softmax(-1).to(v.dtype)
            if dropout_p:
                weights = F.dropout(weights, dropout_p)
            return torch.bmm(weights, values[:, piece.keys])

    y = in_blocks(block, pieces, random=dropout_p > 0)
    return y.unflatten(0, (heads, rows_in_batch)).transpose(0, 1)


def in_blocks(
    block: Callable[[Piece], Tensor], pieces: list[Piece], *, random: bool = False
) -> Tensor:
    """Outputs of all pieces (.., T, D), those of long rows recomputed in the backward pass.

    Args:
        random: whether a block draws random numbers, and must draw them again.
    """
    widest = max(piece.keys.stop - piece.keys.start for piece in pieces)
    recompute = torch.is_grad_enabled() and widest >= RECOMPUTE_FROM
    # torch.func knows no checkpoints.
    recompute = recompute and not torch._C._are_functorch_transforms_active()
    outputs = []
    # The widest block first: where it lay the others fit. Growing blocks left a hole each, at
    # T=8192 1.1 GB of them instead of 0.27.
    for piece in reversed(pieces):
        if recompute:
            y = checkpoint(block, piece, use_reentrant=False, preserve_rng_state=random)
        else:
            y = block(piece)
        outputs.append(y)
    return torch.cat(outputs[::-1], dim=-2)


def _add(bias: Bias | None, logits: Tensor, batch: slice, piece: Piece, past: int) -> None:
    """Add what belongs to the logits (H, B, rows, keys) of a piece."""
    if isinstance(bias, Decay):
        bias, batch = bias.of_rows(batch), slice(None)
    if isinstance(bias, Decay) and not bias.two_sided:
        # Pair by pair on the diagonal alone, where both terms of `in_two` may be larger than both.
        own = past + piece.rows.start
        before, square = slice(piece.keys.start, own), slice(own, piece.keys.stop)
        since, until = bias.in_two(piece.rows, before)
        count = own - piece.keys.start
        logits[..., :count].add_(until.transpose(0, 1)).add_(since.transpose(0, 1))
        logits[..., count:].add_(bias(piece.rows, square).transpose(0, 1))
        return
    added = Scores(bias=bias).added(piece.rows, piece.keys)
    if added is not None:
        added = added[batch] if added.ndim == 4 and len(added) > 1 else added
        logits.add_(added.transpose(0, 1) if added.ndim == 4 else added.unsqueeze(-3))
