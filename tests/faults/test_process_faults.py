"""A worker or a driver that dies between two writes, a reply that is lost, and Tune's files, which nobody trusts."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import WARM, study_file, train
from examples import digits
from operations import watched

from bnscale import query, storage
from bnscale.probes import STEP, Curve, curve
from bnscale.store import Store, StoreFailure
from bnscale.trial import Outcome

TRIAL = digits(steps=4)
READINGS = {curve: 2 * STEP}
EVERY = "select step, split, count(*) from curve group by all order by all"


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: forcing each file to the disk would only take time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def readings(store: Path) -> list[tuple[int, str, int]]:
    """Step, split and how often it is there, of every reading."""
    return [(row[0], row[1], row[2]) for row in query.open(store).sql(EVERY).rows]


WHOLE = [(step, split, 1) for step in (0, 2, 4) for split in ("test", "train", "validation")]


def _die_after_a_data_file(store: str, number: int) -> None:
    """Train until the n-th data file has its name, and no manifest names it."""
    plain, files = storage._rename, [0]

    def rename(source: Path, target: Path) -> None:
        plain(source, target)
        files[0] += target.suffix == ".parquet"
        if files[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    storage._rename = rename
    train(TRIAL, Path(store), READINGS, save_every=0.0)


@pytest.mark.parametrize("number", [1, 2])
def test_02_a_worker_killed_between_a_data_file_and_its_manifest_leaves_an_orphan_that_nobody_reads(
    tmp_path: Path, number: int
) -> None:
    worker = WARM.Process(target=_die_after_a_data_file, args=(str(tmp_path), number))
    worker.start()
    worker.join(100)
    assert worker.exitcode == -signal.SIGKILL
    worker.close()
    orphans = set(tmp_path.glob("curve/*/*.parquet")) - set(Store(tmp_path).files("curve"))
    assert len(orphans) == 1
    assert readings(tmp_path) == WHOLE[: 3 * (number - 1)]
    train(TRIAL, tmp_path, READINGS)
    assert readings(tmp_path) == WHOLE
    assert set(tmp_path.glob("curve/*/*")) == set(Store(tmp_path).files("curve"))
    assert query.open(tmp_path).sql("select outcome, attempts from trials").rows == [("finished", 2)]


@contextlib.contextmanager
def unheard(lost: Callable[[int], bool]) -> Iterator[list[int]]:
    """Manifests are changed, and of some changes whoever asked for them hears of a failure; how many there were."""
    made = [0]

    def act(call: int, name: str, plain: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        plain(*arguments)
        if name in ("_rename", "_link") and arguments[1].parent.name == "manifests":
            made[0] += 1
            if lost(made[0]):
                raise OSError(5, "the reply was lost")

    with watched(act):
        yield made


def test_03_a_manifest_whose_reply_was_lost_is_found_by_who_writes_it_again_and_no_row_is_there_twice(
    tmp_path: Path,
) -> None:
    writer = Store(tmp_path).writer(TRIAL, {}, {})
    rows = [Curve(step, step / 3, "test", 360, 1.0, 0.5, 0.9) for step in range(4)]

    def again(call: Callable[[], None]) -> None:
        silent[0] = True
        with pytest.raises(StoreFailure, match="the reply was lost"):
            call()
        silent[0] = False
        call()

    silent = [False]

    with unheard(lambda number: silent[0]):
        for row in rows[:3]:
            writer.write("curve", [row])
            again(lambda: writer.flush(row.step + 1))  # noqa: B023 (called at once)
        again(lambda: writer.rewind(2))
        for row in rows[2:]:
            writer.write("curve", [row])
        again(lambda: writer.finish(Outcome.FINISHED, 4, {}))
    assert readings(tmp_path) == [(step, "test", 1) for step in range(4)]
    assert len(list(tmp_path.glob("curve/*/*"))) == 1


def test_03_a_trial_that_stops_at_a_lost_reply_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    with unheard(lambda number: False) as made:
        train(TRIAL, tmp_path / "whole", READINGS, save_every=0.0)
    assert made[0] > 4
    for deaf in range(1, made[0] + 1):
        store = tmp_path / str(deaf)
        with unheard(lambda number: number == deaf), pytest.raises(StoreFailure, match="the reply was lost"):  # noqa: B023
            train(TRIAL, store, READINGS, save_every=0.0)
        if deaf < made[0]:  # of the last the trial has ended
            train(TRIAL, store, READINGS)
        assert readings(store) == WHOLE
        assert Store(store).manifests()[0].outcome is Outcome.FINISHED


@pytest.mark.timeout(400)  # workers may take long to start on a busy machine
def test_05_tunes_files_are_never_read_so_damage_to_them_is_none(tmp_path: Path) -> None:
    """Those of a run that is under way are cut off as they appear, those of a driver that died are swept away."""
    file, store = study_file(tmp_path, seeds="range(2)"), tmp_path / "store"
    train(digits(), store)
    (before,) = Store(store).manifests()
    home = Path(tempfile.mkdtemp(prefix="t5-", dir="/tmp"))  # the name of a socket is short
    left = home / "bnscale-4999999-left" / "queue"
    left.mkdir(parents=True)
    (left.parent / "bnscale-owner").write_text(f"{socket.gethostname()} 4999999 1.0")
    for name in ("tuner.pkl", "experiment_state-2026-01-01_00-00-00.json"):
        (left / name).write_bytes(b'{"trial_data": [')
    words = [sys.executable, str(file), "run", "--preset", "laptop", "--store", str(store)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"TMPDIR": str(home), "PYTHONPATH": paths},
    )
    cut = set()
    try:
        while driver.poll() is None:
            for each in home.glob("bnscale-*/queue/*"):
                with contextlib.suppress(OSError):
                    if each.is_file() and each.stat().st_size > 10:
                        os.truncate(each, each.stat().st_size // 2)
                        cut.add(each.name.partition("-")[0])
            time.sleep(0.02)
    finally:
        driver.kill()
        said, _ = driver.communicate()
        shutil.rmtree(home, ignore_errors=True)
    assert driver.returncode == 0, said
    assert "experiment_state" in cut
    assert "2 trials, 1 done, 1 to train" in said
    assert not left.parent.exists()
    after = Store(store).manifests()
    assert [manifest.outcome for manifest in after] == [Outcome.FINISHED, Outcome.FINISHED]
    assert before in after  # the first was not trained again
    assert {path.name for path in store.iterdir()} <= {
        ".locks", "checkpoints", "curve", "drivers", "leases", "logs", "manifests", "reports",
    }  # fmt: skip
