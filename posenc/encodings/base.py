"""The encoding seam: what a positional scheme may do inside attention.

A scheme subclasses `Encoding` once and overrides what it needs; every default does nothing, so
`Encoding()` is NoPE. Inside attention a scheme describes, and a back end computes: `rotation` says
how q and k turn, `scores` how the logits differ. The simplest schemes describe nothing and override
`score_bias` (an additive bias of positions) or `rotate` (any function of q and k).
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from posenc.accounting import Part, Sizes, state, weights
from posenc.cache import Cache, Stream
from posenc.checks import check_pair, check_positions
from posenc.fading import faded_logits
from posenc.phase import repeat_heads
from posenc.placement import Placement, given, place
from posenc.rotations import ByFunction, Rotation
from posenc.scores import Scores, added_logits

#: What FlexAttention takes: (score, b, h, q_idx, kv_idx) -> score.
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Encoding(nn.Module):
    """Position in attention, at one or more of three places.

    Shapes: q (B, H, T, D), k (B, G, S, D); positions integer (T,), (1, T) or (B, T); x (B, T, C),
    the attention module's own input.
    """

    #: Own parameters that must not be decayed (decay would pull them away from the encoding they
    #: stand for).
    no_weight_decay: ClassVar[frozenset[str]] = frozenset()
    #: Whether it acts where tokens enter the model (`embed`) and not inside attention.
    at_input: ClassVar[bool] = False
    #: Whether shifting all positions leaves the output unchanged.
    relative: ClassVar[bool] = True
    #: Whether it adds a term to the logits, with which no kernel skips dropped heads.
    in_logits: ClassVar[bool] = False
    #: Whether its `x` is the phase that a model computed once, see `SharedPhase`.
    reads_phase: ClassVar[bool] = False
    #: How many times as wide as v turned q and k are; kernels then take a padded copy of v.
    widening: ClassVar[int] = 1
    #: Whether it depends on positions, and not on the order of tokens alone.
    reads_positions: ClassVar[bool] = True
    #: Its option that a model's context sets where nobody gives it.
    context_option: ClassVar[str | None] = None
    #: Coordinates of a position, without a dimension of their own where None.
    axes_count: int | None = None
    #: Whether positions may be floating-point numbers.
    continuous: bool = False

    def embed(self, positions: Tensor) -> Tensor | None:
        """What is added once to the token embedding: (T, C) or (B, T, C), or None."""
        return None

    def rotation(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> Rotation | None:
        """How q and k turn, in time linear in T, or None. `state` is given while decoding."""
        return None

    def scores(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> Scores:
        """How the scheme enters the logits of turned q and k."""
        if type(self).score_bias is Encoding.score_bias:
            return Scores()
        keys = _key_positions(place)

        def bias(rows: slice, columns: slice) -> Tensor:
            made = self.score_bias(place.positions[..., rows], keys[..., columns])
            assert made is not None
            return made

        return Scores(bias=bias)

    def describe_rotation(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> Rotation | None:
        """`rotation`, or what a subclass's own `rotate` does where that is the later word."""
        for kind in type(self).__mro__:
            if "rotation" in vars(kind):
                return self.rotation(place, x, state)
            if "rotate" in vars(kind):
                return ByFunction(self.rotate, place, x, state)
        raise AssertionError("Encoding itself has both")

    def rotate(
        self,
        q: Tensor | None,
        k: Tensor | None = None,
        positions: Tensor | None = None,
        x: Tensor | None = None,
        state: Cache | None = None,
        *,
        key_positions: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Turn q (B, H, T, D) and k (B, G, T, D), eagerly; None stays None.

        The time is the dimension before the last: tensors (B, T, H, D) are to be transposed first,
        and where T = H nothing can notice.

        Args:
            positions: of both; None is 0 .. T-1.
            key_positions: of keys that stand elsewhere, of a length of their own.
            x: (B, T, C), for schemes that turn by the tokens.

        Raises:
            ValueError: for wrong shapes, or keys of another length without key_positions.
        """
        apart = q is not None and k is not None and key_positions is not None
        check_pair(q, k, getattr(self, "head_dim", None), apart=apart)
        if apart:
            assert k is not None
            check_positions(
                key_positions,
                k.shape[0],
                k.shape[-2],
                k.device,
                axes=self.axes_count,
                continuous=self.continuous,
                name="key_positions",
            )
            q, _ = self.rotate(q, None, positions, x, state)
            _, k = self.rotate(None, k, key_positions, x, state)
            return q, k
        one = q if q is not None else k
        assert one is not None
        if q is None and key_positions is not None:
            positions = key_positions
        where = place(
            one.shape[0],
            one.shape[-2],
            one.device,
            positions=positions,
            axes=self.axes_count,
            continuous=self.continuous,
            ordered=False,
        )
        if x is not None and x.shape[0] != one.shape[0]:
            raise ValueError(
                f"{type(self).__name__} needs x of shape ({one.shape[0]}, T, C), the batch of q "
                f"and k; got {tuple(x.shape)}."
            )
        rotation = self.rotation(where, x, state)
        return (q, k) if rotation is None else rotation.apply(q, k)

    def score_bias(
        self, positions: Tensor, key_positions: Tensor, x: Tensor | None = None
    ) -> Tensor | None:
        """What is added to q.k/sqrt(D), dense: (1 or B, H, T, S); None where there is no such bias.

        Args:
            positions: of the queries, (T,) or (B, T). key_positions: (S,) or (B, S).
        """
        return None

    def score_mod(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor,
        key_positions: Tensor | None = None,
        x: Tensor | None = None,
    ) -> ScoreMod | None:
        """The closure that FlexAttention takes, for turned q (B, H, T, D) and k (B, G, S, D); None
        where the scheme leaves the logits alone.

        It captures what the scheme adds as a tensor (B or 1, H, T, S), made here. Where gates count
        keys (CoPE) they count those at positions from 0 to the query's; the closure knows of no
        window and no documents.
        """
        keys = positions if key_positions is None else key_positions
        where = given(positions, keys, self.axes_count, self.continuous)
        scores = self.scores(where, x)
        scale = scores.factor(q.shape[-1])
        if scores.fading is not None:  # no function of the score: it takes its place
            return partial(_modify, scale * faded_logits(q, k, scores.fading, where), 0.0)
        added = added_logits(q, k, scores, scale, lambda: _up_to(positions, keys))
        if scores.content is not None:
            repeated = repeat_heads(k, q.shape[1], dim=1)
            term = scale * (scores.content.to(q.dtype).unsqueeze(-2) @ repeated.mT)
            added = term if added is None else term + added
        if added is None and scores.scale is None:
            return None
        factor = scale * q.shape[-1] ** 0.5  # FlexAttention has divided by sqrt(D)
        shape = (*q.shape[:3], k.shape[-2])
        if added is not None:
            added = added.reshape((1,) * (4 - added.ndim) + added.shape).expand(shape)
        return partial(_modify, added, factor)

    def streams(self) -> dict[str, Stream]:
        """The per-token tensors that decoding must remember beside k and v, by name."""
        return {}

    def cost(self, s: Sizes) -> Part:
        """What the scheme adds to attention; its parameters and streams if it says nothing else."""
        count = sum(parameter.numel() for parameter in self.parameters())
        return weights(count, s.e) + state(self.streams().values(), s, read=s.seen)

    def replaces(self, s: Sizes) -> bool:
        """Whether turned q and k take the place of those given, which no backward pass reads."""
        return False

    def init_projection(self, weight: Tensor) -> None:
        """Initialise (C, C) projections, stacked (n C, C), where the scheme's source says how."""

    def reset_parameters(self) -> None:
        """Draw the scheme's own parameters anew (used after materialising a model from `meta`)."""


def _modify(
    added: Tensor | None, factor: float, score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor
) -> Tensor:
    score = score if factor == 1 else score * factor
    return score if added is None else score + added[b, h, m, n]


def _up_to(positions: Tensor, keys: Tensor) -> Tensor:
    """Which keys, padding apart, stand no later than the query: (T, S) or (B, 1, T, S)."""
    at = keys.unsqueeze(-2)
    seen = (at <= positions.unsqueeze(-1)) & (at >= 0)
    return seen if seen.ndim == 2 else seen.unsqueeze(1)


def _key_positions(place: Placement) -> Tensor:
    """Positions of the keys; those of consecutive ones end with the queries'."""
    if place.keys is not None:
        return place.keys
    if place.key_length == place.length:
        return place.positions
    back = torch.arange(1 - place.key_length, 1, device=place.positions.device)
    return place.positions[..., -1:] + back
