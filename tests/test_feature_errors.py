"""Features asked for wrongly: one line each time, that says what was expected."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import posenc
from helpers import CAUSAL_ALONE, HEAD_DIM, HEADS, NAMES, WIDTH, build_part, randn
from posenc.zoo import ENCODINGS

EVERY = pytest.mark.parametrize("name", NAMES)
LENGTH = 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@contextmanager
def refused(word: str) -> Iterator[None]:
    """Inside, a ValueError of one line that names what was wrong."""
    with pytest.raises(ValueError, match=word) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert "unknown option" not in str(caught.value)  # which would hide that the feature is missing


def layer(name: str, **options: Any) -> posenc.Attention:
    return posenc.attention(name, WIDTH, HEADS, **options).double().eval()


@EVERY
@pytest.mark.parametrize("groups", [3, 0, -1, 8, 2.0, "2"])
def test_key_heads_that_do_not_divide_are_refused(name: str, groups: object) -> None:
    with refused("num_kv_heads"):
        layer(name, num_kv_heads=groups)


@EVERY
@pytest.mark.parametrize("window", [0, -3, True, False, 2.0, "2", (2, 2)])
def test_windows_that_are_no_count_are_refused(name: str, window: object) -> None:
    with refused("window"):
        layer(name, window=window)


@EVERY
@pytest.mark.parametrize("head_dim", [0, -2, 6.0, "6"])
def test_head_sizes_that_are_no_count_are_refused(name: str, head_dim: object) -> None:
    with refused("head_dim|head dim"):
        layer(name, head_dim=head_dim)


@EVERY
@pytest.mark.parametrize("qk_norm", ["RMS", "layer", True, 1e-6])
def test_unknown_norms_are_refused(name: str, qk_norm: object) -> None:
    with refused("qk_norm"):
        layer(name, qk_norm=qk_norm)


@EVERY
@pytest.mark.parametrize("causal", [None, "no", 0])
def test_directions_other_than_two_are_refused(name: str, causal: object) -> None:
    with refused("causal"):
        layer(name, causal=causal)


@EVERY
@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, LENGTH + 1).bool(),
        torch.ones(1, LENGTH).bool(),
        torch.ones(LENGTH).bool(),
        torch.ones(2, 1, LENGTH, LENGTH).bool(),
        torch.ones(2, LENGTH),
        torch.ones(2, LENGTH).long(),
        [[True] * LENGTH] * 2,
        True,
    ],
    ids=["long", "one row", "flat", "pairs", "float", "integer", "list", "bool"],
)
def test_masks_of_other_shapes_and_kinds_are_refused(name: str, mask: object) -> None:
    module, x = layer(name), randn(2, LENGTH, WIDTH)
    with refused("mask"):
        module(x, mask=mask)
    with refused("mask"):
        module(x, mask=mask, cache=module.make_cache(2, LENGTH))


@EVERY
@pytest.mark.parametrize(
    "segments",
    [
        torch.zeros(2, LENGTH + 1).long(),
        torch.zeros(LENGTH).long(),
        torch.zeros(2, LENGTH, 1).long(),
        torch.zeros(2, LENGTH),
        torch.zeros(2, LENGTH).bool(),
        [[0] * LENGTH] * 2,
        3,
    ],
    ids=["long", "flat", "deep", "float", "bool", "list", "integer"],
)
def test_segments_of_other_shapes_and_kinds_are_refused(name: str, segments: object) -> None:
    with refused("segments"):
        layer(name)(randn(2, LENGTH, WIDTH), segments=segments)


@EVERY
@pytest.mark.parametrize("row", [[0, 0, 1, 1, 0], [2, 1, 2, 3, 3], [-1, 0, 0, 0, -1]], ids=str)
def test_documents_that_come_back_are_refused(name: str, row: list[int]) -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2], row])
    with refused("segments"):
        layer(name)(randn(2, LENGTH, WIDTH), segments=segments)


@EVERY
def test_caches_with_segments_are_refused(name: str) -> None:
    module, x = layer(name), randn(1, LENGTH, WIDTH)
    cache = module.make_cache(1, LENGTH)
    with refused("segments"):
        module(x, segments=posenc.segments([2, 3]), cache=cache)
    assert cache.length == 0


@EVERY
def test_caches_of_layers_that_see_both_ways_are_refused(name: str) -> None:
    with refused("causal"):  # those of one way alone at once
        module, x = layer(name, causal=False), randn(1, LENGTH, WIDTH)
        module(x, cache=module.make_cache(1, LENGTH))


@EVERY
@pytest.mark.parametrize(
    "order",
    [torch.tensor([0, 1, 0]), torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.zeros(2)],
    ids=["long", "beyond", "negative", "float"],
)
def test_orders_that_are_no_rows_are_refused(name: str, order: object) -> None:
    module = layer(name)
    cache = module.make_cache(2, LENGTH)
    module(randn(2, LENGTH, WIDTH), cache=cache)
    with refused("reorder|index"):
        cache.reorder(order)


#: What makes a part and the options of an attention it does not fit.
MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "num_kv_heads": ({"num_kv_heads": 2}, {}),
    "num_kv_heads of the attention": ({}, {"num_kv_heads": 2}),
    "causal": ({"causal": False}, {}),
    "causal of the attention": ({}, {"causal": False}),
    "head_dim": ({"head_dim": 8}, {}),
    "head_dim of the attention": ({}, {"head_dim": 8}),
}
PARTS: dict[str, Callable[..., Any]] = {**ENCODINGS, "conv": posenc.DepthwiseConv}


def fitting(part: str, head_dim: int = HEAD_DIM, **options: Any) -> dict[str, Any]:
    """The argument of Attention that holds a part of these sizes."""
    wanted = inspect.signature(PARTS[part]).parameters
    known = {key: value for key, value in options.items() if key in wanted}
    sizes = {"embed_dim": WIDTH} if "embed_dim" in wanted else {}
    made = build_part(PARTS[part], heads=HEADS, head_dim=head_dim, **{**sizes, **known})
    return {"conv" if part == "conv" else "encoding": made}


def sized(part: str) -> set[str]:
    return {"head_dim", "num_kv_heads", "causal"} & set(inspect.signature(PARTS[part]).parameters)


def test_parts_know_the_sizes_that_shape_them() -> None:
    assert {part: sized(part) for part in PARTS} == {
        "nope": set(),
        "rope": {"head_dim"},
        "carope": {"head_dim", "num_kv_heads"},
        "polar": {"head_dim", "num_kv_heads"},
        "relative": {"head_dim", "causal"},
        "alibi": set(),
        "t5": {"causal"},
        "kerple": set(),
        "fire": {"causal"},
        "fox": {"causal"},
        "cope": {"head_dim", "causal"},
        "xpos": {"head_dim", "causal"},
        "pope": {"head_dim"},
        "fope": {"head_dim", "num_kv_heads"},
        "grape": {"head_dim"},
        "selective": {"head_dim", "num_kv_heads"},
        "path": {"head_dim", "num_kv_heads", "causal"},
        "conv": {"head_dim", "num_kv_heads", "causal"},
    }


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("part", PARTS)
def test_parts_built_otherwise_are_refused(part: str, misfit: str) -> None:
    built, asked = MISFITS[misfit]
    size = misfit.split()[0]
    if size not in sized(part):  # a part that does not depend on it fits any
        posenc.Attention(WIDTH, HEADS, **asked, **fitting(part))
        return
    with refused(size):
        posenc.Attention(WIDTH, HEADS, **asked, **fitting(part, **built))
    both = built | asked
    if part in CAUSAL_ALONE and size == "causal":
        return
    posenc.Attention(WIDTH, HEADS, **both, **fitting(part, **both))


@pytest.mark.parametrize("part", ["carope", "polar", "selective", "path", "conv"])
@pytest.mark.parametrize("groups", [3, 0, 8, 2.0])
def test_parts_refuse_key_heads_that_do_not_divide(part: str, groups: object) -> None:
    with refused("num_kv_heads"):
        fitting(part, num_kv_heads=groups)


def documents(segments: torch.Tensor) -> list[int]:
    """Lengths of the documents of a row."""
    (row,) = segments
    values, counts = torch.unique_consecutive(row, return_counts=True)
    assert len(values) == len(values.unique())
    assert not segments.is_floating_point()
    assert segments.dtype != torch.bool
    return counts.tolist()


@pytest.mark.parametrize("lengths", [[3, 1, 4], [5], [1, 1, 1], (2, 2)], ids=str)
def test_segments_from_lengths(lengths: list[int]) -> None:
    segments = posenc.segments(lengths)
    assert segments.shape == (1, sum(lengths))
    assert documents(segments) == list(lengths)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(posenc.segments(cu_seqlens=ends.to(dtype)), segments)


@pytest.mark.parametrize("lengths", [[3, 0, 4], [0], [3, -1], [], [2.0, 1.0], 3])
def test_bad_lengths_are_refused(lengths: object) -> None:
    with refused("length"):
        posenc.segments(lengths)


@pytest.mark.parametrize(
    "ends",
    [
        torch.tensor([0, 3, 3]),
        torch.tensor([1, 3]),
        torch.tensor([0, 4, 3]),
        torch.tensor([0]),
        torch.tensor([[0, 3]]),
        torch.tensor([0.0, 3.0]),
    ],
    ids=["empty document", "no zero", "falling", "none", "matrix", "float"],
)
def test_bad_cumulative_lengths_are_refused(ends: object) -> None:
    with refused("cu_seqlens"):
        posenc.segments(cu_seqlens=ends)


def test_lengths_are_given_once() -> None:
    with refused("cu_seqlens"):
        posenc.segments()
    with refused("cu_seqlens"):
        posenc.segments([3], cu_seqlens=torch.tensor([0, 3]))


def test_caches_are_public() -> None:
    assert {"Cache", "segments"} <= set(posenc.__all__)
    assert isinstance(layer("rope").make_cache(1, 3), posenc.Cache)
