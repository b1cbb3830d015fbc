"""The schedule on a cluster that is not there: 2,000 trials of one step over 64 logical GPUs.

    python benchmarks/scale.py                            100, 500 and 2,000 trials; then the makespan
    python benchmarks/scale.py --gpus 8 --trials 50 100   smaller

Ray is told of GPUs that this machine does not have, and gets a real process for each; only what these do is a toy: it
sleeps, and imports no torch. All else is real: Tune, placement groups, leases, the judge, progress.

First each number of trials in a driver of its own, where a trial takes no time at all: processor time of the driver a
trial, and its memory, once every worker has had a trial. Both must not grow with the number of trials.

Then a study whose trials take as long as networks of 14 to 866 layers, to a scale: how long it takes against the
makespan that a plan forecasts. Once by a simulated clock, which stands while the processes of this machine, all on its
few cores, start and report; and once asleep, so that this counts, too.
"""

import argparse
import asyncio
import heapq
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import ray
from ray import cloudpickle
from rich.console import Console

from bnscale.lease import Driver
from bnscale.schedule import tune
from bnscale.schedule.failure import Failure
from bnscale.schedule.makespan import Unit, makespan
from bnscale.schedule.needs import GIB, Node
from bnscale.schedule.progress import Watch
from bnscale.store import Store
from bnscale.trial import Outcome, Trial

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "studies"))
import recipes as recipes

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not import benchmarks

CORES = 4  # logical ones of each GPU


@dataclass(frozen=True)
class Job:
    """As much of train.Job as the schedule and the toy look at."""

    trial: Trial
    store: str
    seconds: float
    attempts: int = 0
    fence: int = 0
    recompute: bool = False
    probes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Forecast:
    """The fields of budget.Forecast, which imports torch."""

    seconds: float
    memory: int = GIB
    on_gpu: int = 0
    disk: int = 0


@dataclass(frozen=True)
class Progress:
    """The fields of train.Progress."""

    step: int
    total: int
    epoch: float
    epochs: float
    loss: float | None
    accuracy: float | None
    outcome: Outcome | None


class Toy:
    """A `Loop` whose trials sleep, or wait for the `conductor` of a simulated clock."""

    def __init__(self, conductor: Any = None) -> None:
        self.conductor = conductor

    def run(self, jobs: list[Job], gang: Any, threads: int, stop: Callable[[], bool]) -> Iterator[list[Progress]]:
        seconds = sum(each.seconds for each in jobs)
        if self.conductor is None:
            time.sleep(seconds)
        else:
            ray.get(self.conductor.train.remote(seconds))
        yield [Progress(1, 1, 1.0, 1.0, 0.0, None, Outcome.FINISHED) for _ in jobs]

    def ready(self, threads: int) -> Any:
        return SimpleNamespace(rank=0, workers=1, leads=True, device=SimpleNamespace(type="cpu"))

    def fail(self, job: Job, failure: Failure) -> None:
        raise AssertionError(failure.text)

    def log(self, job: Job, text: str) -> str:
        raise AssertionError(text)

    def host(self, address: str, workers: int) -> tuple[str, int]:
        raise AssertionError("a worker is alone")

    def join(self, rank: int, workers: int, address: str, port: int, device: Any) -> Any:
        raise AssertionError("a worker is alone")


class Conductor:
    """A clock that stands while workers start, report and are given their next trial: however busy this machine is, a
    trial takes just the time that it should. Of the trials at work the one that ends first ends only when every slot
    has one again, or none is left."""

    def __init__(self, slots: int, trials: int) -> None:
        self.slots = slots
        self.left = trials  # that have not begun
        self.now = 0.0  # simulated seconds
        self.running: list[tuple[float, int, asyncio.Event]] = []

    async def train(self, seconds: float) -> None:
        over = asyncio.Event()
        self.left -= 1
        heapq.heappush(self.running, (self.now + seconds, self.left, over))
        while self.running and (len(self.running) == self.slots or not self.left):
            self.now, _, ended = heapq.heappop(self.running)
            ended.set()
        await over.wait()

    async def clock(self) -> float:
        return self.now


@dataclass(frozen=True)
class Mark:
    """The driver when a trial ended."""

    wall: float  # s
    cpu: float  # s, of all its threads
    memory: int  # bytes


class Clock(Watch):
    """Notes when each trial began and ended, and shows nothing."""

    def __init__(self, seconds: dict[str, float]) -> None:
        super().__init__(seconds, Console(file=io.StringIO()))
        self.ends: list[Mark] = []
        self.starts: list[float] = []

    def started(self, trial: str) -> None:
        self.starts.append(time.perf_counter())
        super().started(trial)

    def ended(self, trial: str, outcome: Outcome | None) -> None:
        self.ends.append(Mark(time.perf_counter(), time.process_time(), psutil.Process().memory_info().rss))
        super().ended(trial, outcome)


def trials(count: int) -> list[Trial]:
    one_step = {"pixels": "original", "depth": 8, "trainable": "bn", "epochs": None, "steps": 1, "lr": 0.1}
    return [Trial.recall(recipes.FRANKLE_CIFAR | one_step | {"seed": seed}) for seed in range(count)]


class Time(Enum):
    SLEPT = "slept"  # on the wall
    SIMULATED = "simulated"


def scheduled(seconds: list[float], gpus: int, folder: Path, kind: Time = Time.SLEPT) -> tuple[Clock, float]:
    """A study of trials that take so long, and the simulated seconds that it took, if they are."""
    store = str(folder / "store")
    jobs = [Job(of, store, each) for of, each in zip(trials(len(seconds)), seconds, strict=True)]
    forecasts: Any = {each.trial.id: Forecast(each.seconds) for each in jobs}
    declared = Node(CORES * gpus, gpus, 4 * GIB * gpus)
    driver = Driver(Store(store).storage, "benchmark")
    watch = Clock({trial: each.seconds for trial, each in forecasts.items()})
    with tune.connect("local", declared=declared) as cluster, driver, watch:
        conductor: Any = None
        if kind is Time.SIMULATED:
            conductor = ray.remote(Conductor).options(num_cpus=0, max_concurrency=10 * gpus).remote(gpus, len(jobs))
        endings = tune.run(
            jobs,  # type: ignore[arg-type]
            forecasts,
            cluster,
            workers=1,
            threads=1,
            rivals=None,
            watch=watch,
            mend="run it again",
            loop=Toy(conductor),  # type: ignore[arg-type]
            driver=driver,
        )
        simulated = 0.0 if conductor is None else ray.get(conductor.clock.remote())
    assert {each.outcome for each in endings.values()} == {Outcome.FINISHED}, endings
    return watch, simulated


def cost(count: int, gpus: int) -> dict[str, float]:
    """Of a trial after the first of each worker."""
    with tempfile.TemporaryDirectory() as folder:
        ends = scheduled([0.0] * count, gpus, Path(folder))[0].ends
    warm, last = ends[min(gpus, count // 2)], ends[-1]
    left = count - min(gpus, count // 2) - 1
    return {
        "trials": count,
        "cpu": (last.cpu - warm.cpu) / left,
        "wall": (last.wall - warm.wall) / left,
        "memory": last.memory / 2**20,
        "warm": warm.wall - ends[0].wall,
    }


def lasting(count: int, scale: float) -> list[float]:
    """Seconds of trials that take as long as networks of 14 to 866 layers, to this scale."""
    depths = (14, 32, 56, 110, 218, 434, 866)
    return [scale * depths[i % len(depths)] for i in range(count)]


def spans(count: int, gpus: int, scale: float) -> dict[str, float]:
    """A study that sleeps: how long it took, and how long it should have, its processes being there when they were."""
    seconds = lasting(count, scale)
    with tempfile.TemporaryDirectory() as folder:
        watch, _ = scheduled(seconds, gpus, Path(folder))
    free = [each - watch.starts[0] for each in watch.starts[:gpus]]
    heapq.heapify(free)
    for each in sorted(seconds, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + each)
    return {
        "measured": watch.ends[-1].wall - watch.starts[0],
        "forecast": max(free),
        "late": watch.starts[gpus - 1] - watch.starts[0],
    }


def simulated(count: int, gpus: int, scale: float) -> dict[str, float]:
    """The same by a simulated clock."""
    with tempfile.TemporaryDirectory() as folder:
        _, found = scheduled(lasting(count, scale), gpus, Path(folder), Time.SIMULATED)
    return {"measured": found}


def alone(*words: str) -> dict[str, float]:
    """What a driver of its own found."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=64, help="logical ones (default: 64)")
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 500, 2000], help="default: 100 500 2000")
    parser.add_argument("--lasting", type=int, default=300, help="trials of the makespan (default: 300; 0: none)")
    parser.add_argument("--scale", type=float, default=0.1, help="seconds that a layer sleeps (default: 0.1)")
    parser.add_argument(
        "--of", choices=("cost", "spans", "simulated"), help=argparse.SUPPRESS
    )  # in a process of its own
    given = parser.parse_args()
    if given.of == "cost":
        print(json.dumps(cost(given.trials[0], given.gpus)))
        return
    if given.of:
        act = spans if given.of == "spans" else simulated
        print(json.dumps(act(given.lasting, given.gpus, given.scale)))
        return
    from step import machine  # brings torch, which no worker must have

    gpus = ["--gpus", str(given.gpus)]
    print(machine())
    print(f"{given.gpus} logical GPUs, as many processes; trials of one step that take no time")
    print("trials  driver, ms of the processor a trial  ms a trial  driver, MiB")
    for count in given.trials:
        found = alone("--of", "cost", *gpus, "--trials", str(count))
        print(
            f"{count:6}  {1000 * found['cpu']:35.1f}  {1000 * found['wall']:10.1f}  {found['memory']:11.0f}", flush=True
        )
    if given.lasting:
        say_makespan(given.lasting, given.gpus, given.scale)


def say_makespan(count: int, gpus: int, scale: float) -> None:
    """A plan's forecast, and what it came to by both clocks."""
    found = makespan([Unit(each) for each in lasting(count, scale)], gpus)
    print(f"makespan of {count} trials that take {14 * scale:g} to {866 * scale:g} s:")
    print(f"forecast   {found.seconds:.1f} s, {100 * found.utilisation:.0f} % of the GPUs' time in use")
    print(f"bound      {found.bound:.1f} s, below which no order is", flush=True)
    words = ["--gpus", str(gpus), "--lasting", str(count), "--scale", str(scale)]
    clock = alone("--of", "simulated", *words)["measured"]
    print(
        f"simulated  {clock:.1f} s by a clock that stands while processes start and report: {clock / found.seconds:.3f}"
    )
    took = alone("--of", "spans", *words)
    print(f"slept      {took['measured']:.1f} s; the last process began {took['late']:.1f} s after the first:")
    print(f"           with that the forecast is {took['forecast']:.1f} s: {took['measured'] / took['forecast']:.3f}")


if __name__ == "__main__":
    main()
