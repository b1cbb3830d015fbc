"""Where results are kept: contents by key, each change whole or not at all.

A key is a relative POSIX path, `manifests/x.json`. What several writers share is decided by two calls that every kind
of storage has: `create`, which exactly one of many wins, and `swap`, which takes the place of one version and no
other. Nothing correct depends on a listing: one of a bucket may lag behind.

A folder is changed by a temporary file, forced to the disk and renamed. `create` links the temporary file to its name,
which is atomic on a network's file system too; `swap` compares and renames under a lock of the kernel, which ends with
its process. Machines whose locks do not reach each other (some network mounts) must not share a folder: two of them may
both win a `swap`. After a `StoreFailure` nobody knows whether the change stands: whoever goes on must look first.
"""

import errno
import fcntl
import hashlib
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from bnscale.trial import Refusal

__all__ = [
    "Abilities",
    "Ability",
    "Folder",
    "Storage",
    "StoreFailure",
    "Version",
    "abilities",
    "check",
    "place",
    "reason",
    "storage",
]

_LOCKS = ".locks"  # a folder's lock files
_TEMPORARY = ".tmp"  # how the name of a file ends that is not whole yet; it begins with a dot
_PATIENCE = 60.0  # seconds for a lock: a process that was stopped while it had one must not stop all others
_PAUSE = 0.05  # seconds between two looks at a lock, at most

_T = TypeVar("_T")
_R = TypeVar("_R")


class StoreFailure(OSError):
    """The disk, the network or another process stands in the way. What was committed before stays readable."""


class Version(NamedTuple):
    """Which content of a key somebody saw. Of no meaning but to `swap` of the same storage."""

    tag: str
    generation: str | None = None


class Storage(Protocol):
    """Contents by key. All but `read`, `get` and `local` of a missing key raise `StoreFailure` and nothing else."""

    url: str  # what a message calls it: an absolute path, or s3://bucket/prefix
    far: bool  # `local` copies a file, the first time that it is asked for

    @property
    def reach(self) -> Path:
        """The folder that all files are in which `local` gives."""

    def read(self, key: str) -> bytes:
        """Raises `FileNotFoundError`."""

    def get(self, key: str) -> tuple[bytes, Version]:
        """The content, and the version that `swap` asks for. Raises `FileNotFoundError`."""

    def write(self, key: str, content: bytes) -> None:
        """Whole or not at all, over whatever is there; durable when it returns."""

    def create(self, key: str, content: bytes) -> Version | None:
        """Like `write` where there is nothing; None where there is something."""

    def swap(self, key: str, content: bytes, version: Version) -> Version | None:
        """Like `write` over this version; None where another stands, or nothing."""

    def delete(self, key: str) -> None:
        """Fine where there is none."""

    def size(self, key: str) -> int | None:
        """Bytes; None where there is none."""

    def age(self, key: str) -> float:
        """Seconds since it was written; infinite where there is none. Two clocks are compared: for people only."""

    def list(self, prefix: str) -> list[str]:
        """The keys below a folder, sorted. May lag behind what was written."""

    def local(self, key: str, sha256: str | None = None) -> Path:
        """A file of this machine to read, never to write. Raises `FileNotFoundError`."""

    def remove(self, prefix: str) -> None:
        """All below a folder."""

    def sweep(self, prefix: str, doomed: Callable[[str], bool]) -> None:
        """Of all keys below a folder the `doomed` ones, and what a killed writer left half written of such."""

    def below(self, prefix: str) -> "Storage":
        """What is below a folder, as a storage of its own."""

    def holds(self, prefix: str) -> bool:
        """Whether there is anything below a folder, or such a folder. May lag behind what was written."""

    def prepare(self, prefix: str) -> None:
        """Make ready to write below a folder, where that takes anything."""

    def each(self, act: Callable[[_T], _R], of: Sequence[_T]) -> "Sequence[_R]":
        """What `act`, which mostly waits for this storage, says of each; as many at once as serves."""


def storage(url: "str | Path | Storage") -> "Storage":
    """The storage that a user named. Touches nothing. Raises `Refusal` for a scheme that is none of ours."""
    if not isinstance(url, str | Path):
        return url
    scheme, colon, _ = str(url).partition("://")
    if isinstance(url, Path) or not colon or not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        return Folder(url)
    if scheme in ("s3", "gs"):
        from bnscale.storage.bucket import Bucket  # who keeps results in a folder needs no obstore

        return Bucket(str(url))
    raise Refusal(f"store {url}: {scheme}:// is no store; give a folder, s3://bucket/prefix or gs://bucket/prefix")


class Folder:
    """A folder of this machine, or of a network's file system. See `Storage`."""

    def __init__(self, root: str | Path) -> None:
        try:
            self.root = Path(root).expanduser().resolve()
        except (RuntimeError, ValueError, OSError) as error:
            raise Refusal(f"store {str(root)!r}: names no folder ({error}); choose another with --store") from None
        self.url = str(self.root)
        self.reach = self.root
        self.far = False
        self._top = self.root  # with the locks

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def read(self, key: str) -> bytes:
        path = self.path(key)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise _missing(path) from None
        except OSError as error:
            raise _failure(path, error, "read") from error

    def get(self, key: str) -> tuple[bytes, Version]:
        content = self.read(key)
        return content, _version(content)

    def write(self, key: str, content: bytes) -> None:
        path = self.path(key)
        with self._changing(path):
            _need(path.parent)
            place(path, content, lambda: self._alone(key))
            _sync(path.parent)

    def create(self, key: str, content: bytes) -> Version | None:
        path = self.path(key)
        temporary = _temporary(path)
        with self._changing(path, temporary), self._alone(key):
            if path.exists():
                return None
            _need(path.parent)
            _write(temporary, content)
            try:
                _link(temporary, path)
            except FileExistsError:  # by a writer whose locks we do not see
                _delete(temporary)
                return None
            _delete(temporary)
            _sync(path.parent)
        return _version(content)

    def swap(self, key: str, content: bytes, version: Version) -> Version | None:
        path = self.path(key)
        temporary = _temporary(path)
        with self._changing(path, temporary), self._alone(key):
            try:
                if self.get(key)[1] != version:
                    return None
            except FileNotFoundError:
                return None
            _write(temporary, content)
            _rename(temporary, path)
            _sync(path.parent)
        return _version(content)

    def delete(self, key: str) -> None:
        path = self.path(key)
        with self._changing(path):
            if _mode(path):
                with self._alone(key):
                    _delete(path)

    def size(self, key: str) -> int | None:
        path = self.path(key)
        try:
            found = path.stat()
            return found.st_size if stat.S_ISREG(found.st_mode) else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _failure(path, error, "read") from error

    def age(self, key: str) -> float:
        try:
            return time.time() - self.path(key).stat().st_mtime
        except OSError:
            return math.inf

    def list(self, prefix: str) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self._files(prefix) if not _hidden(path))

    def local(self, key: str, sha256: str | None = None) -> Path:
        path = self.path(key)
        with _reading(path):
            there = stat.S_ISREG(_mode(path))
        if not there:
            raise _missing(path)
        return path

    def remove(self, prefix: str) -> None:
        self.sweep(prefix, lambda key: True)
        top = self.path(prefix)
        with self._changing(top):
            for folder, _, _ in os.walk(top, topdown=False):
                _delete(Path(folder))

    def sweep(self, prefix: str, doomed: Callable[[str], bool]) -> None:
        for path in self._files(prefix):
            whole = path.with_name(path.name[1:].rsplit(".", 2)[0]) if _hidden(path) else path
            if doomed(whole.relative_to(self.root).as_posix()):
                with self._changing(path):
                    _delete(path)

    def below(self, prefix: str) -> "Folder":
        folder = Folder(self.path(prefix))
        folder._top = self._top
        return folder

    def holds(self, prefix: str) -> bool:
        path = self.path(prefix)
        with _reading(path):
            return stat.S_ISDIR(_mode(path))

    def prepare(self, prefix: str) -> None:
        path = self.path(prefix)
        with self._changing(path):
            _need(path)
            _need(self._top / _LOCKS)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def each(self, act: Callable[[_T], _R], of: Sequence[_T]) -> Sequence[_R]:
        return [act(one) for one in of]

    def path(self, key: str) -> Path:
        """Where a key is in the folder, whether there is something or not; the folder itself for ""."""
        parts = key.split("/") if key else []
        assert {"", ".", ".."}.isdisjoint(parts), f"{key!r} is no key"
        return self.root.joinpath(*parts)

    def _files(self, prefix: str) -> Iterator[Path]:
        top = self.path(prefix)
        with _reading(top):
            for folder, below, names in os.walk(top, onerror=_unless_gone):
                if _LOCKS in below:
                    below.remove(_LOCKS)
                yield from (Path(folder) / name for name in names)

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """No other process, and no other thread, changes this key. Many keys share a lock file: few are ever made."""
        name = self.path(key).relative_to(self._top).as_posix()
        path = self._top / _LOCKS / hashlib.sha256(name.encode()).hexdigest()[:1]
        if not path.parent.is_dir():
            _need(path.parent)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
            yield
        finally:
            os.close(handle)

    @contextmanager
    def _changing(self, path: Path, temporary: Path | None = None) -> Iterator[None]:
        try:
            yield
        except StoreFailure:
            raise
        except OSError as error:
            if temporary is not None:
                with suppress(OSError):
                    _delete(temporary)
            raise _failure(path, error, "written") from error


def place(path: Path, content: bytes, alone: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
    """One file of this machine, whole or not at all, renamed while `alone`. Raises `OSError` where the disk does."""
    # Without a lock while it is written: a checkpoint may take seconds. So the name is this call's own.
    temporary = _temporary(path)
    try:
        _write(temporary, content)
        with alone():
            _rename(temporary, path)
    except OSError:
        with suppress(OSError):
            _delete(temporary)
        raise


def _temporary(path: Path) -> Path:
    """A name that nobody has had: what a killed writer left may be linked to the live file."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")


def _lock(handle: int) -> None:
    """Raises `TimeoutError` for a lock that stays another's."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"another process, perhaps a stopped one, has kept its lock for {_PATIENCE:g} s"
                ) from None
        time.sleep(_PAUSE * secrets.randbelow(1000) / 1000)


def _version(content: bytes) -> Version:
    return Version(hashlib.sha256(content).hexdigest())


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


def _mode(path: Path) -> int:
    """What is there; 0 for nothing. Raises `OSError` where nobody can say."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _failure(path, error, "read") from error


def _unless_gone(error: OSError) -> None:
    """A folder that another deletes while the one above it is walked hides no other folder."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT).lower(), str(path))


def _failure(path: Path, error: OSError, done: str) -> StoreFailure:
    failure = StoreFailure(
        f"{path}: cannot be {done} ({reason(error)}); what was committed is safe: mend that and run again"
    )
    failure.errno = error.errno
    return failure


def reason(error: OSError) -> str:
    """`no space left on device`: what the system says, without the path."""
    if isinstance(error, StoreFailure) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    return (error.strerror or str(error)).lower()


# --- files: every change of a folder is one of these calls ----------------------------------------


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)


def _link(source: Path, target: Path) -> None:
    os.link(source, target)


def _make(folder: Path) -> None:
    folder.mkdir(exist_ok=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(path: Path) -> None:
    """A file, or a folder with nothing in it."""
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):
        if not path.is_dir():
            raise
        path.rmdir()


def _need(folder: Path) -> None:
    """Create a folder and those above it, durably."""
    if not folder.is_dir():
        _need(folder.parent)
        _make(folder)
        _sync(folder.parent)


# --- what needs the above ---------------------------------------------------------------------------

from bnscale.storage.proof import Abilities, Ability, abilities, check  # noqa: E402
