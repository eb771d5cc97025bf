"""A run while it lives: what it is made of, how far it is, its way to a checkpoint and back."""

import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from posenc.data import Batches, Corpus, PackedBatches, StreamBatches
from posenc.models.gpt import GPT
from posenc.routing.stats import RoutingStats, record_routing, routers
from posenc.training import checkpoint
from posenc.training.changes import launched_otherwise, learning_rate_jump
from posenc.training.config import TrainConfig, from_mapping
from posenc.training.console import say
from posenc.training.environment import launch
from posenc.training.errors import Diverged
from posenc.training.evaluate import Evaluation, evaluate
from posenc.training.invocation import command
from posenc.training.parallel import Parallel
from posenc.training.precision import autocast
from posenc.training.run_folder import RunFolder


@dataclass
class Job:
    """A run.

    Attributes:
        module: the model as the ranks train it together.
        dtype: of products.
        step: optimiser steps so far.
        seconds: spent on them.
        saved: the step of the last checkpoint, -1 without one.
        evaluation: the latest.
        routing: what each layer's router, None without one, did in this rank's share of the last
            validation; None for a model without routers.
    """

    config: TrainConfig
    parallel: Parallel
    folder: RunFolder
    corpus: Corpus
    batches: Batches | StreamBatches | PackedBatches
    model: GPT
    module: nn.Module
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype
    step: int = 0
    seconds: float = 0.0
    saved: int = -1
    evaluation: Evaluation | None = None
    routing: list[RoutingStats | None] | None = None

    @property
    def tokens(self) -> int:
        """Trained on so far. A resumed run may have another batch: the windows are counted."""
        return self.batches.sequences * self.config.context

    def say(self, text: str) -> None:
        """Print, on rank 0."""
        if self.parallel.is_main:
            say(text)

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of products, for one forward pass."""
        return autocast(self.parallel.device, self.dtype)

    def due(self, every: int) -> bool:
        """Whether something that happens `every` so many steps, and after the last, happens now."""
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def evaluate(
        self,
        context: int,
        max_tokens: int | None = None,
        halted: Callable[[], bool] = lambda: False,
    ) -> Evaluation:
        """Validate at a length, with about as many tokens at once as in training.

        Raises:
            Halted: between batches, once `halted` says so on all ranks.
        """
        rows = self.config.batch_size // self.parallel.world_size
        return evaluate(
            self.model,
            self.corpus,
            context=context,
            max_tokens=self.config.eval_tokens if max_tokens is None else max_tokens,
            tokens_per_batch=rows * self.config.context,
            parallel=self.parallel,
            autocast=self.autocast(),
            documents=self.config.eval_documents,
            halted=halted,
        )

    def validate(self, halted: Callable[[], bool] = lambda: False) -> Evaluation:
        """Validate at the training context; after the last step, note what the routers do too.

        Raises:
            Halted: as `evaluate`.
        """
        if self.step < self.config.steps or not routers(self.model):
            return self.evaluate(self.config.context, halted=halted)
        with record_routing(self.model) as stats:
            evaluation = self.evaluate(self.config.context, halted=halted)
        self.routing = [stats.get(f"h.{i}.attn.router") for i in range(len(self.model.h))]
        return evaluation

    def save(self, position: dict[str, Any]) -> None:
        """Save a checkpoint after the present step, unless there is one.

        Args:
            position: of the batches after that step.

        Raises:
            Diverged: these weights give no finite loss. The checkpoint before stays.
        """
        if self.saved == self.step:
            return
        loss = self.evaluate(self.config.context, max_tokens=1).loss  # one window
        if not math.isfinite(loss):
            raise Diverged(f"the loss became {loss} after step {self.step}.")
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "data": position,
            "fingerprint": self.corpus.fingerprint,
            "config": asdict(self.config),
        }
        checkpoint.save(self.folder.checkpoints, self.model, self.optimizer, state, self.parallel)
        self.saved = self.step

    def load(self) -> None:
        """Go to the newest checkpoint of the run folder; without one, stay at the beginning.

        Says what this launch changes.

        Raises:
            ValueError: it is damaged, of other data or another model, or beyond the last step.
        """
        was = from_mapping(self.folder.read_config())
        before = self.folder.read_environment() | {"tracker": was.tracker}
        now = launch(self.parallel, self.dtype) | {"tracker": self.config.tracker}
        if changes := launched_otherwise(before, now):
            self.say(changes)
        path = checkpoint.latest(self.folder.checkpoints)
        if path is None:
            self.say(f"{self.folder.path} has no checkpoint yet: it starts again")
            return
        state = checkpoint.read_state(path)
        if state["fingerprint"] != self.corpus.fingerprint:
            raise ValueError(
                f"{self.folder.path} was trained on other data. "
                "Resume with the same text and tokenizer."
            )
        if state["step"] > self.config.steps:
            raise ValueError(
                f"{self.folder.path} is at step {state['step']} already; got --steps "
                f"{self.config.steps}. Give --steps {state['step']} or more."
            )
        self.batches.load_state_dict(state["data"])
        checkpoint.load(path, self.model, self.optimizer, self.parallel)
        self.step = self.saved = state["step"]
        self.seconds = state["seconds"]
        if jump := learning_rate_jump(self.step, from_mapping(state["config"]), self.config):
            self.say(jump)

    def release(self) -> None:
        """Let go of DDP, which must not outlive the process group.

        DDP's reducer would be the last to hold the group and would destroy it under Python's lock,
        which gloo's threads may be waiting for: the process hangs at its end, once in ten times.
        """
        self.module = self.model
        gc.collect()

    def how_to_resume(self) -> str:
        """One line for a user whose run has stopped."""
        if self.saved < 0:
            return "There is no checkpoint yet."
        return f"Checkpoint at step {self.saved}: {command('--resume', self.folder.path)}"
