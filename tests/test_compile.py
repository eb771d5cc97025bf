"""Compilation: one full graph, and few of them over lengths and decoding steps."""

import pytest
import torch

import posenc
from helpers import HEADS, NAMES, WIDTH, build, build_cross, close, counted, perturb, randn

#: Alone, entries that differ in the model's input only are the same module.
MODULES = {repr(posenc.attention(name, WIDTH, HEADS)): name for name in reversed(NAMES)}
#: Those whose steps are traced alike, with another function of distances or phases, left out.
STEPPING = [name for name in MODULES.values() if name not in ("kerple", "t5", "grape", "fope")]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODULES.values())
def test_compiles_whole_with_two_graphs_over_six_lengths(name: str) -> None:
    module = build(name, dtype=torch.float32)
    with counted("eager") as (compiled, counter):
        run = compiled(module)
        for length in (5, 8, 13, 21, 34, 55):
            x = randn(2, length, WIDTH, dtype=torch.float32)
            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, expected = run(ours), module(theirs)
            close(y, expected, 1e-5)
            close(
                torch.autograd.grad(y.square().sum(), ours)[0],
                torch.autograd.grad(expected.square().sum(), theirs)[0],
                1e-4,
            )
        assert counter.frame_count <= 2


@pytest.mark.parametrize("name", STEPPING)
def test_compiled_decoding_steps_share_graphs(name: str) -> None:
    module, x = build(name, dtype=torch.float32), randn(2, 14, WIDTH, dtype=torch.float32)
    with torch.no_grad(), counted("eager") as (compiled, counter):
        run, cache = compiled(module), module.make_cache(2, 14)
        expected = module(x)
        close(run(x[:, :5], cache=cache), expected[:, :5], 1e-5)
        for t in range(5, 14):
            close(run(x[:, t : t + 1], cache=cache), expected[:, t : t + 1], 1e-5)
        # one graph for the prompt and one for all steps
        assert counter.frame_count <= 2
        cache.truncate(6)
        close(run(x[:, 6:9], cache=cache), expected[:, 6:9], 1e-5)
        close(run(x[:, 9:14], cache=cache), expected[:, 9:14], 1e-5)
        # and one for chunks; torch 2.11 makes one of the first chunk's length before
        assert counter.frame_count <= 3 + (torch.__version__ < "2.13")


@pytest.mark.parametrize("encoding", ["carope", "relative"])
def test_cross_compiles_through_autograd(encoding: str) -> None:
    module = build_cross(encoding, True, True).float()
    with counted("aot_eager") as (compiled, counter):
        run = compiled(module)
        for length in (6, 9, 17):
            x = randn(2, length, WIDTH, dtype=torch.float32)
            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            (y, aux), (expected, expected_aux) = (
                run(ours, return_aux=True),
                module(theirs, return_aux=True),
            )
            close(y, expected, 1e-5)
            close(aux, expected_aux, 1e-5)
            (gradient,) = torch.autograd.grad(y.square().sum() + aux, ours)
            (reference,) = torch.autograd.grad(expected.square().sum() + expected_aux, theirs)
            close(gradient, reference, 1e-4)
        assert counter.frame_count <= 2


@pytest.mark.parametrize(("name", "options"), [("mha", {}), ("carope", {"source": "token"})])
def test_model_compiles_whole_and_decodes(name: str, options: dict[str, str]) -> None:
    config = posenc.GPTConfig(
        vocab_size=17,
        context=32,
        layers=2,
        heads=HEADS,
        embed_dim=WIDTH,
        attention=name,
        attention_options=options,
    )
    model = perturb(posenc.GPT(config), 0.1).eval()
    ids = torch.randint(17, (2, 13))  # longer than what is fed, or the last slice is contiguous
    with counted("eager") as (compiled, counter):
        run = compiled(model)
        for length in (5, 8, 12):
            out, expected = (f(ids[:, :length], ids[:, :length]) for f in (run, model))
            close(out.logits, expected.logits, 1e-5)
            close(out.loss, expected.loss, 1e-5)
        assert counter.frame_count <= 2
    with torch.no_grad(), counted("eager") as (compiled, counter):
        run, cache, expected = compiled(model), model.make_cache(2, 13), model(ids).logits
        close(run(ids[:, :5], cache=cache).logits, expected[:, :5], 1e-5)
        for t in range(5, 12):
            step = run(ids[:, t : t + 1], cache=cache).logits
            close(step, expected[:, t : t + 1], 1e-5)
        assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # inductor's imports
def test_inductor_code_is_the_eager_layer() -> None:
    module, x = build("carope", dtype=torch.float32), randn(2, 9, WIDTH, dtype=torch.float32)
    with torch.no_grad(), counted("inductor") as (compiled, _):
        close(compiled(module)(x), module(x), 1e-5)
