"""What a paper says, held against what was measured.

A claim names a query of its study's `.sql` file. The query yields at most one row with the columns
`measured`, `n` (seeds behind it) and, where there is one, an interval `low` to `high`; or several, of which the
claim says by other columns which is its own.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from bnscale.trial import Refusal, near

if TYPE_CHECKING:
    from bnscale.query import Session


class Standing(StrEnum):
    """How sure we are that the paper says this number."""

    FOUND = "found"  # read in the paper or in a text that quotes it
    DIGITISED = "digitised"  # read off a figure
    CODE = "code"  # read in the authors' code
    MEMORY = "memory"  # not checked against the paper
    INFERRED = "inferred"  # ours, from what was found

    @property
    def mark(self) -> str:
        """What stands beside the number: `82 % (found)`, `69.7 % (≈, digitised)`."""
        return self.value if self in (Standing.FOUND, Standing.CODE) else f"≈, {self.value}"


class Verdict(StrEnum):
    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    NOT_ENOUGH_DATA = "not enough data"


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper. `paper`, `band` and what the query measures are in one unit.

    unit `%`: shares in [0, 1], as they are stored, written as per cent.
    unit `pt`: differences of two shares, in [-1, 1], written as signed percentage points.
    Any other unit is written behind the number as it stands; it may be empty.
    """

    sentence: str
    source: str  # "Frankle et al. 2021, abstract"
    query: str  # name in the study's .sql file
    paper: float | None  # None where the paper has no number, or none that was recovered
    unit: str
    band: tuple[float, float]  # measured numbers that count as reproduced, both ends included; inf allowed
    reason: str  # why this band
    standing: Standing
    needs: int  # least number of seeds
    row: Mapping[str, Any] = field(default_factory=dict)  # which row, where the query answers several claims

    def __post_init__(self) -> None:
        low, high = self.band
        if not low <= high:  # also refuses NaN
            raise Refusal(f"claim {self.query}: band {self.band}: must run from a number to a greater one")
        if self.standing not in set(Standing):
            raise Refusal(f"claim {self.query}: standing {self.standing!r}: must be one of {', '.join(Standing)}")
        if self.needs < 1:
            raise Refusal(f"claim {self.query}: needs {self.needs}: must be at least 1 seed; try 1")
        if self.paper is not None:
            self._in_unit("paper", self.paper)
        for end in self.band:
            if math.isfinite(end):
                self._in_unit("band", end)

    def _in_unit(self, name: str, value: float) -> None:
        least = {"%": 0, "pt": -1}.get(self.unit, -math.inf)
        most = {"%": 1, "pt": 1}.get(self.unit, math.inf)
        if not least - 1e-9 <= value <= most + 1e-9:  # a mean of shares of 1 may round to just above it
            raise Refusal(
                f"claim {self.query}: {name} {value:g}: with unit {self.unit!r} it must be a share between {least} and "
                f"{most}; {value:g} {self.unit} is {value / 100:g}"
            )

    def holds(self, measured: float) -> bool:
        """Whether this number would reproduce the claim."""
        return self.band[0] <= measured <= self.band[1]

    @property
    def paper_text(self) -> str:
        """`82 %`, with the digits the paper gave; a dash where there is no number to compare with."""
        return "–" if self.paper is None else _with_unit(_plain(self.paper, self.unit), self.unit)

    @property
    def standing_text(self) -> str:
        """How sure we are that the paper says it: of the number, or where there is none of the sentence."""
        mark = Standing(self.standing).mark
        return f"no number; {mark}" if self.paper is None else mark

    @property
    def band_text(self) -> str:
        """`78–86 %`, `at least 0 pt`."""
        low, high = (_plain(end, self.unit) for end in self.band)
        match (math.isfinite(self.band[0]), math.isfinite(self.band[1])):
            case (True, True):
                between = "–" if self.unit == "%" else " to "
                return _with_unit(low if low == high else f"{low}{between}{high}", self.unit)
            case (True, False):
                return _with_unit(f"at least {low}", self.unit)
            case (False, True):
                return _with_unit(f"at most {high}", self.unit)
            case _:
                return "any number"


@dataclass(frozen=True)
class Judged:
    """A claim and what was measured. `measured` stands even where there are too few seeds for a verdict."""

    claim: Claim
    measured: float | None
    low: float | None
    high: float | None
    n: int
    verdict: Verdict
    sql: str

    @property
    def digits(self) -> int:
        """Decimals of the measured number: few, but enough not to round it across an end of the band."""
        assert self.measured is not None
        value = self.measured * _scale(self.claim.unit)
        if self.claim.unit in ("%", "pt"):
            digits = 2 if 0 < abs(value) < 1 or 99 < abs(value) < 100 else 1
        else:
            digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        while digits < 12 and self.claim.holds(round(value, digits) / _scale(self.claim.unit)) != self.claim.holds(
            self.measured
        ):
            digits += 1
        return digits

    @property
    def measured_text(self) -> str:
        """`80.1 %`, or a dash."""
        if self.measured is None:
            return "–"
        return _with_unit(self._shown(self.measured), self.claim.unit)

    @property
    def interval_text(self) -> str:
        """`79.2–81.0`, in the unit of the measured number; empty where there is none."""
        if self.measured is None or self.low is None or self.high is None:
            return ""
        between = " to " if self.claim.unit == "pt" or self.low < 0 else "–"
        return between.join(map(self._shown, (self.low, self.high))).replace("-", "−")

    def _shown(self, value: float) -> str:
        """To the digits of the measured number; what needs a row of zeros, or more than six digits, as the paper's are
        written: 5.99e-05, 1.22e+10."""
        if self.claim.unit not in ("%", "pt") and abs(value) >= 1e6:
            return f"{value:.3g}"
        sign = "+" if self.claim.unit == "pt" else ""
        shown = f"{value * _scale(self.claim.unit):{sign}.{self.digits}f}"
        assert self.measured is not None
        tiny = self.claim.unit not in ("%", "pt") and 0 < abs(self.measured) < 1e-3
        return f"{float(shown):.6g}" if tiny else shown

    @property
    def n_text(self) -> str:
        """`5`, or `1 of 3` where three are needed."""
        return str(self.n) if self.n >= self.claim.needs else f"{self.n} of {self.claim.needs}"


def judge(claim: Claim, session: Session, queries: Mapping[str, Query]) -> Judged:
    """Runs the claim's query and compares. Raises `Refusal` where the query does not answer a claim."""
    sql = queries[claim.query].sql
    answer = session.sql(sql)
    absent = [name for name in ("measured", "n", *claim.row) if name not in answer.columns]
    if absent:
        raise Refusal(
            f"query {claim.query}: gives {', '.join(answer.columns)} and no {' or '.join(absent)}; "
            "the query of a claim selects measured and n, and may select low and high, and what tells its row"
        )
    rows = [row for row in answer.dicts() if claim.row.items() <= row.items()]
    if len(rows) > 1:
        raise Refusal(f"query {claim.query}: gives {len(rows)} rows; the query of a claim gives one; aggregate them")
    row = rows[0] if rows else {}
    measured, low, high = (_reading(claim, name, row.get(name)) for name in ("measured", "low", "high"))
    n = int(_reading(claim, "n", row.get("n")) or 0)
    if measured is not None:
        claim._in_unit("measured", measured)
    if measured is None or n < claim.needs:
        verdict = Verdict.NOT_ENOUGH_DATA
    else:
        verdict = Verdict.REPRODUCED if claim.holds(measured) else Verdict.NOT_REPRODUCED
    return Judged(claim, measured, low, high, n, verdict, sql)


def tally(judged: list[Judged]) -> dict[Verdict, int]:
    """How many claims have each verdict; verdicts that nobody has are there with 0."""
    counts = Counter(each.verdict for each in judged)
    return {verdict: counts[verdict] for verdict in Verdict}


def _reading(claim: Claim, name: str, value: Any) -> float | None:
    """A cell as a finite number. NULL, NaN and infinity are no numbers to judge by."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise Refusal(f"query {claim.query}: {name} {value!r}: must be a number; cast it")
    return float(value) if math.isfinite(value) else None


def _scale(unit: str) -> int:
    return 100 if unit in ("%", "pt") else 1


def _plain(value: float, unit: str) -> str:
    """Exactly the digits that were given: 0.82 in `%` is 82 and not 82.0."""
    shown = f"{value * _scale(unit):.6g}"
    return "+" + shown if unit == "pt" and value > 0 else shown


def _with_unit(number: str, unit: str) -> str:
    return f"{number.replace('-', '−')} {unit}".rstrip()  # a no-break space: a unit never stands alone on a line


# --- the study's .sql file ----------------------------------------------------------------------


class Query(NamedTuple):
    comment: str  # what it answers and its grain, without the dashes
    sql: str

    @property
    def text(self) -> str:
        """The SQL under its comment, as it stands in the file."""
        return "\n".join([f"-- {line}".rstrip() for line in self.comment.splitlines()] + [self.sql])


class Queries(dict[str, Query]):
    """Queries by name. A name that is not there raises `Refusal` with the nearest one that is."""

    def __missing__(self, name: str) -> Query:
        raise Refusal(
            f"query {name}: the study's .sql file has no such query{near(name, list(self))} "
            f"It has {', '.join(self) or 'none'}; write one under a line `-- name: {name}`"
        )


_HEAD = re.compile(r"--\s*name\s*:\s*(.*?)\s*", re.IGNORECASE)


def queries(text: str) -> Queries:
    """Reads a file of several queries, each under a line `-- name: accuracy_over_depth` and its comment.

    A query may select from another of the file, above or below it, as from a table: it gets that one as a CTE and so
    stands alone. Comments above the first name belong to the file. Raises `Refusal` for a name that is given twice or
    is not a name, for a name without SQL, for SQL without a name and for queries that need each other.
    """
    found = Queries()
    begun: dict[str, int] = {}
    name: str | None = None
    comment: list[str] = []
    sql: list[str] = []

    def close() -> None:
        statement = "\n".join(sql).strip().rstrip(";").rstrip()
        if name is None:
            if statement:
                raise Refusal(
                    f"SQL without a name before line {number}: write `-- name: what_it_answers` on the line above it"
                )
            return
        if not statement:
            raise Refusal(f"query {name} (line {begun[name]}): has no SQL; write it or take the name away")
        found[name] = Query("\n".join(comment).strip(), statement)

    number = 0
    for number, line in enumerate(text.splitlines(), start=1):
        head = _HEAD.fullmatch(line.strip())
        if head:
            close()
            name, comment, sql = head[1], [], []
            if not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
                raise Refusal(f"query {name!r} (line {number}): a name is lower-case letters, digits and underscores")
            if name in begun:
                raise Refusal(f"query {name}: named on line {begun[name]} and again on line {number}; rename one")
            begun[name] = number
        elif not sql and line.lstrip().startswith("--"):
            comment.append(line.strip().removeprefix("--").removeprefix(" "))
        elif sql or line.strip():
            sql.append(line.rstrip())
    close()
    return Queries({name: Query(query.comment, _alone(name, found)) for name, query in found.items()})


_TABLE = r"[a-z_][a-z0-9_]*(?:\s+as\s+[a-z_][a-z0-9_]*)?"
_FROM = re.compile(rf"\b(?:from|join)\s+({_TABLE}(?:\s*,\s*{_TABLE})*)")
_WITH = re.compile(r"with\s+(?!recursive\b)", re.IGNORECASE)


def _alone(name: str, found: Mapping[str, Query]) -> str:
    """The query with those it selects from as CTEs before its own, the ones that they need first."""
    needed: dict[str, str] = {}

    def gather(each: str, above: tuple[str, ...]) -> None:
        if each in above:
            raise Refusal(f"query {each}: needs itself by way of {', '.join(above)}; one of them must do without")
        tables = [table.split()[0] for named in _FROM.findall(found[each].sql) for table in named.split(",")]
        for other in dict.fromkeys(tables):
            if other in found and other not in needed and f"{other} as (" not in found[each].sql:
                gather(other, (*above, each))
                comment = [f"-- {line}" for line in found[other].comment.splitlines()]
                body = [f"    {line}".rstrip() for line in found[other].sql.splitlines()]
                needed[other] = "\n".join([*comment, f"{other} as (", *body, ")"])

    gather(name, ())
    sql = found[name].sql
    if not needed:
        return sql
    own = _WITH.match(sql)
    ctes = ",\n\n".join(needed.values())
    return f"with\n{ctes},\n\n{sql[own.end() :]}" if own else f"with\n{ctes}\n\n{sql}"
