"""Decoding state: streams, truncation, positions."""

import pytest
import torch

import posenc
from helpers import HEADS, NAMES, WIDTH, build, close, differs, randn, tiny_gpt
from posenc.cache import Cache, Stream
from posenc.placement import place


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def cache_of(**streams: Stream) -> Cache:
    return Cache(2, 8, streams, dtype=torch.float64)


def test_rows_come_back_in_order() -> None:
    cache, rows = cache_of(k=Stream((3, 5))), randn(2, 3, 7, 5)
    close(cache.append("k", rows[:, :, :4]), rows[:, :, :4], 0)
    cache.advance(4)
    close(cache.append("k", rows[:, :, 4:]), rows, 0)
    cache.advance(3)
    assert cache.length == len(cache) == 7


def test_truncated_rows_are_overwritten() -> None:
    cache, rows = cache_of(k=Stream((1,))), randn(2, 7, 1)
    cache.append("k", randn(2, 6, 1))
    cache.append("k", rows[:, :5])
    cache.advance(5)
    cache.truncate(2)
    close(cache.append("k", rows[:, 2:]), rows, 0)


@pytest.mark.parametrize("history", [1, 2, 4])
def test_recent_rows_start_with_zeros(history: int) -> None:
    cache, rows = cache_of(conv=Stream((3, 5), history=history)), randn(2, 3, 8, 5)
    padded = torch.cat([torch.zeros(2, 3, history, 5), rows], 2)
    for start, stop in ((0, 1), (1, 3), (3, 8)):
        assert torch.equal(cache.recent("conv"), padded[:, :, start : start + history])
        cache.append("conv", rows[:, :, start:stop])
        cache.advance(stop - start)
    cache.truncate(3)
    assert torch.equal(cache.recent("conv"), padded[:, :, 3 : 3 + history])
    cache.truncate(0)
    assert not cache.recent("conv").any()


def test_recent_rows_are_a_copy() -> None:
    cache = cache_of(phase=Stream((3, 5), history=1))
    before = cache.recent("phase")
    cache.append("phase", randn(2, 3, 1, 5))
    cache.advance(1)
    assert not before.any()


def test_memory_is_allocated_once() -> None:
    module = build("rcmha", dtype=torch.float32)
    cache, x = module.make_cache(2, 16), randn(2, 16, WIDTH, dtype=torch.float32)
    size = cache.nbytes
    places = {name: rows.data_ptr() for name, rows in cache._rows.items()}
    for part in x.split(5, 1):
        module(part, cache=cache)
    assert {name: rows.data_ptr() for name, rows in cache._rows.items()} == places
    assert cache.nbytes == size == sum(rows.nbytes for rows in cache._rows.values())
    assert size >= 2 * 2 * 16 * WIDTH * 4  # k and v at least


@pytest.mark.parametrize("name", NAMES)
def test_device_and_dtype_follow_the_weights_or_the_request(name: str) -> None:
    module = build(name, dtype=torch.float32)
    assert module.make_cache(1, 4)._rows["k"].dtype == torch.float32
    cache = module.make_cache(1, 4, dtype=torch.bfloat16, device="cpu")
    assert cache._rows["k"].dtype == cache._rows["v"].dtype == torch.bfloat16
    x = randn(1, 4, WIDTH, dtype=torch.float32)
    y, expected = torch.cat([module(p, cache=cache) for p in x.split(1, 1)], 1), module(x)
    assert y.dtype == torch.float32
    # keys and values were rounded, and nothing else
    assert 0 < (y - expected).abs().max() < 0.05 * expected.abs().max()
    if "phase" in cache._rows:
        assert cache._rows["phase"].dtype == torch.float64


def test_decoding_under_autocast_follows_the_full_forward() -> None:
    module = build("carope", dtype=torch.float32)
    x = randn(2, 9, WIDTH, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = module.make_cache(2, 9)
        steps = torch.cat([module(part, cache=cache) for part in x.split(1, 1)], 1)
        close(steps, module(x), 0.02)


def test_cache_under_autocast_is_in_its_dtype() -> None:
    module = build("carope", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.make_cache(1, 4)._rows["k"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"floating-point numbers; got torch\.int64"):
        module.make_cache(1, 4, dtype=torch.long)


def test_caches_of_other_modules_are_refused() -> None:
    module, x = build("rope"), randn(2, 3, WIDTH)
    for other in (build("carope"), build("mdha"), build("rope", heads=2, head_dim=12)):
        with pytest.raises(ValueError, match="another module"):
            module(x, cache=other.make_cache(2, 4))
    with pytest.raises(ValueError, match="cache must be a Cache"):
        module(x, cache=tiny_gpt("rope").make_cache(2, 4))


def test_an_empty_cache_is_true() -> None:
    assert cache_of()
    assert len(cache_of()) == 0


def test_positions_continue_and_are_remembered() -> None:
    cache = cache_of()
    assert torch.equal(cache.place(None, 3).positions, torch.arange(3))
    cache.advance(3)
    here = cache.place(torch.tensor([10, 12]), 2)
    assert torch.equal(here.keys, torch.tensor([[0, 1, 2, 10, 12]] * 2))
    cache.advance(2)
    here = cache.place(None, 2)
    assert torch.equal(here.positions, torch.tensor([13, 14]))
    assert here.real is None
    cache.truncate(4)
    assert torch.equal(cache.place(None, 1).positions, torch.tensor([11]))


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_a_call_that_fails_leaves_no_positions_behind(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = build("rope"), randn(2, 6, WIDTH)
    cache = module.make_cache(2, 6)
    with torch.no_grad():
        parts = [module(x[:, :2], cache=cache)]
        with monkeypatch.context() as broken:
            broken.setattr(module.c_proj, "forward", None)
            with pytest.raises(TypeError):
                module(x[:, 2:4], positions=torch.arange(50, 52).expand(shape), cache=cache)
        parts += [module(part, cache=cache) for part in x[:, 2:].split(2, dim=1)]
        close(torch.cat(parts, dim=1), module(x))


def test_ragged_positions_continue_row_by_row() -> None:
    cache = cache_of()
    cache.place(torch.tensor([[-1, -1, 0], [0, 1, 2]]), 3)
    cache.advance(3)
    here = cache.place(None, 2)
    assert torch.equal(here.positions, torch.tensor([[1, 2], [3, 4]]))
    assert torch.equal(here.real, torch.tensor([[False, False, True, True, True], [True] * 5]))


def test_truncation_to_nothing_forgets_the_padding() -> None:
    model = tiny_gpt("mha")  # whose positions are absolute
    ids, cache = torch.randint(29, (2, 5)), model.make_cache(2, 5)
    model(ids, positions=torch.tensor([[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]), cache=cache)
    cache.truncate(0)
    close(model(ids, cache=cache).logits, model(ids).logits)


def test_padding_may_return_after_truncation() -> None:
    module, x = build("carope"), randn(2, 5, WIDTH)
    positions = torch.tensor([[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]])
    expected, cache = module(x, positions=positions), module.make_cache(2, 8)
    module(x, positions=positions, cache=cache)
    for cut in (1, 2, 4):
        cache.truncate(cut)
        close(module(x[:, cut:], positions=positions[:, cut:], cache=cache), expected[:, cut:])


def test_a_sequence_without_a_past_is_placed_as_given() -> None:
    cpu = torch.device("cpu")
    plain = place(2, 3, cpu)
    assert torch.equal(plain.positions, torch.arange(3))
    assert plain.keys is plain.real is None
    padded = place(2, 2, cpu, torch.tensor([[-1, 0], [0, 1]]))
    assert torch.equal(padded.real, torch.tensor([[False, True], [True, True]]))
    given = place(2, 2, cpu, torch.tensor([4, 5]))
    assert given.real is None
    assert torch.equal(given.keys, torch.tensor([4, 5]))


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0), (-1, 4)])
def test_sizes_are_checked(batch: int, length: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Cache(batch, length, {})


@pytest.mark.parametrize("length", [-1, 6])
def test_truncation_is_checked(length: int) -> None:
    cache = cache_of()
    cache.advance(5)
    with pytest.raises(ValueError, match=f"5 tokens .* got {length}"):
        cache.truncate(length)


def test_model_cache_truncates_every_layer() -> None:
    config = posenc.GPTConfig(
        vocab_size=11, context=16, layers=2, heads=HEADS, embed_dim=WIDTH, attention="rcmha"
    )
    model = posenc.GPT(config).double().eval()
    ids, cache = torch.randint(11, (2, 9)), model.make_cache(2, 12)
    expected = model(ids).logits
    model(ids, cache=cache)
    cache.truncate(4)
    assert cache.length == len(cache) == 4
    assert {layer.length for layer in cache.layers} == {4}
    close(model(ids[:, 4:], cache=cache).logits, expected[:, 4:])
    assert cache.nbytes == cache.own.nbytes + sum(layer.nbytes for layer in cache.layers)
    assert cache.max_length == 12


def test_the_past_carries_no_gradient() -> None:
    module = build("rope")
    x = randn(2, 6, WIDTH).requires_grad_()
    cache = module.make_cache(2, 6)
    module(x[:, :4], cache=cache)
    y = module(x[:, 4:], cache=cache)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert not gradient[:, :4].any()
    differs(gradient[:, 4:], torch.zeros(2, 2, WIDTH).double())
