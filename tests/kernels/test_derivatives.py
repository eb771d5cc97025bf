"""Derivatives that the ops do not have are refused: forward mode, and those of torch.func."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import NAMES, build, close
from posenc.kernels import common
from posenc.kernels.biased_attention import biased_attention
from posenc.kernels.carope import carope, carope_with_phases
from posenc.kernels.carope_attention import carope_attention
from posenc.kernels.conv import conv, conv_with_state
from posenc.kernels.decode import decode_attention
from posenc.kernels.decode_relative import relative_by_key
from posenc.kernels.flash import flash_attention, flash_attention_with_lse
from posenc.kernels.polar import polar
from posenc.kernels.projection import project_kept
from posenc.kernels.rates import log_rates
from posenc.kernels.relative import relative_attention
from posenc.kernels.rope import rope
from posenc.kernels.rope_attention import rope_attention
from posenc.kernels.routed import routed_attention

# torch scripts its forward mode, and deprecates that.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

B, H, T, D = 1, 2, 5, 16
REFUSED = r"is differentiated by backward\(\) alone.* Use impl='reference'"


def heads(*shape):
    return torch.rand(*(shape or (B, H, T, D)))


def pair():
    return heads(), heads()


def triple():
    return heads(), heads(), heads()


def frequencies():
    return torch.rand(D // 2, dtype=torch.float64)


#: Every op, and tensors that it can be differentiated by.
OPS = {
    biased_attention: lambda: (*triple(), heads(B, H, T), heads(H, T)),
    carope: lambda: (*pair(), -heads(B, H, T)),
    carope_with_phases: lambda: (*pair(), -heads(B, H, T)),
    carope_attention: lambda: (*triple(), -heads(B, H, T)),
    conv: lambda: (*triple(), heads(3, D, 3), heads(3, D), heads(B, 3, H, 2, D)),
    conv_with_state: lambda: (*triple(), heads(3, D, 3), heads(3, D), heads(B, 3, H, 2, D)),
    flash_attention: triple,
    flash_attention_with_lse: triple,
    log_rates: lambda: (heads(B, T, 8), heads(8, H), heads(H)),
    polar: lambda: (*pair(), heads(H, D // 2), heads(H, D // 2), frequencies()),
    project_kept: lambda: (heads(B, T, 8), heads(H * D, 8), heads(H * D), heads(B, H, T)),
    relative_attention: lambda: (
        *triple(), heads(H, T, D), heads(H, T), heads(H, D), heads(H, D)
    ),
    rope: lambda: (*pair(), frequencies()),
    partial(rope, inplace=True): lambda: (*pair(), frequencies()),
    rope_attention: lambda: (*triple(), frequencies()),
    routed_attention: lambda: (*triple(), heads(B, H, T)),
    partial(routed_attention, straight_through=True): lambda: (*triple(), heads(B, H, T)),
}  # fmt: skip
#: Those that have no gradient at all.
INFERENCE = {
    decode_attention: lambda: (*triple(), heads(1, H, T, T), heads(B, H, T)),
    partial(relative_by_key, keys=T, scale=1.0): lambda: (
        heads(), heads(H, T, D), heads(H, T)
    ),
}  # fmt: skip
EVERY = OPS | INFERENCE
CASES = [
    pytest.param(op, index, id=f"{getattr(op, 'func', op).__name__}-{i}-{index}")
    for i, (op, make) in enumerate(EVERY.items())
    for index in range(len(make()))
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def first(result):
    return result[0] if isinstance(result, tuple) else result


def dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


def jvp(function, x):
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))


def grad(function, x):
    return torch.func.grad(lambda z: function(z).sum())(x)


@pytest.mark.parametrize("transform", [dual, jvp, grad])
@pytest.mark.parametrize(("op", "index"), CASES)
def test_every_op_refuses_every_tensor(op, index, transform, device):
    tensors = [x.to(device) for x in EVERY[op]()]

    def by(x):
        return first(op(*tensors[:index], x, *tensors[index + 1 :]))

    with pytest.raises(ValueError, match="has no gradient" if op in INFERENCE else REFUSED):
        transform(by, tensors[index])


@pytest.mark.parametrize("op", INFERENCE)
def test_inference_alone_refuses_backward(op, device):
    tensors = [x.to(device) for x in INFERENCE[op]()]
    for index in range(len(tensors)):
        given = [x.clone().requires_grad_(i == index) for i, x in enumerate(tensors)]
        with pytest.raises(ValueError, match=r"has no gradient.*torch.no_grad\(\)"):
            op(*given)
        with torch.no_grad():
            op(*given)


def test_there_is_a_case_for_every_file_with_an_op():
    files = Path(common.__file__).parent.glob("*.py")
    with_ops = {path.stem for path in files if "custom_op(" in path.read_text()}
    assert with_ops == {getattr(op, "func", op).__module__.rpartition(".")[2] for op in EVERY}


def jacfwd(function, x):
    return torch.func.jacfwd(function)(x)


def jacrev(function, x):
    return torch.func.jacrev(function)(x)


@pytest.mark.parametrize("transform", [dual, jvp, grad, jacfwd, jacrev])
@pytest.mark.parametrize("name", NAMES)
def test_every_layer_refuses(name, transform, device):
    module = build(name, head_dim=D, dtype=torch.float32, impl="fused").to(device)
    x = torch.randn(1, T, module.embed_dim, device=device)
    with pytest.raises(ValueError, match=REFUSED):
        transform(module, x)


def tangent(function, x):
    return jvp(function, x)[1]


@pytest.mark.parametrize(
    ("outer", "inner"), [(jvp, tangent), (jvp, grad), (grad, tangent), (grad, grad), (dual, grad)]
)
def test_an_inner_transform_does_not_hide_what_an_outer_one_differentiates(outer, inner, device):
    q, k, v = (x.to(device) for x in triple())

    def loss(x):
        return inner(lambda y: flash_attention(x * 2, k, v).sum() * y.sum(), q)

    with pytest.raises(ValueError, match=REFUSED):
        outer(loss, v)


@pytest.mark.parametrize("outer", [dual, jvp, grad])
def test_vmap_does_not_hide_what_is_differentiated(outer, device):
    with pytest.raises(ValueError, match=REFUSED):
        outer(torch.vmap(lambda x: flash_attention(x, x, x)), heads(2, B, H, T, D).to(device))


def test_what_is_not_differentiated_passes(device):
    q, k, v = (x.to(device) for x in triple())

    def frozen(y):
        return (flash_attention(q, k, v) * y).sum()

    expected = flash_attention(q, k, v)
    close(torch.func.grad(frozen)(v), expected, 1e-6)
    close(torch.func.jvp(frozen, (v,), (torch.ones_like(v),))[1], expected.sum(), 1e-6)
    leaf = v.clone().requires_grad_()
    close(torch.autograd.grad(frozen(leaf), leaf)[0], expected, 1e-6)


class Zeros(TorchDispatchMode):
    """Counts the elements of zeros that are made."""

    made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "zero" in function.__name__:
            self.made += result.numel()
        return result


class Nothing(torch.autograd.Function):
    """Passes x on, and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return None


def run(op, device):
    """Outputs of an op that require gradients, and its tensors."""
    tensors = [x.to(device).requires_grad_(x.dtype != torch.float64) for x in OPS[op]()]
    if getattr(op, "keywords", {}).get("inplace"):
        tensors[:2] = [x.clone() for x in tensors[:2]]
    result = op(*tensors)
    results = result if isinstance(result, tuple) else (result,)
    return [x for x in results if x.requires_grad], [x for x in tensors if x.is_leaf]


@pytest.mark.parametrize("op", OPS, ids=lambda op: getattr(op, "func", op).__name__)
def test_outputs_without_a_gradient_cost_backward_nothing(op, device):
    outputs, _ = run(op, device)
    with Zeros() as zeros:
        torch.autograd.backward([x.sum() for x in outputs])
    assert zeros.made == 0


@pytest.mark.parametrize("op", OPS, ids=lambda op: getattr(op, "func", op).__name__)
def test_no_gradient_gives_none(op, device):
    outputs, tensors = run(op, device)
    torch.autograd.backward([Nothing.apply(x).sum() for x in outputs])
    assert all(x.grad is None or not x.grad.any() for x in tensors)


def test_a_gradient_of_q_alone(device):
    q, k = (x.to(device).requires_grad_() for x in pair())
    log_rates = (-heads(B, H, T)).to(device)
    carope(q, k, log_rates)[0].sum().backward()
    whole = q.grad.clone()
    q.grad = None
    q_out, k_out = carope(q, k, log_rates)[:2]
    (q_out.sum() + 0 * k_out.sum()).backward()
    assert torch.equal(q.grad, whole)
    assert not k.grad.any()
