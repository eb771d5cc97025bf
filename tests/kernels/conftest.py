"""Where the kernel tests run.

Triton decides when a kernel is decorated whether it is interpreted (CPU) or compiled (CUDA), and
an interpreted kernel cannot be compiled. Hence two kinds of process:

    TRITON_INTERPRET=1    the parity tests on CPU tensors; the offline compilation is left out
    otherwise             offline compilation, the parity tests if there is a CUDA device, and
                          test_interpreter.py, which runs the parity tests in the other kind

So plain `pytest` covers everything, and a single file is debugged with
`TRITON_INTERPRET=1 pytest tests/kernels/test_flash.py`.
"""

import math
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import posenc
from helpers import COMPILED_ONLY

#: Names that impl="fused" refuses.
WITHOUT_KERNEL = frozenset({"cope", "fire", "path"})
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    collect_ignore = COMPILED_ONLY
elif not torch.cuda.is_available():
    files = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    collect_ignore = sorted(files.difference(COMPILED_ONLY))


def _patch_the_language_once():
    """Triton's interpreter exchanges all functions of its language when a kernel starts, and once
    more in every call of a function that a kernel calls: half of the time of these tests.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @cache
    def languages(function):
        """What a function calls them by; those of Triton's library know `core` alone."""
        names = function.__globals__.values()
        return [one for one in (language, language.core) if any(one is name for name in names)]

    def once(function):
        if any(language.core.is_builtin(one.dot) for one in languages(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once


def _look_up_dtypes_once():
    """Triton's interpreter builds a table of dtypes whenever it wants one: a tenth of its time."""
    from triton.runtime import interpreter

    of_scalar = cache(interpreter._get_np_dtype)

    def of(dtype):
        scalar = dtype.scalar
        return np.dtype(np.uint64) if scalar.is_ptr() else of_scalar(scalar)

    interpreter._get_np_dtype = of


def _compute_no_overflow():
    """Triton's interpreter computes for each addition and product of integers whether it overflows,
    a third of the time, and then asserts it in its debug mode alone.
    """
    from triton.runtime.interpreter import interpreter_builder

    options = replace(interpreter_builder.options, sanitize_overflow=False)
    interpreter_builder.options = options


if INTERPRETED:
    _patch_the_language_once()
    _look_up_dtypes_once()
    _compute_no_overflow()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and (INTERPRETED or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _refused(request, device):
    """Names without a kernel say so, and have no further tests here."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    name = params.get("name", params.get("variant"))
    if name in WITHOUT_KERNEL:
        layer = posenc.attention(name, 24, 4, impl="fused").to(device)
        with pytest.raises(ValueError, match=r"has no kernel.*Use impl='sdpa'"):
            layer(torch.zeros(1, 3, 24, device=device))
        pytest.skip("has no kernel")


@pytest.fixture(autouse=True)
def nan_memory(monkeypatch):
    """Uninitialised memory holds NaN, so that an element which no kernel wrote shows."""

    def poisoned(allocate):
        def allocate_nan(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return allocate_nan

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
