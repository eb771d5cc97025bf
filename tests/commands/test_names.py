"""posenc names: the zoo as a table."""

import re

import pytest

from posenc.commands import names
from posenc.zoo import ZOO


def test_every_name_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert names.main([]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    starts = [found.start() for found in re.finditer(r"(?<!\S)\S+(?: \S+)*", header)]
    cells = [
        [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        for line in lines
    ]
    assert [cell[:3] + cell[4:] for cell in cells] == [
        [name, recipe.paper, recipe.acts, recipe.summary] for name, recipe in ZOO.items()
    ]
    remembers = {cell[0]: cell[3] for cell in cells}
    assert remembers["rope"] == "-"
    assert remembers["carope"] == "phase"
    assert remembers["rcmha"] == "conv"
    assert remembers["selective"] == "sums, taps"


def test_it_takes_no_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        names.main(["rope"])
    assert "unrecognized arguments: rope" in capsys.readouterr().err
