"""Checkpoints: written whole, read back exactly, refused with a reason."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import posenc
from helpers import NAMES, close, tiny_gpt, trained
from posenc import GPT, GPTConfig
from posenc.models.checkpoints import gpt2_state

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in NAMES} | {
    "token": ("carope", {"source": "token", "init": "paper"}),
    "cross": ("moh", {"encoding": "carope", "shared": 2, "top_k": 2, "bias": False}),
    "scaled": (
        "rope",
        {
            "scaling": {
                "rope_type": "longrope",
                "factor": 2.0,
                "original_max_position_embeddings": 8,
                "target_length": 16,
                "short_factor": [1.0, 1.0, 1.0],
                "long_factor": [1.0, 2.0, 3.0],
            }
        },
    ),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_gpt("carope", torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str, tmp_path: Path) -> None:
    name, options = VARIANTS[variant]
    changes = {"attention_options": options, "gelu": "tanh", "dropout": 0.1, "mlp_dim": 17}
    model = tiny_gpt(name, torch.float32, **changes)
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for which, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[which])
    assert trained(loaded).keys() == trained(model).keys()
    ids = torch.randint(29, (2, 16))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    out = loaded(ids, ids)
    out.loss.backward()


def test_both_files_and_nothing_else(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "posenc"
    assert config["attention"] == "carope"
    # readable as any new file, not as a private temporary one
    umask = os.umask(0)
    os.umask(umask)
    for path in saved.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_tied_weights_are_stored_once(saved: Path) -> None:
    assert set(load_file(saved / "model.safetensors")) == set(tiny_gpt("carope").state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_gpt("cmha", torch.float32).to(dtype)
    model.save_pretrained(str(tmp_path))
    loaded = GPT.from_pretrained(str(tmp_path))
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    kept = torch.float32 if dtype == torch.bfloat16 else dtype
    assert loaded.h[0].attn.encoding.delta.dtype == kept


def test_saving_over_a_checkpoint_replaces_it(saved: Path) -> None:
    other = tiny_gpt("rope", torch.float32)
    other.save_pretrained(saved)
    assert GPT.from_pretrained(saved).config == other.config


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_failed_writes_leave_the_old_file_whole(
    saved: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == file:
            raise OSError("No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        tiny_gpt("carope", torch.float32).save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == before.keys()
    assert (saved / file).read_bytes() == before[file]
    GPT.from_pretrained(saved)


def test_compiled_models_save_plain_names(tmp_path: Path) -> None:
    model = tiny_gpt("rope", torch.float32)
    model.compile(backend="eager")
    model(torch.zeros(1, 4, dtype=torch.long))
    model.save_pretrained(tmp_path)
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "model.safetensors"))
    torch._dynamo.reset()


def test_missing_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", "no-such-model", "a/b/c", str(tmp_path / "x" / "y")):
        with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
            GPT.from_pretrained(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="neither a folder"):
        GPT.from_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match=r"no config\.json"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[1]", "JSON object; got list"), ("", "not valid JSON")],
)
def test_broken_configs_are_refused(saved: Path, content: str, message: str) -> None:
    (saved / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "architecture 'llama'; expected 'posenc' or 'gpt2'"),
        ({"model_type": None}, "architecture None"),
        ({"rope_base": 3}, r"unknown keys \['rope_base'\]"),
        ({"attention": "caropes"}, "Did you mean 'carope'"),
        ({"layers": 0}, "needs layers of at least 1"),
        ({"layers": "two"}, "layers of at least 1, an integer; got two"),
        ({"dropout": "half"}, "dropout must lie"),
        ({"attention_options": [1]}, "attention_options must map"),
        ({"embed_dim": 25}, "multiple of num_heads"),
        ({"layers": 3}, r"lacks 14 weights, first 'h\.2\."),
        ({"layers": 1}, r"14 weights .*first 'h\.1\."),
        ({"vocab_size": 30}, r"wte.weight has shape \(29, 24\); expected \(30, 24\)"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(saved)


def test_broken_weights_are_refused(saved: Path) -> None:
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    for broken in (content[:100], content[:-8], b"", b"\x80\x02}q\x00."):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            GPT.from_pretrained(saved)


def test_pickles_are_not_opened(saved: Path) -> None:
    trap = saved / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(
        ValueError, match=r"model\.safetensors nor .*; pickled weights are not read"
    ):
        GPT.from_pretrained(saved)
    assert not trap.exists()


def shard(folder: Path, count: int, state: dict[str, Tensor] | None = None) -> dict[str, str]:
    """Store a model in so many files and an index of them, as Hugging Face does; the index."""
    state = load_file(folder / "model.safetensors") if state is None else state
    home = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: state[name] for name in sorted(state)[i::count]}
        save_file(part, folder / file)
        home |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink(missing_ok=True)
    write_index(folder, home)
    return home


def write_index(folder: Path, home: Any) -> None:
    index = {"metadata": {}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def same_weights(model: GPT, state: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(
        torch.equal(found[key], state[key]) for key in state
    )


def test_only_the_files_of_the_index_are_read(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    stale = {name: torch.zeros_like(value) for name, value in state.items()}
    shard(saved, 3, stale)
    home = shard(saved, 2, state)
    save_file(stale, saved / "model.safetensors")
    save_file(stale, saved / "model_ema.safetensors")
    (saved / "training.safetensors").write_bytes(b"not one")
    assert same_weights(GPT.from_pretrained(saved), state)
    # a weight that the index places elsewhere is stale in whichever file
    first, second = sorted(set(home.values()))
    part = load_file(saved / second)
    moved = next(iter(load_file(saved / first)))
    save_file(part | {moved: stale[moved]}, saved / second)
    assert same_weights(GPT.from_pretrained(saved), state)


def test_without_an_index_there_is_one_file(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    save_file(other, saved / "a.safetensors")
    save_file(other, saved / "model-00001-of-00001.safetensors")
    assert same_weights(GPT.from_pretrained(saved), state)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor model.safetensors.index"):
        GPT.from_pretrained(saved)


def test_broken_indices_are_refused(saved: Path) -> None:
    home = shard(saved, 2)
    gone = saved / home.popitem()[1]
    content = gone.read_bytes()
    gone.unlink()
    with pytest.raises(ValueError, match=f"holds no {gone.name}, which model.safetensors.index"):
        GPT.from_pretrained(saved)
    gone.write_bytes(content)
    for wrong in ({}, ["a"], None, {"wte.weight": 3}):
        write_index(saved, wrong)
        with pytest.raises(ValueError, match="must map weights to files by its weight_map"):
            GPT.from_pretrained(saved)
    (saved / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not valid JSON"):
        GPT.from_pretrained(saved)


def test_saving_over_a_model_in_several_files_replaces_it(saved: Path) -> None:
    shard(saved, 2)
    other = tiny_gpt("rope", torch.float32)
    other.save_pretrained(saved)
    assert same_weights(GPT.from_pretrained(saved), other.state_dict())


@pytest.mark.parametrize("count", [0, 2])
def test_the_hub_is_asked_for_what_describes_a_model(
    saved: Path, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = load_file(saved / "model.safetensors")
    wanted = {"config.json", "model.safetensors"}
    if count:
        wanted = {"config.json", "model.safetensors.index.json", *shard(saved, count).values()}
    save_file(state, saved / "other.safetensors")
    (saved / "pytorch_model.bin").write_bytes(b"")
    local = tmp_path / "local"

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        assert repository == "someone/model"
        local.mkdir(exist_ok=True)
        for file in saved.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, local)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert same_weights(GPT.from_pretrained("someone/model"), state)
    assert {file.name for file in local.iterdir()} == wanted


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("key", ["impl", "attention_impl"])
def test_the_back_end_is_the_loader_s_choice(
    saved: Path, key: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPT.from_pretrained(saved).config
    assert config.attention_options == {}
    state = load_file(saved / "model.safetensors")
    options = {key: impl, "init": "rope"}
    with monkeypatch.context() as there:  # a machine with a GPU
        there.setattr("posenc.backends.fused.check_available", lambda: None)
        model = GPT(replace(config, attention_options=options))
        model.load_state_dict(state)
        model.save_pretrained(saved)
    assert json.loads((saved / "config.json").read_text())["attention_options"] == {"init": "rope"}
    edit_config(saved, attention_options=options)  # as versions before stored it
    for chosen, expected in ((None, "auto"), ("sdpa", "sdpa")):
        loaded = GPT.from_pretrained(saved, impl=chosen)
        assert {block.attn.impl for block in loaded.h} == {expected}
        assert loaded.config.attention_options["init"] == "rope"
        assert same_weights(loaded, state)
    with pytest.raises(ValueError, match="Did you mean 'fused'"):
        GPT.from_pretrained(saved, impl="fussed")


def test_a_run_folder_is_its_model(saved: Path) -> None:
    run, state = saved.parent, load_file(saved / "model.safetensors")
    (run / "config.json").write_text('{"data": "stdlib", "attention": "rope", "layers": 7}')
    assert same_weights(GPT.from_pretrained(run), state)
    (run / "checkpoints").mkdir()
    shutil.rmtree(saved)
    with pytest.raises(ValueError, match=f"run that has not ended.*posenc train --resume {run}$"):
        GPT.from_pretrained(run)


@pytest.mark.parametrize("name", ["rope", "cmha", "carope"])
@pytest.mark.parametrize(
    ("low", "high"), [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)], ids=str
)
def test_files_of_several_dtypes_load_in_the_one_that_holds_them_all(
    tmp_path: Path, name: str, low: torch.dtype, high: torch.dtype
) -> None:
    tiny_gpt(name, torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {
        key: value.to(low if "mlp" in key or "ln_1" in key else high)
        for key, value in load_file(path).items()
    }
    save_file(state, path)
    model = GPT.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key].float())
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.dtype == torch.float32


def test_quantised_weights_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    for dtype in (torch.int8, torch.float8_e4m3fn):
        state = load_file(path)
        state["h.1.mlp.c_fc.weight"] = state["h.1.mlp.c_fc.weight"].to(dtype)
        save_file(state, path)
        with pytest.raises(ValueError, match=f"c_fc.weight is of {dtype}; expected one of torch.f"):
            GPT.from_pretrained(saved)


@pytest.mark.parametrize("part", ["block", "attention", "activation checkpointing", "DDP"])
def test_wrapped_parts_save_plain_names(saved: Path, tmp_path: Path, part: str) -> None:
    model = GPT.from_pretrained(saved)
    state = model.state_dict()
    ids = torch.zeros(1, 4, dtype=torch.long)
    expected = model.generate(ids, 3, temperature=0)
    if part == "block":
        model.h[0] = torch.compile(model.h[0], backend="eager")
        assert torch.equal(model.generate(ids, 3, temperature=0), expected)
    elif part == "attention":
        model.h[1].attn = torch.compile(model.h[1].attn, backend="eager")
    elif part == "DDP":
        model.h[0].mlp = nn.ModuleDict({"module": model.h[0].mlp})  # as DDP holds it
    else:
        model.h[0] = checkpoint_wrapper(model.h[0])
        assert torch.equal(model.generate(ids, 3, temperature=0), expected)
    model.save_pretrained(tmp_path / "again")
    loaded = GPT.from_pretrained(tmp_path / "again")
    assert same_weights(loaded, state)
    assert load_file(tmp_path / "again/model.safetensors").keys() == state.keys()
    # and files of versions that stored the wrappers' names
    save_file(dict(model.state_dict()), saved / "model.safetensors")
    assert same_weights(GPT.from_pretrained(saved), state)
    torch._dynamo.reset()


def test_checkpoints_from_before_a_field_was_added_load(saved: Path) -> None:
    config = GPT.from_pretrained(saved).config
    path = saved / "config.json"
    raw = json.loads(path.read_text())
    del raw["mlp_dim"]
    path.write_text(json.dumps(raw))
    assert GPT.from_pretrained(saved).config == config


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_names_map_onto_ours(prefix: str) -> None:
    model = GPT(GPTConfig(vocab_size=7, context=5, layers=2, heads=2, embed_dim=4, attention="mha"))
    state = model.state_dict()
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    theirs = {
        f"{prefix}{name}": value.T.contiguous() if name.endswith(transposed) else value
        for name, value in state.items()
    }
    theirs |= {
        f"{prefix}h.0.attn.bias": torch.ones(1, 1, 5, 5),
        f"{prefix}h.1.attn.masked_bias": torch.tensor(-1e4),
        "lm_head.weight": state["wte.weight"],
    }
    ours = gpt2_state(theirs)
    assert ours.keys() == state.keys()
    for name, value in state.items():
        close(ours[name], value, 0)


def test_public_names_are_importable() -> None:
    assert set(posenc.__all__) <= set(dir(posenc))
