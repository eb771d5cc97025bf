"""Attention: every cross of its seams, and its constructor."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import posenc
from helpers import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    build_cross,
    close,
    copy_shared,
    crosses,
    differs,
    left_padded,
    oracle_layer,
    perturb,
    randn,
)
from posenc import Attention
from posenc.attention import Shared
from posenc.backends import choice
from posenc.backends.case import Case
from posenc.encodings.carope import SharedPhase
from posenc.placement import Placement, place

CROSSES = pytest.mark.parametrize(("encoding", "conv", "router"), crosses())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@CROSSES
def test_every_cross_is_its_oracle(encoding: str, conv: bool, router: bool) -> None:
    module, x = build_cross(encoding, conv, router), randn(2, 9, WIDTH)
    y, aux = module(x, return_aux=True)
    expected, expected_aux = oracle_layer(module, x)
    close(y, expected)
    close(aux, expected_aux)
    assert (aux > 0) == router


@CROSSES
def test_every_cross_decodes(encoding: str, conv: bool, router: bool) -> None:
    module, x = build_cross(encoding, conv, router), randn(2, 12, WIDTH)
    expected, cache = module(x), module.make_cache(2, 14)
    with torch.no_grad():
        close(module(x[:, :5], cache=cache), expected[:, :5])
        close(module(x[:, 5:6], cache=cache), expected[:, 5:6])
        module(randn(2, 3, WIDTH), cache=cache)
        cache.truncate(3)
        close(module(x[:, 3:4], cache=cache), expected[:, 3:4])
        close(module(x[:, 4:], cache=cache), expected[:, 4:])


@CROSSES
def test_every_cross_takes_left_padding(encoding: str, conv: bool, router: bool) -> None:
    module, rows = build_cross(encoding, conv, router), [randn(n, WIDTH) for n in (7, 3)]
    x, positions = left_padded(rows)
    y = module(x, positions=positions)
    for i, row in enumerate(rows):
        close(y[i, -len(row) :], module(row[None])[0])


@CROSSES
def test_every_cross_is_causal(encoding: str, conv: bool, router: bool) -> None:
    module, x = build_cross(encoding, conv, router), randn(2, 9, WIDTH)
    changed = torch.cat([x[:, :5], randn(2, 4, WIDTH)], 1)
    assert torch.equal(module(x)[:, :5], module(changed)[:, :5])


def test_a_part_may_be_any_encoding() -> None:
    """The seam's three places, filled by a scheme that the library does not know."""

    class Slope(posenc.Encoding):
        def rotate(self, q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
            return 2 * q, k

        def scores(self, place: Placement, *_: Any) -> Any:
            distance = torch.arange(place.length)[:, None] - torch.arange(place.key_length)
            bias = -0.5 * distance.double()
            return posenc.Encoding.scores(self, place)._replace(bias=bias)

    plain, sloped = Attention(WIDTH, HEADS).double(), Attention(WIDTH, HEADS, encoding=Slope())
    sloped = sloped.double()
    copy_shared(plain, sloped)
    x = randn(2, 9, WIDTH)
    q, k, v = plain.c_attn(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
    logits = 2 * q @ k.mT / HEAD_DIM**0.5
    logits = logits - 0.5 * (torch.arange(9)[:, None] - torch.arange(9))
    weights = logits.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    close(sloped(x), plain.c_proj((weights @ v).transpose(1, 2).flatten(2)))


def test_a_phase_from_the_model_takes_the_place_of_the_layer_s_own() -> None:
    module = perturb(posenc.attention("carope", WIDTH, HEADS)).double()
    shared = Attention(WIDTH, HEADS, encoding=SharedPhase()).double()
    copy_shared(module, shared)
    x = randn(2, 9, WIDTH)

    def given(tokens: Tensor) -> Shared:
        where = place(2, 9, x.device)
        return Shared(where, module.encoding.phases(tokens))

    close(shared(x, shared=given(x)), module(x))
    differs(shared(x, shared=given(randn(2, 9, WIDTH))), module(x))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"encoding": "rope"}, "encoding must be a Encoding module; got 'rope'"),
        ({"conv": posenc.RoPE(HEAD_DIM)}, "conv must be a DepthwiseConv"),
        ({"router": 3}, "router must be a MoH"),
        ({"encoding": posenc.RoPE(2 * HEAD_DIM)}, "built for head_dim=12; the attention has 6"),
        ({"encoding": posenc.Polar(2, HEAD_DIM)}, "built for num_heads=2"),
        ({"encoding": posenc.CARoPE(48, HEADS, head_dim=HEAD_DIM)}, "built for embed_dim=48"),
        ({"conv": posenc.DepthwiseConv(HEADS, 5)}, "built for head_dim=5"),
        ({"router": posenc.MoH(48, HEADS, shared=1, top_k=2)}, "built for embed_dim=48"),
        ({"encoding": posenc.Learned(9, WIDTH)}, "where tokens enter"),
        ({"encoding": posenc.Sinusoidal(WIDTH)}, "where tokens enter"),
    ],
)
def test_parts_of_another_kind_or_size_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(WIDTH, HEADS, **parts)


def test_auxiliary_loss_is_returned_on_request_only() -> None:
    plain, routed = (posenc.attention(name, WIDTH, HEADS) for name in ("rope", "moh"))
    x = randn(2, 9, WIDTH, dtype=torch.float32)
    assert isinstance(plain(x), Tensor)
    y, aux = plain(x, return_aux=True)
    assert torch.equal(y, plain(x))
    assert aux == 0
    y, aux = routed(x, return_aux=True)
    assert torch.equal(y, routed(x))
    assert aux > 0
    assert aux.requires_grad


def test_every_argument_changes_the_output() -> None:
    changes: dict[str, dict[str, Any]] = {
        "encoding": {"encoding": posenc.RoPE(HEAD_DIM)},
        "conv": {"conv": posenc.DepthwiseConv(HEADS, HEAD_DIM)},
        "router": {"router": posenc.MoH(WIDTH, HEADS, shared=1, top_k=2)},
        "bias": {"bias": True},
        "dropout": {"dropout": 0.5},
        "qk_norm": {"qk_norm": "rms"},
        "causal": {"causal": False},
        "window": {"window": 3},
    }
    # the sizes change shapes; the back ends compute one function
    tested_elsewhere = {"self", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "impl"}
    known = set(inspect.signature(Attention.__init__).parameters)
    assert known == changes.keys() | tested_elsewhere
    x, plain = randn(2, 9, WIDTH), Attention(WIDTH, HEADS).double()
    for change in changes.values():
        module = Attention(WIDTH, HEADS, **change).double()
        copy_shared(plain, module)
        differs(module(x), plain(x))


def test_heads_change_the_output() -> None:
    two, four = (Attention(WIDTH, heads).double() for heads in (2, 4))
    copy_shared(two, four)
    x = randn(2, 9, WIDTH)
    differs(two(x), four(x))


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_impl_chooses_the_back_end(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def attend(case: Case, impl: str) -> Tensor:
        seen.append(impl)
        return case.q

    monkeypatch.setattr(choice, "attend", attend)
    Attention(WIDTH, HEADS, impl=impl)(torch.zeros(1, 2, WIDTH))
    assert seen == [impl]


def test_projections_start_as_linear_layers_do() -> None:
    module = Attention(400, 4, bias=True)
    bound = 400**-0.5
    for layer in (module.c_attn, module.c_proj):
        assert isinstance(layer, nn.Linear)
        assert bound * 0.99 < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound


def test_module_shows_its_options() -> None:
    text = repr(posenc.attention("moh", WIDTH, HEADS, encoding="carope", impl="sdpa"))
    for part in ("impl='sdpa'", "CARoPE", "init='rope'", "MoH", "shared=1", "top_k=2"):
        assert part in text
