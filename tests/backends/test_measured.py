"""What auto takes of measurements: the life of the file, the nearest row, right outputs."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import posenc
from helpers import attend, close, counted, randn
from posenc import tuned
from posenc.backends import blockwise, choice, measured, reference, sdpa, short
from posenc.backends.case import consecutive
from posenc.backends.measured import Way, between, nearest
from posenc.scores import RelativeTerm, Scores
from posenc.tune.cases import WORKS, Sizes, Work, ask
from posenc.tune.measure import candidates

CPU = torch.device("cpu")
PLAIN = ("plain", "forward", "bfloat16", {"S": 16, "D": 8})


@pytest.fixture(autouse=True)
def file(tuned_file: Path) -> Path:
    torch.manual_seed(0)
    return tuned_file


def row(op: str, direction: str, dtype: str, sizes: dict[str, int], *ways: Way) -> dict[str, Any]:
    stored = [{"backend": way.backend, "settings": way.settings} for way in ways]
    return {"op": op, "direction": direction, "dtype": dtype, "sizes": sizes, "ways": stored}


def entry(*rows: dict[str, Any], **other: str) -> dict[str, Any]:
    return {"made_with": tuned.made_with(CPU) | other, "tiles": [], "rows": list(rows)}


def write(file: Path, **devices: dict[str, Any]) -> None:
    """An entry `here` is that of this processor."""
    named = {tuned.name_of(CPU) if key == "here" else key: devices[key] for key in devices}
    file.write_text(json.dumps({"format": tuned.FORMAT, "devices": named}))


def case(length: int = 16, dtype: torch.dtype = torch.bfloat16) -> Any:
    return consecutive(*(randn(1, 2, length, 8, dtype=dtype) for _ in range(3)))


def test_without_a_file_nothing_is_known_and_nothing_said(file: Path) -> None:
    assert not file.exists()
    assert measured.ways(case()) == ()
    assert choice.chosen(case()) is None
    assert choice.choose(case(), "auto") is short


def test_auto_takes_the_first_way_of_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, here=entry(row(*PLAIN, Way("sdpa"), Way("short"))), other=entry())
    assert choice.chosen(case()) == Way("sdpa")
    taken = []
    original = sdpa.attend
    monkeypatch.setattr(sdpa, "attend", lambda case: taken.append(case.q.dtype) or original(case))
    choice.attend(case())
    assert taken == [torch.bfloat16]  # short would have come with fp32


def test_what_was_measured_is_explained(file: Path) -> None:
    layer = posenc.attention("alibi", 16, 2, window=4).eval().requires_grad_(False)
    x = randn(1, 16, 16, dtype=torch.float32)
    assert layer.explain(x)[0] == "blockwise"
    sizes = {"S": 16, "D": 8, "window": 4}
    write(
        file, here=entry(row("bias of distances, window", "forward", "float32", sizes, Way("sdpa")))
    )
    tuned.forget()
    taken, passed = layer.explain(x)
    assert taken == "sdpa"
    assert passed["blockwise"] == "posenc tune found sdpa faster here"
    assert passed["skipping"] == "no gates drop anything"


def test_the_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    original = tuned.entries
    monkeypatch.setattr(tuned, "entries", lambda path: reads.append(path) or original(path))
    write(file, here=entry(row(*PLAIN, Way("sdpa"))))
    assert measured.ways(case()) == (Way("sdpa"),)
    file.unlink()
    assert measured.ways(case()) == (Way("sdpa"),)
    tuned.forget()
    for _ in range(3):
        assert measured.ways(case()) == ()
    assert len(reads) == 2


@pytest.mark.parametrize("key", ["driver", "torch", "triton", "posenc"])
def test_an_entry_of_other_versions_is_left_out_with_one_warning(key: str, file: Path) -> None:
    write(file, here=entry(row(*PLAIN, Way("sdpa")), **{key: "0.0.7"}))
    with pytest.warns(UserWarning, match=rf"{key} 0\.0\.7 .*posenc tune\.") as seen:
        assert choice.chosen(case()) is None
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.chosen(case()) is None


def test_a_file_of_another_device_is_left_out_with_one_warning(file: Path) -> None:
    write(file, Abacus=entry(row(*PLAIN, Way("sdpa"))))
    with pytest.warns(UserWarning, match="but of Abacus: .*posenc tune"):
        assert choice.chosen(case()) is None
    assert choice.chosen(case()) is None


def damaged_rows(rows: Any) -> str:
    entry = {"made_with": tuned.made_with(CPU), "tiles": [], "rows": rows}
    devices = {tuned.name_of(CPU): entry}
    return json.dumps({"format": tuned.FORMAT, "devices": devices})


@pytest.mark.parametrize(
    "damage",
    [
        lambda: "",
        lambda: '{"format": 2, "devi',
        lambda: "[" * 100_000,
        lambda: "[]",
        lambda: '{"format": 2}',
        lambda: '{"format": 99, "devices": {}}',
        lambda: damaged_rows([]).replace('"format": 2', '"format": 1'),
        lambda: damaged_rows([]).replace('"tiles"', '"tails"'),
        lambda: '{"format": 2, "devices": {"x": 3}}',
        lambda: damaged_rows(7),
        lambda: damaged_rows([{"op": "plain"}]),
        lambda: damaged_rows([row(*PLAIN, Way("abacus"))]),
        lambda: damaged_rows([row(*PLAIN, Way("sdpa", {"rows": 64}))]),
        lambda: damaged_rows([row("plain", "forward", "float17", {"S": 16}, Way("sdpa"))]),
        lambda: damaged_rows([row(*PLAIN), row(*PLAIN[:3], {"S": 3})]),
    ],
)
def test_a_damaged_file_is_left_out_with_one_warning(damage: Any, file: Path) -> None:
    file.write_text(damage())
    with pytest.warns(UserWarning, match=r"tuned\.json .*posenc tune") as seen:
        close(choice.attend(case()), choice.attend(case(), "reference"), 10)  # other numbers
    assert len(seen) == 1
    assert choice.chosen(case()) is None


def test_what_was_measured_with_other_code_is_stale(file: Path) -> None:
    stamp = tuned.made_with(CPU)["posenc"]
    assert stamp == f"{posenc.__version__} {tuned.code()}"
    write(file, here=entry(row(*PLAIN, Way("sdpa")), posenc=f"{posenc.__version__} 0123456789ab"))
    with pytest.warns(UserWarning, match=r"with posenc .* 0123456789ab \(now .*left out"):
        assert measured.ways(case()) == ()


def test_a_warning_that_is_an_error_is_raised_once(file: Path) -> None:
    file.write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="cannot be read"):
            measured.ways(case())
        assert measured.ways(case()) == ()


def test_a_user_without_a_home_has_no_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSENC_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as of a uid that has none
    assert measured.ways(case()) == ()


def test_the_nearest_sizes_count_within_a_factor_of_two() -> None:
    assert between([128]) == [(64, 256, 128)]
    assert between([128, 512, 2048]) == [(64, 256, 128), (256, 1024, 512), (1024, 4096, 2048)]
    assert between([10, 11]) == [(5, 10, 10), (10, 22, 11)]
    assert between([1, 100]) == [(1, 2, 1), (50, 200, 100)]
    ways = [row(*PLAIN[:3], {"S": s, "D": d}, Way("blockwise", {"rows": s * d}))
            for s in (16, 64) for d in (8, 16)]  # fmt: skip
    measured.take(CPU, ways)
    group = measured.table("cpu", None)["plain", "forward", torch.bfloat16]
    answers = {(s, d): [way.settings["rows"] for way in nearest(group, {"S": s, "D": d})]
               for s in (7, 8, 31, 32, 127, 128) for d in (3, 4, 10, 11, 31, 32)}  # fmt: skip
    for (s, d), found in answers.items():
        s_near = None if s in (7, 128) else 16 if s < 32 else 64
        d_near = None if d in (3, 32) else 8 if d < 11 else 16
        assert found == ([s_near * d_near] if s_near and d_near else [])


@pytest.mark.parametrize(
    "changed",
    [
        {"dropout_p": 0.5},
        {"causal": False},
        {"window": 3},
        {"real": torch.ones(1, 16, dtype=torch.bool)},
        {"segments": posenc.segments([7, 9])},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_cases_do_not_take_the_row_of_plain_ones(changed: dict[str, Any]) -> None:
    measured.take(CPU, [row(*PLAIN, Way("sdpa"))])
    q = case().q
    assert measured.ways(consecutive(q, q, q)) == (Way("sdpa"),)
    assert measured.ways(consecutive(q, q, q, **changed)) == ()
    assert measured.ways(consecutive(q[:, :, 3:], q, q)) == ()
    assert measured.ways(consecutive(q, q[:, :1], q[:, :1])) == ()
    assert measured.ways(consecutive(q.requires_grad_(), q, q)) == ()


def test_every_work_has_an_op_of_its_own() -> None:
    found = {}
    for work in WORKS:
        asked = ask(work, Sizes(1, 16, 8), "train", torch.float32, CPU)
        assert asked is not None
        question = measured.question(asked.case)
        assert question is not None
        found.setdefault((question.op, question.sizes.get("kept %")), []).append(work.name)
    assert all(len(names) == 1 for names in found.values())
    assert {op: names[0] for (op, _), names in found.items()} == {
        "plain": "nope",
        "grouped keys": "nope",
        "window": "nope",
        "documents": "nope",
        "padding": "nope",
        "bias of distances": "alibi",
        "learned bias of distances": "t5",
        "bias": "fire",
        "decay": "fox",
        "relative sinusoid": "rmha",
        "relative table": "rcmha",
        "wide keys": "pope",
        "contextual positions": "cope",
        "reflections": "path",
        "gates": "moh",
        "turned by position": "rope",
        "turned by rates": "carope",
        "turned by content": "cmha",
    }


@pytest.mark.parametrize("direction", ["step", "forward", "train"])
@pytest.mark.parametrize("work", WORKS, ids=lambda work: f"{work.name} {work.call}".strip())
def test_auto_follows_the_file_and_is_the_reference(work: Work, direction: str) -> None:
    asked = ask(work, Sizes(2, 37, 8), direction, torch.float32, CPU)
    if asked is None:
        return
    question, ways = measured.question(asked.case), candidates(asked.case)
    if question is None:
        return
    expected = reference.attend(asked.case.turned())
    key = (question.op, question.direction, "float32", question.sizes)
    for way in ways:
        small = Way(way.backend, dict.fromkeys(way.settings, 16))
        measured.take(CPU, [row(*key, small)])
        assert choice.chosen(asked.case) == small
        with torch.set_grad_enabled(direction == "train"):
            y = choice.attend(asked.case)
        close(y, expected, 1e-5)
        if not asked.leaves:
            continue
        leaves = asked.leaves[:3]
        probe = torch.randn_like(y)
        wanted = torch.autograd.grad(expected, leaves, probe, retain_graph=True)
        found = torch.autograd.grad(y, leaves, probe, retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            close(a, b, 1e-5)


def test_settings_reach_the_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask(Work("rcmha"), Sizes(1, 37, 8), "forward", torch.float32, CPU)
    assert asked is not None
    seen = []
    original = blockwise.in_blocks
    monkeypatch.setattr(
        blockwise, "in_blocks", lambda block, pieces, **rest: seen.append(len(pieces))
        or original(block, pieces, **rest)
    )  # fmt: skip
    key = ("relative table", "forward", "float32", {"S": 37, "D": 8})
    for rows in (8, 16, 64):
        measured.take(CPU, [row(*key, Way("blockwise", {"rows": rows}))])
        with torch.no_grad():
            choice.attend(asked.case)
    assert seen == [5, 3, 1]


def test_an_explicit_impl_is_never_affected(monkeypatch: pytest.MonkeyPatch) -> None:
    def unused(case: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(measured, "ways", unused)
    module, x = posenc.attention("rope", 24, 4, impl="sdpa"), torch.randn(1, 5, 24)
    y = module(x)
    module.impl = "reference"
    close(module(x), y.detach(), 1e-5)
    module.impl = "auto"
    with pytest.raises(AssertionError):
        module(x)


def relative(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return attend(q, k, v, Scores(relative=RelativeTerm(table)))


@pytest.mark.parametrize("read_before", [False, True])
def test_compiled_whole_it_takes_what_can_be_compiled(file: Path, read_before: bool) -> None:
    """Plain attention in bf16 would go through fp32; blocks of a relative term are no graph."""
    sizes = {"S": 16, "D": 8}
    write(file, here=entry(
        row(*PLAIN, Way("sdpa"), Way("short")),
        row("relative table", "forward", "float32", sizes, Way("blockwise"), Way("sdpa")),
    ))  # fmt: skip
    q, k, v = case().q, case().q, case().q
    if read_before:
        assert choice.chosen(consecutive(q, k, v)) == Way("sdpa")
    with counted("eager") as (compiled, counter):
        function = compiled(lambda q, k, v: attend(q, k, v))
        for length in (9, 16, 25, 31):
            parts = [x[:, :, :1].repeat(1, 1, length, 1) + x[0, 0, 0] for x in (q, k, v)]
            assert torch.equal(function(*parts), attend(*parts, impl="sdpa"))
    assert counter.frame_count <= 2
    q, k, v, table = (x.float() for x in (q, k, v, randn(2, 5, 8)))
    with counted("eager") as (compiled, _):
        close(compiled(relative)(q, k, v, table), relative(q, k, v, table), 1e-5)
    assert not short.pays(case(513))


def test_exported_programs_do_not_depend_on_this_machine(file: Path) -> None:
    write(file, here=entry(row("plain", "forward", "float32", {"S": 16, "D": 6}, Way("sdpa"))))
    module, x = posenc.attention("nope", 24, 4).eval(), torch.randn(1, 16, 24)
    length = torch.export.Dim("length", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=({1: length},))
        longer = torch.randn(1, 99, 24)
        close(program.module()(longer), module(longer), 1e-5)


def test_what_transforms_the_computation_takes_no_measurement() -> None:
    measured.take(CPU, [row("plain", "forward", "float32", {"S": 16, "D": 8}, Way("sdpa"))])
    q, seen = torch.randn(1, 2, 16, 8), []

    def one(x: Tensor) -> Tensor:
        seen.append(measured.ways(consecutive(x, x, x)))
        return x

    one(q)
    torch.func.grad(lambda x: one(x).sum())(q)
    with torch.autograd.forward_ad.dual_level():
        one(q)
    assert seen == [(Way("sdpa"),), (), ()]
