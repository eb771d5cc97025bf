"""Biases of the distance alone (ALiBi, T5, KERPLE), FIRE's of position too, FoX's decays."""

import copy
import math

import pytest
import torch
from torch import Tensor

import posenc
from helpers import HEADS, WIDTH, attend, close, copy_shared, differs, randn
from posenc.encodings.alibi import slopes
from posenc.encodings.t5 import bucket
from posenc.placement import place
from posenc.scores import Decay, Scores, diagonals

ALL = slice(None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer(name: str, **options: object) -> posenc.Attention:
    return posenc.attention(name, WIDTH, HEADS, **options).double()


def twins(name: str, other: str, **options: object) -> tuple[posenc.Attention, posenc.Attention]:
    """A layer, and one of another name with the same projections."""
    first, second = layer(name, **options), layer(other)
    copy_shared(first, second)
    return first, second


# ALiBi


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (8, [2**-h for h in range(1, 9)]),
        (12, [*(2**-h for h in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
    ],
)
def test_slopes_are_the_authors(heads: int, expected: list[float]) -> None:
    assert slopes(heads) == pytest.approx(expected, abs=0)


def test_alibi_falls_by_its_slope_a_token() -> None:
    bias = posenc.ALiBi(12).score_bias(torch.arange(7), torch.arange(9))
    assert bias.shape == (1, 12, 7, 9)
    for h, slope in enumerate(slopes(12)):
        close(bias[0, h, 6, :7], -slope * torch.arange(6, -1, -1.0).double())
        close(bias[0, h, 2, 3:], -slope * torch.arange(1, 7.0).double())  # two-sided: |d|
    far = posenc.ALiBi(8).score_bias(torch.tensor([1_000_003]), torch.tensor([1_000_000]))
    close(far[0, :, 0, 0], -3 * torch.tensor(slopes(8)).double())


def test_alibi_of_a_key_alone_is_the_same_attention() -> None:
    """The authors add s_h n, which a causal softmax does not tell from -s_h (m - n)."""
    alibi = posenc.ALiBi(HEADS)
    q, k, v = (randn(2, HEADS, 9, 6) for _ in range(3))
    of_keys = torch.tensor(slopes(HEADS)).double()[:, None, None] * torch.arange(9)
    ours = attend(q, k, v, alibi.scores(place(2, 9, q.device), q))
    close(ours, attend(q, k, v, Scores(bias=of_keys)))


# T5


def test_buckets_are_those_of_the_definition() -> None:
    d = torch.tensor([-5, 0, 15, 16, 18, 19, 31, 63, 112, 113, 10**6])
    expected = [0, 0, 15, 16, 16, 17, 21, 26, 30, 31, 31]
    assert bucket(d, 32, 128).tolist() == expected


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (32, 256), (16, 64), (8, 64), (64, 1024)])
def test_buckets_are_those_of_transformers(causal: bool, buckets: int, far: int) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    d = torch.arange(-3000, 3001)
    theirs = t5.T5Attention._relative_position_bucket(-d, not causal, buckets, far)
    assert torch.equal(bucket(d, buckets, far, causal), theirs)


def test_an_empty_table_is_no_encoding() -> None:
    t5, nope = twins("t5", "nope")
    x = randn(2, 9, WIDTH)
    differs(t5(x), nope(x))
    torch.nn.init.zeros_(t5.encoding.table)
    close(t5(x), nope(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": 7}, "buckets divisible by 2; got 7"),
        ({"buckets": 6, "causal": False}, "divisible by 4 where not causal; got 6"),
        ({"buckets": 0}, "buckets"),
        ({"buckets": 32, "max_distance": 16}, "above its 16 exact buckets; got 16"),
    ],
)
def test_buckets_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posenc.T5(HEADS, **options)


# KERPLE


def test_kerple_of_power_one_is_alibi() -> None:
    kerple, d = posenc.Kerple(6, kind="power").double(), torch.arange(-3, 200)
    with torch.no_grad():
        kerple.r1.copy_(torch.tensor(slopes(8)[:6]))  # the last two are below 0.01
        kerple.r2.fill_(1)
    close(kerple.of_distance(d), posenc.ALiBi(8).of_distance(d)[:6])


@pytest.mark.parametrize("kind", ["log", "power"])
def test_kerple_falls_from_zero(kind: str) -> None:
    bias = posenc.Kerple(5, kind=kind).of_distance(torch.arange(200))
    assert (bias[:, 0] == 0).all()
    assert (bias.diff(dim=1) < 0).all()


@pytest.mark.parametrize("kind", ["log", "power"])
def test_kerple_is_clamped_where_it_is_used(kind: str) -> None:
    kerple = posenc.Kerple(1, kind=kind)
    with torch.no_grad():
        kerple.r1.fill_(-3)
        kerple.r2.fill_(9)
    bias = kerple.of_distance(torch.tensor([0, 3]))
    expected = -0.01 * (3**2 if kind == "power" else math.log1p(9 * 3))
    close(bias[0], torch.tensor([0.0, expected]), 1e-6)
    bias.sum().backward()
    assert kerple.r1.item() == -3  # a write would break compilation and recomputation
    assert kerple.r1.grad.item() != 0
    assert kerple.r2.grad.isfinite().all()
    assert kerple.r2.grad.item() != 0


def test_kerple_refuses_other_kinds() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'power'"):
        posenc.Kerple(HEADS, kind="powers")


# FIRE


def test_fire_counts_from_the_position_beyond_its_length() -> None:
    fire = posenc.FIRE(HEADS, length=64).double()

    def bias(start: int) -> Tensor:
        return fire.score_bias(torch.arange(start, start + 9), torch.arange(start, start + 9))

    close(bias(40), bias(0))
    differs(bias(60), bias(0))
    differs(bias(10**6), bias(0))


def test_fire_says_nothing_by_its_last_bias() -> None:
    fire, x = layer("fire", length=5), randn(2, 9, WIDTH)
    before = fire(x)
    with torch.no_grad():
        fire.encoding.b2.add_(3)
    close(fire(x), before)


def test_fire_takes_the_length_of_its_model() -> None:
    config = posenc.GPTConfig(
        vocab_size=29, context=31, layers=1, heads=2, embed_dim=8, attention="fire"
    )
    assert posenc.GPT(config).h[0].attn.encoding.length == 31
    assert layer("fire").encoding.length == 512
    with pytest.raises(ValueError, match="length"):
        posenc.FIRE(2, length=0)


# FoX


def test_fox_of_constant_gates_is_a_linear_bias() -> None:
    fox = layer("fox")
    with torch.no_grad():
        fox.encoding.weight.zero_()
        fox.encoding.bias.copy_(torch.tensor([3.0, 1.0, 0.0, -2.0]))
    slope = -torch.nn.functional.logsigmoid(fox.encoding.bias)
    bias = fox.encoding.score_bias(torch.arange(4, 9), torch.arange(9), randn(1, 9, WIDTH))
    apart = torch.arange(4, 9)[:, None] - torch.arange(9)
    close(bias[0], (-slope[:, None, None] * apart).detach())


def test_fox_that_forgets_nothing_is_no_encoding() -> None:
    fox, nope = twins("fox", "nope")
    x = randn(2, 9, WIDTH)
    differs(fox(x), nope(x))
    torch.nn.init.constant_(fox.encoding.bias, 60)
    close(fox(x), nope(x), 1e-9)


def test_fox_leaves_out_the_gate_of_the_key() -> None:
    """Closing one token's gate hides what lies before it, not itself."""
    fox, x = posenc.FoX(2, 1).double(), torch.zeros(1, 5, 2, dtype=torch.float64)
    x[0, 2, 0] = 1
    with torch.no_grad():
        fox.weight.copy_(torch.tensor([[-50.0], [0.0]]))
        fox.bias.fill_(50)
    bias = fox.score_bias(torch.arange(5), torch.arange(5), x)[0, 0]
    assert bias[4, :2].max() < -0.6
    assert bias[4, 2:].abs().max() < 1e-20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fox_is_precise_after_a_million_tokens(dtype: torch.dtype) -> None:
    fox, length = posenc.FoX(4, 2), 1_000_000
    x = torch.randn(1, length, 4).to(dtype)
    with torch.no_grad():
        bias = fox.scores(place(1, length, x.device), x).bias
        assert isinstance(bias, Decay)
        last = slice(length - 40, length)
        actual = bias(last, last)
        lost = (
            torch.nn.functional.logsigmoid(
                x[0, last].double() @ fox.weight.double() + fox.bias.double()
            )
            .cumsum(0)
            .T
        )
    expected = lost.unsqueeze(-1) - lost.unsqueeze(-2)
    assert actual.dtype == torch.float32
    close(actual[0].double(), expected, 2e-6)
    since, until = bias.in_two(slice(length - 20, length), slice(length - 40, length - 20))
    close((since + until)[0].double(), expected[:, 20:, :20], 2e-6)


def test_fox_needs_the_tokens() -> None:
    fox = posenc.FoX(WIDTH, HEADS)
    with pytest.raises(ValueError, match=r"x of shape \(B, 5, 24\), of all keys; got None"):
        fox.score_bias(torch.arange(3), torch.arange(5))
    with pytest.raises(ValueError, match=r"x of shape \(B, 3, 24\), of all keys; got None"):
        fox.score_mod(randn(1, HEADS, 3, 6), randn(1, HEADS, 3, 6), torch.arange(3))


def test_fox_in_blocks_is_as_exact_as_dense() -> None:
    """Gates that forget much in a block of rows: each difference is rounded by itself."""
    fox = posenc.attention("fox", 64, 4)
    with torch.no_grad():
        fox.encoding.weight.normal_(std=0.5)
    x = torch.randn(1, 300, 64) * 3
    exact = copy.deepcopy(fox).double()
    exact.impl = "reference"
    close(fox(x).double(), exact(x.double()), 2e-6)


@pytest.mark.parametrize("name", ["fox", "path"])
def test_closures_know_padding_and_keys_of_their_own(name: str) -> None:
    encoding = layer(name).encoding
    positions = torch.tensor([[0, 1, 2, -1, -1, 3, 4, 5, 6]])
    q, k, x = randn(1, HEADS, 9, 6), randn(1, HEADS, 9, 6), randn(1, 9, WIDTH)
    whole = encoding.score_mod(q, k, positions, x=x)
    real = [0, 1, 2, 5, 6, 7, 8]
    alone = encoding.score_mod(q[:, :, real], k[:, :, real], torch.arange(7), x=x[:, real])
    last = encoding.score_mod(q[:, :, 6:], k, positions[:, 6:], positions, x=x)
    zero = torch.tensor(0)
    for i, j in ((6, 2), (5, 3), (4, 4)):
        score = q[0, 1, real[i]] @ k[0, 1, real[j]] / 6**0.5
        at = (score, zero, torch.tensor(1))
        expected = whole(*at, torch.tensor(real[i]), torch.tensor(real[j]))
        if name == "fox":  # PaTH's taps read zeros at padding
            close(expected, alone(*at, torch.tensor(i), torch.tensor(j)))
        if real[i] >= 6:
            close(last(*at, torch.tensor(real[i] - 6), torch.tensor(real[j])), expected)


# What they are made of


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (2, 1), (3, 5), (7, 2)])
def test_diagonals_are_constant(rows: int, columns: int) -> None:
    values = randn(2, rows + columns - 1).requires_grad_()
    made = diagonals(values, rows, columns)
    assert made.shape == (2, rows, columns)
    for i in range(rows):
        for n in range(columns):
            assert torch.equal(made[:, i, n], values[:, rows - 1 - i + n])
    probe = randn(*made.shape)
    (gradient,) = torch.autograd.grad((made * probe).sum(), values)
    index = torch.arange(rows - 1, -1, -1)[:, None] + torch.arange(columns)
    expected = torch.zeros_like(values)
    for h in range(2):
        expected[h].index_put_((index,), probe[h], accumulate=True)
    close(gradient, expected)


@pytest.mark.parametrize("name", ["alibi", "t5", "kerple", "fire", "fox"])
def test_flex_attention_takes_the_same_bias(name: str) -> None:
    module = layer(name)
    q, k, x = randn(2, HEADS, 5, 6), randn(2, HEADS, 5, 6), randn(2, 5, WIDTH)
    change = module.encoding.score_mod(q, k, torch.arange(5), x=x)
    bias = module.encoding.score_bias(torch.arange(5), torch.arange(5), x)
    score = randn(())
    for b, h, m, n in ((0, 0, 4, 1), (1, 3, 2, 2)):
        changed = change(score, *map(torch.tensor, (b, h, m, n)))
        close(changed, score + bias[b if len(bias) > 1 else 0, h, m, n].double())
