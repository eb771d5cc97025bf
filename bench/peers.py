"""Attention layers of other libraries, with their weights also in a layer of posenc where it has
the scheme.

A builder takes (embed_dim, heads, device, dtype) and gives the peer's layer and its definition:
`Reference` of our layer on the same weights.
It raises ImportError where the library is not installed. Frequencies stay in fp32, as their models
keep them. Nothing drops out, so peers are in evaluation mode and spend no time on it.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import posenc

from .layers import Layer, Reference
from .measure import Function

Built = tuple[nn.Module, Function]
Rotation = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]  # q, k, the first position


def twin(
    name: str,
    qkv: Tensor,
    out: Tensor,
    heads: int,
    *biases: Tensor,
    encoding: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Reference:
    """Our layer of that name with these projections (3C, C) and (C, C), by its definition.

    Args:
        encoding: parameters of its encoding, by name.
    """
    layer = posenc.attention(name, out.shape[0], heads, bias=bool(biases), **options)
    layer = layer.to(device=qkv.device, dtype=qkv.dtype)
    with torch.no_grad():
        layer.c_attn.weight.copy_(qkv)
        layer.c_proj.weight.copy_(out)
        for projection, bias in zip((layer.c_attn, layer.c_proj), biases, strict=False):
            projection.bias.copy_(bias)
        for which, value in (encoding or {}).items():
            layer.encoding.get_parameter(which).copy_(value)
    return Reference(layer)


# A plain block, with what others put into it.


def no_rotation(q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """No position."""
    return q, k


def rotary_tables(q: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """cos and sin (1, T, D) from fp32 angles, in q's dtype, pairs half-split."""
    length, dim = q.shape[-2:]
    exponents = torch.arange(0, dim, 2, device=q.device) / dim
    angles = torch.arange(start, start + length, device=q.device)[:, None] * 10000.0**-exponents
    angles = torch.cat((angles, angles), dim=-1)[None]
    return angles.cos().to(q.dtype), angles.sin().to(q.dtype)


def rotation(q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """RoPE in a few lines."""
    cos, sin = rotary_tables(q, start)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turned(q), turned(k)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class PlainBlock(Layer):
    """One projection to q, k and v, attention, one projection; keys and values concatenated."""

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        rotate: Rotation = no_rotation,
        core: Function = causal_sdpa,
    ) -> None:
        super().__init__()
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.heads, self.rotate, self.core = heads, rotate, core

    def _heads(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).split(width, dim=-1)
        q, k, v = (
            z.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for z in (q, k, v)
        )
        return *self.rotate(q, k, start), v

    def _merged(self, y: Tensor) -> Tensor:
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.prefill(x, 0)[0]

    def prefill(self, x: Tensor, max_length: int) -> tuple[Tensor, Any]:
        q, k, v = self._heads(x, 0)
        return self._merged(self.core(q, k, v)), (k, v)

    def decode(self, token: Tensor, state: Any) -> Tensor:
        before_k, before_v = state
        q, k, v = self._heads(token, before_k.shape[-2])
        k, v = torch.cat((before_k, k), dim=-2), torch.cat((before_v, v), dim=-2)
        return self._merged(F.scaled_dot_product_attention(q, k, v))


def plain(
    embed_dim: int,
    heads: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    scheme: str = "nope",
    **parts: Any,
) -> Built:
    """The plain block with parts of it exchanged; the zoo's name for what it then computes."""
    block = PlainBlock(embed_dim, heads, **parts).to(device, dtype)
    return block, twin(scheme, block.qkv.weight, block.proj.weight, heads)


def with_liger(*sizes: Any) -> Built:
    """Liger's rotation, which writes q and k in place, in the plain block."""
    from liger_kernel.ops.rope import LigerRopeFunction

    def rotate(q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        turned: tuple[Tensor, Tensor] = LigerRopeFunction.apply(q, k, *rotary_tables(q, start))
        return turned

    return plain(*sizes, scheme="rope", rotate=rotate)


def with_flex(*sizes: Any) -> Built:
    """Compiled FlexAttention after a compiled rotation, in the plain block."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention)

    @lru_cache(maxsize=1)
    def mask(length: int, device: torch.device) -> Any:
        return create_block_mask(lambda b, h, m, n: m >= n, None, None, length, length, device)

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, block_mask=mask(q.shape[-2], q.device))

    return plain(*sizes, scheme="rope", rotate=torch.compile(rotation), core=core)


# x-transformers.


class XTransformers(Layer):
    """Its attention as its decoder calls it, SDPA inside; `position` is made once a forward."""

    def __init__(self, attend: nn.Module, position: Callable[[int], dict[str, Any]]) -> None:
        super().__init__()
        self.attend, self.position = attend.eval(), position

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, **self.position(x.shape[1]))

    def prefill(self, x: Tensor, max_length: int) -> tuple[Tensor, Any]:
        return self.attend(x, **self.position(x.shape[1]), return_intermediates=True)

    def decode(self, token: Tensor, state: Any) -> Tensor:
        position = self.position(state.cached_kv[0].shape[-2] + 1)
        return self.attend(token, **position, cache=state, return_intermediates=True)[0]


def x_attention(
    embed_dim: int, heads: int, device: torch.device, dtype: torch.dtype, **options: Any
) -> Any:
    """x-transformers' causal attention by SDPA."""
    from x_transformers.x_transformers import Attention

    size = {"dim": embed_dim, "heads": heads, "dim_head": embed_dim // heads}
    return Attention(**size, causal=True, flash=True, **options).to(device, dtype)


def stacked(attend: Any) -> Tensor:
    """x-transformers' projections to q, k and v as one (3C, C)."""
    return torch.cat([attend.to_q.weight, attend.to_k.weight, attend.to_v.weight])


def x_rope(embed_dim: int, heads: int, device: torch.device, dtype: torch.dtype) -> Built:
    """Its rotary embedding of whole heads, pairs interleaved. Keys are cached unrotated."""
    attend = x_attention(embed_dim, heads, device, dtype)
    from x_transformers.x_transformers import RotaryEmbedding

    rotary = RotaryEmbedding(embed_dim // heads).to(device)
    layer = XTransformers(attend, lambda n: {"rotary_pos_emb": rotary.forward_from_seq_len(n)})
    pairing = {"pairing": "interleaved"}
    return layer, twin("rope", stacked(attend), attend.to_out.weight, heads, **pairing)


def x_alibi(embed_dim: int, heads: int, device: torch.device, dtype: torch.dtype) -> Built:
    """Its ALiBi (2108.12409)."""
    attend = x_attention(embed_dim, heads, device, dtype)
    from x_transformers.x_transformers import AlibiPositionalBias

    bias = AlibiPositionalBias(heads).to(device, dtype)
    layer = XTransformers(attend, lambda n: {"rel_pos": bias})
    return layer, twin("alibi", stacked(attend), attend.to_out.weight, heads)


def x_fox(embed_dim: int, heads: int, device: torch.device, dtype: torch.dtype) -> Built:
    """Its forgetting attention (2503.02130), there called data-dependent ALiBi."""
    attend = x_attention(embed_dim, heads, device, dtype, data_dependent_alibi=True)
    gate = attend.data_dependent_alibi.to_forget_gates[0]
    gates = {"weight": gate.weight.T, "bias": gate.bias}
    reference = twin("fox", stacked(attend), attend.to_out.weight, heads, encoding=gates)
    return XTransformers(attend, lambda n: {}), reference


# Hugging Face.


class HuggingFace(Layer):
    """An attention module of transformers by SDPA, with its DynamicCache; `position` as above."""

    def __init__(
        self, attend: nn.Module, position: Callable[[Tensor, int], dict[str, Any]]
    ) -> None:
        super().__init__()
        self.attend, self.position = attend.eval(), position

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, attention_mask=None, **self.position(x, 0))[0]

    def prefill(self, x: Tensor, max_length: int) -> tuple[Tensor, Any]:
        from transformers import DynamicCache

        cache = DynamicCache()
        position = self.position(x, 0)
        return self.attend(x, attention_mask=None, past_key_values=cache, **position)[0], cache

    def decode(self, token: Tensor, state: Any) -> Tensor:
        held = state.layers[0]
        keys, values = held.keys, held.values
        position = self.position(token, keys.shape[-2])
        y = self.attend(token, attention_mask=None, past_key_values=state, **position)[0]
        held.keys, held.values = keys, values
        return y


def hf_gpt2(embed_dim: int, heads: int, device: torch.device, dtype: torch.dtype) -> Built:
    """GPT-2's attention: with biases, its positions are outside."""
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    config = GPT2Config(n_embd=embed_dim, n_head=heads, attn_implementation="sdpa")
    attend = GPT2Attention(config, layer_idx=0).to(device, dtype)
    inside, outside = attend.c_attn, attend.c_proj  # (in, out)
    weights = (inside.weight.mT, outside.weight.mT)
    return HuggingFace(attend, lambda x, start: {}), twin(
        "nope", *weights, heads, inside.bias, outside.bias
    )


def hf_llama(embed_dim: int, heads: int, device: torch.device, dtype: torch.dtype) -> Built:
    """Llama's attention, its rotary embedding computed once a forward, as its model does."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    sizes = {"hidden_size": embed_dim, "num_attention_heads": heads}
    config = LlamaConfig(**sizes, attn_implementation="sdpa")
    attend = LlamaAttention(config, layer_idx=0).to(device, dtype)
    rotary = LlamaRotaryEmbedding(config).to(device)

    def position(x: Tensor, start: int) -> dict[str, Any]:
        places = torch.arange(start, start + x.shape[1], device=x.device)[None]
        return {"position_embeddings": rotary(x, places)}

    qkv = torch.cat([attend.q_proj.weight, attend.k_proj.weight, attend.v_proj.weight])
    return HuggingFace(attend, position), twin("rope", qkv, attend.o_proj.weight, heads)


def grouped_llama(embed_dim: int, heads: int, kv_heads: int) -> tuple[nn.Module, nn.Module]:
    """Llama's attention with fewer key heads by SDPA, and ours on the same weights."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    sizes = {"hidden_size": embed_dim, "num_attention_heads": heads}
    config = LlamaConfig(**sizes, num_key_value_heads=kv_heads, attn_implementation="sdpa")
    attend, rotary = LlamaAttention(config, layer_idx=0), LlamaRotaryEmbedding(config)

    def position(x: Tensor, start: int) -> dict[str, Any]:
        places = torch.arange(start, start + x.shape[1], device=x.device)[None]
        return {"position_embeddings": rotary(x, places)}

    ours = posenc.attention("rope", embed_dim, heads, num_kv_heads=kv_heads)
    qkv = torch.cat([attend.q_proj.weight, attend.k_proj.weight, attend.v_proj.weight])
    ours.load_state_dict({"c_attn.weight": qkv, "c_proj.weight": attend.o_proj.weight})
    return HuggingFace(attend, position), ours


# flash-linear-attention.


class Fla(nn.Module):
    """An attention layer of flash-linear-attention."""

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)[0]


def fla_rope(embed_dim: int, heads: int, device: torch.device, dtype: torch.dtype) -> Built:
    """Its softmax attention with RoPE, which needs flash-attn."""
    from fla.layers.attn import Attention

    attend = Attention(embed_dim, heads, layer_idx=0).to(device)
    for projection in (attend.q_proj, attend.k_proj, attend.v_proj, attend.o_proj):
        projection.to(dtype)
    qkv = torch.cat([attend.q_proj.weight, attend.k_proj.weight, attend.v_proj.weight])
    return Fla(attend), twin("rope", qkv, attend.o_proj.weight, heads)


#: By the scheme and the implementation that rows name.
PEERS: dict[tuple[str, str], Callable[..., Built]] = {
    ("nope", "nanogpt sdpa"): plain,
    ("rope", "x-transformers"): x_rope,
    ("alibi", "x-transformers"): x_alibi,
    ("fox", "x-transformers"): x_fox,
    ("mha", "transformers gpt2"): hf_gpt2,
    ("rope", "transformers llama"): hf_llama,
}
CUDA_PEERS: dict[tuple[str, str], Callable[..., Built]] = {
    ("rope", "liger"): with_liger,
    ("rope", "flex"): with_flex,
    ("rope", "fla"): fla_rope,
}
