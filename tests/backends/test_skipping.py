"""Skipping what gates drop: attention and projections of the kept rows alone, and when it is on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import oracles
import posenc
from helpers import (
    attend,
    build,
    close,
    counted,
    left_padded,
    outputs_and_gradients,
    perturb,
    randn,
    rms_error,
)
from posenc import MoH
from posenc.backends import projections, skipping
from posenc.backends.skipping import (
    attend_kept,
    merge_kept,
    progressions,
    project_kept,
    projections_pay,
)
from posenc.routing.gates import Gates, weigh
from posenc.scores import RelativeTerm, Scores

SCALE = 0.7
NAN = float("nan")

#: Options of layers; under relative logits nothing may be skipped in attention.
OPTIONS = [
    {},
    {"bias": True},
    {"encoding": "carope"},
    {"conv": True},
    {"encoding": "relative"},
    {"router": "query_norm"},
    {"scaling": "paper"},
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """T and S of every attention that skips."""
    calls = []

    def record(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        calls.append((q.shape[2], k.shape[2]))
        return attend_kept(q, k, *rest)

    monkeypatch.setattr(skipping, "attend_kept", record)
    return calls


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The projections that skip."""
    calls = []
    for function in (project_kept, merge_kept):

        def record(*args: Any, function: Callable[..., Tensor] = function) -> Tensor:
            calls.append(function.__name__)
            return function(*args)

        monkeypatch.setattr(projections, function.__name__, record)
    return calls


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip from lengths that are quick to test, in blocks of which there are several."""
    for module, constants in (
        (skipping, {"SKIP_FROM": 8 * D, "SKIP_TOKEN_FROM": 24}),
        (skipping, {"ROWS": 5, "ROW_STEP": 2, "KEY_STEP": 4, "KEYS_AT_ONCE": 8}),
    ):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip with the narrow heads of `layer` too."""
    monkeypatch.setattr(skipping, "SKIP_FROM", 512 * 18)


def no_rows(shape: tuple[int, int, int]) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


def third(shape: tuple[int, int, int]) -> Tensor:
    return torch.rand(shape) < 1 / 3


def idle_head(shape: tuple[int, int, int]) -> Tensor:
    kept = third(shape)
    kept[:, -1] = False
    return kept


def one_row(row: int) -> Callable[[tuple[int, int, int]], Tensor]:
    def select(shape: tuple[int, int, int]) -> Tensor:
        kept = idle_head(shape)
        kept[:, -1, row] = True
        return kept

    select.__name__ = f"row_{row}"
    return select


def selected(shape: tuple[int, int, int]) -> Tensor:
    """As of a router: each token keeps one head."""
    heads = torch.randint(shape[1], (shape[0], 1, shape[2]))
    return no_rows(shape).scatter(1, heads, True)


def every_row(shape: tuple[int, int, int]) -> Tensor:
    return ~no_rows(shape)


SELECTIONS = [third, no_rows, idle_head, one_row(0), one_row(5), one_row(-1), selected, every_row]


def gates_for(kept: Tensor, always: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gates from 0.2 to 1.2 where kept, and of the first heads everywhere."""
    kept = kept.clone()
    kept[:, :always] = True
    return (torch.rand(kept.shape, dtype=torch.float64) + 0.2).mul(kept).to(dtype)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, Scores(scale=SCALE), impl="reference")


def kept_attention(always: int) -> Callable[..., Tensor]:
    return lambda q, k, v, g: attend_kept(q, k, v, Gates(g, always, 1), SCALE, dense)


def oracle(values: Tensor) -> Callable[..., Tensor]:
    """Weighed attention of q, k, v and gates, whose dropped entries have no gradient."""
    kept = (values != 0).double()
    return lambda q, k, v, g: oracles.weigh_heads(
        oracles.causal_attention(oracles.dot_scores(q, k, SCALE), v), g * kept
    )


def inputs(batch: int, heads: int, length: int, key_length: int, dim: int) -> list[Tensor]:
    return [randn(batch, heads, n, dim) for n in (length, key_length, key_length)]


def check(q: Tensor, k: Tensor, v: Tensor, values: Tensor, always: int, tolerance: float) -> None:
    """Output and gradients are those of the oracle."""
    tensors, probe = (q, k, v, values), torch.randn_like(q)
    ours = outputs_and_gradients(kept_attention(always), tensors, probe)
    theirs = outputs_and_gradients(oracle(values), [x.double() for x in tensors], probe.double())
    for x, a, b in zip((q, *tensors), ours, theirs, strict=True):
        assert a.dtype == x.dtype
        close(a, b, tolerance)
    dropped = values == 0
    assert not ours[0][dropped].any()
    assert not ours[1][dropped].any()
    assert not ours[4][dropped].any()
    with torch.no_grad():
        close(kept_attention(always)(*tensors), theirs[0], tolerance)


# attend_kept


@pytest.mark.parametrize("select", SELECTIONS, ids=lambda select: select.__name__)
@pytest.mark.parametrize("always", [0, 1, 2])
@pytest.mark.parametrize(("length", "key_length"), [(13, 13), (11, 17)])
@pytest.mark.parametrize("rows", [skipping.ROWS, 3])
def test_output_and_gradients_are_those_of_the_oracle(
    select: Callable[..., Tensor],
    always: int,
    length: int,
    key_length: int,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if rows < 16:
        monkeypatch.setattr(skipping, "ROWS", rows)
        monkeypatch.setattr(skipping, "ROW_STEP", 2)
        monkeypatch.setattr(skipping, "KEY_STEP", 4)
        monkeypatch.setattr(skipping, "KEYS_AT_ONCE", 8)
    values = gates_for(select((2, 4, length)), always)
    check(*inputs(2, 4, length, key_length, 5), values, always, 1e-10)


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (2, 4, 9, 5))),
    past=st.integers(0, 6),
    always=st.integers(0, 4),
    blocks=st.tuples(*(st.integers(1, n) for n in (5, 6, 5, 5))),
    share=st.sampled_from([0.1, 0.4, 0.9]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_block(
    sizes: tuple[int, int, int, int],
    past: int,
    always: int,
    blocks: tuple[int, int, int, int],
    share: float,
    seed: int,
) -> None:
    (batch, heads, length, dim), always = sizes, min(always, sizes[1])
    torch.manual_seed(seed)
    values = gates_for(torch.rand(batch, heads, length) < share, always)
    with pytest.MonkeyPatch.context() as patch:
        names = ("ROWS", "ROW_STEP", "KEY_STEP", "KEYS_AT_ONCE")
        for name, value in zip(names, blocks, strict=True):
            patch.setattr(skipping, name, value)
        check(*inputs(batch, heads, length, length + past, dim), values, always, 1e-10)


@pytest.mark.parametrize("kept", [96, 97, 103])
def test_more_rows_than_a_block(kept: int) -> None:
    rows = torch.randperm(103)[:kept]
    values = gates_for(no_rows((1, 1, 103)).index_fill(2, rows, True), 0)
    check(*inputs(1, 1, 103, 107, 3), values, 0, 1e-10)


@pytest.mark.parametrize("select", [third, no_rows, every_row, selected])
@pytest.mark.parametrize("always", [0, 2, 5])
@pytest.mark.parametrize("key_length", [1, 19])
def test_one_token(select: Callable[..., Tensor], always: int, key_length: int) -> None:
    values = gates_for(select((2, 5, 1)), always)
    check(*inputs(2, 5, 1, key_length, 3), values, always, 1e-10)


@pytest.mark.parametrize("length", [1, 13])
def test_dropped_heads_are_not_computed(length: int) -> None:
    """What is dropped would be NaN, and 0 times NaN too."""
    q, k, v = inputs(2, 6, length, 17, 3)
    values = gates_for(third((2, 6, length)), 1)
    values[:, 4] = 0
    q[values == 0] = k[:, 4] = v[:, 4] = NAN
    heads = []

    def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads.append(q.shape[0] * q.shape[1])
        return dense(q, k, v)

    with torch.no_grad():
        y = attend_kept(q, k, v, Gates(values, 1, 1), SCALE, record)
    assert sum(heads) == ((values != 0).sum() if length == 1 else 2)
    expected = oracle(values)(*(x.nan_to_num() for x in (q, k, v)), values)
    close(y, expected)
    _, *gradients = outputs_and_gradients(kept_attention(1), (q, k, v, values), torch.ones_like(q))
    assert all(x.isfinite().all() for x in gradients)
    assert not any(x[:, 4].any() for x in gradients)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_gates_of_a_router(shared: int, tied: bool) -> None:
    router = perturb(MoH(20, 7, shared=shared, top_k=2)).double()
    if tied:
        nn.init.zeros_(router.W_r.weight)
    values = router(randn(2, 13, 20), None)[0].detach()
    assert ((values != 0).sum(1) == shared + 2).all()
    check(*inputs(2, 7, 13, 13, 5), values, shared, 1e-10)


@pytest.mark.parametrize("always", [0, 2])
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.float64])
def test_fp32(always: int, gate_dtype: torch.dtype) -> None:
    values = gates_for(third((2, 4, 37)), always, gate_dtype)
    q, k, v = (x.float() for x in inputs(2, 4, 37, 43, 6))
    check(q, k, v, values, always, 1e-5)


@pytest.mark.parametrize("length", [1, 37])
def test_bf16_is_no_worse_than_twice_the_dense_computation(length: int) -> None:
    """Output and gradients, on average over all entries."""
    values = gates_for(third((2, 4, length)), 1, torch.float32)
    q, k, v = (x.bfloat16() for x in inputs(2, 4, length, 43, 6))
    tensors, probe, kept = (q, k, v, values), torch.randn_like(q), values != 0

    def bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, Scores(scale=SCALE), impl="sdpa")

    def skipped(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return attend_kept(q, k, v, Gates(g, 1, 1), SCALE, bf16)

    def whole(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return weigh(bf16(q, k, v), g * kept)

    exact = outputs_and_gradients(oracle(values), [x.double() for x in tensors], probe.double())
    ours, theirs = (outputs_and_gradients(f, tensors, probe) for f in (skipped, whole))
    for a, b, expected in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert rms_error(a, expected) <= 2 * rms_error(b, expected)


@pytest.mark.parametrize("length", [1, 37])
def test_bf16_is_rounded_once(length: int) -> None:
    """All between is fp32: the error is that of half a unit in the last place, 2**-8, at most."""
    values = gates_for(third((2, 4, length)), 0, torch.float32)
    tensors = [*(x.bfloat16() for x in inputs(2, 4, length, 43, 6)), values]
    probe = torch.randn_like(tensors[0])
    ours = outputs_and_gradients(kept_attention(0), tensors, probe)
    exact = outputs_and_gradients(oracle(values), [x.double() for x in tensors], probe.double())
    for a, expected in zip(ours, exact, strict=True):
        assert rms_error(a, expected) <= 2**-8


@pytest.mark.parametrize(("length", "key_length"), [(5, 5), (3, 7), (1, 4)])
def test_gradcheck(length: int, key_length: int, early: None) -> None:
    kept = third((2, 3, length)).index_fill(1, torch.tensor([0, 2]), True)
    free = (torch.rand(2, 3, length, dtype=torch.float64) + 0.2).requires_grad_()
    tensors = [x.requires_grad_() for x in inputs(2, 3, length, key_length, 2)]

    def function(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return kept_attention(1)(q, k, v, g * kept)

    torch.autograd.gradcheck(function, (*tensors, free))


def test_views_and_expanded_gradients(early: None) -> None:
    """q, k and v are views of one projection, gates of (B, T, H); the gradient has strides of 0."""
    batch, heads, length, dim = 2, 5, 13, 4
    packed = randn(batch, length, 3 * heads * dim)
    values = gates_for(third((batch, heads, length)), 1)

    def run(attention: Callable[..., Tensor], packed: Tensor, g: Tensor) -> list[Tensor]:
        leaves = packed.clone().requires_grad_(), g.transpose(1, 2).contiguous().requires_grad_()
        parts = leaves[0].unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4)
        y = attention(*parts, leaves[1].transpose(1, 2))
        gradient = torch.tensor(1.7).double().expand_as(y)
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]

    ours, theirs = (run(f, packed, values) for f in (kept_attention(1), oracle(values)))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    with torch.no_grad():
        shared_keys = packed[:, :, :dim].unsqueeze(1).expand(batch, heads, length, dim)
        q = randn(batch, length, heads, dim).transpose(1, 2)
        y = kept_attention(1)(q, shared_keys, shared_keys, values)
        close(y, oracle(values)(q, shared_keys, shared_keys, values))


@settings(deadline=None, max_examples=100)
@given(st.sets(st.integers(0, 40)).map(sorted))
def test_progressions_enumerate_exactly_the_numbers(numbers: list[int]) -> None:
    parts = list(progressions(numbers))
    assert [n for part in parts for n in range(part.start, part.stop, part.step)] == numbers
    heads = torch.arange(41)
    assert [n for part in parts for n in heads[part].tolist()] == numbers
    assert len(parts) <= (len(numbers) + 1) // 2  # only the last may hold a lone number


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9))
def test_a_progression_is_one_slice(start: int, step: int, count: int) -> None:
    (part,) = progressions(list(range(start, start + step * count, step)))
    assert len(range(part.start, part.stop, part.step)) == count


# core.attend

H, ALWAYS, D = 6, 1, 4


def some_gates(length: int, active: int, always: int = ALWAYS, **options: Any) -> Gates:
    order = torch.rand(2, H - always, length).argsort(1)
    kept = torch.cat((torch.ones(2, always, length), (order < active - always).double()), 1)
    return Gates(gates_for(kept != 0, always), always, active, **options)


def relative(length: int, key_length: int) -> Scores:
    return Scores(relative=RelativeTerm(randn(H, 8, D)))


@pytest.mark.parametrize(
    ("length", "key_length", "active", "options", "expected"),
    [
        (8, 8, 3, {}, True),
        (7, 7, 3, {}, False),
        (7, 40, 3, {}, False),
        (8, 40, 3, {}, True),
        (1, 24, 3, {"no_grad": True}, True),
        (1, 23, 3, {"no_grad": True}, False),
        (1, 24, 3, {}, False),
        (13, 13, 2, {}, True),
        (13, 13, 4, {}, False),
        (13, 13, 6, {"always": 6}, False),
        (13, 13, 3, {"always": 0}, False),
        (13, 13, 2, {"always": 0}, True),
        (13, 13, 3, {"scores": lambda *_: Scores(SCALE, randn(H, D))}, True),
        (13, 13, 3, {"scores": relative}, False),
        (13, 13, 3, {"scores": lambda *sizes: Scores(bias=randn(H, *sizes))}, False),
        (13, 13, 3, {"real": True}, False),
        (1, 24, 3, {"real": True, "no_grad": True}, False),
        (13, 13, 3, {"gradient": True}, True),
        (13, 13, 3, {"straight_through": True}, True),
        (13, 13, 3, {"straight_through": True, "gradient": True}, False),
        (13, 13, 3, {"straight_through": True, "gradient": True, "no_grad": True}, True),
        (13, 13, 3, {"impl": "sdpa"}, False),
        (13, 13, 3, {"impl": "reference"}, False),
    ],
)
def test_auto_skips_exactly_where_it_should(
    length: int,
    key_length: int,
    active: int,
    options: dict[str, Any],
    expected: bool,
    taken: list[tuple[int, int]],
    early: None,
) -> None:
    q, k, v = inputs(2, H, length, key_length, D)
    gates = some_gates(
        length,
        active,
        options.get("always", ALWAYS),
        straight_through=options.get("straight_through", False),
    )
    gates.values.requires_grad_(options.get("gradient", False))
    scores = options["scores"](length, key_length) if "scores" in options else None
    real = torch.arange(key_length) >= torch.tensor([[0], [3]]) if "real" in options else None
    with torch.set_grad_enabled("no_grad" not in options):
        y, reference = (
            attend(q, k, v, scores, gates=gates, real=real, impl=impl)
            for impl in (options.get("impl", "auto"), "reference")
        )
    assert taken == ([(length, key_length)] if expected else [])
    close(y, reference)


def test_dropout_and_absent_gates_do_not_skip(taken: list[tuple[int, int]], early: None) -> None:
    q, k, v = inputs(2, H, 13, 13, D)
    attend(q, k, v, gates=some_gates(13, 3), dropout_p=0.1)
    attend(q, k, v)
    assert not taken
    attend(q, k, v, gates=some_gates(13, 3))
    assert taken


@pytest.mark.parametrize("below", [0, 1])
@pytest.mark.parametrize("token", [False, True])
def test_lengths_from_which_it_pays(token: bool, below: int, taken: list[tuple[int, int]]) -> None:
    key_length = (skipping.SKIP_TOKEN_FROM if token else skipping.SKIP_FROM // 64) - below
    length = 1 if token else key_length
    q, k, v = inputs(2, H, length, key_length, 64)
    gates = some_gates(length, 3)
    with torch.no_grad():
        y, reference = (attend(q, k, v, gates=gates, impl=i) for i in ("auto", "reference"))
    assert len(taken) == 1 - below
    close(y, reference)


# Whole layers


def layer(**options: Any) -> posenc.Attention:
    """Two of six routed heads."""
    sizes = {"heads": 7, "head_dim": 18, "dtype": torch.float32, "noise": 0.05}
    return build("moh", **{**sizes, "shared": 1, "top_k": 2, **options})


def wide_layer(**options: Any) -> posenc.Attention:
    return layer(**{"heads": 8, "head_dim": 64, "noise": 0.02, "shared": 2, **options})


def both(module: posenc.Attention, run: Callable[[], Any]) -> tuple[Any, Any]:
    """What `run` gives with impl="auto", and with "reference"."""
    found = []
    for impl in ("auto", "reference"):
        module.impl = impl
        found.append(run())
    module.impl = "auto"
    return found[0], found[1]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_layer_equals_the_reference(
    options: dict[str, Any], taken: list[tuple[int, int]]
) -> None:
    module, x = layer(**options), randn(2, 523, 126, dtype=torch.float32)
    with torch.no_grad():
        (y, aux), (expected, expected_aux) = both(module, lambda: module(x, return_aux=True))
    assert taken == ([] if options.get("encoding") == "relative" else [(523, 523)])
    close(y, expected, 1e-5)
    close(aux, expected_aux, 1e-6)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_a_layer_equal_the_reference(
    options: dict[str, Any], taken: list[tuple[int, int]]
) -> None:
    module, x = layer(**options), randn(2, 523, 126, dtype=torch.float32).requires_grad_()
    probe, leaves = torch.randn_like(x), [x, *module.parameters()]

    def run() -> tuple[Tensor, ...]:
        y, aux = module(x, return_aux=True)
        return torch.autograd.grad((y * probe).sum() + aux, leaves)

    ours, theirs = both(module, run)
    assert bool(taken) == ("encoding" not in options or options["encoding"] == "carope") - (
        options.get("router") == "query_norm"
    )
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 2e-5)


@pytest.mark.usefixtures("narrow")
def test_tied_scores_and_dropped_heads_of_a_layer(taken: list[tuple[int, int]]) -> None:
    """A router of zeros sends every token to the same heads; the others are kept by none."""
    module, x = layer(), randn(1, 523, 126, dtype=torch.float32)
    nn.init.zeros_(module.router.W_r.weight)
    ours, theirs = both(module, lambda: module(x).detach())
    assert taken
    close(ours, theirs, 1e-5)


@pytest.mark.usefixtures("narrow")
def test_autocast(taken: list[tuple[int, int]]) -> None:
    module, x = layer(), randn(2, 523, 126, dtype=torch.float32).requires_grad_()
    probe = torch.randn_like(x)

    def run() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        return y.detach(), *torch.autograd.grad((y * probe).sum(), x)

    ours, theirs = both(module, run)
    assert taken
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 0.03)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_chunks_then_tokens_equal_the_full_pass(
    options: dict[str, Any], grad: bool, taken: list[tuple[int, int]], early: None
) -> None:
    module = layer(**{**options, "dtype": torch.float64, "noise": 0.3, "head_dim": 6})
    x, parts = randn(2, 29, 42), (9, 11, *(1,) * 9)
    with torch.set_grad_enabled(grad):
        module.impl = "reference"
        expected = module(x)
        module.impl = "auto"
        cache = module.make_cache(2, 29)
        y = torch.cat([module(part, cache=cache) for part in x.split(parts, 1)], 1)
    if options.get("encoding") == "relative" or (grad and "router" in options):
        assert not taken
    else:
        # In a single token's graph dense attention is faster.
        tokens = [] if grad else [(1, n) for n in range(24, 30)]
        assert taken == [(9, 9), (11, 20), *tokens]
    close(y, expected)


def test_a_layer_without_data() -> None:
    x = torch.empty(2, 523, 126, device="meta")
    assert layer().to("meta")(x).shape == x.shape


def test_compiled_it_does_not_skip(taken: list[tuple[int, int]], early: None) -> None:
    module, x = layer(head_dim=6), randn(2, 11, 42, dtype=torch.float32)
    with torch.no_grad(), counted("eager") as (compiled, counter):
        y = compiled(module)(x)
        assert counter.frame_count == 1
        assert not taken
        close(y, module(x), 1e-5)
        assert taken


# Projections


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("always", [0, 1, 2])
@pytest.mark.parametrize("select", SELECTIONS, ids=lambda select: select.__name__)
def test_projections_are_those_of_the_oracle(
    bias: bool, always: int, select: Callable[..., Tensor]
) -> None:
    batch, heads, length, dim, width = 2, 5, 13, 3, 11
    values = gates_for(select((batch, heads, length)), always)
    gates, kept = Gates(values, always, 1), (values != 0).unsqueeze(-1)
    x, weight = randn(batch, length, width), randn(2 * heads * dim, width)
    offset = randn(2 * heads * dim) if bias else None
    W, b = weight[heads * dim :], offset[heads * dim :] if bias else None  # views, as in a layer
    close(project_kept(x, W, b, gates), oracles.project(x, W, b, heads) * kept)
    y = randn(batch, heads, length, dim)
    W, b = randn(width, heads * dim), randn(width) if bias else None
    expected = oracles.merge(y * kept, W, b)
    close(merge_kept(y.masked_fill(~kept, NAN), W, b, gates), expected)


@pytest.mark.parametrize(
    ("shape", "changes", "expected"),
    [
        ((1, 512, 512), {}, True),
        ((2, 256, 512), {}, True),
        ((1, 511, 512), {}, False),
        ((1, 512, 511), {}, False),
        ((1, 512, 512), {"dtype": torch.float64}, True),
        ((1, 512, 512), {"dtype": torch.bfloat16}, False),
        ((1, 512, 512), {"device": "meta"}, False),
        ((1, 512, 512), {"active": 4}, False),
        ((1, 512, 512), {"grad": True}, False),
        ((1, 512, 512), {"autocast": True}, False),
        ((1, 512, 512), {"compiling": True}, False),
    ],
)
def test_projections_pay(
    shape: tuple[int, int, int],
    changes: dict[str, Any],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"dtype": torch.float32, "device": "cpu", "active": 3} | changes
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: "compiling" in changes)
    x = torch.empty(shape, dtype=changes["dtype"], device=changes["device"])
    with (
        torch.set_grad_enabled("grad" in changes),
        torch.autocast("cpu", torch.bfloat16, enabled="autocast" in changes),
    ):
        assert projections_pay(x, some_gates(3, changes["active"])) == expected


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(1, 521), (3, 181)])
@pytest.mark.parametrize("options", [{}, {"encoding": "relative"}, {"shared": 0}], ids=str)
def test_skipped_projections_equal_whole_ones(
    bias: bool, batch: int, length: int, options: dict[str, Any], projected: list[str]
) -> None:
    """Where attention itself does not skip, too."""
    module = wide_layer(bias=bias, **options)
    x = randn(batch, length, 512, dtype=torch.float32)
    expected = module(x).detach()
    assert not projected
    with torch.no_grad():
        close(module(x), expected, 1e-5)
        assert projected == ["project_kept", "merge_kept"]
        cache = module.make_cache(batch, length + 1)
        close(module(x, cache=cache), expected, 1e-5)
        assert projected == ["project_kept", "merge_kept"] * 2
        module(x[:, :1], cache=cache)
        assert len(projected) == 4  # too few tokens


def test_skipped_projections_of_padded_rows(projected: list[str]) -> None:
    module = wide_layer(bias=True)
    rows = [randn(n, 512, dtype=torch.float32) for n in (281, 243)]
    x, positions = left_padded(rows)
    with torch.no_grad():
        y = module(x, positions=positions)
        assert projected == ["project_kept", "merge_kept"]
        for row, out in zip(rows, y, strict=True):
            close(out[-len(row) :], module(row[None])[0], 1e-5)


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


@pytest.mark.parametrize("part", ["c_attn", "c_proj"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "class"])
def test_projections_that_do_more_are_called(part: str, how: str, projected: list[str]) -> None:
    module, x = wide_layer(), randn(1, 521, 512, dtype=torch.float32)
    with torch.no_grad():
        plain = module(x)
    assert projected
    projected.clear()
    linear, calls = getattr(module, part), []
    if how == "hook":
        linear.register_forward_hook(lambda module, x, y: calls.append(1) or 1.5 * y)
    elif how == "pre-hook":
        linear.register_forward_pre_hook(lambda module, x: calls.append(1) or (1.5 * x[0],))
    else:
        louder = Louder(linear.in_features, linear.out_features, bias=False)
        louder.weight = linear.weight
        setattr(module, part, louder)
    expected = module(x).detach()
    with torch.no_grad():
        y = module(x)
    assert not projected
    assert len(calls) == (0 if how == "class" else 2)
    close(y, expected, 1e-5)
    assert (y - plain).abs().max() > 0.01 * plain.abs().max()


@pytest.mark.parametrize(
    "options",
    [{"conv": True}, {"impl": "sdpa"}, {"router": "query_norm"}, {"top_k": 4}],
    ids=str,
)
def test_layers_whose_projections_are_whole(options: dict[str, Any], projected: list[str]) -> None:
    module, x = wide_layer(**options), randn(1, 521, 512, dtype=torch.float32)
    with torch.no_grad():
        y = module(x)
    assert not projected
    close(y, both(module, lambda: module(x).detach())[1], 1e-5)


# Rows do not see each other


def block_ends(module: posenc.Attention, x: Tensor) -> list[int]:
    """The tokens at which blocks of kept rows, and of keys, end."""
    values = module.router(x, None)[0]
    ends = {*range(0, x.shape[1], skipping.KEY_STEP), 256, 512, x.shape[1] - 1}
    for head in (module.router.shared, module.num_heads - 1):
        rows = values[0, head].nonzero().flatten()
        ends |= set(rows[skipping.ROWS - 1 :: skipping.ROWS].tolist())
    return sorted({t for end in ends for t in (end, end + 1) if 0 < t < x.shape[1]})


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("change", ["other tokens", "one token"])
def test_causal_to_the_bit(
    wide: bool,
    dtype: torch.dtype,
    change: str,
    taken: list[tuple[int, int]],
    projected: list[str],
) -> None:
    """Of equal tokens from t on, most heads keep none: blocks and products before t get smaller."""
    length = 961  # more than 2 KEYS_AT_ONCE
    module = (wide_layer if wide else layer)(dtype=dtype)
    x = randn(1, length, module.embed_dim, dtype=dtype)
    with torch.no_grad():
        y = module(x)
        changed = {}
        for t in block_ends(module, x):
            tail = randn(1, length - t if change == "other tokens" else 1, x.shape[-1], dtype=dtype)
            z = torch.cat((x[:, :t], tail.expand(1, length - t, -1)), 1)
            rows = (module(z)[:, :t] != y[:, :t]).any(-1).nonzero()[:, 1].tolist()
            if rows:
                changed[t] = rows
    assert taken
    assert bool(projected) == wide
    assert not changed


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("wide", [False, True])
def test_a_row_alone_equals_the_row_in_its_batch(
    wide: bool, taken: list[tuple[int, int]], projected: list[str]
) -> None:
    module = (wide_layer if wide else layer)(bias=True)
    x = randn(3, 523, module.embed_dim, dtype=torch.float32)
    with torch.no_grad():
        together = module(x)
        for b in range(3):
            close(module(x[b : b + 1])[0], together[b], 1e-5)
    assert len(taken) == 4
    assert len(projected) == (8 if wide else 0)


# What watches or transforms the computation gets the dense one


def batched(module: posenc.Attention, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.func.vmap(module)(x.unsqueeze(1)).squeeze(1)


def in_a_mode(module: posenc.Attention, x: Tensor) -> Tensor:
    with torch.no_grad(), FlopCounterMode(display=False):
        return module(x)


def faked(module: posenc.Attention, x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert module(mode.from_tensor(x)).shape == x.shape
    return module(x).detach()


def traced(module: posenc.Attention, x: Tensor) -> Tensor:
    other = torch.randn_like(x)
    with torch.no_grad():
        return torch.jit.trace(module, other, check_trace=False)(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("watch", [batched, in_a_mode, faked, traced])
def test_the_dense_path_serves_what_watches(
    watch: Callable[[posenc.Attention, Tensor], Tensor],
    taken: list[tuple[int, int]],
    projected: list[str],
) -> None:
    module, x = wide_layer(), randn(2, 521, 512, dtype=torch.float32)
    with torch.no_grad():
        expected = module(x)
    assert taken
    assert projected
    taken.clear()
    projected.clear()
    close(watch(module, x), expected, 1e-5)
    assert not projected
    assert len(taken) == (1 if watch is faked else 0)  # it ends with a plain call


@pytest.mark.filterwarnings("ignore")  # sdpa has no batching rule
def test_per_sample_gradients() -> None:
    module, x = wide_layer(), randn(2, 513, 512, dtype=torch.float32)
    weights = dict(module.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    module(x[1:]).square().sum().backward()
    close(each["c_proj.weight"][1], module.c_proj.weight.grad, 1e-4)


def test_global_hooks_see_every_projection(projected: list[str]) -> None:
    module, seen = wide_layer(), []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda part, inputs, output: seen.append(part)
    )
    try:
        with torch.no_grad():
            module(randn(1, 521, 512, dtype=torch.float32))
    finally:
        handle.remove()
    assert not projected
    assert {module.c_attn, module.c_proj} <= set(seen)
