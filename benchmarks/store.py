"""What the store costs: writing 1,000 trials x 160 epochs x 4 probes, and answering a study's whole report over them.

    python benchmarks/store.py                            1,000 trials, in a temporary folder
    python benchmarks/store.py --trials 100 --keep /tmp/s kept, to be asked again without writing

The trials are those of studies/frankle_depth.py on CIFAR-10, at 14 and 32 layers. Their readings are made up, but are
as many and of the types that training takes, and go through `Store.writer` as training gives them: rows after every
epoch, a commit at every tenth, the end, which makes one file a table. curve, gamma, gamma_histogram and sparsity look
after every epoch; clamp at the end, as the study has it, so that every query of its report has rows.

Then a fresh process asks: it opens a session, makes the tables `plan` and `chosen`, and runs `cells` and every query of
the study's .sql file. Its clock counts all of that from the session's beginning, but not the imports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from step import machine, recipes

from bnscale import query, report
from bnscale.probes import (
    END,
    EPOCH,
    TABLES,
    Cadence,
    Curve,
    Probe,
    clamp,
    curve,
    gamma,
    gamma_histogram,
    sparsity,
)
from bnscale.probes.gamma import DEAD, HISTOGRAM, Clamp, Gamma, GammaHistogram
from bnscale.probes.sparsity import Sparsity
from bnscale.store import Store
from bnscale.study import Preset, grid
from bnscale.study.plan import Planned, plan, relate
from bnscale.train import readings
from bnscale.trial import Outcome, Pixels, Trainable, Trial

QUERIES = Path(__file__).resolve().parents[1] / "studies" / "frankle_depth.sql"
PROBES: dict[Probe, Cadence] = {curve: EPOCH, gamma: EPOCH, gamma_histogram: EPOCH, sparsity: EPOCH, clamp: END}
SETS = [Trainable.BN, Trainable.BN_OUTPUT, Trainable.ALL, Trainable.BN_SHORTCUT_OUTPUT, Trainable.TWO_PER_CHANNEL]
COMMIT = 10  # epochs between two commits: a checkpoint each 30 s of a training of some minutes
ASKINGS = 3  # fresh processes; the median counts


def planned(count: int) -> list[Planned]:
    """So many trials of the study's grid, with all its cells and rates, and as many seeds as it takes."""
    cells, rates = grid(depth=[14, 32], trainable=SETS), grid(lr=[0.01, 0.03, 0.1, 0.3])
    seeds = -(-count // (len(cells) * len(rates)))
    found = plan(Preset(recipes.FRANKLE_CIFAR, cells, rates, range(seeds)), lambda data: Pixels.ORIGINAL)
    return found[:count]


# --- writing --------------------------------------------------------------------------------------


class Made:
    """Readings of a network that nobody trained. Those of its layers are drawn once a depth."""

    def __init__(self, of: Trial) -> None:
        draw = np.random.default_rng(of.depth)
        self.layers = {
            step: [Gamma(step, f"blocks.{i}.norm", i, 16, *draw.random(12).tolist()) for i in range(len(of.norms))]
            for step in steps(of)
        }
        channels = 16 * len(of.norms)
        self.histogram = {
            step: [
                GammaHistogram(step, low, high, count, channels)
                for low, high, count in zip(
                    HISTOGRAM, HISTOGRAM[1:], draw.integers(0, 40, len(HISTOGRAM) - 1).tolist(), strict=False
                )
            ]
            for step in steps(of)
        }
        self.relus = {
            step: [Sparsity(step, f"blocks.{i}.relu", i, 1000, 4096, *draw.random(2).tolist()) for i in range(of.depth)]
            for step in steps(of)
        }


def steps(of: Trial) -> range:
    """At which the probes look."""
    return range(0, of.total_steps + 1, of.steps_per_epoch)


def write(trials: list[Trial], place: Path) -> Iterator[tuple[float, int]]:
    """Seconds in the writer and rows of each trial in turn."""
    store = Store(place)
    made = {trial.depth: Made(trial) for trial in {trial.depth: trial for trial in trials}.values()}
    for trial in trials:
        of, draw = made[trial.depth], np.random.default_rng(trial.seed)
        spent, rows = 0.0, 0

        @contextmanager
        def clock() -> Iterator[None]:
            nonlocal spent
            start = time.process_time()
            yield
            spent += time.process_time() - start

        with clock():
            writer = store.writer(trial, readings(PROBES), {"host": "here", "threads": 1, "workers": 1})
            writer.rewind(0)
        for epoch, step in enumerate(steps(trial)):
            if epoch and epoch % COMMIT == 0:
                with clock():
                    writer.flush(step)
            accuracies = draw.random(3).tolist()
            taken: dict[str, list[Any]] = {
                "curve": [
                    Curve(step, float(epoch), split, 5000, 1 - accuracy, accuracy, accuracy)
                    for split, accuracy in zip(("train", "validation", "test"), accuracies, strict=True)
                ],
                "gamma": of.layers[step],
                "gamma_histogram": of.histogram[step],
                "sparsity": of.relus[step],
            }
            if step == trial.total_steps:
                taken["clamp"] = [Clamp(step, split, 5000, DEAD, 0.2, 0.5, 0.5) for split in ("validation", "test")]
            rows += sum(map(len, taken.values()))
            with clock():
                for table, each in taken.items():
                    writer.write(table, each)
        with clock():
            writer.finish(Outcome.FINISHED, trial.total_steps, {"last_finite_loss": 0.5})
        yield spent, rows


# --- asking ---------------------------------------------------------------------------------------


def ask(place: Path, count: int) -> dict[str, tuple[float, float]]:
    """Seconds of each part of a report's questions, in this process: on the wall, and of the processor."""
    spent: dict[str, tuple[float, float]] = {}
    study = planned(count)

    def timed(name: str, act: Callable[[], object]) -> None:
        start, busy = time.perf_counter(), time.process_time()
        act()
        spent[name] = time.perf_counter() - start, time.process_time() - busy

    sessions: list[query.Session] = []
    timed("session", lambda: sessions.append(query.open(place, TABLES)))
    (session,) = sessions
    timed("plan and chosen", lambda: relate(session, study))
    timed("cells", lambda: session.sql("from cells"))
    for name, asked in report.queries(QUERIES.read_text()).items():
        timed(name, lambda sql=asked.sql: session.sql(sql))  # type: ignore[misc]
    return spent


def asked(place: Path, count: int) -> dict[str, tuple[float, float]]:
    """The same in fresh processes: the median of each part."""
    runs = []
    for _ in range(ASKINGS):
        words = [sys.executable, __file__, "--trials", str(count), "--ask", str(place)]
        runs.append(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    return {name: (median(run[name][0] for run in runs), median(run[name][1] for run in runs)) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="default: 1,000")
    parser.add_argument("--keep", type=Path, help="a folder for the store; one that is there is asked as it is")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)  # a process of its own asks this store
    given = parser.parse_args()
    if given.ask:
        print(json.dumps(ask(given.ask, given.trials)))
        return
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        place = given.keep or Path(folder) / "store"
        if not place.exists():
            trials = [each.trial for each in planned(given.trials)]
            written = list(write(trials, place))
            seconds, rows = sum(each for each, _ in written), sum(each for _, each in written)
            files = sum(1 for _ in place.rglob("*.parquet"))
            print(f"writing   {len(trials):,} trials, {rows:,} rows, into {files:,} files")
            print(
                f"          {seconds / len(trials):.3f} s of the processor a trial, {rows / seconds:,.0f} rows a second"
            )
        spent = asked(place, given.trials)
        wall, busy = (sum(part[clock] for part in spent.values()) for clock in (0, 1))
        print(f"asking    {wall:.2f} s, {busy:.2f} s of the processor, in a fresh process; medians of {ASKINGS}")
        for name, part in spent.items():
            print(f"          {part[0]:.3f}  {part[1]:.3f}  {name}")


if __name__ == "__main__":
    main()
