"""What `GPT.generate` is made of: prompts of different lengths as one batch, one token drawn."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    *,
    top_p: float | None = None,
) -> Tensor:
    """One token (B, 1) from logits (B, V); arguments as in `GPT.generate`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # Less their largest: a small temperature then overflows to -inf at worst. The largest itself
    # is not divided: by a temperature that rounds to 0 it would become NaN.
    logits = logits - logits.amax(-1, keepdim=True)
    logits = logits.where(logits == 0, logits / temperature)
    size = logits.shape[-1]
    count = size if top_k is None else min(top_k, size)
    top_p = None if top_p == 1 else top_p
    if count == size and top_p is None:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)
    kept, index = logits.topk(count, dim=-1)
    weights = kept.softmax(-1)  # from the most likely down
    if top_p is not None:
        weights = weights * (weights.cumsum(-1) - weights < top_p)
    return index.gather(-1, torch.multinomial(weights, 1, generator=generator))


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, count: int) -> None:
    """Raise ValueError for what nothing can be drawn by."""
    fits = temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
    if not fits or count < 0:
        raise ValueError(
            "generate needs temperature >= 0, max_new_tokens >= 0, top_k >= 1 and 0 < top_p <= 1; "
            f"got {temperature}, {count}, {top_k} and {top_p}."
        )


def stop_ids(stop: int | Sequence[int] | None, pad: int | None, vocab_size: int) -> list[int]:
    """The ids that end a row, or ValueError for others than of the vocabulary, or a lone pad."""
    stops = list(stop) if isinstance(stop, Sequence) else [] if stop is None else [stop]
    given = all(isinstance(i, int) and 0 <= i < vocab_size for i in stops)
    if not given or (stop is not None and not stops):
        raise ValueError(
            f"stop must be one id or several of the vocabulary, integers from 0 to "
            f"{vocab_size - 1}; got {stop!r}. Leave it out to end no row early."
        )
    if pad is not None and not (stops and isinstance(pad, int)):
        raise ValueError(
            f"pad must be an integer, which follows the end of a row; got {pad!r} with "
            f"stop={stop!r}. Say by stop what ends a row."
        )
    return stops


def align_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, list[int]]:
    """Real tokens of ids (B, T) at the right of (B, longest), zeros before them; and their counts.

    Raises:
        ValueError: unless mask is bool (B, T), with one stretch of True in every row.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != ids.shape:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(
            f"mask must be torch.bool of ids' shape {tuple(ids.shape)}, True for real tokens; "
            f"got {got}. An attention_mask of 0 and 1 becomes one by .bool()."
        )
    real = mask.cpu()
    counts, first = real.sum(1), real.int().argmax(1)
    for row, count, start in zip(real, counts.tolist(), first.tolist(), strict=True):
        if not count or not row[start : start + count].all():
            raise ValueError(
                "mask must be True for one stretch of every row, padding on its left or right; got "
                f"{'padding between tokens' if count else 'a row of padding'}. Leave that out."
            )
    longest = max(counts.tolist(), default=0)
    columns = torch.arange(longest) + (first + counts - longest).unsqueeze(1)
    padding = torch.arange(longest) < (longest - counts).unsqueeze(1)
    text = ids.gather(1, columns.clamp(min=0).to(ids.device))
    return text.masked_fill(padding.to(ids.device), 0), counts.tolist()


def left_padded_positions(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """Positions (B, longest) of rows padded on the left, negative there; None without padding."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    padding = longest - torch.tensor(lengths, device=device)
    return torch.arange(longest, device=device) - padding.unsqueeze(1)
