"""A full disk, a flipped bit, half a file, a damaged manifest, a newer format, half a compaction."""

import ctypes
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import WARM, bnscale, train
from examples import digits
from operations import half, watched

from bnscale import query
from bnscale.engine import checkpoint
from bnscale.probes import STEP, Curve, curve
from bnscale.storage import StoreFailure, storage
from bnscale.store import Store, Writer
from bnscale.trial import Outcome, Refusal

TRIAL = digits(steps=4)
READINGS = {curve: 2 * STEP}
EVERY = "select step, count(*), count(distinct split) from curve group by all order by all"
WHOLE = [(step, 3, 3) for step in (0, 2, 4)]


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: forcing each file to the disk would only take time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def reading(step: int) -> Curve:
    return Curve(step, step / 10, "test", 360, 2.5 - step / 10, 0.5, 0.9)


def flushed(store: Store, steps: int = 3, seed: int = 0) -> Writer:
    """A writer with a part for each step."""
    writer = store.writer(digits(seed=seed), {}, {})
    for step in range(steps):
        writer.write("curve", [reading(step)])
        writer.flush(step + 1)
    return writer


def steps(root: Path) -> list[int]:
    return [row[0] for row in query.open(root).sql("select step from curve order by all").rows]


# --- 16, 17: a full disk -----------------------------------------------------------------------------


def _on_a_small_disk(end: Connection, disk: str, spare: list[int]) -> None:
    """Train on a disk of one MiB, seen by this process alone, with so many bytes free; then free some and go on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000):  # a mount namespace of its own
        end.send(os.strerror(ctypes.get_errno()))
        return
    for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]):
        done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            end.send(done.stderr)
            return
    found = []
    for free in spare:
        root, ballast = Path(disk) / str(free), Path(disk) / "ballast"
        store = Store(root)
        left = os.statvfs(disk)
        ballast.write_bytes(bytes(left.f_bavail * left.f_bsize - free))
        said = None
        try:
            # With little room its first data file does not fit, with more a checkpoint: it is saved at every step.
            train(TRIAL, root, READINGS, save_every=30.0 if free < 16_000 else 0.0)
        except StoreFailure as failure:
            said = str(failure), failure.errno
        newest = checkpoint.newest(store.checkpoints(TRIAL.id))
        manifest = store.manifest(TRIAL.id)
        at = {
            "said": said,
            "readings": query.open(root).sql(EVERY).rows,
            "half": [str(path) for path in root.rglob(".*.tmp")],
            "reached": manifest.step if manifest else -1,
            "saved": newest.step if newest else -1,
        }
        ballast.unlink()
        if said:
            train(TRIAL, root, READINGS)
        found.append(at | {"in the end": query.open(root).sql(EVERY).rows})
        shutil.rmtree(root)
        if not said:  # there was room enough, and so there is with more
            break
    end.send(found)


def test_16_a_disk_that_is_really_full_stops_the_trial_and_freed_it_goes_on_from_what_was_committed(
    tmp_path: Path,
) -> None:
    (tmp_path / "disk").mkdir()
    end, there = WARM.Pipe()
    trainer = WARM.Process(
        target=_on_a_small_disk, args=(there, str(tmp_path / "disk"), list(range(4096, 90_000, 12_288)))
    )
    trainer.start()
    there.close()
    assert end.poll(110)
    found = end.recv()
    trainer.join()
    trainer.close()
    if isinstance(found, str):
        pytest.skip(f"no small disk can be mounted here ({found.strip()}); the next test has the same without one")
    full = set()
    for each in found:
        assert each["in the end"] == WHOLE
        assert each["half"] == []
        if each["said"] is None:
            continue
        text, number = each["said"]
        assert number == errno.ENOSPC
        assert "cannot be written (no space left on device); what was committed is safe: mend that and run" in text
        full.add(Path(text.partition(": ")[0]).relative_to(tmp_path / "disk").parts[1])
        assert each["readings"] == WHOLE[: len(each["readings"])]
        assert each["saved"] <= each["reached"], "rows before a checkpoint are missing"
    assert {"curve", "checkpoints"} <= full, full


def full_from(number: int) -> Callable[[int, str, Callable[..., None], tuple[Any, ...]], None]:
    """No byte more from the n-th write on; deleting goes on."""

    def act(call: int, name: str, plain: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if call >= number and name in ("_write", "_make"):
            half(name, plain, arguments)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(*arguments)

    return act


def test_16_wherever_the_disk_fills_up_earlier_commits_are_readable_and_no_half_file_stays(tmp_path: Path) -> None:
    with watched(full_from(10**9)) as names:
        train(TRIAL, tmp_path / "whole", READINGS, save_every=0.0)
    writes = [number for number, name in enumerate(names, 1) if name == "_write"]
    for number in writes:
        root = tmp_path / str(number)
        with watched(full_from(number)), pytest.raises(StoreFailure, match="no space left on device"):
            train(TRIAL, root, READINGS, save_every=0.0)
        assert not list(root.rglob(".*.tmp"))
        there = query.open(root).sql(EVERY).rows
        assert there == WHOLE[: len(there)]
    train(TRIAL, root, READINGS)
    assert query.open(root).sql(EVERY).rows == WHOLE


# --- 17, 20: checkpoints -----------------------------------------------------------------------------


class Death(BaseException):
    """Of the process: no `except` of ours hears of it."""


def save(root: Path, step: int) -> None:
    checkpoint.write(storage(root), step, {"w": torch.full((8,), float(step))}, {"loss": step / 3})


@pytest.mark.parametrize("fault", ["full", "death"])
def test_17_a_disk_that_fills_up_during_a_checkpoint_leaves_the_one_before(tmp_path: Path, fault: str) -> None:
    for step in (1, 2):
        save(tmp_path / "before", step)

    def act(call: int, name: str, plain: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if call == failing:
            half(name, plain, arguments)
            raise Death if fault == "death" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(*arguments)

    failing = 0
    with watched(act) as names:
        save(Path(shutil.copytree(tmp_path / "before", tmp_path / "0")), 3)
    for failing in range(1, len(names) + 1):
        root = Path(shutil.copytree(tmp_path / "before", tmp_path / str(failing)))
        with watched(act), pytest.raises((StoreFailure, Death)):
            save(root, 3)
        found = checkpoint.newest(storage(root))
        assert found is not None
        assert found.step in (2, 3)
        assert found.tensors["w"].tolist() == 8 * [float(found.step)]
        assert found.facts == {"loss": found.step / 3}
        assert fault == "death" or not list(root.rglob(".*.tmp"))
        save(root, 3)  # after space is freed
        found = checkpoint.newest(storage(root))
        assert found is not None
        assert found.step == 3


def test_20_a_flipped_bit_anywhere_in_a_checkpoint_is_found_and_the_one_before_is_used(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    for file in (tmp_path / "step-2.safetensors", tmp_path / "step-2.json"):
        whole = file.read_bytes()
        for place in range(len(whole)):
            harmed = bytearray(whole)
            harmed[place] ^= 1 << place % 8
            file.write_bytes(harmed)
            found = checkpoint.newest(storage(tmp_path))
            assert found is not None
            # What is between words is no damage, nor is a sum that is not found: all else is as it was.
            assert found.step == 1 or (
                file.suffix == ".json" and (found.tensors["w"].tolist(), found.facts) == (8 * [2.0], {"loss": 2 / 3})
            ), f"{file.name}, byte {place}"
        file.write_bytes(whole)


# --- 19, 21, 22: damaged files -----------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A store of three trials of three readings."""
    for seed in range(3):
        flushed(Store(tmp_path), seed=seed).finish(Outcome.FINISHED, 10, {})
    return tmp_path


def sql(root: Path, *words: str) -> Any:
    return bnscale("sql", "select count(*), count(distinct trial) from curve", "--store", root, *words)


@pytest.mark.parametrize("size", [0, 100])
def test_19_a_file_that_is_cut_off_is_ignored_where_no_manifest_names_it_and_named_where_one_does(
    three: Path, size: int
) -> None:
    victim = Store(three).files("curve", {digits(seed=1).id})[0]
    stray = victim.with_name("part-9-a9-00000000.parquet")
    stray.write_bytes(victim.read_bytes()[:size])
    assert sql(three).out.split()[-2:] == ["9", "3"]
    victim.write_bytes(victim.read_bytes()[:size])
    told = sql(three)
    assert (told.code, told.out) == (2, "")
    assert told.err.startswith(f"{victim}: has {size} bytes and its manifest says ")
    assert "--skip-damaged" in told.err
    told = sql(three, "--skip-damaged")
    *_, answer, said = told.out.splitlines()
    assert told.code == 0
    assert answer.split() == ["6", "2"]
    assert said.startswith(f"not read: {victim}: has {size} bytes and its manifest says ")
    assert said.endswith("(3 rows)")
    told = bnscale("verify", "--store", three)
    assert told.code == 1
    assert f"{victim.relative_to(three)}: has {size} bytes and its manifest says" in told.out


@pytest.mark.parametrize("harm", ["cut off", "empty", "no JSON", "missing"])
def test_21_a_damaged_manifest_is_named_and_hides_no_other_trial(three: Path, harm: str) -> None:
    manifest = three / "manifests" / f"{digits(seed=1).id}.json"
    text = manifest.read_text()
    manifest.write_text({"cut off": text[:200], "empty": "", "no JSON": "rm -rf /", "missing": ""}[harm])
    if harm == "missing":
        manifest.unlink()
    told = sql(three)
    assert told.code == 0
    assert told.out.splitlines()[2].split() == ["6", "2"]
    assert (f"not read: manifest {manifest}: is damaged" in told.out) == (harm != "missing")
    if harm != "missing":
        with pytest.raises(Refusal, match=f"^manifest {manifest}: is damaged .* verify --repair writes it anew"):
            Store(three).writer(digits(seed=1), {"more": "end"}, {})
    told = bnscale("verify", "--store", three)
    assert (told.code, manifest.name in told.out) == (1, True)
    bnscale("verify", "--repair", "--store", three)
    assert bnscale("verify", "--store", three).code == 0
    assert sql(three).out.split()[-2:] == ["9", "3"]
    assert json.loads(manifest.read_text())["outcome"] == "finished"


def test_22_a_manifest_of_a_newer_format_is_refused_and_not_half_read(three: Path) -> None:
    manifest = three / "manifests" / f"{digits(seed=1).id}.json"
    newer = json.loads(manifest.read_text()) | {"format": 99, "bnscale": "7.0", "shards": ["x"]}
    manifest.write_text(json.dumps(newer))
    told = sql(three)
    said = f"manifest {manifest}: was made by bnscale 7.0 (format 99); update bnscale"
    assert told.out.splitlines()[2].split() == ["6", "2"]
    assert told.out.splitlines()[3] == f"not read: {said}"
    with pytest.raises(Refusal) as refused:
        Store(three).writer(digits(seed=1), {"more": "end"}, {})
    assert str(refused.value) == said
    assert json.loads(manifest.read_text()) == newer


# --- 23: half a compaction ---------------------------------------------------------------------------


def test_23_a_compaction_killed_at_any_operation_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    def act(call: int, name: str, plain: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if call == deadly:
            half(name, plain, arguments)
            raise Death
        plain(*arguments)

    def end(root: Path) -> int:
        """Three files become one; the number of operations that takes."""
        writer = flushed(Store(root))
        writer.write("curve", [reading(3)])
        with watched(act) as names:
            writer.finish(Outcome.FINISHED, 10, {})
        return len(names)

    deadly = 0
    operations = end(tmp_path / "0")
    assert operations > 6
    outcomes = set()
    for deadly in range(1, operations + 1):
        root = tmp_path / str(deadly)
        with pytest.raises(Death):
            end(root)
        (manifest,) = Store(root).manifests()
        outcomes.add(manifest.outcome)
        assert all(path.exists() for path in Store(root).files("curve"))
        assert steps(root) == list(range(4 if manifest.outcome else 3))
        if manifest.outcome is None:
            writer = Store(root).writer(digits(), {}, {})
            writer.rewind(2)
            for step in (2, 3):
                writer.write("curve", [reading(step)])
            writer.finish(Outcome.FINISHED, 10, {})
            assert steps(root) == [0, 1, 2, 3]
            assert len(list(root.glob("curve/*/*"))) == 1
    assert outcomes == {None, Outcome.FINISHED}
