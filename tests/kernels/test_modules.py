"""The zoo by its kernels: what `tests/test_contract.py` demands of a module, with impl="fused"."""

import copy

import pytest
import torch

import posenc
from helpers import (
    HEADS,
    NAMES,
    build,
    close,
    counted,
    error,
    oracle_layer,
    raw_weights,
    trained,
)
from posenc.backends import fused
from posenc.encodings.distance import DistanceBias
from posenc.kernels import turns
from posenc.kernels.common import INTERPRETED
from posenc.placement import place

if INTERPRETED:  # alone they are the module of another name, or its kernels and an eager rotation
    NAMES = [n for n in NAMES if n not in ("mha", "sinusoidal", "kerple", "fope", "grape")]
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
#: RoPE turns inside the core where the head dim is a power of two, else in a kernel of its own.
HEAD_DIMS = (6, 16)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
VARIANTS = {
    "interleaved": ("rope", {"pairing": "interleaved"}),
    "partial": ("rope", {"rotary_dim": 8}),
    "base": ("rope", {"base": 500.0}),
    "paper": ("carope", {"init": "paper", "first_power": 1}),
    "authors": ("cmha", {"init": "authors"}),
    "norms": ("moh", {"router": "query_norm"}),
    "no shared heads": ("moh", {"shared": 0, "top_k": 1, "scaling": "paper"}),
    "all heads": ("moh", {"shared": 4, "top_k": 0}),
    "cross": ("moh", {"encoding": "carope", "conv": True}),
    "short table": ("rcmha", {"max_distance": 3}),
    "sinusoidal": ("rcmha", {"relative": "sinusoidal"}),
    "crosses": ("moh", {"encoding": "relative", "conv": True}),
    "rcmha's convolution": ("mdha", {"per_head": False, "bias": True, "kernel_size": 4}),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layer(name, device, dtype=torch.float32, head_dim=16, **options):
    return build(name, head_dim=head_dim, dtype=dtype, impl="fused", **options).to(device)


def tokens(module, batch, length, dtype=torch.float32):
    return torch.randn(batch, length, module.embed_dim).to(module.c_attn.weight.device, dtype)


def outputs_and_gradients(run, x, weights, probe):
    y, aux = run(x)
    loss = (y.double() * probe).sum() + aux.double()
    return [y, aux, *torch.autograd.grad(loss, [x, *weights])]


def check_against_oracle(module, x, positions=None, tolerance=3e-5):
    module_cpu = copy.deepcopy(module).cpu()
    weights, probe = raw_weights(module_cpu), torch.randn(x.shape, dtype=torch.float64)
    ours, exact = x.detach().requires_grad_(), x.detach().cpu().double().requires_grad_()
    actual = outputs_and_gradients(
        lambda z: module(z, positions=positions, return_aux=True),
        ours,
        list(trained(module).values()),
        probe.to(x.device),
    )
    placed = None if positions is None else positions.cpu()
    expected = outputs_and_gradients(
        lambda z: oracle_layer(module_cpu, z, placed, weights),
        exact,
        [weight for weight in weights.values() if weight.requires_grad],
        probe,
    )
    for a, e in zip(actual, expected, strict=True):
        close(a.cpu(), e, tolerance)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", NAMES)
def test_layer_is_its_oracle(name, head_dim, device):
    module = layer(name, device, head_dim=head_dim, bias=True)
    check_against_oracle(module, tokens(module, 2, 11))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_its_oracle(variant, device):
    name, options = VARIANTS[variant]
    module = layer(name, device, **options)
    check_against_oracle(module, tokens(module, 1, 7))


@pytest.mark.parametrize("name", NAMES)
def test_positions_with_gaps_follow_the_oracle_or_are_refused(name, device):
    module = layer(name, device)
    positions = torch.tensor([3, 4, 5, 9, 10, 20, 21], dtype=torch.int32, device=device)
    x = tokens(module, 2, 7)
    if isinstance(module.encoding, (posenc.Relative, DistanceBias)):
        with pytest.raises(ValueError, match=r"at given positions.*impl='sdpa'"):
            module(x, positions=positions)
    else:
        check_against_oracle(module, x, positions)


def test_narrow_sinusoid_joins_the_features(device, monkeypatch):
    module = layer("rmha", device)
    module.encoding = posenc.Relative(HEADS, 16, kind="sinusoidal", embed_dim=6).to(device)
    monkeypatch.setattr("posenc.kernels.relative.forward", None)
    check_against_oracle(module, tokens(module, 2, 11))
    positions = torch.tensor([3, 4, 5, 9, 10, 20, 21], device=device)
    check_against_oracle(module, tokens(module, 1, 7), positions)


@pytest.mark.parametrize(
    ("router", "learns", "skips"),
    [("linear", True, True), ("query_norm", True, False), ("query_norm", False, True)],
)
def test_dropped_heads_are_skipped_unless_their_gates_learn(
    router, learns, skips, device, monkeypatch
):
    from posenc.kernels import routed

    module, called = layer("moh", device, router=router), []
    for name in ("_forward_op", "_dense_forward_op"):
        op = getattr(routed, name)
        monkeypatch.setattr(routed, name, lambda *x, n=name, op=op: (called.append(n), op(*x))[1])
    with torch.set_grad_enabled(learns):
        module(tokens(module, 1, 9))
    assert called == ["_forward_op" if skips else "_dense_forward_op"]


def test_gates_that_drop_nothing_leave_the_kernels_without_gates(device, monkeypatch):
    from posenc.kernels import routed

    monkeypatch.setattr(routed, "sort_rows", None)
    for options in ({"shared": 4, "top_k": 0}, {"shared": 1, "top_k": 3, "encoding": "nope"}):
        module = layer("moh", device, **options)
        check_against_oracle(module, tokens(module, 1, 9))


def test_overrides_of_the_eager_rotation_are_heard(device):
    class Louder(posenc.RoPE):
        def rotate(self, q, k, positions=None, x=None, state=None):
            q, k = super().rotate(q, k, positions, x, state)
            return 2 * q, k

    module = layer("rope", device)
    x = tokens(module, 1, 9)
    before = module(x)
    module.encoding = Louder(16).to(device)
    expected = copy.deepcopy(module)
    expected.impl = "reference"
    close(module(x), expected(x), 1e-5)
    assert error(module(x), before) > 1e-3


def test_scaling_is_that_of_the_reference(device):
    module = layer("rope", device, scaling=YARN)
    x = tokens(module, 2, 9)
    expected = copy.deepcopy(module)
    expected.impl = "reference"
    close(module(x), expected(x), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_as_exact_as_the_reference(name, dtype, device):
    module = layer(name, device, dtype)
    x = tokens(module, 2, 33, dtype)
    exact = oracle_layer(copy.deepcopy(module).cpu(), x.cpu().double())[0]
    plain = copy.deepcopy(module)
    plain.impl = "reference"
    allowed = 2 * error(plain(x).cpu(), exact) + torch.finfo(dtype).eps
    y = module(x)
    assert y.dtype == dtype
    assert error(y.cpu(), exact) <= allowed


@pytest.mark.parametrize("name", NAMES)
def test_later_tokens_change_nothing_before_them(name, device):
    module = layer(name, device)
    for length, cut in ((5, 1), (63, 40)):
        x = tokens(module, 2, length)
        changed = torch.cat((x[:, :cut], 3 * tokens(module, 2, length - cut)), dim=1)
        assert torch.equal(module(x)[:, :cut], module(changed)[:, :cut])


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_do_not_meet(name, device):
    module = layer(name, device)
    x = tokens(module, 3, 17)
    changed = x.clone()
    changed[1] = 7.0
    y, other = module(x), module(changed)
    assert torch.equal(y[[0, 2]], other[[0, 2]])


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_the_full_forward(name, device):
    module = layer(name, device)
    x = tokens(module, 2, 12)
    cache = module.make_cache(2, 12)
    with torch.no_grad():
        expected = module(x)
        parts = [module(part, cache=cache) for part in x.split((1, 6, 1, 1, 3), dim=1)]
        close(torch.cat(parts, dim=1), expected, 1e-5)
        cache.truncate(5)
        close(module(x[:, 5:], cache=cache), expected[:, 5:], 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["carope"] if INTERPRETED else ["carope", "rcmha", "fox"])
def test_compiles_whole_with_two_graphs_over_lengths(name, device):
    module = layer(name, device)
    with counted("aot_eager") as (compiled, counter):
        run = compiled(module)
        for length in (5, 8, 13):
            x = tokens(module, 2, length)
            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, expected = run(ours), module(theirs)
            close(y, expected, 1e-5)
            close(
                torch.autograd.grad(y.square().sum(), ours)[0],
                torch.autograd.grad(expected.square().sum(), theirs)[0],
                1e-4,
            )
        assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("name", "options"),
    [("rcmha", {"max_distance": 8})]
    + [("rope", {}), ("carope", {"source": "token"})] * (not INTERPRETED),
)
def test_model_trains_and_generates(name, options, device):
    config = posenc.GPTConfig(
        vocab_size=29,
        context=16,
        layers=2,
        heads=HEADS,
        embed_dim=16 * HEADS,
        attention=name,
        attention_options={**options, "impl": "fused"},
    )
    torch.manual_seed(1)
    model = posenc.GPT(config).to(device)
    torch.manual_seed(1)
    plain = posenc.GPT(
        posenc.GPTConfig(**{**vars(config), "attention_options": options}),
    ).to(device)
    ids = torch.randint(29, (2, 9), device=device)
    losses = [m(ids, ids).loss for m in (model, plain)]
    close(losses[0], losses[1].detach(), 1e-5)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        close(ours.grad, theirs.grad, 1e-5)
    greedy = {"temperature": 0.0}
    assert torch.equal(model.generate(ids, 5, **greedy), plain.generate(ids, 5, **greedy))


@pytest.mark.parametrize(("name", "head_dim"), [("rope", 16), ("rope", 6), ("cmha", 16)])
def test_layers_share_the_turns_of_frequencies(name, head_dim, device, monkeypatch):
    made, original = [], turns.turns_from_radians
    monkeypatch.setattr(turns, "turns_from_radians", lambda x: made.append(x) or original(x))
    config = posenc.GPTConfig(
        vocab_size=9, context=8, layers=3, heads=2, embed_dim=2 * head_dim, attention=name,
        attention_options={"impl": "fused"},
    )  # fmt: skip
    posenc.GPT(config).to(device)(torch.randint(9, (2, 7), device=device))
    assert len(made) == 1


def test_encoding_alone_turns_by_its_kernel(device):
    q, k = torch.randn(2, 2, 4, 9, 16, device=device).unbind(0)
    x = torch.randn(2, 9, 64, device=device)
    for encoding in (posenc.RoPE(16), posenc.CARoPE(64, 4), posenc.Polar(4, 16)):
        encoding = encoding.to(device)
        for positions in (None, torch.arange(5, 14, device=device)):
            where = place(2, 9, q.device, positions)
            ours = fused.turn(encoding.rotation(where, x), q, k)
            for a, b in zip(ours, encoding.rotate(q, k, positions, x), strict=True):
                close(a, b, 1e-5)


@pytest.mark.parametrize(("name", "options"), [("mdha", {}), VARIANTS["cross"]], ids=str)
def test_convolution_is_its_kernel(name, options, device, monkeypatch):
    module = layer(name, device, **options)
    x, cache = tokens(module, 2, 5), module.make_cache(2, 5)
    monkeypatch.setattr(posenc.convolution, "depthwise_conv", None)
    module(x)
    with torch.no_grad():
        module(x, cache=cache)
    module.impl = "sdpa"
    with pytest.raises(TypeError):
        module(x)


def test_convolution_alone_is_its_kernel(device):
    inputs = torch.randn(3, 2, 4, 9, 16, device=device).unbind(0)
    for options in ({}, {"per_head": True, "bias": False, "kernel_size": 5}):
        part = posenc.DepthwiseConv(4, 16, **options).to(device)
        real = torch.ones(2, 9, dtype=torch.bool, device=device)
        real[0, 3:5] = False
        segments = torch.tensor([[0] * 4 + [1] * 5, [2] * 9], device=device)
        for given in ({}, {"real": real}, {"segments": segments}):
            ours = fused.convolve(part, *inputs, **given)
            for a, b in zip(ours, part(*inputs, **given), strict=True):
                close(a, b, 1e-6)


def test_padding_stops_the_phase(device):
    encoding = posenc.CARoPE(64, 4, init="paper").to(device)
    q, k = torch.randn(2, 2, 4, 9, 16, device=device).unbind(0)
    x = torch.randn(2, 9, 64, device=device)
    positions = torch.arange(9, device=device).repeat(2, 1) - torch.tensor(
        [[0], [3]], device=device
    )
    ours = fused.turn(encoding.rotation(place(2, 9, q.device, positions), x), q, k)
    for a, b in zip(ours, encoding.rotate(q, k, positions, x), strict=True):
        close(a, b, 1e-5)


def test_long_convolutions_are_refused_when_built():
    posenc.attention("mdha", 64, 4, impl="fused", kernel_size=8)
    with pytest.raises(ValueError, match=r"no kernel for .*kernel_size=9.*impl='sdpa'"):
        posenc.attention("mdha", 64, 4, impl="fused", kernel_size=9)


def test_refused_positions_leave_the_cache_usable(device):
    module = layer("rcmha", device)
    x, cache = tokens(module, 2, 5), module.make_cache(2, 5)
    positions = torch.arange(5, device=device).repeat(2, 1)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"at given positions.*impl='sdpa'"):
            module(x, positions=positions, cache=cache)
        assert cache.length == 0
        parts = [module(part, cache=cache) for part in x.split(2, dim=1)]
        close(torch.cat(parts, dim=1), module(x), 1e-5)


def test_cases_without_a_kernel_are_refused(device):
    with pytest.raises(ValueError, match=r"drops no attention weights.*impl='sdpa'"):
        posenc.attention("rope", 64, 4, impl="fused", dropout=0.1)
    module = layer("rope", device)
    x = tokens(module, 2, 5)
    with pytest.raises(ValueError, match="float64"):
        module.double()(x.double())
    cache = module.make_cache(2, 5)
    with pytest.raises(ValueError, match="float64"):
        module(x.double(), cache=cache)
    assert cache.length == 0


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels take bfloat16")
def test_interpreter_refuses_bfloat16(device):
    module = layer("nope", device, torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter computes wrongly"):
        module(tokens(module, 1, 3, torch.bfloat16))
