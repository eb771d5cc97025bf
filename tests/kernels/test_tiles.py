"""Tiles that were found: what the file may hold, that launches get them, and how they are found.

Tiles change how fp32 sums of a row are rounded: outputs of two are within 1e-5 of each other.
"""

import importlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import close, counted
from posenc import tuned
from posenc.backends import choice, fused
from posenc.backends.measured import Way
from posenc.commands import doctor
from posenc.kernels import by_distance, flash, relative, tiles
from posenc.kernels.biased_attention import biased_attention
from posenc.kernels.decode import decode_attention
from posenc.kernels.decode_relative import relative_by_key
from posenc.kernels.mask import Mask
from posenc.kernels.projection import project_kept
from posenc.kernels.relative import relative_attention
from posenc.kernels.routed import routed_attention
from posenc.kernels.tiles import FAMILIES, Kernel
from posenc.tune import __main__ as command
from posenc.tune.cases import Plan, Sizes, Work, ask
from posenc.tune.tiles import Sweep, name_of, neighbours

KERNELS = [
    Kernel(family, key)
    for family in FAMILIES
    for key in importlib.import_module(f"posenc.kernels.{family}").CONFIGS
]
FORWARD = Kernel("flash", ("forward", 4, 32))
SMALL = flash.Config(16, 16, 4, 1)
LENGTH, DIM = 70, 16


@pytest.fixture(autouse=True)
def file(tuned_file: Path) -> Path:
    torch.manual_seed(0)
    return tuned_file


def here(device: torch.device) -> torch.device:
    """As tensors call it."""
    return torch.empty(0, device=device).device


#: A row of back ends.
SDPA = {
    "op": "plain",
    "direction": "forward",
    "dtype": "float32",
    "sizes": {"S": 16, "D": DIM},
    "ways": [{"backend": "sdpa", "settings": {}}],
}


def write(file: Path, device: torch.device, *rows: Mapping[str, Any], **other: str) -> None:
    made_with = tuned.made_with(device) | other
    entry = {"made_with": made_with, "time": "", "tiles": list(rows), "rows": [SDPA]}
    file.write_text(json.dumps({"format": tuned.FORMAT, "devices": {tuned.name_of(device): entry}}))


def row(kernel: Kernel, config: Any) -> dict[str, Any]:
    stored = config if config is None or isinstance(config, dict) else config._asdict()
    return {"family": kernel.family, "key": list(kernel.key), "config": stored}


def tensors(device: torch.device, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device) for shape in shapes]


class Launches:
    """Stands for a kernel, and keeps the tiles that it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.tiles = kernel, []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            self.tiles.append((options["BLOCK_M"], options["BLOCK_N"], options["num_warps"]))
            return self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Tiles of flash's forward kernel, a launch after the other."""
    spy = Launches(flash.forward_kernel)
    monkeypatch.setattr(flash, "forward_kernel", spy)
    return spy.tiles


# Which tiles a launch takes


def ops(device: torch.device) -> dict[str, tuple[Callable[[], torch.Tensor], dict[Kernel, Any]]]:
    """A call of each family, and other tiles for what it launches."""
    q, k, v = tensors(device, *3 * [(1, 2, LENGTH, DIM)])
    table, x, weight = tensors(device, (2, LENGTH, DIM), (1, LENGTH, 24), (2 * DIM, 24))
    gates = torch.rand(1, 2, LENGTH, device=device)
    gates = torch.where(gates < 0.4, 0.0, gates)
    learned = table[..., 0].clone().requires_grad_()
    key, step = (4, 32), q[:, :, -1:]

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(biased_attention(q, k, v, None, learned).sum(), learned)[0]

    return {
        "flash": (lambda: flash.flash_attention(q, k, v), {FORWARD: SMALL}),
        "relative": (
            lambda: relative_attention(q, k, v, table),
            {Kernel("relative", ("forward", *key)): relative.Config(16, 16, 32, 4, 1, 1)},
        ),
        "routed": (
            lambda: routed_attention(q, k, v, gates),
            {Kernel("routed", ("forward", *key)): SMALL},
        ),
        "projection": (
            lambda: project_kept(x, weight, None, gates),
            {Kernel("projection", key): SMALL},
        ),
        "decode": (lambda: decode_attention(step, k, v), {Kernel("decode", key): SMALL}),
        "decode_relative": (
            lambda: relative_by_key(step, table, keys=LENGTH, scale=0.3),
            {Kernel("decode_relative", key): SMALL},
        ),
        "by_distance": (
            gradient,
            {Kernel("by_distance", key): by_distance.Config(16, 16, 4, 1)},
        ),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_launch_on_the_device_takes_them_and_computes_the_same(
    family: str, device: torch.device, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, configs = ops(device)[family]
    module = importlib.import_module(f"posenc.kernels.{family}")
    taken = []
    original = module.tile_options
    monkeypatch.setattr(
        module, "tile_options", lambda x, config: taken.append(config) or original(x, config)
    )
    expected = call()
    (kernel,) = configs
    assert taken == [tiles.constant(kernel)]
    write(file, device, *(row(*one) for one in configs.items()))
    tuned.forget()
    close(call(), expected, 1e-5)
    assert taken[1:] == [configs[kernel]]
    file.unlink()
    assert torch.equal(call(), call())  # read once
    assert len(set(taken[1:])) == 1


def test_a_backward_pass_may_have_other_tiles_than_its_forward_pass(device: torch.device) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(device, *3 * [(1, 2, LENGTH, DIM)]))
    table, gates = tensors(device, (2, LENGTH, DIM), (1, 2, LENGTH))
    gates = torch.where(gates < 0, 0.0, gates)
    key = (4, 32)
    other = {Kernel("relative", (kernel, *key)): relative.Config(32, 16, 64, 4, 1, 1)
             for kernel in ("forward", "dq", "dkv")}  # fmt: skip
    other |= {Kernel("flash", (kernel, *key)): flash.Config(16, 64, 4, 1)
              for kernel in ("forward", "dq", "dkv", "dqkv")}  # fmt: skip
    other |= {Kernel("routed", (kernel, *key)): flash.Config(32, 16, 4, 1)
              for kernel in ("forward", "dq")}  # fmt: skip
    for call in (
        lambda: flash.flash_attention(q, k, v, deterministic=True),
        lambda: flash.flash_attention(q, k, v, deterministic=False),
        lambda: relative_attention(q, k, v, table),
        lambda: routed_attention(q, k, v, gates),
    ):
        expected = torch.autograd.grad(call().square().sum(), (q, k, v))
        y = call()
        with tiles.using(here(device), other):
            found = torch.autograd.grad(y.square().sum(), (q, k, v))
        with tiles.using(here(device), other):
            z = call()
        for actual, exact in zip(found, expected, strict=True):
            close(actual, exact, 1e-5)
        for actual, exact in zip(
            torch.autograd.grad(z.square().sum(), (q, k, v)), expected, strict=True
        ):
            close(actual, exact, 1e-5)


def test_compiled_code_takes_them(
    device: torch.device, file: Path, launched: list[tuple[int, int, int]]
) -> None:
    write(file, device, row(FORWARD, SMALL))
    asked = ask(Work("nope"), Sizes(1, LENGTH, DIM), "forward", torch.float32, device)
    assert asked is not None
    q, k, v = asked.case.q, asked.case.k, asked.case.v
    with counted() as (compiled, counter):
        y = compiled(lambda q, k, v: flash.flash_attention(q, k, v))(q, k, v)
    assert counter.frame_count == 1
    assert launched == [(16, 16, 4)]
    close(y, flash.flash_attention(q, k, v), 0)


# The file


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_constants_and_their_neighbours_are_possible(kernel: Kernel) -> None:
    own, found = tiles.constant(kernel), neighbours(kernel)
    assert tiles.why_not(kernel, own) is None
    assert 3 <= len(found) <= 8
    assert own not in found
    assert len(set(found)) == len(found)
    assert tiles.checked([row(kernel, config) for config in found]) == {kernel: found[-1]}
    for config in found:
        if kernel.family == "by_distance":
            assert config.block_m == config.block_n
        if kernel.family.startswith("decode"):
            assert config.block_m == 16
        if kernel.family == "relative":
            assert config.segment % config.block_m == config.segment % config.block_n == 0


def config(**changed: Any) -> dict[str, Any]:
    return SMALL._asdict() | changed


TERM = {"block_m": 16, "block_n": 64, "segment": 96, "num_warps": 4, "num_stages": 1, "resident": 1}


@pytest.mark.parametrize(
    ("damaged", "why"),
    [
        (7, "TypeError"),
        ([{"family": "flash"}], "config"),
        ([row(Kernel("abacus", ("forward", 4, 32)), SMALL)], "no kernel abacus"),
        ([row(Kernel("flash", ("forward", 4, 512)), SMALL)], "no kernel flash"),
        ([row(FORWARD, config(block_k=16))], "block_k"),
        ([row(FORWARD, {"block_m": 16})], "block_n"),
        ([row(FORWARD, config(block_m=48))], "power of two; got 48"),
        ([row(FORWARD, config(block_m=8))], "block_m must be an integer from 16 to 256; got 8"),
        ([row(FORWARD, config(block_n=4096))], "block_n must be an integer from 16 to 256"),
        ([row(FORWARD, config(num_warps="4"))], "num_warps must be an integer .* got '4'"),
        ([row(FORWARD, config(num_stages=True))], "num_stages must be an integer .* got True"),
        ([row(FORWARD, config(registers=1000))], "registers must be an integer from 24 to 255"),
        ([row(Kernel("by_distance", (4, 32)), by_distance.Config(16, 32, 4, 1))], "equal"),
        ([row(Kernel("decode", (4, 32)), config(block_n=256))], "whole tiles: at most 128"),
        ([row(Kernel("decode", (4, 32)), config(block_m=32))], "block_m must be 16"),
        ([row(Kernel("relative", ("dq", 4, 32)), TERM)], "segment must be whole tiles"),
        (
            [row(Kernel("relative", ("dq", 4, 32)), TERM | {"segment": 32})],
            "segment must be whole tiles",
        ),
        (
            [row(Kernel("relative", ("dq", 4, 32)), TERM | {"num_warps": 16, "resident": 8})],
            "16 warps of 8 programs leave a thread no registers",
        ),
    ],
)
def test_tiles_that_cannot_be_are_left_out_with_one_warning(
    damaged: Any, why: str, device: torch.device, file: Path, launched: list[tuple[int, int, int]]
) -> None:
    write(file, device, row(FORWARD, SMALL))
    content = json.loads(file.read_text())
    entry = content["devices"][tuned.name_of(device)]
    entry["tiles"] = [*entry["tiles"], *damaged] if isinstance(damaged, list) else damaged
    file.write_text(json.dumps(content))
    q = torch.randn(1, 1, 5, DIM, device=device)
    with pytest.warns(UserWarning, match=rf"damaged in its tiles .*{why}.*posenc tune") as seen:
        tiles.table(q.device)  # as a launch does, which warns of other things in triton 3.6
    for _ in range(2):
        flash.flash_attention(q, q, q)
    assert len(seen) == 1
    own = tiles.constant(FORWARD)
    assert launched == 2 * [(own.block_m, own.block_n, own.num_warps)]


@pytest.mark.parametrize("key", ["driver", "torch", "triton", "posenc"])
def test_tiles_of_other_versions_are_left_out_with_the_rows_one_warning(
    key: str, device: torch.device, file: Path, launched: list[tuple[int, int, int]]
) -> None:
    write(file, device, row(FORWARD, SMALL), **{key: "0.0.7"})
    q = torch.randn(1, 1, 5, DIM, device=device)
    with pytest.warns(UserWarning, match=rf"{key} 0\.0\.7") as seen:
        tiles.table(q.device)
    assert len(seen) == 1
    flash.flash_attention(q, q, q)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        asked = ask(Work("nope"), Sizes(1, 16, DIM), "forward", torch.float32, device)
        assert asked is not None
        choice.attend(asked.case)
    own = tiles.constant(FORWARD)
    assert launched == [(own.block_m, own.block_n, own.num_warps)]


def test_a_row_that_keeps_the_constant_takes_whatever_that_is(
    device: torch.device, file: Path
) -> None:
    write(file, device, row(FORWARD, None))
    assert tiles.table(here(device)) == {}


def test_doctor_counts_them(device: torch.device, file: Path) -> None:
    write(file, device, row(FORWARD, None))
    assert doctor.measurements(device) == "kinds of call: 1"
    write(file, device, row(FORWARD, SMALL))
    assert doctor.measurements(here(device)) == "kinds of call: 1, kernels with other tiles: 1"
    write(file, device, row(FORWARD, config(block_m=48)))
    assert "damaged in its tiles" in doctor.measurements(here(device))


# How they are found


def plan(*works: Work, directions: tuple[str, ...] = ("forward",), **other: Any) -> Plan:
    sizes = ((LENGTH,), (DIM,), (torch.float32,), LENGTH, 37, 1, 0)
    return Plan(*sizes, works, directions, **other)


def clock(times: dict[str, float]) -> Callable[[Mapping[str, Callable[[], Any]]], dict[str, Any]]:
    """Runs each candidate once, and tells the time that it is to have taken: 9 if not given."""

    def tell(runs: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        for run in runs.values():
            run()
        return {name: (0.0, times.get(name, 9.0), 99.0) for name in runs}

    return tell


#: The first two neighbours of flash's forward kernel.
WIDE, NARROW = neighbours(FORWARD)[:2]


def test_the_fastest_of_the_right_ones_is_what_the_next_launch_gets(
    device: torch.device, launched: list[tuple[int, int, int]]
) -> None:
    times = {name_of(WIDE): 3.0, name_of(NARROW): 4.0}
    sweep = Sweep(plan(Work("nope"), neighbours=2), device, clock(times))
    assert list(sweep.uses) == [FORWARD]
    (found,) = sweep.rows()
    own = tiles.constant(FORWARD)
    assert found["config"] == WIDE._asdict()
    assert found["why"] == f"3 ms; {name_of(own)} takes 9 ms: 3.00 times as fast"
    assert [one["config"] for one in found["tried"]] == [
        x._asdict() for x in (WIDE, NARROW, own)
    ]  # fmt: skip
    assert all(one["error"] < 1e-6 for one in found["tried"])
    assert found["refused"] == {}
    assert {(x.block_m, x.block_n, x.num_warps) for x in (own, WIDE, NARROW)} == set(launched)
    launched.clear()
    q = torch.randn(1, 1, 5, DIM, device=device)
    flash.flash_attention(q, q, q)
    assert launched == [(WIDE.block_m, WIDE.block_n, WIDE.num_warps)]


def test_what_is_hardly_faster_does_not_replace_the_constant(device: torch.device) -> None:
    times = {name_of(WIDE): 8.7, name_of(NARROW): 8.8}
    (found,) = Sweep(plan(Work("nope"), neighbours=2), device, clock(times)).rows()
    assert found["config"] is None
    assert tiles.table(here(device)) == {}


def spoiled(
    monkeypatch: pytest.MonkeyPatch, where: Callable[[Any, Mask], bool], failure: bool = False
) -> None:
    """Flash's forward pass is wrong with some tiles, or fails."""
    original = flash.forward

    def forward(q: Any, *args: Any, mask: Any = flash.PLAIN, **rest: Any) -> Any:
        o, lse = original(q, *args, mask=mask, **rest)
        if where(flash.launch("forward", q, mask)[0], mask):
            if failure:
                raise RuntimeError("out of resource: shared memory\nand more")
            o = 1.001 * o
        return o, lse

    monkeypatch.setattr(flash, "forward", forward)


@pytest.mark.parametrize(("failure", "why"), [(False, "the output is off by 1"), (True, "out of")])
def test_wrong_tiles_are_refused_however_fast(
    failure: bool, why: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, lambda config, mask: config == WIDE, failure)
    times = {name_of(WIDE): 1.0, name_of(NARROW): 4.0}
    (found,) = Sweep(plan(Work("nope"), neighbours=2), device, clock(times)).rows()
    assert found["config"] == NARROW._asdict()
    assert found["refused"][name_of(WIDE)].startswith(why)
    assert "and more" not in found["refused"][name_of(WIDE)]
    assert name_of(WIDE) not in [name_of(flash.Config(**one["config"])) for one in found["tried"]]


def test_what_wins_must_hold_wherever_the_kernel_is_used(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, lambda config, mask: config == WIDE and mask.window == 7)
    windows = [Work("nope", lambda length, size=size: {"window": size}) for size in (7, 9)]
    works = plan(Work("nope"), *windows, neighbours=2)
    times = {name_of(WIDE): 1.0, name_of(NARROW): 4.0}
    (found,) = Sweep(works, device, clock(times)).rows()
    assert found["config"] == NARROW._asdict()
    why = found["refused"][name_of(WIDE)]
    assert why.startswith("nope, forward, float32, D=16, fused: the output is off by")


def test_what_is_wrong_by_the_constant_too_does_not_speak_against_tiles(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, lambda config, mask: mask.real is not None)
    works = plan(Work("nope"), Work("nope", call="padding"), neighbours=1)
    (found,) = Sweep(works, device, clock({name_of(WIDE): 1.0})).rows()
    assert found["config"] == WIDE._asdict()
    assert found["refused"] == {}


def test_where_the_constant_is_wrong_another_is_taken(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tiles.constant(FORWARD)
    spoiled(monkeypatch, lambda config, mask: config == own)
    (found,) = Sweep(plan(Work("nope"), neighbours=1), device, clock({})).rows()
    assert found["config"] == WIDE._asdict()
    spoiled(monkeypatch, lambda config, mask: True)
    (found,) = Sweep(plan(Work("nope"), neighbours=1), device, clock({})).rows()
    assert (found["config"], found["why"]) == (None, "no tiles were right")
    assert found["tried"] == []


def test_kernels_of_the_backward_pass_are_timed_there(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = []
    original = flash.forward
    monkeypatch.setattr(
        flash, "forward", lambda *x, **rest: forwards.append(1) or original(*x, **rest)
    )
    during: dict[str, int] = {}

    def tell(runs: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        forwards.clear()
        for run in runs.values():
            run()
        during[kernel.key[0]] = len(forwards)
        return {name: (0.0, 9.0 - number, 9.0) for number, name in enumerate(runs)}

    works = plan(Work("nope"), directions=("train",), neighbours=1)
    sweep = Sweep(works._replace(lengths=(20,), tokens=20, checked=19), device, tell)
    assert [kernel.key[0] for kernel in sweep.uses] == ["forward", "dq", "dkv", "dqkv"]
    for kernel in sweep.uses:
        found = sweep.row(kernel)
        assert found["config"] == neighbours(kernel)[0]._asdict()
        assert len(found["tried"]) == 2
    assert during == {"forward": 2, "dq": 0, "dkv": 0, "dqkv": 0}


def test_back_ends_meet_kernels_with_their_best_tiles(
    device: torch.device,
    file: Path,
    launched: list[tuple[int, int, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole command."""
    whole = plan(Work("nope"), neighbours=1)
    monkeypatch.setattr(command, "plan", lambda device, quick: whole)
    planned = clock({name_of(WIDE): 1.0, "fused": 1.0})
    for module in ("tiles", "measure"):
        owner = importlib.import_module(f"posenc.tune.{module}")
        monkeypatch.setattr(owner, "planned_clock", lambda plan, device: planned)
    compared = []
    original = fused.attend

    def attend(*args: Any, **rest: Any) -> Any:
        launched.clear()
        y = original(*args, **rest)
        compared.extend(launched)
        return y

    monkeypatch.setattr(fused, "attend", attend)
    command.main(["--device", device.type])
    wide = (WIDE.block_m, WIDE.block_n, WIDE.num_warps)
    assert compared[-1] == wide  # by the back ends' clock
    tuned.forget()
    asked = ask(Work("nope"), Sizes(1, LENGTH, DIM), "forward", torch.float32, device)
    assert asked is not None
    assert choice.chosen(asked.case) == Way("fused")
    compared.clear()
    choice.attend(asked.case)
    assert compared == [wide]
    capsys.readouterr()
    command.main(["--show"])
    shown = capsys.readouterr().out
    own = name_of(tiles.constant(FORWARD))
    assert f"tiles of {FORWARD}: {name_of(WIDE)}, 1 ms; {own} takes 9 ms" in shown
    assert list(tiles.table(here(device)).values()) == [WIDE]
