"""GPT-2 with a pluggable attention."""

import copy
import gc
import math
import pickle
import random
import weakref
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import oracles
from helpers import HEADS, NAMES, WIDTH, close, copy_shared, differs, left_padded, tiny_gpt, trained
from posenc import GPT, GPTConfig
from posenc.models.generation import sample

VOCABULARY, CONTEXT = 29, 16
EVERY = pytest.mark.parametrize("name", NAMES)
#: Every name, and the variants that a model treats differently.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in NAMES} | {
    "carope-token": ("carope", {"source": "token"}),
    "moh-carope-token": ("moh", {"encoding": "carope", "source": "token"}),
    "moh-query-norm": ("moh", {"router": "query_norm"}),
    "rcmha-sinusoidal": ("rcmha", {"relative": "sinusoidal"}),
    "moh-learned-conv": ("moh", {"encoding": "learned", "conv": True}),
}
VARIED = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build_variant(variant: str, dtype: torch.dtype = torch.float64, **changes: Any) -> GPT:
    name, options = VARIANTS[variant]
    return tiny_gpt(name, dtype, attention_options=options, **changes)


def text(batch: int = 2, length: int = CONTEXT) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length))


def small(name: str = "rope", **changes: Any) -> GPT:
    """An untouched model, large enough for statistics."""
    config = {"vocab_size": 97, "context": 64, "layers": 3, "heads": 6, "embed_dim": 96}
    return GPT(GPTConfig(**config | {"attention": name} | changes))


def by_hand(model: GPT, ids: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-2's forward written out once more, its attention taken as it is."""
    weights = dict(model.named_parameters())
    h = weights["wte.weight"][ids]
    if model.wpe is not None:
        h = h + model.wpe.embed(torch.arange(ids.shape[1]))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    aux = []
    for i in range(model.config.layers):
        y, balance = model.h[i].attn(norm(h, f"h.{i}.ln_1"), return_aux=True)
        aux.append(balance)
        h = h + y
        mlp = f"h.{i}.mlp"
        y = norm(h, f"h.{i}.ln_2") @ weights[f"{mlp}.c_fc.weight"].T + weights[f"{mlp}.c_fc.bias"]
        y = y * torch.special.ndtr(y)
        h = h + y @ weights[f"{mlp}.c_proj.weight"].T + weights[f"{mlp}.c_proj.bias"]
    return norm(h, "ln_f") @ weights["wte.weight"].T, sum(aux) / len(aux)


@EVERY
def test_forward_is_gpt2_written_out(name: str) -> None:
    model, ids, targets = tiny_gpt(name), text(), text()
    targets[0, :3] = -100
    out = model(ids, targets)
    logits, aux = by_hand(model, ids)
    close(out.logits, logits)
    close(out.aux_loss, aux)
    kept = targets.flatten() != -100
    chosen = logits.log_softmax(-1).flatten(0, 1)[kept, targets.flatten()[kept]]
    loss = -chosen.mean()
    close(out.loss, loss)
    parameters = list(trained(model).values())
    sums = (out.loss + out.aux_loss, loss + aux)
    gradients = (torch.autograd.grad(total, parameters) for total in sums)
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)
    assert model(ids).loss is None
    assert (out.aux_loss > 0) == (name == "moh")


def test_token_phases_come_from_the_bare_embedding_once() -> None:
    model, ids = build_variant("carope-token"), text()
    seen = []
    for block in model.h:
        block.attn.register_forward_pre_hook(
            lambda module, inputs, options: seen.append(options["shared"].phase), with_kwargs=True
        )
    model(ids)
    assert seen[0] is seen[1]
    embedded = model.wte.weight[ids]
    rates = oracles.carope_rates(embedded, model.phase.weight, model.phase.bias)
    phases = oracles.carope_phases(oracles.carope_steps(rates, WIDTH // HEADS))
    close(seen[0].sin(), phases.sin())
    close(seen[0].cos(), phases.cos())
    # the same function as the layer's own phases would give from that input
    layer = tiny_gpt("carope")
    copy_shared(model, layer)
    differs(layer(ids).logits, model(ids).logits)


@VARIED
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    """Also what DDP needs: no parameter without one."""
    model, ids = build_variant(variant).train(), text()
    out = model(ids, ids)
    (out.loss + out.aux_loss).backward()
    for which, parameter in trained(model).items():
        assert parameter.grad is not None, which
        assert parameter.grad.any(), which


@VARIED
def test_recomputed_activations_give_the_same_gradients(variant: str) -> None:
    model, ids = build_variant(variant).train(), text()
    gradients = []
    for recompute in (False, True):
        model.checkpoint_activations = recompute
        out = model(ids, ids)
        loss, weights = out.loss + out.aux_loss, trained(model).values()
        gradients.append(torch.autograd.grad(loss, list(weights)))
    for first, second in zip(*gradients, strict=True):
        close(first, second)


@EVERY
def test_later_tokens_change_no_earlier_logits(name: str) -> None:
    model, ids = tiny_gpt(name), text()
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % VOCABULARY
    assert torch.equal(model(ids).logits[:, :9], model(changed).logits[:, :9])


@EVERY
def test_shift_of_positions_matters_to_absolute_encodings_only(name: str) -> None:
    model, ids = tiny_gpt(name, context=64), text()
    part = model.wpe or model.h[0].attn.encoding
    # Without a table there is no end, and a scheme may count from afar alone.
    by = 17 if part.relative or model.wpe is not None else 10_000
    shifted = model(ids, positions=torch.arange(CONTEXT) + by).logits
    if part.relative:
        close(shifted, model(ids).logits)
    else:
        differs(shifted, model(ids).logits)


@EVERY
def test_order_matters(name: str) -> None:
    """Of tokens before the last one too, once there are two layers."""
    model, ids = tiny_gpt(name), text()
    swapped = ids.clone()
    swapped[:, :8] = ids[:, :8].flip(1)
    differs(model(swapped).logits[:, -1], model(ids).logits[:, -1], 1e-5)


@VARIED
@pytest.mark.parametrize("chunks", [[CONTEXT], [5, 1, 1, 9], [1] * CONTEXT], ids=str)
def test_decoding_is_the_full_forward(variant: str, chunks: list[int]) -> None:
    model, ids = build_variant(variant), text()
    cache, expected = model.make_cache(2, CONTEXT), model(ids).logits
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in ids.split(chunks, 1)]
    close(torch.cat(parts, 1), expected)
    assert cache.length == CONTEXT


@VARIED
def test_rejected_drafts_leave_no_trace(variant: str) -> None:
    model, ids = build_variant(variant), text()
    cache, expected = model.make_cache(2, CONTEXT), model(ids).logits
    with torch.no_grad():
        model(ids[:, :7], cache=cache)
        model(text(2, 4), cache=cache)
        cache.truncate(6)
        close(model(ids[:, 6:8], cache=cache).logits, expected[:, 6:8])
        close(model(ids[:, 8:], cache=cache).logits, expected[:, 8:])


@VARIED
def test_ragged_prompts_decode_together(variant: str) -> None:
    model, lengths = build_variant(variant), (7, 3)
    rows = [text(1, n + 3)[0] for n in lengths]
    ids, positions = left_padded(
        [row[:-3] for row in rows], lambda *shape: torch.randint(VOCABULARY, shape)
    )
    cache = model.make_cache(2, 10)
    with torch.no_grad():
        first = model(ids, positions=positions, cache=cache).logits
        close(model(ids, positions=positions).logits, first)
        late = torch.stack([row[-3:] for row in rows])
        steps = [first[:, -1:]]
        steps += [model(part, cache=cache).logits for part in late.split(1, 1)]
        for i, row in enumerate(rows):
            close(torch.cat(steps, 1)[i], model(row[None]).logits[0, -4:])


@VARIED
def test_greedy_generation_is_the_argmax_without_a_cache(variant: str) -> None:
    model, ids = build_variant(variant), text(2, 4)
    out = model.generate(ids, 9, temperature=0)
    assert out.shape == (2, 13)
    slow = ids
    for _ in range(9):
        slow = torch.cat([slow, model(slow).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, slow)


@EVERY
def test_generation_beyond_the_context(name: str) -> None:
    model, ids = tiny_gpt(name, torch.float32), text(2, 3)
    out = model.generate(ids, 3 * CONTEXT, temperature=0)
    assert out.shape == (2, 3 + 3 * CONTEXT)
    assert torch.equal(out[:, :3], ids)
    long = model.generate(text(1, 2 * CONTEXT), 2, temperature=0)
    assert long.shape == (1, 2 * CONTEXT + 2)


def test_full_learned_table_starts_over_from_its_last_half() -> None:
    model, ids = tiny_gpt("mha"), text(1, CONTEXT)
    out = model.generate(ids, 3, temperature=0)
    full = model(ids).logits[:, -1].argmax(-1)
    assert out[0, CONTEXT] == full
    for t in (CONTEXT + 1, CONTEXT + 2):
        window = out[:, CONTEXT + 1 - CONTEXT // 2 : t]
        assert out[0, t] == model(window).logits[:, -1].argmax(-1)
    # more than the table: the last rows of the prompt
    longer = torch.cat([text(1, 5), ids], 1)
    assert model.generate(longer, 1, temperature=0)[0, -1] == full


def padded(rows: list[Tensor], sides: str, fill: int = -1) -> tuple[Tensor, Tensor]:
    """Prompts as one batch of the longest's length, each padded on its side, and the mask."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), longest), fill), torch.zeros(len(rows), longest).bool()
    for i, (row, side) in enumerate(zip(rows, sides, strict=True)):
        where = slice(len(row)) if side == "R" else slice(longest - len(row), longest)
        ids[i, where], mask[i, where] = row, True
    return ids, mask


@VARIED
@pytest.mark.parametrize("sides", ["LLL", "RRR", "RLR"])
def test_padded_prompts_continue_as_each_alone(variant: str, sides: str) -> None:
    """On either side, whatever stands in the padding: here ids that there are not."""
    model = build_variant(variant)
    rows = [text(1, length)[0] for length in (2, 7, 4)]
    ids, mask = padded(rows, sides)
    out = model.generate(ids, 6, mask=mask, temperature=0)
    assert torch.equal(out[:, :7], ids)
    for row, new in zip(rows, out[:, 7:], strict=True):
        alone = model.generate(row[None], 6, temperature=0)[0, len(row) :]
        assert torch.equal(new, alone)


@pytest.mark.parametrize("variant", ["mha", "moh-learned-conv"])
@pytest.mark.parametrize("side", "LR")
def test_rows_fill_a_learned_table_each_by_itself(variant: str, side: str) -> None:
    """Of 16 positions, twice over, by prompts longer than it, just as long, and shorter."""
    model = build_variant(variant)
    rows = [text(1, length)[0] for length in (3, CONTEXT + 4, CONTEXT - 1, CONTEXT, 9)]
    ids, mask = padded(rows, side * 5)
    out = model.generate(ids, 2 * CONTEXT, mask=mask, temperature=0)
    for row, new in zip(rows, out[:, ids.shape[1] :], strict=True):
        alone = model.generate(row[None], 2 * CONTEXT, temperature=0)[0, len(row) :]
        assert torch.equal(new, alone)


def test_a_mask_without_padding_changes_no_bit() -> None:
    model, ids = tiny_gpt("moh", torch.float32), text(3, 5)
    runs = [
        model.generate(given, 9, mask=mask, generator=torch.Generator().manual_seed(1))[:, -9:]
        for given, mask in (
            (ids, None),
            (ids, torch.ones(3, 5).bool()),
            (F.pad(ids, (1, 2), value=99), F.pad(torch.ones(3, 5), (1, 2)).bool()),
        )
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1], [0, 1, 1]], r"torch.bool of ids' shape \(2, 3\).*got torch.int64 .*by .bool"),
        ([[True, True]] * 2, r"shape \(2, 3\).*got torch.bool \(2, 2\)"),
        ([[True] * 3, [False] * 3], "got a row of padding"),
        ([[True, False, True], [True] * 3], "got padding between tokens"),
    ],
)
def test_other_masks_are_refused(mask: list[list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_gpt("rope").generate(text(2, 3), 2, mask=torch.tensor(mask))


def test_rows_stop_at_their_stop_token_and_are_padded() -> None:
    model = tiny_gpt("rope")
    rows = [text(1, length)[0] for length in (3, 6, 5)]
    ids, mask = padded(rows, "LLL")
    whole = model.generate(ids, 12, mask=mask, temperature=0)[:, 6:]
    first, second = whole[0, 2].item(), whole[1, 4].item()
    for stop, pad in ((first, None), ([first, second], None), ((second, first), 7), (second, -100)):
        stops = [stop] if isinstance(stop, int) else list(stop)
        expected, longest = whole.clone(), 0
        for row in expected:
            length = next((i + 1 for i, token in enumerate(row.tolist()) if token in stops), 12)
            row[length:] = stops[0] if pad is None else pad
            longest = max(longest, length)
        out = model.generate(ids, 12, mask=mask, temperature=0, stop=stop, pad=pad)
        assert torch.equal(out, torch.cat((ids, expected[:, :longest]), 1))


def test_generation_ends_with_its_last_row() -> None:
    model, ids = tiny_gpt("rope"), text(2, 3)
    whole = model.generate(ids, 12, temperature=0)
    steps: list[int] = []
    model.wte.register_forward_hook(lambda module, inputs, output: steps.append(1))
    out = model.generate(ids, 12, temperature=0, stop=sorted({*whole[:, 4].tolist()}))
    assert torch.equal(out[:, :4], whole[:, :4])
    assert 4 <= out.shape[1] <= 5
    assert len(steps) == out.shape[1] - 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": VOCABULARY}, "from 0 to 28; got 29"),
        ({"stop": -1}, "from 0 to 28; got -1"),
        ({"stop": [3, 2.5]}, r"got \[3, 2.5\]"),
        ({"stop": []}, r"got \[\]"),
        ({"stop": "."}, "got '.'"),
        ({"pad": 3}, "got 3 with stop=None"),
        ({"pad": 0.5, "stop": 3}, "pad must be an integer.*got 0.5"),
    ],
)
def test_stops_that_cannot_be_drawn_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_gpt("rope").generate(text(1, 3), 2, **options)


def test_unknown_ways_of_generating_are_refused() -> None:
    with pytest.raises(TypeError, match="repetition_penalty"):
        tiny_gpt("rope").generate(text(1, 3), 2, repetition_penalty=1.2)


def test_sampling_follows_the_generator_the_temperature_and_top_k() -> None:
    model, ids = tiny_gpt("rope"), text(4, 3)

    def run(seed: int = 1, **options: Any) -> Tensor:
        return model.generate(ids, 12, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(run(), run())
    assert not torch.equal(run(), run(2))
    greedy = model.generate(ids, 12, temperature=0)
    assert torch.equal(run(top_k=1), greedy)
    for temperature in (1e-4, 1e-40):
        assert torch.equal(run(temperature=temperature), greedy)
    assert torch.equal(run(top_k=VOCABULARY), run(top_k=10 * VOCABULARY))
    assert torch.equal(run(top_p=1e-6), greedy)
    assert torch.equal(run(top_p=1.0), run())
    assert torch.equal(run(top_p=1.0, top_k=5), run(top_k=5))
    assert not torch.equal(run(temperature=50.0), run())


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.9}, {"top_p": 0.999}],
    ids=str,
)
def test_sampled_tokens_follow_the_model_s_probabilities(options: dict[str, Any]) -> None:
    model, ids = tiny_gpt("rope"), text(1, 3)
    ranked = (model(ids).logits[0, -1] / 0.7).softmax(-1).sort(descending=True)
    weights = ranked.values[: options.get("top_k")].tolist()
    nucleus: list[float] = []
    while sum(nucleus) < options.get("top_p", 1) * sum(weights) and len(nucleus) < len(weights):
        nucleus.append(weights[len(nucleus)])
    if len(options) == 2:
        assert 1 < len(nucleus) < options["top_k"]
    expected = torch.zeros(VOCABULARY)
    expected[ranked.indices[: len(nucleus)]] = torch.tensor(nucleus) / sum(nucleus)
    drawn = model.generate(ids.expand(4000, 3), 1, temperature=0.7, **options)[:, -1]
    found = torch.bincount(drawn, minlength=VOCABULARY) / 4000
    assert (found - expected).abs().max() < 0.04
    assert not found[expected == 0].any()


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_small_temperature_takes_the_most_likely_token(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Down to those that round to 0: 1e-46 in fp32, 1e-320 in fp64 or its reciprocal."""
    logits = torch.tensor([[0.5, -3.0, 2.0, 1.9375], [7.0, -1e30, 6.5, -torch.inf]], dtype=dtype)
    for temperature in (1e-3, 1e-38, 1e-46, 1e-320):
        drawn = sample(logits, temperature, **options)
        assert drawn.flatten().tolist() == [2, 0], temperature


def test_generation_keeps_the_mode_and_builds_no_graph() -> None:
    model = tiny_gpt("rope", dropout=0.5).train()
    out = model.generate(text(1, 3), 2)
    assert model.training
    assert model.h[0].training
    assert not out.requires_grad
    model.h[1].eval()
    model.generate(text(1, 3), 1)
    assert [block.training for block in model.h] == [True, False]
    model.eval()
    model.generate(text(1, 3), 1)
    assert not model.training
    assert torch.equal(model.generate(out, 0), out)


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (-1, {}),
        *((1, {"temperature": temperature}) for temperature in (-1.0, math.nan)),
        (1, {"top_k": 0}),
        *((1, {"top_p": top_p}) for top_p in (0.0, 1.1, math.nan)),
    ],
)
def test_bad_generation_is_refused(count: int, options: dict[str, Any]) -> None:
    model = tiny_gpt("rope").train()
    with pytest.raises(ValueError, match="generate needs"):
        model.generate(text(1, 3), count, **options)
    with pytest.raises(ValueError, match="ids must"):
        model.generate(text()[0], 1)
    with pytest.raises(ValueError, match=r"vocabulary, 0 to 28; got"):
        model.generate(text(1, 3) + VOCABULARY, 1)
    assert model.training


@EVERY
def test_weights_are_tied_and_named_as_in_gpt2(name: str) -> None:
    model = small(name)
    names = set(model.state_dict())
    assert {"wte.weight", "h.0.attn.c_attn.weight", "h.2.mlp.c_proj.bias", "ln_f.bias"} <= names
    assert not any("lm_head" in which for which in names)
    assert ("wpe.weight" in names) == (name == "mha")
    assert names == {which for which, _ in model.named_parameters()}
    assert not list(model.buffers())
    ids = torch.randint(97, (1, 5))
    before = model(ids).logits
    with torch.no_grad():
        model.wte.weight[42] += torch.randn(96)
    changed = (model(ids).logits - before).abs().amax((0, 1))
    assert changed[42] > 1e-3


#: Ways to call every module's `reset_parameters`.
ORDERS: dict[str, Callable[[list[nn.Module]], list[nn.Module]]] = {
    "none": lambda modules: [],
    "parents first": lambda modules: modules,
    "children first": lambda modules: modules[::-1],
    "shuffled": lambda modules: random.Random(0).sample(modules, len(modules)),
}


def materialised(model: GPT, order: str) -> GPT:
    """As users of FSDP2 do it."""
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    for module in ORDERS[order](list(model.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


@VARIED
@pytest.mark.parametrize("order", ORDERS)
def test_initial_values_are_those_of_gpt2_at_its_width(variant: str, order: str) -> None:
    name, options = VARIANTS[variant]
    with torch.device("cpu" if order == "none" else "meta"):
        model = small(name, attention_options=options)
    model = model if order == "none" else materialised(model, order)
    width = 0.02 * math.sqrt(768 / model.config.embed_dim)
    residual = width / math.sqrt(2 * 3)
    for which, parameter in model.named_parameters():
        if which.endswith("W_R.weight"):
            slack = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(width, rel=slack), which
            continue
        if ".attn.encoding." in which or ".conv." in which or which.startswith("phase."):
            assert not parameter.isnan().any()
            continue
        if ".ln_" in which or which.startswith("ln_f"):
            assert (parameter == (1 if which.endswith("weight") else 0)).all()
        elif which.endswith("bias"):
            assert not parameter.any()
        else:
            std = width if which.endswith(("c_attn.weight", "c_fc.weight")) else 0.02
            std = residual if which.endswith("c_proj.weight") else std
            slack = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(std, rel=slack), which
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel())


def test_parts_keep_their_own_start_inside_a_model() -> None:
    assert (small("cmha").h[0].attn.encoding.delta == 1).all()
    carope = small("carope").h[1].attn.encoding
    assert carope.bias.tolist() == pytest.approx([oracles.carope_bias(16)] * 6, rel=1e-6)
    assert not carope.weight.any()
    token = small("carope", attention_options={"source": "token"}).phase
    assert token.bias.tolist() == pytest.approx([oracles.carope_bias(16)] * 6, rel=1e-6)
    primer = small("mdha").h[0].attn.conv.weight
    assert (primer[..., -1] == 0.5).all()
    rmha = small("rmha").h[0].attn.encoding
    assert rmha.W_R.weight.std().item() == pytest.approx(0.02 * math.sqrt(768 / 96), rel=0.05)
    bound = math.sqrt(6 / 192)
    for order in ORDERS:
        model = small("cmha", attention_options={"init": "authors"})
        authors = (model if order == "none" else materialised(model, order)).h[0].attn
        for weight in (*authors.c_attn.weight.chunk(3), authors.c_proj.weight):
            assert 0.98 * bound < weight.abs().max() <= bound


def test_all_names_share_their_common_weights_under_one_seed() -> None:
    reference: dict[str, Tensor] = {}
    for variant in VARIANTS:
        name, options = VARIANTS[variant]
        torch.manual_seed(7)
        model = small(name, attention_options=options)
        for which, parameter in model.named_parameters():
            if ".encoding." in which or ".conv." in which or ".router." in which:
                continue
            if which.startswith(("wpe", "phase")):
                continue
            assert torch.equal(parameter, reference.setdefault(which, parameter)), (variant, which)
    torch.manual_seed(8)
    assert not torch.equal(small().wte.weight, reference["wte.weight"])


def test_carope_and_cmha_start_as_the_rope_model() -> None:
    ids = torch.randint(97, (2, 20))
    logits = []
    for name in ("rope", "carope", "cmha"):
        torch.manual_seed(7)
        logits.append(small(name)(ids).logits)
    close(logits[1], logits[0], 1e-5)
    assert torch.equal(logits[2], logits[0])


@VARIED
def test_meta_initialisation_equals_a_direct_one_bit_for_bit(variant: str) -> None:
    name, options = VARIANTS[variant]
    # of a size at which uniform and normal numbers take the generator on by different steps
    sizes = {"heads": 5, "embed_dim": 30}
    torch.manual_seed(7)
    direct = small(name, attention_options=options, **sizes)
    with torch.device("meta"):
        model = small(name, attention_options=options, **sizes)
    model = model.to_empty(device="cpu")
    torch.manual_seed(7)
    model.reset_parameters()
    for which, value in model.state_dict().items():
        assert torch.equal(value, direct.state_dict()[which]), which


@pytest.mark.parametrize("variant", ["rmha", "rcmha-sinusoidal", "moh", "cmha-authors", "mdha"])
def test_a_seed_draws_in_this_order(variant: str) -> None:
    """Written out: another order would be another model from a seed that somebody has published."""
    name, options = (VARIANTS | {"cmha-authors": ("cmha", {"init": "authors"})})[variant]
    changes = {"heads": 5, "embed_dim": 30, "attention_options": options}
    torch.manual_seed(7)
    model = small(name, **changes)
    weights = dict(small(name, **changes).named_parameters())
    torch.manual_seed(7)
    std = 0.02 * math.sqrt(768 / 30)
    nn.init.normal_(weights["wte.weight"], std=0.02)
    for i in range(3):
        for which in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            scale = math.sqrt(6) if which.endswith("c_proj") else 1
            nn.init.normal_(weights[f"h.{i}.{which}.weight"], std=std / scale)
    for i in range(3):
        own = {key: weights.get(f"h.{i}.attn.encoding.{key}") for key in ("u", "v", "W_R.weight")}
        if variant == "cmha-authors":
            for which in ("attn.c_attn", "attn.c_proj"):
                bound = math.sqrt(3 / 30)
                nn.init.uniform_(weights[f"h.{i}.{which}.weight"], -bound, bound)
            nn.init.normal_(weights[f"h.{i}.attn.encoding.delta"], std=3**-0.5)
        if own["W_R.weight"] is not None:
            nn.init.normal_(own["u"], std=0.02)
            nn.init.normal_(own["v"], std=0.02)
            nn.init.kaiming_uniform_(own["W_R.weight"], a=math.sqrt(5))
        if variant == "rcmha-sinusoidal":
            for which in ("weight", "bias"):
                bound = 1 / math.sqrt(3)
                nn.init.uniform_(weights[f"h.{i}.attn.conv.{which}"], -bound, bound)
        for which in ("W_s", "W_r", "W_h"):
            if f"h.{i}.attn.router.{which}.weight" in weights:
                nn.init.normal_(weights[f"h.{i}.attn.router.{which}.weight"], std=0.02)
        if own["W_R.weight"] is not None:
            nn.init.normal_(own["W_R.weight"], std=std)
    for which, value in model.named_parameters():
        assert torch.equal(value, weights[which]), which


@pytest.mark.parametrize("order", ORDERS)
def test_initial_loss_is_that_of_a_uniform_guess(order: str) -> None:
    for name in NAMES:
        model = small(name)
        model = model if order == "none" else materialised(model, order)
        ids = torch.randint(97, (4, 64))
        assert model(ids, ids.roll(1)).loss.item() == pytest.approx(math.log(97), abs=0.1)


@pytest.mark.parametrize("name", ["rmha", "moh"])
def test_a_copy_resets_itself_and_a_deleted_model_is_gone(name: str) -> None:
    model = small(name)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for module in copied.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.constant_(module.weight, math.nan)
                module.reset_parameters()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not any(value.isnan().any() for value in copied.state_dict().values())
    kept = weakref.ref(model.h[0].attn.c_attn.weight)
    gc.disable()
    try:
        del model
        assert kept() is None
    finally:
        gc.enable()


def test_linear_layers_are_torch_s_own() -> None:
    """Quantisers look for the exact type."""
    for name in ("rmha", "moh"):
        layers = {type(part) for part in small(name).modules() if isinstance(part, nn.Linear)}
        assert layers == {nn.Linear}


def test_parameter_counts_of_gpt2_small() -> None:
    with torch.device("meta"):
        models = {name: GPT(GPTConfig(attention=name)) for name in ("mha", "rope", "carope")}
        bare = GPT(GPTConfig(attention="rope", bias=False))
    C, L, V = 768, 12, 50304
    rope = V * C + L * (12 * C * C + 13 * C) + 2 * C
    assert models["rope"].num_parameters() == rope
    assert models["mha"].num_parameters() == rope + 1024 * C
    assert models["carope"].num_parameters() == rope + L * (C * 12 + 12)
    assert bare.num_parameters() == V * C + L * (12 * C * C + 2 * C) + C


def test_config_is_frozen_and_has_gpt2_s_defaults() -> None:
    config = GPTConfig()
    found = {field.name: getattr(config, field.name) for field in fields(config)}
    expected = {
        "vocab_size": 50304,
        "context": 1024,
        "layers": 12,
        "heads": 12,
        "embed_dim": 768,
        "attention": "rope",
        "attention_options": {},
        "dropout": 0.0,
        "bias": True,
    }
    assert found == found | expected
    with pytest.raises(FrozenInstanceError):
        config.layers = 3
    options = {"base": 500.0}
    config = GPTConfig(attention_options=options)
    options["base"] = 3.0
    assert config.attention_options == {"base": 500.0}


def test_every_field_of_the_config_changes_the_model() -> None:
    changes: dict[str, Any] = {
        "layers": 3,
        "heads": 6,
        "attention": "rope",
        "attention_options": {"impl": "reference", "bias": False},
        "dropout": 0.5,
        "bias": False,
        "gelu": "tanh",
        "vocab_size": 31,
        "context": 32,
        "embed_dim": 48,
        "mlp_dim": 17,
    }
    assert {field.name for field in fields(GPTConfig)} == changes.keys()
    plain, ids = tiny_gpt("mha"), text()
    for field, value in changes.items():
        model = tiny_gpt("mha", **{field: value}).train()
        copy_shared(plain, model)
        shapes = [[tuple(p.shape) for p in m.parameters()] for m in (model, plain)]
        same = shapes[0] == shapes[1]
        assert not same or (model(ids).logits - plain(ids).logits).abs().max() > 1e-6, field


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "needs layers of at least 1, an integer; got 0"),
        ({"vocab_size": 0}, "needs vocab_size of at least 1"),
        ({"context": 0}, "needs context of at least 1"),
        ({"mlp_dim": 0}, "needs mlp_dim of at least 1, an integer; got 0"),
        ({"mlp_dim": 2.5}, "needs mlp_dim of at least 1, an integer; got 2.5"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"heads": 5}, "multiple of num_heads"),
        ({"heads": 8}, "even head dim"),
        ({"attention": "roep"}, "Did you mean 'rope'"),
        ({"gelu": "tan"}, "Did you mean 'tanh'"),
        ({"attention_options": {"bses": 1}}, "Did you mean 'base'"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_gpt(
            **{"name": "rope"}
            | {("name" if k == "attention" else k): v for k, v in changes.items()}
        )


def test_wrong_inputs_are_refused() -> None:
    model, ids = tiny_gpt("rope"), text()
    for bad in (ids[0], ids.float(), ids[:, :0], ids[None]):
        with pytest.raises(ValueError, match="ids must be integers of shape"):
            model(bad)
    for dtype in (torch.uint8, torch.int16, torch.bool):
        with pytest.raises(
            ValueError, match=rf"int64 or int32; got {dtype} .*Cast others by ids.l"
        ):
            model(ids.to(dtype))
    with pytest.raises(ValueError, match="got list"):
        model(ids.tolist())
    assert torch.equal(model(ids.int()).logits, model(ids).logits)
    for beyond in (VOCABULARY, -1):
        wrong = ids.clone()
        wrong[1, 3] = beyond
        with pytest.raises(ValueError, match=f"vocabulary, 0 to 28; got {beyond}. Use the tok"):
            model(wrong)
        with pytest.raises(ValueError, match="vocabulary"):
            model.generate(wrong, 1)
    with pytest.raises(ValueError, match="targets must have"):
        model(ids, ids[:, 1:])
    with pytest.raises(ValueError, match="positions must be integers"):
        model(ids, positions=torch.arange(CONTEXT).float())
    with pytest.raises(ValueError, match="batch size 3; got 2"):
        model(ids, cache=model.make_cache(3, CONTEXT))
    with pytest.raises(ValueError, match="holds 8 tokens"):
        model(ids, cache=model.make_cache(2, 8))
    with pytest.raises(ValueError, match="cache must be a ModelCache"):
        model(ids, cache=model.h[0].attn.make_cache(2, CONTEXT))
    for other in (tiny_gpt("rope", layers=1), tiny_gpt("mdha"), build_variant("carope-token")):
        with pytest.raises(ValueError, match=r"the cache (has|holds)"):
            model(ids, cache=other.make_cache(2, CONTEXT))


def test_ids_are_looked_at_only_where_there_are_numbers() -> None:
    """Not under vmap (gradients of each sample), nor where tensors are fake."""
    model, ids = tiny_gpt("rope", attention_options={"impl": "reference"}), text()

    def loss(ids: Tensor) -> Tensor:
        return model(ids[None], ids[None]).loss

    expected = torch.stack([loss(row) for row in ids])
    close(torch.func.vmap(loss)(ids), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.zeros(2, 3, dtype=torch.long)).logits.shape == (2, 3, VOCABULARY)
    assert model.to("meta")(ids.to("meta")).logits.is_meta


class Adapter(nn.Module):
    """A layer and something learned beside it, as adapters wrap them; it has no `weight`."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.scale[0]


@EVERY
def test_layers_without_a_weight_generate_too(name: str) -> None:
    model, ids = tiny_gpt(name), text(1, 3)
    expected = model.generate(ids, 5, temperature=0)
    for block in model.h:
        block.attn.c_attn = Adapter(block.attn.c_attn)
    assert torch.equal(model.generate(ids, 5, temperature=0), expected)
    cache = model.h[0].attn.make_cache(1, 4)
    assert {rows.dtype for key, rows in cache._rows.items() if key in "kv"} == {torch.float64}


def test_text_beyond_the_learned_table_is_refused() -> None:
    model = tiny_gpt("mha")
    with pytest.raises(ValueError, match="16 positions; got 17"):
        model(text(1, CONTEXT + 1))
    with pytest.raises(ValueError, match="16 positions, 0 to 15; got 16"):
        model(text(1, 2), positions=torch.tensor([15, 16]))
    cache = model.make_cache(1, 40)
    model(text(1, 10), cache=cache)
    with pytest.raises(ValueError, match="16 positions; got 17"):
        model(text(1, 7), cache=cache)
    # and the refused call left the cache usable
    assert cache.length == 10
    model(text(1, 6), cache=cache)


def test_a_refused_call_leaves_the_cache_as_it_was() -> None:
    model, ids = tiny_gpt("mha"), text(2, 3)
    cache = model.make_cache(2, CONTEXT)
    for done in (0, 3):
        for far in (torch.arange(CONTEXT, CONTEXT + 3), torch.full((2, 3), CONTEXT)):
            with pytest.raises(ValueError, match="0 to 15; got"):
                model(ids, positions=far, cache=cache)
        step = model(ids, cache=cache).logits
        close(step, model(torch.cat([ids] * (1 + done // 3), 1)).logits[:, -3:])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mha"])
def test_other_encodings_reach_beyond_the_context(name: str) -> None:
    model = tiny_gpt(name)
    assert model.max_length is None
    assert model(text(1, 3 * CONTEXT)).logits.isfinite().all()


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_models_are_finite(name: str, dtype: torch.dtype) -> None:
    model, ids = tiny_gpt(name).to(dtype), text()
    out = model(ids, ids)
    assert out.logits.dtype == dtype
    assert out.loss.dtype == torch.float32
    assert out.logits.isfinite().all()
    cache = model.make_cache(2, CONTEXT)
    steps = torch.cat([model(part, cache=cache).logits for part in ids.split(4, 1)], 1)
    close(steps, out.logits, 0.1)


def test_dropout_acts_on_embedding_attention_and_residuals() -> None:
    model = tiny_gpt("rope", dropout=0.3)
    assert model.h[0].attn.dropout == 0.3
    rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    assert rates == {0.3}
    ids = text()
    still = model(ids).logits
    assert torch.equal(still, model(ids).logits)
    differs(model.train()(ids).logits, still)
    options = {"dropout": 0.0}
    assert tiny_gpt("rope", dropout=0.3, attention_options=options).h[0].attn.dropout == 0.0


def test_moh_averages_the_balance_loss_over_layers() -> None:
    model, ids = tiny_gpt("moh", layers=3), text()
    losses: list[Tensor] = []
    for block in model.h:
        block.attn.router.register_forward_hook(lambda m, i, out: losses.append(out[1]))
    out = model(ids)
    assert len(losses) == 3
    close(out.aux_loss, sum(losses) / 3)


@pytest.mark.parametrize("name", ["mha", "carope"])
def test_a_few_steps_learn_a_repeated_text(name: str) -> None:
    model = tiny_gpt(name, torch.float32).train()
    ids = torch.arange(CONTEXT).remainder(5).expand(4, CONTEXT)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = model(ids, ids.roll(-1, 1)).loss.item()
    for _ in range(30):
        optimiser.zero_grad()
        loss = model(ids, ids.roll(-1, 1)).loss
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.3 * first
