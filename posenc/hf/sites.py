"""Where position enters a Hugging Face attention module, and how a scheme of ours takes its place.

A module is known by what its `forward` does, not by the name of its class:

    pairwise   calls apply_rotary..(q, k, cos, sin)                 Llama and most others
    singly     calls apply_rotary..(x, sin, cos) for q and k apart  GPT-J, CodeGen
    absent     turns nothing, and reads c_attn of a model whose table of positions is at the input
                                                                    GPT-2

Its class is exchanged for a subclass whose forward is the same code with other globals: the
function that turns, and the table of attention functions. Projections, norms, caches, masks and
whatever else the code does stay the model's own.
"""

import inspect
import types
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posenc.hf.call import Call, Scheme
from posenc.hf.classes import Made, make
from posenc.placement import Placement

TURN, TABLE = "apply_rotary", "ALL_ATTENTION_FUNCTIONS"
#: Where keys may come from, each head's own.
PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value", "c_attn")
#: Names of the cache among the arguments of a forward.
CACHES = ("past_key_values", "layer_past", "past_key_value")


class Site(NamedTuple):
    """What is known of one class of attention modules."""

    kind: str  # pairwise, singly or absent
    forward: Any  # the function
    arguments: tuple[str, ...]  # of forward, without self
    turn: str | None  # the global that turns q and k
    table: bool  # whether its forward looks its attention function up

    @property
    def original(self) -> Callable[..., Any]:
        """The model's own function that turns q and k."""
        assert self.turn is not None
        found: Callable[..., Any] = self.forward.__globals__[self.turn]
        return found


def is_attention(module: nn.Module) -> bool:
    """Whether a module looks like attention."""
    kind: Any = original_class(module)
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    turns = code is not None and any(name.startswith(TURN) for name in code.co_names)
    return turns or hasattr(module, "is_causal") or kind.__name__.endswith("Attention")


def site_of(module: nn.Module) -> Site | str:
    """The site, or why there is none."""
    if "forward" in vars(module):
        return "its forward has been wrapped (by accelerate's hooks, or a quantiser): swap first"
    if getattr(module, "is_cross_attention", False):
        return "it attends to another sequence"
    if not any(hasattr(module, name) for name in PROJECTIONS):
        return f"its keys come from no projection {', '.join(PROJECTIONS)}"
    site = _site(original_class(module))
    if isinstance(site, Site) and site.kind == "absent" and not hasattr(module, "c_attn"):
        return "its forward calls no apply_rotary.. function, and it is not GPT-2's"
    return site


def _site(kind: Any) -> Site | str:
    """What the code of a class tells."""
    forward = inspect.unwrap(kind.forward)
    if not isinstance(forward, types.FunctionType):
        return "its forward is no Python function"
    code = forward.__code__
    arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    table = TABLE in code.co_names
    names = [name for name in code.co_names if name.startswith(TURN)]
    if not any(name in arguments for name in CACHES):
        return f"its forward takes no cache {', '.join(CACHES)}"
    if not names and table:
        return Site("absent", forward, arguments, None, table)
    if not names:
        return "its forward calls no apply_rotary.. function"
    if len(names) > 1:
        return f"its forward turns by several functions: {', '.join(names)}"
    taken = list(inspect.signature(forward.__globals__[names[0]]).parameters)
    if taken[:4] == ["q", "k", "cos", "sin"] and "position_embeddings" in arguments:
        return Site("pairwise", forward, arguments, names[0], table)
    if len(taken) == 3 and taken[1:] == ["sin", "cos"] and hasattr(kind, "_attn"):
        return Site("singly", forward, arguments, names[0], table)
    return f"its {names[0]}({', '.join(taken)}) is of no known shape"


_CLASSES: dict[type, type] = {}


class Swapped(Made):
    """A module of attention with a scheme of ours in it."""

    posenc: Scheme


def swapped_class(kind: type) -> type:
    """The class of such modules."""
    if kind not in _CLASSES:
        site = _site(kind)
        assert isinstance(site, Site)
        made = {"pairwise": _pairwise, "singly": _singly, "absent": _absent}[site.kind](site, kind)
        _CLASSES[kind] = make((Swapped, kind), swapped_class, made)
    return _CLASSES[kind]


def exchange(module: nn.Module, scheme: Scheme) -> None:
    """Put the scheme into the module."""
    module.__class__ = swapped_class(original_class(module))
    module.posenc = scheme


def restore(module: nn.Module) -> None:
    """Undo `exchange`."""
    module.__class__ = original_class(module)
    del module.posenc


def original_class(module: nn.Module) -> type:
    """The module's class before `exchange`."""
    return type(module).made_of if isinstance(module, Swapped) else type(module)


def _run(site: Site, **replaced: Any) -> Callable[..., Any]:
    """The module's forward with other globals."""
    original = site.forward
    # Without a module's name: a compiler would look the globals up in that module.
    known = {name: value for name, value in original.__globals__.items() if name != "__name__"}
    run = types.FunctionType(
        original.__code__,
        {**known, **replaced},
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )
    run.__kwdefaults__ = original.__kwdefaults__
    return run


def _cache_name(site: Site) -> str:
    return next(name for name in CACHES if name in site.arguments)


def _pairwise(site: Site, kind: type) -> dict[str, Any]:
    names, cache = site.arguments, _cache_name(site)
    assert site.turn is not None
    plain = _run(site, **{site.turn: _turn})
    table = {TABLE: _Table(site.forward.__globals__[TABLE])} if site.table else {}
    whole = _run(site, **{site.turn: _turn}, **table)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        place, _ = given["position_embeddings"]
        call = Call(
            self.posenc,
            given["hidden_states"],
            place,
            given.get("attention_mask"),
            given.get(cache),
            self.layer_idx,
        )
        given["position_embeddings"] = (call, None)
        if not self.posenc.attends:
            return plain(self, **given)
        return whole(self, **given, posenc_call=call)

    return {"forward": forward}


def _turn(
    q: Tensor, k: Tensor, cos: Call, sin: None, *, position_ids: Any = None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """In place of apply_rotary..(q, k, cos, sin)."""
    if unsqueeze_dim == 1:
        return cos.turn(q, k)
    q, k = cos.turn(q.transpose(1, 2), k.transpose(1, 2))
    return q.transpose(1, 2), k.transpose(1, 2)


class _Table:
    """A table of attention functions, each with the scheme's terms and gates around it."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return partial(_attend, self.table.get_interface(name, default))


def _attend(
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    posenc_call: Call,
    scaling: float | None = None,
    **more: Any,
) -> Any:
    if posenc_call.apart:
        query = posenc_call.turn_query(query)
    asked = (query, key, value, attention_mask)
    return posenc_call.attend(function, module, *asked, scaling, **more)


class _Turning:
    """A cache that turns keys before it takes them; without one they are turned alone."""

    def __init__(self, call: Call, cache: Any) -> None:
        self.call, self.cache = call, cache

    def update(self, k: Tensor, v: Tensor, index: int, *more: Any, **named: Any) -> Any:
        k = self.call.turn_key(k)
        return (k, v) if self.cache is None else self.cache.update(k, v, index, *more, **named)


def _apart(self: Any, site: Site, given: dict[str, Any]) -> Call:
    """The call of a module that turns keys on their way to the cache, which is changed for it."""
    name, x = _cache_name(site), given["hidden_states"]
    cache, ids = given.get(name), given.get("position_ids")
    if given.get("encoder_hidden_states") is not None:
        raise ValueError("a swapped module takes no encoder_hidden_states; got some.")
    if ids is None:
        before = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        ids = torch.arange(x.shape[1], device=x.device).unsqueeze(0) + before
    call = Call(self.posenc, x, place_of(ids), given.get("attention_mask"), cache, self.layer_idx)
    call.apart = True
    given[name] = _Turning(call, cache)
    return call


def _singly(site: Site, kind: Any) -> dict[str, Any]:
    names = site.arguments
    assert site.turn is not None
    run = _run(site, **{site.turn: lambda x, sin, cos: x})

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        call = _apart(self, site, given)
        given["attention_mask"] = (call, given.get("attention_mask"))
        return run(self, **given)

    def _attn(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
    ) -> Any:
        call, mask = attention_mask
        query = call.turn_query(query)
        scale = float(self.scale_attn)  # what the products are divided by
        query, mask, scaling = call.scored(query, key, mask, 1 / scale)
        y, weights = kind._attn(self, query * (scaling * scale), key, value, mask)
        return (y if self.posenc.router is None else call.weighed(y, query)), weights

    return {"forward": forward, "_attn": _attn}


def _absent(site: Site, kind: type) -> dict[str, Any]:
    names = site.arguments
    run = _run(site, **{TABLE: _Table(site.forward.__globals__[TABLE])})

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        call = _apart(self, site, given)
        return run(self, **given, posenc_call=call)

    return {"forward": forward}


def place_of(position_ids: Tensor) -> Placement:
    """The placement of positions (B, T) or (1, T).

    Where they do not count on a document ends, as transformers' masks have it: looked at once a
    forward pass, not under a compiler.
    """
    if position_ids.ndim != 2:
        raise ValueError(
            f"a swapped model takes position_ids (B, T); got {tuple(position_ids.shape)}."
        )
    positions = position_ids[0] if position_ids.shape[0] == 1 else position_ids
    length = position_ids.shape[1]
    return Placement(positions, length=length, segments=documents(position_ids))


def documents(position_ids: Tensor) -> Tensor | None:
    """Which document a token belongs to, where positions (B, T) do not count on; None: in one."""
    if position_ids.shape[1] == 1 or torch.compiler.is_compiling():
        return None
    breaks = position_ids.diff(dim=-1) != 1
    return F.pad(breaks.long().cumsum(-1), (1, 0)) if bool(breaks.any()) else None


class Places(nn.Module):
    """In place of a model's rotary embedding: one placement a forward pass, for all layers.

    A layer's cosines and sines are made of it, once for all layers that turn alike.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = (original,)  # in a tuple: it is no part of the model any more

    def forward(
        self, x: Tensor, position_ids: Tensor | None = None, layer_type: str | None = None
    ) -> tuple[Placement, None]:
        if position_ids is None:
            raise ValueError("a swapped model takes position_ids (B, T); got None.")
        return place_of(position_ids), None


class NoTable(nn.Module):
    """In place of a table of positions at a model's input: it adds nothing."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)
