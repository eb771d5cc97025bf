"""The Triton kernels as attention's back end, `impl="fused"`: where they run, what they compute.

Only this file and the `.._fused` and `has_kernel` members of encodings and convolution import
`posenc.kernels`, and only when such a path is chosen: posenc itself needs no Triton.
"""

import importlib.util

import torch
from torch import Tensor

from posenc.routing.moh import Gates, weigh
from posenc.scores import Scores, add_per_head

REMEDY = "Use impl='sdpa' (torch's fused attention), 'reference' or 'auto'."


def check_available() -> None:
    """Raise ValueError unless Triton has a CUDA device, or its interpreter is on."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"impl='fused' asks for a Triton kernel; Triton is not installed. {REMEDY}"
        )
    from posenc.kernels.common import INTERPRETED

    if not (INTERPRETED or torch.cuda.is_available()):
        raise ValueError(
            "impl='fused' asks for a Triton kernel, which needs a CUDA device, or for a test "
            f"TRITON_INTERPRET=1 before Python starts. {REMEDY}"
        )


def check_case(real: Tensor | None, dropout_p: float) -> None:
    """Raise ValueError for what no kernel computes yet: padded rows and dropped weights."""
    if real is not None:
        raise ValueError(
            "impl='fused' takes positions of shape (T,) only: (B, T) may hold padding, for which "
            f"the kernels have no mask. {REMEDY}"
        )
    if dropout_p:
        raise ValueError(f"impl='fused' drops no attention weights; got dropout. {REMEDY}")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Scores,
    gates: Gates | None,
    real: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """`core.attend` by the kernels; arguments and errors as there.

    What gates drop is skipped unless there is a relative term.
    """
    from posenc.kernels.relative import relative_attention

    check_case(real, dropout_p)
    term, scale = scores.relative, scores.factor(q.shape[-1])
    if scores.bias is not None or (term is not None and term.distances is not None):
        raise ValueError(
            "impl='fused' has no kernel for a dense bias, nor for a relative term at given "
            f"positions. Leave positions out where they are consecutive. {REMEDY}"
        )
    if term is None:
        query = add_per_head(q, scores.content)
        return attend_plain(query, k, v, gates, scale)
    biases = (term.offset, scores.content, term.query)
    y = relative_attention(q, k, v, term.table, *biases, scale=scale)
    return y if gates is None else weigh(y, gates.values)


def attend_plain(q: Tensor, k: Tensor, v: Tensor, gates: Gates | None, scale: float) -> Tensor:
    """Attention without terms in the logits, dense or of what the gates keep."""
    from posenc.kernels.flash import flash_attention
    from posenc.kernels.routed import routed_attention

    if gates is None or gates.kept == 1:
        y = flash_attention(q, k, v, scale=scale)
        return y if gates is None else weigh(y, gates.values)
    every = gates.need_every_output
    return routed_attention(q, k, v, gates.values, scale=scale, straight_through=every)
