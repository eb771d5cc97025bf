import dataclasses
import json

import pytest
import torch

from posenc.models.gpt import GPT
from posenc.training.cli import parse
from posenc.training.config import PRESETS, TrainConfig, flag, from_mapping, preset_values
from training_runs import train

FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]


def test_without_flags_it_is_the_demo():
    assert parse([]) == TrainConfig()
    assert parse([]).preset == "demo"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_defaults_and_flags_override_it(name):
    config = parse(["--preset", name, "--data", "x.txt", "--layers", "3", "--lr=0.5"])
    expected = {**preset_values(name), "data": "x.txt", "layers": 3, "lr": 0.5}
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(("name", "millions"), [("gpt2-tiny", 44.7), ("gpt2-small", 123.7)])
def test_carope_recipes_have_the_published_sizes(name, millions):
    config = TrainConfig(**preset_values(name))
    assert config.tokens_per_step == 524_288
    assert (config.steps, config.warmup, config.lr, config.min_lr) == (19_000, 750, 6e-4, 6e-5)
    shape = config.model(50257)
    assert (shape.vocab_size, shape.context) == (50304, 512)
    with torch.device("meta"):
        assert GPT(shape).num_parameters() / 1e6 == pytest.approx(millions, abs=0.1)


def test_nanogpts_recipe_needs_its_text():
    with pytest.raises(ValueError, match=r"needs its text: --data PATH/input\.txt"):
        parse(["--preset", "shakespeare-char"])
    config = parse(["--preset", "shakespeare-char", "--data", "input.txt"])
    assert config.model(65).vocab_size == 65
    assert config.tokens_per_step == 768


def test_the_vocabulary_follows_the_tokenizer():
    assert TrainConfig(tokenizer="gpt2").model(50257).vocab_size == 50304
    assert TrainConfig(tokenizer="char").model(65).vocab_size == 65
    assert TrainConfig(tokenizer="char", vocab_size=128).model(65).vocab_size == 128
    assert TrainConfig(tokenizer="bpe", vocab_size=4096).model(300).vocab_size == 300
    assert TrainConfig(vocab_size=4096).bpe_symbols == 4096


def test_attention_options_are_read_as_json():
    words = [
        "init=paper",
        "first_power=1",
        'scaling={"type": "linear"}',
        "conv_bias=false",
        "x=a=b",
    ]
    config = parse(["--attention-options", *words, "--attention", "carope"])
    assert config.attention_options == {
        "init": "paper",
        "first_power": 1,
        "scaling": {"type": "linear"},
        "conv_bias": False,
        "x": "a=b",
    }


def test_impl_reaches_the_model_as_an_option():
    config = parse(["--impl", "reference", "--attention-options", "base=100"])
    assert config.model(10).attention_options == {"impl": "reference", "base": 100}
    assert parse([]).model(10).attention_options == {}


def test_the_width_of_the_mlp_reaches_the_model():
    assert TrainConfig(mlp_dim=40).model(300).mlp_dim == 40
    assert TrainConfig(embed_dim=24).model(300).mlp_width == 96


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in FIELDS:
        assert flag(name) in shown
    assert "Peak learning rate" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--atention", "rope"], "unknown flag: '--atention'. Did you mean '--attention'?"),
        (["--attention", "rop"], "unknown attention: 'rop'. Did you mean 'rope'?"),
        (
            ["--preset", "shakespear"],
            "unknown preset: 'shakespear'. Did you mean 'shakespeare-char'?",
        ),
        (["--parallel", "dpp"], "unknown parallel: 'dpp'. Did you mean 'ddp'?"),
        (["--tracker", "wnadb"], "unknown tracker: 'wnadb'. Did you mean 'wandb'?"),
        (["--dtype", "float23"], "unknown dtype: 'float23'. Did you mean 'float32'?"),
        (["--impl", "spda"], "unknown impl: 'spda'. Did you mean 'sdpa'?"),
        (["--layers", "many"], "--layers"),
        (["--layers"], "--layers"),
        (["stray"], "stray"),
        (["--layers", "0"], "--layers must be at least 1; got 0."),
        (["--mlp-dim", "-1"], "--mlp-dim must be 0 or more; got -1."),
        (["--lr", "-1"], "--lr must be 0 or more; got -1.0."),
        (["--lr", "nan"], "--lr must be 0 or more; got nan."),
        (["--lr", "1e-6"], "--min-lr must not exceed --lr"),
        (["--aux-weight", "0"], "rope has no router. Leave it out, or choose --attention moh."),
        (["--attention", "moh", "--aux-weight", "-1"], "--aux-weight must be 0 or more; got -1.0."),
        (["--beta2", "1"], "--beta2 must lie in [0, 1); got 1.0."),
        (["--attention-options", "init"], "expected KEY=VALUE; got 'init'."),
        (["--attention-options", "a=1", "a=2"], "'a' is given twice."),
        (["--resume"], "--resume needs a run folder."),
        (["--resume", "nowhere"], "nowhere holds no run to resume"),
        (["--resume", "nowhere", "--preset", "demo"], "--preset cannot change a run"),
        (["--embed-dim", "30", "--heads", "2"], "even head dim"),
        (["--embed-dim", "30", "--heads", "4"], "multiple of num_heads"),
        (["--attention", "moh", "--heads", "2"], "moh needs at least 4 heads"),
        (["--attention-options", "bse=2"], "Did you mean 'base'?"),
        pytest.param(
            ["--impl", "fused"],
            "impl='fused'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels can run"),
        ),
        (["--dropout", "1.5"], "dropout must lie in [0, 1); got 1.5."),
        (["--device", "gpu"], "unknown device 'gpu'."),
        (["--data", "missing.txt"], "missing.txt"),
        (["--tokenizer", "bep"], "Did you mean 'bpe'?"),
        (["--parallel", "ddp"], "--parallel ddp needs torchrun."),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([*argv, "--cache-dir", "cache"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_what_is_stored_comes_back():
    config = TrainConfig(attention="carope", attention_options={"init": "paper"}, lr=3e-4)
    assert from_mapping(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(ValueError, match="unknown fields \\['colour'\\]"):
        from_mapping({"colour": "red"})


def test_a_resumed_run_stays_in_its_folder(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(dataclasses.asdict(TrainConfig())))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="stays in its folder; got --resume run and --out other"):
        parse(["--resume", "run", "--out", "other"])
    assert parse(["--resume", "run", "--out", str(tmp_path / "run")]).out == "run"


def test_what_belongs_to_the_launch_follows_from_it(tmp_path, monkeypatch):
    stored = TrainConfig(parallel="fsdp", device="cuda:7", tracker="wandb", dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(stored)))
    resumed = ["--resume", str(tmp_path)]
    alone = {"parallel": "none", "device": "auto", "tracker": "none", "dtype": "float32"}
    config = dataclasses.asdict(parse(resumed))
    assert {name: config[name] for name in alone} == alone
    given = [*resumed, "--parallel", "fsdp", "--device", "cpu", "--tracker", "trackio"]
    config = parse(given)
    assert (config.parallel, config.device, config.tracker) == ("fsdp", "cpu", "trackio")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert parse(resumed).parallel == parse([]).parallel == "ddp"
    assert parse([*resumed, "--parallel", "none"]).parallel == "none"


def test_a_resumed_run_keeps_its_flags(tmp_path):
    stored = TrainConfig(layers=2, steps=10, attention_options={"base": 100}, out="elsewhere")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(stored)))
    for words in (["--resume", str(tmp_path)], ["--out", str(tmp_path), "--resume"]):
        config = parse([*words, "--steps", "20"])
        assert config == dataclasses.replace(
            stored, steps=20, out=str(tmp_path), resume=str(tmp_path)
        )
    for name, was in (("layers", 2), ("mlp-dim", 0), ("seed", 0)):
        with pytest.raises(ValueError, match=f"--{name} is {was} in the run .* resumed; got 3"):
            parse(["--resume", str(tmp_path), f"--{name}", "3"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        parse(["--resume", str(tmp_path)])
