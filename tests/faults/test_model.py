"""Any interleaving of drivers, writers, readers, compactions and crashes, held against a model of a few dictionaries.

A driver may die between two calls or at any file operation inside of one, or only sleep while all believe it dead and
then go on; a manifest may be lost and written anew. No committed row is ever lost, none is there twice, no reader sees
one that is not committed, no trial ends twice, and of two that believe they train it one commits.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
import pytest
from examples import digits
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from operations import memory, watched

from bnscale import query
from bnscale.lease import Driver, Held, Lease, claim, release
from bnscale.store import Store, TakenOver, Writer
from bnscale.trial import Outcome, Refusal, Trial
from bnscale.verify import repair, verify

TRIALS = [digits(seed=seed) for seed in range(2)]
TABLES = ("mine", "yours")
LAST = 6  # steps of a trial

Rows = dict[tuple[str, int], int]  # table and step to the one value that was read there


@dataclass(frozen=True)
class Row:
    step: int
    value: int  # no two readings have the same


class Death(BaseException):
    """Of a process: no `except` of ours hears of it."""


@dataclass
class Attempt:
    """A writer, and what its process knows."""

    driver: Driver
    lease: Lease
    writer: Writer
    number: int
    step: int
    waiting: Rows = field(default_factory=dict)  # written and not committed


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.place = memory()
        self.root = self.place.__enter__()
        self.store = Store(self.root)
        self.drivers: list[Driver] = []  # that can act
        self.dead: set[str] = set()  # of which all believe that they have died
        self.attempts: dict[str, list[Attempt]] = {trial.id: [] for trial in TRIALS}  # that can act
        self.committed: dict[str, Rows] = {trial.id: {} for trial in TRIALS}
        self.begun = Counter[str]()  # attempts
        self.fences = Counter[str]()  # the highest yet
        self.holder: dict[str, str] = {}
        self.saved: dict[str, list[int]] = {trial.id: [0] for trial in TRIALS}  # steps of checkpoints
        self.ended: set[str] = set()
        self.told: set[str] = set()  # of these, the ones whose end wrote a data file, which says so
        self.values = 0
        self.past: list[dict[str, Rows]] = []  # every state there was
        self.readers: list[tuple[query.Session, int]] = []  # and how many states there were when it was opened

    @initialize()
    def start(self) -> None:
        self.remember()
        for _ in range(2):
            self.enter()

    def teardown(self) -> None:
        for driver in self.drivers:
            driver.end()
        self.place.__exit__(None, None, None)

    # --- drivers --------------------------------------------------------------------------------

    @precondition(lambda self: len(self.drivers) < 3)
    @rule()
    def enter(self) -> None:
        """A driver comes; it has no need to say that it lives, for who is dead is decided here."""
        self.drivers.append(Driver(self.store.storage, "model", limit=1e6).__enter__())

    @precondition(lambda self: self.drivers)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.kill(data.draw(st.sampled_from(self.drivers), "driver"), data.draw(st.booleans(), "noticed by its key"))

    @precondition(lambda self: self.drivers)
    @rule(data=st.data())
    def fall_asleep(self, data: st.DataObject) -> None:
        """All believe it dead, and it goes on later."""
        self.dead.add(data.draw(st.sampled_from(self.drivers), "driver").id)

    def kill(self, driver: Driver, key_is_gone: bool) -> None:
        driver._over.set()  # its process is gone, and says nothing any more
        driver._heart.join()
        self.dead.add(driver.id)
        if key_is_gone:
            self.store.storage.delete(f"drivers/{driver.id}.json")
        self.drivers.remove(driver)
        for attempts in self.attempts.values():
            attempts[:] = [each for each in attempts if each.driver is not driver]

    # --- writers --------------------------------------------------------------------------------

    @precondition(lambda self: self.drivers)
    @rule(data=st.data(), trial=st.sampled_from(TRIALS))
    def begin(self, data: st.DataObject, trial: Trial) -> None:
        """A driver takes a trial, perhaps from another, and goes on from its checkpoint."""
        driver = data.draw(st.sampled_from(self.drivers), "driver")
        manifest = self.store.manifest(trial.id)
        if trial.id in self.ended:
            with pytest.raises(Refusal, match="has finished and is trained once"):
                self.store.writer(trial, {}, {}, fence=1 + self.fences[trial.id])
            return
        above = manifest.fence if manifest else 0
        found = claim(self.store.storage, trial.id, driver.id, self.dead, above=above)
        if isinstance(found, Held):
            assert found.driver == self.holder[trial.id] != driver.id
            assert found.driver not in self.dead
            return
        assert self.holder.get(trial.id) in {None, driver.id, *self.dead}, "taken from a living driver"
        assert found.fence > self.fences[trial.id]
        self.holder[trial.id], self.fences[trial.id] = driver.id, found.fence
        writer = self.store.writer(trial, {}, {}, fence=found.fence)
        self.begun[trial.id] += 1
        most = writer.reached or 0
        step = data.draw(st.sampled_from([each for each in self.saved[trial.id] if each <= most]), "checkpoint")
        attempt = Attempt(driver, found, writer, self.begun[trial.id], step)
        self.attempts[trial.id].append(attempt)
        self.committed[trial.id] = self.before(trial.id, step)
        writer.rewind(step)
        self.remember()

    @precondition(lambda self: any(self.attempts.values()))
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        _, attempt = self.some(data)
        if attempt.step >= LAST:
            return
        for table in TABLES[: 1 + attempt.step % 2]:
            self.values += 1
            attempt.writer.write(table, [Row(attempt.step, self.values)])
            attempt.waiting[table, attempt.step] = self.values
        attempt.step += 1

    @precondition(lambda self: any(self.attempts.values()))
    @rule(data=st.data())
    def flush(self, data: st.DataObject) -> None:
        trial, attempt = self.some(data)
        self.act(trial, attempt, lambda: attempt.writer.flush(attempt.step))

    @precondition(lambda self: any(self.attempts.values()))
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        """A checkpoint follows the rows before it."""
        trial, attempt = self.some(data)
        if self.act(trial, attempt, lambda: attempt.writer.flush(attempt.step)):
            self.saved[trial].append(attempt.step)

    @precondition(lambda self: any(self.attempts.values()))
    @rule(data=st.data(), outcome=st.sampled_from([Outcome.FINISHED, Outcome.FAILED]))
    def finish(self, data: st.DataObject, outcome: Outcome) -> None:
        """With a result its files become one a table."""
        trial, attempt = self.some(data)
        told = bool(attempt.waiting)
        if self.act(trial, attempt, lambda: attempt.writer.finish(outcome, attempt.step, {})):
            self.end(trial, outcome, told)
            release(self.store.storage, attempt.lease)
            self.holder.pop(trial, None)
            self.attempts[trial].remove(attempt)

    @precondition(lambda self: any(self.attempts.values()))
    @rule(
        data=st.data(),
        deadly=st.integers(1, 16),
        finish=st.booleans(),
        short=st.booleans(),
    )
    def die_at_an_operation(self, data: st.DataObject, deadly: int, finish: bool, short: bool) -> None:
        """While it commits: either all of that counts, or nothing."""
        trial, attempt = self.some(data)

        def act(call: int, name: str, plain: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            if call == deadly:
                if short and name == "_write":
                    plain(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Death
            plain(*arguments)

        current = self.is_current(trial, attempt)
        after = self.committed[trial] | attempt.waiting
        try:
            with watched(act):
                if finish:
                    attempt.writer.finish(Outcome.FINISHED, attempt.step, {})
                else:
                    attempt.writer.flush(attempt.step)
        except (Death, TakenOver):
            pass
        manifest = self.store.manifest(trial)
        assert manifest is not None
        if current and self.rows(trial) == after:
            self.committed[trial] = after
        if finish and current and manifest.outcome is Outcome.FINISHED:
            assert self.committed[trial] == after
            self.end(trial, Outcome.FINISHED, bool(attempt.waiting))
        self.remember()
        self.kill(attempt.driver, False)

    @precondition(lambda self: self.unattended)
    @rule(data=st.data(), cut=st.booleans())
    def lose_a_manifest(self, data: st.DataObject, cut: bool) -> None:
        """And have it written anew from the data files: what was committed is there, and perhaps what nearly was."""
        trial = data.draw(st.sampled_from(self.unattended), "trial")
        for driver in self.dead:  # whoever listens for them deletes their keys
            self.store.storage.delete(f"drivers/{driver}.json")
        path = self.root / "manifests" / f"{trial}.json"
        os.truncate(path, path.stat().st_size // 2) if cut else path.unlink()
        verdict = verify(self.store)
        assert {harm.trial for harm in verdict.harms} <= {trial}
        repair(self.store, verdict)
        assert not verify(self.store).harms
        manifest, rows, before = self.store.manifest(trial), self.rows(trial), self.committed[trial]
        assert before.items() <= rows.items(), "a committed row is lost"
        if trial in self.told:
            assert manifest is not None
            assert (manifest.outcome, rows) == (Outcome.FINISHED, before)
        self.ended.discard(trial)
        self.told.discard(trial)
        if manifest is not None and manifest.has_result:
            self.ended.add(trial)
        self.committed[trial] = rows
        self.begun[trial] = manifest.attempts if manifest else 0
        self.holder.pop(trial, None)
        if verdict.harms:
            self.fences[trial] += 1  # to mend it is a claim too
        self.remember()

    # --- readers --------------------------------------------------------------------------------

    @precondition(lambda self: len(self.readers) < 2)
    @rule()
    def open(self) -> None:
        self.readers.append((query.open(self.root, dict.fromkeys(TABLES, Row)), len(self.past)))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        """A reader sees the store as it was at one moment since it was opened, whatever has been merged meanwhile."""
        reader = data.draw(st.sampled_from(self.readers), "reader")
        session, opened = reader
        self.readers.remove(reader)
        seen: dict[str, Rows] = {trial.id: {} for trial in TRIALS}
        question = " union all ".join(f"select '{table}', trial, step, value from {table}" for table in TABLES)
        for table, trial, step, value in session.sql(question).rows:
            assert (table, step) not in seen[trial], "a row twice"
            seen[trial][table, step] = value
        assert seen in self.past[opened - 1 :]

    # --- what must hold -------------------------------------------------------------------------

    @invariant()
    def what_is_committed_is_what_is_there(self) -> None:
        for trial, rows in self.committed.items():
            assert self.rows(trial) == rows

    def rows(self, trial: str) -> Rows:
        found: Rows = {}
        manifest = self.store.manifest(trial)
        if manifest is None:
            return found
        for table, key, part in self.store.named(manifest):
            there = pq.ParquetFile(self.root / key).read().to_pylist()
            assert len(there) == part.rows
            for row in there:
                assert (table, row["step"]) not in found, "a row twice"
                found[table, row["step"]] = row["value"]
        return found

    @property
    def unattended(self) -> list[str]:
        """The trials that have begun, and that no living driver has."""
        free = {None, *self.dead}
        return [
            trial
            for trial, attempts in self.attempts.items()
            if self.begun[trial] and not attempts and self.holder.get(trial) in free
        ]

    # --- the model ------------------------------------------------------------------------------

    def some(self, data: st.DataObject) -> tuple[str, Attempt]:
        return data.draw(
            st.sampled_from([(trial, each) for trial, attempts in self.attempts.items() for each in attempts]),
            "attempt",
        )

    def is_current(self, trial: str, attempt: Attempt) -> bool:
        return attempt.number == self.begun[trial] and trial not in self.ended

    def before(self, trial: str, step: int) -> Rows:
        return {place: value for place, value in self.committed[trial].items() if place[1] < step}

    def act(self, trial: str, attempt: Attempt, commit: Callable[[], None]) -> bool:
        """Commit, which only the latest attempt can."""
        if not self.is_current(trial, attempt):
            with pytest.raises(TakenOver):
                commit()
            return False
        commit()
        self.committed[trial] = self.committed[trial] | attempt.waiting
        attempt.waiting = {}
        self.remember()
        return True

    def end(self, trial: str, outcome: Outcome, told: bool) -> None:
        if outcome is Outcome.FINISHED:
            assert trial not in self.ended, "finished twice"
            self.ended.add(trial)
            self.told |= {trial} if told else set()

    def remember(self) -> None:
        self.past.append({trial: dict(rows) for trial, rows in self.committed.items()})


@pytest.mark.timeout(600)  # five seconds of work, on a machine that has them
def test_no_interleaving_of_drivers_writers_readers_compactions_and_crashes_loses_or_doubles_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no test cuts the power
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=30,
            deadline=None,
            phases=[Phase.explicit, Phase.reuse, Phase.generate],  # making a failure shorter takes minutes
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
