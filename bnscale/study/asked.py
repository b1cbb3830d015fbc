"""A study as a user asked for it: at one size, with some axes set, for one store; checked before anything starts."""

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from bnscale import data, query
from bnscale.networks.workers import check
from bnscale.probes import TABLES
from bnscale.probes import check as check_probe
from bnscale.schedule import budget
from bnscale.schedule.budget import Forecast
from bnscale.store import Store
from bnscale.study.declare import Study
from bnscale.study.plan import Planned, plan, relate, settings
from bnscale.train import readings
from bnscale.trial import Refusal, Trial


@dataclass(frozen=True)
class Asked:
    """A study at one size, with everything checked that can be checked without starting anything."""

    study: Study
    preset: str
    note: str
    planned: list[Planned]
    merged: int  # cells that turned out to be a trial of another cell
    axes: list[str]
    sets: list[str]  # what --set said
    store: Path
    data: Path
    file: Path
    words: list[str]  # the command that runs it

    @classmethod
    def of(
        cls, study: Study, file: Path, preset: str, sets: Sequence[str] | None, store: Path, folder: Path | None
    ) -> "Asked":
        """Raises `Refusal` for the first thing in it that cannot be run."""
        grid = study.preset(preset)
        for axis, values in settings(sets or []).items():
            grid = grid.setting(axis, values)
        folder = (folder or data.default_folder()).expanduser().resolve()
        planned = plan(grid, lambda each: data.pixels(each, folder))
        for each, probe in itertools.product(planned, study.probes):
            check_probe(probe, each.trial)
        words = ["--preset", preset, *(word for each in sets or [] for word in ("--set", each)), "--store", str(store)]
        if any(each.trial.data.has_files for each in planned):
            words += ["--data", str(folder)]
        return cls(
            study=study,
            preset=preset,
            note=grid.note,
            planned=planned,
            merged=len(grid.scientific) * len(grid.nuisance) * len(grid.seeds) - len(planned),
            axes=grid.axes,
            sets=list(sets or []),
            store=store.resolve(),
            data=folder,
            file=file,
            words=["python", str(here(file)), "run", *words],
        )

    @property
    def folder(self) -> Path:
        """Where its report goes."""
        return self.store / "reports" / f"{self.study.name}-{self.preset}"

    def session(self) -> query.Session:
        """SQL over the store, with the study's tables `plan` and `chosen`."""
        session = query.open(self.store, TABLES)
        relate(session, self.planned)
        return session

    def forecasts(self, workers: int, threads: int, *, gpu: bool) -> dict[str, Forecast]:
        """By trial id. Times a few steps on this machine."""
        device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
        pace = budget.Pace(device, threads)
        return {
            each.trial.id: budget.forecast(each.trial, self.study.probes, pace, workers, gpu=gpu)
            for each in self.planned
        }

    def at(self, preset: str) -> "Asked":
        """The same at another size."""
        return Asked.of(self.study, self.file, preset, self.sets, self.store, self.data)

    def prepare(self, workers: int) -> None:
        """Fetch what data are not there. Raises `Refusal` where that cannot be, and for what a gang cannot do."""
        for each in self.planned:
            check(each.trial, workers)
        for each in {planned.trial.data: planned for planned in self.planned}.values():
            data.prepare(each.trial, self.data)

    def left(self, store: Store, *, asha: bool = False) -> list[Trial]:
        """Trials that have no result yet, or none with the readings that this study needs; with `asha`, without those
        that successive halving has given up. Raises `Refusal` where what the store knows of one is damaged.
        """
        wanted = readings(self.study.probes)
        found = {manifest.trial: manifest for manifest in store.manifests()}
        planned = {each.trial.id for each in self.planned}
        for path, wrong in store.damaged:
            if path.stem in planned:
                raise Refusal(wrong)

        def done(trial: Trial) -> bool:
            manifest = found.get(trial.id)
            if manifest is None:
                return False
            return manifest.covers(wanted) or (asha and bool(manifest.facts.get("stopped_early")))

        return [each.trial for each in self.planned if not done(each.trial)]


def here(path: Path) -> Path:
    """As short as it can be said from the working directory."""
    with suppress(ValueError):
        return path.resolve().relative_to(Path.cwd())
    return path
