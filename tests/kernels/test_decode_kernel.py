"""The kernel of few queries against its definition in fp64, which forms every logit; and that
decoding takes it.

Tolerance: twice the error of the definition in the kernel's dtype, and four roundings of the
largest entry; both errors are against fp64.
"""

import math

import pytest
import torch

import posenc
from combinations import combined
from helpers import close, counted, replayed
from posenc.backends import fused
from posenc.backends.case import consecutive
from posenc.kernels import decode
from posenc.kernels.common import INTERPRETED
from posenc.kernels.decode import decode_attention
from posenc.kernels.mask import CAUSAL, Mask
from posenc.routing.gates import Gates

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
#: batch, heads, key heads, queries, keys, head dim, that of the values
SHAPES = [
    (1, 1, 1, 1, 1, 16, 16),
    (2, 3, 3, 1, 63, 40, 40),
    (1, 12, 3, 1, 130, 64, 64),
    (2, 4, 2, 3, 130, 48, 24),  # several queries of several heads in a tile
    (1, 6, 1, 5, 200, 16, 32),  # more rows than a tile has
    (1, 2, 2, 16, 16, 16, 16),  # as many keys as queries
    (1, 2, 1, 1, 1000, 64, 64),
    (1, 1, 1, 2, 300, 128, 128),
]


def visible(mask, length, keys, device):
    """(B or 1, 1, T, S)."""
    m = torch.arange(keys - length, keys, device=device)[:, None]
    n = torch.arange(keys, device=device)
    seen = (n <= m)[None]
    if mask.window is not None:
        seen = seen & (m - n < mask.window)
    if mask.real is not None:
        seen = seen & (mask.real[:, None] | (m == n))
    return seen[:, None]


def definition(q, k, v, bias=None, gates=None, mask=CAUSAL, scale=None):
    """As written, in the dtype of its arguments."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT * scale
    if bias is not None:
        logits = logits + bias.to(q.dtype)
    hidden = ~visible(mask, q.shape[2], k.shape[2], q.device)
    y = logits.masked_fill(hidden, -math.inf).softmax(-1) @ v
    return y if gates is None else y * gates.unsqueeze(-1).to(q.dtype)


def inputs(shape, dtype, device):
    batch, heads, groups, length, keys, dim, width = shape
    torch.manual_seed(keys)
    sizes = (heads, length, dim), (groups, keys, dim), (groups, keys, width)
    return [torch.randn(batch, *size, device=device).to(dtype) for size in sizes]


def check(qkv, **options):
    actual, plain = (function(*qkv, **options) for function in (decode_attention, definition))
    exact = definition(*(x.double() for x in qkv), **options)
    assert (actual.shape, actual.dtype) == (plain.shape, plain.dtype)
    rounding = 4 * torch.finfo(actual.dtype).eps * exact.abs().max().clamp(min=1.0)
    allowed = 2 * (plain.double() - exact).abs().max() + rounding
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output(shape, dtype, device):
    check(inputs(shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_wide_heads(dtype, device):
    check(inputs((1, 2, 1, 1, 140, 256, 256), dtype, device))


def mask_of(name, batch, keys, device):
    key = torch.arange(keys, device=device)
    parts = {}
    for part in name.split("+"):
        if part.startswith("window"):
            parts["window"] = int(part.removeprefix("window"))
            continue
        hidden = {
            "left": key < keys // 2 + 3,
            "right": key >= keys - 1,
            "middle": key % 7 < 3,
            "everywhere": key >= 0,
        }[part]
        others = (key < 0)[None].expand(batch - 1, -1)
        parts["real"] = ~torch.cat((hidden[None], others))
    return Mask(**parts)


MASKS = [
    "window1", "window20", "window150", "window5000", "left", "right", "middle", "everywhere",
    "window40+left", "window200+middle",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    combined(MASKS, [(2, 4, 2, 1, 63, 16, 16), (2, 4, 1, 3, 261, 32, 32)], DTYPES),
)
def test_masks(name, shape, dtype, device):
    check(inputs(shape, dtype, device), mask=mask_of(name, shape[0], shape[4], device))


@pytest.mark.parametrize("of_all", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias(dtype, of_all, device):
    shape = (3, 4, 2, 3, 261, 32, 32)
    qkv = inputs(shape, dtype, device)
    bias = torch.randn(1 if of_all else 3, 4, 3, 261, device=device)
    check(qkv, bias=bias)
    check(qkv, bias=bias.transpose(-1, -2).contiguous().mT, mask=Mask(window=200))


def test_bias_of_hidden_keys_is_not_read(device):
    qkv = inputs((1, 2, 1, 3, 261, 16, 16), torch.float32, device)
    mask = Mask(window=200)
    bias = torch.randn(1, 2, 3, 261, device=device)
    clean = decode_attention(*qkv, bias, mask=mask)
    bias.masked_fill_(~visible(mask, 3, 261, device), math.nan)
    assert torch.equal(decode_attention(*qkv, bias, mask=mask), clean)
    assert clean.isfinite().all()


@pytest.mark.parametrize("keys", [63, 261])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(dtype, keys, device):
    qkv = inputs((2, 4, 2, 3, keys, 16, 16), dtype, device)
    gates = 0.1 + torch.rand(2, 4, 3, device=device)
    gates[0, :2], gates[1, 3, 1] = 0.0, 0.0  # a whole group; one row
    check(qkv, gates=gates)
    assert not decode_attention(*qkv, gates=gates)[0, :2].any()


@pytest.mark.parametrize("keys", [63, 261])
def test_keys_of_dropped_heads_are_not_read(keys, device):
    q, k, v = inputs((1, 4, 2, 1, keys, 16, 16), torch.float32, device)
    gates = torch.tensor([0.0, 0.0, 0.5, 0.0], device=device).reshape(1, 4, 1)
    clean = decode_attention(q, k, v, gates=gates)
    k[:, 0], v[:, 0] = math.nan, math.nan
    assert torch.equal(decode_attention(q, k, v, gates=gates), clean)
    assert clean[:, 2].all()


def test_keys_before_a_window_are_not_read(device):
    q, k, v = inputs((1, 2, 1, 3, 700, 16, 16), torch.float32, device)
    clean = decode_attention(q, k, v, mask=Mask(window=250))
    k[:, :, :384], v[:, :, :384] = math.nan, math.nan  # whole tiles before key 448
    assert torch.equal(decode_attention(q, k, v, mask=Mask(window=250)), clean)


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_scale(scale, device):
    check(inputs((1, 2, 1, 2, 150, 16, 16), torch.float32, device), scale=scale)


@pytest.mark.parametrize("size", [30.0, 1e-3])
def test_peaked_and_flat_weights(size, device):
    q, k, v = inputs((1, 2, 1, 2, 400, 16, 16), torch.float32, device)
    check([q * size, k, v])


def test_pieces_are_put_together_some_at_a_time(monkeypatch, device):
    monkeypatch.setattr(decode, "PIECES", 2)
    check(inputs((1, 2, 1, 2, 900, 16, 16), torch.float32, device))


def test_keys_in_a_larger_cache(device):
    """Rows beyond the length hold anything; queries are views of a packed projection."""
    q, k, v = inputs((2, 4, 2, 1, 150, 16, 16), torch.float32, device)
    room = torch.full((2, 2, 2, 200, 16), math.nan, device=device)
    room[0, :, :, :150], room[1, :, :, :150] = k, v
    packed = torch.cat((q, q), dim=1).transpose(1, 2).contiguous()
    y = decode_attention(packed.transpose(1, 2)[:, :4], *room[:, :, :, :150].unbind(0))
    assert torch.equal(y, decode_attention(q, k, v))
    assert y.transpose(1, 2).is_contiguous()


def test_a_sequence_alone_is_the_one_in_the_batch(device):
    qkv = inputs((3, 4, 2, 2, 300, 16, 16), torch.float32, device)
    batch = decode_attention(*qkv)
    assert torch.equal(batch, decode_attention(*qkv))
    assert torch.equal(batch[1:2], decode_attention(*(x[1:2] for x in qkv)))


@pytest.mark.parametrize("empty", ["batch", "queries"])
def test_empty(empty, device):
    q, k, v = inputs((1, 2, 1, 3, 200, 16, 16), torch.float32, device)
    q, k, v = (x[:0] for x in (q, k, v)) if empty == "batch" else (q[:, :, :0], k, v)
    assert decode_attention(q, k, v).shape == q.shape


def test_pieces_depend_on_lengths_alone():
    assert decode.cut(1, 1, None) == (128, 0, 1)
    assert decode.cut(1, 128, None) == (128, 0, 1)
    assert decode.cut(1, 129, None) == (128, 0, 2)
    assert decode.cut(1, 128 * 128, None) == (128, 0, 128)
    assert decode.cut(1, 128 * 128 + 1, None) == (256, 0, 65)
    assert decode.cut(2, 10_000, 256) == (128, 76, 3)  # keys 9743 .. 9999
    assert decode.cut(2, 10_000, 20_000) == (256, 0, 40)
    assert decode.cut(16, 4096, None) == (512, 0, 8)
    for queries in (1, 3, 16):
        for keys in (16, 1000, 10_000, 1_000_000):
            size, _, pieces = decode.cut(queries, keys, None)
            assert size == decode.SHORTEST or queries * (pieces - 1) < decode.MOST
            assert all(size % config.block_n == 0 for config in decode.CONFIGS.values())


def test_opcheck(device):
    q, k, v = inputs((2, 4, 2, 2, 140, 16, 8), torch.float32, device)
    real = mask_of("left", 2, 140, device).real
    bias, gates = torch.randn(1, 4, 2, 140, device=device), torch.rand(2, 4, 2, device=device)
    torch.library.opcheck(decode._op, (q, k, v, None, None, 0.25))
    torch.library.opcheck(decode._op, (q, k, v, bias, gates, 0.25, 100, real))


def test_compiles_to_one_graph_over_lengths(device):
    with counted() as (compiled, counter), torch.no_grad():
        step = compiled(decode_attention)
        for keys in (100, 133, 260):
            qkv = inputs((1, 2, 1, 1, keys, 16, 16), torch.float32, device)
            assert torch.equal(step(*qkv), decode_attention(*qkv))
        assert counter.frame_count <= 2


def test_arguments_that_cannot_be(device):
    q, k, v = inputs((2, 4, 2, 2, 5, 16, 8), torch.float32, device)
    first = torch.zeros(2, 5, dtype=torch.int32, device=device)
    for wrong, options in [
        ("divisor of 4", {"k": k[:, :1].expand(2, 3, 5, 16), "v": v}),
        (r"expected v \(B, G, S, E\)", {"v": v[:, :, :4]}),
        ("at most 16 queries", {"q": torch.zeros(2, 4, 17, 16), "k": torch.zeros(2, 2, 17, 16),
                                "v": torch.zeros(2, 2, 17, 16)}),
        ("in float32 128", {"v": torch.zeros(2, 2, 5, 130)}),
        ("as many keys", {"q": torch.zeros(2, 4, 6, 16)}),
        ("one dtype", {"v": v.half()}),
        ("scale must be positive", {"scale": 0.0}),
        ("window counts", {"mask": Mask(window=0)}),
        ("takes no segments", {"mask": Mask(first=first, last=first)}),
        ("real must be bool", {"mask": Mask(real=first)}),
        (r"bias must be floating point \(1, 4, 2, 5\) or \(2, 4, 2, 5\)",
         {"bias": torch.zeros(4, 2, 5)}),
        (r"gates must be floating point \(2, 4, 2\)", {"gates": torch.ones(2, 4, 2).long()}),
    ]:  # fmt: skip
        given = {"q": q, "k": k, "v": v, **options}
        given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        with pytest.raises(ValueError, match=wrong):
            decode_attention(**given)


def test_a_gradient_is_refused(device):
    q, k, v = inputs((1, 2, 1, 1, 5, 16, 16), torch.float32, device)
    leaf = v.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"has no gradient.*torch.no_grad\(\)"):
        decode_attention(q, k, leaf)
    with torch.no_grad():
        assert torch.equal(decode_attention(q, k, leaf), decode_attention(q, k, v))


@pytest.fixture
def taken(monkeypatch):
    """Queries of every call of the kernel."""
    calls, original = [], decode._op

    def spy(q, *rest):
        calls.append(q.shape[2])
        return original(q, *rest)

    monkeypatch.setattr(decode, "_op", spy)
    return calls


#: What decoding of these takes: names, options of theirs.
LAYERS = {
    "rope, grouped": ("rope", {"num_kv_heads": 2}),
    "rope, window": ("rope", {"window": 5}),
    "carope": ("carope", {}),
    "cmha": ("cmha", {}),
    "pope": ("pope", {}),  # q and k are wider than v
    "alibi": ("alibi", {}),
    "t5": ("t5", {"num_kv_heads": 2}),
    "fox": ("fox", {"window": 7}),
    "mdha": ("mdha", {}),
    "moh": ("moh", {}),
}


@pytest.mark.parametrize(
    ("variant", "padded"),
    [(variant, False) for variant in LAYERS]
    + [(variant, True) for variant in LAYERS if variant not in ("alibi", "t5")],
)
def test_decoding_takes_it(variant, padded, taken, device):
    name, options = LAYERS[variant]
    torch.manual_seed(0)
    layer = posenc.attention(name, 64, 4, impl="fused", **options).to(device)
    plain = posenc.attention(name, 64, 4, impl="reference", **options).to(device)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 12, 64, device=device)
    real = torch.ones(2, 12, dtype=torch.bool, device=device)
    real[0, :3] = not padded
    with torch.no_grad():
        cache = layer.make_cache(2, 12)
        parts = []
        for part, own in zip(x.split((9, 1, 2), 1), real.split((9, 1, 2), 1), strict=True):
            parts.append(layer(part, mask=own if padded else None, cache=cache))
        expected = plain(x, mask=real if padded else None)
    assert taken == [9, 1, 2]
    close(torch.cat(parts, dim=1)[real], expected[real], 1e-5)


def test_what_it_does_not_serve_goes_on(taken, device):
    def attend(length=1, keys=20, learns=False, **options):
        q, k, v = inputs((1, 2, 2, length, keys, 16, 16), torch.float32, device)
        return fused.attend(consecutive(q, k, v.requires_grad_(learns), **options))

    attend(learns=True)
    assert taken == []
    attend()  # of weights that are frozen
    assert taken.pop() == 1
    with torch.no_grad():
        attend(17)
        attend(4, 4, segments=torch.tensor([[0, 0, 1, 1]], device=device))
        assert taken == []
        attend(16)
        gates = Gates(torch.tensor([[[0.5], [0.0]]], device=device), 0, 1)
        y = attend(gates=gates)
    assert taken == [16, 1]
    assert not y[:, 1].any()
    assert y[:, 0].all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 1000, 4096, 40_000])
@pytest.mark.parametrize("groups", [1, 4, 12])
def test_on_the_gpu(groups, keys, dtype, device):
    shape = (2, 12, groups, 1, keys, 64, 64)
    check(inputs(shape, dtype, device), mask=mask_of("window30000+middle", 2, keys, device))


@pytest.mark.gpu
def test_no_host_sync_and_cuda_graph(device):
    qkv = inputs((1, 12, 4, 1, 4096, 64, 64), torch.bfloat16, device)
    bias, gates = torch.randn(1, 12, 1, 4096, device=device), torch.ones(1, 12, 1, device=device)
    (captured,), (wanted,) = replayed(lambda: (decode_attention(*qkv, bias, gates),))
    assert torch.equal(captured, wanted)
