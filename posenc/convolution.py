"""Causal depthwise convolution of q, k and v (MDHA of Primer, arXiv 2109.08668; RCMHA, arXiv
2308.03429).

    y[t] = sum_j w[j] x[t - (k-1) + j] (+ bias),   x[t < 0] = 0,   separate weights for q, k and v

Acts on the projected heads, before the encoding. RCMHA shares one set of kernels between the heads,
with a bias; Primer has one for every head and channel, without. RCMHA's abstract speaks of
convolving the embeddings; its code and Primer convolve the projections, and so do we.

While decoding the rows before the convolution are kept: the next token needs the last k-1, a
rollback any of them.
"""

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posenc.cache import Stream
from posenc.checks import check_sizes
from posenc.errors import unknown

if TYPE_CHECKING:
    from posenc.cache import Cache

INITS = ("torch", "identity", "primer")


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None = None
) -> Tensor:
    """Convolve each channel of x (B, H, T, D) with its own kernel, causally: (B, H, T, D).

    Args:
        weight: (D, k), the same for all heads, or (H, D, k). The last tap meets the present token.
        bias: (D,) or (H, D).
        past: (B, H, k-1, D), the rows before x; None is zeros.
    """
    heads, dim, taps = x.shape[1], x.shape[-1], weight.shape[-1]
    past = (
        x.new_zeros(()).expand(x.shape[0], heads, taps - 1, dim)
        if past is None
        else past.to(x.dtype)
    )
    rows = torch.cat((past, x), dim=-2).transpose(1, 2).flatten(2)  # (B, k-1+T, H*D)
    kernel = weight.expand(heads, dim, taps).reshape(-1, 1, 1, taps).to(x.dtype)
    shift = None if bias is None else bias.expand(heads, dim).reshape(-1).to(x.dtype)
    # As an image one pixel high with its channels last: on CPU 2x faster than conv1d, 4x than
    # shifted sums.
    y = F.conv2d(
        rows.transpose(1, 2).unsqueeze(2), kernel, shift, groups=heads * dim
    )  # (B, H*D, 1, T)
    return y.squeeze(2).transpose(1, 2).unflatten(-1, (heads, dim)).transpose(1, 2)


class DepthwiseConv(nn.Module):
    """Short causal convolutions of q, k and v along time.

    Args:
        num_heads: H.
        head_dim: D.
        kernel_size: k, at least 1.
        per_head: one kernel for every head and channel (Primer) or one for each channel, shared by
            heads (RCMHA).
        bias: add a bias to each channel.
        init: "torch" (Conv1d's U(+-1/sqrt(k))), "identity" (0, .., 0, 1) or "primer" (0.5 on the
            present token, a k-th of it on each one before).

    Raises:
        ValueError: for a kernel size below 1 or an unknown init.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        kernel_size: int = 3,
        per_head: bool = False,
        bias: bool = True,
        init: Literal["torch", "identity", "primer"] = "torch",
    ) -> None:
        super().__init__()
        check_sizes(
            "DepthwiseConv", num_heads=num_heads, head_dim=head_dim, kernel_size=kernel_size
        )
        if init not in INITS:
            raise ValueError(unknown("DepthwiseConv init", init, INITS))
        self.num_heads, self.head_dim, self.kernel_size, self.init = (
            num_heads,
            head_dim,
            kernel_size,
            init,
        )
        channels = (num_heads, head_dim) if per_head else (head_dim,)
        self.weight = nn.Parameter(torch.empty(3, *channels, kernel_size))
        self.bias = nn.Parameter(torch.empty(3, *channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.kernel_size)
        if self.init == "torch":
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            past = 0.5 / self.kernel_size if self.init == "primer" else 0.0
            nn.init.constant_(self.weight, past)
            nn.init.constant_(self.weight[..., -1], 0.5 if self.init == "primer" else 1.0)
        if self.bias is not None:
            if self.init == "torch":
                nn.init.uniform_(self.bias, -bound, bound)
            else:
                nn.init.zeros_(self.bias)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        real: Tensor | None = None,
        segments: Tensor | None = None,
        state: "Cache | None" = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolve q, k and v (B, H, T, D).

        Args:
            real: (B, T) bool; padded tokens (False) count as zeros, as what lies before the first
                token does.
            state: the cache while decoding.
        """
        inputs = [q, k, v]
        if real is not None:
            inputs = [z * real[:, None, :, None] for z in inputs]
        past = [None] * 3 if state is None else state.recent("conv").unbind(1)
        if state is not None:
            state.append("conv", torch.stack(inputs, dim=1))
        biases = [None] * 3 if self.bias is None else self.bias.unbind(0)
        q, k, v = map(depthwise_conv, inputs, self.weight.unbind(0), biases, past)
        return q, k, v

    def streams(self) -> dict[str, Stream]:
        """The rows of q, k and v before the convolution."""
        return {"conv": Stream((3, self.num_heads, self.head_dim), history=self.kernel_size - 1)}

    def extra_repr(self) -> str:
        sizes = f"num_heads={self.num_heads}, head_dim={self.head_dim}"
        return f"{sizes}, kernel_size={self.kernel_size}, init={self.init!r}"
