"""A real study of 30 trials while a killer ends its workers and its driver: in the end nothing is lost or there twice.

The unbroken study that it is held against is one plain loop over the same trials in one process, with no schedule.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil
import pytest
import torch

import bnscale
from bnscale import train
from bnscale.engine import Gang
from bnscale.probes import looking
from bnscale.store import Store
from bnscale.study.asked import Asked
from bnscale.trial import Outcome

ROOT = Path(__file__).parents[2]
FILE = ROOT / "studies" / "frankle_depth.py"
AXES = ["depth=8", "trainable=bn,output", "lr=0.1,0.3,1", "seed=0,1,2,3,4", "epochs=none", "steps=30"]
TABLES = ("curve", "gamma", "gamma_histogram", "clamp", "sparsity")
PAUSE = 2.0  # seconds between two deaths of workers, at least
WORKERS = 3  # that die in all: each costs its successor some seconds of imports
DRIVER_AT = (12,)  # trials that have ended when the driver is killed: each start costs half a minute where two are busy
SEED = 7

pytestmark = pytest.mark.timeout(900)  # some of the many processes may take long to start on a busy machine


def start(store: Path, said: IO[str]) -> subprocess.Popen[str]:
    """The study file in a process group of its own, as a terminal gives it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    sets = [word for each in AXES for word in ("--set", each)]
    return subprocess.Popen(
        [
            sys.executable,
            str(FILE),
            "--preset",
            "laptop",
            *sets,
            "--cohort",
            "1",
            "--save-every",
            "0.3",
            "--store",
            str(store),
        ],
        stdout=said,
        stderr=said,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )


def unbroken(store: Path) -> None:
    """Every trial of the study, one after the other, in this process."""
    sys.path.insert(0, str(FILE.parent))
    from frankle_depth import study

    asked = Asked.of(study, FILE, "laptop", AXES, store, None)
    assert len(asked.planned) == 30
    for each in asked.planned:
        job = train.Job(each.trial, looking(study.probes, each.trial), str(store), str(asked.data), None, 0, 1e9)
        *_, (last,) = train.run([job], Gang(0, 1, torch.device("cpu")), 1, lambda: False)
        assert last.outcome in (Outcome.FINISHED, Outcome.DIVERGED)


@dataclass
class Killer:
    """Ends a random worker whenever the study has gone on for a while since the last death."""

    store: Path
    dice: random.Random = field(default_factory=lambda: random.Random(SEED))
    killed: int = 0
    last: float = 0.0
    progress: int = -1
    under_way: bool = False  # whether a trial was in the middle of its training at the last look

    def look(self, driver: psutil.Process) -> int:
        """How many trials have ended."""
        found = Store.existing(self.store).manifests() if (self.store / "manifests").is_dir() else []
        at = sum(each.step for each in found)
        self.under_way = any(each.outcome is None for each in found)
        if self.under_way and self.killed < WORKERS and at > self.progress and time.monotonic() - self.last > PAUSE:
            workers = [each for each in driver.children(recursive=True) if "Trainable" in _name(each)]
            if workers and self.progress >= 0:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.dice.choice(workers).kill()
                    self.killed += 1
            self.progress, self.last = at, time.monotonic()
        return sum(each.outcome is not None for each in found)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 of the driver; its family must follow without being asked."""
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [each for each in family if "Trainable" in _name(each)]
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


def test_04_a_study_whose_workers_and_driver_are_killed_ends_with_the_rows_of_an_unbroken_one(tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    killer = Killer(broken)
    for ended in (*DRIVER_AT, 31):
        said = (tmp_path / "said").open("w+")  # no pipe: helpers of Ray's outlive the driver and would hold it
        with said, start(broken, said) as process:
            try:
                driver = psutil.Process(process.pid)
                while process.poll() is None and not (
                    killer.look(driver) >= ended and (killer.under_way or ended > 30)
                ):
                    time.sleep(0.1)
                said.seek(0)
                output = said.read()
                if ended < 31:
                    assert process.poll() is None, output
                    kill(process)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert killer.killed >= 2, output
    attempts = [each.attempts for each in Store.existing(broken).manifests()]
    assert len(attempts) == 30
    assert sum(attempts) > 30

    unbroken(whole)
    ours, theirs = bnscale.open(broken), bnscale.open(whole)
    for table in TABLES:
        rows, expected = (each.sql(f"from {table} order by all").rows for each in (ours, theirs))
        assert len(expected) > 0
        assert repr(rows) == repr(expected), table  # to the last bit; NaN is written like NaN
    same = "select trial, outcome, step, total_steps, diverged_step, last_finite_loss from trials order by trial"
    assert repr(ours.sql(same).rows) == repr(theirs.sql(same).rows)
    shutil.rmtree(broken)
