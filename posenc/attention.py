"""Attention: causal multi-head attention with three seams.

    q, k, v = heads(x W_qkv)             (B, H, T, D) each
    q, k, v = conv(q, k, v)              seam 1: mix along time
    q, k    = encoding.rotate(q, k)      seam 2: position in q and k ..
    o       = softmax(scores) v                  .. and in the logits (encoding.scores)
    y       = sum_h gate_h o_h W_o       seam 3: the router weighs the heads

With every seam empty it is plain multi-head attention. Legend: B batch, T query length, S key
length, H heads, C embed_dim, D head dim = C/H.
"""

from typing import Literal, overload

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from posenc import fused
from posenc.cache import Cache, Placement, Stream, cache_dtype, check_cache, place
from posenc.checks import check_heads, check_positions
from posenc.convolution import DepthwiseConv
from posenc.core import attend, check_impl
from posenc.encodings.base import Encoding
from posenc.routing import Gates, MoH, weigh
from posenc.skipping import merge_kept, project_kept, projections_pay


class Attention(nn.Module):
    """Causal multi-head attention, (B, T, C) -> (B, T, C).

    Args:
        embed_dim: C.
        num_heads: H, must divide C.
        encoding: position in q, k or the logits; None is no encoding.
        conv: causal convolution of q, k and v before the encoding.
        router: weighs each head's output per token.
        bias: of both projections.
        dropout: of the attention weights, in training.
        impl: "auto", "reference", "sdpa" or "fused", see `posenc.core`.

    Raises:
        ValueError: for sizes that do not divide, a dropout outside [0, 1), or an impl that cannot
            run.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        encoding: Encoding | None = None,
        conv: DepthwiseConv | None = None,
        router: MoH | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.head_dim = check_heads(embed_dim, num_heads)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {dropout}.")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.dropout, self.impl = dropout, check_impl(impl)
        self.c_attn = nn.Linear(embed_dim, 3 * embed_dim, bias=bias)
        self.c_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.encoding = Encoding() if encoding is None else encoding
        self.conv = conv
        self.router = router
        self._check_parts()
        self.init_projections()

    def _check_parts(self) -> None:
        """Raise ValueError for a part of another kind or size: broadcasting would hide it."""
        parts = {"encoding": Encoding, "conv": DepthwiseConv, "router": MoH}
        for seam, kind in parts.items():
            part = getattr(self, seam)
            if part is not None and not isinstance(part, kind):
                raise ValueError(
                    f"{seam} must be a {kind.__name__} module; got {part!r}. "
                    "posenc.attention(NAME, ...) builds one by name."
                )
            for size in ("embed_dim", "num_heads", "head_dim"):
                expected, got = getattr(self, size), getattr(part, size, None)
                if got is not None and got != expected:
                    raise ValueError(
                        f"{seam} {type(part).__name__} was built for {size}={got}; "
                        f"the attention has {expected}. Build both for the same sizes."
                    )
        if self.impl == "fused":
            fused.check_case(None, self.dropout)
            if self.conv is not None and not self.conv.has_kernel:
                raise ValueError(
                    f"impl='fused' has no kernel for a convolution of kernel_size="
                    f"{self.conv.kernel_size}. {fused.REMEDY}"
                )
        if self.encoding.at_input:
            raise ValueError(
                f"{type(self.encoding).__name__} acts where tokens enter the model, not in "
                "attention. Add its embed(positions) to the token embedding once."
            )

    @torch.no_grad()
    def init_projections(self) -> None:
        """Initialise the projections as the encoding's source prescribes, where it does."""
        for projection in (self.c_attn, self.c_proj):
            self.encoding.init_projection(projection.weight)

    def reset_parts(self) -> None:
        """Draw the parameters of encoding, conv and router anew."""
        for part in (self.encoding, self.conv, self.router):
            if part is not None:
                part.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, those of the parts too (after materialising from `meta`)."""
        self.c_attn.reset_parameters()
        self.c_proj.reset_parameters()
        self.init_projections()
        self.reset_parts()

    def make_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Cache:
        """Empty state for up to `max_length` tokens.

        Args:
            device: the weights' if None.
            dtype: that in which k and v will come if None: autocast's where it is on, else the
                weights'.
        """
        # An adapter or a quantised layer in c_attn's place need not have a weight of its own.
        inside = (weight for part in (self.c_attn, self) for weight in part.parameters())
        weight = next((weight for weight in inside if weight.is_floating_point()), torch.empty(0))
        device = weight.device if device is None else torch.device(device)
        return Cache(
            batch_size,
            max_length,
            self.streams(),
            device=device,
            dtype=dtype or cache_dtype(weight),
        )

    def streams(self) -> dict[str, Stream]:
        """What decoding remembers of each token, by name."""
        heads = Stream((self.num_heads, self.head_dim))
        conv = {} if self.conv is None else self.conv.streams()
        return {"k": heads, "v": heads, **self.encoding.streams(), **conv}

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        return_aux: Literal[False] = False,
        phase: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        return_aux: Literal[True],
        phase: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        return_aux: bool = False,
        phase: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend causally over x, and over what `cache` holds before it.

        Args:
            x: (B, T, C).
            positions: integer (T,) or (B, T). None is 0 .. T-1, or what follows the cache. Negative
                entries in front of a row of a (B, T) tensor mark left padding: nothing sees those
                tokens, and their own output is arbitrary but finite. Documents packed into a row
                are not kept apart. Given positions cost a dense T x S mask or bias.
            cache: from `make_cache`; extended by the T tokens.
            return_aux: also return the router's balance loss, a scalar (0 without a router).
            phase: what a model computed once for all layers, for `SharedPhase`.

        Raises:
            ValueError: for wrong shapes, non-integer positions, a cache of another batch size or a
                full one.
        """
        if x.ndim != 3 or x.shape[-1] != self.embed_dim or x.shape[1] == 0:
            raise ValueError(
                f"x must have shape (B, T, {self.embed_dim}), T at least 1; got {tuple(x.shape)}."
            )
        batch, length, _ = x.shape
        given = positions is not None
        if given:
            positions = check_positions(positions, batch, length, x.device)
        if cache is not None:
            check_cache(cache, Cache)
            cache.check(self.streams(), batch, length)
            where = cache.place(positions, length)
        else:
            where = place(check_positions(positions, batch, length, x.device), given=given)
        here = None if where.real is None else where.real[:, -length:]  # (B, T)
        dropout_p = self.dropout if self.training else 0.0
        if self.impl == "fused":
            fused.check_case(where.real, dropout_p)

        router, gates, aux = self.router, None, None
        if router is not None and not router.reads_queries:
            gates, aux = _route(router, x, None, here)
        kept = gates if gates is not None and self._skips_projections(x, gates) else None
        q, k, v = self._project(x, kept)
        if self.conv is not None:
            convolve = self.conv.forward_fused if self.impl == "fused" else self.conv
            q, k, v = convolve(q, k, v, real=here, state=cache)
        # Before the rotation: it keeps the norms.
        if router is not None and router.reads_queries:
            gates, aux = _route(router, x, q, here)
        phase = x if phase is None else phase
        y = self._attend(q, k, v, gates, where, phase, cache, dropout_p)  # (B, H, T, D)
        if kept is None:
            y = self.c_proj(y.transpose(1, 2).flatten(2))
        else:
            y = merge_kept(y, self.c_proj.weight, self.c_proj.bias, kept)
        if cache is not None:
            cache.advance(length)
        if not return_aux:
            return y
        return y, x.new_zeros((), dtype=torch.float32) if aux is None else aux

    def _skips_projections(self, x: Tensor, gates: Gates) -> bool:
        """Whether q and y are projected for the kept heads alone, with the bare weights."""
        if self.impl != "auto" or self.conv is not None or not projections_pay(x, gates):
            return False
        if nn.modules.module._has_any_global_hook():
            return False
        return all(
            type(layer) is nn.Linear
            and type(layer.weight) is nn.Parameter
            and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
            for layer in (self.c_attn, self.c_proj)
        )

    def _project(self, x: Tensor, kept: Gates | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, H, T, D); with `kept`, the rows of q that it drops are 0."""
        # Apart before the heads are: the three gradients then meet again in one copy, not in two.
        if kept is None:
            parts = self.c_attn(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
            q, k, v = (z.transpose(1, 2) for z in parts)
            return q, k, v
        sizes, bias = (self.embed_dim, 2 * self.embed_dim), self.c_attn.bias
        for_q, for_kv = self.c_attn.weight.split(sizes)
        bias_q, bias_kv = (None, None) if bias is None else bias.split(sizes)
        pair = F.linear(x, for_kv, bias_kv)
        k, v = rearrange(pair, "b t (n h d) -> n b h t d", n=2, h=self.num_heads)
        return project_kept(x, for_q, bias_q, kept), k, v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates | None,
        where: Placement,
        x: Tensor,
        cache: Cache | None,
        dropout_p: float,
    ) -> Tensor:
        """Position in q, k and the logits, attention over the cached keys too, and the gates:
        (B, H, T, D).
        """
        rotate, state = self.encoding.rotate, cache
        if self.impl == "fused":
            # Gates that drop nothing only weigh what the kernels without gates give.
            drops = {} if gates is None or gates.kept == 1 else {"gates": gates}
            if cache is None:
                whole = self.encoding.attend_fused(q, k, v, where.positions, x, **drops)
                if whole is not None:
                    return whole if gates is None or drops else weigh(whole, gates.values)
            # Without state, for which a relative term would become a bias while decoding.
            rotate, state = self.encoding.rotate_fused, None
        q, k = rotate(q, k, where.positions, x, cache)
        if cache is not None:
            k, v = cache.append("k", k), cache.append("v", v)
        scores = self.encoding.scores(q, k, where.positions, where.keys, x, state)
        return attend(
            q,
            k,
            v,
            scores,
            gates=gates,
            real=where.real,
            dropout_p=dropout_p,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        sizes = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        return f"{sizes}, dropout={self.dropout}, impl={self.impl!r}"


def _route(router: MoH, x: Tensor, q: Tensor | None, real: Tensor | None) -> tuple[Gates, Tensor]:
    """The gates and the balance loss."""
    values, aux = router(x, q, real=real)
    return router.as_gates(values), aux
