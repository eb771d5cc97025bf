"""What attention and a GPT cost: parameters, FLOPs and bytes, as formulas in their sizes.

    q, k, v    N C 3C multiply-adds, forward        output      N C C
    conv       3 k N C                              router      N C (rows of W_s, W_r, W_h)
    core       2 B P C                              encoding    see each one below
    P = T (S - T) + T (T + 1) / 2                   the pairs (query, key) that a causal mask leaves

Legend: B batch, T query length, S key length, N = B T tokens, H heads, D head dim, C = H D, A heads
that a token keeps (H without a router, hs + K with one), e bytes of an element.

Conventions. A multiply-add is 2 FLOPs; products alone are FLOPs, convolutions among them. The
backward pass of a product is one more for each factor that needs a gradient: mostly both, so
training is 3 times the forward pass. What is computed twice (scores in flash attention, blocks
under `checkpoint_activations`) counts once. Apart stands elementwise work of the encodings: 6 for
the rotation of a pair of features, 1 for each sine, cosine, arctangent, exponential and added
phase. Not counted: softmax, masks, biases, scales, norms, gates, GELU, loss.

`kept_flops` leaves out what gates of 0 make needless: rows of queries, of the scores and of the
output; keys and values stay whole, as a later token may select any head. Queries are all needed
where a convolution mixes them or the router reads them. `posenc.backends.choice` and
`posenc.backends.skipping` say from which sizes on it is skipped; with relative terms nothing is.

Bytes that the backward pass keeps are those of `impl="fused"`, without autocast or dropout: every
tensor of C or more numbers a token, the log-sum-exp and the statistics of LayerNorms, each storage
once. Gates, rates and positions, of H numbers a token or fewer, are left out. Of q, k and v, views
of one product, all stay while one does. `sdpa` agrees without rotation, relative term and router;
elsewhere it keeps more: `python -m bench.memory`.

A new encoding adds one function under `encoding_cost`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from functools import singledispatch
from typing import NamedTuple

import torch

from posenc.attention import Attention
from posenc.cache import POSITIONS, Stream
from posenc.checks import check_sizes
from posenc.encodings.base import Encoding
from posenc.encodings.carope import CARoPE, SharedPhase
from posenc.encodings.learned import Learned
from posenc.encodings.nope import NoPE
from posenc.encodings.polar import Polar
from posenc.encodings.relative import Relative
from posenc.encodings.rope import RoPE
from posenc.encodings.sinusoidal import Sinusoidal
from posenc.models.gpt import GPT, GPTConfig


@dataclass(frozen=True)
class Part:
    """What one part costs in a call of B sequences of T tokens that see S keys.

    Attributes:
        parameters: how many.
        flops: of the forward pass.
        backward_flops: of the backward pass.
        kept_flops: of a forward pass that skips what the router drops.
        elementwise: operations on single numbers, forward; see the head of this file.
        saved_bytes: kept from the forward pass for the backward pass, parameters aside.
        weight_bytes: of the parameters that a forward pass reads.
        state_bytes: that each token of a sequence adds to the decoding state.
        state_read_bytes: of that state, what a step reads for all heads.
    """

    parameters: int = 0
    flops: int = 0
    backward_flops: int = 0
    kept_flops: int = 0
    elementwise: int = 0
    saved_bytes: int = 0
    weight_bytes: int = 0
    state_bytes: int = 0
    state_read_bytes: int = 0

    def __add__(self, other: "Part") -> "Part":
        return Part(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def training_flops(self) -> int:
        """Forward and backward."""
        return self.flops + self.backward_flops

    @property
    def read_bytes(self) -> int:
        """Weights and decoding state that a step reads: its time where memory is the limit."""
        return self.weight_bytes + self.state_read_bytes


@dataclass(frozen=True)
class Cost:
    """A call's cost by part, in the order of the computation; absent parts are `Part()`."""

    parts: Mapping[str, Part]

    @property
    def total(self) -> Part:
        """The sum of the parts."""
        return sum(self.parts.values(), Part())


@dataclass(frozen=True)
class Sizes:
    """The letters of the formulas."""

    B: int
    T: int
    S: int
    H: int
    D: int
    A: int
    dtype: torch.dtype

    @property
    def C(self) -> int:
        """The width of all heads."""
        return self.H * self.D

    @property
    def N(self) -> int:
        """Tokens."""
        return self.B * self.T

    @property
    def pairs(self) -> int:
        """P: row i of T sees S - T + i + 1 keys."""
        return self.T * (self.S - self.T) + self.T * (self.T + 1) // 2

    @property
    def e(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def precise(self) -> int:
        """Bytes of an element in fp32 or better."""
        return max(self.e, 4)


def product(multiply_adds: int, kept: int | None = None, gradients: int = 2) -> Part:
    """The FLOPs of a product.

    Args:
        kept: multiply-adds that the kept heads need; None is all.
        gradients: how many of its two factors need one.
    """
    flops = 2 * multiply_adds
    kept_flops = flops if kept is None else 2 * kept
    return Part(flops=flops, backward_flops=gradients * flops, kept_flops=kept_flops)


def weights(count: int, itemsize: int, read: int | None = None) -> Part:
    """So many parameters, of which a forward pass reads `read`, None being all."""
    return Part(parameters=count, weight_bytes=itemsize * (count if read is None else read))


def state(streams: Iterable[Stream], s: Sizes, read: int) -> Part:
    """Decoding state of which a step reads `read` rows a sequence."""
    row = sum(math.prod(x.shape) * (x.dtype or s.dtype).itemsize for x in streams)
    return Part(state_bytes=row, state_read_bytes=s.B * read * row)


def projections_cost(layer: Attention, s: Sizes) -> Part:
    """q, k, v = x W_qkv: 3 C^2 (+ 3 C) parameters, N C 3C multiply-adds; keeps x and q, k, v."""
    mixed = layer.conv is not None or straight_through(layer)
    queries = s.C if mixed else s.A * s.D
    return (
        weights(3 * s.C**2 + (3 * s.C if layer.c_attn.bias is not None else 0), s.e)
        + product(s.N * s.C * 3 * s.C, kept=s.N * s.C * (2 * s.C + queries))
        + Part(saved_bytes=s.N * (s.C + 3 * s.C) * s.e)
    )


def conv_cost(layer: Attention, s: Sizes) -> Part:
    """y[t] = sum_j w[j] x[t-k+1+j]: 3 k D parameters (+ 3 D), with a kernel a head 3 k C (+ 3 C);
    3 k N C multiply-adds; state q, k and v, of which k-1 rows are read.

    Keeps its outputs, but for q and k that a rotation replaces and nothing else reads.
    """
    conv = layer.conv
    if conv is None:
        return Part()
    channels, taps = s.D if conv.weight.ndim == 3 else s.C, conv.kernel_size
    replaced = 2 if isinstance(layer.encoding, RoPE | CARoPE) else 0
    if isinstance(layer.encoding, SharedPhase) and s.e < 4:
        replaced = 2  # by copies
    if replaced and straight_through(layer) and s.e >= 4:
        replaced = 1  # the norms of q
    return (
        weights(3 * channels * (taps + (conv.bias is not None)), s.e)
        + product(3 * taps * s.N * s.C)
        + Part(saved_bytes=(3 - replaced) * s.N * s.C * s.e)
        + state(conv.streams().values(), s, read=taps - 1)
    )


def core_cost(s: Sizes) -> Part:
    """softmax(q k^T) v: B P C multiply-adds twice; keeps o and the log-sum-exp (fp32, H a token);
    state k and v, and the position, which is read only where it was given.
    """
    heads = Stream((s.H, s.D))
    return (
        product(2 * s.B * s.pairs * s.C, kept=2 * s.B * s.pairs * s.A * s.D)
        + Part(saved_bytes=s.N * (s.C * s.e + 4 * s.H))
        + state((heads, heads), s, read=s.S)
        + state((POSITIONS,), s, read=0)
    )


def straight_through(layer: Attention) -> bool:
    """Whether the gates have a gradient through the norms of q."""
    router = layer.router
    return router is not None and router.reads_queries and router.routed > 0


def router_cost(layer: Attention, s: Sizes) -> Part:
    """softmax(W x) for W_s (hs, C) where hs > 1, W_r (E, C), W_h (2, C): that many parameters, and
    so many multiply-adds a token; router="query_norm" has none.

    Keeps fp32 copies: of x for each of them, or of q. Where no kernel weighs the heads it keeps
    them weighed too.
    """
    router = layer.router
    if router is None:
        return Part()
    products = [w for w in (router.W_s, router.W_r, router.W_h) if w is not None]
    rows = sum(w.out_features for w in products)
    copies = 4 * s.C * (1 if straight_through(layer) else len(products)) if s.e < 4 else 0
    dense = s.A == s.H or isinstance(layer.encoding, Relative)
    apart = straight_through(layer) or dense
    return (
        weights(rows * s.C, s.e)
        + product(s.N * s.C * rows)
        + Part(saved_bytes=s.N * (copies + (s.C * s.e if apart else 0)))
    )


def output_cost(layer: Attention, s: Sizes) -> Part:
    """y = o W_o: C^2 (+ C) parameters, N C C multiply-adds; o is kept already."""
    return weights(s.C**2 + (s.C if layer.c_proj.bias is not None else 0), s.e) + product(
        s.N * s.C**2, kept=s.N * s.C * s.A * s.D
    )


def rotation(s: Sizes, dim: int) -> Part:
    """Turning `dim` features of every head of q and k, 6 a pair; keeps q and k turned."""
    return Part(elementwise=6 * s.N * s.H * dim, saved_bytes=2 * s.N * s.C * s.e)


@singledispatch
def encoding_cost(encoding: Encoding, s: Sizes) -> Part:
    """What an encoding adds. A subclass has the cost of its base, but those of `Encoding` itself
    need a function of their own.

    Raises:
        ValueError: for an encoding without one.
    """
    if type(encoding) is Encoding:
        return Part()
    raise ValueError(
        f"posenc.cost knows no formula for the encoding {type(encoding).__name__}. "
        "Register one: @posenc.cost.encoding_cost.register."
    )


@encoding_cost.register
def nope_cost(encoding: NoPE, s: Sizes) -> Part:
    """Nothing."""
    return Part()


@encoding_cost.register
def rope_cost(encoding: RoPE, s: Sizes) -> Part:
    """The rotation, and a sine and a cosine for each position and pair of rotary_dim features."""
    return rotation(s, encoding.rotary_dim) + Part(elementwise=s.T * encoding.rotary_dim)


@encoding_cost.register
def carope_cost(encoding: CARoPE, s: Sizes) -> Part:
    """z = x W: C H (+ H) parameters, N C H multiply-adds; then for every token, head and pair an
    exponential, an addition, a sine and a cosine; and the rotation.

    Keeps x in fp64. Its parameters are never below fp32; state the phase, C/2 in fp64.
    """
    return (
        phase_cost(encoding, s)
        + Part(elementwise=2 * s.N * s.C // 2)  # sine, cosine
        + rotation(s, s.D)
    )


def phase_cost(encoding: CARoPE, s: Sizes) -> Part:
    """CARoPE without turning q and k."""
    return (
        weights(s.C * s.H + (s.H if encoding.bias is not None else 0), s.precise)
        + product(s.N * s.C * s.H)
        + Part(elementwise=2 * s.N * s.C // 2)  # exponential, addition
        + Part(saved_bytes=8 * s.N * s.C if s.e < 8 else 0)
        + state(encoding.streams().values(), s, read=1)
    )


@encoding_cost.register
def shared_phase_cost(encoding: SharedPhase, s: Sizes) -> Part:
    """A layer's share of CARoPE(source="token"): sine and cosine of the phase, and the rotation.

    No kernel does it: it keeps phase, sine and cosine, fp32 or better, and q and k in that dtype.
    """
    angles = (3 if s.e < 8 else 2) * s.N * s.C // 2  # fp64 layers share the phase
    copies = 2 * s.N * s.C if s.e < 4 else 0
    return rotation(s, s.D) + Part(
        elementwise=2 * s.N * s.C // 2, saved_bytes=(angles + copies) * s.precise
    )


@encoding_cost.register
def polar_cost(encoding: Polar, s: Sizes) -> Part:
    """delta and b: 2 H D/2 = C parameters, never below fp32. For each pair of q and of k an
    arctangent, a sine and a cosine; and the rotation.
    """
    return weights(s.C, s.precise) + Part(elementwise=3 * s.N * s.C) + rotation(s, s.D)


@encoding_cost.register
def relative_cost(encoding: Relative, s: Sizes) -> Part:
    """learned: R, S and u, P' (C + H) + C parameters for P' = max_distance, of which the rows of S
    distances at most are read; q.R: B P C multiply-adds.

    sinusoidal, W the sinusoid's width: W C + 2 C parameters; W_R r for S distances: S W C, without
    a gradient to r, and as above B P C. While decoding fewer than D tokens the sinusoid splits into
    products: N C W + B P H W. Keeps r and W_R r. (H = 1, which the kernels split too, keeps more.)
    """
    by_distance = product(s.B * s.pairs * s.C, kept=s.B * s.pairs * s.A * s.D)
    if encoding.kind == "learned":
        assert encoding.max_distance is not None
        read = min(encoding.max_distance, s.S)
        tables = weights(encoding.max_distance * (s.C + s.H), s.e, read=read * (s.C + s.H))
        return tables + weights(s.C, s.e) + by_distance
    width = encoding.sinusoid_dim
    part = weights(width * s.C + 2 * s.C, s.e)
    if min(s.S, s.D) > s.T:
        angles = (s.T + s.S) * width
        on_sines = product(s.N * s.C * width, kept=s.N * s.A * s.D * width)
        factored = product(s.B * s.pairs * s.H * width, s.B * s.pairs * s.A * width, gradients=1)
        return part + Part(elementwise=angles) + on_sines + factored
    saved = s.S * (width + s.C) * s.e
    rows = Part(elementwise=s.S * width, saved_bytes=saved)
    return part + rows + product(s.S * width * s.C, gradients=1) + by_distance


@encoding_cost.register
def learned_cost(encoding: Learned, s: Sizes) -> Part:
    """A table of max_length C parameters, of which T rows are read and added."""
    return weights(encoding.max_length * s.C, s.e, read=s.T * s.C)


@encoding_cost.register
def sinusoidal_cost(encoding: Sinusoidal, s: Sizes) -> Part:
    """A sine or a cosine for each position and feature."""
    return Part(elementwise=s.T * s.C)


def attention_cost(
    layer: Attention,
    batch: int,
    length: int,
    key_length: int | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Cost:
    """The cost of one attention module, by part: projections, conv, encoding, core, router, output.

    Args:
        batch: B.
        length: T, tokens of the call: the whole text in training and prefill, 1 in a decode step.
        key_length: S, keys that the last of them sees; None is T. More is a step with a cache.
        dtype: of weights, activations and the decoding state; None is the weights'.

    Raises:
        ValueError: for another module, sizes below 1, S < T, a dtype without floating point, or an
            encoding without formula.
    """
    if not isinstance(layer, Attention):
        raise ValueError(
            f"attention_cost takes a posenc.Attention; got {type(layer).__name__}. "
            "posenc.attention(NAME, ...) builds one; model_cost takes a GPT or GPTConfig."
        )
    dtype = layer.c_attn.weight.dtype if dtype is None else dtype
    router = layer.router
    active = layer.num_heads if router is None else router.shared + router.top_k
    s = _sizes(batch, length, key_length, layer.num_heads, layer.head_dim, active, dtype)
    return Cost(
        {
            "projections": projections_cost(layer, s),
            "conv": conv_cost(layer, s),
            "encoding": encoding_cost(layer.encoding, s),
            "core": core_cost(s),
            "router": router_cost(layer, s),
            "output": output_cost(layer, s),
        }
    )


def model_cost(
    model: GPT | GPTConfig,
    batch: int,
    length: int,
    key_length: int | None = None,
    *,
    logits: int | None = None,
    dtype: torch.dtype | None = None,
) -> Cost:
    """The cost of a GPT, by part: embedding, position (what is added to it), phase (of CARoPE with
    source="token"), the parts of attention summed over the layers, mlp, norms, head and loss.

    mlp, M its width, is 2 C M (+ C + M) parameters and 2 N C M multiply-adds a layer and keeps its
    input, and M before and after GELU; a norm is C (+ C) parameters and keeps its input and two
    numbers a token; the head, tied, is V C multiply-adds a position and keeps its input; the loss
    keeps the logarithm of V probabilities.

    Args:
        batch: B.
        length, key_length, dtype: as in `attention_cost`.
        logits: positions of each sequence whose logits are formed; None is all T, as in training;
            `generate` forms 1.

    Raises:
        ValueError: as `attention_cost`; for S beyond a learned table; for logits above T.
    """
    model = _built(model)
    config, dtype = model.config, model.wte.weight.dtype if dtype is None else dtype
    heads = config.heads
    s = _sizes(batch, length, key_length, heads, config.embed_dim // heads, heads, dtype)
    if model.max_length is not None and model.max_length < s.S:
        raise ValueError(
            f"the learned table has {model.max_length} positions; got {s.S} tokens. "
            "Shorten them, or give the config a larger context."
        )
    logits = length if logits is None else logits
    check_sizes("model_cost", logits=logits)
    if logits > length:
        raise ValueError(f"logits must be at most length={length}; got {logits}.")
    layers = [attention_cost(block.attn, batch, length, s.S, dtype=dtype) for block in model.blocks]
    attention = {
        name: sum((layer.parts[name] for layer in layers), Part()) for name in layers[0].parts
    }
    parts = {
        "embedding": _embedding_cost(config, s),
        "position": Part() if model.wpe is None else encoding_cost(model.wpe, s),
        "phase": Part() if model.phase is None else _token_phase_cost(model.phase, s),
        **attention,
        "mlp": _mlp_cost(config, s),
        "norms": _norms_cost(config, s),
        "head": _head_cost(config, s, s.B * logits),
        "loss": Part(saved_bytes=s.B * logits * config.vocab_size * s.precise),
    }
    return Cost(parts)


def _token_phase_cost(phase: CARoPE, s: Sizes) -> Part:
    """Without a kernel; keeps the fp64 exponentials, and in fp64 the phase, which layers share."""
    kept = 1 if s.e < 8 else 2
    return phase_cost(phase, s) + Part(saved_bytes=kept * 8 * s.N * s.C // 2)


def _embedding_cost(config: GPTConfig, s: Sizes) -> Part:
    """A row a token; the model's own cache counts positions too."""
    table = weights(config.vocab_size * s.C, s.e, read=s.N * s.C)
    return table + state((POSITIONS,), s, read=0)


def _mlp_cost(config: GPTConfig, s: Sizes) -> Part:
    layers, width = config.layers, config.mlp_width
    bias = s.C + width if config.bias else 0
    return (
        weights(layers * (2 * s.C * width + bias), s.e)
        + product(layers * 2 * s.N * s.C * width)
        + Part(saved_bytes=layers * s.N * (s.C + 2 * width) * s.e)
    )


def _norms_cost(config: GPTConfig, s: Sizes) -> Part:
    norms = 2 * config.layers + 1
    return weights(norms * s.C * (2 if config.bias else 1), s.e) + Part(
        saved_bytes=norms * s.N * (s.C * s.e + 2 * s.precise)
    )


def _head_cost(config: GPTConfig, s: Sizes, rows: int) -> Part:
    tied = config.vocab_size * s.C
    return Part(weight_bytes=tied * s.e) + product(rows * tied) + Part(saved_bytes=rows * s.C * s.e)


class Conventions(NamedTuple):
    """One figure by two ways of counting."""

    palm: float  # 6 parameters + 12 L C T, every pair (query, key): PaLM, 2204.02311, appendix B
    exact: float  # this file's: the products that there are, the pairs that the mask leaves


def model_flops_per_token(model: GPT | GPTConfig, length: int | None = None) -> Conventions:
    """Training FLOPs a token, heads that a router drops included.

    Published figures count as PaLM's, which takes every parameter for a multiply-add a token: true
    of matrices (the tied embedding is the head's), not of tables and biases.

    Args:
        length: T; None is the config's context.

    Raises:
        ValueError: as `model_cost`.
    """
    model = _built(model)
    config = model.config
    length = config.context if length is None else length
    total = model_cost(model, 1, length).total
    palm = 6 * total.parameters + 12 * config.layers * config.embed_dim * length
    return Conventions(palm, total.training_flops / length)


def mfu(
    tokens_per_second: float, model: GPT | GPTConfig, peak: float, length: int | None = None
) -> Conventions:
    """Model FLOPs utilisation: the share of `peak` FLOPs a second that training puts to use.

    Raises:
        ValueError: for a peak that is not above 0; as `model_flops_per_token`.
    """
    if not 0 < peak < math.inf:
        raise ValueError(f"peak must be a finite number of FLOPs a second above 0; got {peak}.")
    each = model_flops_per_token(model, length)
    return Conventions(*(tokens_per_second * flops / peak for flops in each))


def _sizes(
    batch: int,
    length: int,
    key_length: int | None,
    heads: int,
    head_dim: int,
    active: int,
    dtype: torch.dtype,
) -> Sizes:
    key_length = length if key_length is None else key_length
    check_sizes("a cost", batch=batch, length=length, key_length=key_length)
    if key_length < length:
        raise ValueError(
            f"key_length counts the {length} tokens of the call too; got {key_length}. "
            "Add what the cache holds to them."
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one; got {dtype}.")
    return Sizes(batch, length, key_length, heads, head_dim, active, dtype)


def _built(model: object) -> GPT:
    """The model; that of a config without memory, and without a back end that may not run here."""
    if isinstance(model, GPT):
        return model
    if not isinstance(model, GPTConfig):
        raise ValueError(
            f"model_cost takes a posenc.GPT or GPTConfig; got {type(model).__name__}. "
            "attention_cost takes an attention module."
        )
    options = {k: v for k, v in model.attention_options.items() if not k.endswith("impl")}
    with torch.device("meta"):
        return GPT(replace(model, attention_options=options))
