"""posenc.tune: what is timed was right, the clock decides, the file and what it shows."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import close
from posenc import tuned
from posenc.backends import blockwise, choice, reference
from posenc.backends.case import Case
from posenc.backends.measured import Way
from posenc.tune import __main__ as command
from posenc.tune.cases import WORKS, Plan, Sizes, Work, ask
from posenc.tune.clock import take_turns
from posenc.tune.gate import Gate, definition
from posenc.tune.measure import candidates, measure, ranking

CPU = torch.device("cpu")
BY_CONTENT = Work("rcmha")
Runs = Mapping[str, Callable[[], Any]]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the file goes."""
    monkeypatch.setenv("POSENC_CACHE", str(tmp_path / "cache"))
    tuned.forget()
    yield tuned.path()
    tuned.forget()


def small(*works: Work, directions: tuple[str, ...] = ("train",), **other: Any) -> Plan:
    sizes = {"lengths": (16,), "dims": (8,), "dtypes": (torch.float32,), "tokens": 32} | other
    return Plan(**sizes, checked=19, rounds=1, seconds=0, works=works, directions=directions)


def clock(times: dict[str, float]) -> Callable[[Runs], dict[str, tuple[float, float, float]]]:
    """Runs each candidate once, and tells the time that it is to have taken: 9 if not given."""

    def tell(runs: Runs) -> dict[str, tuple[float, float, float]]:
        for run in runs.values():
            run()
        return {name: (0.0, times.get(name, 9.0), 99.0) for name in runs}

    return tell


def rows(plan: Plan, **times: float) -> list[dict[str, Any]]:
    return [row for row in measure(plan, CPU, clock(times)) if row is not None]


def order(row: dict[str, Any]) -> list[str]:
    return [str(Way(way["backend"], way["settings"])) for way in row["ways"]]


# The clock


def test_medians_of_turns_are_those_of_the_clock() -> None:
    now = 0.0
    costs = {"a": iter([9.0, 9.0, 1.0, 5.0, 2.0]), "b": iter([9.0, 9.0, 3.0, 3.0, 4.0])}

    def run(name: str) -> None:
        nonlocal now
        now += next(costs[name])

    def wait() -> None:
        nonlocal now
        now += 10

    runs = {name: lambda name=name: run(name) for name in costs}
    found = take_turns(runs, 3, wait=wait, clock=lambda: now)
    assert found == {"a": (11e3, 12e3, 15e3), "b": (13e3, 13e3, 14e3)}


def test_the_fastest_comes_first_and_auto_takes_it() -> None:
    (row,) = rows(small(BY_CONTENT), **{"blockwise rows=256": 2.0, "sdpa": 3.0, "blockwise": 4.0})
    assert order(row)[:3] == ["blockwise rows=256", "sdpa", "blockwise"]
    assert row["why"] == "2 ms; blockwise takes 4 ms: 2.00 times as fast"
    assert row["op"] == "relative table"
    assert row["refused"] == {}
    asked = ask(BY_CONTENT, Sizes(1, 20, 8), "train", torch.float32, CPU)
    assert asked is not None
    assert choice.chosen(asked.case) == Way("blockwise", {"rows": 256})
    (row,) = rows(small(BY_CONTENT), sdpa=2.0)
    assert choice.chosen(asked.case) == Way("sdpa")


def test_what_is_hardly_faster_does_not_replace_the_way_of_today() -> None:
    assert ranking({"a": 10.0, "b": 9.6}, "a") == ["a", "b"]
    assert ranking({"a": 10.0, "b": 9.4}, "a") == ["b", "a"]
    assert ranking({"b": 9.6, "c": 9.5}, "a") == ["c", "b"]


def test_every_row_is_of_another_question() -> None:
    window = Work("nope", lambda length: {"window": 4})
    plan = small(window, window, lengths=(16, 64), directions=("step", "forward"))
    assert [(row["direction"], row["sizes"]) for row in rows(plan)] == [
        ("forward", {"S": 16, "D": 8, "window": 4}),
        ("forward", {"S": 64, "D": 8, "window": 4}),
    ]


# The gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_back_end_is_right(dtype: torch.dtype) -> None:
    found = rows(small(*WORKS, directions=("step", "forward", "train"), dtypes=(dtype,)))
    assert len(found) > 20
    assert all(row["refused"] == {} for row in found)
    assert all(way["error"] < 10 * torch.finfo(dtype).eps for row in found for way in row["ways"])


def louder(case: Case) -> Tensor:
    return 1.001 * definition(case)


def without_content(case: Case) -> Tensor:
    return definition(case._replace(scores=case.scores._replace(content=None)))


def wrong_gradient(case: Case) -> Tensor:
    y = definition(case)
    return y + 0.01 * (case.q.sum() - case.q.sum().detach())


def not_a_number(case: Case) -> Tensor:
    return definition(case) * torch.nan


def broken(case: Case) -> Tensor:
    raise RuntimeError("out of order\nand more")


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (louder, "the output is off by 1.0e-03"),
        (without_content, "the output is off"),
        (wrong_gradient, "gradient 1 is off"),
        (not_a_number, "the output is off by nan"),
        (broken, "out of order"),
    ],
)
def test_a_wrong_back_end_is_refused_however_fast(
    attend: Callable[[Case], Tensor], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = SimpleNamespace(attend=attend, reason=lambda case: None)
    monkeypatch.setitem(choice.MEASURABLE, "short", wrong)
    (row,) = rows(small(BY_CONTENT), short=0.1, sdpa=1.0)
    assert row["refused"]["short"].startswith(why)
    assert "and more" not in row["refused"]["short"]
    assert order(row)[0] == "sdpa"
    assert "short" not in order(row)


def test_where_the_way_of_today_is_wrong_another_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    original = blockwise.attend
    monkeypatch.setattr(blockwise, "attend", lambda *x, **rest: 2 * original(*x, **rest))
    (row,) = rows(small(BY_CONTENT), sdpa=2.0)
    assert order(row) == ["sdpa"]
    tried = ("blockwise", *(f"blockwise rows={rows}" for rows in (64, 256, 512)))
    assert set(row["refused"]) == set(tried)
    assert "alone right" in row["why"]


def test_the_gate_knows_how_exact_the_definition_is() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        asked = ask(BY_CONTENT, Sizes(1, 19, 8), "train", dtype, CPU)
        assert asked is not None
        gate = Gate(asked)
        assert gate.check(definition) < gate.allowed[0] < 30 * torch.finfo(dtype).eps
        close(gate.exact[0], reference.attend(asked.case), 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("direction", ["step", "forward", "train"])
def test_the_gate_checks_what_is_timed(direction: str) -> None:
    asked = ask(BY_CONTENT, Sizes(1, 19, 8), direction, torch.float32, CPU)
    assert asked is not None
    seen = []

    def attend(case: Case) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return definition(case)

    Gate(asked).check(attend)
    assert seen == [direction == "train"]


def test_long_texts_stay_linear_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask(BY_CONTENT, Sizes(1, 16, 8), "forward", torch.float32, CPU)
    assert asked is not None
    assert Way("sdpa") in candidates(asked.case)
    monkeypatch.setattr(blockwise, "RECOMPUTE_FROM", 16)
    found = candidates(asked.case)
    assert {way.backend for way in found} == {"blockwise"}
    assert found[0] == Way("blockwise")


# The command and its file

BROKEN = json.dumps(
    {"format": 2, "devices": {"x": {"made_with": {}, "time": "", "tiles": [], "rows": 3}}}
)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of one row."""
    monkeypatch.setattr(command, "plan", lambda device, quick: small(BY_CONTENT))


@pytest.mark.usefixtures("planned")
def test_the_command_writes_shows_and_auto_reads(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(["--quick", "--device", "cpu"])
    assert capsys.readouterr().out == f"{file}\n"
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]
    (entry,) = json.loads(file.read_text())["devices"].values()
    assert entry["made_with"] == tuned.made_with(CPU)
    tuned.forget()
    asked = ask(BY_CONTENT, Sizes(1, 16, 8), "train", torch.float32, CPU)
    assert asked is not None
    best = Way(entry["rows"][0]["ways"][0]["backend"], entry["rows"][0]["ways"][0]["settings"])
    assert choice.chosen(asked.case) == best
    command.main(["--show"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"{file}\n\n{tuned.name_of(CPU)}, 20")
    assert f"relative table, train, float32, S=16 D=8: {best}, {entry['rows'][0]['why']}" in shown


def test_refusals_are_shown(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = SimpleNamespace(attend=louder, reason=lambda case: None)
    monkeypatch.setitem(choice.MEASURABLE, "short", wrong)
    command.write(file, CPU, command.tune(CPU, small(BY_CONTENT)))
    assert any(line.strip().startswith("refused short: the output") for line in command.shown(file))


def test_entries_of_other_devices_stay_and_a_damaged_file_is_replaced(file: Path) -> None:
    entry = {"made_with": {}, "time": "", "tiles": [], "rows": []}
    file.parent.mkdir()
    file.write_text("{")
    command.write(file, CPU, entry)
    devices = json.loads(file.read_text())["devices"] | {"Abacus": entry}
    file.write_text(json.dumps({"format": tuned.FORMAT, "devices": devices}))
    command.write(file, CPU, entry | {"time": "later"})
    assert tuned.entries(file) == {
        tuned.name_of(CPU): entry | {"time": "later"}, "Abacus": entry
    }  # fmt: skip


def test_a_write_that_fails_leaves_the_file_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.write(file, CPU, {"made_with": {}, "tiles": [], "rows": []})
    before = file.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        command.write(file, CPU, {"made_with": {}, "tiles": [], "rows": [1]})
    assert file.read_bytes() == before
    assert len(list(file.parent.iterdir())) == 1


def test_one_device_of_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    models = ["big", "small", "big"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: models[device.index])
    cuda = [torch.device("cuda", index) for index in (0, 1)]
    assert command.devices(None) == [*cuda, CPU]
    assert command.devices("cuda") == cuda
    assert command.devices("cpu") == [CPU]


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["--show"], None, "nothing was measured yet. Run posenc tune"),
        (["--show"], "{", "tuned.json|Expecting property name"),
        (
            ["--show"],
            '{"format": 1, "devices": {}}',
            "tuned.json cannot be read .expected a file of format 2 from posenc tune.. Measure",
        ),
        (["--show"], BROKEN, "damaged"),
        (["--device", "cuda"], None, "--device cuda: torch sees none"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    arguments: list[str],
    content: str | None,
    message: str,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    if content is not None:
        file.parent.mkdir()
        file.write_text(content)
    with pytest.raises(SystemExit, match=message) as stopped:
        command.main(arguments)
    assert "\n" not in str(stopped.value)
