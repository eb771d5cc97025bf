"""Schedule, optimiser, evaluation, run folder, trackers: each against its definition."""

import math
import shutil
import signal
import sys
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

import posenc
from posenc import record_routing
from posenc.data import Tokens
from posenc.models.gpt import GPT, GPTConfig
from posenc.training import checkpoint
from posenc.training.environment import environment, peak_memory
from posenc.training.errors import Refused
from posenc.training.evaluate import Evaluation, contexts, evaluate
from posenc.training.export import plain_model, sample_text
from posenc.training.optimizer import make_optimizer, optimizer_tensors, split_parameters
from posenc.training.parallel import Parallel
from posenc.training.plot import loss_plot, smooth
from posenc.training.precision import choose_device, choose_dtype
from posenc.training.run_folder import RunFolder
from posenc.training.schedule import learning_rate
from posenc.training.signals import StopSignals
from posenc.training.step import train_step
from posenc.training.tracker import check_tracker, make_tracker

ALONE = Parallel("none", torch.device("cpu"))


def small(attention: str = "rope", **changes) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "context": 8, "layers": 2, "heads": 4, "embed_dim": 16}
    return GPT(GPTConfig(**{**sizes, "attention": attention, **changes}))


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    rate = [
        learning_rate(step, lr=1.0, min_lr=0.1, warmup=10, decay_steps=110) for step in range(200)
    ]
    assert rate[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rate[10] == 1.0
    assert rate[60] == pytest.approx(0.55)
    assert rate[35] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate[110:] == [0.1] * 90
    assert all(a > b for a, b in pairwise(rate[10:111]))
    assert learning_rate(5, lr=1.0, min_lr=0.1, warmup=10, decay_steps=5) == pytest.approx(6 / 11)
    assert learning_rate(5, lr=1.0, min_lr=0.1, warmup=5, decay_steps=5) == 0.1


@pytest.mark.parametrize("attention", posenc.names())
def test_only_matrices_of_the_model_decay(attention):
    model = small(attention, bias=True)
    decayed, other = (set(map(id, group)) for group in split_parameters(model))
    named = dict(model.named_parameters())
    assert decayed | other == {id(weight) for weight in named.values()}
    assert not decayed & other
    expected = {"wte.weight", "wpe.weight"}
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "W_R.weight")
    router = ("W_s.weight", "W_r.weight", "W_h.weight")
    for name, weight in named.items():
        if name in expected or name.endswith((*linear, *router)):
            assert id(weight) in decayed, name
        else:
            assert id(weight) in other, name


def test_a_module_can_exempt_its_own_and_its_parts_weights():
    class Part(nn.Module):
        no_weight_decay = frozenset({"inner.weight"})

        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(2, 2), nn.Linear(2, 2)

    model = nn.ModuleDict({"part": Part()})
    (decayed,) = split_parameters(model)[0]
    assert decayed is model["part"].outer.weight


def test_adamw_with_groups_is_adamw():
    model, twin = small(), small()
    ours = make_optimizer(model, lr=0.01, betas=(0.8, 0.9), weight_decay=0.3)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.0)
    decays = {id(weight) for weight in split_parameters(model)[0]}
    for _ in range(3):
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            one.grad = other.grad = torch.randn_like(one)
        with torch.no_grad():
            for one, other in zip(model.parameters(), twin.parameters(), strict=True):
                other.mul_(1 - 0.01 * 0.3 if id(one) in decays else 1)
        ours.step()
        theirs.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_state_made_before_the_first_step_changes_nothing():
    model, twin = small(), small()
    prepared = make_optimizer(model, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    tensors = optimizer_tensors(model, prepared)
    assert tensors["exp_avg.wte.weight"].shape == model.wte.weight.shape
    plain = make_optimizer(twin, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        one.grad = other.grad = torch.randn_like(one)
    prepared.step()
    plain.step()
    for name, value in optimizer_tensors(twin, plain).items():
        assert torch.equal(tensors[name], value)


@pytest.mark.parametrize("attention", ["rope", "moh"])
def test_accumulation_is_the_gradient_of_the_whole_batch(attention):
    ids = torch.randint(11, (6, 9), generator=torch.Generator().manual_seed(1))
    whole = [(ids[:, :-1], ids[:, 1:])]
    parts = [(part[:, :-1], part[:, 1:]) for part in ids.split(2)]
    results = []
    for batches in (whole, parts):
        model = small(attention)
        optimizer = make_optimizer(model, lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
        loss, norm = train_step(
            model, optimizer, batches, grad_clip=0.0, parallel=ALONE, autocast=nullcontext()
        )
        results.append((loss, norm))
    # A router's balance loss is a mean over the micro-batch, so there the norms only come close.
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(
        results[0][1], results[1][1], rtol=1e-2 if attention == "moh" else 1e-5, atol=0
    )


@pytest.mark.parametrize("weight", [0.0, 0.01, 3.0])
def test_the_balance_loss_is_added_with_its_weight(weight):
    ids = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(1))
    stepped, alone = small("moh"), small("moh")
    out = alone(ids[:, :-1], ids[:, 1:])
    (out.loss + weight * out.aux_loss).backward()
    expected = {name: weight.grad for name, weight in alone.named_parameters()}
    before = {name: weight.detach().clone() for name, weight in stepped.named_parameters()}
    loss, _ = train_step(
        stepped, torch.optim.SGD(stepped.parameters(), lr=1.0), [(ids[:, :-1], ids[:, 1:])],
        grad_clip=0.0, aux_weight=weight, parallel=ALONE, autocast=nullcontext(),
    )  # fmt: skip
    assert loss == out.loss
    for name, value in stepped.named_parameters():
        torch.testing.assert_close(before[name] - value, expected[name], rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_to_the_norm():
    ids = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(1))
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [weight.detach().clone() for weight in model.parameters()]
    batches = [(ids[:, :-1], ids[:, 1:])]
    _, norm = train_step(
        model, optimizer, batches, grad_clip=0.01, parallel=ALONE, autocast=nullcontext()
    )
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)])
    assert norm > 0.01
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def corpus_of(count: int, size: int | None = None):
    tokens = np.random.default_rng(0).integers(0, 11, count).astype(np.uint16)
    return SimpleNamespace(validation=Tokens([tokens]), validation_bytes=size)


@pytest.mark.parametrize("length", [8, 16, 32])
def test_evaluation_is_the_sum_of_nll_over_the_count_of_targets(length):
    model, corpus = small("moh", dropout=0.5), corpus_of(301, 700)
    model.train()
    state = torch.get_rng_state()
    found = evaluate(
        model,
        corpus,
        context=length,
        max_tokens=0,
        tokens_per_batch=50,
        parallel=ALONE,
        autocast=nullcontext(),
    )
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    tokens = torch.from_numpy(corpus.validation[:].astype(np.int64))
    model.eval()
    nll, count = 0.0, 0
    for start in range(0, len(tokens) - length, length):
        window = tokens[start : start + length + 1]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0].double()
        nll += F.cross_entropy(logits, window[1:], reduction="sum").item()
        count += length
    assert found.targets == count
    assert found.loss == pytest.approx(nll / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nll / count / math.log(2) * 301 / 700, rel=1e-6)


def test_evaluation_is_bounded():
    model, corpus = small(), corpus_of(1000)
    bounds = {"context": 8, "tokens_per_batch": 24, "parallel": ALONE, "autocast": nullcontext()}
    assert evaluate(model, corpus, max_tokens=100, **bounds).targets == 96
    assert evaluate(model, corpus, max_tokens=100, **bounds).bits_per_byte is None
    assert Evaluation(8, 1e9, 1).perplexity < math.inf


def test_lengths_beyond_the_training_context_where_encoding_and_data_allow():
    assert contexts(small("rope"), corpus_of(1000).validation) == ([8, 16, 32], {})
    lengths, refused = contexts(small("mha"), corpus_of(1000).validation)
    assert lengths == [8]
    assert refused == {str(n): "mha has a learned table of 8 positions" for n in (16, 32)}
    lengths, refused = contexts(small("rope"), corpus_of(20).validation)
    assert lengths == [8, 16]
    assert refused == {"32": "the validation split has 20 tokens"}


def test_the_exported_model_is_the_trained_one(tmp_path):
    model = small("carope", attention_options={"impl": "reference"})
    plain = plain_model(model, ALONE)
    assert plain.config.attention_options == {}
    plain.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    with torch.no_grad():
        model.wte.weight.zero_()
    assert plain.wte.weight.abs().sum() > 0  # a copy


def wrapped(model: GPT) -> GPT:
    """With parts as torch.compile and activation checkpointing wrap them."""
    model.h[0] = torch.compile(model.h[0], backend="eager")
    model.h[1].mlp = checkpoint_wrapper(model.h[1].mlp)
    return model


@pytest.mark.parametrize("first", [wrapped, lambda model: model], ids=["wrapped", "plain"])
def test_a_checkpoint_fits_parts_wrapped_otherwise(tmp_path, first):
    def make(wrap):
        model = wrap(small("moh"))
        optimizer = make_optimizer(model, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
        return model, optimizer

    second = wrapped if first is not wrapped else lambda model: model
    model, optimizer = make(first)
    torch.manual_seed(1)
    for tensor in checkpoint.training_tensors(model, optimizer, ALONE).values():
        if tensor.is_floating_point():
            tensor.detach().normal_()
    path = checkpoint.save(tmp_path, model, optimizer, {"step": 3}, ALONE)
    stored = load_file(next(path.glob("*.safetensors")))
    names = {name.split(".", 1)[1] for name in stored if name.startswith("model.")}
    assert names == small("moh").state_dict().keys()
    assert checkpoint.read_state(path)["step"] == 3
    other, its_optimizer = make(second)
    checkpoint.load(path, other, its_optimizer, ALONE)
    found = checkpoint.training_tensors(other, its_optimizer, ALONE)
    assert found.keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in found.items())


def test_shards_that_a_checkpoint_does_not_name_are_refused(tmp_path):
    model = small()
    optimizer = make_optimizer(model, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    path = checkpoint.save(tmp_path, model, optimizer, {"step": 3}, ALONE)
    checkpoint.read_state(path)
    shutil.copy(next(path.glob("*.safetensors")), path / "before.safetensors")
    with pytest.raises(ValueError, match=r"holds \['before.safetensors'\], which state.json does"):
        checkpoint.read_state(path)


def test_a_model_of_wrapped_parts_is_exported_and_watched_by_plain_names():
    model, ids = wrapped(small("moh")), torch.arange(8)[None]
    plain = plain_model(model, ALONE)
    assert plain.state_dict().keys() == small("moh").state_dict().keys()
    with record_routing(model) as stats:
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    assert stats.keys() == {"h.0.attn.router", "h.1.attn.router"}


def test_samples_end_with_the_end_of_text():
    ids, model = [3, 5], small()
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)), end_of_text=None)
    whole = sample_text(model, tokenizer, ids, 12, 1).split()
    for tokenizer.end_of_text in map(int, whole[2:]):
        end = whole.index(str(tokenizer.end_of_text), 2)
        assert sample_text(model, tokenizer, ids, 12, 1).split() == whole[: end + 1]


def test_samples_are_reproducible():
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)), end_of_text=None)
    texts = [sample_text(small(), tokenizer, [3, 5], 12, seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].split()[:2] == ["3", "5"]
    assert len(texts[0].split()) == 14


def test_devices_and_precision(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    for name in ("meta", "gpu"):
        with pytest.raises(ValueError, match=name):
            choose_device(name)
    assert choose_dtype("float32", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    for found, dtype in (({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert choose_dtype("auto", cpu) == dtype


def test_signals_wait_and_a_second_ctrl_c_does_not():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert not signals.received
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    with StopSignals(patient=True) as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signals.received == signal.SIGINT


def test_metrics_survive_a_torn_line_and_are_cut_at_a_step(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_metrics() == []
    folder.append_metrics({"step": step, "loss": 1.0} for step in (1, 2, 3))
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in folder.read_metrics()] == [1, 2, 3]
    folder.truncate_metrics(2)
    folder.append_metrics([{"step": 3, "loss": 2.0}])
    assert [row["loss"] for row in folder.read_metrics()] == [1.0, 1.0, 2.0]


def test_the_plot_is_a_picture(tmp_path):
    rows = [{"step": step, "loss": 3.0 - step / 10} for step in range(1, 10)]
    loss_plot([*rows, {"step": 9, "val_loss": 2.5}], tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    loss_plot([], tmp_path / "empty.png", "title")
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0] * 3)


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = make_tracker("tensorboard", tmp_path, {}, 0)
    for step in (1, 2):
        tracker.log({"step": step, "loss": 1.0 / step, "bits_per_byte": None})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_are_called_as_they_document(name, tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(("init", options["project"], options["config"])),
        log=lambda values, step: calls.append((values, step)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    check_tracker(name)
    tracker = make_tracker(name, tmp_path, {"lr": 1.0}, 0)
    tracker.log({"step": 3, "loss": 0.5})
    tracker.close()
    assert calls == [("init", "posenc", {"lr": 1.0}), ({"loss": 0.5}, 3), "finish"]


def test_a_missing_tracker_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Refused, match=r"pip install posenc\[log\]"):
        check_tracker("wandb")
    check_tracker("none")


def test_the_environment_names_no_host_and_no_paths():
    import platform

    values = environment(["--lr", "1"], ALONE, torch.bfloat16, {"data": "stdlib"})
    assert values["command"] == "posenc train --lr 1"
    assert values["versions"]["torch"] == torch.__version__
    assert values["dtype"] == "bfloat16"
    text = str(values)
    assert platform.node() not in text
    assert sys.prefix not in text
    assert peak_memory(torch.device("cpu")) > 1 << 20
