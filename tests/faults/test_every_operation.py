"""A death, a failure, half a write and a lost reply at every single file operation of a driver's life with a trial.

Claiming its lease, going on from a checkpoint, writing readings and checkpoints, and the end, which makes one file of
several: whatever is cut off where, no committed row is lost, none is there twice, and the next driver ends with the
rows of an unbroken life.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import operations
import pytest
from operations import CURVE, GAMMA, TRIAL, Phase, half, live, memory, prepare, rows, watched

from bnscale.engine import checkpoint
from bnscale.storage import Storage, StoreFailure
from bnscale.store import Store
from bnscale.trial import Outcome

pytestmark = pytest.mark.timeout(400)  # two hundred processes and as many lives, which a busy machine draws out


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: forcing each file to the disk would only take time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def root() -> Iterator[Path]:
    with memory() as folder:
        yield folder


@pytest.fixture(scope="module")
def graves() -> Iterator[Path]:
    """What is left of lives that ended at every operation in turn."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    with memory() as folder:
        words = [sys.executable, operations.__file__, str(folder)]
        done = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=390)
        assert done.returncode == 0, done.stderr
        yield folder


def dead(graves: Path, phase: str) -> list[Path]:
    """The stores in which a driver died in this phase."""
    return sorted(graves.glob(f"*-{phase}-*"))


def newest(place: Storage, most: int | None) -> int:
    found = checkpoint.newest(place, most)
    return found.step if found else 0


def whole(root: Path) -> bool:
    return rows(root, "curve") == CURVE and rows(root, "gamma") == GAMMA


def fence(root: Path) -> int:
    """Of the lease, where there is one."""
    key = root / "leases" / f"{TRIAL.id}.json"
    return int(json.loads(key.read_text())["fence"]) if key.exists() else 0


def test_every_phase_of_a_life_has_operations_to_die_at(graves: Path) -> None:
    counts = {str(phase): len(dead(graves, phase)) for phase in Phase}
    assert all(count >= 15 for count in counts.values()), counts
    assert sum(counts.values()) > 120
    assert whole(graves / "new-whole")
    assert whole(graves / "resumed-whole")


@pytest.mark.parametrize("phase", Phase)
def test_after_a_death_what_was_committed_is_there_once(graves: Path, phase: Phase) -> None:
    outcomes = set()
    for root in dead(graves, phase):
        if not (root / "manifests").exists():
            continue
        store = Store(root)
        manifest = store.manifest(TRIAL.id)
        assert not store.damaged
        for table in ("curve", "gamma"):
            assert max(rows(root, table).values(), default=1) == 1, root
        if (root / "flushed").exists():
            flushed = int((root / "flushed").read_text())
            assert {step for step, _ in rows(root, "curve")} >= set(range(flushed)), root
        outcomes.add(manifest and manifest.outcome)
        if manifest and manifest.outcome:
            assert whole(root), root
        newest = checkpoint.newest(store.checkpoints(TRIAL.id))
        if newest is not None:
            assert newest.tensors["w"].tolist() == 3 * [float(newest.step)], root
            assert manifest is not None
            assert manifest.step >= newest.step, f"{root}: rows before the checkpoint are missing"
    assert outcomes <= {None, Outcome.FINISHED}
    assert (Outcome.FINISHED in outcomes) == (phase in (Phase.COMPACT, Phase.CLAIM))


@pytest.mark.parametrize("phase", Phase)
def test_after_a_death_the_next_driver_takes_the_lease_and_ends_with_the_rows_of_an_unbroken_life(
    graves: Path, root: Path, phase: Phase
) -> None:
    for grave in dead(graves, phase):
        store = Path(shutil.copytree(grave, root / grave.name))
        manifest = Store(store).manifest(TRIAL.id)
        if manifest is None or manifest.outcome is None:
            before = max(fence(store), manifest.fence if manifest else 0)
            assert live(store, 1, 2, newest).fence > before, store
            assert set(store.glob("curve/*/*")) == set(Store(store).files("curve")), f"{store}: orphans stay"
        assert whole(store), store


Failing = Callable[[int, str, Callable[..., None], tuple[Any, ...]], None]


def full(call: int, name: str, plain: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    half(name, plain, arguments)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unheard(call: int, name: str, plain: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    plain(*arguments)
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("kind", ["new", "resumed"])
@pytest.mark.parametrize("fault", [full, unheard])
def test_a_failure_costs_a_message_and_a_second_try(root: Path, kind: str, fault: Failing) -> None:
    """On a full disk after half of a write, or done and never answered."""
    failing, failures = [0], list[StoreFailure]()

    def act(call: int, name: str, plain: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        (fault if call == failing[0] else lambda call, name, plain, arguments: plain(*arguments))(
            call, name, plain, arguments
        )

    def again(call: Callable[[], None]) -> None:
        try:
            call()
        except StoreFailure as failure:
            failures.append(failure)
            assert not list(root.glob(f"{failing[0]}/**/.*.tmp")), "half a file stays"
            call()

    prepare(root / "prepared")

    def lived() -> int:
        store = root / str(failing[0])
        if kind == "resumed":
            shutil.copytree(root / "prepared", store)
        else:
            Store(store)
        with watched(act) as names:
            live(store, 2, 3, newest, again)
        assert whole(store), failing
        shutil.rmtree(store)
        return len(names)

    operations = lived()
    for failing[0] in range(1, operations + 1):
        lived()
    assert len(failures) > 0.7 * operations  # a deletion that fails is no failure
    for failure in failures:
        assert str(root) in str(failure)
        assert failure.errno in (errno.ENOSPC, errno.EIO)
        assert os.strerror(failure.errno).lower() in str(failure)
