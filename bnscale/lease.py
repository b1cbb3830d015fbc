"""Who trains what: any number of drivers share a store, and no trial is trained twice.

    drivers/<id>.json      one a driver, written anew every BEAT while it lives
    leases/<trial>.json    one a trial: the driver that trains it, and its fence

A lease is taken by `create`, or by `swap` over that of a driver that is dead, so exactly one of many gets it. No clock
is compared with another machine's: a driver is dead when what it writes has not changed for LIMIT of its observer's
own time, at once when it ran on this machine and its process is gone, and when its key is gone.

A driver that only slept may believe in a lease that another has taken. So each lease has a fence, one higher than any
before it; the store takes nothing from an attempt whose fence is lower than the one it knows (`Store.writer`). What is
left of a released lease is its fence.
"""

import contextlib
import math
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import psutil
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from bnscale.storage import Storage, StoreFailure, Version

LIMIT = 60.0  # seconds of silence after which a driver of another machine is dead
BEATS = 6  # signs of life within the limit
BEAT = LIMIT / BEATS


class Unseen(StoreFailure):
    """Here the store shows nothing of the driver: this machine has another folder under the same name."""


Kept = TypeVar("Kept", bound=BaseModel)


class Presence(BaseModel):
    """What a driver says of itself."""

    model_config = ConfigDict(frozen=True)

    host: str
    machine: str  # where its process number means something
    pid: int
    born: str  # of that process: a number is given again
    beat: int  # how many times it has said so
    at: AwareDatetime  # by its own clock, for people only
    study: str

    @property
    def who(self) -> str:
        """`node7:4711 (study frankle_depth)`"""
        return f"{self.host}:{self.pid} (study {self.study})"

    @property
    def gone(self) -> bool:
        """Whether it is known to have ended; of another machine's process nobody here knows."""
        return self.machine == _machine() and self.born != _born(self.pid)


@dataclass(frozen=True)
class Lease:
    """The right to train a trial."""

    trial: str
    driver: str
    fence: int
    version: Version


@dataclass(frozen=True)
class Held:
    """Another driver trains the trial."""

    trial: str
    driver: str
    who: str


class _Entry(BaseModel):
    """What stands in a lease's key."""

    model_config = ConfigDict(frozen=True)

    driver: str | None  # None: released
    fence: int
    claim: str  # no two are equal, also where one driver claims twice


def claim(
    storage: Storage, trial_id: str, driver_id: str, dead: Collection[str] = (), *, above: int = 0
) -> Lease | Held:
    """Take the lease of a trial, unless a living driver has it; a driver takes its own again.

    `dead` are drivers of whose silence the caller has just heard: one that only slept may speak again at any moment,
    and elsewhere the keys tell, for that of a dead driver is deleted. `above` is the fence that the trial's manifest
    knows: also a lease whose key was lost gets a higher one. Raises `StoreFailure`.
    """
    while True:  # who loses a race has another's lease to look at
        version, entry = _entry(storage, trial_id)
        holder = entry.driver if entry else None
        if holder is not None and holder not in {driver_id, *dead}:
            presence = _presence(storage, holder)
            if presence is not None and not presence.gone:
                return Held(trial_id, holder, presence.who)
        fence = 1 + max(above, entry.fence if entry else 0)
        taken = _put(storage, trial_id, _Entry(driver=driver_id, fence=fence, claim=secrets.token_hex(8)), version)
        if taken is not None:
            return Lease(trial_id, driver_id, fence, taken)


def release(storage: Storage, lease: Lease) -> None:
    """Give it back, unless it is another's by now. Raises `StoreFailure`."""
    _put(storage, lease.trial, _Entry(driver=None, fence=lease.fence, claim=secrets.token_hex(8)), lease.version)


def holder(storage: Storage, trial_id: str) -> Held | None:
    """The driver that trains a trial, as far as is known here and now: one that has just died on another machine
    still counts. Raises `StoreFailure`."""
    _, entry = _entry(storage, trial_id)
    presence = _presence(storage, entry.driver) if entry and entry.driver else None
    if entry is None or entry.driver is None or presence is None or presence.gone:
        return None
    return Held(trial_id, entry.driver, presence.who)


def check_seen(storage: Storage, driver_id: str) -> None:
    """Raises `Unseen` where the driver's own key is not there: whatever is written here, it would not see. Creates
    nothing."""
    if storage.size(_driver(driver_id)) is None:
        raise Unseen(
            f"{socket.gethostname()}: store {storage.url} shows nothing of the driver that writes there; mount the "
            "same folder on every node, or give a bucket"
        )


def drivers(storage: Storage) -> dict[str, Presence]:
    """Those that have not ended, as far as is known here and now, by id. Raises `StoreFailure`."""
    found = {_stem(key): _presence(storage, _stem(key)) for key in storage.list("drivers")}
    return {name: presence for name, presence in found.items() if presence is not None and not presence.gone}


class Driver:
    """Says that this process lives and trains trials, for as long as the context lasts.

    Raises `StoreFailure` where its key cannot be written. Later failures are left to those who train: a store that
    takes no sign of life takes no reading either.
    """

    def __init__(self, storage: Storage, study: str, *, limit: float = LIMIT) -> None:
        host = socket.gethostname()
        pid = psutil.Process().pid
        self.id = f"{re.sub(r'[^A-Za-z0-9.-]', '-', host)}-{pid}-{secrets.token_hex(4)}"
        self._storage = storage
        self._presence = Presence(
            host=host,
            machine=_machine(),
            pid=pid,
            born=_born(pid) or "",
            beat=0,
            at=datetime.now(UTC),
            study=study,
        )
        self._limit = limit
        self._pause = limit / BEATS
        self._lookout = Lookout(storage, self.id, limit=limit)
        self._lapsed = -math.inf  # when its key was found gone
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._live, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self.beat()
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Whatever it still has leased is free from now on."""
        self._over.set()
        self._heart.join()
        with contextlib.suppress(OSError):  # then it is dead when its process is gone
            self._storage.delete(_driver(self.id))

    def dead(self) -> frozenset[str]:
        """The drivers that have died, as far as is known by now."""
        return self._lookout.dead()

    def others(self) -> dict[str, Presence]:
        """The living ones, by id."""
        dead = self.dead()
        return {name: each for name, each in drivers(self._storage).items() if name != self.id and name not in dead}

    def beat(self) -> None:
        """A sign of life. Raises `StoreFailure`."""
        if self._presence.beat and self._storage.size(_driver(self.id)) is None:
            self._lapsed = time.monotonic()  # another took it for dead
        self._presence = self._presence.model_copy(
            update={"beat": self._presence.beat + 1, "at": datetime.now(UTC)},
        )
        self._storage.write(_driver(self.id), self._presence.model_dump_json().encode())

    def missed(self) -> bool:
        """Whether its key was not there just now or of late, as after a sleep: who saw nothing of it may see the store
        well. Puts it back."""
        try:
            if self._storage.size(_driver(self.id)) is None:
                self.beat()
        except OSError:
            return True  # nobody sees anything
        return time.monotonic() - self._lapsed < self._limit

    def _live(self) -> None:
        while not self._over.wait(self._pause):
            with contextlib.suppress(OSError):
                self.beat()
            self.dead()


class Lookout:
    """Listens for the signs of life of every driver but one's own.

    Silence counts by the observer's clock and only while it looks: after a sleep of its own it accuses nobody. The key
    of a dead driver is deleted, which tells everyone; one that was only asleep writes it again.
    """

    def __init__(
        self, storage: Storage, own: str = "", *, limit: float = LIMIT, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._storage = storage
        self._own = own
        self._limit = limit
        self._clock = clock
        self._heard: dict[str, bytes] = {}  # the latest sign of each
        self._silence: dict[str, float] = {}  # seconds since it came
        self._dead: set[str] = set()
        self._looked = clock()
        self._lock = threading.Lock()

    def dead(self) -> frozenset[str]:
        """Look, and say whose driver has died. A storage that cannot be read tells nothing of its drivers."""
        with self._lock:
            now = self._clock()
            passed, self._looked = min(now - self._looked, 2 * self._limit / BEATS), now
            with contextlib.suppress(OSError):
                for key in self._storage.list("drivers"):
                    if _stem(key) != self._own:
                        self._listen(key, passed)
            return frozenset(self._dead)

    def _listen(self, key: str, passed: float) -> None:
        name = _stem(key)
        try:
            sign = self._storage.read(key)
        except FileNotFoundError:
            return
        if sign != self._heard.get(name):
            self._heard[name], self._silence[name] = sign, 0.0
            self._dead.discard(name)
        else:
            self._silence[name] += passed
        presence = _read(Presence, sign)
        if self._silence[name] >= self._limit or (presence is not None and presence.gone):
            self._dead.add(name)
            self._storage.delete(key)


# --- keys -----------------------------------------------------------------------------------------


def _driver(driver_id: str) -> str:
    return f"drivers/{driver_id}.json"


def _lease(trial_id: str) -> str:
    return f"leases/{trial_id}.json"


def _stem(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".json")


def _entry(storage: Storage, trial_id: str) -> tuple[Version | None, _Entry | None]:
    """What a lease's key holds, and its version. A damaged one is free: its fence is in the manifest, too."""
    try:
        content, version = storage.get(_lease(trial_id))
    except FileNotFoundError:
        return None, None
    return version, _read(_Entry, content)


def _put(storage: Storage, trial_id: str, entry: _Entry, version: Version | None) -> Version | None:
    """Over this version; None where another stands by now."""
    content = entry.model_dump_json().encode()
    if version is None:
        return storage.create(_lease(trial_id), content)
    return storage.swap(_lease(trial_id), content, version)


def _presence(storage: Storage, driver_id: str) -> Presence | None:
    try:
        return _read(Presence, storage.read(_driver(driver_id)))
    except FileNotFoundError:
        return None


def _read(kind: type[Kept], content: bytes) -> Kept | None:
    try:
        return kind.model_validate_json(content)
    except ValidationError:
        return None


# --- processes ------------------------------------------------------------------------------------


@lru_cache
def _machine() -> str:
    """What distinguishes the process numbers of here from those of elsewhere: containers may share a host's name."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _born(pid: int) -> str | None:
    """When a process began; None for one that is gone. Where it can be, by a clock that nobody sets."""
    with contextlib.suppress(OSError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
