"""Checkpoints: model, optimiser, random states and position, atomic, for any number of ranks.

    checkpoints/step-00000250/
        shard-*.safetensors    tensors, written by torch.distributed.checkpoint, each rank its share
        state.json             step, data position, configuration, and the size of every shard

A checkpoint is written under a temporary name and renamed when it is whole, and older ones are
deleted only then: at any moment the newest folder of such a name can be resumed from, on any number
of ranks. Whatever has another name, step-best or step-00000250.bak, is the user's and stays.
Tensors are stored as safetensors and everything else as JSON, so that loading never runs code from
a checkpoint (torch.distributed.checkpoint's default format is a pickle).
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from posenc.training.optimizer import optimizer_tensors
from posenc.training.parallel import Parallel
from posenc.wrappers import plain_name

STATE = "state.json"
FORMAT = 1
_TEMPORARY = ".writing-"
_NAME = re.compile("step-([0-9]{8}|[1-9][0-9]{8,})")  # a folder named otherwise is not ours


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    return max(_own(folder), key=lambda path: int(path.name.removeprefix("step-")), default=None)


def _own(folder: Path, before: str = "") -> list[Path]:
    """The folders with a checkpoint's name after `before`."""
    return [
        path
        for path in folder.glob(f"{before}step-*")
        if _NAME.fullmatch(path.name.removeprefix(before)) and path.is_dir()
    ]


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> dict[str, Tensor]:
    """Everything that a step changes, by name: the live tensors, and this rank's random states.

    Names are those of the bare parts: a run resumes with parts wrapped otherwise, or not at all.
    """
    state = model.state_dict()
    tensors = {f"model.{plain_name(name)}": tensor for name, tensor in state.items()}
    tensors |= {
        f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(model, optimizer).items()
    }
    tensors[f"rng.cpu.{parallel.rank}"] = torch.get_rng_state()
    if parallel.device.type == "cuda":
        tensors[f"rng.cuda.{parallel.rank}"] = torch.cuda.get_rng_state(parallel.device)
    return tensors


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    parallel: Parallel,
) -> Path:
    """Write a checkpoint of all ranks and delete the older ones.

    Args:
        folder: of the run's checkpoints.
        state: plain values, with the `step`.

    Raises:
        OSError: it could not be written. The checkpoint before it is untouched.
    """
    name = f"step-{state['step']:08d}"
    temporary = folder / f"{_TEMPORARY}{name}"
    parallel.on_main(lambda: _make_empty(temporary))
    try:
        with _quiet(), _unwrapped():
            save_tensors(
                training_tensors(model, optimizer, parallel),
                storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
            )
        parallel.on_main(lambda: _publish(temporary, folder / name, state))
    except OSError:
        if parallel.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder / name


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> None:
    """Load a checkpoint into model, optimiser and this rank's random states.

    A rank that the checkpoint has no random state for keeps the one it has.

    Raises:
        ValueError: the checkpoint is damaged or belongs to another model.
    """
    tensors = training_tensors(model, optimizer, parallel)
    stored = sizes(path)
    _read_into(path, {k: v for k, v in tensors.items() if k in stored or k[:4] != "rng."}, stored)
    torch.set_rng_state(tensors[f"rng.cpu.{parallel.rank}"])
    if parallel.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"rng.cuda.{parallel.rank}"], parallel.device)


def load_model(path: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint alone.

    Raises:
        ValueError: the checkpoint is damaged or belongs to another model.
    """
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    _read_into(path, weights, sizes(path))


def sizes(path: Path) -> dict[str, torch.Size]:
    """The shapes of a checkpoint's tensors.

    Raises:
        ValueError: a shard is damaged.
    """
    try:
        stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a damaged shard: {error}.") from None
    return {name: found.size for name, found in stored.items() if hasattr(found, "size")}


def _read_into(path: Path, wanted: dict[str, Tensor], stored: Mapping[str, torch.Size]) -> None:
    """Read tensors in place, once all are found to fit."""
    for name, tensor in wanted.items():
        size = stored.get(name)
        if size != tensor.shape:
            found = "nothing" if size is None else f"shape {tuple(size)}"
            raise ValueError(
                f"{path} does not fit the model: {name} needs shape {tuple(tensor.shape)}; "
                f"got {found}. Use the options that the run was started with."
            )
    with _quiet(), _unwrapped():
        load_tensors(wanted, storage_reader=HuggingFaceStorageReader(str(path)))


def read_state(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, once all its shards are found to be there.

    Raises:
        ValueError: something is missing, damaged or of another format.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(
                f"{path} has checkpoint format {state['format']}; expected {FORMAT}. "
                "Use the version of posenc that wrote it."
            )
        for name, size in state["shards"].items():
            if (path / name).stat().st_size != size:
                raise ValueError(f"{path / name} should have {size} bytes; it is damaged.")
        # Torch's reader takes every file of this kind, whoever put it there.
        if strange := {file.name for file in path.glob("*.safetensors")} - state["shards"].keys():
            raise ValueError(
                f"{path} holds {sorted(strange)}, which {STATE} does not name. Move them elsewhere."
            )
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a whole checkpoint: {type(error).__name__}: {error}."
        ) from None
    return dict(state)


def clean(folder: Path) -> None:
    """Delete what an interrupted save left behind."""
    for path in _own(folder, _TEMPORARY):
        shutil.rmtree(path)


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()


def _publish(temporary: Path, final: Path, state: Mapping[str, Any]) -> None:
    shards = {path.name: path.stat().st_size for path in sorted(temporary.glob("*.safetensors"))}
    with (temporary / STATE).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **state, "shards": shards}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(temporary)
    temporary.rename(final)
    _sync(final.parent)
    for path in _own(final.parent):
        if path != final:
            shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise the error of the failing rank itself, not torch's collection of them."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((c for c in causes if isinstance(c, OSError | ValueError)), causes[0]) from None
