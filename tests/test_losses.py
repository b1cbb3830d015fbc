"""Losses that are told late change no number, no row and no ending: a GPU is looked at later than it computes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import digits

import bnscale
from bnscale import train
from bnscale.engine import Gang, Pass, checkpoint
from bnscale.engine.cohort import CohortEngine
from bnscale.engine.losses import Losses
from bnscale.networks import build
from bnscale.probes import END, STEP, Cadence, Probe, curve, gamma
from bnscale.store import Store

NOWHERE = Path("/nonexistent")


@pytest.fixture
def losses() -> Losses[str]:
    trials = [digits(), digits(lr=0.2)]
    engine: Pass = CohortEngine(build(trials[0]), trials, Gang(), [None, None])
    return Losses(engine)


def test_what_is_told_late_is_told_in_order_and_once(losses: Losses[str]) -> None:
    heard = []
    for step in range(1, 10):
        losses.add(torch.tensor([step, -step], dtype=torch.float32))
        if step % 3 == 0:
            heard.append(list(losses.told(step, ["one", "other"], 1)))
    assert heard == [
        [],
        [(3, [("one", [1, 2, 3]), ("other", [-1, -2, -3])])],
        [(6, [("one", [4, 5, 6]), ("other", [-4, -5, -6])])],
    ]
    assert list(losses.told(9, ["one", "other"], 0)) == [
        (9, [("one", [7, 8, 9]), ("other", [-7, -8, -9])]),
        (9, [("one", []), ("other", [])]),
    ]


def test_what_must_be_known_is_told_at_once(losses: Losses[str]) -> None:
    losses.add(torch.tensor([1.0, math.nan]))
    ((step, told),) = losses.told(1, ["one", "other"], 0)
    assert step == 1
    assert told[0] == ("one", [1.0])
    assert math.isnan(told[1][1][0])


# --- the loop ------------------------------------------------------------------------------------------

# Two steps an epoch; rates that drop at plateaus, and one that leaves the numbers between two looks.
SHORT: dict[str, Any] = {"validation": 1405, "milestones": (), "epochs": 8, "steps": None}
GRID: list[dict[str, Any]] = [{"plateau": 1, "lr": 1.0}, {"lr": 1e30}, {"lr": 1e12}]


def ended(store: Path, grid: list[dict[str, Any]], probes: dict[Probe, Cadence], stop: int) -> list[str]:
    """How each trial ended, what was written and what is saved; after a stop at some look."""
    trials = [digits(**(SHORT | own)) for own in grid]
    jobs = [train.Job(trial, probes, str(store), str(NOWHERE), None, 0, 1e9) for trial in trials]
    looks = iter(range(10**6))
    list(train.run(jobs, Gang(), 1, lambda: next(looks) == stop))
    left = [job for job in jobs if not Store(store).manifest(job.trial.id).has_result]
    list(train.run(left, Gang(), 1, lambda: False))
    found = []
    for trial in trials:
        manifest = Store(store).manifest(trial.id)
        known = {name: manifest.facts.get(name) for name in ("diverged_step", "last_finite_loss")}
        found.append(f"{manifest.outcome} {manifest.step} {known}")
        newest = checkpoint.newest(Store(store).checkpoints(trial.id))
        if newest is not None:
            found += [
                f"{newest.step} {newest.facts}",
                *(f"{n} {t.tolist()}" for n, t in sorted(newest.tensors.items())),
            ]
    db = bnscale.open(store)
    return found + [
        repr(row) for probe in probes for row in db.sql(f"select * from {probe.__name__} order by all").rows
    ]


NEVER = 10**6


@pytest.mark.parametrize(
    ("grid", "probes", "stop"),
    [(GRID, {curve: END}, NEVER), (GRID, {gamma: 5 * STEP, curve: 14 * STEP}, 4), (GRID[1:2], {curve: END}, NEVER)],
    ids=["a cohort", "a cohort that is stopped", "one trial"],
)
def test_a_trial_ends_as_it_does_where_each_look_waits(
    grid: list[dict[str, Any]],
    probes: dict[Probe, Cadence],
    stop: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(train.LOOK_EVERY, "cpu", 3)
    at_once = ended(tmp_path / "at once", grid, probes, stop)
    monkeypatch.setitem(train.LATE, "cpu", 1)
    assert ended(tmp_path / "late", grid, probes, stop) == at_once
    assert any(told.startswith("diverged") for told in at_once)
    assert len(grid) == 1 or any(told.startswith("finished") for told in at_once)


def test_a_step_at_which_nothing_is_due_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = digits(**(SHORT | {"steps": 10, "epochs": None}))
    job = train.Job(trial, {curve: 7 * STEP}, str(tmp_path), str(NOWHERE), None, 0, 1e9)
    monkeypatch.setitem(train.LOOK_EVERY, "cpu", 2)
    monkeypatch.setitem(train.LATE, "cpu", 1)
    known = [at.step for (at,) in train.run([job], Gang(), 1, lambda: False)]
    # Looks at 0, which reads; 2, 4, 6, each told of the one before; 7, which reads; 8; and the end.
    assert known == [0, 0, 2, 4, 7, 7, 10]
