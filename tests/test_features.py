"""What layers can do beside their method: grouped keys, head sizes, norms, windows, padding,
packed documents, both directions, and decoding with each: one suite over `posenc.names()`.
"""

import random
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import posenc
from helpers import (
    CAUSAL_ALONE,
    HEAD_DIM,
    HEADS,
    NAMES,
    WIDTH,
    close,
    differs,
    error,
    oracle_layer,
    perturb,
    randn,
    raw_weights,
    repeat_key_heads,
    trained,
)
from posenc.cache import Cache

#: Crosses, and variants whose parameters have other shapes or edges.
CROSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "moh-carope": ("moh", {"encoding": "carope"}),
    "moh-polar-conv": ("moh", {"encoding": "polar", "conv": True}),
    "moh-query-norm": ("moh", {"router": "query_norm"}),
    "carope-conv": ("carope", {"conv": True}),
    "rope-conv-of-4": ("rope", {"conv": True, "per_head": True, "kernel_size": 4}),
    "rcmha-near": ("rcmha", {"max_distance": 4}),
    "rcmha-sinusoidal": ("rcmha", {"relative": "sinusoidal"}),
}
pytestmark = pytest.mark.parametrize("name", [*NAMES, *CROSSES])

GROUPS, WINDOW, LENGTH = 2, 3, 9
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": GROUPS},
    "one-key-head": {"num_kv_heads": 1},
    "wide": {"head_dim": 8},
    "norm": {"qk_norm": "rms"},
    "window": {"window": WINDOW},
    "two-sided": {"causal": False},
    "grouped-window": {"num_kv_heads": GROUPS, "window": WINDOW},
    "wide-norm": {"head_dim": 8, "qk_norm": "rms"},
    "two-sided-window": {"causal": False, "window": WINDOW},
    "all": {"num_kv_heads": GROUPS, "head_dim": 8, "qk_norm": "rms", "window": WINDOW},
    "all-two-sided": {
        "num_kv_heads": GROUPS,
        "head_dim": 8,
        "qk_norm": "rms",
        "window": WINDOW,
        "causal": False,
    },
}
MASK = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 0, 0]]).bool()
SEGMENTS = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2], [7, 7, 7, 7, 7, 7, 4, 4, 4]])
POSITIONS = torch.tensor([[-1, -1, 0, 1, 5, 6, 7, 20, 21], [3, 4, 5, 9, 10, 11, 0, 1, 3]])
ARRANGEMENTS: dict[str, dict[str, Tensor]] = {
    "whole": {},
    "mask": {"mask": MASK},
    "segments": {"segments": SEGMENTS},
    "mask-segments": {"mask": MASK, "segments": SEGMENTS},
    "mask-segments-positions": {"mask": MASK, "segments": SEGMENTS, "positions": POSITIONS},
}
#: Options alone, and some in every arrangement of the row. The plain layer is the contract's.
MEETINGS = [
    *((options, "whole") for options in OPTIONS if options not in ("plain", "one-key-head")),
    *((options, "mask") for options in ("plain", "all", "all-two-sided")),
    *((options, "segments") for options in ("plain", "all", "all-two-sided")),
    *((options, "mask-segments") for options in ("window", "two-sided")),
    *((options, "mask-segments-positions") for options in ("plain", "all", "all-two-sided")),
]


def some(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("options", [OPTIONS[name] for name in names], ids=names)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _causal_alone(request: pytest.FixtureRequest, name: str) -> None:
    """Names without a meaning in both directions refuse them, and have no further tests there."""
    options = request.node.callspec.params.get("options", {})
    options = OPTIONS[options] if isinstance(options, str) else options
    if name in CAUSAL_ALONE and not options.get("causal", True):
        with pytest.raises(ValueError, match="causal=False"):
            made(name, **options)
        pytest.skip("has no meaning without a causal order")


def made(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> posenc.Attention:
    """A layer with biases in eval mode, away from its initial values."""
    base, own = CROSSES.get(name, (name, {}))
    module = posenc.attention(base, WIDTH, HEADS, bias=True, **own, **options)
    return perturb(module).to(dtype).eval()


def gradients(module: nn.Module, x: Tensor, loss: Tensor) -> list[Tensor]:
    """Of x and of every parameter that is trained."""
    leaves = [x, *trained(module).values()]
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True))


def same_gradients(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize(("options", "arrangement"), MEETINGS, ids=map("-".join, MEETINGS))
def test_layer_is_its_oracle(name: str, options: str, arrangement: str) -> None:
    features, call = OPTIONS[options], ARRANGEMENTS[arrangement]
    module, x = made(name, **features), randn(2, LENGTH, WIDTH).requires_grad_()
    real = torch.ones(2, LENGTH).bool()
    if "mask" in call:
        real = MASK & (POSITIONS >= 0) if "positions" in call else MASK
    weights, probe = raw_weights(module), randn(2, LENGTH, WIDTH) * real[..., None]
    y, aux = module(x, return_aux=True, **call)
    expected, expected_aux = oracle_layer(module, x, weights=weights, **features, **call)
    assert y.isfinite().all()
    close(y[real], expected[real])
    close(aux, expected_aux)
    actual = gradients(module, x, (y * probe).sum() + aux)
    loss = (expected * probe).sum() + expected_aux
    leaves = [x, *(weights[which] for which in trained(module))]
    same_gradients(actual, list(torch.autograd.grad(loss, leaves, materialize_grads=True)))


@some("all", "all-two-sided")
def test_float32_layer_is_its_oracle(name: str, options: dict[str, Any]) -> None:
    module, x = made(name, torch.float32, **options), randn(2, LENGTH, WIDTH, dtype=torch.float32)
    call = ARRANGEMENTS["mask-segments"]
    expected, _ = oracle_layer(module, x.double(), **options, **call)
    close(module(x, **call)[MASK], expected[MASK], 1e-5)


@some("plain", "two-sided", "all", "all-two-sided")
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_back_ends_agree_or_refuse(name: str, impl: str, options: dict[str, Any]) -> None:
    module, x = made(name, **options), randn(2, LENGTH, WIDTH)

    def run(call: dict[str, Tensor]) -> Tensor | str:
        try:
            twin = made(name, impl=impl, **options)
            twin.load_state_dict(module.state_dict())
            return twin(x, **call)
        except ValueError as refusal:
            return str(refusal)

    for call in ARRANGEMENTS.values():
        y = run(call)
        if isinstance(y, str):
            assert impl != "reference"
            assert "impl=" in y
            continue
        real = call.get("mask", torch.ones_like(MASK)) & (call.get("positions", POSITIONS + 1) >= 0)
        close(y[real], module(x, **call)[real])


DOCUMENTS = ((4, 1, 6), (8, 3))


@some("plain", "window", "two-sided", "all", "all-two-sided")
def test_packed_documents_are_documents_alone(name: str, options: dict[str, Any]) -> None:
    module, x = made(name, **options), randn(2, 11, WIDTH).requires_grad_()
    probe = randn(2, 11, WIDTH)
    y = module(x, segments=torch.cat([posenc.segments(lengths) for lengths in DOCUMENTS]))
    packed = gradients(module, x, (y * probe).sum())
    loss = x.new_zeros(())
    for row, lengths in enumerate(DOCUMENTS):
        for start, stop in pairwise((0, *accumulate(lengths))):
            alone = module(x[row : row + 1, start:stop])
            close(y[row, start:stop], alone[0])
            loss = loss + (alone[0] * probe[row, start:stop]).sum()
    same_gradients(packed, gradients(module, x, loss))


@some("plain", "two-sided", "all")
def test_documents_do_not_meet(name: str, options: dict[str, Any]) -> None:
    module, x = made(name, **options), randn(2, LENGTH, WIDTH)
    changed = x.clone()
    changed[:, 3:6] = 3 * randn(2, 3, WIDTH)
    segments = posenc.segments([3, 3, 3]).expand(2, LENGTH)
    y, other = module(x, segments=segments), module(changed, segments=segments)
    for others in (slice(0, 3), slice(6, 9)):
        close(other[:, others], y[:, others], 1e-12)
    differs(other[:, 3:6], y[:, 3:6])


LENGTHS = (7, 4, 1)


def padded_rows(where: str) -> Tensor:
    """A mask (3, T) with LENGTHS real tokens in its rows."""
    mask, rng = torch.zeros(3, LENGTH, dtype=torch.bool), random.Random(0)
    for row, count in enumerate(LENGTHS):
        places = {
            "left": range(LENGTH - count, LENGTH),
            "right": range(count),
            "within": rng.sample(range(LENGTH), count),
        }
        mask[row, list(places[where])] = True
    return mask


@some("plain", "window", "two-sided", "all", "all-two-sided")
@pytest.mark.parametrize("where", ["left", "right", "within"])
def test_padded_rows_are_rows_alone(name: str, where: str, options: dict[str, Any]) -> None:
    module, mask = made(name, **options), padded_rows(where)
    x, probe = (3 * randn(3, LENGTH, WIDTH)).requires_grad_(), randn(3, LENGTH, WIDTH)
    y = module(x, mask=mask)
    assert y.isfinite().all()
    padded = gradients(module, x, (y * probe)[mask].sum())
    assert not padded[0][~mask].any()
    taps = module.conv is not None or hasattr(module.encoding, "kernel")
    counts_rows = taps or "window" in options
    if where == "within" and counts_rows:  # padding then keeps tokens apart
        expected, _ = oracle_layer(module, x, mask=mask, **options)
        close(y[mask], expected[mask])
        return
    loss = x.new_zeros(())
    for row in range(3):
        alone = module(x[row : row + 1, mask[row]])[0]
        close(y[row, mask[row]], alone)
        loss = loss + (alone * probe[row, mask[row]]).sum()
    same_gradients(padded, gradients(module, x, loss))


@some("plain", "two-sided", "all")
def test_rows_of_padding_alone_stay_finite(name: str, options: dict[str, Any]) -> None:
    module, mask = made(name, **options), torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[1] = True
    for rows in (mask, torch.zeros_like(mask)):
        x = randn(2, LENGTH, WIDTH).requires_grad_()
        y, aux = module(x, mask=rows, return_aux=True)
        for value in (y, aux, *gradients(module, x, y.square().sum() + aux)):
            assert value.isfinite().all()
    close(module(x, mask=mask)[1:], module(x[1:]))


@some("plain", "all")
def test_left_padding_is_that_of_negative_positions(name: str, options: dict[str, Any]) -> None:
    module, x, mask = made(name, **options), randn(3, LENGTH, WIDTH), padded_rows("left")
    positions = torch.where(mask, mask.cumsum(1) - 1, -1)
    close(module(x, mask=mask)[mask], module(x, positions=positions)[mask])


@some("plain", "two-sided", "all", "all-two-sided")
def test_masks_and_segments_that_divide_nothing(name: str, options: dict[str, Any]) -> None:
    module, x = made(name, **options), randn(2, LENGTH, WIDTH)
    y, aux = module(x, return_aux=True)
    everything = torch.ones(2, LENGTH, dtype=torch.bool)
    for call in ({"mask": everything}, {"segments": everything.int()}):
        ours, our_aux = module(x, return_aux=True, **call)
        close(ours, y, 1e-12)
        close(our_aux, aux, 1e-12)


@some("plain", "two-sided")
def test_shifted_positions_in_documents_change_nothing(name: str, options: dict[str, Any]) -> None:
    module, x = made(name, **options), randn(2, LENGTH, WIDTH)
    expected = module(x, segments=SEGMENTS)
    # Absolute schemes may count from afar alone.
    later = torch.arange(LENGTH) + (5 if module.encoding.relative else 10_000)
    for positions in (later, later.expand(2, LENGTH)):
        shifted = module(x, segments=SEGMENTS, positions=positions)
        if module.encoding.relative:
            close(shifted, expected)
        else:
            differs(shifted, expected)


@pytest.mark.parametrize("groups", [1, 2])
@some("plain", "norm", "window", "two-sided")
def test_groups_are_repeated_key_heads(name: str, groups: int, options: dict[str, Any]) -> None:
    grouped, x = made(name, num_kv_heads=groups, **options), randn(2, LENGTH, WIDTH)
    module = made(name, **options)
    assert grouped.c_attn.weight.shape == ((HEADS + 2 * groups) * HEAD_DIM, WIDTH)
    repeat_key_heads(grouped, module, groups)
    close(grouped(x), module(x))


def test_as_many_key_heads_as_query_heads_change_nothing(name: str) -> None:
    module, x = made(name), randn(2, LENGTH, WIDTH)
    twin = made(name, num_kv_heads=HEADS, head_dim=HEAD_DIM, causal=True, window=None, qk_norm=None)
    assert [(which, weight.shape) for which, weight in twin.state_dict().items()] == [
        (which, weight.shape) for which, weight in module.state_dict().items()
    ]
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x))


@some("plain", "two-sided", "grouped")
def test_windows_from_the_token_itself_to_everything(name: str, options: dict[str, Any]) -> None:
    module, x = made(name, **options), randn(2, LENGTH, WIDTH)

    def seen(window: int | None, **call: Tensor) -> Tensor:
        twin = made(name, window=window, **options)
        twin.load_state_dict(module.state_dict())
        return twin(x, **call)

    whole = module(x)
    close(seen(None), whole, 1e-12)
    close(seen(LENGTH), whole, 1e-12)
    close(seen(LENGTH + 5), whole, 1e-12)
    differs(seen(LENGTH - 1), whole, 1e-8)
    if module.conv is None:
        alone = module(x, segments=torch.arange(LENGTH).expand(2, LENGTH))
        close(seen(1), alone)
    else:  # whose taps reach past the window
        close(seen(1), oracle_layer(module, x, window=1, **options)[0])


@some("wide-norm", "all")
@pytest.mark.parametrize("arrangement", ["whole", "mask", "segments"])
def test_later_tokens_change_nothing_before_them(
    name: str, options: dict[str, Any], arrangement: str
) -> None:
    module, x, call = made(name, **options), randn(2, LENGTH, WIDTH), ARRANGEMENTS[arrangement]
    for cut in (1, 5):
        changed = x.clone()
        changed[:, cut:] = 3 * randn(2, LENGTH - cut, WIDTH)
        y, other = module(x, **call), module(changed, **call)
        assert torch.equal(y[:, :cut], other[:, :cut])
        assert not torch.equal(y[:, cut:], other[:, cut:])


TEXT = 14


def calls(
    module: posenc.Attention,
    cache: Cache,
    x: Tensor,
    mask: Tensor | None,
    rng: random.Random,
    most: int = 5,
) -> Iterator[tuple[slice, Tensor]]:
    """Decode the rest of x in random chunks; a mask is left out where nothing is padded, or not."""
    while cache.length < x.shape[1]:
        now = slice(cache.length, min(cache.length + rng.randint(1, most), x.shape[1]))
        masked = mask is not None and (not mask[:, now].all() or rng.random() < 0.5)
        given = {"mask": mask[:, now]} if mask is not None and masked else {}
        yield now, module(x[:, now], cache=cache, **given)


@some("plain", "grouped", "window", "all")
@pytest.mark.parametrize("padding", [None, "left", "within"])
def test_decoding_is_the_full_forward(
    name: str, options: dict[str, Any], padding: str | None
) -> None:
    module, x, mask = made(name, **options), randn(2, TEXT, WIDTH), None
    if padding is not None:
        mask = torch.ones(2, TEXT, dtype=torch.bool)
        mask[0, :6] = False
        if padding == "within":
            mask[1, [1, 4, 5, 9, 13]] = mask[0, [8, 12]] = False
            mask[0, 2] = True
    with torch.no_grad():
        expected = module(x) if mask is None else module(x, mask=mask)
        for seed, most in enumerate((1, 5, TEXT)):
            rng, cache = random.Random(seed), module.make_cache(2, TEXT)
            retakes = 0 if "window" in options else 2
            while cache.length < TEXT:
                for now, y in calls(module, cache, x, mask, rng, most):
                    assert y.isfinite().all()
                    real = slice(None) if mask is None else mask[:, now]
                    assert error(y[real], expected[:, now][real]) <= 1e-10
                if retakes:
                    retakes -= 1
                    cache.truncate(rng.randint(0, TEXT - 1))
            assert cache.length == TEXT


@some("window", "all")
def test_cache_of_a_window_is_no_longer_than_it(name: str, options: dict[str, Any]) -> None:
    module, length = made(name, **options), 300
    assert module.make_cache(1, 5_000).nbytes == module.make_cache(1, 50_000).nbytes
    x, rng = randn(1, length, WIDTH), random.Random(0)
    with torch.no_grad():
        expected, cache = module(x), module.make_cache(1, length)
        for now, y in calls(module, cache, x, None, rng, 70):
            close(y, expected[:, now])
        with pytest.raises(ValueError) as refusal:
            cache.truncate(5)
        assert "\n" not in str(refusal.value)
        assert cache.length == length
        # what is refused leaves the cache as it was; what is granted is exact
        for back in range(6):
            cut = cache.length - back
            try:
                cache.truncate(cut)
            except ValueError:
                assert back > 0
                continue
            for now, y in calls(module, cache, x, None, rng):
                close(y, expected[:, now])


@some("plain", "grouped", "all")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_reordered_rows_decode_on(name: str, options: dict[str, Any], masked: bool) -> None:
    """As in beam search: some rows are dropped, others continue twice."""
    module, x, order = made(name, **options), randn(3, LENGTH, WIDTH), torch.tensor([2, 0, 2])
    mask = padded_rows("left") if masked else None
    cache, rng = module.make_cache(3, LENGTH), random.Random(0)
    with torch.no_grad():
        for _ in calls(module, cache, x[:, :5], None if mask is None else mask[:, :5], rng):
            pass
        cache.reorder(order)
        x, mask = x[order], None if mask is None else mask[order]
        expected = module(x) if mask is None else module(x, mask=mask)
        for now, y in calls(module, cache, x, mask, rng):
            real = slice(None) if mask is None else mask[:, now]
            close(y[real], expected[:, now][real])
