"""A study as a user asked for it: at one size, with some axes set, for one store; checked before anything starts."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from bnscale import data, query, report
from bnscale.engine.machine import in_bytes, release_memory
from bnscale.networks.workers import check
from bnscale.probes import TABLES, looking
from bnscale.probes import check as check_probe
from bnscale.schedule import budget
from bnscale.schedule.budget import Forecast
from bnscale.storage import storage
from bnscale.store import Manifest, Store
from bnscale.study.declare import MANY, MOST, Preset, Study
from bnscale.study.plan import Planned, Search, plan, relate, relate_searches, sample, searches, settings, verdicts
from bnscale.study.search import Bisection
from bnscale.train import readings
from bnscale.trial import Refusal, Trial

SAMPLE = 8  # trials that stand for a grid too large to build


@dataclass(frozen=True)
class Asked:
    """A study at one size, with everything checked that can be checked without starting anything."""

    study: Study
    preset: str
    note: str
    search: Bisection | None
    grid: list[Planned]  # every trial, of a search those at all its values
    searches: list[Search]  # as far as the store had them when it was read
    merged: int  # cells that turned out to be a trial of another cell
    axes: list[str]
    sets: list[str]  # what --set said
    store: str  # absolute path, or the address of a bucket
    data: Path
    file: Path
    words: list[str]  # the command that runs it
    most: int  # trials that it may have

    @classmethod
    def of(
        cls,
        study: Study,
        file: Path,
        preset: str,
        sets: Sequence[str] | None,
        store: str | Path,
        folder: Path | None,
        most: int = MOST,
    ) -> "Asked":
        """Raises `Refusal` for the first thing in it that cannot be run, and for more than `most` trials, of which it
        builds none."""
        grid = preset_of(study, preset, sets)
        folder = folder_of(folder)
        if grid.trials > most:
            also = f", and more than {MOST:,} not at all" if grid.trials > MOST else ""
            raise Refusal(
                f"grid: has {cost_of(study, grid, folder)}; more than {MANY:,} are trained only with --yes{also}; "
                "narrow it with --set, for example --set seed=0"
            )
        every = plan(grid, lambda each: data.pixels(each, folder))
        for each in every:
            for probe in looking(study.probes, each.trial):
                check_probe(probe, each.trial)
        words = ["--preset", preset, *(word for each in sets or [] for word in ("--set", each)), "--store", str(store)]
        if any(each.trial.data.has_files for each in every):
            words += ["--data", str(folder)]
        asked = cls(
            study=study,
            preset=preset,
            note=grid.note,
            search=grid.search,
            grid=every,
            searches=[],
            merged=grid.combinations - len(every),
            axes=grid.axes,
            sets=list(sets or []),
            store=storage(store).url,
            data=folder,
            file=file,
            words=["python", str(here(file)), "run", *words],
            most=most,
        )
        return asked.again()

    def again(self) -> "Asked":
        """The same, with its searches as far as the store has them now."""
        if self.search is None:
            return self
        return replace(self, searches=self._searches(self.search, self._open() if is_store(self.store) else None))

    @property
    def recipe(self) -> list[str]:
        """The command that runs it, on whichever store and machine: no path in it is absolute."""
        words = list(self.words)
        for option in ("--store", "--data"):
            if option in words:
                at = words.index(option)
                del words[at : at + 2]
        file = here(self.file)
        return [word if word != str(file) else file.name for word in words] if file.is_absolute() else words

    @property
    def planned(self) -> list[Planned]:
        """The trials that answer; of a search, what has been tried and what comes next."""
        return self.grid if self.search is None else [each for search in self.searches for each in search.planned]

    @property
    def later(self) -> list[tuple[Planned, int]]:
        """Of each search that is open: its next trial, and how many like it may yet follow that one."""
        return [(each, search.bracket.rounds - 1) for search in self.searches for each in search.next]

    @property
    def round(self) -> str:
        """`round 3 of at most 5`: the same round whoever trained those before it."""
        assert self.search is not None
        left = max((search.bracket.rounds for search in self.searches), default=0)
        return f"round {self.search.rounds - left + 1} of at most {self.search.rounds}"

    @property
    def folder(self) -> Path:
        """Where this machine writes its report: in the store, or below the working directory for a bucket."""
        place = storage(self.store)
        return (Path.cwd() if place.far else place.reach) / self.report_key

    @property
    def report_key(self) -> str:
        """Where in the store it goes."""
        return f"reports/{self.study.name}-{self.preset}"

    def session(self) -> query.Session:
        """SQL over the store, with the study's tables `plan` and `chosen`; with a search `tried` and `bracket` too.

        Where --set names the values of a search, the trials at these have its tables.
        """
        session = self._open()
        relate(session, self.planned)
        declared = self.study.preset(self.preset).search
        if declared:
            relate_searches(session, self._searches(declared, session))
        return session

    def _open(self) -> query.Session:
        return query.open(self.store, TABLES)

    def _searches(self, search: Bisection, session: query.Session | None) -> list[Search]:
        sql = report.queries(self.file.with_suffix(".sql").read_text())[search.verdict].sql
        return searches(self.grid, search.axis, verdicts(session, search.verdict, sql) if session else {})

    def forecasts(self, workers: int, threads: int, *, gpu: bool) -> dict[str, Forecast]:
        """By trial id. Times a few steps on this machine, the first time."""
        return {each.trial.id: self.forecast(each.trial, workers, threads, gpu=gpu) for each in self.planned}

    def forecast(self, trial: Trial, workers: int, threads: int, *, gpu: bool, members: int = 1) -> Forecast:
        """Of one of its trials, or of a pass of so many like it."""
        pace = self.pace(threads, gpu=gpu)
        return budget.forecast(trial, looking(self.study.probes, trial), pace, workers, gpu=gpu, members=members)

    def pace(self, threads: int, *, gpu: bool) -> budget.Pace:
        """Of this machine, on its GPU where the trials have some and it has one."""
        return _pace(torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu"), threads)

    def at(self, preset: str) -> "Asked":
        """The same at another size."""
        return Asked.of(self.study, self.file, preset, self.sets, self.store, self.data, self.most)

    def prepare(self, workers: int) -> None:
        """Fetch what data are not there. Raises `Refusal` where that cannot be, and for what a gang cannot do."""
        for each in self.planned:
            check(each.trial, workers)
        for each in {planned.trial.data: planned for planned in self.planned}.values():
            data.prepare(each.trial, self.data)
        release_memory()  # this process outlives the study's workers, and trains nothing

    def begun(self, store: Store | None) -> list[Manifest]:
        """What the store knows of its trials."""
        if store is None:
            return []
        found = store.storage.each(store.manifest, [each.trial.id for each in self.planned])
        return [manifest for manifest in found if manifest]

    def left(self, store: Store, *, asha: bool = False) -> list[Trial]:
        """Trials that have no result yet, or none with the readings that this study needs; with `asha`, without those
        that successive halving has given up. Raises `Refusal` where what the store knows of one is damaged.
        """
        planned = {each.trial.id for each in self.planned}
        found = store.known(planned)
        for trial_id, wrong in store.damaged:
            if trial_id in planned:
                raise Refusal(wrong)

        def done(trial: Trial) -> bool:
            manifest = found.get(trial.id)
            if manifest is None:
                return False
            return manifest.covers(readings(looking(self.study.probes, trial))) or (
                asha and bool(manifest.facts.get("stopped_early"))
            )

        return [each.trial for each in self.planned if not done(each.trial)]


def preset_of(study: Study, name: str, sets: Sequence[str] | None) -> Preset:
    """One of a study's presets with some axes set."""
    preset = study.preset(name)
    for axis, values in settings(sets or []).items():
        preset = preset.setting(axis, values)
    return preset


def folder_of(data_sets: Path | None) -> Path:
    return (data_sets or data.default_folder()).expanduser().resolve()


def cost_of(study: Study, grid: Preset, folder: Path) -> str:
    """`10,000,000 trials, about 6,400 hours of one worker and 12 TiB of disk, by 8 of them`: for more trials than there
    is a reason to build. Times a few steps on this machine."""
    drawn = sample(grid, lambda each: data.pixels(each, folder), SAMPLE)
    gpu = torch.cuda.is_available()
    pace = _pace(torch.device("cuda" if gpu else "cpu"), 1)
    cost = budget.total(budget.forecast(each, looking(study.probes, each), pace, 1, gpu=gpu) for each in drawn)
    share = grid.trials / len(drawn)
    return (
        f"{grid.trials:,} trials, about {cost.seconds * share / 3600:,.0f} hours of one worker and "
        f"{in_bytes(round(cost.disk * share))} of disk, by {len(drawn)} of them"
    )


@lru_cache
def _pace(device: torch.device, threads: int) -> budget.Pace:
    """What was timed once is not timed again."""
    return budget.Pace(device, threads)


def is_store(url: str) -> bool:
    return storage(url).holds("manifests")


def store_there(url: str) -> Store | None:
    """To look into; None for a folder that holds none. An empty bucket has no trial."""
    return Store(url) if storage(url).far else Store.existing(url) if is_store(url) else None


def here(path: Path) -> Path:
    """As short as it can be said from the working directory."""
    with suppress(ValueError):
        return path.resolve().relative_to(Path.cwd())
    return path
