"""The parts at the sizes that features give them: parameters, and where they start."""

from typing import Any

import pytest
import torch

import posenc
from helpers import HEAD_DIM, HEADS, WIDTH, close, copy_shared, perturb, randn
from layer_oracle import convolve, place

GROUPS, LENGTH, REACH = 2, 9, 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def shapes(part: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in part.state_dict().items()}


def test_what_q_and_k_share_is_held_per_key_head() -> None:
    carope = posenc.CARoPE(WIDTH, HEADS, num_kv_heads=GROUPS, head_dim=8)
    assert shapes(carope) == {"weight": (WIDTH, GROUPS), "bias": (GROUPS,)}
    polar = posenc.Polar(HEADS, HEAD_DIM, num_kv_heads=GROUPS)
    assert shapes(polar) == {"delta": (GROUPS, HEAD_DIM // 2), "b": (HEADS, HEAD_DIM // 2)}


def test_two_sided_tables_have_a_row_for_each_distance() -> None:
    learned = posenc.Relative(HEADS, HEAD_DIM, max_distance=REACH, causal=False)
    rows = 2 * REACH - 1
    assert shapes(learned) == {
        "u": (HEADS, HEAD_DIM),
        "R": (HEADS, rows, HEAD_DIM),
        "S": (HEADS, rows),
    }
    sinusoidal = {"kind": "sinusoidal", "embed_dim": WIDTH}
    both = [posenc.Relative(HEADS, HEAD_DIM, causal=side, **sinusoidal) for side in (True, False)]
    assert shapes(both[0]) == shapes(both[1])


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, (3, HEAD_DIM)),
        ({"num_kv_heads": GROUPS}, (3, HEAD_DIM)),
        ({"per_head": True}, (3, HEADS, HEAD_DIM)),
        ({"per_head": True, "num_kv_heads": HEADS}, (3, HEADS, HEAD_DIM)),
        ({"per_head": True, "num_kv_heads": GROUPS}, (HEADS + 2 * GROUPS, HEAD_DIM)),
    ],
    ids=str,
)
def test_kernels_of_groups(options: dict[str, Any], channels: tuple[int, ...]) -> None:
    conv = posenc.DepthwiseConv(HEADS, HEAD_DIM, **options)
    assert shapes(conv) == {"weight": (*channels, 3), "bias": channels}


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize("groups", [HEADS, GROUPS])
def test_starts_put_their_weight_on_the_present(taps: int, causal: bool, groups: int) -> None:
    sizes = {"kernel_size": taps, "num_kv_heads": groups, "causal": causal, "per_head": True}
    present = taps - 1 if causal else (taps - 1) // 2
    q, (k, v) = randn(2, HEADS, LENGTH, HEAD_DIM), randn(2, 2, groups, LENGTH, HEAD_DIM)
    identity = posenc.DepthwiseConv(HEADS, HEAD_DIM, init="identity", **sizes).double()
    for before, after in zip((q, k, v), identity(q, k, v), strict=True):
        close(after, before, 0)
    primer = posenc.DepthwiseConv(HEADS, HEAD_DIM, init="primer", **sizes).double()
    expected = torch.full((taps,), 0.5 / taps).double()
    expected[present] = 0.5
    close(primer.weight, expected.expand(primer.weight.shape), 1e-6)
    perturb(primer)
    tokens = place(randn(2, LENGTH, WIDTH), None, None, None, causal, None)
    weight, bias = primer.weight.reshape(-1, HEAD_DIM, taps), primer.bias.reshape(-1, HEAD_DIM)
    rows = (HEADS, groups, groups)
    parts = zip((q, k, v), weight.split(rows), bias.split(rows), primer(q, k, v), strict=True)
    for z, w, shift, after in parts:
        close(after, convolve(z, w, shift, tokens))


@pytest.mark.parametrize("encoding", ["carope", "polar"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": GROUPS},
        {"head_dim": 8, "num_kv_heads": 1, "qk_norm": "rms"},
        {"window": 3},
        {"causal": False},
    ],
    ids=str,
)
def test_encodings_that_start_as_rope_do_so_in_every_layer(
    encoding: str, options: dict[str, Any]
) -> None:
    ours = posenc.attention("rope", WIDTH, HEADS, encoding=encoding, **options).double().eval()
    rope = perturb(posenc.attention("rope", WIDTH, HEADS, **options)).double().eval()
    copy_shared(rope, ours)
    x, mask = randn(2, LENGTH, WIDTH), torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, [0, 1, 4]] = mask[1, 7:] = False
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2)
    # the rate is fp32 until .double()
    close(ours(x), rope(x), 1e-5)
    close(ours(x, mask=mask)[mask], rope(x, mask=mask)[mask], 1e-5)
    close(ours(x, segments=segments), rope(x, segments=segments), 1e-5)


def test_norms_start_at_one_and_follow_a_reset() -> None:
    module = posenc.attention("rope", WIDTH, HEADS, qk_norm="rms")
    plain = shapes(posenc.attention("rope", WIDTH, HEADS))
    added = {name: shape for name, shape in shapes(module).items() if name not in plain}
    assert list(added.values()) == [(HEAD_DIM,), (HEAD_DIM,)]
    for _ in range(2):
        assert all((module.state_dict()[name] == 1).all() for name in added)
        perturb(module)
        module.reset_parameters()
