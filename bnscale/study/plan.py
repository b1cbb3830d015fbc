"""From a preset to trials, and from trials to those that answer: of chosen nuisance axes, and of searches."""

import itertools
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnscale.study.declare import MOST, Preset, once
from bnscale.study.search import Bracket
from bnscale.trial import Data, Pixels, Refusal, Trial, near, parse

if TYPE_CHECKING:
    from bnscale.query import Session


@dataclass(frozen=True)
class Planned:
    """A trial with its place in a study."""

    trial: Trial
    cell: str  # "depth=14 trainable=bn": the scientific axes
    nuisance: str  # "lr=0.1"


def plan(preset: Preset, pixels: Callable[[Data], Pixels]) -> list[Planned]:
    """Every trial of a preset, each once. Raises `Refusal` for the first that cannot be run.

    `pixels` says of a data set whether its images on this machine went through JPEG. A trial that trains nothing
    has no use for a nuisance axis or a search: it is planned once, at the first value. Of a search, these are the
    trials at all its values.
    """
    if preset.combinations > MOST:
        raise Refusal(f"grid: has {preset.combinations:,} trials; {MOST:,} at most; narrow it with --set")
    axes, nuisances = preset.axes, preset.nuisances
    own = {cell[preset.chosen] for cell in preset.cells if preset.chosen in cell}
    names, choices = ([preset.chosen], len(own)) if len(own) > 1 else (nuisances, len(preset.nuisance))
    planned: dict[str, Planned] = {}
    known = lru_cache(pixels)
    tuned = [(cell, nuisance) for cell in preset.cells for nuisance in preset.tuned(cell)]
    for (cell, nuisance), seed, place in itertools.product(tuned, preset.seeds, preset.searched):
        if cell.get("seed", seed) != seed:
            continue
        trial = _trial(preset.fields(cell, nuisance, seed, place), known)
        if choices > 1 and not trial.validation:
            raise Refusal(
                f"validation 0: {', '.join(names)} has {choices} values and no training images are "
                "held out to choose among them, and test images choose nothing; hold some out with "
                f"--set validation=..., or narrow with --set {names[0]}=..."
            )
        planned.setdefault(trial.id, Planned(trial, _said(trial, axes), _said(trial, nuisances)))
    return list(planned.values())


def sample(preset: Preset, pixels: Callable[[Data], Pixels], count: int) -> list[Trial]:
    """So many trials out of a preset of any size. Raises `Refusal` for the first of them that cannot be run."""
    return [_trial(values, pixels) for values in preset.sample(count)]


def _trial(values: dict[str, Any], pixels: Callable[[Data], Pixels]) -> Trial:
    data = values.get("data")
    return Trial(**({"pixels": pixels(data) if isinstance(data, Data) else Pixels.ORIGINAL} | values))


def _said(trial: Trial, names: list[str]) -> str:
    return " ".join(f"{name}={getattr(trial, name)}" for name in names)


@dataclass(frozen=True)
class Search:
    """One search for the largest value of an axis that trains: of one cell and seed."""

    axis: str
    ladder: list[Planned]  # at every value of the axis, rising
    known: dict[int, bool]  # of those with a result, whether they train

    @property
    def bracket(self) -> Bracket:
        return Bracket.of(self.known, len(self.ladder))

    @property
    def next(self) -> list[Planned]:
        return [self.ladder[place] for place in self.bracket.open]

    @property
    def planned(self) -> list[Planned]:
        """What has been tried, and what comes next."""
        return [self.ladder[place] for place in sorted({*self.known, *self.bracket.open})]

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """The largest value known to train and the smallest above it known not to; None where there is none."""
        values = [getattr(each.trial, self.axis) for each in self.ladder]
        bracket = self.bracket
        return (
            values[bracket.trains] if bracket.trains >= 0 else None,
            values[bracket.fails] if bracket.fails < len(values) else None,
        )


def searches(planned: Iterable[Planned], axis: str, verdicts: Mapping[str, bool]) -> list[Search]:
    """Trials that differ in one axis alone belong to one search. `verdicts`: whether a trial trains, by its id."""
    ladders: dict[Trial, list[Planned]] = defaultdict(list)
    for each in sorted(planned, key=lambda each: getattr(each.trial, axis)):
        ladders[each.trial.model_copy(update={axis: None})].append(each)
    return [
        Search(axis, ladder, {i: verdicts[each.trial.id] for i, each in enumerate(ladder) if each.trial.id in verdicts})
        for ladder in ladders.values()
    ]


def settings(texts: Iterable[str]) -> dict[str, list[Any]]:
    """`depth=14,32` to a field and its values, each once. Raises `Refusal` for what is no field."""
    fields = list(Trial.model_fields)
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals:
            raise Refusal(f"--set {text}: must be field=value or field=value,value; for example --set depth=14,32")
        if name not in fields:
            raise Refusal(f"--set {name}: no such field{near(name, fields)} The fields of a trial: {', '.join(fields)}")
        if name in found:
            raise Refusal(f"--set {name}: given twice; give all its values at once: --set {name}=value,value")
        parsed = (parse(Trial, name, value.strip()) for value in values.split(",") if value.strip())
        found[name] = once(f"--set {name}", parsed)
    return found


def commit(folder: Path) -> str | None:
    """Git commit of the code in `folder`, with a `+` where it was changed since; None outside of git.

    A node of a cluster is sent neither the history nor every file: there a `+` says that a file of those it has is not
    what git was told last, by `git commit` or `git add`.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout

    try:
        head = git("rev-parse", "HEAD").strip()
        try:
            changed = bool(git("status", "--porcelain", "-uno").strip())
        except subprocess.CalledProcessError:  # what HEAD names is not here
            modified, missing = (
                git("ls-files", "--full-name", f"--{which}", ":/") for which in ("modified", "deleted")
            )
            changed = bool(set(modified.splitlines()) - set(missing.splitlines()))
        return head + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


CHOSEN = """
with
-- one row per finished trial: what it reached at its last step
final as (
    select
        trial,
        arg_max_null(accuracy, curve.step) filter (where split = 'validation') as held_out,
        arg_max_null(loss, curve.step) filter (where split = 'validation') as held_out_loss,
        arg_max_null(accuracy, curve.step) filter (where split = 'test') as test
    from curve
    join trials using (trial)
    where outcome = 'finished'
    group by trial
),

-- one row per cell and value of the nuisance axes that has a result
tried as (
    select
        cell,
        nuisance,
        count(*) filter (where outcome in ('finished', 'diverged')) as n_results,
        count(*) filter (where outcome = 'diverged') as n_diverged,
        avg(held_out) as held_out,
        avg(held_out_loss) as held_out_loss
    from plan
    left join trials using (trial)
    left join final using (trial)
    group by cell, nuisance
    having n_results > 0
),

-- one row per cell: a value with results for more seeds comes first, for means over different seeds do not compare;
-- then one at which no seed diverged, then the best on held-out training images: a regression has a loss alone
best as (
    select
        cell,
        first(
            nuisance
            order by
                n_results desc,
                n_diverged = 0 desc,
                held_out desc nulls last,
                case when held_out is null then held_out_loss end nulls last,
                nuisance
        ) as nuisance
    from tried
    group by cell
)

-- one row per trial whose nuisance axes were chosen and which has a result; accuracy is null where it diverged
select
    trial,
    nuisance,
    test as accuracy
from plan
join best using (cell, nuisance)
join trials using (trial)
left join final using (trial)
where outcome in ('finished', 'diverged')
order by trial
"""


def relate(session: "Session", planned: list[Planned]) -> None:
    """Give a session the study's own two tables: `plan`, all its trials, and `chosen`, the ones that answer,
    with their test accuracy at the end.

    `chosen` is decided on held-out training images alone; where a nuisance axis has one value, by that.
    """
    columns = {name: [getattr(each, name) for each in planned] for name in ("cell", "nuisance")}
    session.relate("plan", {"trial": [each.trial.id for each in planned]} | columns)
    answer = session.sql(CHOSEN)
    chosen = {name: [row[i] for row in answer.rows] for i, name in enumerate(answer.columns)}
    session.relate("chosen", chosen, dict(zip(answer.columns, answer.types, strict=True)))


def verdicts(session: "Session", query: str, sql: str) -> dict[str, bool]:
    """Whether a trial trains, by its id, as a study's own query has it: one row per trial with a result.

    Raises `Refusal` for a query that answers something else. A trial of which it says NULL has no verdict.
    """
    answer = session.sql(sql)
    kinds = dict(zip(answer.columns, answer.types, strict=True))
    if kinds.get("trial") != "VARCHAR" or kinds.get("trains") != "BOOLEAN":
        said = ", ".join(f"{name} {kind.lower()}" for name, kind in kinds.items())
        raise Refusal(f"query {query}: gives {said}; the query of a search selects trial and trains, a boolean")
    found: dict[str, bool] = {}
    for row in answer.dicts():
        if found.setdefault(row["trial"], row["trains"]) is not row["trains"]:
            raise Refusal(f"query {query}: says of {row['trial']} that it trains and that it does not; aggregate it")
    return {trial: trains for trial, trains in found.items() if trains is not None}


def relate_searches(session: "Session", found: list[Search]) -> None:
    """Give a session two more tables: `tried`, the trials of searches that have a verdict, and `bracket`, how far each
    search is; its `trial` is one of the search, to join `trials` with.

    A search that has not begun has a row too, or else what has begun would look like all there is: its ends are NULL,
    it is not settled, and its trial is the one to come.
    """
    tried = [(search.ladder[place], trains) for search in found for place, trains in search.known.items()]
    session.relate(
        "tried",
        {
            "trial": [each.trial.id for each, _ in tried],
            "trains": [trains for _, trains in tried],
        },
        {"trains": "boolean"},
    )
    ends = [search.ends for search in found]
    session.relate(
        "bracket",
        {
            "trial": [
                (search.ladder[max(search.known)] if search.known else search.next[0]).trial.id for search in found
            ],
            "trains": [trains for trains, _ in ends],
            "fails": [fails for _, fails in ends],
            "settled": [not search.next for search in found],
        },
        {"trains": "double", "fails": "double", "settled": "boolean"},
    )
