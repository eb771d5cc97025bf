"""MoH: mixture-of-head attention (arXiv 2410.11842).

    y[t] = sum_h g[h, t] o[h, t] W_O[h]         o: outputs of heads; the first hs shared, E routed
    a = softmax(W_h x),  s = softmax(W_s x) over hs,  p = softmax(W_r x) over all E
    M = one-hot of the K largest p
    "paper"     shared g = a0 s            routed g = a1 p M                        (Eq. 5, 6)
    "authors"   shared g = 2 a0 hs s       routed g = 2 a1 K p M / sum(p M)         (released code)
    balance     aux = sum over routed i of P_i f_i  (option "authors": times E)
                P_i: mean over tokens of p_i,  f_i: fraction of tokens that select i

The two scalings are different models: with zero routers every active gate is 1 under "authors" but
0.5/hs and 0.5/E under "paper". A lone group has no W_h: g = K p M / sum(p M) or hs s under
"authors", p M or s under "paper"; hs = 1 has no W_s.

`router="query_norm"` retrofits trained attention without parameters: shared gates 1, routed heads
scored by ||q_i|| / std over the routed heads, gate 0 or 1, with the gradient of the softmax
(straight through).

The gates read x_t only, so there is no decoding state; k and v of every head are cached, as a later
token may select any. The balance loss is returned to the caller: kept in a class attribute, as
released, it breaks under recomputation.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from posenc.autocast import no_autocast
from posenc.errors import unknown
from posenc.linear import is_plain
from posenc.routing.gates import Gates
from posenc.start import Start, draw

#: Never zero: tied scores would send every token to the same heads.
ROUTER_STD = 0.02
AUX_WEIGHT = 0.01  # of the balance loss, in the paper


def select(scores: Tensor, top_k: int) -> Tensor:
    """One-hot of the K largest along the last dimension; of tied scores, some K."""
    return torch.zeros_like(scores).scatter(-1, scores.topk(top_k, dim=-1).indices, 1.0)


def balance_loss(p: Tensor, selected: Tensor, real: Tensor | None = None) -> Tensor:
    """sum_i P_i f_i over the routed heads: K/E at balance, up to 1 when K heads take everything.

    Args:
        p, selected: (B, T, E), router probabilities and their one-hot selection.
        real: (B, T) bool, the tokens that count; None is all.
    """
    if real is None:
        return (p.mean((0, 1)) * selected.mean((0, 1))).sum()
    weight = real.unsqueeze(-1).to(p.dtype) / real.sum().clamp(min=1)
    return ((p * weight).sum((0, 1)) * (selected * weight).sum((0, 1))).sum()


class MoH(nn.Module):
    """Weighs each head's output per token; all but `shared + top_k` heads get weight 0.

    Args:
        embed_dim: C.
        num_heads: H.
        shared: hs, heads that every token uses; the first ones.
        top_k: K, routed heads that each token selects of the other E = H - hs.
        scaling: "authors" (released code) or "paper" (Eq. 5). Ignored by router="query_norm".
        router: "linear" or "query_norm".
        aux_scale: "paper" (sum P f) or "authors" (E sum P f).

    Raises:
        ValueError: for a split that is impossible, or K = 1 with the authors' scaling, whose router
            gets no gradient.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        shared: int,
        top_k: int,
        scaling: Literal["authors", "paper"] = "authors",
        router: Literal["linear", "query_norm"] = "linear",
        aux_scale: Literal["paper", "authors"] = "paper",
    ) -> None:
        super().__init__()
        for what, value, known in (
            ("MoH scaling", scaling, ("authors", "paper")),
            ("MoH router", router, ("linear", "query_norm")),
            ("MoH aux_scale", aux_scale, ("paper", "authors")),
        ):
            if value not in known:
                raise ValueError(unknown(what, value, known))
        routed = num_heads - shared
        if not 0 <= shared <= num_heads:
            raise ValueError(f"shared must lie between 0 and num_heads={num_heads}; got {shared}.")
        if not (1 <= top_k <= routed or top_k == routed == 0):
            raise ValueError(
                f"top_k must lie between 1 and the {routed} routed heads "
                f"(num_heads={num_heads} less shared={shared}); "
                f"got {top_k}. top_k=0 needs shared=num_heads."
            )
        linear = router == "linear"
        if linear and scaling == "authors" and top_k == 1:
            raise ValueError(
                "top_k=1 with scaling='authors' gives the router no gradient: "
                "its renormalised gate is always 1. "
                "Use scaling='paper' or top_k of at least 2."
            )
        if not linear and routed == 1:
            raise ValueError(
                "router='query_norm' needs at least 2 routed heads, whose norms it compares; got 1."
            )
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.shared, self.routed, self.top_k = shared, routed, top_k
        self.scaling, self.router, self.aux_scale = scaling, router, aux_scale
        self.W_s = nn.Linear(embed_dim, shared, bias=False) if linear and shared > 1 else None
        self.W_r = nn.Linear(embed_dim, routed, bias=False) if linear and routed else None
        self.W_h = nn.Linear(embed_dim, 2, bias=False) if linear and shared and routed else None
        for layer in self._layers():
            Start(layer, ROUTER_STD)
        self.reset_parameters()

    def _layers(self) -> list[nn.Linear]:
        return [layer for layer in (self.W_s, self.W_r, self.W_h) if layer is not None]

    @property
    def reads_queries(self) -> bool:
        """Whether the gates depend on q, else on x alone."""
        return self.router == "query_norm"

    def as_gates(self, values: Tensor) -> Gates:
        """What `forward` returned, with what is known of it beforehand."""
        straight_through = self.reads_queries and self.routed > 0
        return Gates(values, self.shared, self.shared + self.top_k, straight_through)

    def reset_parameters(self) -> None:
        for layer in self._layers():
            draw(layer, ROUTER_STD)

    def forward(
        self, x: Tensor, q: Tensor | None = None, *, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The gates (B, H, T), and the balance loss.

        Args:
            x: (B, T, C), the attention's input.
            q: (B, H, T, D), its queries; None where `reads_queries` is False.
            real: (B, T) bool, the tokens that the balance loss counts.
        """
        with no_autocast(x.device):
            gates, p, selected = self._query_norm(x, q) if self.reads_queries else self._linear(x)
            if not self.routed:
                return gates.transpose(1, 2), gates.new_zeros(())
            aux = balance_loss(p, selected, real)
            return gates.transpose(1, 2), aux * (self.routed if self.aux_scale == "authors" else 1)

    def probabilities(self, x: Tensor, q: Tensor | None) -> Tensor:
        """p (B, T, E), of which a token selects the K largest; x and q as in `forward`.

        Raises:
            ValueError: for q=None where `reads_queries` is True.
        """
        with no_autocast(x.device):
            if self.W_r is not None:
                return _softmax(self.W_r, x)
            if self.reads_queries and q is None:
                raise ValueError("router='query_norm' scores heads by their queries; got q=None.")
            if q is None or not self.routed:
                return _precise(x.detach()[..., :0])
            routed = _precise(q)[:, self.shared :]
            # The norm of a zero query has no gradient: its square root is kept off 0.
            norms = routed.square().sum(-1).clamp(min=1e-24).sqrt().transpose(1, 2)  # (B, T, E)
            return torch.softmax(norms / norms.std(-1, keepdim=True).clamp(min=1e-6), dim=-1)

    def _linear(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates (B, T, H), router probabilities and selection (B, T, E)."""
        authors = self.scaling == "authors"
        a = _softmax(self.W_h, x) * (2 if authors else 1) if self.W_h is not None else None
        groups = []
        if self.shared:
            s = (
                _softmax(self.W_s, x)
                if self.W_s is not None
                else torch.ones_like(_precise(x[..., :1]))
            )
            s = s * self.shared if authors else s
            groups.append(s if a is None else s * a[..., :1])
        p = self.probabilities(x, None)
        selected = select(p, self.top_k)
        if self.routed:
            routed = p * selected
            if authors:
                routed = routed * (self.top_k / routed.sum(-1, keepdim=True))
            groups.append(routed if a is None else routed * a[..., 1:])
        return torch.cat(groups, dim=-1), p, selected

    def _query_norm(self, x: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        p = self.probabilities(x, q)
        selected = select(p, self.top_k)
        # These brackets: (selected + p) - p is off by one rounding, and all heads on would not be
        # bit for bit MHA.
        gates = selected + (p - p.detach())
        ones = p.new_ones(*p.shape[:2], self.shared)
        return torch.cat((ones, gates), dim=-1), p, selected

    def extra_repr(self) -> str:
        return (
            f"shared={self.shared}, routed={self.routed}, top_k={self.top_k}, "
            f"scaling={self.scaling!r}, router={self.router!r}, aux_scale={self.aux_scale!r}"
        )


def _precise(x: Tensor) -> Tensor:
    """x in fp32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _softmax(layer: nn.Linear, x: Tensor) -> Tensor:
    """In fp32 or better."""
    if is_plain(layer):
        return torch.softmax(_precise(x) @ _precise(layer.weight).T, dim=-1)
    # What took its place multiplies as it does, but as precisely: an adapter that adds nothing to a
    # bf16 layer must not send tokens to other heads.
    raised = {
        name: _precise(parameter)
        for name, parameter in layer.named_parameters()
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4
    }
    return torch.softmax(_precise(functional_call(layer, raised, (_precise(x),))), dim=-1)
