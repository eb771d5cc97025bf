"""The zoo: recipes, options, defaults, parameter counts."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import posenc
from helpers import HEAD_DIM, HEADS, NAMES, WIDTH, close, copy_shared, differs, randn
from layer_oracle import SCORES
from posenc.zoo import ENCODINGS, ZOO, default_moh, model_attention


def turning(D: int) -> int:
    """Bands of RoPE that turn once within 512 tokens."""
    return sum(10000 ** (-2 * i / D) >= 2 * math.pi / 512 for i in range(D // 2))


#: Parameters of a layer beside its four projections, for C, H and P = max_distance.
EXTRA: dict[str, Callable[[int, int, int], int]] = {
    "mha": lambda C, H, P: 0,
    "sinusoidal": lambda C, H, P: 0,
    "nope": lambda C, H, P: 0,
    "rope": lambda C, H, P: 0,
    "carope": lambda C, H, P: C * H + H,
    "cmha": lambda C, H, P: C,
    "rmha": lambda C, H, P: C * C + 2 * C,
    "mdha": lambda C, H, P: 9 * C,
    "rcmha": lambda C, H, P: P * (C + H) + C + 12 * C // H,
    "moh": lambda C, H, P: C * (H + 2) if H // 3 > 1 else C * (H + 1),
    "alibi": lambda C, H, P: 0,
    "t5": lambda C, H, P: 32 * H,
    "kerple": lambda C, H, P: 2 * H,
    "fire": lambda C, H, P: 2 + 2 * 32 + 32 * H + H,
    "fox": lambda C, H, P: C * H + H,
    "xpos": lambda C, H, P: 0,
    "pope": lambda C, H, P: C,
    "fope": lambda C, H, P: 2 * H * turning(C // H) ** 2,
    "cope": lambda C, H, P: 64 * C // H,
    "grape": lambda C, H, P: C + 1 + C // H // 2,
    "selective": lambda C, H, P: 32 * C + 37 * C // 2,
    "path": lambda C, H, P: 67 * C + C * H + H,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_ten_names() -> None:
    expected = "mha sinusoidal nope rope carope cmha rmha mdha rcmha moh"
    assert set(expected.split()) <= set(NAMES)
    assert posenc.names() == tuple(ZOO)


def test_everything_is_documented_and_has_an_oracle() -> None:
    for recipe in ZOO.values():
        assert recipe.paper
        assert recipe.acts
        assert recipe.summary
    assert {part.__name__ for part in ENCODINGS.values()} <= SCORES.keys()
    assert EXTRA.keys() == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "heads"), [(24, 4), (96, 12), (768, 12)])
def test_parameter_counts_follow_their_formulas(
    name: str, bias: bool, width: int, heads: int
) -> None:
    with torch.device("meta"):
        module = posenc.attention(name, width, heads, **({} if name == "mdha" else {"bias": bias}))
        if name == "mdha":
            module = posenc.attention(name, width, heads, attention_bias=bias)
    projections = 4 * width**2 + 4 * width * bias
    assert count(module) == projections + EXTRA[name](width, heads, 1024)


@pytest.mark.parametrize(
    ("name", "options", "extra"),
    [
        ("carope", {}, 9_228),
        ("carope", {"init": "paper"}, 9_216),
        ("cmha", {}, 768),
        ("rmha", {"relative": "learned"}, 799_488),
        ("rmha", {}, 591_360),
        ("mdha", {}, 6_912),
        ("rcmha", {}, 800_256),
        ("moh", {}, 10_752),
        ("path", {}, 60_684),
    ],
)
def test_published_counts_of_gpt2_small(name: str, options: dict[str, Any], extra: int) -> None:
    with torch.device("meta"):
        assert count(posenc.attention(name, 768, 12, **options)) == 4 * 768**2 + extra


@pytest.mark.parametrize("name", NAMES)
def test_rows_fill_the_seams_as_written(name: str) -> None:
    module = posenc.attention(name, WIDTH, HEADS)
    filled = {
        "mha": ("NoPE", False, False),
        "sinusoidal": ("NoPE", False, False),
        "nope": ("NoPE", False, False),
        "rope": ("RoPE", False, False),
        "carope": ("CARoPE", False, False),
        "cmha": ("Polar", False, False),
        "rmha": ("Relative", False, False),
        "mdha": ("NoPE", True, False),
        "rcmha": ("Relative", True, False),
        "moh": ("RoPE", False, True),
    }
    parts = (type(module.encoding).__name__, module.conv is not None, module.router is not None)
    assert parts == filled.get(name, parts)


def test_relative_names_take_their_kind() -> None:
    assert posenc.attention("rmha", WIDTH, HEADS).encoding.kind == "sinusoidal"
    assert posenc.attention("rcmha", WIDTH, HEADS).encoding.kind == "learned"
    for alias in ("relative", "kind", "encoding_kind"):
        module = posenc.attention("rcmha", WIDTH, HEADS, **{alias: "sinusoidal"})
        assert module.encoding.kind == "sinusoidal"
    learned = posenc.attention("rmha", WIDTH, HEADS, relative="learned", max_distance=7)
    assert learned.encoding.R.shape == (HEADS, 7, HEAD_DIM)
    assert posenc.attention("rcmha", WIDTH, HEADS).encoding.max_distance == 1024


@pytest.mark.parametrize(
    ("heads", "shared", "top_k"), [(4, 1, 2), (6, 2, 3), (8, 2, 4), (12, 4, 5)]
)
def test_default_split_of_the_heads(heads: int, shared: int, top_k: int) -> None:
    assert default_moh(heads) == {"shared": shared, "top_k": top_k}
    router = posenc.attention("moh", 2 * heads, heads).router
    assert (router.shared, router.top_k) == (shared, top_k)


@pytest.mark.parametrize("heads", range(4, 33))
def test_default_split_keeps_three_quarters(heads: int) -> None:
    split = default_moh(heads)
    active = split["shared"] + split["top_k"]
    assert abs(active - 0.75 * heads) <= 0.5
    assert split["shared"] == max(1, heads // 3)
    assert split["top_k"] >= 2


def test_half_of_a_split_may_be_given() -> None:
    router = posenc.attention("moh", 96, 12, shared=3).router
    assert (router.shared, router.top_k) == (3, 6)
    router = posenc.attention("moh", 96, 12, top_k=3).router
    assert (router.shared, router.top_k) == (4, 3)


@pytest.mark.parametrize("name", ["mdha", "rcmha", "moh"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_fits_every_recipe(name: str, encoding: str) -> None:
    module = posenc.attention(name, WIDTH, HEADS, encoding=encoding)
    assert type(module.encoding) is ENCODINGS[encoding]
    assert module(torch.zeros(1, 3, WIDTH)).shape == (1, 3, WIDTH)


@pytest.mark.parametrize(("alias", "name"), [("cmha", "polar"), ("rmha", "relative")])
def test_names_of_the_zoo_name_encodings(alias: str, name: str) -> None:
    assert type(posenc.attention("moh", WIDTH, HEADS, encoding=alias).encoding) is ENCODINGS[name]


def test_convolutions_are_added_and_dropped() -> None:
    assert posenc.attention("rcmha", WIDTH, HEADS, conv=False).conv is None
    assert posenc.attention("mdha", WIDTH, HEADS, conv=True).conv.init == "primer"
    added = posenc.attention("moh", WIDTH, HEADS, conv=True, kernel_size=2, encoding="carope")
    assert added.conv.kernel_size == 2
    assert added.router is not None


@pytest.mark.parametrize("encoding", ["learned", "sinusoidal", "mha"])
def test_encodings_at_the_input_go_to_the_model(encoding: str) -> None:
    lone = posenc.attention("moh", WIDTH, HEADS, encoding=encoding)
    assert type(lone.encoding) is posenc.NoPE
    made = model_attention("moh", WIDTH, HEADS, 1, 20, {"encoding": encoding})
    kind = posenc.Sinusoidal if encoding == "sinusoidal" else posenc.Learned
    assert type(made.embedding) is kind
    assert made.layers[0].router is not None
    assert model_attention("mha", WIDTH, HEADS, 1, 20, {"encoding": "rope"}).embedding is None


def test_options_reach_their_parts() -> None:
    module = posenc.attention(
        "moh",
        WIDTH,
        HEADS,
        encoding="carope",
        init="paper",
        first_power=1,
        encoding_base=500.0,
        shared=2,
        router_top_k=2,
        scaling="paper",
        bias=True,
        impl="reference",
        dropout=0.25,
    )
    assert (module.encoding.init, module.encoding.first_power) == ("paper", 1)
    assert module.encoding.base == 500.0
    router = module.router
    assert (router.shared, router.top_k, router.scaling) == (2, 2, "paper")
    assert module.c_attn.bias is not None
    assert (module.impl, module.dropout) == ("reference", 0.25)


def test_a_prefix_tells_parts_apart() -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    module = posenc.attention("moh", WIDTH, HEADS, scaling="paper", encoding_scaling=rope)
    assert module.router.scaling == "paper"
    assert module.encoding.scaling == rope
    module = posenc.attention("rcmha", WIDTH, HEADS, bias=True, conv_bias=False)
    assert module.c_attn.bias is not None
    assert module.conv.bias is None
    module = posenc.attention("mdha", WIDTH, HEADS, encoding="polar", encoding_init="authors")
    assert module.conv.init == "primer"
    assert module.encoding.init == "authors"


def test_options_change_the_output() -> None:
    x = randn(2, 9, WIDTH)
    for name, options in (
        ("rope", {"base": 100.0}),
        ("rope", {"pairing": "interleaved"}),
        ("carope", {"base": 100.0}),
        ("moh", {"encoding": "nope"}),
        ("mdha", {"kernel_size": 2}),
        ("mdha", {"encoding": "rope"}),
    ):
        plain, changed = (
            posenc.attention(name, WIDTH, HEADS, **given).double().eval() for given in ({}, options)
        )
        copy_shared(plain, changed)
        with torch.no_grad():
            for module in (plain, changed):
                module.c_attn.weight.copy_(2 * plain.c_attn.weight)
        differs(changed(x), plain(x))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "rope",
            {"bases": 3.0},
            "unknown option of attention 'rope': 'bases'. Did you mean 'base'",
        ),
        ("rope", {"shared": 3}, "unknown option.*Known: .*pairing"),
        ("moh", {"encoding": "carpe"}, "unknown encoding: 'carpe'. Did you mean 'carope'"),
        ("nope", {"args": 3}, "unknown option.*'args'"),
        ("kerple", {"relative": "power"}, "unknown option.*'relative'"),
        ("t5", {"causal": "no"}, "causal must be True or False; got 'no'"),
        ("moh", {"encoding": "wavelet"}, "unknown encoding.*Known: nope, rope, carope"),
        ("rope", {"conv": 3}, "conv must be True or False; got 3"),
        ("mdha", {"conv": False, "kernel_size": 3}, "unknown option"),
        ("moh", {"shared": 1, "router_shared": 1}, "given twice"),
        ("mha", {"max_length": 5}, "unknown option"),
        ("sinusoidal", {"scale": 1.0}, "GPTConfig"),
        ("carope", {"head_dims": 12}, "unknown option.*Did you mean 'head_dim'"),
        ("carope", {"encoding_head_dim": 12}, "unknown option"),
        ("ropes", {}, "unknown attention: 'ropes'. Did you mean 'rope'.*Known: mha"),
        (None, {}, "unknown attention: None"),
    ],
)
def test_unknown_names_and_options_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        posenc.attention(name, WIDTH, HEADS, **options)


def test_models_build_the_input_once_and_layers_without_it() -> None:
    made = model_attention("mha", WIDTH, HEADS, 3, 50, {})
    assert made.embedding.weight.shape == (50, WIDTH)
    assert made.phase is None
    assert len(made.layers) == 3
    assert {type(layer.encoding).__name__ for layer in made.layers} == {"NoPE"}
    made = model_attention("carope", WIDTH, HEADS, 2, 50, {"source": "token"})
    assert made.phase.weight.shape == (WIDTH, HEADS)
    assert not any(list(layer.encoding.parameters()) for layer in made.layers)
    made = model_attention("rcmha", WIDTH, HEADS, 2, 50, {})
    assert made.layers[0].encoding.R.shape == (HEADS, 50, HEAD_DIM)
    made = model_attention("rcmha", WIDTH, HEADS, 2, 50, {"max_distance": 9})
    assert made.layers[0].encoding.R.shape == (HEADS, 9, HEAD_DIM)
    close(
        model_attention("sinusoidal", WIDTH, HEADS, 1, 50, {"scale": 0.5}).embedding.embed(
            torch.arange(3)
        )[0, 1],
        torch.tensor(0.5),
        1e-6,
    )
