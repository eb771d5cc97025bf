"""The compile-time check of tiles, for an H100 without one: nothing is launched."""

import re
from typing import Any

import pytest
import torch

from posenc.kernels import flash, inspect_sm90, tiles
from posenc.kernels.tiles import Kernel
from posenc.tune import tiles as tuning
from posenc.tune.cases import Plan, Work
from posenc.tune.compiled import H100, Change, examples, in_examples, refusal, refusals
from posenc.tune.tiles import Sweep, name_of

FORWARD = Kernel("flash", ("forward", 2, 64))
#: Twice the rows a warp, in registers that hold one.
SPILLS = flash.Config(128, 64, 4, 3, 128)
GOOD = flash.Config(128, 64, 8, 2, 128)


pytestmark = pytest.mark.usefixtures("tuned_file")


def launch(family: str, example: str, kernel: str) -> inspect_sm90.Launch:
    return next(
        found
        for name, found in inspect_sm90.launches(family)
        if name == example and found.kernel.__name__ == kernel
    )


def test_what_spills_is_refused_and_what_fits_passes() -> None:
    found = {name_of(x): in_examples(FORWARD, x)[:1] for x in (SPILLS, GOOD)}
    assert all(len(changes) == 1 for changes in found.values())
    refused = refusals(H100, found)
    assert list(refused) == [name_of(SPILLS)], refused
    assert re.fullmatch(r"forward_kernel spills \d+ bytes a thread", refused[name_of(SPILLS)])


def test_more_shared_memory_than_there_is_is_refused() -> None:
    (change, *_) = in_examples(FORWARD, GOOD)
    small = H100._replace(shared=10_000)
    assert refusal(H100, change) is None
    assert refusal(small, change) is None  # the constant takes more too
    change = change._replace(before=None)
    assert re.fullmatch(
        r"forward_kernel takes \d{5} bytes of shared memory; a program of this device has 10000",
        refusal(small, change) or "",
    )


def test_what_does_not_compile_is_refused_in_a_line() -> None:
    own = launch("flash", "bfloat16 D=64", "forward_kernel")
    other = own._replace(kwargs=own.kwargs | {"num_warps": 3})
    refused = refusal(H100, Change(other, own))
    assert refused is not None
    assert refused == "forward_kernel does not compile: num_warps must be a power of 2"
    wrong = own._replace(kwargs=own.kwargs | {"GROUP": "x"})
    refused = refusal(H100, Change(wrong, own))
    assert refused is not None
    assert re.fullmatch("forward_kernel does not compile: .*(str|unsupported).*", refused), refused


def test_what_spills_no_more_than_the_constant_is_not_refused() -> None:
    own = launch("flash", "bfloat16 D=64", "forward_kernel")
    spilling = own._replace(kwargs=own.kwargs | {"num_warps": SPILLS.num_warps})
    assert refusal(H100, Change(spilling, spilling)) is None
    assert "spills" in (refusal(H100, Change(spilling, own)) or "")
    assert "spills" in (refusal(H100, Change(spilling, None)) or "")


def test_examples_hold_every_launch_that_takes_the_tiles() -> None:
    assert set(examples()[Kernel("flash", ("dkv", 2, 64))]) == {
        "biased_attention", "carope_attention", "flash", "rope_attention", "routed"
    }  # fmt: skip
    found = in_examples(FORWARD, GOOD)
    assert all(change.before is not None for change in found)
    assert {change.launch.kwargs["num_stages"] for change in found} == {2}
    assert {change.before.kwargs["num_stages"] for change in found if change.before} == {3}
    assert {change.launch.kwargs["D"] for change in found} >= {40, 64}
    assert in_examples(FORWARD, tiles.constant(FORWARD)) == []


def test_a_sweep_compiles_what_it_would_launch_before_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for what runs: the gate's errors, and the clock."""
    monkeypatch.setattr(flash, "require_runnable", lambda *given: None)
    monkeypatch.setattr(tuning, "gpu_of", lambda device: H100)
    monkeypatch.setattr(tuning, "neighbours", lambda kernel: [SPILLS, GOOD])
    ran: list[str] = []

    def error(self: Sweep, kernel: Kernel, config: Any, use: Any) -> float:
        ran.append(name_of(config))
        return 0.0

    def time(self: Sweep, kernel: Kernel, configs: dict[str, Any]) -> dict[str, Any]:
        return {name: (0.0, 1.0 if x == GOOD else 2.0, 0.0) for name, x in configs.items()}

    monkeypatch.setattr(Sweep, "error", error)
    monkeypatch.setattr(Sweep, "time", time)
    window = Work("nope", lambda length: {"window": 8})
    plan = Plan(
        (64,), (64,), (torch.bfloat16,), 64, 32, 1, 0, (Work("nope"), window), ("forward", "train")
    )
    sweep = Sweep(plan, torch.device("cpu"))
    assert [kernel.key[0] for kernel in sweep.uses] == [
        "forward", "masked forward", "dq", "dkv", "dqkv", "masked dq"
    ]  # fmt: skip
    found = sweep.row(FORWARD)
    assert found["config"] == GOOD._asdict()
    assert list(found["refused"]) == [name_of(SPILLS)]
    assert "spills" in found["refused"][name_of(SPILLS)]
    assert name_of(SPILLS) not in ran
    assert ran.count(name_of(GOOD)) == len(sweep.uses[FORWARD])
    (change,) = sweep.changes(FORWARD, GOOD, sweep.uses[FORWARD][0])
    assert change.launch.args[0][0].device.type == "cpu"  # what the call was given
    assert not tiles.table(torch.device("cpu"))
