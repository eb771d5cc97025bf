"""--init-from: a run starts from the weights of another, with the same attention or another."""

import json
import shutil

import pytest
import torch

import posenc
from posenc.models.gpt import GPT
from posenc.training import initial
from posenc.training.cli import parse
from training_runs import checkpoint, flags, losses, run, train

SIZES = ("layers", "heads", "embed_dim", "context", "vocab_size", "tokenizer", "attention")


@pytest.fixture
def folder(folder):
    run(flags(folder))
    initial.read.cache_clear()
    yield folder
    initial.read.cache_clear()


def given(folder, *words, source="run"):
    """Flags of a run from what the first one left, without those that it decides."""
    at = folder if source is None else folder / source
    kept = flags(folder)
    for name in (*SIZES, "out"):
        key = "--" + name.replace("_", "-")
        if key in kept:
            at_key = kept.index(key)
            del kept[at_key : at_key + 2]
    return [*kept, "--init-from", str(at), "--out", str(folder / "next" / "run"), *words]


def start(folder, *words, source="run"):
    """The model and configuration before the first step."""
    config = parse(given(folder, *words, source=source))
    return initial.start(config, config.vocab_size)


@pytest.mark.parametrize("source", ["run", "checkpoint", "model"])
def test_weights_sizes_and_tokenizer_are_the_source_s(folder, source):
    trained = GPT.from_pretrained(folder / "run" / "model")
    at = {"run": "run", "checkpoint": checkpoint(folder).relative_to(folder), "model": "run/model"}
    model, config, origin = start(folder, source=at[source])
    assert model.state_dict().keys() == trained.state_dict().keys()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    for name in ("layers", "heads", "embed_dim", "context", "vocab_size", "attention"):
        assert getattr(config, name) == getattr(model.config, name)
    assert config.tokenizer == str(folder / "run" / "tokenizer.json")
    assert origin == f"weights: of {config.init_from}, {config.attention}"


def test_a_run_goes_on_from_them_and_is_resumed_without_its_source(folder):
    run(given(folder))
    assert losses(folder / "next")[0] < losses(folder)[0]
    stored = json.loads((folder / "next" / "run" / "config.json").read_text())
    assert stored["init_from"] == str(folder / "run")
    shutil.rmtree(folder / "run")
    initial.read.cache_clear()
    run(["--resume", str(folder / "next" / "run"), "--steps", str(stored["steps"] + 2)])
    assert len(losses(folder / "next")) == stored["steps"] + 2


def test_another_attention_is_converted_and_its_options_are_the_run_s(folder, capsys):
    words = ("--attention", "carope")
    model, config, origin = start(folder, *words)
    assert model.config.attention == "carope"
    assert 'converted "rope" to "carope"' in origin
    assert "logits are equal to rounding" in origin
    before = GPT.from_pretrained(folder / "run" / "model")
    ids = torch.arange(12).unsqueeze(0) % config.vocab_size
    torch.testing.assert_close(model.eval()(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-5)
    run(given(folder, *words))
    assert 'converted "rope" to "carope"' in capsys.readouterr().out
    model = GPT.from_pretrained(folder / "next" / "run" / "model")
    assert model.config.attention == "carope"
    stored = json.loads((folder / "next" / "run" / "config.json").read_text())
    assert stored["attention_options"] == config.attention_options
    run(["--resume", str(folder / "next" / "run"), "--steps", str(stored["steps"] + 1)])


def test_a_longer_context_is_one_of_distances_alone(folder):
    model, _, _ = start(folder, "--context", "64")
    assert model.config.context == 64
    config = parse(given(folder, "--attention", "mha", "--context", "64"))
    with pytest.raises(ValueError, match=r"mha's wpe.weight is of a context of 16; got --context"):
        initial.start(config, config.vocab_size)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", "3"), r"--layers is 2 in .*run, which --init-from starts from; got 3\."),
        (("--embed-dim", "36"), "--embed-dim is"),
        (("--tokenizer", "byte"), r"reads the tokens of .*tokenizer\.json; got --tokenizer byte"),
        (("--attention", "ropee"), "Did you mean 'rope'"),
    ],
)
def test_what_contradicts_the_source_is_refused(folder, words, message):
    with pytest.raises(ValueError, match=message):
        parse(given(folder, *words))


def test_other_sources_say_what_they_lack(folder):
    with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
        parse(given(folder, source="nowhere"))
    shutil.move(folder / "run" / "model", folder / "alone")
    with pytest.raises(ValueError, match=r"has no tokenizer beside it.*--tokenizer gpt2, or PATH"):
        parse(given(folder, source="alone"))
    preset = ["--data", str(folder / "text.txt"), "--preset", "shakespeare-char"]
    with pytest.raises(ValueError, match="has no tokenizer beside it"):
        parse([*preset, "--init-from", str(folder / "alone")])
    with pytest.raises(ValueError, match="--init-from cannot change a run that is resumed"):
        parse(["--resume", str(folder / "run"), "--init-from", str(folder / "alone")])
    config = posenc.GPTConfig(
        11, 8, 2, 2, 8, attention=("rope:window=4", "nope"),
    )  # fmt: skip
    posenc.GPT(config).save_pretrained(folder / "pattern")
    with pytest.raises(ValueError, match="layers of several kinds"):
        parse(given(folder, source="pattern"))


def test_a_text_with_more_symbols_is_refused(folder):
    config = parse(given(folder))
    with pytest.raises(ValueError, match="symbols; the model of"):
        initial.start(config, config.vocab_size + 1)


def test_a_bad_source_is_one_line(folder, capsys):
    assert train.main(given(folder, source="nowhere")) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_the_mlp_of_gpt2_stays_its_own(folder):
    config = posenc.GPTConfig(256, 16, 1, 2, 8, gelu="tanh")
    posenc.GPT(config).save_pretrained(folder / "tanh")
    model, _, _ = start(folder, "--tokenizer", "byte", source="tanh")
    assert model.config.gelu == "tanh"
    with pytest.raises(ValueError, match="--gelu is 'tanh' in"):
        parse(given(folder, "--tokenizer", "byte", "--gelu", "none", source="tanh"))
