"""What a trial costs beside its training: trials of one step each, through the schedule and in one plain loop.

    python benchmarks/overhead.py                         1,000 trials on all cores of this machine

Both build the same network, load the same data, take the same step and measure the same curve. The schedule adds Ray,
progress, the store's files and the checkpoint, and trains as many trials at once as there are cores: its overhead is
what it takes beyond the loop's time shared among them. The first trials, which raise the workers, are not counted; the
first and the last quarter of the others are told apart, for a trial must not cost more the more there are.

Then the share of what keeps a study whole whatever dies: lease, manifests and policy. Each of these trials once more
makes just the calls of a real one (claim, open the writer, flush, finish, let the lease go, what the judge hears), on
the disk and forced to it, and each layer has its own clock. Their sum is held against one second of training; a real
trial waits for all of it, but for the signs of life, which the driver gives beside it.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from step import CPU, machine, recipes

from bnscale.data import Resident
from bnscale.engine import Gang
from bnscale.engine.local import LocalEngine
from bnscale.lease import BEAT, Driver
from bnscale.networks import build
from bnscale.probes import END, Curve, Snapshot, curve
from bnscale.schedule import tune
from bnscale.schedule.budget import Forecast
from bnscale.schedule.failure import Judge
from bnscale.schedule.progress import Watch
from bnscale.schedule.turns import Turn, take
from bnscale.store import Store
from bnscale.train import Job, readings
from bnscale.trial import Augmentation, Data, Outcome, Pixels, Trainable, Trial

PLAIN = 200  # trials of the plain loop
SMALL = Forecast(seconds=0.1, memory=2**30, on_gpu=0, disk=100_000)


def trial(seed: int) -> Trial:
    digits = {"data": Data.DIGITS, "pixels": Pixels.ORIGINAL, "validation": 0, "augmentation": Augmentation.SHIFT}
    one_step = {"depth": 8, "trainable": Trainable.BN, "epochs": None, "steps": 1, "lr": 0.1, "seed": seed}
    return Trial(**(recipes.FRANKLE_CIFAR | digits | one_step))


class Clock(Watch):
    """Notes when each trial ended, and shows nothing."""

    def __init__(self, jobs: list[Job]) -> None:
        super().__init__({job.trial.id: SMALL.seconds for job in jobs}, Console(file=io.StringIO()))
        self.gangs = 1  # at work at once
        self.ends: list[float] = []
        self.warm = self.last = (0.0, 0.0)  # processor seconds by then, of this process and of all others

    def ended(self, trial: str, outcome: Outcome | None) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) == self.gangs:
            self.warm = busy()
        if len(self.ends) == len(self.seconds):
            self.last = busy()
        super().ended(trial, outcome)


def busy() -> tuple[float, float]:
    """Processor seconds of this process, and of all that it has started: Ray's own, and the workers."""
    others = 0.0
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            others += sum(each.cpu_times()[:2])
    return time.process_time(), others


def in_process(trials: list[Trial], folder: Path) -> float:
    """Seconds a trial in one loop on one core, after the first."""
    torch.set_num_threads(1)
    start = 0.0
    for place, of in enumerate(trials):
        if place == 1:
            start = time.perf_counter()
        data = Resident(of, folder, CPU)
        engine = LocalEngine(build(of), of, Gang(device=CPU), None)
        for step in range(of.total_steps):
            loss = engine(*data.batch(step))
            engine.backward(loss)
            engine.step(of.rate(step))
            assert torch.isfinite(loss)
        list(curve(Snapshot(of, of.total_steps, engine, data)))
    return (time.perf_counter() - start) / (len(trials) - 1)


@dataclass(frozen=True)
class Found:
    """Of trials through the schedule."""

    gangs: int  # at work at once
    warm: float  # seconds until each of them had ended its first trial
    each: float  # seconds a trial from then on
    first: float  # the same over the first quarter of them
    last: float  # and over the last
    driver: float  # of the processor a trial, in the driver
    others: float  # and in all other processes: Ray's own, and the workers, which train


def scheduled(trials: list[Trial], folder: Path) -> Found:
    store = folder / "store"
    jobs = [Job(of, {curve: END}, str(store), str(folder), "benchmark", 0, 30.0) for of in trials]
    start = time.perf_counter()
    driver = Driver(Store(store).storage, "benchmark")
    with tune.connect("local") as cluster, driver, Clock(jobs) as watch:
        gangs = watch.gangs = cluster.slots(1, SMALL.memory)
        outcomes = tune.run(
            jobs, {of.id: SMALL for of in trials}, cluster,
            workers=1, threads=1, rivals=None, watch=watch, mend="run it again", driver=driver,
        )  # fmt: skip
    assert {each.outcome for each in outcomes.values()} == {Outcome.FINISHED}, outcomes
    ends = watch.ends[gangs - 1 :]
    quarter = max(1, (len(ends) - 1) // 4)
    return Found(
        gangs=gangs,
        warm=ends[0] - start,
        each=(ends[-1] - ends[0]) / (len(ends) - 1),
        first=(ends[quarter] - ends[0]) / quarter,
        last=(ends[-1] - ends[-1 - quarter]) / quarter,
        driver=(watch.last[0] - watch.warm[0]) / (len(ends) - 1),
        others=(watch.last[1] - watch.warm[1]) / (len(ends) - 1),
    )


def layers(trials: list[Trial], folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds in each layer, of a trial that takes a second: on the wall, and of the processor."""
    spent: dict[str, float] = defaultdict(float)
    busy: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def clock(layer: str) -> Iterator[None]:
        part = len(trials) * (BEAT if layer == "signs of life" else 1)  # one in BEAT seconds
        start, cpu = time.perf_counter(), time.thread_time()
        yield
        spent[layer] += (time.perf_counter() - start) / part
        busy[layer] += (time.thread_time() - cpu) / part

    store = Store(folder / "layers")
    judge = Judge(len(trials))
    rows = [Curve(1, 0.01, split, 360, 0.5, 0.5, 0.5) for split in ("train", "validation", "test")]
    with Driver(store.storage, "benchmark") as driver:
        for of in trials:
            job = Job(of, {curve: END}, store.url, str(folder), "benchmark", 0, 30.0)
            with clock("lease"):
                turn = take(job, driver.id, halving=False)
            assert isinstance(turn, Turn)
            with clock("manifests"):
                writer = store.writer(of, readings(job.probes), {"host": "here", "threads": 1}, turn.job.fence)
                writer.rewind(0)
                writer.flush(1)
                writer.write("curve", rows)
                writer.finish(Outcome.FINISHED, 1, {"last_finite_loss": 0.5})
            with clock("policy"):
                for _ in range(4):  # a report each quarter of a second
                    judge.progressed(of.id, 1)
                judge.ended(None)
            with clock("lease"):
                turn.end()
        for _ in trials:
            with clock("signs of life"):
                driver.beat()
                driver.dead()
    return spent, busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="of one step each (default: 1,000)")
    given = parser.parse_args()
    trials = [trial(seed) for seed in range(given.trials)]
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        spent, busy = layers(trials, Path(folder))
        plain = in_process(trials[:PLAIN], Path(folder))
        found = scheduled(trials, Path(folder))
    print(f"{len(trials)} trials of one step, ResNet-8 on digits, one reading of the curve each")
    print(f"one plain loop     {plain:.3f} s a trial on one core, {plain / found.gangs:.3f} shared among {found.gangs}")
    print(
        f"through Ray Tune   {found.each:.3f} s a trial, {found.gangs} at once; {found.warm:.1f} s until they were warm"
    )
    print(f"                   {found.first:.3f} s over the first quarter of them, {found.last:.3f} over the last")
    print(
        f"of the processor   {found.driver:.3f} s a trial in the driver, {found.others:.3f} in Ray and the workers: "
        "what counts where others work"
    )
    print(f"overhead           {found.each - plain / found.gangs:.3f} s a trial")
    each = ", ".join(f"{layer} {1000 * part:.2f} ms" for layer, part in spent.items())
    total, cpu = sum(spent.values()), sum(busy.values())
    print(f"of a trial of one second: {each}: together {100 * total / (1 + total):.1f} %")
    print(
        f"    of the processor {1000 * cpu:.1f} ms, {100 * cpu / (1 + cpu):.1f} %: the one to trust where others work"
    )


if __name__ == "__main__":
    main()
