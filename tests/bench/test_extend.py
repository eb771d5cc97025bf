"""bench.extend on a small model of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import extend
from bench.rows import read

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
transformers.logging.set_verbosity_error()

WORDS = {word: i for i, word in enumerate(["?", *"abcdefgh"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=40, vocab_size=len(WORDS), max_position_embeddings=32,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    model.save_pretrained(path)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?").save_pretrained(path)
    for name, words in (("long", 70), ("short", 5), ("longer", 90)):
        text = [list(WORDS)[int(i)] for i in torch.randint(1, 9, (words,))]
        (path / f"{name}.txt").write_text(" ".join(text))
    return path


def run(folder: Path, *more: str) -> None:
    extend.main(
        ["--source", str(folder / "long*.txt"), "--model", str(folder), "--length", "65",
         "--original", "32", "--bucket", "20", *more]
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_our_scalings_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    run(folder, "--texts", "2", "--out", str(out))
    rows = read(out)
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row["name"], row["seed"], row["T"]), {})[row["implementation"]] = row[
            "p50"
        ]
    assert {key[2] for key in found} == {20, 40, 60, 65}
    assert {key[0] for key in found} == set(extend.SCALINGS)
    pairs = [both for key, both in found.items() if key[0] in extend.THEIRS]
    assert len(pairs) == 4 * 2 * 4
    assert all(abs(both["posenc"] - both["transformers"]) < 1e-4 for both in pairs)
    at_end = {key[0]: both["posenc"] for key, both in found.items() if key[1:] == (0, 65)}
    assert len(set(at_end.values())) == 5  # each changes the numbers
    run(folder, "--texts", "2", "--out", str(out))
    assert len(read(out)) == len(rows)  # nothing is measured twice


def test_losses_are_those_of_the_model(folder: Path) -> None:
    model, _ = extend.load(str(folder))
    ids = torch.randint(1, 9, (1, 33))
    assert torch.allclose(extend.losses(model, ids).mean(), model(ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--texts", "3"], "has 2 documents of 65 tokens"),
        (["--length", "30"], "above --original"),
        (["--scalings", "yarnn"], "unknown scaling"),
        (["--model", "/no/such"], "takes a folder"),
        (["--bucket", "0"], "--bucket must be at least 1"),
    ],
)
def test_bad_input(folder: Path, more: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(folder, *more)
