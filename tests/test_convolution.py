"""Causal depthwise convolution of q, k and v."""

import inspect
from typing import Any

import pytest
import torch

import oracles
import posenc
from helpers import HEAD_DIM, HEADS, WIDTH, build, close, copy_shared, differs, perturb, randn
from posenc import DepthwiseConv
from posenc.convolution import depthwise_conv

B, T = 2, 9
SIZES = pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
SHARING = pytest.mark.parametrize("per_head", [False, True])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def conv(**options: Any) -> DepthwiseConv:
    return perturb(DepthwiseConv(HEADS, HEAD_DIM, **options)).double()


@SIZES
@SHARING
@pytest.mark.parametrize("bias", [False, True])
def test_output_is_the_oracle(kernel_size: int, per_head: bool, bias: bool) -> None:
    part = conv(kernel_size=kernel_size, per_head=per_head, bias=bias)
    inputs = randn(3, B, HEADS, T, HEAD_DIM)
    shifts = part.bias if bias else (None,) * 3
    outputs = part(*inputs)
    for y, x, weight, shift in zip(outputs, inputs, part.weight, shifts, strict=True):
        close(y, oracles.depthwise_conv(x, weight, shift))


@SIZES
def test_impulse_response_is_the_kernel_and_stays_in_its_channel(kernel_size: int) -> None:
    part = conv(kernel_size=kernel_size, per_head=True, bias=False)
    x = torch.zeros(1, HEADS, T, HEAD_DIM).double()
    x[0, 1, 2, 4] = 1.0
    for y, weight in zip(part(x, x, x), part.weight, strict=True):
        response = torch.zeros(T).double()
        count = min(kernel_size, T - 2)
        response[2 : 2 + count] = weight[1, 4].flip(0)[:count]
        close(y[0, 1, :, 4], response, 1e-12)
        y = y.clone()
        y[0, 1, :, 4] = 0
        assert not y.any()


def test_queries_keys_and_values_have_their_own_kernels() -> None:
    part, x = conv(), randn(B, HEADS, T, HEAD_DIM)
    q, k, v = part(x, x, x)
    differs(q, k)
    differs(k, v)
    differs(q, v)


@SIZES
def test_past_rows_continue_the_sequence(kernel_size: int) -> None:
    x, weight = randn(B, HEADS, T, HEAD_DIM), randn(HEADS, HEAD_DIM, kernel_size)
    whole = depthwise_conv(x, weight, None)
    for cut in (0, 1, 4):
        padded = torch.cat([torch.zeros(B, HEADS, kernel_size - 1, HEAD_DIM).double(), x], 2)
        past = padded[:, :, cut : cut + kernel_size - 1]
        close(depthwise_conv(x[:, :, cut:], weight, None, past), whole[:, :, cut:])


@SIZES
@SHARING
def test_decoding_and_rollback_at_every_cut(kernel_size: int, per_head: bool) -> None:
    module = build("mdha", kernel_size=kernel_size, per_head=per_head)
    x, junk = randn(B, T, WIDTH), randn(B, 4, WIDTH)
    expected, cache = module(x), module.make_cache(B, T + 4)
    with torch.no_grad():
        for cut in range(T):
            cache.truncate(0)
            if cut:
                module(x[:, :cut], cache=cache)
            module(junk, cache=cache)
            cache.truncate(cut)
            close(module(x[:, cut:], cache=cache), expected[:, cut:])


def test_padded_tokens_count_as_zeros() -> None:
    part, inputs = conv(), randn(3, B, HEADS, T, HEAD_DIM)
    real = torch.ones(B, T, dtype=torch.bool)
    real[0, :4] = False
    outputs = part(*inputs, real=real)
    alone = part(*inputs[:, :1, :, 4:])
    for y, expected in zip(outputs, alone, strict=True):
        close(y[:1, :, 4:], expected)


def test_gradients_are_those_of_finite_differences() -> None:
    part = DepthwiseConv(2, 2).double()
    inputs = [z.requires_grad_() for z in randn(3, 1, 2, 4, 2)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, *_: part(q, k, v), (*inputs, *part.parameters()), fast_mode=True
    )


def test_starts() -> None:
    torch_like = DepthwiseConv(12, 64)
    assert torch_like.weight.shape == (3, 64, 3)
    assert torch_like.bias.shape == (3, 64)
    bound = 3**-0.5
    for parameter in torch_like.parameters():
        assert bound * 0.9 < parameter.abs().max() <= bound
    identity = DepthwiseConv(12, 64, init="identity", kernel_size=4)
    assert (identity.weight == torch.tensor([0.0, 0, 0, 1])).all()
    assert not identity.bias.any()
    primer = DepthwiseConv(12, 64, init="primer", per_head=True, bias=False)
    assert primer.weight.shape == (3, 12, 64, 3)
    close(primer.weight, torch.tensor([0.5 / 3, 0.5 / 3, 0.5]).expand(3, 12, 64, 3), 1e-7)
    assert primer.bias is None


@pytest.mark.parametrize(("per_head", "bias", "count"), [(True, False, 6912), (False, True, 768)])
def test_parameter_counts(per_head: bool, bias: bool, count: int) -> None:
    part = DepthwiseConv(12, 64, per_head=per_head, bias=bias)
    assert sum(parameter.numel() for parameter in part.parameters()) == count


def test_every_argument_changes_the_output() -> None:
    changes = {"kernel_size": 5, "per_head": True, "bias": False, "init": "primer", "causal": False}
    parameters = set(inspect.signature(DepthwiseConv).parameters)
    assert parameters == changes.keys() | {"num_heads", "num_kv_heads", "head_dim"}
    inputs = randn(3, B, HEADS, T, HEAD_DIM)
    plain = DepthwiseConv(HEADS, HEAD_DIM).double()
    for name, value in changes.items():
        part = DepthwiseConv(HEADS, HEAD_DIM, **{name: value}).double()
        if name == "bias":
            copy_shared(plain, part)
        differs(part(*inputs)[0], plain(*inputs)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "kernel_size.* at least 1.*got 0"),
        ({"init": "identiy"}, "Did you mean 'identity'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthwiseConv(HEADS, HEAD_DIM, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_output_keeps_the_dtype(dtype: torch.dtype) -> None:
    part = DepthwiseConv(HEADS, HEAD_DIM)
    q, k, v = randn(3, B, HEADS, T, HEAD_DIM, dtype=dtype)
    assert {y.dtype for y in part(q, k, v)} == {dtype}


def test_zoo_defaults_are_those_of_the_sources() -> None:
    primer, rcmha = (posenc.attention(name, WIDTH, HEADS).conv for name in ("mdha", "rcmha"))
    assert primer.weight.shape == (3, HEADS, HEAD_DIM, 3)
    assert primer.bias is None
    assert primer.init == "primer"
    assert rcmha.weight.shape == (3, HEAD_DIM, 3)
    assert rcmha.bias.shape == (3, HEAD_DIM)
    assert rcmha.init == "torch"
