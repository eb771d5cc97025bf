"""Attention layers as they are measured: (B, T, C) -> (B, T, C) with their projections.

A layer of the zoo with perturbed weights, its definition, and the one interface through which a
benchmark calls layers of ours and of peers.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import posenc

from .measure import Case

Compile = Callable[[nn.Module], nn.Module]


class Layer(nn.Module, ABC):
    """A layer that decodes with whatever it remembers; of others `forward` alone is measured."""

    @abstractmethod
    def prefill(self, x: Tensor, max_length: int) -> tuple[Tensor, Any]:
        """The forward pass, and its state with room for `max_length` tokens."""

    @abstractmethod
    def decode(self, token: Tensor, state: Any) -> Tensor:
        """The output of one more token (B, 1, C); the state stays as it was."""


class ZooLayer(Layer):
    """A module of posenc, compiled or not."""

    def __init__(self, module: posenc.Attention, wrap: Compile) -> None:
        super().__init__()
        self.module, self.run = module, wrap(module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def prefill(self, x: Tensor, max_length: int) -> tuple[Tensor, Any]:
        cache = self.module.make_cache(x.shape[0], max_length)
        return self.run(x, cache=cache), cache

    def decode(self, token: Tensor, state: Any) -> Tensor:
        y = self.run(token, cache=state)
        state.truncate(state.length - 1)
        return y


class Reference:
    """A module by its definition: in fp64 for fp64 inputs, on the same weights."""

    def __init__(self, module: posenc.Attention) -> None:
        self.module = copy.deepcopy(module)
        self.module.impl = "reference"
        self.precise = copy.deepcopy(self.module).double()

    def __call__(self, x: Tensor) -> Tensor:
        return (self.precise if x.dtype == torch.float64 else self.module)(x)


def as_is(module: nn.Module) -> nn.Module:
    """The module itself: it is not compiled."""
    return module


def one_row(x: Tensor) -> Tensor:
    """The last row of a batch (B, T, C): rows do not meet."""
    return x[-1:]


def zoo_case(
    kind: str,
    row: str,
    name: str,
    implementations: Mapping[str, tuple[str, Compile]],
    x: Tensor,
    heads: int,
) -> Case:
    """A name of the zoo on x (B, T, C), in x's dtype.

    Args:
        row: the name of its rows.
        implementations: impl, and how it is compiled, by the name that rows give them.
    """
    # A learned table as long as the text.
    options = {"max_distance": x.shape[1]} if name in ("rmha", "rcmha") else {}
    module = posenc.attention(name, x.shape[-1], heads, impl="reference", **options).to(x.device)
    with torch.no_grad():  # tables that begin at zero would hide what is wrong with them
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    module = module.to(x.dtype)

    def build(impl: str, wrap: Compile) -> Layer:
        chosen = copy.deepcopy(module)
        chosen.impl = impl
        return ZooLayer(chosen, wrap)

    providers = {
        label: (lambda impl=impl, wrap=wrap: build(impl, wrap))
        for label, (impl, wrap) in implementations.items()
    }
    return Case(kind, row, (x,), Reference(module), providers, one_row)
