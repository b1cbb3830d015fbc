"""SQL over a store: read-only, bounded in time and rows, and true while a study still runs.

A session sees the store as its manifests were when it was opened. Views: `trials`, one per probe table, and `cells`.
A reading that is NaN is NULL here: DuckDB takes NaN for the greatest number, and a diverged trial would be the best.
"""

import html
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import duckdb
from scipy.special import stdtrit

from bnscale.store import Manifest, Store, columns_of, damage, flaw
from bnscale.trial import Refusal, Trial, near

# What `cells` asks of the table `curve`, also in a store where no trial has read anything yet.
_CURVE = {"step": "bigint", "split": "varchar", "accuracy": "double"}

# One row per reading. Statistics of a file know nothing of NaN, so `nullif(x, 'nan')` is not safe; `isnan` is.
_READINGS = """
create or replace view "{table}" as
select {columns}
from read_parquet(
    getvariable('files of {table}'), hive_partitioning = true, hive_types_autocast = false, union_by_name = {union}
)"""

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
final as (
    -- one row per trial; accuracies of finished trials only
    select
        trials.*,
        test.accuracy as test_accuracy,
        validation.accuracy as validation_accuracy
    from trials
    left join last_reading as test on test.trial = trials.trial and test.split = 'test'
    left join last_reading as validation on validation.trial = trials.trial and validation.split = 'validation'
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
    from final
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
            "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric, strict=True))
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

    def __init__(
        self, store: Store, tables: dict[str, type], seconds: float, rows: int, skip_damaged: bool
    ) -> None:
        self.damaged: list[str] = []
        self._store, self._tables, self._seconds, self._rows = store, tables, seconds, rows
        self._skip_damaged = skip_damaged
        self._related: dict[str, list[str]] = {}
        self._connection = duckdb.connect()
        self._refresh()
        root = os.path.realpath(store.root)
        for setting, value in {
            "python_enable_replacements": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allowed_directories": [root, _literal(root)],
            "enable_external_access": False,
            "lock_configuration": True,
        }.items():
            self._connection.execute(f"set {setting} = $value", {"value": value})

    def sql(self, text: str) -> Answer:
        """Answer one statement that reads. Raises `Refusal` for one that writes, is wrong, or takes too long."""
        statement = _reading(text)
        for chance in (1, 2, 3):
            try:
                return self._ask(statement)
            except _Gone as gone:
                # The files that a trial's end has merged are gone: its new manifest names others.
                before = self._broken
                self._refresh()
                if chance == 3 or self._broken == before != {}:
                    raise Refusal(str(gone)) from None
        raise AssertionError("unreachable")

    def relate(self, name: str, columns: dict[str, list[Any]]) -> None:
        """Add a small table under this name, or replace it. A column named as one of `trials` has its type."""
        assert name not in self._views, f"{name} is a view"
        known = {column: kind for column, kind, *_ in self._connection.execute("describe trials").fetchall()}
        types = {column: known.get(column) or _type(values) for column, values in columns.items()}
        declared = ", ".join(f'"{column}" {kind}' for column, kind in types.items())
        self._connection.execute(f'create or replace table "{name}" ({declared})')
        plain = [[value.value if isinstance(value, Enum) else value for value in values] for values in columns.values()]
        assert len({len(values) for values in plain}) == 1, f"{name}: columns differ in length"
        if plain[0]:
            picked = ", ".join(f"unnest(${i}::{kind}[])" for i, kind in enumerate(types.values(), 1))
            self._connection.execute(f'insert into "{name}" select {picked}', plain)
        self._related[name] = list(columns)

    def export(self, path: str | Path) -> None:
        """Write a DuckDB file with a table for every view. Raises `Refusal` where another file would be lost."""
        path = Path(path)
        if path.exists() and not _exported(path):
            raise Refusal(f"export {path}: is there and is no export of bnscale; choose another name or move it away")
        self._readable(set(self._views))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with duckdb.connect(str(temporary)) as file:
                file.execute("create schema views; use views")
                _fill(file, self._store, self._manifests, self._tables, self._files)
                for view in self._views:
                    file.execute(f'create table main."{view}" as from views."{view}"')
                file.execute("create table main.bnscale_export as select 1 as format")
                file.execute("use main; drop schema views cascade")
            os.replace(temporary, path)
        except (duckdb.Error, OSError) as error:
            raise Refusal(f"export {path}: cannot be written ({_first_line(error)}); choose another place") from None
        finally:
            for leftover in (temporary, temporary.with_name(temporary.name + ".wal")):
                with suppress(OSError):
                    leftover.unlink(missing_ok=True)

    # --- what the store holds ---------------------------------------------------------------------

    def _refresh(self) -> None:
        """Read the manifests and name the files that count."""
        store = self._store
        manifests = store.manifests()
        if any(flaw(path, part) for _, path, part in _named(store, manifests)):
            manifests = store.manifests()  # a trial may have ended between the manifest and the look at its files
        check = damage if self._skip_damaged else flaw
        self._broken: dict[str, list[str]] = {}  # table to what is wrong with its files
        self._files: dict[str, list[str]] = {}
        for table, path, part in _named(store, manifests):
            wrong = check(path, part)
            if wrong:
                self._broken.setdefault(table, []).append(f"{path}: {wrong}, {part.rows} rows")
            else:
                self._files.setdefault(table, []).append(_literal(os.path.realpath(path)))
        self._manifests = manifests
        self.damaged = [reason for _, reason in store.damaged]
        self._views = _fill(self._connection, store, manifests, self._tables, self._files)
        if self._skip_damaged:
            self.damaged += [each for broken in self._broken.values() for each in broken]

    def _readable(self, names: set[str]) -> None:
        if self._skip_damaged:
            return
        for table in sorted(names | {"curve"} if "cells" in names else names):
            for wrong in self._broken.get(table, []):
                raise _Gone(f"table {table}: {wrong} cannot be read; leave damaged files out with --skip-damaged")
