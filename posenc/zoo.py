"""The zoo: every named attention as one readable row, and the two functions that build from it.

A row fills the seams of `Attention`. A new method is its file, a row here, and an oracle in the
tests.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from posenc.attention import Attention
from posenc.checks import check_heads, check_kv_heads
from posenc.convolution import DepthwiseConv
from posenc.encodings.alibi import ALiBi
from posenc.encodings.base import Encoding
from posenc.encodings.carope import CARoPE, SharedPhase
from posenc.encodings.cope import CoPE
from posenc.encodings.fire import FIRE
from posenc.encodings.fope import FoPE
from posenc.encodings.fox import FoX
from posenc.encodings.grape import GRAPE
from posenc.encodings.kerple import Kerple
from posenc.encodings.learned import Learned
from posenc.encodings.nope import NoPE
from posenc.encodings.path import PaTH
from posenc.encodings.polar import Polar
from posenc.encodings.pope import PoPE
from posenc.encodings.relative import Relative
from posenc.encodings.rope import RoPE
from posenc.encodings.selective import SelectiveRoPE
from posenc.encodings.sinusoidal import Sinusoidal
from posenc.encodings.t5 import T5
from posenc.encodings.xpos import XPos
from posenc.errors import unknown
from posenc.routing.moh import MoH


def default_moh(num_heads: int, shared: int | None = None) -> dict[str, Any]:
    """75% of the heads active: a third shared (down, at least one), at least two more routed to."""
    if num_heads < 4:
        raise ValueError(
            f"moh needs at least 4 heads for its default split; got {num_heads}. "
            "Use more heads, or give both shared and top_k."
        )
    shared = max(1, num_heads // 3) if shared is None else shared
    if shared == num_heads:
        return {"shared": shared, "top_k": 0}
    active = (3 * num_heads + 2) // 4  # to the nearest
    return {"shared": shared, "top_k": max(2, active - shared)}


@dataclass(frozen=True)
class Recipe:
    """One row: what fills each seam, the paper, and where it acts. Parts are (class, defaults)."""

    paper: str
    acts: str
    summary: str
    encoding: type[Encoding] = NoPE
    embedding: type[Encoding] | None = None
    conv: Mapping[str, Any] | None = None
    router: Callable[..., dict[str, Any]] | None = None
    encoding_defaults: Mapping[str, Any] = field(default_factory=dict)


#: Encodings inside attention that an `encoding=` option can name, and those at the input.
ENCODINGS: dict[str, type[Encoding]] = {
    "nope": NoPE,
    "rope": RoPE,
    "carope": CARoPE,
    "polar": Polar,
    "relative": Relative,
    "alibi": ALiBi,
    "t5": T5,
    "kerple": Kerple,
    "fire": FIRE,
    "fox": FoX,
    "cope": CoPE,
    "xpos": XPos,
    "pope": PoPE,
    "selective": SelectiveRoPE,
    "grape": GRAPE,
    "path": PaTH,
    "fope": FoPE,
}
EMBEDDINGS: dict[str, type[Encoding]] = {"learned": Learned, "sinusoidal": Sinusoidal}
#: Beside a GPT's embeddings of std 0.02 this is the original's ratio of position to token.
EMBEDDING_DEFAULTS: dict[type[Encoding], dict[str, Any]] = {Sinusoidal: {"scale": 0.02}}

ZOO: dict[str, Recipe] = {
    "mha": Recipe(
        paper="GPT-2",
        acts="input",
        summary="plain attention; in GPT a learned table of positions added at the input",
        embedding=Learned,
    ),
    "sinusoidal": Recipe(
        paper="1706.03762",
        acts="input",
        summary="plain attention; in GPT a fixed table of sines added at the input",
        embedding=Sinusoidal,
    ),
    "nope": Recipe(
        paper="2305.19466",
        acts="nowhere",
        summary="no encoding: order comes from the causal mask alone",
    ),
    "rope": Recipe(
        paper="2104.09864",
        acts="q, k",
        summary="rotation of q and k by the position",
        encoding=RoPE,
    ),
    "carope": Recipe(
        paper="2507.23083",
        acts="q, k",
        summary="rotation by a running phase whose rate each token sets, per head",
        encoding=CARoPE,
    ),
    "cmha": Recipe(
        paper="2505.10222",
        acts="q, k",
        summary="RoPE plus a learned multiple of each pair's own angle (ComplexFormer)",
        encoding=Polar,
    ),
    "rmha": Recipe(
        paper="1901.02860",
        acts="logits",
        summary="Transformer-XL: the query meets a projected sinusoid of the distance",
        encoding=Relative,
        encoding_defaults={"kind": "sinusoidal", "max_distance": 1024},
    ),
    "mdha": Recipe(
        paper="2109.08668",
        acts="q, k, v",
        summary="Primer's causal convolution of q, k and v, one kernel for each head and channel",
        conv={"per_head": True, "bias": False, "init": "primer"},
    ),
    "rcmha": Recipe(
        paper="2308.03429",
        acts="q, k, v; logits",
        summary="learned relative scores over convolved q, k and v",
        encoding=Relative,
        encoding_defaults={"kind": "learned", "max_distance": 1024},
        conv={},
    ),
    "moh": Recipe(
        paper="2410.11842",
        acts="heads; q, k",
        summary="a router weighs the heads for each token and drops the rest; RoPE inside",
        encoding=RoPE,
        router=default_moh,
    ),
    "alibi": Recipe(
        paper="2108.12409",
        acts="logits",
        summary="a bias that falls with the distance, at a fixed slope a head",
        encoding=ALiBi,
    ),
    "t5": Recipe(
        paper="1910.10683",
        acts="logits",
        summary="a trained bias for each head and bucket of distances",
        encoding=T5,
    ),
    "kerple": Recipe(
        paper="2205.09921",
        acts="logits",
        summary="a bias that falls with the logarithm or a power of the distance, trained",
        encoding=Kerple,
    ),
    "fire": Recipe(
        paper="2310.04418",
        acts="logits",
        summary="a small network of the logarithm of the distance over that of the position",
        encoding=FIRE,
    ),
    "fox": Recipe(
        paper="2503.02130",
        acts="logits",
        summary="a gate a token and head says how much of what lies before is forgotten",
        encoding=FoX,
    ),
    "cope": Recipe(
        paper="2405.18719",
        acts="logits",
        summary="a position between the integers: how many keys since then the query's gates count",
        encoding=CoPE,
    ),
    "xpos": Recipe(
        paper="2212.10554",
        acts="q, k",
        summary="RoPE whose pairs fade with the distance, the fastest ones fastest",
        encoding=XPos,
    ),
    "pope": Recipe(
        paper="2509.10534",
        acts="q, k",
        summary="features are magnitudes at the angle of the position, twice as wide",
        encoding=PoPE,
    ),
    "selective": Recipe(
        paper="2511.17388",
        acts="q, k",
        summary="rotation by a running phase whose rates four tokens set, per head and pair",
        encoding=SelectiveRoPE,
    ),
    "grape": Recipe(
        paper="2512.07805",
        acts="q, k",
        summary="rotation by a running sum of one rate a token, learned frequencies (GRAPE-M)",
        encoding=GRAPE,
    ),
    "path": Recipe(
        paper="2505.16381",
        acts="logits",
        summary="reflections by the tokens between a key and the query, multiplied up (PaTH)",
        encoding=PaTH,
    ),
    "fope": Recipe(
        paper="2412.17739",
        acts="q, k",
        summary="RoPE whose bands are fixed series of all its frequencies (Fourier)",
        encoding=FoPE,
    ),
}


def names() -> tuple[str, ...]:
    """The names that `attention` and `GPTConfig` accept."""
    return tuple(ZOO)


class Parts(NamedTuple):
    """A recipe with its options sorted to the parts they belong to."""

    recipe: Recipe
    encoding: type[Encoding]
    embedding: type[Encoding] | None
    conv: bool
    options: dict[str, dict[str, Any]]  # by part: attention, encoding, embedding, conv, router


#: What the parts are told by the module that they fill.
SIZES = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "max_length", "causal")
MODULE_OPTIONS = (
    "num_kv_heads", "head_dim", "qk_norm", "causal", "window", "bias", "dropout", "impl",
)  # fmt: skip
#: Names of the zoo for encodings.
ALIASES = {"cmha": "polar", "rmha": "relative", "mha": "learned"}


def options_of(part: Callable[..., Any]) -> list[str]:
    """The options of a part, without the sizes that it is told."""
    parameters = inspect.signature(part).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [name for name in named if name not in SIZES]


def sort_options(name: str, options: Mapping[str, Any]) -> Parts:
    """Sort the options of a zoo name to its parts.

    A bare option goes to the first part that has it: the module itself, then router, conv,
    encoding, embedding; `router_`, `conv_`, `encoding_` or `embedding_` before it addresses one
    part. `encoding=` swaps the encoding, `conv=True` or `False` adds or drops the convolution.

    Raises:
        ValueError: for an unknown name or option, with the nearest spelling and what exists.
    """
    if name not in ZOO:
        raise ValueError(unknown("attention", name, ZOO))
    recipe, options = ZOO[name], dict(options)
    encoding, embedding = recipe.encoding, recipe.embedding
    if "encoding" in options:
        chosen = ALIASES.get(options["encoding"], options["encoding"])
        if chosen not in {**ENCODINGS, **EMBEDDINGS}:
            raise ValueError(unknown("encoding", chosen, {**ENCODINGS, **EMBEDDINGS}))
        encoding, embedding = ENCODINGS.get(chosen, NoPE), EMBEDDINGS.get(chosen)
        del options["encoding"]
    conv = options.pop("conv", recipe.conv is not None)
    if not isinstance(conv, bool):
        raise ValueError(f"conv must be True or False; got {conv!r}. Its options are conv_NAME.")
    parts: dict[str, list[str]] = {"attention": list(MODULE_OPTIONS)}
    if recipe.router is not None:
        parts["router"] = options_of(MoH)
    if conv:
        parts["conv"] = options_of(DepthwiseConv)
    parts["encoding"] = options_of(encoding)
    if embedding is not None:
        parts["embedding"] = options_of(embedding)
    table: dict[str, tuple[str, str]] = {}
    for part, accepted in parts.items():
        for option in accepted:
            table.setdefault(option, (part, option))
            table[f"{part}_{option}"] = (part, option)
    if encoding is Relative:
        table["relative"] = table["kind"]
    sorted_options: dict[str, dict[str, Any]] = {
        part: {} for part in (*parts, "embedding", "conv", "router")
    }
    for option, value in options.items():
        if option not in table:
            shown = [known for known in table if not known.startswith("attention_")]
            raise ValueError(
                unknown(f"option of attention {name!r}", option, ["encoding", "conv", *shown])
            )
        part, argument = table[option]
        if argument in sorted_options[part]:
            raise ValueError(
                f"option {argument!r} of attention {name!r} is given twice, once as {option!r}."
            )
        sorted_options[part][argument] = value
    return Parts(recipe, encoding, embedding, conv, sorted_options)


def encoding_name(parts: Parts) -> str:
    """What `encoding=` calls the encoding of these parts."""
    wanted, known = parts.embedding or parts.encoding, {**ENCODINGS, **EMBEDDINGS}
    return next(name for name, part in known.items() if part is wanted)


def _build(part: Callable[..., Any], sizes: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    wanted = inspect.signature(part).parameters
    return part(**{name: size for name, size in sizes.items() if name in wanted}, **options)


def _build_attention(
    parts: Parts, embed_dim: int, num_heads: int, encoding: Encoding | None = None
) -> Attention:
    sizes, options = _sizes(parts, embed_dim, num_heads), parts.options
    if encoding is None:
        encoding = build_encoding(parts, sizes)
    conv = None
    if parts.conv:
        conv = _build(DepthwiseConv, sizes, {**(parts.recipe.conv or {}), **options["conv"]})
    router = build_router(parts, sizes)
    return Attention(
        embed_dim, num_heads, encoding=encoding, conv=conv, router=router, **options["attention"]
    )


def build_encoding(parts: Parts, sizes: Mapping[str, Any]) -> Encoding:
    """The encoding inside attention, told those of `sizes` that it asks for."""
    encoding: Encoding = _build(parts.encoding, sizes, _encoding_options(parts))
    return encoding


def build_router(parts: Parts, sizes: Mapping[str, Any]) -> MoH | None:
    """The router, where the recipe has one."""
    if parts.recipe.router is None:
        return None
    given, split = parts.options["router"], {}
    if not {"shared", "top_k"} <= given.keys():
        split = parts.recipe.router(sizes["num_heads"], given.get("shared"))
    router: MoH = _build(MoH, sizes, {**split, **given})
    return router


def _sizes(parts: Parts, embed_dim: int, num_heads: int) -> dict[str, Any]:
    """What the parts of a module are told."""
    given = parts.options["attention"]
    return {
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": check_kv_heads(num_heads, given.get("num_kv_heads")),
        "head_dim": check_heads(embed_dim, num_heads, given.get("head_dim")),
        "causal": given.get("causal", True),
    }


def _encoding_options(parts: Parts) -> dict[str, Any]:
    defaults = (
        dict(parts.recipe.encoding_defaults) if parts.encoding is parts.recipe.encoding else {}
    )
    if parts.encoding is Relative:
        defaults.setdefault("max_distance", 1024)
    return {**defaults, **parts.options["encoding"]}


def attention(name: str, embed_dim: int, num_heads: int, **options: Any) -> Attention:
    """One attention module from the zoo.

    `mha` and `sinusoidal` encode position at the input of the model: alone they are plain
    attention, and it is `GPTConfig(attention="mha")` that adds the table.

    Args:
        name: one of `names()`.
        embed_dim: C. num_heads: H, must divide C.
        options: of the module (`num_kv_heads`, `head_dim`, `qk_norm`, `causal`, `window`, `bias`,
            `dropout`, `impl`, see `Attention`) and of its parts, for example
            `attention("carope", 768, 12, init="paper")`,
            `attention("moh", 768, 12, encoding="carope", shared=4, top_k=5)`. Where two parts know
            an option, `router_`, `conv_` or `encoding_` before it says which: `conv_bias=False`,
            `encoding_scaling={...}`.

    Raises:
        ValueError: for an unknown name, option or value, with what exists and the nearest spelling.
    """
    parts = sort_options(name, options)
    if parts.options["embedding"]:
        raise ValueError(
            f"{sorted(parts.options['embedding'])} belong to {name}'s table at the model's input, "
            "which a lone attention module does not have. "
            f"Give them to GPTConfig(attention={name!r}, attention_options=...)."
        )
    return _build_attention(parts, embed_dim, num_heads)


class ModelAttention(NamedTuple):
    """What a model of one zoo name is made of."""

    embedding: Encoding | None  # added to the token embedding
    phase: CARoPE | None  # computed once from the token embedding, handed to every layer
    layers: list[Attention]


def parse_layer(entry: str) -> tuple[str, dict[str, Any]]:
    """A layer of a pattern, NAME or NAME:KEY=VALUE,..: its name and options.

    Raises:
        ValueError: for text of another form.
    """
    name, colon, rest = entry.partition(":")
    # A value may hold commas of its own: a list or a mapping.
    words = re.split(r",(?=\s*\w+=)", rest) if colon else []
    pairs = [word.partition("=") for word in words]
    keys = [key.strip() for key, _, _ in pairs]
    whole = all(key and equals and value for key, equals, value in pairs)
    if not name or not whole or len(set(keys)) < len(keys):
        raise ValueError(
            "a layer of an attention pattern is NAME or NAME:KEY=VALUE,KEY=VALUE, each key once; "
            f"got {entry!r}."
        )
    return name, {key.strip(): parse_value(value.strip()) for key, _, value in pairs}


def parse_value(text: str) -> Any:
    """What JSON reads in the text, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def sort_layers(
    attention: str | Sequence[str], layers: int, options: Mapping[str, Any]
) -> list[Parts]:
    """The parts of each layer: of one name, or of a pattern of them that repeats.

    Args:
        options: of every layer; those in the pattern go before them.
    """
    one = isinstance(attention, str) or not isinstance(attention, Sequence)
    pattern: tuple[Any, ...] = (attention,) if one else tuple(attention)
    if not pattern or not all(isinstance(entry, str) for entry in pattern):
        raise ValueError(
            f"attention must be a name or a sequence of names, one a layer; got {attention!r}."
        )
    sorts = []
    for entry in pattern:
        name, own = parse_layer(entry)
        sorts.append(sort_options(name, {**options, **own}))
    tables = {(parts.embedding, repr(parts.options["embedding"])) for parts in sorts}
    if len(tables) > 1:
        raise ValueError(
            f"the layers of a model share one table at its input; {list(pattern)} ask for "
            "different ones. Mix names that add the same table (mha, sinusoidal) or none."
        )
    return [sorts[i % len(sorts)] for i in range(layers)]


def model_attention(
    attention: str | Sequence[str],
    embed_dim: int,
    num_heads: int,
    layers: int,
    context: int,
    options: Mapping[str, Any],
) -> ModelAttention:
    """Build the input-level part once and one attention a layer, each without parameters that it
    would not use.

    Args:
        attention: a name, or a pattern of NAME:KEY=VALUE,.. that repeats over the layers.
        context: sizes what the options do not, see `Encoding.context_option`, and learned tables.
    """
    sorts = sort_layers(attention, layers, options)
    for parts in sorts:
        if parts.encoding.context_option is not None:
            parts.options["encoding"].setdefault(parts.encoding.context_option, context)
    check_positions_agree(sorts)
    first = sorts[0]
    embedding: Encoding | None = None
    if first.embedding is not None:
        defaults = EMBEDDING_DEFAULTS.get(first.embedding, {})
        embedding = _build(
            first.embedding,
            {**_sizes(first, embed_dim, num_heads), "max_length": context},
            {**defaults, **first.options["embedding"]},
        )
    shared: CARoPE | None = None
    made = []
    for parts in sorts:
        phase = _reads_tokens(parts)
        if phase and shared is None:
            sizes = _sizes(parts, embed_dim, num_heads)
            shared = _build(CARoPE, sizes, _encoding_options(parts))
        encoding = SharedPhase() if phase else None
        made.append(_build_attention(parts, embed_dim, num_heads, encoding))
    of_tokens = {
        repr((parts.options["encoding"], parts.options["attention"].get("num_kv_heads")))
        for parts in sorts
        if _reads_tokens(parts)
    }
    if len(of_tokens) > 1:
        raise ValueError(
            "carope layers with source='token' share one phase; the pattern gives them different "
            "options. Give all of them the same."
        )
    return ModelAttention(embedding, shared, made)


def check_positions_agree(sorts: Sequence[Parts]) -> None:
    """Raise ValueError where layers that read positions read different ones."""
    kinds = {
        (len(options["axes"]) if options.get("axes") else None, options.get("continuous", False))
        for options in (p.options["encoding"] for p in sorts if p.encoding.reads_positions)
    }
    if len(kinds) > 1:
        asked = [f"of {axes or 1} axes, continuous={real}" for axes, real in kinds]
        raise ValueError(
            "the layers of a model share their positions; the pattern asks for positions "
            f"{' and '.join(sorted(asked))}. Give all layers the same axes and continuous."
        )


def _reads_tokens(parts: Parts) -> bool:
    """Whether a layer turns by phases of the token embeddings, made once for the model."""
    return parts.encoding is CARoPE and parts.options["encoding"].get("source") == "token"


__all__ = ["ENCODINGS", "ZOO", "ModelAttention", "Recipe", "attention", "model_attention", "names"]
