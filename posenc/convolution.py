"""Depthwise convolution of q, k and v along time (MDHA of Primer, arXiv 2109.08668; RCMHA, arXiv
2308.03429).

    y[t] = sum_j w[j] x[t - (k-1) + j] (+ bias),   x[t < 0] = 0,   separate weights for q, k and v
    not causal: x[t - (k-1)//2 + j], zeros on both sides

Acts on the projected heads, before the encoding. RCMHA shares one set of kernels between the heads,
with a bias; Primer has one for every head and channel, without. RCMHA's abstract speaks of
convolving the embeddings; its code and Primer convolve the projections, and so do we. A tap on
padding, or across the boundary of a document, reads zero.

While decoding the rows before the convolution are kept: the next token needs the last k-1, a
rollback any of them.
"""

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posenc.cache import Stream
from posenc.checks import check_kv_heads, check_sizes
from posenc.errors import unknown

if TYPE_CHECKING:
    from posenc.cache import Cache

INITS = ("torch", "identity", "primer")


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None = None,
    *,
    future: int = 0,
    segments: Tensor | None = None,
) -> Tensor:
    """Convolve each channel of x (B, H, T, D) with its own kernel: (B, H, T, D).

    Args:
        weight: (D, k), the same for all heads, or (H, D, k).
        bias: (D,) or (H, D).
        past: (B, H, k-1-future, D), the rows before x; None is zeros.
        future: taps that meet later tokens; the one before them meets the present token.
        segments: (B, T), documents that no tap may leave.
    """
    heads, dim, taps = x.shape[1], x.shape[-1], weight.shape[-1]
    behind = taps - 1 - future
    zeros = x.new_zeros(()).expand(x.shape[0], heads, taps - 1, dim)
    past = zeros[:, :, :behind] if past is None else past.to(x.dtype)
    rows = torch.cat((past, x, zeros[:, :, :future]), dim=-2)  # (B, H, k-1+T, D)
    if segments is not None:
        return _within(rows, weight, bias, behind, segments)
    rows = rows.transpose(1, 2).flatten(2)  # (B, k-1+T, H*D)
    kernel = weight.expand(heads, dim, taps).reshape(-1, 1, 1, taps).to(x.dtype)
    shift = None if bias is None else bias.expand(heads, dim).reshape(-1).to(x.dtype)
    # As an image one pixel high with its channels last: on CPU 2x faster than conv1d, 4x than
    # shifted sums.
    y = F.conv2d(
        rows.transpose(1, 2).unsqueeze(2), kernel, shift, groups=heads * dim
    )  # (B, H*D, 1, T)
    return y.squeeze(2).transpose(1, 2).unflatten(-1, (heads, dim)).transpose(1, 2)


def _within(
    rows: Tensor, weight: Tensor, bias: Tensor | None, behind: int, segments: Tensor
) -> Tensor:
    """Shifted sums of rows (B, H, k-1+T, D), of each token's own document alone."""
    length, taps = segments.shape[1], weight.shape[-1]
    # Beside the row lies no document: an outer token may have any number.
    padded = F.pad(segments, (behind, taps - 1 - behind))
    inside = F.pad(torch.ones_like(segments, dtype=torch.bool), (behind, taps - 1 - behind))
    y = None if bias is None else bias.unsqueeze(-2).to(rows.dtype)
    for j in range(taps):
        at = slice(j, j + length)
        own = (padded[:, at] == segments) & inside[:, at]
        tap = rows[:, :, at] * weight[..., j].unsqueeze(-2).to(rows.dtype)
        tap = tap * own[:, None, :, None]
        y = tap if y is None else y + tap
    assert y is not None
    return y


def gather_taps(
    x: Tensor, taps: int, past: Tensor | None = None, segments: Tensor | None = None
) -> Tensor:
    """What the causal taps of each token read, side by side: x (B, T, r) -> (B, T, taps * r).

    Where a narrow x is widened and convolved, one product then does both.

    Args:
        past: (B, taps - 1, r), the rows before; None is zeros.
        segments: (B, T), documents that no tap leaves.
    """
    length = x.shape[1]
    if past is None:
        past = x.new_zeros(()).expand(x.shape[0], taps - 1, x.shape[-1])
    rows = torch.cat((past, x), dim=1)
    read = [rows[:, j : j + length] for j in range(taps)]
    if segments is not None:
        padded = F.pad(segments, (taps - 1, 0))  # what lies before the row is zeros anyway
        own = (padded[:, j : j + length] == segments for j in range(taps))
        read = [tap * same.unsqueeze(-1) for tap, same in zip(read, own, strict=True)]
    return torch.cat(read, dim=-1)


class DepthwiseConv(nn.Module):
    """Short convolutions of q, k and v along time.

    Args:
        num_heads: H.
        head_dim: D.
        num_kv_heads: G, heads of k and v; H if None.
        kernel_size: k, at least 1.
        per_head: one kernel for every head and channel (Primer) or one for each channel, shared by
            heads (RCMHA).
        bias: add a bias to each channel.
        init: "torch" (Conv1d's U(+-1/sqrt(k))), "identity" (0, .., 0, 1) or "primer" (0.5 on the
            present token, a k-th of it on each other one).
        causal: the last tap meets the present token; else tap (k-1)//2 does.

    The weight is (3, D, k) where heads share it; of each head (3, H, D, k), or with fewer key heads
    (H + 2G, D, k), rows q | k | v. The bias has no k.

    Raises:
        ValueError: for a kernel size below 1, an unknown init or key heads that do not divide.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        kernel_size: int = 3,
        per_head: bool = False,
        bias: bool = True,
        init: Literal["torch", "identity", "primer"] = "torch",
        causal: bool = True,
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
        self.num_kv_heads, self.causal = check_kv_heads(num_heads, num_kv_heads), causal
        channels = (3, num_heads, head_dim) if per_head else (3, head_dim)
        if per_head and self.grouped:
            channels = (num_heads + 2 * self.num_kv_heads, head_dim)
        self.per_head = per_head
        self.weight = nn.Parameter(torch.empty(*channels, kernel_size))
        self.bias = nn.Parameter(torch.empty(*channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.kernel_size)
        if self.init == "torch":
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            past = 0.5 / self.kernel_size if self.init == "primer" else 0.0
            nn.init.constant_(self.weight, past)
            present = self.kernel_size - 1 - self.future
            nn.init.constant_(self.weight[..., present], 0.5 if self.init == "primer" else 1.0)
        if self.bias is not None:
            if self.init == "torch":
                nn.init.uniform_(self.bias, -bound, bound)
            else:
                nn.init.zeros_(self.bias)

    @property
    def grouped(self) -> bool:
        """Whether k and v have fewer heads than q."""
        return self.num_kv_heads != self.num_heads

    @property
    def future(self) -> int:
        """Taps that meet later tokens."""
        return 0 if self.causal else self.kernel_size // 2

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
        """Convolve q (B, H, T, D), k and v (B, G, T, D).

        Args:
            real: (B, T) bool; padded tokens (False) count as zeros, as what lies before the first
                token does.
            segments: (B, T), documents that no tap leaves.
            state: the cache while decoding.
        """
        if real is not None:
            q, k, v = (z * real[:, None, :, None] for z in (q, k, v))
        inputs = (q, k, v)
        past: tuple[Tensor | None, ...] = (None,) * 3
        if state is not None:
            past = self.apart(state.recent("conv"), dim=1)
            state.append("conv", self.together(q, k, v))
        weights, biases = self.taps()
        q, k, v = (
            depthwise_conv(z, weight, bias, before, future=self.future, segments=segments)
            for z, weight, bias, before in zip(inputs, weights, biases, past, strict=True)
        )
        return q, k, v

    def taps(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """The kernels (.., k) and biases of q, k and v."""
        whole = not (self.per_head and self.grouped)

        def parts(x: Tensor) -> tuple[Tensor, ...]:
            return x.unbind(0) if whole else self.apart(x, dim=0)

        return parts(self.weight), (None,) * 3 if self.bias is None else parts(self.bias)

    def together(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows of q, k and v as the cache keeps them."""
        return torch.cat((q, k, v), dim=1) if self.grouped else torch.stack((q, k, v), dim=1)

    def apart(self, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        """The inverse of `together`, along `dim`."""
        if not self.grouped:
            return x.unbind(dim)
        return x.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim)

    def streams(self) -> dict[str, Stream]:
        """The rows of q, k and v before the convolution."""
        heads = (self.num_heads + 2 * self.num_kv_heads,) if self.grouped else (3, self.num_heads)
        return {"conv": Stream((*heads, self.head_dim), history=self.kernel_size - 1)}

    def extra_repr(self) -> str:
        sizes = f"num_heads={self.num_heads}, head_dim={self.head_dim}"
        kind = f"per_head={self.per_head}, init={self.init!r}, causal={self.causal}"
        return f"{sizes}, kernel_size={self.kernel_size}, {kind}"
