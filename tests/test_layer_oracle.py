"""Self-checks of the layer's oracle: torch's own functions, and identities between features."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import oracles
from helpers import close, differs, randn
from layer_oracle import attention_layer, convolve, heads_of_keys, place, rms_norm

B, T, C, H, G, D, TAPS, REACH = 2, 8, 12, 4, 2, 4, 3, 3


def part(class_name: str, **options: Any) -> Any:
    """What the oracle knows of an encoding: the name of its class, and its options."""
    return type(class_name, (SimpleNamespace,), {})(**options)


ENCODINGS: dict[str, Any] = {
    "nope": part("NoPE"),
    "rope": part("RoPE", scaling=None, base=100.0, pairing="half", rotary_dim=None),
    "carope": part("CARoPE", first_power=0),
    "polar": part("Polar", init="rope", base=100.0),
    "learned": part("Relative", kind="learned"),
    "sinusoidal": part("Relative", kind="sinusoidal"),
}
ROUTER = SimpleNamespace(router="linear", shared=1, top_k=2, scaling="authors", aux_scale="paper")
EVERY = pytest.mark.parametrize("encoding", ENCODINGS)
CONV = pytest.mark.parametrize("conv", [False, True], ids=["plain", "conv"])
SIDES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def draw(groups: int = H, conv: bool = False, causal: bool = True) -> dict[str, Tensor]:
    """Weights of a layer that holds any of the encodings."""
    rows = REACH if causal else 2 * REACH - 1
    channels = (3, H, D) if groups == H else (H + 2 * groups, D)
    weights = {
        "c_attn.weight": randn((H + 2 * groups) * D, C) / 2,
        "c_attn.bias": randn((H + 2 * groups) * D) / 2,
        "c_proj.weight": randn(C, H * D) / 2,
        "c_proj.bias": randn(C),
        "q_norm.weight": randn(D),
        "k_norm.weight": randn(D),
        "encoding.weight": randn(C, groups),
        "encoding.bias": randn(groups),
        "encoding.delta": randn(groups, D // 2),
        "encoding.b": randn(H, D // 2),
        "encoding.u": randn(H, D),
        "encoding.v": randn(H, D),
        "encoding.R": randn(H, rows, D),
        "encoding.S": randn(H, rows),
        "encoding.W_R.weight": randn(H * D, C),
        "router.W_r.weight": randn(H - 1, C),
        "router.W_h.weight": randn(2, C),
    }
    if conv:
        weights |= {"conv.weight": randn(*channels, TAPS), "conv.bias": randn(*channels)}
    return weights


def run(x: Tensor, weights: dict[str, Tensor], encoding: str, **features: Any) -> Tensor:
    sizes = {"num_heads": H, "head_dim": D, "encoding": ENCODINGS[encoding], "router": ROUTER}
    return attention_layer(x, weights, **sizes | features)[0]


@SIDES
def test_plain_layer_is_torch_multihead_attention(causal: bool) -> None:
    x, weights = randn(B, T, C), [randn(C, C) for _ in range(4)]
    named = {"c_attn.weight": torch.cat(weights[:3]), "c_proj.weight": weights[3]}
    y, aux = attention_layer(x, named, num_heads=H, encoding=ENCODINGS["nope"], causal=causal)
    future = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None
    torch_options = {"attn_mask": future, "need_weights": False}
    none = (None, None, False, 0.0)
    expected, _ = F.multi_head_attention_forward(
        *[x.transpose(0, 1)] * 3,
        *(C, H, named["c_attn.weight"], None, *none, weights[3], None),
        **torch_options,
    )
    close(y, expected.transpose(0, 1))
    assert aux == 0


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
@SIDES
def test_convolution_is_torch_conv1d(taps: int, causal: bool) -> None:
    z, w, bias = randn(B, H, T, D), randn(H, D, taps), randn(H, D)
    channels = z.transpose(2, 3).reshape(B, H * D, T)
    if causal:
        channels = F.pad(channels, (taps - 1, 0))
    else:
        channels = F.pad(channels, ((taps - 1) // 2, taps // 2))
    expected = F.conv1d(channels, w.reshape(H * D, 1, taps), bias.reshape(-1), groups=H * D)
    tokens = place(z[:, 0], None, None, None, causal, None)
    close(convolve(z, w, bias, tokens), expected.reshape(B, H, D, T).transpose(2, 3))
    if causal:
        close(convolve(z, w, bias, tokens), oracles.depthwise_conv(z, w, bias))


def test_norm_is_torch_rms_norm() -> None:
    z, weight = randn(B, H, T, D), randn(D)
    close(rms_norm(z, weight), F.rms_norm(z, (D,), weight, 1e-6))


def test_query_heads_read_their_group() -> None:
    assert heads_of_keys(6, 2) == [0, 0, 0, 1, 1, 1]
    assert heads_of_keys(4, 4) == [0, 1, 2, 3]
    assert heads_of_keys(3, 1) == [0, 0, 0]


def test_visible_tokens_by_hand() -> None:
    mask = torch.tensor([[True, True, False, True, True, True]])
    segments = torch.tensor([[0, 0, 0, 0, 1, 1]])
    x = randn(1, 6, C)

    def seen(causal: bool, window: int | None) -> list[str]:
        tokens = place(x, None, mask, segments, causal, window)
        return ["".join(str(n) for n in range(6) if tokens.sees(0, m, n)) for m in range(6)]

    assert seen(True, None) == ["0", "01", "2", "013", "4", "45"]
    assert seen(True, 3) == ["0", "01", "2", "13", "4", "45"]
    assert seen(False, None) == ["013", "013", "2", "013", "45", "45"]
    assert seen(False, 3) == ["01", "013", "2", "13", "45", "45"]
    assert seen(True, 1) == seen(False, 1) == list("012345")
    assert place(x, None, mask, segments, True, None).positions[0, [0, 1, 3, 4, 5]].tolist() == [
        *(0, 1, 2),
        *(0, 1),
    ]


@EVERY
@CONV
@SIDES
def test_packed_documents_are_documents_alone(encoding: str, conv: bool, causal: bool) -> None:
    x, weights = randn(B, T, C), draw(G, conv, causal)
    features = {"num_kv_heads": G, "qk_norm": "rms", "causal": causal, "window": 3}
    y = run(x, weights, encoding, segments=torch.tensor([[4, 4, 4, 0, 9, 9, 9, 9]] * B), **features)
    for start, stop in pairwise((0, 3, 4, 8)):
        close(y[:, start:stop], run(x[:, start:stop], weights, encoding, **features))


@EVERY
@CONV
@SIDES
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_rows_alone(encoding: str, conv: bool, causal: bool, side: str) -> None:
    x, weights = randn(B, T, C), draw(G, conv, causal)
    features = {"num_kv_heads": G, "causal": causal, "window": 3}
    real = slice(3, T) if side == "left" else slice(0, T - 3)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[:, real] = True
    y = run(x, weights, encoding, mask=mask, **features)
    close(y[:, real], run(x[:, real], weights, encoding, **features))


@EVERY
@SIDES
def test_padding_within_a_row_is_as_if_cut_out(encoding: str, causal: bool) -> None:
    """Without a window or a convolution, which count tokens of the row."""
    x, weights = randn(B, T, C), draw(causal=causal)
    mask = torch.tensor([[True, False, True, True, False, False, True, True]] * B)
    y = run(x, weights, encoding, mask=mask, causal=causal)
    close(y[:, mask[0]], run(x[:, mask[0]], weights, encoding, causal=causal))


@EVERY
@CONV
def test_groups_are_repeated_key_heads(encoding: str, conv: bool) -> None:
    x, weights = randn(B, T, C), draw(G, conv)
    repeated = dict(weights)
    for name in ("c_attn.weight", "c_attn.bias", "conv.weight", "conv.bias"):
        if name in weights:
            q, k, v = weights[name].unflatten(0, (H + 2 * G, -1)).split((H, G, G))
            whole = torch.cat([q, k.repeat_interleave(H // G, 0), v.repeat_interleave(H // G, 0)])
            repeated[name] = whole.flatten(0, 1)
            if name.startswith("conv"):
                repeated[name] = whole.reshape(3, H, D, *weights[name].shape[2:])
    for name, dim in (("weight", 1), ("bias", 0), ("delta", 0)):
        repeated[f"encoding.{name}"] = weights[f"encoding.{name}"].repeat_interleave(H // G, dim)
    close(run(x, weights, encoding, num_kv_heads=G), run(x, repeated, encoding))


@EVERY
@SIDES
def test_wide_windows_are_none_and_the_narrowest_shows_a_token_itself(
    encoding: str, causal: bool
) -> None:
    x, weights = randn(B, T, C), draw(causal=causal)
    whole = run(x, weights, encoding, causal=causal)
    close(run(x, weights, encoding, causal=causal, window=T), whole)
    differs(run(x, weights, encoding, causal=causal, window=T - 1), whole, 1e-8)
    alone = run(x, weights, encoding, causal=causal, window=1)
    close(alone, run(x, weights, encoding, causal=causal, segments=torch.arange(T).expand(B, T)))


@EVERY
@SIDES
def test_shift_of_all_positions_changes_nothing(encoding: str, causal: bool) -> None:
    x, weights, where = randn(B, T, C), draw(causal=causal), torch.arange(T)
    whole = run(x, weights, encoding, causal=causal)
    close(run(x, weights, encoding, causal=causal, positions=where + 7), whole)
    close(run(x, weights, encoding, causal=causal, positions=(where + 7).expand(B, T)), whole)


@pytest.mark.parametrize("encoding", ["learned", "sinusoidal", "polar", "rope"])
def test_two_sided_last_token_is_the_causal_one(encoding: str) -> None:
    """The last token of a row sees the same keys both ways, at distances of 0 and up."""
    x, both = randn(B, T, C), draw(causal=False)
    ahead = {name: both[f"encoding.{name}"][:, REACH - 1 :] for name in "RS"}
    one = both | {f"encoding.{name}": table for name, table in ahead.items()}
    close(run(x, both, encoding, causal=False)[:, -1], run(x, one, encoding)[:, -1])
    differs(run(x, both, encoding, causal=False)[:, 0], run(x, one, encoding)[:, 0])


def test_two_sided_sinusoid_is_its_own_table() -> None:
    x, weights = randn(B, T, C), draw(causal=False)
    W_R, v = weights["encoding.W_R.weight"], weights["encoding.v"]
    R = oracles.relative_rows(W_R, range(1 - T, T), H)
    table = {"encoding.R": R, "encoding.S": (v[:, None] * R).sum(-1)}
    expected = run(x, weights, "sinusoidal", causal=False)
    close(run(x, weights | table, "learned", causal=False), expected)


def test_two_sided_table_clamps_on_both_sides() -> None:
    x, weights = randn(B, T, C), draw(causal=False)
    wide = {
        name: torch.cat([w[:, :1]] * 9 + [w] + [w[:, -1:]] * 9, 1)
        for name, w in weights.items()
        if name in ("encoding.R", "encoding.S")
    }
    expected = run(x, weights, "learned", causal=False)
    close(run(x, weights | wide, "learned", causal=False), expected)


def test_balance_loss_counts_real_tokens() -> None:
    x, weights, mask = randn(1, T, C), draw(), torch.arange(T)[None] >= 3
    sizes = {"num_heads": H, "head_dim": D, "encoding": ENCODINGS["nope"], "router": ROUTER}
    close(
        attention_layer(x, weights, mask=mask, **sizes)[1],
        attention_layer(x[:, 3:], weights, **sizes)[1],
    )
