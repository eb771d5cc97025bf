"""Validation: token-weighted loss over windows in order, at the training context and beyond.

loss           = sum of nll / number of targets
perplexity     = exp(loss)
bits per byte  = loss / ln 2 * tokens / bytes
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from posenc.data import Corpus, Tokens, evaluation_windows, packed_windows
from posenc.models.gpt import GPT, NO_TARGET
from posenc.training.parallel import Parallel


class Halted(Exception):
    """An evaluation that was asked to stop."""


@dataclass(frozen=True)
class Evaluation:
    """What the model makes of validation tokens.

    Attributes:
        context: length of the windows; all their targets count, the first with little to go by.
        loss: nats a target.
        targets: how many.
        tokens_per_byte: of the validation text, None where unknown.
    """

    context: int
    loss: float
    targets: int
    tokens_per_byte: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # beyond lies no float

    @property
    def bits_per_byte(self) -> float | None:
        return (
            None if self.tokens_per_byte is None else self.loss / math.log(2) * self.tokens_per_byte
        )

    def values(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "val_loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "targets": self.targets,
        }

    def __str__(self) -> str:
        text = f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}"
        bits = self.bits_per_byte
        return text if bits is None else f"{text}, {bits:.3f} bits per byte"


@torch.no_grad()
def evaluate(
    model: GPT,
    corpus: Corpus,
    *,
    context: int,
    max_tokens: int,
    tokens_per_batch: int,
    parallel: Parallel,
    autocast: AbstractContextManager[None],
    documents: bool = False,
    halted: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Score validation windows, the ranks taking turns. Mode and randomness are left as they were.

    Args:
        context: length of the windows.
        max_tokens: targets to score, rounded to whole windows; 0 is all.
        tokens_per_batch: how much a rank takes at once.
        documents: score documents packed into the windows, each with itself before it alone.
        halted: asked between batches, on all ranks alike.

    Raises:
        Halted: `halted` said so.
    """
    rows = max(1, tokens_per_batch // context)
    limit, text = max_tokens or None, corpus.validation
    windows: Iterator[Sequence[Tensor]] = (
        packed_windows(text, corpus.end_of_text(), context, limit, batch_size=rows)
        if documents
        else evaluation_windows(text, context, limit, batch_size=rows)
    )
    totals = torch.zeros(2, dtype=torch.float64, device=parallel.device)  # nll, targets
    training = model.training
    model.eval()
    for turn in _groups(windows, parallel.world_size):
        if halted():
            model.train(training)
            raise Halted
        # FSDP's ranks run in step: one without windows of its own computes others and drops them.
        batch = turn[min(parallel.rank, len(turn) - 1)]
        inputs, targets, *packed = (ids.to(parallel.device) for ids in batch)
        with autocast:
            loss = model(inputs, targets, segments=packed[0] if packed else None).loss
        if parallel.rank < len(turn):
            count = (targets != NO_TARGET).sum()
            totals += torch.stack((loss.double() * count, count.double()))
    model.train(training)
    nll, count = parallel.sum(totals).tolist()
    size = corpus.validation_bytes
    return Evaluation(
        context, nll / count, int(count), None if not size else len(corpus.validation) / size
    )


def _groups(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := list(islice(items, size)):
        yield group


def contexts(model: GPT, validation: Tokens) -> tuple[list[int], dict[str, str]]:
    """Which lengths of 1, 2 and 4 training contexts can be evaluated, and why the others cannot."""
    allowed, refused = [], {}
    for times in (1, 2, 4):
        length = times * model.config.context
        if model.max_length is not None and length > model.max_length:
            refused[str(length)] = (
                f"{model.config.attention} has a learned table of {model.max_length} positions"
            )
        elif len(validation) <= length:
            refused[str(length)] = f"the validation split has {len(validation)} tokens"
        else:
            allowed.append(length)
    return allowed, refused
