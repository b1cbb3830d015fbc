"""The schedule, with real Ray and toy trials: what they leave in files is the evidence.

A toy trial takes its `total_steps` in steps of 20 ms, keeps its step in a checkpoint file, and does to itself what its
seed asks for.
"""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from examples import digits
from ray import cloudpickle
from ray._private.node import Node as RayNode
from ray.tune import registry

from bnscale.engine import Gang
from bnscale.schedule.budget import Forecast
from bnscale.schedule.failure import POLICY, Failure, Kind, Policy, Then
from bnscale.schedule.loop import Training
from bnscale.schedule.needs import GIB, Cluster, Node, needs_of
from bnscale.schedule.progress import Watch
from bnscale.schedule.tune import connect, run
from bnscale.schedule.tune.cluster import OWNER, own_folder, sweep
from bnscale.trial import Augmentation, Outcome, Refusal, Trainable, Trial

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not import tests

pytestmark = pytest.mark.timeout(300)  # a worker takes seconds to start, and many on a busy machine

RAISES, DIES, SLOW, DIVERGES, DIES_ALWAYS = 101, 102, 103, 104, 105  # seeds that mean something to the toy


@dataclass(frozen=True)
class Job:
    """As much of train.Job as the schedule and the toy look at; workers then start without the real loop's imports."""

    trial: Trial
    store: str


@dataclass(frozen=True)
class Progress:
    """The fields of train.Progress."""

    step: int
    total: int
    epoch: float
    epochs: float
    loss: float | None
    accuracy: float | None
    outcome: Outcome | None


class Toy:
    """A `Loop` without networks. Every worker appends to <store>/<trial>.<rank>."""

    def run(self, jobs: Sequence[Job], gang: Gang, threads: int, stop: Callable[[], bool]) -> Iterator[list[Progress]]:
        (job,) = jobs
        trial, total = job.trial, job.trial.total_steps
        assert torch.get_num_threads() == threads
        evidence = Path(job.store) / f"{trial.id}.{gang.rank}"
        checkpoint = Path(job.store) / f"{trial.id}.checkpoint"
        first = not evidence.exists()
        step = int(checkpoint.read_text()) if checkpoint.exists() else 0
        told = f"began {step} {os.getpid()} {time.time()} {gc.get_freeze_count()}"
        met: set[int] = set()
        with evidence.open("a") as file:
            print(told, file=file, flush=True)
            while step < total:
                time.sleep(0.02)
                self._meet(job, gang, step, met)
                step += 1
                # Only the worker that does not lead, where there is one.
                if gang.rank == gang.workers - 1 and step == 3:
                    if trial.seed == RAISES:
                        raise ArithmeticError("the toy broke")
                    if trial.seed == DIES_ALWAYS or (trial.seed == DIES and first):
                        os.kill(os.getpid(), signal.SIGKILL)
                if gang.leads:
                    checkpoint.write_text(str(step))
                if stop():
                    print(f"saved {step}", file=file)
                    return
                accuracy = trial.lr * step / total
                yield [Progress(step, total, step / 2, total / 2, 1.0, accuracy, None)]
            print(f"ended {step}", file=file)
        outcome = Outcome.DIVERGED if trial.seed == DIVERGES else Outcome.FINISHED
        yield [Progress(step, total, step / 2, total / 2, 1.0, trial.lr, outcome)]

    def fail(self, job: Job, failure: Failure) -> None:
        with (Path(job.store) / f"{job.trial.id}.failed").open("a") as file:
            print(failure.kind, failure.text, file=file)

    def log(self, job: Job, text: str) -> str:
        path = Path(job.store) / f"{job.trial.id}.log"
        with path.open("a") as file:
            print(text, file=file)
        return str(path)

    def ready(self, threads: int) -> Gang:
        return Training().ready(threads)

    def host(self, address: str, workers: int) -> tuple[str, int]:
        return address, 1

    def join(self, rank: int, workers: int, address: str, port: int, device: torch.device) -> Gang:
        return Gang(rank, workers, torch.device("cpu"))

    @staticmethod
    def _meet(job: Job, gang: Gang, step: int, met: set[int]) -> None:
        """A collective: waits for the other workers, and breaks when one that it `met` in this life is gone.

        What a worker of an earlier life left is no broken connection: its successor may only be late.
        """
        folder = Path(job.store)
        (folder / f"{job.trial.id}.at.{gang.rank}").write_text(f"{step} {os.getpid()}")
        for other in set(range(gang.workers)) - {gang.rank}:
            while True:
                try:
                    at, pid = map(int, (folder / f"{job.trial.id}.at.{other}").read_text().split())
                except (OSError, ValueError):
                    at = pid = -1
                there = pid > 0 and psutil.pid_exists(pid)
                if there:
                    met.add(pid)
                if there and at >= step:
                    break
                if pid in met and not there:
                    raise RuntimeError("connection closed by peer")
                time.sleep(0.005)


def job(folder: Path, seed: int, steps: int = 4, lr: float = 0.5, trainable: Trainable = Trainable.BN) -> Job:
    trial = digits(
        validation=137,
        augmentation=Augmentation.NONE,
        trainable=trainable,
        batch=650,  # two steps an epoch
        norm_batch=650,
        steps=steps,
        lr=lr,
        milestones=(),
        weight_decay=0.0,
        seed=seed,
    )
    return Job(trial, str(folder))


def foresee(jobs: list[Job]) -> dict[str, Forecast]:
    """The higher the learning rate, the longer the trial."""
    return {each.trial.id: Forecast(seconds=100 * each.trial.lr, memory=GIB // 2, on_gpu=0, disk=0) for each in jobs}


class Listener(Watch):
    """Keeps every word."""

    def __init__(self, jobs: list[Job]) -> None:
        super().__init__({trial: each.seconds for trial, each in foresee(jobs).items()})
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def study(
    jobs: list[Job], cluster: Cluster, workers: int, threads: int, rivals: dict[str, str] | None = None
) -> tuple[dict[str, Outcome | None], list[str]]:
    with Listener(jobs) as watch:
        outcomes = run(
            jobs,
            foresee(jobs),
            cluster,
            workers=workers,
            threads=threads,
            rivals=rivals,
            watch=watch,
            mend="the same again",
            loop=Toy(),
        )
    return {trial: ending.outcome for trial, ending in outcomes.items()}, watch.said


def told(each: Job, rank: int = 0) -> list[list[str]]:
    """What a worker of a trial wrote, in words."""
    path = Path(each.store) / f"{each.trial.id}.{rank}"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def failure(each: Job) -> str:
    return (Path(each.store) / f"{each.trial.id}.failed").read_text()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with connect("local") as found:
        yield found


def test_a_cluster_of_our_own_starts_nothing_that_one_machine_has_no_use_for(cluster: Cluster) -> None:
    here = {Path(word).name for each in psutil.Process().children(recursive=True) for word in each.cmdline()}
    assert {"raylet", "gcs_server"} <= here
    assert not {"monitor.py", "log_monitor.py", "dashboard.py"} & here
    for name in ("start_monitor", "start_log_monitor", "start_api_server"):
        assert getattr(RayNode, name).__module__ == RayNode.__module__  # other clusters of this process have them


# --- one worker a trial ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run, one trial at a time: trials that end well, one that raises, one killed in a step."""
    folder = tmp_path_factory.mktemp("alone")
    jobs = {
        "short": job(folder, 1, lr=0.1),
        "long": job(folder, 2, lr=0.9),
        "middle": job(folder, 3, lr=0.5),
        "raises": job(folder, RAISES, lr=0.4),
        "diverges": job(folder, DIVERGES, lr=0.3),
        "dies": job(folder, DIES, steps=6, lr=0.05),
    }
    before = set(Path.cwd().iterdir())
    asked: list[str] = []
    ask = registry._internal_kv_get
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_internal_kv_get", lambda key: (asked.append(key), ask(key))[1])
        outcomes, said = study(list(jobs.values()), cluster, workers=1, threads=cluster.cpus)
    littered = set(Path.cwd().iterdir()) - before
    return jobs | {
        "outcomes": {name: outcomes[each.trial.id] for name, each in jobs.items()},
        "said": said,
        "littered": littered,
        "asked": asked,
    }


def test_every_trial_ends_once_and_says_how(alone: dict[str, Any]) -> None:
    assert alone["outcomes"] == {
        "short": Outcome.FINISHED,
        "long": Outcome.FINISHED,
        "middle": Outcome.FINISHED,
        "raises": Outcome.FAILED,
        "diverges": Outcome.DIVERGED,
        "dies": Outcome.FINISHED,
    }
    for name in ("short", "long", "middle", "diverges"):
        assert [line[0] for line in told(alone[name])] == ["began", "ended"], name


def test_the_longest_trial_begins_first(alone: dict[str, Any]) -> None:
    began = {name: float(told(alone[name])[0][3]) for name in alone["outcomes"]}
    assert sorted(began, key=lambda name: began[name]) == ["long", "middle", "raises", "diverges", "short", "dies"]


def test_a_warm_worker_serves_trial_after_trial(alone: dict[str, Any]) -> None:
    pids = {told(alone[name])[0][2] for name in alone["outcomes"]}
    assert len(pids) == 1
    assert int(pids.pop()) != os.getpid()


def test_a_worker_keeps_what_it_has_after_its_first_trial_out_of_what_is_searched_for_garbage(
    alone: dict[str, Any],
) -> None:
    apart = [int(told(alone[name])[0][4]) for name in ("long", "middle", "raises", "diverges", "short", "dies")]
    assert apart[0] == 0
    assert apart[1] > 10_000
    assert apart[1:] == sorted(apart[1:], reverse=True), "what later trials leave would be kept for ever"


def test_the_cluster_is_not_asked_for_every_trial_what_is_trained(alone: dict[str, Any]) -> None:
    assert 1 <= len(alone["asked"]) < len(alone["outcomes"])


def test_an_error_of_the_code_is_recorded_and_not_tried_again(alone: dict[str, Any]) -> None:
    assert len(told(alone["raises"])) == 1
    assert failure(alone["raises"]).count("ArithmeticError: the toy broke") == 1


def test_a_killed_worker_s_trial_goes_on_from_its_checkpoint(alone: dict[str, Any]) -> None:
    (_, at, first, *_), (_, again, second, *_), ended = told(alone["dies"])
    assert (at, again) == ("0", "2")  # it died in its third step
    assert first != second
    assert ended == ["ended", "6"]
    assert sum("died" in line for line in alone["said"]) == 1


def test_a_run_leaves_nothing_in_the_working_directory(alone: dict[str, Any]) -> None:
    assert not alone["littered"]


def test_successive_halving_stops_the_worse_trial_of_its_own_group_only(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = {**POLICY, Kind.WORKER: Policy("a worker died", 1, Then.FAILED)}
    monkeypatch.setattr("bnscale.schedule.failure.POLICY", impatient)
    jobs = {
        "best": job(tmp_path, 1, steps=120, lr=0.9),
        "worse": job(tmp_path, 2, steps=120, lr=0.3),
        "other group": job(tmp_path, 3, steps=120, lr=0.1),
        "keeps dying": job(tmp_path, DIES_ALWAYS, lr=0.05),
    }
    rivals = {each.trial.id: "one" if name in ("best", "worse") else name for name, each in jobs.items()}
    outcomes, _ = study(list(jobs.values()), cluster, workers=1, threads=cluster.cpus, rivals=rivals)
    assert {name: outcomes[each.trial.id] for name, each in jobs.items()} == {
        "best": Outcome.FINISHED,
        "worse": None,
        "other group": Outcome.FINISHED,
        "keeps dying": Outcome.FAILED,
    }
    assert told(jobs["worse"])[-1][0] == "saved"
    assert "a worker died 2 times" in failure(jobs["keeps dying"])


# --- gangs ----------------------------------------------------------------------------------------


def test_a_gang_is_raised_once_dies_whole_and_is_raised_again(cluster: Cluster, tmp_path: Path) -> None:
    if cluster.cpus < 2:
        pytest.skip("a gang of two needs two CPUs")
    jobs = {
        "first": job(tmp_path, 1, lr=0.9),
        "second": job(tmp_path, 2, lr=0.8),
        "dies": job(tmp_path, DIES, steps=6, lr=0.7),
        "raises": job(tmp_path, RAISES, lr=0.6),
        "after": job(tmp_path, 3, lr=0.5),
    }
    outcomes, _ = study(list(jobs.values()), cluster, workers=2, threads=cluster.cpus // 2)
    assert {name: outcomes[each.trial.id] for name, each in jobs.items()} == {
        "first": Outcome.FINISHED,
        "second": Outcome.FINISHED,
        "dies": Outcome.FINISHED,
        "raises": Outcome.FAILED,
        "after": Outcome.FINISHED,
    }
    pids = {
        name: [{line[2] for line in told(each, rank) if line[0] == "began"} for rank in (0, 1)]
        for name, each in jobs.items()
    }
    lead, member = pids["first"]
    assert lead != member
    assert pids["first"] == pids["second"]  # warm
    assert [len(each) for each in pids["dies"]] == [2, 2]  # the leading worker was replaced too
    assert [line[1] for line in told(jobs["dies"]) if line[0] == "began"] in (["0", "2"], ["0", "3"])
    assert failure(jobs["raises"]).count("ArithmeticError: the toy broke") == 1
    assert pids["after"] != pids["raises"]  # a broken gang serves nobody
    everyone = {int(pid) for both in pids.values() for rank in both for pid in rank}
    assert not _alive(everyone)


# --- the driver -----------------------------------------------------------------------------------


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_tune import SLOW, Toy, connect, foresee, job, run
from bnscale.schedule.progress import Watch
from pathlib import Path
jobs = [job(Path(sys.argv[2]), SLOW, steps=1000, lr=0.9), job(Path(sys.argv[2]), 1, lr=0.1)]
with connect("local") as cluster, Watch({trial: f.seconds for trial, f in foresee(jobs).items()}) as watch:
    try:
        run(jobs, foresee(jobs), cluster, workers=1, threads=cluster.cpus, rivals=None, watch=watch,
            mend="do it again", loop=Toy())
    except KeyboardInterrupt:
        code = 130
sys.exit(code)
"""


@contextlib.contextmanager
def driver(folder: Path, began: int) -> Iterator[tuple[subprocess.Popen[str], set[int]]]:
    """A driver in its own process group, as a terminal has it, and all its processes, when its trial has begun."""
    slow = job(folder, SLOW, steps=1000, lr=0.9)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(Path(__file__).parent), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    family = {process.pid}
    try:
        deadline = time.monotonic() + 100
        while len([line for line in told(slow) if line[0] == "began"]) < began:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(0.3)
        # Two idle helpers of Ray's try for a minute to report the death of the others.
        children = psutil.Process(process.pid).children(recursive=True)
        family |= {each.pid for each in children if not each.name().endswith("Agent")}
        assert len(family) > 3  # Ray's servers and a worker
        yield process, family
    finally:
        for pid in _alive(family):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def _alive(pids: set[int]) -> set[int]:
    """Those still there after a while."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        here = set()
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    here.add(pid)
        if not here:
            return here
        time.sleep(0.2)
    return here


def test_after_the_death_of_the_driver_nothing_runs_on_and_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    slow = job(tmp_path, SLOW, steps=1000, lr=0.9)
    with driver(tmp_path, began=1) as (process, family):
        process.kill()
        process.wait()
        assert not _alive(family)
    with driver(tmp_path, began=2) as (process, family):
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert not _alive(family)
    begins = [int(line[1]) for line in told(slow) if line[0] == "began"]
    assert len(begins) == 2
    assert begins[1] > 0
    assert told(slow)[-1][0] == "saved"
    assert int(told(slow)[-1][1]) > begins[1]
    assert "stopping: saving checkpoints" in output
    assert "do it again" in output
    assert errors == ""  # Ray's own noise is silenced
    assert "ray" not in output.lower()


# --- what is refused ------------------------------------------------------------------------------


def test_an_address_where_nobody_answers_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    with (
        pytest.raises(Refusal, match=rf"address 127\.0\.0\.1:{free}: no Ray cluster answers.*ray start"),
        connect(f"127.0.0.1:{free}"),
    ):
        pass
    with pytest.raises(Refusal, match=r"address ray://somewhere:10001: .*host:port"), connect("ray://somewhere:10001"):
        pass


def test_a_trial_that_fits_no_part_of_the_cluster_is_refused_before_anything_starts(tmp_path: Path) -> None:
    small = Cluster("", True, None, [Node(2, 0, 4 * GIB), Node(2, 0, 4 * GIB)])
    each = job(tmp_path, 1)

    def ask(workers: int, threads: int, memory: int) -> None:
        forecast = {each.trial.id: Forecast(seconds=1.0, memory=memory, on_gpu=0, disk=0)}
        run(
            [each],
            forecast,
            small,
            workers=workers,
            threads=threads,
            rivals=None,
            watch=Listener([each]),
            mend="",
            loop=Toy(),
        )

    with pytest.raises(Refusal, match=rf"{each.trial.id}: needs 1 worker of 1 CPUs and 5.0 GiB"):
        ask(workers=1, threads=1, memory=5 * GIB)
    with pytest.raises(Refusal, match=r"needs 1 worker of 3 CPUs .* the cluster has 2 x \(2 CPUs, 0 GPUs, 4.0 GiB\)"):
        ask(workers=1, threads=3, memory=GIB)
    with pytest.raises(Refusal, match="needs 5 workers"):
        ask(workers=5, threads=1, memory=GIB)
    assert not list(tmp_path.iterdir())


def test_what_trains_nothing_takes_one_worker_and_memory_makes_few_classes(tmp_path: Path) -> None:
    gang, alone = job(tmp_path, 1), job(tmp_path, 2, trainable=Trainable.NONE)
    forecasts = {
        gang.trial.id: Forecast(seconds=1.0, memory=3 * GIB, on_gpu=0, disk=0),
        alone.trial.id: Forecast(seconds=1.0, memory=GIB // 3, on_gpu=0, disk=0),
    }

    def needs(memory: int, gpus: int) -> list[tuple[int, int, float]]:
        found = needs_of([gang, alone], forecasts, Cluster("", True, None, [Node(4, gpus, memory * GIB)]), 2, 2)
        return [
            (found[each.trial.id].workers, found[each.trial.id].gpus, found[each.trial.id].memory / GIB)
            for each in (gang, alone)
        ]

    assert needs(memory=64, gpus=0) == [(2, 0, 4), (1, 0, 4)]  # plenty: one class, so that all share warm workers
    assert needs(memory=64, gpus=2) == [(2, 1, 4), (1, 1, 4)]
    forecasts[gang.trial.id] = Forecast(seconds=1.0, memory=13 * GIB, on_gpu=0, disk=0)
    assert needs(memory=40, gpus=0) == [(2, 0, 16), (1, 0, 16)]
    assert needs(memory=30, gpus=0) == [(2, 0, 13), (1, 0, 13)]  # rounded up, it would not fit


def test_a_cluster_that_grows_is_asked_for_the_gpus_that_it_may_bring(tmp_path: Path) -> None:
    each = job(tmp_path, 1)
    forecasts = {each.trial.id: Forecast(seconds=1.0, memory=3 * GIB, on_gpu=GIB, disk=0)}
    head, small, large = Node(0, 0, 4 * GIB), Node(4, 1, 12 * GIB), Node(8, 2, 30 * GIB)
    head_alone = Cluster("", False, [head, small, small, large], [head])
    assert needs_of([each], forecasts, head_alone, 1, 2)[each.trial.id].gpus == 1
    assert head_alone.slots(2, 3 * GIB) == 4
    assert head_alone.slots(8, 0) == 1  # no node lends another its cores
    assert Cluster("", False, [head, *[Node(8, 0, 12 * GIB)] * 2], [head]).slots(2, 3 * GIB) == 8


def test_a_gang_that_no_machine_of_an_autoscaler_has_room_for_is_refused_before_it_waits(tmp_path: Path) -> None:
    each = job(tmp_path, 1)
    forecasts = {each.trial.id: Forecast(seconds=1.0, memory=3 * GIB, on_gpu=GIB, disk=0)}
    growing = Cluster("", False, [Node(0, 0, 4 * GIB), Node(4, 1, 12 * GIB)], [Node(0, 0, 4 * GIB)])
    with pytest.raises(Refusal, match=r"the cluster may have .*1 x \(4 CPUs, 1 GPUs, 12.0 GiB\)"):
        needs_of([each], forecasts, growing, 2, 2)


def test_only_folders_that_say_they_are_ours_and_whose_process_is_gone_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    foreign = tmp_path / "bnscale-4999999-results"
    foreign.mkdir()
    ours = own_folder(str(tmp_path))
    left = own_folder(str(tmp_path))
    (left / OWNER).write_text(f"{socket.gethostname()} 4999999 1.0")
    reused = own_folder(str(tmp_path))  # another process has the number now
    (reused / OWNER).write_text(f"{socket.gethostname()} {os.getpid()} 1.0")
    elsewhere = own_folder(str(tmp_path))
    (elsewhere / OWNER).write_text("another-host 4999999 1.0")
    sweep()
    assert set(tmp_path.iterdir()) == {foreign, ours, elsewhere}
