"""The record of training: rows of metrics.jsonl, the progress bar, the tracker, and the clock."""

import math
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from posenc.training.errors import Diverged
from posenc.training.evaluate import Evaluation
from posenc.training.job import Job
from posenc.training.tracker import Tracker


class TrainingLog:
    """Collects steps on the device and writes them out together: the host waits once for many.

    Args:
        job: its `seconds` are counted here, its `evaluation` kept.
        tracker, bar: what is told beside metrics.jsonl, on rank 0.
    """

    def __init__(self, job: Job, tracker: Tracker, bar: "tqdm[Any]") -> None:
        self._job, self._tracker, self._bar = job, tracker, bar
        self._pending: list[tuple[int, int, float, Tensor, Tensor]] = []
        self._since = time.perf_counter()

    def start_clock(self) -> None:
        """Count time from now: what came since the last flush was not training."""
        self._since = time.perf_counter()

    def add(self, rate: float, loss: Tensor, norm: Tensor) -> None:
        """Note the job's latest step: its learning rate, this rank's loss, the gradient's norm."""
        self._pending.append((self._job.step, self._job.tokens, rate, loss, norm))

    def flush(self) -> None:
        """Write the rows of the steps so far.

        Raises:
            Diverged: a loss or gradient was not finite. The rows before it are written.
        """
        if not self._pending:
            return
        steps, tokens, rates, losses, norms = zip(*self._pending, strict=True)
        self._pending = []
        parallel = self._job.parallel
        mean = parallel.sum(torch.stack(losses)) / parallel.world_size
        numbers = torch.stack((mean, torch.stack(norms))).tolist()  # waits for the device
        now = time.perf_counter()
        spent, self._since = now - self._since, now
        self._job.seconds += spent
        speed = len(steps) * self._job.config.tokens_per_step / spent
        rows: list[dict[str, Any]] = []
        for step, seen, rate, loss, norm in zip(steps, tokens, rates, *numbers, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._write(rows)
                what = (
                    f"gradient norm became {norm}" if math.isfinite(loss) else f"loss became {loss}"
                )
                raise Diverged(f"the {what} at step {step}.")
            rows.append(
                {
                    "step": step,
                    "tokens": seen,
                    "loss": loss,
                    "grad_norm": norm,
                    "lr": rate,
                    "tokens_per_second": speed,
                }
            )
        self._write(rows)
        self._bar.set_postfix_str(f"loss {rows[-1]['loss']:.3f}, {speed:,.0f} tok/s", refresh=False)
        self._bar.update(len(rows))

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Write an evaluation of the job's latest step."""
        step = self._job.step
        self._job.evaluation = evaluation
        self._write([{"step": step, "tokens": self._job.tokens, **evaluation.values()}])
        if self._job.parallel.is_main:
            self._bar.write(f"step {step}: validation {evaluation}")

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if self._job.parallel.is_main and rows:
            self._job.folder.append_metrics(rows)
            for row in rows:
                self._tracker.log(row)
