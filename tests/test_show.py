"""posenc.show: what is measured of a scheme, and what is refused."""

import math
from pathlib import Path

import pytest
import torch

import posenc
from helpers import NAMES, close
from posenc import show
from posenc.encodings.alibi import slopes
from posenc.phase import inverse_frequencies

SMALL = {"embed_dim": 24, "heads": 4, "length": 9, "texts": 2}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_looked_at(name: str) -> None:
    seen = show.look(name, **SMALL)
    assert seen.equal.shape == seen.random.shape == (4, 9)
    assert seen.equal.isfinite().all()
    assert seen.random[:, 1:].isfinite().all()
    assert torch.equal(seen.one.isnan(), torch.ones(9, 9, dtype=torch.bool).triu(1))


@pytest.mark.parametrize(("name", "panels"), [("nope", 3), ("t5", 4), ("carope", 4)])
def test_panels_are_those_that_there_are(name: str, panels: int) -> None:
    titles = [axes.get_title() for axes in show.figure(show.look(name, **SMALL)).axes]
    assert sum(map(bool, titles)) == panels


def test_without_position_equal_tokens_are_equal() -> None:
    seen = show.look("nope", **SMALL)
    close(seen.equal, seen.equal[:, :1].expand_as(seen.equal))
    assert seen.bias is None
    assert seen.turns is None


def test_what_tokens_become_before_the_layer_is_drawn() -> None:
    layer, x = posenc.attention("nope", 24, 4).double(), torch.randn(2, 9, 24).double()
    first = torch.zeros(9, 1).double()
    first[0] = 1
    seen = show.look_at(layer, x, "first", lambda tokens: tokens * first)
    assert seen.title == "first"
    assert (seen.equal[:, 0] > 0).all()  # token 0 beside itself
    close(seen.equal[:, 1:], torch.zeros(4, 8))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_pairs_turn_at_their_frequencies(pairing: str) -> None:
    seen = show.look("rope", {"pairing": pairing}, **{**SMALL, "embed_dim": 32})
    assert seen.title == f"rope:pairing={pairing}"
    assert seen.turns is not None
    close(seen.turns, inverse_frequencies(8, 10000.0).expand(4, 4))
    # matching keys are nearest to themselves
    assert (seen.equal[:, 0] == seen.equal.max(1).values).all()


def test_grouped_keys_match_the_first_query_head_that_reads_them() -> None:
    seen = show.look("nope", {"num_kv_heads": 2, "bias": True}, **SMALL)
    assert (seen.equal[::2] > 0).all()


def test_the_bias_is_shown_alone() -> None:
    seen = show.look("alibi", **SMALL)
    assert seen.bias is not None
    close(seen.bias, -torch.tensor(slopes(4)).double()[:, None] * torch.arange(9))


def test_two_axes_are_an_image() -> None:
    sizes = {**SMALL, "embed_dim": 32, "length": 30}
    seen = show.look("rope", {"axes": [4, 4], "base": 100.0}, **sizes)
    assert seen.title == "rope:axes=[4, 4],base=100.0"
    assert isinstance(seen, show.Image)
    assert seen.logits.shape == (4, 5, 5)
    assert (seen.logits[:, 2, 2] == seen.logits.amax((1, 2))).all()
    close(seen.logits, seen.logits.flip(1, 2))  # as far to either side
    assert len(show.figure(seen).axes) == 8  # with their scales
    with pytest.raises(ValueError, match=r"two axes can be drawn, or none; got 3"):
        show.look("rope", {"axes": [4, 2, 2]}, **sizes)


def test_nothing_else_is_drawn_anew() -> None:
    """Looking takes no random numbers of the caller's."""
    before = torch.random.get_rng_state()
    show.look("carope", **SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_command_writes_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--embed-dim", "24", "--length", "5", "--texts", "1"]
    show.main(["kerple", "kind=power", *small])
    assert capsys.readouterr().out == "kerple.png\n"
    show.main(["fire", "length=64", *small, "--out", "a.pdf"])  # FIRE's own, not that of a text
    assert show.look("mha", **SMALL).title.endswith("at the model's input: plain attention")
    assert {path.name for path in tmp_path.iterdir()} == {"kerple.png", "a.pdf"}


def test_a_name_alone_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        show.main([])
    assert capsys.readouterr().err.endswith("required: NAME\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ropes"], "Did you mean 'rope'"),
        (["rope", "based=3"], "Did you mean 'base'"),
        (["rope", "--out", "a.gif"], r"must end with .png, .svg, .pdf; got a.gif"),
        (["rope", "--out", "no/such/a.png"], "No such file"),
        (["rope", "--length", "1"], "length must be at least 2; got 1"),
        (["rope", "--texts", "0"], "texts must be at least 1; got 0"),
        (["rope", "--heads", "3"], "embed_dim"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as stopped:
        show.main(arguments)
    assert "\n" not in str(stopped.value)


def test_logits_are_those_of_the_softmax() -> None:
    torch.manual_seed(0)
    layer = posenc.attention("rope", 24, 4, window=5).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    mask = torch.arange(9) >= torch.tensor([[0], [2]])
    logits = layer.logits(x, mask=mask)
    v = (x @ layer.c_attn.weight[-24:].T).unflatten(-1, (4, 6)).transpose(1, 2)
    y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2) @ layer.c_proj.weight.T
    close(y, layer(x, mask=mask))
    assert logits[0, 0, 8, 3] == -math.inf
    assert logits[1, 0, 3, 1] == -math.inf
    for wrong in (x[0], x[:, :0]):
        with pytest.raises(ValueError, match=r"shape \(B, T, 24\), T at least 1; got \("):
            layer.logits(wrong)
