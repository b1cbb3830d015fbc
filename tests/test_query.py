"""Questions to a store: NaN never wins, nothing is written, nothing runs for ever, and a running study is no obstacle.

Run as a program it is a study that goes on: trial after trial, each flushed, killed once, resumed and merged.
"""

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from examples import digits
from scipy.stats import t as student

from bnscale import query
from bnscale.query import Session
from bnscale.store import Store
from bnscale.trial import Outcome, Refusal, Trainable, Trial


@dataclass(frozen=True)
class Curve:
    step: int
    split: str
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Gamma:
    step: int
    layer: str
    gamma_dead: float | None


TABLES: dict[str, type] = {"curve": Curve, "gamma": Gamma}


def train(
    root: Path, trial: Trial, accuracies: list[float], outcome: Outcome = Outcome.FINISHED, finish: bool = True
) -> Callable[[], None]:
    """A trial with these test accuracies, step after step, one part each; what ends it."""
    writer = Store(root).writer(trial, {"curve": "1 step"}, {"threads": 1})
    for step, accuracy in enumerate(accuracies):
        splits = ("validation", "test")
        writer.write("curve", [Curve(step, split, 1.0, accuracy - 0.1 * (split != "test")) for split in splits])
        writer.flush(step + 1)

    def end() -> None:
        writer.finish(outcome, len(accuracies), {})

    if finish:
        end()
    return end


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: forcing each file to the disk would only take time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of one setting, one of another, a diverged and a failed trial."""
    root = tmp_path_factory.mktemp("grown")
    for seed, best in enumerate((0.5, 0.6, 0.8)):
        train(root, digits(seed=seed), [0.9, best])
    train(root, digits(depth=14), [0.1, 0.7])
    train(root, digits(seed=3), [0.95, math.nan], Outcome.DIVERGED)
    train(root, digits(seed=4), [0.99], Outcome.FAILED)
    return root


@pytest.fixture
def root(grown: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(grown, tmp_path / "results"))


def one(session: Session, text: str) -> Any:
    ((value,),) = session.sql(text).rows
    return value


# --- answers --------------------------------------------------------------------------------------


def test_readings_join_their_trials(root: Path) -> None:
    answer = query.open(root, TABLES).sql(
        "select depth, trainable, max(accuracy) from curve join trials using (trial) where split = 'test' group by all"
    )
    assert answer.columns == ["depth", "trainable", "max(accuracy)"]
    assert answer.types == ["BIGINT", "VARCHAR", "DOUBLE"]
    assert sorted(answer.rows) == [(8, "bn", 0.99), (14, "bn", 0.7)]
    assert answer.damaged == []


@pytest.mark.parametrize("trials", [1, 2])
def test_nan_is_never_best(tmp_path: Path, trials: int) -> None:
    for seed in range(trials):
        train(tmp_path, digits(seed=seed), [0.5, math.nan, math.inf], Outcome.DIVERGED)
    session = query.open(tmp_path)
    for best in (
        "select max(accuracy) from curve where step < 2",
        "select accuracy from curve where step < 2 order by accuracy desc nulls last limit 1",
        "select accuracy from curve where step < 2 and accuracy > 0.4 order by accuracy desc limit 1",
        "select arg_max(accuracy, accuracy) from curve where step < 2",
    ):
        assert one(session, best) == 0.5, best
    assert one(session, "select count(*) from curve where accuracy is null") == 2 * trials
    assert one(session, "select max(accuracy) from curve") == math.inf


def test_cells_have_the_mean_over_seeds_and_its_t_interval(root: Path) -> None:
    session = query.open(root, TABLES)
    several, single = session.sql("select * from cells order by depth").dicts()
    assert {name: several[name] for name in ("depth", "n", "n_finished", "n_failed", "n_diverged")} == {
        "depth": 8,
        "n": 5,
        "n_finished": 3,
        "n_failed": 1,
        "n_diverged": 1,
    }
    for split, last in (("test", [0.5, 0.6, 0.8]), ("validation", [0.4, 0.5, 0.7])):
        half = student.ppf(0.975, 2) * stdev(last) / math.sqrt(3)
        assert several[f"{split}_mean"] == pytest.approx(mean(last))
        assert several[f"{split}_low"] == pytest.approx(mean(last) - half)
        assert several[f"{split}_high"] == pytest.approx(mean(last) + half)
    assert (single["n"], single["test_mean"], single["test_low"], single["test_high"]) == (1, 0.7, None, None)
    assert list(several)[: len(Trial.model_fields) - 1] == [name for name in Trial.model_fields if name != "seed"]


def test_every_view_answers_for_an_empty_store_and_for_failures_alone(tmp_path: Path) -> None:
    for step in range(2):
        Store(tmp_path)
        for tables in ({}, TABLES):
            session = query.open(tmp_path, tables)
            for view in ("trials", "cells", "curve", *tables):
                assert len(session.sql(f"from {view}").rows) == (step if view in ("trials", "cells") else 0)
            assert one(session, "select max(accuracy) from curve join trials using (trial)") is None
        Store(tmp_path).writer(digits(), {}, {}).finish(Outcome.FAILED, 0, {"error": "out of memory"})
    (cell,) = session.sql("select n, n_failed, test_mean, test_low, validation_high from cells").rows
    assert cell == (1, 1, None, None, None)
    assert session.sql("from gamma").columns == ["trial", "step", "layer", "gamma_dead"]


def test_a_column_that_came_later_is_null_before(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class More(Curve):
        top5: float

    train(tmp_path, digits(seed=0), [0.5])
    writer = Store(tmp_path).writer(digits(seed=1), {}, {})
    writer.write("curve", [More(0, "test", 1.0, 0.5, 0.9)])
    writer.finish(Outcome.FINISHED, 1, {})
    resumed = Store(tmp_path).writer(digits(seed=2), {}, {})
    resumed.write("curve", [Curve(0, "test", 1.0, 0.5)])
    resumed.flush(1)
    resumed = Store(tmp_path).writer(digits(seed=2), {}, {})
    resumed.write("curve", [More(1, "test", 1.0, 0.5, 0.9)])
    resumed.flush(2)
    assert query.open(tmp_path).sql(
        f"select top5 from curve where trial = '{digits(seed=2).id}' order by step"
    ).rows == [
        (None,),
        (0.9,),
    ]
    resumed.rewind(1)  # its manifest knows of a column that no file of it has any more
    resumed.finish(Outcome.DIVERGED, 1, {})
    for tables in ({}, {"curve": Curve}, {"curve": More}):
        one(query.open(tmp_path, tables), f"select max(top5) from curve where trial = '{digits(seed=2).id}'")
    (tmp_path / "manifests" / f"{digits(seed=2).id}.json").unlink()
    for tables in ({}, {"curve": Curve}, {"curve": More}):
        answer = query.open(tmp_path, tables).sql("select top5 from curve where split = 'test' order by trial")
        assert answer.rows == [(None,), (0.9,)]


def test_one_word_among_numbers_is_left_out_and_said(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Worded(Curve):
        accuracy: str  # type: ignore[assignment]

    for seed in range(2):
        train(tmp_path, digits(seed=seed), [0.5])
    writer = Store(tmp_path).writer(digits(seed=2), {}, {})
    writer.write("curve", [Worded(0, "test", 1.0, "good")])
    writer.finish(Outcome.FINISHED, 1, {})
    session = query.open(tmp_path)
    assert session.sql("select max(accuracy) from curve").types == ["DOUBLE"]
    assert one(session, "select count(distinct trial) from curve") == 2
    (said,) = session.damaged
    assert digits(seed=2).id in said
    assert "column accuracy: is varchar and elsewhere double; left out" in said


@pytest.mark.parametrize("name", ["a b", "it's", "[x]*?", "lr=0.1"])
def test_any_folder_name_will_do(tmp_path: Path, name: str) -> None:
    train(tmp_path / name, digits(), [0.5])
    (tmp_path / "link").symlink_to(tmp_path / name)
    for root in (tmp_path / name, tmp_path / "link"):
        session = query.open(root)
        assert session.sql("select distinct trial from curve").rows == [(digits().id,)]


def test_an_answer_can_be_read_in_a_terminal_and_in_a_notebook(root: Path) -> None:
    answer = query.open(root).sql("select 14 as depth, null as nothing, '<b>' as word, 0.1 + 0.2 as share")
    assert answer.table().splitlines() == [
        "depth  nothing  word  share",
        "-----  -------  ----  -----",
        "   14           <b>     0.3",
    ]
    assert answer.dicts()[0]["word"] == "<b>"
    assert "<td>&lt;b&gt;</td>" in answer._repr_html_()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "copy trials to '{root}/stolen.csv'",
        "copy (from curve) to '{root}/curve/trial=x/part-0.parquet' (format parquet)",
        "explain analyze copy trials to '{root}/stolen.csv'",
        "EXPLAIN /* a */ ANALYZE copy trials to '{root}/stolen.csv'",
        "explain -- a\n analyze copy trials to '{root}/stolen.csv'",
        "explain (analyze) copy trials to '{root}/stolen.csv'",
        "explain explain analyze copy trials to '{root}/stolen.csv'",
        "with gone as (delete from trials returning *) select * from gone",
        "explain analyze with gone as (delete from trials returning *) select * from gone",
        "drop table trials",
        "drop view curve",
        "delete from trials",
        "attach '{root}/new.duckdb'",
        "insert into trials select * from trials",
        "create table mine as select 1",
        "create or replace view curve as select 1",
        "set enable_external_access = true",
        "pragma database_list",
        "call pragma_version()",
        "export database '{root}/all'",
        "install httpfs",
        "load httpfs",
        "use main",
        "begin",
        "prepare mine as select 1",
        "select 1; drop table trials",
        "",
        "-- nothing",
    ],
)
def test_a_statement_that_does_not_only_read_is_refused_and_changes_nothing(root: Path, text: str) -> None:
    def state() -> list[tuple[Path, int]]:
        return sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))

    before = state()
    session = query.open(root)
    with pytest.raises(Refusal):
        session.sql(text.format(root=root))
    assert state() == before
    assert one(session, "select count(*) from trials") == 6


def test_a_refusal_says_which_statement_writes(root: Path) -> None:
    with pytest.raises(Refusal, match="statement writes: DROP is refused; results are read-only"):
        query.open(root).sql("drop table trials")


@pytest.mark.parametrize(
    "text",
    [
        "show tables",
        "describe curve",
        "summarize trials",
        "explain from cells",
        "explain analyze from curve",
        "values (1)",
        "from trials",
        "table trials",
        "with a as (select 1) from a;",
        "-- why\nselect 1 -- so",
    ],
)
def test_every_way_to_read_is_answered(root: Path, text: str) -> None:
    assert query.open(root).sql(text).rows


@pytest.mark.parametrize(
    "source",
    [
        "read_csv('{file}')",
        "read_text('{file}')",
        "read_parquet('{file}')",
        "'{file}'",
        "glob('{folder}/*')",
        "read_text('{root}/../outside/secret.csv')",
        "read_text('{root}/link')",
        "here",
    ],
)
def test_files_outside_of_the_store_and_variables_of_python_are_out_of_reach(
    root: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root.parent / "outside"
    folder.mkdir(exist_ok=True)
    (folder / "secret.csv").write_text("password\n1\n")
    (root / "link").unlink(missing_ok=True)
    (root / "link").symlink_to(folder / "secret.csv")
    monkeypatch.setattr(query, "here", pa.table({"password": [1]}), raising=False)
    session = query.open(root)
    with pytest.raises(Refusal):
        session.sql("from " + source.format(root=root, folder=folder, file=folder / "secret.csv"))


def test_a_query_that_never_ends_is_stopped_and_the_session_lives(root: Path) -> None:
    session = query.open(root, seconds=0.3)
    began = time.monotonic()
    with pytest.raises(Refusal, match="took longer than 0.3 s and was stopped"):
        session.sql("select count(*) from range(1e11::bigint) a, range(1e11::bigint) b")
    assert time.monotonic() - began < 5
    assert one(session, "select count(*) from trials") == 6


def test_an_answer_of_too_many_rows_is_refused_before_it_is_made(root: Path) -> None:
    session = query.open(root, rows=1000)
    began = time.monotonic()
    with pytest.raises(Refusal, match=r"has more than 1,000 rows; add `limit 1000`, or aggregate"):
        session.sql("from range(1000000000)")
    assert time.monotonic() - began < 5
    assert len(session.sql("from range(1000)").rows) == 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from triasl", "table triasl: no such table; did you mean trials? The tables: trials, cells, curve, gamma"),
        ("select acuracy from curve", "column acuracy: no such column in these tables; did you mean accuracy?"),
        ("select c.acuracy from curve c", "column acuracy: no such column in these tables; did you mean accuracy?"),
        ("selec 1", 'syntax error at or near "selec"'),
        ("select", "Parser Error"),
        ("select maxx(1)", "maxx"),
    ],
)
def test_a_wrong_name_is_answered_with_the_near_one(root: Path, text: str, said: str) -> None:
    with pytest.raises(Refusal) as refused:
        query.open(root, TABLES).sql(text)
    assert said in str(refused.value)


def test_a_store_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="there is none"):
        query.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    Store(tmp_path / "trial=1")
    with pytest.raises(Refusal, match="rename that folder"):
        query.open(tmp_path / "trial=1")


# --- while others write ---------------------------------------------------------------------------


def test_a_session_sees_the_store_as_it_is_when_opened_and_survives_the_end_of_its_trials(tmp_path: Path) -> None:
    end = train(tmp_path, digits(), [0.1, 0.2, 0.3], finish=False)
    early = query.open(tmp_path)
    count = "select count(*) from curve join trials using (trial)"
    assert one(early, count) == 6
    early.relate("plan", {"trial": [digits().id]})
    end()  # the three parts are gone, one file has all their rows
    assert len(list(tmp_path.glob("curve/*/*"))) == 1
    assert one(early, count) == 6
    assert one(early, "select count(*) from curve join plan using (trial)") == 6
    train(tmp_path, digits(seed=1), [0.1])
    assert one(query.open(tmp_path), count) == 8


def test_reading_always_works_while_another_process_writes(tmp_path: Path) -> None:
    Store(tmp_path)
    path = os.pathsep.join(sys.path)
    with subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=os.environ | {"PYTHONPATH": path}) as study:
        sessions = answers = 0
        session = query.open(tmp_path)
        while study.poll() is None:
            if answers % 3 == 0:
                session, sessions = query.open(tmp_path), sessions + 1
            doubles = "select count(*) - count(distinct (trial, step, split)) from curve"
            assert one(session, doubles) == 0
            answers += 1
            time.sleep(0.01)
    assert study.returncode == 0
    assert sessions > 5
    assert one(query.open(tmp_path), "select count(*) from curve join trials using (trial)") == STUDY * 8


STUDY = 25  # trials


def _study(root: Path) -> None:
    os.fsync = lambda handle: None
    for seed in range(STUDY):
        train(root, digits(seed=seed), [0.1, 0.2, 0.3], finish=False)
        writer = Store(root).writer(digits(seed=seed), {"curve": "1 step"}, {})
        writer.rewind(2)  # as after a kill: the third reading is taken again
        for step in (2, 3):
            writer.write("curve", [Curve(step, split, 1.0, 0.3) for split in ("validation", "test")])
            writer.flush(step + 1)
        writer.finish(Outcome.FINISHED, 4, {})


# --- damage ---------------------------------------------------------------------------------------


def _victim(root: Path) -> Path:
    (path,) = Store(root).files("curve", {digits(seed=1).id})
    return path


@pytest.mark.parametrize("wound", ["missing", "short", "empty", "flipped"])
def test_a_damaged_file_is_named_or_skipped_and_counted(root: Path, wound: str) -> None:
    path = _victim(root)
    whole = path.read_bytes()
    middle = 40  # among the readings: they stand before what the file says of itself
    path.unlink()
    if wound != "missing":
        wounds = {"short": whole[:-1], "empty": b"", "flipped": whole[:middle] + b"\0" * 40 + whole[middle + 40 :]}
        path.write_bytes(wounds[wound])
    session = query.open(root)
    for text in ("select sum(accuracy), sum(loss), sum(step), max(split) from Curve", "from cells"):
        with pytest.raises(Refusal, match=f"{path}.*--skip-damaged"):
            session.sql(text)
    assert one(session, "select count(*) from trials") == 6
    skipping = query.open(root, skip_damaged=True)
    assert one(skipping, "select count(distinct trial) from curve") == 5
    (said,) = skipping.sql("from trials").damaged
    assert str(path) in said
    assert "4 rows" in said


def test_a_manifest_that_cannot_be_read_is_said_beside_every_answer(root: Path) -> None:
    manifest = root / "manifests" / f"{digits(seed=1).id}.json"
    manifest.write_text("{")
    answer = query.open(root).sql("select count(*) from trials")
    assert answer.rows == [(5,)]
    assert str(manifest) in answer.damaged[0]
    assert str(manifest) in repr(answer)


def test_a_table_that_no_trial_has_any_more_is_gone_from_a_session_that_is_open(tmp_path: Path) -> None:
    train(tmp_path, digits(), [0.5])
    writer = Store(tmp_path).writer(digits(seed=1), {}, {})
    writer.write("gamma", [Gamma(0, "norm", 0.1)])
    writer.finish(Outcome.FINISHED, 1, {})
    session = query.open(tmp_path)
    assert one(session, "select count(*) from gamma") == 1
    (path,) = Store(tmp_path).files("gamma")
    path.unlink()
    (tmp_path / "manifests" / f"{digits(seed=1).id}.json").unlink()
    with pytest.raises(Refusal, match="^table gamma: no such table"):
        session.sql("select count(*) from gamma")
    assert one(session, "select count(*) from trials") == 1


# --- plans and exports ----------------------------------------------------------------------------


def test_a_related_table_joins_with_the_types_of_the_trials(root: Path) -> None:
    session = query.open(root, TABLES)
    cells = {
        "depth": [8, 14, 20],
        "epochs": [None, None, None],
        "milestones": [(0.5,), (0.5,), ()],
        "trainable": [Trainable.BN, Trainable.BN, Trainable.ALL],
        "weight": [1, 2.5, None],
        "chosen": [True, False, None],
    }
    session.relate("plan", cells)
    answer = session.sql("from plan")
    assert answer.types == ["BIGINT", "BIGINT", "DOUBLE[]", "VARCHAR", "DOUBLE", "BOOLEAN"]
    assert answer.rows[0] == (8, None, [0.5], "bn", 1.0, True)
    done = "select count(*) from plan join trials using (depth, milestones, trainable)"
    assert one(session, done) == 6
    session.relate("plan", {"depth": [14]})
    assert one(session, "select count(*) from plan join trials using (depth)") == 1
    session.relate("plan", {"depth": []})
    assert session.sql("from plan").rows == []
    with pytest.raises(Refusal, match="did you mean plan"):
        session.sql("from plann")


def test_an_export_is_a_file_with_real_tables(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    session = query.open(root, TABLES)
    session.relate("plan", {"depth": [8]})
    path = tmp_path_factory.mktemp("out") / "results.duckdb"
    for _ in range(2):  # an older export is replaced
        session.export(path)
    assert list(path.parent.iterdir()) == [path]
    with duckdb.connect(str(path), read_only=True) as file:
        for view in ("trials", "cells", "curve", "gamma"):
            kind = "select table_type from information_schema.tables where table_name = $view"
            assert file.execute(kind, {"view": view}).fetchall() == [("BASE TABLE",)]
            order = f"from {view} order by all"
            assert repr(file.execute(order).fetchall()) == repr(session.sql(order).rows)


def test_an_export_replaces_nothing_but_an_export(root: Path, tmp_path: Path) -> None:
    session = query.open(root)
    foreign, text = tmp_path / "foreign.duckdb", tmp_path / "notes.txt"
    duckdb.connect(str(foreign)).close()
    text.write_text("precious")
    for path in (foreign, text, tmp_path):
        with pytest.raises(Refusal, match="is no export of bnscale"):
            session.export(path)
    assert text.read_text() == "precious"
    with pytest.raises(Refusal, match="cannot be written"):
        session.export(tmp_path / "nowhere" / "results.duckdb")
    _victim(root).unlink()
    with pytest.raises(Refusal, match="--skip-damaged"):
        query.open(root).export(tmp_path / "results.duckdb")
    assert not (tmp_path / "results.duckdb").exists()


if __name__ == "__main__":
    _study(Path(sys.argv[1]))


@pytest.mark.parametrize("table", ["plan", "chosen", "tried", "bracket"])
def test_a_table_that_only_a_study_has_is_refused_with_where_to_ask(table, tmp_path):
    Store(tmp_path)
    with pytest.raises(Refusal, match=f"^table {table}: only a study has it; ask there: python studies/NAME.py sql"):
        query.open(tmp_path, {}).sql(f"select * from {table}")
