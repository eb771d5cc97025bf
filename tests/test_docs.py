"""The guides are right: the code of each page runs, in the order in which it stands."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if page.name != "README.md")
METHODS = sorted((DOCS / "methods").glob("*.md"))


def run(page: Path) -> None:
    """Run the blocks of a page, which share their names."""
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_of_a_page_are_made_of_the_committed_rows(page: Path) -> None:
    from bench.report import readme

    text = page.read_text(encoding="utf-8")
    assert readme(text) == text, "stale; python -m bench.report --readme"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_code_of_a_method_runs(page: Path) -> None:
    run(page)


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_links_of_a_method_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https://)([^)#]*)(?:#([\w-]+))?\)", text)
    assert links
    for target, anchor in links:
        other = page.parent / target if target else page
        assert other.is_file(), target
        titles = re.findall(r"^#+ (.+)", other.read_text(), re.M) if anchor else []
        assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles]


def test_the_list_of_pages_is_whole() -> None:
    listed = re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [page.name for page in PAGES]
    assert "](methods/index.md)" in (DOCS / "README.md").read_text(encoding="utf-8")
    assert "docs/README.md" in (DOCS.parent / "README.md").read_text(encoding="utf-8")
