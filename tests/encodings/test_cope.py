"""CoPE: gates, positions between the integers, and the blocks that count them."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
import posenc
from bench.measure import bytes_saved
from helpers import HEAD_DIM, HEADS, WIDTH, attend, build, close, copy_shared, differs, randn
from posenc import CoPE, Relative
from posenc.backends import blockwise, contextual, fused
from posenc.backends.case import consecutive
from posenc.scores import Scores, at_places, contextual_logits

B, T, P = 2, 11, 5
WORKING = pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs(length: int = T, keys: int = T) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a table."""
    q, (k, v) = randn(B, HEADS, length, HEAD_DIM), randn(2, B, HEADS, keys, HEAD_DIM)
    return q, k, v, randn(P, HEAD_DIM)


def exact(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Pair by pair."""
    length, keys = q.shape[2], k.shape[2]
    plain = oracles.dot_scores(q, k)
    gates, scores = torch.sigmoid(plain), plain.clone()
    for m in range(length):
        at = keys - length + m
        for n in range(at + 1):
            p = gates[:, :, m, n : at + 1].sum(-1).clamp(max=P - 1)
            below, above = p.floor().long(), p.ceil().long()
            w = (p - below).unsqueeze(-1)
            e = (1 - w) * table[below] + w * table[above]
            scores[:, :, m, n] += (q[:, :, m] * e).sum(-1) / HEAD_DIM**0.5
    return oracles.causal_attention(scores, v)


@WORKING
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (T, T), (1, T), (3, T), (T - 1, T)])
def test_logits_are_their_definition_pair_by_pair(impl: str, length: int, keys: int) -> None:
    q, k, v, table = inputs(length, keys)
    y = attend(q, k, v, Scores(contextual=table), impl=impl)
    close(y, exact(q, k, v, table))


@WORKING
def test_start_is_nope(impl: str) -> None:
    cope, nope = (
        posenc.attention(name, WIDTH, HEADS, impl=impl).double() for name in ("cope", "nope")
    )
    copy_shared(cope, nope)
    x = randn(B, T, WIDTH)
    close(cope(x), nope(x))


@WORKING
def test_one_row_is_nope(impl: str) -> None:
    q, k, v, table = inputs()
    close(attend(q, k, v, Scores(contextual=table[:1]), impl=impl), attend(q, k, v))


@WORKING
def test_open_gates_are_learned_distances(impl: str) -> None:
    cope = build("cope", impl=impl, max_positions=P).encoding
    relative = Relative(HEADS, HEAD_DIM, max_distance=T).double()
    q, k, v, _ = inputs()
    q[..., 0] = k[..., 0] = 100.0  # opens every gate, and adds the same to every logit
    with torch.no_grad():
        cope.table[:, 0] = 0.0
        rows = [min(d + 1, P - 1) for d in range(T)]
        relative.R.copy_(cope.table[rows])
    where = posenc.Attention(WIDTH, HEADS)._place(randn(B, T, WIDTH), None, None, None, None)
    ours, theirs = (part.scores(where) for part in (cope, relative))
    close(attend(q, k, v, ours, impl=impl), attend(q, k, v, theirs, impl=impl))


@WORKING
def test_shut_gates_see_the_first_row(impl: str) -> None:
    q, k, v, table = inputs()
    q[..., 0], k[..., 0] = 100.0, -100.0
    table[:, 0] = 0.0
    y = attend(q, k, v, Scores(contextual=table), impl=impl)
    close(y, attend(q, k, v))
    table[0] = 1e6  # the same for all keys of a query
    differs(attend(q, k, v, Scores(contextual=table), impl=impl), torch.zeros_like(y))


def test_numbers_between_places_are_linear_and_the_last_is_kept() -> None:
    numbers, places = randn(3, P), torch.tensor([0.0, 0.25, 1.0, 2.5, 3.999, 4.0]).double()
    places = places.expand(3, 6).clone().requires_grad_()
    found = at_places(numbers, places)
    expected = [
        numbers[:, 0],
        0.75 * numbers[:, 0] + 0.25 * numbers[:, 1],
        numbers[:, 1],
        0.5 * numbers[:, 2] + 0.5 * numbers[:, 3],
        0.001 * numbers[:, 3] + 0.999 * numbers[:, 4],
        numbers[:, 4],
    ]
    close(found, torch.stack(expected, -1), 1e-6)
    (slopes,) = torch.autograd.grad(found.sum(), places)
    close(slopes[:, 1], numbers[:, 1] - numbers[:, 0])
    close(slopes[:, 3], numbers[:, 3] - numbers[:, 2])
    assert not slopes[:, 5].any()


def test_hidden_keys_count_nothing() -> None:
    q, k, _, table = inputs()
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    products = q @ k.mT
    term = contextual_logits(products, q, table, seen, 0.3)
    later = products.masked_fill(~seen, 1e9)
    assert torch.equal(contextual_logits(later, q, table, seen, 0.3), term)
    seen = seen & (torch.arange(T) != 4)  # counts for no query, wherever it is read
    term = contextual_logits(products, q, table, seen, 0.3)
    kept = [n for n in range(T) if n != 4]
    alone = contextual_logits(products[..., kept], q, table, seen[:, kept], 0.3)
    close(term[..., kept], alone)


ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "window": {"window": 4},
    "padded": {"real": torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1], [1] * 9 + [0] * 2]).bool()},
    "documents": {"segments": torch.tensor([[0] * 3 + [1] * 8, [5] * 7 + [2] * 4])},
}
ARRANGEMENTS["all"] = ARRANGEMENTS["padded"] | ARRANGEMENTS["documents"] | {"window": 5}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("groups", [HEADS, 2])
def test_blocks_are_the_reference(
    arrangement: str, groups: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contextual, "ROWS", 4)
    monkeypatch.setattr(blockwise, "RECOMPUTE_FROM", 2 if recompute else 1000)
    q, k, v, table = inputs()
    k, v, content = k[:, :groups], v[:, :groups], randn(HEADS, HEAD_DIM)
    options, results = ARRANGEMENTS[arrangement], []
    for impl in ("auto", "reference"):
        leaves = [z.clone().requires_grad_() for z in (q, k, v, content, table)]
        scores = Scores(0.7, leaves[3], contextual=leaves[4])
        case = consecutive(*leaves[:3], scores, **options)
        assert contextual.reason(case) is None
        y = attend(*leaves[:3], scores, impl=impl, **options)
        if "real" in options:
            y = y * options["real"][:, None, :, None]
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_blocks_have_gradients_in_torch_func(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contextual, "ROWS", 4)
    monkeypatch.setattr(blockwise, "RECOMPUTE_FROM", 2)
    q, k, v, table = inputs()

    def loss(q: Tensor) -> Tensor:
        return attend(q, k, v, Scores(contextual=table)).square().sum()

    leaf = q.clone().requires_grad_()
    close(torch.func.grad(loss)(q), torch.autograd.grad(loss(leaf), leaf)[0])


def test_memory_of_blocks_is_linear_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contextual, "ROWS", 8)
    monkeypatch.setattr(blockwise, "RECOMPUTE_FROM", 16)
    layer, kept = posenc.attention("cope", WIDTH, HEADS), []
    for length in (64, 128, 256):
        x = randn(1, length, WIDTH, dtype=torch.float32).requires_grad_()
        kept.append(bytes_saved(layer, lambda x=x: layer(x)))
    for short, long in pairwise(kept):
        assert long <= 2.01 * short
    assert kept[-1] < 4 * HEADS * 256 * 256  # one T x S of numbers


@WORKING
def test_dropout_drops_weights_and_keeps_their_mean(impl: str) -> None:
    q, k = torch.zeros(64, 4, 32, 2), torch.zeros(64, 4, 32, 2)
    v, scores = torch.ones(64, 4, 32, 2), Scores(contextual=torch.zeros(3, 2))
    y = attend(q, k, v, scores, dropout_p=0.5, impl=impl)
    assert set(y[:, :, 0].unique().tolist()) == {0.0, 2.0}
    assert abs(y.mean() - 1) < 0.05


@WORKING
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gates_of_half_precision_are_counted_in_single(impl: str, dtype: torch.dtype) -> None:
    q, k, v = (z.to(dtype) for z in randn(3, 1, HEADS, 300, HEAD_DIM))
    table = 3 * randn(200, HEAD_DIM)  # bf16 has no fractions beyond 128
    wide = [z.double() for z in (q, k, v)]
    y = attend(q, k, v, Scores(contextual=table.float()), impl=impl)
    exact = attend(*wide, Scores(contextual=table.float().double()), impl="reference")
    assert y.dtype == dtype
    close(y, exact, torch.finfo(dtype).eps)


def test_reference_and_blocks_ignore_autocast() -> None:
    q, k, v, table = (z.float() for z in inputs())
    for impl in ("auto", "reference"):
        expected = attend(q, k, v, Scores(contextual=table), impl=impl)
        with torch.autocast("cpu", torch.bfloat16):
            y = attend(q, k, v, Scores(contextual=table), impl=impl)
        assert torch.equal(y, expected)


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v, table = inputs(5, 5)
    leaves = [z[:1, :2].clone().requires_grad_() for z in (q, k, v)]

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attend(q, k, v, Scores(contextual=table))

    assert torch.autograd.gradcheck(run, (*leaves, table.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("groups", [HEADS, 2])
def test_closure_for_flex_attention_is_the_layer_s(groups: int) -> None:
    part = build("cope", max_positions=P).encoding
    q, k, v, _ = inputs(4)
    k, v = k[:, :groups], v[:, :groups]
    keys = torch.arange(T)
    modify = part.score_mod(q, k, keys[-4:], keys)
    assert modify is not None
    whole = k.repeat_interleave(HEADS // groups, 1)
    b, h, m, n = (
        z.expand(B, HEADS, 4, T)
        for z in torch.meshgrid(*map(torch.arange, (B, HEADS, 4, T)), indexing="ij")
    )
    logits = modify(q @ whole.mT / math.sqrt(HEAD_DIM), b, h, m, n)
    y = oracles.causal_attention(logits, v.repeat_interleave(HEADS // groups, 1))
    close(attend(q, k, v, Scores(contextual=part.table)), y)
    # what lies behind padding or in front of the query has other positions, and counts nothing
    padded = part.score_mod(q, k, keys[-4:], torch.cat([torch.tensor([-1, -1]), keys[2:]]))
    assert padded is not None
    rest = part.score_mod(q, k[:, :, 2:], keys[-4:], keys[2:])
    at = (torch.zeros(B, HEADS, 4, T).double(), b, h, m, n)
    close(padded(*at)[..., 2:], rest(*(z[..., :-2] for z in at)))


def test_kernels_refuse_it() -> None:
    q, k, v, table = inputs()
    why = fused.reason(consecutive(q, k, v, Scores(contextual=table)))
    assert why is not None
    assert "no kernel" in why


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": False}, "causal=False"),
        ({"max_positions": 0}, "max_positions of at least 1"),
        ({"max_positions": 2.5}, "max_positions of at least 1, an integer"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        CoPE(HEAD_DIM, **options)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=message):
        posenc.attention("cope", WIDTH, HEADS, **options)


def test_sizes_are_the_papers() -> None:
    assert CoPE(64).table.shape == (64, 64)
    assert not CoPE(64).table.any()
