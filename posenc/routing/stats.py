"""Router diagnostics: which heads the MoH routers of a model keep, and how evenly.

    utilisation  u[h] = share of tokens with g[h, t] != 0            (H,)
    gate         mean over tokens of g[h, t]                         (H,)
    load         u[i] / (K/E) of the routed heads: 1 is balance      (E,)
    entropy      mean over tokens of -sum_i p_i log p_i, in nats;  over log E: 1 is uniform
    balance      sum_i P_i f_i over all tokens as if in one batch: K/E where P or f is uniform,
                 1 when K heads take everything

g, p, P, f, K, E and H are those of `posenc.routing.moh`. All are means over the same tokens, made
of sums in fp64, so that the statistics of several calls are those of their concatenation.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posenc.routing.moh import MoH, select
from posenc.wrappers import plain_name


class RoutingSums(NamedTuple):
    """Sums over tokens, in fp64."""

    tokens: Tensor  # (), how many
    kept: Tensor  # (H,), gates that are not 0
    gate: Tensor  # (H,)
    entropy: Tensor  # (), nats
    probability: Tensor  # (E,)
    selected: Tensor  # (E,)


def routing_sums(
    gates: Tensor, p: Tensor, selected: Tensor, real: Tensor | None = None
) -> RoutingSums:
    """What the statistics are made of.

    Args:
        gates: (B, H, T).
        p, selected: (B, T, E), router probabilities and their one-hot selection.
        real: (B, T) bool, the tokens that count; None is all.
    """
    gates = gates.transpose(1, 2)
    counts = gates.new_ones(gates.shape[:2]) if real is None else real
    counts = counts.double().unsqueeze(-1)  # (B, T, 1)

    def total(values: Tensor) -> Tensor:
        return (values.double() * counts).sum((0, 1))

    return RoutingSums(
        tokens=counts.sum(),
        kept=total(gates != 0),
        gate=total(gates),
        entropy=total(torch.special.entr(p.double())).sum(),
        probability=total(p),
        selected=total(selected),
    )


@dataclass(frozen=True, eq=False)
class RoutingStats:
    """What one router did; see the head of this file. Without a token, all is 0.

    Attributes:
        top_k: K.
        sums: over the tokens.
    """

    top_k: int
    sums: RoutingSums

    def __add__(self, other: "RoutingStats") -> "RoutingStats":
        return RoutingStats(self.top_k, RoutingSums(*map(add, self.sums, other.sums)))

    @property
    def tokens(self) -> int:
        """How many were counted."""
        return int(self.sums.tokens)

    @property
    def routed(self) -> int:
        """E."""
        return len(self.sums.probability)

    @property
    def utilisation(self) -> Tensor:
        """(H,), the share of tokens that keep each head."""
        return self._mean(self.sums.kept)

    @property
    def gate(self) -> Tensor:
        """(H,), each head's mean weight; 0 where it is dropped."""
        return self._mean(self.sums.gate)

    @property
    def load(self) -> Tensor:
        """(E,), the utilisation of the routed heads over that at balance, K/E."""
        shared = len(self.sums.kept) - self.routed
        return self.utilisation[shared:] * (self.routed / max(self.top_k, 1))

    @property
    def entropy(self) -> float:
        """Of a token's probabilities, in nats."""
        return self._mean(self.sums.entropy).item()

    @property
    def entropy_fraction(self) -> float:
        """The entropy over that of the uniform router, log E; 1 where there is no choice, E < 2."""
        return self.entropy / math.log(self.routed) if self.routed > 1 else 1.0

    @property
    def balance(self) -> float:
        """The balance loss (option "paper") of all tokens as one batch; 0 without routed heads."""
        return (self._mean(self.sums.probability) * self._mean(self.sums.selected)).sum().item()

    def values(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "tokens": self.tokens,
            "utilisation": self.utilisation.tolist(),
            "gate": self.gate.tolist(),
            "load": self.load.tolist(),
            "entropy": self.entropy,
            "entropy_fraction": self.entropy_fraction,
            "balance": self.balance,
        }

    def __str__(self) -> str:
        kept = " ".join(f"{100 * share:.0f}" for share in self.utilisation.tolist())
        return (
            f"heads kept {kept} %, entropy {self.entropy_fraction:.2f} of uniform, "
            f"balance {self.balance:.2f} (uniform {self.top_k / max(self.routed, 1):.2f})"
        )

    def _mean(self, total: Tensor) -> Tensor:
        return total / self.sums.tokens.clamp(min=1)


def routers(model: nn.Module) -> dict[str, MoH]:
    """The routers of a model by qualified name, e.g. "h.0.attn.router" in GPT."""
    modules = model.named_modules()
    return {plain_name(name): part for name, part in modules if isinstance(part, MoH)}


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, RoutingStats]]:
    """Inside, count what each router does in every call: by qualified name, from its first call on.

    Padded tokens do not count; a call that activation checkpointing repeats counts again. Outputs
    and gradients stay as they are. Compiled code passes new hooks by, so it runs eagerly inside.

    Raises:
        ValueError: for a model without a router.
    """
    parts = routers(model)
    if not parts:
        raise ValueError(
            f"record_routing needs a model with a MoH router; this {type(model).__name__} has "
            'none. posenc.attention("moh", ...) has one.'
        )
    found: dict[str, RoutingStats] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, part in parts.items():
            hook = partial(_record, found, name)
            stack.callback(part.register_forward_hook(hook, with_kwargs=True).remove)
        yield found


@torch.no_grad()
def _record(
    found: dict[str, RoutingStats],
    name: str,
    router: MoH,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: tuple[Tensor, Tensor],
) -> None:
    """A forward hook that adds the call to `found`."""
    stats = _stats(router, output[0], *args, **kwargs)
    found[name] = found[name] + stats if name in found else stats


def _stats(
    router: MoH, gates: Tensor, x: Tensor, q: Tensor | None = None, *, real: Tensor | None = None
) -> RoutingStats:
    """Of one call, with the arguments of `MoH.forward`."""
    p = router.probabilities(x, q)
    return RoutingStats(router.top_k, routing_sums(gates, p, select(p, router.top_k), real))
