"""CARoPE in the core: outputs as of rotation and core one after the other, gradients as exact."""

import math

import pytest
import torch

import oracles
from combinations import combined
from helpers import outputs_and_gradients
from posenc.kernels import carope_attention as module
from posenc.kernels import flash
from posenc.kernels.carope import carope
from posenc.kernels.carope_attention import _backward_op, _forward_op, carope_attention

DTYPES = (torch.float32, torch.float16)
#: batch, heads, length, head dim
SHAPES = [(1, 1, 1, 64), (2, 3, 70, 64), (1, 2, 33, 128), (1, 1, 63, 80)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Short sequences take many tiles, each of one or two of CARoPE's."""
    configs = {key: flash.Config(32, 64, 4, 1) for key in flash.CONFIGS}
    monkeypatch.setattr(flash, "CONFIGS", configs)


def inputs(shape, dtype, device):
    """q, k, v as views of a packed projection, log f, and the gradient of the output."""
    batch, heads, length, dim = shape
    torch.manual_seed(0)
    packed = torch.randn(batch, length, 3, heads, dim, dtype=dtype, device=device)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    log_f = torch.rand(batch, heads, length, dtype=torch.float64, device=device).mul(0.9).log()
    return q, k, v, log_f, torch.randn(batch, heads, length, dim, dtype=dtype, device=device)


def definition(q, k, v, log_f, first_power):
    """Running phases, rotation and attention as written, in fp64."""
    phases = oracles.carope_steps(log_f.exp(), q.shape[-1], first_power).cumsum(2)
    q, k = oracles.carope_rotate(q, k, phases)
    visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v


def check(shape, dtype, first_power, deterministic, device):
    *tensors, do = inputs(shape, dtype, device)
    before = [x.clone() for x in tensors]
    options = {"first_power": first_power}

    def whole(*x):
        return carope_attention(*x, **options, deterministic=deterministic)

    def parts(q, k, v, log_f):
        q, k, _ = carope(q, k, log_f, **options)
        return flash.flash_attention(q, k, v, deterministic=deterministic)

    actual = outputs_and_gradients(whole, tensors, do)
    composed = outputs_and_gradients(parts, tensors, do)
    double = [x.cpu().double() for x in tensors]
    exact = outputs_and_gradients(lambda *x: definition(*x, first_power), double, do.cpu())
    assert all(map(torch.equal, tensors, before))
    torch.testing.assert_close(actual[0], composed[0], rtol=0, atol=0)
    for x, a, c, e in zip([tensors[0], *tensors], actual, composed, exact, strict=True):
        assert (a.shape, a.dtype) == (c.shape, x.dtype)
        allowed = 2 * (c.cpu().double() - e).abs().max() + torch.finfo(dtype).eps * e.abs().max()
        assert (a.cpu().double() - e).abs().max() <= allowed


@pytest.mark.parametrize(
    ("shape", "dtype", "deterministic"), combined(SHAPES, DTYPES, [True, False])
)
def test_outputs_and_gradients(shape, dtype, deterministic, device):
    check(shape, dtype, shape[1] % 2, deterministic, device)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [True, False])
def test_tiles_of_the_table_in_bfloat16(deterministic, device, monkeypatch):
    monkeypatch.undo()
    for dim in (64, 128):
        check((2, 3, 300, dim), torch.bfloat16, 0, deterministic, device)


@pytest.mark.gpu
def test_every_run_gives_the_same_bits(device, monkeypatch):
    monkeypatch.undo()
    *tensors, do = inputs((4, 12, 1024, 64), torch.bfloat16, device)
    runs = [
        outputs_and_gradients(lambda *x: carope_attention(*x, deterministic=True), tensors, do)
        for _ in range(20)
    ]
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_tiles_that_do_not_divide_take_the_parts(device, monkeypatch):
    shape = (1, 2, 70, 16)  # CARoPE's tiles are 128 rows here, the core's 32 and 64
    assert not module.fits(inputs(shape, torch.float32, device)[0], 0)
    check(shape, torch.float32, 0, True, device)


def test_tiles_of_the_table_divide_at_the_usual_sizes(monkeypatch):
    monkeypatch.undo()
    for dim in (64, 80, 96, 128, 256):
        assert module.fits(torch.empty(1, 1, 1, dim, dtype=torch.bfloat16), 0), dim


def test_rates_of_one_head_do_not_reach_another(device):
    q, k, v, log_f, _ = inputs((2, 3, 40, 64), torch.float32, device)
    y = carope_attention(q, k, v, log_f)
    changed = log_f.clone()
    changed[:, 1] *= 2
    other = carope_attention(q, k, v, changed)
    assert torch.equal(y[:, [0, 2]], other[:, [0, 2]])
    assert not torch.equal(y[:, 1], other[:, 1])


def test_ops_are_registered_well(device):
    q, k, v, log_f, do = inputs((1, 2, 5, 16), torch.float32, device)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, log_f)]
    for deterministic in (True, False):
        options = (0, 0.125, deterministic)
        torch.library.opcheck(_forward_op, (*leaves, *options))
        o, lse, q_turned, k_turned, rates, carries = _forward_op(q, k, v, log_f, *options)
        saved = (do, q_turned, k_turned, v, o, lse, rates, carries)
        torch.library.opcheck(_backward_op, (*saved, *options))


def test_bad_arguments_are_refused(device):
    q, k, v, log_f, _ = inputs((1, 2, 5, 16), torch.float32, device)
    for arguments, message in (
        ((q, k[:, :1], v[:, :1], log_f), "log_rates must be"),
        ((q[0], k[0], v[0], log_f), "expected q"),
        ((q, k, v[:, :, :3], log_f), "expected q"),
        ((q, k, v, log_f[:, :1]), "log_rates must be"),
    ):
        with pytest.raises(ValueError, match=message):
            carope_attention(*arguments)
