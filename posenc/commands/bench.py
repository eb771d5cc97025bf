"""The benchmarks: `posenc bench NAME ..` is `python -m bench.NAME ..` of a clone.

Without a NAME it lists them: every module of `posenc.bench` that is a command, with the first line
of its docstring. The modules are read, not imported.
"""

import ast
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from posenc.errors import unknown

#: The folder bench/ of a clone.
PACKAGE = "posenc.bench"


def benchmarks() -> dict[str, str]:
    """What each command measures, by name."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    found = {}
    folder = Path(spec.submodule_search_locations[0])
    for path in (*folder.glob("*.py"), *folder.glob("*/__main__.py")):
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in text:
            title = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
            name = path.parent.name if path.stem == "__main__" else path.stem
            found[name] = " ".join(title.split()).partition(": `python")[0]
    return dict(sorted(found.items()))


def main(argv: Sequence[str]) -> int:
    """Run one, or list them."""
    known = benchmarks()
    if not argv or argv[0] in ("-h", "--help"):
        print("posenc bench NAME ..    (posenc bench NAME --help says more)\n")
        width = 2 + max(map(len, known))
        for name, what in known.items():
            print(f"  {name:<{width}}{what}")
        return 0
    name, *rest = argv
    if name not in known:
        print(f"error: {unknown('benchmark', name, known)}", file=sys.stderr)
        return 2
    before = sys.argv
    sys.argv = ["", *rest]  # run_module fills in the first
    try:
        # As a program: processes that it spawns import it again by its name.
        runpy.run_module(f"{PACKAGE}.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    finally:
        sys.argv = before
    return 0
