"""Every kernel beside its peers, behind a gate of correctness: `python -m bench.kernels`.

    python -m bench.kernels --out bench/results/h100/kernels.jsonl     S1, S2, S3 in bfloat16, CUDA
    python -m bench.kernels --part layers                              whole layers alone, or ops
    TRITON_INTERPRET=1 python -m bench.kernels --shapes 1,2,33,16      the same code on a CPU, slow

All providers of a case run in the same process on the same inputs, behind the gate of
`bench.measure`; q, k and v are views of one packed projection.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import posenc
from posenc import rates
from posenc.backends.case import consecutive
from posenc.backends.choice import attend
from posenc.convolution import depthwise_conv
from posenc.kernels.biased_attention import biased_attention
from posenc.kernels.carope import carope
from posenc.kernels.carope_attention import carope_attention
from posenc.kernels.conv import conv
from posenc.kernels.decode import decode_attention
from posenc.kernels.flash import flash_attention
from posenc.kernels.polar import polar
from posenc.kernels.rates import log_rates
from posenc.kernels.relative import relative_attention
from posenc.kernels.rope import rope
from posenc.kernels.rope_attention import rope_attention
from posenc.kernels.turns import turns_from_radians
from posenc.phase import inverse_frequencies, phase_dtype, position_phases
from posenc.rotations import running_phase, turn_by_content, turn_by_phase
from posenc.scores import (
    Bias,
    ByDistance,
    Decay,
    RelativeTerm,
    Scores,
    add_per_head,
    relative_logits,
)

from .layers import Compile, as_is, zoo_case
from .measure import Case, Function, measure, one_head, timed
from .rows import Row, RowFile

#: Batch, heads, length, head dim. GPT-2's layer at three lengths, 16,384 tokens each.
SHAPES = {"S1": (16, 12, 1024, 64), "S2": (4, 12, 4096, 64), "S3": (1, 12, 16384, 64)}
#: The direct form of CMHA holds every pair of tokens and bands: 1.6 GB at this size.
DIRECT = (1, 12, 1024, 64)
OURS = "posenc"
EAGER = "eager"


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention as written."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return ((q @ k.mT) * scale).masked_fill(~visible, -math.inf).softmax(-1) @ v


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention by one named back end."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last token over all, as written; heads may share keys."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def sdpa_step(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by torch's attention, by a named back end or its own choice."""
    backends = sdpa_kernel(backend) if backend is not None else nullcontext()
    with backends:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


FA2 = partial(sdpa, SDPBackend.FLASH_ATTENTION)
CUDNN = partial(sdpa, SDPBackend.CUDNN_ATTENTION)


def flex(length: int, device: torch.device) -> Function:
    """Compiled FlexAttention with a causal block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return m >= n

    mask = create_block_mask(causal, None, None, length, length, device=device)
    return partial(torch.compile(flex_attention), block_mask=mask)


def after(rotate: Function, core: Function) -> Function:
    """Attention whose q and k are rotated first; what follows v is for the rotation."""

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        q, k = rotate(q, k, *rest)
        return core(q, k, v)  # type: ignore[return-value]

    return run


def liger(length: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Function:
    """Liger's rotation, its tables made beforehand."""
    from liger_kernel.ops.rope import LigerRopeFunction

    turns = torch.arange(length, device=device)[:, None] * inverse_frequencies(
        head_dim, 10000.0, device
    )
    angles = torch.cat((turns, turns), dim=-1)[None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return lambda q, k: LigerRopeFunction.apply(q, k, cos, sin)


def cores(length: int, device: torch.device) -> dict[str, Callable[[], Function]]:
    """The peers of the flash core."""
    peers: dict[str, Callable[[], Function]] = {
        "sdpa-fa2": lambda: FA2,
        "sdpa-cudnn": lambda: CUDNN,
        "flex": lambda: flex(length, device),
    }
    return peers if device.type == "cuda" else {}


def direct_cmha(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, b: Tensor) -> Tensor:
    """ComplexFormer's scores as written: a cosine for every pair of tokens and every band."""
    pairs, length = q.shape[-1] // 2, q.shape[-2]
    (q1, q2), (k1, k2) = q.float().split(pairs, -1), k.float().split(pairs, -1)
    positions = torch.arange(length, device=q.device)
    apart = (positions[:, None] - positions)[..., None]
    omega = inverse_frequencies(2 * pairs, 10000.0, q.device)
    turn = (apart * omega).remainder(2 * math.pi).float()  # (T, T, D/2)
    q_angle, k_angle = torch.atan2(q2, q1), torch.atan2(k2, k1)
    angle = delta[:, None, None] * (q_angle.unsqueeze(-2) - k_angle.unsqueeze(-3))
    size = torch.hypot(q1, q2).unsqueeze(-2) * torch.hypot(k1, k2).unsqueeze(-3)
    scores = (size * torch.cos(angle + b[:, None, None] + turn)).sum(-1)
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = (scores * q.shape[-1] ** -0.5).masked_fill(~visible, -math.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def eager_conv(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """q, k and v convolved, each on its own."""
    biases = (None,) * 3 if bias is None else bias.unbind(0)
    return tuple(map(depthwise_conv, (q, k, v), weight.unbind(0), biases))


def fla() -> Function:
    """flash-linear-attention's convolution of q, k and v, each in one launch, by its kernels."""
    from fla.modules.causal_conv1d import causal_conv1d

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        heads, dim = x.shape[1], x.shape[3]
        weight = weight.expand(heads, dim, -1).flatten(0, 1)
        bias = None if bias is None else bias.expand(heads, dim).flatten()
        y, _ = causal_conv1d(x.transpose(1, 2).flatten(2), weight, bias)
        return y.unflatten(-1, (heads, dim)).transpose(1, 2)

    def run(
        q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        biases = (None,) * 3 if bias is None else bias.unbind(0)
        return tuple(map(convolve, (q, k, v), weight.unbind(0), biases))

    return run


def last_head(x: Tensor) -> Tensor:
    """As `one_head`, where parameters (H, P, D) may have as many dimensions as rates."""
    return x[:, -1:] if x.ndim == 4 else x[-1:]


def everything(x: Tensor) -> Tensor:
    """All of a tensor: heads and rows meet in the gradient of a weight that they share."""
    return x


def layers(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Whole attention modules, of lengths whose definition fits in fp64."""
    batch, heads, length, dim = shape
    if length > 4096:
        return
    for name in ("mha", "rope", "carope", "cmha", "rmha", "mdha", "rcmha", "moh"):
        if heads < 4 and name == "moh":
            continue
        implementations: dict[str, tuple[str, Compile]] = {
            OURS: ("fused", as_is),
            EAGER: ("reference", as_is),
            "sdpa": ("sdpa", as_is),
        }
        if device.type == "cuda":
            implementations["torch.compile sdpa"] = ("sdpa", torch.compile)
            implementations[f"torch.compile {OURS}"] = ("fused", torch.compile)
        x = torch.randn(batch, length, heads * dim, device=device, dtype=dtype, requires_grad=True)
        yield zoo_case("layer", f"{name} layer", name, implementations, x, heads)


def relative(
    shape: tuple[int, int, int, int],
    qkv: tuple[Tensor, Tensor, Tensor],
    peers: dict[str, Callable[[], Function]],
) -> Case:
    """RCMHA's attention: tables R and S with a row a distance, and u."""
    _, heads, length, dim = shape
    device = qkv[0].device
    table = (0.5 * torch.randn(heads, length, dim, device=device)).requires_grad_()
    offsets = torch.randn(heads, length, device=device).requires_grad_()
    u = torch.randn(heads, dim, device=device).requires_grad_()

    def by(impl: str) -> Function:
        def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor, s: Tensor, u: Tensor) -> Tensor:
            scores = Scores(content=u, relative=RelativeTerm(table, offset=s))
            return attend(consecutive(q, k, v, scores), impl)

        return run

    def by_flex() -> Function:
        core = peers["flex"]()

        def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor, s: Tensor, u: Tensor) -> Tensor:
            term = RelativeTerm(table, offset=s)
            bias = relative_logits(q, term, length) * dim**-0.5

            def add(score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
                return score + bias[b, h, m, n]

            return core(add_per_head(q, u), k, v, score_mod=add)  # type: ignore[return-value]

        return run

    providers: dict[str, Callable[[], Function]] = {
        OURS: lambda: by("fused"),
        f"{OURS} deterministic": lambda: partial(relative_attention, deterministic=True),
        EAGER: lambda: by("reference"),
        "sdpa + bias": lambda: by("sdpa"),
    }
    if device.type == "cuda":
        providers["torch.compile"] = lambda: torch.compile(by("reference"))
        providers["torch.compile sdpa + bias"] = lambda: torch.compile(by("sdpa"))
        providers["flex + bias"] = by_flex
    return Case(
        "kernel",
        "relative + attention",
        (*qkv, table, offsets, u),
        by("reference"),
        providers,
        last_head,
    )


def biased(
    shape: tuple[int, int, int, int],
    qkv: tuple[Tensor, Tensor, Tensor],
    peers: dict[str, Callable[[], Function]],
) -> Iterator[Case]:
    """FoX's attention, c falling by gates near 1/2; that of a trained number for each distance."""
    batch, heads, length, _ = shape
    device, precise = qkv[0].device, torch.promote_types(qkv[0].dtype, torch.float32)
    gates = F.logsigmoid(torch.randn(batch, heads, length, device=device, dtype=torch.float64))
    c = gates.cumsum(-1).requires_grad_()
    table = torch.randn(heads, length, device=device).requires_grad_()

    def decay(c: Tensor) -> Bias:
        return Decay(c, c, precise)

    def by_distance(table: Tensor) -> Bias:
        def of(distances: Tensor) -> Tensor:
            return table[:, distances.clamp(min=0)]

        return ByDistance(of, length, length, precise, device)

    def lost(c: Tensor) -> Function:
        c = c.float()  # near enough to 0 at these lengths
        return lambda b, h, m, n: c[b, h, m] - c[b, h, n]

    def between(table: Tensor) -> Function:
        return lambda b, h, m, n: table[h, (m - n).abs()]

    def by(impl: str, bias: Callable[[Tensor], Bias]) -> Function:
        def run(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
            return attend(consecutive(q, k, v, Scores(bias=bias(x))), impl)

        return run

    def by_flex(added: Callable[[Tensor], Function]) -> Function:
        core = peers["flex"]()

        def run(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
            bias = added(x)

            def add(score: Tensor, *place: Tensor) -> Tensor:
                return score + bias(*place)  # type: ignore[operator]

            return core(q, k, v, score_mod=add)  # type: ignore[return-value]

        return run

    def directly(name: str, deterministic: bool) -> Function:
        def run(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
            return biased_attention(q, k, v, **{name: x}, deterministic=deterministic)

        return run

    for name, x, bias, added in (("decay", c, decay, lost), ("table", table, by_distance, between)):
        providers: dict[str, Callable[[], Function]] = {
            OURS: lambda bias=bias: by("fused", bias),
            f"{OURS} split": lambda name=name: directly(name, True),
            f"{OURS} one kernel": lambda name=name: directly(name, False),
            EAGER: lambda bias=bias: by("reference", bias),
            "sdpa + bias": lambda bias=bias: by("sdpa", bias),
        }
        if device.type == "cuda":
            providers["torch.compile sdpa + bias"] = lambda b=bias: torch.compile(by("sdpa", b))
            providers["flex + bias"] = lambda added=added: by_flex(added)
        definition = by("reference", bias)
        yield Case("kernel", f"{name} + attention", (*qkv, x), definition, providers, one_head)


def decoding(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """One query a sequence over the keys of a cache; a key head a query head, or one for four."""
    batch, heads, length, dim = shape
    for name, group in (("decode", 1), ("decode grouped", 4)):
        if heads % group:
            continue
        new = partial(torch.randn, device=device, dtype=dtype)
        q, cache = new(batch, heads, 1, dim), new(2, batch, heads // group, length, dim)
        providers: dict[str, Callable[[], Function]] = {
            OURS: lambda: decode_attention,
            f"{OURS} forward kernel": lambda: flash_attention,
            EAGER: lambda: step,
            "sdpa": lambda: partial(sdpa_step, None),
        }
        if device.type == "cuda":
            for label, backend in (
                ("sdpa-fa2", SDPBackend.FLASH_ATTENTION), ("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION)
            ):  # fmt: skip
                providers[label] = lambda backend=backend: partial(sdpa_step, backend)
        inputs = (q, *cache.unbind(0))
        yield Case("kernel", name, inputs, step, providers, one_head, queries=1)


def cases(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Ops and cores of one shape, on fresh random inputs."""
    batch, heads, length, dim = shape
    packed = torch.randn(batch, length, 3, heads, dim, device=device, dtype=dtype)
    q, k, v = (x.detach().requires_grad_() for x in packed.permute(2, 0, 3, 1, 4).unbind(0))
    log_f = -torch.nn.functional.softplus(
        torch.randn(batch, heads, length, device=device, dtype=torch.float64)
    ).log1p()
    log_f.requires_grad_()
    delta = (1 + 0.1 * torch.randn(heads, dim // 2, device=device)).requires_grad_()
    b = (0.1 * torch.randn(heads, dim // 2, device=device)).requires_grad_()

    encoding = posenc.RoPE(dim)
    omega = inverse_frequencies(dim, encoding.base, device)
    fractions = turns_from_radians(omega)  # once a model's forward pass

    def eager_rope(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return encoding.rotate(q, k)

    def eager_carope(q: Tensor, k: Tensor, log_f: Tensor) -> tuple[Tensor, Tensor]:
        return turn_by_phase(q, k, running_phase(log_f.double(), dim // 2))

    def eager_polar(q: Tensor, k: Tensor, delta: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        turns = position_phases(torch.arange(length, device=device), omega)
        return turn_by_content(q, k, delta, b, turns.to(phase_dtype(q)))

    def our_carope(q: Tensor, k: Tensor, log_f: Tensor) -> tuple[Tensor, Tensor]:
        return carope(q, k, log_f)[:2]

    def our_polar(q: Tensor, k: Tensor, delta: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return polar(q, k, delta, b, fractions)

    peers = cores(length, device)
    fast = {"": flash_attention, " + fa2": FA2, " + cudnn": CUDNN}
    compiled = {"torch.compile": torch.compile} if device.type == "cuda" else {}
    yield Case(
        "kernel",
        "flash",
        (q, k, v),
        attention,
        {
            OURS: lambda: flash_attention,
            f"{OURS} split": lambda: partial(flash_attention, deterministic=True),
            f"{OURS} one kernel": lambda: partial(flash_attention, deterministic=False),
            EAGER: lambda: attention,
            **peers,
        },
        one_head,
    )

    our_rope: Function = lambda q, k: rope(q, k, fractions)  # noqa: E731
    liger_rope = partial(liger, length, dim, dtype, device)
    our_rope_attention: Function = lambda q, k, v: rope_attention(q, k, v, fractions)  # noqa: E731
    for name, rotate, fused, eager, extra in (
        ("rope", our_rope, our_rope_attention, eager_rope, ()),
        ("carope", our_carope, carope_attention, eager_carope, (log_f,)),
        ("polar", our_polar, None, eager_polar, (delta, b)),
    ):
        providers: dict[str, Callable[[], Function]] = {
            OURS: lambda rotate=rotate: rotate,
            EAGER: lambda eager=eager: eager,
            **{key: lambda wrap=wrap, eager=eager: wrap(eager) for key, wrap in compiled.items()},
        }
        if name == "rope" and device.type == "cuda":
            providers["liger"] = liger_rope
        yield Case("kernel", name, (q, k, *extra), eager, providers, one_head)

        parts = {f"{OURS} parts": lambda rotate=rotate: after(rotate, flash_attention)}
        whole = (
            {OURS: lambda fused=fused: fused, **parts} if fused else {OURS: parts[f"{OURS} parts"]}
        )
        whole[EAGER] = lambda eager=eager: after(eager, attention)
        if device.type == "cuda":
            for label, core in fast.items():
                if label:
                    whole[f"{OURS}{label}"] = lambda r=rotate, core=core: after(r, core)
                    whole[f"torch.compile{label}"] = lambda e=eager, core=core: after(
                        torch.compile(e), core
                    )
            if name == "rope":
                whole["liger + fa2"] = lambda: after(liger_rope(), FA2)
        if name == "polar" and math.prod(shape) <= math.prod(DIRECT):
            whole["direct"] = lambda: direct_cmha
        yield Case(
            "kernel",
            f"{name} + attention",
            (q, k, v, *extra),
            after(eager, attention),
            whole,
            one_head,
        )

    for name, channels, shift, part in (
        ("conv", (3, dim), True, everything),
        ("conv per head", (3, heads, dim), False, one_head),
    ):
        weight = torch.randn(*channels, 3, device=device).requires_grad_()
        bias = (torch.randn(channels, device=device).requires_grad_(),) if shift else ()
        mixes: dict[str, Callable[[], Function]] = {
            OURS: lambda: conv,
            EAGER: lambda: eager_conv,
            **{key: lambda wrap=wrap: wrap(eager_conv) for key, wrap in compiled.items()},
        }
        if device.type == "cuda":
            mixes["fla"] = fla
        yield Case("kernel", name, (q, k, v, weight, *bias), eager_conv, mixes, part)
    x = torch.randn(batch, length, heads * dim, device=device, dtype=dtype).requires_grad_()
    weight = (0.02 * torch.randn(heads * dim, heads, device=device)).requires_grad_()
    shift = torch.randn(heads, device=device).requires_grad_()
    tokens: dict[str, Callable[[], Function]] = {
        OURS: lambda: log_rates,
        EAGER: lambda: rates.log_rates,
        **{key: lambda wrap=wrap: wrap(rates.log_rates) for key, wrap in compiled.items()},
    }
    yield Case("kernel", "rates", (x, weight, shift), rates.log_rates, tokens, everything)
    yield relative(shape, (q, k, v), peers)
    yield from biased(shape, (q, k, v), peers)
    yield from decoding(shape, dtype, device)


PARTS = {"ops": cases, "layers": layers}


def ceilings(device: torch.device) -> Iterator[Row]:
    """What the device reaches at best: a bf16 product, and copies, counting bytes both ways."""
    if device.type != "cuda":
        return
    about: dict[str, Any] = {"kind": "ceiling", "mode": "fwd", "metric": "rate"}
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16).unbind(0)
    p20, p50, p80 = (2 * 8192**3 / ms / 1e9 for ms in reversed(timed(lambda: a @ b, device)))
    product = {"name": "product", "implementation": "cublas", "T": 8192, "dtype": "bfloat16"}
    yield Row(**about, **product, unit="TFLOP/s", p20=p20, p50=p50, p80=p80)
    for mib in (25, 64, 256):
        source = torch.randn(mib * 2**18, device=device)
        target = torch.empty_like(source)
        times = timed(lambda source=source, target=target: target.copy_(source), device)
        p20, p50, p80 = (2 * source.nbytes / ms / 1e9 for ms in reversed(times))
        copy = {"name": "copy", "implementation": f"{mib} MiB", "dtype": "float32"}
        yield Row(**about, **copy, unit="TB/s", p20=p20, p50=p50, p80=p80)


class Target(NamedTuple):
    """A ratio of two medians of one case and shape: numerator / denominator."""

    what: str
    kernel: tuple[str, str]
    provider: tuple[str, str]
    mode: str
    bound: str


#: What the kernels were designed for, at S1 unless the name says otherwise.
TARGETS = [
    Target("core over FA2", ("flash", "flash"), ("sdpa-fa2", OURS), "fwd", ">= 1.15"),
    Target("core over cuDNN", ("flash", "flash"), ("sdpa-cudnn", OURS), "fwd", ">= 0.90"),
    Target("core over FA2", ("flash", "flash"), ("sdpa-fa2", OURS), "bwd", ">= 1.10"),
    Target("core over cuDNN", ("flash", "flash"), ("sdpa-cudnn", OURS), "bwd", ">= 0.75"),
    Target("core over FA2", ("flash", "flash"), ("sdpa-fa2", OURS), "fwd+bwd", ">= 1.10"),
    Target("decoding over SDPA", ("decode", "decode"), ("sdpa", OURS), "fwd", ">= 1.00"),
    Target(
        "decoding over the forward kernel", ("decode", "decode"), (f"{OURS} forward kernel", OURS),
        "fwd", ">= 1.00",
    ),
    Target("RoPE over liger", ("rope", "rope"), ("liger", OURS), "fwd+bwd", ">= 1.80"),
    Target("RoPE over compiled", ("rope", "rope"), ("torch.compile", OURS), "fwd+bwd", ">= 1.00"),
    Target(
        "RoPE + core over liger + FA2",
        ("rope + attention", "rope + attention"), ("liger + fa2", OURS), "fwd+bwd", ">= 1.30",
    ),
    Target(
        "RoPE + core over compiled + cuDNN",
        ("rope + attention", "rope + attention"), ("torch.compile + cudnn", OURS), "fwd+bwd",
        ">= 0.93",
    ),
    Target(
        "CARoPE to RoPE", ("carope + attention", "rope + attention"), (OURS, OURS), "fwd+bwd",
        "<= 1.12",
    ),
    Target("CARoPE over eager", ("carope", "carope"), (EAGER, OURS), "fwd+bwd", ">= 5.00"),
    Target(
        "CARoPE over compiled", ("carope", "carope"), ("torch.compile", OURS), "fwd+bwd", ">= 2.50"
    ),
    Target(
        "CMHA to RoPE", ("polar + attention", "rope + attention"), (OURS, OURS), "fwd+bwd",
        "<= 1.15",
    ),
    Target(
        "CMHA over its direct form",
        ("polar + attention", "polar + attention"), ("direct", OURS), "fwd+bwd", ">= 50",
    ),
    Target("relative to plain", ("relative + attention", "flash"), (OURS, OURS), "fwd", "<= 1.90"),
    Target(
        "relative to plain", ("relative + attention", "flash"), (OURS, OURS), "fwd+bwd", "<= 2.40"
    ),
    *(
        Target(f"relative over {peer}", ("relative + attention",) * 2, (peer, OURS), mode, bound)
        for mode in ("fwd", "fwd+bwd")
        for peer, bound in (
            (EAGER, ">= 6.00"), ("torch.compile", ">= 3.00"),
            ("sdpa + bias", ">= 2.00"), ("flex + bias", ">= 2.00"),
        )
    ),
    Target("conv over eager", ("conv", "conv"), (EAGER, OURS), "fwd+bwd", ">= 1.00"),
    Target("conv over compiled", ("conv", "conv"), ("torch.compile", OURS), "fwd+bwd", ">= 1.00"),
    Target("conv over fla", ("conv", "conv"), ("fla", OURS), "bwd", ">= 1.15"),
]  # fmt: skip


def ratios(rows: list[Row]) -> Iterator[str]:
    """Targets beside what was measured; ratios of graph times where both sides have them."""
    found = {
        ((row.B, row.H, row.T, row.D), row.name, row.implementation, row.mode, row.metric): row.p50
        for row in rows
    }
    for shape in dict.fromkeys(key[0] for key in found):
        for target in TARGETS:
            for metric in ("graph time", "time"):
                keys = [
                    (shape, kernel, provider, target.mode, metric)
                    for kernel, provider in zip(target.kernel, target.provider, strict=True)
                ]
                if all(key in found for key in keys):
                    ratio = found[keys[0]] / found[keys[1]]
                    about = f"{shape!s:22} {target.what:34} {target.mode:8} {metric:10}"
                    yield f"{about} {target.bound:>8} {ratio:8.2f}"
                    break


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """A name of SHAPES or B,H,T,D; argparse.ArgumentTypeError for anything else."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        batch, heads, length, dim = map(int, text.split(","))
    except ValueError:
        batch = heads = length = dim = 0
    if min(batch, heads, length, dim) < 1 or dim % 2:
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(SHAPES)} or B,H,T,D, all positive, D even; got {text!r}"
        )
    return batch, heads, length, dim


def main() -> None:
    """Measure, print a line a row, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=parse_shape, nargs="+", metavar="S1|S2|S3|B,H,T,D",
                        default=[*SHAPES.values(), DIRECT])  # fmt: skip
    parser.add_argument("--part", choices=list(PARTS), help="ops, or layers; both if not given")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    from posenc.kernels.common import INTERPRETED

    device = torch.device("cpu" if INTERPRETED else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("bench.kernels needs a CUDA device, or TRITON_INTERPRET=1 to try it on a CPU.")
    if INTERPRETED and args.dtype == "bfloat16":
        sys.exit("Triton's interpreter computes bfloat16 wrongly. Use --dtype float32 or float16.")
    dtype = getattr(torch, args.dtype or ("float32" if INTERPRETED else "bfloat16"))
    torch.manual_seed(0)
    # Gates and modes differentiate one compiled forward pass more than once.
    functorch_config.donated_buffer = False
    try:
        file, failed = RowFile(args.out, device), False
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    for row in ceilings(device):
        file.add(row)
        print(f"{row.name} {row.implementation}: {row.p50:.2f} {row.unit}", flush=True)
    for shape in args.shapes:
        rows = []
        makers = [PARTS[args.part]] if args.part else PARTS.values()
        for case in (case for make in makers for case in make(shape, dtype, device)):
            for row in measure(case, shape, device):
                if isinstance(row, str):
                    failed = failed or f"of {OURS}" in row
                    print(row, flush=True)
                    continue
                file.add(row)
                rows.append(row)
                print(
                    f"{shape!s:22} {row.name:20} {row.implementation:24} {row.mode:8} "
                    f"{row.p50:10.4f} {row.unit:4} {row.metric:10} error {row.error_vs_fp64:.1e}",
                    flush=True,
                )
            torch._dynamo.reset()
        print("\nmeasured ratios beside their targets", *ratios(rows), "", sep="\n", flush=True)
    if failed:
        sys.exit("a kernel of posenc was refused or failed, see above")


if __name__ == "__main__":
    main()
