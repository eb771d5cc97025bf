"""Our GPT among the models of transformers: `PosencConfig`, `PosencForCausalLM`.

    AutoModelForCausalLM.from_pretrained("runs/NAME/model")

loads what train.py and `GPT.save_pretrained` write; what its `save_pretrained` writes,
`GPT.from_pretrained` loads.
"""

from dataclasses import field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from posenc.cache import ModelCache
from posenc.hf.saved import keep_precise
from posenc.hf.sites import documents
from posenc.models.config import GPTConfig
from posenc.models.gpt import GPT, NO_TARGET
from posenc.routing.moh import AUX_WEIGHT

#: A cache makes room for as many tokens again, and at least so many.
ROOM = 64


class PosencConfig(PreTrainedConfig):
    """The shape of a GPT of ours, see `posenc.GPTConfig` for its fields.

    Args:
        aux_weight: of the routers' balance loss, which is added to the loss in training.
    """

    model_type = "posenc"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "embed_dim",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "context",
        "intermediate_size": "mlp_width",
    }
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 50304
    context: int = 1024
    layers: int = 12
    heads: int = 12
    embed_dim: int = 768
    attention: Any = "rope"
    attention_options: Any = field(default_factory=dict)
    dropout: float = 0.0
    bias: bool = True
    gelu: str = "none"
    mlp_dim: int | None = None
    aux_weight: float = AUX_WEIGHT
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def gpt(self) -> GPTConfig:
        """The same as ours; ValueError for what cannot be built."""
        return GPTConfig(**{one.name: getattr(self, one.name) for one in fields(GPTConfig)})

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP."""
        return self.gpt.mlp_width


class PosencCache(Cache):
    """A `posenc.cache.ModelCache` that grows, with the methods that `generate` calls."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.of_model: ModelCache | None = None

    def room(self, model: GPT, batch: int, tokens: int) -> ModelCache:
        """The model's cache, with room for so many tokens more."""
        needed = tokens if self.of_model is None else self.of_model.length + tokens
        grown = needed + max(needed, ROOM)
        if self.of_model is None:
            self.of_model = model.make_cache(batch, grown)
        elif needed > self.of_model.max_length:
            self.of_model.extend(grown)
        return self.of_model

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.of_model is None else self.of_model.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a number of tokens to remove, negative; got {tokens_to_remove}."
            )
        if self.of_model is not None:
            self.of_model.truncate(max(self.of_model.length + tokens_to_remove, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.of_model is not None:
            self.of_model.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.of_model is not None:
            self.of_model.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.of_model is not None:
            index = torch.arange(self.of_model.own.batch_size)
            self.of_model.select(index.repeat_interleave(repeats))

    def reset(self) -> None:
        self.of_model = None

    def __len__(self) -> int:
        return 0 if self.of_model is None else len(self.of_model.layers)


class PosencForCausalLM(PreTrainedModel, GenerationMixin):
    """A GPT of ours with the interface of transformers."""

    config_class = PosencConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "model.wte.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: PosencConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.model = GPT(config.gpt)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        if not self.model.wte.weight.is_meta:
            for module in self.model.modules():
                vars(module)["_is_hf_initialized"] = True  # no second draw
        self.post_init()
        keep_precise(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As of transformers; a run folder of train.py is taken for the model in it."""
        given = pretrained_model_name_or_path
        inner = Path(str(given)) / "model"
        return super().from_pretrained(inner if inner.is_dir() else given, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """What a checkpoint leaves out starts as in a new GPT."""
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.model.wte = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, loss and cache, as models of transformers give them.

        Args:
            input_ids: (B, T). labels: (B, T), shifted here; -100 where none.
            attention_mask: (B, S), 0 for padding, of the tokens before too.
            position_ids: (B, T) or (1, T); where they do not count on, without a mask and a cache,
                a document ends.
            num_items_in_batch: targets of all micro-batches of a step, which the loss is over.
            logits_to_keep: of so many last tokens, 0 of all; or their indices.

        Raises:
            ValueError: for inputs_embeds, a mask or positions of another shape, a static cache,
                and arguments that our model has no answer to.
        """
        if asked := sorted(key for key, value in kwargs.items() if value not in (None, False)):
            raise ValueError(
                f"PosencForCausalLM has no {', '.join(asked)}; got one. It takes input_ids, "
                "attention_mask, position_ids, past_key_values, labels, use_cache and "
                "logits_to_keep."
            )
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("PosencForCausalLM takes input_ids (B, T); got inputs_embeds or none.")
        batch, length = input_ids.shape
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        self.model.checkpoint_activations = self.gradient_checkpointing
        past = self._past(past_key_values, bool(use_cache))
        mask = self._mask(attention_mask, length, 0 if past is None else past.get_seq_length())
        positions, segments = self._positions(position_ids, mask, past, batch, length)
        if segments is not None:
            past = None  # nothing goes on after a row of documents
        cache = None if past is None else past.room(self.model, batch, length)
        if positions is not None and mask is not None:
            positions = positions.expand(batch, length).masked_fill(~mask, -1)
            mask = None
        h, aux = self.model.hidden(
            input_ids, positions=positions, mask=mask, segments=segments, cache=cache
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.model.ln_f(h[:, kept]))
        loss, routed = None, any(block.attn.router is not None for block in self.model.blocks)
        if labels is not None:
            share: Any = 1  # of the step, which several micro-batches make up
            if num_items_in_batch is not None:
                share = (labels[:, 1:] != NO_TARGET).sum() / num_items_in_batch
            sizes = {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits, labels, **sizes)
            if routed and self.training:
                loss = loss + self.config.aux_weight * share * aux
        output = MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=aux if routed else None, logits=logits, past_key_values=past
        )
        named = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if named else output.to_tuple()

    def _past(self, given: Any, use_cache: bool) -> PosencCache | None:
        """The cache to go on with, or a new one; an empty one of another kind is put aside."""
        if isinstance(given, PosencCache):
            return given
        if given is not None and (given.is_compileable or given.get_seq_length() > 0):
            raise ValueError(
                f"a {type(given).__name__} has no room for what attention of posenc remembers; "
                "leave past_key_values and cache_implementation out."
            )
        return PosencCache() if use_cache else None

    def _mask(self, given: Tensor | None, length: int, before: int) -> Tensor | None:
        """Of the tokens of this call, or None where all are real."""
        if given is None:
            return None
        if given.ndim != 2 or given.shape[1] not in (length, before + length):
            raise ValueError(
                f"attention_mask must have shape (B, {before + length}), of all tokens so far; got "
                f"{tuple(given.shape)}."
            )
        mask = given[:, -length:].bool()
        looked_at = not torch.compiler.is_compiling() and given.device.type == "cpu"
        return None if looked_at and bool(mask.all()) else mask

    def _positions(
        self,
        given: Tensor | None,
        mask: Tensor | None,
        past: PosencCache | None,
        batch: int,
        length: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those given, or None where they count real tokens, as our model does by itself; and which
        document a token belongs to.
        """
        if given is None:
            return None, None
        if given.ndim != 2 or given.shape[0] not in (1, batch) or given.shape[1] != length:
            raise ValueError(
                f"position_ids must have shape ({batch}, {length}) or (1, {length}); got "
                f"{tuple(given.shape)}."
            )
        if torch.compiler.is_compiling():
            return given, None
        before = 0 if past is None else past.get_seq_length()
        if mask is not None:
            same = (given == mask.long().cumsum(1) - 1) | ~mask
            return (None if before == 0 and bool(same.all()) else given), None
        counted = torch.arange(before, before + length, device=given.device)
        if bool((given == counted).all()):
            return None, None
        segments = None if before else documents(given)
        return given, None if segments is None else segments.expand(batch, length)


AutoConfig.register(PosencConfig.model_type, PosencConfig)
AutoModelForCausalLM.register(PosencConfig, PosencForCausalLM)
# Trainer shifts the labels of a smoothed loss for the names of this table alone.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[PosencConfig.model_type] = PosencForCausalLM.__name__
