"""What attention and a GPT cost: parameters, FLOPs and bytes, as formulas in their sizes.

    q, k, v    N C (H + 2G) D multiply-adds, forward     output      N H D C
    conv       k N (H + 2G) D                            router      N C (rows of W_s, W_r, W_h)
    core       2 B P H D                                 encoding    see each one's `cost`
    P = T (S - T) + T (T + 1) / 2                        the pairs (query, key) of a causal mask; a
                                                         window leaves fewer, causal=False T S

Letters, conventions and the formulas that parts share are in `posenc.accounting`. What segments and
padding leave out is not known beforehand, and is counted as if it were there.

`kept_flops` leaves out what gates of 0 make needless: rows of queries, of the scores and of the
output; keys and values stay whole, as a later token may select any head. Queries are all needed
where a convolution mixes them or the router reads them. `posenc.backends.choice` and
`posenc.backends.skipping` say from which sizes on it is skipped; with relative terms nothing is.

Of q, k and v, views of one product, all stay while one does. `sdpa` agrees with the bytes of
`impl="fused"` without rotation, relative term and router; elsewhere it keeps more:
`python -m bench.memory`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from posenc.accounting import Part, Sizes, product, state, weights
from posenc.attention import Attention
from posenc.cache import POSITIONS, Stream
from posenc.checks import check_sizes
from posenc.encodings.carope import CARoPE
from posenc.models.config import GPTConfig
from posenc.models.gpt import GPT


@dataclass(frozen=True)
class Cost:
    """A call's cost by part, in the order of the computation; absent parts are `Part()`."""

    parts: Mapping[str, Part]

    @property
    def total(self) -> Part:
        """The sum of the parts."""
        return sum(self.parts.values(), Part())


def projections_cost(layer: Attention, s: Sizes) -> Part:
    """q, k, v = x W_qkv, W = (H + 2G) D: C W (+ W) parameters, N C W multiply-adds; keeps x and q,
    k, v, unless copies take the place of all three. A norm of q and k is D parameters each; it
    keeps what it makes, and a number a head.
    """
    width = s.inner + 2 * s.G * s.D
    mixed = layer.conv is not None or straight_through(layer)
    queries = s.inner if mixed else s.A * s.D
    copied = layer.encoding.widening > 1 and layer.encoding.replaces(s)
    read = layer.conv is not None or layer.q_norm is not None or not copied
    norms = Part()
    if layer.q_norm is not None:
        norms = weights(2 * s.D, s.e) + Part(
            saved_bytes=s.N * (s.turned * s.e + (s.H + s.G) * s.precise)
        )
    return (
        weights(s.C * width + (width if layer.c_attn.bias is not None else 0), s.e)
        + product(s.N * s.C * width, kept=s.N * s.C * (2 * s.G * s.D + queries))
        + Part(saved_bytes=s.N * (s.C + (width if read else 0)) * s.e)
        + norms
    )


def conv_cost(layer: Attention, s: Sizes) -> Part:
    """y[t] = sum_j w[j] x[t-k+1+j], W = (H + 2G) D: 3 k D parameters (+ 3 D), with a kernel a head
    k W (+ W); k N W multiply-adds; state q, k and v, of which k-1 rows are read.

    Keeps its outputs, but for q and k that a rotation replaces and nothing else reads, and for v
    where kernels take a padded copy.
    """
    conv = layer.conv
    if conv is None:
        return Part()
    width, taps = s.inner + 2 * s.G * s.D, conv.kernel_size
    channels = width if conv.per_head else 3 * s.D
    replaced = 0 if layer.q_norm is not None else layer.encoding.replaces(s)
    values = 0 if layer.encoding.widening > 1 else s.G * s.D
    kept = s.turned + values
    if replaced:
        norms_of_q = straight_through(layer) and s.e >= 4
        kept = values + (s.inner if norms_of_q else 0)
    return (
        weights(channels * (taps + (conv.bias is not None)), s.e)
        + product(taps * s.N * width)
        + Part(saved_bytes=kept * s.N * s.e)
        + state(conv.streams().values(), s, read=taps - 1)
    )


def core_cost(s: Sizes) -> Part:
    """softmax(q k^T) v: B P H D multiply-adds twice; keeps o and the log-sum-exp (fp32, H a token);
    state k and v, and the position, which is read only where it was given.
    """
    heads = Stream((s.G, s.D))
    return (
        product(2 * s.B * s.pairs * s.inner, kept=2 * s.B * s.pairs * s.A * s.D)
        + Part(saved_bytes=s.N * (s.inner * s.e + 4 * s.H))
        + state((heads, heads), s, read=s.seen)
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
    copied = s.inner if straight_through(layer) else s.C * len(products)
    copies = 4 * copied if s.e < 4 else 0
    apart = straight_through(layer) or s.A == s.H or layer.encoding.in_logits
    return (
        weights(rows * s.C, s.e)
        + product(s.N * s.C * rows)
        + Part(saved_bytes=s.N * (copies + (s.inner * s.e if apart else 0)))
    )


def output_cost(layer: Attention, s: Sizes) -> Part:
    """y = o W_o: H D C (+ C) parameters, N H D C multiply-adds; o is kept already."""
    bias = s.C if layer.c_proj.bias is not None else 0
    return weights(s.inner * s.C + bias, s.e) + product(
        s.N * s.inner * s.C, kept=s.N * s.C * s.A * s.D
    )


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
        ValueError: for another module, sizes below 1, S < T, or a dtype without floating point.
    """
    if not isinstance(layer, Attention):
        raise ValueError(
            f"attention_cost takes a posenc.Attention; got {type(layer).__name__}. "
            "posenc.attention(NAME, ...) builds one; model_cost takes a GPT or GPTConfig."
        )
    dtype = layer.c_attn.weight.dtype if dtype is None else dtype
    s = _sizes(layer, batch, length, key_length, dtype)
    return Cost(
        {
            "projections": projections_cost(layer, s),
            "conv": conv_cost(layer, s),
            "encoding": layer.encoding.cost(s),
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
    s = _sizes(model.blocks[0].attn, batch, length, key_length, dtype)
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
        "position": Part() if model.wpe is None else model.wpe.cost(s),
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
    return phase.phase_cost(s) + Part(saved_bytes=kept * 8 * s.N * s.G * s.D // 2)


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
    layer: Attention, batch: int, length: int, key_length: int | None, dtype: torch.dtype
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
    router = layer.router
    return Sizes(
        B=batch,
        T=length,
        S=key_length,
        H=layer.num_heads,
        D=layer.head_dim,
        A=layer.num_heads if router is None else router.shared + router.top_k,
        dtype=dtype,
        G=layer.num_kv_heads,
        C=layer.embed_dim,
        window=layer.window,
        causal=layer.causal,
    )


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
