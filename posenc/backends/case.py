"""What is asked of a back end: one call of softmax attention, as data.

    q', k' = rotation(q, k)
    y[m]   = gate[m] sum over n of softmax_n(logits[m, n]) v[n]      over the keys that m may see

Shapes: q (B, H, T, D), k and v (B, G, S, D), T <= S; query row i sits at key index S - T + i, and
query head h reads key head h // (H/G). Turned q and k may be wider than v.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from posenc.backends.mask import Mask
from posenc.phase import repeat_heads
from posenc.placement import Placement
from posenc.rotations import Rotation
from posenc.routing.gates import Gates
from posenc.scores import Scores


class Case(NamedTuple):
    """One call; every default asks for nothing."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    rotation: Rotation | None = None  # of q and k as given; None once they have turned
    scores: Scores = Scores()
    gates: Gates | None = None
    dropout_p: float = 0.0  # of the attention weights, applied whenever it is not 0

    @property
    def place(self) -> Placement:
        """Where the queries and keys sit."""
        return self.mask.place

    @property
    def plain(self) -> bool:
        """Whether nothing is asked for but attention over all that came before, of one width."""
        alone = self.gates is None and self.mask.only_order and self.scores.plain
        return alone and not self.wide

    @property
    def wide(self) -> bool:
        """Whether turned q and k are wider than v."""
        return self.k.shape[-1] != self.v.shape[-1]

    @property
    def scale(self) -> float:
        """The factor of the products."""
        return self.scores.factor(self.q.shape[-1])

    def turned(self) -> "Case":
        """The same with q and k turned eagerly."""
        if self.rotation is None:
            return self
        q, k = self.rotation.apply(self.q, self.k)
        assert q is not None
        assert k is not None
        return self._replace(q=q, k=k, rotation=None)

    def repeated(self) -> "Case":
        """The same with a key head for every query head."""
        heads = self.q.shape[1]
        if self.k.shape[1] == heads:
            return self
        k, v = (repeat_heads(x, heads, dim=1) for x in (self.k, self.v))
        r = self.scores.reflections
        r = None if r is None else repeat_heads(r, heads, dim=1)
        return self._replace(k=k, v=v, scores=self.scores._replace(reflections=r))


def consecutive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Scores | None = None,
    *,
    rotation: Rotation | None = None,
    gates: Gates | None = None,
    real: Tensor | None = None,
    segments: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> Case:
    """The case of T queries that are the last of S consecutive tokens."""
    length, key_length = q.shape[-2], k.shape[-2]
    positions = torch.arange(key_length - length, key_length, device=q.device)
    place = Placement(positions, key_length=key_length, real=real, segments=segments)
    mask = Mask(place, causal=causal, window=window)
    return Case(q, k, v, mask, rotation, scores or Scores(), gates, dropout_p)
