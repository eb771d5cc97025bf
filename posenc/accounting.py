"""What the parts of the cost model are made of: its letters, its sums, and the formulas that parts
share. Each encoding says with these what it costs (`Encoding.cost`); `posenc.cost` adds up.

Conventions. A multiply-add is 2 FLOPs; products alone are FLOPs, convolutions among them. The
backward pass of a product is one more for each factor that needs a gradient: mostly both, so
training is 3 times the forward pass. What is computed twice (scores in flash attention, blocks
under `checkpoint_activations`) counts once. Apart stands elementwise work of the encodings: 6 for
the rotation of a pair of features, 1 for each sine, cosine, arctangent, exponential and added
phase. Not counted: softmax, masks, biases, scales, norms, gates, GELU, loss.

Bytes that the backward pass keeps are those of `impl="fused"`, without autocast or dropout: every
tensor of D or more numbers a token and head, the log-sum-exp and the statistics of norms, each
storage once. Gates, rates and positions are left out.
"""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch

from posenc.cache import Stream


@dataclass(frozen=True)
class Part:
    """What one part costs in a call of B sequences of T tokens that see S keys.

    Attributes:
        parameters: how many.
        flops: of the forward pass.
        backward_flops: of the backward pass.
        kept_flops: of a forward pass that skips what the router drops.
        elementwise: operations on single numbers, forward; see the head of this file.
        saved_bytes: kept from the forward pass for the backward pass, parameters aside.
        weight_bytes: of the parameters that a forward pass reads.
        state_bytes: that each token of a sequence adds to the decoding state.
        state_read_bytes: of that state, what a step reads for all heads.
    """

    parameters: int = 0
    flops: int = 0
    backward_flops: int = 0
    kept_flops: int = 0
    elementwise: int = 0
    saved_bytes: int = 0
    weight_bytes: int = 0
    state_bytes: int = 0
    state_read_bytes: int = 0

    def __add__(self, other: "Part") -> "Part":
        return Part(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def training_flops(self) -> int:
        """Forward and backward."""
        return self.flops + self.backward_flops

    @property
    def read_bytes(self) -> int:
        """Weights and decoding state that a step reads: its time where memory is the limit."""
        return self.weight_bytes + self.state_read_bytes


@dataclass(frozen=True)
class Sizes:
    """The letters of the formulas.

    B batch, T query length, S key length, H heads, G key heads, D head dim, C embed_dim, A heads
    that a token keeps (H without a router); window and causal as the attention has them.
    """

    B: int
    T: int
    S: int
    H: int
    D: int
    A: int
    dtype: torch.dtype
    G: int
    C: int
    window: int | None = None
    causal: bool = True

    @property
    def N(self) -> int:
        """Tokens."""
        return self.B * self.T

    @property
    def inner(self) -> int:
        """H D, the width of all query heads."""
        return self.H * self.D

    @property
    def turned(self) -> int:
        """(H + G) D, the width of q and k."""
        return (self.H + self.G) * self.D

    @property
    def seen(self) -> int:
        """Keys that the last query sees."""
        return self.S if self.window is None else min(self.S, self.window)

    @property
    def pairs(self) -> int:
        """P: pairs of a query and a key that it sees; row i of T has S - T + i keys before it."""
        past = self.S - self.T
        if self.window is None:
            return self.T * past + self.T * (self.T + 1) // 2 if self.causal else self.T * self.S
        before = sum(min(self.window, past + i + 1) for i in range(self.T))
        return before if self.causal else 2 * before - self.T

    @property
    def e(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def precise(self) -> int:
        """Bytes of an element in fp32 or better."""
        return max(self.e, 4)


def product(multiply_adds: int, kept: int | None = None, gradients: int = 2) -> Part:
    """The FLOPs of a product.

    Args:
        kept: multiply-adds that the kept heads need; None is all.
        gradients: how many of its two factors need one.
    """
    flops = 2 * multiply_adds
    kept_flops = flops if kept is None else 2 * kept
    return Part(flops=flops, backward_flops=gradients * flops, kept_flops=kept_flops)


def weights(count: int, itemsize: int, read: int | None = None) -> Part:
    """So many parameters, of which a forward pass reads `read`, None being all."""
    return Part(parameters=count, weight_bytes=itemsize * (count if read is None else read))


def state(streams: Iterable[Stream], s: Sizes, read: int) -> Part:
    """Decoding state of which a step reads `read` rows a sequence."""
    row = sum(math.prod(x.shape) * (x.dtype or s.dtype).itemsize for x in streams)
    return Part(state_bytes=row, state_read_bytes=s.B * read * row)


def rotation(s: Sizes, dim: int) -> Part:
    """Turning `dim` features of every head of q and k, 6 a pair; keeps q and k turned."""
    return Part(elementwise=3 * s.N * (s.H + s.G) * dim, saved_bytes=s.N * s.turned * s.e)


def rotation_by_angles(s: Sizes) -> Part:
    """Turning q and k by angles that have a gradient, without a kernel: keeps q and k in fp32 too,
    apart from what is given where that is less precise.
    """
    return rotation(s, s.D) + Part(saved_bytes=4 * s.N * s.turned if s.e < 4 else 0)
