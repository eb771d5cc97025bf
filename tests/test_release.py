"""What a release says of itself: one version, a citation, and forms for issues."""

import re
from pathlib import Path

import pytest
import yaml

import posenc

ROOT = Path(__file__).parent.parent
FORMS = sorted(
    path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"
)
#: GitHub's kinds of elements, and what each needs.
NEEDED = {
    "markdown": {"value"},
    "input": {"label"},
    "textarea": {"label"},
    "dropdown": {"label", "options"},
    "checkboxes": {"label", "options"},
}


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == posenc.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.search(r"^## \[(.+?)\]", changes, re.MULTILINE)
    assert latest is not None
    assert latest[1] == posenc.__version__


def test_the_citation_has_what_the_format_asks_for() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type", "license"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert all(author["name"] for author in citation["authors"])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_a_form_is_one_that_github_reads(form: Path) -> None:
    read = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert read["name"]
    assert read["description"]
    ids = [element.get("id") for element in read["body"]]
    assert len(set(ids)) == len(ids)
    for element in read["body"]:
        assert NEEDED[element["type"]] <= element["attributes"].keys()


def test_bugs_and_wrong_results_ask_for_the_doctor() -> None:
    assert [form.stem for form in FORMS] == ["bug", "new-encoding", "wrong-result"]
    for form in FORMS:
        asks = "`posenc doctor`" in form.read_text(encoding="utf-8")
        assert asks == (form.stem != "new-encoding")
