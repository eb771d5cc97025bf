"""CARoPE's rates (arXiv 2507.23083), as logarithms: of a token and a head each."""

import torch
from torch import Tensor
from torch.nn import functional as F

from posenc.precise import precise_columns


def log_rates(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """log f = -log1p(softplus(x W + bias)): x (B, T, C), W (C, H) -> (B, H, T) in fp64.

    The logarithm, never log of a computed f, which is 0 for large z and has a NaN gradient there.
    """
    return log_rates_of(precise_columns(x, weight), bias)


def log_rates_of(columns: Tensor, bias: Tensor | None) -> Tensor:
    """`log_rates` of columns = (x W)^T, fp64 (B, H, T)."""
    z = columns if bias is None else columns + bias.double().unsqueeze(-1)
    return -torch.log1p(softplus(z))


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), of fp64."""
    if torch.compiler.is_exporting():
        # onnxruntime has no Softplus in fp64. At 0 the gradient of a maximum, unlike a clamp's, is
        # one half, as it should be.
        return torch.maximum(z, torch.zeros_like(z)) + torch.log1p(torch.exp(-z.abs()))
    # It turns linear past its threshold; the default, 20, is 2e-9 off there.
    return F.softplus(z, threshold=40)
