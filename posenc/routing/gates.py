"""What a router makes of the heads."""

from typing import NamedTuple

import torch
from torch import Tensor


class Gates(NamedTuple):
    """A weight for each token and head."""

    values: Tensor  # (B, H, T); 0 drops the pair
    always: int  # so many heads, the first ones, no token drops
    active: int  # so many heads each token keeps
    straight_through: bool = False  # a gate of 0 has the gradient <dy, o> too

    @property
    def kept(self) -> float:
        """The share of kept tokens in the heads that may be dropped."""
        routed = self.values.shape[1] - self.always
        return (self.active - self.always) / routed if routed else 1.0

    @property
    def need_every_output(self) -> bool:
        """Whether the gradient of a gate reads the output of a head that it drops."""
        return self.straight_through and self.values.requires_grad and torch.is_grad_enabled()


def weigh(y: Tensor, gates: Tensor) -> Tensor:
    """y (B, H, T, D) times gates (B, H, T), in y's dtype."""
    return y * gates.unsqueeze(-1).to(y.dtype)


def weighed(y: Tensor, gates: Gates | None) -> Tensor:
    """The same where there are gates."""
    return y if gates is None else weigh(y, gates.values)
