"""Faults that befall workers and training, by the rows of their table: real Ray, and toy trials where the loop is not
the question.

A toy trial does to itself what its seed asks for, the first time; a real one trains digits.
"""

import contextlib
import errno
import io
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import psutil
import pytest
import ray
import test_tune
import torch
from examples import digits
from ray import cloudpickle
from ray.util.placement_group import placement_group, remove_placement_group
from rich.console import Console
from test_tune import Listener, Progress, Toy, foresee, told

import bnscale
from bnscale import train
from bnscale.engine import Gang
from bnscale.lease import Driver, holder
from bnscale.probes import STEP, curve, gamma
from bnscale.report import page
from bnscale.schedule.failure import Ending, Failure, Hopeless, Kind, OutOfTime
from bnscale.schedule.loop import Training
from bnscale.schedule.needs import GIB, Cluster, Need, Node, gpu_type, needs_of, on_one_type
from bnscale.schedule.notice import Cloud, Notice
from bnscale.schedule.progress import Watch
from bnscale.schedule.tune import connect, run
from bnscale.schedule.tune.driver import _Telling
from bnscale.schedule.tune.lead import Brief, Lead, Standing
from bnscale.storage import Folder
from bnscale.store import Manifest, Store
from bnscale.study import command
from bnscale.study.run import _warn_changed
from bnscale.trial import Outcome, Refusal, Trainable, Trial

for module in (test_tune, sys.modules[__name__]):
    cloudpickle.register_pickle_by_value(module)  # workers do not import tests

pytestmark = pytest.mark.timeout(400)  # a worker takes seconds to start, and many on a busy machine

# Seeds with a meaning.
TAKEN_AWAY, HANGS, OOM, OOM_ALWAYS, NEIGHBOUR, FULL, BROKEN, MEETS, STUCK = range(201, 210)
PREEMPTION = 2  # DRAIN_NODE_REASON_PREEMPTION of Ray's protocol
HANG = 4.0  # seconds that a step may take here


@dataclass(frozen=True)
class Job(test_tune.Job):
    recompute: bool = False


def job(folder: Path, seed: int, steps: int = 6, lr: float = 0.5) -> Job:
    of = test_tune.job(folder, seed, steps=steps, lr=lr)
    return Job(of.trial, of.store)


class Faulty(Toy):
    """A toy whose trials meet what their seeds say when they have taken four steps."""

    def run(self, jobs: Sequence[Any], gang: Gang, threads: int, stop: Callable[[], bool]) -> Iterator[list[Progress]]:
        (job,) = jobs
        first = not (Path(job.store) / f"{job.trial.id}.{gang.rank}").exists()
        if job.trial.seed == STUCK:
            stop = self.stuck(stop)
        last = gang.rank == gang.workers - 1
        for (at,) in super().run(jobs, gang, threads, stop):
            yield [at]
            if at.step >= 4 and last:
                self.meet(job, first)

    @staticmethod
    def stuck(stop: Callable[[], bool]) -> Callable[[], bool]:
        """Asked to save, it never does."""
        return lambda: stop() and time.sleep(1e6) is None

    def meet(self, job: Any, first: bool) -> None:
        seed = job.trial.seed
        if seed == TAKEN_AWAY and first:
            os.kill(os.getpid(), signal.SIGTERM)
        elif seed == HANGS and first:
            time.sleep(1e6)
        elif seed == OOM_ALWAYS or (seed == OOM and not job.recompute):
            torch.empty(2**50)
        elif seed == NEIGHBOUR and first:
            # Somebody else's 4 GiB, of a device that has as many and some.
            from bnscale.engine import machine

            machine.memory_of = lambda device: (2**33, 2**33 - 2**29)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        elif seed == FULL:
            raise OSError(errno.ENOSPC, "No space left on device", "results/curve")
        elif seed == BROKEN:
            raise KeyError("no such table")

    def host(self, address: str, workers: int) -> tuple[str, int]:
        note = Path(os.environ["BNSCALE_TOY"]) / f"port.{os.getpid()}"
        with note.open("a") as file:
            print("asked", file=file)
        if len(note.read_text().splitlines()) < 3:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return address, 1


def go(
    jobs: list[Any],
    cluster: Cluster,
    *,
    workers: int = 1,
    threads: int = 1,
    loop: Any = None,
    watch: Listener | None = None,
    **more: Any,
) -> tuple[dict[str, Ending], list[str]]:
    with watch or Listener(jobs) as watch:
        endings = run(
            jobs,
            foresee(jobs),
            cluster,
            workers=workers,
            threads=threads,
            rivals=None,
            watch=watch,
            mend="the same again",
            loop=loop or Faulty(),
            **more,
        )
    return endings, watch.said


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    os.environ["BNSCALE_TOY"] = str(tmp_path_factory.mktemp("toy"))  # before Ray hands its environment on
    with connect("local") as found:
        yield found
    del os.environ["BNSCALE_TOY"]


class Unread(Listener):
    """Keeps every word, and writes thousands to a pipe that is full and that nobody reads while trials run."""

    def __init__(self, jobs: list[Any], reader: Any, stream: Any) -> None:
        super().__init__(jobs)
        self.console = Console(file=stream)
        self.reading = threading.Thread(target=reader.read)

    def __enter__(self) -> Self:
        super().__enter__()
        for number in range(5000):
            Watch.say(self, f"line {number}")
        return self

    def __exit__(self, *error: Any) -> None:
        self.reading.start()
        super().__exit__(*error)

    def say(self, text: str) -> None:
        super().say(text)
        Watch.say(self, text)


@contextlib.contextmanager
def full_pipe() -> Iterator[tuple[Any, Any]]:
    """Its two ends, with no room left in it."""
    here, there = os.pipe()
    os.set_blocking(there, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(there, b"x" * 4096)
    os.set_blocking(there, True)
    with open(here) as reader, open(there, "w") as stream:
        yield reader, stream


@pytest.fixture(scope="module")
def alone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run, one worker a trial, seen on a terminal that nobody reads."""
    folder = tmp_path_factory.mktemp("alone")
    jobs = {
        "well": job(folder, 1, lr=0.9),
        "taken away": job(folder, TAKEN_AWAY, lr=0.8),
        "oom": job(folder, OOM, lr=0.6),
        "oom always": job(folder, OOM_ALWAYS, lr=0.5),
        "neighbour": job(folder, NEIGHBOUR, lr=0.4),
        "full": job(folder, FULL, lr=0.3),
        "hangs": job(folder, HANGS, lr=0.2),
    }

    with full_pipe() as (reader, stream):
        watch = Unread(list(jobs.values()), reader, stream)
        endings, said = go(list(jobs.values()), cluster, threads=cluster.cpus, stall=HANG, watch=watch)
        stream.close()
        watch.reading.join()
    return {"jobs": jobs, "said": said} | {name: endings[each.trial.id] for name, each in jobs.items()}


def lives(alone: dict[str, Any], name: str, rank: int = 0) -> list[int]:
    """The step at which each life of a trial began."""
    return [int(line[1]) for line in told(alone["jobs"][name], rank) if line[0] == "began"]


def of(said: list[str], each: Any) -> list[str]:
    return [line for line in said if each.trial.id in line and not line.startswith(("finished", "failed"))]


# --- 1: a worker is killed ------------------------------------------------------------------------


class Killed(Training):
    """The real loop; its process is killed in a step of its first life, between two checkpoints."""

    def run(
        self, jobs: Sequence[train.Job], gang: Gang, threads: int, stop: Callable[[], bool]
    ) -> Iterator[list[train.Progress]]:
        (job,) = jobs
        first = Store(job.store).manifest(job.trial.id) is None
        for (at,) in super().run(jobs, gang, threads, stop):
            if first and at.step == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            yield [at]


def real(folder: Path, **changes: Any) -> train.Job:
    """Digits, 10 steps, read at each; saved after each second step at most."""
    return train.Job(digits(**changes), {curve: 2 * STEP, gamma: STEP}, str(folder), str(folder), "abc", 0, 1e-9)


def trained(job: train.Job, until: int | None = None) -> train.Progress:
    """In this process, to its end or to a stop."""
    at: list[train.Progress] = []
    for (each,) in train.run([job], Gang(), 1, lambda: until is not None and bool(at) and at[-1].step >= until - 1):
        at.append(each)
    return at[-1]


def rows(store: Path, table: str) -> list[tuple[Any, ...]]:
    return bnscale.open(store).sql(f"select * exclude (trial) from {table} order by all").rows


def manifest(job: train.Job) -> Manifest:
    found = Store.existing(job.store).manifest(job.trial.id)
    assert found is not None
    return found


def test_01_a_killed_worker_s_trial_goes_on_from_its_checkpoint_and_no_row_is_there_twice(
    cluster: Cluster, tmp_path: Path
) -> None:
    whole, killed = real(tmp_path / "whole"), real(tmp_path / "killed")
    with Driver(Folder(whole.store), "depth") as driver:  # not in this process, which has another number of threads
        assert go([whole], cluster, loop=Training(), driver=driver)[0][whole.trial.id] == Ending(Outcome.FINISHED)
    with Driver(Folder(killed.store), "depth") as driver:
        endings, said = go([killed], cluster, loop=Killed(), driver=driver)
    assert endings[killed.trial.id] == Ending(Outcome.FINISHED)
    assert sum("a worker died" in line and "goes on from its checkpoint" in line for line in said) == 1
    assert manifest(killed).attempts == 2
    assert manifest(killed).outcome is Outcome.FINISHED
    for table in ("curve", "gamma"):
        assert rows(tmp_path / "killed", table) == rows(tmp_path / "whole", table) != []


# --- 6: Ctrl-C ------------------------------------------------------------------------------------


def test_06_ctrl_c_saves_a_checkpoint_releases_the_lease_and_says_how_to_go_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    long = real(tmp_path, steps=100_000)

    def press() -> None:
        while not list(tmp_path.glob("checkpoints/*/step-*.json")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    watch = Listener([long])
    with Driver(Folder(tmp_path), "depth") as driver, watch:
        start = partial(run, [long], foresee([long]), cluster, workers=1, threads=1, rivals=None, driver=driver)
        with pytest.raises(KeyboardInterrupt):
            start(watch=watch, mend="python study.py run")
    assert holder(Folder(tmp_path), long.trial.id) is None
    assert manifest(long).outcome is None
    assert manifest(long).step > 0
    assert "stopping: saving checkpoints (Ctrl-C again: at once)" in watch.said
    assert "every running trial has its checkpoint. To go on: python study.py run" in watch.said[-1]


TWICE = """
import os, signal, time
from bnscale.schedule.progress import Watch
from bnscale.schedule.tune.driver import _interruptible
with _interruptible(Watch({})) as asked:
    os.kill(os.getpid(), signal.SIGINT)
    assert asked.wait(5)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""


def test_06_the_second_ctrl_c_ends_at_once_with_130() -> None:
    assert subprocess.run([sys.executable, "-c", TWICE], timeout=100).returncode == 130


# --- 8: notice ------------------------------------------------------------------------------------


def test_08_a_worker_that_is_told_to_go_saves_and_its_trial_goes_on_uncounted(alone: dict[str, Any]) -> None:
    assert alone["taken away"] == Ending(Outcome.FINISHED)
    first, second = lives(alone, "taken away")
    saved = [line for line in told(alone["jobs"]["taken away"]) if line[0] == "saved"]
    assert (first, [["saved", str(second)]]) == (0, saved)  # the checkpoint is of the very next step
    assert second >= 4
    (line,) = of(alone["said"], alone["jobs"]["taken away"])
    assert "its node is taken away" in line


@contextlib.contextmanager
def another_node(cluster: Cluster) -> Iterator[str]:
    """One more node of Ray's, on this machine; its id."""
    before = {node["NodeID"] for node in ray.nodes()}
    words = ["start", "--address", cluster.address, "--num-cpus", "1", "--disable-usage-stats", "--block"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    family = [psutil.Process(process.pid)]
    try:
        deadline = time.monotonic() + 120
        while not (new := {node["NodeID"] for node in ray.nodes() if node["Alive"]} - before):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        yield new.pop()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += family[0].children(recursive=True)
        for each in reversed(family):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def test_08_a_node_that_the_cluster_drains_is_left_at_a_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    each = job(tmp_path, 1, steps=400)
    with another_node(cluster) as node:
        first = placement_group([{"CPU": cluster.cpus}])  # so that the trial begins on the other one
        ray.get(first.ready())

        def drain() -> None:
            while not told(each):
                time.sleep(0.05)
            remove_placement_group(first)
            client = ray._private.worker.global_worker.gcs_client
            in_a_minute = round(1000 * (time.time() + 60))
            accepted.append(client.drain_node(node, PREEMPTION, "it is a spot machine", in_a_minute)[0])

        accepted: list[bool] = []
        draining = threading.Thread(target=drain)
        draining.start()
        endings, said = go([each], cluster)
        draining.join()
    assert accepted == [True]
    assert endings[each.trial.id] == Ending(Outcome.FINISHED)
    assert [line[0] for line in told(each)] == ["began", "saved", "began", "ended"]
    (line,) = of(said, each)
    assert "its node is taken away" in line


def test_08_a_machine_that_is_about_to_go_is_given_no_trial_again_where_there_is_another(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = job(tmp_path, 1)
    brief = Brief({each.trial.id: each}, {each.trial.id: Need(1, 1, 0, 1)}, {}, Faulty(), "run", 1.0)  # type: ignore[dict-item]
    trial = SimpleNamespace(config={"trial": each.trial.id}, status="RUNNING")
    result = {
        "members": [Standing(each.trial.id)], "spoilt": True, "nodes": ["going"], "leaving": ["going"],
        "failure": Failure(Kind.PREEMPTED, "about to go"),
    }  # fmt: skip
    for others, avoided in (([], []), (["other"], ["going"])):
        monkeypatch.setattr("bnscale.schedule.tune.driver.roomy_nodes", lambda gpus, others=others: ["going", *others])
        with Listener([each]) as watch:
            telling = _Telling(brief, watch, None, elastic=False)
            telling.on_trial_result(0, [], trial, result)
            assert (telling.open(each.trial.id), telling.avoid()) == (True, avoided)
    here = ray.get_runtime_context().get_node_id()
    lead = Lead.__new__(Lead)
    vars(lead).update(notice=Notice(), nodes=[here], members=[], told=False)
    lead.notice.given.set()
    assert lead._leaving() == [here]
    lead.leave()  # by the word of the cluster, which gives that node to nobody
    assert lead._leaving() == []


def test_08_the_notice_of_a_cloud_is_read_where_it_gives_one() -> None:
    """Against a server of this machine: a real notice is nothing to be had for a test."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    notice = {"/latest/meta-data/spot/instance-action": False, "/computeMetadata/v1/instance/preempted": False}

    class Metadata(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self.answer(200, "a token")

        def do_GET(self) -> None:
            if "spot" in self.path:
                known = self.headers["X-aws-ec2-metadata-token"] == "a token"
                self.answer(200 if notice[self.path] and known else 404, '{"action": "terminate"}')
            else:
                assert self.headers["Metadata-Flavor"] == "Google"
                self.answer(200, "TRUE" if notice[self.path] else "FALSE")

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *words: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for cloud in Cloud:
            assert not cloud.takes(url)
        notice = dict.fromkeys(notice, True)
        for cloud in Cloud:
            assert cloud.takes(url)
        server.shutdown()


# --- 9, 10, 13: gangs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gang(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run, two workers a trial."""
    if cluster.cpus < 2:
        pytest.skip("a gang of two needs two CPUs")
    folder = tmp_path_factory.mktemp("gang")
    jobs = {
        "meets": job(folder, MEETS, lr=0.9),
        "dies": job(folder, test_tune.DIES, lr=0.8),
        "hangs": job(folder, HANGS, lr=0.7),
    }
    endings, said = go(list(jobs.values()), cluster, workers=2, threads=cluster.cpus // 2, stall=HANG)
    return {"jobs": jobs, "said": said} | {name: endings[each.trial.id] for name, each in jobs.items()}


def processes(gang: dict[str, Any], name: str) -> list[int]:
    """Of every life of a trial."""
    each = gang["jobs"][name]
    return [int(line[2]) for rank in (0, 1) for line in told(each, rank) if line[0] == "began"]


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        alive = []
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    alive.append(pid)
        if not alive:
            return True
        time.sleep(0.1)
    return False


def test_09_when_one_rank_dies_all_ranks_end_and_the_gang_begins_again(gang: dict[str, Any]) -> None:
    assert gang["dies"] == Ending(Outcome.FINISHED)
    assert [len(lives(gang, "dies", rank)) for rank in (0, 1)] == [2, 2]
    assert len(set(processes(gang, "dies"))) == 4
    assert gone(processes(gang, "dies"))


def test_10_a_gang_that_hangs_is_ended_with_the_stacks_of_all_its_workers_in_the_trial_s_log(
    gang: dict[str, Any],
) -> None:
    assert gang["hangs"] == Ending(Outcome.FINISHED)
    assert [len(lives(gang, "hangs", rank)) for rank in (0, 1)] == [2, 2]
    log = Path(gang["jobs"]["hangs"].store) / f"{gang['jobs']['hangs'].trial.id}.log"
    text = log.read_text()
    for rank, place in ((0, "_meet"), (1, "meet")):
        assert f"worker {rank}: no step in" in text
        assert f"in {place}\n" in text
    (line,) = of(gang["said"], gang["jobs"]["hangs"])
    assert f"stacks in {log}" in line
    assert gone(processes(gang, "hangs"))


def test_10_a_worker_alone_that_hangs_is_ended_too(alone: dict[str, Any]) -> None:
    assert alone["hangs"] == Ending(Outcome.FINISHED)
    assert len(lives(alone, "hangs")) == 2
    (line,) = of(alone["said"], alone["jobs"]["hangs"])
    assert "no step for too long" in line


def test_10_the_log_of_a_trial_grows_by_what_each_worker_adds(tmp_path: Path) -> None:
    each = real(tmp_path)
    where = train.log(each, "first\n")
    threads = [threading.Thread(target=train.log, args=(each, f"{n}\n")) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert where == str(tmp_path / "logs" / f"{each.trial.id}.txt")
    assert sorted(Path(where).read_text().splitlines()) == ["0", "1", "2", "3", "first"]


def test_13_a_port_in_use_is_left_for_another_and_counts_for_nothing(gang: dict[str, Any]) -> None:
    """The toy's first two meeting places are taken."""
    asked = [note.read_text().splitlines() for note in Path(os.environ["BNSCALE_TOY"]).glob("port.*")]
    assert asked
    assert {len(each) for each in asked} == {3}
    assert gang["meets"] == Ending(Outcome.FINISHED)
    assert [len(lives(gang, "meets", rank)) for rank in (0, 1)] == [1, 1]
    assert of(gang["said"], gang["jobs"]["meets"]) == []


# --- 15: whoever looks on is slow -----------------------------------------------------------------


def test_15_a_terminal_that_nobody_reads_holds_no_training_up(alone: dict[str, Any]) -> None:
    """There is no logger of Tune's on, and no callback that asks the network: the terminal is all that is left. Here it
    was a full pipe until the last trial had ended."""
    assert {name: alone[name].outcome for name in ("well", "taken away", "hangs")} == dict.fromkeys(
        ("well", "taken away", "hangs"), Outcome.FINISHED
    )
    assert len(alone["said"]) >= len(alone["jobs"])


# --- 28: divergence -------------------------------------------------------------------------------


def test_28_a_loss_that_is_no_number_is_a_result_that_is_kept_not_tried_again_and_never_the_best(
    tmp_path: Path,
) -> None:
    diverging = real(tmp_path, lr=1e30, trainable=Trainable.ALL, milestones=())
    well = real(tmp_path, lr=0.1, trainable=Trainable.ALL, milestones=())
    assert trained(diverging).outcome is Outcome.DIVERGED
    trained(well)
    found = manifest(diverging)
    assert found.outcome is Outcome.DIVERGED
    assert 0 < (found.facts["diverged_step"] or 0) <= 10
    assert found.facts["last_finite_loss"] is not None
    with pytest.raises(Refusal, match="has diverged and is trained once"):
        trained(diverging)
    best = "select arg_max(trial, accuracy) from curve join trials using (trial) where outcome = 'finished'"
    assert bnscale.open(tmp_path).sql(best).rows == [(well.trial.id,)]
    finite = "select count(*) from trials where last_finite_loss = 'nan' or isinf(last_finite_loss)"
    assert bnscale.open(tmp_path).sql(finite).rows == [(0,)]


# --- 29, 30: memory -------------------------------------------------------------------------------


def test_29_out_of_memory_is_tried_once_more_with_activation_checkpointing(alone: dict[str, Any]) -> None:
    assert alone["oom"] == Ending(Outcome.FINISHED)
    assert len(lives(alone, "oom")) == 2
    (line,) = of(alone["said"], alone["jobs"]["oom"])
    assert "goes on from its checkpoint with activation checkpointing" in line


def test_29_out_of_memory_again_is_a_failure_that_says_what_was_forecast_and_held(alone: dict[str, Any]) -> None:
    ending = alone["oom always"]
    assert ending.outcome is Outcome.FAILED
    assert ending.failure.kind is Kind.OOM
    assert len(lives(alone, "oom always")) == 2
    recorded = test_tune.failure(alone["jobs"]["oom always"])
    assert recorded.startswith("oom ")
    assert "512.0 MiB were forecast, this process has held " in recorded
    assert "activations were computed again instead of kept" in recorded


def test_29_a_trial_that_recomputes_says_so_and_its_numbers_are_the_same(tmp_path: Path) -> None:
    kept, again = real(tmp_path / "kept"), replace(real(tmp_path / "again"), recompute=True)
    for each in (kept, again):
        trained(each)
    assert [manifest(each).facts.get("recomputed") for each in (kept, again)] == [None, True]
    for table in ("curve", "gamma"):
        assert rows(tmp_path / "again", table) == rows(tmp_path / "kept", table)


def test_30_out_of_memory_that_a_neighbour_holds_is_tried_again_and_not_counted(alone: dict[str, Any]) -> None:
    """One trial has a GPU to itself here, so a neighbour is another program."""
    assert alone["neighbour"] == Ending(Outcome.FINISHED)
    (line,) = of(alone["said"], alone["jobs"]["neighbour"])
    assert "out of memory that others hold" in line
    assert "others hold 7.5 GiB of 8.0 GiB" in line
    assert "activation checkpointing" not in line


# --- errors that end a trial, or all of them ------------------------------------------------------


def test_16_a_full_disk_sets_the_trial_aside_and_it_stays_resumable(alone: dict[str, Any]) -> None:
    assert alone["full"].outcome is None
    assert alone["full"].failure.kind is Kind.STORAGE
    assert len(lives(alone, "full")) == 1
    assert not (Path(alone["jobs"]["full"].store) / f"{alone['jobs']['full'].trial.id}.failed").exists()
    (line,) = of(alone["said"], alone["jobs"]["full"])
    assert "stays where its checkpoint is until the study is run again" in line
    assert "No space left on device" in line


def test_when_the_first_trials_fail_alike_the_study_stops_with_that_error_once_and_is_resumable(
    cluster: Cluster, tmp_path: Path
) -> None:
    jobs = [job(tmp_path, BROKEN, lr=lr) for lr in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)]
    watch = Listener(jobs)
    with watch, pytest.raises(Hopeless, match=r"KeyError: 'no such table'.*go on: the same again"):
        run(
            jobs,
            foresee(jobs),
            cluster,
            workers=1,
            threads=cluster.cpus,
            rivals=None,
            watch=watch,
            mend="the same again",
            loop=Faulty(),
        )
    begun = [each for each in jobs if told(each)]
    assert 3 <= len(begun) < len(jobs)
    assert sum("no such table" in line for line in watch.said) == 1
    assert all(each.trial.lr >= 0.6 for each in begun)


def test_at_the_end_of_its_hours_a_study_stops_with_124_and_says_how_to_go_on(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its running trials end as after Ctrl-C; of these hours there are none."""
    file = Path(__file__).parents[2] / "studies" / "frankle_depth.py"
    monkeypatch.setattr("bnscale.schedule.tune.connect", lambda address: contextlib.nullcontext(cluster))
    monkeypatch.syspath_prepend(str(file.parent))
    study = runpy.run_path(str(file))["study"]
    words = ["run", "--preset", "laptop", "--set", "depth=8", "--store", str(tmp_path), "--max-hours", "0"]
    with pytest.raises(SystemExit) as ended:
        command.app(study, file)(args=words, prog_name="study")
    assert ended.value.code == 124
    said = capsys.readouterr().out
    assert "the time is up; every running trial has its checkpoint. To go on: python " in said
    assert "--max-hours 0" in said
    assert {each.outcome for each in Store.existing(tmp_path).manifests()} <= {None}


def test_a_worker_that_never_saves_does_not_hold_up_the_end_of_the_hours(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = job(tmp_path, STUCK, steps=100_000)
    late = SimpleNamespace(monotonic=lambda: time.monotonic() + (3600 * 5 if told(each) else 0))
    monkeypatch.setattr("bnscale.schedule.tune.driver.time", late)
    monkeypatch.setattr("bnscale.schedule.tune.driver.HALT", 1.0)
    watch = Listener([each])
    start = partial(run, [each], foresee([each]), cluster, workers=1, threads=1, rivals=None, loop=Faulty())
    with watch, pytest.raises(OutOfTime):
        start(watch=watch, mend="the same again", until=time.monotonic() + 3600 * 4)
    assert f"{each.trial.id}: no new checkpoint (no answer in 1 s); the one before it counts" in watch.said


# --- 34, 36, 37: what a trial goes on under -------------------------------------------------------


def test_34_a_trial_that_goes_on_under_other_code_is_warned_of_and_keeps_both_commits(tmp_path: Path) -> None:
    before = real(tmp_path)
    trained(before, until=4)
    text = io.StringIO()
    _warn_changed([manifest(before)], "def", Console(file=text, width=200))
    assert "1 of these trials go on from checkpoints of other code" in text.getvalue()
    assert before.trial.id in text.getvalue()
    assert "of abc (now def)" in text.getvalue()
    silent = io.StringIO()
    _warn_changed([manifest(before)], "abc", Console(file=silent))
    assert silent.getvalue() == ""
    trained(replace(before, commit="def+"))
    facts = manifest(before).facts
    assert (facts["commit"], facts["commits"]) == ("def+", "abc -> def+")
    assert manifest(before).outcome is Outcome.FINISHED


class Halfway(Training):
    """The real loop, until its code breaks in the middle."""

    def run(
        self, jobs: Sequence[train.Job], gang: Gang, threads: int, stop: Callable[[], bool]
    ) -> Iterator[list[train.Progress]]:
        for (at,) in super().run(jobs, gang, threads, stop):
            if at.step == 6:
                raise KeyError("broken")
            yield [at]


def test_36_another_number_of_workers_goes_on_with_the_same_numbers_and_is_recorded(
    cluster: Cluster, tmp_path: Path
) -> None:
    if cluster.cpus < 2:
        pytest.skip("a gang of two needs two CPUs")
    whole, shared = real(tmp_path / "whole"), real(tmp_path / "shared")
    trained(whole)
    endings, _ = go([shared], cluster, workers=2, loop=Halfway())
    assert endings[shared.trial.id].outcome is Outcome.FAILED
    assert manifest(shared).facts["failure"] == "code"
    began = next(train.run([shared], Gang(), 1, lambda: False))[0].step
    assert 0 < began <= 6
    assert trained(shared).outcome is Outcome.FINISHED
    facts = manifest(shared).facts
    assert (facts["workers"], facts["worker_counts"]) == (1, "2 -> 1")
    found, expected = ([row[-2:] for row in rows(tmp_path / name, "curve")] for name in ("shared", "whole"))
    assert len(found) == len(expected) > 0
    for here, there in zip(found, expected, strict=True):
        assert here == pytest.approx(there, rel=1e-4)


def test_37_another_gpu_type_is_recorded_shown_and_forbidden_where_that_is_asked(tmp_path: Path) -> None:
    a100, h100 = "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3"
    assert [gpu_type(each) for each in (a100, h100, "Tesla V100-SXM2-16GB")] == ["A100", "H100", "V100"]
    assert gpu_type("Intel(R) Xeon(R) Processor") is None
    mixed = Cluster("", False, None, [Node(8, 2, 64 * GIB, "A100"), Node(8, 4, 64 * GIB, "H100"), Node(4, 0, GIB)])
    assert on_one_type(mixed, [a100, h100]).gpus == 2  # the first counts
    assert on_one_type(mixed, []).gpu_type == "H100"  # of which there are most
    assert on_one_type(replace(mixed, nodes=mixed.nodes[2:]), []).gpu_type is None
    with pytest.raises(Refusal, match=r"--same-gpu: this study began on Tesla V100.*A100, H100.*leave --same-gpu out"):
        on_one_type(mixed, ["Tesla V100-SXM2-16GB"])
    with pytest.raises(Refusal, match="began on Intel"):
        on_one_type(mixed, ["Intel(R) Xeon(R) Processor"])
    with pytest.raises(Refusal, match="the cluster has no GPU"):
        on_one_type(replace(mixed, nodes=mixed.nodes[2:]), [h100])
    head, l4, untold = Node(4, 0, GIB), Node(8, 1, 64 * GIB, "L4"), Node(8, 1, 64 * GIB)
    growing = Cluster("", False, [head, l4, Node(8, 4, 64 * GIB, "A100")], [head])
    assert on_one_type(growing, ["NVIDIA L4"]).most == [head, l4]
    assert on_one_type(growing, []).gpu_type == "A100"  # before the first has come
    with pytest.raises(Refusal, match="began on NVIDIA H100.*the cluster has L4, A100"):
        on_one_type(growing, [h100])
    with pytest.raises(Refusal, match="does not say the type of the GPUs that may come"):
        on_one_type(replace(growing, most=[head, untold]), [])
    assert on_one_type(replace(growing, most=[head, l4], nodes=mixed.nodes), [h100]).most is None
    each = test_tune.job(tmp_path, 1)
    need = needs_of([each], foresee([each]), on_one_type(mixed, [h100]), 1, 1)[each.trial.id]  # type: ignore[list-item]
    assert need == Need(1, 1, 1, need.memory, "H100")
    assert need.bundles()[0]["accelerator_type:H100"] > 0


def test_37_the_report_names_every_device_that_a_study_ran_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    trials: list[Trial] = [digits(seed=seed) for seed in range(2)]
    for trial, device in zip(trials, ("NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3"), strict=True):
        store.writer(trial, {}, {"device": device}).finish(Outcome.FINISHED, 10, {})
    again = store.writer(digits(seed=2), {}, {"device": "NVIDIA L4"})
    again.flush(3)
    store.writer(digits(seed=2), {}, {"device": "NVIDIA A10G"}).finish(Outcome.FINISHED, 10, {})
    session = bnscale.open(tmp_path)
    assert session.sql("select devices from trials where devices is not null").rows == [("NVIDIA L4 -> NVIDIA A10G",)]
    from bnscale.study.plan import Planned, relate

    relate(session, [Planned(trial, "all", "") for trial in trials])
    shown = page.provenance(session, "results")["Devices"]
    assert "A100" in shown
    assert "H100" in shown
