"""An encoding in somebody else's attention: one tensor alone, other lengths and numbers of heads,
grids, positions between the integers, and the bias of distances.
"""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
import posenc
from helpers import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    build_part,
    close,
    differs,
    oracle_layer,
    perturb,
    randn,
    repeat_key_heads,
)
from posenc import RoPE
from posenc.zoo import ENCODINGS

B, T, S, D, GROUPS = 2, 7, 9, 12, 2
EVERY = pytest.mark.parametrize("name", ENCODINGS)
LAYOUTS = pytest.mark.parametrize(
    ("layout", "axes"),
    [("blocks", (4, 8)), ("sections", (8, 4)), ("interleaved", (8, 4)), ("sections", (4, 6, 2))],
    ids=["blocks", "sections", "interleaved", "three"],
)
PAIRED = pytest.mark.parametrize("pairing", ["half", "interleaved"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(name: str, groups: int = HEADS) -> posenc.Encoding:
    wanted = inspect.signature(ENCODINGS[name]).parameters
    grouped = {"num_kv_heads": groups} if "num_kv_heads" in wanted else {}
    part = build_part(ENCODINGS[name], heads=HEADS, head_dim=HEAD_DIM, **grouped)
    return perturb(part).double()


def queries_keys(groups: int = HEADS, length: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and the input that data-dependent encodings read."""
    q, k = randn(B, HEADS, length, HEAD_DIM), randn(B, groups, length, HEAD_DIM)
    return q, k, randn(B, length, WIDTH)


@EVERY
def test_queries_or_keys_alone_turn_as_together(name: str) -> None:
    encoding, (q, k, x) = made(name), queries_keys()
    for positions in (torch.arange(T), torch.randint(50, (B, T))):
        both = encoding.rotate(q, k, positions, x)
        alone, none = encoding.rotate(q, None, positions, x)
        assert none is None
        close(alone, both[0], 1e-12)
        none, alone = encoding.rotate(None, k, positions, x)
        assert none is None
        close(alone, both[1], 1e-12)


@EVERY
@pytest.mark.parametrize("groups", [1, 2])
def test_fewer_key_heads_turn_as_repeated_ones(name: str, groups: int) -> None:
    encoding, (q, k, x) = made(name, groups), queries_keys(groups)
    turned_q, turned_k = encoding.rotate(q, k, torch.arange(T), x)
    assert turned_q.shape[:-1] == q.shape[:-1]
    assert turned_k.shape[:-1] == k.shape[:-1]
    whole = made(name)
    repeat_key_heads(encoding, whole, groups)
    repeated = k.repeat_interleave(HEADS // groups, 1)
    expected_q, expected_k = whole.rotate(q, repeated, torch.arange(T), x)
    close(turned_q, expected_q)
    close(turned_k.repeat_interleave(HEADS // groups, 1), expected_k)


@EVERY
def test_one_row_of_positions_serves_the_batch(name: str) -> None:
    encoding, (q, k, x) = made(name), queries_keys()
    positions = torch.arange(T) + 3
    expected = encoding.rotate(q, k, positions, x)
    for ours, theirs in zip(encoding.rotate(q, k, positions[None], x), expected, strict=True):
        close(ours, theirs, 1e-12)


def by_position(name: str) -> bool:
    """Whether positions alone say how q and k turn, whatever the tokens are."""
    encoding, (q, k, x) = made(name), queries_keys()
    first, second = (encoding.rotate(q, k, torch.arange(T), z) for z in (x, randn(*x.shape)))
    return torch.equal(first[0], second[0])


@EVERY
def test_queries_and_keys_of_other_lengths_stand_at_their_own_positions(name: str) -> None:
    if not by_position(name):  # its queries and keys are those of the same tokens
        encoding, (q, k, x) = made(name), queries_keys()
        with pytest.raises(ValueError):
            encoding.rotate(q[:, :, :3], k, torch.arange(3), x, key_positions=torch.arange(T))
        return
    encoding, q, k = made(name), randn(B, HEADS, 3, HEAD_DIM), randn(B, HEADS, S, HEAD_DIM)
    for where, keys in (
        (torch.tensor([8, 2, 5]), torch.arange(S)),
        (torch.randint(50, (B, 3)), torch.randint(50, (B, S))),
        (torch.randint(50, (B, 3)), torch.arange(S)),
    ):
        turned_q, turned_k = encoding.rotate(q, k, where, key_positions=keys)
        close(turned_q, encoding.rotate(q, None, where)[0], 1e-12)
        close(turned_k, encoding.rotate(None, k, keys)[1], 1e-12)


def test_scores_of_other_lengths_are_those_of_the_oracles() -> None:
    where, keys = torch.randint(50, (B, 3)), torch.randint(50, (B, S))
    q, k = randn(B, HEADS, 3, HEAD_DIM), randn(B, HEADS, S, HEAD_DIM)

    def scores(encoding: posenc.Encoding) -> Tensor:
        turned_q, turned_k = encoding.rotate(q, k, where, key_positions=keys)
        return turned_q @ turned_k.mT / HEAD_DIM**0.5

    close(scores(RoPE(HEAD_DIM)), oracles.rope_scores(q, k, where, keys))
    polar = made("polar")
    close(scores(polar), oracles.cmha_scores(q, k, polar.delta, polar.b, where, keys))


def test_lengths_that_differ_need_positions_of_their_own() -> None:
    q, k = randn(B, HEADS, 3, D), randn(B, HEADS, S, D)
    for options in ({}, {"positions": torch.arange(3)}):
        with pytest.raises(ValueError, match="key_positions") as refusal:
            RoPE(D).rotate(q, k, **options)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="key_positions"):
        RoPE(D).rotate(q, k, torch.arange(3), key_positions=torch.arange(S + 1))


@pytest.mark.parametrize("name", ["nope", "rope", "carope", "polar", "grape", "selective"])
def test_encodings_without_a_bias_say_so(name: str) -> None:
    assert made(name).score_bias(torch.arange(T), torch.arange(S)) is None


@EVERY
def test_biases_have_the_shape_of_scores(name: str) -> None:
    bias = made(name).score_bias(torch.arange(T), torch.arange(S), randn(B, S, WIDTH))
    assert bias is None or (bias.shape[0] in (1, B) and bias.shape[1:] == (HEADS, T, S))


# Grids


def grid(axes: tuple[int, ...], batch: tuple[int, ...] = (), length: int = T) -> Tensor:
    return torch.randint(30, (*batch, length, len(axes)))


@LAYOUTS
@PAIRED
@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_grids_are_those_of_the_oracle(
    layout: str, axes: tuple[int, ...], pairing: str, base: float
) -> None:
    rope = RoPE(D, axes=axes, layout=layout, pairing=pairing, base=base)
    q, k = randn(B, HEADS, T, D), randn(B, GROUPS, T, D)
    for positions in (grid(axes), grid(axes, (B,)), grid(axes, (1,))):
        turned = rope.rotate(q, k, positions)
        for ours, z in zip(turned, (q, k), strict=True):
            expected = oracles.axial_rotate(z, positions, axes, layout, pairing=pairing, base=base)
            close(ours, expected)


@LAYOUTS
def test_queries_and_keys_on_grids_of_their_own(layout: str, axes: tuple[int, ...]) -> None:
    rope, q, k = RoPE(D, axes=axes, layout=layout), randn(B, HEADS, 3, D), randn(B, HEADS, S, D)
    where, keys = grid(axes, (B,), 3), grid(axes, (), S)
    turned_q, turned_k = rope.rotate(q, k, where, key_positions=keys)
    close(turned_q, oracles.axial_rotate(q, where, axes, layout))
    close(turned_k, oracles.axial_rotate(k, keys, axes, layout))


@pytest.mark.parametrize("layout", ["blocks", "sections", "interleaved"])
@PAIRED
def test_one_axis_is_rope(layout: str, pairing: str) -> None:
    q, k, positions = randn(B, HEADS, T, D), randn(B, HEADS, T, D), torch.randint(50, (B, T))
    ours = RoPE(D, axes=(D,), layout=layout, pairing=pairing).rotate(q, k, positions[..., None])
    for a, b in zip(ours, RoPE(D, pairing=pairing).rotate(q, k, positions), strict=True):
        close(a, b, 1e-12)


@LAYOUTS
def test_equal_positions_on_every_axis(layout: str, axes: tuple[int, ...]) -> None:
    q, k, positions = randn(B, HEADS, T, D), randn(B, HEADS, T, D), torch.arange(T)
    equal = positions[:, None].expand(T, len(axes))
    ours = torch.stack(RoPE(D, axes=axes, layout=layout).rotate(q, k, equal))
    plain = torch.stack(RoPE(D).rotate(q, k, positions))
    if layout == "blocks":
        differs(ours, plain)
    else:
        close(ours, plain, 1e-12)


@LAYOUTS
def test_shift_of_one_axis_changes_no_score(layout: str, axes: tuple[int, ...]) -> None:
    rope, q, k = RoPE(D, axes=axes, layout=layout), randn(B, HEADS, T, D), randn(B, HEADS, T, D)
    positions = grid(axes)

    def scores(where: Tensor) -> Tensor:
        turned_q, turned_k = rope.rotate(q, k, where)
        return turned_q @ turned_k.mT

    for axis in range(len(axes)):
        shift = torch.zeros(len(axes), dtype=torch.long)
        shift[axis] = 17
        close(scores(positions + shift), scores(positions), 1e-9)
        moved = positions.clone()
        moved[3, axis] += 5  # of one token: every axis is read
        differs(scores(moved), scores(positions), 1e-7)


def test_axes_of_the_defaults_are_blocks() -> None:
    q, k, positions = randn(B, HEADS, T, D), randn(B, HEADS, T, D), grid((6, 6))
    close(
        torch.stack(RoPE(D, axes=(6, 6)).rotate(q, k, positions)),
        torch.stack(RoPE(D, axes=(6, 6), layout="blocks").rotate(q, k, positions)),
        0,
    )
    half = oracles.rope_rotate(q[..., :6], positions[:, 0])
    close(RoPE(D, axes=(6, 6)).rotate(q, k, positions)[0][..., :6], half)


@pytest.mark.parametrize("layout", ["blocks", "sections", "interleaved"])
@pytest.mark.parametrize("causal", [True, False])
def test_layers_on_grids_are_their_oracle(layout: str, causal: bool) -> None:
    axes, x = (4, 2), randn(B, T, WIDTH)
    options: dict[str, Any] = {"num_kv_heads": GROUPS, "causal": causal, "window": 4}
    module = posenc.attention("rope", WIDTH, HEADS, axes=axes, layout=layout, **options)
    module = perturb(module).double().eval()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, [0, 1, 4]] = False
    for positions in (grid(axes), grid(axes, (B,))):
        for call in ({}, {"mask": mask}, {"segments": posenc.segments([3, 4]).expand(B, T)}):
            expected, _ = oracle_layer(module, x, positions, **options, **call)
            real = call.get("mask", torch.ones_like(mask))
            close(module(x, positions=positions, **call)[real], expected[real])


def test_layers_on_grids_decode() -> None:
    axes, x = (4, 2), randn(B, T, WIDTH)
    module = perturb(posenc.attention("rope", WIDTH, HEADS, axes=axes)).double().eval()
    for positions in (grid(axes), grid(axes, (B,))):
        cache = module.make_cache(B, T)
        with torch.no_grad():
            expected = module(x, positions=positions)
            for now in (slice(0, 4), slice(4, 5), slice(5, T)):
                where = positions[..., now, :]
                close(module(x[:, now], positions=where, cache=cache), expected[:, now])


def test_grids_need_positions() -> None:
    axes, x = (4, 2), randn(B, T, WIDTH)
    module = posenc.attention("rope", WIDTH, HEADS, axes=axes).double()
    q, k = randn(2, B, HEADS, T, HEAD_DIM)
    for positions in (None, torch.arange(T), grid((1, 1, 1)), grid(axes).double()):
        with pytest.raises(ValueError, match="positions") as refusal:
            module(x, positions=positions)
        assert "\n" not in str(refusal.value)
        with pytest.raises(ValueError, match="positions"):
            module.encoding.rotate(q, k, positions)


@pytest.mark.parametrize(
    "options",
    [
        {"axes": (4, 4)},  # not the whole head
        {"axes": (7, 5)},  # no pairs
        {"axes": (12, 0)},
        {"axes": ()},
        {"axes": (6.0, 6.0)},
        {"axes": 12},
        {"axes": (6, 6), "layout": "rows"},
        {"axes": (2, 10), "layout": "interleaved"},  # the second axis needs pairs beyond the head
        {"layout": "sections"},  # of what?
    ],
    ids=str,
)
def test_bad_axes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"axes|layout") as refusal:
        RoPE(12, **options)
    assert "\n" not in str(refusal.value)


# Proportional RoPE


@pytest.mark.parametrize("rotary_dim", [2, 6, 8, 12])
@pytest.mark.parametrize("base", [10000.0, 1e6])
def test_proportional_rope_is_its_oracle(rotary_dim: int, base: float) -> None:
    rope = RoPE(D, partial="proportional", rotary_dim=rotary_dim, base=base)
    q, k, positions = randn(B, HEADS, T, D), randn(B, HEADS, T, D), torch.randint(99, (B, T))
    frequencies, _ = oracles.proportional_frequencies(D, rotary_dim, base=base)
    for ours, z in zip(rope.rotate(q, k, positions), (q, k), strict=True):
        close(ours, oracles.rope_rotate(z, positions, frequencies=frequencies))
    still = [*range(rotary_dim // 2, D // 2), *range((D + rotary_dim) // 2, D)]
    assert torch.equal(rope.rotate(q, k, positions)[0][..., still], q[..., still])


def test_proportional_rope_lies_between_none_and_rope() -> None:
    q, k = randn(B, HEADS, T, D), randn(B, HEADS, T, D)
    whole = RoPE(D, partial="proportional", rotary_dim=D).rotate(q, k)
    close(torch.stack(whole), torch.stack(RoPE(D).rotate(q, k)), 1e-12)
    assert torch.equal(RoPE(D, partial="proportional", rotary_dim=0).rotate(q, k)[0], q)
    front = RoPE(D, rotary_dim=6)
    close(
        torch.stack(RoPE(D, partial="front", rotary_dim=6).rotate(q, k)),
        torch.stack(front.rotate(q, k)),
        0,
    )
    other = RoPE(D, partial="proportional", rotary_dim=6).rotate(q, k)
    differs(torch.stack(other), torch.stack(front.rotate(q, k)))


def test_layers_of_proportional_rope_are_their_oracle() -> None:
    options = {"partial": "proportional", "rotary_dim": 4}
    module = perturb(posenc.attention("rope", WIDTH, HEADS, **options)).double().eval()
    x = randn(B, T, WIDTH)
    close(module(x), oracle_layer(module, x)[0])


def test_unknown_parts_of_a_head_are_refused() -> None:
    with pytest.raises(ValueError, match=r"partial.*proportional"):
        RoPE(D, partial="proportionl", rotary_dim=4)


# Positions between the integers


def test_continuous_positions_are_those_of_the_oracle() -> None:
    rope, q, k = RoPE(D, continuous=True), randn(B, HEADS, T, D), randn(B, HEADS, T, D)
    for positions in (10 * randn(T), 10 * randn(B, T)):
        for ours, z in zip(rope.rotate(q, k, positions), (q, k), strict=True):
            close(ours, oracles.rope_rotate(z, positions))
    whole = torch.randint(50, (B, T))
    for integers in (whole, whole.double(), whole.float()):
        for ours, theirs in zip(
            rope.rotate(q, k, integers), RoPE(D).rotate(q, k, whole), strict=True
        ):
            close(ours, theirs, 1e-12)


def test_continuous_positions_on_a_grid() -> None:
    axes, q, k = (8, 4), randn(B, HEADS, T, D), randn(B, HEADS, T, D)
    rope, positions = RoPE(D, axes=axes, continuous=True), 10 * randn(B, T, 2)
    for ours, z in zip(rope.rotate(q, k, positions), (q, k), strict=True):
        close(ours, oracles.axial_rotate(z, positions, axes))


def test_continuous_layers_take_negative_positions_for_what_they_are() -> None:
    module = perturb(posenc.attention("rope", WIDTH, HEADS, continuous=True)).double().eval()
    x = randn(B, T, WIDTH)
    y = module(x)
    close(y, oracle_layer(module, x)[0])
    close(module(x, positions=torch.arange(T) - 40.5), y)
    close(module(x, positions=(torch.arange(T) - 40).expand(B, T)), y)
    positions = 10 * randn(B, T)
    close(module(x, positions=positions), oracle_layer(module, x, positions)[0])
    cache = module.make_cache(B, T)
    with torch.no_grad():
        parts = [
            module(x[:, now], positions=positions[:, now], cache=cache)
            for now in (slice(0, 3), slice(3, T))
        ]
    close(torch.cat(parts, 1), module(x, positions=positions))


def test_float_positions_are_refused_elsewhere() -> None:
    q, k = randn(2, B, HEADS, T, D)
    for rope, positions in (
        (RoPE(D), torch.arange(T).double()),
        (RoPE(D, continuous=True), torch.ones(T, dtype=torch.bool)),
        (RoPE(D, continuous=True), torch.ones(T, dtype=torch.complex64)),
    ):
        with pytest.raises(ValueError, match="positions"):
            rope.rotate(q, k, positions)
