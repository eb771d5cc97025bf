"""What the tests share: perturbed modules, comparisons, and whole layers built from the oracles."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import oracles
import posenc
from posenc.backends import choice
from posenc.backends.case import consecutive
from posenc.encodings.base import Encoding
from posenc.placement import Placement
from posenc.scores import Scores
from posenc.zoo import ENCODINGS, ZOO

# At these sizes a second thread only waits: 60 ms for a product that takes 10 us.
torch.set_num_threads(1)

NAMES = posenc.names()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Layer sizes that are not powers of two.
HEADS, HEAD_DIM = 4, 6
WIDTH = HEADS * HEAD_DIM


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *scores: Any, impl: str = "auto", **rest: Any
) -> Tensor:
    """Attention of T queries that are the last of S consecutive tokens."""
    return choice.attend(consecutive(q, k, v, *scores, **rest), impl)


def scores_of(
    part: Encoding, q: Tensor, k: Tensor, positions: Tensor, keys: Tensor | None = None
) -> Scores:
    """How an encoding enters the logits of q (.., T, D) and k (.., S, D)."""
    sizes = {"length": q.shape[-2], "key_length": k.shape[-2]}
    return part.scores(Placement(positions, keys=keys, **sizes))


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected entry where that exceeds 1."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.isfinite().all()
    if not expected.numel():
        return 0.0
    scale = max(1.0, expected.abs().max().item())
    return (actual.double() - expected.double()).abs().max().item() / scale


def rms_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of `expected`."""
    difference = actual.double() - expected.double()
    return (difference.square().mean() / expected.double().square().mean()).sqrt().item()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert error(actual, expected) <= tolerance


def differs(actual: Tensor, expected: Tensor, least: float = 1e-4) -> None:
    assert error(actual, expected) > least


def perturb(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Add noise to every parameter, so that none sits at a special value."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def copy_shared(source: nn.Module, target: nn.Module) -> None:
    """Give `target` those weights of `source` that it has under the same name and shape."""
    weights = source.state_dict()
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name in weights and weights[name].shape == parameter.shape:
                parameter.copy_(weights[name])


def min_heads(name: str) -> int:
    """A default split into shared and routed heads needs four."""
    return 4 if ZOO[name].router is not None else 1


def build(
    name: str,
    *,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.float64,
    noise: float = 0.3,
    **options: Any,
) -> posenc.Attention:
    """A zoo entry in eval mode, away from its initial values."""
    module = posenc.attention(name, heads * head_dim, heads, **options)
    return perturb(module, noise).to(dtype).eval()


def build_part(part: Callable[..., Any], *, heads: int, head_dim: int, **options: Any) -> Any:
    """A part from the sizes that its constructor asks for."""
    sizes = {
        "embed_dim": heads * head_dim,
        "num_heads": heads,
        "head_dim": head_dim,
        "max_distance": 1024,
    }
    wanted = inspect.signature(part).parameters
    return part(**{key: size for key, size in sizes.items() if key in wanted} | options)


def encodings(heads: int = HEADS, head_dim: int = HEAD_DIM) -> dict[str, Encoding]:
    """Every encoding that attention can hold, perturbed."""
    return {
        name: perturb(build_part(part, heads=heads, head_dim=head_dim)).double()
        for name, part in ENCODINGS.items()
    }


def crosses() -> list[tuple[str, bool, bool]]:
    """Encoding, with a convolution, with a router."""
    return list(itertools.product(ENCODINGS, (False, True), (False, True)))


def build_cross(encoding: str, conv: bool, router: bool) -> posenc.Attention:
    module = posenc.Attention(
        WIDTH,
        HEADS,
        encoding=build_part(ENCODINGS[encoding], heads=HEADS, head_dim=HEAD_DIM),
        conv=posenc.DepthwiseConv(HEADS, HEAD_DIM) if conv else None,
        router=posenc.MoH(WIDTH, HEADS, shared=1, top_k=2) if router else None,
        bias=True,
    )
    return perturb(module).double().eval()


def tiny_gpt(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> posenc.GPT:
    """A two-layer model, away from its initial values."""
    config = {
        "vocab_size": 29,
        "context": 16,
        "layers": 2,
        "heads": HEADS,
        "embed_dim": WIDTH,
        "attention": name,
    } | changes
    return perturb(posenc.GPT(posenc.GPTConfig(**config)), 0.2).to(dtype).eval()


def left_padded(
    rows: list[Tensor], fill: Callable[..., Tensor] = torch.randn
) -> tuple[Tensor, Tensor]:
    """Sequences (T_i, C) as one batch padded on the left with noise, and its positions."""
    longest = max(len(row) for row in rows)
    x = fill(len(rows), longest, *rows[0].shape[1:]).to(rows[0].dtype)
    positions = torch.full((len(rows), longest), -1)
    for i, row in enumerate(rows):
        x[i, longest - len(row) :] = row
        positions[i, longest - len(row) :] = torch.arange(len(row))
    return x, positions


def outputs_and_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], gradient: Tensor
) -> list[Tensor]:
    """The output of a function of tensors, and their gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient.to(y.dtype))]


def replayed(
    step: Callable[[], Sequence[Tensor]],
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What a step leaves when it is replayed from a CUDA graph, and what it gave before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wanted = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    return captured, wanted


@contextmanager
def counted(
    backend: str = "aot_eager",
) -> Iterator[tuple[Callable[..., Any], CompileCounterWithBackend]]:
    """A full-graph `compile` and the counter of the graphs it makes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    try:
        yield lambda function: torch.compile(function, backend=counter, fullgraph=True), counter
    finally:
        torch._dynamo.reset()


def _nope(part: Encoding, weights: dict[str, Tensor], q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return oracles.dot_scores(q, k)


def _rope(
    part: posenc.RoPE,
    weights: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    x: Tensor,
    positions: Tensor | None,
) -> Tensor:
    assert part.scaling is None
    options = {"base": part.base, "pairing": part.pairing, "rotary_dim": part.rotary_dim}
    return oracles.rope_scores(q, k, positions, positions, **options)


def _carope(
    part: posenc.CARoPE,
    weights: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    x: Tensor,
    positions: Tensor | None,
) -> Tensor:
    W, bias = weights["weight"], weights.get("bias")
    return oracles.carope_scores(q, k, x, W, bias, first_power=part.first_power)


def _polar(
    part: posenc.Polar,
    weights: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    x: Tensor,
    positions: Tensor | None,
) -> Tensor:
    scale = 1.0 if part.init == "authors" else None
    delta, b = weights["delta"], weights["b"]
    return oracles.cmha_scores(q, k, delta, b, positions, positions, scale, part.base)


def _relative(
    part: posenc.Relative,
    weights: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    x: Tensor,
    positions: Tensor | None,
) -> Tensor:
    if part.kind == "learned":
        terms = (weights["u"], weights["R"], weights["S"])
        return oracles.relative_learned_scores(q, k, *terms, positions, positions)
    terms = (weights["u"], weights["v"], weights["W_R.weight"])
    return oracles.relative_sinusoidal_scores(q, k, *terms, positions, positions)


#: The oracle of every encoding class; a new method adds its own here.
SCORES: dict[str, Callable[..., Tensor]] = {
    "Encoding": _nope,
    "NoPE": _nope,
    "RoPE": _rope,
    "CARoPE": _carope,
    "Polar": _polar,
    "Relative": _relative,
}


def raw_weights(module: nn.Module) -> dict[str, Tensor]:
    """Leaf copies of all parameters in fp64, by name."""
    return {
        name: parameter.detach().double().clone().requires_grad_()
        for name, parameter in module.named_parameters()
    }


def oracle_layer(
    layer: posenc.Attention,
    x: Tensor,
    positions: Tensor | None = None,
    weights: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and balance loss of a layer in fp64: project, convolve, encode, attend, route, merge.

    From the layer it takes its weights and its public options, none of its code.
    """
    weights = raw_weights(layer) if weights is None else weights
    heads = layer.num_heads

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(f"{prefix}."): weight
            for name, weight in weights.items()
            if name.startswith(f"{prefix}.")
        }

    biases = weights["c_attn.bias"].chunk(3) if "c_attn.bias" in weights else (None,) * 3
    q, k, v = (
        oracles.project(x, W, bias, heads)
        for W, bias in zip(weights["c_attn.weight"].chunk(3), biases, strict=True)
    )
    if layer.conv is not None:
        taps, shifts = weights["conv.weight"], weights.get("conv.bias", (None,) * 3)
        q, k, v = (
            oracles.depthwise_conv(z, w, shift)
            for z, w, shift in zip((q, k, v), taps, shifts, strict=True)
        )
    encoding = layer.encoding
    scores = SCORES[type(encoding).__name__](encoding, part("encoding"), q, k, x, positions)
    o = oracles.causal_attention(scores, v)
    aux = x.new_zeros(())
    if layer.router is not None:
        router = layer.router
        if router.router == "linear":
            matrices = (weights.get(f"router.{name}.weight") for name in ("W_s", "W_r", "W_h"))
            gates = oracles.moh_linear_gates(
                x, *matrices, shared=router.shared, top_k=router.top_k, scaling=router.scaling
            )
        else:
            gates = oracles.moh_query_norm_gates(q, shared=router.shared, top_k=router.top_k)
        o = oracles.weigh_heads(o, gates.gates)
        aux = oracles.moh_aux(gates.probabilities, gates.selected, router.aux_scale)
    return oracles.merge(o, weights["c_proj.weight"], weights.get("c_proj.bias")), aux


@contextmanager
def rounded(layer: posenc.Attention, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the fp64 `layer` rounds what a layer in `dtype` stores: q, k, v and both outputs."""

    def to(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(tensor.dtype)

    def after(module: nn.Module, inputs: Any, output: Any) -> Any:
        return tuple(map(to, output)) if isinstance(output, tuple) else to(output)

    rotate = layer.encoding.rotate
    handles = [
        part.register_forward_hook(after)
        for part in (layer.c_attn, layer.conv, layer.c_proj)
        if part
    ]
    handles.append(layer.c_proj.register_forward_pre_hook(lambda module, inputs: (to(inputs[0]),)))
    layer.encoding.rotate = lambda *args: tuple(map(to, rotate(*args)))
    try:
        yield
    finally:
        del layer.encoding.rotate
        for handle in handles:
            handle.remove()
