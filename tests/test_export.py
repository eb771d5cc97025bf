"""Export: torch.export and ONNX compute what the model does, at lengths that were not traced."""

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from helpers import HEADS, NAMES, WIDTH, build, close, randn, tiny_gpt
from posenc.rates import log_rates

#: Layers alone that a length known beforehand may take another way: tables, sums and scans over it.
FIXED = ("rope", "carope", "rmha", "moh", "cope", "fox", "path")
#: Models that ONNX's exporter traces itself, as the docs say: path's triangular system is solved
#: another way there. The others' graphs are there already, and take half of the time.
FROM_MODEL = ("rope", "moh", "path")
#: Batch and length of the ids.
DYNAMIC = ({0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=16)},)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(29, (batch, length))


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_computes_and_trains_as_the_model_at_any_length(name: str) -> None:
    model, inputs = tiny_gpt(name, torch.float32, layers=1), [ids(2, 12), ids(3, 5), ids(1, 16)]
    program = export(model, (inputs[0],), dynamic_shapes=DYNAMIC)
    graph = program.module()
    expected = [model(x).logits for x in inputs]
    for x, logits in zip(inputs, expected, strict=True):
        close(graph(x).logits, logits, 1e-5)
    for part in (model, graph):
        part(inputs[-1]).logits.square().sum().backward()
    gradients = dict(graph.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            close(gradients[key].grad, parameter.grad, 1e-5)
    if name == "path" and torch.__version__ < "2.13":
        pytest.skip("torch 2.11 decomposes no scan over a number of tokens that is not known")
    if name in FROM_MODEL:
        same_in_onnxruntime(model, inputs, expected, dynamic_shapes=DYNAMIC)
    else:
        same_in_onnxruntime(program, inputs, expected)


def same_in_onnxruntime(
    model: nn.Module | ExportedProgram,
    inputs: Sequence[Tensor],
    expected: Sequence[Tensor],
    dynamic_shapes: Any = None,
) -> None:
    """onnxruntime gives what is expected of each input."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, and its progress
        program = torch.onnx.export(model, (inputs[0],), dynamo=True, dynamic_shapes=dynamic_shapes)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (entry,) = session.get_inputs()
    for x, y in zip(inputs, expected, strict=True):
        close(torch.from_numpy(session.run(None, {entry.name: x.numpy()})[0]), y, 1e-5)


@pytest.mark.parametrize("name", FIXED)
def test_onnxruntime_gives_a_layer_s_output_at_a_fixed_length(name: str) -> None:
    layer, x = build(name, dtype=torch.float32), randn(2, 12, WIDTH, dtype=torch.float32)
    same_in_onnxruntime(layer, [x], [layer(x)])


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
