"""Router diagnostics: every statistic from its definition, one token after another."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracles
import posenc
from helpers import HEADS, WIDTH, build, left_padded, perturb, randn, tiny_gpt
from posenc import MoH, record_routing
from posenc.routing.stats import RoutingStats

B, T, H, D, C = 3, 7, 7, 4, 20
#: Splits of the heads: both groups, one shared head, none shared, none routed, all selected.
SPLITS = pytest.mark.parametrize(("shared", "top_k"), [(2, 3), (1, 2), (0, 4), (7, 0), (3, 4)])
OPTIONS = pytest.mark.parametrize(
    "options", [{"scaling": "authors"}, {"scaling": "paper"}, {"router": "query_norm"}]
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(shared: int = 2, top_k: int = 3, **options: Any) -> MoH:
    return perturb(MoH(C, H, shared=shared, top_k=top_k, **options)).double()


def recorded(part: MoH, *calls: tuple[Tensor, Tensor, Tensor | None]) -> RoutingStats:
    """Of calls with x, q and real."""
    with record_routing(part) as stats:
        for x, q, real in calls:
            part(x, q, real=real)
    (found,) = stats.values()
    return found


def call(batch: int = B, length: int = T) -> tuple[Tensor, Tensor, Tensor]:
    return randn(batch, length, C), randn(batch, H, length, D), torch.rand(batch, length) < 0.7


def oracle(part: MoH, x: Tensor, q: Tensor) -> oracles.Gates:
    if part.router == "query_norm":
        if part.routed:
            return oracles.moh_query_norm_gates(q, shared=part.shared, top_k=part.top_k)
        none = x[..., :0]
        return oracles.Gates(torch.ones(q.shape[:3]).double(), none, none)
    weights = [None if w is None else w.weight for w in (part.W_s, part.W_r, part.W_h)]
    split = {"shared": part.shared, "top_k": part.top_k, "scaling": part.scaling}
    return oracles.moh_linear_gates(x, *weights, **split)


def expected(part: MoH, *calls: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """`values()` from the definitions."""
    tokens = []  # gates (H,), p (E,), selected (E,) of every real token
    for x, q, real in calls:
        gates, p, selected = oracle(part, x, q)
        tokens += [
            (gates[b, :, t].tolist(), p[b, t].tolist(), selected[b, t].tolist())
            for b in range(len(x))
            for t in range(x.shape[1])
            if real[b, t]
        ]
    n, routed, K = len(tokens), range(part.routed), part.top_k
    kept = [sum(g[h] != 0 for g, _, _ in tokens) / n for h in range(H)]
    entropy = -sum(p[i] * math.log(p[i]) for _, p, _ in tokens for i in routed) / n
    P = [sum(p[i] for _, p, _ in tokens) / n for i in routed]
    f = [sum(selected[i] for _, _, selected in tokens) / n for i in routed]
    return {
        "tokens": n,
        "utilisation": kept,
        "gate": [sum(g[h] for g, _, _ in tokens) / n for h in range(H)],
        "load": [share * part.routed / K for share in kept[part.shared :]],
        "entropy": entropy,
        "entropy_fraction": entropy / math.log(part.routed) if part.routed else 1.0,
        "balance": sum(P[i] * f[i] for i in routed),
    }


def check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-12, abs=1e-12), key


@SPLITS
@OPTIONS
def test_statistics_are_their_definitions(shared: int, top_k: int, options: dict[str, Any]) -> None:
    """Of three calls of other shapes, with padding: those of all their tokens."""
    part, calls = make(shared, top_k, **options), [call(), call(1, 4), call(2, 1)]
    check(recorded(part, *calls).values(), expected(part, *calls))


@OPTIONS
def test_without_padding_the_balance_is_the_loss(options: dict[str, Any]) -> None:
    part, (x, q, _) = make(**options), call()
    stats = recorded(part, (x, q, None))
    assert stats.tokens == B * T
    assert stats.balance == pytest.approx(part(x, q)[1].item())
    halves = [(x[:, cut], q[:, :, cut], None) for cut in (slice(3), slice(3, None))]
    check(recorded(part, *halves).values(), stats.values())


@pytest.mark.parametrize("kind", ["linear", "query_norm"])
def test_a_router_of_zeros_is_uniform(kind: str) -> None:
    part, (x, _, real) = make(router=kind), call()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()
    stats = recorded(part, (x, torch.zeros(B, H, T, D).double(), real))
    assert stats.entropy == pytest.approx(math.log(5))
    assert stats.entropy_fraction == pytest.approx(1)
    assert stats.balance == pytest.approx(3 / 5)  # whichever heads a tie selects
    assert stats.load.sum() == pytest.approx(5)


def test_a_router_that_knows_three_heads_has_collapsed() -> None:
    part, (x, q, real) = make(), call()
    x[..., 0] = 1
    with torch.no_grad():
        part.W_r.weight.zero_()
        part.W_r.weight[[0, 2, 3], 0] = 1e4
    stats = recorded(part, (x, q, real))
    assert stats.balance == pytest.approx(1)
    assert stats.load.tolist() == pytest.approx([5 / 3, 0, 5 / 3, 5 / 3, 0])
    assert stats.utilisation.tolist() == [1, 1, 1, 0, 1, 1, 0]
    assert stats.entropy_fraction == pytest.approx(math.log(3) / math.log(5))
    assert str(stats) == (
        "heads kept 100 100 100 0 100 100 0 %, entropy 0.68 of uniform, balance 1.00 (uniform 0.60)"
    )


def test_one_routed_head_leaves_no_choice() -> None:
    stats = recorded(make(6, 1, scaling="paper"), call())
    assert stats.values()["entropy"] == 0
    assert stats.entropy_fraction == stats.balance == stats.load.item() == 1


def test_without_a_token_all_is_zero() -> None:
    x, q, real = call()
    values = recorded(make(), (x, q, torch.zeros_like(real))).values()
    assert not any(values.pop("utilisation") + values.pop("gate") + values.pop("load"))
    assert set(values.values()) == {0}


@pytest.mark.parametrize("kind", ["linear", "query_norm"])
def test_padding_of_a_layer_does_not_count(kind: str) -> None:
    module = build("moh", router=kind)
    rows = [randn(n, WIDTH) for n in (6, 2)]
    x, positions = left_padded(rows)
    with record_routing(module) as padded:
        module(x, positions=positions)
    with record_routing(module) as alone:
        for row in rows:
            module(row[None])
    assert padded["router"].tokens == 8
    check(padded["router"].values(), alone["router"].values())


def test_a_model_has_a_router_in_each_layer_and_decodes_as_it_reads() -> None:
    model, ids = tiny_gpt("moh"), torch.randint(29, (B, 9))
    with torch.no_grad(), record_routing(model) as whole:
        model(ids)
    cache = model.make_cache(B, 9)
    with torch.inference_mode(), record_routing(model) as parts:
        for chunk in ids.split((5, 1, 3), 1):
            model(chunk, cache=cache)
    assert list(whole) == list(parts) == ["h.0.attn.router", "h.1.attn.router"]
    for name, stats in whole.items():
        assert stats.tokens == B * 9
        check(parts[name].values(), stats.values())
        assert json.loads(json.dumps(stats.values())) == stats.values()


@OPTIONS
def test_recording_changes_nothing_and_keeps_no_gradient(options: dict[str, Any]) -> None:
    module, x = build("moh", **options), randn(B, T, WIDTH)
    state = {name: set(vars(part)) for name, part in module.named_modules()}

    def step() -> list[Tensor]:
        y, aux = module(x, return_aux=True)
        return [y, *torch.autograd.grad(y.square().sum() + aux, list(module.parameters()))]

    plain = step()
    with record_routing(module) as stats:
        seen = step()
        seen = step()
    assert all(map(torch.equal, seen, plain))
    assert stats["router"].tokens == 2 * B * T
    assert not any(total.requires_grad for total in stats["router"].sums)
    assert {name: set(vars(part)) for name, part in module.named_modules()} == state


def test_low_precision_and_autocast_record_what_was_routed() -> None:
    module, x = build("moh", dtype=torch.float32), randn(B, T, WIDTH, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), record_routing(module) as under:
        module(x)
    with record_routing(module) as plain:
        module(x)
    check(under["router"].values(), plain["router"].values())


@pytest.mark.parametrize("shape", [(B, T), (B, T, WIDTH)])
def test_hooks_go_when_a_call_or_the_caller_fails(shape: tuple[int, ...]) -> None:
    module, found = build("moh"), {}

    def fail() -> None:
        with record_routing(module) as stats:
            module(randn(B, T, WIDTH))
            found.update(stats)
            module(randn(*shape))
            raise ValueError("x must have shape: no, but the caller failed")

    with pytest.raises(ValueError, match="x must have shape"):
        fail()
    module(randn(B, T, WIDTH))
    assert found["router"].tokens == B * T
    assert not module.router._forward_hooks
    assert not module.router._forward_hooks_with_kwargs


def test_recordings_nest() -> None:
    module = build("moh")
    with record_routing(module) as outer:
        module(randn(1, 2, WIDTH))
        with record_routing(nn.ModuleList([module])) as inner:
            module(randn(1, 3, WIDTH))
        module(randn(1, 4, WIDTH))
    assert (outer["router"].tokens, inner["0.router"].tokens) == (9, 3)


def test_a_compiled_module_is_seen() -> None:
    """Hooks that come after compilation are no part of the compiled code."""
    module, x = build("moh"), randn(B, T, WIDTH)
    with record_routing(module) as plain:
        module(x)
    torch._dynamo.reset()
    nn.Module.compile(module, backend="eager")
    module(x)
    with record_routing(module) as compiled:
        module(x)
    torch._dynamo.reset()
    check(compiled["router"].values(), plain["router"].values())


def test_a_model_without_router_is_refused() -> None:
    with (
        pytest.raises(
            ValueError, match=r"a MoH router; this Attention has none\. posenc.attention"
        ),
        record_routing(posenc.attention("rope", WIDTH, HEADS)),
    ):
        raise AssertionError("entered")
