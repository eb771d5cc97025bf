"""Claims that need no rows: identities in fp64, and the arithmetic of a paper's own numbers.

Each function takes the published numbers of its claim, by name, and says whether the claim, or the
premise of its not being runnable, holds.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

import posenc
from posenc.rates import log_rates

if TYPE_CHECKING:
    from .reading import Published

CLOSE = 1e-10  # of an identity in fp64


class Found(NamedTuple):
    """Whether it holds, and what was computed."""

    holds: bool
    words: str


Numbers = Mapping[str, "Published"]


def carope_starts_as_rope(published: Numbers) -> Found:
    """With W = 0 and the bias log(expm1(base^(2/D) - 1)), CARoPE's outputs are RoPE's."""
    torch.manual_seed(0)
    ours = posenc.attention("carope", 256, 4).double()
    ours.encoding.reset_parameters()  # the bias in fp64
    rope = posenc.attention("rope", 256, 4).double()
    rope.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(2, 61, 256, dtype=torch.float64)
    with torch.no_grad():
        error = relative(ours(x), rope(x))
    bias = ours.encoding.state_dict()["bias"][0].item()
    return Found(
        error < CLOSE,
        f"with powers from 0, W = 0 and a bias of {bias:.5f} at D = 64, outputs are RoPE's "
        f"{bound(error)}",
    )


def carope_bias_free_is_not_rope(published: Numbers) -> Found:
    """Without a bias, W = 0 gives f = 1/(1 + ln 2), which is RoPE of base f^(-D/2)."""
    rate = log_rates(torch.zeros(1, 1, 1), torch.zeros(1, 1), None).exp().item()
    base = rate ** (-64 / 2)
    return Found(
        not math.isclose(base, 10000, rel_tol=0.01),
        f"without a bias f starts at {rate:.4f}, which at D = 64 is RoPE of base {base:.1e}",
    )


def heads_do_not_divide(published: Numbers) -> Found:
    """The published width is no multiple of the published number of heads."""
    width, heads = published["width"].own, published["heads"].own
    return Found(width % heads != 0, f"{width:g} / {heads:g} = {width / heads:g} features a head")


def cut_in_the_table(published: Numbers) -> Found:
    """The perplexities of the table give the cut that the text claims."""
    shown, holds = [], False
    for name in ("tiny at 1024", "small at 1024"):
        numbers = published[name]
        assert numbers.other is not None
        cut = 1 - numbers.own / numbers.other
        holds = holds or (name.startswith("tiny") and cut > published["claimed cut, tiny"].own)
        shown.append(f"{name}: {cut:.1%}")
    return Found(holds, "; ".join(shown))


def cmha_factorises(published: Numbers) -> Found:
    """The score with the difference of the angles, pair by pair, is a product of turned q and k;
    at delta = 1, b = 0 they are RoPE's.
    """
    torch.manual_seed(0)
    heads, size, length = 3, 16, 23
    polar = posenc.Polar(heads, size).double()
    rope = posenc.RoPE(size).double()
    q, k = torch.randn(2, 1, heads, length, size, dtype=torch.float64)
    positions = torch.arange(length)
    with torch.no_grad():
        plain = relative(turned(polar, q, k, positions), turned(rope, q, k, positions))
        polar.delta.normal_()
        polar.b.normal_()
        turned_q, turned_k = turned(polar, q, k, positions)
        factorised = turned_q @ turned_k.mT
        direct = torch.zeros_like(factorised)
        distance = (positions[:, None] - positions[None]).double()
        for i in range(size // 2):
            (r, p), (s, t) = ((z[..., i], z[..., i + size // 2]) for z in (q, k))
            of_q, of_k = torch.atan2(p, r)[..., None], torch.atan2(t, s)[..., None, :]
            angle = polar.delta[:, i, None, None] * (of_q - of_k)
            angle = angle + polar.b[:, i, None, None] + distance * 10000 ** (-2 * i / size)
            lengths = torch.hypot(r, p)[..., None] * torch.hypot(s, t)[..., None, :]
            direct += lengths * angle.cos()
        error = relative(factorised, direct)
    return Found(
        max(error, plain) < CLOSE,
        f"direct and factorised scores agree {bound(error)}; at delta = 1, b = 0 the turned q and "
        f"k are RoPE's {bound(plain)}",
    )


def rcmha_adds_to_rmha(published: Numbers) -> Found:
    """At equal shapes RCMHA is RMHA and a convolution: it holds more of everything."""
    costs = [
        posenc.attention_cost(posenc.attention(name, 128, 8, **options), batch=1, length=256).total
        for name, options in (("rcmha", {}), ("rmha", {"relative": "learned"}))
    ]
    pairs = [(getattr(costs[0], key), getattr(costs[1], key))
             for key in ("parameters", "saved_bytes", "state_bytes")]  # fmt: skip
    return Found(
        all(own > other for own, other in pairs),
        "by the cost model at equal shapes RCMHA has {:,} parameters against {:,}, keeps {:,} "
        "against {:,} bytes for the backward pass, {:,} against {:,} while decoding".format(
            *(int(value) for pair in pairs for value in pair)
        ),
    )


def gain_over_the_control(published: Numbers) -> Found:
    """Over a control with as much training the gain is at least half of the claimed one."""
    claimed, left = published["14 tasks"].effect, published["over the control"].effect
    return Found(
        left >= claimed / 2,
        f"over the paper's own control, as much training without MoH: {left:+.1f} points of "
        f"{claimed:+.1f}",
    )


def turned(
    encoding: posenc.Encoding, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """q and k (B, H, T, D) after a rotation, as one tensor (2, B, H, T, D)."""
    found = encoding.rotate(q, k, positions)
    return torch.stack([each for each in found if each is not None])


def bound(error: float) -> str:
    """An error in words that are the same on every machine while the identity holds."""
    return f"to {CLOSE:g}" if error < CLOSE else f"to {error:.0e} only"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the root mean square of b."""
    return float((a - b).abs().max() / b.square().mean().sqrt())


EXACT: dict[str, Callable[[Numbers], Found]] = {
    function.__name__: function
    for function in (
        carope_starts_as_rope, carope_bias_free_is_not_rope, heads_do_not_divide, cut_in_the_table,
        cmha_factorises, rcmha_adds_to_rmha, gain_over_the_control,
    )
}  # fmt: skip
