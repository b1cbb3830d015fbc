"""A grid of BN-only trials in one pass, against the same trials one after the other and against the plain loop.

    python benchmarks/cohort.py                                   ResNet-20, 1 to 16 trials, this CPU
    python benchmarks/cohort.py --device cuda --depth 110 866     on a GPU: the rows of the targets

K trials differ in their learning rate and share seed, images and frozen weights, batch 128 each. A line is K of them
as one cohort; where K is 1, one trial by the engine of single trials. `x plain` is the time in which `plain.py` takes K
steps of its one network over the time of one step of all K: how much faster a grid is done. The plain loop is timed
over some steps, and a training of it is so many times as long; it is fp32 always. `x one by one` is the same against K
steps of the single trial in the same precision. `% of the limit` is what `limit.py` allows over what it took.

Each loop has its own data and augmentation, a process of its own and a warm-up until its steps have become as fast as
they get. On a CPU they take turns, so that whatever else the machine does falls on all; on a GPU, which holds one at a
time, they follow one another. `memory` is the peak of the process, or of the GPU; `again` says that the activations do
not fit and are computed again.
"""

import argparse
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import plain
import table
import torch
from limit import Machine, effort, limit, measured, trial
from step import Apart, images

from bnscale.data import Resident, pixels
from bnscale.engine import Alone, Gang
from bnscale.engine.cohort import CohortEngine
from bnscale.engine.local import LocalEngine
from bnscale.engine.losses import Losses
from bnscale.engine.machine import forget_peak, keep_freed_memory, memory_of, peak_memory
from bnscale.networks import build
from bnscale.networks.recompute import Activations
from bnscale.schedule.budget import work
from bnscale.train import LATE, LOOK_EVERY
from bnscale.trial import Augmentation, Data, Pixels, Precision, Trial

BATCH = 128
HOPELESS = 1.5  # times a GPU's memory
ROUNDS = 8  # of warm-up, at most


class Grid:
    """The training steps of K trials as train.py takes them."""

    def __init__(self, trials: Sequence[Trial], folder: Path, device: str, way: Activations) -> None:
        keep_freed_memory()
        self.trials, self.device = trials, torch.device(device)
        self.data = Resident(trials[0], folder, self.device)
        self.way = way
        forget_peak(self.device)
        gang, network = Gang(device=self.device), build(trials[0])
        self.engine: Any = (
            Alone(LocalEngine(network, trials[0], gang, None, way))
            if len(trials) == 1
            else CohortEngine(network, trials, gang, [None] * len(trials), way)
        )
        self.at = 0
        self.losses: Losses[Trial] = Losses(self.engine)

    def run(self, steps: int, clock: Callable[[], float] = time.perf_counter) -> tuple[float, int, str]:
        """Seconds of so many updates of all trials, data and augmentation included; peak memory; what is said of it."""
        self._wait()
        start = clock()
        for _ in range(steps):
            losses = self.engine(*self.data.batch(self.at))
            self.engine.backward(losses)
            self.engine.step(*(each.rate(self.at) for each in self.trials))
            self.losses.add(losses)
            self.at += 1
            if self.at % LOOK_EVERY[self.device.type] == 0:
                for _, told in self.losses.told(self.at, self.trials, LATE[self.device.type]):
                    assert all(map(math.isfinite, (loss for _, values in told for loss in values)))
        self._wait()
        note = "" if self.way is Activations.KEPT else "again"
        return clock() - start, peak_memory(self.device) or 0, f"{note}|{self.engine.backend}"

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def too_large(trials: Sequence[Trial], device: torch.device) -> bool:
    """Whether what an uncompiled step keeps is so much beyond a GPU's memory that keeping it need not be tried."""
    return device.type == "cuda" and work(trials[0]).saved * len(trials) > HOPELESS * memory_of(device)[0]


class Plain:
    """The plain loop, which answers alike."""

    def __init__(self, depth: int, workers: int, device: str, batch: int) -> None:
        self.loop = plain.Loop(depth, batch, workers, device)

    def run(self, steps: int, clock: Callable[[], float]) -> tuple[float, int, str]:
        return self.loop.run(steps, clock), peak_memory(self.loop.device) or 0, ""


class Side:
    """One loop in a process of its own, and what it took in each turn."""

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        self.name, self.make, self.arguments = name, make, arguments
        self.seconds: list[float] = []  # a step
        self.memory = 0
        self.note = ""
        self.apart: Apart | None = None

    def start(self, seconds: float) -> None:
        """Warm up, and find how many steps a turn of so many seconds has."""
        self.apart = Apart(self.make, *self.arguments)
        before = self._step(2)
        for _ in range(ROUNDS):
            now = self._step(2)
            if now > 0.8 * before:
                break
            before = now
        self.steps = max(2, round(seconds / max(now, 1e-6)))

    def turn(self) -> None:
        self.seconds.append(self._step(self.steps))

    def stop(self) -> None:
        if self.apart is not None:
            self.apart.stop()
            self.apart = None

    def _step(self, steps: int) -> float:
        assert self.apart is not None
        answer: Any = self.apart.run(steps, time.perf_counter)
        took, self.memory, self.note = answer
        return took / steps


def _lives(side: Side, call: Callable[[Side], None]) -> bool:
    try:
        call(side)
    except (EOFError, OSError):  # its end of the pipe is gone; its own words are on stderr
        print(f"{side.name}: ended before its time", file=sys.stderr, flush=True)
        if side.apart is not None:
            side.apart.process.join()  # and with it its memory
            side.apart = None
        return False
    return True


def compare(
    lines: table.Table, depth: int, folder: Path, workers: int, whole: Machine, given: argparse.Namespace
) -> None:
    """The lines of one depth, each as soon as it is known. A loop that dies, as for want of memory, leaves a line
    without figures."""
    device: torch.device = given.device
    changes: dict[str, Any] = {"pixels": pixels(Data.CIFAR10, folder)}
    if given.quick:
        changes = {"data": Data.DIGITS, "pixels": Pixels.ORIGINAL, "augmentation": Augmentation.SHIFT}
    plain_one = Side(f"plain {depth}", Plain, depth, workers, str(device), given.batch)
    sides: dict[tuple[Precision, int], Side] = {}
    for precision in given.precision:
        first = trial(depth, given.batch, precision).model_dump() | changes
        for count in given.members:
            trials = [Trial(**(first | {"lr": 0.01 * 1.2**place})) for place in range(count)]
            way = Activations.RECOMPUTED if too_large(trials, device) else Activations.KEPT
            sides[precision, count] = Side(
                f"{count} of ResNet-{depth} {precision}", Grid, trials, folder, str(device), way
            )
    everyone = [plain_one, *sides.values()]
    for group in [everyone] if device.type == "cpu" else [[side] for side in everyone]:
        going = [side for side in group if _lives(side, lambda side: side.start(given.seconds))]
        for side in set(group) - set(going):
            if side.make is Grid and side.arguments[-1] is Activations.KEPT:  # for want of memory, most likely
                side.arguments = (*side.arguments[:-1], Activations.RECOMPUTED)
                going += [side] if _lives(side, lambda side: side.start(given.seconds)) else []
        for _ in range(given.turns):
            going = [side for side in going if _lives(side, Side.turn)]
        for side in going:
            side.stop()
        if device.type == "cpu":  # which is rarely as idle at one time as at another
            whole = whole.or_better(measured(device, torch.get_num_threads(), effort(device, quick=given.quick)))
        for (precision, count), side in sides.items():
            if side not in group:
                continue
            line: dict[str, Any] = {"depth": depth, "precision": precision, "trials": count}
            if side in going:
                took = median(side.seconds)
                least = limit(side.arguments[0][0], count, whole).seconds
                alone = sides.get((precision, 1))
                line |= {
                    "ms a step": 1000 * took,
                    "x plain": _times(count, plain_one, side),
                    "x one by one": _times(count, alone, side) if alone else None,
                    "% of the limit": 100 * least / took,
                    "memory": f"{side.memory / 2**30:.1f} GiB {side.note.partition('|')[0]}".strip(),
                    "backend": side.note.partition("|")[2],
                    "plain ms": 1000 * median(plain_one.seconds) if plain_one.seconds else None,
                    "plain workers": workers,
                    "steps": side.steps,
                    "limit ms": 1000 * least,
                }
            lines.line(line)
            lines.save(given.out)  # what is measured is kept, whatever comes
            if "not " in line["backend"]:  # the fastest way did not work: these ratios say little
                print(f"       {line['backend']}", flush=True)


def _times(count: int, other: Side, side: Side) -> list[float] | None:
    """How often as long `count` steps of another take, by turns; None where it has not been timed."""
    if len(other.seconds) != len(side.seconds):
        return None
    return [count * there / here for there, here in zip(other.seconds, side.seconds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table.asked(parser)
    parser.add_argument("--depth", type=int, nargs="+", default=[20], help="layers (default: 20)")
    parser.add_argument(
        "--members", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="trials in one pass (default: 1 2 4 8 16)"
    )
    parser.add_argument("--precision", type=Precision, nargs="+", default=list(Precision), help="(default: fp32 bf16)")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"images of each trial (default: {BATCH})")
    parser.add_argument("--turns", type=int, default=5, help="repetitions of each loop (default: 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each loop in a turn (default: 2)")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10; random images where it is not given")
    parser.add_argument(
        "--loaders", type=int, help="DataLoader processes of the plain loop (default: the number it is fastest with)"
    )
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    print(table.told(given.device), flush=True)
    workers = given.loaders
    if workers is None:
        cores = os.cpu_count() or 1
        counts = range(3) if given.device.type == "cpu" else sorted({min(cores, count) for count in (4, 8, 12)})
        workers = plain.best_of(counts, given.depth[0], given.batch, str(given.device))
    whole = measured(given.device, torch.get_num_threads(), effort(given.device, quick=given.quick))
    gc.collect()  # loops that were tried, and their processes
    if given.device.type == "cuda":
        torch.cuda.empty_cache()  # the others need the memory
    with nullcontext(Path()) if given.quick else images(given.data) as folder:
        lines = table.Table(
            "cohort",
            [
                table.Column("depth", "5d"),
                table.Column("precision", "9s"),
                table.Column("trials", "6d"),
                table.Column("ms a step", "10.1f", compared=True),
                table.Column("x plain", "20s"),
                table.Column("x one by one", "20s"),
                table.Column("% of the limit", "6.0f"),
                table.Column("memory", "14s"),
            ],
            ("depth", "precision", "trials"),
            given.device,
            f"BN-only CIFAR ResNets, batch {given.batch} a trial; medians of {given.turns} turns (min-max); "
            f"the plain loop with {workers} DataLoader processes",
        )
        for depth in given.depth:
            compare(lines, depth, folder, workers, whole, given)


if __name__ == "__main__":
    main()
