"""What the trainer's tests share: a tiny text, tiny flags, and ways to start train.py."""

import importlib.util
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)  # at these sizes a second thread only waits


def load_train() -> ModuleType:
    """train.py as a module, wherever pytest was started."""
    spec = importlib.util.spec_from_file_location("posenc_train", ROOT / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    return module


train = load_train()


def write_text(path: Path, words: int = 6000) -> Path:
    """A file of random words, the same every time."""
    generator = random.Random(0)
    vocabulary = ["".join(generator.choices("abcdefgh", k=4)) for _ in range(50)]
    path.write_text(" ".join(generator.choices(vocabulary, k=words)) + "\n")
    return path


def flags(folder: Path, **changes: Any) -> list[str]:
    """Flags of a tiny run in `folder`/run on `folder`/text.txt."""
    values: dict[str, Any] = {
        "data": folder / "text.txt",
        "out": folder / "run",
        "cache_dir": folder / "cache",
        "tokenizer": "byte",
        "layers": 2,
        "heads": 2,
        "embed_dim": 16,
        "context": 16,
        "batch_size": 4,
        "steps": 6,
        "warmup": 2,
        "lr": 1e-2,
        "min_lr": 1e-3,
        "eval_every": 0,
        "eval_tokens": 320,
        "save_every": 0,
        "log_every": 1,
        "sample_tokens": 0,
        "dtype": "float32",
        "device": "cpu",
        **changes,
    }
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        words += (
            [flag]
            if value is True
            else [flag, *map(str, value if isinstance(value, list) else [value])]
        )
    return words


def run(argv: Sequence[str]) -> None:
    """Train in this process."""
    assert train.main(list(argv)) == 0


def resumed(folder: Path) -> list[str]:
    """Flags that continue the run of `flags`, on the same device."""
    return ["--resume", str(folder / "run"), "--device", "cpu"]


def resume(folder: Path, **changes: Any) -> None:
    words = [
        word
        for name, value in changes.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    run([*resumed(folder), *words])


def start(argv: Sequence[str], *, processes: int = 0, **options: Any) -> "subprocess.Popen[str]":
    """Start train.py as a user does; with `processes`, under torchrun."""
    program = [sys.executable, str(ROOT / "train.py")]
    if processes:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        program = [sys.executable, *launcher, str(ROOT / "train.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*program, *argv],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def ranks(argv: Sequence[str], folder: Path, code: int = 0) -> tuple[str, str]:
    """Output and errors of two processes that share the work as those of torchrun do, which end
    with the exit code expected. They are forks of one that has imported what they need.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["posenc.training.main"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    files = folder / "out.txt", folder / "err.txt"
    for file in files:
        file.touch()
    processes = [
        context.Process(target=_rank, args=(list(argv), rank, port, *files), daemon=True)
        for rank in (0, 1)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
    finally:
        for process in processes:
            process.kill()
            process.join()
    out, err = (file.read_text() for file in files)
    assert [process.exitcode for process in processes] == [code, code], (out, err)
    return out, err


def _rank(argv: list[str], rank: int, port: int, *files: Path) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (own | place).items()})
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.exit(train.main(argv))


def finished(process: "subprocess.Popen[str]", code: int = 0) -> tuple[str, str]:
    """Output and errors of a process that ended with the exit code expected."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The training losses, in order; there is one for each step."""
    found = [row for row in rows(folder) if "loss" in row]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["loss"] for row in found]


def checkpoint(folder: Path) -> Path:
    """The only checkpoint of a run."""
    (path,) = (folder / "run/checkpoints").iterdir()
    return path


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of one process."""
    (shard,) = checkpoint(folder).glob("*.safetensors")
    return load_file(shard)
