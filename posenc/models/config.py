"""The shape of a GPT."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from posenc.checks import check_sizes
from posenc.errors import unknown


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Args:
        context: the training length, and the rows of a learned table; other encodings can go beyond
            it.
        attention: one of `posenc.names()`, or a sequence of them that repeats over the layers, each
            NAME or NAME:KEY=VALUE,..: `("rope:window=128", "rope:window=128", "nope")`.
        attention_options: of every layer, see `posenc.attention`.
        dropout: after the embedding, on attention weights and on residual branches.
        bias: of every linear layer and LayerNorm.
        gelu: "none" is the exact GELU, "tanh" GPT-2's approximation.
        mlp_dim: hidden width of the MLP; None is 4 embed_dim.
    """

    vocab_size: int = 50304
    context: int = 1024
    layers: int = 12
    heads: int = 12
    embed_dim: int = 768
    attention: str | Sequence[str] = "rope"
    attention_options: Mapping[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    bias: bool = True
    gelu: Literal["none", "tanh"] = "none"
    mlp_dim: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "context", "layers", "heads", "embed_dim")
        check_sizes("GPTConfig", **{name: getattr(self, name) for name in sizes})
        check_sizes("GPTConfig", mlp_dim=self.mlp_width)
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {self.dropout}.")
        if self.gelu not in ("none", "tanh"):
            raise ValueError(unknown("gelu", self.gelu, ("none", "tanh")))
        if not isinstance(self.attention_options, Mapping):
            raise ValueError(
                f"attention_options must map names to values; got {self.attention_options!r}."
            )
        object.__setattr__(self, "attention_options", dict(self.attention_options))
        if isinstance(self.attention, Sequence) and not isinstance(self.attention, str):
            object.__setattr__(self, "attention", tuple(self.attention))

    @property
    def mlp_width(self) -> int:
        """M, the hidden width of the MLP."""
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim
