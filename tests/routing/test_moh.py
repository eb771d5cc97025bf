"""MoH: gates, balance loss and the parameter-free router."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
import posenc
from helpers import HEADS, WIDTH, close, differs, left_padded, perturb, randn
from posenc import MoH
from posenc.routing.moh import balance_loss, select

B, T, H, D = 2, 9, 7, 4
C = 20
#: Splits of the heads: both groups, one shared head, none shared, none routed.
SPLITS = pytest.mark.parametrize(("shared", "top_k"), [(2, 3), (1, 3), (0, 4), (7, 0), (3, 4)])
SCALINGS = pytest.mark.parametrize("scaling", ["authors", "paper"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def router(shared: int = 2, top_k: int = 3, **options: Any) -> MoH:
    return perturb(MoH(C, H, shared=shared, top_k=top_k, **options)).double()


def run(part: MoH, x: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    x = randn(B, T, C) if x is None else x
    return part(x, randn(B, H, T, D), **options)


@SPLITS
@SCALINGS
@pytest.mark.parametrize("aux_scale", ["paper", "authors"])
def test_gates_and_loss_are_those_of_the_oracle(
    shared: int, top_k: int, scaling: str, aux_scale: str
) -> None:
    part, x = router(shared, top_k, scaling=scaling, aux_scale=aux_scale), randn(B, T, C)
    gates, aux = run(part, x)
    weights = [None if w is None else w.weight for w in (part.W_s, part.W_r, part.W_h)]
    expected = oracles.moh_linear_gates(x, *weights, shared=shared, top_k=top_k, scaling=scaling)
    close(gates, expected.gates)
    close(aux, oracles.moh_aux(expected.probabilities, expected.selected, aux_scale))


@SPLITS
@SCALINGS
def test_exactly_the_active_heads_have_positive_gates(
    shared: int, top_k: int, scaling: str
) -> None:
    gates, _ = run(router(shared, top_k, scaling=scaling))
    assert (gates >= 0).all()
    assert ((gates > 0).sum(1) == shared + top_k).all()
    assert (gates[:, :shared] > 0).all()


def test_sums_of_the_gates() -> None:
    part, x = router(scaling="authors"), randn(B, T, C)
    gates, _ = run(part, x)
    a0, a1 = torch.softmax(x @ part.W_h.weight.T, -1).unbind(-1)
    close(gates[:, :2].sum(1), 2 * a0 * 2)
    close(gates[:, 2:].sum(1), 2 * a1 * 3)
    assert (gates.sum(1) >= 2 * 2 - 1e-9).all()
    assert (gates.sum(1) <= 2 * 3 + 1e-9).all()
    paper = router(scaling="paper")
    assert (run(paper, x)[0].sum(1) <= 1).all()


@pytest.mark.parametrize(
    ("scaling", "shared", "routed"), [("authors", 1.0, 1.0), ("paper", 0.25, 0.1)]
)
def test_zero_routers(scaling: str, shared: float, routed: float) -> None:
    part = router(scaling=scaling)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()
    gates, aux = run(part)
    close(gates[:, :2], torch.full((B, 2, T), shared, dtype=torch.float64))
    active = gates[:, 2:][gates[:, 2:] > 0]
    close(active, torch.full((B * T * 3,), routed, dtype=torch.float64))
    # whoever is chosen, uniform probabilities balance
    assert aux.item() == pytest.approx(3 / 5)


def test_selected_heads_are_the_most_probable() -> None:
    part, x = router(), randn(B, T, C)
    gates, _ = run(part, x)
    order = (x @ part.W_r.weight.T).argsort(-1, descending=True)[..., :3].sort(-1).values
    chosen = (gates[:, 2:] > 0).transpose(1, 2).nonzero()[:, 2].view(B, T, 3)
    assert torch.equal(chosen, order)


def test_ties_select_exactly_k() -> None:
    for scores in (torch.zeros(3, 5), torch.tensor([[1.0, 1, 1, 0, 0]])):
        assert (select(scores, 2).sum(-1) == 2).all()


def test_permuting_routed_heads_with_their_rows_changes_nothing() -> None:
    module = posenc.attention("moh", WIDTH, 6, shared=2, top_k=2).double().eval()
    perturb(module)
    x, order = randn(B, T, WIDTH), torch.tensor([0, 1, 4, 2, 5, 3])
    y, aux = module(x, return_aux=True)
    rows = torch.arange(WIDTH).view(6, 4)[order].flatten()
    with torch.no_grad():
        weight = module.c_attn.weight.view(3, WIDTH, WIDTH)
        weight.copy_(weight[:, rows].clone())
        module.c_proj.weight.copy_(module.c_proj.weight[:, rows].clone())
        module.router.W_r.weight.copy_(module.router.W_r.weight[order[2:] - 2].clone())
    other, other_aux = module(x, return_aux=True)
    close(other, y)
    close(other_aux, aux)


def test_output_block_of_a_dropped_head_gets_no_gradient_from_the_token() -> None:
    module = perturb(posenc.attention("moh", WIDTH, HEADS)).double().eval()
    x = randn(1, 1, WIDTH)
    gates, _ = module.router(x, randn(1, HEADS, 1, WIDTH // HEADS))
    module(x).square().sum().backward()
    blocks = module.c_proj.weight.grad.view(WIDTH, HEADS, -1).abs().amax((0, 2))
    assert torch.equal(blocks > 0, gates[0, :, 0] > 0)
    assert (blocks == 0).sum() == 1


def test_gates_read_the_present_token_alone() -> None:
    part, x = router(), randn(B, T, C)
    changed = x.clone()
    changed[:, 4] = randn(B, C)
    before, after = run(part, x)[0], run(part, changed)[0]
    others = [t for t in range(T) if t != 4]
    assert torch.equal(before[..., others], after[..., others])
    differs(before[..., 4], after[..., 4])


def test_gates_of_low_precision_inputs_are_float32_with_autocast_off() -> None:
    part, x = router().float(), randn(B, T, C, dtype=torch.bfloat16)
    q = randn(B, H, T, D, dtype=torch.bfloat16)
    gates, aux = part(x, q)
    assert gates.dtype == aux.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        under, under_aux = part(x, q)
    assert torch.equal(gates, under)
    assert torch.equal(aux, under_aux)
    close(gates, part.double()(x.double(), q.double())[0], 1e-5)


def test_loss_is_k_over_e_at_balance_and_one_at_collapse() -> None:
    p = torch.full((B, 10, 5), 0.2).double()
    turns = select(torch.stack([torch.arange(5.0).roll(t) for t in range(10)]), 2)
    assert balance_loss(p, turns.double().expand(B, 10, 5)).item() == pytest.approx(2 / 5)
    p = torch.tensor([0.7, 0.3, 0, 0, 0]).double().expand(B, 10, 5)
    assert balance_loss(p, select(p, 2)).item() == pytest.approx(1.0)


def test_authors_scale_multiplies_by_the_routed_heads() -> None:
    x = randn(B, T, C)
    paper, authors = router(), router(aux_scale="authors")
    authors.load_state_dict(paper.state_dict())
    close(run(authors, x)[1], 5 * run(paper, x)[1])


def test_gradient_of_the_loss_reaches_the_routed_rows_alone() -> None:
    part = router()
    _, aux = run(part)
    gradients = torch.autograd.grad(
        aux, [part.W_r.weight, part.W_s.weight, part.W_h.weight], allow_unused=True
    )
    assert gradients[0].abs().max() > 0
    assert gradients[1] is gradients[2] is None


@pytest.mark.parametrize("kind", ["linear", "query_norm"])
def test_padded_tokens_do_not_count(kind: str) -> None:
    module = perturb(posenc.attention("moh", WIDTH, HEADS, router=kind)).double().eval()
    rows = [randn(n, WIDTH) for n in (6, 2)]
    x, positions = left_padded(rows)
    _, aux = module(x, positions=positions, return_aux=True)
    part = module.router
    if kind == "linear":
        tokens = torch.cat(rows)[None]
        weights = [w.weight for w in (part.W_r, part.W_h)]
        found = oracles.moh_linear_gates(tokens, None, *weights, shared=1, top_k=part.top_k)
    else:
        q = torch.cat([module.c_attn(row)[:, :WIDTH] for row in rows])
        q = q.view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
        found = oracles.moh_query_norm_gates(q, shared=1, top_k=part.top_k)
    close(aux, oracles.moh_aux(found.probabilities, found.selected))


@pytest.mark.parametrize(("shared", "top_k"), [(2, 3), (0, 1), (3, 4), (7, 0)])
def test_query_norm_gates_are_those_of_the_oracle(shared: int, top_k: int) -> None:
    part = MoH(C, H, shared=shared, top_k=top_k, router="query_norm")
    assert not list(part.parameters())
    q = randn(B, H, T, D).requires_grad_()
    q_oracle = q.detach().clone().requires_grad_()
    gates, aux = part(randn(B, T, C), q)
    if not top_k:
        assert torch.equal(gates, torch.ones(B, H, T).double())
        return
    expected = oracles.moh_query_norm_gates(q_oracle, shared=shared, top_k=top_k)
    assert torch.equal(gates, expected.gates)
    close(aux, oracles.moh_aux(expected.probabilities, expected.selected))
    probe = randn(B, H, T)
    (ours,) = torch.autograd.grad((gates * probe).sum(), q)
    (theirs,) = torch.autograd.grad((expected.gates * probe).sum(), q_oracle)
    close(ours, theirs)


def test_query_norm_is_hard_forward_and_soft_backward() -> None:
    part = MoH(C, H, shared=2, top_k=3, router="query_norm")
    q = randn(B, H, T, D).requires_grad_()
    gates, _ = part(randn(B, T, C), q)
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    assert (gates.sum(1) == 5).all()
    probe = randn(B, 5, T)
    (hard,) = torch.autograd.grad((gates[:, 2:] * probe).sum(), q)
    norms = q[:, 2:].norm(dim=-1)
    soft = torch.softmax(norms / norms.std(1, keepdim=True), 1)
    (expected,) = torch.autograd.grad((soft * probe).sum(), q)
    close(hard, expected)
    assert not hard[:, :2].any()


def test_query_norm_ignores_scaling() -> None:
    x, q = randn(B, T, C), randn(B, H, T, D)
    first, second = (
        MoH(C, H, shared=2, top_k=3, router="query_norm", scaling=scaling)(x, q)[0]
        for scaling in ("authors", "paper")
    )
    assert torch.equal(first, second)


def test_query_norm_survives_zero_queries() -> None:
    part = MoH(C, H, shared=2, top_k=3, router="query_norm")
    q = torch.zeros(B, H, T, D, requires_grad=True)
    gates, aux = part(torch.zeros(B, T, C), q)
    assert (gates.sum(1) == 5).all()
    (gradient,) = torch.autograd.grad(gates.sum() + aux, q)
    assert gradient.isfinite().all()


def test_query_norm_state_dict_is_that_of_plain_attention() -> None:
    plain = posenc.attention("rope", WIDTH, HEADS)
    routed = posenc.attention("moh", WIDTH, HEADS, router="query_norm")
    assert routed.state_dict().keys() == plain.state_dict().keys()


def test_query_norm_decodes() -> None:
    module = posenc.attention("moh", WIDTH, HEADS, router="query_norm").double().eval()
    x, cache = randn(B, T, WIDTH), module.make_cache(B, T)
    with torch.no_grad():
        steps = torch.cat([module(part, cache=cache) for part in x.split(2, 1)], 1)
    close(steps, module(x))


@pytest.mark.parametrize(
    ("shared", "top_k", "shapes"),
    [
        (2, 3, {"W_s": (2, C), "W_r": (5, C), "W_h": (2, C)}),
        (1, 3, {"W_r": (6, C), "W_h": (2, C)}),
        (0, 3, {"W_r": (7, C)}),
        (7, 0, {"W_s": (7, C)}),
    ],
)
def test_parameters_of_every_split(
    shared: int, top_k: int, shapes: dict[str, tuple[int, int]]
) -> None:
    found = {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in MoH(C, H, shared=shared, top_k=top_k).named_parameters()
    }
    assert found == shapes


def test_start_is_small_and_never_zero() -> None:
    part = MoH(768, 12, shared=4, top_k=5)
    for parameter in part.parameters():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.1)


def test_layers_reset_one_by_one_start_as_the_router_does() -> None:
    router = MoH(96, 12, shared=4, top_k=5)
    for part in router.modules():
        part.reset_parameters()
    for parameter in router.parameters():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.3)


def test_every_argument_changes_the_result() -> None:
    changes = {
        "shared": 3,
        "top_k": 4,
        "scaling": "paper",
        "router": "query_norm",
        "aux_scale": "authors",
    }
    assert set(inspect.signature(MoH).parameters) == changes.keys() | {"embed_dim", "num_heads"}
    x, q = randn(B, T, C), randn(B, H, T, D)
    options = {"shared": 2, "top_k": 3}
    torch.manual_seed(1)
    plain = MoH(C, H, **options).double()
    for name, value in changes.items():
        torch.manual_seed(1)
        part = MoH(C, H, **options | {name: value}).double()
        which = 1 if name == "aux_scale" else 0
        differs(part(x, q)[which], plain(x, q)[which])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": 8, "top_k": 1}, "shared must lie between 0 and num_heads=7; got 8"),
        ({"shared": -1, "top_k": 1}, "shared must lie"),
        ({"shared": 2, "top_k": 6}, "top_k must lie between 1 and the 5 routed heads.*got 6"),
        ({"shared": 2, "top_k": 0}, "top_k=0 needs shared=num_heads"),
        ({"shared": 7, "top_k": 1}, "top_k must lie"),
        ({"shared": 2, "top_k": 1}, "scaling='paper'"),
        ({"shared": 6, "top_k": 1, "router": "query_norm"}, "at least 2 routed heads.*got 1"),
        ({"shared": 2, "top_k": 3, "scaling": "author"}, "Did you mean 'authors'"),
        ({"shared": 2, "top_k": 3, "router": "linaer"}, "Did you mean 'linear'"),
        ({"shared": 2, "top_k": 3, "aux_scale": "papers"}, "Did you mean 'paper'"),
    ],
)
def test_impossible_splits_and_unknown_options_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MoH(C, H, **options)


def test_a_single_routed_head_works_where_its_gate_is_not_renormalised() -> None:
    assert (run(router(2, 1, scaling="paper"))[0] > 0).sum(1).unique().tolist() == [3]
    part = MoH(C, H, shared=2, top_k=1, router="query_norm")
    assert (run(part)[0].sum(1) == 3).all()


def test_fewer_than_four_heads_are_refused_by_the_default_split() -> None:
    for heads in (1, 2, 3):
        with pytest.raises(ValueError, match=f"at least 4 heads.*got {heads}.*shared and top_k"):
            posenc.attention("moh", WIDTH, heads)
    module = posenc.attention("moh", WIDTH, 3, shared=1, top_k=2)
    assert module.router.routed == 2
