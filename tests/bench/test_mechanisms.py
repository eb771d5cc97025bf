"""bench.mechanisms: arrays against direct formulas on untrained models, figures, run folders."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

import posenc
from bench import mechanisms
from helpers import close, perturb, scores_of
from training_runs import flags, run, write_text

LAYERS, HEADS, DIM, WINDOW, VOCABULARY = 3, 4, 6, 11, 29


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def model_of(name: str, noise: float = 0.0, **options: Any) -> posenc.GPT:
    config = posenc.GPTConfig(VOCABULARY, WINDOW, LAYERS, HEADS, HEADS * DIM, name, options)
    return perturb(posenc.GPT(config), noise).double().eval()


def text(batch: int = 5) -> Tensor:
    return torch.randint(VOCABULARY, (batch, WINDOW))


@pytest.mark.parametrize("source", ["layer", "token"])
def test_rates_start_at_ropes(source: str) -> None:
    rates = mechanisms.carope_rates(model_of("carope", source=source, base=500.0), text())
    assert rates.f.shape == (LAYERS if source == "layer" else 1, HEADS, 5 * WINDOW)
    assert rates.rope == pytest.approx(500.0 ** (-2 / DIM))
    close(rates.f, torch.full_like(rates.f, rates.rope), 1e-6)  # the bias is fp32
    waves = torch.tensor([2 * math.pi * 500.0 ** (2 * i / DIM) for i in range(DIM // 2)])
    close(rates.rope_wavelength, waves.double(), 1e-6)
    close(rates.wavelength, waves.double().expand_as(rates.wavelength), 1e-5)


def test_rates_are_those_of_the_tokens() -> None:
    """Of the shared phase every token has its own, whatever stands before it."""
    model = model_of("carope", 0.3, source="token", init="paper", first_power=1)
    ids = text(2)
    rates = mechanisms.carope_rates(model, ids)
    x, weight = model.wte.weight[ids[1, 4]], model.phase.weight
    for head in range(HEADS):
        expected = 1 / (1 + math.log1p(math.exp((x @ weight[:, head]).item())))
        assert rates.f[0, head, WINDOW + 4].item() == pytest.approx(expected)
    steps = rates.f[0, 1].pow(3).mean()
    assert rates.wavelength[0, 1, 2].item() == pytest.approx(2 * math.pi / steps.item())


def test_rates_read_what_the_layer_does() -> None:
    model, ids = model_of("carope", 0.3), text(2)
    block = model.h[0]
    z = block.ln_1(model.wte(ids)) @ block.attn.encoding.weight + block.attn.encoding.bias
    f = 1 / (1 + torch.log1p(z.exp()))  # (B, T, H)
    close(mechanisms.carope_rates(model, ids).f[0], f.flatten(0, 1).T)


def test_polar_parameters() -> None:
    model = model_of("cmha")
    delta, b = mechanisms.polar_parameters(model)
    assert delta.shape == b.shape == (LAYERS, HEADS, DIM // 2)
    assert torch.equal(delta, torch.ones_like(delta))
    assert not b.any()
    with torch.no_grad():
        model.h[1].attn.encoding.b[2, 1] = 0.5
    assert mechanisms.polar_parameters(model).b.nonzero().tolist() == [[1, 2, 1]]


def test_head_use_sums_to_the_active_heads() -> None:
    use = mechanisms.head_use(model_of("moh", shared=1, top_k=2), text())
    assert (use.shared, use.top_k) == (1, 2)
    assert use.share.shape == (LAYERS, HEADS)
    assert use.share[:, 0].tolist() == [1.0] * LAYERS
    close(use.share.sum(1), torch.full((LAYERS,), 3.0).double())


@pytest.mark.parametrize(("name", "channels"), [("mdha", HEADS * DIM), ("rcmha", DIM)])
def test_filters(name: str, channels: int) -> None:
    model = model_of(name, 0.3)
    taps = mechanisms.convolution_filters(model)
    assert taps.shape == (LAYERS, 3, channels, 3)
    k_of_last_channel = model.h[2].attn.conv.weight[1].reshape(channels, 3)[-1]
    close(taps[2, 1, -1], k_of_last_channel)


@pytest.mark.parametrize("name", ["rmha", "rcmha"])
def test_relative_tables(name: str) -> None:
    """From the attention's own scores of each query, of which the mean is taken last."""
    model, ids = model_of(name, 0.3), text(2)
    tables = mechanisms.relative_tables(model, ids)
    attn, x = model.h[0].attn, model.h[0].ln_1(model.wte(ids))
    q, k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
               for part in attn.c_attn(x).chunk(3, -1))  # fmt: skip
    if attn.conv is not None:
        q, k, v = attn.conv(q, k, v)
    scores = scores_of(attn.encoding, q, k, torch.arange(WINDOW)).relative
    rows, query = scores.rows(WINDOW), q if scores.query is None else q + scores.query[:, None]
    products = torch.einsum("bhtd,hpd->bhtp", query, rows)
    if scores.offset is not None:
        products = products + scores.offset[:, None]
    close(tables.logit[0], products.mean((0, 2)) / math.sqrt(DIM))
    close(tables.norm[0], rows.square().sum(-1).sqrt())
    assert tables.logit.shape == (LAYERS, HEADS, WINDOW)


def test_bins_keep_the_mean_and_the_near_distances() -> None:
    values = torch.randn(2, 300).double()
    middles, means = mechanisms.binned(values)
    close(means[:, :8], values[:, :8])
    assert middles[:8].tolist() == list(range(8))
    assert (middles.diff() > 0).all()
    assert len(middles) < 8 + 8 * 6
    widths = 2 * (middles - torch.cat((torch.tensor([-0.5]), _ends(middles)[:-1]))).double()
    close((means * widths).sum(1) / 300, values.mean(1))
    assert mechanisms.binned(values[:, :3])[0].tolist() == [0, 1, 2]


def _ends(middles: Tensor) -> Tensor:
    """Bins lie side by side from -0.5 on: each ends as far behind its middle as it began before."""
    ends, begin = [], -0.5
    for middle in middles.tolist():
        begin = 2 * middle - begin
        ends.append(begin)
    return torch.tensor(ends)


@pytest.mark.parametrize(
    ("name", "options", "titles"),
    [
        ("carope", {}, ["CARoPE: rate", "CARoPE: tokens"]),
        ("carope", {"source": "token"}, ["CARoPE: rate", "CARoPE: tokens"]),
        ("cmha", {}, ["CMHA: delta", "CMHA: b"]),
        ("rmha", {}, ["Relative term: mean", "Relative term: norm"]),
        ("mdha", {}, ["Convolution"]),
        ("rcmha", {}, ["Relative term: mean", "Relative term: norm", "Convolution"]),
        ("moh", {}, ["MoH"]),
        ("moh", {"encoding": "cmha", "conv": True},
         ["CMHA: delta", "CMHA: b", "Convolution", "MoH"]),
    ],
)  # fmt: skip
def test_figures(name: str, options: dict[str, Any], titles: list[str], tmp_path: Path) -> None:
    figure = mechanisms.figure(model_of(name, **options), text(1))
    assert isinstance(figure, Figure)
    drawn = [part.get_suptitle() for part in figure.subfigs]
    assert [title for title, start in zip(drawn, titles, strict=True) if title.startswith(start)]
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["rope", "nope", "mha", "sinusoidal"])
def test_nothing_learned_is_nothing_drawn(name: str) -> None:
    assert mechanisms.figure(model_of(name), text(1)) is None


def test_a_run_is_drawn_on_its_own_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_file = write_text(tmp_path / "text.txt", words=300)
    run(flags(tmp_path, attention="carope", steps=1))
    model, ids = mechanisms.of_run(tmp_path / "run")
    assert model.config.attention == "carope"
    assert bytes(ids[1].tolist()) in text_file.read_bytes()
    assert ids.shape[1] == 16
    capsys.readouterr()
    mechanisms.main([str(tmp_path / "run"), "--out", str(tmp_path / "new")])
    picture = tmp_path / "new" / "run-mechanism.png"
    assert capsys.readouterr().out == f"{picture}\n"
    assert picture.stat().st_size > 10_000
    text_file.write_text("another text " * 200)
    with pytest.raises(SystemExit, match=r"no longer the text that .* was trained on"):
        mechanisms.main([str(tmp_path / "run"), "--out", str(tmp_path)])


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"missing is no finished run .*no config\.json"):
        mechanisms.main([str(tmp_path / "missing"), "--out", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps({"attention": "carope"}))
    (tmp_path / "environment.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"is no finished run of train.py: it holds no model\."):
        mechanisms.main([str(tmp_path), "--out", str(tmp_path)])
