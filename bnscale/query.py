"""SQL over a store: read-only, bounded in time and rows, and true while a study still runs.

A session sees the store as its manifests were when it was opened. Views: `trials`, one per probe table, and `cells`.
A reading that is NaN is NULL here: DuckDB takes NaN for the greatest number, and a diverged trial would be the best.
"""

import html
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import duckdb
from scipy.special import stdtrit

from bnscale.storage import Storage, reason, storage
from bnscale.store import Manifest, Part, Store, columns_of
from bnscale.trial import Refusal, Trial, near

MEMORY = "2GiB"  # of one query; the rest of the machine is training
PATIENCE = 20.0  # seconds with a store that changes while it is read; then a file that is not there counts as damage
PAUSE = 0.02  # seconds between two looks

_OF_A_STUDY = ("plan", "chosen", "tried", "bracket")  # tables that its grid makes of a store
_MARK = "bnscale_export"  # a table that only our exports have
_LEFT_OUT = "--skip-damaged of `bnscale sql` and `bnscale export` leaves such files out"
# What a question can do wrong. DuckDB reports a damaged file as one of many others.
_ASKED_WRONG = (
    duckdb.ParserException,
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.ConversionException,
    duckdb.OutOfRangeException,
    duckdb.PermissionException,
    duckdb.TransactionException,
)

# What `cells` asks of the table `curve`, also in a store where no trial has read anything yet.
_CURVE = {"step": "bigint", "split": "varchar", "accuracy": "double"}

_FILES = "read_parquet([{files}], hive_partitioning = true, hive_types_autocast = false, union_by_name = {by_name})"

# One row per reading. Each `double` goes through `isnan`: `nullif(x, 'nan')` is undone by a file's statistics.
_READINGS = """
create or replace view "{table}" as
select {columns}
from {source}"""

# One row per setting: every field of a trial but its seed.
_CELLS = """
create or replace view cells as
with last_reading as (
    -- one row per finished trial and split: the reading at its last step
    select trial, split, arg_max_null(accuracy, curve.step) as accuracy
    from curve
    join trials using (trial)
    where outcome = 'finished'
    group by trial, split
),
by_trial as (
    -- one row per trial; accuracies of finished trials only
    select
        trials.*,
        tested.accuracy as test_accuracy,
        validated.accuracy as validation_accuracy
    from trials
    left join last_reading as tested on tested.trial = trials.trial and tested.split = 'test'
    left join last_reading as validated on validated.trial = trials.trial and validated.split = 'validation'
),
over_seeds as (
    -- one row per setting
    select
        {fields},
        count(*) as n,
        count(*) filter (where outcome = 'finished') as n_finished,
        count(*) filter (where outcome = 'failed') as n_failed,
        count(*) filter (where outcome = 'diverged') as n_diverged,
        count(test_accuracy) as test_n,
        avg(test_accuracy) as test_mean,
        stddev_samp(test_accuracy) / sqrt(count(test_accuracy)) as test_error,
        count(validation_accuracy) as validation_n,
        avg(validation_accuracy) as validation_mean,
        stddev_samp(validation_accuracy) / sqrt(count(validation_accuracy)) as validation_error
    from by_trial
    group by {fields}
)
-- one row per setting; low and high bound the mean at 95 %, and are null for fewer than two readings
select
    over_seeds.* exclude (test_n, test_error, validation_n, validation_error),
    test_mean - test_t.t95 * test_error as test_low,
    test_mean + test_t.t95 * test_error as test_high,
    validation_mean - validation_t.t95 * validation_error as validation_low,
    validation_mean + validation_t.t95 * validation_error as validation_high
from over_seeds
left join student as test_t on test_t.n = test_n
left join student as validation_t on validation_t.n = validation_n"""


@dataclass(frozen=True)
class Answer:
    """The rows of one query, in memory."""

    columns: list[str]
    types: list[str]  # DuckDB's names
    rows: list[tuple[Any, ...]]
    damaged: list[str] = field(default_factory=list)  # what could not be read and is not in the rows

    def dicts(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def table(self) -> str:
        """Plain text, one line a row."""
        lines = [self.columns, *([_text(value) for value in row] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        numeric = [bool(re.match(r".*INT|DOUBLE|FLOAT|DECIMAL", kind)) and "[" not in kind for kind in self.types]
        padded = [
            "  ".join(
                cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric, strict=True)
            )
            for line in lines
        ]
        return "\n".join(line.rstrip() for line in [padded[0], "  ".join("-" * w for w in widths), *padded[1:]])

    def __repr__(self) -> str:
        return "\n".join([self.table(), *(f"not read: {each}" for each in self.damaged)])

    def _repr_html_(self) -> str:
        def line(tag: str, cells: list[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line("td", [_text(value) for value in row]) for row in self.rows)
        notes = "".join(f"<p>not read: {html.escape(each)}</p>" for each in self.damaged)
        return f"<table><thead>{line('th', self.columns)}</thead><tbody>{body}</tbody></table>{notes}"


class Session:
    """Asks a store. Made by `open`; not for use by several threads at once."""

    def __init__(self, store: Store, tables: dict[str, type], seconds: float, rows: int, skip_damaged: bool) -> None:
        self.damaged: list[str] = []  # what could not be read, to be said beside every answer
        self._store, self._tables, self._seconds, self._rows = store, tables, seconds, rows
        self._check = store.damage if skip_damaged else store.flaw
        self._skip_damaged = skip_damaged
        self._far = store.storage.far
        self._related: dict[str, list[str]] = {}
        self._connection = duckdb.connect()
        self._reach = str(store.storage.reach)
        self._root = root = os.path.realpath(self._reach)
        for setting, value in {
            "memory_limit": MEMORY,
            "temp_directory": "",  # a query that needs more ends, and does not fill the disk
            "parquet_metadata_cache": True,  # what a manifest names is never written over
            "python_enable_replacements": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allowed_directories": [root, _literal(root)],
            "enable_external_access": False,
            "lock_configuration": True,
        }.items():
            self._connection.execute(f"set {setting} = $value", {"value": value})
        self._refresh()

    def sql(self, text: str) -> Answer:
        """Answer one statement that reads. Raises `Refusal` for one that writes, is wrong, or asks for too much."""
        query = _reading(self._connection, text)
        for _ in _looks():
            try:
                return self._ask(query)
            except _Unreadable as unreadable:
                why, before = unreadable, self._manifests
            self._refresh()  # a trial that ended has merged its files: its new manifest names others
            if self._manifests == before:
                break
        tables = self._behind(query)
        suspects = [
            (key, self._store.damage(key, part), manifest.trial)
            for manifest in self._manifests
            for table, key, part in self._store.named(manifest)
            if table in tables
        ]
        found = [f"{self._store.url}/{key}: {wrong}; {self._way_out(trial)}" for key, wrong, trial in suspects if wrong]
        raise Refusal(found[0] if found else str(why)) from None

    @property
    def tables(self) -> list[str]:
        """Names of the tables that a question may read."""
        return [*self._views, "student", *self._related]

    def relate(self, name: str, columns: dict[str, list[Any]], stated: dict[str, str] | None = None) -> None:
        """Add a small table under this name, or replace it. A column has its `stated` type, or that of `trials`."""
        assert name not in self._views, f"{name} is a view"
        assert len({len(values) for values in columns.values()}) == 1, f"{name}: columns of different lengths"
        known = {column: kind for column, kind, *_ in self._connection.execute("describe trials").fetchall()}
        known |= stated or {}
        types = {column: known.get(column) or _type(values) for column, values in columns.items()}
        plain = {
            column: (types[column], [each.value if isinstance(each, Enum) else each for each in values])
            for column, values in columns.items()
        }
        _create(self._connection, name, plain)
        self._related[name] = list(columns)

    def export(self, path: str | Path) -> None:
        """Write a DuckDB file with a table for every view. Raises `Refusal` where another file would be lost."""
        path = Path(path)
        if path.exists() and not _is_export(path):
            raise Refusal(f"export {path}: exists and is no export of bnscale; choose another name")
        self._refresh()
        self._bring(set(self._views))
        self._readable(set(self._views))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with duckdb.connect(str(temporary)) as file:
                file.execute("create schema views; use views")
                _fill(file, self._store, self._manifests, self._tables, self._files)
                for view in self._views:
                    file.execute(f'create table main."{view}" as from views."{view}"')
                file.execute(f"create table main.{_MARK} as select 1 as format")
                file.execute("use main; drop schema views cascade")
            os.replace(temporary, path)
        except (duckdb.Error, OSError) as error:
            raise Refusal(f"export {path}: cannot be written ({_gist(error)}); choose another place") from None
        finally:
            for leftover in (temporary, temporary.with_name(temporary.name + ".wal")):
                with suppress(OSError):
                    leftover.unlink(missing_ok=True)

    # --- the store's files ------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Read the manifests anew, look at each file they name, and build the views."""
        check = self._check
        for last in _looks():
            self._manifests: list[Manifest] = []
            self._files: dict[str, list[tuple[str, str]]] = {}  # table to trial and path
            self._broken: dict[str, list[tuple[str, str]]] = {}  # table to trial and what is wrong with a file of it
            self._waiting: dict[str, list[tuple[str, str, Part]]] = {}  # table to trial and what has yet to be fetched
            for manifest in self._store.manifests():
                self._look(manifest, check)
            if self._skip_damaged:
                self._fetch(set(self._waiting))  # to see which are damaged
            try:
                self._views, odd = _fill(self._connection, self._store, self._manifests, self._tables, self._files)
                break
            except duckdb.Error as error:
                if last:
                    raise Refusal(
                        f"store {self._store.url}: {_gist(error)}; its rows cannot be read; {_LEFT_OUT} and names them"
                    ) from None
                check = self._store.damage  # a file went away a moment ago, or one of the right size cannot be read
        skipped = [said for broken in self._broken.values() for _, said in broken] if self._skip_damaged else []
        self.damaged = [reason for _, reason in self._store.damaged] + odd + skipped

    def _look(self, manifest: Manifest, check: Callable[[str, Part], str | None]) -> None:
        """Take up the files of one trial. Where one is amiss the trial may have ended: its manifest is read again.

        Of a bucket, whose files are looked at when they are fetched, it notes them only.
        """
        if self._far:
            self._manifests.append(manifest)
            for table, key, part in self._store.named(manifest):
                self._waiting.setdefault(table, []).append((manifest.trial, key, part))
            return
        for _ in _looks():
            looked = [(*each, check(*each[1:])) for each in self._store.named(manifest)]
            if not any(wrong for *_, wrong in looked):
                break
            now = self._store.manifest(manifest.trial)
            if now is None or now == manifest:
                break
            manifest = now
        self._manifests.append(manifest)
        for table, key, part, wrong in looked:
            self._take(table, manifest.trial, key, part, wrong or self._store.storage.reach / key)

    def _fetch(self, tables: set[str]) -> bool:
        """Bring the files of these tables to this machine, where they are not there. Whether any came."""
        wanted = [(table, *each) for table in sorted(tables) for each in self._waiting.pop(table, [])]

        fetched = self._store.storage.each(lambda each: self._local(*each[2:]), wanted)
        for each, found in zip(wanted, fetched, strict=True):
            self._take(*each, found)
        return bool(wanted)

    def _local(self, key: str, part: Part) -> Path | str:
        """Where this machine reads it, or why it cannot."""
        try:
            return self._store.storage.local(key, part.sha256)
        except OSError as error:
            return reason(error)

    def _bring(self, tables: set[str]) -> None:
        """Make these tables readable on this machine. Raises `_Unreadable`."""
        if self._fetch(tables):
            try:
                _fill(self._connection, self._store, self._manifests, self._tables, self._files)
            except duckdb.Error as error:
                raise _Unreadable(f"store {self._store.url}: {_gist(error)}") from None

    def _take(self, table: str, trial: str, key: str, part: Part, found: Path | str) -> None:
        """A file where this machine reads it, or why it cannot."""
        if isinstance(found, Path):
            # The folder of all of them may be a link; what may be read is below the place that it leads to.
            path = self._root + str(found)[len(self._reach) :]
            self._files.setdefault(table, []).append((trial, _literal(path)))
        else:
            said = f"{self._store.url}/{key}: {found} ({part.rows} rows)"
            self._broken.setdefault(table, []).append((trial, said))

    def _behind(self, query: str) -> set[str]:
        """The probe tables that a query may read: those it mentions."""
        named = {view for view in self._views if re.search(rf"\b{view}\b", query, re.IGNORECASE)}
        return named | {"curve"} if "cells" in named else named

    def _readable(self, tables: set[str]) -> None:
        for table in sorted(tables & self._broken.keys()):
            if not self._skip_damaged:
                trial, said = self._broken[table][0]
                raise _Unreadable(f"table {table}: {said}; {self._way_out(trial)}")

    def _way_out(self, trial: str) -> str:
        """What mends a damaged file of a trial, for whoever trains and for whoever only reads."""
        return f"its rows cannot be read; delete {self._store.where(trial)} to train the trial again; {_LEFT_OUT}"

    # --- one question -----------------------------------------------------------------------------

    def _ask(self, query: str) -> Answer:
        connection = self._connection
        self._bring(self._behind(query))
        watch = threading.Timer(self._seconds, connection.interrupt)
        watch.start()
        try:
            self._readable(self._behind(query))
            connection.execute("begin transaction read only")
            try:
                asked = connection.execute(query)
                columns = [name for name, *_ in asked.description or []]
                types = [str(kind) for _, kind, *_ in asked.description or []]
                rows = asked.fetchmany(self._rows + 1)  # DuckDB streams: the rest is never made
            finally:
                connection.execute("rollback")
        except duckdb.InterruptException:
            raise Refusal(
                f"query: took longer than {self._seconds:g} s and was stopped; ask for less, or give it more seconds"
            ) from None
        except duckdb.OutOfMemoryException:
            raise Refusal(f"query: needs more than {MEMORY} of memory; aggregate earlier, or join on a key") from None
        except _ASKED_WRONG as error:
            raise Refusal(self._explained(error)) from None
        except duckdb.Error as error:
            raise _Unreadable(f"query: {_gist(error)}") from None
        finally:
            watch.cancel()
        if len(rows) > self._rows:
            raise Refusal(f"query: has more than {self._rows:,} rows; add `limit {self._rows}`, or aggregate")
        return Answer(columns, types, rows, list(self.damaged))

    def _explained(self, error: duckdb.Error) -> str:
        """DuckDB's complaint, with the near name among ours."""
        said = str(error)
        tables = self._views | self._related
        if match := re.search(r"Table with name (\S+) does not exist", said):
            if match[1] in _OF_A_STUDY:
                return f'table {match[1]}: only a study has it; ask there: python studies/NAME.py sql "..."'
            return f"table {match[1]}: no such table{near(match[1], list(tables))} The tables: {', '.join(tables)}"
        if match := re.search(r'column (?:named )?"([^"]+)"', said):
            names = re.findall(r'"([^"]+)"', said.partition("Candidate bindings")[2])
            columns = names + sorted({column for each in tables.values() for column in each})
            return f"column {match[1]}: no such column in these tables{near(match[1], columns)} See: describe <table>"
        if isinstance(error, duckdb.TransactionException):
            return "statement writes: results are read-only"
        if isinstance(error, duckdb.PermissionException):
            return f"query: {_gist(error)}; a query reads nothing but its store"
        return f"query: {_gist(error)}"


def _looks() -> Iterator[bool]:
    """Look after look until the patience ends; whether it is the last one."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        yield False
        time.sleep(PAUSE)
    yield True


class _Unreadable(Refusal):
    """A file that a question needs may not be as its manifest says."""


def open(
    store: str | Path | Storage,
    tables: dict[str, type] | None = None,
    seconds: float = 60,
    rows: int = 100_000,
    *,
    skip_damaged: bool = False,
) -> Session:
    """A session over a store as it is now. `tables`: the dataclass of each table, for tables without a row yet.

    `skip_damaged` reads every file to verify it, and leaves the damaged ones out. Raises `Refusal` for no store.
    """
    place = storage(store)
    above = [part for part in Path(os.path.realpath(place.reach)).parts if part.startswith("trial=")]
    if above:
        raise Refusal(
            f"store {place.url}: lies in {above[0]}, which reads like a trial of another store; rename that folder"
        )
    return Session(Store.existing(place), tables or {}, seconds, rows, skip_damaged)


# --- views ------------------------------------------------------------------------------------------


def _fill(
    connection: duckdb.DuckDBPyConnection,
    store: Store,
    manifests: list[Manifest],
    tables: dict[str, type],
    files: dict[str, list[tuple[str, str]]],
) -> tuple[dict[str, list[str]], list[str]]:
    """Create the views: each with its columns, and what had to be left out."""
    _create(connection, "trials", store.trials_table(manifests))
    numbers = list(range(2, len(manifests) + 1))
    quantiles = stdtrit([n - 1 for n in numbers], 0.975).tolist()  # Student's t, two-sided 95 %
    _create(connection, "student", {"n": ("bigint", numbers), "t95": ("double", quantiles)})
    odd: list[str] = []
    names = list({"curve": None} | tables | {table: None for manifest in manifests for table in manifest.columns})
    there = connection.execute("select view_name from duckdb_views() where not internal").fetchall()
    for table in {view for (view,) in there} - {"cells", *names}:  # no trial has it any more
        connection.execute(f'drop view "{table}"')
    views: dict[str, list[str]] = {}
    for table in names:
        stated = columns_of(tables[table]) if table in tables else _CURVE if table == "curve" else {}
        views[table], left_out = _read_view(connection, table, stated, manifests, files.get(table, []))
        odd += left_out
    fields = ", ".join(f'"{name}"' for name in Trial.model_fields if name != "seed")
    connection.execute(_CELLS.format(fields=fields))
    own = {
        view: [column for column, *_ in connection.execute(f'describe "{view}"').fetchall()]
        for view in ("trials", "cells")
    }
    return own | views, odd


def _create(connection: duckdb.DuckDBPyConnection, table: str, columns: Mapping[str, tuple[str, list[Any]]]) -> None:
    """A table of columns, each with its type and its values; in the place of one that there is."""
    # Not by way of Arrow, which imports pandas to look at a list.
    picked = ", ".join(f'unnest(${i}::{kind}[]) as "{name}"' for i, (name, (kind, _)) in enumerate(columns.items(), 1))
    values = [each for _, each in columns.values()]
    connection.execute(f'create or replace table "{table}" as select {picked}', values)


def _read_view(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    stated: dict[str, str],
    manifests: list[Manifest],
    files: list[tuple[str, str]],
) -> tuple[list[str], list[str]]:
    """Create the view of one probe table over its files: its columns, and what had to be left out of it."""
    present = {trial for trial, _ in files}
    holders = [manifest for manifest in manifests if manifest.trial in present]
    votes: dict[str, Counter[str]] = {name: Counter([kind]) for name, kind in stated.items()}
    shapes = Counter(
        tuple(manifest.columns[table].items()) for manifest in (holders or manifests) if table in manifest.columns
    )
    for shape, times in shapes.items():
        for name, kind in shape:
            votes.setdefault(name, Counter())[kind] += times
    types = {
        name: "double" if len(kinds) > 1 and kinds.keys() <= _NUMBERS else stated.get(name, kinds.most_common(1)[0][0])
        for name, kinds in votes.items()
    }

    def clash(manifest: Manifest) -> str:
        """A column whose meaning changed: one word among numbers would make all of them words."""
        for name, kind in manifest.columns[table].items():
            if kind != types[name] and not {kind, types[name]} <= _NUMBERS:
                here = f"trial {manifest.trial}, table {table}, column {name}"
                return f"{here}: is {kind} and elsewhere {types[name]}; left out"
        return ""

    odd = {manifest.trial: reason for manifest in holders if (reason := clash(manifest))}
    kept = [manifest for manifest in holders if manifest.trial not in odd]
    paths = [path for trial, path in files if trial not in odd]
    files_read = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
    held = {name for manifest in kept for name in manifest.columns[table]}
    # Reading by name opens every file before the first row, so only where files may differ: by trial, or by attempt.
    by_name = len({frozenset(manifest.columns[table]) for manifest in kept}) > 1 or any(m.attempts > 1 for m in kept)
    source = _FILES.format(files=files_read, by_name=str(by_name).lower())
    if paths and by_name:
        held = {name for name, *_ in connection.execute(f"describe from {source}").fetchall()}
    picked = ["trial" if paths else "null::varchar as trial"]
    for name, kind in types.items():
        value = f'"{name}"::{kind}' if paths and name in held else f"null::{kind}"
        picked.append(f'{f"case when not isnan({value}) then {value} end" if kind == "double" else value} as "{name}"')
    source = source if paths else "(select 1) where false"
    connection.execute(_READINGS.format(table=table, columns=", ".join(picked), source=source))
    return ["trial", *types], list(odd.values())


_NUMBERS = {"bigint", "double"}


def _literal(path: str) -> str:
    """A pattern that only this path matches: DuckDB takes every path for one."""
    return re.sub(r"([*?\[])", r"[\1]", path)


# --- questions --------------------------------------------------------------------------------------


def _reading(connection: duckdb.DuckDBPyConnection, text: str) -> str:
    """The text, if it is one statement that reads."""
    try:
        statements = connection.extract_statements(text)
    except duckdb.Error as error:
        raise Refusal(f"query: {_gist(error)}") from None
    if len(statements) != 1:
        raise Refusal(f"query: has {len(statements)} statements; ask one at a time, such as `from trials`")
    kind = statements[0].type
    if kind == duckdb.StatementType.EXPLAIN:
        # `explain analyze` runs what it explains, so that must read too.
        _reading(connection, _EXPLAIN.sub("", text, count=1))
    elif kind != duckdb.StatementType.SELECT:
        raise Refusal(f"statement writes: {kind.name} is refused; results are read-only")
    return text


_EXPLAIN = re.compile(r"(?s)^(\s|--[^\n]*\n|/\*.*?\*/)*explain(\s+analyze)?(\s*\([^)]*\))?\s", re.IGNORECASE)


def _type(values: list[Any]) -> str:
    """The SQL type of a column of Python values; words where there are none."""
    kinds = {type(value) for value in values if value is not None}
    if kinds and kinds <= {int, float}:
        return "bigint" if kinds == {int} else "double"
    return "boolean" if kinds == {bool} else "varchar"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _gist(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _is_export(path: Path) -> bool:
    try:
        with duckdb.connect(str(path), read_only=True) as file:
            return bool(
                file.execute("select 1 from duckdb_tables() where table_name = $mark", {"mark": _MARK}).fetchall()
            )
    except duckdb.Error:
        return False
