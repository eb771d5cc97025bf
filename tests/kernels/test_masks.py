"""Windows, segments and padding in the kernels, against definitions in fp64 that are written here
and form every logit: outputs, also of padded rows, and every gradient.

Tolerance: `helpers.as_exact`, beside the definition in the kernel's dtype.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from helpers import as_exact, outputs_and_gradients
from posenc.kernels import by_distance, carope, carope_attention, flash, routed
from posenc.kernels.biased_attention import biased_attention
from posenc.kernels.common import INTERPRETED
from posenc.kernels.flash import flash_attention
from posenc.kernels.mask import CAUSAL, Mask
from posenc.kernels.rope_attention import rope_attention
from posenc.kernels.routed import routed_attention

#: Small enough for short sequences to take many; the window leaves some of them empty.
TILE = 16
WINDOW = 20
HEADS, KEY_HEADS, DIM = 2, 1, 16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    config = flash.Config(TILE, TILE, 4, 1)
    for module in (flash, routed):
        monkeypatch.setattr(module, "CONFIGS", dict.fromkeys(module.CONFIGS, config))
    blocks = dict.fromkeys(by_distance.CONFIGS, by_distance.Config(TILE, TILE, 4, 1))
    monkeypatch.setattr(by_distance, "CONFIGS", blocks)
    monkeypatch.setattr(by_distance, "PROGRAMS", 5)
    monkeypatch.setattr(carope, "TILE", TILE * DIM // 2)


def segments(length, cuts, device):
    """first and last of two rows: one cut at `cuts`, one whole."""
    ends = [[*(c for c in cuts if c < length), length], [length]]
    rows = []
    for row in ends:
        starts = [0, *row[:-1]]
        lengths = torch.tensor([e - s for s, e in zip(starts, row, strict=True)])
        rows.append(
            [torch.tensor(x).repeat_interleave(lengths) for x in (starts, [e - 1 for e in row])]
        )
    first, last = (torch.stack(x).int().to(device) for x in zip(*rows, strict=True))
    return first, last


def mask_of(name, length, key_length, device):
    """A mask of two rows by the names of its parts."""
    parts = {}
    for part in name.split("+"):
        key = torch.arange(key_length, device=device)
        if part == "window":
            parts["window"] = WINDOW
        elif part == "segments":
            cuts = (5, 23, 24, 37)
            parts["first"], parts["last"] = segments(length, cuts, device)
        else:
            real = {
                "left": key >= key_length // 2 + 3,
                "right": key < key_length // 3,
                "middle": (key % 7 < 3) | (key > key_length // 2),
                "everywhere": key < 0,
            }[part]
            parts["real"] = torch.stack((real, key >= 0))
    return Mask(**parts)


MASKS = [
    "window",
    "segments",
    "left",
    "right",
    "middle",
    "everywhere",
    "window+segments",
    "window+middle",
    "segments+right",
    "window+segments+left",
]

#: Every way in which kernels differ that share their loops, and thereby their bounds, with "flash".
SOME = ["window", "segments", "window+middle", "window+segments+left"]


def visible(mask, length, key_length, device):
    """Which key every query sees: (B, T, S), or (1, T, S)."""
    m = torch.arange(length, device=device)[:, None] + key_length - length
    n = torch.arange(key_length, device=device)[None, :]
    seen = (n <= m)[None]
    if mask.window is not None:
        seen = seen & (m - n < mask.window)
    if mask.first is not None:
        seen = seen & (n >= mask.first[:, :, None])
    if mask.real is not None:
        seen = seen & (mask.real[:, None, :] | (n == m))
    return seen


def softmax_over_seen(scores, v, mask):
    """Attention by logits (B, H, T, S) over what the mask shows."""
    seen = visible(mask, *scores.shape[-2:], v.device)[:, None]
    return scores.masked_fill(~seen, -math.inf).softmax(-1).to(v.dtype) @ v


def of_query_heads(x, heads):
    """Key heads repeated for the query heads that share them."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def attention(q, k, v, mask):
    """As written, in the dtype of its arguments."""
    k, v = (of_query_heads(x, q.shape[1]) for x in (k, v))
    return softmax_over_seen(q @ k.mT / math.sqrt(q.shape[-1]), v, mask)


def draw(*shape, dtype, device):
    return torch.randn(*shape, device=device).to(dtype)


def qkv(length, key_length, dtype, device, heads=HEADS, key_heads=KEY_HEADS, dim=DIM):
    torch.manual_seed(length)
    sizes = (heads, length), (key_heads, key_length), (key_heads, key_length), (heads, length)
    *inputs, do = (draw(2, *size, dim, dtype=dtype, device=device) for size in sizes)
    return inputs, do


def check(kernel: Callable, definition: Callable, inputs: list[Tensor], do: Tensor):
    actual = outputs_and_gradients(kernel, inputs, do)
    plain = outputs_and_gradients(definition, inputs, do)
    exact = outputs_and_gradients(definition, [x.double() for x in inputs], do.double())
    as_exact(actual, plain, exact, terms=max(inputs[1].shape[2:]))


class Case(NamedTuple):
    """An op with a mask: its inputs from a length, dtype and device, itself, its definition."""

    inputs: Callable
    kernel: Callable
    definition: Callable


def same_length(length, dtype, device):
    return qkv(length, length, dtype, device)


def with_gates(length, dtype, device):
    """Half of the rows dropped, differently in every head."""
    (q, k, v), do = same_length(length, dtype, device)
    gates = 0.5 + torch.rand(q.shape[:-1], device=device)
    return [q, k, v, gates * (torch.rand(gates.shape, device=device) < 0.5)], do


def routed_definition(q, k, v, gates, mask):
    weights = (gates * (gates != 0)).unsqueeze(-1)  # no gradient for what is dropped
    return attention(q, k, v, mask) * weights.to(q.dtype)


def straight_through(*x, **options):
    return routed_attention(*x, straight_through=True, **options)


def straight_definition(q, k, v, gates, mask):
    return attention(q, k, v, mask) * gates.unsqueeze(-1).to(q.dtype)


def turned(x, phases):
    """Pairs (i, i + D/2) of x turned by phases (.., T, D/2), in the dtype of x."""
    cos, sin = phases.cos().to(x.dtype), phases.sin().to(x.dtype)
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def rope_arguments(mask, length, device):
    """Frequencies, and positions (B, T) that begin anew with every segment."""
    frequencies = 100.0 ** -torch.linspace(0, 1, DIM // 2, dtype=torch.float64, device=device)
    positions = torch.arange(length, device=device).expand(2, length)
    return frequencies, positions if mask.first is None else positions - mask.first


def rope_kernel(q, k, v, mask, **options):
    arguments = rope_arguments(mask, q.shape[2], q.device)
    return rope_attention(q, k, v, *arguments, mask=mask, **options)


def rope_definition(q, k, v, mask):
    frequencies, positions = rope_arguments(mask, q.shape[2], q.device)
    phases = positions[:, None, :, None] * frequencies
    return attention(turned(q, phases), turned(k, phases), v, mask)


def with_rates(length, dtype, device):
    (q, k, v), do = same_length(length, dtype, device)
    return [q, k, v, -0.5 * torch.rand(k.shape[:-1], device=device)], do


def standing(log_rates, mask):
    """Padding does not turn."""
    if mask.real is not None:
        log_rates = log_rates.masked_fill(~mask.real[:, None], -math.inf)
    return log_rates


def carope_kernel(q, k, v, log_rates, mask, **options):
    arguments = (q, k, v, standing(log_rates, mask))
    return carope_attention.carope_attention(*arguments, first_power=1, mask=mask, **options)


def carope_definition(q, k, v, log_rates, mask):
    powers = torch.arange(1, DIM // 2 + 1, device=q.device)
    rates = standing(log_rates, mask).double().unsqueeze(-1)
    phases = (powers * rates).exp().cumsum(2)
    query = turned(q, of_query_heads(phases, q.shape[1]))
    return attention(query, turned(k, phases), v, mask)


def with_biases(length, dtype, device):
    """A decay and a table of distances."""
    (q, k, v), do = same_length(length, dtype, device)
    gates = -torch.rand(q.shape[:-1], device=device)
    return [q, k, v, gates.cumsum(-1), torch.randn(q.shape[1], length, device=device)], do


def biased_definition(q, k, v, decay, table, mask):
    k, v = (of_query_heads(x, q.shape[1]) for x in (k, v))
    index = torch.arange(q.shape[2], device=q.device)
    bias = decay.unsqueeze(-1) - decay.unsqueeze(-2) + table[:, (index[:, None] - index).abs()]
    return softmax_over_seen(q @ k.mT / math.sqrt(q.shape[-1]) + bias, v, mask)


CASES = {
    "rope": Case(same_length, rope_kernel, rope_definition),
    "carope": Case(with_rates, carope_kernel, carope_definition),
    "biased": Case(with_biases, biased_attention, biased_definition),
    "flash": Case(same_length, flash_attention, attention),
    "routed": Case(with_gates, routed_attention, routed_definition),
}


def run(case, name, length, dtype, deterministic, device):
    inputs, do = case.inputs(length, dtype, device)
    mask = mask_of(name, length, length, device)
    check(
        lambda *x: case.kernel(*x, mask=mask, deterministic=deterministic),
        lambda *x: case.definition(*x, mask),
        inputs,
        do,
    )


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in CASES for name in (MASKS if case == "flash" else SOME)],
)
def test_outputs_and_gradients(case, name, device):
    run(CASES[case], name, 63, torch.float32, True, device)


@pytest.mark.parametrize("name", ["window+segments+left"] + ["right"] * (not INTERPRETED))
@pytest.mark.parametrize("case", CASES)
def test_half_precision_and_atomics(case, name, device):
    run(CASES[case], name, 65, torch.float16, False, device)


def test_gradients_of_rates_pass_through_the_core(device):
    (q, *_), _ = same_length(2, torch.float32, device)
    assert carope_attention.fits(q, 1)


@pytest.mark.parametrize("deterministic", [True, False])
def test_straight_through_gates(deterministic, device):
    case = Case(with_gates, straight_through, straight_definition)
    run(case, "window+segments+left", 40, torch.float32, deterministic, device)


@pytest.mark.parametrize("length", [1, 7, 130])
def test_lengths(length, device):
    run(CASES["flash"], "window+segments+middle", length, torch.float32, True, device)


@pytest.mark.parametrize("length", [1, 17, 40])
@pytest.mark.parametrize("name", ["window", "left", "window+right"])
def test_fewer_queries_than_keys(name, length, device):
    inputs, do = qkv(length, 93, torch.float32, device)
    mask = mask_of(name, length, 93, device)
    check(
        lambda *x: flash_attention(*x, mask=mask),
        lambda *x: attention(*x, mask),
        inputs,
        do,
    )


@pytest.mark.parametrize("name", ["window", "window+segments+middle"])
def test_tiles_of_the_table(name, monkeypatch, device):
    monkeypatch.undo()
    inputs, do = qkv(140, 140, torch.float16, device, 1, 1, 64)
    mask = mask_of(name, 140, 140, device)
    check(
        lambda *x: flash_attention(*x, mask=mask),
        lambda *x: attention(*x, mask),
        inputs,
        do,
    )


def test_a_mask_that_hides_nothing_changes_nothing(device):
    # One query head a key head: how their tiles are interleaved in dk and dv depends on the mask.
    inputs, do = qkv(50, 50, torch.float32, device, 1, 1)
    first, last = segments(50, (), device)
    real = torch.ones(2, 50, dtype=torch.bool, device=device)
    plain = outputs_and_gradients(flash_attention, inputs, do)
    for mask in (Mask(window=50), Mask(first=first, last=last), Mask(real=real)):
        masked = outputs_and_gradients(lambda *x, m=mask: flash_attention(*x, mask=m), inputs, do)
        for a, b in zip(masked, plain, strict=True):
            assert torch.equal(a, b)


def test_a_window_of_one_is_the_value(device):
    (q, k, v), _ = qkv(40, 40, torch.float32, device)
    y = flash_attention(q, k, v, mask=Mask(window=1))
    torch.testing.assert_close(y, of_query_heads(v, HEADS))


#: By mask: tokens whose keys and values hold NaN, the first query and key that must not notice;
#: tokens whose outer gradient does, and the last key that must not notice.
PLANTED = {
    "window": (slice(0, 16), 48, slice(64, 96), 32),
    "segments": (slice(0, 32), 48, slice(64, 96), 32),
    "left": (slice(0, 32), 64, None, None),
    "right": (slice(48, 64), 64, slice(64, 96), None),
}


def planted_mask(name, length, device):
    key = torch.arange(length, device=device)
    if name == "window":
        return Mask(window=WINDOW)
    if name == "segments":
        first, last = segments(length, (20, 40, 61), device)
        return Mask(first=first[:1], last=last[:1])
    return Mask(real=(key >= 36 if name == "left" else key < 36)[None])


def planted(kernel, q, k, v, do, name, device):
    """Whether what lies outside is read: one row of 96 tokens in tiles of 16."""
    mask = planted_mask(name, q.shape[2], device)
    keys, from_here, gradients, up_to = PLANTED[name]

    def results(k, v, do):
        return outputs_and_gradients(lambda *x: kernel(*x, mask=mask), [q, k, v], do)

    clean = results(k, v, do)
    assert all(x.isfinite().all() for x in clean)
    bad_k, bad_v, bad_do = k.clone(), v.clone(), do.clone()
    bad_k[:, :, keys], bad_v[:, :, keys] = math.nan, math.nan
    # Rows that do meet the NaN must not hand it on to the keys that are compared.
    hit = results(bad_k, bad_v, do)
    assert not hit[0].isfinite().all()  # it is there
    for a, b in zip(hit, clean, strict=True):
        assert torch.equal(a[:, :, from_here:], b[:, :, from_here:])
    if gradients is not None and up_to is not None:
        bad_do[:, :, gradients] = math.nan
        hit = results(k, v, bad_do)
        for a, b in zip(hit[2:], clean[2:], strict=True):
            assert torch.equal(a[:, :, :up_to], b[:, :, :up_to])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows that do meet NaN
@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("op", ["flash", "routed"])
def test_tiles_that_the_mask_empties_are_not_read(op, name, device):
    (q, k, v), do = qkv(96, 96, torch.float32, device, 1, 1)

    def gated(q, k, v, **options):
        # One tile of rows is dropped: tiles of kept rows then end where those of all rows do.
        gates = (torch.arange(96, device=device) >= TILE).float().expand(1, 1, 96)
        return routed_attention(q, k, v, gates, **options)

    kernel = {"flash": flash_attention, "routed": gated}[op]
    planted(kernel, *(x[:1] for x in (q, k, v, do)), name, device)


def bad_masks(device):
    first, last = segments(6, (2,), device)
    real = torch.ones(2, 6, dtype=torch.bool, device=device)
    return {
        "at least 1": Mask(window=0),
        "got one": Mask(first=first),
        "first must be int32": Mask(first=first.long(), last=last),
        "last must be int32": Mask(first=first, last=last[:1]),
        "real must be bool": Mask(real=real.int()),
        r"real must be bool \(2, 6\)": Mask(real=real[:, :5]),
    }


@pytest.mark.parametrize("message", bad_masks("cpu"))
def test_masks_that_cannot_be(message, device):
    x = torch.zeros(2, 1, 6, 16, device=device)
    with pytest.raises(ValueError, match=message):
        flash_attention(x, x, x, mask=bad_masks(device)[message])


def test_segments_need_all_queries(device):
    first, last = segments(4, (2,), device)
    k = torch.zeros(2, 1, 6, 16, device=device)
    with pytest.raises(ValueError, match="T=4, S=6"):
        flash_attention(k[:, :, 2:], k, k, mask=Mask(first=first, last=last))


def test_opcheck(device):
    (q, k, v), do = qkv(20, 20, torch.float32, device)
    mask = mask_of("window+segments+left", 20, 20, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(flash._forward_op, (*leaves, 0.25, True, *mask))
    o, lse = flash._forward_op(q, k, v, 0.25, None, *mask)
    saved = [x.detach() for x in (do, q, k, v, o, lse)]
    torch.library.opcheck(flash._backward_op, (*saved, 0.25, None, *mask))


def test_compiled(device):
    torch._dynamo.reset()
    inputs, do = qkv(20, 20, torch.float32, device)
    mask = mask_of("window+segments+left", 20, 20, device)

    def attention(*x):
        return flash_attention(*x, mask=mask)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    eager = outputs_and_gradients(attention, inputs, do)
    for a, b in zip(outputs_and_gradients(compiled, inputs, do), eager, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(eager[0], flash_attention(*inputs, mask=CAUSAL))
