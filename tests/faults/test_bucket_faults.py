"""Rows 24, 26 and 27: buckets that are slow, down, behind or want other credentials; stores that moved."""

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from asking import bnscale, study_file
from asking import train as train_in
from examples import digits
from s3 import Server

from bnscale import query
from bnscale.engine import Gang
from bnscale.probes import END, Cadence, curve, gamma
from bnscale.storage import StoreFailure, storage
from bnscale.store import Store, TakenOver
from bnscale.train import Job, run
from bnscale.trial import Outcome

TRIAL = digits(steps=8)
PROBES: dict[Any, Cadence] = {curve: END, gamma: END}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tries with shorter pauses."""
    monkeypatch.setattr("bnscale.storage.bucket.PAUSE", 0.01)


def attempt(store: str, steps: int) -> Iterator[None]:
    """A worker's attempt that saves at every step; after so many it is told to stop."""
    job = Job(TRIAL, PROBES, store, store, commit=None, zero=0, save_every=0.0)
    left = iter(range(steps))
    for _ in run([job], Gang(), 1, lambda: next(left, None) is None):
        yield


def tables(store: str | Path) -> dict[str, str]:
    """Every reading; the same text for the same rows."""
    session = query.open(store)
    return {table: repr(session.sql(f"from {table} order by all").rows) for table in ("curve", "gamma")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    store = tmp_path_factory.mktemp("unbroken") / "results"
    train_in(TRIAL, store, PROBES)
    return tables(store)


# --- row 24 ---------------------------------------------------------------------------------------


def test_24_a_bucket_that_is_down_now_and_then_and_loses_replies_has_the_rows_of_a_folder(
    bucket: str, s3: Server, unbroken: dict[str, str]
) -> None:
    s3.requests()
    with s3.failing(
        {"match": ".", "every": 5, "kind": "refused", "status": 503, "code": "SlowDown"},
        {"match": "PUT ", "every": 4, "kind": "lost"},
        {"match": "GET ", "every": 3, "kind": "truncated"},
        {"match": ".", "every": 7, "kind": "refused", "status": 500, "code": "InternalError"},
    ):
        list(attempt(bucket, 3))
        list(attempt(bucket, 99))
        assert tables(bucket) == unbroken
    manifest = Store(bucket).manifest(TRIAL.id)
    assert manifest is not None
    assert (manifest.outcome, manifest.attempts) == (Outcome.FINISHED, 2)


def test_24_a_bucket_that_stays_down_is_asked_a_bounded_number_of_times_and_the_trial_goes_on_later(
    bucket: str, s3: Server, unbroken: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = attempt(bucket, 99)
    for _ in range(3):
        next(training)
    s3.requests()
    with (
        s3.failing({"match": ".", "kind": "refused", "status": 503, "code": "SlowDown"}),
        pytest.raises(StoreFailure, match=f"{bucket}/.*: cannot be .* \\(503.*SlowDown.*run again"),
    ):
        list(training)
    monkeypatch.setattr("bnscale.storage.bucket.TRIES", 3)
    s3.requests()
    down = {"match": ".", "kind": "refused", "status": 503, "code": "SlowDown"}
    with s3.failing(down), pytest.raises(StoreFailure):
        storage(bucket).read("a")
    assert len(s3.requests()) == 3
    list(attempt(bucket, 99))
    assert tables(bucket) == unbroken


def test_24_a_server_that_does_not_answer_is_asked_again(
    bucket: str, s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnscale.storage.bucket.SILENCE", timedelta(seconds=0.5))
    place = storage(bucket)
    place.write("a", b"one")
    with s3.failing({"match": ".", "kind": "slow", "seconds": 2, "times": 2}):
        assert place.read("a") == b"one"
    with s3.failing({"match": ".", "kind": "slow", "seconds": 2}):
        monkeypatch.setattr("bnscale.storage.bucket.TRIES", 2)
        with pytest.raises(StoreFailure, match="no answer in time"):
            place.read("a")


def test_24_where_nobody_listens_it_is_said_so(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    for words in (("sql", "from trials"), ("export", "x.duckdb")):
        told = bnscale(*words, "--store", bucket)
        assert told.code == 2
        assert "cannot be listed (connection refused)" in told.err
        assert len(told.err.splitlines()) == 1


def test_24_a_listing_that_lags_behind_hides_no_result_and_takes_up_no_checkpoint_without_its_rows(
    bucket: str, s3: Server, unbroken: dict[str, str], tmp_path: Path
) -> None:
    list(attempt(bucket, 3))
    with s3.failing({"match": "list-type=2", "kind": "hidden", "key": "checkpoints"}):
        list(attempt(bucket, 3))  # from the beginning: it sees none
    with s3.failing({"match": "list-type=2", "kind": "hidden", "key": r"\.parquet"}):
        list(attempt(bucket, 99))
    assert tables(bucket) == unbroken
    store = f"{bucket}/study"
    file = study_file(tmp_path, seeds="range(3)")
    for seed in range(2):
        train_in(digits(seed=seed), store)
    with s3.failing({"match": "list-type=2", "kind": "hidden", "key": r"manifests"}):
        told = bnscale("study", file, "plan", "--preset", "laptop", "--store", store)
    assert "3 trials, 2 done" in told.out, told


def test_24_two_that_open_a_trial_in_a_bucket_at_once_are_one_that_trains_it(bucket: str) -> None:
    first = Store(bucket).writer(TRIAL, {}, {})
    second = Store(bucket).writer(TRIAL, {}, {})
    with pytest.raises(TakenOver, match="attempt 2 has taken over; attempt 1 writes no more"):
        first.flush(1)
    second.finish(Outcome.FINISHED, 8, {})


# --- row 26 ---------------------------------------------------------------------------------------


def test_26_with_credentials_that_expired_a_trial_stops_at_its_checkpoint_and_says_what_to_do(
    bucket: str, s3: Server, unbroken: dict[str, str]
) -> None:
    training = attempt(bucket, 99)
    for _ in range(5):
        next(training)
    with (
        s3.failing({"match": ".", "kind": "refused", "status": 400, "code": "ExpiredToken"}),
        pytest.raises(StoreFailure, match="credentials have expired: renew them and run again, which goes on from the"),
    ):
        list(training)
    manifest = Store(bucket).manifest(TRIAL.id)
    assert manifest is not None
    assert manifest.outcome is None
    steps = [int(key.partition(".")[0].removeprefix("step-")) for key in Store(bucket).checkpoints(TRIAL.id).list("")]
    assert max(steps) == manifest.step > 0
    list(attempt(bucket, 99))
    assert tables(bucket) == unbroken


def test_26_the_credentials_of_a_role_are_renewed_when_they_expire(
    bucket: str, s3: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A role is known by what hands out its credentials: an address and a token, as a pod of Kubernetes has them."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "token").write_text("pod")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{s3.url}/_credentials")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
    place = storage(bucket)
    place.write("a", b"one")
    with s3.failing({"match": ".", "token": s3.token(), "kind": "refused", "status": 400, "code": "ExpiredToken"}):
        assert place.read("a") == b"one"


@pytest.mark.parametrize(
    ("code", "way"),
    [
        ("AccessDenied", "allow it to these credentials"),
        ("InvalidAccessKeyId", "give credentials that this server knows"),
        ("RequestTimeTooSkewed", "set the clock of this machine"),
    ],
)
def test_26_what_is_forbidden_is_said_at_once_with_the_way_out(bucket: str, s3: Server, code: str, way: str) -> None:
    s3.requests()
    with s3.failing({"match": ".", "kind": "refused", "status": 403, "code": code}):
        told = bnscale("sql", "from trials", "--store", bucket)
    assert told.code == 2
    assert way in told.err
    assert code in told.err
    assert len(s3.requests()) == 1


# --- row 27 ---------------------------------------------------------------------------------------


def test_27_a_store_opens_wherever_it_was_moved_or_copied(
    bucket: str, tmp_path: Path, unbroken: dict[str, str]
) -> None:
    train_in(TRIAL, tmp_path / "here", PROBES)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert tables(tmp_path / "there") == unbroken
    shutil.copytree(tmp_path / "there", tmp_path / "elsewhere")
    assert tables(tmp_path / "elsewhere") == unbroken
    here, there = storage(tmp_path / "there"), storage(f"{bucket}/copied")
    for key in here.list(""):
        there.write(key, here.read(key))
    assert tables(there.url) == unbroken
    assert Store(there).manifest(TRIAL.id) == Store(here).manifest(TRIAL.id)
    for key in there.list(""):
        assert str(tmp_path).encode() not in there.read(key), f"{key} names where it was"


def test_27_a_trial_goes_on_in_a_bucket_that_began_in_a_folder(
    bucket: str, tmp_path: Path, unbroken: dict[str, str]
) -> None:
    list(attempt(str(tmp_path / "here"), 3))
    here, there = storage(tmp_path / "here"), storage(bucket)
    for key in here.list(""):
        there.write(key, here.read(key))
    list(attempt(bucket, 99))
    assert tables(bucket) == unbroken
    manifest = Store(there).manifest(TRIAL.id)
    assert manifest is not None
    assert manifest.attempts == 2
