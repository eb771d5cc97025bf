"""Biases in the flash core against the fp64 definition: outputs and every gradient.

Tolerance: `helpers.as_exact`, beside the definition in the kernel's dtype, whose biases are exact
and whose logits are fp32. Masks: test_masks.py.
"""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from helpers import as_exact, outputs_and_gradients, replayed
from posenc.kernels import biased_attention as kernels
from posenc.kernels import by_distance, flash
from posenc.kernels.biased_attention import biased_attention
from posenc.kernels.flash import flash_attention
from posenc.kernels.mask import Mask

#: batch, heads, key heads, queries, keys, head dim
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (1, 4, 2, 37, 37, 24),
    (1, 2, 1, 50, 93, 16),  # fewer queries than keys, not by whole tiles
    (2, 1, 1, 2, 34, 40),
]


@pytest.fixture
def small_tiles(monkeypatch, request):
    """Tiles so small that short sequences take many of them, of (queries, keys), and so many
    programs at least for sums by distance.
    """
    m, n, programs = getattr(request, "param", (16, 32, 5))
    monkeypatch.setattr(flash, "CONFIGS", dict.fromkeys(flash.CONFIGS, flash.Config(m, n, 4, 1)))
    config = by_distance.Config(16, 16, 4, 1)
    monkeypatch.setattr(by_distance, "CONFIGS", dict.fromkeys(by_distance.CONFIGS, config))
    monkeypatch.setattr(by_distance, "PROGRAMS", programs)


def random_inputs(shape, dtype, device, start=-7e5, size=1.0):
    """q, k, v, c, b and do: gates near 1/2 after `start`; `size` steepens them."""
    batch, heads, kv_heads, length, key_length, dim = shape
    torch.manual_seed(0)

    def draw(*sizes):
        return torch.randn(*sizes, device=device)

    q, do = draw(2, batch, heads, length, dim).to(dtype).unbind(0)
    k, v = draw(2, batch, kv_heads, key_length, dim).to(dtype).unbind(0)
    gates = logsigmoid(size * draw(batch, heads, key_length).double())
    return [q, k, v, start + gates.cumsum(-1), draw(heads, key_length)], do


def definition(q, k, v, decay=None, table=None):
    """As written: fp32 logits at least, decays rounded after the subtraction."""
    length, key_length = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    precise = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(precise) @ k.to(precise).mT / math.sqrt(q.shape[-1])
    n = torch.arange(key_length, device=q.device)
    distance = n[key_length - length :, None] - n
    if decay is not None:
        lost = decay[..., key_length - length :, None] - decay[..., None, :]
        logits = logits + lost.to(precise)
    if table is not None:
        logits = logits + table[:, distance.clamp(min=0)].to(precise)
    return logits.masked_fill(distance < 0, -math.inf).softmax(-1).to(v.dtype) @ v


def check(inputs, do, deterministic=True, parts=("decay", "table")):
    """The kernels against the definition, with the parts of a bias that `inputs` ends with."""

    def by(function, **options):
        def run(q, k, v, *biases):
            return function(q, k, v, **dict(zip(parts, biases, strict=True)), **options)

        return run

    kernel, written = by(biased_attention, deterministic=deterministic), by(definition)
    actual = outputs_and_gradients(kernel, inputs, do)
    plain = outputs_and_gradients(written, inputs, do)
    exact = outputs_and_gradients(written, [x.double() for x in inputs], do.double())
    as_exact(actual, plain, exact, terms=max(inputs[1].shape[2:]))


@pytest.mark.parametrize(
    ("small_tiles", "dtype", "deterministic"),
    [((16, 32, 5), torch.float32, True), ((32, 16, 512), torch.float16, False)],
    indirect=["small_tiles"],
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_tiles")
def test_outputs_and_gradients(shape, dtype, deterministic, device):
    inputs, do = random_inputs(shape, dtype, device)
    check(inputs, do, deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.usefixtures("small_tiles")
def test_each_part_alone(part, deterministic, device):
    (*qkv, decay, table), do = random_inputs((2, 2, 1, 30, 41, 16), torch.float32, device)
    check([*qkv, (decay, table)[part]], do, deterministic, [("decay", "table")[part]])


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 64), (torch.float16, 128)])
def test_tiles_of_the_table(dtype, dim, device):
    inputs, do = random_inputs((1, 2, 1, 140, 140, dim), dtype, device)
    check(inputs, do, dtype == torch.float32)


@pytest.mark.usefixtures("small_tiles")
def test_a_table_without_gradient_costs_no_sums(device, monkeypatch):
    (q, k, v, _, table), do = random_inputs((1, 2, 1, 20, 20, 16), torch.float32, device)
    trained = outputs_and_gradients(lambda *x: biased_attention(*x[:3], None, x[3]),
                                    [q, k, v, table], do)  # fmt: skip
    monkeypatch.setattr(by_distance, "gradient", None)
    fixed = outputs_and_gradients(lambda *x: biased_attention(*x, table=table), [q, k, v], do)
    for a, b in zip(fixed, trained[:4], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("window", "diagonals"), [(16, 2), (17, 3), (None, 5)])
@pytest.mark.usefixtures("small_tiles")
def test_sums_end_where_the_window_does(window, diagonals, device, monkeypatch):
    """Corners of tiles lie at distance -1, 15, 31, .., as the first query is key 15; the tile of 31
    begins at 16, in its upper right.
    """
    (q, k, v, _, table), do = random_inputs((1, 1, 1, 60, 75, 16), torch.float32, device)
    launched, kernel = [], by_distance.by_distance_kernel

    class Recorder:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(by_distance, "by_distance_kernel", Recorder())
    monkeypatch.setattr(by_distance, "PROGRAMS", 1)

    def attention(x):
        return biased_attention(q, k, v, table=x, mask=Mask(window))

    _, found = outputs_and_gradients(attention, [table], do)
    reach = 75 if window is None else window
    assert found[:, :reach].all()
    assert not found[:, reach:].any()
    assert launched == [(diagonals,)]


@pytest.mark.parametrize("size", [1e3, 1e-4])
@pytest.mark.usefixtures("small_tiles")
def test_steep_and_flat_decays(size, device):
    """Within a tile c falls by thousands, and near tokens still differ by what they do."""
    inputs, do = random_inputs((1, 2, 2, 50, 50, 16), torch.float32, device, size=size)
    check(inputs[:4], do, parts=["decay"])
    assert inputs[3][0, 0, 0] - inputs[3][0, 0, 15] > 1e3 * (size > 1)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.usefixtures("small_tiles")
def test_far_along_is_as_near_the_start(deterministic, device):
    inputs, do = random_inputs((1, 1, 1, 60, 60, 16), torch.float32, device, start=0.0)
    inputs = inputs[:4]

    def after(start):
        def attention(q, k, v, decay):
            return biased_attention(q, k, v, decay + start, deterministic=deterministic)

        return outputs_and_gradients(attention, inputs, do)

    for near, far in zip(after(0.0), after(-1e7), strict=True):
        torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.mark.usefixtures("small_tiles")
def test_what_does_not_fall_is_no_bias(device):
    (q, k, v, *biases), do = random_inputs((1, 2, 1, 40, 50, 16), torch.float32, device)
    flat = [torch.full_like(x, -3.0) for x in biases]
    biased = outputs_and_gradients(lambda *x: biased_attention(*x, *flat), [q, k, v], do)
    plain = outputs_and_gradients(flash_attention, [q, k, v], do)
    for a, b in zip(biased, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_a_common_shift_has_no_gradient(device):
    inputs, do = random_inputs((1, 2, 1, 50, 50, 16), torch.float32, device)
    for gradient in outputs_and_gradients(biased_attention, inputs, do)[4:]:
        assert gradient.abs().max() > 0.1
        assert gradient.sum(-1).abs().max() < 1e-5


@pytest.mark.parametrize("small_tiles", [(32, 64, 5)], indirect=True)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.usefixtures("small_tiles")
def test_rounded_outputs_do_not_add_up_in_gates(deterministic, device):
    """A gate's gradient sums dc over all later tokens, and is about as exact as one of them."""
    inputs, do = random_inputs((1, 1, 1, 300, 300, 16), torch.float16, device, start=0.0)
    inputs = inputs[:4]
    inputs[2] += 8  # changes nothing but the outputs, and what they are rounded by
    exact = outputs_and_gradients(definition, [x.double() for x in inputs], do.double())[4]

    def attention(*x):
        return biased_attention(*x, deterministic=deterministic)

    wrong = outputs_and_gradients(attention, inputs, do)[4].double() - exact
    assert wrong.flip(-1).cumsum(-1).abs().max() < 2 * wrong.abs().max()


@pytest.mark.usefixtures("small_tiles")
def test_biases_keep_their_own_dtype_and_strides(device):
    (q, k, v, *biases), do = random_inputs((2, 2, 1, 20, 20, 16), torch.float16, device, start=0.0)
    biases = [x.float() for x in biases]
    dense = outputs_and_gradients(biased_attention, [q, k, v, *biases], do)
    assert dense[4].dtype == dense[5].dtype == torch.float32
    by_token = [x.mT.contiguous().mT for x in biases]
    for a, b in zip(outputs_and_gradients(biased_attention, [q, k, v, *by_token], do), dense,
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.usefixtures("small_tiles")
def test_later_tokens_change_nothing(device):
    inputs, _ = random_inputs((1, 1, 1, 40, 40, 16), torch.float32, device)
    o = biased_attention(*inputs)
    for x in inputs[:3]:
        x[:, :, 23:] = torch.randn_like(x[:, :, 23:])
    inputs[3][..., 23:] -= 1.0
    inputs[4][..., 23:] += 1.0
    assert torch.equal(biased_attention(*inputs)[:, :, :23], o[:, :, :23])


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 3, 16), (1, 2, 1, 0, 3, 16)])
def test_empty(shape, device):
    inputs, do = random_inputs(shape, torch.float32, device)
    o, *grads = outputs_and_gradients(biased_attention, inputs, do)
    assert o.shape == do.shape
    assert not any(x.any() for x in grads)


@pytest.mark.usefixtures("small_tiles")
def test_opcheck(device):
    inputs, do = random_inputs((1, 2, 1, 5, 18, 16), torch.float32, device)
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(kernels._forward_op, (*leaves, 0.25, True))
    o, lse = kernels._forward_op(*inputs, 0.25, None)
    saved = [x.detach() for x in (do, *inputs, o, lse)]
    torch.library.opcheck(kernels._backward_op, (*saved, True, 0.25, None))


@pytest.mark.usefixtures("small_tiles")
def test_compiles_without_breaks(device):
    torch._dynamo.reset()
    inputs, do = random_inputs((1, 2, 1, 20, 20, 16), torch.float32, device)
    attention = torch.compile(biased_attention, fullgraph=True, backend="aot_eager")
    compiled = outputs_and_gradients(attention, inputs, do)
    for a, b in zip(compiled, outputs_and_gradients(biased_attention, inputs, do), strict=True):
        assert torch.equal(a, b)


def test_arguments_that_cannot_be(device):
    (q, k, v, decay, table), _ = random_inputs((1, 2, 1, 3, 4, 16), torch.float32, device)
    for wrong in (decay[..., :3], decay[:, :1], decay.long()):
        with pytest.raises(ValueError, match=r"decay must be floating point \(1, 2, 4\)"):
            biased_attention(q, k, v, wrong)
    for wrong in (table[:, :3], table[:1], table.long()):
        with pytest.raises(ValueError, match=r"table must be floating point \(2, 4\)"):
            biased_attention(q, k, v, table=wrong)
    wide = torch.zeros(1, 1, 3, 129, device=device)
    with pytest.raises(ValueError, match=r"at most 128 in float32; got 129.*impl='sdpa'"):
        biased_attention(wide, wide, wide, table=torch.zeros(1, 3, device=device))
    with pytest.raises(ValueError, match="scale must be positive"):
        biased_attention(q, k, v, decay, scale=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [(2, 12, 12, 1024, 1024, 64), (1, 12, 3, 1024, 1024, 128), (1, 2, 2, 100, 4097, 80), *SHAPES],
)
def test_on_the_gpu(shape, dtype, deterministic, device):
    inputs, do = random_inputs(shape, dtype, device)
    check(inputs, do, deterministic)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 12])
def test_deterministic_runs_are_bit_equal(kv_heads, device):
    inputs, do = random_inputs((4, 12, kv_heads, 1000, 1000, 64), torch.bfloat16, device)

    def attention(*x):
        return biased_attention(*x, deterministic=True)

    first = outputs_and_gradients(attention, inputs, do)
    second = outputs_and_gradients(attention, inputs, do)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_no_host_sync_and_cuda_graph(device):
    inputs, do = random_inputs((1, 2, 2, 256, 256, 64), torch.bfloat16, device)
    leaves = [x.requires_grad_() for x in inputs]

    def step():
        o = biased_attention(*leaves, deterministic=True)
        return o, *torch.autograd.grad(o, leaves, do)

    captured, wanted = replayed(step)
    for a, b in zip(captured, wanted, strict=True):
        assert torch.equal(a, b)
