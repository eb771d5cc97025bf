"""The pages are right: their code runs in the order in which it stands, their tables are fresh,
their commands exist, and the site is built of all of them without a warning.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml

import posenc.hf
from pages import DOCS, PAGES, README, ROOT, blocks, links, name_of
from posenc.training.cli import check_flags

torch.set_num_threads(1)  # at these sizes a second thread only waits

OF_SITE = [page for page in PAGES if page != README]
WITH_CODE = [page for page in OF_SITE if blocks(page, "python")]


@pytest.mark.filterwarnings("ignore")  # what libraries say of themselves, exporters above all
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    missing = []
    for block in blocks(page, "python"):
        if block.can_run:
            exec(compile(block.text, page.name, "exec"), names)
        else:
            missing.append(block.needs)
    if missing:
        pytest.skip(f"all ran but the block for {', '.join(missing)}, which is not installed")


@pytest.mark.parametrize("page", OF_SITE, ids=name_of)
def test_a_page_has_an_example_or_a_figure(page: Path) -> None:
    assert blocks(page, "python") or "![" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_are_made_of_the_committed_rows(page: Path) -> None:
    from bench.report import readme

    text = page.read_text(encoding="utf-8")
    assert readme(text) == text, "stale; python -m bench.report --readme"


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of the page's shell blocks, without variables before it."""
    for block in blocks(page, "sh"):
        for line in re.sub(r"\\\n", " ", block.text).splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                yield words


def flags_of(module: str) -> str:
    """The source in which a command's flags are named."""
    found = importlib.util.find_spec(module)
    assert found is not None, f"no module {module}"
    if found.submodule_search_locations is not None:  # a package: its command stands apart
        found = importlib.util.find_spec(f"{module}.__main__")
        assert found is not None, f"{module} is no command"
    assert found.origin is not None
    return Path(found.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist_and_know_their_flags(page: Path) -> None:
    for words in commands(page):
        if "train.py" in words:
            check_flags(words[words.index("train.py") + 1 :])
        elif words[:2] == ["python", "-m"] and words[2].startswith(("bench", "posenc")):
            own = words[3 : words.index("--") if "--" in words else None]
            source = flags_of(words[2])
            for flag in (word for word in own if word.startswith("--")):
                assert f'"{flag}"' in source, f"{words[2]} has no {flag}"
            check_flags(words[words.index("--") + 1 :] if "--" in words else [])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_reach_files(page: Path) -> None:
    for link in links(page):
        path = urlsplit(link).path
        if "://" not in link and path:
            assert (page.parent / unquote(path)).exists(), link


def targets(page: Path) -> set[str]:
    """The files that a page links to."""
    paths = (link.partition("#")[0] for link in links(page) if "://" not in link)
    return {name_of((page.parent / path).resolve()) for path in paths if path}


def test_every_page_is_found_from_the_readme_in_two_clicks() -> None:
    """But for the pages of single methods and of the API, which have a list of their own."""
    first = targets(README)
    pages = [ROOT / name for name in first if name.endswith(".md")]
    found = first.union(*map(targets, pages))
    assert {name_of(page) for page in OF_SITE if page.parent == DOCS} <= found
    for name in ("docs/methods", "docs/api"):
        assert f"{name}/index.md" in found
        listed = targets(ROOT / name / "index.md")
        assert {name_of(page) for page in (ROOT / name).glob("[!i]*.md")} <= listed


def entries(nav: object) -> Iterator[str]:
    """The paths and patterns of a nav, at any depth."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for inner in nav.values():
            yield from entries(inner)
    elif isinstance(nav, list):
        for inner in nav:
            yield from entries(inner)


@pytest.mark.parametrize("file", sorted(DOCS.rglob(".nav.yml")), ids=name_of)
def test_what_the_nav_names_is_there(file: Path) -> None:
    named = list(entries(yaml.safe_load(file.read_text(encoding="utf-8"))["nav"]))
    assert len(named) > 5
    for entry in named:
        assert entry == "*" or (file.parent / entry).exists(), entry


class Page(HTMLParser):
    """What a page of the site fetches, links to and can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = set()
        self.formulas = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        self.formulas += tag == "math"
        if "src" in values:
            self.fetched.append(values["src"])
        if "href" in values:
            read = tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload")
            (self.fetched if read else self.linked).append(values["href"])


#: By the site: rows are large.
UNREAD = shutil.ignore_patterns("__pycache__", "*.jsonl", "report.html")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The built site, its pages by their paths."""
    for needed in ("zensical", "mkdocstrings", "l2m4m"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"the site needs {needed}: pip install 'posenc[docs]'")
    copy = tmp_path_factory.mktemp("source")  # building leaves files behind
    shutil.copy(ROOT / "zensical.toml", copy)
    for folder in ("docs", "posenc", "bench/results"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=UNREAD)
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=copy,
        env=os.environ | {"NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    said = built.stdout + built.stderr
    assert built.returncode == 0, said
    assert "WARNING" not in said, said
    assert "griffe:" not in said, said
    return {path: Page(path) for path in sorted((copy / "site").rglob("*.html"))}


def test_the_site_holds_every_page(site: dict[Path, Page]) -> None:
    made = {path.with_suffix(".md").name for path in site}
    assert {page.name for page in OF_SITE} <= made
    assert sum(page.formulas for page in site.values()) > 5


def test_the_api_has_every_public_name(site: dict[Path, Page]) -> None:
    anchors = set().union(*(page.anchors for page in site.values()))
    public = [getattr(posenc, name) for name in posenc.__all__]
    public += [getattr(posenc.hf, name) for name in posenc.hf.__all__]
    assert {f"{one.__module__}.{one.__qualname__}" for one in public} <= anchors


def test_the_site_needs_no_network(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        for address in page.fetched:
            parts = urlsplit(address)
            assert not parts.netloc, f"{path.name} fetches {address}"
            if parts.scheme != "data" and path.name != "404.html":  # which a server shows
                assert (path.parent / unquote(parts.path)).is_file(), f"{path.name}: {address}"


def test_links_of_the_site_reach_their_anchors(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        for address in page.linked:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.suffix == ".html":
                assert target in site, f"{path.name}: {address}"
                anchor = unquote(parts.fragment)
                assert not anchor or anchor in site[target].anchors, f"{path.name}: {address}"
            else:  # the notebook
                assert target.exists(), f"{path.name}: {address}"
