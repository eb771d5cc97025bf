"""GPT-2 with a pluggable attention.

    h = wte[ids] (+ position)                                  (B, T, C)
    h = h + attn(ln_1(h));  h = h + mlp(ln_2(h))               for every block
    logits = ln_f(h) wte^T                                     tied

Weights carry GPT-2's own names, so that a Hugging Face checkpoint loads by transposing four
suffixes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from posenc.attention import Attention
from posenc.cache import Cache, ModelCache, place
from posenc.encodings.base import check_positions
from posenc.encodings.learned import Learned
from posenc.zoo import model_attention


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Args:
        context: the training length, and the rows of a learned table; other encodings can go beyond
            it.
        attention: one of `posenc.names()`. attention_options: for it, see `posenc.attention`.
        dropout: after the embedding, on attention weights and on residual branches.
        bias: of every linear layer and LayerNorm.
        gelu: "none" is the exact GELU, "tanh" GPT-2's approximation.
    """

    vocab_size: int = 50304
    context: int = 1024
    layers: int = 12
    heads: int = 12
    embed_dim: int = 768
    attention: str = "rope"
    attention_options: Mapping[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    bias: bool = True
    gelu: Literal["none", "tanh"] = "none"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {self.dropout}.")


class GPTOutput(NamedTuple):
    """What a forward returns; `loss` is cross entropy alone, the caller adds `aux_loss` to it."""

    logits: Tensor  # (B, T, V)
    loss: Tensor | None  # mean cross entropy in nats, over targets that are not -100
    aux_loss: Tensor  # mean over layers of the routers' balance loss, 0 without routers


class MLP(nn.Module):
    """C -> 4C -> GELU -> C."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.embed_dim, 4 * config.embed_dim, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.embed_dim, config.embed_dim, bias=config.bias)
        self.gelu: Literal["none", "tanh"] = config.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))


class Block(nn.Module):
    """GPT-2's pre-LN block."""

    def __init__(self, config: GPTConfig, attention: Attention) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.embed_dim, bias=config.bias)
        self.attn = attention
        self.ln_2 = nn.LayerNorm(config.embed_dim, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, h: Tensor, positions: Tensor | None, shared: Tensor | None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        y, aux = self.attn(
            self.ln_1(h), positions=positions, cache=cache, return_aux=True, shared=shared
        )
        h = h + self.dropout(y)
        return h + self.dropout(self.mlp(self.ln_2(h))), aux


class GPT(nn.Module):
    """A GPT-2 whose attention is any entry of the zoo.

    Raises:
        ValueError: for a config that cannot be built.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        #: Recompute each block in the backward pass instead of keeping its activations.
        self.checkpoint_activations = False
        # The parts draw numbers of their own while they are built; the weights that all encodings
        # share must not depend on how many, so that two encodings under one seed start from the
        # same ones.
        rng = torch.get_rng_state()
        options = {"bias": config.bias, "dropout": config.dropout, **config.attention_options}
        made = model_attention(
            config.attention, config.embed_dim, config.heads, config.layers, config.context, options
        )
        self.wte = nn.Embedding(config.vocab_size, config.embed_dim)
        self.wpe = made.embedding
        self.shared = made.shared
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, attention) for attention in made.layers)
        self.ln_f = nn.LayerNorm(config.embed_dim, bias=config.bias)
        torch.set_rng_state(rng)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 0.02), residual projections 1/sqrt(2 L) of it; then the parts, by their rules."""
        nn.init.normal_(self.wte.weight, std=0.02)
        residual_std = 0.02 / math.sqrt(2 * self.config.layers)
        for block in self._blocks():
            attn, mlp = block.attn, block.mlp
            for norm in (block.ln_1, block.ln_2):
                norm.reset_parameters()
            for linear in (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj):
                residual = linear is attn.c_proj or linear is mlp.c_proj
                nn.init.normal_(linear.weight, std=residual_std if residual else 0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        self.ln_f.reset_parameters()
        for part in (self.wpe, self.shared):
            if part is not None:
                part.reset_parameters()
        for block in self._blocks():
            block.attn.init_projections()
            block.attn.reset_parts()
            for module in block.attn.encoding.modules():
                # Transformer-XL's W_R is a projection like the others.
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)

    @property
    def max_length(self) -> int | None:
        """The longest text that the encoding can place; None is no limit."""
        return self.wpe.max_length if isinstance(self.wpe, Learned) else None

    def num_parameters(self) -> int:
        """Trainable numbers; the tied output layer counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def make_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelCache:
        """Empty decoding state of all layers for up to `max_length` tokens."""
        device, dtype = device or self.wte.weight.device, dtype or self.wte.weight.dtype
        own = Cache(
            batch_size,
            max_length,
            {} if self.shared is None else self.shared.streams(),
            device=device,
            dtype=dtype,
        )
        layers = [
            block.attn.make_cache(batch_size, max_length, device=device, dtype=dtype)
            for block in self._blocks()
        ]
        return ModelCache(own, layers)

    def _blocks(self) -> list[Block]:
        return [block for block in self.h if isinstance(block, Block)]

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: ModelCache | None = None,
    ) -> GPTOutput:
        """Logits of the next token at every position.

        Args:
            ids: integer (B, T). targets: integer (B, T), -100 where none; the caller shifts them.
            positions: integer (T,) or (B, T); negative entries of (B, T) mark left padding.
            cache: from `make_cache`.

        Raises:
            ValueError: for wrong shapes, a text longer than a learned table, or a full cache.
        """
        if ids.ndim != 2 or ids.dtype.is_floating_point or ids.shape[1] == 0:
            raise ValueError(
                "ids must be integers of shape (B, T), T at least 1; "
                f"got {ids.dtype} {tuple(ids.shape)}."
            )
        if targets is not None and targets.shape != ids.shape:
            raise ValueError(
                f"targets must have ids' shape {tuple(ids.shape)}; got {tuple(targets.shape)}."
            )
        batch, length = ids.shape
        past = 0 if cache is None else cache.length
        if self.max_length is not None and positions is None and past + length > self.max_length:
            raise ValueError(
                f"the learned table has {self.max_length} positions; got {past + length} tokens. "
                "Shorten it, or train with a larger context."
            )
        given = positions is not None
        if positions is not None:
            positions = check_positions(positions, batch, length, ids.device)
        if cache is None:
            where = place(check_positions(positions, batch, length, ids.device), given=given)
        else:
            cache.own.check(batch, length)
            where = cache.own.place(positions, length)
        h = self.wte(ids)  # (B, T, C)
        shared = None
        if self.shared is not None:
            shared = self.shared.phases(h, where.positions, None if cache is None else cache.own)
        if self.wpe is not None:
            table = self.wpe.embed(where.positions)
            assert table is not None
            h = h + table.to(h.dtype)
        h = self.dropout(h)
        aux = []
        for i, block in enumerate(self.h):
            if self.checkpoint_activations and self.training and cache is None:
                h, balance = checkpoint(block, h, positions, shared, use_reentrant=False)
            else:
                h, balance = block(h, positions, shared, None if cache is None else cache.layers[i])
            aux.append(balance)
        if cache is not None:
            cache.own.advance(length)
        logits = F.linear(self.ln_f(h), self.wte.weight)  # (B, T, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return GPTOutput(logits, loss, torch.stack(aux).mean())

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue ids (B, T) by sampling: (B, T + max_new_tokens).

        A model with a learned table starts over from the last half of its context when the table is
        full.

        Args:
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample among the k most likely tokens only.
            generator: the source of randomness, on ids' device.

        Raises:
            ValueError: for a negative temperature or count, or top_k below 1.
        """
        if temperature < 0 or max_new_tokens < 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                "generate needs temperature >= 0, max_new_tokens >= 0 and top_k >= 1; "
                f"got {temperature}, {max_new_tokens}, {top_k}."
            )
        training = self.training
        self.eval()
        limit = self.max_length or ids.shape[1] + max_new_tokens
        cache: ModelCache | None = None
        fresh = ids[:, -limit:]
        for _ in range(max_new_tokens):
            if cache is None or cache.length + fresh.shape[1] > limit:
                fresh = fresh if cache is None else ids[:, -max(limit // 2, 1) :]
                cache = self.make_cache(ids.shape[0], limit)
            logits = self(fresh, cache=cache).logits[:, -1].float()
            fresh = sample(logits, temperature, top_k, generator)
            ids = torch.cat((ids, fresh), dim=1)
        self.train(training)
        return ids

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors into the folder `path`."""
        from posenc.pretrained import save

        save(self, Path(path))

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> "GPT":
        """Load a folder or Hub repository written by `save_pretrained`, or a Hugging Face GPT-2
        (safetensors).

        Raises:
            ValueError: for a missing file, another architecture, or weights that do not fit.
        """
        from posenc.pretrained import load

        return load(path_or_hub_id)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token (B, 1) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept, index = logits.topk(top_k, dim=-1)
        return index.gather(-1, torch.multinomial(kept.softmax(-1), 1, generator=generator))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
