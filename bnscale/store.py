"""Rows to Parquet, whole or not at all.

    <store>/manifests/<trial>.json                       what counts: one file a trial, replaced atomically
    <store>/<table>/trial=<trial>/part-<step>.parquet    readings from that step on
    <store>/checkpoints/trial=<trial>/                   the engine's own

A data file is written under a temporary name, forced to the disk and renamed; then a manifest that names it takes
the place of the one before. That last rename is the commit: whatever a crash leaves behind that no manifest names
was never there. So readers trust manifests, never a listing, and no path in a manifest is absolute: a store may be
moved. The step of a row decides what a resumed trial repeats: training that goes on from step s takes every reading
of step s and later again, so `rewind(s)` forgets those.
"""

import hashlib
import importlib.metadata
import io
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from itertools import count
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AwareDatetime, BaseModel, ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # the one of `typing` lacks what pydantic needs before Python 3.12

from bnscale.trial import Outcome, Refusal, Trial, near

RESERVED = ("manifests", "checkpoints", "logs", "trials", "cells")  # folders and views that are no probe's

_SQL = {int: "bigint", float: "double", str: "varchar", bool: "boolean"}
_ARROW = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()} | {
    AwareDatetime: pa.timestamp("us"),  # without a zone: always UTC
    tuple[float, ...]: pa.list_(pa.float64()),
}
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class StoreFailure(OSError):
    """The disk or another process stands in the way. What was committed before stays readable."""


class TakenOver(StoreFailure):
    """A later attempt, perhaps on another node, trains the trial now: nothing is wrong with it."""


class Facts(TypedDict, total=False):
    """What is known of a trial besides its fields: nothing here may change a number."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # type: ignore[misc]

    started: AwareDatetime | None  # of the first attempt
    ended: AwareDatetime | None
    seconds: float | None  # training wall time, over all attempts
    workers: int | None
    threads: int | None  # of each worker
    host: str | None
    device: str | None
    commit: str | None  # git hash, with "+" where the tree was dirty
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

    format: Literal[1]  # a later bnscale that writes another says so here
    bnscale: str
    trial: str
    fingerprint: str
    fields: dict[str, Any]
    probes: dict[str, str]  # what this training reads: table to cadence in words
    kept: dict[str, str]  # the same for tables that an earlier training of this trial has read whole
    outcome: Outcome | None  # None while it trains, and after a kill
    attempts: int
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


class Store:
    """A folder of readings of many trials, each written by one process and read by any number.

    Raises `Refusal` where the folder cannot be written.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.damaged: list[tuple[Path, str]] = []  # manifests the last `manifests()` could not read, and why
        folder = self.root / "manifests"
        try:
            _need(folder)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError("permission denied")
        except OSError as error:
            raise Refusal(
                f"store {self.root}: cannot be written ({_reason(error)}); choose another with --store"
            ) from None

    @classmethod
    def existing(cls, root: str | Path) -> "Store":
        """A store to read; nothing is created. Raises `Refusal` where there is none."""
        if not (Path(root) / "manifests").is_dir():
            raise Refusal(f"store {root}: there is none; run a study that writes it, or choose another with --store")
        store = cls.__new__(cls)
        store.root, store.damaged = Path(root), []
        return store

    def manifest(self, trial_id: str) -> Manifest | None:
        """None for a trial that never began. Raises `Refusal` for a manifest that cannot be trusted."""
        path = self._manifest_path(trial_id)
        try:
            return _load(path)
        except FileNotFoundError:
            return None

    def manifests(self) -> list[Manifest]:
        """Of all trials, by id. What cannot be read is listed in `damaged` and hides no other trial."""
        found, self.damaged = [], []
        for path in sorted((self.root / "manifests").glob("*.json")):
            try:
                found.append(_load(path))
            except (Refusal, OSError) as error:
                self.damaged.append((path, str(error)))
        return found

    def writer(self, trial: Trial, probes: dict[str, str], facts: dict[str, Any]) -> "Writer":
        """Open the trial's next attempt.

        A trial with a result is opened only for readings that it lacks, and an interrupted one goes on only if
        it reads the same; otherwise training begins anew (`Writer.anew`), and whole tables of other probes stay.
        Raises `Refusal` for a trial that has a result and all these readings.
        """
        before = self.manifest(trial.id)
        path = self._manifest_path(trial.id)
        if before and before.fingerprint != trial.fingerprint:
            raise Refusal(f"trial {trial.id}: another trial with this id is in {path}; write to another store")
        if before and before.covers(probes):
            raise Refusal(
                f"trial {trial.id}: has {before.outcome} and is trained once; to train it again delete {path}"
            )
        anew = before is not None and (before.has_result or before.probes != probes)
        kept = {} if not before else before.kept | before.probes if before.has_result else before.kept
        kept = {table: cadence for table, cadence in kept.items() if table not in probes}
        parts = before.parts if before else {}
        inherited = {name: value for name, value in before.facts.items() if name not in _ENDINGS} if before else {}
        lasting = {name: inherited[name] for name in ("started", "seconds") if name in inherited}
        turns = {} if anew else _changes(inherited, facts)
        manifest = Manifest(
            format=1,
            bnscale=_version(),
            trial=trial.id,
            fingerprint=trial.fingerprint,
            fields=trial.model_dump(mode="json"),
            probes=probes,
            kept=kept,
            outcome=None,
            attempts=before.attempts + 1 if before else 1,
            step=before.step if before and not anew else 0,
            total_steps=trial.total_steps,
            facts=_checked(trial.id, {"started": datetime.now(UTC)} | inherited | facts | lasting | turns),
            columns=before.columns if before else {},
            parts={table: parts[table] for table in kept if table in parts} if anew else parts,
        )
        return Writer(self, manifest, anew=anew)

    def stop_early(self, trial_id: str) -> None:
        """Note that successive halving gave up on a trial that nobody trains any more."""
        manifest = self.manifest(trial_id)
        if manifest is not None and manifest.outcome is None:
            facts: Facts = {**manifest.facts, "stopped_early": True}
            changed = manifest.model_copy(update={"facts": facts})
            _replace(self._manifest_path(trial_id), (changed.model_dump_json(indent=1) + "\n").encode())

    def checkpoints(self, trial_id: str) -> Path:
        """The folder for the trial's checkpoints, which the engine creates."""
        return self.root / "checkpoints" / f"trial={trial_id}"

    def folder(self, table: str, trial_id: str) -> Path:
        return self.root / table / f"trial={trial_id}"

    def files(self, table: str, trials: set[str] | None = None) -> list[Path]:
        """The data files of a table that count, of these trials or of all."""
        return [
            self.folder(table, manifest.trial) / part.file
            for manifest in self.manifests()
            if trials is None or manifest.trial in trials
            for part in manifest.parts.get(table, [])
        ]

    def trials_table(self, manifests: Sequence[Manifest] | None = None) -> pa.Table:
        """One row per trial: its fields, its outcome and what is known of it. Times are UTC."""
        types = get_type_hints(Trial)
        columns = {"trial": str} | {name: types[name] for name in Trial.model_fields}
        columns |= {"data_title": str, "outcome": str, "attempts": int, "step": int, "total_steps": int}
        facts = get_type_hints(Facts)
        rows = []
        for manifest in self.manifests() if manifests is None else manifests:
            trial = manifest.recalled
            stated = manifest.model_dump(include={"trial", "outcome", "attempts", "step", "total_steps"})
            rows.append(stated | trial.model_dump() | {"data_title": trial.data_title} | manifest.facts)
        schema = pa.schema([(name, _ARROW[_kind(type_)[0]]) for name, type_ in (columns | facts).items()])
        return pa.Table.from_pylist(rows, schema=schema)

    def _manifest_path(self, trial_id: str) -> Path:
        return self.root / "manifests" / f"{trial_id}.json"


class Writer:
    """Writes the readings of one attempt at one trial. Nothing counts before a `flush`, a `rewind` or the `finish`.

    Raises `StoreFailure` where the disk fails; the same call may then be made again.
    """

    def __init__(self, store: Store, manifest: Manifest, *, anew: bool) -> None:
        self.anew = anew  # checkpoints of an earlier training must not be gone on from
        self._store = store
        self._rows: dict[str, list[Any]] = {}
        self._columns = dict(manifest.columns)
        self._kinds: dict[str, type] = {}
        self._first = manifest.step  # of the next part
        self._clock = time.monotonic()
        self._seconds_before = manifest.facts.get("seconds") or 0.0
        self._commit(manifest)

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
        self._stand()
        parts = {table: list(listed) for table, listed in self._manifest.parts.items()}
        for table in self._rows:
            self._append(parts, table)
        self._commit(self._changed(step=step, parts=parts, facts={"seconds": self._seconds()}))
        self._first = step

    def rewind(self, step: int) -> None:
        """Forget every row of `step` and later: training goes on from there, and will read them again."""
        self._stand()
        parts: dict[str, list[Part]] = {}
        for table, listed in self._manifest.parts.items():
            if table in self._manifest.kept:
                parts[table] = listed
                continue
            parts[table] = [part for part in listed if part.last_step < step]
            for part in listed:
                if part.first_step < step <= part.last_step:
                    rows = self._read(table, part)
                    earlier = rows.filter(pc.less(rows["step"], step))
                    self._place(parts, table, f"part-{part.first_step}", earlier, part.first_step)
        if parts != self._manifest.parts or step != self._manifest.step:
            self._commit(self._changed(step=step, parts=parts))
            self._sweep()
        self._rows.clear()
        self._first = step

    def finish(self, outcome: Outcome, step: int, facts: dict[str, Any]) -> None:
        """Commit all that was written, and the outcome with it.

        A result has one file a table. A failed trial keeps its parts: its next attempt rewinds.
        """
        self._stand()
        known = _checked(self._manifest.trial, facts)
        given = known.get("seconds")
        known["seconds"] = self._seconds() if given is None else self._seconds_before + given
        known.setdefault("ended", datetime.now(UTC))
        parts = {table: list(listed) for table, listed in self._manifest.parts.items()}
        for table in sorted(parts.keys() | self._rows.keys()):
            if outcome is Outcome.FAILED or not self._merge(parts, table):
                self._append(parts, table)
        self._commit(self._changed(outcome=outcome, step=step, parts=parts, facts=known))
        self._first = step
        self._sweep()

    # --- data files -----------------------------------------------------------------------------

    def _append(self, parts: dict[str, list[Part]], table: str) -> None:
        """Add the waiting rows of a table as one more part."""
        if self._rows.get(table):
            self._place(parts, table, f"part-{self._first}", self._waiting(table), self._first)

    def _merge(self, parts: dict[str, list[Part]], table: str) -> bool:
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
        self._place(
            parts,
            table,
            "whole",
            pa.concat_tables(pieces, promote_options="default"),
            min(part.first_step for part in listed),
        )
        return True

    def _place(self, parts: dict[str, list[Part]], table: str, stem: str, rows: pa.Table, first_step: int) -> None:
        """Write a data file and list it. Content that is listed already, as in a repeated flush, is left alone."""
        if not rows.num_rows:
            return
        content = _encode(rows)
        part = Part(
            file="",
            first_step=first_step,
            last_step=pc.max(rows["step"]).as_py(),
            rows=rows.num_rows,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        if any(each.sha256 == part.sha256 for each in parts.get(table, [])):
            return
        # A file that the manifest names must stay as it is until the next manifest stands.
        taken = {each.file for each in self._manifest.parts.get(table, []) + parts.get(table, [])}
        names = (f"{stem}.parquet" if again == 1 else f"{stem}-{again}.parquet" for again in count(1))
        part = part.model_copy(update={"file": next(name for name in names if name not in taken)})
        path = self._store.folder(table, self._manifest.trial) / part.file
        _replace(path, content)
        _settle(path)
        parts.setdefault(table, []).append(part)

    def _waiting(self, table: str) -> pa.Table:
        rows = self._rows[table]
        kinds = _kinds(self._kinds[table])
        schema = pa.schema([(name, _ARROW[type_]) for name, (type_, _) in kinds.items()])
        return pa.table({name: [getattr(row, name) for row in rows] for name in kinds}, schema=schema)

    def _read(self, table: str, part: Part) -> pa.Table:
        path = self._store.folder(table, self._manifest.trial) / part.file
        wrong = damage(path, part)
        if wrong:
            raise StoreFailure(f"{path}: {wrong}; delete the trial's manifest to train it again")
        return pq.ParquetFile(path).read()  # without the column `trial`, which only the path holds

    def _sweep(self) -> None:
        """Delete what no manifest names any more."""
        for table in self._manifest.columns:
            named = {part.file for part in self._manifest.parts.get(table, [])}
            # An orphan is never read, so one that cannot be deleted costs nothing but its space.
            with suppress(OSError):
                for path in self._store.folder(table, self._manifest.trial).iterdir():
                    if path.name not in named:
                        _delete(path)

    # --- the manifest ---------------------------------------------------------------------------

    def _stand(self) -> None:
        """Raises `TakenOver` where a later attempt has."""
        mine = self._manifest
        now = self._store.manifest(mine.trial)
        if now is None or now.attempts != mine.attempts:
            there = f"attempt {now.attempts} has taken over" if now else "its manifest was deleted"
            raise TakenOver(f"trial {mine.trial}: {there}; attempt {mine.attempts} writes no more")

    def _changed(self, facts: dict[str, Any] | Facts | None = None, **changes: Any) -> Manifest:
        changes |= {"columns": dict(self._columns), "facts": {**self._manifest.facts, **(facts or {})}}
        return self._manifest.model_copy(update=changes)

    def _commit(self, manifest: Manifest) -> None:
        path = self._store._manifest_path(manifest.trial)
        _replace(path, (manifest.model_dump_json(indent=1) + "\n").encode())
        # From here on it is committed, even where forcing the folder to the disk fails: no row may wait any longer.
        self._manifest = manifest
        self._rows.clear()
        _settle(path)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._clock


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


def flaw(path: Path, part: Part) -> str | None:
    """What is wrong with a file that a manifest names, as far as its size tells."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return _reason(error)
    return None if size == part.bytes else f"has {size} bytes and its manifest says {part.bytes}"


def damage(path: Path, part: Part) -> str | None:
    """What is wrong with a file that a manifest names; reads all of it."""
    wrong = flaw(path, part)
    if wrong:
        return wrong
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return _reason(error)
    return None if found == part.sha256 else "its checksum is not the one of its manifest"


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


def _encode(rows: pa.Table) -> bytes:
    # Parquet's statistics of a column leave NaN out, and DuckDB 2.0 believes them: `x = 'nan'` is never true for it,
    # and `nullif(x, 'nan')` becomes x. So floats carry none.
    exact = [field.name for field in rows.schema if not pa.types.is_floating(field.type)]
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd", write_page_checksum=True, write_statistics=exact)
    return sink.getvalue()


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


# --- files: every change of the disk is one of these calls ----------------------------------------


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)


def _make(folder: Path) -> None:
    folder.mkdir(exist_ok=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)


def _need(folder: Path) -> None:
    """Create a folder and those above it, durably."""
    if not folder.is_dir():
        _need(folder.parent)
        _make(folder)
        _sync(folder.parent)


def _replace(path: Path, content: bytes) -> None:
    """This content under this name, or what was there before."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        _need(path.parent)
        _write(temporary, content)
        _rename(temporary, path)
    except OSError as error:
        with suppress(OSError):
            _delete(temporary)
        raise _failure(path, error) from error


def _settle(path: Path) -> None:
    """Make a rename survive a power cut."""
    try:
        _sync(path.parent)
    except OSError as error:
        raise _failure(path, error) from error


def _failure(path: Path, error: OSError) -> StoreFailure:
    failure = StoreFailure(
        f"{path}: cannot be written ({_reason(error)}); what was committed is safe: mend that and run again"
    )
    failure.errno = error.errno
    return failure


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _load(path: Path) -> Manifest:
    content, newer = path.read_bytes(), ""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        with suppress(ValueError):
            match json.loads(content):
                case {"format": int(made), "bnscale": by} if made > 1:
                    newer = f"manifest {path}: was made by bnscale {by} (format {made}); update bnscale"
        if newer:
            raise Refusal(newer) from None
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        wrong = f"{where}: {first['msg']}" if where else first["msg"]
        raise Refusal(f"manifest {path}: is damaged ({wrong}); delete it to train the trial again") from None
    try:
        recalled = manifest.recalled
    except Refusal as error:
        raise Refusal(f"manifest {path}: made by bnscale {manifest.bnscale} and not understood here: {error}") from None
    if recalled.fingerprint != manifest.fingerprint or manifest.trial != path.stem:
        raise Refusal(f"manifest {path}: its fields are another trial's; delete it to train the trial again")
    return manifest


@lru_cache
def _version() -> str:
    try:
        return importlib.metadata.version("bnscale")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
