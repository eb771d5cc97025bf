"""Whatever takes a linear layer's place acts: adapters, quantised layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import posenc
from helpers import NAMES, close, differs, perturb

WIDTH, HEADS = 24, 4
LAYERS = [*((name, {}) for name in NAMES), ("rcmha", {"relative": "sinusoidal"}),
          ("moh", {"encoding": "relative"})]  # fmt: skip


class Adapter(nn.Module):
    """base(x) + x A B, as LoRA's layers do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.A = nn.Parameter(0.5 * torch.randn(base.in_features, 2, dtype=base.weight.dtype))
        self.B = nn.Parameter(0.5 * torch.randn(2, base.out_features, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.A @ self.B

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        self.base_layer.weight += (self.A @ self.B).T
        return self.base_layer


def linears(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if type(part) is nn.Linear]


def made(name: str, options: dict[str, Any]) -> posenc.Attention:
    torch.manual_seed(0)
    return perturb(posenc.attention(name, WIDTH, HEADS, **options)).double().eval()


def everyway(module: posenc.Attention, x: Tensor) -> list[Tensor]:
    """Whole, at given positions, and decoding."""
    with torch.no_grad():
        cache = module.make_cache(len(x), x.shape[1])
        steps = [module(part, cache=cache) for part in x.split((4, 1, 2), dim=1)]
    return [module(x), module(x, positions=torch.arange(7) + 3), torch.cat(steps, dim=1)]


@pytest.mark.parametrize(("name", "options"), LAYERS, ids=str)
def test_adapters_of_every_layer_act_learn_and_merge(name: str, options: dict[str, Any]) -> None:
    module = made(name, options)
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    plain = everyway(module, x)
    for path in linears(module):
        *parents, last = path.split(".")
        parent = module.get_submodule(".".join(parents))
        adapter = Adapter(getattr(parent, last))
        setattr(parent, last, adapter)
        adapted = everyway(module, x)
        for before, after in zip(plain, adapted, strict=True):
            differs(after, before)
        close(adapted[2], adapted[0])
        weights = torch.randn_like(adapted[0])
        y, aux = module(x, return_aux=True)
        gradients = torch.autograd.grad((y * weights).sum() + aux, (adapter.A, adapter.B))
        assert all(gradient.abs().max() > 0 for gradient in gradients), path
        setattr(parent, last, adapter.merge())
        for after, merged in zip(adapted, everyway(module, x), strict=True):
            close(merged, after)
        plain = everyway(module, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "options"), LAYERS, ids=str)
def test_layers_quantised_to_int8_come_close(name: str, options: dict[str, Any]) -> None:
    module = made(name, options).float()
    low = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    assert not linears(low)
    x = torch.randn(2, 7, WIDTH)
    with torch.no_grad():
        assert (low(x) - module(x)).abs().mean() < 0.2 * module(x).abs().mean()
        cache = low.make_cache(2, 7)
        assert low(x[:, :5], cache=cache).isfinite().all()
        assert low(x[:, 5:], cache=cache).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_an_adapter_that_adds_nothing_leaves_every_gate(dtype: torch.dtype, autocast: bool) -> None:
    router = made("moh", {}).router.to(dtype)
    x = torch.randn(4, 200, WIDTH, dtype=torch.bfloat16).to(torch.bfloat16 if autocast else dtype)
    before, _ = router(x)
    for name in ("W_r", "W_h"):
        adapter = Adapter(getattr(router, name))
        nn.init.zeros_(adapter.B)
        setattr(router, name, adapter)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        after, _ = router(x)
    assert torch.equal(after, before)


# W_R's input is a sinusoid, without a gradient: torch says that the hook sees the output's alone.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize(("name", "options"), LAYERS, ids=str)
def test_backward_hooks_of_every_layer_are_called(
    name: str, options: dict[str, Any], kind: str
) -> None:
    module, called = made(name, options), []
    for path in linears(module):
        getattr(module.get_submodule(path), kind)(lambda *_, path=path: called.append(path))
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    y, aux = module(x, return_aux=True)
    (y.square().sum() + aux).backward()
    assert sorted(called) == sorted(linears(module))
