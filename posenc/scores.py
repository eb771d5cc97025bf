"""How an encoding enters the logits: data that it describes and a back end computes.

    logits[m, n] = scale * ((q[m] + content_h) . k[n] + relative[m, n] + contextual[m, n])
                   + bias[m, n]
    relative     = (q[m] + query_h) . table[h, d] + offset[h, d],    d the distance of m and n
    contextual   = q[m] . table[p[m, n]],                            p counted by gates (CoPE)
    reflections  in place of q[m] + content_h its product H_{n+1} .. H_m (q[m] + content_h),
                 H_t = I - r_t r_t^T                         (PaTH)

    with fading each product of two features also fades with the distance, see `posenc.fading`

The relative term stays factored and the bias a function until a back end needs them:

    ByDistance    bias of the distance alone                 ALiBi, T5, KERPLE
    Decay         what a running sum has lost since the key   FoX

Shapes: q (B, H, T, D), keys S >= T.
"""

from collections.abc import Callable
from typing import NamedTuple, Union

import torch
from torch import Tensor

from posenc.autocast import no_autocast
from posenc.fading import Fading
from posenc.phase import repeat_heads
from posenc.reflections import correction

#: An additive bias broadcastable to (B, H, T, S), or one made of some rows and some keys at a time.
Bias = Union[Tensor, Callable[[slice, slice], Tensor], "ByDistance", "Decay"]
#: Rows of distances (H, P, D), or a function that makes them as far as distances reach.
Table = Tensor | Callable[[int], Tensor]


def span(part: slice, length: int) -> tuple[int, int]:
    """First and past-the-last index of a slice without a step."""
    return part.start or 0, length if part.stop is None else part.stop


class ByDistance(NamedTuple):
    """A bias that is a function of the distance d = m - n, exact at any of them.

    Attributes:
        of: (H, ..) of integer distances (..). Keys after the query have negative ones; it must be
            finite there.
        length, key_length: T and S.
        dtype: of what it gives, fp32 or better: in bf16 distances above 256 collapse.
        positions: of the queries, (T,) or (B, T), and keys: (S,) or (B, S); None: consecutive keys,
            of which the queries are the last.
    """

    of: Callable[[Tensor], Tensor]
    length: int
    key_length: int
    dtype: torch.dtype
    device: torch.device
    positions: Tensor | None = None
    keys: Tensor | None = None

    def __call__(self, rows: slice, keys: slice) -> Tensor:
        """(1 or B, H, rows, keys)."""
        (first, last), (low, high) = span(rows, self.length), span(keys, self.key_length)
        past = self.key_length - self.length
        if self.positions is None and not torch.compiler.is_compiling():
            falling = torch.arange(
                past + last - 1 - low, past + first - high, -1, device=self.device
            )
            values = self.of(falling).to(self.dtype)
            return diagonals(values, last - first, high - low).unsqueeze(0)
        if self.positions is None:  # a compiler would tie the lengths that `diagonals` slices
            m = torch.arange(past + first, past + last, device=self.device)
            n = torch.arange(low, high, device=self.device)
        else:
            assert self.keys is not None
            m, n = self.positions[..., rows], self.keys[..., keys]
        apart = m.unsqueeze(-1) - n.unsqueeze(-2)
        return batch_first(self.of(apart).to(self.dtype))


def batch_first(bias: Tensor) -> Tensor:
    """From heads first, (H, T, S) or (H, B, T, S), to (1 or B, H, T, S)."""
    return bias.unsqueeze(0) if bias.ndim == 3 else bias.transpose(0, 1)


def diagonals(values: Tensor, rows: int, columns: int) -> Tensor:
    """Constant along diagonals: values (.., R + W - 1) -> (.., R, W), [i, n] = values[R-1-i+n]."""
    if rows == 1:
        return values.unsqueeze(-2)
    # One row after the other, each read one element later than its place: as in `skew`.
    width = rows + columns - 2
    flat = values.unsqueeze(-2).expand(*values.shape[:-1], rows, width + 1).flatten(-2)
    flat = flat[..., rows - 1 : rows - 1 + rows * width]
    return flat.unflatten(-1, (rows, width))[..., :columns]


class Decay(NamedTuple):
    """c[m] - c[n], c a running sum; -|c[m] - c[n]| where two-sided.

    Attributes:
        queries: c at the queries (B, H, T) in fp64: differences come before rounding.
        keys: c at the keys (B, H, S).
        dtype: of what it gives.
        two_sided: whether keys after the query are seen.
    """

    queries: Tensor
    keys: Tensor
    dtype: torch.dtype
    two_sided: bool = False

    def __call__(self, rows: slice, keys: slice) -> Tensor:
        """(B, H, rows, keys)."""
        lost = self.queries[..., rows].unsqueeze(-1) - self.keys[..., keys].unsqueeze(-2)
        return (-lost.abs() if self.two_sided else lost).to(self.dtype)

    def of_rows(self, batch: slice) -> "Decay":
        """Of these sequences alone."""
        return self._replace(queries=self.queries[batch], keys=self.keys[batch])

    def in_two(self, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """The same as what is lost from the first of the rows on, (B, H, rows, 1), and from keys
        before it up to it, (B, H, 1, keys): of one sign, so that rounding them apart loses nothing.
        """
        first = self.queries[..., rows][..., :1].detach()  # of their sum it is no part
        since, before = self.queries[..., rows] - first, first - self.keys[..., keys]
        return since.to(self.dtype).unsqueeze(-1), before.to(self.dtype).unsqueeze(-2)


class RelativeTerm(NamedTuple):
    """A query-dependent term of the distance.

    Attributes:
        table: rows of distances 0 .. P-1, (H, P, D), the last for all further ones; two-sided,
            those of -(P-1) .. P-1.
        query: (H, D), added to q.
        offset: (H, P), without query.
        distances: integer (T, S) or (B, 1, T, S); None: consecutive keys.
        factors: of q + query (B, H, T, D) at the positions of the case: two tensors (.., T, E) and
            (.., S, E) whose product is the term without offset; None: there are none.
        width: E.
        two_sided: whether keys after the query have rows too.
    """

    table: Table
    query: Tensor | None = None
    offset: Tensor | None = None
    distances: Tensor | None = None
    factors: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    width: int = 0
    two_sided: bool = False

    def rows(self, length: int) -> Tensor:
        """The table where no distance reaches `length`."""
        return self.table if isinstance(self.table, Tensor) else self.table(length)


class Scores(NamedTuple):
    """What changes plain q . k / sqrt(D); every default leaves it."""

    scale: float | None = None  # None is 1/sqrt(D)
    content: Tensor | None = None  # (H, D)
    bias: Bias | None = None
    relative: RelativeTerm | None = None
    contextual: Tensor | None = None  # (P, D), see `contextual_logits`; causal alone
    reflections: Tensor | None = None  # r (B, G, S, D), 0 where a key is hidden by padding
    fading: Fading | None = None  # causal, without any of the others but the scale

    def factor(self, head_dim: int) -> float:
        """The scale as a number."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def added(self, rows: slice | None = None, keys: slice | None = None) -> Tensor | None:
        """The bias of these rows and keys, None being all, broadcastable to (B, H, rows, keys)."""
        every = slice(None)  # torch 2.11 compiles no slice as a default
        rows, keys = rows or every, keys or every
        if not isinstance(self.bias, Tensor):
            return None if self.bias is None else self.bias(rows, keys)
        part = self.bias[..., rows if self.bias.shape[-2] > 1 else every, :]
        return part[..., keys if self.bias.shape[-1] > 1 else every]

    @property
    def plain(self) -> bool:
        """Whether the logits are scale * (q + content) . k."""
        return (
            self.bias is None
            and self.relative is None
            and self.contextual is None
            and self.reflections is None
            and self.fading is None
        )


def add_per_head(q: Tensor, bias: Tensor | None) -> Tensor:
    """q (B, H, T, D) plus a vector a head (H, D), in q's dtype."""
    return q if bias is None else q + bias.unsqueeze(-2).to(q.dtype)


def added_logits(
    q: Tensor, k: Tensor, scores: Scores, scale: float, seen: Callable[[], Tensor]
) -> Tensor | None:
    """What is added to scale * (q + content) . k, dense: broadcastable to (B, H, T, S), or None.

    Args:
        q: (B, H, T, D), without content. k: (B, G, S, D).
        seen: which keys a query sees, bool broadcastable to (B, H, T, S); called where gates count
            them.
    """
    added = scores.added()
    if scores.relative is not None:
        relative = scale * relative_logits(q, scores.relative, k.shape[-2])
        added = relative if added is None else added + relative
    if scores.contextual is not None:
        term = scale * contextual_term(q, k, scores, seen())
        added = term if added is None else added + term
    if scores.reflections is not None:
        query = add_per_head(q, scores.content)
        term = _reflected(query, k, scores.reflections, scale)
        added = term if added is None else added + term
    return added


def _reflected(q: Tensor, k: Tensor, r: Tensor, scale: float) -> Tensor:
    """What reflections add to the logits, in fp32 or better: (B, H, T, S)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, r = (repeat_heads(x.to(dtype), q.shape[1], dim=1) for x in (k, r))
    # Copies: traced, products of views into a cache would be told apart where it is full.
    k, r = (x.clone(memory_format=torch.contiguous_format) for x in (k, r))
    with no_autocast(q.device):
        return correction(q.to(dtype) * scale, k, r)


def falling_table(
    term: RelativeTerm, key_length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The table (H, D, S + 1) and its offsets (H, 1, S + 1) at the distances S, S-1, .. 0."""
    table = term.rows(key_length)
    falling = torch.arange(key_length, -1, -1, device=table.device)
    falling = falling.clamp(max=table.shape[-2] - 1)
    columns = table[:, falling].to(dtype).transpose(1, 2)
    if term.offset is None:
        return columns, None
    return columns, term.offset[:, falling].to(dtype).unsqueeze(1)


def skew(by_distance: Tensor) -> Tensor:
    """From columns of falling distance to columns of keys: (.., T, S + 1) -> (.., T, S), a view.

    Row i is the query at key index S - T + i, so key n lies at distance S-T+i-n, in column T-i+n,
    hence at flat index i*S + n + T: reading rows one element shorter puts every key in its place.
    Entries with n > S - T + i hold other rows' values and must be masked.
    """
    length, key_length = by_distance.shape[-2], by_distance.shape[-1] - 1
    return by_distance.flatten(-2)[..., length:].unflatten(-1, (length, key_length))


def relative_logits(q: Tensor, term: RelativeTerm, key_length: int) -> Tensor:
    """The relative term, unscaled: (B, H, T, S). Causal, entries after the query must be masked."""
    query, length = add_per_head(q, term.query), q.shape[-2]
    # For few queries two products with the factors cost less than a row for every distance.
    few = length < key_length and length < q.shape[-1]
    if term.factors is not None and (term.two_sided or term.distances is not None or few):
        on_query, on_key = term.factors(query)
        return on_query @ on_key.mT
    distances = term.distances
    if distances is None and not term.two_sided:
        columns, offset = falling_table(term, key_length, q.dtype)
        by_distance = query @ columns  # (B, H, T, S + 1)
        return skew(by_distance if offset is None else by_distance + offset)
    if distances is None:
        index = torch.arange(key_length, device=q.device)
        distances = index[key_length - length :].unsqueeze(-1) - index
    table = term.rows(key_length)
    by_distance = query @ table.to(q.dtype).transpose(-1, -2)  # (B, H, T, P)
    if term.offset is not None:
        by_distance = by_distance + term.offset.to(q.dtype).unsqueeze(-2)
    last = table.shape[-2] - 1
    at = distances + last // 2 if term.two_sided else distances
    return by_distance.gather(-1, at.clamp(0, last).expand(*q.shape[:2], *at.shape[-2:]))


def at_places(by_place: Tensor, places: Tensor) -> Tensor:
    """Linear between its numbers: by_place (.., T, P) at places (.., T, S) in [0, P-1].

    The gradient passes through the place's fraction and the numbers, not through its floor.
    """
    below = places.detach().floor()
    index = below.long()
    steps = by_place.diff(dim=-1, append=by_place[..., -1:])
    return by_place.gather(-1, index) + (places - below) * steps.gather(-1, index)


def contextual_term(q: Tensor, k: Tensor, scores: "Scores", seen: Tensor) -> Tensor:
    """`contextual_logits` of q (B, H, T, D) and k (B, G, S, D), in fp32 or better."""
    assert scores.contextual is not None
    precise = torch.promote_types(q.dtype, torch.float32)
    with no_autocast(q.device):
        query, key = q.to(precise), repeat_heads(k, q.shape[1], dim=1).to(precise)
        products = add_per_head(query, scores.content) @ key.mT
        scale = scores.factor(q.shape[-1])
        return contextual_logits(products, query, scores.contextual, seen, scale)


def contextual_logits(
    products: Tensor, q: Tensor, table: Tensor, seen: Tensor, scale: float
) -> Tensor:
    """CoPE's term, unscaled: (B, H, T, S).

        g[m, j] = sigmoid(scale * products[m, j]), 0 where m does not see j
        p[m, n] = min(sum over j >= n of g[m, j], P-1)
        term    = q[m] . table[p], linear between the rows of the table

    Args:
        products: (q + content).k (B, H, T, S). q: (B, H, T, D).
        table: (P, D).
        seen: bool, broadcastable to (B, H, T, S).
    """
    # Before the sums: what is hidden counts 0.
    gates = torch.sigmoid(products * scale).masked_fill(~seen, 0)
    places = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=table.shape[0] - 1)
    return at_places(q @ table.to(q.dtype).mT, places)
