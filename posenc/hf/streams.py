"""What a scheme remembers of past tokens, beside a Hugging Face model's own cache.

Streams as in `posenc.cache`, on the layer of the cache that holds the keys, so that whatever
happens to these happens to them: beam search reorders, assisted decoding crops, a batch is
repeated or thinned out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from posenc.cache import Stream
from posenc.hf.classes import Made


class Streams:
    """Rows (B, *lead, history + S, F) of all tokens, by name; `history` rows of zeros come first.

    Args:
        streams: what to remember, by name.
        batch: B.
        device, dtype: of the streams that name no dtype.
        room: tokens that there is room for, at a fixed shape and address; 0: the last `history`
            rows alone; None grows.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        room: int | None = None,
    ) -> None:
        self.streams, self.room = dict(streams), room
        #: Whether rows of the batch have had positions of their own.
        self.ragged = False
        self.rows = {
            name: torch.zeros(
                (batch, *stream.shape[:-1], stream.history + (room or 0), stream.shape[-1]),
                dtype=stream.dtype or dtype,
                device=device,
            )
            for name, stream in self.streams.items()
        }

    def select(self, index: Tensor) -> None:
        """Go on with these rows of the batch."""
        self.rows = {
            name: rows.index_select(0, index.to(rows.device)) for name, rows in self.rows.items()
        }

    def repeat(self, repeats: int) -> None:
        """Every row of the batch so many times."""
        self.rows = {name: rows.repeat_interleave(repeats, 0) for name, rows in self.rows.items()}

    def crop(self, tokens: int) -> None:
        """Forget the last so many tokens; all, where there are fewer."""
        self.rows = {
            name: rows[..., : max(rows.shape[-2] - tokens, self.streams[name].history), :]
            for name, rows in self.rows.items()
        }

    def clear(self) -> None:
        """Forget all tokens."""
        for name, stream in self.streams.items():
            if self.room is None:
                self.rows[name] = self.rows[name][..., : stream.history, :]
            else:
                self.rows[name].zero_()


class State:
    """The streams as one call sees them: what `posenc.cache.Cache` is to an encoding.

    Args:
        streams: of the layer.
        before: tokens so far, a number or, where shapes are fixed, a tensor.
        visible: keys that the call's queries meet.
    """

    def __init__(self, streams: Streams, before: int | Tensor, visible: int) -> None:
        self._streams, self._before, self._visible = streams, before, visible

    @property
    def ragged(self) -> bool:
        """Whether rows of the batch have had positions of their own."""
        return self._streams.ragged

    @ragged.setter
    def ragged(self, value: bool) -> None:
        self._streams.ragged = value

    def recent(self, name: str) -> Tensor:
        """The last `history` rows (B, *lead, history, F), zeros before the first token."""
        rows, history = self._streams.rows[name], self._streams.streams[name].history
        if self._streams.room is None:
            return rows[..., rows.shape[-2] - history :, :]
        if self._streams.room == 0:
            return rows.clone()
        index = torch.arange(history, device=rows.device) + self._before
        return rows.index_select(-2, index)

    def append(self, name: str, rows: Tensor) -> Tensor:
        """Store the new tokens' rows and return those of the visible keys, in rows' dtype; where
        the last ones alone are kept, the new ones.
        """
        streams, stored = self._streams, self._streams.rows[name]
        new, history = rows.to(stored.dtype), streams.streams[name].history
        if streams.room is None:
            streams.rows[name] = stored = torch.cat((stored, new), dim=-2)
            return stored[..., stored.shape[-2] - self._visible :, :].to(rows.dtype)
        if streams.room == 0:
            last = torch.cat((stored, new.detach()), dim=-2)
            stored.copy_(last[..., last.shape[-2] - history :, :])
            return rows
        index = torch.arange(rows.shape[-2], device=stored.device) + self._before + history
        stored.index_copy_(-2, index, new.detach())
        return stored.narrow(-2, history, streams.room).to(rows.dtype)


def remembering(kind: type) -> type:
    """The class of layers that have streams beside their keys and values."""
    if kind in _CLASSES:
        return _CLASSES[kind]

    class Remembering(kind):
        _layer_type = None  # transformers registers a class that names one
        streams: Streams
        __reduce_ex__ = Made.__reduce_ex__
        made_by, made_of = staticmethod(remembering), kind

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.streams.select(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.streams.select(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self.streams.repeat(repeats)

        def crop(self, tokens_to_remove: int) -> None:
            super().crop(tokens_to_remove)
            self.streams.crop(abs(tokens_to_remove))

        def reset(self) -> None:
            super().reset()
            self.streams.clear()

    _CLASSES[kind] = Remembering
    return Remembering


_CLASSES: dict[type, type] = {}


def layer_of(cache: Cache, index: int) -> Any:
    """The cache's layer, made as its first `update` would make it."""
    make = cache.layer_class_to_replicate
    while make is not None and len(cache.layers) <= index:
        cache.layers.append(make())
    return cache.layers[index]


def streams_of(layer: Any, needed: Mapping[str, Stream], x: Tensor, *, read: bool) -> Streams:
    """The layer's streams; at the first call of x (B, T, C) they are put beside its keys.

    Args:
        read: whether rows of all visible keys are read, not those of the last tokens alone.
    """
    if not hasattr(layer, "streams"):
        _attach(layer, needed, x, read)
    streams: Streams = layer.streams
    return streams


def check_own(layer: Any, stamp: int) -> None:
    """Raise ValueError where the layer holds tokens that another scheme has placed."""
    if getattr(layer, "posenc_stamp", None) == stamp:
        return
    if not torch.compiler.is_compiling() and layer.get_seq_length() > 0:
        raise ValueError(
            "the cache holds tokens that were placed before this scheme was swapped in; got "
            f"{int(layer.get_seq_length())} of them. Start with an empty cache."
        )
    layer.posenc_stamp = stamp


@torch.compiler.disable  # a class is no data of a graph
def _attach(layer: Any, needed: Mapping[str, Stream], x: Tensor, read: bool) -> None:
    kind = type(layer)
    fixed = isinstance(layer, StaticLayer)
    if not fixed and not isinstance(layer, DynamicLayer):
        raise ValueError(
            f"this scheme remembers tokens beside their keys; got a {kind.__name__} in the cache. "
            "Use a DynamicCache or a StaticCache."
        )
    if fixed and read and layer.is_sliding:
        raise ValueError(
            "this scheme reads of every key what it remembers, and a static cache of a sliding "
            "window moves its keys about; got one. Use a DynamicCache."
        )
    room = (layer.max_cache_len if read else 0) if fixed else None
    streams = Streams(needed, x.shape[0], x.device, x.dtype, room)
    layer.__class__, layer.streams = remembering(kind), streams
    if room is not None:
        for rows in streams.rows.values():
            torch._dynamo.mark_static_address(rows)
