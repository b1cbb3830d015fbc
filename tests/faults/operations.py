"""Every change of a folder's files passes through six functions of storage.py. Here they are counted, and made to
fail, stop short or end the process at the n-th call.

Run as a program it is the victim: it lives a driver's life with one trial again and again, in a fresh process each
time, and dies at every operation in turn. Two lives are lived: that of a new store, and that of one in which another
driver died half way, with a checkpoint in the middle of what it had written. It does without torch, so that a fresh
process takes milliseconds.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import safetensors.numpy
from examples import digits

from bnscale import storage as files
from bnscale.lease import Driver, Lease, claim, release
from bnscale.storage import Storage
from bnscale.store import Store, Writer
from bnscale.trial import Outcome

SEAM = ("_write", "_rename", "_link", "_make", "_sync", "_delete")
LAST = 4
TRIAL = digits(steps=LAST)
PROBES = {"curve": "1 step", "gamma": "3 steps"}


@dataclass(frozen=True)
class Curve:
    step: int
    split: str
    loss: float


@dataclass(frozen=True)
class Gamma:
    step: int
    layer_index: int
    gamma_dead: float | None


CURVE = Counter((step, split) for step in range(LAST + 1) for split in ("validation", "test"))
GAMMA = Counter((step, layer) for step in range(0, LAST + 1, 3) for layer in range(2))

Act = Callable[[Callable[[], None]], None]


class Phase(StrEnum):
    CLAIM = "claim"  # of the lease, and its release
    RESUME = "resume"  # the writer opens and forgets what training will read again
    WRITE = "write"  # readings and checkpoints
    COMPACT = "compact"  # the end: one file a table


def save(place: Storage, step: int) -> None:
    """A checkpoint as engine/checkpoint.py writes it."""
    content = safetensors.numpy.save({"w": np.full(3, step, np.float32)})
    place.write(f"step-{step}.safetensors", content)
    about = {"step": step, "sha256": hashlib.sha256(content).hexdigest(), "facts": {}}
    place.write(f"step-{step}.json", json.dumps(about).encode())


def live(
    root: Path,
    every: int,
    saves: int,
    start: Callable[[Storage, int | None], int],
    again: Act = lambda call: call(),
    phase: Callable[[Phase], None] = lambda phase: None,
) -> Lease:
    """What a driver and its worker do with one trial: flush each `every` steps, a checkpoint each `saves`.

    `start` says of the checkpoints, and of how far rows go, where to go on. `again` makes a call, and makes it again
    where it fails. Notes in `root/flushed` up to where rows are committed.
    """
    phase(Phase.CLAIM)
    store = Store(root)
    driver = Driver(store.storage, "tiny")
    again(driver.__enter__)
    leases: list[Lease] = []
    writers: list[Writer] = []
    places = store.checkpoints(TRIAL.id)

    def take() -> None:
        manifest = store.manifest(TRIAL.id)
        found = claim(store.storage, TRIAL.id, driver.id, above=manifest.fence if manifest else 0)
        assert isinstance(found, Lease), found
        leases.append(found)

    again(take)
    phase(Phase.RESUME)
    again(lambda: writers.append(store.writer(TRIAL, PROBES, {"host": "here"}, fence=leases[-1].fence)))
    writer = writers[-1]
    begin = start(places, writer.reached)
    again(lambda: writer.rewind(begin))
    phase(Phase.WRITE)
    for step in range(begin, LAST + 1):
        if step % every == 0 or step % saves == 0:
            again(lambda: writer.flush(step))  # noqa: B023 (called at once)
            (root / "flushed").write_text(str(step))
        if step % saves == 0:
            again(lambda: save(places, step))  # noqa: B023
        writer.write("curve", [Curve(step, split, step / 3) for split in ("validation", "test")])
        if step % 3 == 0:
            writer.write("gamma", [Gamma(step, layer, None) for layer in range(2)])
    phase(Phase.COMPACT)
    again(lambda: writer.finish(Outcome.FINISHED, LAST, {}))
    (root / "flushed").write_text(str(LAST + 1))
    phase(Phase.CLAIM)
    again(lambda: release(store.storage, leases[-1]))
    driver.end()
    return leases[-1]


def prepare(root: Path) -> None:
    """A store in which a driver died: of its three parts the last goes beyond its checkpoint."""
    store = Store(root)
    store.storage.create(f"leases/{TRIAL.id}.json", b'{"driver": "dead", "fence": 7, "claim": "x"}')
    writer = store.writer(TRIAL, PROBES, {}, fence=7)
    for step in range(4):
        if step in (1, 2):
            writer.flush(step)
        writer.write("curve", [Curve(step, split, step / 3) for split in ("validation", "test")])
        if step % 3 == 0:
            writer.write("gamma", [Gamma(step, layer, None) for layer in range(2)])
    writer.flush(4)
    for step in (1, 3):
        save(store.checkpoints(TRIAL.id), step)
    (root / "flushed").write_text("3")


@contextmanager
def memory() -> Iterator[Path]:
    """A folder in memory, where there is one: a disk takes twice as long for so many small files."""
    shared = "/dev/shm"
    folder = Path(tempfile.mkdtemp(prefix="bnscale-test-", dir=shared if os.access(shared, os.W_OK) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rows(root: Path, table: str) -> Counter[Any]:
    """Step and place of every row that counts, and how often it does."""
    found: Counter[Any] = Counter()
    for path in Store.existing(root).files(table):
        for row in pq.ParquetFile(path).read().to_pylist():
            found[tuple(row.values())[:2]] += 1
    return found


@contextmanager
def watched(act: Callable[[int, str, Callable[..., None], tuple[Any, ...]], None]) -> Iterator[list[str]]:
    """Every file operation goes through `act`, with its number, name, function and arguments; the names so far."""
    names: list[str] = []
    before = {name: getattr(files, name) for name in SEAM}

    def through(name: str, plain: Callable[..., None]) -> Callable[..., None]:
        def operation(*arguments: Any) -> None:
            names.append(name)
            act(len(names), name, plain, arguments)

        return operation

    for name, plain in before.items():
        setattr(files, name, through(name, plain))
    try:
        yield names
    finally:
        for name, plain in before.items():
            setattr(files, name, plain)


def half(name: str, plain: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Of a write the first half of its content; of anything else nothing."""
    if name == "_write":
        plain(arguments[0], arguments[1][: len(arguments[1]) // 2])


def life(root: Path, begin: int) -> list[tuple[Phase, str]]:
    """Phase and name of every operation of a life in `root`, which is lived."""
    found: list[tuple[Phase, str]] = []
    now = [Phase.CLAIM]

    def note(call: int, name: str, plain: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        found.append((now[0], name))
        plain(*arguments)

    with watched(note):
        live(root, 2, 3, lambda *_: begin, phase=lambda phase: now.__setitem__(0, phase))
    return found


def die(root: Path, begin: int, deadly: int, *, short: bool) -> None:
    """Live in `root` in a process of its own, which ends at this operation."""
    child = os.fork()
    if child == 0:

        def end(call: int, name: str, plain: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            if call == deadly:
                if short:
                    half(name, plain, arguments)
                os._exit(9)
            plain(*arguments)

        with watched(end):
            live(root, 2, 3, lambda *_: begin)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, root


def main(graves: Path) -> None:
    """What is on the disk after each death: `new-claim-001`, `resumed-write-017-short`; and after a whole life."""
    os.fsync = lambda handle: None
    prepared = graves / "prepared"
    prepare(prepared)
    for kind, begin in (("new", 0), ("resumed", 3)):

        def buried(name: str, kind: str = kind) -> Path:
            root = graves / f"{kind}-{name}"
            if kind == "resumed":
                shutil.copytree(prepared, root)
            return root

        for number, (phase, name) in enumerate(life(buried("whole"), begin), 1):
            for short in (False, True) if name == "_write" else (False,):
                die(buried(f"{phase}-{number:03}{'-short' if short else ''}"), begin, number, short=short)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
