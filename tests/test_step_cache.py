"""generate(compile=True): the same tokens as without, from one compiled step."""

from typing import Any

import pytest
import torch

import posenc
from helpers import NAMES
from posenc.models import gpt

PATTERNS: list[Any] = [
    ("rope:window=5", "nope"),
    "carope:source=token",
    "rope:num_kv_heads=2,qk_norm=rms",
    "moh:encoding=carope",
]


def made(attention: Any, layers: int = 2) -> posenc.GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "context": 16, "layers": layers, "heads": 4, "embed_dim": 32}
    model = posenc.GPT(posenc.GPTConfig(**sizes, attention=attention)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("attention", [*NAMES, *PATTERNS], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_steps_of_one_shape_give_the_same_tokens(
    attention: Any, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt, "compiled_step", lambda device: gpt.step)
    model, ids = made(attention), torch.randint(31, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = not padded
    options = {"temperature": 0, "mask": mask}
    # mha's table of 16 rows is started over on the way
    expected = model.generate(ids, 14, **options)
    assert torch.equal(model.generate(ids, 14, **options, compile=True), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # the compiler's own
def test_the_step_is_compiled_once() -> None:
    model = made("rope", layers=1).float()
    ids = torch.randint(31, (1, 7))
    expected = model.generate(ids, 12, temperature=0)
    gpt.compiled_step.cache_clear()
    torch._dynamo.reset()
    before = torch._dynamo.config.error_on_recompile
    torch._dynamo.config.error_on_recompile = True
    try:
        for prompt, count in ((ids, 12), (ids[:, :3], 5), (ids, 30)):
            made_of = model.generate(prompt, count, temperature=0, compile=True)
            if count == 12:
                assert torch.equal(made_of, expected)
    finally:
        torch._dynamo.config.error_on_recompile = before
