"""What a trained model makes of a text: the loss of chosen targets, by protocol and unit of text.

A text is a number of blocks of B targets, each within one document. Every mean is over as many
targets in every block, so that means of means are token-weighted.

| protocol | inputs that a target sees | scored |
|---|---|---|
| windows, L | those since the last multiple of L in its block | every target |
| sliding, L | the last L/2 to L, also from before its block | every target, half a window a time |
| positions, t | up to t: windows of the longest L, by buckets of the position | every target |
| tail, L | the last L | the same R = context/2 targets at up to PLACES places of every block |

The early targets of a window have little to go by, and a longer window has fewer of them; the tail
changes nothing but the context.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from posenc.data.batches import TokenSequence
from posenc.models.gpt import GPT

ENOUGH_DOCUMENTS = 30  # to resample them; fewer are resampled by the block
PLACES = 4

Ids = npt.NDArray[np.int64]
#: Mean nats a target by protocol, then by length or position, then for every unit of the text.
Losses = dict[str, dict[int, list[float]]]


class Block(NamedTuple):
    """ids[lead:-1] are the block's inputs, ids[lead + 1:] its targets; before them is context."""

    ids: Ids
    lead: int


@dataclass(frozen=True)
class Text:
    """What is scored.

    Attributes:
        blocks: all of `size` targets.
        documents: that they come from.
    """

    blocks: Sequence[Block]
    size: int
    documents: int

    @property
    def unit(self) -> str:
        """What is resampled."""
        return "document" if self.documents >= ENOUGH_DOCUMENTS else "block"

    @property
    def targets(self) -> Ids:
        """All of them, in order."""
        return np.concatenate([block.ids[block.lead + 1 :] for block in self.blocks])

    def __str__(self) -> str:
        return f"{len(self.blocks)} blocks of {self.size} tokens from {self.documents} documents"


def documents(tokens: TokenSequence, end_of_text: int | None) -> list[range]:
    """Where the documents lie; each begins with `end_of_text`, None being one document."""
    if end_of_text is None:
        return [range(len(tokens))]
    starts = np.flatnonzero(np.asarray(tokens[:]) == end_of_text).tolist()
    borders = [*sorted({0, *starts}), len(tokens)]
    return [range(start, stop) for start, stop in pairwise(borders)]


def choose_text(
    tokens: TokenSequence, end_of_text: int | None, *, size: int, wanted: int, lead: int
) -> Text:
    """Blocks of every document that holds one, the same number of each, spread evenly through it.

    Of at least ENOUGH_DOCUMENTS documents one block each; of fewer, enough blocks for `wanted` of
    them, if the shortest document holds its share.

    Args:
        size: targets in a block. wanted: blocks. lead: tokens of context before each, where there
            are so many in its document.

    Raises:
        ValueError: there are fewer than two blocks.
    """
    long = [found for found in documents(tokens, end_of_text) if len(found) > size]
    each = 1
    if long and len(long) < ENOUGH_DOCUMENTS:
        each = min(-(-wanted // len(long)), min(len(found) - 1 for found in long) // size)
    blocks = []
    for found in long:
        gap = (len(found) - 1 - each * size) / each
        for number in range(each):
            start = found.start + number * size + int((number + 0.5) * gap)
            before = min(lead, start - found.start)
            ids = np.array(tokens[start - before : start + size + 1], np.int64)
            blocks.append(Block(ids, before))
    if len(blocks) < 2:
        raise ValueError(
            f"the validation text gives {len(blocks)} blocks of {size} tokens; expected at least "
            "2. Give a smaller --block, or longer --val-data."
        )
    return Text(blocks, size, len(long))


class Question(NamedTuple):
    """A text, the training context, and the window lengths that models are asked at.

    Attributes:
        name: of the answers' file, NAME.json.
    """

    text: Text
    context: int
    lengths: Sequence[int]
    name: str = "losses"

    def digest(self) -> str:
        """The same for the same answer."""
        found = hashlib.sha256(repr((self.context, *self.lengths)).encode())
        for block in self.text.blocks:
            found.update(repr(block.lead).encode() + block.ids.tobytes())
        return found.hexdigest()


def ask(
    text: tuple[TokenSequence, int | None], *, context: int, times: Sequence[int], size: int,
    wanted: int, name: str = "losses",
) -> Question:  # fmt: skip
    """Choose the text for windows of so many times the training context.

    Args:
        text: tokens and end-of-text.

    Raises:
        ValueError: they do not divide a block, or there is too little text.
    """
    lengths = sorted({context * many for many in times})
    if context % 2:
        raise ValueError(f"half of a context is scored at a time; got a context of {context}.")
    for length in lengths:
        if size % length:
            raise ValueError(
                f"windows of {length} tokens do not divide blocks of {size}. "
                f"Give --block {-(-size // lengths[-1]) * lengths[-1]} or other --contexts."
            )
    found = choose_text(*text, size=size, wanted=wanted, lead=lengths[-1] // 2)
    return Question(found, context, lengths, name)


class Window(NamedTuple):
    """Inputs ids[start:stop] of a block, of whose targets those of ids[first:last] are scored."""

    start: int
    stop: int
    first: int
    last: int


def windows(block: Block, length: int) -> list[Window]:
    """Windows of `length` side by side."""
    starts = range(block.lead, len(block.ids) - 1, length)
    return [Window(start, start + length, start, start + length) for start in starts]


def sliding(block: Block, length: int) -> list[Window]:
    """Windows half a length apart; one that would begin before its document is shorter."""
    half = length // 2
    starts = range(block.lead, len(block.ids) - 1, half)
    return [Window(max(0, at - half), at + half, at, at + half) for at in starts]


def positions(block: Block, longest: int, limit: int, first: int, last: int) -> list[Window]:
    """Positions first .. last - 1 of the longest windows, of which a model sees `limit` inputs."""
    starts = range(block.lead, len(block.ids) - 1, longest)
    return [Window(start, start + limit, start + first, start + last) for start in starts]


def tails(block: Block, longest: int, length: int, scored: int) -> list[Window]:
    """The last `length` inputs of some of the longest windows."""
    found = windows(block, longest)
    places = min(PLACES, len(found))
    ends = [found[(i + 1) * len(found) // places - 1].stop for i in range(places)]
    return [Window(end - length, end, end - scored, end) for end in ends]


def protocols(
    block: Block, question: Question, limit: int
) -> Iterator[tuple[str, int, list[Window]]]:
    """What a model that sees `limit` tokens is asked of a block: protocol, length, windows."""
    longest, scored = question.lengths[-1], question.context // 2
    for length in question.lengths:
        if length <= limit:
            yield "windows", length, windows(block, length)
            yield "sliding", length, sliding(block, length)
    width = bucket(longest)
    for first in range(0, limit, width):
        last = min(first + width, limit)
        yield "positions", last, positions(block, longest, limit, first, last)
    for length in range(scored, limit + 1, scored):
        yield "tail", length, tails(block, longest, length, scored)


def bucket(longest: int) -> int:
    """Positions that are averaged: 16 buckets, of 64 from 1024 positions on."""
    return 64 if longest >= 1024 else max(1, longest // 16)


class Place(NamedTuple):
    """Inputs ids[start:stop] of the block of that number."""

    block: int
    start: int
    stop: int


@torch.no_grad()
def token_losses(model: GPT, ids: Tensor, scored: int) -> Tensor:
    """Nats of the last `scored` targets, in fp32 or better: (N, scored).

    Args:
        ids: (N, T + 1), inputs and the last target.
    """
    h, _ = model.hidden(ids[:, :-1])
    logits = model.head(h[:, -scored:])
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(precise.transpose(1, 2), ids[:, -scored:], reduction="none")


def losses(
    model: GPT,
    question: Question,
    *,
    tokens_per_batch: int,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Losses:
    """All protocols. Lengths beyond a learned table are left out.

    Protocols share windows: the last halves of `windows` are half of `sliding`. Each is computed
    once, from the first target on that any protocol scores.
    """
    blocks, longest = question.text.blocks, question.lengths[-1]
    limit = longest if model.max_length is None else min(longest, model.max_length)
    asked = [list(protocols(block, question, limit)) for block in blocks]
    first: dict[Place, int] = {}
    for number, of_block in enumerate(asked):
        for _, _, cut in of_block:
            for window in cut:
                place = Place(number, window.start, window.stop)
                first[place] = min(window.first, first.get(place, window.first))
    shapes: dict[tuple[int, int], list[Place]] = {}  # by inputs and targets
    for place, at in first.items():
        shapes.setdefault((place.stop - place.start, place.stop - at), []).append(place)

    model.eval()
    device = model.wte.weight.device
    nats: dict[Place, npt.NDArray[np.float64]] = {}
    for (length, scored), places in shapes.items():
        rows = max(1, tokens_per_batch // length)
        for start in range(0, len(places), rows):
            batch = places[start : start + rows]
            ids = np.stack([blocks[i].ids[begin : end + 1] for i, begin, end in batch])
            with autocast():
                found = token_losses(model, torch.from_numpy(ids).to(device), scored)
            nats.update(zip(batch, found.double().cpu().numpy(), strict=True))

    answers: Losses = {}
    for number, of_block in enumerate(asked):
        for protocol, length, cut in of_block:
            parts = []
            for window in cut:
                place = Place(number, window.start, window.stop)
                at = first[place]
                parts.append(nats[place][window.first - at : window.last - at])
            mean = float(np.concatenate(parts).mean())
            answers.setdefault(protocol, {}).setdefault(length, []).append(mean)
    return answers


def read_losses(text: str, question: Question) -> Losses | None:
    """The answers of an answers' file, None if they are to another question.

    Raises:
        ValueError: they are damaged.
    """
    values = json.loads(text)
    try:
        if values["question"] != question.digest():
            return None
        found = {
            protocol: {int(length): [float(x) for x in nats] for length, nats in by_length.items()}
            for protocol, by_length in values["losses"].items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    units = {len(nats) for by_length in found.values() for nats in by_length.values()}
    if units - {len(question.text.blocks)}:
        raise ValueError(f"expected {len(question.text.blocks)} losses at every length")
    return found
