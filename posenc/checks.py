"""What the user gave, checked: expected, got, remedy, in one line."""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def check_even(dim: int, who: str, remedy: str) -> None:
    """Raise ValueError unless `dim` features can be split into pairs."""
    if dim < 2 or dim % 2:
        raise ValueError(f"{who} of at least 2; got {dim}. {remedy}")


def check_head_dim(head_dim: int, who: str) -> None:
    """Raise ValueError unless a head's features can be split into pairs."""
    remedy = "Choose embed_dim divisible by 2 * num_heads."
    check_even(head_dim, f"{who} needs an even head dim", remedy)


def check_heads(embed_dim: int, num_heads: int) -> int:
    """The head dim embed_dim / num_heads, or ValueError."""
    whole = isinstance(embed_dim, int) and isinstance(num_heads, int)
    if not whole or num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        near = ""
        if whole and num_heads > 0:
            lower = embed_dim - embed_dim % num_heads
            near = f" Choose for example embed_dim={max(lower, num_heads)}."
        raise ValueError(
            f"embed_dim must be a positive multiple of num_heads; got embed_dim={embed_dim}, "
            f"num_heads={num_heads}.{near}"
        )
    return embed_dim // num_heads


def check_sizes(who: str, **sizes: int) -> None:
    """Raise ValueError unless all sizes are integers of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{who} needs {name} of at least 1, an integer; got {size}.")


def check_pair(q: Tensor, k: Tensor, head_dim: int) -> None:
    """Raise ValueError unless q and k are (.., T, head_dim) of the same tokens."""
    if q.shape[-1] != head_dim or k.shape[-1] != head_dim or q.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"q and k must have shape (B, H, T, {head_dim}) with the same T; got {tuple(q.shape)} "
            f"and {tuple(k.shape)}. Rotate the keys of new tokens only, and cache them rotated."
        )


def check_positions(
    positions: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor:
    """Integer positions (length,) or (batch, length); None is 0 .. length-1. Or ValueError."""
    if positions is None:
        return torch.arange(length, device=device)
    if not isinstance(positions, Tensor):
        raise ValueError(
            f"positions must be an integer tensor of shape ({length},) or ({batch}, {length}); got "
            f"{type(positions).__name__}. Pass torch.arange(start, start + {length})."
        )
    if (
        positions.dtype.is_floating_point
        or positions.dtype.is_complex
        or positions.dtype == torch.bool
    ):
        raise ValueError(
            f"positions must be integers; got {positions.dtype}. Pass a torch.long tensor."
        )
    if positions.shape not in ((length,), (batch, length)):
        raise ValueError(
            f"positions must have shape ({length},) or ({batch}, {length}); "
            f"got {tuple(positions.shape)}. "
            "Give one position per token."
        )
    return positions.long()


def concrete(x: Tensor) -> bool:
    """Whether the numbers of x can be looked at: not while traced, mapped or fake."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
        or _get_current_dispatch_mode() is not None
        or x.is_meta
    )


def check_base(base: float) -> None:
    """Raise ValueError unless the frequencies base^(-2i/D) fall."""
    if not isinstance(base, int | float) or not 1 < base < math.inf:
        raise ValueError(f"base must be a finite number above 1; got {base}.")


def check_ids(ids: Tensor) -> None:
    """Raise ValueError unless ids are integers (B, T) that an embedding can look up."""
    tensor = isinstance(ids, Tensor)
    integers = tensor and ids.dtype in (torch.int64, torch.int32)
    if not integers or ids.ndim != 2 or ids.shape[1] == 0:
        got = f"{ids.dtype} {tuple(ids.shape)}" if tensor else type(ids).__name__
        raise ValueError(
            "ids must be integers of shape (B, T), T at least 1, of torch.int64 or int32; "
            f"got {got}. Cast others by ids.long(); a single text is ids[None]."
        )


def check_vocabulary(ids: Tensor, size: int) -> None:
    """Raise ValueError for an id beyond 0 .. size-1; on CPU alone, as looking elsewhere syncs."""
    if ids.device.type != "cpu" or type(ids) is not Tensor or not concrete(ids) or not ids.numel():
        return
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= size:
        raise ValueError(
            f"ids must lie in the vocabulary, 0 to {size - 1}; got {low if low < 0 else high}. "
            "Use the tokenizer that the model was trained with."
        )
