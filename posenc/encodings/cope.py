"""CoPE: contextual position encoding, in the logits (arXiv 2405.18719).

    g[m,j] = sigmoid(q[m].k[j] / sqrt(D))                 0 where m does not see j
    p[m,n] = min( sum over j = n..m of g[m,j], P-1 ),     f = floor p,  w = p - f
    score[m,n] = ( q[m].k[n] + (1-w) q[m].e[f] + w q[m].e[f+1] ) / sqrt(D)          e (P, D)

How far a key lies is how many of the keys since then the query's gates let count; the query's own
counts, p[m,m] = g[m,m]. One table for all heads, zero at the start: NoPE. The gradient passes
through w and e, not through floor.

Sources disagree about the position term: the authors' repository divides it by sqrt(D), like
Transformer-XL's; its option `--cope-nodiv`, x-transformers and DAPE do not. Ours divides.

Hidden keys (later ones, padding, other documents, beyond a window) count 0. Integer positions are
not used. Keys and values are cached, nothing else. Without a causal order there is nothing to count
along, and causal=False is refused. T x S gates are the definition: the reference and torch's
attention form them whole, `auto` on CPU in blocks, in memory linear in T; no kernel forms them.
"""

from torch import Tensor, nn

from posenc.accounting import Part, Sizes, product, weights
from posenc.cache import Cache
from posenc.checks import check_causal, check_sizes
from posenc.encodings.base import Encoding
from posenc.phase import Float32Parameters
from posenc.placement import Placement
from posenc.scores import Scores


class CoPE(Float32Parameters, Encoding):
    """Contextual positions of every query and key, interpolated in a table of P rows.

    Args:
        head_dim: D.
        max_positions: P, at least 1; positions of P-1 and beyond use the last row.
        causal: True.

    Parameters, fp32: table (P, D), zero at the start.

    Raises:
        ValueError: for sizes below 1, or causal=False.
    """

    reads_positions = False
    no_weight_decay = frozenset({"table"})
    in_logits = True

    def __init__(self, head_dim: int, *, max_positions: int = 64, causal: bool = True) -> None:
        super().__init__()
        check_sizes("CoPE", head_dim=head_dim, max_positions=max_positions)
        if not check_causal(causal):
            raise ValueError(
                "CoPE counts keys from the query back, which causal=False does not order; got "
                "causal=False. Use another encoding, for example 't5' or 'alibi'."
            )
        self.head_dim, self.max_positions, self.causal = head_dim, max_positions, causal
        self.table = self.float32_parameter(max_positions, head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.table)

    def scores(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> Scores:
        return Scores(contextual=self.table)

    def cost(self, s: Sizes) -> Part:
        """P D parameters, never below fp32; q.e: N H P D multiply-adds; an exponential and an
        addition for every head and pair of a query and a key that it sees.

        No kernel computes it. Nothing of T x S is counted as kept: blocks are recomputed.
        """
        rows = self.max_positions * s.D
        return (
            weights(rows, s.precise)
            + product(s.N * s.H * rows, kept=s.N * s.A * rows)
            + Part(elementwise=2 * s.B * s.H * s.pairs)
        )

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, max_positions={self.max_positions}"
