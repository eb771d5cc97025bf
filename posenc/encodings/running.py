"""Rotations by a phase that runs along the tokens: what CARoPE, Selective RoPE and GRAPE share."""

from abc import ABC, abstractmethod

from torch import Tensor

from posenc.cache import Cache
from posenc.encodings.base import Encoding
from posenc.phase import Float32Parameters
from posenc.placement import Placement, place
from posenc.rotations import ByRates, BySteps


class RunningRotation(Float32Parameters, Encoding, ABC):
    """A rotation by sums over tokens; positions are read for padding alone."""

    reads_positions = False

    @abstractmethod
    def rotation(
        self, place: Placement, x: Tensor | None = None, state: Cache | None = None
    ) -> ByRates | BySteps:
        """By what the tokens x (B, T, C) say; `state` remembers the sums."""

    def phases(
        self, x: Tensor, positions: Tensor | None = None, state: Cache | None = None
    ) -> Tensor:
        """The running phase (B, G or 1, T, D/2), fp64 modulo 2 pi, of the tokens x (B, T, C)."""
        where = place(len(x), x.shape[1], x.device, positions=positions, ordered=False)
        return self.rotation(where, x, state).phases()
