"""The convolution's kernel against the fp64 oracle: outputs, state, gradients, strides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from posenc.kernels import conv as kernels
from posenc.kernels.common import INTERPRETED
from posenc.kernels.conv import _backward_op, _forward_op, conv, conv_with_state

#: Half a unit of the last place of fp32, and the longest chain of additions in these tests: rows
#: that one thread adds up for the weights, then threads, then programs.
UNIT, CHAIN = 2**-24, 64
DTYPES = (torch.float32, torch.float16)
SHAPES = [  # batch, heads, length, dim, taps, per head, bias, past
    (2, 1, 1, 16, 3, False, True, False),
    (1, 12, 2, 16, 4, True, False, True),
    (1, 2, 63, 40, 3, True, True, False),
    (1, 1, 100, 128, 2, False, False, True),
    (2, 2, 2, 6, 8, False, True, True),
    (1, 2, 63, 16, 8, True, False, False),
    (2, 3, 9, 16, 1, False, True, True),
    (1, 1, 130, 16, 3, True, True, True),
]


@pytest.fixture
def small_tiles(monkeypatch):
    """Short sequences take many tiles, each program several, over the ends of sequences."""
    monkeypatch.setattr(kernels, "NUM_WARPS", 1)
    monkeypatch.setattr(kernels, "FORWARD_PROGRAMS", 12)
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", 12)


def inputs(batch, length, heads, dim, dtype, device):
    """q, k and v as they lie in a projection (B, T, 3, H, D)."""
    qkv = torch.randn(batch, length, 3, heads, dim, dtype=dtype, device=device)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def parameters(batch, heads, dim, taps, per_head, bias, past, dtype, device):
    """Weight, bias and past, None where there is none."""
    channels = (3, heads, dim) if per_head else (3, dim)
    weight = torch.randn(*channels, taps, device=device)
    shift = torch.randn(channels, device=device) if bias else None
    before = torch.randn(batch, 3, heads, taps - 1, dim, dtype=dtype, device=device)
    return weight, shift, before if past else None


def expected(q, k, v, weight, bias, past):
    outputs = []
    for part, x in enumerate((q, k, v)):
        before = x[:, :, :0] if past is None else past[:, part]
        shift = None if bias is None else bias[part]
        whole = oracles.depthwise_conv(torch.cat((before, x), 2), weight[part], shift)
        outputs.append(whole[:, :, before.shape[2] :])
    return outputs


def differentiated(function, leaves, upstream):
    """Outputs, then a gradient for each of the leaves that is there."""
    outputs = function(*leaves)
    wanted = [x for x in leaves if x is not None]
    return *outputs, *torch.autograd.grad(outputs, wanted, upstream, materialize_grads=True)


def leaf(x, change=lambda x: x):
    return None if x is None else change(x.detach()).requires_grad_()


def exact(leaves, upstream):
    """The oracle's results, and those of all absolute values: what a rounding error scales with."""
    results = []
    for change in (lambda x: x.cpu().double(), lambda x: x.cpu().double().abs()):
        copies = [leaf(x, change) for x in leaves]
        results.append(differentiated(expected, copies, [change(x) for x in upstream]))
    return zip(*results, strict=True)


def check(actual, wanted, size):
    assert actual.isfinite().all()
    # Below the smallest normal number the spacing no longer shrinks.
    kind = torch.finfo(actual.dtype)
    allowed = CHAIN * UNIT * size + kind.eps / 2 * wanted.abs().clamp(min=kind.smallest_normal)
    assert ((actual.cpu().double() - wanted).abs() <= allowed).all()


def check_all(leaves, upstream):
    found = differentiated(conv, leaves, upstream)
    wanted = [*leaves[:3], *(x for x in leaves if x is not None)]
    for a, x, (e, size) in zip(found, wanted, exact(leaves, upstream), strict=True):
        assert a.dtype == x.dtype
        check(a, e, size)


def check_shape(shape, dtype, device):
    torch.manual_seed(0)
    batch, heads, length, dim, taps, *kind = shape
    rest = parameters(batch, heads, dim, taps, *kind, dtype, device)
    given = *inputs(batch, length, heads, dim, dtype, device), *rest
    upstream = inputs(batch, length, heads, dim, dtype, device)
    before = [None if x is None else x.clone() for x in given]
    check_all([leaf(x) for x in given], upstream)
    for x, old in zip(given, before, strict=True):
        assert x is None or torch.equal(x, old)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape, dtype, device):
    check_shape(shape, dtype, device)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 63, 16, 3, False, True, False),
        (3, 2, 13, 6, 4, True, False, True),
        (1, 1, 7, 64, 8, False, True, True),
    ],
    ids=str,
)
def test_many_tiles(shape, dtype, device):
    check_shape(shape, dtype, device)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (2, 2, 30, 20, 8))),
    kind=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, kind, dtype):
    check_shape((*shape, *kind), dtype, torch.device("cpu" if INTERPRETED else "cuda"))


def test_bias_and_weight_need_not_be_shared_alike(device):
    given = inputs(1, 5, 3, 16, torch.float32, device)
    weight, bias = torch.randn(3, 16, 3, device=device), torch.randn(3, 3, 16, device=device)
    upstream = inputs(1, 5, 3, 16, torch.float32, device)
    check_all([leaf(x) for x in (*given, weight, bias, None)], upstream)


def test_any_stride(device):
    """Features that are not neighbours, heads outermost, weights transposed, gradients expanded."""
    q = torch.randn(2, 3, 16, 9, device=device).transpose(2, 3)
    k = torch.randn(3, 2, 9, 16, device=device).transpose(0, 1)
    v = torch.randn(1, 1, 1, 16, device=device).expand(2, 3, 9, 16)
    weight = torch.randn(3, 3, 3, 16, device=device).transpose(2, 3)
    bias = torch.randn(16, 3, device=device).T
    past = torch.randn(2, 3, 2, 3, 16, device=device).transpose(2, 3)
    upstream = [
        torch.randn((), device=device).expand(2, 3, 9, 16),
        torch.randn(16, 9, 3, 2, device=device).permute(3, 2, 1, 0),
        torch.randn(2, 1, 9, 1, device=device).expand(2, 3, 9, 16),
    ]
    check_all([leaf(x) for x in (q, k, v, weight, bias, past)], upstream)


def test_weights_are_used_in_full_precision(device):
    given = inputs(2, 9, 2, 16, torch.float16, device)
    weight = (1 + torch.rand(3, 16, 3)).to(device)
    outputs = conv(*given, weight)
    for y, z in zip(outputs, conv(*given, weight.half()), strict=True):
        assert not torch.equal(y, z)
    check_all([leaf(x) for x in (*given, weight.half(), None, None)], given)


def test_missing_gradients_are_zero(device):
    q, k, v = (leaf(x) for x in inputs(2, 9, 2, 16, torch.float32, device))
    weight = leaf(torch.randn(3, 16, 3, device=device))
    y, _, _ = conv(q, k, v, weight)
    dq, dk, dv, dweight = torch.autograd.grad(y.sum(), (q, k, v, weight))
    assert dq.any()
    assert dweight[0].any()
    for gradient in (dk, dv, dweight[1:]):
        assert not gradient.any()


@pytest.mark.parametrize("taps", [1, 3, 8])
@pytest.mark.parametrize("size", [1, 3])
def test_chunks_are_the_whole_bit_for_bit(taps, size, device):
    given = inputs(2, 7, 1, 16, torch.float32, device)
    weight, bias, _ = parameters(2, 1, 16, taps, True, True, False, torch.float32, device)
    whole = conv_with_state(*given, weight, bias)
    parts, state = [], None
    for chunk in zip(*(x.split(size, 2) for x in given), strict=True):
        *outputs, state = conv_with_state(*chunk, weight, bias, state)
        parts.append(outputs)
    for y, pieces in zip(whole[:3], zip(*parts, strict=True), strict=True):
        assert torch.equal(y, torch.cat(pieces, 2))
    assert state.shape == (2, 3, 1, taps - 1, 16)
    assert torch.equal(state, whole[3])
    assert torch.equal(state, torch.stack(given, 1)[..., 7 - (taps - 1) :, :])


def test_state_has_no_gradient_and_begins_with_zeros(device):
    given = [leaf(x) for x in inputs(1, 2, 1, 16, torch.float32, device)]
    *_, state = conv_with_state(*given, torch.randn(3, 16, 4, device=device))
    assert not state.requires_grad
    assert not state[..., 0, :].any()
    assert torch.equal(state[..., 1:, :], torch.stack(given, 1))


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_again_and_alone(device):
    given = inputs(3, 31, 1, 16, torch.float32, device)
    rest = parameters(3, 1, 16, 3, False, True, True, torch.float32, device)
    results = []
    for rows in (slice(None), slice(None), slice(1, 2)):
        leaves = [leaf(x) for x in (*(z[rows] for z in given), *rest[:2], rest[2][rows])]
        results.append(differentiated(conv, leaves, [z[rows] for z in given]))
    for first, again in zip(*results[:2], strict=True):
        assert torch.equal(first, again)
    by_row = (0, 1, 2, 3, 4, 5, 8)  # outputs, dq, dk, dv and dpast
    for index in by_row:
        assert torch.equal(results[0][index][1:2], results[2][index])


def test_partial_sums_stay_few():
    for batch, heads, rows in ((1, 1, 10**6), (64, 12, 4096), (3, 700, 5000), (1, 12, 1)):
        for programs in (kernels.FORWARD_PROGRAMS, kernels.BACKWARD_PROGRAMS):
            grid, (tiles, items, share) = kernels.shares(batch, heads, rows, 48, programs)
            assert grid[0] * grid[1] <= max(programs, 3 * heads)
            assert (grid[1] - 1) * share < items <= grid[1] * share
            assert items == batch * tiles
            assert (tiles - 1) * 48 < rows <= tiles * 48


def test_heads_merge_without_a_copy(device):
    given = inputs(2, 5, 3, 16, torch.float32, device)
    for y in conv(*given, torch.randn(3, 16, 3, device=device)):
        assert y.transpose(1, 2).is_contiguous()


def test_operator_contract(device):
    given = [leaf(x) for x in inputs(1, 5, 2, 16, torch.float32, device)]
    rest = [leaf(x) for x in parameters(1, 2, 16, 3, True, True, True, torch.float32, device)]
    torch.library.opcheck(_forward_op, (*given, *rest))
    torch.library.opcheck(_forward_op, (*given, leaf(rest[0][:, 0]), None, None))
    shallow = ("test_schema", "test_faketensor")
    torch.library.opcheck(_backward_op, (*given, *given, *rest), test_utils=shallow)
    few = (*given, *given, leaf(rest[0][:, 0]), None, None)
    torch.library.opcheck(_backward_op, few, test_utils=shallow)


def test_compiles_whole(device):
    def function(x, weight, bias):
        q, k, v, _ = conv_with_state(x * 1, x * 2, x * 3, weight, bias)
        return q * k + v

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    weight, bias, _ = parameters(1, 2, 16, 3, False, True, False, torch.float32, device)
    for length in (5, 40):
        leaves = [leaf(x) for x in (torch.randn(1, 2, length, 16, device=device), weight, bias)]
        runs = [run(*leaves) for run in (function, compiled)]
        assert torch.equal(*runs)
        gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in runs]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (4, 12, 1000, 64, 3, True, False, False)], ids=str)
def test_bfloat16(shape, device):
    check_shape(shape, torch.bfloat16, device)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("one shape", {"k": torch.zeros(1, 1, 5, 16)}),
        ("one shape", {name: torch.zeros(1, 2, 0, 16) for name in "qkv"}),
        ("one shape", {name: torch.zeros(2, 5, 16) for name in "qkv"}),
        ("dtype", {"v": torch.zeros(1, 2, 5, 16, dtype=torch.float16)}),
        ("float64", {name: torch.zeros(1, 2, 5, 16, dtype=torch.float64) for name in "qkv"}),
        ("weight must", {"weight": torch.zeros(3, 3, 16, 3)}),
        ("weight must", {"weight": torch.zeros(16, 3)}),
        ("weight must", {"weight": torch.zeros(())}),
        ("1 to 8", {"weight": torch.zeros(3, 16, 9)}),
        ("1 to 8", {"weight": torch.zeros(3, 16, 0)}),
        ("bfloat16, float16 or float32", {"weight": torch.zeros(3, 16, 3, dtype=torch.float64)}),
        ("bias must", {"bias": torch.zeros(16)}),
        ("dtype", {"bias": torch.zeros(3, 16, dtype=torch.float16)}),
        ("past must", {"past": torch.zeros(1, 3, 2, 3, 16)}),
        ("dtype", {"past": torch.zeros(1, 3, 2, 2, 16, dtype=torch.float16)}),
        ("on meta", {"weight": torch.zeros(3, 16, 3, device="meta")}),
    ],
)
def test_bad_arguments(message, change, device):
    good = {name: torch.zeros(1, 2, 5, 16) for name in "qkv"}
    good["weight"] = torch.zeros(3, 16, 3)
    arguments = {
        name: value if value.is_meta else value.to(device)
        for name, value in (good | change).items()
    }
    with pytest.raises(ValueError, match=message):
        conv(**arguments)
