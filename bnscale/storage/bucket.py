"""A bucket of S3, of a server that speaks its protocol, or of Google Cloud Storage. The only file that imports obstore.

obstore, because it can put under a condition (if the key is absent, if its version is the one that was seen), which
`pyarrow.fs` cannot, and what drivers share is decided by nothing else. Servers without such puts are found out by
`check`.

A request is tried TRIES times, with a random pause that doubles. A put whose reply was lost may have been carried out:
each put has a mark of its own, and when it is refused on a second try, the mark on what stands tells whether it was
itself. The credentials are those of the environment: AWS_ACCESS_KEY_ID and its like, the role of the machine or of the
pod, GOOGLE_APPLICATION_CREDENTIALS; roles are renewed before they expire. AWS_ENDPOINT_URL names another server.
"""

import errno
import hashlib
import math
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.store import GCSStore, S3Store

from bnscale.storage import StoreFailure, Version, place
from bnscale.trial import Refusal

if TYPE_CHECKING:
    from obstore import PutMode, UpdateVersion

TRIES = 7
PAUSE = 0.25  # seconds before the second try at most; before each further one twice as long
LONGEST = 8.0  # seconds
CONNECT = timedelta(seconds=5)
SILENCE = timedelta(seconds=60)  # without a byte, after which a request has failed
REQUEST = timedelta(minutes=15)  # of the largest checkpoint
AT_ONCE = 16  # requests
KEPT = 30 * 86400  # seconds that a copy which nobody reads stays on this machine

_MARK = "bnscale-put"  # an attribute of each object: which put made it
_S3 = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SEGMENT = re.compile(r"[A-Za-z0-9!_.*'()=+@,-]+")
_EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "InvalidToken")
_FORBIDDEN = {
    "RequestTimeTooSkewed": "set the clock of this machine",
    "InvalidAccessKeyId": "give credentials that this server knows",
    "SignatureDoesNotMatch": "give credentials that this server knows",
}
_NO_BUCKET = ("NoSuchBucket", "bucket does not exist")
_BROKEN = {
    "TimedOut": "no answer in time",
    "IncompleteMessage": "the connection was broken",
    "UnexpectedEof": "the reply was cut short",
}
_LATER = ("ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown")
_NO_CREDENTIALS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal", "CredentialsError")

_T = TypeVar("_T")
_R = TypeVar("_R")


class Bucket:
    """Contents by key below a prefix of a bucket. See `Storage`."""

    far = True

    def __init__(self, url: str) -> None:
        """Raises `Refusal` for an address or an environment that no bucket can be opened by; asks no server."""
        self.scheme, _, place = url.partition("://")
        self.name, *prefix = place.rstrip("/").split("/")
        wrong = _wrong(self.name, prefix)
        if wrong:
            raise Refusal(f"store {url}: {wrong}; give {self.scheme}://bucket/prefix")
        self.prefix = "/".join(prefix)
        self.url = "/".join([f"{self.scheme}://{self.name}", *prefix])
        self._whole = self.url  # the address that the user gave: what is below it shares its copies
        self._connection: S3Store | GCSStore = self._open()

    def __repr__(self) -> str:
        return f"Bucket({self.url!r})"

    def __reduce__(self) -> tuple[type["Bucket"], tuple[str]]:
        return Bucket, (self.url,)

    # --- contents ---------------------------------------------------------------------------------

    def read(self, key: str) -> bytes:
        return self.get(key)[0]

    def get(self, key: str) -> tuple[bytes, Version]:
        def ask() -> tuple[bytes, Version]:
            found = obstore.get(self._connection, self._full(key))
            return bytes(found.bytes()), _version(found.meta)

        return self._tried(ask, key, "read")

    def write(self, key: str, content: bytes) -> None:
        # A large content goes in parts, and is there when the last one is.
        self._put(key, content, "overwrite")

    def create(self, key: str, content: bytes) -> Version | None:
        return self._put(key, content, "create")

    def swap(self, key: str, content: bytes, version: Version) -> Version | None:
        mode: UpdateVersion = {"e_tag": version.tag}
        if version.generation is not None:
            mode["version"] = version.generation
        return self._put(key, content, mode)

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._tried(lambda: obstore.delete(self._connection, self._full(key)), key, "deleted")

    def size(self, key: str) -> int | None:
        found = self._head(key)
        return found and found["size"]

    def age(self, key: str) -> float:
        found = self._head(key)
        return math.inf if found is None else (datetime.now(UTC) - found["last_modified"]).total_seconds()

    # --- many keys --------------------------------------------------------------------------------

    def list(self, prefix: str) -> "list[str]":
        def ask() -> "list[str]":
            pages = obstore.list(self._connection, self._full(prefix) or None)
            return [found["path"] for page in pages for found in page]

        cut = len(self.prefix) + 1 if self.prefix else 0
        return sorted(path[cut:] for path in self._tried(ask, prefix, "listed"))

    def holds(self, prefix: str) -> bool:
        def ask() -> bool:
            pages = obstore.list(self._connection, self._full(prefix) or None, chunk_size=1)
            return any(len(page) for page in pages)

        return self._tried(ask, prefix, "listed")

    def remove(self, prefix: str) -> None:
        self.sweep(prefix, lambda key: True)

    def sweep(self, prefix: str, doomed: Callable[[str], bool]) -> None:
        keys = [self._full(key) for key in self.list(prefix) if doomed(key)]
        if keys:
            with suppress(FileNotFoundError):
                self._tried(lambda: obstore.delete(self._connection, keys), prefix, "deleted")

    def below(self, prefix: str) -> "Bucket":
        below = Bucket.__new__(Bucket)
        below.__dict__.update(self.__dict__)
        below.prefix = self._full(prefix)
        below.url = f"{self.url}/{prefix}"
        return below

    def prepare(self, prefix: str) -> None:
        """Nothing: a bucket has no folders."""

    def each(self, act: Callable[[_T], _R], of: Sequence[_T]) -> Sequence[_R]:
        if len(of) < 2:
            return [act(one) for one in of]
        with ThreadPoolExecutor(min(AT_ONCE, len(of))) as pool:
            return list(pool.map(act, of))

    # --- copies on this machine -------------------------------------------------------------------

    @cached_property
    def reach(self) -> Path:
        """The folder of the copies. They may be deleted at any time."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = home / "bnscale" / "buckets" / hashlib.sha256(self._whole.encode()).hexdigest()[:16]
        _expire(folder)
        return folder

    def local(self, key: str, sha256: str | None = None) -> Path:
        """A copy by its content: one that is here is not fetched again."""
        content = None if sha256 else self.read(key)
        said = sha256 or hashlib.sha256(content or b"").hexdigest()
        # DuckDB reads the trial from the name of the folder.
        path = self.reach.joinpath(said[:2], said, *key.split("/")[-2:])
        with suppress(OSError):
            if path.stat().st_size:
                os.utime(path)
                return path
        content = self.read(key) if content is None else content
        if hashlib.sha256(content).hexdigest() != said:
            raise StoreFailure(f"{self.url}/{key}: its checksum is not the one of its manifest")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            place(path, content)
        except OSError as error:
            raise StoreFailure(
                f"{path}: a copy of {self.url}/{key} cannot be written ({(error.strerror or str(error)).lower()}); "
                "choose another folder for copies with XDG_CACHE_HOME"
            ) from error
        return path

    # --- requests ---------------------------------------------------------------------------------

    def _full(self, key: str) -> str:
        assert {"", ".", ".."}.isdisjoint(key.split("/") if key else []), f"{key!r} is no key"
        return "/".join(filter(None, (self.prefix, key)))

    def _open(self) -> S3Store | GCSStore:
        # Retries are ours: only we know which put may be made twice.
        limits: Any = {
            "client_options": {"connect_timeout": CONNECT, "read_timeout": SILENCE, "timeout": REQUEST},
            "retry_config": {"max_retries": 0},
        }
        try:
            if self.scheme == "gs":
                return GCSStore(self.name, **limits)
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            if endpoint:
                limits["endpoint"] = endpoint
                limits["client_options"]["allow_http"] = endpoint.startswith("http://")
            return S3Store(self.name, **limits)
        except (BaseError, ValueError, OSError) as error:
            raise Refusal(
                f"store {self.url}: cannot be opened ({_gist(error)}); mend what the environment says of it"
            ) from None

    def _head(self, key: str) -> Any:
        try:
            return self._tried(lambda: obstore.head(self._connection, self._full(key)), key, "read")
        except FileNotFoundError:
            return None

    def _put(self, key: str, content: bytes, mode: "PutMode") -> Version | None:
        mark = secrets.token_hex(8)
        tried = 0

        def put() -> Version | None:
            nonlocal tried
            tried += 1
            try:
                done = obstore.put(
                    self._connection, self._full(key), content, mode=mode, attributes={_MARK: mark}, max_concurrency=4
                )
            except (AlreadyExistsError, PreconditionError) as refused:
                if any(word in str(refused) for word in (*_LATER, *_NO_BUCKET)):
                    raise GenericError(str(refused)) from None  # as where another's put was under way at the same time
                return self._own(key, mark) if tried > 1 else None
            return _version(done)

        try:
            return self._tried(put, key, "written")
        except FileNotFoundError:  # GCS says so of a version that went away
            return None

    def _own(self, key: str, mark: str) -> Version | None:
        """The version that stands, if the put with this mark made it: its reply was lost."""
        try:
            found = obstore.get(self._connection, self._full(key))
        except FileNotFoundError:
            return None
        return _version(found.meta) if found.attributes.get(_MARK) == mark else None

    def _tried(self, ask: Callable[[], _R], key: str, done: str) -> _R:
        """What the server says to a request, in the end. Raises `FileNotFoundError` and `StoreFailure`."""
        pause, renewed = PAUSE, False
        for left in reversed(range(TRIES)):
            try:
                return ask()
            except (BaseError, OSError) as error:
                said = str(error)
                if left and not renewed and any(word in said for word in _EXPIRED):
                    self._connection, renewed = self._open(), True  # a role has new ones by now
                    continue
                way_out = self._way_out(said)
                if isinstance(error, FileNotFoundError) and way_out is None:
                    raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.url}/{key}") from None
                if way_out is None and left:
                    time.sleep(random.uniform(0, pause))
                    pause = min(2 * pause, LONGEST)
                    continue
                raise StoreFailure(
                    f"{self.url}/{key}: cannot be {done} ({_gist(error)}); what was committed is safe: "
                    + (way_out or "run again when it is there again")
                ) from None
        raise AssertionError("the last try returns or raises")

    def _way_out(self, said: str) -> str | None:
        """What mends a failure; None for one that goes away: no answer, half an answer, a server that is down or asks
        to be asked less."""
        found = re.search(r"status code: (\d{3})", said)
        status = int(found[1]) if found else 0
        if any(word in said for word in _NO_BUCKET):
            return f"there is no bucket {self.name}; create it"
        if any(word in said for word in _EXPIRED):
            return "the credentials have expired: renew them and run again, which goes on from the last checkpoint"
        if status >= 500 or status in (404, 408, 425, 429) or any(word in said for word in _LATER):
            return None
        if any(word in said for word in _NO_CREDENTIALS):
            return "no credentials were found: " + (
                "set GOOGLE_APPLICATION_CREDENTIALS, or give the machine a role"
                if self.scheme == "gs"
                else "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (those of a profile: "
                "eval $(aws configure export-credentials --format env)), or give the machine a role"
            )
        if status in (401, 403):
            ways = (way for word, way in _FORBIDDEN.items() if word in said)
            return next(ways, "allow it to these credentials, in the policy of the bucket or the role")
        return "mend that and run again" if status else None


def _wrong(name: str, prefix: Sequence[str]) -> str | None:
    """What is wrong with the name of a bucket and a prefix in it."""
    if not name:
        return "names no bucket"
    if not _S3.fullmatch(name.replace("_", "-")):
        return f"{name!r} cannot be the name of a bucket: 3 to 63 small letters, digits, dots and hyphens"
    for part in prefix:
        if not _SEGMENT.fullmatch(part) or part in (".", ".."):
            return f"{part!r} cannot be a part of a prefix: letters, digits and none of / \\ ? # % or blanks"
    return None


def _version(meta: Any) -> Version:
    return Version(meta["e_tag"] or "", meta["version"])


def _gist(error: Exception) -> str:
    """`503 Service Unavailable, SlowDown: Please reduce your request rate.`, of what obstore writes over a page."""
    said, _, debug = str(error).partition("\n\nDebug source")
    status = re.search(r"status code: (\d{3}[^:\n]*)", said)
    code, message = (re.search(rf"<{name}>([^<]*)</{name}>", said) for name in ("Code", "Message"))
    if status:
        return ", ".join(
            [status[1], *([": ".join(found[1].rstrip(".") for found in (code, message) if found)] if code else [])]
        )
    quoted = re.search(r'(?:message|error): "([^"]+)"', debug)
    last = said.strip().splitlines()[0].rpartition(": ")[2] if said.strip() else type(error).__name__
    return quoted[1].lower() if quoted else next((word for sign, word in _BROKEN.items() if sign in debug), last)


_expiring = Lock()
_expired: set[Path] = set()


def _expire(folder: Path) -> None:
    """Delete the copies that nobody has read for a month; once in the life of a process."""
    with _expiring:
        if folder in _expired:
            return
        _expired.add(folder)
    with suppress(OSError):
        for path in folder.glob("*/*/**/*"):
            with suppress(OSError):
                if path.is_file() and time.time() - path.stat().st_mtime > KEPT:
                    path.unlink()
