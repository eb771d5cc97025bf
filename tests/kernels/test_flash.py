"""The flash kernels against the fp64 definition: outputs, log-sum-exps and every gradient.

Tolerance: twice the error of the same computation done plainly in the same dtype, plus one rounding
of the result; both errors are against fp64. On top come two fp32 roundings that only the flash
algorithm has: L, which makes P inexact by 2^-24 |L|, and delta, from which dP is subtracted.
"""

import math

import pytest
import torch

import oracles
from combinations import combined
from helpers import outputs_and_gradients, replayed
from posenc.kernels import common, flash

DTYPES = (torch.float32, torch.float16)
#: batch, heads, key heads, queries, keys, head dim
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 3, 1, 2, 2, 40),
    (1, 2, 2, 63, 63, 64),
    (1, 2, 1, 100, 100, 80),
    (2, 1, 1, 63, 93, 128),
    (1, 12, 4, 1, 33, 16),
    (1, 1, 1, 2, 33, 256),
]


@pytest.fixture
def small_tiles(monkeypatch, device, request):
    """Tiles so small that short sequences take many of them, of (queries, keys)."""
    m, n = getattr(request, "param", (16, 32))
    configs = {key: flash.Config(m, n, 4, 1) for key in flash.CONFIGS}
    monkeypatch.setattr(flash, "CONFIGS", configs)


def definition(q, k, v, scale=None):
    """Causal attention as written, in the dtype of its arguments."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    visible = visible.tril(k.shape[2] - q.shape[2])
    scores = (q @ k.mT * scale).masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v


def check(function, inputs, do, scale=None):
    actual = outputs_and_gradients(function, inputs, do)
    plain = outputs_and_gradients(lambda *x: definition(*x, scale), inputs, do)
    double = [x.double() for x in inputs]
    exact = outputs_and_gradients(lambda *x: definition(*x, scale), double, do)

    q, k, _ = double
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    delta = (exact[0] * do).abs().sum(-1).max()
    largest = [x.abs().max() for x in exact]
    # Three TF32 products keep 22 bits of an fp32 factor; the interpreter keeps all 24.
    bits = 22 if inputs[0].is_cuda and inputs[0].dtype == torch.float32 else 24
    logits = scale * q.norm(dim=-1).max() * k.norm(dim=-1).max()
    flash_only = [logits * x for x in largest]
    flash_only[1] += scale * delta * k.abs().max()
    flash_only[2] += scale * delta * q.abs().max()
    for name, a, p, e, size, extra in zip(
        ("o", "dq", "dk", "dv"), actual, plain, exact, largest, flash_only, strict=True
    ):
        assert (a.shape, a.dtype) == (p.shape, p.dtype)
        rounding = torch.finfo(a.dtype).eps / 2 * size
        allowed = 2 * ((p.double() - e).abs().max() + rounding) + 2**-bits * extra
        error = (a.double() - e).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def random_inputs(shape, dtype, device):
    batch, heads, kv_heads, length, key_length, dim = shape
    torch.manual_seed(0)

    def draw(*sizes):
        return torch.randn(*sizes, dtype=dtype, device=device)

    return (
        draw(batch, heads, length, dim),
        draw(batch, kv_heads, key_length, dim),
        draw(batch, kv_heads, key_length, dim),
        draw(batch, heads, length, dim),
    )


def test_definition_is_the_oracle():
    q, k, v, _ = (x.double() for x in random_inputs((2, 2, 2, 5, 9, 6), torch.float32, "cpu"))
    wanted = oracles.causal_attention(oracles.dot_scores(q, k), v)
    torch.testing.assert_close(definition(q, k, v), wanted)


@pytest.mark.parametrize(
    ("shape", "dtype", "small_tiles", "deterministic"),
    combined(SHAPES, DTYPES, [(16, 32), (32, 16)], [True, False]),
    indirect=["small_tiles"],
)
@pytest.mark.usefixtures("small_tiles")
def test_outputs_and_gradients(shape, dtype, deterministic, device):
    *inputs, do = random_inputs(shape, dtype, device)

    def attention(q, k, v):
        return flash.flash_attention(q, k, v, deterministic=deterministic)

    check(attention, inputs, do)


@pytest.mark.parametrize(
    ("dtype", "dim", "deterministic"), combined(DTYPES, [64, 128, 256], [True, False])
)
def test_tiles_of_the_table(dtype, dim, deterministic, device):
    length = 140 if dim == 64 else 40
    *inputs, do = random_inputs((1, 1, 1, length, length, dim), dtype, device)

    def attention(q, k, v):
        return flash.flash_attention(q, k, v, deterministic=deterministic)

    check(attention, inputs, do)


@pytest.mark.usefixtures("small_tiles")
def test_log_sum_exp(device):
    q, k, v, _ = random_inputs((1, 2, 1, 37, 50, 40), torch.float32, device)
    _, lse = flash.flash_attention_with_lse(q, k, v, scale=0.5)
    scores = q.double() @ k.double().mT * 0.5
    hidden = torch.ones(37, 50, dtype=torch.bool, device=device).triu(50 - 37 + 1)
    wanted = scores.masked_fill(hidden, -math.inf).logsumexp(-1) / math.log(2)
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-6, atol=1e-6)
    assert not lse.requires_grad


@pytest.mark.parametrize("scale", [0.02, 1.0])
@pytest.mark.usefixtures("small_tiles")
def test_scale(scale, device):
    *inputs, do = random_inputs((1, 1, 1, 40, 40, 16), torch.float32, device)
    check(lambda *x: flash.flash_attention(*x, scale=scale), inputs, do, scale)


@pytest.mark.parametrize("size", [30.0, 1e-3])
@pytest.mark.usefixtures("small_tiles")
def test_peaked_and_flat_weights(size, device):
    q, k, v, do = random_inputs((1, 1, 1, 50, 50, 32), torch.float32, device)
    check(flash.flash_attention, [q * size, k, v], do)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.usefixtures("small_tiles")
def test_views_of_a_packed_projection(deterministic, device):
    packed = torch.randn(2, 33, 3, 2, 40, device=device, requires_grad=True)
    before = packed.detach().clone()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    o = flash.flash_attention(q, k, v, deterministic=deterministic)
    assert o.transpose(1, 2).is_contiguous()
    do = torch.randn_like(o)
    (grad,) = torch.autograd.grad(o, packed, do)
    exact = before.double().requires_grad_()
    wanted = definition(*exact.permute(2, 0, 3, 1, 4))
    (wanted_grad,) = torch.autograd.grad(wanted, exact, do.double())
    torch.testing.assert_close(o.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(packed, before)


def layouts(x):
    """Views with x's shape whose strides are zero, reversed, gapped."""
    return {
        "expanded": x[:1, :1, :1, :1].expand_as(x),
        "columns first": x.mT.contiguous().mT,
        "every second": x.repeat_interleave(2, -1)[..., ::2],
        "every second row": x.repeat_interleave(2, -2)[..., ::2, :],
    }


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("layout", ["expanded", "columns first", "every second"])
@pytest.mark.usefixtures("small_tiles")
def test_strides_of_the_incoming_gradient(layout, deterministic, device):
    *inputs, do = random_inputs((2, 2, 1, 10, 20, 16), torch.float32, device)
    do = layouts(do)[layout]

    def attention(q, k, v):
        return flash.flash_attention(q, k, v, deterministic=deterministic)

    given = outputs_and_gradients(attention, inputs, do)
    dense = outputs_and_gradients(attention, inputs, do.contiguous())
    for a, b in zip(given, dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["expanded", "columns first", "every second row"])
@pytest.mark.usefixtures("small_tiles")
def test_strides_of_the_inputs(layout, device):
    *inputs, _ = random_inputs((2, 2, 2, 20, 20, 16), torch.float32, device)
    views = [layouts(x)[layout] for x in inputs]
    dense = [x.contiguous() for x in views]
    assert torch.equal(flash.flash_attention(*views), flash.flash_attention(*dense))


@pytest.mark.usefixtures("small_tiles")
def test_one_tensor_as_query_key_and_value(device):
    x = torch.randn(1, 2, 30, 16, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(flash.flash_attention(x, x, x).sum(), x)
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(definition(exact, exact, exact).sum(), exact)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_later_tokens_change_nothing(device):
    q, k, v, _ = random_inputs((1, 1, 1, 40, 40, 16), torch.float32, device)
    o = flash.flash_attention(q, k, v)
    for x in (q, k, v):
        x[:, :, 23:] = torch.randn_like(x[:, :, 23:])
    assert torch.equal(flash.flash_attention(q, k, v)[:, :, :23], o[:, :, :23])


@pytest.mark.usefixtures("small_tiles")
def test_a_row_alone_is_the_row_in_the_batch(device):
    *inputs, do = random_inputs((3, 2, 1, 30, 30, 16), torch.float32, device)

    def attention(q, k, v):
        return flash.flash_attention(q, k, v, deterministic=True)

    batch = outputs_and_gradients(attention, inputs, do)
    alone = outputs_and_gradients(attention, [x[1:2] for x in inputs], do[1:2])
    for a, b in zip(batch, alone, strict=True):
        assert torch.equal(a[1:2], b)


@pytest.mark.parametrize("empty", ["batch", "queries"])
def test_empty(empty, device):
    q, k, v, _ = random_inputs((1, 2, 1, 3, 3, 16), torch.float32, device)
    inputs = [x[:0] for x in (q, k, v)] if empty == "batch" else [q[:, :, :0], k, v]
    o, dq, dk, dv = outputs_and_gradients(
        flash.flash_attention, inputs, torch.zeros_like(inputs[0])
    )
    assert o.shape == dq.shape == inputs[0].shape
    assert not dk.any()
    assert not dv.any()


def backward_choice(monkeypatch, length, deterministic, device):
    """Whether the backward pass was split."""
    choices = []
    kernel = flash.dkv_kernel

    class Recorder:
        def __getitem__(self, grid):
            def launch(*args, ADD_DQ, **kwargs):
                choices.append(not ADD_DQ)
                kernel[grid](*args, ADD_DQ=ADD_DQ, **kwargs)

            return launch

    monkeypatch.setattr(flash, "dkv_kernel", Recorder())
    x = torch.randn(1, 1, length, 16, device=device, requires_grad=True)
    flash.flash_attention(x, x, x, deterministic=deterministic).sum().backward()
    return choices


def test_choice_of_the_backward(monkeypatch, device):
    monkeypatch.setattr(flash, "SPLIT_UP_TO", 8)
    assert backward_choice(monkeypatch, 8, None, device) == [True]
    assert backward_choice(monkeypatch, 9, None, device) == [False]
    assert backward_choice(monkeypatch, 9, True, device) == [True]
    assert backward_choice(monkeypatch, 8, False, device) == [False]
    torch.use_deterministic_algorithms(True)
    try:
        assert backward_choice(monkeypatch, 9, False, device) == [True]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("small_tiles")
def test_opcheck(device):
    q, k, v, do = random_inputs((1, 2, 1, 5, 18, 16), torch.float32, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(flash._forward_op, (*leaves, 0.25, True))
    o, lse = flash._forward_op(q, k, v, 0.25, None)
    saved = [x.detach() for x in (do, q, k, v, o, lse)]
    torch.library.opcheck(flash._backward_op, (*saved, 0.25, None))


@pytest.mark.usefixtures("small_tiles")
def test_compiles_without_breaks_or_recompilation(device):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    attention = torch.compile(flash.flash_attention, fullgraph=True, backend=backend)
    for length in (3, 4, 6, 17):
        *inputs, do = random_inputs((1, 2, 1, length, length, 16), torch.float32, device)
        compiled = outputs_and_gradients(attention, inputs, do)
        eager = outputs_and_gradients(flash.flash_attention, inputs, do)
        for a, b in zip(compiled, eager, strict=True):
            assert torch.equal(a, b)
    assert len(graphs) <= 2


@pytest.mark.usefixtures("small_tiles")
def test_compiled_gradients(device):
    torch._dynamo.reset()
    *inputs, do = random_inputs((1, 2, 1, 20, 20, 16), torch.float32, device)
    attention = torch.compile(flash.flash_attention, fullgraph=True, backend="aot_eager")
    compiled = outputs_and_gradients(attention, inputs, do)
    eager = outputs_and_gradients(flash.flash_attention, inputs, do)
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((2, 4, 16), (2, 4, 16), "expected q"),
        ((1, 1, 4, 16), (2, 1, 4, 16), "expected q"),
        ((1, 1, 4, 16), (1, 1, 4, 32), "one head dim"),
        ((1, 1, 4, 512), (1, 1, 4, 512), "at most 256"),
        ((1, 4, 4, 16), (1, 3, 4, 16), "divisor of 4"),
        ((1, 1, 5, 16), (1, 1, 4, 16), "as many keys"),
    ],
)
def test_shapes_that_cannot_be(q, k, message, device):
    q, k = torch.zeros(q, device=device), torch.zeros(k, device=device)
    with pytest.raises(ValueError, match=message):
        flash.flash_attention(q, k, k)


def test_arguments_that_cannot_be(device, monkeypatch):
    x = torch.zeros(1, 1, 4, 16, device=device)
    with pytest.raises(ValueError, match="positive"):
        flash.flash_attention(x, x, x, scale=-1.0)
    with pytest.raises(ValueError, match="one dtype"):
        flash.flash_attention(x, x.half(), x.half())
    with pytest.raises(ValueError, match="float64"):
        flash.flash_attention(x.double(), x.double(), x.double())
    with pytest.raises(ValueError, match="k and v"):
        flash.flash_attention(x, x, x[:, :, :2])
    if common.INTERPRETED:
        with pytest.raises(ValueError, match="bfloat16"):
            flash.flash_attention(x.bfloat16(), x.bfloat16(), x.bfloat16())


def test_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)
    x = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match="impl='sdpa'"):
        flash.flash_attention(x, x, x)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 12, 12, 1024, 1024, 64),
        (1, 12, 3, 1024, 1024, 128),
        (1, 2, 1, 4097, 4097, 64),
        (1, 2, 2, 100, 4097, 80),
        (1, 2, 2, 300, 300, 256),
        *SHAPES,
    ],
)
def test_on_the_gpu(shape, dtype, deterministic, device):
    *inputs, do = random_inputs(shape, dtype, device)

    def attention(q, k, v):
        return flash.flash_attention(q, k, v, deterministic=deterministic)

    check(attention, inputs, do)


@pytest.mark.gpu
def test_deterministic_runs_are_bit_equal(device):
    *inputs, do = random_inputs((4, 12, 4, 1000, 1000, 64), torch.bfloat16, device)

    def attention(q, k, v):
        return flash.flash_attention(q, k, v, deterministic=True)

    first = outputs_and_gradients(attention, inputs, do)
    second = outputs_and_gradients(attention, inputs, do)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_no_host_sync_and_cuda_graph(device):
    q, k, v, do = random_inputs((1, 2, 2, 256, 256, 64), torch.bfloat16, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step():
        o = flash.flash_attention(*leaves, deterministic=True)
        return o, *torch.autograd.grad(o, leaves, do)

    captured, wanted = replayed(step)
    for a, b in zip(captured, wanted, strict=True):
        assert torch.equal(a, b)
