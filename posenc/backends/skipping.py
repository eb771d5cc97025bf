"""Attention weighed by gates that computes only what they keep: the path of MoH on CPU.

    y[h,m] = g[h,m] sum_n softmax_n(scale q[h,m].k[h,n]) v[h,n]        where g is not 0; else 0

Shared heads take dense attention. Of the others the kept rows are gathered, and go in blocks of
several heads through the keys up to their last row; the backward pass makes the weights of a block
anew, so memory is linear in the length. Logits and softmax are fp32 whatever the inputs are.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from posenc.autocast import no_autocast
from posenc.backends.case import Case
from posenc.routing.gates import Gates, weigh
from posenc.scores import Scores, add_per_head

#: Kept rows of a block where nothing was measured; of 64, 96 and 128 the fastest on CPU.
ROWS = 96
#: Logits of a block, over all of its heads: 4 MB in fp32.
SPACE = 1 << 20
# MKL adds up in an order that depends on the sizes of the whole product. These keep it, so that the
# rounding of an output does not tell how many tokens come after it (gradients are not so kept).
#: Rows of a product are a multiple of this.
ROW_STEP = 16
#: Keys of a block are a multiple of this, or all there are.
KEY_STEP = 192
#: Of weights and values no more keys are added up in one product. Of 385 to 767 keys a Xeon with
#: AMX (MKL of torch 2.13) adds up each half by itself; MKL for AVX2 alone does not.
KEYS_AT_ONCE = 384


#: Where nothing was measured, skipping what gates drop pays from so many queries x features of a
#: head on, or so many keys of a single query, and up to this share of kept rows in the heads that
#: may be dropped.
#: Routed heads at B=1 T=1024 D=64 fp32, a third kept: 7.4 ms dense, 4.6 skipping; two thirds kept,
#: a tie. T=512 D=32, half kept: 0.92 of the dense speed. One query of 4096 keys, half of 8 heads
#: kept: 205 us dense, 105 skipping.
SKIP_FROM, SKIP_TOKEN_FROM, SKIP_UP_TO = 512 * 64, 2048, 0.4


def reason(case: Case) -> str | None:
    """None where it can, else why not."""
    q, gates, mask = case.q, case.gates, case.mask
    if gates is None:
        return "no gates drop anything"
    if not (case.scores.plain and mask.only_order and mask.causal and not case.dropout_p):
        return "takes causal attention of whole rows, without a term in the logits or dropout"
    if q.shape[1] != case.k.shape[1]:
        return "takes as many key heads as query heads"
    if q.device.type != "cpu" or not runs_eagerly(q):
        return "lists of kept rows are not to be had here"
    if mask.length == 1 and torch.is_grad_enabled():
        return "a single query has its few views of the keys in inference alone"
    if gates.need_every_output:
        return "gradients of gates read what they drop"
    return None


def pays(case: Case) -> bool:
    """Whether it is the faster way where nothing was measured."""
    assert case.gates is not None
    if case.gates.kept > SKIP_UP_TO:
        return False
    if case.mask.length == 1:
        return case.mask.key_length >= SKIP_TOKEN_FROM
    return case.mask.length * case.q.shape[-1] >= SKIP_FROM


def attend(case: Case, dense: Callable[[Case], Tensor], rows: int | None = None) -> Tensor:
    """(B, H, T, D) in q's dtype.

    Args:
        dense: computes heads that nothing drops.
        rows: of a block; None is `ROWS`.
    """
    assert case.gates is not None
    plain = Case(case.q, case.k, case.v, case.mask, scores=Scores(scale=case.scale))

    def some(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(plain._replace(q=q, k=k, v=v))

    q = add_per_head(case.q, case.scores.content)
    return attend_kept(q, case.k, case.v, case.gates, case.scale, some, rows)


def runs_eagerly(x: Tensor) -> bool:
    """Whether lists of rows can be made of x: of numbers, not while something watches or transforms
    the computation (torch.compile, tracing, torch.func, fake tensors, dispatch modes).
    """
    watched = (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
        or _get_current_dispatch_mode() is not None
    )
    return type(x) in (Tensor, Parameter) and not watched


def attend_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    scale: float,
    dense: Callable[[Tensor, Tensor, Tensor], Tensor],
    rows: int | None = None,
) -> Tensor:
    """Causal attention over consecutive keys, weighed.

    Args:
        q: (B, H, T, D). k, v: (B, H, S, D), T <= S. v may be narrower.
        gates: where one is 0 nothing is computed, and its own gradient is 0.
        dense: attention of some heads without gates.
        rows: of a block; None is `ROWS`.

    Returns:
        (B, H, T, D), v's width, in q's dtype.
    """
    if q.shape[2] == 1 and not torch.is_grad_enabled():
        return weigh(_attend_token(q, k, v, gates.values[:, :, 0] != 0, dense), gates.values)
    n = gates.always
    shared = q.new_empty(len(q), 0, q.shape[2], v.shape[-1])
    if n:
        shared = weigh(dense(q[:, :n], k[:, :n], v[:, :n]), gates.values[:, :n])
    routed = (x[:, n:] for x in (q, k, v, gates.values))
    return _Kept.apply(shared, *routed, scale, rows or ROWS)


def _attend_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    dense: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """One query a sequence: its kept heads (B, H) as few views of the keys, without copies."""
    y = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for b, row in enumerate(kept.tolist()):
        one = slice(b, b + 1)
        for heads in progressions([h for h, keep in enumerate(row) if keep]):
            y[one, heads] = dense(q[one, heads], k[one, heads], v[one, heads])
    return y


def progressions(numbers: list[int]) -> Iterator[slice]:
    """Rising numbers as slices, each as long as the steps stay equal."""
    start = 0
    while start < len(numbers):
        stop, step = start + 1, 1
        if stop < len(numbers):
            step = numbers[stop] - numbers[start]
            while stop < len(numbers) and numbers[stop] - numbers[stop - 1] == step:
                stop += 1
        yield slice(numbers[start], numbers[stop - 1] + 1, step)
        start = stop


def projections_pay(x: Tensor, gates: Gates) -> bool:
    """Whether `project_kept` and `merge_kept` are faster than the whole products.

    In fp32 from C=512 on, 1024 tokens, a third kept: 1.4 times as fast, at C=2048 1.5 to 1.7 times;
    at C=256 0.6 times. In bf16 they lose below C=2048, and sums over heads would be rounded.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or not runs_eagerly(x):
        return False
    exact = x.dtype.itemsize >= 4 and not torch.is_autocast_enabled("cpu")
    return exact and x.shape[0] * x.shape[1] >= 512 and x.shape[2] >= 512 and gates.kept <= 0.4


def project_kept(x: Tensor, weight: Tensor, bias: Tensor | None, gates: Gates) -> Tensor:
    """x (B, T, C) through a projection (H D, C) as heads (B, H, T, D); zeros where a gate is 0."""
    (batch, length, _), heads = x.shape, gates.values.shape[1]
    tokens, dim = x.flatten(0, 1), weight.shape[0] // heads
    n = gates.always * dim
    shared = F.linear(tokens, weight[:n], None if bias is None else bias[:n])
    y = shared.new_zeros(batch * length, heads, dim)
    y[:, : gates.always] = shared.unflatten(-1, (gates.always, dim))
    for h, rows in _rows_by_head(gates):
        part = slice(h * dim, (h + 1) * dim)
        b = None if bias is None else bias[part]
        y[:, h].index_copy_(0, rows, _linear(tokens, rows, weight[part], b))
    return y.unflatten(0, (batch, length)).transpose(1, 2)


def merge_kept(y: Tensor, weight: Tensor, bias: Tensor | None, gates: Gates) -> Tensor:
    """Weighed heads (B, H, T, D) through a projection (C, H D) as (B, T, C)."""
    batch, _, length, dim = y.shape
    heads = y.transpose(1, 2).flatten(0, 1)  # (B T, H, D)
    n = gates.always * dim
    out = F.linear(heads[:, : gates.always].flatten(1), weight[:, :n], bias)
    for h, rows in _rows_by_head(gates):
        part = slice(h * dim, (h + 1) * dim)
        out.index_add_(0, rows, _linear(heads[:, h], rows, weight[:, part], None))
    return out.unflatten(0, (batch, length))


def _rows_by_head(gates: Gates) -> Iterator[tuple[int, Tensor]]:
    """Of every head that may be dropped and is kept by some: the tokens (B T) that keep it."""
    for h in range(gates.always, gates.values.shape[1]):
        rows = gates.values[:, h].flatten().nonzero().flatten()
        if len(rows):
            yield h, rows


def _linear(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """These rows of x through a projection."""
    taken = _padded(rows, -(-len(rows) // ROW_STEP) * ROW_STEP)
    return F.linear(x.index_select(0, taken), weight, bias)[: len(rows)]


def _padded(rows: Tensor, length: int) -> Tensor:
    """So many rows: the last of them again and again."""
    return torch.cat((rows, rows[-1:].expand(length - len(rows))))


Part = tuple[slice, slice]  # heads of a group, and rows or keys


class _Group:
    """The kept rows of some heads of one sequence, as many of each as the first has, and what they
    meet: products of several heads at once, whose threads wait for each other less often.
    """

    def __init__(
        self,
        rows: dict[int, Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        columns: Tensor,
        scale: float,
    ) -> None:
        self.rows, self.columns = rows, columns
        self.counts = [len(taken) for taken in rows.values()]
        length = -(-self.counts[0] // ROW_STEP) * ROW_STEP
        self.taken = {h: _padded(taken, length) for h, taken in rows.items()}
        self.heads = torch.tensor(list(rows))
        self.query = self.take(q) * scale
        self.keys, self.values = (_precise(x.index_select(0, self.heads)) for x in (k, v))
        self.gates = self.take(gates).to(self.query.dtype).unsqueeze(-1)
        for gate, count in zip(self.gates, self.counts, strict=True):
            gate[count:] = 0  # repeated rows leave no trace
        at = torch.stack(list(self.taken.values())) + (k.shape[1] - q.shape[1])  # among the keys
        self.at, self.ends = at.int().unsqueeze(-1), (at + 1).tolist()

    def take(self, x: Tensor) -> Tensor:
        """The kept rows of x (H, T, ..), precise."""
        return _precise(torch.stack([x[h].index_select(0, at) for h, at in self.taken.items()]))

    def put(self, x: Tensor, made: Tensor) -> None:
        """Write what was made of the kept rows to x (H, T, ..)."""
        for (h, rows), own in zip(self.rows.items(), made.to(x.dtype), strict=True):
            x[h].index_copy_(0, rows, own[: len(rows)])

    def blocks(self, space: Tensor, most: int) -> Iterator[tuple[Part, Part, Tensor]]:
        """Heads and at `most` so many rows, heads and the keys that they see between them, and the
        weights, which lie in `space` until the next block.
        """
        for start in range(0, self.counts[0], most):
            heads = slice(0, sum(count > start for count in self.counts))
            rows = slice(start, min(start + most, self.query.shape[1]))
            first = min(ends[start] for ends in self.ends[heads])
            last = max(ends[rows.stop - 1] for ends in self.ends[heads])
            seen = (heads, slice(0, min(-(-last // KEY_STEP) * KEY_STEP, self.keys.shape[1])))
            logits = _product(self.query[heads, rows], self.keys[seen].mT, space)
            hidden = self.columns[first : seen[1].stop] > self.at[heads, rows]
            logits[:, :, first:].masked_fill_(hidden, -math.inf)
            yield (heads, rows), seen, torch.softmax(logits, dim=-1, out=logits)


def _groups(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, scale: float, most: int
) -> Iterator[tuple[int, _Group]]:
    """The heads that keep a row, of each sequence: those that keep as many go together."""
    columns = torch.arange(k.shape[2], dtype=torch.int32)
    together = _heads_at_once(k, most)
    for b in range(q.shape[0]):
        rows = {h: gates[b, h].nonzero().flatten() for h in range(q.shape[1])}
        falling = sorted((h for h in rows if len(rows[h])), key=lambda h: -len(rows[h]))
        for start in range(0, len(falling), together):
            own = {h: rows[h] for h in falling[start : start + together]}
            yield b, _Group(own, q[b], k[b], v[b], gates[b], columns, scale)


def _heads_at_once(k: Tensor, most: int) -> int:
    return max(1, SPACE // (most * k.shape[2]))


def _spaces(k: Tensor, count: int, most: int) -> tuple[Tensor, ...]:
    """Room for blocks of logits, which would otherwise be fresh memory each."""
    size = min(_heads_at_once(k, most), k.shape[1]) * most * k.shape[2]
    return _precise(k.new_empty(0)).new_empty(count, size).unbind()


def _product(a: Tensor, b: Tensor, space: Tensor) -> Tensor:
    """a @ b (N, rows, columns), in the first numbers of `space`."""
    shape = (*a.shape[:2], b.shape[2])
    return torch.bmm(a, b, out=space[: math.prod(shape)].view(shape))


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """weights (N, rows, keys) @ values (N, keys, D), some keys after the others: KEYS_AT_ONCE."""
    parts = weights.split(KEYS_AT_ONCE, -1), values.split(KEYS_AT_ONCE, 1)
    first, *others = zip(*parts, strict=True)
    made = torch.bmm(*first)
    for part in others:
        made.baddbmm_(*part)
    return made


class _Kept(torch.autograd.Function):
    """Shared heads as they are, then attention of heads of which some rows are dropped.
    Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shared: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        scale: float,
        most: int,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, gates)
        ctx.scale, ctx.most, n = scale, most, shared.shape[1]
        batch, heads, length, _ = q.shape
        # Laid out (B, T, H, D): merging the heads then copies nothing.
        y = q.new_zeros(batch, length, n + heads, v.shape[-1]).transpose(1, 2)
        y[:, :n] = shared
        (space,) = _spaces(k, 1, most)
        with no_autocast(q.device):
            for b, group in _groups(q, k, v, gates, scale, most):
                made = group.query.new_empty(*group.query.shape[:-1], v.shape[-1])
                for block, seen, weights in group.blocks(space, most):
                    made[block] = _weighted(group.values[seen], weights)
                group.put(y[b, n:], made.mul_(group.gates))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gates = ctx.saved_tensors
        to_shared, dy = dy.split((dy.shape[1] - q.shape[1], q.shape[1]), dim=1)
        dq, dk, dv, d_gates = (torch.zeros_like(x) for x in (q, k, v, gates))
        space, other, third = _spaces(k, 3, ctx.most)
        with no_autocast(q.device):
            for b, group in _groups(q, k, v, gates, ctx.scale, ctx.most):
                grads = group.take(dy[b])
                to_keys, to_values = (torch.zeros_like(x) for x in (group.keys, group.values))
                to_queries, to_gates = (torch.empty_like(x) for x in (group.query, group.gates))
                for block, seen, weights in group.blocks(space, ctx.most):
                    products = _product(grads[block], group.values[seen].mT, other)
                    both = third[: weights.numel()].view_as(weights)
                    torch.mul(weights, products, out=both)
                    delta = both.sum(-1, keepdim=True)  # of the gates: <dy, o>
                    to_gates[block] = delta
                    weights.mul_(group.gates[block])
                    to_values[seen].baddbmm_(weights.mT, grads[block])
                    logits = products.sub_(delta).mul_(weights)
                    to_keys[seen].baddbmm_(logits.mT, group.query[block])
                    to_queries[block] = logits @ group.keys[seen]
                dk[b].index_copy_(0, group.heads, to_keys.to(k.dtype))
                dv[b].index_copy_(0, group.heads, to_values.to(v.dtype))
                group.put(dq[b], to_queries.mul_(ctx.scale))
                group.put(d_gates[b], to_gates.squeeze(-1))
        return to_shared, dq, dk, dv, d_gates, None, None


def _precise(x: Tensor) -> Tensor:
    """x in fp32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
