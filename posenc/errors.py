"""Messages for names that do not exist."""

import difflib
from collections.abc import Iterable


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """One line: what was not found, the nearest spelling, and everything that exists."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what}: {name!r}.{hint} Known: {', '.join(known) or 'none'}."


class UnexpectedArgument(TypeError, ValueError):
    """An argument that a call does not take: what Python raises, with a remedy."""
