"""Kernels as candidates of `posenc.tune`, and as what auto takes."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from helpers import close
from posenc.backends import choice, fused, reference
from posenc.backends.measured import Way
from posenc.tune.cases import Plan, Sizes, Work, ask
from posenc.tune.measure import measure

pytestmark = pytest.mark.usefixtures("tuned_file")


def prefers_kernels(runs: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """As if kernels were fast, the one-kernel backward the fastest."""
    times = {"fused": 1.0, "fused deterministic=False": 1.0, "fused deterministic=True": 2.0}
    return {name: (0.0, times.get(name, 9.0), 0.0) for name in runs}


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        *(("nope", direction) for direction in ("step", "forward", "train")),
        *(("rope", direction) for direction in ("step", "train")),
        ("carope", "forward"),
        ("cmha", "forward"),
        ("fox", "train"),
        ("rcmha", "forward"),
    ],
)
def test_kernels_pass_the_gate_and_auto_takes_them(
    name: str, direction: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, dtype = Work(name), torch.float32
    plan = Plan((16,), (16,), (dtype,), 16, 19, 1, 0, (work,), (direction,))
    found = [row for row in measure(plan, device, prefers_kernels) if row is not None]
    asked = ask(work, Sizes(1, 13, 16), direction, dtype, device)
    assert asked is not None
    (row,) = found
    assert row["refused"] == {}
    settings = {"deterministic": False} if direction == "train" else {}
    assert choice.chosen(asked.case) == Way("fused", settings)
    taken = []
    original = fused.attend

    def spy(case: Any, **rest: Any) -> Any:
        taken.append((case.rotation is not None, rest))
        return original(case, **rest)

    monkeypatch.setattr(fused, "attend", spy)
    with torch.set_grad_enabled(direction == "train"):
        y = choice.attend(asked.case)
    inside = direction != "step" and name in ("rope", "carope", "cmha")
    assert taken == [(inside, settings)]
    close(y, reference.attend(asked.case.turned()), 1e-5)


def test_what_is_too_large_for_a_kernel_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask(Work("nope"), Sizes(1, 16, 16), "forward", torch.float32, torch.device("cpu"))
    assert asked is not None
    assert choice.can(Way("fused"), asked.case)
    monkeypatch.setattr(fused, "MAX_DIM", 15)
    assert not choice.can(Way("fused"), asked.case)
