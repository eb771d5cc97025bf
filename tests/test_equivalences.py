"""The lattice: configurations of different methods that must be one function."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracles
import posenc
from helpers import HEAD_DIM, HEADS, WIDTH, attend, close, copy_shared, encodings, perturb, randn
from posenc import Attention, CARoPE, DepthwiseConv, MoH, NoPE, Polar, Relative, RoPE
from posenc.encodings.rope import half_to_interleaved, interleaved_to_half

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
LENGTH = 23


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer(dtype: torch.dtype = torch.float64, **parts: Any) -> Attention:
    return Attention(WIDTH, HEADS, **parts).to(dtype).eval()


def set_values(module: nn.Module, **values: float | Tensor) -> nn.Module:
    """Set parameters by name, `__` standing for the dot."""
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name.replace("__", ".")).copy_(
                torch.as_tensor(value, dtype=torch.float64)
            )
    return module


def same(first: Attention, second: Attention, *, exact: bool = False) -> None:
    """Both give the same output and input gradient, from the projections of the first."""
    dtype = next(first.parameters()).dtype
    for name in ("c_attn", "c_proj"):
        with torch.no_grad():
            weight = 2 * randn(*getattr(first, name).weight.shape) / WIDTH**0.5
        for module in (first, second):
            set_values(module, **{f"{name}__weight": weight})
    x = randn(2, LENGTH, WIDTH, dtype=dtype)
    results = []
    for module in (first, second):
        given = x.clone().requires_grad_()
        y = module(given)
        (gradient,) = torch.autograd.grad(y.square().sum(), given)
        results.append((y, gradient))
    (y, gradient), (other, other_gradient) = results
    if exact:
        assert torch.equal(y, other)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    close(y, other, tolerance)
    close(gradient, other_gradient, 10 * tolerance)


@DTYPES
def test_cmha_starts_as_rope_bit_for_bit(dtype: torch.dtype) -> None:
    same(
        layer(dtype, encoding=Polar(HEADS, HEAD_DIM)),
        layer(dtype, encoding=RoPE(HEAD_DIM)),
        exact=True,
    )


@DTYPES
def test_cmha_without_positions_is_nope(dtype: torch.dtype) -> None:
    polar, nope = (layer(dtype, encoding=e) for e in (Polar(HEADS, HEAD_DIM), NoPE()))
    copy_shared(polar, nope)
    x = randn(2, LENGTH, WIDTH, dtype=dtype)
    still = torch.zeros(LENGTH, dtype=torch.long)
    close(polar(x, positions=still), nope(x), 1e-10 if dtype == torch.float64 else 1e-5)


def test_cmha_factorised_is_the_direct_cosine_form() -> None:
    polar, (q, k) = perturb(Polar(HEADS, HEAD_DIM)).double(), randn(2, 2, HEADS, 9, HEAD_DIM)
    rotated_q, rotated_k = polar.rotate(q, k)
    scores = rotated_q @ rotated_k.mT / math.sqrt(HEAD_DIM)
    close(scores, oracles.cmha_scores(q, k, polar.delta, polar.b))


def test_cmha_with_shared_parameters_is_eulerformer() -> None:
    """EulerFormer for LLaMA, as complex numbers: every pair turns to delta * angle (+ b in q)."""
    delta, b = 1 + 0.3 * randn(HEAD_DIM // 2), randn(HEAD_DIM // 2)
    polar = set_values(Polar(HEADS, HEAD_DIM).double(), delta=delta, b=b)
    q, k = randn(2, 2, HEADS, 9, HEAD_DIM)
    omega = torch.tensor(oracles.rope_frequencies(HEAD_DIM), dtype=torch.float64)
    position = torch.arange(9)[:, None] * omega

    def euler(x: Tensor, shift: Tensor) -> Tensor:
        z = torch.complex(*x.chunk(2, -1))
        return torch.polar(z.abs(), delta * z.angle() + shift + position)

    scores = (euler(q, b) @ euler(k, torch.zeros(3).double()).mH).real / math.sqrt(HEAD_DIM)
    rotated_q, rotated_k = polar.rotate(q, k)
    close(rotated_q @ rotated_k.mT / math.sqrt(HEAD_DIM), scores)


@DTYPES
def test_carope_at_its_initial_rate_is_rope(dtype: torch.dtype) -> None:
    carope = CARoPE(WIDTH, HEADS).to(dtype)
    if dtype == torch.float64:
        set_values(carope, bias=oracles.carope_bias(HEAD_DIM))  # initialised in fp32
    same(layer(dtype, encoding=carope), layer(dtype, encoding=RoPE(HEAD_DIM)))


def test_carope_vectors_are_those_of_rope_one_position_later() -> None:
    q, k = randn(2, 2, HEADS, LENGTH, HEAD_DIM)
    x, positions = randn(2, LENGTH, WIDTH), torch.arange(LENGTH)
    ours = CARoPE(WIDTH, HEADS, base=500.0).double().rotate(q, k, positions, x)
    theirs = RoPE(HEAD_DIM, base=500.0).rotate(q, k, positions + 1)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-6)  # the bias is fp32 until .double()


@DTYPES
def test_rope_interleaved_is_half_split_under_a_permutation(dtype: torch.dtype) -> None:
    half = layer(dtype, encoding=RoPE(HEAD_DIM))
    interleaved = layer(dtype, encoding=RoPE(HEAD_DIM, pairing="interleaved"))
    copy_shared(half, interleaved)
    q, k, v = half.c_attn.weight.detach().chunk(3)
    moved = torch.cat([half_to_interleaved(q, HEADS), half_to_interleaved(k, HEADS), v])
    set_values(interleaved, c_attn__weight=moved)
    x = randn(2, LENGTH, WIDTH, dtype=dtype)
    close(interleaved(x), half(x), 1e-10 if dtype == torch.float64 else 1e-5)
    assert torch.equal(interleaved_to_half(half_to_interleaved(q, HEADS), HEADS), q)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 1.0},
        {"rope_type": "ntk", "factor": 1.0},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 1.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "longrope",
            "factor": 1.0,
            "original_max_position_embeddings": 64,
            "target_length": 128,
            "short_factor": [2.0] * 3,
            "long_factor": [1.0] * 3,
        },
        {
            "rope_type": "dynamic",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "target_length": 64,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_neutral_scalings_are_rope(scaling: Mapping[str, Any]) -> None:
    same(layer(encoding=RoPE(HEAD_DIM, scaling=scaling)), layer(encoding=RoPE(HEAD_DIM)))


@DTYPES
def test_relative_learned_starts_as_nope(dtype: torch.dtype) -> None:
    same(
        layer(dtype, encoding=Relative(HEADS, HEAD_DIM, max_distance=LENGTH)),
        layer(dtype, encoding=NoPE()),
    )


@DTYPES
def test_relative_sinusoidal_without_its_terms_is_nope(dtype: torch.dtype) -> None:
    silent = set_values(
        Relative(HEADS, HEAD_DIM, kind="sinusoidal"), u=torch.zeros(()), W_R__weight=torch.zeros(())
    )
    same(layer(dtype, encoding=silent), layer(dtype, encoding=NoPE()))


@DTYPES
def test_relative_sinusoidal_is_learned_with_its_own_rows(dtype: torch.dtype) -> None:
    sinusoidal = perturb(Relative(HEADS, HEAD_DIM, kind="sinusoidal").double())
    R = oracles.relative_rows(sinusoidal.W_R.weight.detach(), range(LENGTH), HEADS)
    S = (sinusoidal.v.detach()[:, None] * R).sum(-1)
    learned = Relative(HEADS, HEAD_DIM, max_distance=LENGTH).double()
    set_values(learned, u=sinusoidal.u.detach(), R=R, S=S)
    same(layer(dtype, encoding=sinusoidal), layer(dtype, encoding=learned))


@pytest.mark.parametrize("encoding", [None, "rope", "carope", "polar", "relative"])
@pytest.mark.parametrize("per_head", [False, True])
def test_identity_convolution_is_none(encoding: str | None, per_head: bool) -> None:
    """With relative scores: RCMHA with an identity convolution is Transformer-XL's attention."""
    conv = DepthwiseConv(HEADS, HEAD_DIM, per_head=per_head, init="identity")
    part = encodings()[encoding] if encoding else None
    same(layer(encoding=part, conv=conv), layer(encoding=part))


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_rcmha_with_identity_convolution_is_rmha_of_its_kind(kind: str) -> None:
    options = {"max_distance": 16}
    rcmha = posenc.attention("rcmha", WIDTH, HEADS, relative=kind, init="identity", **options)
    rmha = posenc.attention("rmha", WIDTH, HEADS, relative=kind, **options)
    perturb(rmha)
    copy_shared(rmha, rcmha)
    same(rcmha.double(), rmha.double())


def test_rcmha_without_relative_terms_is_mdha() -> None:
    rcmha = posenc.attention("rcmha", WIDTH, HEADS, per_head=True).double()
    mdha = posenc.attention("mdha", WIDTH, HEADS, bias=False, conv_bias=True).double()
    perturb(mdha)
    copy_shared(mdha, rcmha)
    assert torch.equal(mdha.conv.weight, rcmha.conv.weight)
    same(rcmha, mdha)


def test_rcmha_without_either_is_attention_without_position() -> None:
    rcmha = posenc.attention("rcmha", WIDTH, HEADS, init="identity").double()
    same(rcmha, posenc.attention("nope", WIDTH, HEADS).double())


def test_convolution_that_takes_the_first_tap_shifts_by_two() -> None:
    conv = DepthwiseConv(HEADS, HEAD_DIM, bias=False).double()
    set_values(conv, weight=torch.tensor([1.0, 0.0, 0.0]))
    q, k, v = randn(3, 2, HEADS, LENGTH, HEAD_DIM)
    for before, after in zip((q, k, v), conv(q, k, v), strict=True):
        close(after[:, :, 2:], before[:, :, :-2], 1e-15)
        assert not after[:, :, :2].any()


@DTYPES
def test_equal_kernels_per_head_are_shared_ones(dtype: torch.dtype) -> None:
    shared = DepthwiseConv(HEADS, HEAD_DIM)
    per_head = DepthwiseConv(HEADS, HEAD_DIM, per_head=True)
    weight, bias = shared.weight.detach(), shared.bias.detach()
    set_values(per_head, weight=weight[:, None], bias=bias[:, None])
    same(layer(dtype, conv=shared), layer(dtype, conv=per_head))


def zeroed(router: MoH) -> MoH:
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
    return router


@DTYPES
@pytest.mark.parametrize("encoding", ["nope", "rope", "carope", "polar", "relative"])
@pytest.mark.parametrize(
    ("shared", "top_k"), [(HEADS, 0), (0, HEADS), (1, HEADS - 1), (2, HEADS - 2)]
)
def test_zero_routers_with_all_heads_are_plain_attention(
    encoding: str, shared: int, top_k: int, dtype: torch.dtype
) -> None:
    router = zeroed(MoH(WIDTH, HEADS, shared=shared, top_k=top_k))
    part = encodings()[encoding]
    same(layer(dtype, encoding=part, router=router), layer(dtype, encoding=part))


@DTYPES
@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("encoding", ["nope", "rope", "carope", "polar", "relative"])
def test_query_norm_with_all_heads_is_plain_attention_bit_for_bit(
    encoding: str, shared: int, dtype: torch.dtype
) -> None:
    router = MoH(WIDTH, HEADS, shared=shared, top_k=HEADS - shared, router="query_norm")
    part = encodings()[encoding]
    routed, plain = layer(dtype, encoding=part, router=router), layer(dtype, encoding=part)
    copy_shared(plain, routed)
    x = randn(2, LENGTH, WIDTH, dtype=dtype)
    assert torch.equal(routed(x), plain(x))


def test_sinusoidal_table_moves_by_a_fixed_rotation() -> None:
    table = posenc.Sinusoidal(WIDTH).embed(torch.arange(30)).double()
    angle = 5 * torch.tensor(oracles.rope_frequencies(WIDTH), dtype=torch.float64)
    # (sin, cos) turns against the direction of (cos, sin)
    close(oracles.rotate(table[:-5], -angle, "interleaved"), table[5:], 1e-5)


def test_nope_forgets_the_order_of_earlier_tokens_in_one_layer() -> None:
    module, x = perturb(layer(encoding=NoPE())), randn(2, 9, WIDTH)
    shuffled = torch.cat([x[:, torch.randperm(8)], x[:, 8:]], 1)
    close(module(shuffled)[:, -1], module(x)[:, -1])
    rope = perturb(layer(encoding=RoPE(HEAD_DIM)))
    assert (rope(shuffled)[:, -1] - rope(x)[:, -1]).abs().max() > 1e-3


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
def test_empty_seams_are_torch_multihead_attention(bias: bool, dtype: torch.dtype) -> None:
    ours = perturb(Attention(WIDTH, HEADS, bias=bias).to(dtype)).eval()
    theirs = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True).to(dtype).eval()
    set_values(
        theirs,
        in_proj_weight=ours.c_attn.weight.detach(),
        out_proj__weight=ours.c_proj.weight.detach(),
    )
    if bias:
        set_values(
            theirs, in_proj_bias=ours.c_attn.bias.detach(), out_proj__bias=ours.c_proj.bias.detach()
        )
    x = randn(2, LENGTH, WIDTH, dtype=dtype)
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    expected, _ = theirs(x, x, x, attn_mask=future, need_weights=False)
    close(ours(x), expected, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dropped", ["nope", "none"])
def test_absent_parts_do_nothing(dropped: str) -> None:
    encoding: Callable[[], posenc.Encoding] = NoPE if dropped == "nope" else posenc.Encoding
    same(layer(encoding=encoding()), layer(), exact=True)


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_scores_of_zero_average_the_values(impl: str) -> None:
    q, v = torch.zeros(1, 1, 5, 2), randn(1, 1, 5, 2, dtype=torch.float32)
    running = v.cumsum(2) / torch.arange(1, 6)[:, None]
    close(attend(q, q, v, impl=impl), running, 1e-6)
