"""The ledger of claims: `python -m bench.claims [NAME] [--scale mini|full] [--table]`.

    python -m bench.claims                     every claim, its verdict, and what it rests on
    python -m bench.claims carope              of one paper; CA1 is one claim
    python -m bench.claims --scale full        by the published recipe alone
    python -m bench.claims moh --table         as Markdown

Verdicts are computed from the rows below bench/results each time, by the rule of
`bench.claims.verdict`; the claims, and the commands that make their rows, are the TOML files in
bench/claims. Without --scale the full check counts where its rows exist, else the mini one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from posenc.training.console import say

from ..clone import RESULTS
from .ledger import SCALES, entries, lines, table


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        prog="python -m bench.claims", description=(__doc__ or "").splitlines()[0]
    )
    made.add_argument("name", nargs="?", help="a paper or a claim; all if not given")
    made.add_argument("--scale", choices=SCALES, help="of the check; the best that has rows")
    made.add_argument("--table", action="store_true", help="print a Markdown table")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the ledger; the exit code."""
    args = parser().parse_args(arguments)
    try:
        if not args.results.is_dir():
            raise ValueError(f"--results must be a folder of rows; there is no {args.results}.")
        found = entries(args.name, args.scale, args.results)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(table(found).markdown() if args.table else "\n".join(lines(found)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
