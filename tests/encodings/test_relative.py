"""Relative scores, learned and sinusoidal."""

import inspect
import math
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
    attend,
    build,
    close,
    differs,
    left_padded,
    perturb,
    randn,
    scores_of,
)
from posenc import Attention, Relative
from posenc.encodings.relative import factors, sinusoid

B, S = 2, 13
KINDS = pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
LENGTHS = pytest.mark.parametrize("length", [1, 2, 6, S])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def relative(kind: str = "learned", max_distance: int = 5, **options: Any) -> Relative:
    part = Relative(HEADS, HEAD_DIM, kind=kind, max_distance=max_distance, **options)
    return perturb(part).double()


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        randn(B, HEADS, length, HEAD_DIM),
        randn(B, HEADS, S, HEAD_DIM),
        randn(B, HEADS, S, HEAD_DIM),
    )


def oracle(part: Relative, q: Tensor, k: Tensor, *positions: Tensor | None) -> Tensor:
    if part.kind == "learned":
        return oracles.relative_learned_scores(q, k, part.u, part.R, part.S, *positions)
    weights = (part.u, part.v, part.W_R.weight)
    return oracles.relative_sinusoidal_scores(q, k, *weights, *positions)


@KINDS
@LENGTHS
@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_attention_is_the_oracle(kind: str, length: int, impl: str) -> None:
    part, (q, k, v) = relative(kind), inputs(length)
    scores = scores_of(part, q, k, torch.arange(S - length, S))
    close(attend(q, k, v, scores, impl=impl), oracles.causal_attention(oracle(part, q, k), v))


@KINDS
@LENGTHS
def test_given_positions_are_the_oracle(kind: str, length: int) -> None:
    part, (q, k, v) = relative(kind), inputs(length)
    for keys in (torch.arange(S) + 7, torch.randint(40, (B, S)).sort(-1).values):
        queries = keys[..., -length:]
        scores = scores_of(part, q, k, queries, keys)
        expected = oracles.causal_attention(oracle(part, q, k, queries, keys), v)
        close(attend(q, k, v, scores), expected)


@pytest.mark.parametrize("length", [1, 4, S])
def test_far_distances_score_as_the_last_row(length: int) -> None:
    short, long = relative(max_distance=5), relative(max_distance=S)
    with torch.no_grad():
        for name in ("R", "S"):
            rows = getattr(short, name)
            last = rows[:, -1:].expand(-1, S - 5, *rows.shape[2:])
            getattr(long, name).copy_(torch.cat([rows, last], 1))
        long.u.copy_(short.u)
    q, k, v = inputs(length)
    positions = torch.arange(S - length, S)
    first, second = (attend(q, k, v, scores_of(part, q, k, positions)) for part in (short, long))
    close(first, second)
    with torch.no_grad():
        long.R[:, -1] += 1
    differs(attend(q, k, v, scores_of(long, q, k, positions)), second)


def log_weights(part: Relative, q: Tensor, k: Tensor) -> Tensor:
    """The logits below the diagonal, each row shifted so that its last entry is 0."""
    every = torch.eye(S).double().expand(B, HEADS, S, S)
    weights = attend(q, k, every, scores_of(part, q, k, torch.arange(S)), impl="reference")
    log = weights.masked_fill(~torch.ones(S, S).tril().bool(), 1.0).log()
    return (log - log.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).tril()


def test_terms_switch_off_one_by_one_and_add_up() -> None:
    part, (q, k, _) = relative(max_distance=S), inputs(S)
    values = {name: value.clone() for name, value in part.state_dict().items()}
    silent = {name: torch.zeros_like(value) for name, value in values.items()}

    def logits(**given: Tensor) -> Tensor:
        part.load_state_dict(silent | given)
        return log_weights(part, q, k)

    plain = logits()
    parts = {name: logits(**{name: value}) - plain for name, value in values.items()}
    for name, term in parts.items():
        assert term.abs().max() > 1e-3, name
    close(logits(**values), plain + sum(parts.values()))
    # S, too, is divided by sqrt(D)
    expected = (values["S"][:, 2] - values["S"][:, 0]) / math.sqrt(HEAD_DIM)
    close(parts["S"][:, :, 7, 5], expected.expand(B, HEADS))


@KINDS
def test_shift_of_positions_changes_nothing(kind: str) -> None:
    part, (q, k, v) = relative(kind), inputs(S)
    keys = torch.arange(S)
    first, second = (
        attend(q, k, v, scores_of(part, q, k, keys + s, keys + s)) for s in (0, 1_000_003)
    )
    close(first, second, 1e-8)
    close(first, attend(q, k, v, scores_of(part, q, k, keys)))


@KINDS
def test_tables_beyond_the_text_are_unused(kind: str) -> None:
    module, x = build("rcmha", relative=kind, max_distance=40), randn(B, 9, WIDTH)
    before = module(x)
    if kind == "learned":
        with torch.no_grad():
            module.encoding.R[:, 9:] = torch.nan
            module.encoding.S[:, 9:] = torch.nan
    assert torch.equal(module(x), before)


def test_sinusoid_has_sines_first_and_no_limit() -> None:
    for distance in (0, 1, 1000, 1_000_000):
        expected = oracles.relative_sinusoid(distance, 10)
        close(sinusoid(torch.tensor([distance]), 10)[0], expected, 1e-8)


def test_split_of_the_sinusoid_is_the_table() -> None:
    query, weight = randn(B, HEADS, 4, HEAD_DIM), randn(WIDTH, 10)
    positions, keys = torch.randint(900, (B, 4)), torch.randint(900, (B, S))
    turned, key = factors(query, weight, positions, keys)
    bias = turned @ key.mT
    for b in range(B):
        for i in range(4):
            for n in range(S):
                row = weight @ oracles.relative_sinusoid(int(positions[b, i] - keys[b, n]), 10)
                close(bias[b, :, i, n], (query[b, :, i] * row.view(HEADS, HEAD_DIM)).sum(-1))


@KINDS
@pytest.mark.parametrize("chunk", [1, 4])
def test_decoding_past_the_table(kind: str, chunk: int) -> None:
    module = build("rcmha", relative=kind, max_distance=4)
    x = randn(B, S, WIDTH)
    cache = module.make_cache(B, S)
    with torch.no_grad():
        parts = [module(part, cache=cache) for part in x.split(chunk, 1)]
    close(torch.cat(parts, 1), module(x))


@KINDS
def test_left_padding_past_the_table(kind: str) -> None:
    module = build("rmha", relative=kind, max_distance=3)
    rows = [randn(n, WIDTH) for n in (9, 5)]
    x, positions = left_padded(rows)
    y = module(x, positions=positions)
    for i, row in enumerate(rows):
        close(y[i, -len(row) :], module(row[None])[0])


def test_starts() -> None:
    learned = Relative(HEADS, HEAD_DIM, max_distance=7)
    assert learned.R.shape == (HEADS, 7, HEAD_DIM)
    assert learned.S.shape == (HEADS, 7)
    assert not any(parameter.any() for parameter in learned.parameters())
    sinusoidal = Relative(12, 64, kind="sinusoidal")
    for bias in (sinusoidal.u, sinusoidal.v):
        assert bias.std().item() == pytest.approx(0.02, rel=0.15)
    assert sinusoidal.W_R.bias is None
    assert 0.99 * 768**-0.5 < sinusoidal.W_R.weight.abs().max() <= 768**-0.5


def test_every_argument_changes_the_output() -> None:
    def run(**options: Any) -> Tensor:
        module = Attention(WIDTH, HEADS, encoding=Relative(HEADS, HEAD_DIM, **options)).double()
        with torch.no_grad():
            for parameter in module.parameters():
                # the same rows in tables of any length
                rows = torch.arange(parameter.shape[1], dtype=torch.float64)[:, None]
                parameter.copy_((rows + 0.3).sin().view(-1, *[1] * (parameter.ndim - 2)))
        torch.manual_seed(1)
        return module(randn(B, S, WIDTH))

    changes = {"kind": "sinusoidal", "max_distance": 4, "embed_dim": 10}
    sizes = {"num_heads", "head_dim", "causal"}
    assert set(inspect.signature(Relative).parameters) == changes.keys() | sizes
    differs(run(max_distance=S, kind="sinusoidal"), run(max_distance=S))
    differs(run(max_distance=4), run(max_distance=6))
    differs(run(kind="sinusoidal", embed_dim=10), run(kind="sinusoidal"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs max_distance of at least 1; got None"),
        ({"max_distance": 0}, "got 0"),
        ({"kind": "learnt", "max_distance": 3}, "Did you mean 'learned'"),
        ({"kind": "sinusoidal", "embed_dim": 9}, "even"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Relative(HEADS, HEAD_DIM, **options)


def test_sinusoidal_needs_no_limit() -> None:
    module = posenc.attention("rmha", WIDTH, HEADS, max_distance=2).double()
    other = posenc.attention("rmha", WIDTH, HEADS, max_distance=500).double()
    other.load_state_dict(module.state_dict())
    x = randn(B, 20, WIDTH)
    assert torch.equal(module(x), other(x))
