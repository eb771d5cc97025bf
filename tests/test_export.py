"""Export: torch.export and ONNX compute what the model does, at lengths that were not traced."""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import posenc
from helpers import HEADS, NAMES, WIDTH, build, close, randn, tiny_gpt
from posenc.rates import log_rates

#: Alone, entries that differ in the model's input only are the same module.
MODULES = {repr(posenc.attention(name, WIDTH, HEADS)): name for name in reversed(NAMES)}
#: Batch and length of the ids.
DYNAMIC = ({0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=16)},)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(29, (batch, length))


@pytest.mark.parametrize("name", NAMES)
def test_exports_and_the_graph_can_be_trained(name: str) -> None:
    model = tiny_gpt(name, layers=1)
    graph = export(model, (ids(2, 12),), dynamic_shapes=DYNAMIC).module()
    for shape in ((2, 12), (3, 5), (1, 16)):
        x = ids(*shape)
        close(graph(x).logits, model(x).logits)
    for part in (model, graph):
        part(x).logits.square().sum().backward()
    gradients = dict(graph.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            close(gradients[key].grad, parameter.grad)


def same_in_onnxruntime(
    model: nn.Module, inputs: Sequence[Tensor], dynamic: Any, expected: Callable[[Tensor], Tensor]
) -> None:
    """Export at the first input; onnxruntime gives what is expected of all of them."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with contextlib.redirect_stdout(io.StringIO()):  # its progress
        program = torch.onnx.export(model, (inputs[0],), dynamo=True, dynamic_shapes=dynamic)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (entry,) = session.get_inputs()
    for x in inputs:
        y = session.run(None, {entry.name: x.numpy()})[0]
        close(torch.from_numpy(y), expected(x), 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnxruntime_gives_a_model_s_logits_at_any_length(name: str) -> None:
    if name == "path" and torch.__version__ < "2.13":
        pytest.skip("torch 2.11 decomposes no scan over a number of tokens that is not known")
    model = tiny_gpt(name, torch.float32, layers=1)
    inputs = [ids(2, 12), ids(3, 5), ids(1, 16)]
    same_in_onnxruntime(model, inputs, DYNAMIC, lambda x: model(x).logits)


@pytest.mark.parametrize("name", MODULES.values())
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnxruntime_gives_a_layer_s_output_at_a_fixed_length(name: str) -> None:
    layer = build(name, dtype=torch.float32)
    same_in_onnxruntime(layer, [randn(2, 12, WIDTH, dtype=torch.float32)], None, layer)


class LogRates(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return log_rates(z, torch.eye(HEADS).double(), None)


def test_exported_rates_of_carope_are_exact_to_their_gradient() -> None:
    module, z = LogRates(), 20 * randn(1, 200, HEADS)
    z[0, :7, 0] = torch.tensor([0.0, -0.0, 1e-300, -1e4, 1e4, -800.0, 45.0]).double()
    graph = export(module, (z,)).module()
    operators = {str(node.target) for node in graph.graph.nodes}
    assert not any("softplus" in name for name in operators)
    ours, theirs = (z.clone().requires_grad_() for _ in range(2))
    y, expected = graph(ours), module(theirs)
    torch.testing.assert_close(y, expected, rtol=1e-15, atol=1e-300)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), ours)[0],
        torch.autograd.grad(expected.sum(), theirs)[0],
        rtol=1e-14,
        atol=1e-300,
    )
