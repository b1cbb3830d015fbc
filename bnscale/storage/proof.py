"""What a storage can do, found out by doing it: a file system may accept a hard link and a bucket a condition, and keep
neither."""

import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import NamedTuple

from bnscale.storage import Storage, StoreFailure, reason
from bnscale.trial import Refusal


class Ability(NamedTuple):
    """One thing that a study asks of its storage, tried."""

    seconds: float
    error: str | None = None  # None: it can


@dataclass(frozen=True)
class Abilities:
    """What a storage proved by doing it."""

    write: Ability  # and read back
    replace: Ability  # a reader sees the old or the new content whole
    create: Ability  # put-if-absent: of many at once exactly one
    swap: Ability  # of many at once none is lost
    list: Ability
    delete: Ability

    def named(self) -> dict[str, Ability]:
        """By the words above."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def abilities(storage: Storage) -> Abilities:
    """Try everything on a few small keys of our own, which are removed again. Takes a second at most on a disk."""
    here = f"doctor-{secrets.token_hex(8)}"
    attempts = {
        "write": _can_write,
        "replace": _can_replace,
        "create": _can_create,
        "swap": _can_swap,
        "list": _can_list,
        "delete": _can_delete,
    }
    found = {name: _tried(attempt, storage, f"{here}/{name}") for name, attempt in attempts.items()}
    with suppress(OSError):
        storage.remove(here)
    return Abilities(**found)


def check(storage: Storage) -> None:
    """Raises `Refusal` where no study could be kept there, or not by several drivers."""
    found = abilities(storage)
    for ability in (found.write, found.replace, found.delete):
        if ability.error:
            raise Refusal(f"store {storage.url}: cannot be written ({ability.error}); choose another with --store")
    for ability in (found.create, found.swap):
        if ability.error:
            raise Refusal(
                f"store {storage.url}: two drivers could not share it ({ability.error}); choose another with --store, "
                "on a disk or file system that keeps the rules of POSIX, or a bucket with conditional puts"
            )


def _tried(attempt: Callable[[Storage, str], str | None], storage: Storage, key: str) -> Ability:
    began = time.monotonic()
    try:
        error = attempt(storage, key)
    except OSError as failure:
        error = reason(failure)
    return Ability(time.monotonic() - began, error)


def _can_write(storage: Storage, key: str) -> str | None:
    content = secrets.token_bytes(1 << 16)
    storage.write(key, content)
    return None if storage.read(key) == content else "what was written did not come back"


def _can_replace(storage: Storage, key: str) -> str | None:
    contents = [bytes([digit]) * (1 << 14) for digit in range(8)]
    storage.write(key, contents[0])
    torn = [0]

    def look(rounds: int = 8) -> None:
        for _ in range(rounds):
            with suppress(StoreFailure):
                try:
                    torn[0] += storage.read(key) not in contents
                except FileNotFoundError:
                    torn[0] += 1

    reader = threading.Thread(target=look)
    reader.start()
    for content in contents[1:]:
        storage.write(key, content)
    reader.join()
    if torn[0]:
        return "a reader saw a half-written or no content while it was replaced"
    return None if storage.read(key) == contents[-1] else "an older content came back after it was replaced"


def _can_create(storage: Storage, key: str) -> str | None:
    won = _at_once(lambda number: storage.create(key, b"%d" % number) is not None)
    if won.count(True) != 1:
        return f"of {len(won)} writers that each put a key if absent {won.count(True)} succeeded instead of one"
    return None if storage.read(key) == b"%d" % won.index(True) else "a key that was there was put again"


def _can_swap(storage: Storage, key: str) -> str | None:
    first = storage.create(key, b"first")
    if first is None:
        return "a new key could not be created"
    won = _at_once(lambda number: storage.swap(key, b"%d" % number, first) is not None)
    if won.count(True) != 1:
        return f"of {len(won)} writers that replaced the same version {won.count(True)} succeeded instead of one"
    return None if storage.read(key) == b"%d" % won.index(True) else "a version that was replaced came back"


def _can_list(storage: Storage, key: str) -> str | None:
    names = [f"{key}/{name}" for name in ("a", "b/c")]
    for name in names:
        storage.write(name, b"")
    return None if storage.list(key) == names else "what was written is not in the listing yet"


def _can_delete(storage: Storage, key: str) -> str | None:
    storage.write(key, b"")
    storage.delete(key)
    storage.delete(key)
    return None if storage.size(key) is None else "what was deleted is still there"


def _at_once(act: Callable[[int], bool], writers: int = 8) -> list[bool]:
    """What each of several threads that start together got. Raises what one of them raised."""
    line = threading.Barrier(writers)
    found = [False] * writers
    failures: list[OSError] = []

    def run(number: int) -> None:
        line.wait()
        try:
            found[number] = act(number)
        except OSError as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return found
