"""The training loop: the only one, for a laptop or a gang, for gamma and beta alone or the whole network.

Everything is a function of the step: learning rate, batch, augmentation, when a probe looks. So what is
needed to go on is weights, running statistics, momentum and one integer. Nothing plugged in changes
what is trained.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bnscale.data import Resident
from bnscale.engine import Engine, Gang
from bnscale.engine.local import LocalEngine
from bnscale.engine.machine import facts_of, forget_peak, keep_freed_memory, peak_memory, release_memory
from bnscale.networks import build, even_output, trained
from bnscale.networks.recompute import Activations
from bnscale.plateau import Plateau
from bnscale.probes import Cadence, Curve, Probe, Snapshot, demand, described
from bnscale.storage import storage
from bnscale.store import Store
from bnscale.trial import Outcome, OutputBias, Trial

LOOK_EVERY = {"cpu": 1, "cuda": 10}  # steps between looks at the loss; on a GPU each look waits for it


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


def train(
    trial: Trial,
    engine: Engine,
    data: Resident,
    notebook: Notebook,
    probes: dict[Probe, Cadence],
    save_every: float,
    stop: Callable[[], bool],
) -> Iterator[Progress]:
    """From the newest checkpoint to the end; yields often, and saves and returns when told to stop."""
    step, saved = engine.restore(notebook.reached)
    notebook.rewind(step)
    share = _share(trial, engine.gang)
    every = LOOK_EVERY[engine.gang.device.type]
    progress = Progress(step, trial.total_steps, 0, 0, saved.get("loss"), saved.get("accuracy"), None)
    plateau = Plateau.of(trial, saved.get("plateau"))
    losses: list[Tensor] = []  # of the steps since the last look
    clock = time.monotonic()
    while True:
        due = [probe for probe, cadence in probes.items() if cadence.due(step, trial)]
        last = step == trial.total_steps
        if due or last or step % every == 0 or plateau.due(step):
            progress, diverged = _look(trial, engine, step, losses, progress, plateau)
            if diverged is not None:
                notebook.finish(Outcome.DIVERGED, step, _ending(engine, progress) | {"diverged_step": diverged})
                yield replace(progress, outcome=Outcome.DIVERGED)
                return
            stopping = engine.agree(stop())
            if stopping or last or engine.agree(time.monotonic() - clock >= save_every):
                notebook.flush(step)  # rows of earlier steps, then the checkpoint from which later ones follow
                engine.save(step, {"loss": progress.loss, "accuracy": progress.accuracy, "plateau": plateau.facts()})
                clock = time.monotonic()
            if stopping:
                return
            at = Snapshot(trial, step, engine, data)
            for probe in due:
                if demand(probe).steps(trial):
                    release_memory()  # a reading has other tensors than a step, and no room for both in a full memory
                rows = list(probe(at))
                notebook.write(probe.__name__, rows)
                progress = replace(progress, accuracy=_accuracy(rows, progress.accuracy))
            del at  # and what its probes kept: the next update needs the memory
            if last:
                notebook.finish(Outcome.FINISHED, step, _ending(engine, progress))
                yield replace(progress, outcome=Outcome.FINISHED)
                return
            yield progress
        images_NCHW, labels_N = data.batch(step, share)
        loss = engine(images_NCHW, labels_N)
        engine.backward(loss)
        engine.step(trial.rate(step, plateau.drops))
        losses.append(loss.detach())
        step += 1


def _look(
    trial: Trial, engine: Engine, step: int, losses: list[Tensor], before: Progress, plateau: Plateau
) -> tuple[Progress, int | None]:
    """Wait for the device and read the losses since the last look: where training stands, and where it diverged."""
    values = (engine.total(torch.stack(losses)) / engine.gang.workers).tolist() if losses else []
    losses.clear()
    plateau.hear(step, values)
    finite = [math.isfinite(value) for value in values]
    good = values[: finite.index(False)] if False in finite else values
    diverged = None if all(finite) else step - len(values) + len(good)
    loss = good[-1] if good else before.loss
    epochs = trial.total_steps / trial.steps_per_epoch
    return replace(before, step=step, epoch=step / trial.steps_per_epoch, epochs=epochs, loss=loss), diverged


def _ending(engine: Engine, progress: Progress) -> dict[str, Any]:
    return {"last_finite_loss": progress.loss, "peak_memory": peak_memory(engine.gang.device)}


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
    """Train some trials on this worker; yields where each of them stands, in their order. One that has ended keeps its
    outcome.

    Raises `Refusal` for data that is not there; every other error is the code's or the machine's.
    """
    standing = [Progress(0, job.trial.total_steps, 0, 0, None, None, None) for job in jobs]
    for place, job in enumerate(jobs):
        for standing[place] in _one(job, gang, threads, stop):
            yield list(standing)
        if standing[place].outcome is None:
            return  # it was stopped


def _one(job: Job, gang: Gang, threads: int, stop: Callable[[], bool]) -> Iterator[Progress]:
    """Build what a trial needs on this worker, train it, and let go of it."""
    trial = job.trial
    keep_freed_memory()
    release_memory()  # of the trial before
    forget_peak(gang.device)
    data = Resident(trial, Path(job.data), gang.device)
    network = initialised(trial, data)
    store = Store(job.store)
    checkpoints = store.checkpoints(trial.id)
    way = Activations.RECOMPUTED if job.recompute else Activations.KEPT
    engine: Engine
    if gang.workers == 1:
        engine = LocalEngine(network, trial, gang, checkpoints, way)
    else:
        from bnscale.engine.deepspeed import DeepSpeedEngine  # seconds to import, and of no use to one worker

        engine = DeepSpeedEngine(network, trial, gang, checkpoints, job.zero, way)
    notebook: Notebook = _Nowhere()
    if gang.leads:
        facts = facts_of(gang.device) | {
            "workers": gang.workers,
            "threads": threads,
            "commit": job.commit,
            "command": job.command,
            "backend": "local" if gang.workers == 1 else f"deepspeed zero {job.zero}",
            "parameters": sum(p.numel() for p in network.parameters()),
            "trainable_parameters": sum(p.numel() for p in trained(network).values()),
            "recomputed": job.recompute or None,
        }
        notebook = store.writer(trial, readings(job.probes), facts, job.fence)
    try:
        yield from train(trial, engine, data, notebook, job.probes, job.save_every, stop)
    finally:
        engine.close()
