"""The workers of a trial: the Lead, which Tune calls, and the other Members of its gang."""

import math
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bnscale.schedule.loop import Loop, record
from bnscale.schedule.needs import Need
from bnscale.schedule.tune.watchdog import Watchdog
from bnscale.schedule.turns import Elsewhere, Turn, take
from bnscale.store import TakenOver
from bnscale.trial import Outcome

if TYPE_CHECKING:
    import torch

    from bnscale.engine import Gang
    from bnscale.train import Job, Progress

SLICE = 2.0  # seconds of training between two reports, so that a stop is heard and progress lives
QUICK = 0.25  # seconds; an epoch shorter than this is no reason for a report


@dataclass(frozen=True)
class Brief:
    """What every leading worker knows, sent once: jobs and needs by trial id."""

    jobs: dict[str, "Job"]
    needs: dict[str, Need]
    loop: Loop
    driver: str | None = None  # whose leases the trials are trained under; None: under none
    dead: frozenset[str] = frozenset()  # drivers whose leases nobody holds any more
    halving: bool = False  # whether a trial that is told to stop was given up


class WorkerDiedError(RuntimeError):
    """Another worker of the gang is gone: nothing is wrong with the trial."""


def _ready(threads: int) -> "torch.device":
    """Pin this process to its share of the machine, and find its device."""
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    import torch

    torch.set_num_threads(threads)
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


class Member:
    """A worker that does not lead."""

    def __init__(self, loop: Loop, threads: int) -> None:
        self.loop = loop
        self.threads = threads

    def join(self, rank: int, workers: int, address: str, port: int) -> None:
        self.gang = self.loop.join(rank, workers, address, port, _ready(self.threads))

    def train(self, job: "Job") -> str | None:
        """Follow the leading worker to the end of a trial. Returns the error that ended it, if any."""
        try:
            for _ in self.loop.run(job, self.gang, self.threads, lambda: False):
                pass
        except Exception:
            return traceback.format_exc()
        return None


class Lead(tune.Trainable):
    """The leading worker of a gang, or the only one. Serves trial after trial."""

    def setup(self, config: dict[str, Any], brief: Brief) -> None:  # type: ignore[override]  # tune.with_parameters
        from bnscale.engine import Gang

        self.brief = brief
        self.need = brief.needs[config["trial"]]
        self.spoilt = False  # this process must serve no other trial
        self.members = self._raise()
        device = _ready(self.need.threads)  # takes seconds, on all workers at once
        self.gang = self._meet(device) if self.members else Gang(0, 1, device)
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._wind_up(given_up=self.brief.halving)
        if self.spoilt:
            return False
        self._take(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train for a slice of time. Reports where the trial stands."""
        if self.spoilt:
            raise RuntimeError("this worker is to be replaced")
        try:
            if not self.begun and (elsewhere := self._begin()):
                return self._report(True) | {"elsewhere": elsewhere}
            over = self._advance()
        except Exception as error:
            return self._failed(error)
        return self._report(over)

    def halt(self) -> dict[str, Any]:
        """Save a checkpoint and end. Called by the driver after Ctrl-C."""
        self._wind_up(given_up=False)
        return self._report(True)

    def cleanup(self) -> None:
        self._wind_up(given_up=self.brief.halving)

    # --- a trial ---------------------------------------------------------------------------------

    def _take(self, config: dict[str, Any]) -> None:
        self.job = self.brief.jobs[config["trial"]]
        self.stopping = False
        self.begun = False
        self.over = False
        self.turn: Turn | None = None
        self.began = 0  # the step of the checkpoint from which it goes on
        self.at: Progress | None = None
        self.watchdog: Watchdog | None = None
        self.steps: Iterator[Progress] = iter(())

    def _begin(self) -> Elsewhere | None:
        """Claim the trial, and set all workers to it, unless another driver has it."""
        self.begun = True
        if self.brief.driver is not None:
            turn = take(self.job, self.brief.driver, self.brief.dead, halving=self.brief.halving)
            if isinstance(turn, Elsewhere):
                self.over = True
                return turn
            self.turn, self.job = turn, turn.job
        self.steps = self.brief.loop.run(self.job, self.gang, self.need.threads, lambda: self.stopping)
        if self.members:
            self.watchdog = Watchdog(self.members, [each.train.remote(self.job) for each in self.members], self._lost)
        return None

    def _end(self) -> None:
        """The trial has ended, or is left as it is: it is another's turn."""
        self.over = True
        self.steps = iter(())
        if self.turn:
            self.turn.end()

    def _advance(self) -> bool:
        """Whether the trial is over."""
        if self.watchdog and self.watchdog.barked.is_set():
            raise WorkerDiedError("a worker is gone")
        start = time.monotonic()
        epoch = math.floor(self.at.epoch) if self.at else 0
        for at in self.steps:
            if self.at is None:
                self.began = at.step
            self.at = at
            # Its last step is no place to pause: what follows is measuring, and the commit.
            if at.outcome is not None or at.step >= at.total:
                continue
            passed = time.monotonic() - start
            if passed > SLICE or (passed > QUICK and math.floor(at.epoch) > epoch):
                return False
        if self.watchdog:
            self.spoilt = not self.watchdog.dismiss()
        self._end()
        return True

    def _wind_up(self, *, given_up: bool) -> None:
        """Let the trial save a checkpoint and end, if it has not ended. `given_up`: by successive halving."""
        if self.begun and not self.over and not self.spoilt:
            self.stopping = True
            for at in self.steps:
                self.at = at
            if self.watchdog:
                self.spoilt = not self.watchdog.dismiss()
            if given_up and self.turn and not (self.at and self.at.outcome):
                # Before its lease is free: another driver must see that it is not to be trained.
                self.turn.store.stop_early(self.job.trial.id)
            self._end()

    def _failed(self, error: Exception) -> dict[str, Any]:
        """Raise a worker's death, so that Tune begins again with fresh workers; record an error of the code."""
        if isinstance(error, TakenOver):
            self.spoilt = self.watchdog is not None  # the others of the gang are in the middle of a step
            self._end()
            elsewhere = {"elsewhere": Elsewhere("another driver", over=False)} if self.turn else {}
            return self._report(not self.spoilt) | {"spoilt": self.spoilt} | elsewhere
        text = "".join(traceback.format_exception(error))
        if self.watchdog:
            verdict = self.watchdog.verdict(text)
            self.spoilt = True
            if verdict is None:
                raise WorkerDiedError("another worker of the gang died") from error
            text = verdict
        # An error on a GPU may poison its process for good.
        self.spoilt = self.spoilt or self.gang.device.type == "cuda"
        record(self.brief.loop, self.job, text)
        self._end()
        return self._report(not self.spoilt) | {"outcome": str(Outcome.FAILED), "spoilt": self.spoilt}

    def _lost(self) -> None:
        """Called by the watchdog when a death has left this process hanging in a collective."""
        text = self.watchdog.found if self.watchdog else None
        if text:
            record(self.brief.loop, self.job, text)
        os._exit(1)

    def _report(self, over: bool) -> dict[str, Any]:
        at = self.at
        result = {
            "at": at.step if at else 0,
            "began": self.began,
            "epoch": at.epoch if at else 0.0,
            "loss": at.loss if at else None,
            "outcome": str(at.outcome) if at and at.outcome else None,
            "spoilt": False,
            "done": over,
        }
        # Absent rather than None: ASHA compares what is there.
        return result | ({"accuracy": at.accuracy} if at and at.accuracy is not None else {})

    # --- a gang ----------------------------------------------------------------------------------

    def _raise(self) -> list[Any]:
        """Start the other workers, one in each further bundle of this trial's placement group."""
        place = ray.util.get_current_placement_group()
        assert place is not None
        return [
            ray.remote(Member)
            .options(
                num_cpus=self.need.threads,
                num_gpus=self.need.gpus,
                memory=self.need.memory,
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=rank),
            )
            .remote(self.brief.loop, self.need.threads)
            for rank in range(1, self.need.workers)
        ]

    def _meet(self, device: "torch.device") -> "Gang":
        """Join with the other workers; the gang stays together for all later trials."""
        loop, workers = self.brief.loop, self.need.workers
        address, port = loop.host(ray.util.get_node_ip_address(), workers)
        joins = [each.join.remote(rank, workers, address, port) for rank, each in enumerate(self.members, start=1)]
        watchdog = Watchdog(self.members, joins, lambda: os._exit(1))
        gang = loop.join(0, workers, address, port, device)
        if not watchdog.dismiss():
            raise WorkerDiedError(watchdog.found or "a worker died while the gang met")
        return gang
