"""How the trials of a study share the machines: several in one pass, and several passes on one GPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bnscale.probes import looking
from bnscale.schedule import makespan
from bnscale.schedule.budget import Forecast, alike
from bnscale.schedule.cohorts import WORTH, Unit, alone, units_of
from bnscale.schedule.needs import Cluster, gpu_type
from bnscale.store import Manifest
from bnscale.study.asked import Asked
from bnscale.train import readings
from bnscale.trial import Refusal, Trainable, Trial

FULL = 0.8  # of the time one after the other: trials that would take more than that at once do not share a GPU


@dataclass(frozen=True)
class Sharing:
    """What a user says about it; None leaves it to the forecast. Raises `Refusal` for what cannot be together."""

    cohort: int | None = None  # members of a pass at most; 1: none shares one
    trials_per_gpu: int | None = None  # 1: none shares one
    workers: int = 1  # of a trial; several train it alone, each on its own GPU
    threads: int = 1
    halving: bool = False  # trials compete, so each is trained alone

    def __post_init__(self) -> None:
        for name, count in (("cohort", self.cohort), ("trials-per-gpu", self.trials_per_gpu)):
            if count is None or count == 1:
                continue
            if self.workers > 1:
                raise Refusal(
                    f"--{name} {count}: a trial of {self.workers} workers shares them and its GPUs with no other; "
                    f"leave out --{name} or --workers-per-trial"
                )
            if self.halving:
                raise Refusal(
                    f"--{name} {count}: with --asha trials that compete stop one by one; leave one of the two out"
                )


@dataclass(frozen=True)
class Passes:
    """What a round trains."""

    units: list[Unit]
    sharers: dict[str, int]  # by trial, how many like it have a GPU together; the others have one each
    crowded: dict[str, float]  # by the same, seconds over those alone on the GPU
    workers: int  # of a trial

    @classmethod
    def of(
        cls,
        asked: Asked,
        trials: Sequence[Trial],
        forecasts: Mapping[str, Forecast],
        cluster: Cluster,
        how: Sharing,
        begun: Sequence[Manifest] = (),
    ) -> "Passes":
        """`begun` is what the store knows of the study's trials. Times a few steps on this machine, the first time,
        where several trials could be trained in one pass."""
        gpu = cluster.gpus > 0
        if how.workers > 1 or how.halving:
            return cls(alone([trial.id for trial in trials], forecasts), {}, {}, how.workers)
        pace = asked.pace(how.threads, gpu=gpu)
        units = units_of(
            trials,
            forecasts,
            lambda trial, members: asked.forecast(trial, 1, how.threads, gpu=gpu, members=members),
            cluster,
            how.threads,
            readings=lambda trial: tuple(readings(looking(asked.study.probes, trial)).items()),
            reached={each.trial: each.step for each in begun},
            worth=lambda trial: pace.relief(trial) <= WORTH,
            most=how.cohort,
        )
        sharers, crowded = {}, {}
        single = [trial for trial in trials if (trial.id,) in {unit.trials for unit in units}]
        measured = _measured(begun)
        for trial in single if gpu else []:
            most = -(-len(single) // cluster.gpus)  # none idles
            n = min(most, cluster.sharers(how.threads, measured.get(alike(trial)) or forecasts[trial.id].on_gpu))
            seconds = pace.crowding(trial, n) if n > 1 else None
            if how.trials_per_gpu is not None:
                n = how.trials_per_gpu
            elif seconds is not None and seconds > FULL * n:
                n = 1
            if n > 1:
                sharers[trial.id], crowded[trial.id] = n, seconds or float(n)
        return cls(units, sharers, crowded, 1)

    @property
    def seconds(self) -> dict[str, float]:
        """Of the pass of each trial, which may be on a GPU with others."""
        return {
            trial: unit.forecast.seconds * self.crowded.get(trial, 1.0) for unit in self.units for trial in unit.trials
        }

    @property
    def parts(self) -> dict[str, float]:
        """Of its pass, what each trial is."""
        return {trial: 1 / len(unit.trials) for unit in self.units for trial in unit.trials}

    @property
    def said(self) -> str:
        """`, in 6 passes of at most 4, at most 2 on one GPU`; nothing where each trial has a pass and a GPU."""
        most = max((len(unit.trials) for unit in self.units), default=1)
        together = max(self.sharers.values(), default=1)
        passes = f", in {len(self.units):,} pass{'es' if len(self.units) > 1 else ''} of at most {most}"
        return (passes if most > 1 else "") + (f", at most {together} on one GPU" if together > 1 else "")

    def loads(self, trials: Mapping[str, Trial]) -> list[makespan.Unit]:
        """For the makespan: their slots are workers."""
        seconds = self.seconds
        return [makespan.Unit(seconds[unit.name], self._slots(trials[unit.name])) for unit in self.units]

    def _slots(self, trial: Trial) -> float:
        if trial.id in self.sharers:
            return 1 / self.sharers[trial.id]
        return 1.0 if trial.trainable is Trainable.NONE else float(self.workers)  # what trains nothing has no gang


def _measured(begun: Sequence[Manifest]) -> dict[Trial | None, int]:
    """Bytes of a GPU that trials of a shape held at their peak, alone in their pass and with all activations kept."""
    found: dict[Trial | None, int] = {}
    for each in begun:
        peak = each.facts.get("peak_memory")
        usual = not each.facts.get("cohort") and not each.facts.get("recomputed")
        if peak and usual and gpu_type(each.facts.get("device") or ""):
            shape = alike(each.recalled)
            found[shape] = max(found.get(shape, 0), peak)
    return found
