"""Rows to Parquet, whole or not at all, in a folder or a bucket.

    <store>/manifests/<trial>.json                  what counts: one a trial
    <store>/<table>/trial=<trial>/part-*.parquet    readings from one step on
    <store>/checkpoints/trial=<trial>/              the engine's own

A data file is written whole under a name that no other content has; then a manifest that names it takes the place of
the version that this writer saw last. That is the commit: whatever a crash leaves behind that no manifest names was
never there, and an attempt that slept while another took its trial commits nothing. So readers trust manifests, never
a listing, and no path in a manifest is absolute: a store may be moved. The step of a row decides what a resumed trial
repeats: training that goes on from step s takes every reading of step s and later again, so `rewind(s)` forgets those.
"""

import hashlib
import importlib.metadata
import io
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property, lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, cast, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AwareDatetime, BaseModel, ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # the one of `typing` lacks what pydantic needs before Python 3.12

from bnscale.storage import Storage, StoreFailure, Version, reason, storage
from bnscale.trial import Outcome, Refusal, Trial, near

__all__ = [
    "DamagedManifest",
    "Facts",
    "Footer",
    "Manifest",
    "Part",
    "Store",
    "StoreFailure",
    "TakenOver",
    "Writer",
    "columns_of",
    "footer",
    "is_named_for",
    "rebuilt",
    "rows_of",
]

FORMAT: Final = 2  # of manifests and of data files that are written; 1 had neither a fence nor footers, and is read

# folders and views that are no probe's
RESERVED = ("manifests", "checkpoints", "trials", "cells", "drivers", "leases", "damaged", "reports", "logs")

_SQL = {int: "bigint", float: "double", str: "varchar", bool: "boolean"}
_ARROW = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}
_SQL_OF: dict[Any, str] = {**_SQL, AwareDatetime: "timestamp", tuple[float, ...]: "double[]"}  # of what is no row's
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_BY_ATTEMPT = re.compile(r"-a(\d+)-([0-9a-f]{8})\.parquet$")
_FOOTER = b"bnscale"  # the key of a data file's metadata


class DamagedManifest(Refusal):
    """A manifest that says nothing any more; `verify` can write it anew from its trial's data files."""


class TakenOver(StoreFailure):
    """A later attempt, perhaps on another node, trains the trial now: nothing is wrong with it."""


class Facts(TypedDict, total=False):
    """What is known of a trial besides its fields: nothing here may change a number."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # type: ignore[misc]

    started: AwareDatetime | None  # of the first attempt
    ended: AwareDatetime | None
    seconds: float | None  # training wall time, over all attempts; of a pass of several trials, an equal share
    workers: int | None
    threads: int | None  # of each worker
    host: str | None
    device: str | None
    commit: str | None  # git hash, with "+" where the tree was dirty
    command: str | None  # that asked for it, but for its store
    bnscale: str | None
    python: str | None
    torch: str | None
    ray: str | None
    deepspeed: str | None
    backend: str | None
    parameters: int | None
    trainable_parameters: int | None
    diverged_step: int | None
    last_finite_loss: float | None
    error: str | None
    failure: str | None  # of what kind the error is
    stopped_early: bool | None  # successive halving gave up on it; a checkpoint is there to go on from
    peak_memory: int | None  # bytes
    cohort: int | None  # trials that were trained in one pass with it, itself among them, when it began
    recomputed: bool | None  # activations were computed again instead of kept: less memory, the same numbers
    # Of trials that went on under another one, all of them in turn: "1 -> 2"
    commits: str | None
    devices: str | None
    worker_counts: str | None


_FACTS = TypeAdapter(Facts)
# what a new attempt has none of yet
_ENDINGS = ("ended", "diverged_step", "last_finite_loss", "error", "failure", "stopped_early", "peak_memory")


class Part(BaseModel):
    """A data file that counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    first_step: int  # no row is of an earlier step
    last_step: int  # of its last row
    rows: int
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What the store knows of one trial."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1, 2]  # a later bnscale that writes another says so here
    bnscale: str
    trial: str
    fingerprint: str
    fields: dict[str, Any]
    probes: dict[str, str]  # what this training reads: table to cadence in words
    kept: dict[str, str]  # the same for tables that an earlier training of this trial has read whole
    outcome: Outcome | None  # None while it trains, and after a kill
    attempts: int
    fence: int = 0  # of the lease under which the last attempt began; none with a lower one begins any more
    step: int  # updates behind the rows that count
    total_steps: int
    facts: Facts
    columns: dict[str, dict[str, str]]  # table to column to SQL type
    parts: dict[str, list[Part]]

    @property
    def has_result(self) -> bool:
        """Finished or diverged: it is not trained again, unless for readings that nobody has taken."""
        return self.outcome in (Outcome.FINISHED, Outcome.DIVERGED)

    def covers(self, probes: dict[str, str]) -> bool:
        """Whether it has a result, with all these readings."""
        return self.has_result and probes.items() <= (self.kept | self.probes).items()

    @cached_property
    def recalled(self) -> Trial:
        """The trial, also where it was stored before a field existed."""
        return Trial.recall(self.fields)


class Footer(BaseModel):
    """What a data file says of itself: enough to write its trial's manifest anew where that is lost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    bnscale: str
    trial: str
    fingerprint: str
    fields: dict[str, Any]
    total_steps: int
    probes: dict[str, str]  # of the training that wrote it
    table: str
    columns: dict[str, str]  # of the table, in SQL types
    first_step: int  # no row is of an earlier step
    last_step: int  # of its last row
    attempt: int
    fence: int = 0  # of its lease
    rewinds: int  # that this attempt had made when it wrote the file
    start: int | None  # the step of the last of them: of files written before it, those count whose rows are earlier
    whole: bool  # all rows of the table up to then: no earlier file counts beside it
    # of the manifest that names it first:
    step: int
    outcome: Outcome | None
    facts: Facts
    kept: dict[str, str]
    counted: dict[str, int]  # rows of each table, these included

    @property
    def turn(self) -> tuple[int, int]:
        """Files of a later turn take the place of those of an earlier one."""
        return self.attempt, self.rewinds


def footer(content: bytes | Path) -> Footer | None:
    """Of a data file; None where it was written before there were any. Raises `ValueError` for no Parquet file."""
    try:
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        said = (pq.read_metadata(file).metadata or {}).get(_FOOTER)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"is no Parquet file ({error})") from None
    return None if said is None else Footer.model_validate_json(said)


def standing(footers: dict[str, Footer]) -> list[str]:
    """Of the files of one table of one trial, by name: those that count where no manifest says so, in order.

    What a killed attempt had written and not committed may be among them; the trial then rewinds to its checkpoint.
    """
    counting: dict[str, Footer] = {}
    for name, about in sorted(footers.items(), key=lambda each: (each[1].turn, each[1].whole, each[1].first_step)):
        if about.whole:
            counting = {}
        elif about.start is not None:
            counting = {
                before: each
                for before, each in counting.items()
                if each.turn == about.turn or each.last_step < about.start
            }
        counting[name] = about
    return sorted(counting, key=lambda name: (counting[name].first_step, counting[name].turn))


def rows_of(content: bytes) -> int:
    """Rows of a data file, read to its last page, each held against its own checksum.

    Raises `ValueError` for what is no whole Parquet file.
    """
    try:
        with pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True) as file:
            return file.read().num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot be read ({str(error).splitlines()[0]})") from None


def is_named_for(content: bytes, name: str) -> bool:
    """Whether a data file still has the content that its name is of; true where names did not say."""
    found = _BY_ATTEMPT.search(name)
    return found is None or hashlib.sha256(content).hexdigest().startswith(found[2])


def rebuilt(files: dict[str, dict[str, tuple[Part, Footer]]]) -> Manifest | None:
    """A trial's manifest, from all its data files that can be read, by table and name; None where there are none.

    That of its latest commit of which no row is missing. A result that its files call whole is one; for anything else
    the trial goes on from there, and where no commit is whole, from its beginning.
    """
    every = [(part, about) for named in files.values() for part, about in named.values()]
    if not every:
        return None
    # A trial whose manifest was deleted began another life: what came later is told by leases, not by clocks.
    life = _began(max((about for _, about in every), key=lambda about: (about.fence, _began(about))))
    every = [(part, about) for part, about in every if _began(about) == life]
    files = {
        table: {name: each for name, each in named.items() if _began(each[1]) == life} for table, named in files.items()
    }

    def commit(about: Footer) -> tuple[int, int, int, bool]:
        return about.attempt, about.rewinds, about.step, about.outcome is not None

    latest = max((about for _, about in every), key=commit)
    empty = Manifest(
        format=FORMAT,
        bnscale=latest.bnscale,
        trial=latest.trial,
        fingerprint=latest.fingerprint,
        fields=latest.fields,
        probes=latest.probes,
        kept={},
        outcome=None,
        attempts=max(about.attempt for _, about in every),
        step=0,
        total_steps=latest.total_steps,
        facts=_lasting(latest.facts),
        columns={},
        parts={},
    )
    for about in sorted((about for _, about in every), key=commit, reverse=True):
        parts = _counting(files, about, commit(about), commit)
        if {table: sum(part.rows for part in listed) for table, listed in parts.items()} != {
            table: rows for table, rows in about.counted.items() if rows
        }:
            continue
        columns = {
            table: dict(pair for part in listed for pair in files[table][part.file][1].columns.items())
            for table, listed in parts.items()
        }
        result = about.outcome in (Outcome.FINISHED, Outcome.DIVERGED)
        return empty.model_copy(
            update={"kept": about.kept, "step": about.step, "columns": columns, "parts": parts, "probes": about.probes}
            | ({"outcome": about.outcome, "facts": about.facts} if result else {})
        )
    return empty


def _began(about: Footer) -> datetime:
    """When the first attempt began: all later ones inherit it, so no two lives have the same."""
    return about.facts.get("started") or datetime.min.replace(tzinfo=UTC)


def _counting(
    files: dict[str, dict[str, tuple[Part, Footer]]], about: Footer, until: Any, commit: Callable[[Footer], Any]
) -> dict[str, list[Part]]:
    """The data files that the manifest of a commit named, as far as they are there."""
    parts = {}
    for table, named in files.items():
        footers = {
            name: each
            for name, (_, each) in named.items()
            if commit(each) <= until
            # what the last rewind forgot, also in tables that nothing was written to since
            and (table in about.kept or about.start is None or each.turn == about.turn or each.last_step < about.start)
        }
        if about.counted.get(table):
            parts[table] = [named[name][0] for name in standing(footers)]
    return parts


class Store:
    """Readings of many trials, each written by one process and read by any number, in a folder or a bucket.

    Raises `Refusal` where a folder cannot be written; whether a bucket can be is for `storage.check` to say.
    """

    def __init__(self, place: str | Path | Storage) -> None:
        self.storage = storage(place)
        self.url = self.storage.url
        self.damaged: list[
            tuple[str, str]
        ] = []  # trials whose manifests the last `manifests()` could not read, and why
        try:
            self.storage.prepare("manifests")
        except OSError as error:
            raise Refusal(
                f"store {self.url}: cannot be written ({reason(error)}); choose another with --store"
            ) from None

    @classmethod
    def existing(cls, place: str | Path | Storage) -> "Store":
        """A store to read; nothing is created. Raises `Refusal` where there is none."""
        kept = storage(place)
        try:
            there = kept.holds("manifests")
        except StoreFailure as failure:
            raise Refusal(str(failure)) from None
        if not there:
            raise Refusal(
                f"store {kept.url}: there is none; run a study that writes it, or choose another with --store"
            )
        store = cls.__new__(cls)
        store.storage, store.url, store.damaged = kept, kept.url, []
        return store

    def manifest(self, trial_id: str) -> Manifest | None:
        """None for a trial that never began. Raises `Refusal` for a manifest that cannot be trusted."""
        found = self._seen(trial_id)
        return found and found[0]

    def ids(self) -> list[str]:
        """Of all trials that a listing shows."""
        return [_trial_of(key) for key in self.storage.list("manifests") if key.endswith(".json")]

    def manifests(self) -> list[Manifest]:
        """Of all trials, by id. What cannot be read is listed in `damaged` and hides no other trial.

        A bucket's listing may lag: a trial that began a moment ago may be missing, and only `manifest` knows it.
        """
        ids = self.ids()
        found, self.damaged = [], []

        def look(trial_id: str) -> Manifest | Exception | None:
            try:
                return self.manifest(trial_id)
            except (Refusal, OSError) as error:
                return error

        for trial_id, manifest in zip(ids, self.storage.each(look, ids), strict=True):
            if isinstance(manifest, Manifest):
                found.append(manifest)
            elif manifest is not None:
                self.damaged.append((trial_id, str(manifest)))
        return found

    def known(self, trials: set[str]) -> dict[str, Manifest]:
        """The manifests of the store by trial id; those of these `trials` also where a listing lags behind."""
        found = {manifest.trial: manifest for manifest in self.manifests()}
        if self.storage.far:
            damaged = {trial for trial, _ in self.damaged}
            hidden = self.storage.each(self.manifest, sorted(trials - found.keys() - damaged))
            found |= {manifest.trial: manifest for manifest in hidden if manifest}
        return found

    def writer(self, trial: Trial, probes: dict[str, str], facts: dict[str, Any], fence: int = 0) -> "Writer":
        """Open the trial's next attempt.

        A trial with a result is opened only for readings that it lacks, and an interrupted one goes on only if
        it reads the same; otherwise training begins anew, without the checkpoints that there are, and whole tables of
        other probes stay. Anew begins also a trial whose manifest was deleted.
        Raises `Refusal` for a trial that has a result and all these readings, `TakenOver` where an attempt has begun
        under a later lease than that with this `fence`; 0 is for those who train under none.
        """
        seen = self._seen(trial.id)
        before = seen and seen[0]
        path = self.where(trial.id)
        if before and before.fingerprint != trial.fingerprint:
            raise Refusal(f"trial {trial.id}: another trial with this id is in {path}; write to another store")
        if before and before.covers(probes):
            raise Refusal(
                f"trial {trial.id}: has {before.outcome} and is trained once; to train it again delete {path}"
            )
        if before:
            _check_fence(before, fence)
        anew = _anew(before, probes)
        kept = {} if not before else before.kept | before.probes if before.has_result else before.kept
        kept = {table: cadence for table, cadence in kept.items() if table not in probes}
        parts = before.parts if before else {}
        inherited = _lasting(before.facts) if before else {}
        lasting = {name: inherited[name] for name in ("started", "seconds") if name in inherited}
        turns = {} if anew else _changes(dict(inherited), facts)
        manifest = Manifest(
            format=FORMAT,
            bnscale=_version(),
            trial=trial.id,
            fingerprint=trial.fingerprint,
            fields=trial.model_dump(mode="json"),
            probes=probes,
            kept=kept,
            outcome=None,
            attempts=before.attempts + 1 if before else 1,
            fence=fence or (before.fence if before else 0),
            step=before.step if before and not anew else 0,
            total_steps=trial.total_steps,
            facts=_checked(trial.id, {"started": datetime.now(UTC)} | inherited | facts | lasting | turns),
            columns=before.columns if before else {},
            parts={table: parts[table] for table in kept if table in parts} if anew else parts,
        )
        if anew:  # before the manifest is there: who dies in between has not begun
            self.checkpoints(trial.id).remove("")
        return Writer(self, manifest, seen and seen[1])

    def reached(self, trial_id: str, probes: dict[str, str]) -> int:
        """Updates behind the rows from which an attempt that opened now would go on; 0 where it would begin anew."""
        before = self.manifest(trial_id)
        return before.step if before and not _anew(before, probes) else 0

    def stop_early(self, trial_id: str) -> None:
        """Note that successive halving gave up on a trial; for the holder of its lease, who trains it no more."""
        while (seen := self._seen(trial_id)) and seen[0].outcome is None and not seen[0].facts.get("stopped_early"):
            if self._note(seen, {"stopped_early": True}):
                return

    def note_error(self, trial_id: str, error: str, kind: str, fence: int = 0) -> bool:
        """Put an error beside a result, which stays; False where there is none. Raises `TakenOver` as `writer` does."""
        while (seen := self._seen(trial_id)) and seen[0].has_result:
            _check_fence(seen[0], fence)
            if self._note(seen, {"error": error, "failure": kind}):
                return True
        return False

    def _note(self, seen: tuple[Manifest, Version], facts: Facts) -> bool:
        manifest = seen[0].model_copy(update={"facts": {**seen[0].facts, **facts}})
        return self.storage.swap(_manifest(manifest.trial), _text(manifest), seen[1]) is not None

    def replace(self, manifest: Manifest) -> None:
        """Put a manifest in the place of whatever is there: for one that mends a trial that nobody trains."""
        self.storage.write(_manifest(manifest.trial), _text(manifest))

    def checkpoints(self, trial_id: str) -> Storage:
        """Where the trial's checkpoints are kept; the engine writes them."""
        return self.storage.below(f"checkpoints/trial={trial_id}")

    def where(self, trial_id: str) -> str:
        """What a message calls the trial's manifest."""
        return f"{self.url}/{_manifest(trial_id)}"

    def key(self, table: str, trial_id: str, part: Part) -> str:
        """Of a data file."""
        return f"{_folder(table, trial_id)}/{part.file}"

    def named(self, manifest: Manifest) -> list[tuple[str, str, Part]]:
        """Table, key and promise of every data file of a trial that counts."""
        return [
            (table, self.key(table, manifest.trial, part), part)
            for table, parts in manifest.parts.items()
            for part in parts
        ]

    def files(self, table: str, trials: set[str] | None = None) -> list[Path]:
        """The data files of a table that count, of these trials or of all, where this machine can read them."""
        return [
            self.storage.local(self.key(table, manifest.trial, part), part.sha256)
            for manifest in self.manifests()
            if trials is None or manifest.trial in trials
            for part in manifest.parts.get(table, [])
        ]

    def flaw(self, key: str, part: Part) -> str | None:
        """What is wrong with a file that a manifest names, as far as its size tells."""
        try:
            size = self.storage.size(key)
        except OSError as error:
            return reason(error)
        if size is None:
            return "no such file or directory"
        return None if size == part.bytes else f"has {size} bytes and its manifest says {part.bytes}"

    def damage(self, key: str, part: Part) -> str | None:
        """What is wrong with a file that a manifest names; reads all of it."""
        wrong = self.flaw(key, part)
        if wrong:
            return wrong
        try:
            found = hashlib.sha256(self.storage.read(key)).hexdigest()
        except OSError as error:
            return reason(error)
        return None if found == part.sha256 else "its checksum is not the one of its manifest"

    def trials_table(self, manifests: Sequence[Manifest] | None = None) -> dict[str, tuple[str, list[Any]]]:
        """One row per trial: its fields, its outcome and what is known of it. The SQL type and the values of each
        column; times are UTC."""
        types = get_type_hints(Trial)
        columns = {"trial": str} | {name: types[name] for name in Trial.model_fields}
        columns |= {"data_title": str, "outcome": str, "attempts": int, "step": int, "total_steps": int}
        columns |= get_type_hints(Facts)
        rows = []
        for manifest in self.manifests() if manifests is None else manifests:
            trial = manifest.recalled
            stated = {name: getattr(manifest, name) for name in ("trial", "outcome", "attempts", "step", "total_steps")}
            rows.append(manifest.facts | stated | dict(trial) | {"data_title": trial.data_title})
        return {
            name: (_SQL_OF[_kind(type_)[0]], [_plain(row.get(name)) for row in rows]) for name, type_ in columns.items()
        }

    def _seen(self, trial_id: str) -> tuple[Manifest, Version] | None:
        """A trial's manifest as it is now, and its version."""
        try:
            content, version = self.storage.get(_manifest(trial_id))
        except FileNotFoundError:
            return None
        return _load(content, trial_id, self.where(trial_id)), version


def _check_fence(manifest: Manifest, fence: int) -> None:
    if manifest.fence > fence > 0:
        raise TakenOver(
            f"trial {manifest.trial}: a later lease ({manifest.fence}) has taken over from this one ({fence})"
        )


def _manifest(trial_id: str) -> str:
    return f"manifests/{trial_id}.json"


def _trial_of(key: str) -> str:
    return key.removeprefix("manifests/").removesuffix(".json")


def _folder(table: str, trial_id: str) -> str:
    return f"{table}/trial={trial_id}"


def _text(manifest: Manifest) -> bytes:
    return (manifest.model_dump_json(indent=1) + "\n").encode()


class Writer:
    """Writes the readings of one attempt at one trial. Nothing counts before a `flush`, a `rewind` or the `finish`.

    Raises `StoreFailure` where the storage fails; the same call may then be made again. Raises `TakenOver` where
    another attempt has begun: this one commits no more.
    """

    def __init__(self, store: Store, manifest: Manifest, version: Version | None) -> None:
        self._store = store
        self._storage = store.storage
        self._rows: dict[str, list[Any]] = {}
        self._columns = dict(manifest.columns)
        self._kinds: dict[str, type] = {}
        self._first = manifest.step  # of the next part
        self._rewinds = 0
        self._start: int | None = None  # of the last of them
        self._written: set[str] = set()  # keys of data files
        self._clock = time.monotonic()
        self._sharing = manifest.facts.get("cohort") or 1
        self._seconds_before = manifest.facts.get("seconds") or 0.0
        self._manifest = manifest
        self._version = version
        # Commits that failed, each with how many rows of each table it has: one of them may stand all the same.
        self._doubts: list[tuple[Manifest, dict[str, int]]] = []
        self._commit(manifest)

    @property
    def reached(self) -> int:
        """Updates behind the rows that count: a checkpoint of a later step is of no use, rows before it are missing."""
        return self._manifest.step

    def write(self, table: str, rows: Iterable[Any]) -> None:
        """Rows of one dataclass per table. Raises `Refusal`, and takes none of them, where a row is of another type."""
        new = list(rows)
        if not new:
            return
        here = f"trial {self._manifest.trial}, table {table}"
        kind = self._kinds.get(table) or type(new[0])
        if table not in self._kinds:
            if not _NAME.fullmatch(table) or table in RESERVED:
                raise Refusal(
                    f"{here}: cannot be a table's name; use lower-case letters, digits and _, none of {RESERVED}"
                )
            columns, stored = columns_of(kind), self._columns.get(table, {})
            for name in columns.keys() & stored.keys():
                if columns[name] != stored[name]:
                    raise Refusal(
                        f"{here}, column {name}: is {columns[name]} and was {stored[name]} in an earlier attempt; "
                        "give the new meaning another name"
                    )
            self._columns[table] = stored | columns
            self._kinds[table] = kind
        for row in new:
            if type(row) is not kind:
                raise Refusal(
                    f"{here}: {type(row).__name__} {row!r} among rows of {kind.__name__}; a table has one type"
                )
        for name, (type_, may_lack) in _kinds(kind).items():
            for row in new:
                value = getattr(row, name)
                if not (
                    may_lack if value is None else isinstance(value, type_) and type(value) is not _FALSE_FRIEND[type_]
                ):
                    raise Refusal(
                        f"{here}, column {name}: {value!r} is {type(value).__name__} and must be {type_.__name__}; "
                        "convert it in the probe"
                    )
        self._rows.setdefault(table, []).extend(new)

    def flush(self, step: int) -> None:
        """Commit all that was written; the next rows are of `step` and later."""
        assert step >= self._first, f"flush at {step} after {self._first}"
        self._settle()
        parts = {table: list(listed) for table, listed in self._manifest.parts.items()}
        coming = self._changed(step=step, facts={"seconds": self._seconds()})
        counted = self._counted()
        for table in self._rows:
            self._append(parts, table, coming, counted)
        self._commit(coming.model_copy(update={"parts": parts}))
        self._first = step

    def rewind(self, step: int) -> None:
        """Forget every row of `step` and later: training goes on from there, and will read them again."""
        self._settle()
        self._rewinds, self._start = self._rewinds + 1, step
        parts: dict[str, list[Part]] = {}
        earlier: list[tuple[str, pa.Table, int]] = []  # rows of parts that begin before the step and end after it
        for table, listed in self._manifest.parts.items():
            if table in self._manifest.kept:
                parts[table] = listed
                continue
            parts[table] = [part for part in listed if part.last_step < step]
            for part in listed:
                if part.first_step < step <= part.last_step:
                    rows = self._read(table, part)
                    earlier.append((table, rows.filter(pc.less(rows["step"], step)), part.first_step))
        counted = {table: sum(part.rows for part in listed) for table, listed in parts.items()}
        for table, rows, _ in earlier:
            counted[table] += rows.num_rows
        coming = self._changed(step=step)
        for table, rows, first in earlier:
            self._place(parts, table, rows, first, coming, counted)
        if parts != self._manifest.parts or step != self._manifest.step:
            self._commit(coming.model_copy(update={"parts": parts}))
            self._sweep()
        elif self._storage.get(_manifest(self._manifest.trial))[1] != self._version:
            raise self._overtaken()
        self._rows.clear()
        self._first = step

    def finish(self, outcome: Outcome, step: int, facts: dict[str, Any]) -> None:
        """Commit all that was written, and the outcome with it.

        A result has one file a table. A failed trial keeps its parts: its next attempt rewinds.
        """
        self._settle()
        known = _checked(self._manifest.trial, facts)
        given = known.get("seconds")
        known["seconds"] = self._seconds() if given is None else self._seconds_before + given
        known.setdefault("ended", datetime.now(UTC))
        parts = {table: list(listed) for table, listed in self._manifest.parts.items()}
        coming = self._changed(outcome=outcome, step=step, facts=known)
        counted = self._counted()
        for table in sorted(parts.keys() | self._rows.keys()):
            if outcome is Outcome.FAILED or not self._merge(parts, table, coming, counted):
                self._append(parts, table, coming, counted)
        self._commit(coming.model_copy(update={"parts": parts}))
        self._first = step
        self._sweep()

    # --- data files -----------------------------------------------------------------------------

    def _counted(self) -> dict[str, int]:
        """Rows of each table, those that wait included."""
        listed = self._manifest.parts
        return {
            table: sum(part.rows for part in listed.get(table, [])) + len(self._rows.get(table, []))
            for table in sorted(listed.keys() | self._rows.keys())
        }

    def _append(self, parts: dict[str, list[Part]], table: str, coming: Manifest, counted: dict[str, int]) -> None:
        """Add the waiting rows of a table as one more part."""
        if self._rows.get(table):
            self._place(parts, table, self._waiting(table), self._first, coming, counted)

    def _merge(self, parts: dict[str, list[Part]], table: str, coming: Manifest, counted: dict[str, int]) -> bool:
        """Make one part of all of them and the waiting rows; False where nothing is gained or one cannot be read."""
        listed = parts.get(table, [])
        if not listed or len(listed) + bool(self._rows.get(table)) < 2:
            return False
        try:
            pieces = [self._read(table, part) for part in listed]
        except StoreFailure:
            return False  # the manifest goes on naming the damaged file, so every reader hears of it
        if self._rows.get(table):
            pieces.append(self._waiting(table))
        parts[table] = []
        first = min(part.first_step for part in listed)
        rows = pa.concat_tables(pieces, promote_options="default")
        self._place(parts, table, rows, first, coming, counted, of="whole")
        return True

    def _place(
        self,
        parts: dict[str, list[Part]],
        table: str,
        rows: pa.Table,
        first: int,
        coming: Manifest,
        counted: dict[str, int],
        of: Literal["part", "whole"] = "part",
    ) -> None:
        """Write a data file and list it. Rows that are listed already, as in a repeated flush, are left alone.

        `coming` is the manifest that will name it, but for its parts; `counted` has the rows of each table then.
        """
        if not rows.num_rows:
            return
        mine = self._manifest
        last = pc.max(rows["step"]).as_py()
        if any(self._holds(table, part, rows, first, last) for part in parts.get(table, [])):
            return
        about = Footer(
            bnscale=mine.bnscale,
            trial=mine.trial,
            fingerprint=mine.fingerprint,
            fields=mine.fields,
            total_steps=mine.total_steps,
            probes=mine.probes,
            table=table,
            columns=self._columns[table],
            first_step=first,
            last_step=last,
            attempt=mine.attempts,
            fence=mine.fence,
            rewinds=self._rewinds,
            start=self._start,
            whole=of == "whole",
            step=coming.step,
            outcome=coming.outcome,
            facts=coming.facts,
            kept=coming.kept,
            counted=counted,
        )
        content = _encode(rows, about)
        sha256 = hashlib.sha256(content).hexdigest()
        # The name is of this content and no other: what a manifest names is never written over.
        part = Part(
            file=f"{of}-{first}-a{mine.attempts}-{sha256[:8]}.parquet",
            first_step=first,
            last_step=last,
            rows=rows.num_rows,
            bytes=len(content),
            sha256=sha256,
        )
        key = self._store.key(table, mine.trial, part)
        self._written.add(key)
        self._storage.write(key, content)
        parts.setdefault(table, []).append(part)

    def _holds(self, table: str, part: Part, rows: pa.Table, first: int, last: int) -> bool:
        """Whether a part has just these rows. Only one of the same steps is read, and none is but by repetition."""
        if (part.first_step, part.last_step, part.rows) != (first, last, rows.num_rows):
            return False
        return _encode(self._read(table, part), None) == _encode(rows, None)

    def _waiting(self, table: str) -> pa.Table:
        rows = self._rows[table]
        kinds = _kinds(self._kinds[table])
        schema = pa.schema([(name, _ARROW[type_]) for name, (type_, _) in kinds.items()])
        return pa.table({name: [getattr(row, name) for row in rows] for name in kinds}, schema=schema)

    def _read(self, table: str, part: Part) -> pa.Table:
        key = self._store.key(table, self._manifest.trial, part)
        try:
            content = self._storage.read(key)
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != part.sha256:
            wrong = self._store.damage(key, part)
            raise StoreFailure(f"{self._store.url}/{key}: {wrong}; delete the trial's manifest to train it again")
        # `pq.ParquetFile` adds no column `trial`, which only the path holds.
        return pq.ParquetFile(io.BytesIO(content)).read()

    def _sweep(self) -> None:
        """Delete what no manifest names any more. Of later attempts nothing: one may have begun since our commit."""
        mine = self._manifest
        named = {key for _, key, _ in self._store.named(mine)}
        # An orphan is never read, so one that cannot be deleted costs nothing but its space.
        with suppress(OSError):
            for key in sorted(self._written - named):
                self._storage.delete(key)
        self._written &= named
        if mine.attempts == 1:
            return
        for table in mine.columns:
            with suppress(OSError):
                self._storage.sweep(
                    _folder(table, mine.trial), lambda key: key not in named and _attempt(key) <= mine.attempts
                )

    # --- the manifest ---------------------------------------------------------------------------

    def _settle(self) -> bool:
        """Whether a commit that failed stands all the same, as after a lost reply. If so its rows wait no longer."""
        if not self._doubts:
            return False
        try:
            content, version = self._storage.get(_manifest(self._manifest.trial))
        except FileNotFoundError:
            return False
        for manifest, counts in self._doubts:
            if content == _text(manifest):
                self._manifest, self._version = manifest, version
                self._rows = {table: rows[counts.get(table, 0) :] for table, rows in self._rows.items()}
                self._doubts = []
                return True
        return False

    def _changed(self, facts: dict[str, Any] | Facts | None = None, **changes: Any) -> Manifest:
        changes |= {"columns": dict(self._columns), "facts": {**self._manifest.facts, **(facts or {})}}
        return self._manifest.model_copy(update=changes)

    def _commit(self, manifest: Manifest) -> None:
        key, content = _manifest(manifest.trial), _text(manifest)
        while True:
            doubt = (manifest, {table: len(rows) for table, rows in self._rows.items()})
            self._doubts.append(doubt)
            if self._version is None:
                version = self._storage.create(key, content)
            else:
                version = self._storage.swap(key, content, self._version)
            if version is not None:
                break
            self._doubts.remove(doubt)
            if not self._settle():  # a commit in doubt may have come late
                raise self._overtaken()
        self._manifest, self._version, self._doubts = manifest, version, []
        self._rows.clear()

    def _overtaken(self) -> TakenOver:
        mine = self._manifest
        now = self._store.manifest(mine.trial)
        there = f"attempt {now.attempts} has taken over" if now else "its manifest was deleted"
        return TakenOver(f"trial {mine.trial}: {there}; attempt {mine.attempts} writes no more")

    def _seconds(self) -> float:
        return self._seconds_before + (time.monotonic() - self._clock) / self._sharing


def _anew(before: Manifest | None, probes: dict[str, str]) -> bool:
    """Whether an attempt that reads this does not go on from the one before."""
    return before is None or before.has_result or before.probes != probes


_TURNS = {"commit": "commits", "device": "devices", "workers": "worker_counts"}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Of a training that goes on: what is another than it was, all of it in turn."""
    said = {}
    for name, turns in _TURNS.items():
        earlier = before.get(turns) or before.get(name)
        if earlier is not None and now.get(name) is not None:
            kept = [*str(earlier).split(" -> "), str(now[name])]
            said[turns] = " -> ".join(each for each, last in zip(kept, [None, *kept], strict=False) if each != last)
    return {turns: value for turns, value in said.items() if " -> " in value}


def columns_of(row: type) -> dict[str, str]:
    """Column to SQL type of a table's dataclass. Raises `Refusal` for a type that no column can have."""
    return {name: _SQL[type_] for name, (type_, _) in _kinds(row).items()}


# --- types --------------------------------------------------------------------------------------

_FALSE_FRIEND = {int: bool, float: None, str: None, bool: None}  # True is an int to Python, and must not be one to SQL


@lru_cache
def _kinds(row: type) -> dict[str, tuple[type, bool]]:
    """Column to Python type and whether it may be None."""
    if not is_dataclass(row):
        raise Refusal(f"{row.__name__}: a row is a dataclass whose fields are the columns")
    types = get_type_hints(row)
    kinds = {field.name: _kind(types[field.name]) for field in fields(row)}
    for name, (type_, _) in kinds.items():
        if type_ not in _SQL:
            raise Refusal(
                f"{row.__name__}.{name}: {type_} cannot be a column; use int, float, str or bool, or one | None"
            )
        if not _NAME.fullmatch(name) or name == "trial":
            raise Refusal(
                f"{row.__name__}.{name}: cannot be a column's name; lower-case letters, digits and _, not trial"
            )
    if kinds.get("step") != (int, False):
        raise Refusal(f"{row.__name__}: has no field `step: int` (updates taken), which resuming a trial needs")
    return kinds


def _kind(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) in (Union, UnionType):
        kept = [each for each in get_args(annotation) if each is not NoneType]
        return (_kind(kept[0])[0] if len(kept) == 1 else annotation), True
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, str):
        return str, False  # an enum of words
    return annotation, False


def _encode(rows: pa.Table, about: Footer | None) -> bytes:
    # Parquet's statistics of a column leave NaN out, and DuckDB 2.0 believes them: `x = 'nan'` is never true for it,
    # and `nullif(x, 'nan')` becomes x. So floats carry none.
    exact = [field.name for field in rows.schema if not pa.types.is_floating(field.type)]
    sink = io.BytesIO()
    # Arrow's own schema is not stored: its types are Parquet's here.
    with pq.ParquetWriter(
        sink, rows.schema, compression="zstd", write_page_checksum=True, write_statistics=exact, store_schema=False
    ) as file:
        file.write_table(rows)
        if about:
            file.add_key_value_metadata({_FOOTER: about.model_dump_json()})
    return sink.getvalue()


def _plain(value: Any) -> Any:
    """As a database takes it: a word for an enum, the time of day at UTC."""
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None)
    return list(value) if isinstance(value, tuple) else value


def _attempt(key: str) -> int:
    """That wrote a data file; 0 where names did not say."""
    found = _BY_ATTEMPT.search(key)
    return int(found[1]) if found else 0


def _lasting(facts: Facts) -> Facts:
    """What of an attempt's facts the next one has, too."""
    return cast(Facts, {name: value for name, value in facts.items() if name not in _ENDINGS})


def _checked(trial_id: str, facts: dict[str, Any]) -> Facts:
    try:
        return _FACTS.validate_python(facts)
    except ValidationError as error:
        first = error.errors()[0]
        name, known = str(first["loc"][0]), list(get_type_hints(Facts))
        if first["type"] == "extra_forbidden":
            message = f"fact {name}: no such fact{near(name, known)} They are {', '.join(known)}"
        else:
            message = f"fact {name} {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        raise Refusal(f"trial {trial_id}, {message}") from None


def _load(content: bytes, trial_id: str, where: str) -> Manifest:
    newer = ""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        with suppress(ValueError):
            match json.loads(content):
                case {"format": int(made), "bnscale": by} if made > FORMAT:
                    newer = f"manifest {where}: was made by bnscale {by} (format {made}); update bnscale"
        if newer:
            raise Refusal(newer) from None
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        wrong = f"{at}: {first['msg']}" if at else first["msg"]
        raise DamagedManifest(
            f"manifest {where}: is damaged ({wrong}); bnscale verify --repair writes it anew, or delete it to train "
            "the trial again"
        ) from None
    try:
        recalled = manifest.recalled
    except Refusal as error:
        raise Refusal(
            f"manifest {where}: made by bnscale {manifest.bnscale} and not understood here: {error}"
        ) from None
    if recalled.fingerprint != manifest.fingerprint or manifest.trial != trial_id:
        raise DamagedManifest(f"manifest {where}: its fields are another trial's; delete it to train the trial again")
    return manifest


@lru_cache
def _version() -> str:
    try:
        return importlib.metadata.version("bnscale")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
