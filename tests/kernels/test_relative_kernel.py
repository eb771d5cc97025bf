"""The relative kernels against the fp64 definition, a double loop over queries and keys: outputs
and the gradients of q, k, v, R, S, u and v_h.

Tolerance: twice the error of the same computation done plainly in the same dtype, plus one rounding
of the result; both errors are against fp64. On top come the fp32 roundings of L and delta that only
the flash algorithm has, see test_flash.py.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from combinations import combined
from helpers import attend, outputs_and_gradients, replayed
from posenc.kernels import relative
from posenc.kernels.relative import relative_attention
from posenc.scores import RelativeTerm, Scores

DTYPES = (torch.float32, torch.float16)
NAMES = ("o", "dq", "dk", "dv", "dR", "dS", "du", "dv_h")
#: batch, heads, queries, keys, head dim, rows of the table
SHAPES = [
    (1, 1, 1, 1, 16, 1),
    (2, 3, 37, 37, 16, 64),  # a table longer than the sequence
    (1, 2, 50, 93, 24, 17),  # fewer queries than keys, distances past the table
    (1, 1, 63, 63, 40, 63),
    (2, 1, 2, 34, 32, 5),
]


@pytest.fixture
def small_tiles(monkeypatch, request):
    """Tiles, segments and programs so few that short sequences take many rounds of them."""
    m, n, segment = getattr(request, "param", (16, 16, 32))
    configs = {key: relative.Config(m, n, segment, 4, 1, 1) for key in relative.CONFIGS}
    monkeypatch.setattr(relative, "CONFIGS", configs)
    monkeypatch.setattr(relative, "programs", lambda config, device: 5)


def random_inputs(shape, dtype, device):
    batch, heads, length, key_length, dim, rows = shape
    torch.manual_seed(0)

    def draw(*sizes, size=1.0):
        return (size * torch.randn(*sizes, device=device)).to(dtype)

    q, do = draw(2, batch, heads, length, dim).unbind(0)
    k, v = draw(2, batch, heads, key_length, dim).unbind(0)
    table, offsets = draw(heads, rows, dim, size=0.5), draw(heads, rows)
    u, v_h = draw(2, heads, dim).unbind(0)
    return [q, k, v, table, offsets, u, v_h], do


def definition(q, k, v, table, offsets=None, u=None, v_h=None):
    """As written, in the dtype of its arguments: `oracles` says the same entry by entry."""
    term = RelativeTerm(table, query=v_h, offset=offsets)
    return attend(q, k, v, Scores(content=u, relative=term), impl="reference")


def check(inputs, do, deterministic=True):
    def attention(*tensors):
        return relative_attention(*tensors, deterministic=deterministic)

    before = [x.clone() for x in inputs]
    actual = outputs_and_gradients(attention, inputs, do)
    plain = outputs_and_gradients(definition, inputs, do)
    double = [x.double() for x in inputs]
    exact = outputs_and_gradients(definition, double, do)
    assert all(map(torch.equal, inputs, before))

    q, k, _, table = double[:4]
    dim, scale = q.shape[-1], q.shape[-1] ** -0.5
    delta = (exact[0] * do).abs().sum(-1).max()
    bits = 22 if do.is_cuda and do.dtype == torch.float32 else 24
    met = k.norm(dim=-1).max() + table.norm(dim=-1).max()
    logits = scale * (q.norm(dim=-1).max() + 2 * math.sqrt(dim)) * met + 4
    # delta is subtracted from every dP of a row; what sums over rows sums its roundings too.
    rows = q.shape[0] * q.shape[2]
    through = scale * delta * (q.abs().max() + met)
    for name, a, p, e in zip(NAMES, actual, plain, exact, strict=False):
        assert (a.shape, a.dtype) == (p.shape, p.dtype)
        size = e.abs().max()
        rounding = torch.finfo(a.dtype).eps / 2 * size
        extra = logits * size
        if name not in ("o", "dv"):
            extra = extra + through * (1 if name in ("dq", "dk") else math.sqrt(rows))
        allowed = 2 * ((p.double() - e).abs().max() + rounding) + 2**-bits * extra
        error = (a.double() - e).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    return actual


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_definition_is_the_oracle(shape):
    (q, k, v, table, offsets, u, _), _ = random_inputs(shape, torch.float64, "cpu")
    scores = oracles.relative_learned_scores(q, k, u, table, offsets)
    wanted = oracles.causal_attention(scores, v)
    torch.testing.assert_close(definition(q, k, v, table, offsets, u), wanted)


@pytest.mark.parametrize(
    ("shape", "dtype", "small_tiles", "deterministic"),
    combined(SHAPES, DTYPES, [(16, 16, 32), (16, 32, 32), (32, 16, 32)], [True, False]),
    indirect=["small_tiles"],
)
@pytest.mark.usefixtures("small_tiles")
def test_outputs_and_gradients(shape, dtype, deterministic, device):
    check(*random_inputs(shape, dtype, device), deterministic)


def test_segments_are_whole_tiles():
    for config in relative.CONFIGS.values():
        assert config.segment % config.block_m == config.segment % config.block_n == 0


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_the_table(dtype, dim, device):
    check(*random_inputs((1, 1, 70, 130, dim, 100), dtype, device))


@pytest.mark.parametrize("parts", [(), (4,), (5,), (6,), (5, 6)])
@pytest.mark.usefixtures("small_tiles")
def test_each_part_alone(parts, device):
    inputs, do = random_inputs((1, 2, 35, 35, 16, 40), torch.float32, device)
    given = [i for i in range(7) if i < 4 or i in parts]

    def placed(function):
        def run(*tensors):
            arguments = dict(zip(given, tensors, strict=True))
            return function(*(arguments.get(i) for i in range(7)))

        return run

    chosen = [inputs[i] for i in given]
    actual = outputs_and_gradients(placed(relative_attention), chosen, do)
    exact = outputs_and_gradients(placed(definition), [x.double() for x in chosen], do)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    length=st.integers(1, 40),
    before=st.integers(0, 30),
    dim=st.integers(1, 20),
    rows=st.integers(1, 50),
    deterministic=st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_any_shape(batch, heads, length, before, dim, rows, deterministic):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (batch, heads, length, length + before, dim, rows)
    inputs, do = random_inputs(shape, torch.float32, device)
    actual = outputs_and_gradients(
        lambda *x: relative_attention(*x, deterministic=deterministic), inputs, do
    )
    exact = outputs_and_gradients(definition, [x.double() for x in inputs], do)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("small_tiles")
def test_gradients_of_the_offsets_add_up_to_nothing(device):
    """A number added to all offsets of a head changes no weight."""
    inputs, do = random_inputs((2, 3, 40, 40, 16, 30), torch.float32, device)
    d_offsets = outputs_and_gradients(relative_attention, inputs, do)[5]
    assert d_offsets.sum(-1).abs().max() <= 1e-5 * d_offsets.abs().sum(-1).max()


@pytest.mark.usefixtures("small_tiles")
def test_without_a_term_it_is_plain_attention(device):
    (q, k, v, table, *_), _ = random_inputs((1, 2, 33, 40, 16, 9), torch.float32, device)
    y = relative_attention(q, k, v, torch.zeros_like(table))
    wanted = attend(*(x.double() for x in (q, k, v)), impl="reference")
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_large_logits_saturate(device):
    """Beyond what fp16 holds the term is clamped, and the softmax stays finite."""
    (q, k, v, table, *_), _ = random_inputs((1, 1, 20, 20, 16, 20), torch.float16, device)
    for size in (1.0, -1.0):
        offsets = torch.full((1, 20), size * 1e6, device=device)
        assert relative_attention(q, k, v, table, offsets).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_tiles")
def test_nothing_hides_a_nan(dtype, device):
    (q, k, v, table, offsets, *_), _ = random_inputs((1, 1, 20, 20, 16, 20), dtype, device)
    offsets[0, 3] = math.nan
    y = relative_attention(q, k, v, table, offsets)
    assert y[:, :, 3:].isnan().all()
    assert y[:, :, :3].isfinite().all()


@pytest.mark.usefixtures("small_tiles")
def test_autocast_changes_nothing(device):
    inputs, do = random_inputs((1, 2, 20, 20, 16, 12), torch.float32, device)
    wanted = outputs_and_gradients(
        lambda *x: relative_attention(*x, deterministic=True), inputs, do
    )
    with torch.autocast(device.type, torch.bfloat16):
        found = outputs_and_gradients(
            lambda *x: relative_attention(*x, deterministic=True), inputs, do
        )
    assert all(map(torch.equal, found, wanted))


@pytest.mark.usefixtures("small_tiles")
def test_tables_keep_their_own_dtype(device):
    (q, k, v, *rest), _ = random_inputs((1, 2, 20, 20, 16, 12), torch.float16, device)
    leaves = [x.float().requires_grad_() for x in rest]
    grads = torch.autograd.grad(relative_attention(q, k, v, *leaves).sum(), leaves)
    assert [g.dtype for g in grads] == [torch.float32] * 4


@pytest.mark.usefixtures("small_tiles")
def test_later_tokens_change_nothing(device):
    inputs, _ = random_inputs((1, 1, 40, 40, 16, 64), torch.float32, device)
    o = relative_attention(*inputs)
    for x in inputs[:3]:
        x[:, :, 23:] = torch.randn_like(x[:, :, 23:])
    assert torch.equal(relative_attention(*inputs)[:, :, :23], o[:, :, :23])


@pytest.mark.usefixtures("small_tiles")
def test_unreachable_rows_of_the_table_are_not_read_into_anything(device):
    inputs, do = random_inputs((1, 2, 20, 20, 16, 30), torch.float32, device)
    before = outputs_and_gradients(relative_attention, inputs, do)
    inputs[3][:, 20:], inputs[4][:, 20:] = 7.0, 7.0
    for a, b in zip(before, outputs_and_gradients(relative_attention, inputs, do), strict=True):
        assert torch.equal(a, b)
    assert not before[4][:, 20:].any()
    assert not before[5][:, 20:].any()


@pytest.mark.usefixtures("small_tiles")
def test_views_and_expanded_gradients(device):
    (*_, table, offsets, u, v_h), _ = random_inputs((2, 2, 30, 30, 16, 20), torch.float32, device)
    packed = torch.randn(2, 30, 3, 2, 16, device=device, requires_grad=True)
    before = packed.detach().clone()
    tables = [x.mT.contiguous().mT.requires_grad_() for x in (table, offsets, u, v_h)]
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    o = relative_attention(q, k, v, *tables)
    assert o.transpose(1, 2).is_contiguous()
    found = torch.autograd.grad(o.sum(), [packed, *tables])
    exact = [x.detach().double().requires_grad_() for x in (packed, *tables)]
    wanted = definition(*exact[0].permute(2, 0, 3, 1, 4), *exact[1:])
    for a, e in zip(found, torch.autograd.grad(wanted.sum(), exact), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
    assert torch.equal(packed, before)


def test_fewer_shares_where_their_sums_grow(device, monkeypatch):
    inputs, do = random_inputs((3, 2, 40, 40, 16, 40), torch.float32, device)
    sizes = []
    kernel = relative.dq_kernel

    class Recorder:
        def __getitem__(self, grid):
            sizes.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(relative, "dq_kernel", Recorder())
    for limit in (2**28, 3 * 2 * 40 * 16 * 4, 1):
        monkeypatch.setattr(relative, "SHARES_LIMIT", limit)
        check(inputs, do)
    assert sizes == [9, 3, 1]


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_programs_keep_to_their_scratch(dtype, dim, device, monkeypatch):
    guarded = []

    def allocate_guarded(dtype, x, elements):
        whole = torch.full((elements + 2 * 4096,), -7.0, dtype=dtype, device=x.device)
        guarded.append(whole)
        return whole[4096:-4096]

    monkeypatch.setattr(relative, "scratch", allocate_guarded)
    monkeypatch.setattr(relative, "programs", lambda config, device: 1)
    inputs, do = random_inputs((1, 1, 70, 70, dim, 70), dtype, device)
    outputs_and_gradients(relative_attention, inputs, do)
    assert len(guarded) == 4
    for whole in guarded:
        assert (whole[:4096] == -7.0).all()
        assert (whole[-4096:] == -7.0).all()


@pytest.mark.usefixtures("small_tiles")
def test_opcheck(device):
    inputs, do = random_inputs((1, 2, 5, 18, 16, 7), torch.float32, device)
    for keep in (7, 4):
        given = [x if i < keep else None for i, x in enumerate(inputs)]
        leaves = [x if x is None else x.detach().requires_grad_() for x in given]
        torch.library.opcheck(relative._forward_op, (*leaves, 0.25, True))
        o, lse = relative._forward_op(*given, 0.25, True)
        torch.library.opcheck(relative._backward_op, (do, *given, o, lse, 0.25, True))


@pytest.mark.usefixtures("small_tiles")
def test_compiles_without_breaks(device):
    torch._dynamo.reset()
    inputs, do = random_inputs((1, 2, 20, 20, 16, 30), torch.float32, device)
    compiled = torch.compile(relative_attention, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(
        lambda *x: relative_attention(*x, deterministic=True), inputs, do
    )
    found = outputs_and_gradients(lambda *x: compiled(*x, deterministic=True), inputs, do)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3, 16, 4), (1, 2, 0, 3, 16, 4), (1, 2, 0, 0, 16, 4)])
def test_empty(shape, device):
    inputs, do = random_inputs(shape, torch.float32, device)
    for deterministic in (True, False):
        o, *grads = outputs_and_gradients(
            lambda *x, d=deterministic: relative_attention(*x, deterministic=d), inputs, do
        )
        assert o.shape == inputs[0].shape
        assert not any(grad.any() for grad in grads)


def test_bad_arguments_are_refused(device):
    (q, k, v, table, offsets, u, _), _ = random_inputs((1, 2, 5, 5, 16, 4), torch.float32, device)
    wide = torch.zeros(1, 2, 5, 160, device=device)
    for arguments, message in (
        ((q, k[:, :, :3], v[:, :, :3], table), "as many keys"),
        ((q, k.repeat(1, 2, 1, 1)[:, :3], v.repeat(1, 2, 1, 1)[:, :3], table), "divi"),
        ((wide, wide, wide, table), "at most 128"),
        ((q, k, v, table[:1]), r"table must be \(H=2, P, D=16\)"),
        ((q, k, v, table[:, :0]), "table must be"),
        ((q, k, v, table, offsets[:, :2]), r"offsets must be \(2, 4\)"),
        ((q, k, v, table, None, u[0]), r"content_bias must be \(2, 16\)"),
        ((q, k, v, table, None, None, u[:1]), r"relative_bias must be \(2, 16\)"),
        ((q.double(), k.double(), v.double(), table), "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            relative_attention(*arguments)
    with pytest.raises(ValueError, match="positive"):
        relative_attention(q, k, v, table, scale=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 12, 1024, 1024, 64, 1024),
        (1, 2, 1000, 1000, 128, 700),
        (1, 2, 4097, 4097, 64, 4097),
        (1, 3, 100, 2049, 80, 300),
        *SHAPES,
    ],
)
def test_on_the_gpu(shape, dtype, deterministic, device):
    check(*random_inputs(shape, dtype, device), deterministic)


@pytest.mark.gpu
def test_small_gradients_keep_their_digits_in_bfloat16(device):
    """fp16, which holds the biases, would flush them."""
    inputs, do = random_inputs((1, 2, 200, 200, 64, 200), torch.bfloat16, device)
    large = outputs_and_gradients(relative_attention, inputs, do)
    small = outputs_and_gradients(relative_attention, inputs, do * 2.0**-30)
    for a, b in zip(large[1:], small[1:], strict=True):
        torch.testing.assert_close(a.float(), b.float() * 2.0**30, rtol=2**-6, atol=2**-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_run_gives_the_same_bits(dtype, dim, device):
    """Also a race between a program's stores to its scratch and its loads would show here."""
    inputs, do = random_inputs((4, 12, 1024, 1024, dim, 1024), dtype, device)

    def attention(*tensors):
        return relative_attention(*tensors, deterministic=True)

    runs = [outputs_and_gradients(attention, inputs, do) for _ in range(20)]
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.gpu
def test_no_host_sync_and_cuda_graph(device):
    inputs, do = random_inputs((1, 2, 256, 256, 64, 256), torch.bfloat16, device)
    leaves = [x.requires_grad_() for x in inputs]

    def step():
        o = relative_attention(*leaves, deterministic=True)
        return o, *torch.autograd.grad(o, leaves, do)

    captured, wanted = replayed(step)
    for a, b in zip(captured, wanted, strict=True):
        assert torch.equal(a, b)
