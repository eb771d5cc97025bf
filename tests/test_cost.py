"""The formulas of posenc.cost against the modules: parameters and bytes to the last one, FLOPs
against torch's counter, which runs the reference back end.

What the counter does not count as we do, and `counted` takes off:
    all T x S pairs, of the relative term T x (S + 1), where the causal mask leaves fewer;
    the weight gradient of a grouped convolution as if it had one group: C times too much.
It has no formula for attention on CPU, hence impl="reference", which is written in products.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import posenc
from bench.measure import bytes_saved
from helpers import CAUSAL_ALONE, HEAD_DIM, HEADS, NAMES, WIDTH, tiny_gpt
from posenc.accounting import Part, Sizes
from posenc.backends.mask import Mask
from posenc.cache import POSITIONS, Stream
from posenc.cost import attention_cost, mfu, model_cost
from posenc.cost import model_flops_per_token as per_token
from posenc.placement import place

#: Names with options that change what they cost.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in NAMES},
    "bias": ("rope", {"bias": True}),
    "partial": ("rope", {"rotary_dim": 4}),
    "paper": ("carope", {"init": "paper", "first_power": 1}),
    "authors": ("cmha", {"init": "authors"}),
    "learned": ("rmha", {"relative": "learned", "max_distance": 7}),
    "long table": ("rcmha", {"max_distance": 300}),
    "convolved sinusoid": ("rcmha", {"relative": "sinusoidal"}),
    "long kernel": ("mdha", {"kernel_size": 5, "conv_bias": True}),
    "one tap": ("mdha", {"kernel_size": 1, "per_head": False}),
    "shared kernel": ("mdha", {"per_head": False, "conv_bias": True, "attention_bias": True}),
    "two shared heads": ("moh", {"shared": 2, "top_k": 1, "scaling": "paper"}),
    "no shared heads": ("moh", {"shared": 0, "top_k": 2}),
    "all shared": ("moh", {"shared": 4, "top_k": 0}),
    "norms": ("moh", {"router": "query_norm", "shared": 1, "top_k": 1}),
    "moh of carope": ("moh", {"encoding": "carope", "conv": True, "shared": 1, "top_k": 2}),
    "moh of polar": ("moh", {"encoding": "polar"}),
    "moh of relative": ("moh", {"encoding": "relative", "max_distance": 5}),
    "moh of sinusoids": ("moh", {"encoding": "rmha", "kind": "sinusoidal"}),
    "carope, convolved": ("mdha", {"encoding": "carope", "encoding_init": "paper"}),
}
EVERY = pytest.mark.parametrize("variant", VARIANTS)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in NAMES},
    "no bias": ("rope", {"bias": False}),
    "longer": ("mha", {"context": 19}),
    "narrow": ("rope", {"mlp_dim": 5}),
    "wide": ("nope", {"mlp_dim": 131, "bias": False}),
    "one phase": ("carope", {"attention_options": {"source": "token"}}),
    "convolved phase": ("mdha", {"attention_options": {"encoding": "carope", "source": "token"}}),
    "learned in moh": ("moh", {"attention_options": {"encoding": "learned"}}),
}
EVERY_MODEL = pytest.mark.parametrize("variant", MODELS)


def layer_of(variant: str, **more: Any) -> posenc.Attention:
    name, options = VARIANTS[variant]
    return posenc.attention(name, WIDTH, HEADS, **options, **more)


def model_of(variant: str, dtype: torch.dtype = torch.float32, **options: Any) -> posenc.GPT:
    name, changes = MODELS[variant]
    options = {**changes.get("attention_options", {}), **options}
    return tiny_gpt(name, dtype, **{**changes, "attention_options": options})


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def flops_of(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def counted(layer: posenc.Attention, batch: int, length: int, key_length: int, flops: int) -> int:
    """A forward count of products with T x S pairs, less those that the mask hides."""
    pairs = sum(key_length - length + i + 1 for i in range(length))
    hidden = 2 * (length * key_length - pairs)
    if isinstance(layer.encoding, posenc.Relative):
        hidden += length * (key_length + 1) - pairs
    if isinstance(layer.encoding, posenc.PoPE):
        hidden += length * key_length - pairs  # q and k are twice as wide as v
    if isinstance(layer.encoding, posenc.PaTH):
        hidden //= 2  # its queries meet no later keys; only their weights are multiplied by values
    return flops - 2 * batch * hidden * layer.embed_dim


def grouped(layer: posenc.Attention, batch: int, length: int) -> int:
    """What the counter adds to the weight gradients of the convolution."""
    if layer.conv is None:
        return 0
    one = 2 * layer.conv.kernel_size * batch * length * layer.embed_dim
    return 3 * one * (layer.embed_dim - 1)


@EVERY
def test_parameters_of_a_layer(variant: str) -> None:
    layer = layer_of(variant)
    cost = attention_cost(layer, 2, 9)
    assert cost.total.parameters == count(layer)
    linears = (("projections", layer.c_attn), ("output", layer.c_proj))
    seams = (("conv", layer.conv), ("encoding", layer.encoding), ("router", layer.router))
    for part, module in linears + seams:
        assert cost.parts[part].parameters == (0 if module is None else count(module)), part


@EVERY_MODEL
def test_parameters_of_a_model(variant: str) -> None:
    model = model_of(variant)
    cost = model_cost(model, 2, 9)
    assert cost.total.parameters == model.num_parameters()
    own = (("embedding", model.wte), ("position", model.wpe), ("phase", model.phase))
    for part, module in own:
        assert cost.parts[part].parameters == (0 if module is None else count(module)), part
    assert cost.parts["mlp"].parameters == 2 * count(model.h[0].mlp)
    assert model_cost(model.config, 2, 9) == cost


@EVERY
def test_flops_of_a_layer_forward_and_backward(variant: str) -> None:
    layer, batch, length = layer_of(variant, impl="reference"), 3, 11
    x = torch.randn(batch, length, WIDTH, requires_grad=True)
    total = attention_cost(layer, batch, length).total
    forward = flops_of(lambda: layer(x))
    assert total.flops == counted(layer, batch, length, length, forward)
    both = flops_of(lambda: layer(x).sum().backward()) - grouped(layer, batch, length)
    # Backward, what the mask hides is counted once more for each factor.
    assert total.training_flops == both - 3 * (forward - total.flops)
    constant = 2 * length * WIDTH**2 * hasattr(layer.encoding, "W_R")  # a factor of the table
    if hasattr(layer.encoding, "cos_series"):  # and both of the series
        constant = 2 * attention_cost(layer, batch, length).parts["encoding"].flops
    assert total.training_flops == 3 * total.flops - constant


@EVERY
@pytest.mark.parametrize("length", [1, 5, HEAD_DIM + 1])
def test_flops_of_a_step_with_a_cache(variant: str, length: int) -> None:
    """One token needs no correction: it sees every key. Few tokens take the factored sinusoid."""
    layer, batch, past = layer_of(variant, impl="reference"), 2, 7
    cache = layer.make_cache(batch, past + length)
    with torch.no_grad():
        layer(torch.randn(batch, past, WIDTH), cache=cache)
        forward = flops_of(lambda: layer(torch.randn(batch, length, WIDTH), cache=cache))
    total = attention_cost(layer, batch, length, past + length).total
    keys = past + length
    if hasattr(layer.encoding, "W_R") and length < HEAD_DIM:
        pairs = length * past + length * (length + 1) // 2
        assert forward - total.flops == 2 * batch * (length * keys - pairs) * WIDTH * (2 + HEADS)
    else:
        hidden = counted(layer, batch, length, keys, forward)
        assert total.flops == hidden
    if length == 1 and not isinstance(layer.encoding, posenc.Relative):
        assert total.flops == forward


def test_a_factored_sinusoid_is_a_constant() -> None:
    layer, batch, past, length = layer_of("rmha", impl="reference"), 2, 7, HEAD_DIM - 1
    cache = layer.make_cache(batch, past + length)
    x = torch.randn(batch, past, WIDTH, requires_grad=True)
    with torch.no_grad():
        layer(x, cache=cache)
    both = flops_of(lambda: layer(x[:, :length], cache=cache).sum().backward())
    hidden = 2 * batch * length * (length - 1) // 2 * WIDTH
    expected = attention_cost(layer, batch, length, past + length).total.training_flops
    assert both == expected + hidden * (3 * 2 + 2 * HEADS)


@EVERY_MODEL
def test_flops_of_a_model(variant: str) -> None:
    model, batch, length = model_of(variant, impl="reference"), 2, 9
    ids = torch.randint(29, (batch, length))
    total = model_cost(model, batch, length).total
    forward = flops_of(lambda: model(ids))
    hidden = [counted(block.attn, batch, length, length, 0) for block in model.h]
    assert total.flops == forward + sum(hidden)

    def train() -> None:
        out = model(ids, ids)
        (out.loss + out.aux_loss).backward()

    both = flops_of(train) - sum(grouped(block.attn, batch, length) for block in model.h)
    assert total.training_flops == both + 3 * sum(hidden)


def test_flops_of_the_last_logits() -> None:
    model, ids = model_of("rope", impl="reference"), torch.randint(29, (2, 9))
    whole, last = (model_cost(model, 2, 9, logits=n).parts["head"] for n in (None, 1))
    assert whole.flops == flops_of(lambda: model.head(model.hidden(ids)[0])) - flops_of(
        lambda: model.hidden(ids)
    )
    assert last.flops * 9 == whole.flops


@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v][0] == "moh"])
def test_kept_flops_are_those_of_gates_that_are_not_zero(variant: str) -> None:
    layer, batch, length = layer_of(variant), 3, 7
    seen: list[torch.Tensor] = []
    hook = layer.router.register_forward_hook(lambda module, inputs, out: seen.append(out[0]))
    layer(torch.randn(batch, length, WIDTH))
    hook.remove()
    kept = seen[0] != 0  # (B, H, T)
    rows = int(kept.sum())
    keys = int((kept.sum((0, 1)) * torch.arange(1, length + 1)).sum())
    parts = attention_cost(layer, batch, length).parts
    assert parts["core"].kept_flops == 2 * 2 * keys * HEAD_DIM
    assert parts["output"].kept_flops == 2 * rows * HEAD_DIM * WIDTH
    mixed = layer.conv is not None or layer.router.reads_queries
    queries = batch * length * HEADS if mixed else rows
    both = 2 * 2 * batch * length * WIDTH**2
    assert parts["projections"].kept_flops == both + 2 * queries * HEAD_DIM * WIDTH
    if isinstance(layer.encoding, posenc.Relative):
        table = 2 * length * WIDTH**2 * (layer.encoding.kind == "sinusoidal")
        assert parts["encoding"].kept_flops == table + 2 * keys * HEAD_DIM
    for part in ("conv", "router"):
        assert parts[part].kept_flops == parts[part].flops


@pytest.mark.parametrize("name", NAMES)
def test_without_a_router_every_head_is_kept(name: str) -> None:
    total = attention_cost(posenc.attention(name, WIDTH, HEADS), 2, 9).total
    assert (total.kept_flops == total.flops) == (name != "moh")


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_of_a_layer_is_what_the_cache_allocates(variant: str, dtype: torch.dtype) -> None:
    layer = layer_of(variant)
    # The difference of two lengths: apart from the fixed rows of history.
    sizes = [layer.make_cache(3, length, dtype=dtype).nbytes for length in (16, 5)]
    cost = attention_cost(layer, 3, 1, 5, dtype=dtype)
    assert (sizes[0] - sizes[1]) == cost.total.state_bytes * 3 * (16 - 5)
    history = sum(stream.history > 0 for stream in layer.streams().values())
    if not history:
        assert sizes[1] == cost.total.state_bytes * 3 * 5


@EVERY_MODEL
def test_state_of_a_model_is_what_the_cache_allocates(variant: str) -> None:
    model = model_of(variant)
    large, small = (model.make_cache(3, n, dtype=torch.float16).nbytes for n in (16, 5))
    total = model_cost(model, 3, 1, dtype=torch.float16).total
    assert large - small == total.state_bytes * 3 * (16 - 5)


@EVERY
def test_a_step_reads_weights_keys_and_history(variant: str) -> None:
    layer, keys = layer_of(variant), 7
    cache = layer.make_cache(1, keys)
    total = attention_cost(layer, 3, 1, keys).total
    used = sum(cache._rows[name][0, :, :keys].nbytes for name in "kv")
    for name, stream in layer.encoding.streams().items():
        # What enters the logits is read of every key, what turns q and k goes on from the last.
        rows = keys if layer.encoding.in_logits and name != "taps" else stream.history
        used += cache._rows[name].narrow(-2, 0, rows).nbytes
    if layer.conv is not None:
        used += cache._rows["conv"].narrow(-2, 0, layer.conv.kernel_size - 1).nbytes
    assert total.state_read_bytes == 3 * used
    unread = 0
    if hasattr(layer.encoding, "R"):
        unread = layer.encoding.R[:, keys:].numel() + layer.encoding.S[:, keys:].numel()
    assert total.weight_bytes == 4 * (count(layer) - unread)
    assert total.read_bytes == total.weight_bytes + total.state_read_bytes


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_weights_follow_the_cast(name: str) -> None:
    """Parameters of phases stay fp32."""
    layer = posenc.attention(name, WIDTH, HEADS, **{"rcmha": {"max_distance": 5}}.get(name, {}))
    predicted = attention_cost(layer, 2, 9, dtype=torch.bfloat16)
    layer = layer.to(torch.bfloat16)
    assert predicted == attention_cost(layer, 2, 9)
    assert predicted.total.weight_bytes == sum(p.nbytes for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["nope", "mha", "sinusoidal", "wide"])
def test_bytes_kept_for_the_backward_pass(name: str, dtype: torch.dtype) -> None:
    """torch's attention keeps what the kernels do, which tests/kernels compares for every name;
    its log-sum-exp is fp64 where its inputs are.
    """
    model, ids = model_of(name, dtype, impl="sdpa"), torch.randint(29, (3, 9))
    saved = bytes_saved(
        model, lambda: model(ids, ids), lambda x: x.is_floating_point() and x.numel() > 1
    )
    lse = 2 * 3 * 9 * HEADS * (dtype.itemsize - 4)
    assert saved == model_cost(model, 3, 9).total.saved_bytes + lse


def test_elementwise_work_is_that_of_the_papers() -> None:
    """At GPT-2 small's layer, N = 2048 tokens of C = 768: METHODS' lines on cost."""
    tokens, rotation = 2 * 1024, 6 * 768
    expected = {
        "nope": 0,
        "rope": tokens * rotation + 1024 * 64,  # sines and cosines serve all heads
        "carope": tokens * (rotation + 4 * 384),
        "cmha": tokens * (rotation + 3 * 768),
        "rmha": 1024 * 768,
        "rcmha": 0,
    }
    for name, work in expected.items():
        with torch.device("meta"):
            layer = posenc.attention(name, 768, 12)
        assert attention_cost(layer, 2, 1024).total.elementwise == work, name
    model = posenc.GPTConfig(64, 1024, 1, 12, 768, "carope", {"source": "token"})
    assert model_cost(model, 2, 1024).total.elementwise == expected["carope"]
    assert model_cost(posenc.GPTConfig(64, 9, 1, 2, 8, "sinusoidal"), 2, 9).total.elementwise == 72


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 12), st.integers(0, 12), st.integers(1, 4), st.integers(1, 5)
)
def test_any_sizes(batch: int, length: int, past: int, heads: int, half: int) -> None:
    layer = posenc.attention("carope", heads * 2 * half, heads, impl="reference")
    cost = attention_cost(layer, batch, length, past + length)
    dim, width = 2 * half, heads * 2 * half
    sizes = Sizes(batch, length, past + length, heads, dim, heads, torch.float32, heads, width)
    assert sizes.pairs == sum(past + i + 1 for i in range(length))
    assert cost.parts["core"].flops == 4 * batch * sizes.pairs * layer.embed_dim
    assert cost.total.parameters == count(layer)
    x = torch.randn(batch, length, layer.embed_dim)
    if not past:
        forward = flops_of(lambda: layer(x))
        assert cost.total.flops == counted(layer, batch, length, length, forward)
    one = attention_cost(layer, 1, length, past + length).total
    assert cost.total.flops == batch * one.flops


def test_chunks_cost_what_the_whole_does() -> None:
    """No pair twice, none left out. Tables of distances are projected anew for every chunk."""
    for name in ("rope", "carope", "mdha", "rcmha", "moh"):
        layer = posenc.attention(name, WIDTH, HEADS)
        chunks = ((4, 4), (1, 5), (8, 13))
        parts = [attention_cost(layer, 2, *chunk).total.flops for chunk in chunks]
        assert sum(parts) == attention_cost(layer, 2, 13).total.flops


def test_published_sizes_of_gpt2_small() -> None:
    config = posenc.GPTConfig(vocab_size=50257, attention="mha")
    cost = model_cost(config, 1, 1024)
    assert cost.total.parameters == 124_439_808
    palm, exact = per_token(config)
    assert palm == 6 * 124_439_808 + 12 * 12 * 768 * 1024
    # 2 FLOPs a weight of a matrix and 2 C (T + 1) of attention in 12 layers, thrice.
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert exact == 3 * (2 * matrices + 12 * 2 * 768 * 1025)
    with torch.device("meta"):
        assert per_token(posenc.GPT(config), 1024) == (palm, exact)
    assert per_token(config, 512).exact < exact


def test_mfu_by_both_conventions() -> None:
    config = posenc.GPTConfig(64, 32, 2, 4, 24)
    found = mfu(1000.0, config, 1e9)
    assert found == pytest.approx([1e-6 * flops for flops in per_token(config)])
    assert mfu(1000.0, config, 1e9, 16).palm < found.palm


def test_a_config_needs_no_memory_random_numbers_or_kernels() -> None:
    state = torch.get_rng_state()
    config = posenc.GPTConfig(
        500_000, 4096, 2, 64, 16384, "carope", {"impl": "fused", "source": "token"}
    )
    assert model_cost(config, 8, 4096).total.parameters > 7e9
    assert torch.equal(torch.get_rng_state(), state)


def test_subclasses_cost_what_their_base_does_and_schemes_of_their_own_what_they_hold() -> None:
    class Slower(posenc.RoPE):
        pass

    class Own(posenc.Encoding):
        def __init__(self) -> None:
            super().__init__()
            self.slopes = torch.nn.Parameter(torch.zeros(5))

        def streams(self) -> dict[str, Stream]:
            return {"sums": Stream((3,))}

    def cost(encoding: posenc.Encoding) -> Part:
        return attention_cost(posenc.Attention(24, 4, encoding=encoding), 2, 9).parts["encoding"]

    assert cost(Slower(6)) == cost(posenc.RoPE(6)) != Part()
    assert cost(posenc.Encoding()) == cost(posenc.NoPE()) == Part()
    # fp32 parameters, and what decoding remembers
    assert cost(Own()) == Part(parameters=5, weight_bytes=20, state_bytes=12, state_read_bytes=216)


def test_errors() -> None:
    layer, config = posenc.attention("rope", 24, 4), posenc.GPTConfig(29, 16, 2, 4, 24, "mha")
    for sizes in ((0, 3), (2, 0), (2, 3.5), (2, 3, 0)):
        with pytest.raises(ValueError, match="at least 1, an integer"):
            attention_cost(layer, *sizes)
    with pytest.raises(ValueError, match="counts the 5 tokens of the call too; got 4"):
        attention_cost(layer, 2, 5, 4)
    with pytest.raises(ValueError, match=r"dtype must be a floating-point one; got torch\.int8"):
        attention_cost(layer, 2, 5, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"takes a posenc\.Attention; got Linear"):
        attention_cost(torch.nn.Linear(2, 2), 2, 5)
    for wrong in (layer, "rope"):
        for ask in (lambda wrong: model_cost(wrong, 2, 5), per_token):
            with pytest.raises(ValueError, match=f"GPTConfig; got {type(wrong).__name__}"):
                ask(wrong)
    with pytest.raises(ValueError, match="has 16 positions; got 17"):
        model_cost(config, 2, 1, 17)
    with pytest.raises(ValueError, match="logits must be at most length=5; got 6"):
        model_cost(config, 2, 5, logits=6)
    for peak in (0, float("inf")):
        with pytest.raises(ValueError, match="peak must be"):
            mfu(1.0, config, peak)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "head_dim": 12},
        {"qk_norm": "rms", "head_dim": 4},
        {"causal": False},
        {"window": 3, "num_kv_heads": 2, "bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_state_of_other_shapes(name: str, options: dict[str, Any]) -> None:
    if name in CAUSAL_ALONE:
        options = {**options, "causal": True}
    layer = posenc.attention(name, WIDTH, HEADS, **options)
    total = attention_cost(layer, 2, 7).total
    assert total.parameters == count(layer)
    if layer.causal:
        rows = [math.prod(s.shape) * (s.dtype or torch.float32).itemsize
                for s in {**layer.streams(), "positions": POSITIONS}.values()]  # fmt: skip
        assert total.state_bytes == sum(rows)


@pytest.mark.parametrize(("causal", "window"), [(True, 3), (False, None), (False, 3), (True, 99)])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_pairs_are_those_that_the_mask_leaves(
    causal: bool, window: int | None, length: int
) -> None:
    sizes = Sizes(1, length, length, 1, 2, 1, torch.float32, 1, 2, window, causal)
    mask = Mask(place(1, length, torch.device("cpu")), causal=causal, window=window)
    assert sizes.pairs == mask.dense().sum()
