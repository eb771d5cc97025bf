"""RoPE in the core: outputs as of rotation and core one after the other, gradients no worse."""

import math

import pytest
import torch

import oracles
from combinations import combined
from helpers import outputs_and_gradients
from posenc.kernels import flash
from posenc.kernels.rope import rope
from posenc.kernels.rope_attention import _backward_op, _forward_op, rope_attention

DTYPES = (torch.float32, torch.float16)
#: batch, heads, key heads, length, head dim
SHAPES = [(1, 1, 1, 1, 16), (2, 3, 3, 63, 16), (1, 4, 2, 40, 64), (1, 1, 1, 33, 128)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Short sequences take many tiles."""
    configs = {key: flash.Config(16, 32, 4, 1) for key in flash.CONFIGS}
    monkeypatch.setattr(flash, "CONFIGS", configs)


def frequencies(dim, device):
    return torch.tensor(oracles.rope_frequencies(dim), dtype=torch.float64, device=device)


def inputs(shape, dtype, device):
    """q, k, v as views of a packed projection, and the gradient of the output."""
    batch, heads, kv_heads, length, dim = shape
    torch.manual_seed(0)
    packed = torch.randn(batch, length, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    q, k, v = packed.transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
    return q, k, v, torch.randn(batch, heads, length, dim, dtype=dtype, device=device)


def definition(q, k, v, omega, positions, factor, pairing):
    """Rotation and attention as written, in fp64."""
    angles = positions.double()[..., None] * omega
    angles = angles[:, None] if angles.ndim == 3 else angles
    q, k = (
        oracles.rotate(x, angles.expand(*x.shape[:3], -1), pairing, factor).to(x.dtype)
        for x in (q, k)
    )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v


def check(shape, dtype, pairing, deterministic, device):
    *tensors, do = inputs(shape, dtype, device)
    batch, _, _, length, dim = shape
    omega, factor = frequencies(dim, device), 1.25
    shape = (batch, length) if pairing == "half" else (length,)
    positions = torch.randint(0, 9000, shape, device=device)
    before = [x.clone() for x in tensors]

    def whole(q, k, v):
        turn = {"factor": factor, "pairing": pairing, "deterministic": deterministic}
        return rope_attention(q, k, v, omega, positions, **turn)

    def parts(q, k, v):
        q, k = rope(q, k, omega, positions, factor=factor, pairing=pairing)
        return flash.flash_attention(q, k, v, deterministic=deterministic)

    actual = outputs_and_gradients(whole, tensors, do)
    composed = outputs_and_gradients(parts, tensors, do)
    exact = outputs_and_gradients(
        lambda *x: definition(*x, omega, positions, factor, pairing),
        [x.double() for x in tensors],
        do,
    )
    assert all(map(torch.equal, tensors, before))
    torch.testing.assert_close(actual[0], composed[0], rtol=0, atol=0)
    for a, c, e in zip(actual, composed, exact, strict=True):
        assert (a.shape, a.dtype) == (c.shape, dtype)
        size = e.abs().max()
        rounding = torch.finfo(dtype).eps * size
        assert (a.double() - e).abs().max() <= (c.double() - e).abs().max() + rounding


@pytest.mark.parametrize(
    ("shape", "dtype", "pairing", "deterministic"),
    combined(SHAPES, DTYPES, ["half", "interleaved"], [True, False]),
)
def test_outputs_and_gradients(shape, dtype, pairing, deterministic, device):
    check(shape, dtype, pairing, deterministic, device)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_tiles_of_the_table_in_bfloat16(pairing, deterministic, device, monkeypatch):
    monkeypatch.undo()
    for dim in (64, 128):
        check((2, 4, 2, 300, dim), torch.bfloat16, pairing, deterministic, device)


@pytest.mark.gpu
def test_every_run_gives_the_same_bits(device, monkeypatch):
    monkeypatch.undo()
    *tensors, do = inputs((4, 12, 12, 1024, 64), torch.bfloat16, device)
    omega = frequencies(64, device)
    runs = [
        outputs_and_gradients(lambda *x: rope_attention(*x, omega, deterministic=True), tensors, do)
        for _ in range(20)
    ]
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_positions_default_to_the_index(device):
    q, k, v, _ = inputs((2, 3, 3, 37, 16), torch.float32, device)
    omega = frequencies(16, device)
    positions = torch.arange(37, device=device, dtype=torch.int32)
    y = rope_attention(q, k, v, omega)
    assert torch.equal(y, rope_attention(q, k, v, omega, positions))


@pytest.mark.parametrize(("dim", "pairs"), [(24, 12), (16, 5), (8, 4), (128, 64)])
def test_other_sizes_take_the_parts(dim, pairs, device):
    q, k, v, _ = inputs((1, 2, 2, 19, dim), torch.float32, device)
    omega = frequencies(2 * pairs, device)
    composed = flash.flash_attention(*rope(q, k, omega), v)
    assert torch.equal(rope_attention(q, k, v, omega), composed)


def test_expanded_gradient(device):
    *tensors, _ = inputs((2, 3, 3, 21, 16), torch.float32, device)
    omega = frequencies(16, device)
    leaves = [x.detach().requires_grad_() for x in tensors]
    sums = torch.autograd.grad(rope_attention(*leaves, omega).sum(), leaves)
    o = rope_attention(*leaves, omega)
    for a, b in zip(sums, torch.autograd.grad(o, leaves, torch.ones_like(o)), strict=True):
        assert torch.equal(a, b)


def test_ops_are_registered_well(device):
    *tensors, do = inputs((1, 2, 1, 19, 16), torch.float32, device)
    leaves = [x.detach().requires_grad_() for x in tensors]
    fractions = torch.arange(8, device=device)
    for positions in (None, torch.arange(19, device=device)):
        options = (fractions, positions, 1.0, False, 0.25, True)
        torch.library.opcheck(_forward_op, (*leaves, *options))
        o, lse, q_turned, k_turned = _forward_op(*tensors, *options)
        saved = (do, q_turned, k_turned, tensors[2], o, lse)
        torch.library.opcheck(_backward_op, (*saved, *options))


def test_bad_arguments_are_refused(device):
    q, k, v, _ = inputs((1, 2, 2, 5, 16), torch.float32, device)
    omega = frequencies(16, device)
    for arguments, message in (
        ((q[:, :, :3], k, v, omega), "agree in batch, length"),
        ((q, k[:, :, :3], v[:, :, :3], omega), "as many keys"),
        ((q, k, v, omega[None]), "frequencies must be"),
        ((q, k, v, omega, torch.arange(4, device=device)), "positions must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            rope_attention(*arguments)
