"""bench.losses: which text is scored, under which context, and that the numbers are the model's."""

from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.losses import Block, Question, Text, ask, choose_text, documents, losses, token_losses
from helpers import tiny_gpt

END, SYMBOLS = 0, 11


def tokens_of(*lengths: int) -> np.ndarray:
    """Documents of random tokens behind END."""
    generator = np.random.default_rng(0)
    parts = [[END, *generator.integers(1, SYMBOLS, length - 1)] for length in lengths]
    return np.concatenate(parts).astype(np.uint16)


class Clock(nn.Module):
    """A model whose logits depend on nothing but the position in the window."""

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__()
        self.wte = SimpleNamespace(weight=torch.empty(0))
        self.max_length = max_length
        self.table = torch.randn(99, SYMBOLS, generator=torch.Generator().manual_seed(1))
        self.batches: list[int] = []

    def hidden(self, ids: Tensor) -> tuple[Tensor, None]:
        assert not self.training
        self.batches.append(ids.numel())
        return torch.arange(ids.shape[1]).expand(ids.shape), None

    def head(self, h: Tensor) -> Tensor:
        return self.table[h]

    def nll(self, position: int, target: int) -> float:
        row = self.table[position].double()
        return float(row.logsumexp(0) - row[target])


def answer(model: nn.Module, question: Question, size: int = 50) -> dict:
    return losses(model, question, tokens_per_batch=size, autocast=nullcontext)


def test_documents_end_where_the_next_begins() -> None:
    found = documents(tokens_of(3, 1, 5), END)
    assert found == [range(3), range(3, 4), range(4, 9)]
    assert documents(tokens_of(3, 4)[1:], END) == [range(2), range(2, 6)]
    assert documents(tokens_of(3, 4), None) == [range(7)]


def test_blocks_lie_within_documents_and_apart() -> None:
    tokens = tokens_of(100, 41, 40, 333, 200)
    text = choose_text(tokens, END, size=40, wanted=8, lead=15)
    # The shortest of the four that hold a block holds one.
    assert (len(text.blocks), text.documents, text.unit) == (4, 4, "block")
    assert str(text) == "4 blocks of 40 tokens from 4 documents"
    text = choose_text(tokens_of(100, 333, 200), END, size=40, wanted=5, lead=15)
    assert len(text.blocks) == 6
    tokens = np.arange(700)
    tokens[[0, 100, 433]] = 0
    text = choose_text(tokens, 0, size=40, wanted=5, lead=15)
    spans = [(b.ids[0], b.ids[b.lead], b.ids[-1]) for b in text.blocks]
    for block, (first, start, last) in zip(text.blocks, spans, strict=True):
        assert len(block.ids) == block.lead + 41
        assert not (block.ids[1:] == 0).any()
        assert block.lead == min(15, start - max(x for x in (0, 100, 433) if x <= start))
        assert last - first == len(block.ids) - 1 or first == 0
    for (_, _, last), (_, start, _) in pairwise(spans):
        assert last <= start
    # Two blocks of 40 in 332 targets: gaps of 126 around and between, halved at the ends.
    assert [start for _, start, _ in spans[2:4]] == [100 + 63, 100 + 40 + 189]


def test_enough_documents_give_one_block_each() -> None:
    text = choose_text(tokens_of(*range(50, 81)), END, size=45, wanted=1000, lead=4)
    assert (len(text.blocks), text.documents, text.unit) == (31, 31, "document")


@pytest.mark.parametrize("max_length", [None, 6, 14, 24])
def test_every_protocol_scores_its_targets_under_its_context(max_length: int | None) -> None:
    """Loops over targets, the position of each worked out from the table in the module's head."""
    context, size, longest = 6, 48, 24
    tokens = tokens_of(49, 55, 101)  # before the first block there is but its own first token
    question = ask((tokens, END), context=context, times=[4, 1, 2], size=size, wanted=3)
    assert [block.lead for block in question.text.blocks] == [0, 3, 12]
    model = Clock(max_length)
    found = answer(model, question)
    limit = max_length or longest
    expected: dict[str, dict[int, list[float]]] = {
        "windows": {}, "sliding": {}, "positions": {}, "tail": {}
    }  # fmt: skip
    for block in question.text.blocks:
        targets = block.ids[block.lead + 1 :]
        for length in (6, 12, 24):
            if length > limit:
                continue
            side = [model.nll(j % length, int(targets[j])) for j in range(size)]
            expected["windows"].setdefault(length, []).append(float(np.mean(side)))
            half = length // 2
            seen = [min(block.lead, half) if j < half else half for j in range(size)]
            slid = [model.nll(seen[j] + j % half, int(targets[j])) for j in range(size)]
            expected["sliding"].setdefault(length, []).append(float(np.mean(slid)))
        for position in range(limit):
            each = [model.nll(position, int(targets[j])) for j in range(position, size, longest)]
            expected["positions"].setdefault(position + 1, []).append(float(np.mean(each)))
        for length in range(3, limit + 1, 3):
            end = [
                model.nll(length - 3 + i, int(targets[stop - 3 + i]))
                for stop in (24, 48)
                for i in range(3)
            ]
            expected["tail"].setdefault(length, []).append(float(np.mean(end)))
    assert found.keys() == expected.keys()
    for protocol, by_length in expected.items():
        assert found[protocol].keys() == by_length.keys(), protocol
        for length, values in by_length.items():
            # fp32 nats of about 3, rounded once and summed.
            assert found[protocol][length] == pytest.approx(values, abs=3e-6), (protocol, length)


def test_shared_windows_are_computed_once_and_batches_are_bounded() -> None:
    question = ask((tokens_of(200, 200), END), context=8, times=[1, 2], size=64, wanted=2)
    model = Clock()
    answer(model, question, 40)
    assert max(model.batches) <= 40
    # windows at 8 and 16; the other half of sliding at 8 and 16; tails of 4 and 12 at four places.
    assert sum(model.batches) == 2 * (64 + 64 + 64 + 64 + 4 * (4 + 12))


@pytest.mark.parametrize("name", ["rope", "mha", "moh"])
def test_losses_are_those_of_the_model(name: str) -> None:
    model = tiny_gpt(name)
    ids = torch.randint(1, 29, (3, 17), generator=torch.Generator().manual_seed(2))
    direct = model(ids[:, :-1]).logits.log_softmax(-1)
    expected = -direct.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(token_losses(model, ids, 5), expected[:, -5:])
    blocks = [Block(row.numpy(), 0) for row in ids]
    found = answer(model, Question(Text(blocks, 16, 3), 4, [4, 16]))
    whole = [float(model(row[None, :-1], row[None, 1:]).loss.detach()) for row in ids]
    assert found["windows"][16] == pytest.approx(whole, rel=1e-6)
    parts = model(ids[0, :16].view(4, 4), ids[0, 1:].view(4, 4)).loss.detach()
    assert found["windows"][4][0] == pytest.approx(float(parts), rel=1e-6)
    last = F.cross_entropy(model(ids[:1, 10:16]).logits[0, -2:], ids[0, 15:])
    assert found["tail"][6][0] == pytest.approx(float(last.detach()), rel=1e-6)


def test_losses_are_fp32_where_logits_are_not() -> None:
    model = tiny_gpt("rope", torch.bfloat16)
    ids = torch.randint(1, 29, (2, 9))
    assert token_losses(model, ids, 3).dtype == torch.float32


def test_the_same_question_has_the_same_digest() -> None:
    tokens = tokens_of(200, 200)
    asked = {"context": 8, "times": [1, 2], "size": 64, "wanted": 2}
    digest = ask((tokens, END), **asked).digest()
    assert ask((tokens, END), **asked | {"times": [2, 1, 1]}).digest() == digest
    for change in ({"times": [1]}, {"context": 16, "times": [1]}, {"size": 32}, {"wanted": 6}):
        assert ask((tokens, END), **asked | change).digest() != digest
    tokens[120] += 1
    assert ask((tokens, END), **asked).digest() != digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": [1, 3]}, "windows of 24 tokens do not divide blocks of 64. Give --block 72"),
        ({"size": 1024}, "gives 0 blocks of 1024 tokens; expected at least 2"),
        ({"context": 1}, "half of a context is scored at a time; got a context of 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes: dict, message: str) -> None:
    asked = {"context": 8, "times": [1, 2], "size": 64, "wanted": 2} | changes
    with pytest.raises(ValueError, match=message):
        ask((tokens_of(200, 200), END), **asked)
