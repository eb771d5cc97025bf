"""Claims, their verdicts, and what they rest on."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from posenc.errors import unknown

from ..clone import RESULTS
from ..statistics import MOST_SEEDS
from ..tables import Table
from .evidence import Evidence, Measured, named
from .exact import EXACT, Found
from .reading import (
    Buckets,
    Check,
    Claim,
    Compare,
    Exact,
    Load,
    Loss,
    OfRows,
    Paper,
    read_commands,
    read_papers,
)
from .verdict import (
    CONTRADICTED,
    NOT_RUNNABLE,
    OPEN,
    REPRODUCED,
    WITHIN_NOISE,
    combine,
    judge,
)

SCALES = ("mini", "full")


@dataclass(frozen=True)
class Finding:
    """A comparison and what became of it."""

    compare: Compare
    found: Measured | Found | None
    half: float = 0.0

    @property
    def verdict(self) -> str:
        if self.found is None:
            return OPEN
        if isinstance(self.found, Found):
            return REPRODUCED if self.found.holds else CONTRADICTED
        assert isinstance(self.compare, OfRows)
        return judge(self.found.gap, self.half, self.compare.tolerance)

    @property
    def threshold(self) -> str:
        """What the interval is held against, and how many seeds could tell."""
        if isinstance(self.found, Found) or self.found is None:
            return ""
        assert isinstance(self.compare, OfRows)
        half = f"{math.exp(self.half):.2f} times" if self.found.times else f"{self.half:.3f} nats"
        words = [f"h = {half}"] if self.half else []
        if self.compare.tolerance:
            words.append(f"up to {self.compare.tolerance:g} worse counts as no worse")
        if self.verdict == WITHIN_NOISE and (needed := self.found.needed) is not None:
            count = f"over {MOST_SEEDS:,}" if math.isinf(needed) else f"{needed:.0f}"
            words.append(f"needs {count} seeds")
        return ", ".join(words)

    @property
    def source(self) -> str:
        """Its rows."""
        if isinstance(self.found, Measured):
            assert isinstance(self.compare, OfRows)
            files = ", ".join(f"`{file}`" for file in self.compare.files)
            return f"{files}, {self.found.source}"
        return "computed in fp64" if isinstance(self.found, Found) else ""

    def __str__(self) -> str:
        if self.found is None:
            assert isinstance(self.compare, OfRows)
            if isinstance(self.compare, Load):
                return f"{self.compare.what}: no rows"
            return f"`{named(self.compare.own)}` over `{named(self.compare.other)}`: no rows"
        return self.found.words if isinstance(self.found, Found) else str(self.found)


@dataclass(frozen=True)
class Entry:
    """A line of the ledger.

    Attributes:
        scale: mini, full, or any.
    """

    paper: Paper
    claim: Claim
    scale: str
    check: Check
    findings: Sequence[Finding]

    @property
    def verdict(self) -> str:
        """As `bench.claims.verdict` says, of the comparisons that decide; with its scale."""
        if self.claim.not_runnable:
            return NOT_RUNNABLE
        if self.check.none:
            return OPEN
        found = combine([each.verdict for each in self.findings if each.compare.decides])
        return found if found == OPEN else found + self.suffix

    @property
    def suffix(self) -> str:
        """Of what a small experiment says."""
        return " (mini)" if self.scale == "mini" else ""


def evaluate(paper: Paper, claim: Claim, scale: str | None, evidence: Evidence) -> Entry:
    """The line of a claim.

    Args:
        scale: mini or full; None is full where all that decides has rows, else mini.

    Raises:
        ValueError: the premise of `not_runnable` does not hold, or rows cannot be compared.
    """
    if claim.premise:
        premise = EXACT[claim.premise]({each.of: each for each in claim.published})
        if not premise.holds:
            raise ValueError(
                f"{paper.name}.toml, {claim.id} is said not to be runnable, but its premise does "
                f"not hold: {premise.words}. Take not_runnable out."
            )
    if claim.any is not None:
        return Entry(paper, claim, "any", claim.any, findings(claim, claim.any, evidence))
    if scale is None:
        full = evaluate(paper, claim, "full", evidence)
        deciding = [each for each in full.findings if each.compare.decides]
        whole = bool(deciding) and all(each.found is not None for each in deciding)
        return full if whole else evaluate(paper, claim, "mini", evidence)
    check = claim.check(scale)
    return Entry(paper, claim, scale, check, findings(claim, check, evidence))


def findings(claim: Claim, check: Check, evidence: Evidence) -> list[Finding]:
    """What became of every comparison of a check."""
    numbers = {each.of: each for each in claim.published}
    made = []
    for compare in check.compare:
        if isinstance(compare, Exact):
            made.append(Finding(compare, EXACT[compare.function](numbers)))
            continue
        assert isinstance(compare, OfRows)
        half = claim.numbers(compare.effect).effect / 2 if compare.effect else 0.0
        made.append(Finding(compare, evidence.measure(compare), half))
    return made


def chosen(papers: dict[str, Paper], name: str | None) -> list[tuple[Paper, Claim]]:
    """The claims of a paper, the claim of that id, or all.

    Raises:
        ValueError: there is none of that name, with the nearest.
    """
    every = [(paper, claim) for paper in papers.values() for claim in paper.claim]
    if name is None:
        return every
    found = [(paper, claim) for paper, claim in every
             if paper.name == name.lower() or claim.id == name.upper()]  # fmt: skip
    if not found:
        raise ValueError(unknown("paper or claim", name, [*papers, *(c.id for _, c in every)]))
    return found


def entries(
    name: str | None = None, scale: str | None = None, results: Path = RESULTS
) -> list[Entry]:
    """The ledger from the rows below a folder.

    Raises:
        ValueError: for an unknown name, TOML that is not valid, and rows that cannot be compared.
    """
    evidence = Evidence(results)
    return [evaluate(*each, scale, evidence) for each in chosen(read_papers(), name)]


def lines(found: Sequence[Entry]) -> Iterator[str]:
    """The ledger as text; then how the rows came about, and the commands that make them."""
    for entry in found:
        claim = entry.claim
        yield f"{claim.id}  {entry.verdict}"
        yield f"    {entry.paper.title} (arXiv {entry.paper.arxiv}), {claim.where}: {claim.claim}"
        said = {
            "published": claim.published, "note": [claim.note], "reason": [claim.not_runnable],
            "no check": [entry.check.none],
        }  # fmt: skip
        for title, words in said.items():
            yield from (f"    {title:10} {word}" for word in words if word)
        for each in entry.findings:
            yield from finding_lines(entry, each)
        for deviation in (*entry.check.deviations, *shared_deviations(entry)):
            yield f"    deviation  {deviation}"
        if entry.check.commands:
            yield f"    commands   {', '.join(entry.check.commands)}"
        yield ""
    yield from recipes(each for entry in found for each in entry.findings)
    known = read_commands()
    for name in dict.fromkeys(name for entry in found for name in entry.check.commands):
        yield from ("", f"{name}: {known[name].about}", f"    {known[name].command}")


def finding_lines(entry: Entry, each: Finding) -> Iterator[str]:
    """One comparison."""
    role = "instead" if entry.claim.not_runnable else "found" if each.compare.decides else "beside"
    yield f"    {role:10} {each}".replace("`", "")
    if isinstance(each.found, Measured):
        about = (each.verdict + entry.suffix, each.threshold, each.source.replace("`", ""))
        yield f"               {'; '.join(word for word in about if word)}"


def shared_deviations(entry: Entry) -> Sequence[str]:
    """Of all mini checks of the paper by losses."""
    by_loss = any(isinstance(each, Loss | Buckets) for each in entry.check.compare)
    return entry.paper.deviations if entry.scale == "mini" and by_loss else ()


def recipes(findings: Iterable[Finding]) -> list[str]:
    """How the rows of each file came about, once."""
    return list(dict.fromkeys(
        f"{each.compare.rows}: {each.found.recipe}"
        for each in findings
        if isinstance(each.found, Measured) and isinstance(each.compare, OfRows)
    ))  # fmt: skip


def shown(entry: Entry) -> list[Finding]:
    """What a table has of an entry: what decides, all of it where nothing can."""
    everything = entry.claim.not_runnable or entry.verdict == OPEN
    return [each for each in entry.findings if each.compare.decides or everything]


def table(found: Sequence[Entry]) -> Table:
    """The ledger as a table; of one paper or of several."""
    body = []
    for entry in found:
        claim = entry.claim
        findings = shown(entry)
        here = [one_line(entry, each, alone=len(findings) == 1) for each in findings]
        if claim.not_runnable:
            here = [claim.not_runnable, *(f"ran instead: {words}" for words in here)]
            if not entry.findings:
                here.append("nothing was run instead")
        if entry.check.none:
            here.append(entry.check.none)
        sources = dict.fromkeys(each.source for each in findings if each.source)
        body.append([
            claim.id,
            f"{claim.claim} ({claim.where})",
            "; ".join(map(str, claim.published)) or "no number",
            "; ".join(here),
            f"**{entry.verdict}**",
            "; ".join(sources) or how(entry),
        ])  # fmt: skip
    header = ["claim", "what the paper says", "published", "found here", "verdict", "rows"]
    return Table(header, body, note(found), words=True)


def how(entry: Entry) -> str:
    """What makes rows that are not there, where something does."""
    return "none" if entry.check.none else f"`python -m bench.claims {entry.claim.id}` says how"


def one_line(entry: Entry, each: Finding, *, alone: bool) -> str:
    """A comparison in a cell; with its own verdict where the line's does not say it."""
    beside = "" if each.compare.decides or entry.claim.not_runnable else "beside: "
    words = [f"{beside}{each}", each.threshold]
    if isinstance(each.found, Measured) and (not alone or entry.claim.not_runnable):
        words.append(each.verdict + entry.suffix)
    return ", ".join(word for word in words if word)


def note(found: Sequence[Entry]) -> str:
    """How to read the table, how the rows came about, and what differs from the papers."""
    words = [
        "Positive, or above 1 time, is in the claim's favour; h is half of the published effect; "
        "95% intervals paired by seed, widened to the bootstrap over seeds and text where rows "
        "have one; not corrected for the number of claims",
        *recipes(each for entry in found for each in shown(entry)),
    ]
    for paper in {entry.paper.name: entry.paper for entry in found}.values():
        if any(shared_deviations(entry) for entry in found if entry.paper is paper):
            words.append(f"Losses here are of other runs than the paper's: "
                         f"{'; '.join(paper.deviations)}")  # fmt: skip
    words += [f"{entry.claim.id}: {'; '.join(entry.check.deviations)}"
              for entry in found if entry.check.deviations]  # fmt: skip
    return ". ".join(words) + "."
