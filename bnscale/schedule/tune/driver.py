"""The driver: a queue of trials, longest first; what follows a failure; Ctrl-C; what the progress view is told."""

import contextlib
import math
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray
from ray import cloudpickle, tune
from ray.exceptions import RayActorError, RayError
from ray.tune import registry
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from bnscale.lease import Driver
from bnscale.schedule.cohorts import Unit, alone
from bnscale.schedule.failure import POLICY, Ending, Failure, Hopeless, Judge, Kind, OutOfTime, Then
from bnscale.schedule.loop import Loop, Training, record
from bnscale.schedule.needs import Cluster, Need, needs_of
from bnscale.schedule.progress import Watch
from bnscale.schedule.tune import words
from bnscale.schedule.tune.cluster import draining_nodes, own_folder, roomy_nodes
from bnscale.schedule.tune.lead import Brief, Lead, Standing
from bnscale.schedule.tune.watchdog import FLOOR
from bnscale.schedule.turns import Elsewhere, Turn, look, take
from bnscale.storage import StoreFailure
from bnscale.trial import Outcome, Refusal

if TYPE_CHECKING:
    from bnscale.schedule.budget import Forecast
    from bnscale.train import Job

HALT = 900.0  # seconds that the workers have to save their checkpoints before a run ends
POLL = 1.0  # seconds between two looks at the trials of other drivers
NODE = "ray.io/node-id"  # the label that every node has of Ray itself
LOOK = 2.0  # seconds between two questions to the cluster which of its nodes are to go


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
    until: float = math.inf,
    stall: float = FLOOR,
    units: Sequence[Unit] | None = None,
    sharers: Mapping[str, int] | None = None,
) -> dict[str, Ending]:
    """Run every job, longest first, and return the end of each by trial id.

    `workers` processes train one trial, each on `threads` CPUs and, where the cluster has them, a GPU.
    `rivals` puts trials into groups within which successive halving (ASHA) stops the worse ones early, by accuracy;
    None trains all to the end. `mend` is the command that goes on after Ctrl-C. At `until`, of the monotonic clock, all
    ends as by Ctrl-C. No step may take longer than `stall` seconds, unless ten usual ones do.

    `units` are the trials that are trained in one pass; without it each is trained alone. `sharers` says by trial how
    many like it share a GPU. A unit that meets what one trial would fail of is broken up, and a trial that runs out of
    its part of a GPU gets a whole one.

    Trials are trained under the leases of `driver`. Those that another driver trains are left to it, and waited for in
    the end: how they end there is their outcome, and if their driver dies they are trained here.

    Raises Refusal, before anything starts, where a trial fits no part of the cluster; and when every running trial has
    its checkpoint, KeyboardInterrupt after Ctrl-C or SIGTERM, OutOfTime, and Hopeless where the first trials all ended
    in the same error.
    """
    by_id = {job.trial.id: job for job in jobs}
    brief = Brief(
        by_id,
        {},
        dict(forecasts),
        loop or Training(),
        run=secrets.token_hex(8),
        stall=stall,
        driver=driver.id if driver else None,
        halving=rivals is not None,
    )
    parts = list(units or alone(by_id, forecasts))
    telling = _Telling(brief, watch, driver, elastic=cluster.most is not None, units=parts, sharers=sharers)

    def needs(parts: list[Unit]) -> dict[str, Need]:
        first = [by_id[unit.name] for unit in parts]
        whole = {unit.name: unit.forecast for unit in parts}
        return needs_of(first, whole, cluster, workers, threads, telling.sharers)

    needs(parts)  # refuses before anything starts

    with _interruptible(watch) as interrupt:
        brake = _Brake(telling, interrupt, until)
        while True:
            while left := telling.left():
                before = telling.strikes
                telling.begin(left, needs(left))
                asking = set(telling.brief.needs.values())
                groups = min(cluster.slots(each.threads, each.memory, each.sharers) // each.workers for each in asking)
                # Pending trials each ask Ray for a placement; few of them keep the order and cost little.
                os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(1, groups))
                _round(left, telling, _scheduler(by_id, rivals, telling), brake)
                if brake.why is _Why.UNFIT:
                    brake.why = None
                elif brake.why is not None or telling.strikes == before:
                    break
            # Only now, for another driver may wait for those that were given up.
            again = driver is not None and _await(telling, driver, brake)
            if brake.why is not None:
                raise _stopped(brake.why, telling, mend)
            if not again:
                break
    return {trial: telling.endings.get(trial, Ending()) for trial in by_id}


class _Why(Enum):
    """A run ends before its trials."""

    ASKED = "stopped"
    TIME = "the time is up"
    HOPELESS = "stopped"
    UNFIT = "goes on"  # on other nodes


def _stopped(why: _Why, telling: "_Telling", mend: str) -> BaseException:
    """What is raised, after it was said."""
    saved = "every running trial has its checkpoint"
    hopeless = telling.judge.hopeless
    if why is _Why.HOPELESS and hopeless:
        message = (
            f"{why.value}: the first trials all ended in one error, as the others would ({hopeless.short}); {saved}. "
            f"Mend that, and go on: {mend}"
        )
        telling.watch.say(message)
        return Hopeless(message)
    message = f"{why.value}; {saved}. To go on: {mend}"
    telling.watch.say(message)
    return OutOfTime(message) if why is _Why.TIME else KeyboardInterrupt()


def _round(units: list[Unit], telling: "_Telling", scheduler: FIFOScheduler, brake: "_Brake") -> None:
    """One pass of Tune over `units`: a trial of Tune's is one of them, and has the id of its first trial."""

    brief, unfit = telling.brief, telling.avoid()

    _ASKED[brief.run] = lambda trial: _place(brief.needs[trial], unfit)
    folder = own_folder(tempfile.gettempdir())
    try:
        tune.run(
            tune.with_resources(tune.with_parameters(Lead, brief=brief), _Resources(brief.run)),
            config={"trial": tune.sample_from(_Next([unit.name for unit in units]))},
            num_samples=len(units),
            name="queue",
            storage_path=str(folder),
            trial_dirname_creator=lambda trial: trial.trial_id,
            scheduler=scheduler,
            stop=brake,
            callbacks=[telling],
            max_failures=-1,  # the judge says when it is enough
            reuse_actors=True,
            raise_on_failed_trial=False,
            verbose=0,
        )
    finally:
        del _ASKED[brief.run]
        shutil.rmtree(folder, ignore_errors=True)


_ASKED: dict[str, Callable[[str], tune.PlacementGroupFactory]] = {}  # what a trial asks for, of each run under way


@dataclass(frozen=True)
class _Resources:
    """What a trial asks of the cluster. Tune unpickles what it trains, and this with it, twice a trial: so the needs of
    all trials stay where they are."""

    run: str

    def __call__(self, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        return _ASKED[self.run](config["trial"])


class _Registry:
    """Tune's, with a memory: it asks the cluster five times a trial for the class that it trains, waits for each answer
    and unpickles two of them. What was found stays until something is registered."""

    def __init__(self, tunes: Any) -> None:
        self._find = cache(tunes.get)
        self._add = tunes.register
        tunes.register, tunes.get, tunes.contains = self.register, self._find, self.contains

    def register(self, category: str, key: str, value: Any) -> None:
        self._add(category, key, value)
        self._find.cache_clear()

    def contains(self, category: str, key: str) -> bool:
        try:
            return self._find(category, key) is not None
        except (LookupError, ValueError):  # before and after there is a cluster
            return False


_Registry(registry._global_registry)


class _Next:
    """The trials in turn. Of a grid Tune copies all values for each of them."""

    def __init__(self, trials: list[str]) -> None:
        self.trials = iter(list(trials))

    def __call__(self, spec: Any) -> str:
        return next(self.trials)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Next":
        return self


def _forget(trials: list[Any]) -> None:
    """Take those that have ended out of Tune's own list: it goes through all of it at every step, and keeps statistics
    of every metric of each."""
    ended = [trial for trial in trials if trial.is_finished()]
    if ended:
        trials[:] = [trial for trial in trials if not trial.is_finished()]
    for trial in ended:
        trial.run_metadata.metric_analysis.clear()
        trial.run_metadata.metric_n_steps.clear()
        trial.run_metadata.last_result = {}


def _place(need: Need, unfit: list[str]) -> tune.PlacementGroupFactory:
    """What a trial asks of the cluster, on other nodes than these."""
    bundles = need.bundles()
    if not unfit:
        return tune.PlacementGroupFactory(bundles, strategy="PACK")
    label = {NODE: f"!in({','.join(unfit)})"}
    return tune.PlacementGroupFactory(bundles, strategy="PACK", bundle_label_selector=[label] * len(bundles))


def _await(telling: "_Telling", driver: Driver, brake: "_Brake") -> bool:
    """Until a trial that another driver trained is free, or all of them have ended. Whether one is free."""
    if telling.held and not brake.pressed():
        telling.watch.say("waiting for what other drivers train; Ctrl-C ends the waiting")
    while telling.held and not brake.pressed():
        brake.interrupt.wait(POLL)
        dead = driver.dead()
        free = False
        for trial in sorted(telling.held):
            try:
                found = look(telling.brief.jobs[trial], driver.id, dead, halving=telling.brief.halving)
            except StoreFailure:
                continue  # it may pass, and nothing is trained meanwhile
            telling.settle(trial, found)
            telling.watch.passes()
            free = free or found is None
        if free:
            return True
    return False


class _Telling(tune.Callback):
    """Hears what Tune reports, has failures judged, and tells the watch."""

    def __init__(
        self,
        brief: Brief,
        watch: Watch,
        driver: Driver | None,
        *,
        elastic: bool,
        units: Sequence[Unit] = (),
        sharers: Mapping[str, int] | None = None,
    ) -> None:
        self.brief = brief
        self.watch = watch
        self.driver = driver
        self.elastic = elastic  # whether an autoscaler may bring other nodes
        self.judge = Judge(len(brief.jobs))
        self.units = list(units)  # of which a round trains what is open
        self.sharers = dict(sharers or {})  # by trial, how many share a GPU
        self.endings: dict[str, Ending] = {}
        self.strikes = 0  # failures so far, of whatever kind
        self.later: set[str] = set()  # trials that go on in the next round, in other units or with a GPU of their own
        self.struck: set[str] = set()  # units whose worker has reported a failure and is now replaced
        self.held: dict[str, Elsewhere] = {}  # by another driver
        self.trials: list[Any] = []  # Tune's, of this round
        self.nodes: dict[str, list[str]] = {}  # of the workers of each running unit
        self.given_up: list[Any] = []  # trials that Tune has put into its queue again
        self.told: set[str] = set()  # trials of whose end the watch has heard
        self.leaving: set[Any] = set()  # actors that have been told that a node of theirs is to go
        self.unfit: set[str] = set()  # nodes that do not see the store, or are about to go
        self.avoided: set[str] = set()  # those of them that this round knows
        self._looked = 0.0

    def open(self, trial: str) -> bool:
        """Whether it has yet to end, here: also after Tune has given it up for what it could survive."""
        return trial not in self.endings and trial not in self.held

    def left(self) -> list[Unit]:
        """The units of the next round, the longest first."""
        forecasts = self.brief.forecasts
        parts = [(unit, [trial for trial in unit.trials if self.open(trial)]) for unit in self.units]
        return sorted(
            (unit.of(trials, forecasts) for unit, trials in parts if trials), key=lambda unit: -unit.forecast.seconds
        )

    def begin(self, units: list[Unit], needs: dict[str, Need]) -> None:
        """A round."""
        self.brief = replace(
            self.brief,
            units={unit.name: unit for unit in units},
            needs=needs,
            recomputing=frozenset(trial for trial in self.brief.jobs if self.judge.recomputing(trial)),
        )
        self.later.clear()

    def members(self, trial: Any) -> list[str]:
        """The trials of one of Tune's that it has yet to end."""
        of = self.brief.members(trial.config["trial"])
        return [each for each in of if self.open(each) and each not in self.later]

    def settle(self, trial: str, found: Elsewhere | None) -> None:
        """Another driver trains the trial, has ended it, or has left it."""
        self.held.pop(trial, None)
        if found is None:
            self.watch.freed(trial)
        elif found.over:
            self._end(trial, Ending(found.outcome))
        else:
            self.held[trial] = found
            self.watch.held(trial, found.who)

    def avoid(self) -> list[str]:
        """From now on: nodes that are unfit, as long as there may be any other place."""
        self.avoided = set(self.unfit)
        self.struck.clear()  # those workers went with their round
        self.given_up.clear()
        return sorted(self.unfit) if self.unfit and self._elsewhere(self.unfit) else []

    def halted(self, result: Mapping[str, Any]) -> None:
        """A unit was told to save, and its trials may have come to their end instead."""
        for standing in result["members"]:
            if standing.outcome:
                self._end(standing.trial, Ending(standing.outcome))

    # --- called by Tune --------------------------------------------------------------------------

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        _forget(trials)
        self.trials = trials
        if time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            self._make_room()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        for each in self.members(trial):
            self.watch.started(each)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        name = trial.config["trial"]
        self.nodes[name] = result["nodes"]
        for standing in result["members"]:
            if standing.elsewhere:
                self.settle(standing.trial, standing.elsewhere)
            else:
                self._hear(standing)
        if result["failure"]:
            self.struck.add(name)
            self._shun(result["leaving"])
            self._failed(trial, result["failure"])
        elif result["spoilt"]:  # its actor now raises, to be replaced
            for each in self.members(trial):
                self._end(each, Ending())
        if not self.members(trial):
            trial.max_failures = 0  # the unit itself is over, or another's

    def _hear(self, standing: Standing) -> None:
        from bnscale.train import Progress

        name, of = standing.trial, self.brief.jobs[standing.trial].trial
        self.judge.progressed(name, standing.at)
        self.watch.progressed(
            name,
            Progress(
                step=standing.at,
                total=of.total_steps,
                epoch=standing.epoch,
                epochs=of.total_steps / of.steps_per_epoch,
                loss=standing.loss,
                accuracy=standing.accuracy,
                outcome=standing.outcome,
            ),
            standing.began,
        )
        if standing.outcome:
            self._end(name, Ending(standing.outcome))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        for each in self.members(trial):
            self._end(each, Ending())  # without an end by now: stopped by ASHA

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._died(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._died(trial)

    def _shun(self, nodes: list[str]) -> None:
        """Nodes that are about to go, where there may be any other place."""
        if nodes and self._elsewhere(self.unfit.union(nodes)):
            self.unfit.update(nodes)

    def _elsewhere(self, unfit: set[str]) -> bool:
        """Whether there may be any place beside these nodes."""
        gpus = max(need.gpus for need in self.brief.needs.values())
        return self.elastic or bool(set(roomy_nodes(gpus)) - unfit)

    # --- failures --------------------------------------------------------------------------------

    def _died(self, trial: Any) -> None:
        """The process of a leading worker is gone."""
        name = trial.config["trial"]
        if name in self.struck:
            self.struck.discard(name)  # that was foreseen
        elif self.members(trial):
            self._failed(trial, words.take(self.brief.run, name) or _death(trial))

    def _failed(self, trial: Any, failure: Failure) -> None:
        from bnscale.networks.recompute import recomputable  # brings torch, which no worker needs before its loop does

        unit, members = trial.config["trial"], self.members(trial)
        self.strikes += 1
        if not members:
            return
        if failure.kind is Kind.UNSEEN and not (self.driver and self.driver.missed()):
            self.unfit.update(self.nodes[unit][:1])  # the leading worker alone writes
        if failure.kind in (Kind.OOM, Kind.NEIGHBOUR) and self.sharers.get(unit, 1) > 1:
            self._widen(unit, failure)
        else:
            may_recompute = len(members) == 1 and recomputable(self.brief.jobs[members[0]].trial)
            follows = {each: self.judge.failed(each, failure, may_recompute=may_recompute) for each in members}
            if {Then.AGAIN, Then.RECOMPUTING}.issuperset(follows.values()):
                trial.config["recompute"] = self.judge.recomputing(members[0])
                trial.config["ended"] = sorted(set(self.brief.members(unit)).difference(members))
                then = follows[members[0]].value
                what = f"{POLICY[failure.kind].said}; {_named(members)} {then} ({failure.short})"
                self.watch.lost(members[0], what, also=members[1:])
                return
            if len(members) > 1:
                self._break_up(members, failure)
            else:
                self._give_up(members[0], follows[members[0]], failure)
        if trial.status == "PENDING":
            self.given_up.append(trial)

    def _give_up(self, name: str, then: Then, failure: Failure) -> None:
        failure = self.judge.story(name, failure)
        _let_go(self.brief, name, failure if then is Then.FAILED else None)
        self._end(name, Ending(Outcome.FAILED if then is Then.FAILED else None, failure))

    def _break_up(self, members: list[str], failure: Failure) -> None:
        """The trials of a unit go on apart: one's fault is nobody else's. Too large for the memory, it is halved."""
        forecasts = self.brief.forecasts
        whole = next(unit for unit in self.units if set(members).issubset(unit.trials))
        unit = whole.of(members, forecasts)
        halved = failure.kind in (Kind.OOM, Kind.NEIGHBOUR) and len(members) > 3
        parts = unit.halves(forecasts) if halved else unit.singles(forecasts)
        # What another driver holds of it may come back, when that driver dies.
        elsewhere = [each for each in whole.trials if each not in members and each not in self.endings]
        self.units = [*(other for other in self.units if other is not whole), *parts, *alone(elsewhere, forecasts)]
        for each in members:
            self.judge.forgive(each)
            self.later.add(each)
            _let_go(self.brief, each, None)
        what = f"{POLICY[failure.kind].said}; {_named(members)} goes on {'in halves' if halved else 'each alone'}"
        self.watch.apart(
            {each: part.forecast.seconds for part in parts for each in part.trials},
            {each: 1 / len(part.trials) for part in parts for each in part.trials},
            f"{what} ({failure.short})",
        )

    def _widen(self, name: str, failure: Failure) -> None:
        """A trial needs more of a GPU than its part."""
        seconds, part = self.brief.forecasts[name].seconds, self.sharers.pop(name)
        self.later.add(name)
        _let_go(self.brief, name, None)
        what = f"{POLICY[failure.kind].said} in 1/{part} of a GPU; {name} goes on with one to itself ({failure.short})"
        self.watch.apart({name: seconds}, {name: 1.0}, what)

    def _end(self, name: str, ending: Ending) -> None:
        if name in self.told:
            return
        self.told.add(name)
        known = self.endings.setdefault(name, ending)
        if known.outcome is None and known.failure:
            what = f"{POLICY[known.failure.kind].said}; {name} {Then.ASIDE.value} ({known.failure.short})"
            self.watch.set_aside(name, what)
        else:
            self.watch.ended(name, known.outcome)
        self.judge.ended(known.failure)

    def _make_room(self) -> None:
        """Let the trials on nodes that are to go save their checkpoints and go on elsewhere."""
        draining = set(draining_nodes())
        if not draining:
            return
        for trial in self.trials:
            actor = trial.temporary_state.ray_actor
            on = self.nodes.get(trial.config["trial"], [])
            if trial.status == "RUNNING" and actor and actor not in self.leaving and draining.intersection(on):
                self.leaving.add(actor)
                actor.leave.remote()


def _named(members: list[str]) -> str:
    """What is trained in one pass."""
    more = f"{len(members) - 1} other{'s' if len(members) > 2 else ''}"
    return members[0] if len(members) == 1 else f"the pass of {members[0]} and {more}"


def _let_go(brief: Brief, trial: str, failure: Failure | None) -> None:
    """Record why a trial has failed, if it has, and let its lease go, unless another driver has it by now."""
    job = brief.jobs[trial]
    if brief.driver is None:
        if failure:
            record(brief.loop, job, failure)
        return
    with contextlib.suppress(Refusal, StoreFailure):
        turn = take(job, brief.driver, halving=brief.halving)
        if isinstance(turn, Turn):
            if failure:
                record(brief.loop, turn.job, failure)
            turn.end()


def _death(trial: Any) -> Failure:
    """From what Ray says of the end of a process."""
    kept = Path(trial.pickled_error_file)
    error = cloudpickle.loads(kept.read_bytes()) if kept.exists() else None
    if isinstance(error, RayActorError):
        return Failure.of_death(str(error), preempted=error.preempted)
    return Failure.of_words(Path(trial.error_file).read_text())


class _Brake(tune.Stopper):
    """Ends the round after Ctrl-C, at the end of the time, and where all is in vain, when every running trial has saved
    its checkpoint."""

    def __init__(self, telling: _Telling, interrupt: threading.Event, until: float) -> None:
        self.telling = telling
        self.interrupt = interrupt
        self.until = until
        self.why: _Why | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its stopper into its own state, which nobody reads

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def pressed(self) -> bool:
        over = len(self.telling.endings) + len(self.telling.held) == len(self.telling.brief.jobs)
        if self.interrupt.is_set():
            self.why = _Why.ASKED
        elif time.monotonic() >= self.until:
            self.why = _Why.TIME
        elif self.telling.judge.hopeless and not over:
            self.why = _Why.HOPELESS
        return self.why is not None

    def stop_all(self) -> bool:
        if not self.pressed():
            if self.telling.unfit == self.telling.avoided:
                return False
            self.why = _Why.UNFIT
        self._halt()
        return True

    def _halt(self) -> None:
        running = [trial for trial in self.telling.trials if trial.status == "RUNNING" and self.telling.members(trial)]
        actors = {trial.config["trial"]: trial.temporary_state.ray_actor for trial in running}
        halts = {actor.halt.remote(): unit for unit, actor in actors.items() if actor}
        if halts:
            stopping = "stopping: saving checkpoints (Ctrl-C again: at once)"
            self.telling.watch.say("saving checkpoints, to go on elsewhere" if self.why is _Why.UNFIT else stopping)
        left, until = list(halts), time.monotonic() + HALT
        while left:  # as long as a step of training takes; the second Ctrl-C ends the waiting
            if time.monotonic() > until:
                for answer in left:
                    ray.kill(actors[halts[answer]])
                    said = f"{halts[answer]}: no new checkpoint (no answer in {HALT:.0f} s); the one before it counts"
                    self.telling.watch.say(said)
                return
            ready, left = ray.wait(left, timeout=0.5)
            for answer in ready:
                try:
                    self.telling.halted(ray.get(answer))
                except RayError as error:
                    last = str(error).strip().splitlines()[-1]
                    self.telling.watch.say(f"{halts[answer]}: no new checkpoint ({last}); the one before it counts")


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


def _scheduler(jobs: Mapping[str, "Job"], rivals: Mapping[str, Hashable] | None, telling: _Telling) -> FIFOScheduler:
    return _Queue(telling) if rivals is None else _Halving(jobs, rivals, telling)


class _Queue(FIFOScheduler):
    """In turn. A trial that has been given up leaves the queue, in which Tune has put it again."""

    def __init__(self, telling: _Telling) -> None:
        super().__init__()
        self.telling = telling

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        while self.telling.given_up:
            tune_controller.stop_trial(self.telling.given_up.pop())
        return super().choose_trial_to_run(tune_controller)


class _Halving(_Queue):
    """One ASHA for each group of rivals: a deep network must not stop a shallow one for being better."""

    def __init__(self, jobs: Mapping[str, "Job"], rivals: Mapping[str, Hashable], telling: _Telling) -> None:
        super().__init__(telling)
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
