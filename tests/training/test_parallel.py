"""The processes of torchrun on the CPU: the same numbers as one process, and each other's runs."""

import json
import shutil

import pytest

from posenc.training import checkpoint as checkpoints
from training_runs import (
    finished,
    flags,
    losses,
    ranks,
    resumed,
    rows,
    run,
    start,
    train,
)

pytestmark = pytest.mark.slow


def evaluations(folder):
    return [row["val_loss"] for row in rows(folder) if "val_loss" in row]


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("ddp", {"grad_accum": 2}),
        ("fsdp", {"grad_accum": 2, "activation_checkpointing": True}),
        ("fsdp", {"attention": "carope", "embed_dim": 20}),
    ],
    ids=["ddp", "fsdp", "fsdp-carope"],
)
def test_two_processes_train_as_one(folder, mode, changes):
    changes = {**changes, "eval_every": 3, "sample_tokens": 4, "grad_clip": 0.5}
    run(flags(folder, **changes))
    expected = losses(folder), evaluations(folder), [row.get("grad_norm") for row in rows(folder)]
    shutil.rmtree(folder / "run")
    out, _ = ranks(flags(folder, parallel=mode, **changes), folder)
    assert losses(folder) == pytest.approx(expected[0], rel=1e-5)
    assert evaluations(folder) == pytest.approx(expected[1], rel=1e-5)
    norms = [row["grad_norm"] for row in rows(folder) if "loss" in row]
    assert norms == pytest.approx([norm for norm in expected[2] if norm is not None], rel=1e-4)
    assert "batch: 4 sequences (2 x 2)" in out
    assert out.count("run folder:") == 1


def test_a_router_trains_nearly_as_one(folder):
    """Its balance loss is a mean over each rank's share, as its authors'."""
    changes = {"attention": "moh", "heads": 4}
    run(flags(folder, **changes))
    expected = losses(folder)
    shutil.rmtree(folder / "run")
    ranks(flags(folder, parallel="ddp", **changes), folder)
    assert losses(folder) == pytest.approx(expected, rel=1e-3)
    summary = json.loads((folder / "run/summary.json").read_text())
    assert [layer["tokens"] for layer in summary["routing"]] == [160, 160]  # half of them


def test_a_run_moves_between_numbers_of_processes(folder, capsys):
    """One process, two with whole models, two with halves, one again: as if it never moved.

    Where no flag says how they share the work, it follows from their number.
    """
    run(flags(folder, steps=8))
    expected = losses(folder)
    shutil.rmtree(folder / "run")
    again = resumed(folder)
    run(flags(folder, steps=2, decay_steps=8))
    out, _ = finished(start([*again, "--steps", "4"], processes=2))
    changed = "launched otherwise than before: parallel {}, processes {}."
    assert out.count(changed.format("ddp (was none)", "2 (was 1)")) == 1
    ranks([*again, "--steps", "6", "--parallel", "fsdp"], folder)
    (path,) = (folder / "run/checkpoints").iterdir()
    assert len(list(path.glob("*.safetensors"))) == 2
    assert train.main([*again, "--steps", "8"]) == 0
    assert changed.format("none (was fsdp)", "1 (was 2)") in capsys.readouterr().out
    assert losses(folder) == pytest.approx(expected, rel=1e-5)


def test_sigterm_reaches_all_processes_after_the_same_step(folder, capsys):
    """torchrun passes the signal on; the ranks agree on where to stop, and save together."""
    process = start(flags(folder, parallel="ddp", steps=100_000), processes=2)
    wait_for_steps(folder, process)
    assert train.main(resumed(folder)) == 2  # rank 0 holds the folder
    assert f"{folder / 'run'} is in use by process " in capsys.readouterr().err
    process.terminate()
    process.communicate(timeout=120)
    path = checkpoints.latest(folder / "run/checkpoints")
    assert checkpoints.read_state(path)["step"] >= 3
    assert path.name == f"step-{len(losses(folder)):08d}"
    last = str(len(losses(folder)))
    assert train.main([*resumed(folder), "--steps", last]) == 0


def wait_for_steps(folder, process):
    import time

    for _ in range(1200):
        assert process.poll() is None, process.communicate()
        if (folder / "run/metrics.jsonl").exists() and len(rows(folder)) >= 3:
            return
        time.sleep(0.1)
    raise AssertionError("no steps in two minutes")


@pytest.mark.parametrize("launched", [True, False])
def test_bad_input_is_said_once(folder, launched):
    """The launcher ends all processes once one has failed; alone each ends by itself."""
    if launched:
        _, err = finished(start(flags(folder, parallel="none"), processes=2), code=1)
    else:
        _, err = ranks(flags(folder, parallel="ddp", batch_size=3), folder, code=2)
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert not (folder / "run").exists()
