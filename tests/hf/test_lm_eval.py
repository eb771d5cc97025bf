"""lm-evaluation-harness runs on our GPT, here on a task of its own."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")
models = pytest.importorskip("lm_eval.models.huggingface")
tasks = pytest.importorskip("lm_eval.tasks")
tokenizers = pytest.importorskip("tokenizers")

from posenc.hf import PosencConfig, PosencForCausalLM  # noqa: E402

WORDS = ["<end>", *"abcdefgh"]
TASK = """
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["rope", "carope", "rcmha"])
def test_a_task_is_scored_as_by_hand(name: str, tmp_path: Path) -> None:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = PosencConfig(
        vocab_size=len(WORDS), context=32, layers=2, heads=4, embed_dim=24, attention=name,
        eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = PosencForCausalLM(config).eval()
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    questions = ["a b c", "d", "e f g h a", "b b", "h g", "c a f d"]
    choices = ["a", "b c", "d"]
    documents = [
        {"question": question, "choices": choices, "answer": i % 3}
        for i, question in enumerate(questions)
    ]
    file = tmp_path / "toy.json"
    file.write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "toy.yaml").write_text(TASK.format(file=file))

    def score(question: str, choice: str) -> float:
        words = [*question.split(), *choice.split()]
        ids = torch.tensor([[WORDS.index(word) for word in words]])
        logs = model(ids).logits[0].log_softmax(-1)
        start = len(question.split())
        return sum(float(logs[i - 1, ids[0, i]].detach()) for i in range(start, len(words)))

    best = [max(range(3), key=lambda i: score(q, choices[i])) for q in questions]
    expected = sum(found == i % 3 for i, found in enumerate(best)) / len(questions)
    results = lm_eval.simple_evaluate(
        model=models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu"),
        tasks=["toy"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results["results"]["toy"]["acc,none"] == pytest.approx(expected)
