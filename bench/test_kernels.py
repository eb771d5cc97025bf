"""pytest-benchmark: every kernel and its peers at GPT-2's shape, on CUDA. `pytest bench`."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("the kernels are timed on a CUDA device", allow_module_level=True)

from .kernels import PARTS, SHAPES
from .measure import Gate, modes

CASES = {
    case.name: case
    for make in PARTS.values()
    for case in make(SHAPES["S1"], torch.bfloat16, torch.device("cuda"))
}


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize(
    ("case", "provider"), [(name, key) for name, case in CASES.items() for key in case.providers]
)
def test_kernel(benchmark, case, provider, mode):
    found = CASES[case]
    try:
        function = found.providers[provider]()
        Gate(found).check(function)
    except (ImportError, RuntimeError, ValueError) as error:
        pytest.skip(str(error).partition("\n")[0])
    run = modes(function, found.inputs).get(mode)
    if run is None:
        pytest.skip("has no gradient")

    def once():
        run()
        torch.cuda.synchronize()

    benchmark(once)
