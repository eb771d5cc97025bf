"""The routed kernels against fp64 loops and definitions: outputs and every gradient.

Tolerance as in test_flash.py. The gate's gradient is <dy, y> / g, whose rounding is that of y.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from combinations import combined
from helpers import counted, outputs_and_gradients, replayed
from posenc.kernels import common, flash, routed

DTYPES = (torch.float32, torch.float16)
#: batch, heads, queries, keys, head dim
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 3, 2, 2, 40),
    (1, 2, 1, 33, 64),
    (1, 5, 63, 93, 16),
    (2, 4, 100, 100, 80),
    (1, 2, 70, 70, 128),
    (1, 1, 20, 33, 256),
]


@pytest.fixture
def small_tiles(monkeypatch, request):
    """Tiles so small that short sequences take many of them, of (queries, keys)."""
    config = flash.Config(*getattr(request, "param", (16, 32)), 4, 1)
    for module in (flash, routed):
        monkeypatch.setattr(module, "CONFIGS", dict.fromkeys(module.CONFIGS, config))
    monkeypatch.setattr(routed, "SORT_ROWS", 32)
    monkeypatch.setattr(routed, "DELTA_ROWS", 16)


def definition(q, k, v, gates, scale=None):
    """Causal attention times gates, in the dtype of q."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    scores = (q @ k.mT * scale).masked_fill(~visible.tril(k.shape[2] - q.shape[2]), -math.inf)
    return scores.softmax(-1) @ v * gates.unsqueeze(-1).to(q.dtype)


def random_gates(shape, device, share=0.5):
    """Head 0 keeps every token, head 1 none, head 2 one of them, the others a random share."""
    gates = 0.1 + torch.rand(shape, device=device)
    kept = torch.rand(shape, device=device) < share
    kept[:, :1], kept[:, 1:2] = True, False
    kept[:, 2:3] = torch.arange(shape[2], device=device) == shape[2] // 2
    return torch.where(kept, gates, 0.0)


def random_inputs(shape, dtype, device):
    batch, heads, length, key_length, dim = shape
    torch.manual_seed(0)

    def draw(length):
        return torch.randn(batch, heads, length, dim, dtype=dtype, device=device)

    gates = random_gates((batch, heads, length), device)
    return [draw(length), draw(key_length), draw(key_length), gates], draw(length)


def check(function, inputs, dy, *, every=False, scale=None):
    """Compare with the definition; `every`: gates of 0 have gradients too."""
    actual = outputs_and_gradients(function, inputs, dy)
    plain = outputs_and_gradients(lambda *x: definition(*x, scale), inputs, dy)
    double = [x.double() for x in inputs]
    exact = outputs_and_gradients(lambda *x: definition(*x, scale), double, dy)
    q, k, v, gates = double
    kept = (gates != 0) | every
    plain[4], exact[4] = plain[4] * kept, exact[4] * kept

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    largest = [x.abs().max() for x in exact]
    bits = 22 if inputs[0].is_cuda and inputs[0].dtype == torch.float32 else 24
    logits = scale * q.norm(dim=-1).max() * k.norm(dim=-1).max()
    flash_only = [(1 + logits) * x for x in largest]
    # delta is a sum over the head of rounded outputs.
    delta = (dy.double().norm(dim=-1) * v.norm(dim=-1).max()).max()
    rounding = torch.finfo(inputs[0].dtype).eps / 2
    to_delta = [0.0, *(scale * gates.max() * x.abs().max() for x in (k, q)), 0.0, 1.0]
    for name, a, p, e, size, extra, through_delta in zip(
        ("y", "dq", "dk", "dv", "dgates"),
        *(actual, plain, exact, largest, flash_only, to_delta),
        strict=True,
    ):
        assert (a.shape, a.dtype) == (p.shape, p.dtype)
        allowed = 2 * ((p.double() - e).abs().max() + torch.finfo(a.dtype).eps / 2 * size)
        allowed += 2**-bits * (extra + through_delta * delta) + rounding * through_delta * delta
        error = (a.double() - e).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    dropped = inputs[3] == 0
    assert not actual[0][dropped].any()
    assert not actual[1][dropped].any()


def test_definition_is_the_oracle():
    (q, k, v, gates), _ = random_inputs((2, 4, 5, 9, 6), torch.float64, "cpu")
    o = oracles.causal_attention(oracles.dot_scores(q, k), v)
    wanted = oracles.weigh_heads(o, gates.double())
    torch.testing.assert_close(definition(q, k, v, gates.double()), wanted)


@pytest.mark.parametrize(
    ("shape", "dtype", "small_tiles", "deterministic", "straight_through"),
    combined(SHAPES, DTYPES, [(16, 32), (32, 16)], [True, False], [False, True]),
    indirect=["small_tiles"],
)
@pytest.mark.usefixtures("small_tiles")
def test_outputs_and_gradients(shape, dtype, deterministic, straight_through, device):
    inputs, dy = random_inputs(shape, dtype, device)
    if straight_through:
        inputs[3] = (inputs[3] != 0).float()

    def attention(*x):
        options = {"straight_through": straight_through, "deterministic": deterministic}
        return routed.routed_attention(*x, **options)

    check(attention, inputs, dy, every=straight_through)


@pytest.mark.parametrize(
    ("dtype", "dim", "deterministic"), combined(DTYPES, [64, 128], [True, False])
)
def test_tiles_of_the_table(dtype, dim, deterministic, device):
    length = 140 if dim == 64 else 70
    inputs, dy = random_inputs((1, 3, length, length, dim), dtype, device)
    inputs[3] = random_gates((1, 3, length), device).flip(1)
    check(lambda *x: routed.routed_attention(*x, deterministic=deterministic), inputs, dy)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [True, False])
def test_bfloat16(deterministic, device):
    inputs, dy = random_inputs((2, 6, 500, 500, 64), torch.bfloat16, device)
    check(lambda *x: routed.routed_attention(*x, deterministic=deterministic), inputs, dy)


@pytest.mark.usefixtures("small_tiles")
def test_scale(device):
    inputs, dy = random_inputs((1, 3, 40, 40, 16), torch.float32, device)
    check(lambda *x: routed.routed_attention(*x, scale=1.0), inputs, dy, scale=1.0)


def sorted_rows(gates):
    """Kept rows first, each kind in order; and how many kept rows lie before each."""
    order = torch.empty(gates.shape, dtype=torch.int32)
    ranks = torch.zeros((*gates.shape[:2], gates.shape[2] + 1), dtype=torch.int32)
    for b, heads in enumerate(gates.tolist()):
        for h, row in enumerate(heads):
            kept = [t for t, gate in enumerate(row) if gate != 0]
            dropped = [t for t, gate in enumerate(row) if gate == 0]
            order[b, h] = torch.tensor(kept + dropped)
            for t in range(len(row) + 1):
                ranks[b, h, t] = sum(before < t for before in kept)
    return order, ranks


@settings(max_examples=8, deadline=None)
@given(length=st.integers(1, 150), share=st.floats(0, 1), rows=st.sampled_from([8, 32, 1024]))
def test_sorting(length, share, rows, device):
    torch.manual_seed(length)
    gates = random_gates((2, 4, length), "cpu", share)
    before, routed.SORT_ROWS = routed.SORT_ROWS, rows
    try:
        routing = routed.sort_rows(gates.to(device))
    finally:
        routed.SORT_ROWS = before
    order, ranks = sorted_rows(gates)
    assert torch.equal(routing.order.cpu(), order)
    assert torch.equal(routing.ranks.cpu(), ranks)


@pytest.mark.usefixtures("small_tiles")
def test_everything_kept_is_flash_attention(device):
    (q, k, v, _), dy = random_inputs((2, 2, 50, 50, 40), torch.float32, device)
    ones = torch.ones(2, 2, 50, device=device)
    actual = outputs_and_gradients(
        lambda *x: routed.routed_attention(*x, ones, deterministic=True), (q, k, v), dy
    )
    wanted = outputs_and_gradients(
        lambda *x: flash.flash_attention(*x, deterministic=True), (q, k, v), dy
    )
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_nothing_kept(straight_through, device):
    (q, k, v, _), dy = random_inputs((1, 2, 40, 40, 16), torch.float32, device)
    zeros = torch.zeros(1, 2, 40, device=device)
    for deterministic in (True, False):
        options = {"straight_through": straight_through, "deterministic": deterministic}
        found = outputs_and_gradients(
            lambda *x, options=options: routed.routed_attention(*x, **options), (q, k, v, zeros), dy
        )
        assert not any(x.any() for x in found[: 4 if straight_through else 5])
        assert found[4].any() == straight_through


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.usefixtures("small_tiles")
def test_dropped_rows_are_not_read(deterministic, device):
    (q, k, v, gates), dy = random_inputs((2, 4, 70, 90, 16), torch.float32, device)
    q[gates == 0], dy[gates == 0] = math.nan, math.nan
    found = outputs_and_gradients(
        lambda *x: routed.routed_attention(*x, deterministic=deterministic), (q, k, v, gates), dy
    )
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.usefixtures("small_tiles")
def test_keys_that_no_kept_row_sees_are_not_read(deterministic, device):
    (q, k, v, _), dy = random_inputs((1, 3, 96, 96, 16), torch.float32, device)
    gates = torch.zeros(1, 3, 96, device=device)
    gates[:, 1, :20], gates[:, 2, 3:64:7] = 1.0, 0.5
    for h, seen in enumerate((0, 32, 64)):  # whole tiles of keys, in both passes
        k[:, h, seen:], v[:, h, seen:] = math.nan, math.nan
    found = outputs_and_gradients(
        lambda *x: routed.routed_attention(*x, deterministic=deterministic), (q, k, v, gates), dy
    )
    y, dq, dk, dv, _ = found
    assert y.isfinite().all()
    assert dq.isfinite().all()
    for h, seen in enumerate((0, 32, 64)):
        # Later tiles of keys have no query: their sums are empty.
        assert not dk[:, h, seen:].any()
        assert not dv[:, h, seen:].any()


@pytest.mark.usefixtures("small_tiles")
def test_tiny_gates_have_gradients_or_none(device):
    (q, k, v, gates), dy = random_inputs((1, 1, 40, 40, 16), torch.float32, device)
    gates[..., ::2] = 1e-30
    gates[..., 1::4] = 1e-42  # has no reciprocal in fp32: dropped
    found = outputs_and_gradients(routed.routed_attention, (q, k, v, gates), dy)
    wanted = outputs_and_gradients(definition, [x.double() for x in (q, k, v, gates)], dy)
    wanted[4][..., 1::4] = 0.0
    torch.testing.assert_close(found[4].double(), wanted[4], rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.usefixtures("small_tiles")
def test_a_gate_that_is_nan_comes_through(device):
    (q, k, v, gates), dy = random_inputs((1, 1, 40, 40, 16), torch.float32, device)
    gates[..., 7] = math.nan
    y, *grads = outputs_and_gradients(routed.routed_attention, (q, k, v, gates), dy)
    assert y[0, 0, 7].isnan().all()
    assert y.isnan().sum() == 16
    assert all(x.isnan().any() for x in grads)


@pytest.mark.usefixtures("small_tiles")
def test_changing_the_future_changes_no_bit_of_the_past(device):
    inputs, _ = random_inputs((2, 4, 70, 70, 16), torch.float32, device)
    before = routed.routed_attention(*inputs)
    for t in (1, 16, 33, 69):
        changed, _ = random_inputs((2, 4, 70, 70, 16), torch.float32, device)
        torch.manual_seed(t)
        for x in changed:
            x[:, :, t:] = torch.rand_like(x[:, :, t:]) * (torch.rand_like(x[:, :, t:]) < 0.7)
        assert torch.equal(routed.routed_attention(*changed)[:, :, :t], before[:, :, :t])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.usefixtures("small_tiles")
def test_views_of_a_packed_projection(deterministic, device):
    packed = torch.randn(2, 33, 3, 3, 40, device=device, requires_grad=True)
    gates = random_gates((2, 33, 3), device).transpose(1, 2)  # as a router gives them
    before = packed.detach().clone()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    y = routed.routed_attention(q, k, v, gates, deterministic=deterministic)
    assert y.transpose(1, 2).is_contiguous()
    dy = torch.randn(1, 1, 1, 1, device=device).expand_as(y)  # strides of zero
    (grad,) = torch.autograd.grad(y, packed, dy)
    exact = before.double().requires_grad_()
    wanted = definition(*exact.permute(2, 0, 3, 1, 4), gates)
    (wanted_grad,) = torch.autograd.grad(wanted, exact, dy.double())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(packed, before)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_ops_follow_the_rules_of_torch_library(straight_through, device):
    (q, k, v, gates), _ = random_inputs((1, 3, 9, 11, 16), torch.float32, device)
    if straight_through:
        forward, backward = routed._dense_forward_op, routed._dense_backward_op
    else:
        forward, backward = routed._forward_op, routed._backward_op
    y, *saved = forward(q, k, v, gates, 0.25, True)
    kept = saved if straight_through else [y, *saved]
    torch.library.opcheck(backward, (torch.randn_like(y), q, k, v, gates, *kept, 0.25, True))
    leaves = [x.requires_grad_() for x in (q, k, v, gates)]
    torch.library.opcheck(forward, (*leaves, 0.25, True))


@pytest.mark.usefixtures("small_tiles")
def test_compiles_to_one_graph(device):
    inputs, dy = random_inputs((1, 3, 20, 20, 16), torch.float32, device)
    with counted() as (compiled, counter):
        step = compiled(routed.routed_attention)
        actual = outputs_and_gradients(step, inputs, dy)
        assert counter.frame_count == 1
    for a, w in zip(
        actual, outputs_and_gradients(routed.routed_attention, inputs, dy), strict=True
    ):
        torch.testing.assert_close(a, w)


@pytest.mark.gpu
@pytest.mark.parametrize("straight_through", [False, True])
def test_cuda_graphs(straight_through, device):
    inputs, dy = random_inputs((2, 6, 300, 300, 64), torch.bfloat16, device)

    def step():
        return outputs_and_gradients(
            lambda *x: routed.routed_attention(
                *x, straight_through=straight_through, deterministic=True
            ),
            inputs,
            dy,
        )

    for a, w in zip(*replayed(step), strict=True):
        assert torch.equal(a, w)


@pytest.mark.gpu
def test_deterministic_gradients_have_the_same_bits(device):
    inputs, dy = random_inputs((2, 6, 900, 900, 64), torch.bfloat16, device)
    runs = [
        outputs_and_gradients(
            lambda *x: routed.routed_attention(*x, deterministic=True), inputs, dy
        )
        for _ in range(2)
    ]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_bad_arguments(device, monkeypatch):
    (q, k, v, gates), _ = random_inputs((1, 4, 5, 5, 16), torch.float32, device)
    for arguments, message in (
        ((q, k[:, :3], v[:, :3], gates), "divisor of 4"),
        ((q, k, v, gates[:, :3]), r"gates must be .* got torch.float32 \(1, 3, 5\)"),
        ((q, k, v, gates > 0), "gates must be floating point"),
        ((q, k[:, :, :4], v[:, :, :4], gates), "at least as many keys"),
        ((q.double(), k.double(), v.double(), gates), "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            routed.routed_attention(*arguments)
    monkeypatch.setattr(common, "INTERPRETED", False)
    if not q.is_cuda:
        with pytest.raises(ValueError, match="needs CUDA tensors"):
            routed.routed_attention(q, k, v, gates)
