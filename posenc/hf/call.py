"""What takes the position scheme's place in one attention module, and one call of it."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from posenc.backends.mask import Mask
from posenc.cache import Stream
from posenc.encodings.base import Encoding
from posenc.fading import faded_logits
from posenc.hf.streams import State, check_own, layer_of, streams_of
from posenc.placement import Placement
from posenc.rotations import ByPhase, ByRates, BySteps, Rotation
from posenc.routing.gates import weigh
from posenc.routing.moh import MoH
from posenc.scores import add_per_head, added_logits

_STAMPS = itertools.count()
#: The stream of where keys stand.
POSITIONS = "positions"
#: Rotations that remember what they have summed up.
RUNNING = (ByRates, BySteps)


class Scheme(nn.Module):
    """The parts that act in place of a model's own position scheme, in one of its layers.

    Args:
        encoding: turns the first `width` features of q and k, or adds to the logits.
        router: weighs the heads' outputs, or None.
        num_heads, num_kv_heads: H and G of the layer.
        head_dim: D. width: features of them that the layer turns.
        interleaved: whether their pairs are to be put side by side first.
        turns: whether the layer says itself when it turns q and k: one that does not has no
            position, and is left so.
        causal: whether a token sees what comes before it alone.
    """

    def __init__(
        self,
        encoding: Encoding,
        router: MoH | None,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        width: int,
        interleaved: bool,
        turns: bool,
        causal: bool,
    ) -> None:
        super().__init__()
        self.encoding, self.router = encoding, router
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.width, self.interleaved = head_dim, width, interleaved
        self.turns, self.causal = turns, causal
        #: Tells the tokens of a cache that it has placed from those of another scheme.
        self.stamp = next(_STAMPS)
        kind = type(encoding)
        rotates_alone = kind.scores is Encoding.scores and kind.score_bias is Encoding.score_bias
        #: Whether it has to do with the logits; with those or the outputs.
        self.adds = not rotates_alone
        self.attends = self.adds or router is not None
        #: What it remembers of past tokens.
        self.streams = encoding.streams()
        if self.adds and encoding.reads_positions:
            self.streams[POSITIONS] = Stream((1,), torch.int64)
        #: Who counts the calls of a first try.
        self.asked: Asked | None = None
        #: The router's balance loss at the last call in training.
        self.aux: Tensor | None = None

    def parts(self) -> list[Any]:
        """What draws its parameters by itself."""
        return [part for part in (self.encoding, self.router) if part is not None]


class Asked:
    """What a layer asks of its scheme until `end`."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme, self.turned, self.attended = scheme, 0, 0
        scheme.asked = self

    def end(self) -> None:
        """Stop counting."""
        self.scheme.asked = None


class Call:
    """One call of a layer.

    Args:
        scheme: of the layer.
        x: its input (B, T, C).
        place: positions of its tokens.
        mask: what it was given to mask by: None, (B, S), (B, 1, T, S) of bool or numbers.
        cache, index: the model's cache, before the call, and the layer's place in it; or None.

    Attributes:
        turned: whether the layer has asked for q and k to be turned.
        apart: whether it asks for k first and for q later.
        asked: q before it turned, where a router reads it.
        before: tokens in the cache.
        visible, first: how many keys the queries meet, and which token the first of them is.
        fixed: whether the cache's shape is.
    """

    # Of the class: most calls leave them so, and a step is short.
    turned = apart = fixed = False
    asked: Tensor | None = None
    before: int | Tensor = 0
    first = 0
    state: State | None = None
    _rotation: Rotation | None = None
    _place: Placement | None = None

    def __init__(
        self, scheme: Scheme, x: Tensor, place: Placement, mask: Any, cache: Any, index: int
    ) -> None:
        self.scheme, self.x, self.mask, self._position = scheme, x, mask, place
        self.visible = x.shape[1]
        hook = vars(scheme.encoding).get("_hf_hook")
        if hook is not None and getattr(hook, "offload", False):
            raise ValueError(
                f"parameters of {type(scheme.encoding).__name__} are offloaded, and read outside a "
                "forward of their own; got a hook of accelerate. Keep the modules 'posenc' on a "
                "device."
            )
        if cache is None:
            return
        layer = layer_of(cache, index)
        check_own(layer, scheme.stamp)
        needed = scheme.streams
        if needed or scheme.attends:
            before = layer.get_seq_length()
            # A static layer counts on in place.
            self.before = before.clone() if isinstance(before, Tensor) else before
            self.visible, self.first = layer.get_mask_sizes(x.shape[1])
            self.fixed = isinstance(self.before, Tensor) or bool(layer.is_compileable)
            if self.fixed and layer.is_sliding:  # it moves its keys about: counted in rows
                needed = {name: one for name, one in needed.items() if name != POSITIONS}
            if needed:
                streams = streams_of(layer, needed, x, read=scheme.adds)
                self.state = State(streams, self.before, self.visible)

    # q and k

    def turn(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, T, D) and k (B, G, T, D), of which the first features turn."""
        turned = self._turn(q, k)
        assert turned[0] is not None
        assert turned[1] is not None
        return turned[0], turned[1]

    def turn_key(self, k: Tensor) -> Tensor:
        """k alone, of a layer that asks apart."""
        _, turned = self._turn(None, k)
        assert turned is not None
        return turned

    def turn_query(self, q: Tensor) -> Tensor:
        """q alone, after k."""
        turned, _ = self._turn(q, None)
        assert turned is not None
        return turned

    def _turn(self, q: Tensor | None, k: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        scheme, self.turned = self.scheme, True
        if scheme.asked is not None:
            scheme.asked.turned += 1
        self._check_heads(q, scheme.num_heads)
        self._check_heads(k, scheme.num_kv_heads)
        if scheme.router is not None and q is not None and q.shape[-1] == scheme.head_dim:
            self.asked = q  # of a part of it the norm says nothing; turned it is the same
        rotation = self._rotate_by()
        if rotation is None:
            return q, k
        width = scheme.width
        given = q if q is not None else k
        assert given is not None
        rest: list[Tensor | None] = [None, None]
        if given.shape[-1] > width:
            rest = [None if z is None else z[..., width:] for z in (q, k)]
            q, k = (None if z is None else z[..., :width] for z in (q, k))
        if scheme.interleaved:
            q, k = (None if z is None else halves(z) for z in (q, k))
        q, k = rotation.apply(q, k)
        q, k = (
            z if z is None or more is None else torch.cat((z, more), dim=-1)
            for z, more in zip((q, k), rest, strict=True)
        )
        return q, k

    def _rotate_by(self) -> Rotation | None:
        """The rotation, described once a call: what runs along the tokens is then remembered."""
        if self._rotation is None:
            encoding = self.scheme.encoding
            rotation = encoding.describe_rotation(self.place, self.x, self.state)  # type: ignore[arg-type]
            if isinstance(rotation, RUNNING):
                rotation = ByPhase(rotation.phases())
            self._rotation = rotation
        return self._rotation

    def _check_heads(self, x: Tensor | None, heads: int) -> None:
        if x is not None and x.shape[1] != heads:
            raise ValueError(
                f"the layer has {x.shape[1]} heads in q or k where its config says {heads}: this "
                "shape of attention cannot be swapped."
            )

    # where the tokens sit

    @property
    def place(self) -> Placement:
        """Positions, and which tokens are real where that counts."""
        if self._place is None:
            place = self._position
            if place.positions.device != self.x.device:  # of a layer on another device
                there = place
                place = there.once(
                    ("on", self.x.device),
                    lambda: Placement(there.positions.to(self.x.device), length=there.length),
                )
            if not self.scheme.encoding.reads_positions:
                place = Placement(
                    place.positions,
                    length=place.length,
                    real=self.real(),
                    segments=self.documents(),
                )
            self._place = place
        return self._place

    def documents(self) -> Tensor | None:
        """Which document each token belongs to, where there are several: (B, T)."""
        segments = self._position.segments
        if segments is None or self.state is not None:
            return None
        return segments.to(self.x.device).expand(len(self.x), -1)

    def real(self) -> Tensor | None:
        """Which tokens are not padding: (B, T) bool, or None for all; those whose own key the mask
        shows.
        """
        mask, length = self.mask, self.x.shape[1]
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise ValueError(
                "the scheme that was swapped in has to know padding; got a mask of "
                f"{type(mask).__name__}. Use model.set_attn_implementation('sdpa') or 'eager'."
            )
        if mask.ndim == 2:
            return mask[:, -length:].bool()
        own = self._at().expand(len(mask), length).unsqueeze(-1)
        shown = _shown(mask[:, 0].gather(-1, own).squeeze(-1))
        return shown.expand(len(self.x), length)

    def _at(self) -> Tensor:
        """Index of the queries among the visible keys: (T,)."""
        return torch.arange(self.x.shape[1], device=self.x.device) + (self.before - self.first)

    def _among_keys(self) -> Placement:
        """The queries among the visible keys."""
        length, at = self.x.shape[1], self._at()
        sizes: dict[str, Any] = {"length": length, "key_length": self.visible}
        if not self.scheme.encoding.reads_positions:  # in the order of the row
            sizes |= {"real": self.real(), "segments": self.documents()}
            if not self.fixed:
                return Placement(at, **sizes)
            return Placement(at, **sizes, keys=self._rows(), at=at)
        positions = self.place.positions.clamp(min=0)
        if self.state is not None and POSITIONS in self.scheme.streams:
            rows = positions.expand(len(self.x), length).unsqueeze(-1)
            keys = self.state.append(POSITIONS, rows).squeeze(-1)
            self.state.ragged |= positions.ndim == 2
            return Placement(positions, **sizes, keys=keys if self.state.ragged else keys[0], at=at)
        if self.visible == length:  # without a past, or one that slides in a fixed shape
            counted = positions.ndim == 1 and self._position.segments is None
            if counted and not self.fixed and self.scheme.encoding.relative:
                return Placement(at, **sizes)
            if not self.fixed:
                return Placement(positions, **sizes, keys=positions, at=at)
        shift = positions[..., -1:] - at[-1:]
        keys = (self._rows() + shift).clamp(min=0)
        return Placement((at + shift).clamp(min=0), **sizes, keys=keys, at=at)

    def _rows(self) -> Tensor:
        return torch.arange(self.visible, device=self.x.device)

    # the logits and the outputs

    def attend(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        scaling: float | None,
        **more: Any,
    ) -> tuple[Tensor, Any]:
        """What the attention function makes of q (B, H, T, D) and all keys, with the scheme's terms
        in the logits and its gates on the outputs: (B, T, H, D), and the weights or None.
        """
        q, mask, scaling = self.scored(q, k, mask, scaling)
        y, weights = function(module, q, k, v, mask, scaling=scaling, **more)
        if self.scheme.router is not None:
            y = self.weighed(y.transpose(1, 2), q).transpose(1, 2)
        return y, weights

    def scored(
        self, q: Tensor, k: Tensor, mask: Any, scaling: float | None
    ) -> tuple[Tensor, Any, float]:
        """q, the mask and the scale with which plain attention has the scheme's logits."""
        if self.scheme.asked is not None:
            self.scheme.asked.attended += 1
        encoding, head_dim = self.scheme.encoding, self.scheme.head_dim
        scaling = head_dim**-0.5 if scaling is None else scaling
        if self.scheme.turns and not self.turned:
            return q, mask, scaling  # a layer without positions
        place = self._among_keys()
        scores = encoding.scores(place, self.x, self.state)  # type: ignore[arg-type]
        if scores.scale is not None:  # beside the usual one, as the model's own may be
            scaling = scaling * scores.scale * head_dim**0.5
        if scores.plain:
            return add_per_head(q, scores.content), mask, scaling
        scores = scores._replace(scale=scaling)
        if scores.reflections is not None and self.fixed and q.shape[-2] > 1:
            raise ValueError(
                f"{type(encoding).__name__} takes several tokens at once beside a cache that "
                "grows; got a static one. Use a DynamicCache."
            )
        shown = self._seen(mask, place)
        if scores.fading is not None:  # no function of the products: it takes their place
            added = scaling * faded_logits(q, k, scores.fading, place)
            q = torch.zeros_like(q)
        else:
            term = added_logits(q, k, scores, scaling, lambda: shown)
            assert term is not None
            added, q = term, add_per_head(q, scores.content)
        # In bf16 a bias loses its distances above 256; torch takes an fp32 one on CPU alone.
        precise = torch.promote_types(q.dtype, torch.float32)
        added = added.to(precise if q.device.type == "cpu" else q.dtype)
        if mask is not None and mask.dtype != torch.bool:  # what it adds to the logits counts too
            added = added + mask[..., : self.visible].to(added.dtype)
        return q, added.masked_fill(~shown, torch.finfo(added.dtype).min), scaling

    def _seen(self, mask: Any, place: Placement) -> Tensor:
        """Which keys a query sees, as the mask has it: broadcastable to (B, 1, T, S)."""
        if mask is None:
            return Mask(place, causal=self.scheme.causal).whole()
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise ValueError(
                f"{type(self.scheme.encoding).__name__} adds to the logits; got a mask of "
                "another attention function. Use model.set_attn_implementation('sdpa') or 'eager'."
            )
        return _shown(mask[..., : self.visible])

    def weighed(self, y: Tensor, q: Tensor) -> Tensor:
        """y (B, H, T, D) times the router's gates."""
        router = self.scheme.router
        assert router is not None
        read = None
        if router.reads_queries:
            read = q if self.asked is None else self.asked
        values, aux = router(self.x, read, real=self.real())
        self.scheme.aux = aux if self.scheme.training else None
        return weigh(y, router.as_gates(values).values)


def _shown(mask: Tensor) -> Tensor:
    """True where a mask of bool or of numbers shows a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def halves(x: Tensor) -> Tensor:
    """Interleaved pairs (.., R) in half-split order."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
