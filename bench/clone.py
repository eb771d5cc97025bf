"""The clone around these files: its rows, and the pages that are made of them. A wheel has none."""

from pathlib import Path

# Resolved: posenc/bench is a link to bench/.
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"


def check_clone(command: str) -> None:
    """Raise ValueError where there is none for the command to write into."""
    if not DOCS.is_dir():
        raise ValueError(
            f"{command} writes the pages of a clone, and there is none around {ROOT}. Clone the "
            "repository and run it there."
        )
