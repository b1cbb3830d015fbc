"""The workers of a trial: the Lead, which Tune calls, and the other Members of its gang."""

import contextlib
import gc
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bnscale.schedule.cohorts import Unit
from bnscale.schedule.failure import Failure, Kind, Memory
from bnscale.schedule.loop import Loop
from bnscale.schedule.needs import CONTEXT, Need
from bnscale.schedule.notice import Notice
from bnscale.schedule.tune import words
from bnscale.schedule.tune.watchdog import Pulse, Watchdog, stacks
from bnscale.schedule.turns import Elsewhere, Turn, take
from bnscale.storage import StoreFailure
from bnscale.store import TakenOver
from bnscale.trial import Outcome, Refusal

if TYPE_CHECKING:
    import torch

    from bnscale.engine import Gang
    from bnscale.schedule.budget import Forecast
    from bnscale.train import Job, Progress

SLICE = 2.0  # seconds of training between two reports, so that a stop is heard and progress lives
QUICK = 0.25  # seconds; an epoch shorter than this is no reason for a report
GRACE = 5.0  # seconds in which the other workers of a gang that hangs write their stacks down, too
PORTS = 5  # meeting places that a gang tries


@dataclass(frozen=True)
class Brief:
    """What every leading worker knows, sent once a round: jobs and forecasts by trial id, needs and units by the id of
    a unit's first trial."""

    jobs: dict[str, "Job"]
    needs: dict[str, Need]
    forecasts: Mapping[str, "Forecast"]
    loop: Loop
    run: str  # no other run of the cluster has this name
    stall: float  # seconds that a step may take, whatever its median
    driver: str | None = None  # whose leases the trials are trained under; None: under none
    halving: bool = False  # whether a trial that is told to stop was given up
    units: Mapping[str, Unit] = field(default_factory=dict)  # the trial is one of its own where there is none
    recomputing: frozenset[str] = frozenset()  # trials that compute their activations again instead of keeping them

    def members(self, unit: str) -> tuple[str, ...]:
        """The trials that are trained in one pass with this one, their first."""
        return self.units[unit].trials if unit in self.units else (unit,)

    def forecast(self, unit: str) -> "Forecast":
        return self.units[unit].forecast if unit in self.units else self.forecasts[unit]

    def foreseen(self, unit: str) -> float:
        """Seconds of a step."""
        need = self.needs[unit]
        seconds = self.forecast(unit).seconds / max(1, self.jobs[unit].trial.total_steps)
        return seconds * need.workers * need.sharers


@dataclass(frozen=True)
class Standing:
    """Where a trial stands, as its leading worker reports it."""

    trial: str
    at: int = 0  # updates
    began: int = 0  # of the checkpoint from which it goes on
    epoch: float = 0.0
    loss: float | None = None
    accuracy: float | None = None
    outcome: Outcome | None = None
    elsewhere: Elsewhere | None = None  # it is not trained here


def _between(at: "list[Progress]") -> bool:
    """Whether no step follows at once: a trial is at its last one, or all have ended."""
    return all(each.outcome for each in at) or any(each.outcome is None and each.step >= each.total for each in at)


class WorkerDiedError(RuntimeError):
    """Another worker of the gang is gone: nothing is wrong with the trial."""


class TakenAwayError(RuntimeError):
    """This worker's machine is about to go."""


def _write_down(loop: Loop, jobs: "list[Job]", rank: int, wrong: str) -> str:
    """Put the stacks of this process into the log of each trial; where the first is. A store that hangs, too, keeps
    nobody."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    head = f"{now} UTC, {socket.gethostname()}, process {os.getpid()}, worker {rank}: {wrong}"
    text = f"{head}\n{stacks()}\n"
    where = []

    def log() -> None:
        with contextlib.suppress(Exception):
            for job in jobs:
                where.append(loop.log(job, text))

    writing = threading.Thread(target=log, daemon=True)
    writing.start()
    writing.join(30.0)
    return f"stacks in {where[0]}" if where else "the log of the trial could not be written"


@cache  # once: what is kept apart is never searched again
def _keep_apart() -> None:
    """Keep what this process has by now out of what is searched for garbage. Between two trials that is modules: half a
    million objects, and to search them takes longer than a short trial."""
    gc.collect()
    gc.freeze()


class Member:
    """A worker that does not lead."""

    def __init__(self, loop: Loop, threads: int) -> None:
        self.loop = loop
        self.threads = threads
        self.trained = False  # whether it has been through a pass
        self.notice = Notice()
        self.notice.listen()

    def join(self, rank: int, workers: int, address: str, port: int) -> None:
        self.gang = self.loop.join(rank, workers, address, port, self.loop.ready(self.threads).device)

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def leaves(self) -> bool:
        """Whether its machine is about to go."""
        return self.notice.given.is_set()

    def train(self, jobs: "list[Job]", foreseen: float, stall: float) -> Failure | None:
        """Follow the leading worker to the end of a pass. Returns what ended it before, if anything."""

        def stalled(wrong: str) -> None:
            _write_down(self.loop, jobs, self.gang.rank, wrong)  # whether that is the end, the leading worker knows

        def stop() -> bool:
            pulse.beat()
            return self.notice.given.is_set()

        if self.trained:
            _keep_apart()
        self.trained = True
        pulse = Pulse(foreseen, stalled, floor=stall)
        self.notice.busy = True
        try:
            for _ in self.loop.run(jobs, self.gang, self.threads, stop):
                pulse.going()
        except Exception as error:
            return Failure.of(error)
        finally:
            pulse.end()
            self.notice.busy = False
        return None


class Lead(tune.Trainable):
    """The leading worker of a gang, or the only one. Serves unit after unit: a trial, or several in one pass."""

    def setup(self, config: dict[str, Any], brief: Brief) -> None:  # type: ignore[override]  # tune.with_parameters
        self.brief = brief
        self.need = brief.needs[config["trial"]]
        self.told = False  # by the driver that a node is to go
        self.spoilt = False  # this process must serve no other trial
        self.notice = Notice()
        self.notice.listen()
        self.leaving: list[str] = []  # nodes that have said that they are about to go
        self.members = self._raise()
        alone = brief.loop.ready(self.need.threads)  # takes seconds, on all workers at once
        self.gang = self._meet(alone.device) if self.members else alone
        if self.need.sharers > 1:
            from bnscale.engine.machine import keep_to_share

            keep_to_share(self.gang.device, self.need.sharers, CONTEXT)
        self.nodes = [str(ray.get_runtime_context().get_node_id())]
        self.nodes += ray.get([each.node.remote() for each in self.members])
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._wind_up(given_up=self.brief.halving)
        if self.spoilt:
            return False
        self._take(new_config)
        _keep_apart()  # only now: the first trial has imported what all need, and nothing of it is left
        return True

    def step(self) -> dict[str, Any]:
        """Train for a slice of time. Reports where each trial stands."""
        if self.spoilt:
            raise RuntimeError("this worker is to be replaced")
        try:
            if not self.begun:
                self._begin()
            over = self.over or self._advance()
        except Exception as error:
            return self._failed(error)
        return self._report(over)

    def halt(self) -> dict[str, Any]:
        """Save a checkpoint and end. Called by the driver after Ctrl-C."""
        self._wind_up(given_up=False)
        return self._report(True)

    def leave(self) -> None:
        """Save a checkpoint at the next step and make room. Called by the driver when a node is to go, which Ray then
        gives to nobody."""
        self.told = True
        self.notice.given.set()

    def cleanup(self) -> None:
        self._wind_up(given_up=self.brief.halving)

    # --- a unit ----------------------------------------------------------------------------------

    def _take(self, config: dict[str, Any]) -> None:
        self.unit: str = config["trial"]
        ended = config.get("ended", ())
        self.recomputing = bool(config.get("recompute")) or self.unit in self.brief.recomputing
        self.jobs = {trial: self.brief.jobs[trial] for trial in self.brief.members(self.unit) if trial not in ended}
        if self.recomputing:
            self.jobs = {trial: replace(job, recompute=True) for trial, job in self.jobs.items()}
        self.stopping = False
        self.over = False
        self.standings = {trial: Standing(trial) for trial in self.jobs}
        self._let_go()

    def _let_go(self) -> None:
        """Nothing of the unit has begun, here and now."""
        self.begun = False
        self.turns: dict[str, Turn] = {}
        self.training: list[Job] = []  # in the order in which the loop tells of them
        self.at: list[Progress] = []
        self.watchdog: Watchdog | None = None
        self.pulse: Pulse | None = None
        self.steps: Iterator[list[Progress]] = iter(())

    def _asked(self) -> bool:
        """Whether to save and end. The loop asks after every step."""
        if self.pulse:
            self.pulse.beat()
        return self.stopping or self.notice.given.is_set()

    def _begin(self) -> None:
        """Claim the trials, and set all workers to those that no other driver has."""
        self.begun = True
        for trial, job in self.jobs.items():
            standing = self.standings[trial]
            if standing.outcome or standing.elsewhere:
                continue
            if self.brief.driver is not None:
                turn = take(job, self.brief.driver, halving=self.brief.halving)
                if isinstance(turn, Elsewhere):
                    self.standings[trial] = replace(standing, elsewhere=turn)
                    continue
                self.turns[trial], job = turn, turn.job
            self.training.append(job)
        if not self.training:
            self.over = True
            return
        self.steps = self.brief.loop.run(self.training, self.gang, self.need.threads, self._asked)
        self.notice.busy = True
        foreseen, stall = self.brief.foreseen(self.unit), self.brief.stall
        if self.members:
            answers = [each.train.remote(self.training, foreseen, stall) for each in self.members]
            self.watchdog = Watchdog(self.members, answers, self._lost)
        self.pulse = Pulse(foreseen, self._stalled, floor=stall)

    def _end(self) -> None:
        """The trials have ended, or are left as they are: it is another's turn."""
        self.over = True
        self.steps = iter(())
        for turn in self.turns.values():
            turn.end()

    def _advance(self) -> bool:
        """Whether the pass is over."""
        assert self.pulse is not None
        if self.watchdog and self.watchdog.barked.is_set():
            raise WorkerDiedError("a worker is gone")
        start = time.monotonic()
        epochs = [math.floor(at.epoch) for at in self.at]
        if self.at:
            self.pulse.going()
        for at in self.steps:
            self._hear(at)
            # Its last step is no place to pause: what follows is measuring, and the commit.
            if _between(at):
                continue
            passed = time.monotonic() - start
            if passed > SLICE or (passed > QUICK and [math.floor(each.epoch) for each in at] != epochs):
                self.pulse.idle()  # until Tune calls again
                return False
            self.pulse.going()
        self._rest()
        if not self.stopping and not (self.at and all(at.outcome for at in self.at)):
            self.leaving = self._leaving()
            raise TakenAwayError("the machine of a worker is about to go, and the trial has its checkpoint")
        self._end()
        return True

    def _hear(self, at: "list[Progress]") -> None:
        """Where the trials stand now."""
        for job, now in zip(self.training, at, strict=True):
            trial = job.trial.id
            self.standings[trial] = Standing(
                trial,
                at=now.step,
                began=self.standings[trial].began if self.at else now.step,
                epoch=now.epoch,
                loss=now.loss,
                accuracy=now.accuracy,
                outcome=now.outcome,
            )
        self.at = list(at)

    def _leaving(self) -> list[str]:
        """The nodes of this gang whose machines have announced their end themselves."""
        given = [self.notice.given.is_set() and not self.told]
        with contextlib.suppress(RayError):  # one that is gone needs no avoiding
            given += ray.get([each.leaves.remote() for each in self.members], timeout=GRACE)
        return [node for node, leaves in zip(self.nodes, given, strict=False) if leaves]

    def _rest(self) -> None:
        """Nothing is trained any more."""
        if self.watchdog:
            self.spoilt = not self.watchdog.dismiss()
        if self.pulse:
            self.pulse.end()
        self.notice.busy = False

    def _wind_up(self, *, given_up: bool) -> None:
        """Let the trials save a checkpoint and end, if they have not ended. `given_up`: by successive halving."""
        if self.begun and not self.over and not self.spoilt:
            self.stopping = True
            assert self.pulse is not None
            self.pulse.going()
            for at in self.steps:
                self._hear(at)
                if not _between(at):
                    self.pulse.going()
            self._rest()
            if given_up:
                for trial, turn in self.turns.items():
                    if not self.standings[trial].outcome:
                        # Before its lease is free: another driver must see that it is not to be trained.
                        with contextlib.suppress(OSError, Refusal):
                            turn.store.stop_early(trial)
            self._end()

    def _failed(self, error: Exception) -> dict[str, Any]:
        """Report what happened; the driver says what follows, and has the leases until then. This process is replaced,
        unless it trained alone and nothing is wrong with it."""
        self.over = True
        self.steps = iter(())
        self.notice.busy = False
        if self.pulse:
            self.pulse.end()
        # Who takes a trial over sweeps away what its last attempt was in the middle of writing: then a file is missing.
        others = isinstance(error, TakenOver) or (
            isinstance(error, Refusal | StoreFailure) and any(turn.overtaken() for turn in self.turns.values())
        )
        if others:
            return self._taken_over()
        if isinstance(error, TakenAwayError):
            failure = Failure(Kind.PREEMPTED, str(error))
        else:
            failure = Failure.of(error)
            if self.watchdog:
                failure = self.watchdog.verdict(failure)
        if failure.kind is Kind.OOM:
            failure = self._whose(failure)
        # An error on a GPU may poison its process for good.
        alone = self.watchdog is None and self.gang.device.type == "cpu"
        self.spoilt = not (alone and failure.kind in (Kind.CODE, Kind.STORAGE))
        return self._report(not self.spoilt) | {"failure": failure, "spoilt": self.spoilt}

    def _taken_over(self) -> dict[str, Any]:
        """Another driver trains one of the trials, or has trained it to its end."""
        self.spoilt = self.watchdog is not None  # the others of the gang are in the middle of a step
        self._end()
        if len(self.training) > 1:  # the others of the pass go on: whose each of them is shows when they are claimed
            self.over = False
            self._let_go()
            return self._report(False)
        for trial in self.turns:
            self.standings[trial] = replace(self.standings[trial], elsewhere=Elsewhere("another driver", over=False))
        return self._report(not self.spoilt) | {"spoilt": self.spoilt}

    def _whose(self, failure: Failure) -> Failure:
        """Of an out-of-memory: the trial's own or a neighbour's, with the figures."""
        from bnscale.engine.machine import in_bytes, memory_of, peak_memory

        forecast = self.brief.forecast(self.unit)
        device = self.gang.device
        total, others = memory_of(device)
        foreseen = forecast.on_gpu if device.type == "cuda" else forecast.memory
        memory = Memory(total, others, peak_memory(device) or 0, foreseen)
        part = ""
        if device.type == "cuda" and self.need.sharers > 1:
            memory = memory.shared(self.need.sharers)
            part = f", its part of the GPU that {self.need.sharers} share"
        figures = (
            f"out of memory: {in_bytes(memory.forecast)} were forecast, this process has held {in_bytes(memory.peak)} "
            f"at most, others hold {in_bytes(memory.others)} of {in_bytes(memory.total)}{part}"
        )
        if len(self.training) > 1:
            figures += f", and {len(self.training)} trials were trained in one pass"
        if self.recomputing:
            figures += ", and activations were computed again instead of kept"
        return Failure(memory.kind, f"{failure.text.rstrip()}\n{figures}\n")

    def _lost(self, failure: Failure) -> None:
        """Called by the watchdog when a death has left this process hanging in a collective."""
        words.leave(self.brief.run, self.unit, failure)
        os._exit(1)

    def _stalled(self, wrong: str) -> None:
        """Called by the pulse when this process hangs in a step."""
        where = _write_down(self.brief.loop, self.training, 0, wrong)
        if self.members:
            time.sleep(GRACE)
            for each in self.members:
                ray.kill(each)
        words.leave(self.brief.run, self.unit, Failure(Kind.HANG, f"{wrong}; {where}"))
        os._exit(1)

    def _report(self, over: bool) -> dict[str, Any]:
        standings = list(self.standings.values())
        first = standings[0]
        result = {
            "members": standings,
            "failure": None,
            "spoilt": False,
            "nodes": self.nodes,
            "leaving": self.leaving,
            "done": over,
            "epoch": first.epoch,  # of trials that compete, each has a unit of its own
        }
        # Absent rather than None: ASHA compares what is there.
        return result | ({"accuracy": first.accuracy} if first.accuracy is not None else {})

    # --- a gang ----------------------------------------------------------------------------------

    def _raise(self) -> list[Any]:
        """Start the other workers, one in each further bundle of this trial's placement group."""
        place = ray.util.get_current_placement_group()
        assert place is not None
        return [
            ray.remote(Member)
            .options(
                num_cpus=self.need.threads,
                num_gpus=self.need.gpu_share,
                memory=self.need.memory,
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=rank),
            )
            .remote(self.brief.loop, self.need.threads)
            for rank in range(1, self.need.workers)
        ]

    def _meet(self, device: "torch.device") -> "Gang":
        """Join with the other workers; the gang stays together for all later trials."""
        loop, workers = self.brief.loop, self.need.workers
        address, port = self._host(ray.util.get_node_ip_address(), workers)
        joins = [each.join.remote(rank, workers, address, port) for rank, each in enumerate(self.members, start=1)]
        watchdog = Watchdog(self.members, joins, lambda failure: os._exit(1))
        gang = loop.join(0, workers, address, port, device)
        if not watchdog.dismiss():
            raise WorkerDiedError(watchdog.found.text if watchdog.found else "a worker died while the gang met")
        return gang

    def _host(self, address: str, workers: int) -> tuple[str, int]:
        """A meeting place, at another port where one is taken."""
        for left in reversed(range(PORTS)):
            try:
                return self.brief.loop.host(address, workers)
            except (OSError, RuntimeError) as error:
                if not left or Failure.of(error).kind is not Kind.PORT:
                    raise
        raise AssertionError("the last try returns or raises")
