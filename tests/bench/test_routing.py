"""bench.routing runs whole on a CPU: rows, ratios and plot."""

from pathlib import Path

import pytest

from bench import routing
from bench.rows import read
from posenc.backends import skipping as core


def test_every_level_and_mode_has_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows" / "routing.jsonl"
    monkeypatch.setattr(routing, "SPLITS", {(2, 2): 0.5, (0, 2): 0.25})
    arguments = "--device cpu --lengths 9 20 --tokens 40 --dim 6 --rounds 1 --dtype float32"
    monkeypatch.setattr("sys.argv", ["routing", *arguments.split(), "--out", str(path)])
    routing.main()
    rows = read(path)
    seen = {
        (row["name"], row["mode"], row["S"], row["implementation"], row["options"]) for row in rows
    }
    splits = ("shared=2 top_k=2", "shared=0 top_k=2")
    providers = [("dense", "")] + [(p, o) for p in ("masked", "skipping") for o in splits]
    assert seen == {
        (f"moh {level}", mode, length, *provider)
        for level in routing.LEVELS
        for mode in routing.MODES
        if (level, mode) != ("queries", "decode")
        for length in (9, 20)
        for provider in providers
    }
    assert all(0 < row["p20"] <= row["p50"] <= row["p80"] for row in rows)
    printed = capsys.readouterr().out
    assert "core fwd 9: 0.500:" in printed
    assert path.with_suffix(".png").stat().st_size > 10_000


def row(provider: str, options: str, p50: float) -> dict[str, object]:
    about = {"name": "moh core", "mode": "fwd", "metric": "time", "H": 8, "S": 512}
    return {"implementation": provider, "options": options, "p50": p50, **about}


def test_ratios_are_to_dense_of_the_same_length() -> None:
    rows = [row("dense", "", 2.0), row("skipping", "shared=2 top_k=2", 1.5)]
    rows += [row("skipping", "shared=2 top_k=5", 2.2), row("masked", "shared=2 top_k=2", 2.1)]
    found = routing.ratios(rows, "core", "fwd", "time")
    assert found == {512: {"skipping": [(0.875, 1.1), (0.5, 0.75)], "masked": [(0.5, 1.05)]}}
    again = [row("dense", "", 4.0), row("skipping", "shared=2 top_k=2", 3.2)]
    found = routing.ratios([*rows, *again], "core", "fwd", "time")
    assert found[512]["skipping"] == [(0.875, 0.55), (0.5, 0.8)]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1.0, 1.2), (0.5, 0.8)], 0.75),
        ([(1.0, 0.9), (0.5, 0.8)], 1.0),
        ([(1.0, 1.4), (0.5, 1.2)], None),
        ([(1.0, 1.4), (0.75, 1.2), (0.5, 1.0)], 0.5),
    ],
)
def test_break_even(points: list[tuple[float, float]], expected: float | None) -> None:
    assert routing.break_even(points) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device gpu", "unknown device: 'gpu'. .*Known: cpu"),
        ("--lengths 9 0", "--lengths must be at least 1; got 0"),
        ("--tokens 0", "--tokens must be at least 1; got 0"),
        ("--rounds -1", "--rounds must be at least 1; got -1"),
        ("--dim 7", "--dim must be even and at least 2; got 7"),
        ("--out .", "Is a directory: '.'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["routing", "--device", "cpu", *arguments.split()])
    with pytest.raises(SystemExit, match=message) as stopped:
        routing.main()
    assert "\n" not in str(stopped.value)
    assert not capsys.readouterr().out


def test_always_skipping_ends() -> None:
    before = core.SKIP_FROM
    with routing.always_skipping():
        assert core.SKIP_FROM == 0
    assert before == core.SKIP_FROM
