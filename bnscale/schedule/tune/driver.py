"""The driver: a queue of trials, longest first; Ctrl-C; what the progress view is told."""

import contextlib
import math
import os
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from bnscale.lease import Driver
from bnscale.schedule.loop import Loop, Training, record
from bnscale.schedule.needs import Cluster, needs_of
from bnscale.schedule.progress import Watch
from bnscale.schedule.tune.cluster import own_folder
from bnscale.schedule.tune.lead import Brief, Lead
from bnscale.schedule.turns import Elsewhere, Turn, look, take
from bnscale.storage import StoreFailure
from bnscale.trial import Outcome, Refusal

if TYPE_CHECKING:
    from bnscale.schedule.budget import Forecast
    from bnscale.train import Job

DEATHS = 3  # of its workers that a trial survives in one run
POLL = 1.0  # seconds between two looks at the trials of other drivers


def run(
    jobs: list["Job"],
    forecasts: Mapping[str, "Forecast"],
    cluster: Cluster,
    *,
    workers: int,
    threads: int,
    rivals: Mapping[str, Hashable] | None,
    watch: Watch,
    mend: str,
    loop: Loop | None = None,
    driver: Driver | None = None,
) -> dict[str, Outcome | None]:
    """Run every job, longest first, and return the outcome of each by trial id; None where it has no end.

    `workers` processes train one trial, each on `threads` CPUs and, where the cluster has them, a GPU.
    `rivals` puts trials into groups within which successive halving (ASHA) stops the worse ones early, by accuracy;
    None trains all to the end. `mend` is the command that goes on after Ctrl-C.

    Trials are trained under the leases of `driver`. Those that another driver trains are left to it, and waited for in
    the end: how they end there is their outcome, and if their driver dies they are trained here.

    Raises Refusal, before anything starts, where a trial fits no part of the cluster; KeyboardInterrupt after Ctrl-C
    or SIGTERM, when every running trial has its checkpoint.
    """
    needs = needs_of(jobs, forecasts, cluster, workers, threads)
    by_id = {job.trial.id: job for job in jobs}
    order = sorted(by_id, key=lambda trial: -forecasts[trial].seconds)
    brief = Brief(by_id, needs, loop or Training(), driver.id if driver else None, halving=rivals is not None)
    telling = _Telling(by_id, watch)
    groups = max(1, min(cluster.slots(need.threads, need.memory) // need.workers for need in needs.values()))
    # Pending trials each ask Ray for a placement; few of them keep the order and cost little.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(groups)

    with _interruptible(watch) as interrupt:
        while True:
            while left := [trial for trial in order if telling.open(trial)]:
                before = Counter(telling.deaths)
                brief = replace(brief, dead=driver.dead() if driver else frozenset())
                _round(left, brief, telling, _scheduler(by_id, rivals), interrupt)
                if interrupt.is_set() or telling.deaths == before:
                    break
            for trial in order:
                if telling.deaths[trial] > DEATHS and trial not in telling.outcomes:
                    text = f"a worker died {telling.deaths[trial]} times; the last time: {telling.last_words[trial]}"
                    _give_up(brief, trial, text)
                    telling.outcomes[trial] = Outcome.FAILED
                    watch.ended(trial, Outcome.FAILED)
            # Only now, for another driver may wait for those that were given up.
            again = driver is not None and _await(brief, telling, driver, interrupt)
            if interrupt.is_set():
                watch.say(f"stopped; every running trial has its checkpoint. To go on: {mend}")
                raise KeyboardInterrupt
            if not again:
                break
    return {trial: telling.outcomes.get(trial) for trial in by_id}


def _give_up(brief: Brief, trial: str, text: str) -> None:
    """Record why a trial has failed that no worker lives to record, unless another driver has it by now."""
    if brief.driver is None:
        record(brief.loop, brief.jobs[trial], text)
        return
    with contextlib.suppress(Refusal, StoreFailure):
        turn = take(brief.jobs[trial], brief.driver, brief.dead, halving=brief.halving)
        if isinstance(turn, Turn):
            record(brief.loop, turn.job, text)
            turn.end()


def _round(
    trials: list[str], brief: Brief, telling: "_Telling", scheduler: FIFOScheduler, interrupt: threading.Event
) -> None:
    """One pass of Tune over `trials`."""

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        need = brief.needs[config["trial"]]
        return tune.PlacementGroupFactory(need.bundles(), strategy="PACK")

    folder = own_folder(tempfile.gettempdir())
    try:
        tune.run(
            tune.with_resources(tune.with_parameters(Lead, brief=brief), resources),
            config={"trial": tune.grid_search(trials)},
            name="queue",
            storage_path=str(folder),
            trial_dirname_creator=lambda trial: trial.trial_id,
            scheduler=scheduler,
            stop=_Brake(telling, interrupt),
            callbacks=[telling],
            max_failures=DEATHS,
            reuse_actors=True,
            raise_on_failed_trial=False,
            verbose=0,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _await(brief: Brief, telling: "_Telling", driver: Driver, interrupt: threading.Event) -> bool:
    """Until a trial that another driver trained is free, or all of them have ended. Whether one is free."""
    if telling.held and not interrupt.is_set():
        telling.watch.say("waiting for what other drivers train; Ctrl-C ends the waiting")
    while telling.held and not interrupt.wait(POLL):
        dead = driver.dead()
        free = False
        for trial in sorted(telling.held):
            try:
                found = look(brief.jobs[trial], driver.id, dead, halving=brief.halving)
            except StoreFailure:
                continue  # it may pass, and nothing is trained meanwhile
            telling.settle(trial, found)
            telling.watch.passes()
            free = free or found is None
        if free:
            return True
    return False


class _Telling(tune.Callback):
    """Keeps what Tune reports and tells it to the watch."""

    def __init__(self, jobs: Mapping[str, "Job"], watch: Watch) -> None:
        self.jobs = jobs
        self.watch = watch
        self.outcomes: dict[str, Outcome | None] = {}
        self.deaths: Counter[str] = Counter()
        self.last_words: dict[str, str] = {}
        self.held: dict[str, Elsewhere] = {}  # by another driver
        self.trials: list[Any] = []  # Tune's, of this round

    def open(self, trial: str) -> bool:
        """Whether it has yet to end: also after Tune has given it up for a death that it could survive."""
        return trial not in self.outcomes and trial not in self.held and self.deaths[trial] <= DEATHS

    def settle(self, trial: str, found: Elsewhere | None) -> None:
        """Another driver trains the trial, has ended it, or has left it."""
        self.held.pop(trial, None)
        if found is None:
            self.watch.freed(trial)
        elif found.over:
            self.outcomes[trial] = found.outcome
            self.watch.ended(trial, found.outcome)
        else:
            self.held[trial] = found
            self.watch.held(trial, found.who)

    def note(self, trial: str, result: Mapping[str, Any]) -> None:
        if result["outcome"]:
            self.outcomes[trial] = Outcome(result["outcome"])

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.trials = trials

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.watch.started(trial.config["trial"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        from bnscale.train import Progress

        name = trial.config["trial"]
        self.note(name, result)
        if result["spoilt"]:
            trial.max_failures = 0  # its actor now raises, to be replaced; the trial itself is over
        if "elsewhere" in result:
            self.settle(name, result["elsewhere"])
            return
        of = self.jobs[name].trial
        self.watch.progressed(
            name,
            Progress(
                step=result["at"],
                total=of.total_steps,
                epoch=result["epoch"],
                epochs=of.total_steps / of.steps_per_epoch,
                loss=result["loss"],
                accuracy=result.get("accuracy"),
                outcome=self.outcomes.get(name),
            ),
            result["began"],
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        if "elsewhere" not in trial.last_result:
            self.watch.ended(name, self.outcomes.setdefault(name, None))  # without an end: stopped by ASHA

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._died(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        if "elsewhere" in trial.last_result:
            return
        if name in self.outcomes:
            self.watch.ended(name, self.outcomes[name])
        else:
            self._died(trial)

    def _died(self, trial: Any) -> None:
        name = trial.config["trial"]
        self.deaths[name] += 1
        said = [line.strip() for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
        # Ours begins with the name of its class; Ray's goes on with a paragraph of advice.
        self.last_words[name] = said[-1].split("WorkerDiedError: ")[-1].split(". ")[0]
        if self.deaths[name] <= DEATHS:
            self.watch.lost(name, self.last_words[name])


class _Brake(tune.Stopper):
    """Ends the round after Ctrl-C, when every running trial has saved its checkpoint."""

    def __init__(self, telling: _Telling, interrupt: threading.Event) -> None:
        self.telling = telling
        self.interrupt = interrupt

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its stopper into its own state, which nobody reads

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if not self.interrupt.is_set():
            return False
        self.telling.watch.say("stopping: saving checkpoints (Ctrl-C again: at once)")
        running = [trial for trial in self.telling.trials if trial.status == "RUNNING"]
        actors = {trial.config["trial"]: trial.temporary_state.ray_actor for trial in running}
        halts = {actor.halt.remote(): trial for trial, actor in actors.items() if actor}
        left = list(halts)
        while left:  # as long as a step of training takes; the second Ctrl-C ends the waiting
            ready, left = ray.wait(left, timeout=0.5)
            for answer in ready:
                try:
                    self.telling.note(halts[answer], ray.get(answer))
                except RayError as error:
                    last = str(error).strip().splitlines()[-1]
                    self.telling.watch.say(f"{halts[answer]}: no new checkpoint ({last}); the one before it counts")
        return True


@contextlib.contextmanager
def _interruptible(watch: Watch) -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event; the second one ends the process at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def hear(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            watch.abandon()
            os._exit(130)
        asked.set()

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _scheduler(jobs: Mapping[str, "Job"], rivals: Mapping[str, Hashable] | None) -> FIFOScheduler:
    return FIFOScheduler() if rivals is None else _Halving(jobs, rivals)


class _Halving(FIFOScheduler):
    """One ASHA for each group of rivals: a deep network must not stop a shallow one for being better."""

    def __init__(self, jobs: Mapping[str, "Job"], rivals: Mapping[str, Hashable]) -> None:
        super().__init__()
        self.rivals = rivals
        epochs: dict[Hashable, float] = {}
        for name, job in jobs.items():
            group = rivals[name]
            epochs[group] = max(epochs.get(group, 0), job.trial.total_steps / job.trial.steps_per_epoch)
        # Beyond the end, so that none is stopped at its last step, before it is finished.
        self.halvings = {
            group: ASHAScheduler(
                "epoch",
                "accuracy",
                "max",
                max_t=math.ceil(2 * n),
                grace_period=max(1, round(n / 9)),
                reduction_factor=3,
            )
            for group, n in epochs.items()
        }

    def _of(self, trial: Any) -> ASHAScheduler:
        return self.halvings[self.rivals[trial.config["trial"]]]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)
