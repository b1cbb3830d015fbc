"""The store under retries, sleeping writers and wrong values: no committed row is lost and none is there twice.

Deaths and failures at every file operation are in tests/faults.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
from examples import digits
from hypothesis import given, settings
from hypothesis import strategies as st

from bnscale import storage as files
from bnscale.storage import StoreFailure
from bnscale.store import Part, Store, TakenOver, footer, rebuilt, standing
from bnscale.trial import Outcome, Refusal, Trial

LAST = 6
TRIAL = digits(steps=LAST)


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


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: forcing each file to the disk would only take time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def rows(root: Path, table: str) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for path in Store.existing(root).files(table):
        for row in pq.ParquetFile(path).read().to_pylist():
            found[tuple(row.values())[:2]] += 1
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["read", "read", "read", "flush", "save", "kill", "fail", "older"]), max_size=30))
def test_no_history_of_flushes_checkpoints_and_kills_doubles_or_drops_a_row(
    tmp_path_factory: pytest.TempPathFactory, history: list[str]
) -> None:
    root = tmp_path_factory.mktemp("history")
    store = Store(root)
    writer = store.writer(TRIAL, {}, {})
    step = saved = 0
    for event in history:
        match event:
            case "read":
                writer.write("curve", [Curve(step, "test", 0.0)])
                step += 1
            case "flush":
                writer.flush(step)
            case "save":
                writer.flush(step)
                saved = step
            case _:
                if event == "older":  # the newest checkpoint is damaged: the one before, perhaps inside of a part
                    saved //= 2
                if event == "fail":
                    writer.finish(Outcome.FAILED, step, {"error": "worker died"})
                writer = Store(root).writer(TRIAL, {}, {})
                writer.rewind(saved)
                step = saved
    writer.finish(Outcome.FINISHED, step, {})
    assert rows(root, "curve") == Counter((each, "test") for each in range(step))
    assert len(store.files("curve")) <= 1


# --- one writer -----------------------------------------------------------------------------------


def test_rows_count_from_the_flush_on_and_are_one_file_a_table_in_the_end(tmp_path: Path) -> None:
    store = Store(tmp_path)
    writer = store.writer(TRIAL, {"curve": "1 epoch"}, {})
    writer.write("curve", [Curve(0, "test", 2.5)])
    assert rows(tmp_path, "curve") == Counter()
    writer.flush(4)
    (path,) = store.files("curve")
    assert path.parent == tmp_path / "curve" / f"trial={TRIAL.id}"
    assert re.fullmatch(r"part-0-a1-[0-9a-f]{8}\.parquet", path.name)
    writer.write("curve", [Curve(4, "test", 1.5)])
    writer.flush(8)
    assert [path.name.partition("-a1-")[0] for path in store.files("curve")] == ["part-0", "part-4"]
    writer.write("curve", [Curve(8, "test", 0.5)])
    writer.finish(Outcome.FINISHED, 10, {})
    (path,) = store.files("curve")
    assert list(path.parent.iterdir()) == [path]
    assert pq.ParquetFile(path).read().to_pylist() == [
        {"step": step, "split": "test", "loss": 2.5 - step / 4} for step in (0, 4, 8)
    ]
    manifest = store.manifest(TRIAL.id)
    assert manifest is not None
    assert (manifest.outcome, manifest.step, manifest.total_steps, manifest.attempts) == ("finished", 10, LAST, 1)
    assert store.files("curve", {"another"}) == []


def test_a_flush_of_the_same_step_adds_what_is_new_and_takes_a_repetition_once(tmp_path: Path) -> None:
    writer = Store(tmp_path).writer(TRIAL, {}, {})
    for loss in (1.0, 2.0, 3.0, 3.0):
        writer.write("curve", [Curve(5, "test", loss)])
        writer.flush(5)
    found = [pq.ParquetFile(path).read()["loss"].to_pylist() for path in Store(tmp_path).files("curve")]
    assert found == [[1.0], [2.0], [3.0]]


def test_a_rewind_into_a_part_keeps_its_earlier_rows_and_deletes_what_it_forgot(tmp_path: Path) -> None:
    store = Store(tmp_path)
    writer = store.writer(TRIAL, {}, {})
    for start in (0, 3):
        writer.write("curve", [Curve(step, "test", 1.0) for step in range(start, start + 3)])
        writer.flush(start + 3)
    writer.rewind(2)
    assert rows(tmp_path, "curve") == Counter({(0, "test"): 1, (1, "test"): 1})
    (path,) = store.files("curve")
    assert list(path.parent.iterdir()) == [path]
    manifest = store.manifest(TRIAL.id)
    assert manifest is not None
    assert manifest.step == 2


def test_readings_without_a_number_are_stored_as_they_are(tmp_path: Path) -> None:
    writer = Store(tmp_path).writer(TRIAL, {}, {})
    writer.write("curve", [Curve(0, "test", value) for value in (math.nan, math.inf, -math.inf)])
    writer.finish(Outcome.DIVERGED, 0, {})
    (path,) = Store(tmp_path).files("curve")
    nan, *infinite = pq.ParquetFile(path).read()["loss"].to_pylist()
    assert math.isnan(nan)
    assert infinite == [math.inf, -math.inf]


def test_files_say_nothing_of_the_range_of_floats_for_it_would_leave_nan_out(tmp_path: Path) -> None:
    writer = Store(tmp_path).writer(TRIAL, {}, {})
    writer.write("curve", [Curve(0, "test", math.nan), Curve(1, "test", 1.0)])
    writer.finish(Outcome.DIVERGED, 0, {})
    (path,) = Store(tmp_path).files("curve")
    group = pq.ParquetFile(path).metadata.row_group(0)
    assert group.column(0).statistics.max == 1
    assert group.column(2).statistics is None


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (Curve(0, "test", "0.5"), "loss"),  # type: ignore[arg-type]
        (Curve(0, "test", 1), "loss"),
        (Curve(0, "test", None), "loss"),  # type: ignore[arg-type]
        (Curve(True, "test", 1.0), "step"),
        (Curve(0.0, "test", 1.0), "step"),  # type: ignore[arg-type]
        (Curve(0, 3, 1.0), "split"),  # type: ignore[arg-type]
        (Gamma(0, 1, 0.5), "Gamma"),
    ],
)
def test_a_value_of_another_type_is_refused_with_trial_table_and_column(tmp_path: Path, row: Any, column: str) -> None:
    writer = Store(tmp_path).writer(TRIAL, {}, {})
    writer.write("curve", [Curve(0, "train", 1.0)])
    with pytest.raises(Refusal, match=f"trial {TRIAL.id}, table curve.*{column}"):
        writer.write("curve", [Curve(0, "test", 1.0), row])
    writer.flush(0)
    assert rows(tmp_path, "curve") == Counter({(0, "train"): 1}), "a refused batch leaves nothing"


def test_a_table_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Odd:
        step: int
        values: list[float]

    @dataclass(frozen=True)
    class Timeless:
        loss: float

    @dataclass(frozen=True)
    class Trialled:
        step: int
        trial: str

    writer = Store(tmp_path).writer(TRIAL, {}, {})
    for table, row, wrong in [
        ("odd", Odd(0, []), "Odd.values"),
        ("timeless", Timeless(0.0), "step"),
        ("trialled", Trialled(0, "x"), "Trialled.trial"),
        ("trials", Curve(0, "test", 0.0), "table trials"),
        ("../up", Curve(0, "test", 0.0), "name"),
        ("rows", (1, 2), "dataclass"),
    ]:
        with pytest.raises(Refusal, match=wrong):
            writer.write(table, [row])


def test_a_column_keeps_its_type_over_attempts_and_a_new_one_is_null_before(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Changed:
        step: int
        split: int
        loss: float

    @dataclass(frozen=True)
    class More:
        step: int
        split: str
        loss: float
        top5: float

    writer = Store(tmp_path).writer(TRIAL, {}, {})
    writer.write("curve", [Curve(0, "test", 1.0)])
    writer.flush(1)
    writer = Store(tmp_path).writer(TRIAL, {}, {})
    with pytest.raises(Refusal, match="column split: is bigint and was varchar"):
        writer.write("curve", [Changed(1, 1, 1.0)])
    writer.write("curve", [More(1, "test", 0.5, 0.9)])
    writer.finish(Outcome.FINISHED, 10, {})
    (path,) = Store(tmp_path).files("curve")
    assert pq.ParquetFile(path).read()["top5"].to_pylist() == [None, 0.9]


def test_a_damaged_part_is_not_merged_into_the_result_and_stays_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    writer = store.writer(TRIAL, {}, {})
    for step in (0, 1):
        writer.write("curve", [Curve(step, "test", 1.0)])
        writer.flush(step + 1)
    broken = store.files("curve")[0]
    broken.write_bytes(broken.read_bytes()[:-1])
    writer.write("curve", [Curve(2, "test", 1.0)])
    writer.finish(Outcome.FINISHED, 10, {})
    manifest = store.manifest(TRIAL.id)
    assert manifest is not None
    parts = manifest.parts["curve"]
    assert [part.file.partition("-a1-")[0] for part in parts] == ["part-0", "part-1", "part-2"]
    key = store.key("curve", TRIAL.id, parts[0])
    assert store.damage(key, parts[0]) == f"has {parts[0].bytes - 1} bytes and its manifest says {parts[0].bytes}"


def test_a_trial_of_one_step_takes_few_file_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", forced.append)
    store = Store(tmp_path)
    forced.clear()
    writer = store.writer(TRIAL, {}, {})
    writer.rewind(0)
    writer.write("curve", [Curve(0, "test", 1.0)])
    writer.finish(Outcome.FINISHED, 1, {})
    assert len(forced) == 8  # two manifests, two new folders, one data file: each and the folder that names it


# --- attempts and facts ---------------------------------------------------------------------------


def trials(store: Store) -> list[dict[str, Any]]:
    """The rows of the trials table."""
    columns = store.trials_table()
    return [
        dict(zip(columns, row, strict=True)) for row in zip(*(values for _, values in columns.values()), strict=True)
    ]


def test_attempts_count_and_their_seconds_add_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    began = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    store.writer(TRIAL, {}, {"started": began, "host": "one"}).finish(
        Outcome.FAILED, 3, {"seconds": 2.5, "error": "no space", "peak_memory": 7}
    )
    failed = store.manifest(TRIAL.id)
    assert failed is not None
    assert (failed.outcome, failed.facts["error"]) == (Outcome.FAILED, "no space")
    writer = store.writer(TRIAL, {}, {"host": "two", "started": began + timedelta(days=1)})
    resumed = store.manifest(TRIAL.id)
    assert resumed is not None
    assert resumed.outcome is None
    assert "error" not in resumed.facts
    writer.finish(Outcome.FINISHED, 10, {"seconds": 4.0})
    (row,) = trials(store)
    assert {name: row[name] for name in ("attempts", "seconds", "host", "error", "started")} == {
        "attempts": 2,
        "seconds": 6.5,
        "host": "two",
        "error": None,
        "started": began.replace(tzinfo=None),
    }
    assert row["ended"] > row["started"]


def test_an_attempt_that_was_killed_counts_its_seconds_up_to_its_last_flush(tmp_path: Path) -> None:
    store = Store(tmp_path)
    writer = store.writer(TRIAL, {}, {})
    writer._clock -= 100
    writer.flush(1)
    store.writer(TRIAL, {}, {}).finish(Outcome.FINISHED, 10, {"seconds": 5.0})
    (row,) = trials(store)
    assert 105 <= row["seconds"] < 110


def test_a_result_is_trained_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed, outcome in enumerate((Outcome.FINISHED, Outcome.DIVERGED)):
        store.writer(digits(seed=seed), {}, {}).finish(outcome, 10, {})
        with pytest.raises(Refusal, match=f"has {outcome} and is trained once; .*delete"):
            store.writer(digits(seed=seed), {}, {})


def test_an_attempt_that_another_has_overtaken_writes_no_more(tmp_path: Path) -> None:
    old = Store(tmp_path).writer(TRIAL, {}, {})
    old.write("curve", [Curve(0, "test", 1.0)])
    new = Store(tmp_path).writer(TRIAL, {}, {})
    for late in (lambda: old.flush(1), lambda: old.rewind(0), lambda: old.finish(Outcome.FINISHED, 10, {})):
        with pytest.raises(StoreFailure, match="attempt 2 has taken over; attempt 1 writes no more"):
            late()
    new.finish(Outcome.FINISHED, 10, {})
    assert rows(tmp_path, "curve") == Counter()


def test_an_attempt_that_slept_commits_nothing_and_deletes_nothing_of_its_successors(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.writer(TRIAL, {}, {}).flush(0)
    asleep = store.writer(TRIAL, {}, {})
    asleep.write("curve", [Curve(0, "test", 1.0)])
    asleep.flush(1)
    awake = store.writer(TRIAL, {}, {})
    awake.write("curve", [Curve(1, "test", 2.0)])
    awake.flush(2)
    asleep._sweep()  # as if it had slept between its commit and this
    asleep.write("curve", [Curve(1, "test", 3.0)])
    with pytest.raises(TakenOver, match="attempt 3 has taken over; attempt 2 writes no more"):
        asleep.flush(2)
    awake.finish(Outcome.FINISHED, 2, {})
    (path,) = store.files("curve")
    assert pq.ParquetFile(path).read()["loss"].to_pylist() == [1.0, 2.0]


def test_two_that_open_a_trial_at_once_are_one_that_trains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    for attempt in (1, 2):
        stale = store._seen(TRIAL.id)
        store.writer(TRIAL, {}, {})
        with monkeypatch.context() as both_have_looked:
            both_have_looked.setattr(store, "_seen", lambda trial_id, stale=stale: stale)
            with pytest.raises(TakenOver):
                store.writer(TRIAL, {}, {})
        manifest = store.manifest(TRIAL.id)
        assert manifest is not None
        assert manifest.attempts == attempt


def test_an_attempt_under_an_earlier_lease_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.writer(TRIAL, {}, {}, fence=2).finish(Outcome.FAILED, 0, {"error": "x"})
    with pytest.raises(TakenOver, match=r"a later lease \(2\) has taken over from this one \(1\)"):
        store.writer(TRIAL, {}, {}, fence=1)
    store.writer(TRIAL, {}, {}, fence=2)
    store.writer(TRIAL, {}, {}, fence=5)
    manifest = store.manifest(TRIAL.id)
    assert manifest is not None
    assert (manifest.attempts, manifest.fence) == (3, 5)


class _Lossy(files.Folder):
    """A storage whose replies to manifests are lost: the change stands, and whoever asked for it hears of a failure."""

    lost: ClassVar[list[bool]] = []

    def swap(self, key: str, content: bytes, version: files.Version) -> files.Version | None:
        found = super().swap(key, content, version)
        if self.lost and self.lost.pop():
            raise StoreFailure("the reply was lost")
        return found


def test_a_commit_whose_reply_was_lost_is_found_when_it_is_tried_again(tmp_path: Path) -> None:
    store = Store(_Lossy(tmp_path))
    writer = store.writer(TRIAL, {}, {})
    for step in range(3):
        writer.write("curve", [Curve(step, "test", 1.0)])
        _Lossy.lost = [True]
        with pytest.raises(StoreFailure, match="reply was lost"):
            writer.flush(step + 1)
        if step == 1:  # what was read meanwhile is no part of the lost commit
            writer.write("curve", [Curve(step, "validation", 1.0)])
        writer.flush(step + 1)
    _Lossy.lost = [True]
    with pytest.raises(StoreFailure):
        writer.finish(Outcome.FINISHED, 3, {})
    writer.finish(Outcome.FINISHED, 3, {})
    expected = {(0, "test"): 1, (1, "test"): 1, (1, "validation"): 1, (2, "test"): 1}
    assert rows(tmp_path, "curve") == Counter(expected)


def test_a_commit_that_arrives_after_its_retry_was_sent_is_found_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(_Lossy(tmp_path))
    writer = store.writer(TRIAL, {}, {})
    writer.write("curve", [Curve(0, "test", 1.0)])
    _Lossy.lost = [True]
    with pytest.raises(StoreFailure):
        writer.flush(1)
    monkeypatch.setattr(writer, "_settle", _once(lambda: False, writer._settle))  # it has not arrived when we look
    writer.write("curve", [Curve(1, "test", 1.0)])
    writer.flush(2)
    writer.finish(Outcome.FINISHED, 2, {})
    assert rows(tmp_path, "curve") == Counter({(0, "test"): 1, (1, "test"): 1})


def _once(first: Callable[[], bool], then: Callable[[], bool]) -> Callable[[], bool]:
    turns = iter([first])
    return lambda: next(turns, then)()


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"hots": "x"}, "fact hots: no such fact; did you mean host?"),
        ({"workers": "2"}, "fact workers '2'"),
        ({"started": datetime(2026, 1, 1)}, "fact started"),
        ({"last_finite_loss": math.inf}, "fact last_finite_loss inf"),
    ],
)
def test_a_fact_without_a_column_or_of_another_type_is_refused(
    tmp_path: Path, facts: dict[str, Any], said: str
) -> None:
    store = Store(tmp_path)
    with pytest.raises(Refusal, match=said.replace("?", "[?]")):
        store.writer(TRIAL, {}, facts)
    with pytest.raises(Refusal, match=said.replace("?", "[?]")):
        store.writer(TRIAL, {}, {}).finish(Outcome.FINISHED, 10, facts)


def test_the_trials_table_has_every_field_and_fact_as_a_column(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert trials(store) == []
    assert len(store.trials_table()) == len(Trial.model_fields) + 6 + 28
    store.writer(TRIAL, {}, {"threads": 2, "torch": None})
    (row,) = trials(store)
    assert row["trial"] == TRIAL.id
    assert {name: row[name] for name in Trial.model_fields} == TRIAL.model_dump() | {"milestones": [0.5]}
    assert (row["outcome"], row["data_title"], row["step"], row["threads"], row["torch"]) == (
        None,
        "digits",
        0,
        2,
        None,
    )


# --- manifests ------------------------------------------------------------------------------------


def test_a_manifest_that_cannot_be_trusted_is_named_and_hides_no_other(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed in range(5):
        store.writer(digits(seed=seed), {}, {}).finish(Outcome.FINISHED, 10, {})
    newer, cut, empty, foreign, good = sorted((tmp_path / "manifests").iterdir())
    newer.write_text(
        newer.read_text().replace('"format": 2', '"format": 3').replace('"probes"', '"later": 1, "probes"')
    )
    cut.write_text(cut.read_text()[:100])
    empty.write_text("")
    foreign.write_text(foreign.read_text().replace('"depth": 8', '"depth": 14'))
    assert [manifest.trial for manifest in store.manifests()] == [good.stem]
    reasons = dict(store.damaged)
    assert "was made by bnscale " in reasons[newer.stem]
    assert "(format 3); update bnscale" in reasons[newer.stem]
    assert "is damaged" in reasons[cut.stem]
    assert "is damaged" in reasons[empty.stem]
    assert "its fields are another trial's" in reasons[foreign.stem]
    for path in (newer, cut, empty, foreign):
        with pytest.raises(Refusal, match=path.stem):
            store.manifest(path.stem)
    assert store.manifest("resnet8-never") is None


def test_two_trials_of_one_id_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.writer(TRIAL, {}, {})
    monkeypatch.setattr(Trial, "id", TRIAL.id)
    with pytest.raises(Refusal, match="another trial with this id"):
        store.writer(digits(depth=14), {}, {})


def test_a_store_of_the_format_before_is_read_and_gone_on_with(tmp_path: Path) -> None:
    """As bnscale 0.1 wrote it: no fence, and data files without attempt and footer."""
    store = Store(tmp_path)
    writer = store.writer(TRIAL, {}, {})
    for step in range(2):
        writer.write("curve", [Curve(step, "test", 1.0)])
        writer.flush(step + 1)
    path = tmp_path / "manifests" / f"{TRIAL.id}.json"
    old = json.loads(path.read_text()) | {"format": 1}
    del old["fence"]
    for part in old["parts"]["curve"]:
        new = tmp_path / "curve" / f"trial={TRIAL.id}" / part["file"]
        part["file"] = f"part-{part['first_step']}.parquet"
        pq.write_table(pq.ParquetFile(new).read().replace_schema_metadata(None), new.with_name(part["file"]))
        new.unlink()
        content = new.with_name(part["file"]).read_bytes()
        part |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert footer(new.with_name(part["file"])) is None
    path.write_text(json.dumps(old))
    assert rows(tmp_path, "curve") == Counter({(0, "test"): 1, (1, "test"): 1})
    writer = store.writer(TRIAL, {}, {})
    writer.rewind(1)
    writer.write("curve", [Curve(1, "test", 2.0)])
    writer.finish(Outcome.FINISHED, 2, {})
    (left,) = path.parent.parent.glob("curve/*/*")
    assert pq.ParquetFile(left).read()["loss"].to_pylist() == [1.0, 2.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["read", "read", "read", "flush", "flush", "kill", "rewind"]), max_size=30))
def test_the_footers_of_data_files_say_which_of_them_count(
    tmp_path_factory: pytest.TempPathFactory, history: list[str]
) -> None:
    """As the manifest does, up to the rows that only a rewind of the next attempt would forget."""
    root = tmp_path_factory.mktemp("footers")
    store = Store(root)
    writer = store.writer(TRIAL, {"curve": "1 step"}, {})
    step = 0
    for event in history:
        match event:
            case "read":
                writer.write("curve", [Curve(step, "test", 0.0)])
                step += 1
            case "flush":
                writer.flush(step)
            case _:
                if event == "kill":
                    writer = store.writer(TRIAL, {"curve": "1 step"}, {})
                step = writer.reached // 2
                writer.rewind(step)
    writer.write("curve", [Curve(step, "test", 0.0)])
    writer.flush(step + 1)
    manifest = store.manifest(TRIAL.id)
    assert manifest is not None
    said = {path.name: footer(path) for path in root.glob("curve/*/*.parquet")}
    assert all(said.values())
    assert standing({name: about for name, about in said.items() if about}) == [
        part.file for part in manifest.parts["curve"]
    ]
    about = next(each for each in said.values() if each)
    assert (about.trial, about.fingerprint, about.fields) == (TRIAL.id, TRIAL.fingerprint, manifest.fields)
    assert (about.table, about.columns, about.probes) == ("curve", manifest.columns["curve"], manifest.probes)
    writer.finish(Outcome.FINISHED, LAST, {})
    said = {path.name: footer(path) for path in root.glob("curve/*/*.parquet")}
    assert standing({name: about for name, about in said.items() if about}) == [
        path.name for path in store.files("curve")
    ]


def test_a_store_may_be_moved(tmp_path: Path) -> None:
    finished(Store(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert rows(tmp_path / "new", "curve") == Counter((step, "test") for step in range(LAST + 1))


def test_a_store_that_cannot_be_is_refused_and_readers_create_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(Refusal, match=r"store .*file.*: cannot be written \(.*\); choose another with --store"):
            Store(root)
    with pytest.raises(Refusal, match="nowhere: there is none"):
        Store.existing(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


# --- readings that nobody has taken yet -----------------------------------------------------------


def rows_in(store: Store, table: str) -> int:
    return sum(pq.ParquetFile(file).metadata.num_rows for file in store.files(table))


def finished(store: Store) -> None:
    notebook = store.writer(TRIAL, {"curve": "1 epoch"}, {})
    notebook.write("curve", [Curve(step, "test", 0.5) for step in range(LAST + 1)])
    notebook.finish(Outcome.FINISHED, LAST, {})


def test_a_result_is_opened_again_only_for_readings_that_it_lacks_and_keeps_the_ones_it_has(tmp_path):
    store = Store(tmp_path)
    finished(store)
    with pytest.raises(Refusal, match="is trained once"):
        store.writer(TRIAL, {"curve": "1 epoch"}, {})
    again = store.writer(TRIAL, {"gamma": "end"}, {})
    assert again.reached == 0
    again.rewind(0)
    assert rows_in(store, "curve") == LAST + 1
    again.write("gamma", [Gamma(LAST, 0, 0.1)])
    again.finish(Outcome.FINISHED, LAST, {})
    assert (rows_in(store, "curve"), rows_in(store, "gamma")) == (LAST + 1, 1)
    manifest = store.manifest(TRIAL.id)
    assert manifest.covers({"curve": "1 epoch", "gamma": "end"})
    assert not manifest.covers({"gamma": "1 epoch"})


def test_a_reading_at_another_cadence_replaces_the_one_before(tmp_path):
    store = Store(tmp_path)
    finished(store)
    again = store.writer(TRIAL, {"curve": "end"}, {})
    again.rewind(0)
    again.write("curve", [Curve(LAST, "test", 0.5)])
    again.finish(Outcome.FINISHED, LAST, {})
    assert rows_in(store, "curve") == 1


def test_an_interrupted_trial_goes_on_only_if_it_reads_the_same(tmp_path):
    store = Store(tmp_path)
    first = store.writer(TRIAL, {"curve": "1 epoch"}, {})
    store.checkpoints(TRIAL.id).write("step-3.json", b"")
    first.write("curve", [Curve(0, "test", 0.5)])
    first.flush(3)
    same = store.writer(TRIAL, {"curve": "1 epoch"}, {})
    assert same.reached == 3
    assert store.checkpoints(TRIAL.id).list("") == ["step-3.json"]
    assert rows_in(store, "curve") == 1
    other = store.writer(TRIAL, {"gamma": "end"}, {})
    assert other.reached == 0
    assert store.checkpoints(TRIAL.id).list("") == []
    assert rows_in(store, "curve") == 0


def test_a_trial_whose_manifest_was_deleted_begins_another_life_without_anything_of_the_first(tmp_path):
    store = Store(tmp_path)
    for attempt in range(3):  # the last of which reads nothing
        first = store.writer(TRIAL, {"curve": "1 epoch"}, {}, fence=1 + attempt)
        first.rewind(first.reached)
        if attempt < 2:
            first.write("curve", [Curve(attempt, "test", 0.5)])
            first.flush(attempt + 1)
    store.checkpoints(TRIAL.id).write("step-2.json", b"")
    old = set(tmp_path.glob("curve/*/*"))
    assert len(old) == 2
    store.storage.delete(f"manifests/{TRIAL.id}.json")
    behind = {"started": datetime.now(UTC) - timedelta(minutes=10)}  # by the clock of another machine
    second = store.writer(TRIAL, {"curve": "1 epoch"}, behind, fence=4)
    assert store.checkpoints(TRIAL.id).list("") == []
    second.rewind(0)
    second.write("curve", [Curve(0, "test", 0.25)])
    second.flush(1)
    manifest = store.manifest(TRIAL.id)
    files = {path.name: path for path in tmp_path.glob("curve/*/*")}
    assert len(files) == 3
    parts = {}
    for name, path in files.items():
        about = footer(path)
        size, sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        parts[name] = (
            Part(file=name, first_step=about.first_step, last_step=about.last_step, rows=1, bytes=size, sha256=sha256),
            about,
        )
    anew = rebuilt({"curve": parts})
    assert (anew.parts, anew.step, anew.attempts) == (manifest.parts, 1, 1)


def test_halving_gives_up_a_trial_once_and_its_next_attempt_is_not_disturbed(tmp_path):
    store = Store(tmp_path)
    store.writer(TRIAL, {"curve": "1 epoch"}, {}).flush(1)
    store.stop_early(TRIAL.id)
    before = store.storage.get(f"manifests/{TRIAL.id}.json")
    store.stop_early(TRIAL.id)
    assert store.storage.get(f"manifests/{TRIAL.id}.json") == before
