"""Leases: whatever the drivers do, at most one living driver trains a trial, and fences only grow."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnscale import lease as leases
from bnscale import storage as files
from bnscale.lease import Driver, Held, Lease, Lookout, Presence, claim, drivers, holder, release
from bnscale.storage import Folder, Version

TRIAL = "resnet8-bn-lr0.1-s0-1f3a9c20"


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: forcing each file to the disk would only take time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Interrupted(Folder):
    """Does something else just before it changes a lease: what another driver may do in that instant."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.first: list[Callable[[], Any]] = []

    def create(self, key: str, content: bytes) -> Version | None:
        self._interrupt(key)
        return super().create(key, content)

    def swap(self, key: str, content: bytes, version: Version) -> Version | None:
        self._interrupt(key)
        return super().swap(key, content, version)

    def _interrupt(self, key: str) -> None:
        if key.startswith("leases/") and self.first:
            self.first.pop()()


def live(storage: Folder, driver: str, beat: int = 1, host: str = "far", machine: str = "far") -> None:
    """A sign of life, of a machine of which nobody here knows a process."""
    presence = Presence(
        host=host, machine=machine, pid=4711, born="1", beat=beat, at="2026-01-02T03:04:05Z", study="depth"
    )
    storage.write(f"drivers/{driver}.json", presence.model_dump_json().encode())


def die(storage: Folder, driver: str) -> None:
    storage.delete(f"drivers/{driver}.json")


# --- one holder ----------------------------------------------------------------------------------

ACTS = st.sampled_from(["claim", "claim", "claim", "release", "die", "wake", "silent", "meanwhile"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(ACTS, st.sampled_from("abc"), st.sampled_from(["x", "y"])), max_size=40))
def test_of_any_number_of_drivers_one_holds_a_trial_and_each_claim_has_a_higher_fence(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, str, str]]
) -> None:
    storage = Interrupted(tmp_path_factory.mktemp("leases"))
    living = set("abc")
    for driver in living:
        live(storage, driver)
    held: dict[str, Lease] = {}
    highest = {"x": 0, "y": 0}

    def take(driver: str, trial: str, dead: set[str]) -> None:
        before = held.get(trial)
        got = claim(storage, trial, driver, dead)
        now = held.get(trial)  # of another who came between
        if isinstance(got, Held):
            assert now is not None
            assert got.driver == now.driver != driver
            assert now.driver in living - dead
            assert got.who == "far:4711 (study depth)"
            return
        if now is not None and now.driver != driver:
            assert now.driver not in living - dead
        assert got.fence > highest[trial]
        assert before is None or got.fence > before.fence
        held[trial], highest[trial] = got, got.fence

    for act, driver, trial in history:
        match act:
            case "claim":
                take(driver, trial, set())
                storage.first.clear()
            case "meanwhile":  # before the next change of a lease
                storage.first.append(lambda driver=driver, trial=trial: take(driver, trial, set()))
            case "release":
                mine = held.get(trial)
                if mine and mine.driver == driver:
                    storage.first.clear()
                    release(storage, mine)
                    del held[trial]
            case "die":
                die(storage, driver)
                living.discard(driver)
            case "wake":
                live(storage, driver)
                living.add(driver)
            case "silent":  # a driver that somebody has not heard for too long
                others = set("abc") - {driver}
                take(driver, trial, others)
                storage.first.clear()
        for name in ("x", "y"):
            found = holder(storage, name)
            mine = held.get(name)
            assert (found and found.driver) == (mine.driver if mine and mine.driver in living else None)


def test_of_many_that_claim_at_the_same_instant_one_gets_it(tmp_path: Path) -> None:
    storage = Folder(tmp_path)
    names = [f"d{number}" for number in range(8)]
    for name in names:
        live(storage, name)
    for fence in range(1, 6):
        line, got = threading.Barrier(len(names)), list[Lease | Held]()

        def run(name: str, line: threading.Barrier = line, got: list[Lease | Held] = got) -> None:
            line.wait()
            got.append(claim(storage, TRIAL, name))

        threads = [threading.Thread(target=run, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (won,) = [each for each in got if isinstance(each, Lease)]
        assert won.fence == fence
        assert {each.driver for each in got if isinstance(each, Held)} == {won.driver}
        release(storage, won)


def test_a_driver_takes_its_own_lease_again_with_a_higher_fence(tmp_path: Path) -> None:
    storage = Folder(tmp_path)
    live(storage, "a")
    first, second = claim(storage, TRIAL, "a"), claim(storage, TRIAL, "a")
    assert isinstance(first, Lease)
    assert isinstance(second, Lease)
    assert second.fence == first.fence + 1
    release(storage, first)  # too late: its worker is dead, and its successor trains
    assert holder(storage, TRIAL) == Held(TRIAL, "a", "far:4711 (study depth)")


def test_a_fence_survives_release_loss_and_damage_of_its_key(tmp_path: Path) -> None:
    storage = Folder(tmp_path)
    live(storage, "a")
    lease = claim(storage, TRIAL, "a", above=41)
    assert isinstance(lease, Lease)
    assert lease.fence == 42
    release(storage, lease)
    again = claim(storage, TRIAL, "b")
    assert isinstance(again, Lease)
    assert again.fence == 43
    for spoil in (lambda: storage.delete(f"leases/{TRIAL}.json"), lambda: storage.write(f"leases/{TRIAL}.json", b"{")):
        spoil()
        third = claim(storage, TRIAL, "c", above=43)
        assert isinstance(third, Lease)
        assert third.fence == 44


def test_a_lease_that_another_has_taken_over_is_not_given_back_by_the_one_that_slept(tmp_path: Path) -> None:
    storage = Folder(tmp_path)
    live(storage, "a")
    live(storage, "b")
    slept = claim(storage, TRIAL, "a")
    assert isinstance(slept, Lease)
    taken = claim(storage, TRIAL, "b", {"a"})
    assert isinstance(taken, Lease)
    assert taken.fence > slept.fence
    release(storage, slept)
    assert holder(storage, TRIAL) == Held(TRIAL, "b", "far:4711 (study depth)")


# --- who lives ------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["beat", "look", "look"]), st.floats(0.1, 100)), max_size=40))
def test_a_driver_is_dead_only_after_a_whole_limit_without_a_sign(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, float]]
) -> None:
    storage, clock = Folder(tmp_path_factory.mktemp("silence")), Clock()
    live(storage, "far")
    lookout = Lookout(storage, "own", limit=60, clock=clock)
    lookout.dead()
    heard, counted, looked, beats = clock.now, 0.0, clock.now, 1
    for act, seconds in history:
        clock.now += seconds
        if act == "beat":
            beats += 1
            live(storage, "far", beats)
            heard = -1.0
            continue
        dead = "far" in lookout.dead()
        counted = 0.0 if heard < 0 else counted + min(clock.now - looked, 20.0)  # a look of its own counts two beats
        heard, looked = clock.now if heard < 0 else heard, clock.now
        assert dead == (counted >= 60)
        if dead:
            assert clock.now - heard >= 60
            return


def test_the_time_that_an_observer_slept_itself_accuses_nobody(tmp_path: Path) -> None:
    storage, clock = Folder(tmp_path), Clock()
    live(storage, "far")
    lookout = Lookout(storage, limit=60, clock=clock)
    lookout.dead()
    clock.now += 3600
    assert lookout.dead() == set()


def test_a_dead_driver_s_key_is_gone_for_all_and_one_that_was_asleep_is_back_with_its_next_sign(
    tmp_path: Path,
) -> None:
    storage, clock = Folder(tmp_path), Clock()
    live(storage, "far")
    lease = claim(storage, TRIAL, "far")
    assert isinstance(lease, Lease)
    lookout = Lookout(storage, limit=60, clock=clock)
    for _ in range(8):
        clock.now += 10
        lookout.dead()
    assert lookout.dead() == {"far"}
    assert drivers(storage) == {}
    assert holder(storage, TRIAL) is None
    live(storage, "far", 2)
    assert lookout.dead() == set()
    assert holder(storage, TRIAL) == Held(TRIAL, "far", "far:4711 (study depth)")


def test_a_storage_that_cannot_be_read_says_of_nobody_that_he_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, clock = Folder(tmp_path), Clock()
    live(storage, "far")
    lookout = Lookout(storage, limit=60, clock=clock)
    lookout.dead()

    def fail(prefix: str) -> list[str]:
        raise OSError("no route to host")

    monkeypatch.setattr(storage, "list", fail)
    for _ in range(20):
        clock.now += 10
        assert lookout.dead() == set()


def test_a_process_of_this_machine_that_is_gone_is_dead_at_once_and_another_of_its_number_is_not_it(
    tmp_path: Path,
) -> None:
    storage = Folder(tmp_path)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    born = leases._born(sleeper.pid)
    assert born is not None

    def here(driver: str, born: str) -> Presence:
        presence = Presence(
            host="here",
            machine=leases._machine(),
            pid=sleeper.pid,
            born=born,
            beat=1,
            at="2026-01-02T03:04:05Z",
            study="x",
        )
        storage.write(f"drivers/{driver}.json", presence.model_dump_json().encode())
        return presence

    assert not here("alive", born).gone
    assert here("before", born + "0").gone
    lookout = Lookout(storage, limit=60)
    assert lookout.dead() == {"before"}
    assert isinstance(claim(storage, TRIAL, "alive"), Lease)
    assert isinstance(claim(storage, TRIAL, "other"), Held)
    sleeper.kill()
    deadline = time.monotonic() + 20
    while (
        leases._born(sleeper.pid) is not None and time.monotonic() < deadline
    ):  # a process nobody waits for is a zombie
        time.sleep(0.01)
    assert isinstance(claim(storage, TRIAL, "other"), Lease)
    assert lookout.dead() == {"before", "alive"}
    sleeper.wait()


def test_a_driver_beats_while_it_lives_and_its_leases_are_free_when_it_ends(tmp_path: Path) -> None:
    storage = Folder(tmp_path)
    with Driver(storage, "depth", limit=0.06) as one, Driver(storage, "width", limit=600) as two:
        (seen,) = two.others().values()
        assert seen.pid == os.getpid()
        assert seen.who.endswith(f":{os.getpid()} (study depth)")
        deadline = time.monotonic() + 20
        while drivers(storage)[one.id].beat < seen.beat + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert drivers(storage)[one.id].beat >= seen.beat + 3
        assert isinstance(claim(storage, TRIAL, one.id), Lease)
        assert isinstance(claim(storage, TRIAL, two.id), Held)
        one.end()
        assert isinstance(claim(storage, TRIAL, two.id), Lease)
    assert storage.list("drivers") == []


def test_a_driver_that_dies_at_any_of_its_file_operations_leaves_leases_that_the_next_one_takes(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    victims = sorted(tmp_path.iterdir())
    assert len(victims) > 12
    for root in victims:
        storage = Folder(root)
        with Driver(storage, "depth") as second:
            assert second.others() == {}, root
            got = claim(storage, TRIAL, second.id)
            assert isinstance(got, Lease), root
            assert 1 <= got.fence <= 3
        assert storage.list("drivers") == []


def _victim(root: Path) -> None:
    """A driver's life, ended at operation 1, 2, 3 .. of the file layer, each time in a new process and a new folder."""
    os.fsync = lambda handle: None  # type: ignore[assignment]
    plain = {name: getattr(files, name) for name in ("_write", "_rename", "_link", "_make", "_sync", "_delete")}

    def live_once(storage: Folder, deadly: int) -> int:
        calls = 0
        for name in plain:

            def operation(*given: Any, name: str = name) -> None:
                nonlocal calls
                calls += 1
                if calls == deadly:
                    os._exit(9)
                plain[name](*given)

            setattr(files, name, operation)
        with Driver(storage, "depth") as driver:
            for _ in range(2):
                got = claim(storage, TRIAL, driver.id)
                assert isinstance(got, Lease)
                release(storage, got)
        return calls

    for deadly in range(1, 1 + live_once(Folder(root / "000"), 0)):
        child = os.fork()
        if child == 0:
            live_once(Folder(root / f"{deadly:03}"), deadly)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, deadly


def test_a_stopped_process_is_not_gone(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    born = leases._born(sleeper.pid)
    os.kill(sleeper.pid, signal.SIGSTOP)
    assert leases._born(sleeper.pid) == born
    sleeper.kill()
    sleeper.wait()
    assert leases._born(sleeper.pid) is None


if __name__ == "__main__":
    _victim(Path(sys.argv[1]))
