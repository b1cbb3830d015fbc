"""Several drivers on one store: each trial is trained once, and nobody's death or sleep loses or doubles anything.

Run as a program it is another driver: it trains one trial of digits, under a lease, as slowly as it is told.
"""

import importlib
import io
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from examples import digits
from rich.console import Console

import bnscale
from bnscale import lease as leases
from bnscale import storage as storages
from bnscale import store as stores
from bnscale import train
from bnscale.engine import Gang
from bnscale.engine.checkpoint import newest
from bnscale.lease import Driver, Held, Lease, claim, drivers, holder, release
from bnscale.probes import EPOCH, curve
from bnscale.schedule.failure import Ending, Kind
from bnscale.schedule.loop import Training
from bnscale.schedule.notice import Notice
from bnscale.schedule.progress import Watch
from bnscale.schedule.tune.lead import Brief, Lead, Standing
from bnscale.schedule.turns import Elsewhere, Turn, look, take
from bnscale.storage import Folder, StoreFailure
from bnscale.store import Manifest, Store, TakenOver
from bnscale.study.asked import Asked
from bnscale.study.say import say_status
from bnscale.trial import Outcome, Refusal, Trial

ROOT = Path(__file__).parents[2]
FILE = ROOT / "studies" / "frankle_depth.py"
STEPS = 40
LIMIT = 1.5  # seconds of silence, for tests

pytestmark = pytest.mark.timeout(400)  # processes may take long to start on a busy machine


def job(store: Path, seed: int = 0, steps: int = STEPS) -> train.Job:
    trial = digits(seed=seed, steps=steps, batch=100, norm_batch=100)
    return train.Job(trial, {curve: EPOCH}, str(store), str(store), None, 0, 0.0)


def to_the_end(turn: Turn, pause: float = 0.0) -> Outcome | None:
    outcome = None
    for (at,) in train.run([turn.job], Gang(0, 1, torch.device("cpu")), 1, lambda: False):
        outcome = at.outcome
        time.sleep(pause)
    turn.end()
    return outcome


def rows(store: Path) -> list[tuple[Any, ...]]:
    return bnscale.open(store).sql("select step, split, loss, accuracy from curve order by all").rows


def manifest(store: Path, trial: Trial) -> Manifest:
    found = Store.existing(store).manifest(trial.id)
    assert found is not None
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """All but signs of life, checkpoints, and what has no name yet."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {
        name: content for name, content in found.items() if not name.startswith(("drivers", ".locks", "checkpoints"))
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """What one driver that nothing happens to reads."""
    store = tmp_path_factory.mktemp("unbroken")
    with Driver(Folder(store), "alone") as driver:
        turn = take(job(store), driver.id, halving=False)
        assert isinstance(turn, Turn)
        assert to_the_end(turn) is Outcome.FINISHED
    return rows(store)


@contextmanager
def another(store: Path, machine: str) -> Iterator[subprocess.Popen[str]]:
    """A driver in a process of its own that is half way through the trial of `job(store)`."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(store), machine],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        trial, deadline = job(store).trial, time.monotonic() + 100
        while not ((store / "manifests" / f"{trial.id}.json").exists() and manifest(store, trial).step > 5):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate()


def until_taken(store: Path, driver: Driver) -> Turn:
    deadline = time.monotonic() + 60
    while True:
        turn = take(job(store), driver.id, halving=False)
        if isinstance(turn, Turn):
            return turn
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- a driver that is gone ------------------------------------------------------------------------


def test_07_the_trial_of_a_machine_lost_for_ever_goes_on_elsewhere_when_its_lease_has_ended(
    tmp_path: Path, unbroken: list[tuple[Any, ...]]
) -> None:
    with another(tmp_path, "lost") as process, Driver(Folder(tmp_path), "depth", limit=LIMIT) as driver:
        held = take(job(tmp_path), driver.id, halving=False)
        assert held == Elsewhere(f"{leases.socket.gethostname()}:{process.pid} (study slow)", over=False)
        process.kill()
        process.wait()
        silent = time.monotonic()
        turn = until_taken(tmp_path, driver)  # this machine cannot see that process; only its silence tells
        assert time.monotonic() - silent > LIMIT / 2
        reached = manifest(tmp_path, turn.job.trial).step
        assert 0 < reached < STEPS
        assert to_the_end(turn) is Outcome.FINISHED
    assert rows(tmp_path) == unbroken
    assert manifest(tmp_path, turn.job.trial).attempts == 2


def test_07_the_trial_of_a_driver_killed_on_this_machine_is_free_at_once(
    tmp_path: Path, unbroken: list[tuple[Any, ...]]
) -> None:
    with another(tmp_path, "") as process, Driver(Folder(tmp_path), "depth", limit=1e6) as driver:
        assert isinstance(take(job(tmp_path), driver.id, halving=False), Elsewhere)
        process.kill()
        process.wait()
        assert to_the_end(until_taken(tmp_path, driver)) is Outcome.FINISHED
    assert rows(tmp_path) == unbroken


def test_11_a_driver_that_slept_past_its_lease_commits_nothing(tmp_path: Path, unbroken: list[tuple[Any, ...]]) -> None:
    with another(tmp_path, "elsewhere") as process, Driver(Folder(tmp_path), "depth", limit=LIMIT) as driver:
        os.kill(process.pid, signal.SIGSTOP)
        assert to_the_end(until_taken(tmp_path, driver)) is Outcome.FINISHED
        before = contents(tmp_path)
        os.kill(process.pid, signal.SIGCONT)
        said, _ = process.communicate(timeout=60)
        # It may have slept while it wrote a checkpoint: who took over has swept that unfinished file away, and this
        # process, which has no schedule to ask whose the trial is by now, tells of the file.
        last_words = said.strip().splitlines()[-1]
        assert "TakenOver" in last_words or ("StoreFailure" in last_words and "checkpoints/" in last_words), said
        # It may have slept in the middle of a file that now nothing names, or of a checkpoint that nobody needs.
        after = contents(tmp_path)
        assert before.items() <= after.items()
        assert {name.partition("/")[0] for name in after.keys() - before.keys()} <= {"curve"}
        last = newest(Store(tmp_path).checkpoints(job(tmp_path).trial.id))
        assert last is not None
        assert last.step == STEPS
    assert rows(tmp_path) == unbroken


# --- many -----------------------------------------------------------------------------------------


def test_12_of_a_thousand_trials_that_end_together_none_is_lost_and_memory_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no test cuts the power
    storage, line = Folder(tmp_path), threading.Barrier(16)
    before = psutil.Process().memory_info().rss

    def live(worker: int) -> None:
        store = Store(tmp_path)
        for number in range(worker, 1000, 16):
            trial = digits(seed=number)
            got = claim(storage, trial.id, driver.id)
            assert isinstance(got, Lease)
            writer = store.writer(trial, {}, {}, got.fence)
            if number < 16:
                line.wait()  # so that all are at it at once
            writer.finish(Outcome.FINISHED, 10, {})
            release(storage, got)

    with Driver(storage, "many") as driver, ThreadPoolExecutor(16) as pool:
        list(pool.map(live, range(16)))
    found = Store.existing(tmp_path)
    assert Counter((each.outcome, each.attempts) for each in found.manifests()) == {(Outcome.FINISHED, 1): 1000}
    assert found.damaged == []
    assert psutil.Process().memory_info().rss - before < 200 * 2**20


def test_14_clocks_ten_minutes_apart_change_neither_who_trains_nor_which_attempt_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) - timedelta(minutes=10)

    storage, store, trial = Folder(tmp_path), Store(tmp_path), digits()
    with Driver(storage, "ahead", limit=1e6) as ahead:
        first = claim(storage, trial.id, ahead.id)
        assert isinstance(first, Lease)
        early = store.writer(trial, {}, {}, first.fence)
        monkeypatch.setattr(leases, "datetime", Slow)
        monkeypatch.setattr(stores, "datetime", Slow)
        with Driver(storage, "behind", limit=1e6) as behind:
            assert behind.dead() == frozenset()
            assert abs(drivers(storage)[behind.id].at - datetime.now(UTC)) > timedelta(minutes=9)
            assert isinstance(claim(storage, trial.id, behind.id), Held)
            release(storage, first)
            second = claim(storage, trial.id, behind.id)
            assert isinstance(second, Lease)
            late = store.writer(trial, {}, {}, second.fence)  # it began earlier, by its own clock
            with pytest.raises(TakenOver):
                early.finish(Outcome.FINISHED, 1, {})
            late.finish(Outcome.FINISHED, 2, {})
    assert (manifest(tmp_path, trial).step, manifest(tmp_path, trial).fence) == (2, second.fence)


# --- the schedule ---------------------------------------------------------------------------------


def test_11_what_another_driver_ended_since_it_was_planned_is_not_trained_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with Driver(store.storage, "one") as one, Driver(store.storage, "two") as two:
        finished, failed, older, stopped = (job(tmp_path, seed) for seed in range(4))
        for each, outcome in ((finished, Outcome.DIVERGED), (failed, Outcome.FAILED), (older, Outcome.FAILED)):
            turn = take(each, one.id, halving=False)
            assert isinstance(turn, Turn)
            store.writer(each.trial, train.readings(each.probes), {}, turn.job.fence).finish(outcome, 0, {})
            turn.end()
        store.writer(stopped.trial, train.readings(stopped.probes), {}).flush(0)
        store.stop_early(stopped.trial.id)
        planned_later = train.Job(**(vars(older) | {"attempts": 1}))
        for each, halving, found in (
            (finished, False, Elsewhere("another driver", over=True, outcome=Outcome.DIVERGED)),
            (failed, False, Elsewhere("another driver", over=True, outcome=Outcome.FAILED)),
            (planned_later, False, None),  # a failure that was known is tried again
            (stopped, True, Elsewhere("another driver", over=True)),
            (stopped, False, None),
        ):
            assert look(each, two.id, (), halving=halving) == found
            turn = take(each, two.id, halving=halving)
            assert (turn == found) if found else isinstance(turn, Turn)
            if isinstance(turn, Turn):
                turn.end()
            assert holder(store.storage, each.trial.id) is None


def test_11_a_driver_that_only_slept_is_not_robbed_by_who_had_taken_it_for_dead(tmp_path: Path) -> None:
    each = job(tmp_path)
    with Driver(Folder(tmp_path), "slept", limit=1e6) as slept, Driver(Folder(tmp_path), "other", limit=1e6) as other:
        other._lookout = leases.Lookout(Folder(tmp_path), other.id, limit=0.0)
        assert other.dead() == {slept.id}
        assert slept.missed()  # whoever looked for it now saw nothing of it, and is not blind
        turn = take(each, slept.id, halving=False)
        assert isinstance(turn, Turn)
        assert isinstance(take(each, other.id, halving=False), Elsewhere)
        turn.end()


def test_11_who_sees_nothing_of_a_driver_that_is_well_is_blind(tmp_path: Path) -> None:
    with Driver(Folder(tmp_path), "well", limit=1e6) as well:
        assert not well.missed()
        well.beat()
        assert not well.missed()


def leading(turn: Turn) -> Lead:
    """The only worker of a trial that is under way."""
    trial, lead = turn.job.trial.id, Lead.__new__(Lead)
    vars(lead).update(
        turns={trial: turn}, training=[turn.job], standings={trial: Standing(trial)},
        notice=Notice(), pulse=None, watchdog=None, nodes=["here"], leaving=[], gang=Gang(0, 1, torch.device("cpu")),
    )  # fmt: skip
    return lead


def test_11_who_took_a_trial_over_in_the_middle_of_a_checkpoint_trains_it_and_a_full_disk_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each, really = job(tmp_path), storages._write
    with Driver(Folder(tmp_path), "slept", limit=1e6) as slept, Driver(Folder(tmp_path), "other", limit=1e6) as other:
        turn = take(each, slept.id, halving=False)
        assert isinstance(turn, Turn)

        def sleeps(path: Path, content: bytes) -> None:
            really(path, content)
            if "checkpoints" in path.parts:  # it has no name yet
                monkeypatch.undo()
                assert leading(turn)._failed(StoreFailure("the disk is full"))["failure"].kind is Kind.STORAGE
                Folder(tmp_path).delete(f"drivers/{slept.id}.json")
                taken = take(each, other.id, halving=False)
                assert isinstance(taken, Turn)
                assert to_the_end(taken) is Outcome.FINISHED

        monkeypatch.setattr(storages, "_write", sleeps)
        with pytest.raises(StoreFailure, match=r"checkpoints/.* cannot be written") as raised:
            to_the_end(turn)
        assert not isinstance(raised.value, TakenOver)
        told = leading(turn)._failed(raised.value)
        assert told["failure"] is None
        assert told["members"] == [Standing(each.trial.id, elsewhere=Elsewhere("another driver", over=False))]


def test_11_what_another_driver_finishes_between_claim_and_writer_is_left_to_it_and_is_no_failure(
    tmp_path: Path,
) -> None:
    each = job(tmp_path)
    with Driver(Folder(tmp_path), "slept", limit=1e6) as slept, Driver(Folder(tmp_path), "other", limit=1e6) as other:
        turn = take(each, slept.id, halving=False)
        assert isinstance(turn, Turn)
        assert not turn.overtaken()
        Folder(tmp_path).delete(f"drivers/{slept.id}.json")
        taken = take(each, other.id, halving=False)
        assert isinstance(taken, Turn)
        taken.store.writer(each.trial, train.readings(each.probes), {}, taken.job.fence).finish(Outcome.FINISHED, 0, {})
        taken.end()
        lead = leading(turn)
        with pytest.raises(Refusal, match="is trained once") as raised:
            to_the_end(turn)
        told = lead._failed(raised.value)
        assert told["failure"] is None
        assert told["members"] == [Standing(each.trial.id, elsewhere=Elsewhere("another driver", over=False))]
        assert look(each, slept.id, (), halving=False) == Elsewhere("another driver", True, Outcome.FINISHED)


def test_07_a_driver_that_waits_takes_what_another_leaves_and_counts_what_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnscale.schedule.tune import driver as schedule

    monkeypatch.setattr(schedule, "POLL", 0.01)
    store = Store(tmp_path)
    left, ended = job(tmp_path, 1), job(tmp_path, 2)
    jobs = {each.trial.id: each for each in (left, ended)}
    with Driver(store.storage, "first") as first, Driver(store.storage, "second") as second:
        brief = Brief(jobs, {}, {}, Training(), run="", stall=60, driver=second.id)
        said = io.StringIO()
        watch = Watch(dict.fromkeys(jobs, 1.0), Console(file=said, width=200))
        telling = schedule._Telling(brief, watch, second, elastic=False)
        for each in (left, ended):
            assert isinstance(take(each, first.id, halving=False), Turn)
            found = take(each, second.id, halving=False)
            assert isinstance(found, Elsewhere)
            telling.settle(each.trial.id, found)
        writer = store.writer(ended.trial, train.readings(ended.probes), {}, 1)
        brake = schedule._Brake(telling, threading.Event(), math.inf)
        waiting = ThreadPoolExecutor(1).submit(schedule._await, telling, second, brake)
        writer.finish(Outcome.FINISHED, STEPS, {})
        deadline = time.monotonic() + 60
        while ended.trial.id not in telling.endings and time.monotonic() < deadline:
            time.sleep(0.01)
        assert telling.endings == {ended.trial.id: Ending(Outcome.FINISHED)}
        assert not waiting.done()
        first.end()
        assert waiting.result(timeout=60)
        assert telling.open(left.trial.id)
        telling.settle(left.trial.id, Elsewhere("another driver", over=False))
        brake.interrupt.set()  # Ctrl-C
        assert not schedule._await(telling, second, brake)
    assert f"{left.trial.id} is trained by" in said.getvalue()
    assert "waiting for what other drivers train; Ctrl-C ends the waiting" in said.getvalue()
    assert f"trains {left.trial.id} no more; it goes on here" in said.getvalue()


def test_11_status_says_who_trains_what_and_takes_nobody_who_is_dead_for_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FILE.parent))
    declared = importlib.import_module("frankle_depth").study
    asked = Asked.of(declared, FILE, "laptop", ["depth=8", "trainable=bn", "lr=0.1", "seed=0,1,2"], tmp_path, None)
    store = Store(tmp_path)
    first, second, third = (each.trial for each in asked.planned)

    def said() -> list[str]:
        console = Console(file=io.StringIO(), width=200)
        say_status(asked, console)
        file = console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue().splitlines()

    for trial in (first, second):
        store.writer(trial, {}, {})
    with Driver(store.storage, "frankle_depth") as driver:
        claim(store.storage, first.id, driver.id)
        claim(store.storage, third.id, driver.id)  # it has no manifest yet
        lines = said()
        assert "3 trials: 2 running, 1 stopped" in lines
        trained = ", ".join(sorted([first.id, third.id]))
        assert lines[-1] == f"{leases.socket.gethostname()}:{os.getpid()} (study frankle_depth) trains {trained}"
    assert said()[-1] == "3 trials: 2 stopped, 1 missing"


def study(store: Path) -> subprocess.Popen[str]:
    axes = ["depth=8", "trainable=bn,output", "lr=0.3", "seed=0,1,2,3", "epochs=none", "steps=30"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    sets = [word for each in axes for word in ("--set", each)]
    return subprocess.Popen(
        [sys.executable, str(FILE), "--preset", "laptop", *sets, "--store", str(store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )


def test_11_two_drivers_at_once_train_each_trial_once_and_report_the_same(tmp_path: Path) -> None:
    both = [study(tmp_path / "results") for _ in range(2)]
    try:
        said = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    found = Store.existing(tmp_path / "results").manifests()
    assert Counter((each.outcome, each.attempts) for each in found) == {(Outcome.FINISHED, 1): 8}
    reports = [output[output.index("\nclaim ") :] for output in said]
    assert reports[0] == reports[1]
    for output in said:
        assert "8 done, 0 running, 0 failed, 0 diverged, 0 waiting" in output
    assert any("works on this store, too; what it trains is left to it" in output for output in said)
    assert Folder(tmp_path / "results").list("drivers") == []
    assert all(holder(Folder(tmp_path / "results"), each.trial) is None for each in found)


def _another(store: Path, machine: str) -> None:
    if machine:
        leases._machine = lambda: machine  # type: ignore[assignment]
    with Driver(Folder(store), "slow", limit=LIMIT) as driver:
        turn = take(job(store), driver.id, halving=False)
        assert isinstance(turn, Turn)
        to_the_end(turn, pause=0.05)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _another(Path(sys.argv[1]), sys.argv[2])
