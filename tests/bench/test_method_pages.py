"""The gallery: a page for every name, whole, and as the code and the committed rows are now."""

import ast
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image, ImageChops

import posenc
from bench import method_pages, method_pictures, tables
from helpers import NAMES
from posenc.zoo import ZOO, Recipe

README = method_pages.FOLDER.parent.parent / "README.md"
ENCODED = [name for name in NAMES if ZOO[name].embedding is None]


def test_every_name_has_its_page() -> None:
    there = {page.name for page in method_pages.FOLDER.glob("*.md")}
    assert there == {page.name for page in method_pages.pages()}


@pytest.mark.parametrize("page", method_pages.pages(), ids=lambda page: page.stem)
def test_pages_are_of_the_code_and_the_committed_rows(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert method_pages.filled(page) == text, "stale; python -m bench.method_pages"


@pytest.mark.parametrize("name", NAMES)
def test_pages_say_all_that_there_is_to_say(name: str) -> None:
    text = (method_pages.FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}: ")
    _, *found = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(found[::2], found[1::2], strict=True))
    assert tuple(sections) == method_pages.HEADINGS
    by_hand = {title: method_pages.BLOCK.sub("", said).strip() for title, said in sections.items()}
    made = {"Options", "Decoding and cost"}
    assert {title for title, said in by_hand.items() if not said} == made
    assert "$$" in by_hand["Formula"]
    assert "```python\n" in by_hand["In code"]
    identifier = re.fullmatch(r"\d{4}\.\d{5}", ZOO[name].paper)
    assert identifier is None or identifier[0] in text


def test_pictures_are_there_and_small() -> None:
    expected = {f"{name}{kind}.png" for name in NAMES for kind in ("", "-small")}
    assert {path.name for path in method_pictures.FOLDER.iterdir()} == expected
    assert all(path.stat().st_size < 60_000 for path in method_pictures.FOLDER.iterdir())


@pytest.mark.parametrize("name", ["sinusoidal", "t5"])
def test_pictures_are_those_that_the_command_draws(name: str, tmp_path: Path) -> None:
    with Image.open(method_pictures.FOLDER / f"{name}.png") as image:
        if image.text["Software"] != f"matplotlib {matplotlib.__version__}":
            pytest.skip(f"drawn by {image.text['Software']}")
        committed = image.convert("L")
    drawn = tmp_path / "drawn.png"
    drawn.write_bytes(method_pictures.png(method_pictures.large(method_pictures.look(name))))
    with Image.open(drawn) as image:
        apart = ImageChops.difference(committed, image.convert("L"))
    # Other processors may round a few otherwise.
    far = sum(apart.histogram()[32:])
    assert far < 0.001 * committed.width * committed.height, (
        "stale; python -m bench.method_pictures"
    )


def test_noise_is_of_parameters_that_names_have() -> None:
    for name, noise in method_pictures.NOISE.items():
        owned = dict(posenc.attention(name, 32, 4).encoding.named_parameters())
        assert noise.keys() <= owned.keys()


@pytest.mark.parametrize("name", ENCODED)
def test_options_and_defaults_are_those_of_a_layer(name: str) -> None:
    given = {}
    for option in method_pages.options_for(name):
        value = re.match(r"`(.*?)`", option.default)
        assert value is not None
        given[option.spelled.strip("`")] = ast.literal_eval(value[1])
    heads = method_pages.HEADS
    told, plain = posenc.attention(name, 8 * heads, heads, **given), posenc.attention(name, 96, 12)
    assert repr(told) == repr(plain)
    assert told.state_dict().keys() == plain.state_dict().keys()


def test_two_parts_that_share_an_option_are_told_apart() -> None:
    spelled = {option.spelled for option in method_pages.options_for("moh")}
    assert {"`scaling`", "`encoding_scaling`", "`shared`"} <= spelled
    assert "`conv_bias`" in {option.spelled for option in method_pages.options_for("mdha")}


def test_the_index_says_what_the_readme_says() -> None:
    index = (method_pages.FOLDER / "index.md").read_text(encoding="utf-8")
    chosen = index[index.index("## How to choose") :]
    found = tables.perplexity_table(method_pages.rows_of("perplexity.jsonl")).lines
    lengths = [line[2] for line in found]
    for name, perplexity in zip((line[0] for line in found), lengths, strict=True):
        assert f"| {name} |" in README.read_text(encoding="utf-8")
        assert f"| [{name}]({name.strip('`')}.md) | {perplexity} |" in chosen
    shown = re.findall(r"^\| \[`\w+`\]\(\w+\.md\) \| ([\d.]+) \|", chosen, re.MULTILINE)
    assert shown == sorted(lengths, key=float)


class Said(posenc.Encoding):
    """A scheme.

    Args:
        slope: how steep | flat; a second
            line, of "x*y".
    """

    def __init__(self, *, slope: float = 0.5) -> None:
        super().__init__()


class Silent(Said):
    """A scheme that does not say what its argument is."""


def test_a_new_row_needs_a_page_and_words_for_its_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(ZOO, "toy", Recipe("2401.00001", "logits", "a toy", Said))
    assert tmp_path / "toy.md" in method_pages.pages(tmp_path)
    with pytest.raises(ValueError, match=r"toy\.md is missing\. .* about, picture, options, cost"):
        method_pages.filled(tmp_path / "toy.md")
    (option,) = method_pages.options_for("toy")
    assert option == ("`slope`", "`0.5`", r'how steep \| flat; a second line, of "x\*y"')
    assert "Not measured here yet" in method_pages.known("toy")
    monkeypatch.setitem(ZOO, "toy", Recipe("2401.00001", "logits", "a toy", Silent))
    with pytest.raises(ValueError, match="Silent does not say what slope is"):
        method_pages.options_for("toy")


@pytest.mark.parametrize("blocks", [(), ("about", "options", "picture", "cost", "known")])
def test_pages_with_other_blocks_are_refused(blocks: tuple[str, ...], tmp_path: Path) -> None:
    text = "".join(f"<!-- made: {block} -->\n<!-- end -->\n" for block in blocks)
    (tmp_path / "rope.md").write_text(text)
    with pytest.raises(ValueError, match="must have the blocks about, picture"):
        method_pages.filled(tmp_path / "rope.md")


def test_filling_keeps_what_is_written_by_hand(tmp_path: Path) -> None:
    blocks = "".join(f"<!-- made: {b} -->\nold\n<!-- end -->\n" for b in method_pages.OF_NAME)
    (tmp_path / "fox.md").write_text(f"# fox\n{blocks}by hand\n")
    text = method_pages.filled(tmp_path / "fox.md")
    assert text.startswith("# fox\n<!-- made: about -->\nA gate a token")
    assert text.endswith("<!-- end -->\nby hand\n")
    assert "old" not in text.split()


def test_tokens_enter_with_the_table_where_there_is_one() -> None:
    x = torch.randn(2, method_pictures.LENGTH, method_pictures.WIDTH).double()
    assert method_pictures.table_of("rope") is None
    enter = method_pictures.table_of("sinusoidal")
    assert enter is not None
    assert not torch.allclose(
        enter(x[:, :1].expand_as(x))[:, 0], enter(x[:, :1].expand_as(x))[:, 1]
    )


def test_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (method_pages, method_pictures):
        monkeypatch.setattr("sys.argv", ["bench", "rope"])
        with pytest.raises(SystemExit, match=r"takes no arguments; got \['rope'\]"):
            module.main()
