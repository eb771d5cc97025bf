"""posenc doctor: facts without names of people or machines, and what "auto" takes."""

import getpass
import platform
import re
from pathlib import Path

import pytest
import torch

import posenc
from posenc.backends import choice
from posenc.commands import doctor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shown() -> str:
    return "\n".join(doctor.report())


def test_the_report_is_a_page_of_markdown(shown: str) -> None:
    facts = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", shown, re.MULTILINE))
    assert facts["posenc"] == posenc.__version__
    assert facts["torch"].startswith(torch.__version__)
    assert facts["Python"].startswith(platform.python_version())
    assert facts["cache"].startswith("~/.cache/posenc, ")
    for name in posenc.names():
        (line,) = re.findall(rf"^\| `{name}` \|.*$", shown, re.MULTILINE)
        assert line.count("|") == len(doctor.CALLS) + 2
    notes = re.findall(r"^\((\d+)\) not ", shown, re.MULTILINE)
    assert notes == [str(number + 1) for number in range(len(notes))]
    assert set(re.findall(r" \((\d+)\) \|", shown)) == set(notes)  # each is cited, and there


def test_it_names_nobody(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = str(Path.home())
    monkeypatch.setattr(doctor, "report", lambda: iter([f"{home}/data"]))
    assert doctor.main([]) == 0
    assert capsys.readouterr().out == "~/data\n"
    monkeypatch.undo()
    facts = "\n".join(f"{name} {value}" for name, value in doctor.facts())
    assert platform.node() not in facts
    assert not re.search(rf"\b{getpass.getuser()}\b", facts)
    assert "/home" not in facts


@pytest.mark.parametrize("name", posenc.names())
def test_what_is_explained_is_what_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    choose = choice.choose

    def seen(case: choice.Case, impl: str) -> object:
        backend = choose(case, impl)
        taken.append(backend.__name__.rpartition(".")[2])
        return backend

    monkeypatch.setattr(choice, "choose", seen)
    layer = doctor.layer_of(name, CPU)
    x = torch.randn(2, 40, doctor.WIDTH)
    segments = posenc.segments([30, 10]).expand(2, 40)
    mask = torch.arange(40) > torch.tensor([[0], [3]])
    for arguments in ({}, {"segments": segments}, {"mask": mask}):
        taken.clear()
        layer(x, **arguments)
        backend, passed = layer.explain(x, **arguments)
        assert backend == taken[0]
        assert backend not in passed
        assert all(passed.values())


def test_reasons_are_those_of_the_call() -> None:
    assert doctor.training("rope", CPU)[0] == "sdpa"
    assert doctor.half("rope", CPU)[0] == "short"
    taken, passed = doctor.windowed("rope", CPU)
    assert (taken, passed["skipping"]) == ("blockwise", "no gates drop anything")
    taken, passed = doctor.decoding("rmha", CPU)
    assert (taken, passed["blockwise"]) == ("sdpa", "a single query has no blocks")


def test_explaining_leaves_the_cache_as_it_was() -> None:
    layer, x = doctor.layer_of("carope", CPU), torch.randn(1, 9, doctor.WIDTH)
    state = layer.make_cache(1, 9)
    with torch.no_grad():
        layer(x[:, :8], cache=state)
        layer.explain(torch.randn(1, 1, doctor.WIDTH), cache=state)
        torch.testing.assert_close(layer(x[:, 8:], cache=state), layer(x)[:, 8:])
    with pytest.raises(ValueError, match="x must have shape"):
        layer.explain(x[0])


def test_packages_of_extras_are_those_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.11", "tyro>=0.9; extra == 'train'", 'no-such>=1; extra == "hf"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert set(doctor.extras()) == {"train", "hf"}
    assert doctor.extras()["train"].startswith("tyro 1.")
    assert doctor.extras()["hf"] == "without no-such"
