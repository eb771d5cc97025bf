"""Cases, the gate of correctness before them, and how one is timed.

A case is a computation, its providers are implementations. Before a provider is timed, its outputs
(with and without gradients to follow) and gradients on one head, or one row of a layer, or all of
it where heads share weights, are compared with the definition in fp64: at most twice the error of
the definition in the inputs' own dtype, or there is no row. A provider that is not installed or
does not fit is left out, with the reason. A case none of whose inputs requires a gradient is one of
inference: forward alone.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rows import Row

Function = Callable[..., Tensor | tuple[Tensor, ...]]
#: Calls timed on CPU where candidates take no turns.
ROUNDS = 3


class Case(NamedTuple):
    """A computation: leaves in, tensors out; by its definition, and by its providers."""

    kind: str  # of its rows
    name: str
    inputs: tuple[Tensor, ...]
    definition: Function
    providers: dict[str, Callable[[], Function]]  # built when their turn comes
    part: Callable[[Tensor], Tensor]  # of inputs and results: what the gate compares
    slack: float = 0.0  # error that the method of the providers is known for
    queries: int | None = None  # where they are fewer than the keys


def one_head(x: Tensor) -> Tensor:
    """The last head of q, k, v, rates (B, H, ..) or of a parameter (H, ..) or (3, H, ..): heads do
    not meet.
    """
    return x[:, -1:] if x.ndim >= 3 else x[-1:]


def outputs_of(function: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A tuple of them, also of one."""
    found = function(*inputs)
    return (found,) if isinstance(found, Tensor) else found


def outputs_and_gradients(
    function: Function,
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
    part: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Outputs, then the gradients of a random projection of them, the same for every provider.

    The projection is drawn in `dtype` for one part, a head or a row, and serves all of them.
    """
    outputs = outputs_of(function, inputs)
    if not any(x.requires_grad for x in inputs):
        return [*outputs]
    probes = []
    for number, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(number)
        shape = part(output).shape
        probe = torch.randn(shape, generator=generator, device=output.device, dtype=dtype)
        probes.append(probe.to(output.dtype).expand_as(output))
    return [*outputs, *torch.autograd.grad(outputs, inputs, probes)]


def errors(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Root mean square of each difference, relative to that of the exact tensor."""
    return [
        ((a.double() - e).square().mean() / e.square().mean().clamp(min=1e-30)).sqrt().item()
        for a, e in zip(actual, exact, strict=True)
    ]


def allowed(plain: list[float], case: Case) -> list[float]:
    """The errors that a case excuses, for those of the definition in the inputs' own dtype."""
    rounding = max(torch.finfo(case.inputs[0].dtype).eps, 1e-6)  # fp32 sums in another order
    return [2 * error + rounding + case.slack for error in plain]


class Gate:
    """What a provider must compute: one part in fp64, and the error that its dtype excuses."""

    def __init__(self, case: Case) -> None:
        self.inputs, self.dtype, self.part = case.inputs, case.inputs[0].dtype, case.part
        own = tuple(
            case.part(x.detach()).clone().requires_grad_(x.requires_grad) for x in case.inputs
        )
        precise = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in own)
        self.exact = outputs_and_gradients(case.definition, precise, self.dtype, self.part)
        plain = outputs_and_gradients(case.definition, own, self.dtype, self.part)
        self.allowed = allowed(errors(plain, self.exact), case)

    def check(self, function: Function) -> float:
        """The error of the first output; ValueError where anything is worse than allowed."""
        results = outputs_and_gradients(function, self.inputs, self.dtype, self.part)
        found = errors([self.part(x) for x in results], self.exact)
        with torch.no_grad():  # which may be another way through
            inferred = [self.part(x) for x in outputs_of(function, self.inputs)]
        alone = errors(inferred, self.exact[: len(inferred)])
        for kind, measured in (("result", found), ("inferred result", alone)):
            for number, (error, allowed) in enumerate(zip(measured, self.allowed, strict=False)):
                if not error <= allowed:
                    raise ValueError(
                        f"{kind} {number} is off by {error:.1e}; allowed {allowed:.1e}"
                    )
        return found[0]


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, float, float]:
    """p20, p50 and p80 in milliseconds."""
    if device.type == "cuda":
        from triton.testing import do_bench

        low, middle, high = do_bench(run, warmup=25, rep=150, quantiles=[0.2, 0.5, 0.8])
        return low, middle, high
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        taken.append((time.perf_counter() - start) * 1e3)
    taken.sort()
    return taken[0], taken[len(taken) // 2], taken[-1]


def modes(function: Function, inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """What is timed: forward alone, backward alone, both; of inference, forward."""

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    # A layer's backward pass is that of training: its weights have gradients too.
    weights = function.parameters() if isinstance(function, torch.nn.Module) else ()
    wanted = (*inputs, *(weight for weight in weights if weight.requires_grad))
    if not any(x.requires_grad for x in inputs):
        return {"fwd": forward}
    outputs = outputs_of(function, inputs)
    gradients = [torch.randn_like(output) for output in outputs]

    def both() -> None:
        torch.autograd.grad(function(*inputs), wanted, gradients)

    return {
        "fwd": forward,
        "bwd": lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True),
        "fwd+bwd": both,
    }


def peak_mib(run: Callable[[], Any], device: torch.device) -> float:
    """The most memory that a call adds, on CUDA."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def bytes_saved(
    module: torch.nn.Module,
    run: Callable[[], Any],
    counts: Callable[[Tensor], bool] = lambda tensor: True,
) -> int:
    """What `run` keeps for the backward pass: each storage once, without the module's parameters.

    Args:
        counts: which tensors do.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}  # tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if counts(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in known)


def timing(
    mode: str, metric: str, unit: str, p20: float, p50: float, p80: float, **about: Any
) -> Row:
    """A row of a measurement in some mode."""
    return Row(mode=mode, metric=metric, unit=unit, p20=p20, p50=p50, p80=p80, **about)


def graphed(run: Callable[[], Any]) -> tuple[float, float, float]:
    """As `timed`, replayed from a CUDA graph: without what the host adds to each launch."""
    from triton.testing import do_bench_cudagraph

    low, middle, high = do_bench_cudagraph(run, rep=100, quantiles=[0.2, 0.5, 0.8])
    return low, middle, high


def measure(
    case: Case, shape: tuple[int, int, int, int], device: torch.device
) -> Iterator[Row | str]:
    """Rows of all providers of a case; a line of text for those that are left out."""
    batch, heads, length, dim = shape
    dtype = str(case.inputs[0].dtype).removeprefix("torch.")
    sizes: dict[str, Any] = {"B": batch, "H": heads, "T": length, "D": dim, "dtype": dtype}
    if case.queries is not None:
        sizes |= {"T": case.queries, "S": length}
    gate: Gate | None = None
    for provider, build in case.providers.items():
        try:
            gate = gate or Gate(case)
            function = build()
            error = gate.check(function)
            runs = modes(function, case.inputs)
        except Exception as failure:  # whatever a peer raises, the others are still measured
            yield f"{case.name}: no row of {provider}: {reason(failure)}"
            continue
        about = {"kind": case.kind, "name": case.name, "implementation": provider}
        row = partial(timing, **about, **sizes, error_vs_fp64=error)
        for mode, run in runs.items():
            try:
                yield row(mode, "time", "ms", *timed(run, device))
            except Exception as failure:
                yield f"{case.name}: no {mode} of {provider}: {reason(failure)}"
        try:
            if device.type == "cuda":
                graphs = [mode for mode in ("fwd", "fwd+bwd") if mode in runs]
                for mode in graphs:
                    yield row(mode, "graph time", "ms", *graphed(runs[mode]))
                peak = peak_mib(runs[graphs[-1]], device)
                yield row(graphs[-1], "memory", "MiB", peak, peak, peak)
        except Exception as failure:
            yield f"{case.name}: no graph of {provider}: {reason(failure)}"


def reason(failure: Exception) -> str:
    """The first line of what went wrong."""
    return str(failure).strip().partition("\n")[0] or type(failure).__name__
