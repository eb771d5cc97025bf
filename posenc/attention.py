"""Attention: multi-head attention with three seams.

    q, k, v = heads(x W_qkv)             q (B, H, T, D), k and v (B, G, T, D)
    q, k, v = conv(q, k, v)              seam 1: mix along time
    q, k    = norm(q), norm(k)           where asked
    q, k    = encoding.rotation(q, k)    seam 2: position in q and k ..
    o       = softmax(scores) v                  .. and in the logits (encoding.scores)
    y       = sum_h gate_h o_h W_o       seam 3: the router weighs the heads

With every seam empty it is plain multi-head attention. Legend: B batch, T query length, S key
length, H heads, G key heads (query head h reads key head h // (H/G)), C embed_dim, D head dim.
"""

from typing import Any, Literal, NamedTuple, NoReturn, overload

import torch
from torch import Tensor, nn

from posenc.backends import choice, reference
from posenc.backends.case import Case
from posenc.backends.mask import Mask
from posenc.backends.projections import from_heads, kept_rows, to_heads
from posenc.cache import Cache, Stream, cache_dtype, check_cache, check_no_segments, place_after
from posenc.checks import check_causal, check_heads, check_kv_heads, check_window
from posenc.convolution import DepthwiseConv
from posenc.encodings.base import Encoding
from posenc.errors import UnexpectedArgument
from posenc.errors import unknown as unknown_name
from posenc.placement import Placement, place
from posenc.routing.gates import Gates
from posenc.routing.moh import MoH


class Shared(NamedTuple):
    """What a model computes once a forward pass for all of its layers."""

    place: Placement
    phase: Tensor | None = None  # for encodings that read one


class Attention(nn.Module):
    """Multi-head attention, (B, T, C) -> (B, T, C), causal unless told otherwise.

    Args:
        embed_dim: C.
        num_heads: H.
        num_kv_heads: G, heads of k and v, must divide H; H if None.
        head_dim: D; C / H if None, which H must then divide.
        encoding: position in q, k or the logits; None is no encoding.
        conv: convolution of q, k and v before the encoding.
        router: weighs each head's output per token.
        qk_norm: None, or "rms": q and k over their root mean square (epsilon 1e-6) times a weight
            (D,) each, after the convolution and before the encoding.
        causal: a token sees what comes before it alone; else everything, and there is no cache.
        window: how many tokens of the row a token sees, itself and those before it (and as many
            after it, where not causal); None is all.
        bias: of both projections.
        dropout: of the attention weights, in training.
        impl: "auto", "reference", "sdpa" or "fused", see `posenc.backends.choice`.

    Raises:
        ValueError: for sizes that do not divide, parts built for others, a dropout outside [0, 1),
            a window below 1, or an impl that cannot run.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        encoding: Encoding | None = None,
        conv: DepthwiseConv | None = None,
        router: MoH | None = None,
        qk_norm: Literal["rms"] | None = None,
        causal: bool = True,
        window: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        head_dim = check_heads(embed_dim, num_heads, head_dim)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {dropout}.")
        if qk_norm not in (None, "rms"):
            raise ValueError(unknown_name("qk_norm", qk_norm, ("rms",)))
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.num_kv_heads = check_kv_heads(num_heads, num_kv_heads)
        self.causal, self.window = check_causal(causal), check_window(window)
        self.dropout, self.impl = dropout, choice.check_impl(impl, dropout, conv)
        inner = num_heads * head_dim
        self.c_attn = nn.Linear(embed_dim, inner + 2 * self.num_kv_heads * head_dim, bias=bias)
        self.c_proj = nn.Linear(inner, embed_dim, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.encoding = Encoding() if encoding is None else encoding
        self.conv = conv
        self.router = router
        self._check_parts()
        self.init_projections()

    def _check_parts(self) -> None:
        """Raise ValueError for a part of another kind or size: broadcasting would hide it."""
        parts = {"encoding": Encoding, "conv": DepthwiseConv, "router": MoH}
        sizes = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "causal")
        for seam, kind in parts.items():
            part = getattr(self, seam)
            if part is not None and not isinstance(part, kind):
                raise ValueError(
                    f"{seam} must be a {kind.__name__} module; got {part!r}. "
                    "posenc.attention(NAME, ...) builds one by name."
                )
            for size in sizes:
                expected, got = getattr(self, size), getattr(part, size, None)
                if got is not None and got != expected:
                    raise ValueError(
                        f"{seam} {type(part).__name__} was built for {size}={got}; "
                        f"the attention has {expected}. Build both alike, if it can be built so."
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
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()
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

        Raises:
            ValueError: where attention is not causal.
        """
        if not self.causal:
            raise ValueError(
                "attention with causal=False has no cache: later tokens change earlier outputs. "
                "Give the whole text at once."
            )
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
            window=self.window,
        )

    def streams(self) -> dict[str, Stream]:
        """What decoding remembers of each token, by name."""
        wide = Stream((self.num_kv_heads, self.head_dim * self.encoding.widening))
        heads = Stream((self.num_kv_heads, self.head_dim))
        conv = {} if self.conv is None else self.conv.streams()
        return {"k": wide, "v": heads, **self.encoding.streams(), **conv}

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        return_aux: Literal[False] = False,
        shared: Shared | None = None,
        **unknown: Any,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        return_aux: Literal[True],
        shared: Shared | None = None,
        **unknown: Any,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        return_aux: bool = False,
        shared: Shared | None = None,
        **unknown: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend over x, and over what `cache` holds before it.

        Args:
            x: (B, T, C).
            positions: integer (T,), (1, T) or (B, T), rising; with an encoding of A axes (T, A) or
                (B, T, A). None counts real tokens: from 0 in each document, or on from the cache.
                Negative entries of (B, T) are padding, as `mask` says it. Given positions cost a
                dense T x S bias with relative terms.
            mask: bool (B, T), True for real tokens of this call; padding may stand anywhere.
                Nothing sees padding, and its own output is arbitrary but finite.
            segments: integer (B, T), equal within a document, each in one piece: nothing crosses a
                boundary, so that a packed row equals its documents one by one. See
                `posenc.segments`.
            cache: from `make_cache`; extended by the T tokens.
            return_aux: also return the router's balance loss, a scalar (0 without a router).
            shared: what a model computed once for all layers; positions, mask and segments are then
                its own.

        Raises:
            ValueError: for wrong shapes or dtypes, positions that fall within a row, segments that
                come back or meet a cache, a cache of another batch size or a full one; for
                arguments that are not attention's.
        """
        if unknown or not isinstance(x, Tensor):
            refuse(unknown, x)
        self._check_input(x)
        if cache is not None:
            self._check_cache(cache, x, segments)
        if shared is None:
            shared = Shared(self._place(x, positions, mask, segments, cache))
        elif not (positions is mask is segments is None):
            raise ValueError("positions, mask and segments are placed in shared; give one of both.")
        case, aux, kept = self._case(x, shared, cache, self.impl)
        y = from_heads(choice.attend(case, self.impl), self.c_proj, kept)
        if cache is not None:
            cache.advance(x.shape[1])
        if not return_aux:
            return y
        return y, x.new_zeros((), dtype=torch.float32) if aux is None else aux

    def logits(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """What the softmax sees, by the definition: (B, H, T, T) in fp32 or better, -inf where
        hidden. Arguments and errors as those of `forward`; for looking at, as no back end but
        "reference" forms it.
        """
        self._check_input(x)
        shared = Shared(self._place(x, positions, mask, segments, None))
        case, _, _ = self._case(x, shared, None, "reference")
        return reference.logits(case.turned().repeated())

    def explain(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[str, dict[str, str]]:
        """What `impl="auto"` takes for this call, a module of `posenc.backends`, and why it passes
        over those before it in its list, by name. Arguments and errors as those of `forward`; the
        cache is not extended.
        """
        self._check_input(x)
        if cache is not None:
            self._check_cache(cache, x, segments)
        shared = Shared(self._place(x, positions, mask, segments, cache))
        case, _, _ = self._case(x, shared, cache, "auto")
        return choice.explain(case)

    def _case(
        self, x: Tensor, shared: Shared, cache: Cache | None, impl: str
    ) -> tuple[Case, Tensor | None, Gates | None]:
        """What a back end is asked for; the balance loss; the gates if only what they keep was
        projected.
        """
        where = shared.place if cache is None else shared.place.ending(cache.seen + x.shape[1])
        # Read once: a module finds each of its parts by a Python function.
        encoding, conv, router, q_norm = self.encoding, self.conv, self.router, self.q_norm
        described = x
        if encoding.reads_phase and shared.phase is not None:
            described = shared.phase
        gates = aux = kept = None
        if router is not None and not router.reads_queries:
            gates, aux = _route(router, x, None, where.here)
        if conv is None and gates is not None:
            kept = kept_rows(x, gates, [self.c_attn, self.c_proj], impl)
        q, k, v = to_heads(x, self.c_attn, self.num_heads, self.num_kv_heads, kept)
        if conv is not None:
            q, k, v = choice.convolve(conv, q, k, v, where, cache, impl)
        # Before norm and rotation: the rotation keeps the length of q, which the norm takes away.
        if router is not None and router.reads_queries:
            gates, aux = _route(router, x, q, where.here)
        if q_norm is not None and self.k_norm is not None:
            q, k = q_norm(q), self.k_norm(k)
        rotation = encoding.describe_rotation(where, described, cache)
        if cache is not None:
            if rotation is not None:  # cached keys have turned
                q, k = choice.turn(rotation, q, k, impl)
                rotation = None
            k, v = cache.append("k", k), cache.append("v", v)
        case = Case(
            q,
            k,
            v,
            Mask(where, causal=self.causal, window=self.window),
            rotation,
            encoding.scores(where, described, cache),
            gates,
            self.dropout if self.training else 0.0,
        )
        return case, aux, kept

    def _check_input(self, x: Tensor) -> None:
        """Raise ValueError for another shape."""
        fits = isinstance(x, Tensor) and x.ndim == 3 and x.shape[-1] == self.embed_dim
        if not fits or x.shape[1] == 0:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"x must have shape (B, T, {self.embed_dim}), T at least 1; got {got}."
            )

    def _place(
        self,
        x: Tensor,
        positions: Tensor | None,
        mask: Tensor | None,
        segments: Tensor | None,
        cache: Cache | None,
    ) -> Placement:
        """Where the tokens of x sit, after what `cache` holds."""
        batch, length, device = *x.shape[:2], x.device
        encoding = self.encoding
        axes, continuous = encoding.axes_count, encoding.continuous
        if cache is None:
            given = (positions, mask, segments)
            return place(batch, length, device, *given, axes=axes, continuous=continuous)
        return place_after(
            cache, batch, length, device, positions, mask, axes=axes, continuous=continuous
        )

    def _check_cache(self, cache: Cache, x: Tensor, segments: Tensor | None) -> None:
        """Raise ValueError for a cache that does not fit the call."""
        check_cache(cache, Cache)
        check_no_segments(segments)
        cache.check(self.streams(), *x.shape[:2])

    def extra_repr(self) -> str:
        sizes = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        if self.num_kv_heads != self.num_heads:
            sizes += f", num_kv_heads={self.num_kv_heads}"
        if self.num_heads * self.head_dim != self.embed_dim:
            sizes += f", head_dim={self.head_dim}"
        if not self.causal:
            sizes += ", causal=False"
        if self.window is not None:
            sizes += f", window={self.window}"
        return f"{sizes}, dropout={self.dropout}, impl={self.impl!r}"


def _route(router: MoH, x: Tensor, q: Tensor | None, real: Tensor | None) -> tuple[Gates, Tensor]:
    """The gates and the balance loss."""
    values, aux = router(x, q, real=real)
    return router.as_gates(values), aux


def refuse(arguments: dict[str, Any], x: object) -> NoReturn:
    """Raise for arguments that forward does not take, each of which means something elsewhere."""
    if not arguments:
        raise ValueError(f"x must be a tensor (B, T, C); got {type(x).__name__}.")
    raise UnexpectedArgument(
        f"Attention.forward takes no {', '.join(sorted(arguments))}; it takes x, positions, mask, "
        "segments, cache and return_aux. It is no layer of another library with that one's "
        "arguments: posenc.hf.swap(model, name) exchanges the position scheme of a Hugging Face "
        "model and keeps its attention; elsewhere turn q and k by encoding.rotate(q, k, positions)."
    )
