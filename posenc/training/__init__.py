"""The parts of the trainer; `train.py` wires them. Needs the `train` extra."""

from posenc.training.checkpoint import latest, load, read_state, save
from posenc.training.config import PRESETS, TrainConfig
from posenc.training.evaluate import Evaluation, evaluate
from posenc.training.optimizer import make_optimizer, split_parameters
from posenc.training.parallel import Parallel, connect
from posenc.training.run_folder import RunFolder
from posenc.training.schedule import learning_rate
from posenc.training.step import train_step

__all__ = [
    "PRESETS",
    "Evaluation",
    "Parallel",
    "RunFolder",
    "TrainConfig",
    "connect",
    "evaluate",
    "latest",
    "learning_rate",
    "load",
    "make_optimizer",
    "read_state",
    "save",
    "split_parameters",
    "train_step",
]
