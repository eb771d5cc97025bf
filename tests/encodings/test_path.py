"""PaTH: products of reflections in all their forms, in chunks, and while decoding."""

import inspect
import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import posenc
from helpers import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    attend,
    build,
    close,
    copy_shared,
    differs,
    error,
    oracle_layer,
    outputs_and_gradients,
    perturb,
    randn,
    rms_error,
)
from posenc import PaTH
from posenc.backends import blockwise, choice, fused, reflected, sdpa
from posenc.backends.case import consecutive
from posenc.convolution import depthwise_conv
from posenc.encodings.path import directions, root_beta
from posenc.placement import place
from posenc.reflections import correction, scanned, sweep
from posenc.scores import Scores

B, D, GROUPS = 2, 5, 2
LENGTHS = (1, 2, 63, 64, 65, 129, 200)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def reflections(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """r = sqrt(beta) w, beta in (0, 2)."""
    r = torch.nn.functional.normalize(randn(*shape, dtype=dtype), dim=-1)
    return r * (2 * torch.rand(*shape[:-1], 1, dtype=dtype)).sqrt()


def tensors(length: int, key_length: int, groups: int = GROUPS, dim: int = D) -> list[Tensor]:
    """q, k, v and r."""
    keys = (B, groups, key_length, dim)
    return [randn(B, HEADS, length, dim), randn(*keys), randn(*keys), reflections(*keys)]


def by(impl: str, q: Tensor, k: Tensor, v: Tensor, r: Tensor, **rest: Any) -> Tensor:
    y = attend(q, k, v, Scores(reflections=r), impl=impl, **rest)
    return y + 0 * r.sum()  # the definition does not reflect a lone token


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


def matrices(r: Tensor) -> Tensor:
    """H_t = I - r_t r_t^T: (.., S, D) -> (.., S, D, D)."""
    eye = torch.eye(r.shape[-1], dtype=r.dtype)
    return eye - r.unsqueeze(-1) * r.unsqueeze(-2)


# The product


@pytest.mark.parametrize(("length", "key_length"), [(1, 1), (7, 7), (3, 9), (1, 6)])
def test_scores_are_products_of_matrices(length: int, key_length: int) -> None:
    q, k, r = randn(length, D), randn(key_length, D), reflections(key_length, D)
    turns = matrices(r)
    expected = torch.zeros(length, key_length, dtype=torch.float64)
    for row in range(length):
        m = key_length - length + row
        for n in range(m + 1):
            product = torch.eye(D, dtype=torch.float64)
            for t in range(n + 1, m + 1):
                product = product @ turns[t]
            expected[row, n] = k[n] @ product @ q[row]
    past = key_length - length
    close(sweep(q, k, r), expected, 1e-12)
    close((q @ k.mT + correction(q, k, r)).tril(past), expected, 1e-12)
    close(scanned(q, k, r).tril(past), expected, 1e-12)


def test_a_score_knows_what_came_after_its_key_alone() -> None:
    length, n = 9, 4
    q, k, r = randn(length, D), randn(length, D), reflections(length, D)
    other = torch.cat([reflections(n + 1, D), r[n + 1 :]])
    for form in (sweep, lambda *x: (x[0] @ x[1].mT + correction(*x)).tril()):
        score = form(q, k, r)
        close(form(q, k, other)[:, n:], score[:, n:], 1e-12)
        differs(form(q, k, other)[n + 1 :, :n], score[n + 1 :, :n])
        later = torch.cat([r[: n + 1], reflections(length - n - 1, D)])
        differs(form(q, k, later)[n + 1 :, n], score[n + 1 :, n])
        close(score.diagonal(), (q * k).sum(-1), 1e-12)


def test_beta_of_two_keeps_lengths_and_of_one_projects() -> None:
    length = 40
    r = torch.nn.functional.normalize(randn(length, D), dim=-1)
    q, axes = randn(length, D), torch.eye(D, dtype=torch.float64)
    for beta in (2.0, 1.0):
        every = [sweep(q, axis.expand(length, D), beta**0.5 * r) for axis in axes]
        u = torch.stack(every, -1)  # (m, n, D): q_m where it meets key n
        m, n = torch.tril_indices(length, length, -1)
        if beta == 2:
            close(u[m, n].norm(dim=-1), q[m].norm(dim=-1), 1e-12)
        else:
            assert (u[m, n] * r[n + 1]).sum(-1).abs().max() <= 1e-12
            assert (u[m, n].norm(dim=-1) < q[m].norm(dim=-1)).all()


# In chunks


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_are_the_definition_with_gradients(length: int) -> None:
    inputs, probe = tensors(length, length), randn(B, HEADS, length, D)
    expected = outputs_and_gradients(partial(by, "reference"), inputs, probe)
    same(outputs_and_gradients(partial(by, "auto"), inputs, probe), expected)
    same(outputs_and_gradients(partial(by, "sdpa"), inputs, probe), expected)


@pytest.mark.parametrize(("length", "key_length"), [(1, 64), (1, 65), (3, 130), (70, 200)])
def test_chunks_behind_a_past_are_the_definition(length: int, key_length: int) -> None:
    inputs, probe = tensors(length, key_length), randn(B, HEADS, length, D)
    expected = outputs_and_gradients(partial(by, "reference"), inputs, probe)
    same(outputs_and_gradients(partial(by, "auto"), inputs, probe), expected)


def features(length: int) -> dict[str, dict[str, Any]]:
    real = torch.ones(B, length, dtype=torch.bool)
    real[0, :70] = real[1, 100:130] = False
    lengths = ([3, 64, 1, length - 68], [length - 5, 5])
    segments = torch.cat([posenc.segments(row) for row in lengths])
    return {
        "padding": {"real": real},
        "window": {"window": 70},
        "near": {"window": 1},
        "documents": {"segments": segments},
        "documents, padding": {"segments": segments, "real": real},
        "documents, window": {"segments": segments, "window": 66},
        "all": {"segments": segments, "window": 66, "real": real},
    }


@pytest.mark.parametrize("feature", features(200))
@pytest.mark.parametrize("groups", [1, HEADS])
def test_chunks_hide_what_the_mask_hides(feature: str, groups: int) -> None:
    options = features(200)[feature]
    inputs, probe = tensors(200, 200, groups), randn(B, HEADS, 200, D)
    expected = outputs_and_gradients(partial(by, "reference", **options), inputs, probe)
    same(outputs_and_gradients(partial(by, "auto", **options), inputs, probe), expected)


def test_documents_are_swept_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    chunks = reflected.chunks

    def watched(q: Tensor, k: Tensor, r: Tensor) -> reflected.Chunks:
        seen.append(k.shape[1])
        return chunks(q, k, r)

    monkeypatch.setattr(reflected, "chunks", watched)
    q, k, v, r = tensors(30, 30)
    by("auto", q, k, v, r, segments=posenc.segments([20, 3, 7]).expand(B, 30))
    assert seen == [20, 3, 7]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_blocks_made_anew_in_the_backward_pass_change_nothing(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, probe = tensors(150, 150), randn(B, HEADS, 150, D)
    results = []
    for least in (1, 1000):
        monkeypatch.setattr(blockwise, "RECOMPUTE_FROM", least)
        torch.manual_seed(1)
        run = partial(by, "auto", dropout_p=dropout)
        results.append(outputs_and_gradients(run, inputs, probe))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_memory_is_linear_in_the_length() -> None:
    kept: list[int] = []
    for length in (1024, 2048):
        inputs = [x.float().requires_grad_() for x in tensors(length, length, dim=8)]
        sizes: dict[int, int] = {}

        def keep(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y = by("auto", *inputs)
        kept.append(sum(sizes.values()))
        assert max(sizes.values()) < B * HEADS * length**2
        del y
    assert kept[1] <= 2.1 * kept[0]


def test_transforms_of_functions_go_through_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "RECOMPUTE_FROM", 1)
    inputs = tensors(130, 130)
    expected = by("reference", *inputs)
    y = torch.func.vmap(lambda *x: by("auto", *(z[None] for z in x))[0])(*inputs)
    close(y, expected)
    ours = torch.func.grad(lambda q: by("auto", q, *inputs[1:]).square().sum())(inputs[0])
    q = inputs[0].requires_grad_()
    (theirs,) = torch.autograd.grad(by("reference", q, *inputs[1:]).square().sum(), q)
    close(ours, theirs)


def test_chunks_are_taken_wherever_they_can_be() -> None:
    q, k, v, r = tensors(9, 9)
    scores = Scores(reflections=r)
    assert not scores.plain
    real, segments = torch.rand(B, 9) < 0.5, posenc.segments([4, 5]).expand(B, 9)
    for options in ({}, {"window": 3}, {"real": real}, {"segments": segments}):
        assert choice.choose(consecutive(q, k, v, scores, **options), "auto") is reflected
    step = consecutive(q[:, :, -1:], k, v, scores)
    assert choice.choose(step, "auto") is reflected
    assert choice.choose(consecutive(q, k, v), "auto") is not reflected
    biased = Scores(reflections=r, bias=randn(1, HEADS, 9, 9))
    case = consecutive(q, k, v, biased)
    assert choice.choose(case, "auto") is sdpa
    close(choice.attend(case, "auto"), choice.attend(case, "reference"))


def test_the_kernels_refuse_it() -> None:
    q, k, v, r = tensors(9, 9)
    why = fused.reason(consecutive(q, k, v, Scores(reflections=r)))
    assert why == "has no kernel for products of reflections"
    # with Triton or without, the way out is named
    with pytest.raises(ValueError, match=r"impl='fused' .*impl='sdpa'"):
        posenc.attention("path", WIDTH, HEADS, impl="fused")(randn(1, 3, WIDTH).float())


def test_float32_stays_exact_over_thousands_of_reflections() -> None:
    """Lengths are kept: nothing is forgotten, errors neither."""
    length, late = 5000, 3
    r = 2**0.5 * torch.nn.functional.normalize(randn(1, 1, length, D), dim=-1)
    q, k, v = randn(1, 1, late, D), randn(1, 1, length, D), randn(1, 1, length, D)
    exact, single = by("auto", q, k, v, r), [x.float() for x in (q, k, v, r)]
    assert error(by("auto", *single), exact) <= 1e-5


@pytest.mark.parametrize("start", [0, 1_000_000])
def test_bfloat16_errs_by_its_rounding_at_any_position(start: int) -> None:
    module = build("path", head_dim=16, dtype=torch.float32).to(torch.bfloat16)
    x, positions = randn(1, 300, 16 * HEADS, dtype=torch.bfloat16), start + torch.arange(300)
    with torch.no_grad():
        y = module(x, positions=positions)
        assert rms_error(y, module.double()(x.double())) < 3 * torch.finfo(torch.bfloat16).eps


# The tokens' part


def test_directions_are_convolved_projections() -> None:
    narrow, wide, kernel = randn(B, 7, 32), randn(32, GROUPS * D), randn(GROUPS, D, 3)
    y = (narrow @ wide).unflatten(-1, (GROUPS, D)).transpose(1, 2)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [3, 4, 4, 4, 4, 4, 9]])
    past = randn(B, 2, 32)
    y_past = (past @ wide).unflatten(-1, (GROUPS, D)).transpose(1, 2)
    for ours, theirs in (
        (directions(narrow, wide, kernel), depthwise_conv(y, kernel, None)),
        (directions(narrow, wide, kernel, past), depthwise_conv(y, kernel, None, y_past)),
        (
            directions(narrow, wide, kernel, segments=segments),
            depthwise_conv(y, kernel, None, segments=segments),
        ),
    ):
        z = torch.nn.functional.silu(theirs)
        close(ours, z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt(), 1e-12)
    zero = directions(torch.zeros_like(narrow).requires_grad_(), wide, kernel)
    assert not zero.any()


def test_beta_has_a_gradient_wherever_it_ends() -> None:
    x, bias = torch.zeros(1, 5, 2).double(), torch.tensor([-2000.0, -800, -3, 0, 800]).double()
    weight, bias = torch.zeros(2, 5).double(), bias.requires_grad_()
    root = root_beta(x, weight, bias)[0, :, 0]
    close(root.square(), 2 * torch.sigmoid(bias), 1e-12)
    (gradient,) = torch.autograd.grad(root.sum(), bias)
    assert gradient.isfinite().all()
    close(gradient[2:4], (root * torch.sigmoid(-bias) / 2)[2:4], 1e-12)


@pytest.mark.parametrize("how", ["no direction", "no beta"])
def test_without_reflections_it_is_nope(how: str) -> None:
    path, nope = (build(name) for name in ("path", "nope"))
    copy_shared(path, nope)
    x = randn(2, 70, WIDTH).requires_grad_()
    differs(path(x), nope(x))
    with torch.no_grad():
        if how == "no direction":
            path.encoding.W2.zero_()
        else:
            path.encoding.weight.zero_()
            path.encoding.bias.fill_(-2000)
    close(path(x), nope(x))
    gradients = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (path, nope)]
    if how == "no beta":  # w still has a gradient where it is zero
        close(*gradients)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_padding_reflects_nothing_and_taps_stop_at_it() -> None:
    part, x = perturb(PaTH(WIDTH, HEADS)).double(), randn(B, 8, WIDTH)
    mask = torch.ones(B, 8, dtype=torch.bool)
    mask[0, :3] = mask[1, 5] = False
    cpu = torch.device("cpu")
    r = part.reflections(place(B, 8, cpu, mask=mask), x)
    assert r.shape == (B, HEADS, 8, HEAD_DIM)
    assert not r.transpose(1, 2)[~mask].any()
    alone = part.reflections(place(1, 5, cpu), x[:1, 3:])
    close(r[:1, :, 3:], alone, 1e-12)
    changed = x.clone()
    changed[~mask] = randn(4, WIDTH)
    assert torch.equal(part.reflections(place(B, 8, cpu, mask=mask), changed), r)


def test_start_is_near_projections() -> None:
    part = PaTH(768, 12)
    assert sum(parameter.numel() for parameter in part.parameters()) == 60_684
    root = root_beta(randn(2, 9, 768).float(), part.weight, part.bias)
    assert ((root.square() - 1).abs() < 0.9).all()
    assert abs(root.square().mean() - 1) < 0.1


# Layers


def test_heads_that_a_router_weighs_are_reflected() -> None:
    module, x = build("moh", encoding="path"), randn(2, 11, WIDTH)
    close(module(x), oracle_layer(module, x)[0])


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_decoding_in_random_chunks(window: int | None, dtype: torch.dtype) -> None:
    """Past the chunks of the back end, with drafts taken back and rows that change places."""
    length, rng = 200, random.Random(0)
    module = build("path", num_kv_heads=GROUPS, window=window, dtype=dtype)
    x = randn(3, length, WIDTH, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    with torch.no_grad():
        expected = module(x)
        cache = module.make_cache(3, length + 5)
        while cache.length < length:
            start = cache.length
            stop = min(start + rng.choice([1, 2, 3, 64, 70]), length)
            y = module(x[:, start:stop], cache=cache)
            assert error(y, expected[:, start:stop]) <= tolerance
            module(randn(3, 5, WIDTH, dtype=dtype), cache=cache)
            cache.truncate(stop)
            order = torch.randperm(3)
            cache.reorder(order)
            x, expected = x[order], expected[order]


def test_rollback_forgets_without_a_trace() -> None:
    module, x = build("path"), randn(1, 80, WIDTH)
    with torch.no_grad():
        cache, other = module.make_cache(1, 80), module.make_cache(1, 80)
        for one in (cache, other):
            module(x[:, :66], cache=one)
        module(randn(1, 4, WIDTH), cache=cache)
        cache.truncate(66)
        assert torch.equal(module(x[:, 66:69], cache=cache), module(x[:, 66:69], cache=other))


def test_flexattention_gets_what_the_reflections_add() -> None:
    part, length = perturb(PaTH(WIDTH, HEADS, num_kv_heads=GROUPS)).double(), 7
    q, k, v = randn(B, HEADS, length, HEAD_DIM), *randn(2, B, GROUPS, length, HEAD_DIM)
    x = randn(B, length, WIDTH)
    mod = part.score_mod(q, k, torch.arange(length), x=x)
    assert mod is not None
    sizes = (B, HEADS, length, length)
    index = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
    every = k.repeat_interleave(HEADS // GROUPS, 1)
    score = mod(q @ every.mT / HEAD_DIM**0.5, *index)
    score = score.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    r = part.reflections(place(B, length, x.device), x)
    expected = by("reference", q, k, v, r)
    close(score.softmax(-1) @ v.repeat_interleave(HEADS // GROUPS, 1), expected)


def test_every_argument_changes_the_parameters() -> None:
    changes: dict[str, Any] = {"head_dim": 12, "num_kv_heads": 2}
    assert set(inspect.signature(PaTH).parameters) == {"embed_dim", "num_heads", "causal", *changes}
    plain = PaTH(WIDTH, HEADS)
    for name, value in changes.items():
        assert PaTH(WIDTH, HEADS, **{name: value}).W2.shape != plain.W2.shape


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((25, 4), {}, "multiple of num_heads"),
        ((24, 4), {"num_kv_heads": 3}, "num_kv_heads"),
        ((24, 4), {"head_dim": 0}, "head_dim of at least 1"),
        ((24, 4), {"causal": False}, "causal=False"),
    ],
)
def test_bad_arguments_are_refused(
    sizes: tuple[int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        PaTH(*sizes, **options)
    assert "\n" not in str(refusal.value)


def test_scores_without_their_tokens_are_refused() -> None:
    part, cpu = PaTH(WIDTH, HEADS), torch.device("cpu")
    for x in (None, randn(B, 7, WIDTH + 1), randn(B, 6, WIDTH), randn(7, WIDTH)):
        with pytest.raises(ValueError, match=r"needs x of shape \(B, 7, 24\), of all keys") as no:
            part.scores(place(B, 7, cpu), x)
        assert "\n" not in str(no.value)
