"""Papers and their claims as TOML files in this folder, read strictly.

    carope.toml  cmha.toml  rcmha.toml  moh.toml  rope_scaling.toml     a paper each
    commands.toml                                                       what makes the rows

A paper has `title`, `arxiv`, `source`, deviations that all of its mini checks by losses share, and
claims. A claim has `id`, `claim` in our words, `where` the paper makes it, numbers as `published`,
and either `mini` and `full` checks or one at `any` scale. A check names commands of commands.toml
and compares; what cannot be checked says `none`, and why. `not_runnable` is why the claim cannot be
tested as its paper states it: then the checks are what was run instead, and decide nothing.

A comparison is one of `KINDS`, by its key `kind`:

    loss      losses of two methods, paired by seed: rows of kind perplexity or run
    buckets   losses of one model under two scalings of RoPE, paired by text and positions
    ratio     two timings or sizes
    load      the least used heads of a router under two weights of its balance loss, by seed
    exact     a function of `bench.claims.exact`, computed when it is asked

Every key that is not known here is an error that names the nearest.
"""

import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from posenc.errors import unknown

from ..comparison import MATCHES
from ..rows import COLUMNS
from .exact import EXACT

FOLDER = Path(__file__).parent
COMMANDS = "commands.toml"

#: Units of published numbers: whether less is better, and whether effects are logarithms of ratios.
UNITS = {
    "perplexity": (True, True), "nats": (True, False), "tokens/s": (False, True),
    "M tokens/s": (False, True), "ms": (True, True), "GB": (True, True),
    "points": (False, False), "share": (False, False), "count": (False, False),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Published:
    """Numbers of a paper: the method's and what it is compared with.

    Attributes:
        of: what they are of, by which comparisons call them.
    """

    of: str
    own: float
    other: float | None = None
    unit: str

    @property
    def effect(self) -> float:
        """In the claim's favour: a difference, or the logarithm of a ratio (of perplexities: nats).
        Of numbers that have an `other`.
        """
        assert self.other is not None
        less, logarithmic = UNITS[self.unit]
        gain = math.log(self.own / self.other) if logarithmic else self.own - self.other
        return -gain if less else gain

    def __str__(self) -> str:
        if self.other is None:
            return f"{self.of}: " + (f"{self.own:.1%}" if self.unit == "share" else f"{self.own:g}")
        return f"{self.of}: {self.own:g} against {self.other:g} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What all kinds share.

    Attributes:
        decides: whether the verdict depends on it, or it is shown beside.
    """

    decides: bool = True


@dataclass(frozen=True, kw_only=True)
class OfRows(Compare):
    """What is measured.

    Attributes:
        rows: a file below bench/results.
        effect: the published numbers that it is held against, by their `of`; none where they are in
            no unit that rows have: then h is 0.
        tolerance: m, see `bench.claims.verdict`.
    """

    units: ClassVar[tuple[str, ...]]
    rows: str
    own: Any
    other: Any
    effect: str = ""
    tolerance: float = 0.0

    @property
    def files(self) -> Sequence[str]:
        """All that it reads."""
        return (self.rows,)


@dataclass(frozen=True, kw_only=True)
class Loss(OfRows):
    """Losses of two methods, by label; paired by seed.

    Attributes:
        protocol: the mode of the rows.
        length: in training contexts.
    """

    units: ClassVar[tuple[str, ...]] = ("perplexity", "nats")
    own: str
    other: str
    match: str = "tokens"
    protocol: Literal["windows", "sliding", "tail", "evaluate"] = "windows"
    length: int = 1


@dataclass(frozen=True, kw_only=True)
class Buckets(OfRows):
    """Losses at positions beyond so many training lengths, of two scalings."""

    units: ClassVar[tuple[str, ...]] = ("perplexity", "nats")
    own: str
    other: str
    beyond: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Ratio(OfRows):
    """Two measured quantities: rows whose columns have these values; the last of a file counts."""

    units: ClassVar[tuple[str, ...]] = ("tokens/s", "M tokens/s", "ms", "GB")
    better: Literal["higher", "lower"]
    both: Mapping[str, Any]
    own: Mapping[str, Any]
    other: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Load(OfRows):
    """The load of the least used head of a router under two weights of its balance loss.

    Attributes:
        of: a method, by label.
        own, other: the weights.
        other_rows: where the other's are, which another command makes.
    """

    units: ClassVar[tuple[str, ...]] = ()
    of: str
    own: float
    other: float
    other_rows: str
    match: str = "tokens"

    @property
    def files(self) -> Sequence[str]:
        return (self.rows, self.other_rows)

    @property
    def what(self) -> str:
        """What is compared."""
        return (
            f"least load of a head of `{self.of}` under {self.own:g} over that under {self.other:g}"
        )


@dataclass(frozen=True, kw_only=True)
class Exact(Compare):
    """A function of `bench.claims.exact`."""

    function: str


KINDS: dict[str, type[Compare]] = {
    "loss": Loss, "buckets": Buckets, "ratio": Ratio, "load": Load, "exact": Exact,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is run at one scale.

    Attributes:
        commands: that make the rows, by their names in commands.toml.
        none: why there is no such check.
        deviations: from the paper.
    """

    commands: Sequence[str] = ()
    none: str = ""
    deviations: Sequence[str] = ()
    compare: Sequence[Compare] = ()


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim.

    Attributes:
        note: what else is known.
        premise: a function of `bench.claims.exact` that must hold where the claim is said not to be
            runnable.
    """

    id: str
    claim: str
    where: str
    published: Sequence[Published] = ()
    note: str = ""
    not_runnable: str = ""
    premise: str = ""
    mini: Check | None = None
    full: Check | None = None
    any: Check | None = None

    def numbers(self, of: str) -> Published:
        """The published ones of that name."""
        return next(each for each in self.published if each.of == of)

    def check(self, scale: str) -> Check:
        """At that scale, mini or full."""
        found = self.any or (self.mini if scale == "mini" else self.full)
        assert found is not None
        return found


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A file."""

    title: str
    arxiv: str
    source: str
    deviations: Sequence[str] = ()  # of every mini check
    claim: Sequence[Claim]
    name: str = field(default="")  # the file's


@dataclass(frozen=True, kw_only=True)
class Command:
    """What makes a file of rows.

    Attributes:
        about: what it takes.
        rows: the file, below bench/results.
    """

    about: str
    command: str
    rows: str


def built(kind: type[Any], values: Any, where: str) -> Any:
    """A dataclass of a TOML table.

    Raises:
        ValueError: for keys that are unknown, missing or of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a table; got {values!r}.")
    if kind is Compare:
        values = dict(values)
        name = values.pop("kind", None)
        if name not in KINDS:
            raise ValueError(f"{where}: {unknown('kind of a comparison', name, KINDS)}")
        kind = KINDS[name]
    hints = get_type_hints(kind)
    known = {each.name: each for each in fields(kind) if (kind, each.name) != (Paper, "name")}
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: {unknown('key', key, known)}")
    for name, each in known.items():
        if each.default is MISSING and name not in values:
            raise ValueError(f"{where}: the key {name!r} is missing. It has {sorted(values)}.")
    return kind(**{
        key: typed(hints[key], value, f"{where}, {key}") for key, value in values.items()
    })  # fmt: skip


def typed(hint: Any, value: Any, where: str) -> Any:
    """A value of an annotated type; ValueError for others."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (hint,) = (each for each in inner if each is not type(None))
        return typed(hint, value, where)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{where}: {unknown('value', value, inner)}")
        return value
    if origin is not None and issubclass(origin, Sequence):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list; got {value!r}.")
        return [typed(inner[0], each, f"{where} {i}") for i, each in enumerate(value, start=1)]
    if hint in (Published, Compare, Check, Claim):
        return built(hint, value, where)
    kinds: Any = {float: (int, float), Mapping[str, Any]: dict}.get(hint, hint)
    if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where} must be {getattr(hint, '__name__', hint)}; got {value!r}.")
    return value


def load(path: Path) -> Any:
    """The TOML of a file; ValueError for one that is none, naming it."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no TOML: {error}") from error


def read_commands(folder: Path = FOLDER) -> dict[str, Command]:
    """Those of commands.toml by name."""
    found = load(folder / COMMANDS)
    return {name: built(Command, each, f"{COMMANDS}, {name}") for name, each in found.items()}


def read_papers(folder: Path = FOLDER) -> dict[str, Paper]:
    """Every paper of a folder by the name of its file.

    Raises:
        ValueError: for keys, names or combinations that cannot be, naming file and claim.
    """
    commands, papers, seen = read_commands(folder), {}, dict[str, str]()
    for path in sorted(folder.glob("*.toml")):
        if path.name == COMMANDS:
            continue
        paper = built(Paper, load(path), path.name)
        for claim in paper.claim:
            where = f"{path.name}, {claim.id}"
            if claim.id in seen:
                raise ValueError(f"{where}: {seen[claim.id]} has a claim of this id. Rename one.")
            seen[claim.id] = path.name
            check_claim(claim, commands, where)
        papers[path.stem] = Paper(**{**vars(paper), "name": path.stem})
    return papers


def check_claim(claim: Claim, commands: Mapping[str, Command], where: str) -> None:
    """Raise ValueError where the parts of a claim do not fit together."""
    if (claim.any is None) == (claim.mini is None) or (claim.mini is None) != (claim.full is None):
        raise ValueError(f"{where} needs the checks mini and full, or one that is any.")
    for each in claim.published:
        if each.unit not in UNITS:
            raise ValueError(f"{where}: {unknown('unit', each.unit, UNITS)}")
    if claim.premise and not claim.not_runnable:
        raise ValueError(f"{where}: a premise is of not_runnable. Give both, or neither.")
    if claim.premise and claim.premise not in EXACT:
        raise ValueError(f"{where}: {unknown('premise', claim.premise, EXACT)}")
    for scale in ("mini", "full", "any"):
        check = getattr(claim, scale)
        if check is not None:
            check_check(check, claim, commands, f"{where}, {scale}")


def check_check(check: Check, claim: Claim, commands: Mapping[str, Command], where: str) -> None:
    """Raise ValueError where a check is not whole."""
    if bool(check.none) == bool(check.compare):
        raise ValueError(f"{where} needs comparisons, or the reason why there is none.")
    if not claim.not_runnable and not check.none and not any(c.decides for c in check.compare):
        raise ValueError(f"{where}: no comparison decides. Let at least one.")
    for name in check.commands:
        if name not in commands:
            raise ValueError(f"{where}: {unknown('command', name, commands)}")
    made = {commands[name].rows for name in check.commands}
    for each in check.compare:
        if isinstance(each, Exact):
            if each.function not in EXACT:
                raise ValueError(f"{where}: {unknown('function', each.function, EXACT)}")
            continue
        assert isinstance(each, OfRows)
        if each.decides and (lacking := [file for file in each.files if file not in made]):
            raise ValueError(
                f"{where}: no command of it makes the rows {lacking[0]!r}; its commands make "
                f"{sorted(made)}. Name the command."
            )
        check_effect(each, claim, where)
        if isinstance(each, Loss | Load) and each.match not in MATCHES:
            raise ValueError(f"{where}: {unknown('match', each.match, MATCHES)}")
        if isinstance(each, Ratio):
            for column, value in (*each.both.items(), *each.own.items(), *each.other.items()):
                if column not in COLUMNS:
                    raise ValueError(f"{where}: {unknown('column', column, COLUMNS)}")
                kinds: Any = get_args(COLUMNS[column]) or COLUMNS[column]
                if not isinstance(value, kinds):
                    raise ValueError(f"{where}: {column} must be {COLUMNS[column]}; got {value!r}.")


def check_effect(compare: OfRows, claim: Claim, where: str) -> None:
    """Raise ValueError where there is no such effect, or none in the claim's favour."""
    if compare.tolerance < 0:
        raise ValueError(f"{where}: tolerance must be 0 or more; got {compare.tolerance}.")
    if not compare.effect:
        return
    names = [each.of for each in claim.published]
    if compare.effect not in names:
        raise ValueError(f"{where}: {unknown('effect', compare.effect, names)}")
    numbers = claim.numbers(compare.effect)
    if numbers.unit not in compare.units:
        raise ValueError(
            f"{where}: {compare.effect!r} is in {numbers.unit}; rows of this kind are held against "
            f"{', '.join(compare.units) or 'no published number'}. Leave effect out."
        )
    if numbers.other is None:
        raise ValueError(f"{where}: {compare.effect!r} has no `other` to compare with. Give it.")
    if numbers.effect <= 0:
        raise ValueError(f"{where}: {numbers} is not in the claim's favour. Exchange the two.")
