"""Padding, packed documents and patterns of layers in a whole model."""

import json
import random
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import posenc
from helpers import HEADS, NAMES, WIDTH, close, differs, tiny_gpt, trained
from posenc import GPT, GPTConfig
from posenc.zoo import ZOO

VOCABULARY, CONTEXT, LENGTH = 29, 16, 11
GROUPED = {"num_kv_heads": 2, "head_dim": 8, "qk_norm": "rms", "window": 3}
#: Every name, and what a model treats differently.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in NAMES},
    **{f"{name}-grouped": (name, GROUPED) for name in NAMES},
    "carope-token": ("carope", {"source": "token"}),
    "carope-token-grouped": ("carope", {"source": "token", **GROUPED}),
    "moh-learned-conv": ("moh", {"encoding": "learned", "conv": True}),
}
EVERY = pytest.mark.parametrize("model", MODELS)
DOCUMENTS = ((4, 1, 6), (8, 3))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def built(model: str, **changes: Any) -> GPT:
    name, options = MODELS[model]
    return tiny_gpt(name, attention_options=options, **changes)


def text(batch: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length))


def gradients(model: GPT, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(trained(model).values()), materialize_grads=True))


def same_gradients(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        close(ours, theirs)


@EVERY
def test_packed_documents_are_documents_alone(model: str) -> None:
    gpt, ids, probe = built(model), text(2, LENGTH), torch.randn(2, LENGTH, VOCABULARY).double()
    logits = gpt(ids, segments=torch.cat([posenc.segments(row) for row in DOCUMENTS])).logits
    loss = probe.new_zeros(())
    for row, lengths in enumerate(DOCUMENTS):
        for start, stop in pairwise((0, *accumulate(lengths))):
            alone = gpt(ids[row : row + 1, start:stop]).logits[0]
            close(logits[row, start:stop], alone)
            loss = loss + (alone * probe[row, start:stop]).sum()
    same_gradients(gradients(gpt, (logits * probe).sum()), gradients(gpt, loss))


@EVERY
def test_each_document_may_be_as_long_as_the_context(model: str) -> None:
    """A table's rows limit a document, not the row that holds several."""
    gpt, ids = built(model), text(1, 2 * CONTEXT)
    logits = gpt(ids, segments=posenc.segments([CONTEXT, CONTEXT])).logits
    for half in (slice(None, CONTEXT), slice(CONTEXT, None)):
        close(logits[:, half], gpt(ids[:, half]).logits)


def padded_rows(where: str, lengths: tuple[int, ...] = (7, 4, 1)) -> Tensor:
    mask = torch.zeros(len(lengths), LENGTH, dtype=torch.bool)
    for row, count in enumerate(lengths):
        mask[row, -count:] = where == "left"
        mask[row, :count] |= where == "right"
    return mask


@EVERY
@pytest.mark.parametrize("where", ["left", "right"])
def test_padded_rows_are_rows_alone(model: str, where: str) -> None:
    gpt, ids, mask = built(model), text(3, LENGTH), padded_rows(where)
    logits = gpt(ids, mask=mask).logits
    assert logits.isfinite().all()
    for row in range(3):
        close(logits[row, mask[row]], gpt(ids[row : row + 1, mask[row]]).logits[0])
    other = torch.where(mask, ids, text(3, LENGTH))
    close(gpt(other, mask=mask).logits[mask], logits[mask], 1e-12)


@EVERY
def test_padding_does_not_use_up_the_table(model: str) -> None:
    gpt, ids = built(model), text(1, CONTEXT + 4)
    mask = torch.arange(CONTEXT + 4)[None] >= 4
    close(gpt(ids, mask=mask).logits[:, 4:], gpt(ids[:, 4:]).logits)


@EVERY
def test_padded_documents_are_documents_alone(model: str) -> None:
    gpt, ids = built(model), text(1, LENGTH)
    segments, mask = posenc.segments([5, 4, 2]), torch.ones(1, LENGTH, dtype=torch.bool)
    mask[0, [0, 1, 8, 9, 10]] = False  # left of the first, right of the second, all of the third
    logits = gpt(ids, segments=segments, mask=mask).logits
    for real in (slice(2, 5), slice(5, 8)):
        close(logits[:, real], gpt(ids[:, real]).logits)
    assert logits.isfinite().all()


@EVERY
def test_recomputed_activations_take_masks_and_segments(model: str) -> None:
    gpt, ids = built(model).train(), text(1, LENGTH)
    call = {"segments": posenc.segments([5, 4, 2]), "mask": torch.arange(LENGTH)[None] >= 2}
    results = []
    for recompute in (False, True):
        gpt.checkpoint_activations = recompute
        logits = gpt(ids, **call).logits
        results.append([logits, *gradients(gpt, logits[call["mask"]].square().sum())])
    same_gradients(*results)


@EVERY
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_decoding_is_the_full_forward(model: str, padded: bool) -> None:
    gpt, ids, order = built(model), text(3, LENGTH), torch.tensor([2, 0, 2])
    mask = padded_rows("left", (11, 8, 5)) if padded else torch.ones(3, LENGTH, dtype=torch.bool)
    with torch.no_grad():
        for chunks in ([LENGTH], [7, 1, 3], [1] * LENGTH):
            cache = gpt.make_cache(3, LENGTH)
            given, real, expected = ids, mask, gpt(ids, mask=mask).logits
            for stop, chunk in zip(accumulate(chunks), chunks, strict=True):
                now = slice(stop - chunk, stop)
                call = {"mask": real[:, now]} if padded and not real[:, now].all() else {}
                logits = gpt(given[:, now], cache=cache, **call).logits
                close(logits[real[:, now]], expected[:, now][real[:, now]])
                if stop in (7, 9):
                    cache.reorder(order)
                    given, real, expected = given[order], real[order], expected[order]
            assert cache.length == LENGTH


def test_bad_masks_and_segments_are_refused_by_the_model() -> None:
    gpt, ids = built("rope"), text(2, 5)
    for call in (
        {"mask": torch.ones(2, 4).bool()},
        {"mask": torch.ones(2, 5)},
        {"segments": torch.zeros(2, 4).long()},
        {"segments": torch.zeros(2, 5)},
        {"segments": torch.tensor([[0, 1, 0, 0, 0]] * 2)},
        {"segments": torch.zeros(2, 5).long(), "cache": gpt.make_cache(2, 5)},
    ):
        with pytest.raises(ValueError, match=r"mask|segments") as refusal:
            gpt(ids, **call)
        assert "\n" not in str(refusal.value)


def test_models_that_see_both_ways_refuse_a_cache() -> None:
    gpt = tiny_gpt("rope", attention_options={"causal": False})
    assert gpt(text(1, 5)).logits.isfinite().all()
    with pytest.raises(ValueError, match="causal"):
        gpt(text(1, 5), cache=gpt.make_cache(1, 5))
    with pytest.raises(ValueError, match="causal"):
        gpt.generate(text(1, 5), 3)


PATTERN = ("rope:window=4", "rope:window=4,base=500.0", "nope")


def pattern_gpt(attention: Any, layers: int = 5, **changes: Any) -> GPT:
    return tiny_gpt(attention, layers=layers, **changes)


def test_patterns_repeat_over_the_layers() -> None:
    gpt, h = pattern_gpt(PATTERN), torch.randn(2, LENGTH, WIDTH).double()
    wanted = [("rope", {"window": 4}), ("rope", {"window": 4, "base": 500.0}), ("nope", {})]
    for layer in range(5):
        name, options = wanted[layer % 3]
        alone = posenc.attention(name, WIDTH, HEADS, bias=True, **options).double().eval()
        alone.load_state_dict(gpt.h[layer].attn.state_dict())
        close(gpt.h[layer].attn(h), alone(h), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_patterns_of_one_name_are_that_name(name: str) -> None:
    ids, plain = text(2, LENGTH), tiny_gpt(name)
    for attention in ((name,), (name, name)):
        gpt = pattern_gpt(attention, layers=2)
        gpt.load_state_dict(plain.state_dict())
        assert torch.equal(gpt(ids).logits, plain(ids).logits)


def test_options_of_a_pattern_are_read_as_values() -> None:
    gpt = pattern_gpt(("moh:encoding=carope,shared=1,top_k=3,init=paper", "carope:first_power=1"))
    router, carope = gpt.h[0].attn.router, gpt.h[0].attn.encoding
    assert (router.shared, router.top_k) == (1, 3)
    assert (carope.init, gpt.h[1].attn.encoding.first_power) == ("paper", 1)
    assert gpt.h[2].attn.encoding.first_power == 0
    single = tiny_gpt("rope:base=500.0,conv=true")
    assert single.h[1].attn.encoding.base == 500.0
    assert single.h[1].attn.conv is not None


#: Every name beside one of each kind at the input, and beside its neighbour.
PAIRS = [*product(NAMES, ("rope", "mha", "sinusoidal")), *pairwise(NAMES)]


@pytest.mark.parametrize("names", PAIRS, ids=",".join)
def test_names_mix_where_their_tables_at_the_input_agree(names: tuple[str, str]) -> None:
    first, second = (ZOO[name].embedding for name in names)
    if first is second:
        gpt, ids = pattern_gpt(names, layers=2), text(1, LENGTH)
        (logits,) = gpt(ids).logits
        (same,) = gpt(ids, segments=posenc.segments([LENGTH])).logits
        close(logits, same)
        return
    with pytest.raises(ValueError) as refusal:
        GPT(GPTConfig(vocab_size=29, layers=2, heads=4, embed_dim=24, attention=names))
    assert "\n" not in str(refusal.value)
    assert all(name in str(refusal.value) for name in names)


@pytest.mark.parametrize(
    ("attention", "word"),
    [
        ((), "attention"),
        (("rop", "nope"), "rope"),
        (("rope:windw=4",), "window"),
        (("rope:window",), "window"),
        (("rope:window=0",), "window"),
        (("rope", 3), "3"),
        (3, "3"),
    ],
    ids=str,
)
def test_bad_patterns_are_refused(attention: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word) as refusal:
        GPT(GPTConfig(vocab_size=29, layers=2, heads=4, embed_dim=24, attention=attention))
    assert "\n" not in str(refusal.value)


def test_patterns_pack_pad_and_decode() -> None:
    gpt, ids, rng = pattern_gpt(PATTERN), text(1, LENGTH), random.Random(0)
    logits = gpt(ids, segments=posenc.segments([5, 6])).logits
    close(logits[:, 5:], gpt(ids[:, 5:]).logits)
    mask = torch.arange(LENGTH)[None] >= 3
    close(gpt(ids, mask=mask).logits[:, 3:], gpt(ids[:, 3:]).logits)
    expected, cache = gpt(ids).logits, gpt.make_cache(1, LENGTH)
    with torch.no_grad():
        while cache.length < LENGTH:
            now = slice(cache.length, min(cache.length + rng.randint(1, 4), LENGTH))
            close(gpt(ids[:, now], cache=cache).logits, expected[:, now])


def test_windows_of_a_pattern_matter() -> None:
    ids, whole = text(1, LENGTH), pattern_gpt(("rope", "nope"))
    narrow = pattern_gpt(("rope:window=2", "nope"))
    narrow.load_state_dict(whole.state_dict())
    differs(narrow(ids).logits, whole(ids).logits)


def test_patterns_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    gpt, ids = pattern_gpt(PATTERN, dtype=torch.float32), text(1, LENGTH)
    gpt.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path).eval()
    assert loaded.config == gpt.config
    assert torch.equal(loaded(ids).logits, gpt(ids).logits)


@pytest.mark.parametrize(
    "pattern",
    [("rope:axes=[4,4]", "rope"), ("rope", "rope:axes=[4,4]"), ("rope:continuous=true", "t5")],
    ids=str,
)
def test_layers_share_their_positions(pattern: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"share their positions.*the same axes and continuous"):
        GPT(GPTConfig(vocab_size=29, layers=2, heads=4, embed_dim=32, attention=pattern))


@pytest.mark.parametrize("options", [{"axes": [4, 2]}, {"continuous": True}], ids=str)
def test_positions_of_other_kinds_decode(options: dict[str, Any]) -> None:
    """Beside layers that read none."""
    model, ids = pattern_of(options), text(1, 7)
    positions = torch.randint(9, (7, 2)) if "axes" in options else torch.rand(7).cumsum(0)
    whole = model(ids, positions=positions).logits
    cache = model.make_cache(1, 7)
    parts = [
        model(ids[:, part], positions=positions[part], cache=cache).logits
        for part in (slice(0, 4), slice(4, 5), slice(5, 7))
    ]
    close(torch.cat(parts, 1), whole)


def pattern_of(options: dict[str, Any]) -> posenc.GPT:
    words = ",".join(f"{key}={json.dumps(value)}" for key, value in options.items())
    return pattern_gpt(("nope", f"rope:{words}"), layers=2)
