"""What every entry of the zoo must hold: one suite over `posenc.names()`."""

import copy
import functools
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import posenc
from helpers import (
    DTYPES,
    HEADS,
    NAMES,
    WIDTH,
    build,
    close,
    differs,
    error,
    left_padded,
    min_heads,
    oracle_layer,
    randn,
    raw_weights,
    rms_error,
    rounded,
    trained,
)
from posenc.phase import Float32Parameters

pytestmark = pytest.mark.parametrize("name", NAMES)

IMPLS = ("auto", "sdpa", "reference")
FAR = 1_000_000
#: Parameters without a gradient at the start, as what they are multiplied by starts at 0.
SILENT_AT_FIRST = {"selective": {"encoding.W1", "encoding.kernel"}}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-10 if dtype == torch.float64 else 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", [False, True], ids=["random", "zero"])
def test_odd_shapes_give_finite_outputs_and_gradients(
    name: str, dtype: torch.dtype, zero: bool
) -> None:
    for heads, head_dim in ((min_heads(name), 6), (12, 10)):
        module = build(name, heads=heads, head_dim=head_dim, noise=0.1).to(dtype)
        for length in (1, 2, 63, 100):
            x = randn(2, length, heads * head_dim, dtype=dtype) * (not zero)
            x.requires_grad_()
            y, aux = module(x, return_aux=True)
            assert y.shape == x.shape
            assert y.dtype == dtype
            assert aux.shape == ()
            loss = y.float().square().mean() + aux
            gradients = torch.autograd.grad(loss, [x, *trained(module).values()], allow_unused=True)
            for value in (y, loss, *gradients):
                assert value is None or value.isfinite().all()


def test_initial_values_survive_zero_input(name: str) -> None:
    module = posenc.attention(name, WIDTH, HEADS, bias=True)
    x = torch.zeros(2, 5, WIDTH, requires_grad=True)
    y, aux = module(x, return_aux=True)
    gradients = torch.autograd.grad(y.square().sum() + aux, [x, *trained(module).values()])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_every_parameter_reaches_the_loss(name: str) -> None:
    module = posenc.attention(name, WIDTH, HEADS, bias=True)
    x = randn(2, 9, WIDTH, dtype=torch.float32)
    y, aux = module(x, return_aux=True)
    weights = trained(module)
    gradients = torch.autograd.grad(y.square().sum() + aux, list(weights.values()))
    for which, gradient in zip(weights, gradients, strict=True):
        silent = which in SILENT_AT_FIRST.get(name, ()) or "c_attn.bias" in which
        assert gradient.abs().max() > 0 or silent, which


def test_output_is_deterministic(name: str) -> None:
    module, x = build(name), randn(2, 40, WIDTH)
    assert torch.equal(module(x), module(x))


def test_dropout_acts_in_training_only_and_follows_the_seed(name: str) -> None:
    module, x = build(name, dropout=0.5), randn(2, 9, WIDTH)
    still = module(x)
    assert torch.equal(still, module(x))
    module.train()
    torch.manual_seed(1)
    first = module(x)
    differs(first, still)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    differs(module(x), first)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_layer_is_its_oracle(name: str, impl: str, bias: bool) -> None:
    module, x = build(name, impl=impl, bias=bias), randn(2, 11, WIDTH).requires_grad_()
    weights, probe = raw_weights(module), randn(2, 11, WIDTH)
    x_oracle = x.detach().clone().requires_grad_()
    y, aux = module(x, return_aux=True)
    expected, expected_aux = oracle_layer(module, x_oracle, weights=weights)
    close(y, expected)
    close(aux, expected_aux)
    ((y * probe).sum() + aux).backward()
    ((expected * probe).sum() + expected_aux).backward()
    close(x.grad, x_oracle.grad)
    for which, parameter in trained(module).items():
        close(parameter.grad, weights[which].grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_float32_layer_is_its_oracle(name: str, impl: str) -> None:
    module, x = build(name, impl=impl, dtype=torch.float32), randn(2, 11, WIDTH)
    close(module(x.float()), oracle_layer(module, x.float().double())[0], 1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_with_gaps_follow_the_oracle(name: str, impl: str) -> None:
    module, x = build(name, impl=impl), randn(2, 8, WIDTH)
    positions = torch.tensor([[0, 1, 5, 6, 7, 20, 21, 40], [3, 4, 5, 9, 10, 11, 12, 13]])
    close(module(x, positions=positions), oracle_layer(module, x, positions)[0])
    close(module(x, positions=positions[0]), oracle_layer(module, x, positions[0])[0])


def test_implementations_agree_past_one_block(name: str) -> None:
    x = randn(1, 300, WIDTH)
    outputs = []
    for impl in IMPLS:
        torch.manual_seed(1)
        module = build(name, impl=impl)
        given = x.clone().requires_grad_()
        y = module(given)
        outputs.append((y, torch.autograd.grad(y.square().sum(), given)[0]))
    for y, gradient in outputs[:2]:
        close(y, outputs[2][0])
        close(gradient, outputs[2][1])


def test_gradients_are_those_of_finite_differences(name: str) -> None:
    module, x = build(name, head_dim=4), randn(1, 4, 4 * HEADS)
    parameters = {which: value.detach() for which, value in module.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        state = dict(zip(parameters, values, strict=True))
        y, aux = torch.func.functional_call(module, state, (x,), {"return_aux": True})
        return y, aux.double()

    inputs = [value.clone().requires_grad_() for value in (x, *parameters.values())]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_later_tokens_change_nothing_before_them(name: str, impl: str, dtype: torch.dtype) -> None:
    module = build(name, impl=impl, dtype=dtype)
    for length, cut in ((5, 1), (63, 40), (150, 140)):
        x = randn(2, length, WIDTH, dtype=dtype)
        changed = x.clone()
        changed[:, cut:] = 3 * randn(2, length - cut, WIDTH, dtype=dtype)
        y, other = module(x), module(changed)
        assert torch.equal(y[:, :cut], other[:, :cut])
        assert not torch.equal(y[:, cut:], other[:, cut:])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_to_later_tokens_is_zero(name: str, impl: str) -> None:
    module = build(name, impl=impl)
    for length, row in ((9, 0), (9, 5), (150, 130)):
        x = randn(2, length, WIDTH).requires_grad_()
        (gradient,) = torch.autograd.grad(module(x)[:, row].square().sum(), x)
        assert not gradient[:, row + 1 :].any()
        assert (gradient[:, : row + 1].abs().amax(-1) > 0).all()


LENGTH = 12
#: Rounds of decoding: true tokens fed, rejected drafts fed after them, true tokens taken back.
ROUNDS = st.lists(
    st.tuples(st.integers(1, 5), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=6
)


@functools.cache
def decoding_case(
    name: str, dtype: torch.dtype, impl: str
) -> tuple[posenc.Attention, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    module = build(name, dtype=dtype, impl=impl)
    x, junk = randn(2, LENGTH, WIDTH, dtype=dtype), 3 * randn(2, 3, WIDTH, dtype=dtype)
    return module, x, junk, module(x).detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(rounds=ROUNDS)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_decoding_is_the_full_forward(
    name: str, dtype: torch.dtype, rounds: list[tuple[int, int, int]]
) -> None:
    module, x, junk, expected = decoding_case(name, dtype, "auto")
    with torch.no_grad():
        cache = module.make_cache(2, LENGTH + 3)
        for tokens, drafts, taken_back in (*rounds, (LENGTH, 0, 0)):
            start = cache.length
            stop = min(start + tokens, LENGTH)
            if start < stop:
                y = module(x[:, start:stop], cache=cache)
                assert error(y, expected[:, start:stop]) <= tolerance(dtype)
            if drafts:
                module(junk[:, :drafts], cache=cache)
            cache.truncate(max(stop - taken_back, 0))
        y = module(x[:, cache.length :], cache=cache) if cache.length < LENGTH else None
        assert y is None or error(y, expected[:, -y.shape[1] :]) <= tolerance(dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chunk", [1, 3, LENGTH])
def test_decoding_in_equal_chunks(name: str, impl: str, chunk: int) -> None:
    module, x, _, expected = decoding_case(name, torch.float64, impl)
    cache = module.make_cache(2, LENGTH)
    with torch.no_grad():
        parts = [module(part, cache=cache) for part in x.split(chunk, dim=1)]
    close(torch.cat(parts, dim=1), expected)
    assert cache.length == len(cache) == LENGTH


def test_decoding_with_gradients_differentiates_the_present_call(name: str) -> None:
    module, x, _, expected = decoding_case(name, torch.float64, "auto")
    cache = module.make_cache(2, LENGTH)
    module(x[:, :7], cache=cache)
    late = x[:, 7:].clone().requires_grad_()
    y = module(late, cache=cache)
    close(y, expected[:, 7:])
    (gradient,) = torch.autograd.grad(y.square().sum(), late)
    whole = x.clone().requires_grad_()
    (full,) = torch.autograd.grad(module(whole)[:, 7:].square().sum(), whole)
    close(gradient, full[:, 7:])


def test_decoding_in_bfloat16_stays_within_its_rounding(name: str) -> None:
    module, x = build(name, dtype=torch.bfloat16), randn(2, LENGTH, WIDTH, dtype=torch.bfloat16)
    with torch.no_grad():
        cache = module.make_cache(2, LENGTH)
        steps = torch.cat([module(part, cache=cache) for part in x.split(1, dim=1)], dim=1)
        assert rms_error(steps, module(x)) < 2 * torch.finfo(torch.bfloat16).eps


def test_full_caches_and_other_batches_are_refused(name: str) -> None:
    module, x = build(name), randn(2, 5, WIDTH)
    cache = module.make_cache(2, 6)
    y = module(x, cache=cache)
    with pytest.raises(ValueError, match=r"holds 6 tokens; got 5 \+ 2"):
        module(x[:, :2], cache=cache)
    with pytest.raises(ValueError, match="batch size 2; got 1"):
        module(x[:1, :1], cache=cache)
    # a refused call leaves the cache as it was
    assert cache.length == 5
    cache.truncate(3)
    close(module(x[:, 3:], cache=cache), y[:, 3:])
    with pytest.raises(ValueError, match=r"5 tokens .* got 6"):
        cache.truncate(6)


def test_rows_of_a_batch_do_not_meet(name: str) -> None:
    module, x = build(name), randn(4, 13, WIDTH)
    y, order = module(x), torch.tensor([2, 0, 3, 1])
    close(module(x[order]), y[order], 1e-12)
    close(module(x[1:2]), y[1:2], 1e-12)
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[1].square().sum(), x)
    assert not gradient[[0, 2, 3]].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_left_padding_changes_no_row(name: str, impl: str) -> None:
    module, rows = build(name, impl=impl), [randn(n, WIDTH) for n in (9, 4, 1)]
    x, positions = left_padded(rows)
    x.requires_grad_()
    y = module(x, positions=positions)
    assert y.isfinite().all()
    for i, row in enumerate(rows):
        close(y[i, -len(row) :], module(row[None])[0])
    real = torch.cat([y[i, -len(row) :] for i, row in enumerate(rows)])
    (gradient,) = torch.autograd.grad(real.square().sum(), x)
    assert not gradient[positions < 0].any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("chunks", [[9], [2, 7], [1] * 9], ids=str)
def test_ragged_rows_decode_on_without_positions(name: str, chunks: list[int]) -> None:
    module, lengths, more = build(name), (9, 4, 1), 5
    texts = [randn(n + more, WIDTH) for n in lengths]
    x, positions = left_padded([text[:n] for text, n in zip(texts, lengths, strict=True)])
    cache = module.make_cache(3, 9 + more)
    with torch.no_grad():
        for part, where in zip(x.split(chunks, 1), positions.split(chunks, 1), strict=True):
            y = module(part, positions=where, cache=cache)
        for i, (text, n) in enumerate(zip(texts, lengths, strict=True)):
            close(y[i, -1], module(text[None, :n])[0, -1])
        late = torch.stack([text[-more:] for text in texts])
        new = torch.cat([module(late[:, :2], cache=cache), module(late[:, 2:4], cache=cache)], 1)
        cache.truncate(9 + 3)
        new = torch.cat([new[:, :3], module(late[:, 3:], cache=cache)], 1)
        for i, text in enumerate(texts):
            close(new[i], module(text[None])[0, -more:])


def test_explicit_positions_of_a_plain_sequence_change_nothing(name: str) -> None:
    module, x = build(name), randn(2, 9, WIDTH)
    y, positions = module(x), torch.arange(9)
    close(module(x, positions=positions), y)
    close(module(x, positions=positions.expand(2, 9)), y)
    close(module(x, positions=positions.int()), y)
    cache = module.make_cache(2, 9)
    first = module(x[:, :4], cache=cache)
    second = module(x[:, 4:], positions=positions[4:], cache=cache)
    close(torch.cat([first, second], 1), y)


def test_relative_methods_ignore_a_shift_of_all_positions(name: str) -> None:
    module, x = build(name), randn(2, 9, WIDTH)
    y, positions = module(x), torch.arange(9) + 17
    if not module.encoding.relative:
        differs(module(x, positions=positions + 10_000), y)
        return
    close(module(x, positions=positions), y)
    close(module(x, positions=torch.stack([positions, positions + 400])), y)
    cache = module.make_cache(2, 9)
    first = module(x[:, :4], positions=positions[:4], cache=cache)
    close(torch.cat([first, module(x[:, 4:], cache=cache)], 1), y)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (3, "integer tensor"),
        ([0, 1, 2], "integer tensor"),
        (torch.arange(3.0), "must be integers"),
        (torch.ones(3, dtype=torch.bool), "must be integers"),
        (torch.arange(4), "must have shape"),
        (torch.arange(3)[None].expand(3, 3), "must have shape"),
        (torch.zeros((), dtype=torch.long), "must have shape"),
    ],
    ids=["int", "list", "float", "bool", "long", "batch", "scalar"],
)
def test_bad_positions_are_refused(name: str, positions: object, message: str) -> None:
    module, x = build(name), randn(2, 3, WIDTH)
    with pytest.raises(ValueError, match=message):
        module(x, positions=positions)
    with pytest.raises(ValueError, match=message):
        module(x, positions=positions, cache=module.make_cache(2, 9))


def test_wrong_inputs_and_sizes_are_refused(name: str) -> None:
    module = build(name)
    for shape in ((2, 3, WIDTH + 1), (3, WIDTH), (2, 0, WIDTH)):
        with pytest.raises(ValueError, match=f"shape .B, T, {WIDTH}."):
            module(randn(*shape))
    with pytest.raises(ValueError, match="multiple of num_heads"):
        posenc.attention(name, 25, 4)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        posenc.attention(name, 24, 0)
    with pytest.raises(ValueError, match="Did you mean 'dropout'"):
        posenc.attention(name, WIDTH, HEADS, dropuot=0.1)
    with pytest.raises(ValueError, match="dropout must lie in"):
        posenc.attention(name, WIDTH, HEADS, dropout=1.0)
    with pytest.raises(ValueError, match="Did you mean 'sdpa'"):
        posenc.attention(name, WIDTH, HEADS, impl="spda")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"needs a CUDA device.*impl='sdpa'"):
            posenc.attention(name, WIDTH, HEADS, impl="fused")
    with pytest.raises(ValueError, match=f"unknown attention: '{name}x'. Did you mean '{name}'"):
        posenc.attention(f"{name}x", WIDTH, HEADS)


#: Unit roundoff: what one rounding costs at most, relatively.
BAND = torch.finfo(torch.bfloat16).eps / 2


def low_precision_case(name: str, length: int) -> tuple[posenc.Attention, posenc.Attention, Tensor]:
    """A bf16 module, the fp64 module of the same (rounded) weights, and a bf16 input."""
    low = build(name, head_dim=16, noise=0.2, dtype=torch.float32).to(torch.bfloat16)
    high = copy.deepcopy(low).to(torch.float64)
    return low, high, randn(1, length, 16 * HEADS, dtype=torch.bfloat16)


def test_bfloat16_error_is_that_of_rounding(name: str) -> None:
    low, high, x = low_precision_case(name, 1024)
    high.impl = "sdpa"
    with torch.no_grad():
        exact = high(x.double())
        with rounded(high, torch.bfloat16):
            plain = high(x.double())
        wide = copy.deepcopy(low).float()
        for impl in IMPLS:
            low.impl = wide.impl = impl
            converted = low(x)
            with torch.autocast("cpu", torch.bfloat16):
                cast = wide(x.float())
            for mode, y in (("to", converted), ("autocast", cast)):
                assert y.dtype == torch.bfloat16
                error = rms_error(y, exact)
                assert error <= 2 * (rms_error(plain, exact) + BAND), (impl, mode)


def test_far_positions_lose_nothing(name: str) -> None:
    module, x = build(name, dtype=torch.float32), randn(2, 11, WIDTH, dtype=torch.float32)
    positions = FAR + torch.arange(11)
    expected, _ = oracle_layer(module, x.double(), positions)
    close(module(x, positions=positions), expected, 1e-5)
    cache = module.make_cache(2, 11)
    first = module(x[:, :6], positions=positions[:6], cache=cache)
    close(torch.cat([first, module(x[:, 6:], cache=cache)], 1), expected, 1e-5)


def test_far_positions_lose_nothing_in_bfloat16(name: str) -> None:
    low, high, x = low_precision_case(name, 256)
    positions = FAR + torch.arange(256)
    with torch.no_grad():
        y, exact = low(x, positions=positions), high(x.double(), positions=positions)
        with rounded(high, torch.bfloat16):
            plain = high(x.double(), positions=positions)
    assert rms_error(y, exact) <= 2 * (rms_error(plain, exact) + BAND)


def test_rotation_and_convolution_ignore_autocast(name: str) -> None:
    encoding, x = build(name, dtype=torch.float32).encoding, randn(2, 9, WIDTH, dtype=torch.float32)
    q, k = (randn(2, HEADS, 9, 6, dtype=torch.float32) for _ in range(2))
    positions = FAR + torch.arange(9)
    plain = encoding.rotate(q, k, positions, x)
    with torch.autocast("cpu", torch.bfloat16):
        under = encoding.rotate(q, k, positions, x)
    for a, b in zip(plain, under, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


def test_rotation_of_bfloat16_rounds_once_at_any_length(name: str) -> None:
    low, high, x = low_precision_case(name, 4096)
    q, k = randn(2, 1, HEADS, 4096, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        for start in (0, FAR):
            positions = start + torch.arange(4096)
            turned = low.encoding.rotate(q, k, positions, x)
            exact = high.encoding.rotate(q.double(), k.double(), positions, x.double())
            for ours, theirs in zip(turned, exact, strict=True):
                assert ((ours - theirs).abs() <= BAND * theirs.abs() + 1e-4).all()


@pytest.mark.parametrize("cast", ["to", "bfloat16", "half"])
def test_phase_parameters_stay_float32(name: str, cast: str) -> None:
    module = build(name, dtype=torch.float32)
    before = {which: value.clone() for which, value in module.named_parameters()}
    cast_module = getattr(module, cast)(*([torch.bfloat16] if cast == "to" else []))
    kept = {
        f"{prefix}.{which}"
        for prefix, part in module.named_modules()
        if isinstance(part, Float32Parameters)
        for which, _ in part.named_parameters(recurse=False)
    }
    for which, value in cast_module.named_parameters():
        if which in kept:
            assert value.dtype == torch.float32
            assert torch.equal(value, before[which])
        else:
            assert value.dtype.itemsize == 2
    assert {which.removeprefix("encoding.") for which in kept} == module.encoding.no_weight_decay
    module.double()
    assert all(value.dtype == torch.float64 for value in module.parameters())


def test_meta_initialisation_equals_a_direct_one(name: str) -> None:
    options = {"embed_dim": 96, "num_heads": 12, "bias": True}
    direct = posenc.attention(name, **options)
    with torch.device("meta"):
        module = posenc.attention(name, **options)
    assert all(parameter.is_meta for parameter in module.parameters())
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    module.reset_parameters()
    for (which, ours), theirs in zip(module.named_parameters(), direct.parameters(), strict=True):
        assert ours.dtype == theirs.dtype
        if theirs.numel() == 1 or theirs.std() == 0:
            assert torch.equal(ours, theirs), which
        else:
            assert abs(ours.mean() - theirs.mean()) < theirs.std() * 6 / ours.numel() ** 0.5, which
            # the standard deviation of a sample of n strays by 1/sqrt(2n)
            assert abs(ours.std() / theirs.std() - 1) < 6 / (2 * ours.numel()) ** 0.5, which
            assert abs(ours.abs().max() / theirs.abs().max() - 1) < 0.6, which


def test_reset_parameters_follows_the_seed(name: str) -> None:
    modules = []
    for _ in range(2):
        module = build(name)
        torch.manual_seed(5)
        module.reset_parameters()
        modules.append(module.state_dict())
    for which, value in modules[0].items():
        assert torch.equal(value, modules[1][which])


def test_state_dict_holds_parameters_alone_and_returns(name: str) -> None:
    module, x = build(name, dtype=torch.float32), randn(2, 9, WIDTH, dtype=torch.float32)
    module(x)
    assert not list(module.buffers())
    assert set(module.state_dict()) == {which for which, _ in module.named_parameters()}
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = build(name, dtype=torch.float32)
    differs(other(x), module(x))
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(x), module(x))


def test_deep_copies_are_independent(name: str) -> None:
    module, x = build(name), randn(2, 9, WIDTH)
    twin, y = copy.deepcopy(module), module(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(module(x), y)
