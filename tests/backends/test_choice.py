"""attend(): causal alignment, masks, scores and back ends."""

import importlib.util
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import oracles
import posenc
from helpers import NAMES, attend, close, differs, randn, rms_error
from posenc.backends import blockwise, choice
from posenc.backends.case import Case
from posenc.backends.choice import IMPLS, check_impl
from posenc.backends.mask import Mask
from posenc.placement import Placement
from posenc.scores import RelativeTerm, Scores, relative_logits

B, H, D = 2, 3, 6
LENGTHS = pytest.mark.parametrize(
    ("length", "keys"), [(1, 1), (7, 7), (1, 7), (2, 7), (5, 7), (6, 7)]
)
WORKING = pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs(length: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(B, H, length, D), randn(B, H, keys, D), randn(B, H, keys, D)


@LENGTHS
def test_causal_mask_is_aligned_at_the_lower_right(length: int, keys: int) -> None:
    mask = Mask(Placement(torch.arange(length), key_length=keys)).dense()
    for i in range(length):
        for n in range(keys):
            assert mask[i, n] == (n <= keys - length + i)


@WORKING
@LENGTHS
def test_plain_attention_is_the_oracle(impl: str, length: int, keys: int) -> None:
    q, k, v = inputs(length, keys)
    close(attend(q, k, v, impl=impl), oracles.causal_attention(oracles.dot_scores(q, k), v))


@LENGTHS
def test_alignment_is_that_of_sdpa_with_a_lower_right_mask(length: int, keys: int) -> None:
    q, k, v = inputs(length, keys)
    allowed = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))


def test_torch_alone_would_align_at_the_upper_left() -> None:
    q, k, v = inputs(2, 7)
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, 0]
    close(first, v[:, :, 0])
    differs(attend(q, k, v)[:, :, 0], first)


@WORKING
@LENGTHS
def test_scale_content_and_bias_enter_the_logits(impl: str, length: int, keys: int) -> None:
    q, k, v = inputs(length, keys)
    content, bias = randn(H, D), randn(1, H, length, keys)
    scores = Scores(scale=0.7, content=content, bias=bias)
    logits = oracles.dot_scores(q + content[:, None], k, 0.7) + bias
    close(attend(q, k, v, scores, impl=impl), oracles.causal_attention(logits, v))


def relative_oracle(
    q: Tensor, k: Tensor, table: Tensor, query: Tensor, offset: Tensor, scale: float
) -> Tensor:
    """scale * (q.k + (q + query).table[d] + offset[d]), distance by distance."""
    length, keys = q.shape[2], k.shape[2]
    logits = scale * oracles.dot_scores(q, k, 1.0)
    for i in range(length):
        for n in range(keys):
            d = min(max(keys - length + i - n, 0), table.shape[1] - 1)
            term = ((q[:, :, i] + query) * table[:, d]).sum(-1) + offset[:, d]
            logits[:, :, i, n] += scale * term
    return logits


@WORKING
@LENGTHS
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_relative_term_is_its_gather(impl: str, length: int, keys: int, rows: int) -> None:
    q, k, v = inputs(length, keys)
    table, query, offset = randn(H, rows, D), randn(H, D), randn(H, rows)
    scores = Scores(scale=0.7, relative=RelativeTerm(table, query, offset))
    expected = oracles.causal_attention(relative_oracle(q, k, table, query, offset, 0.7), v)
    close(attend(q, k, v, scores, impl=impl), expected)


@LENGTHS
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_skewed_view_is_the_gather_by_distance(length: int, keys: int, rows: int) -> None:
    q = randn(B, H, length, D)
    term = RelativeTerm(randn(H, rows, D), randn(H, D), randn(H, rows))
    distances = torch.arange(keys - length, keys)[:, None] - torch.arange(keys)
    gathered = relative_logits(q, term._replace(distances=distances), keys)
    below = distances >= 0
    close(relative_logits(q, term, keys)[..., below], gathered[..., below])


def test_terms_of_the_scores_add_up() -> None:
    q, k, v = inputs(4, 7)
    table, bias = randn(H, 9, D), randn(B, 1, 4, 7)
    both = Scores(bias=bias, relative=RelativeTerm(table))
    dense = relative_logits(q, RelativeTerm(table), 7) / math.sqrt(D) + bias
    close(attend(q, k, v, both), attend(q, k, v, Scores(bias=dense)))


@WORKING
def test_padded_keys_are_not_seen(impl: str) -> None:
    q, k, v = inputs(7, 7)
    real = torch.ones(B, 7, dtype=torch.bool)
    real[0, :3] = False
    y = attend(q, k, v, real=real, impl=impl)
    assert y.isfinite().all()
    close(y[1:], attend(q[1:], k[1:], v[1:], impl=impl))
    close(y[:1, :, 3:], attend(q[:1, :, 3:], k[:1, :, 3:], v[:1, :, 3:], impl=impl))
    close(attend(q[:, :, 5:], k, v, real=real, impl=impl), y[:, :, 5:])


def test_padded_rows_see_themselves() -> None:
    real = torch.tensor([[False, False, True]])
    expected = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    mask = Mask(Placement(torch.arange(3), real=real))
    assert torch.equal(mask.dense()[0, 0], expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(11, 11), (9, 11), (4, 11), (12, 12), (2, 12)])
def test_blocks_are_the_reference(
    length: int, keys: int, recompute: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "ROWS", 4)
    monkeypatch.setattr(blockwise, "RECOMPUTE_FROM", 2 if recompute else 1000)
    tensors = [*inputs(length, keys), randn(H, D), randn(H, 5, D), randn(H, D), randn(H, 5)]
    results = []
    for impl in ("auto", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        q, k, v, content, table, query, offset = leaves
        term = RelativeTerm(table, query, offset if bias else None)
        y = attend(q, k, v, Scores(0.7, content, relative=term), impl=impl)
        used = leaves if bias else leaves[:-1]
        results.append((y, *torch.autograd.grad(y.square().sum(), used)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 1e-9])  # so rare that nothing drops
@pytest.mark.parametrize(("length", "keys"), [(11, 11), (9, 11), (4, 11), (12, 12), (2, 12)])
def test_blocks_share_the_mask_of_a_bias_that_does_not_learn(
    length: int, keys: int, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "BAND_ROWS", 4)
    monkeypatch.setattr(blockwise, "RECOMPUTE_FROM", 2)
    taken = []
    plain = blockwise._plain
    monkeypatch.setattr(blockwise, "_plain", lambda *x: taken.append(x) or plain(*x))
    tensors, results = inputs(length, keys), []
    for impl in ("auto", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        place = Placement(torch.arange(keys - length, keys), key_length=keys)
        scores = posenc.ALiBi(H).scores(place, leaves[0])
        y = attend(*leaves, scores, impl=impl, dropout_p=dropout_p)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)
    assert bool(taken) == (dropout_p == 0)


def test_blocks_have_gradients_in_torch_func(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "ROWS", 4)
    monkeypatch.setattr(blockwise, "RECOMPUTE_FROM", 2)
    (q, k, v), table = inputs(11, 11), randn(H, 5, D)

    def loss(q: Tensor) -> Tensor:
        return attend(q, k, v, Scores(relative=RelativeTerm(table))).square().sum()

    leaf = q.clone().requires_grad_()
    close(torch.func.grad(loss)(q), torch.autograd.grad(loss(leaf), leaf)[0])


@WORKING
def test_dropout_drops_weights_and_keeps_their_mean(impl: str) -> None:
    q, k = torch.zeros(64, 4, 32, 2), torch.zeros(64, 4, 32, 2)
    v = torch.ones(64, 4, 32, 2)
    y = attend(q, k, v, dropout_p=0.5, impl=impl)
    # the first row has one weight: dropped, or kept and doubled
    assert set(y[:, :, 0].unique().tolist()) == {0.0, 2.0}
    assert abs(y.mean() - 1) < 0.05
    table = RelativeTerm(torch.zeros(4, 3, 2))
    y = attend(q, k, v, Scores(relative=table), dropout_p=0.5, impl=impl)
    assert set(y[:, :, 0].unique().tolist()) == {0.0, 2.0}


@WORKING
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_output_keeps_the_dtype(impl: str, dtype: torch.dtype) -> None:
    q, k, v = (tensor.to(dtype) for tensor in inputs(5, 7))
    for scores in (None, Scores(relative=RelativeTerm(randn(H, 4, D).to(dtype)))):
        assert attend(q, k, v, scores, impl=impl).dtype == dtype


@WORKING
@pytest.mark.parametrize("length", [1, 3, 6])
def test_biases_of_another_precision_than_the_queries(impl: str, length: int) -> None:
    q, k, v = (tensor.bfloat16() for tensor in inputs(length, 6))
    bias = randn(1, H, length, 6)
    exact = attend(q.double(), k.double(), v.double(), Scores(bias=bias))
    for dtype in (torch.bfloat16, torch.float32):
        y = attend(q, k, v, Scores(bias=bias.to(dtype)), impl=impl)
        assert y.dtype == torch.bfloat16
        close(y, exact, 0.05)


@WORKING
def test_huge_logits_stay_finite(impl: str) -> None:
    q, k, v = (tensor.float() for tensor in inputs(5, 5))
    assert attend(1e4 * q, 1e4 * k, v, impl=impl).isfinite().all()


@pytest.mark.parametrize(
    ("impl", "relative"),
    [("auto", False), ("sdpa", False), ("reference", False), ("auto", True), ("reference", True)],
)
def test_large_logits_of_bfloat16_inputs_are_not_rounded(impl: str, relative: bool) -> None:
    q, k, v = (tensor.bfloat16() for tensor in inputs(50, 50))
    q, table = 30 * q, randn(H, 50, D).bfloat16()
    term = RelativeTerm(table) if relative else None
    y = attend(q, k, v, Scores(relative=term), impl=impl)
    precise = RelativeTerm(table.double()) if relative else None
    exact = attend(q.double(), k.double(), v.double(), Scores(relative=precise))
    # rounded weights and a rounded result; logits of 100 rounded to bf16 would be off by 0.2
    assert rms_error(y, exact) < torch.finfo(torch.bfloat16).eps / 2


def test_reference_ignores_autocast() -> None:
    q, k, v = (tensor.float() for tensor in inputs(5, 7))
    expected = attend(q, k, v, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(q, k, v, impl="reference"), expected)


@pytest.mark.parametrize("kind", ["expanded", "sliced", "transposed"])
@WORKING
def test_strides_do_not_matter(impl: str, kind: str) -> None:
    q, k, v = inputs(6, 6)
    views = {
        "expanded": lambda x: x[:1, :1].expand(B, H, 6, D),
        "sliced": lambda x: torch.cat([x, x], -1)[..., ::2],
        "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    }
    given = [views[kind](x).detach().requires_grad_() for x in (q, k, v)]
    plain = [x.detach().contiguous().requires_grad_() for x in given]
    y, expected = attend(*given, impl=impl), attend(*plain, impl=impl)
    close(y, expected)
    # sum() hands back a gradient of stride 0
    gradients = zip(
        torch.autograd.grad(y.sum(), given), torch.autograd.grad(expected.sum(), plain), strict=True
    )
    for actual, wanted in gradients:
        close(actual, wanted)


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("name", NAMES)
def test_the_short_list_of_plain_calls_chooses_as_the_whole_one(
    name: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []

    def spy(case: Case, impl: str) -> ModuleType:
        found = original(case, impl)
        with monkeypatch.context() as patch:
            patch.setattr(choice, "ON_CPU_PLAIN", choice.ON_CPU)
            chosen.append((found, original(case, impl)))
        return found

    original = choice.choose
    monkeypatch.setattr(choice, "choose", spy)
    for dtype in (torch.float32, torch.bfloat16):
        posenc.attention(name, 24, 4).to(dtype)(torch.randn(2, length, 24, dtype=dtype))
    assert chosen
    assert all(found is whole for found, whole in chosen)


def test_more_queries_than_keys_are_refused() -> None:
    q, k, v = inputs(5, 4)
    with pytest.raises(ValueError, match=r"T=5, .*S=4"):
        attend(q, k, v)


def test_impl_is_checked() -> None:
    assert [check_impl(impl) for impl in IMPLS if impl != "fused"] == ["auto", "reference", "sdpa"]
    with pytest.raises(ValueError, match="Did you mean 'reference'"):
        check_impl("refrence")
    with pytest.raises(ValueError, match="'sdpa'"):
        attend(*inputs(2, 2), impl="fused")


def test_kernels_are_refused_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"Triton is not installed\. Use impl='sdpa'"):
        check_impl("fused")
