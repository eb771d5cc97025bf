"""Biases of the distance alone: what ALiBi, T5 and KERPLE share.

    logits[m, n] = q[m].k[n] / sqrt(D) + b_h(m - n)

A scheme says b as a function of integer distances, `of_distance`; everything else is here. Raw keys
are cached, and there is no further state.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from posenc.cache import Cache
from posenc.encodings.base import Encoding
from posenc.phase import Float32Parameters
from posenc.placement import Placement
from posenc.scores import ByDistance, Scores, batch_first


class DistanceBias(Float32Parameters, Encoding, ABC):
    """A bias of each head that depends on the distance m - n alone."""

    in_logits = True

    @abstractmethod
    def of_distance(self, distances: Tensor) -> Tensor:
        """b_h of integer distances (..): (H, ..). Keys after the query have negative ones."""

    def scores(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> Scores:
        given = torch.get_default_dtype() if x is None else x.dtype
        dtype = torch.promote_types(given, torch.float32)
        # Packed rows are consecutive too: nothing is seen across documents.
        apart = (None, None) if place.keys is None else (place.positions, place.keys)
        device = place.positions.device
        bias = ByDistance(self.of_distance, place.length, place.key_length, dtype, device, *apart)
        return Scores(bias=bias)

    def score_bias(
        self, positions: Tensor, key_positions: Tensor, x: Tensor | None = None
    ) -> Tensor:
        apart = positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
        return batch_first(self.of_distance(apart))
