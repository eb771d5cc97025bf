"""What the tests share: perturbed modules, comparisons, and whole layers built from the oracles."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import posenc
from layer_oracle import attention_layer
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

#: Files of tests/kernels that compile, which the interpreter cannot.
COMPILED_ONLY = [
    "test_compile_sm90.py",
    "test_grids.py",
    "test_interpreter.py",
    "test_sass.py",
    "test_tiles_sm90.py",
]

#: Names to which causal=False means nothing.
CAUSAL_ALONE = frozenset({"cope", "path", "xpos"})

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
    """Add noise to every parameter, so that none sits at a special value, nor beyond the bounds
    that its module keeps it in.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
        for part in module.modules():
            for name, (low, high) in getattr(part, "bounds", {}).items():
                getattr(part, name).clamp_(low + 0.1, high - 0.1)
    return module


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, without fixed ones."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def copy_shared(source: nn.Module, target: nn.Module) -> None:
    """Give `target` those weights of `source` that it has under the same name and shape."""
    weights = source.state_dict()
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name in weights and weights[name].shape == parameter.shape:
                parameter.copy_(weights[name])


def repeat_key_heads(grouped: nn.Module, whole: nn.Module, groups: int) -> None:
    """Give `whole`, with HEADS key heads, the weights of `grouped`, each key head's repeated."""
    times, rows = HEADS // groups, HEADS + 2 * groups

    def repeated(weight: Tensor, shape: torch.Size) -> Tensor:
        if weight.shape == shape:
            return weight
        if weight.numel() * 3 * HEADS == shape.numel() * rows:  # heads of q | k | v
            q, k, v = weight.reshape(rows, -1).split((HEADS, groups, groups))
            heads = (q, k.repeat_interleave(times, 0), v.repeat_interleave(times, 0))
            return torch.cat(heads).reshape(shape)
        (dim,) = (i for i, (a, b) in enumerate(zip(weight.shape, shape, strict=True)) if a != b)
        heads = weight.unflatten(dim, (groups, -1))
        return heads.repeat_interleave(times, dim).flatten(dim, dim + 1)

    wanted = whole.state_dict()
    whole.load_state_dict(
        {
            name: repeated(weight, wanted[name].shape)
            for name, weight in grouped.state_dict().items()
        }
    )


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


def as_exact(
    actual: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], terms: int
) -> None:
    """Outputs and gradients of a kernel err no more than those of a definition in their dtypes.

    Allowed are twice the definition's error, as both are against fp64, four roundings of the
    largest entry to the output's dtype, and what sums of fp32 numbers one after another err by
    where the definition, which adds in pairs, does not: a walk of sqrt(terms) roundings, of the
    largest entry of all, as the logits' gradients are differences of larger numbers.
    """
    size = max(1.0, *(e.abs().max().item() for e in exact))
    walk = math.sqrt(terms) * torch.finfo(torch.float32).eps
    for place, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert (a.shape, a.dtype) == (p.shape, p.dtype)
        own = 4 * torch.finfo(actual[0].dtype).eps * e.abs().max().clamp(min=1.0)
        allowed = 2 * (p.double() - e).abs().max() + own + walk * size
        wrong = (a.double() - e).abs().max()
        assert wrong <= allowed, f"number {place}: error {wrong:.2e}, allowed {allowed:.2e}"


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


def raw_weights(module: nn.Module) -> dict[str, Tensor]:
    """Leaf copies of all parameters in fp64, by name."""
    return {
        name: parameter.detach().double().clone().requires_grad_(parameter.requires_grad)
        for name, parameter in module.named_parameters()
    }


def oracle_layer(
    layer: posenc.Attention,
    x: Tensor,
    positions: Tensor | None = None,
    weights: dict[str, Tensor] | None = None,
    **features: Any,
) -> tuple[Tensor, Tensor]:
    """Output and balance loss of a layer in fp64, by `layer_oracle.attention_layer`.

    From the layer it takes its weights and the public options of its parts, none of its code.
    `features` are what the test asked of the layer and of the call, never read back from the layer.
    """
    weights = raw_weights(layer) if weights is None else weights
    parts = {"encoding": layer.encoding, "router": layer.router}
    sizes = {"num_heads": layer.num_heads, "positions": positions}
    return attention_layer(x, weights, **parts, **sizes, **features)


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
