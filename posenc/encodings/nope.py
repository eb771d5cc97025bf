"""NoPE: no positional encoding (arXiv 2305.19466, 2203.16634).

    score[m, n] = q[m] . k[n] / sqrt(D)

Order reaches the model through the causal mask alone. No parameters, no state; k is cached as
projected.
"""

from posenc.encodings.base import Encoding


class NoPE(Encoding):
    """No positional encoding: the causal mask is the only clue to order."""

    reads_positions = False
