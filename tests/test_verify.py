"""Damage of every kind: it is found and named, and what is mended tells nothing that is not so."""

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from examples import digits
from hypothesis import given, settings
from hypothesis import strategies as st

from bnscale import cli
from bnscale.lease import Driver, claim
from bnscale.storage import StoreFailure
from bnscale.store import Manifest, Store
from bnscale.trial import Outcome
from bnscale.verify import again, lines, repair, verify

LAST = 12
TRIAL = digits(steps=LAST)
PROBES = {"curve": "1 step", "gamma": "3 steps"}


@dataclass(frozen=True)
class Curve:
    step: int
    loss: float


@dataclass(frozen=True)
class Gamma:
    step: int
    layer: int


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: forcing each file to the disk would only take time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def live(store: Store, every: int, saves: int, dies: int | None = None, seed: int = 0) -> None:
    """An attempt as training makes it: it goes on from its latest checkpoint, and dies at a step or finishes."""
    trial = digits(steps=LAST, seed=seed)
    notes = store.storage.below(f"toy/{trial.id}")
    writer = store.writer(trial, PROBES, {"command": "python studies/x.py run"})
    saved = [int(key) for key in notes.list("")]
    start = max((step for step in saved if step <= writer.reached), default=0)
    writer.rewind(start)
    for step in range(start, LAST + 1):
        if step % every == 0 or step % saves == 0:
            writer.flush(step)
        if step % saves == 0:
            notes.write(str(step), b"")
        if dies is not None and step >= dies:
            return
        writer.write("curve", [Curve(step, step / 3)])
        if step % 3 == 0:
            writer.write("gamma", [Gamma(step, layer) for layer in range(2)])
    writer.finish(Outcome.FINISHED, LAST, {})


def rows(store: Store) -> dict[str, Counter[Any]]:
    """What the files that count hold."""
    found: dict[str, Counter[Any]] = {"curve": Counter(), "gamma": Counter()}
    for table, counter in found.items():
        for path in store.files(table):
            counter.update(tuple(row.values()) for row in pq.ParquetFile(path).read().to_pylist())
    return found


def expected(before: int) -> dict[str, Counter[Any]]:
    return {
        "curve": Counter((step, step / 3) for step in range(before)),
        "gamma": Counter((step, layer) for step in range(0, before, 3) for layer in range(2)),
    }


def manifest(store: Store, seed: int = 0) -> Manifest:
    found = store.manifest(digits(steps=LAST, seed=seed).id)
    assert found is not None
    return found


def data(root: Path) -> list[Path]:
    return sorted(path for table in PROBES for path in (root / table).glob("trial=*/*.parquet"))


def flip(path: Path, where: float = 0.5) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[int(where * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOIL: dict[str, Callable[[Path], None]] = {
    "lost": Path.unlink,
    "cut": cut,
    "empty": lambda path: path.write_bytes(b"") and None,
    "flipped": flip,
}


# --- found ----------------------------------------------------------------------------------------


def test_a_store_without_damage_says_so_and_counts_what_there_is(tmp_path: Path) -> None:
    store = Store(tmp_path)
    live(store, 4, 6)
    live(store, 4, 6, dies=9, seed=1)
    verdict = verify(store)
    assert (verdict.trials, verdict.harms, verdict.orphans) == (2, [], 0)
    assert verdict.files == sum(len(listed) for each in store.manifests() for listed in each.parts.values())
    assert verdict.bytes == sum(path.stat().st_size for path in data(tmp_path))
    assert list(lines(verdict)) == [
        f"2 trials, {verdict.files} data files of {verdict.bytes / 2**20:.1f} MiB, 0 checkpoints: "
        "all as they were written"
    ]


@pytest.mark.parametrize("how", SPOIL)
def test_a_damaged_data_file_is_named_with_the_rows_that_were_in_it_and_hides_no_other_trial(
    tmp_path: Path, how: str
) -> None:
    store = Store(tmp_path)
    live(store, 4, 6)
    live(store, 4, 6, seed=1)
    broken = data(tmp_path)[0]
    (trial,) = [each.trial for each in store.manifests() if each.trial in str(broken)]
    SPOIL[how](broken)
    (harm,) = verify(store).harms
    assert (harm.trial, harm.key) == (trial, str(broken.relative_to(tmp_path)))
    assert harm.lost == f"{LAST + 1} rows of curve, steps 0 to {LAST}"


def test_every_bit_of_a_data_file_is_watched(tmp_path: Path) -> None:
    store = Store(tmp_path)
    live(store, 4, 6)
    (path, *_) = data(tmp_path)
    whole = path.read_bytes()
    for step in range(0, 100, 5):
        flip(path, step / 100)
        assert len(verify(store).harms) == 1
        path.write_bytes(whole)
    assert verify(store).harms == []


def test_an_orphan_is_counted_and_is_no_damage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    live(store, 4, 6)
    data(tmp_path)[0].with_name("part-0-a1-00000000.parquet").write_bytes(b"")
    verdict = verify(store)
    assert (verdict.harms, verdict.orphans) == ([], 1)
    assert "1 data files that no manifest names" in next(iter(lines(verdict)))


def test_a_damaged_checkpoint_is_named_and_set_aside_and_nothing_else_changes(tmp_path: Path) -> None:
    import torch

    from bnscale.engine.checkpoint import newest, write

    store = Store(tmp_path)
    live(store, 4, 6)
    place = store.checkpoints(TRIAL.id)
    for step in (3, 6):
        write(place, step, {"w": torch.full((4,), float(step))}, {})
    before = manifest(store)
    flip(tmp_path / "checkpoints" / f"trial={TRIAL.id}" / "step-6.safetensors", 0.9)
    (harm,) = verify(store).harms
    assert harm.key.endswith("step-6.safetensors")
    assert repair(store, verify(store)) == [f"{TRIAL.id}: a damaged checkpoint was set aside"]
    assert verify(store).harms == []
    assert (tmp_path / "damaged" / harm.key).exists()
    found = newest(place)
    assert found is not None
    assert found.step == 3
    assert manifest(store) == before


# --- mended ---------------------------------------------------------------------------------------


def test_a_finished_trial_whose_manifest_is_lost_has_it_back_to_the_last_word(tmp_path: Path) -> None:
    for place, how in enumerate(SPOIL):
        store = Store(tmp_path / how)
        live(store, 4, 6, dies=7)
        live(store, 5, 5)
        before = manifest(store)
        path = tmp_path / how / "manifests" / f"{TRIAL.id}.json"
        cut(path) if how == "flipped" else SPOIL[how](path)  # JSON has no checksum
        (said,) = repair(store, verify(store))
        assert said == f"{TRIAL.id}: its manifest was written anew: finished, as its data files say"
        after = manifest(store)
        assert after.fence == 1, place
        assert after == before.model_copy(update={"fence": 1})


HISTORY = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, LAST)), max_size=3)
END = st.none() | st.tuples(st.integers(1, 5), st.integers(1, 6))
HARM = st.tuples(st.sampled_from(["manifest", "data"]), st.integers(0, 99), st.sampled_from([*SPOIL]))
DAMAGE = st.lists(HARM, min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(HISTORY, END, DAMAGE)
def test_whatever_is_damaged_a_mended_trial_has_no_row_twice_none_missing_before_its_step_and_goes_on_to_all_of_them(
    tmp_path_factory: pytest.TempPathFactory, history: Any, end: Any, damage: Any
) -> None:
    root = tmp_path_factory.mktemp("damaged")
    store = Store(root)
    for every, saves, dies in history or [(2, 4, 6)]:
        live(store, every, saves, dies)
    if end:
        live(store, *end)
    for what, which, how in damage:
        paths = data(root) if what == "data" else [root / "manifests" / f"{TRIAL.id}.json"]
        paths = [path for path in paths if path.exists()]
        if paths:
            path = paths[which % len(paths)]
            cut(path) if (what, how) == ("manifest", "flipped") else SPOIL[how](path)
    verdict = verify(store)
    repair(store, verdict)
    assert verify(store).harms == []
    now = store.manifest(TRIAL.id)
    if now is not None:
        held = rows(store)
        whole = expected(LAST + 1)
        if now.has_result:
            for table in PROBES:
                assert held[table] == (whole[table] if table in now.probes | now.kept else Counter())
        else:
            for table, counter in held.items():
                assert set(counter.values()) <= {1}
                earlier = Counter({row: n for row, n in counter.items() if row[0] < now.step})
                assert earlier == expected(now.step)[table]
    if now is None or not now.covers(PROBES):
        live(store, 3, 3)
    assert rows(store) == expected(LAST + 1)
    assert manifest(store).covers(PROBES)
    assert verify(store).harms == []


def test_a_trial_that_somebody_trains_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    live(store, 4, 6)
    data(tmp_path)[0].unlink()
    before = manifest(store)
    with Driver(store.storage, "depth", limit=0.3) as driver:
        claim(store.storage, TRIAL.id, driver.id)
        (said,) = repair(store, verify(store), limit=6.0)
    assert f"{TRIAL.id}: left as it is, for it is trained by" in said
    assert manifest(store) == before


def test_a_manifest_of_a_newer_bnscale_is_not_mended(tmp_path: Path) -> None:
    store = Store(tmp_path)
    live(store, 4, 6)
    path = tmp_path / "manifests" / f"{TRIAL.id}.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3').replace('"probes"', '"later": 1, "probes"'))
    before = path.read_bytes()
    (said,) = repair(store, verify(store))
    assert "left as it is" in said
    assert "update bnscale" in said
    assert path.read_bytes() == before


def test_a_mended_trial_fences_off_the_attempt_that_was_at_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    live(store, 2, 2, dies=6)
    slept = store.writer(TRIAL, PROBES, {}, fence=1)
    (tmp_path / "manifests" / f"{TRIAL.id}.json").write_text("{")
    repair(store, verify(store))
    slept.write("curve", [Curve(8, 0.0)])
    with pytest.raises(OSError, match="writes no more"):
        slept.flush(9)


# --- the command ----------------------------------------------------------------------------------


def call(*words: str) -> int:
    before = sys.argv
    sys.argv = ["bnscale", *words]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("a command ends with SystemExit")


def test_21_the_command_names_damage_mends_it_and_says_what_to_run_again(tmp_path: Path, capsys: Any) -> None:
    store = Store(tmp_path)
    live(store, 4, 6)
    live(store, 4, 6, seed=1)
    place = ["--store", str(tmp_path)]
    assert call("verify", *place) == 0
    assert "all as they were written" in capsys.readouterr().out
    broken = data(tmp_path)[0]
    flip(broken)
    assert call("verify", *place) == 1
    said = capsys.readouterr().out
    assert f"damaged: {broken.relative_to(tmp_path)}: its checksum is not" in said or "cannot be read" in said
    assert f"to mend what can be: bnscale verify --repair --store {tmp_path}" in said
    assert f"then run again what was lost: python studies/x.py run --store {tmp_path}" in said
    assert call("verify", "--repair", *place) == 0
    assert "its tables curve are to be read again, the others stay" in capsys.readouterr().out
    assert call("verify", *place) == 0
    (tmp_path / "manifests" / f"{TRIAL.id}.json").unlink(missing_ok=True)
    capsys.readouterr()
    assert call("verify", *place) == 1
    assert f"damaged: manifests/{TRIAL.id}.json: no such file or directory" in capsys.readouterr().out
    assert call("verify", "--repair", *place) == 0
    assert call("verify", "--store", str(tmp_path / "none")) == 2
    assert again(verify(store), store) == []


def test_a_flipped_bit_anywhere_in_what_is_said_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    import torch

    from bnscale.engine.checkpoint import write

    store = Store(tmp_path)
    live(store, 4, 6)
    write(store.checkpoints(TRIAL.id), 3, {"w": torch.zeros(4)}, {"loss": 0.25, "accuracy": None})
    path = tmp_path / "checkpoints" / f"trial={TRIAL.id}" / "step-3.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        harmed = bytearray(whole)
        harmed[place] ^= 1 << place % 8
        path.write_bytes(harmed)
        assert [harm.key.rpartition("/")[2] for harm in verify(store).harms] == ["step-3.safetensors"], place
    path.write_bytes(whole)
    assert verify(store).harms == []
    path.with_suffix(".safetensors").unlink()
    assert [harm.wrong for harm in verify(store).harms] == ["a part of it is not there"]


def test_checkpoints_of_a_trial_whose_manifest_is_lost_are_looked_at_too(tmp_path: Path) -> None:
    import torch

    from bnscale.engine.checkpoint import write

    store = Store(tmp_path)
    live(store, 4, 6)
    write(store.checkpoints(TRIAL.id), 3, {"w": torch.zeros(4)}, {})
    flip(tmp_path / "checkpoints" / f"trial={TRIAL.id}" / "step-3.safetensors")
    (tmp_path / "manifests" / f"{TRIAL.id}.json").unlink()
    verdict = verify(store)
    assert verdict.checkpoints == 1
    assert sorted(harm.key.partition("/")[0] for harm in verdict.harms) == ["checkpoints", "manifests"]


def test_what_is_set_aside_replaces_nothing_that_was(tmp_path: Path) -> None:
    store = Store(tmp_path)
    live(store, 4, 6)
    for content in (b"one", b"two", b"three", b"two"):
        (tmp_path / "manifests" / f"{TRIAL.id}.json").write_bytes(content)
        repair(store, verify(store))
    kept = (tmp_path / "damaged" / "manifests").iterdir()
    assert sorted(path.read_bytes() for path in kept) == [b"one", b"three", b"two"]


def test_a_trial_that_cannot_be_mended_stops_no_other_and_each_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    trials = [digits(steps=LAST, seed=seed) for seed in range(2)]
    for seed, trial in enumerate(trials):
        live(store, 4, 6, seed=seed)
        (tmp_path / "manifests" / f"{trial.id}.json").unlink()
    plain = Store.replace

    def replace(here: Store, manifest: Manifest) -> None:
        if manifest.trial == min(trial.id for trial in trials):
            raise StoreFailure("out of reach")
        plain(here, manifest)

    monkeypatch.setattr(Store, "replace", replace)
    heard: list[str] = []
    said = repair(store, verify(store), heard.append)
    assert heard == said
    assert [line.partition(": ")[2].partition(";")[0] for line in said] == [
        "left as it is",
        "its manifest was written anew: finished, as its data files say",
    ]


@pytest.mark.parametrize("alive", [False, True])
def test_a_holder_on_another_machine_is_listened_to_and_mended_over_where_it_is_silent(
    tmp_path: Path, alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    live(store, 4, 6)
    data(tmp_path)[0].unlink()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("bnscale.lease._machine", lambda: "another")
        holder = Driver(store.storage, "depth", limit=0.05 if alive else 3600)
        holder.__enter__()
    claim(store.storage, TRIAL.id, holder.id)
    heard: list[str] = []
    repair(store, verify(store), heard.append, limit=30 if alive else 0.6)
    assert "listening for at most" in heard[0]
    assert ("left as it is" in heard[1]) == alive
    assert len(verify(store).harms) == alive
    holder.end()
