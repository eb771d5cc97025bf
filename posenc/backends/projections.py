"""Projections into heads and out of them: whole, or only the rows that gates keep.

On CPU in inference the rows of q and of the output that a router drops need not be projected; the
weights are then used bare, which only plain, unwatched linear layers allow.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from posenc.backends.skipping import merge_kept, project_kept, projections_pay
from posenc.linear import is_plain
from posenc.routing.gates import Gates


def kept_rows(x: Tensor, gates: Gates, layers: list[nn.Module], impl: str) -> Gates | None:
    """The gates if only what they keep is to be projected by these layers, else None."""
    if impl != "auto" or not projections_pay(x, gates):
        return None
    watched = nn.modules.module._has_any_global_hook()
    return gates if all(map(is_plain, layers)) and not watched else None


def to_heads(
    x: Tensor, layer: nn.Linear, heads: int, kv_heads: int, kept: Gates | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, T, D), k and v (B, G, T, D) of x (B, T, C); rows of q that `kept` drops are 0.

    The layer's rows are those of q, k and v, one head after the other.
    """
    if kept is None:
        y = layer(x)
        dim = y.shape[-1] // (heads + 2 * kv_heads)
        if x.shape[1] == 1:  # heads and time need not change places: 5 us of 90 a layer and step
            q, k, v = y.view(x.shape[0], -1, 1, dim).split_with_sizes(
                (heads, kv_heads, kv_heads), dim=1
            )
            return q, k, v
        if heads == kv_heads:
            # Apart before the heads are: the three gradients then meet again in one copy, not two.
            parts = y.unflatten(-1, (3, heads, dim)).unbind(2)
            q, k, v = (z.transpose(1, 2) for z in parts)
            return q, k, v
        sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
        q, k, v = (z.unflatten(-1, (-1, dim)).transpose(1, 2) for z in y.split(sizes, dim=-1))
        return q, k, v
    dim = layer.out_features // (heads + 2 * kv_heads)
    sizes = [heads * dim, 2 * kv_heads * dim]
    for_q, for_kv = layer.weight.split(sizes)
    bias_q, bias_kv = (None, None) if layer.bias is None else layer.bias.split(sizes)
    pair = F.linear(x, for_kv, bias_kv).unflatten(-1, (2, kv_heads, dim))
    k, v = (z.transpose(1, 2) for z in pair.unbind(2))
    return project_kept(x, for_q, bias_q, kept), k, v


def from_heads(y: Tensor, layer: nn.Linear, kept: Gates | None) -> Tensor:
    """y (B, H, T, D) through the output projection: (B, T, C)."""
    if kept is None:
        one = y.shape[2] == 1
        out: Tensor = layer(y.flatten(1).unsqueeze(1) if one else y.transpose(1, 2).flatten(2))
        return out
    return merge_kept(y, layer.weight, layer.bias, kept)
