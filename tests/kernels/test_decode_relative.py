"""The relative term of few queries by key, against loops in fp64; and that decoding takes it.

Tolerance: twice the error of the products in the kernel's dtype, and four roundings of the largest
entry; both errors are against fp64.
"""

import pytest
import torch

import posenc
from combinations import combined
from helpers import close, replayed
from posenc.kernels import decode_relative
from posenc.kernels.common import INTERPRETED
from posenc.kernels.decode_relative import relative_by_key

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
#: batch, heads, queries, keys, rows of the table, head dim
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 3, 1, 63, 63, 40),
    (1, 2, 3, 130, 20, 64),  # distances beyond the table
    (9, 2, 2, 70, 100, 16),  # more rows than a tile has, and more of the table than distances
    (1, 1, 16, 16, 16, 128),
    (1, 2, 1, 1000, 1000, 32),
]


def inputs(shape, dtype, device):
    batch, heads, length, keys, rows, dim = shape
    torch.manual_seed(keys)
    q = torch.randn(batch, length, heads, dim, device=device).to(dtype).transpose(1, 2)
    return q, torch.randn(heads, rows, dim, device=device), torch.randn(heads, rows, device=device)


def definition(q, table, offsets, keys, scale):
    """As written: the row of each pair's distance."""
    m = torch.arange(keys - q.shape[2], keys, device=q.device)[:, None]
    distance = (m - torch.arange(keys, device=q.device)).clamp(0, table.shape[1] - 1)
    rows = table[:, distance].to(q.dtype)  # (H, T, S, D)
    term = (q.unsqueeze(-2) @ rows.mT).squeeze(-2)
    if offsets is not None:
        term = term + offsets[:, distance].to(q.dtype)
    return scale * term


def seen(length, keys, window, device):
    m = torch.arange(keys - length, keys, device=device)[:, None]
    n = torch.arange(keys, device=device)
    return (n <= m) & (m - n < (window or keys))


@pytest.mark.parametrize(
    ("shape", "dtype", "window", "learned"), combined(SHAPES, DTYPES, [None, 1, 50], [True, False])
)
def test_term(shape, dtype, window, learned, device):
    q, table, offsets = inputs(shape, dtype, device)
    offsets, keys = offsets if learned else None, shape[3]
    actual = relative_by_key(q, table, offsets, keys=keys, scale=0.3, window=window)
    assert (actual.shape, actual.dtype) == ((*q.shape[:3], keys), torch.float32)
    plain = definition(q, table, offsets, keys, 0.3)
    exact = definition(q.double(), table.to(dtype).double(), offsets, keys, 0.3)
    own = seen(q.shape[2], keys, window, device)
    rounding = 4 * torch.finfo(dtype).eps * exact.abs().max().clamp(min=1.0)
    allowed = 2 * (plain.double() - exact).abs().max() + rounding
    assert ((actual.double() - exact)[..., own].abs() <= allowed).all()
    if INTERPRETED:  # what no query sees is left as it was: NaN here
        beyond = torch.arange(keys, device=device) > torch.arange(keys)[-q.shape[2] :, None]
        assert actual[..., beyond].isnan().all()


def test_opcheck(device):
    q, table, offsets = inputs((2, 3, 1, 40, 40, 16), torch.float32, device)
    # What is not seen is not initialised, which opcheck would compare.
    for window in (None, 40):
        torch.library.opcheck(decode_relative._op, (q, table, offsets, 40, 0.25, window))
    torch.library.opcheck(decode_relative._op, (q, table, None, 40, 0.25))


def test_arguments_that_cannot_be(device):
    q, table, offsets = inputs((2, 3, 4, 9, 9, 16), torch.float32, device)
    options = {"keys": 9, "scale": 1.0}
    for wrong, given, changes in [
        ("as many keys as queries", (q, table, offsets), {"keys": 3}),
        (r"table must be \(H=3, P, D=16\)", (q, table[0], None), {}),
        (r"table must be floating point \(3, 9, 16\)", (q, table[:2], None), {}),
        (r"offsets must be floating point \(3, 9\)", (q, table, offsets[:, :5]), {}),
        ("float64", (q.double(), table, offsets), {}),
        ("head dim of at most 128", (q.repeat(1, 1, 1, 9), table.repeat(1, 1, 9), None), {}),
    ]:
        with pytest.raises(ValueError, match=wrong):
            relative_by_key(*given, **options | changes)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rcmha", {}),
        ("rcmha", {"max_distance": 4}),
        ("rmha", {"num_kv_heads": 2}),
        ("rmha", {"window": 6}),
        ("moh", {"encoding": "relative", "conv": True}),
    ],
)
def test_decoding_takes_it(name, options, device, monkeypatch):
    calls, original = [], decode_relative._op

    def spy(q, *rest):
        calls.append(q.shape[2])
        return original(q, *rest)

    monkeypatch.setattr(decode_relative, "_op", spy)
    torch.manual_seed(0)
    layer = posenc.attention(name, 64, 4, impl="fused", **options).to(device)
    plain = posenc.attention(name, 64, 4, impl="reference", **options).to(device)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 23, 64, device=device)
    with torch.no_grad():
        cache = layer.make_cache(2, 23)
        parts = [layer(part, cache=cache) for part in x.split((20, 1, 2), dim=1)]
        close(torch.cat(parts, dim=1), plain(x), 1e-5)
    assert calls == [1, 2]


@pytest.mark.gpu
def test_no_host_sync_and_cuda_graph(device):
    q, table, offsets = inputs((1, 12, 1, 4096, 4096, 64), torch.bfloat16, device)

    def step():
        return (relative_by_key(q, table, offsets, keys=4096, scale=0.125),)

    (captured,), (wanted,) = replayed(step)
    assert torch.equal(captured, wanted)
