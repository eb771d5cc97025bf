"""Where a layer's weights start, when that is for what holds the layer to say.

Users materialise a model from `meta` by calling every module's `reset_parameters`, in whatever
order. Torch's own would give a linear layer or an embedding torch's start there. So the layer gets
a `reset_parameters` of its own, on the instance: it stays a plain nn.Linear, by which exact type
quantisers find it.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def draw(layer: nn.Linear | nn.Embedding, std: float) -> None:
    """Weight N(0, std), bias 0."""
    nn.init.normal_(layer.weight, std=std)
    bias = getattr(layer, "bias", None)
    if bias is not None:
        nn.init.zeros_(bias)


class Start:
    """The `reset_parameters` of one layer: `draw`, and what is `prescribed` for the weight then.

    Args:
        layer: gets it.
        std: see `draw`.
        prescribed: may draw the weight anew, in place.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Embedding,
        std: float,
        prescribed: Callable[[Tensor], None] | None = None,
    ) -> None:
        # Weakly: a cycle would keep a deleted model's memory until Python collects garbage.
        self._layer = weakref.ref(layer)
        self._std, self._prescribed = std, prescribed
        vars(layer)["reset_parameters"] = self

    @torch.no_grad()
    def __call__(self) -> None:
        layer = self._layer()
        assert layer is not None
        draw(layer, self._std)
        if self._prescribed is not None:
            self._prescribed(layer.weight)

    # Weak references are neither copied nor pickled; a copied layer's start is its own.

    def __getstate__(self) -> tuple[object, ...]:
        return self._layer(), self._std, self._prescribed

    def __setstate__(self, state: tuple[nn.Linear, float, Callable[[Tensor], None] | None]) -> None:
        layer, self._std, self._prescribed = state
        self._layer = weakref.ref(layer)
