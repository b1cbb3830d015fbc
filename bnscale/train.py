"""The training loop: the only one, for a laptop or a gang, for gamma and beta alone or the whole network.

Everything is a function of the step: learning rate, batch, augmentation, when a probe looks. So what is
needed to go on is weights, running statistics, momentum and one integer. Nothing plugged in changes
what is trained.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from bnscale.data import Resident
from bnscale.engine import Alone, Gang, Member, Pass, checkpoint
from bnscale.engine.cohort import CohortEngine
from bnscale.engine.local import LocalEngine
from bnscale.engine.losses import Losses
from bnscale.engine.machine import facts_of, forget_peak, keep_freed_memory, peak_memory, release_gpu, release_memory
from bnscale.networks import build, even_output, trained
from bnscale.networks.recompute import Activations
from bnscale.plateau import Plateau
from bnscale.probes import Cadence, Curve, Probe, Snapshot, demand, described
from bnscale.storage import storage
from bnscale.store import Store
from bnscale.trial import Outcome, OutputBias, Trial

LOOK_EVERY = {"cpu": 1, "cuda": 10}  # steps between looks at the loss
# Looks by which a loss is seen late where nothing hangs on it: a GPU need not be waited for, and does not run dry.
LATE = {"cpu": 0, "cuda": 1}


@dataclass(frozen=True)
class Job:
    """A trial and what its workers need to run it."""

    trial: Trial
    probes: dict[Probe, Cadence]
    store: str  # absolute path, or the address of a bucket
    data: str  # absolute path of the data folder
    commit: str | None  # of the code that declared the trial; None outside of git
    zero: int  # ZeRO stage of a gang, 0 or 1
    save_every: float  # seconds between checkpoints: what a killed worker loses at most
    attempts: int = 0  # that there had been when it was planned
    command: str | None = None  # that asked for it, but for its store
    fence: int = 0  # of the lease under which it is trained; 0 for none
    recompute: bool = False  # activations are computed again instead of kept: less memory, more time, the same numbers


@dataclass(frozen=True)
class Progress:
    """Where a trial stands."""

    step: int
    total: int
    epoch: float
    epochs: float
    loss: float | None  # mean over the latest batch
    accuracy: float | None  # the latest on validation images, or on test images where none are held out
    outcome: Outcome | None  # None while it runs, and at the end of a run that was stopped


def waiting(trial: Trial, step: int = 0) -> Progress:
    """Where a trial stands that is still to go on after so many updates."""
    epochs = trial.total_steps / trial.steps_per_epoch
    return Progress(step, trial.total_steps, step / trial.steps_per_epoch, epochs, None, None, None)


class Notebook(Protocol):
    """Where rows go: a store's writer, or nowhere for workers that do not lead."""

    @property
    def reached(self) -> int | None:
        """Updates behind the rows that count: before a later checkpoint there would be rows missing. None: any."""
        ...

    def write(self, table: str, rows: list[Any]) -> None: ...
    def flush(self, step: int) -> None: ...
    def rewind(self, step: int) -> None: ...
    def finish(self, outcome: Outcome, step: int, facts: dict[str, Any]) -> None: ...


class Course:
    """One trial on its way: what it is read by and where that is written, and where it stands."""

    def __init__(self, trial: Trial, notebook: Notebook, probes: dict[Probe, Cadence]) -> None:
        self.trial = trial
        self.notebook = notebook
        self.probes = probes
        self.at = waiting(trial)

    def begin(self, member: Member, most: int | None) -> int:
        """From the newest checkpoint of at most so many updates, or of those behind its rows; from which step."""
        self._member = member
        step, saved = member.restore(self.notebook.reached if most is None else most)
        self.notebook.rewind(step)
        self.at = replace(waiting(self.trial, step), loss=saved.get("loss"), accuracy=saved.get("accuracy"))
        self.plateau = Plateau.of(self.trial, saved.get("plateau"))
        return step

    def due(self, step: int) -> list[Probe]:
        return [probe for probe, cadence in self.probes.items() if cadence.due(step, self.trial)]

    def rate(self, step: int) -> float:
        """Learning rate of the update that comes next."""
        return self.trial.rate(step, self.plateau.drops)

    def hear(self, step: int, losses: list[float]) -> int | None:
        """The losses since the last time: now it stands at `step`, unless it diverged; then where."""
        self.plateau.hear(step, losses)
        finite = [math.isfinite(loss) for loss in losses]
        good = losses[: finite.index(False)] if False in finite else losses
        loss = good[-1] if good else self.at.loss
        self.at = replace(self.at, step=step, epoch=step / self.trial.steps_per_epoch, loss=loss)
        return None if all(finite) else step - len(losses) + len(good)

    def save(self) -> None:
        step, at = self.at.step, self.at
        self.notebook.flush(step)  # rows of earlier steps, then the checkpoint from which later ones follow
        self._member.save(step, {"loss": at.loss, "accuracy": at.accuracy, "plateau": self.plateau.facts()})

    def look(self, data: Resident) -> None:
        """Take the readings that are due."""
        at = Snapshot(self.trial, self.at.step, self._member, data)
        for probe in self.due(self.at.step):
            if demand(probe).steps(self.trial):
                release_memory()  # a reading has other tensors than a step, and no room for both in a full memory
            rows = list(probe(at))
            self.notebook.write(probe.__name__, rows)
            self.at = replace(self.at, accuracy=_accuracy(rows, self.at.accuracy))

    def finish(self, outcome: Outcome, **known: Any) -> None:
        facts = {"last_finite_loss": self.at.loss, "peak_memory": peak_memory(self._member.gang.device)}
        self.notebook.finish(outcome, self.at.step, facts | known)
        self.at = replace(self.at, outcome=outcome)


def train(
    courses: Sequence[Course],
    engine: Pass,
    data: Resident,
    save_every: float,
    stop: Callable[[], bool],
    most: int | None = None,
) -> Iterator[list[Progress]]:
    """From the newest checkpoint, of at most so many updates, to the end of all; yields often where they stand, and
    saves and returns when told to stop. All must stand at the same step, and have as many before them."""
    (step,) = {course.begin(member, most) for course, member in zip(courses, engine.members, strict=True)}
    (total,) = {course.trial.total_steps for course in courses}
    share = _share(courses[0].trial, engine.gang)
    every, late = LOOK_EVERY[engine.gang.device.type], LATE[engine.gang.device.type]
    going = list(courses)
    losses: Losses[Course] = Losses(engine)
    clock = time.monotonic()
    while True:
        last = step == total
        due = last or any(course.due(step) or course.plateau.due(step) for course in going)
        if due or step % every == 0:
            stopping = engine.agree(stop())
            saving = stopping or last or engine.agree(time.monotonic() - clock >= save_every)
            for until, told in losses.told(step, going, 0 if due or saving else late):
                going = _tell(going, engine, until, told)
            if not going:
                yield [course.at for course in courses]
                return
            if saving:
                for course in going:
                    course.save()
                clock = time.monotonic()
            if stopping:
                return
            for course in going if due else []:
                course.look(data)
            if last:
                for course in going:
                    course.finish(Outcome.FINISHED)
            yield [course.at for course in courses]
            if last:
                return
        images_NCHW, labels_N = data.batch(step, share)
        losses_K = engine(images_NCHW, labels_N)
        engine.backward(losses_K)
        engine.step(*(course.rate(step) for course in going))
        losses.add(losses_K)
        step += 1


def _tell(going: list[Course], engine: Pass, step: int, losses: Sequence[tuple[Course, list[float]]]) -> list[Course]:
    """Tell each trial its losses until a step. One that diverged has ended, and leaves; the others are returned."""
    for course, values in losses:
        if course.at.outcome is None:
            diverged = course.hear(step, values)
            if diverged is not None:
                course.finish(Outcome.DIVERGED, diverged_step=diverged)
    left = [place for place, course in enumerate(going) if course.at.outcome is None]
    if left and len(left) < len(going):
        engine.keep(left)
    return [going[place] for place in left]


def _share(trial: Trial, gang: Gang) -> slice:
    """This worker's part of a batch: contiguous, so that groups of `norm_batch` images stay together."""
    size = trial.batch // gang.workers
    return slice(gang.rank * size, (gang.rank + 1) * size)


def _accuracy(rows: list[Any], before: float | None) -> float | None:
    """What a scheduler may see: accuracy on held-out training images, and on test images only where there are none."""
    by_split = {row.split: row.accuracy for row in rows if isinstance(row, Curve)}
    return by_split.get("validation", by_split.get("test", before))


class _Nowhere:
    """The notebook of a worker that does not lead: its rows are the leader's."""

    reached = None

    def write(self, table: str, rows: list[Any]) -> None: ...
    def flush(self, step: int) -> None: ...
    def rewind(self, step: int) -> None: ...
    def finish(self, outcome: Outcome, step: int, facts: dict[str, Any]) -> None: ...


def readings(probes: dict[Probe, Cadence]) -> dict[str, str]:
    """Table and cadence in words, as the manifest keeps them."""
    return {probe.__name__: described(probe, cadence) for probe, cadence in probes.items()}


def fail(job: Job, error: str, kind: str) -> None:
    """Record that a trial ended in an error, which says nothing about the science. A result stays one, with all its
    rows, also where it lacks readings that this training was to take."""
    store = Store(job.store)
    before = store.manifest(job.trial.id)
    if before and before.covers(readings(job.probes)):
        return
    if store.note_error(job.trial.id, error, kind, job.fence):
        return
    writer = store.writer(job.trial, readings(job.probes), {"commit": job.commit}, job.fence)
    writer.finish(Outcome.FAILED, writer.reached, {"error": error, "failure": kind})


def log(job: Job, text: str) -> str:
    """Add to the trial's log; returns where that is. Several workers may, at once. Raises `StoreFailure`."""
    place, key = storage(job.store), f"logs/{job.trial.id}.txt"
    added = False
    while not added:
        try:
            content, version = place.get(key)
            added = place.swap(key, content + text.encode(), version) is not None
        except FileNotFoundError:
            added = place.create(key, text.encode()) is not None
    return f"{place.url}/{key}"


def initialised(trial: Trial, data: Resident) -> nn.Module:
    """The network before its first update, with the biases that it takes from the first batch, if any."""
    network = build(trial)
    if trial.output_bias is OutputBias.EVEN:
        even_output(network, data.batch(0)[0])
    return network


def run(jobs: Sequence[Job], gang: Gang, threads: int, stop: Callable[[], bool]) -> Iterator[list[Progress]]:
    """Train some trials on this worker, all of one kin or a single one; yields where each of them stands, in their
    order. One that has ended keeps its outcome.

    They are trained in one pass, but for those that an earlier run left at another step: passes follow one another.
    Raises `Refusal` for data that is not there; every other error is the code's or the machine's.
    """
    passes = _passes(jobs, gang)
    starts = {place: most for most, places in passes for place in places}
    standing = [waiting(job.trial, starts[place] or 0) for place, job in enumerate(jobs)]
    for most, places in passes:
        for at in _pass([jobs[place] for place in places], gang, threads, stop, most):
            for place, each in zip(places, at, strict=True):
                standing[place] = each
            yield list(standing)
        if any(standing[place].outcome is None for place in places):
            return  # it was stopped


def _passes(jobs: Sequence[Job], gang: Gang) -> list[tuple[int | None, list[int]]]:
    """Which jobs, by their places, can go on together, and from which step, or from what they have where they are
    alone. From the step that most of them have a checkpoint of, and then so on with the rest."""
    if len(jobs) == 1 or gang.workers > 1:
        return [(None, [place]) for place in range(len(jobs))]
    steps = []
    for job in jobs:
        store = Store(job.store)
        reached = store.reached(job.trial.id, readings(job.probes))
        steps.append(checkpoint.whole(store.checkpoints(job.trial.id), reached) or [0])
    passes: list[tuple[int | None, list[int]]] = []
    left = list(range(len(jobs)))
    while left:
        counts = Counter(step for place in left for step in steps[place])
        start = max(counts, key=lambda step: (counts[step], step))
        passes.append((start, [place for place in left if start in steps[place]]))
        left = [place for place in left if start not in steps[place]]
    return passes


def _pass(
    jobs: Sequence[Job], gang: Gang, threads: int, stop: Callable[[], bool], most: int | None
) -> Iterator[list[Progress]]:
    """Build what trials need on this worker, train them, and let go of it."""
    keep_freed_memory()
    _make_room(_likeness(jobs[0], len(jobs)))
    forget_peak(gang.device)
    data = Resident(jobs[0].trial, Path(jobs[0].data), gang.device)
    engine = _engine(jobs, data, gang)
    machine = facts_of(gang.device) | {
        "workers": gang.workers,
        "threads": threads,
        "backend": engine.backend,
        "recomputed": _way(jobs) is Activations.RECOMPUTED or None,
        "cohort": len(jobs) if len(jobs) > 1 else None,
    }
    courses = []
    for job, member in zip(jobs, engine.members, strict=True):
        notebook: Notebook = _Nowhere()
        if gang.leads:
            facts = machine | {
                "commit": job.commit,
                "command": job.command,
                "parameters": sum(p.numel() for p in member.module.parameters()),
                "trainable_parameters": sum(p.numel() for p in trained(member.module).values()),
            }
            notebook = Store(job.store).writer(job.trial, readings(job.probes), facts, job.fence)
        courses.append(Course(job.trial, notebook, job.probes))
    try:
        yield from train(courses, engine, data, min(job.save_every for job in jobs), stop, most)
    finally:
        engine.close()
        # One trial on a CPU leaves no ring of references, and to search for one takes longer than a short trial.
        if len(jobs) > 1 or gang.workers > 1 or gang.device.type != "cpu":
            release_gpu(gang.device)


@lru_cache(maxsize=1)  # a pass like the one before takes the same memory again, and the system would clear it anew
def _make_room(likeness: Hashable) -> None:
    """Hand the memory of the trials before back."""
    release_memory()


def _likeness(job: Job, members: int) -> Hashable:
    """Equal for passes that take the same memory."""
    return job.trial.model_copy(update={"seed": 0, "lr": 0.0}), frozenset(job.probes), members, job.recompute


def _engine(jobs: Sequence[Job], data: Resident, gang: Gang) -> Pass:
    """What trains these trials here, from their first step on."""
    trials = [job.trial for job in jobs]
    checkpoints = [Store(job.store).checkpoints(job.trial.id) for job in jobs]
    if len(jobs) > 1:
        return CohortEngine(build(trials[0]), trials, gang, checkpoints, _way(jobs))
    network = initialised(trials[0], data)
    if gang.workers == 1:
        return Alone(LocalEngine(network, trials[0], gang, checkpoints[0], _way(jobs)))
    from bnscale.engine.deepspeed import DeepSpeedEngine  # seconds to import, and of no use to one worker

    return Alone(DeepSpeedEngine(network, trials[0], gang, checkpoints[0], jobs[0].zero, _way(jobs)))


def _way(jobs: Sequence[Job]) -> Activations:
    return Activations.RECOMPUTED if any(job.recompute for job in jobs) else Activations.KEPT
