"""One contract for every kind of storage: whole or not at all, and of many writers at once exactly one wins."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bnscale.storage import Folder, Storage, StoreFailure, abilities, check, storage
from bnscale.trial import Refusal


@pytest.fixture
def kept(tmp_path: Path) -> Storage:
    return storage(tmp_path / "kept")


def at_once(act: Callable[[int], object], writers: int = 8) -> list[object]:
    with ThreadPoolExecutor(writers) as pool:
        return list(pool.map(act, range(writers)))


def test_what_was_written_is_read_whole_and_what_is_not_there_is_said_so(kept: Storage) -> None:
    for content in (b"one", b"", bytes(1 << 20)):
        kept.write("folder/a", content)
        assert kept.read("folder/a") == content
        assert kept.get("folder/a")[0] == content
        assert kept.size("folder/a") == len(content)
        assert kept.local("folder/a").read_bytes() == content
    for missing in ("folder/b", "nowhere/a", "folder"):
        for ask in (kept.read, kept.get, kept.local):
            with pytest.raises(FileNotFoundError):
                ask(missing)
    assert kept.size("folder/b") is None


def test_a_key_is_created_once(kept: Storage) -> None:
    assert kept.create("a", b"one")
    assert kept.create("a", b"two") is None
    assert kept.read("a") == b"one"
    kept.delete("a")
    kept.delete("a")
    assert kept.create("a", b"two")


def test_of_many_creators_exactly_one_wins_and_its_content_stands(kept: Storage) -> None:
    won = at_once(lambda number: kept.create("leases/a", b"%d" % number) is not None)
    assert won.count(True) == 1
    assert kept.read("leases/a") == b"%d" % won.index(True)


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
        for _ in range(5):
            while True:
                content, version = kept.get("counter")
                if kept.swap("counter", b"%d" % (int(content) + 1), version):
                    break

    at_once(count, 4)
    assert kept.read("counter") == b"20"


def test_a_listing_has_the_keys_below_a_folder_in_order(kept: Storage) -> None:
    for key in ("x/b", "x/a", "x/y/c", "z", "xy/a"):
        kept.write(key, b"")
    assert kept.list("x") == ["x/a", "x/b", "x/y/c"]
    assert kept.list("nowhere") == []
    kept.sweep("x", lambda key: key != "x/b")
    assert kept.list("x") == ["x/b"]
    below = kept.below("x")
    assert below.list("") == ["b"]
    assert below.read("b") == kept.read("x/b")
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
    assert isinstance(kept, Folder)
    assert [path.name for path in kept.root.iterdir()] == [".locks"]


def test_a_storage_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(Refusal, match="store ftp://a/b: ftp:// is no store; give a folder, s3://"):
        storage("ftp://a/b")


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
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert abilities(storage(tmp_path)).create.error == (
        "of 8 writers that each put a key if absent 8 succeeded instead of one"
    )
