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
from torch import Tensor, nn

from posenc.backends import choice
from posenc.backends.case import Case
from posenc.backends.mask import Mask
from posenc.backends.projections import from_heads, kept_rows, to_heads
from posenc.cache import Cache, Stream, cache_dtype, check_cache
from posenc.checks import check_heads, check_positions
from posenc.convolution import DepthwiseConv
from posenc.encodings.base import Encoding
from posenc.placement import Placement, place
from posenc.routing.gates import Gates
from posenc.routing.moh import MoH


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
        impl: "auto", "reference", "sdpa" or "fused", see `posenc.backends.choice`.

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
        self.dropout, self.impl = dropout, choice.check_impl(impl, dropout, conv)
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
        weight = self.c_attn.weight
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
        where: Placement | None = None,
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
        where: Placement | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        return_aux: bool = False,
        phase: Tensor | None = None,
        where: Placement | None = None,
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
            where: placed by a model once for all layers; `positions` are then its own.

        Raises:
            ValueError: for wrong shapes, non-integer positions, a cache of another batch size or a
                full one.
        """
        if x.ndim != 3 or x.shape[-1] != self.embed_dim or x.shape[1] == 0:
            raise ValueError(
                f"x must have shape (B, T, {self.embed_dim}), T at least 1; got {tuple(x.shape)}."
            )
        where = self._place(x, positions, cache) if where is None else where
        if cache is not None:
            check_cache(cache, Cache)
            cache.check(self.streams(), *x.shape[:2])
            where = where.ending(cache.seen + x.shape[1])
        dropout_p = self.dropout if self.training else 0.0

        router, gates, aux = self.router, None, None
        if router is not None and not router.reads_queries:
            gates, aux = _route(router, x, None, where.here)
        plain = self.conv is None
        kept = kept_rows(x, gates, [self.c_attn, self.c_proj], self.impl) if plain else None
        q, k, v = to_heads(x, self.c_attn, self.num_heads, self.num_heads, kept)
        if self.conv is not None:
            q, k, v = choice.convolve(self.conv, q, k, v, where, cache, self.impl)
        # Before the rotation: it keeps the norms.
        if router is not None and router.reads_queries:
            gates, aux = _route(router, x, q, where.here)
        described = x if phase is None else phase
        rotation = self.encoding.describe_rotation(where, described, cache)
        if cache is not None:
            if rotation is not None:  # cached keys have turned
                q, k = choice.turn(rotation, q, k, self.impl)
                rotation = None
            k, v = cache.append("k", k), cache.append("v", v)
        scores = self.encoding.scores(where, described, cache)
        mask = Mask(where)
        case = Case(q, k, v, mask, rotation, scores, gates, dropout_p)
        y = from_heads(choice.attend(case, self.impl), self.c_proj, kept)
        if cache is not None:
            cache.advance(x.shape[1])
        if not return_aux:
            return y
        return y, x.new_zeros((), dtype=torch.float32) if aux is None else aux

    def _place(self, x: Tensor, positions: Tensor | None, cache: Cache | None) -> Placement:
        """Where the tokens of x sit, after what `cache` holds."""
        batch, length, device = *x.shape[:2], x.device
        if cache is None:
            return place(batch, length, device, positions=positions)
        check_cache(cache, Cache)
        if positions is not None:
            positions = check_positions(positions, batch, length, device)
        cache.check(self.streams(), batch, length)
        return cache.place(positions, length)

    def extra_repr(self) -> str:
        sizes = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        return f"{sizes}, dropout={self.dropout}, impl={self.impl!r}"


def _route(router: MoH, x: Tensor, q: Tensor | None, real: Tensor | None) -> tuple[Gates, Tensor]:
    """The gates and the balance loss."""
    values, aux = router(x, q, real=real)
    return router.as_gates(values), aux
