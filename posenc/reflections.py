"""Products of reflections between a query and a key: PaTH's logits, in two dense forms.

    score[m, n] = k_n^T H_{n+1} .. H_m q_m        H_t = I - r_t r_t^T,  n <= m

`sweep` is the definition: the query is carried back over the keys, one reflection each.
`correction` takes all at once (UT transform), by c[m, t] = r_t^T H_{t+1} .. H_m q_m:

    H_{n+1} .. H_m q_m = q_m - sum_{t=n+1..m} c[m, t] r_t
    c[m, t] + sum_{s=t+1..m} c[m, s] r_s.r_t = q_m.r_t                    triangular in t

|r_t|^2 <= 2 keeps every H_t from growing anything, and the entries of the inverse of that system
within 2: it is solved as exactly as it is posed. Shapes: q (.., T, D), k and r (.., S, D), T <= S;
query row i stands at key S - T + i.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def sweep(q: Tensor, k: Tensor, r: Tensor) -> Tensor:
    """The scores (.., T, S), 0 where n > m."""
    length, key_length = q.shape[-2], k.shape[-2]
    u, columns = q[..., :0, :], []  # the queries that have come back to the present key
    for n in reversed(range(key_length)):
        row = n - (key_length - length)
        if row >= 0:
            u = torch.cat((q[..., row : row + 1, :], u), dim=-2)
        score = u @ k[..., n, :, None]
        columns.append(F.pad(score, (0, 0, max(row, 0), 0)))
        if n > 0:
            u = u - (u @ r[..., n, :, None]) @ r[..., n, None, :]
    return torch.cat(columns[::-1], dim=-1)


def scanned(q: Tensor, k: Tensor, r: Tensor) -> Tensor:
    """`sweep` as a loop that a graph can hold, over any number of keys; arbitrary where n > m."""
    from torch._higher_order_ops.scan import scan

    index = torch.arange(k.shape[-2], device=q.device)
    come = index[k.shape[-2] - q.shape[-2] :] >= index.unsqueeze(-1)  # (S, T)

    def step(u: Tensor, key: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        k, r, come = key
        k, r = k.unsqueeze(-2), r.unsqueeze(-2)
        along = (u * r).sum(-1, keepdim=True) * come.unsqueeze(-1)
        return u - along * r, (u * k).sum(-1)

    keys = (k.movedim(-2, 0), r.movedim(-2, 0), come.to(q.dtype))
    _, scores = scan(step, q.clone(), keys, reverse=True)
    return scores.movedim(0, -1)


def solve(gram: Tensor, met: Tensor) -> Tensor:
    """c (.., R, L) of rows `met` (.., R, L), q_m.r_t; gram (.., L, L), r_s.r_t, of which what lies
    on and above the diagonal is not read.
    """
    return torch.linalg.solve_triangular(gram, met, upper=False, left=False, unitriangular=True)


def correction(q: Tensor, k: Tensor, r: Tensor) -> Tensor:
    """What reflections add to q.k: (.., T, S), what is added where n > m being arbitrary."""
    if torch.onnx.is_in_onnx_export():  # ONNX solves no triangular systems
        return scanned(q, k, r) - q @ k.mT
    met = (q @ r.mT).tril(r.shape[-2] - q.shape[-2])
    return -(solve(r @ r.mT, met) @ (r @ k.mT).tril(-1))
