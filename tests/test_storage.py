"""One contract for every kind of storage: whole or not at all, and of many writers at once exactly one wins."""

import hashlib
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3 import Server

from bnscale import storage as files
from bnscale.storage import Folder, Storage, StoreFailure, Version, abilities, check, storage
from bnscale.storage.bucket import Bucket
from bnscale.store import Store
from bnscale.trial import Refusal

SEAM = ("_write", "_rename", "_link", "_make", "_sync", "_delete")


@pytest.fixture(params=["folder", "slow folder", "bucket", "bucket that often fails"])
def kept(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """Every kind of storage, empty. The slow folder lets others in between before each change of the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr("bnscale.storage.bucket.PAUSE", 0.02)
    if request.param == "slow folder":
        for name in SEAM:
            monkeypatch.setattr(files, name, _slowly(getattr(files, name)))
    if "folder" in request.param:
        yield storage(tmp_path / "kept")
        return
    place = storage(request.getfixturevalue("bucket"))
    if "fails" not in request.param:
        yield place
        return
    server: Server = request.getfixturevalue("s3")
    with server.failing(
        {"match": "PUT ", "kind": "lost", "times": 2},
        {"match": "(PUT|GET|HEAD|POST) ", "kind": "refused", "status": 503, "code": "SlowDown", "times": 2},
        {"match": "PUT ", "kind": "lost", "times": 1},
        {"match": "GET /results/.*/", "kind": "truncated", "times": 3},
    ):
        yield place


def _slowly(plain: Callable[..., None]) -> Callable[..., None]:
    def slow(*arguments: Any) -> None:
        time.sleep(0.002)
        plain(*arguments)

    return slow


def at_once(act: Callable[[int], object], writers: int = 8) -> list[object]:
    line = threading.Barrier(writers)

    def together(number: int) -> object:
        line.wait()
        return act(number)

    with ThreadPoolExecutor(writers) as pool:
        return list(pool.map(together, range(writers)))


# --- the contract ---------------------------------------------------------------------------------


def test_what_was_written_is_read_whole_and_what_is_not_there_is_said_so(kept: Storage) -> None:
    for content in (b"one", b"", bytes(6 << 20)):  # the last one goes to a bucket in parts
        kept.write("folder/a", content)
        assert kept.read("folder/a") == content
        assert kept.get("folder/a")[0] == content
        assert kept.size("folder/a") == len(content)
        local = kept.local("folder/a")
        assert local.read_bytes() == content
        assert local.is_relative_to(kept.reach)
        assert kept.local("folder/a", hashlib.sha256(content).hexdigest()).read_bytes() == content
    for missing in ("folder/b", "nowhere/a", "folder"):
        for ask in (kept.read, kept.get, kept.local):
            with pytest.raises(FileNotFoundError):
                ask(missing)
    assert kept.size("folder/b") is None
    assert -60 < kept.age("folder/a") < 60
    assert kept.age("folder/b") == float("inf")


def test_a_key_is_created_once(kept: Storage) -> None:
    assert kept.create("a", b"one")
    assert kept.create("a", b"two") is None
    assert kept.read("a") == b"one"
    kept.delete("a")
    kept.delete("a")
    assert kept.create("a", b"two")


def test_of_many_creators_exactly_one_wins_and_its_content_stands(kept: Storage) -> None:
    for turn in range(3):
        won = at_once(lambda number, turn=turn: kept.create(f"leases/{turn}", b"%d" % number) is not None)
        assert won.count(True) == 1
        assert kept.read(f"leases/{turn}") == b"%d" % won.index(True)


def test_a_swap_replaces_the_version_that_was_seen_and_no_other(kept: Storage) -> None:
    first = kept.create("a", b"one")
    assert first is not None
    assert kept.get("a") == (b"one", first)
    second = kept.swap("a", b"two", first)
    assert second is not None
    assert kept.swap("a", b"three", first) is None
    assert kept.get("a") == (b"two", second)
    kept.write("a", b"four")
    assert kept.swap("a", b"three", second) is None
    kept.delete("a")
    assert kept.swap("a", b"three", second) is None
    assert kept.size("a") is None


def test_concurrent_swaps_of_a_counter_lose_none(kept: Storage) -> None:
    kept.write("counter", b"0")

    def count(_: int) -> None:
        for _ in range(4):
            while True:
                content, version = kept.get("counter")
                if kept.swap("counter", b"%d" % (int(content) + 1), version):
                    break

    at_once(count, 4)
    assert kept.read("counter") == b"16"


def test_a_listing_has_the_keys_below_a_folder_in_order(kept: Storage) -> None:
    for key in ("x/b", "x/a", "x/y/c", "z", "xy/a"):
        kept.write(key, b"")
    assert kept.list("x") == ["x/a", "x/b", "x/y/c"]
    assert kept.list("") == ["x/a", "x/b", "x/y/c", "xy/a", "z"]
    assert kept.list("nowhere") == []
    kept.sweep("x", lambda key: key != "x/b")
    assert kept.list("x") == ["x/b"]
    below = kept.below("x")
    assert below.list("") == ["b"]
    assert below.read("b") == kept.read("x/b")
    assert below.url == f"{kept.url}/x"
    assert [kept.holds(each) for each in ("x", "nowhere")] == [True, False]
    kept.remove("x")
    kept.remove("nowhere")
    assert kept.list("x") == []
    assert kept.list("xy") == ["xy/a"]


def test_a_sound_storage_proves_every_ability_and_leaves_nothing_behind(kept: Storage) -> None:
    found = abilities(kept)
    assert [(name, ability.error) for name, ability in found.named().items()] == [
        (name, None) for name in ("write", "replace", "create", "swap", "list", "delete")
    ]
    assert all(ability.seconds > 0 for ability in found.named().values())
    check(kept)
    assert kept.list("") == []


def test_what_another_process_unpickles_is_the_same_storage(kept: Storage) -> None:
    kept.write("a", b"one")
    again = pickle.loads(pickle.dumps(kept))
    assert again.read("a") == b"one"
    assert again.url == kept.url


CALLS = st.tuples(
    st.sampled_from(["write", "create", "swap", "swap stale", "delete", "read"]),
    st.sampled_from(["a", "b/c"]),
    st.binary(max_size=4),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CALLS, max_size=12))
def test_any_sequence_of_calls_leaves_what_a_dictionary_would_have(
    tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[str, str, bytes]]
) -> None:
    _same_as_a_dictionary(storage(tmp_path_factory.mktemp("kept")), calls)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CALLS, max_size=12))
def test_any_sequence_of_calls_leaves_in_a_bucket_what_a_dictionary_would_have(
    bucket: str, calls: list[tuple[str, str, bytes]]
) -> None:
    place = storage(bucket)
    place.remove("")
    _same_as_a_dictionary(place, calls)


def _same_as_a_dictionary(place: Storage, calls: list[tuple[str, str, bytes]]) -> None:
    expected: dict[str, bytes] = {}
    stale: dict[str, tuple[bytes, Version]] = {}
    for number, (call, key, content) in enumerate(calls):
        content += b"%d" % number  # no content comes twice: a version may be of the content
        match call:
            case "write":
                place.write(key, content)
                expected[key] = content
            case "create":
                assert (place.create(key, content) is None) == (key in expected)
                expected.setdefault(key, content)
            case "swap" if key in expected:
                stale[key] = place.get(key)
                assert place.swap(key, content, stale[key][1]) is not None
                expected[key] = content
            case "swap stale" if key in stale:
                assert place.swap(key, content, stale[key][1]) is None
            case "delete":
                place.delete(key)
                expected.pop(key, None)
        assert (place.read(key) if key in expected else None) == expected.get(key)
    assert place.list("") == sorted(expected)


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=r"store .*file: cannot be written \(.*\); choose another with --store"):
        check(storage(tmp_path / "file"))
    with pytest.raises(StoreFailure, match="file.*a: cannot be written"):
        storage(tmp_path / "file").write("a", b"")


def test_a_folder_without_hard_links_is_refused_for_two_drivers_could_not_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("bnscale.storage._link", no_links)
    with pytest.raises(Refusal, match=r"two drivers could not share it \(operation not permitted\)"):
        check(storage(tmp_path))
    assert abilities(storage(tmp_path)).write.error is None


def test_a_folder_where_two_can_create_the_same_key_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnscale.storage._link", lambda source, target: target.write_bytes(source.read_bytes()))
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert abilities(storage(tmp_path)).create.error == (
        "of 8 writers that each put a key if absent 8 succeeded instead of one"
    )


def test_what_a_killed_writer_left_half_written_is_no_key_and_is_swept_with_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(source: Path, target: Path) -> None:
        raise Killed

    folder = Folder(tmp_path)
    with monkeypatch.context() as dying:
        dying.setattr("bnscale.storage._rename", die)
        for key in ("x/part-0.parquet", "x/part-1.parquet"):
            with pytest.raises(Killed):
                folder.write(key, b"whole")
    assert folder.list("x") == []
    folder.sweep("x", lambda key: key == "x/part-0.parquet")
    (left,) = (tmp_path / "x").iterdir()
    assert left.name.startswith(".part-1.parquet.")


def test_a_folder_goes_by_its_whole_path_and_may_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = storage("results")
    assert place.url == str(tmp_path / "results")
    place.write("a/b", b"one")
    shutil.move("results", "elsewhere")
    moved = storage("elsewhere")
    assert moved.read("a/b") == b"one"
    assert moved.swap("a/b", b"two", moved.get("a/b")[1])


# --- buckets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("ftp://a/b", "ftp:// is no store; give a folder, s3://bucket/prefix or gs://bucket/prefix"),
        ("s3://", "names no bucket; give s3://bucket/prefix"),
        ("s3://ab", "'ab' cannot be the name of a bucket"),
        ("gs://Results/x", "'Results' cannot be the name of a bucket"),
        ("s3://results/a//b", "'' cannot be a part of a prefix"),
        ("s3://results/../b", "'..' cannot be a part of a prefix"),
        ("s3://results/a b", "'a b' cannot be a part of a prefix"),
    ],
)
def test_an_address_that_is_none_is_refused(url: str, wrong: str) -> None:
    with pytest.raises(Refusal, match=f"store {url}: .*") as refused:
        storage(url)
    assert wrong in str(refused.value)


def test_a_bucket_of_google_is_opened_without_asking_anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = storage("gs://results/some/where/")
    assert isinstance(place, Bucket)
    assert (place.url, place.name, place.prefix) == ("gs://results/some/where", "results", "some/where")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(Refusal, match=r"store gs://results: cannot be opened \(.*\); mend what the environment says"):
        storage("gs://results")


def test_a_bucket_that_is_not_there_is_no_empty_one(bucket: str) -> None:
    place = storage(bucket.replace("s3://results", "s3://nothing"))
    for ask in (
        lambda: place.read("a"),
        lambda: place.list(""),
        lambda: place.write("a", b""),
        lambda: place.create("a", b""),
        lambda: place.swap("a", b"", Version('"0"')),
    ):
        with pytest.raises(StoreFailure, match="there is no bucket nothing; create it"):
            ask()


def test_a_copy_is_fetched_once_and_again_where_it_is_gone(bucket: str, s3: Server) -> None:
    place = storage(bucket)
    place.write("curve/trial=x/whole.parquet", b"content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    s3.requests()
    first = place.local("curve/trial=x/whole.parquet", sha256)
    assert first.parent.name == "trial=x"
    assert storage(bucket).local("curve/trial=x/whole.parquet", sha256) == first
    assert len(s3.requests()) == 1
    first.unlink()
    assert place.local("curve/trial=x/whole.parquet", sha256).read_bytes() == b"content"
    place.write("curve/trial=x/whole.parquet", b"damaged")
    first.unlink()
    with pytest.raises(StoreFailure, match="its checksum is not the one of its manifest"):
        place.local("curve/trial=x/whole.parquet", sha256)


def test_copies_that_nobody_reads_for_a_month_are_deleted(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = storage(bucket)
    kept, old = b"kept", b"old"
    paths = []
    for content in (kept, old):
        place.write("curve/trial=x/whole.parquet", content)
        paths.append(place.local("curve/trial=x/whole.parquet", hashlib.sha256(content).hexdigest()))
    long_ago = time.time() - 31 * 86400
    os.utime(paths[1], (long_ago, long_ago))
    monkeypatch.setattr("bnscale.storage.bucket._expired", set())  # as in another process
    assert storage(bucket).reach == place.reach
    assert [path.exists() for path in paths] == [True, False]


class _Death(BaseException):
    """Of the process: nobody tidies up."""


def test_a_death_between_the_link_and_its_end_leaves_every_later_swap_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temporary file of a `create` and the live one are one file then."""
    left, plain = [0], {name: getattr(files, name) for name in SEAM}

    def dies(name: str) -> Callable[..., None]:
        def act(*arguments: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                if name == "_write":
                    plain[name](arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise _Death
            plain[name](*arguments)

        return act

    folder = Folder(tmp_path / "dying")
    folder.write("other", b"")  # so that the locks are there
    with monkeypatch.context() as patch:
        for name in SEAM:
            patch.setattr(files, name, dies(name))
        left[0] = 3  # write, link, and the temporary name stays
        with pytest.raises(_Death):
            folder.create("a", b"before")
        assert [path.read_bytes() for path in folder.root.glob(".a.*")] == [b"before"]
        for n in range(1, 10):
            root = Folder(shutil.copytree(folder.root, tmp_path / str(n), copy_function=os.link))
            (temporary,) = root.root.glob(".a.*")
            assert temporary.samefile(root.root / "a")
            _, version = root.get("a")
            left[0] = n
            try:
                assert root.swap("a", b"after, and longer", version)
            except _Death:
                assert root.read("a") in (b"before", b"after, and longer")
            else:
                break
        assert n > 2
        assert folder.read("a") == b"before"


def test_two_writers_of_a_key_never_write_the_same_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    plain = files._write
    monkeypatch.setattr(files, "_write", lambda path, content: (written.append(path), plain(path, content))[1])
    folder = Folder(tmp_path)
    version = folder.create("a", b"0")
    assert version
    assert folder.swap("a", b"1", version)
    folder.write("a", b"2")
    assert len({path.name for path in written}) == 3


def test_a_lock_that_a_stopped_process_keeps_is_a_failure_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    folder = Folder(tmp_path)
    folder.write("a", b"0")
    with folder._alone("a"):  # as another process would, that Ctrl-Z stopped
        for act in (
            lambda: folder.create("a", b"1"),
            lambda: folder.write("a", b"1"),
            lambda: folder.swap("a", b"1", folder.get("a")[1]),
            lambda: folder.delete("a"),
        ):
            with pytest.raises(StoreFailure, match=r"a: cannot be written \(another process, perhaps a stopped one"):
                act()
    assert folder.list("") == ["a"]
    assert not list(tmp_path.glob("*.tmp"))
    folder.write("a", b"1")


def test_a_folder_that_vanishes_while_it_is_listed_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    for key in ("a/1", "b/1", "c/1", "d/1"):
        folder.write(key, b"")
    plain = os.walk

    def walk(top: Path, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for at, (here, below, names) in enumerate(plain(top, **options)):
            yield here, below, names
            if at == 0:
                shutil.rmtree(tmp_path / below[0])  # before it is entered

    monkeypatch.setattr(os, "walk", walk)
    assert len(folder.list("")) == 3
    assert folder.list("none") == []


def test_what_cannot_be_looked_at_is_a_storage_failure_or_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refusal, match=r"^store '~nosuchuser/x': names no folder .* choose another with --store$"):
        storage("~nosuchuser/x")
    folder = Folder(tmp_path)
    for act in (folder.holds, folder.delete, folder.local, folder.size, folder.list):
        with pytest.raises(StoreFailure, match="file name too long"):
            act("x" * 300)
    with pytest.raises(Refusal, match="file name too long"):
        Store.existing(tmp_path / ("x" * 300))

    def forbidden(path: Path, **options: Any) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", forbidden)  # tests run as root, whom nothing is forbidden
    for act in (folder.holds, folder.delete, folder.local, folder.size):
        with pytest.raises(StoreFailure, match="permission denied"):
            act("a")
    with pytest.raises(Refusal, match="permission denied"):
        Store.existing(folder)
