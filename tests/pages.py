"""The pages that people read: the README and those of docs/, and the code in them."""

import importlib.metadata
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = (README, *sorted(DOCS.rglob("*.md")))

_FENCE = re.compile(r"(?:<!-- needs ([\w-]+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page."""

    needs: str  # the package that it takes, "" for none
    language: str
    text: str

    @property
    def can_run(self) -> bool:
        """Whether what it takes is installed."""
        try:
            return not self.needs or bool(importlib.metadata.version(self.needs))
        except importlib.metadata.PackageNotFoundError:
            return False


def name_of(page: Path) -> str:
    """Of a page, below the root."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    """The page's blocks of one language."""
    found = map(Block._make, _FENCE.findall(page.read_text(encoding="utf-8")))
    return [block for block in found if block.language == language]


def links(page: Path) -> list[str]:
    """What the text of the page links to, anchors included."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", text)
