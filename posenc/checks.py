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


def check_causal(causal: bool) -> bool:
    """`causal` itself, or ValueError where it is no bool."""
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False; got {causal!r}.")
    return causal


def check_heads(embed_dim: int, num_heads: int, head_dim: int | None = None) -> int:
    """The head dim, embed_dim / num_heads where it is None. Or ValueError."""
    if head_dim is not None:
        check_sizes("attention", embed_dim=embed_dim, num_heads=num_heads, head_dim=head_dim)
        return head_dim
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


def check_kv_heads(num_heads: int, num_kv_heads: int | None) -> int:
    """G, which must divide H; None is H. Or ValueError."""
    if num_kv_heads is None:
        return num_heads
    whole = isinstance(num_kv_heads, int) and not isinstance(num_kv_heads, bool)
    if not whole or num_kv_heads < 1 or num_heads % num_kv_heads:
        divisors = [g for g in range(1, num_heads + 1) if num_heads % g == 0]
        raise ValueError(
            f"num_kv_heads must divide num_heads={num_heads}; got {num_kv_heads}. "
            f"Choose one of {divisors}."
        )
    return num_kv_heads


def check_window(window: int | None) -> int | None:
    """The window itself, None or an integer of at least 1. Or ValueError."""
    whole = isinstance(window, int) and not isinstance(window, bool)
    if window is not None and (not whole or window < 1):
        raise ValueError(
            f"window must be an integer of at least 1, the tokens that a query sees; got "
            f"{window!r}. None is no window."
        )
    return window


def check_sizes(who: str, **sizes: int) -> None:
    """Raise ValueError unless all sizes are integers of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{who} needs {name} of at least 1, an integer; got {size}.")


def check_pair(
    q: Tensor | None, k: Tensor | None, head_dim: int | None, *, apart: bool = False
) -> None:
    """Raise ValueError unless q and k are (B, H, T, head_dim), of the same tokens unless `apart`.

    Either may be None; a head_dim of None is any.
    """
    given = [x for x in (q, k) if x is not None]
    if not given:
        raise ValueError("rotate needs q, k or both; got neither.")
    fits = all(x.ndim >= 3 and x.shape[-1] == (head_dim or x.shape[-1]) for x in given)
    if not fits or (not apart and len({x.shape[-2] for x in given}) > 1):
        shapes = " and ".join(str(tuple(x.shape)) for x in given)
        raise ValueError(
            f"q and k must have shape (B, H, T, {head_dim or 'D'}) with the same T; got {shapes}. "
            "Give key_positions= for keys of their own, or None for one of the two."
        )


def check_positions(
    positions: Tensor | None,
    batch: int,
    length: int,
    device: torch.device,
    *,
    axes: int | None = None,
    continuous: bool = False,
    name: str = "positions",
) -> Tensor:
    """Positions (length,), (1, length) or (batch, length), with axes (.., A), or ValueError.

    Integers, or with `continuous` floating-point numbers too. None is 0 .. length-1, with axes an
    error.
    """
    tail = "" if axes is None else f", {axes}"
    kind = "number" if continuous else "integer"
    wanted = f"({length},{tail.removeprefix(',')}) or ({batch}, {length}{tail})"
    if positions is None:
        if axes is not None:
            raise ValueError(
                f"an encoding of {axes} axes needs positions of shape {wanted}; got None. "
                "Give every token its coordinates."
            )
        return torch.arange(length, device=device)
    if not isinstance(positions, Tensor):
        raise ValueError(
            f"{name} must be an integer tensor of shape {wanted}; got "
            f"{type(positions).__name__}. Pass torch.arange(start, start + {length})."
        )
    real = positions.dtype.is_floating_point
    if positions.dtype.is_complex or positions.dtype == torch.bool or (real and not continuous):
        raise ValueError(
            f"{name} must be {kind}s; got {positions.dtype}. Pass a torch.long tensor."
        )
    inner = () if axes is None else (axes,)
    if positions.shape not in (
        (length, *inner),
        (1, length, *inner),
        (batch, length, *inner),
    ):
        raise ValueError(
            f"{name} must have shape {wanted}; got {tuple(positions.shape)}. "
            "Give one position per token."
        )
    return positions.double() if real else positions.long()


def check_tokens(who: str, x: Tensor | None, length: int, embed_dim: int) -> Tensor:
    """x, or ValueError unless it is (B, length, embed_dim): what goes by the tokens reads it."""
    if x is None or x.ndim != 3 or x.shape[1:] != (length, embed_dim):
        got = None if x is None else tuple(x.shape)
        raise ValueError(
            f"{who} goes by the tokens and needs x of shape (B, {length}, {embed_dim}), of all "
            f"keys; got {got}. Pass the attention's input."
        )
    return x


def check_ascending(positions: Tensor, real: Tensor | None) -> None:
    """Raise ValueError where positions (T,) or (B, T) fall: looked at on CPU alone."""
    if positions.device.type != "cpu" or not concrete(positions):
        return
    counted = positions if real is None else positions.where(real, -1)
    highest = counted.cummax(-1).values
    falls = counted < highest if real is None else (counted < highest) & real
    if falls.any():
        raise ValueError(
            "positions must not fall within a row: got "
            f"{positions[falls][0].item()} after {highest[falls][0].item()}. Documents packed into "
            "a row are kept apart by segments=posenc.segments(lengths), and need no positions."
        )


def check_mask(mask: object, batch: int, length: int) -> None:
    """Raise ValueError unless bool (B, T)."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (batch, length):
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(
            f"mask must be torch.bool of shape ({batch}, {length}), True for real tokens of this "
            f"call; got {got}. An attention_mask of 0 and 1 becomes one by .bool()."
        )


def check_segments(segments: object, batch: int, length: int) -> None:
    """Raise ValueError unless integer (B, T), each document in one piece (looked at on CPU)."""
    if (
        not isinstance(segments, Tensor)
        or segments.dtype.is_floating_point
        or segments.dtype.is_complex
        or segments.dtype == torch.bool
        or segments.shape != (batch, length)
    ):
        got = (
            f"{segments.dtype} {tuple(segments.shape)}"
            if isinstance(segments, Tensor)
            else repr(segments)
        )
        raise ValueError(
            f"segments must be integers of shape ({batch}, {length}), equal within a document; "
            f"got {got}. posenc.segments(lengths) makes a row of them."
        )
    if segments.device.type != "cpu" or not concrete(segments):
        return
    for row in segments:
        order = row.unique_consecutive()
        if len(order) > len(order.unique()):
            raise ValueError(
                f"segments must not come back: got the documents {order.tolist()} in one row. "
                "Number them in their order."
            )


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
