"""Runs in this process: what they write, and that stopping and resuming changes nothing."""

import errno
import json
import os
import pickle
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

import training_runs
from posenc.data import StreamError
from posenc.models.gpt import GPT
from posenc.training import checkpoint as checkpoints
from posenc.training.lock import hold
from training_runs import (
    checkpoint,
    flags,
    losses,
    resume,
    resumed,
    rows,
    run,
    stored,
    train,
    write_text,
)


def last_line(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.2, "grad_accum": 2},
        {"attention": "moh", "heads": 4, "dtype": "bfloat16", "activation_checkpointing": True},
        {"attention": "carope", "steps": 8, "eval_every": 1, "save_every": 3},
        {"attention": "mha", "tokenizer": "bpe", "vocab_size": 300, "log_every": 4},
    ],
    ids=["rope", "moh", "carope", "mha"],
)
def test_stopping_and_resuming_twice_changes_no_bit(folder, changes):
    total = changes.get("steps", 6)
    changes = {**changes, "decay_steps": total}
    run(flags(folder, **{**changes, "steps": total}))
    once = stored(folder), losses(folder), [row for row in rows(folder) if "val_loss" in row]
    shutil.rmtree(folder / "run")

    run(flags(folder, **{**changes, "steps": 2}))
    assert stored(folder).keys() == once[0].keys()
    resume(folder, steps=4)
    resume(folder, steps=total)
    assert losses(folder) == once[1]
    assert same(stored(folder), once[0])
    evaluations = [row for row in rows(folder) if "val_loss" in row and row["step"] in (total,)]
    assert evaluations == [row for row in once[2] if row["step"] in (total,)]


def test_without_resume_the_third_step_is_another(folder):
    """What the test above would miss if dropout or the data order did not matter."""
    run(flags(folder, dropout=0.2))
    first = losses(folder)
    for change in ({"seed": 1}, {"data_seed": 1}, {"dropout": 0.1}):
        shutil.rmtree(folder / "run")
        run(flags(folder, **{"dropout": 0.2, **change}))
        assert losses(folder)[2] != first[2]


@pytest.mark.parametrize("attention", ["mha", "rcmha", "moh", "fire", "path"])
def test_a_run_writes_its_folder(folder, attention, capsys, drawn):
    run(flags(folder, attention=attention, heads=4, sample_tokens=8))
    path = folder / "run"
    assert {file.name for file in path.iterdir()} == {
        "checkpoints", "config.json", "environment.json", "loss.png", "metrics.jsonl", "model",
        "sample.txt", "summary.json", "tokenizer.json",
    }  # fmt: skip
    summary = json.loads((path / "summary.json").read_text())
    for key in (
        *("val_loss", "perplexity", "bits_per_byte", "tokens_per_second", "parameters"),
        *("peak_memory_bytes", "steps", "tokens", "seconds"),
    ):
        assert summary[key] > 0
    assert summary["tokens"] == 6 * 4 * 16
    lengths = [evaluation["context"] for evaluation in summary["evaluations"]]
    assert lengths == ([16] if attention == "mha" else [16, 32, 64])
    assert list(summary["not_evaluated"]) == (["32", "64"] if attention == "mha" else [])
    assert losses(folder)[-1] < losses(folder)[0]
    model = GPT.from_pretrained(path / "model")
    assert model.num_parameters() == summary["parameters"]
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert same(weights, {key: value for key, value in stored(folder).items() if key in weights})
    shown = capsys.readouterr().out
    if attention == "moh":
        targets = summary["evaluations"][0]["targets"]
        assert [layer["tokens"] for layer in summary["routing"]] == [targets] * 2
        for i, layer in enumerate(summary["routing"]):
            assert sum(layer["utilisation"]) == pytest.approx(3)  # of the 4 heads
            kept = " ".join(f"{100 * share:.0f}" for share in layer["utilisation"])
            assert f"layer {i}: heads kept {kept} %, entropy " in shown
    else:
        assert summary["routing"] is None
        assert "heads kept" not in shown
    assert "batch: 4 sequences (1 x 4) x 1 accumulated x 16 tokens = 64 tokens a step" in shown
    assert f"perplexity {summary['perplexity']:.2f}" in shown
    assert (path / "sample.txt").read_text() in shown


def test_a_compiled_run_saves_the_same_names(folder, monkeypatch):
    """With the compiler's front end alone: generating code takes minutes and renames nothing."""
    run(flags(folder))
    plain = stored(folder).keys()
    expected = losses(folder)
    shutil.rmtree(folder / "run")
    compiled = []

    def traced(self):
        compiled.append(self)
        torch.nn.Module.compile(self, backend="eager")

    monkeypatch.setattr(GPT, "compile", traced)
    run(flags(folder, compile=True, sample_tokens=4))
    assert len(compiled) == 1
    assert stored(folder).keys() == plain
    assert losses(folder) == pytest.approx(expected, rel=1e-5)
    assert not any("_orig_mod" in name for name in plain)
    resume(folder, steps=7)


def test_other_data_are_refused(folder):
    run(flags(folder, steps=2))
    write_text(folder / "text.txt", words=5000)
    assert train.main([*resumed(folder), "--steps", "4"]) == 2


def test_a_run_is_not_overwritten(folder, capsys):
    run(flags(folder, steps=1))
    before = stored(folder)
    assert train.main(flags(folder)) == 2
    assert f"Continue it with --resume {folder / 'run'}" in capsys.readouterr().err
    assert same(stored(folder), before)


def test_a_context_longer_than_the_data_leaves_nothing_behind(folder, capsys):
    assert train.main(flags(folder, context=100_000)) == 2
    assert "context 100000 needs at least 100001 tokens" in last_line(capsys)
    assert not (folder / "run").exists()


def test_a_new_checkpoint_replaces_the_old_one_and_what_a_crash_left(folder):
    run(flags(folder, steps=2))
    (folder / "run/checkpoints/.writing-step-00000009").mkdir()
    (folder / "run/checkpoints/step-00000001").mkdir()  # older: its deletion was cut off
    resume(folder, steps=3)
    assert checkpoint(folder).name == "step-00000003"


def test_checkpoints_of_other_names_are_the_users(folder):
    run(flags(folder, steps=2))
    expected = stored(folder)
    kept = ["step-00000009.bak", "step-best", "step-9", "step-000000009", ".writing-step-9"]
    for name in kept:
        shutil.copytree(folder / "run/checkpoints/step-00000002", folder / name)
        (folder / name).rename(folder / "run/checkpoints" / name)
    (folder / "run/checkpoints/step-00000011").touch()  # no folder
    resume(folder, steps=3)
    names = {path.name for path in (folder / "run/checkpoints").iterdir()}
    assert names == {*kept, "step-00000003", "step-00000011"}
    assert len(losses(folder)) == 3
    for name in kept:
        (shard,) = (folder / "run/checkpoints" / name).glob("*.safetensors")
        assert same(load_file(shard), expected)


def test_tokens_are_counted_not_derived(folder, capsys):
    """As with --grad-accum: 2 steps of 64 tokens, 2 of 128, then one of 192."""
    run(flags(folder, steps=2))
    resume(folder, steps=4, batch_size=8, eval_every=1)
    expected = [64, 128, 256, 384]
    assert [row["tokens"] for row in rows(folder) if "loss" in row] == expected
    assert [row["tokens"] for row in rows(folder) if "val_loss" in row] == [128, 256, 384]
    assert "length: 4 steps = 384 tokens, " in capsys.readouterr().out
    resume(folder, steps=5, batch_size=4, grad_accum=3)
    summary = json.loads((folder / "run/summary.json").read_text())
    assert summary["tokens"] == 576
    assert summary["tokens_per_second"] == pytest.approx(576 / summary["seconds"])
    resume(folder, batch_size=16)  # finishes again: no step, no token
    assert json.loads((folder / "run/summary.json").read_text())["tokens"] == 576


def files(folder):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in (folder / "run").rglob("*")
        if path.is_file()
    }


def test_a_second_process_in_a_run_folder_is_refused(folder, capsys):
    run(flags(folder, steps=2))
    before = files(folder)
    with hold(folder / "run"):
        (note,) = files(folder).keys() - before.keys()
        assert train.main([*resumed(folder), "--steps", "4"]) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith(f"error: {folder / 'run'} is in use by process {os.getpid()} on ")
        assert note.exists()
    assert files(folder) == before
    resume(folder, steps=4)
    assert len(losses(folder)) == 4


def test_fewer_steps_than_were_taken_are_refused(folder, capsys):
    run(flags(folder, steps=3))
    before = files(folder)
    assert train.main([*resumed(folder), "--steps", "2"]) == 2
    error = last_line(capsys)
    assert error.endswith("run is at step 3 already; got --steps 2. Give --steps 3 or more.")
    assert files(folder) == before


def test_a_learning_rate_that_jumps_is_announced_with_the_flag_that_keeps_it(folder, capsys):
    run(flags(folder, steps=4))
    shutil.copytree(folder / "run", folder / "kept")
    capsys.readouterr()
    resume(folder, steps=8)
    rate = next(row["lr"] for row in rows(folder) if row["step"] == 5)
    assert (
        f"the learning rate goes on with {rate:.3g}, where the run so far had 0.001: "
        "it falls until step 8, not 4. --decay-steps 4 keeps the decay as it was."
    ) in capsys.readouterr().out
    assert rate > 0.005

    shutil.rmtree(folder / "run")
    (folder / "kept").rename(folder / "run")
    resume(folder, steps=8, decay_steps=4)
    assert "learning rate" not in capsys.readouterr().out
    assert [row["lr"] for row in rows(folder) if row["step"] > 4 and "lr" in row] == [1e-3] * 4
    resume(folder, steps=9, min_lr=2e-3)
    said = capsys.readouterr().out
    assert "goes on with 0.002, where the run so far had 0.001.\n" in said
    resume(folder)
    assert "learning rate" not in capsys.readouterr().out


@pytest.mark.parametrize("checkpointed", [True, False])
def test_what_belongs_to_the_launch_is_not_inherited(folder, capsys, checkpointed):
    """A run that two processes wrote by FSDP elsewhere goes on in one, and says so."""
    run(flags(folder, steps=2))
    if not checkpointed:
        shutil.rmtree(checkpoint(folder))
    for name, changes in (
        ("config", {"parallel": "fsdp", "device": "cuda:7", "tracker": "wandb"}),
        ("environment", {"parallel": "fsdp", "processes": 2, "device": "A GPU"}),
    ):
        path = folder / f"run/{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    capsys.readouterr()
    run(["--resume", str(folder / "run"), "--steps", "3"])
    said = capsys.readouterr().out
    device = json.loads((folder / "run/environment.json").read_text())["device"]
    assert (
        f"launched otherwise than before: device {device} (was A GPU), parallel none (was fsdp), "
        "processes 1 (was 2), tracker none (was wandb). "
        "--parallel, --device and --tracker are each launch's own."
    ) in said
    (folder / "run/environment.json").write_text("[1]")
    resume(folder, steps=4)
    assert "launched otherwise" not in capsys.readouterr().out


def test_a_run_killed_before_its_first_checkpoint_starts_again(folder):
    run(flags(folder))
    expected = losses(folder)
    shutil.rmtree(checkpoint(folder))
    resume(folder)
    assert losses(folder) == expected


def test_a_finished_run_can_be_finished_again(folder):
    run(flags(folder, steps=2))
    summary = json.loads((folder / "run/summary.json").read_text())
    count = len(rows(folder))
    resume(folder)
    assert json.loads((folder / "run/summary.json").read_text())["val_loss"] == summary["val_loss"]
    assert len(rows(folder)) == count


@pytest.mark.parametrize("every", [1, 5])
def test_divergence_stops_and_keeps_the_last_sound_checkpoint(folder, capsys, every):
    """The rate ruins the weights in step 3, whose own loss is still finite."""
    run(flags(folder, steps=2))
    before = stored(folder)
    words = ["--steps", "9", "--lr", "1e30", "--warmup", "0", "--log-every", "3"]
    assert train.main([*resumed(folder), *words, "--save-every", str(every)]) == 1
    error = last_line(capsys)
    assert ("after step 3. " if every == 1 else "at step 4. ") in error
    assert f"Checkpoint at step 2: posenc train --resume {folder / 'run'}" in error
    assert same(stored(folder), before)
    assert len(losses(folder)) == 3


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_never_runs_code(folder, capsys):
    """Pickles where torch would look for them are refused, or not read at all."""
    run(flags(folder, steps=2))
    (shard,) = checkpoint(folder).glob("*.safetensors")
    evil = pickle.dumps(Payload(folder / "hacked"))
    (checkpoint(folder) / ".metadata").write_bytes(evil)
    (checkpoint(folder) / "__0_0.distcp").write_bytes(evil)
    resume(folder, steps=3)
    assert not (folder / "hacked").exists()

    (shard,) = checkpoint(folder).glob("*.safetensors")
    torch.save({"model.wte.weight": Payload(folder / "hacked")}, shard)
    state = checkpoint(folder) / "state.json"
    values = json.loads(state.read_text())
    values["shards"][shard.name] = shard.stat().st_size
    state.write_text(json.dumps(values))
    assert train.main([*resumed(folder), "--steps", "5"]) == 2
    assert "damaged shard" in last_line(capsys)
    state.write_bytes(evil)
    assert train.main([*resumed(folder), "--steps", "5"]) == 2
    assert not (folder / "hacked").exists()


@pytest.mark.parametrize("damage", ["shard gone", "shard cut", "state gone", "format", "model"])
def test_a_damaged_checkpoint_is_refused(folder, damage, capsys):
    run(flags(folder, steps=2))
    path = checkpoint(folder)
    (shard,) = path.glob("*.safetensors")
    if damage == "shard gone":
        shard.unlink()
    elif damage == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "state gone":
        (path / "state.json").unlink()
    elif damage == "format":
        (path / "state.json").write_text('{"format": 99}')
    else:
        config = json.loads((folder / "run/config.json").read_text())
        (folder / "run/config.json").write_text(json.dumps({**config, "layers": 3}))
    assert train.main(resumed(folder)) == 2
    assert str(path) in last_line(capsys)


def test_a_full_disk_keeps_the_last_checkpoint(folder, capsys, monkeypatch):
    run(flags(folder, steps=2))
    before = stored(folder)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.HuggingFaceStorageWriter, "write_data", full)
    assert train.main([*resumed(folder), "--steps", "4"]) == 1
    error = last_line(capsys)
    assert error.startswith("error: No space left on device. Checkpoint at step 2: ")
    assert same(stored(folder), before)
    monkeypatch.undo()
    resume(folder, steps=4)
    assert len(losses(folder)) == 4


def test_a_run_folder_that_cannot_be_made_is_one_line(folder, capsys):
    (folder / "file").write_text("in the way")
    for out in (folder / "file/run", folder / "file"):
        assert train.main(flags(folder, out=out)) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {folder / 'file'} is not a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_one_line(folder, capsys):
    (folder / "locked").mkdir(mode=0o500)
    assert train.main(flags(folder, out=folder / "locked/run")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not writable" in line


class Breaking:
    """Batches whose stream breaks for good after some of them."""

    def __init__(self, batches, good):
        self.batches, self.good = batches, good

    def next_batch(self):
        if self.good == 0:
            raise StreamError("the stream broke 6 times in a row")
        self.good -= 1
        return self.batches.next_batch()

    def __getattr__(self, name):
        return getattr(self.batches, name)


def test_a_broken_stream_saves_and_ends(folder, capsys, monkeypatch):
    """Two micro-batches a step, broken at the second of step 3: that step is drawn again."""
    run(flags(folder, grad_accum=2))
    expected = losses(folder), stored(folder)
    shutil.rmtree(folder / "run")

    original = train.Corpus.batches
    monkeypatch.setattr(
        train.Corpus, "batches", lambda *a, **k: Breaking(original(*a, **k), good=5)
    )
    assert train.main(flags(folder, grad_accum=2)) == 1
    error = last_line(capsys)
    assert error.startswith("error: the stream broke 6 times in a row Checkpoint at step 2: ")
    monkeypatch.undo()
    resume(folder)
    assert losses(folder) == expected[0]
    assert same(stored(folder), expected[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step(folder, capsys, monkeypatch, number):
    run(flags(folder))
    expected = losses(folder), stored(folder)
    shutil.rmtree(folder / "run")

    original = train.train_step

    def interrupted(*args, **kwargs):
        if sum(1 for _ in rows(folder)) == 3:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert train.main(flags(folder)) == 128 + number
    monkeypatch.undo()
    assert len(losses(folder)) == 4
    shown = capsys.readouterr().out
    assert (
        f"stopped at step 4. Checkpoint at step 4: posenc train --resume {folder / 'run'}" in shown
    )
    assert not (folder / "run/summary.json").exists()
    resume(folder)
    assert losses(folder) == expected[0]
    assert same(stored(folder), expected[1])


def test_the_tracker_of_a_run_sees_its_metrics(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(flags(folder, tracker="tensorboard"))
    events = EventAccumulator(str(folder / "run/tensorboard"))
    events.Reload()
    seen = [event.value for event in events.Scalars("loss")]
    assert seen == pytest.approx(losses(folder), rel=1e-6)
    assert {"val_loss", "lr", "grad_norm"} <= set(events.Tags()["scalars"])


def test_token_shards_without_a_tokenizer(folder, capsys):
    import numpy as np

    ids = np.random.default_rng(0).integers(0, 300, 5000).astype("<u2")
    ids.tofile(folder / "tokens.bin")
    run(flags(folder, data=folder / "tokens.bin", tokenizer="bpe", sample_tokens=5))
    summary = json.loads((folder / "run/summary.json").read_text())
    assert summary["bits_per_byte"] is None
    assert not (folder / "run/tokenizer.json").exists()
    assert not (folder / "run/sample.txt").exists()
    weights = load_file(folder / "run/model/model.safetensors")
    assert weights["wte.weight"].shape[0] == 2048
    assert training_runs.losses(folder)[0] > 0
