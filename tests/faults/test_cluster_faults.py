"""Clusters that are not what a study needs: other versions, no token, a store that one node sees, nodes that never
come; and grids without end. With real Ray, started here."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from asking import Told, bnscale, study_file, train
from examples import digits
from ground import Ground, alone, ground

from bnscale import doctor
from bnscale.doctor import State
from bnscale.lease import Unseen
from bnscale.schedule import tune
from bnscale.schedule.budget import Forecast
from bnscale.schedule.needs import GIB, Cluster, Node, needs_of
from bnscale.schedule.turns import take
from bnscale.storage import Folder, StoreFailure, check, storage
from bnscale.study.run import Way, _check_size
from bnscale.train import Job
from bnscale.trial import Refusal

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(300)  # processes that import Ray take seconds to start, and many on a busy machine


@pytest.fixture(scope="module")
def two() -> Iterator[Ground]:
    folder = Path(tempfile.mkdtemp(prefix="bns", dir="/tmp"))
    try:
        with ground(folder) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def apart(two: Ground) -> Path:
    if two.apart is None:
        pytest.skip("nobody may mount here, not even in a namespace of its own")
    return two.apart


def lines(out: str, check: str) -> list[str]:
    """What a table of the doctor's says of one check, each finding on one line."""
    told: list[str] = []
    for line in out.splitlines():
        if line[:1].strip():
            told.append(line)
        elif told:
            told[-1] += " " + line.strip()
    return [" ".join(each.split()) for each in told if each.split()[:1] == [check]]


@pytest.fixture(scope="module")
def examined(two: Ground) -> tuple[int, str]:
    """`bnscale doctor --cluster`, where the store is one folder for one node and another for the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        told = bnscale("doctor", "--cluster", "--address", two.address, "--store", two.apart or two.shared)
    assert told.err == ""
    return told.code, told.out


class Unlucky(NamedTuple):
    told: Told
    never: int  # how `ray start` ended on the node that did not come


@pytest.fixture(scope="module")
def unlucky(two: Ground, tmp_path_factory: pytest.TempPathFactory) -> Unlucky:
    """A study of six trials. A third node's Ray is turned away meanwhile, for a token of its own; and of the two that
    are there one sees another store, as if it had joined when all had been asked."""
    words = [Path(sys.executable).with_name("ray"), "start", f"--address={two.address}", "--disable-usage-stats"]
    environment = two.environment | {"RAY_AUTH_TOKEN": "f" * 64}
    # Of some seconds each: one node alone must not be through with them while a worker starts on the other.
    file = study_file(tmp_path_factory.mktemp("study"), seeds="range(6)", changes='{"steps": 400}')
    store = (two.apart or two.shared) / "late"
    with (
        subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as never,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(tune, "check_sight", lambda store: None)
        told = bnscale("study", file, "--preset", "laptop", "--address", two.address, "--store", store)
        return Unlucky(told, never.wait(120))


# --- 14, 25: what the doctor sees ------------------------------------------------------------------


def test_14_the_doctor_warns_of_a_node_whose_clock_is_ten_minutes_ahead(examined: tuple[int, str]) -> None:
    found = lines(examined[1], "clock")
    assert len(found) == 2
    assert " ok within 60 s of the driver's" in found[0]
    assert " warning 600 s ahead of the driver's: times mislead, results do not; `timedatectl" in found[1]


def test_25_a_store_that_one_node_sees_is_found_and_named(examined: tuple[int, str], apart: Path) -> None:
    code, out = examined
    assert code == 1
    whole, seen, blind = lines(out, "store")
    assert f" ok {apart}: write " in whole
    assert " ok each sees what the others write" in seen
    assert " would fail sees nothing of what is written elsewhere; mount the same folder there" in blind
    assert {each.split()[2] for each in (seen, blind)} == {each.split()[2] for each in lines(out, "clock")}
    assert out.rstrip().endswith("a study would fail here: 1 thing to mend")
    assert list(apart.glob("doctor-*")) == []


def test_the_doctor_looks_at_every_node_and_raises_a_gang_over_all(examined: tuple[int, str]) -> None:
    out = examined[1]
    assert lines(out, "cluster")[0].endswith("who has no token is refused")
    for each in ("python", "ray", "torch", "duckdb", "deepspeed", "bnscale", "token"):
        assert [line.split()[1:4] for line in lines(out, each)] == [["all", "2", "ok"]], each
    assert lines(out, "gang")[0].startswith("gang ok 2 processes on 2 nodes over gloo, ")


def test_25_a_study_does_not_start_on_a_store_that_one_node_sees(two: Ground, apart: Path, tmp_path: Path) -> None:
    told = bnscale("study", study_file(tmp_path), "--preset", "laptop", "--address", two.address, "--store", apart)
    assert told.code == 2
    assert told.err.startswith(f"store {apart}: ")
    assert "sees nothing of what is written elsewhere; mount the same folder on every node, or give a" in told.err
    assert f"`bnscale doctor --cluster --store {apart}` shows each" in told.err
    assert len(told.err.splitlines()) == 1
    assert list((apart / "manifests").iterdir()) == []


def test_25_a_trial_goes_elsewhere_from_a_node_that_joined_later_and_sees_another_store(
    unlucky: Unlucky, apart: Path
) -> None:
    assert "its node does not see the store; " in unlucky.told.out
    assert "shows nothing of the driver that writes there; mount the same folder on every node" in unlucky.told.out
    assert "6 done, 0 running, 0 failed" in unlucky.told.out
    assert len(storage(apart / "late").list("manifests")) == 6


def test_25_where_nothing_is_seen_of_the_driver_nothing_is_made(tmp_path: Path) -> None:
    job = Job(digits(), {}, str(tmp_path / "results"), data="", commit=None, zero=0, save_every=30.0)
    with pytest.raises(Unseen, match="shows nothing of the driver that writes there; mount the same folder"):
        take(job, "somebody", halving=False)
    assert list(tmp_path.iterdir()) == []


class Hasty(Folder):
    """Two steps where there must be one, as a file system does that knows no links."""

    def create(self, key: str, content: bytes) -> None:  # type: ignore[override]
        self.write(key, content)


class Stale(Folder):
    """A file system that goes on showing what it once read."""

    def read(self, key: str) -> bytes:
        kept = self.__dict__.setdefault("kept", {})
        return kept.setdefault(key, super().read(key))


class Torn(Folder):
    """A file system on which a rename is not allowed."""

    def write(self, key: str, content: bytes) -> None:
        raise StoreFailure(f"{self.path(key)}: cannot be written (operation not supported)")


@pytest.mark.parametrize(
    ("kind", "lacks", "said"),
    [
        (Hasty, "create", "two drivers must not share it"),
        (Stale, "replace", "choose another with --store"),
        (Torn, "write", "choose another with --store"),
    ],
)
def test_25_a_store_that_breaks_the_rules_is_found_by_trying_and_refused(
    kind: type[Folder], lacks: str, said: str, tmp_path: Path
) -> None:
    found = {each.said.split(": ")[1]: each for each in doctor.proved(kind(tmp_path))}
    assert found[lacks].state is State.FAILS
    assert said in found[lacks].said
    with pytest.raises(Refusal, match=rf"^store {tmp_path}: .*--store"):
        check(kind(tmp_path))


# --- 18: no room, no right -------------------------------------------------------------------------


@pytest.mark.usefixtures("apart")
def test_18_a_full_disk_is_one_message_with_the_path(tmp_path: Path) -> None:
    place = tmp_path / "full"
    place.mkdir()
    script = (
        "import sys; from bnscale.storage import check, storage; from bnscale.trial import Refusal\n"
        "try: check(storage(sys.argv[1]))\nexcept Refusal as refusal: print(refusal); raise SystemExit(2)"
    )
    ended = subprocess.run([*alone(place, "32k"), sys.executable, "-c", script, place], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == f"store {place}: cannot be written (no space left on device); choose another with --store\n"


def test_18_a_store_without_the_right_to_write_is_one_message_with_its_path(tmp_path: Path) -> None:
    told = bnscale("study", study_file(tmp_path), "--preset", "laptop", "--store", "/proc/results")
    assert told.code == 2
    assert told.err.startswith("store /proc/results: cannot be written (")
    assert len(told.err.splitlines()) == 1
    [found] = doctor.of_store(storage("/proc/results"))
    assert found.state is State.FAILS
    assert found.said.startswith("/proc/results: cannot be made (")


def test_18_a_quota_that_is_used_up_stops_a_trial_at_its_first_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def refuse(path: Path, content: bytes) -> None:
        tried.append(path)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    train(digits(seed=1), tmp_path)  # what it costs to find out comes before
    monkeypatch.setattr("bnscale.storage._write", refuse)
    with pytest.raises(StoreFailure, match=rf"^{tmp_path}/.*: cannot be written \(disk quota exceeded\); .*run again"):
        train(digits(seed=2), tmp_path)
    assert len(tried) == 1


# --- 39: a grid without end ------------------------------------------------------------------------

MANY = {
    "seed": range(1000),
    "weight_decay": [f"{n / 10000:.4f}" for n in range(100)],
    "momentum": [f"{n / 200:.3f}" for n in range(100)],
}


def set_to(axes: dict[str, object]) -> list[str]:
    return [word for name, values in axes.items() for word in ("--set", f"{name}={','.join(map(str, values))}")]  # type: ignore[call-overload]


def test_39_ten_million_trials_are_counted_and_costed_and_never_built(tmp_path: Path) -> None:
    file = study_file(tmp_path)
    bnscale("study", file, "plan", "--preset", "laptop", "--store", tmp_path)  # what is imported and timed once
    tracemalloc.start()
    told = bnscale("study", file, "plan", "--preset", "laptop", *set_to(MANY), "--store", tmp_path / "results")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told.code == 0
    assert told.out.startswith("tiny, preset laptop: 10,000,000 trials, about ")
    assert " hours of one worker and " in told.out
    assert peak < 50 * 2**20


def test_39_more_than_five_thousand_trials_are_trained_only_with_yes(tmp_path: Path) -> None:
    file = study_file(tmp_path)
    rest = ["--preset", "laptop", "--store", tmp_path / "results"]
    for axes, also in [(MANY, ", and more than 100,000 not at all"), (MANY | {"momentum": [0.5]}, "")]:
        told = bnscale("study", file, *rest, *set_to(axes))
        assert told.code == 2
        assert told.err.startswith(f"grid: has {'10,000,000' if also else '100,000'} trials, about ")
        assert f"; more than 5,000 are trained only with --yes{also}; narrow it with --set" in told.err
    told = bnscale("study", file, *rest, *set_to(MANY), "--yes")
    assert told.code == 2
    assert not (tmp_path / "results").exists()


def test_39_yes_goes_on_to_be_said_by_the_command_that_resumes() -> None:
    assert Way(yes=True).words == ["--yes"]


@pytest.mark.parametrize("way", [{"max_hours": math.inf}, {"max_hours": math.nan}, {"save_every": math.inf}])
def test_a_number_without_end_is_refused(way: dict[str, float]) -> None:
    with pytest.raises(Refusal, match=r"^--(max-hours|save-every) (inf|nan): "):
        Way(**way)  # type: ignore[arg-type]


def test_who_has_no_room_on_a_growing_cluster_hears_what_it_may_grow_to() -> None:
    growing = Cluster("", False, [Node(2, 0, GIB), Node(8, 1, GIB)], [Node(2, 0, GIB)])
    with pytest.raises(Refusal, match="the cluster may have .*1 x .8 CPUs and 1 GPUs"):
        _check_size(Way(workers_per_trial=4), growing)


# --- 45: a cluster that does not let us in ----------------------------------------------------------


def refused(two: Ground, home: Path, *, drop: tuple[str, ...] = (), **variables: str) -> str:
    """What `bnscale doctor --cluster` says in another environment; one line, exit code 2."""
    environment = {name: value for name, value in two.environment.items() if name not in drop}
    script = "import sys; from bnscale.cli import main; sys.argv[0] = 'bnscale'; main()"
    ended = subprocess.run(
        [sys.executable, "-c", script, "doctor", "--cluster", "--address", two.address, "--store", str(home)],
        env=environment | {"HOME": str(home)} | variables,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""
    return ended.stderr.removeprefix(f"address {two.address}: ")


TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE")


def test_45_without_a_token_the_message_says_where_from_to_fetch_it(two: Ground, tmp_path: Path) -> None:
    said = refused(two, tmp_path, drop=TOKEN)
    assert said.startswith(
        f"the cluster asks for a token and there is none in {tmp_path}/.ray/auth_token; from its head: "
    )
    assert "scp -p 127.0.0.1:.ray/auth_token ~/.ray/" in said


def test_45_a_wrong_token_is_named_by_where_it_came_from(two: Ground, tmp_path: Path) -> None:
    said = refused(two, tmp_path, RAY_AUTH_TOKEN="0" * 64)
    assert said.startswith("the token in RAY_AUTH_TOKEN is not the cluster's; from its head: ")
    assert said.endswith(", and `unset RAY_AUTH_TOKEN`\n")


def test_45_a_mode_that_keeps_the_token_back_is_named(two: Ground, tmp_path: Path) -> None:
    said = refused(two, tmp_path, RAY_AUTH_MODE="disabled")
    assert said == "the cluster asks for a token and RAY_AUTH_MODE=disabled keeps it back; `unset RAY_AUTH_MODE`\n"


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"ray_version": "2.59.1"}, "the cluster runs Ray 2.59.1 and Python {python} and this process Ray {ray} and "),
        ({"python_version": "3.10.2"}, "the cluster runs Ray {ray} and Python 3.10.2 and this process Ray {ray} and "),
    ],
)
def test_45_a_cluster_of_another_version_is_refused_with_both_versions(
    two: Ground, theirs: dict[str, str], said: str, tmp_path: Path
) -> None:
    import platform

    import ray
    from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
    from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
    from ray._raylet import GcsClient

    client = GcsClient(address=two.address)
    whole = client.internal_kv_get(CLUSTER_METADATA_KEY, namespace=KV_NAMESPACE_CLUSTER)
    other = json.dumps(json.loads(whole) | theirs).encode()  # as a head of that version would have said
    client.internal_kv_put(CLUSTER_METADATA_KEY, other, True, KV_NAMESPACE_CLUSTER)
    try:
        told = bnscale(
            "study", study_file(tmp_path), "--preset", "laptop", "--address", two.address, "--store", tmp_path
        )
    finally:
        client.internal_kv_put(CLUSTER_METADATA_KEY, whole, True, KV_NAMESPACE_CLUSTER)
    assert told.code == 2
    own = {"ray": ray.__version__, "python": platform.python_version()}
    assert told.err.startswith(f"address {two.address}: {said.format(**own)}")
    assert "`make clean setup PYTHON=python3.10`" in told.err or "set its nodes up with this copy" in told.err


def test_45_nothing_installed_and_too_old_a_ray_are_one_message(tmp_path: Path) -> None:
    notes = tmp_path / "ray-2.9.3.dist-info"
    notes.mkdir()
    (notes / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.9.3\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    words = [sys.executable, "-S", str(ROOT / "studies" / "deep_linear.py"), "plan"]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "ray 2.9.3 is too old, 2.60.0 is needed; " in ended.stderr
    assert "torch, " in ended.stderr
    assert f"are not installed; run `make -C {ROOT} setup`" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_45_without_any_cluster_the_doctor_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    told = bnscale("doctor", "--cluster")
    assert told.code == 2
    assert told.err.startswith("address: no Ray cluster runs on this machine; name one with --address host:port, or ")


def test_a_gang_larger_than_any_node_has_room_for_is_refused_with_what_there_is() -> None:
    nodes = [Node(cpus=8, gpus=1, memory=32 * GIB)] * 2
    job = Job(digits(), {}, "", data="", commit=None, zero=0, save_every=30.0)
    forecasts = {job.trial.id: Forecast(seconds=1.0, memory=GIB, on_gpu=GIB, disk=1)}
    with pytest.raises(Refusal, match=r"needs 3 workers of 1 CPUs, 1 GPU .*the cluster has 2 x \(8 CPUs, 1 GPUs"):
        needs_of([job], forecasts, Cluster("here:1", False, None, nodes), workers=3, threads=1)


@pytest.mark.parametrize(
    ("words", "fits"), [(["4"], "--workers-per-trial 2"), (["1", "--threads", "2"], "--threads 1")]
)
def test_a_gang_that_no_part_of_a_cluster_has_room_for_is_told_the_largest_that_fits(
    two: Ground, words: list[str], fits: str, tmp_path: Path
) -> None:
    rest = ["--preset", "laptop", "--address", two.address, "--store", two.shared / "large"]
    told = bnscale("study", study_file(tmp_path), *rest, "--workers-per-trial", *words)
    assert told.code == 2
    assert f"the cluster has 2 x (1 CPUs and 0 GPUs); at most {fits} fits; " in told.err
    assert len(told.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("place", "wrong", "right"),
    [
        ((), "max_wokers", "max_workers"),
        (("provider",), "regoin", "region"),
        (("auth",), "ssh_usr", "ssh_user"),
        (("available_node_types", "head"), "min_worker", "min_workers"),
    ],
)
def test_a_cluster_file_with_an_unknown_key_is_refused_with_the_nearest_known(
    place: tuple[str, ...], wrong: str, right: str, tmp_path: Path
) -> None:
    whole = yaml.safe_load((ROOT / "cluster" / "ray_cluster.yaml").read_text())
    part = whole
    for key in place:
        part = part[key]
    part[wrong] = 1
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(whole))
    told = bnscale("doctor", "--yaml", file)
    assert told.code == 2
    where = ".".join(place) or "a cluster file"
    assert (
        told.err
        == f"{file}: {where} has no key {wrong}; did you mean {right}? Mend it, then `bnscale doctor --yaml {file}`\n"
    )


@pytest.mark.parametrize("name", ["ray_cluster.yaml", "gcp.yaml", "local.yaml"])
def test_our_own_cluster_files_have_nothing_left_but_what_is_the_users_to_fill_in(name: str) -> None:
    told = bnscale("doctor", "--yaml", ROOT / "cluster" / name)
    assert told.code == 1
    assert told.err == ""
    assert "Ray knows all of it; still to fill in: " in " ".join(told.out.split())


# --- 46: a node that never comes --------------------------------------------------------------------


def test_46_a_set_up_that_fails_ends_with_the_last_lines_of_what_failed(tmp_path: Path) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    for name, body in {
        "make": 'for n in $(seq 30); do echo "line $n"; done; echo "no such mirror" >&2; exit 7'
    }.items():
        (fake / name).write_text(f"#!/bin/sh\n{body}\n")
        (fake / name).chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{fake}:{Path(sys.executable).parent}:/usr/bin:/bin"}
    ended = subprocess.run(
        ["bash", ROOT / "cluster" / "node.sh", "setup"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 7
    first, *rest = ended.stderr.splitlines()
    assert "setup LOCK=cluster/requirements.lock` failed with exit status 7; its last lines:" in first
    assert rest[-1].strip() == "no such mirror"
    assert rest[-2].strip() == "line 30"
    assert len(rest) <= 20


def test_46_a_study_goes_on_without_the_node_that_never_came(unlucky: Unlucky) -> None:
    assert unlucky.never != 0
    assert (unlucky.told.code, unlucky.told.err) == (0, "")
    assert "6 done, 0 running, 0 failed" in unlucky.told.out
