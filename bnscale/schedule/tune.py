"""Trials -> Ray Tune -> gangs of workers, warm from trial to trial. The only file that imports ray.

Tune is a queue and a scheduler here, not a store: what a trial reached is in the store's manifests and checkpoints,
Tune's own files live in a temporary folder and are thrown away.

    driver   run()    a queue of trials, longest first; Ctrl-C; the progress view
    actor    Lead     one per running trial: the leading worker; it advances the training loop in slices
    actor    Member   the other workers of a gang, raised by the Lead and owned by it: they die with it
"""

import os

# Read by ray when it is imported. Tune's loggers, its state file, its own Ctrl-C and its advice have no use here.
os.environ.update(
    RAY_AIR_NEW_OUTPUT="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_CHDIR_TO_TRIAL_DIR="0",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_DISABLE_SIGINT_HANDLER="1",
    TUNE_DISABLE_STRICT_METRIC_CHECKING="1",
    TUNE_GLOBAL_CHECKPOINT_S="1000000000",
    TUNE_PRINT_ALL_TRIAL_ERRORS="0",
)

import contextlib
import logging
import math
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import ray
from ray import tune
from ray.exceptions import RayActorError, RayError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bnscale.schedule.progress import Watch
from bnscale.store import TakenOver
from bnscale.trial import Outcome, Refusal, Trainable

if TYPE_CHECKING:
    import torch

    from bnscale.engine import Gang
    from bnscale.schedule.budget import Forecast
    from bnscale.train import Job, Progress

GIB = 2**30
OBJECT_STORE = 150 * 2**20  # bytes; a few thousand jobs and nothing else travel through it
SLICE = 2.0  # seconds of training between two reports, so that a stop is heard and progress lives
QUICK = 0.25  # seconds; an epoch shorter than this is no reason for a report
DEATHS = 3  # of its workers that a trial survives in one run
PATIENCE = 10.0  # seconds until a process that hangs in a collective, because another worker is gone, is ended
NOTICE = 3.0  # seconds in which Ray learns of a death that other workers have already felt
OWNER = "bnscale-owner"  # the file in each of our temporary folders that names its process
_TOKEN = secrets.token_hex(32)  # of the clusters that this process starts


class Loop(Protocol):
    """What the workers of a trial do. `Training` is the real one; a test may bring a toy."""

    def run(self, job: "Job", gang: "Gang", threads: int, stop: Callable[[], bool]) -> "Iterator[Progress]": ...

    def fail(self, job: "Job", error: str) -> None:
        """Record that the trial ended with an error."""

    def host(self, address: str, workers: int) -> tuple[str, int]: ...

    def join(self, rank: int, workers: int, address: str, port: int, device: "torch.device") -> "Gang": ...


class Training:
    """The training loop and DeepSpeed's gangs, imported where they run: a worker that is alone needs no DeepSpeed."""

    def run(self, job: "Job", gang: "Gang", threads: int, stop: Callable[[], bool]) -> "Iterator[Progress]":
        from bnscale import train

        return train.run(job, gang, threads, stop)

    def fail(self, job: "Job", error: str) -> None:
        from bnscale import train

        train.fail(job, error)

    def host(self, address: str, workers: int) -> tuple[str, int]:
        from bnscale.engine import deepspeed

        return deepspeed.host(address, workers)

    def join(self, rank: int, workers: int, address: str, port: int, device: "torch.device") -> "Gang":
        from bnscale.engine import deepspeed

        return deepspeed.join(rank, workers, address, port, device)


# --- the cluster ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    cpus: int
    gpus: int
    memory: int  # bytes that Ray may hand out


@dataclass(frozen=True)
class Cluster:
    """Where trials run."""

    address: str  # host:port
    ours: bool  # started by `connect`, and ended by it
    most: Node | None  # all that an autoscaler may bring it to; None where there is none
    nodes: list[Node]  # those that are there

    @property
    def cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """Those that may come count: nothing may ask for a GPU before there is one, and none comes unasked."""
        return max(sum(node.gpus for node in self.nodes), self.most.gpus if self.most else 0)

    @property
    def memory(self) -> int:
        """Bytes, over all nodes."""
        return sum(node.memory for node in self.nodes)

    def slots(self, threads: int, memory: int) -> int:
        """Workers at work at once, each with `threads` CPUs, `memory` bytes, and a GPU where there are any."""
        if self.most:  # how much memory its nodes will have, no autoscaler says
            return min([self.most.cpus // threads, *([self.most.gpus] if self.gpus else [])])
        each = [
            min([node.cpus // threads, node.memory // max(1, memory), *([node.gpus] if self.gpus else [])])
            for node in self.nodes
        ]
        return sum(each)


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[Cluster]:
    """The Ray cluster at `address`, or RAY_ADDRESS, or that `ray start` left on this machine; else one of our own,
    for as long as the context lasts. `local` always starts one.

    A cluster of our own asks every client for a token that only this process and its children know.
    Raises Refusal where the address does not answer or answers with another version.
    """
    _hush()
    asked = address or os.environ.get("RAY_ADDRESS") or None
    found = asked if asked != "local" else None
    if asked is None:
        found = _left_running()
    if found:
        _join(found)
        home = None
    else:
        home = _start()
    try:
        yield Cluster(ray.get_runtime_context().gcs_address, home is not None, _most() if found else None, _nodes())
    finally:
        ray.shutdown()
        if home:
            shutil.rmtree(home, ignore_errors=True)


def _hush() -> None:
    """What Ray and Tune say about errors and dead workers on the terminal, we say in our own words."""
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    setattr(ray._private.worker, "print_to_stdstream", lambda data, ignore_prefix: None)  # noqa: B010 - untyped


def _left_running() -> str | None:
    """Address of the cluster that `ray start` began on this machine, if it still answers."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        found = note.read_text().strip()
    except OSError:
        return None
    return found if found and _answers(found) else None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return True
    except (OSError, ValueError):
        return False


def _join(address: str) -> None:
    """Become a driver of a running cluster."""
    if "://" in address:
        raise Refusal(
            f"address {address}: Ray Client (ray://) is not supported; run on a node of the cluster and give host:port"
        )
    way_out = "start one with `ray start --head`, or leave the address out to run on this machine"
    if address != "auto" and not _answers(address):
        raise Refusal(f"address {address}: no Ray cluster answers there; {way_out}")
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available()  # Ray does this itself only where it finds the address itself
    try:
        with _no_stderr():
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # Ray raises a dozen classes here
        ray.shutdown()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "ersion mismatch" in str(error):
            raise Refusal(
                f"address {address}: the cluster runs another version of Ray or Python ({reason}); "
                f"install ray {ray.__version__} there, or its version here"
            ) from None
        raise Refusal(
            f"address {address}: {reason.rstrip('.')}. If the cluster asks for a token, put it into ~/.ray/auth_token "
            f"or RAY_AUTH_TOKEN; this machine must be one of its nodes. Otherwise {way_out}"
        ) from None


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Ray's C++ tells there of each of its twenty tries, past Python's own stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _start() -> Path:
    """A cluster of this machine alone; returns the folder with all its files."""
    _sweep()
    # Ray keeps sockets there, and the name of a socket may have 107 letters.
    folder = tempfile.gettempdir() if len(tempfile.gettempdir()) < 25 else "/tmp"
    home = _own_folder(folder)
    # With a token at hand Ray turns authentication on by itself and writes none into ~/.ray.
    os.environ.setdefault("RAY_AUTH_TOKEN", _TOKEN)
    # Workers find the package where this process found it, installed or not.
    package = str(Path(__file__).parents[2])
    paths = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([package, paths] if paths else [package])
    try:
        ray.init(
            "local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            _temp_dir=str(home),
        )
    except BaseException:
        ray.shutdown()
        shutil.rmtree(home, ignore_errors=True)
        raise
    return home


def _own_folder(parent: str) -> Path:
    """A new folder that says whose it is."""
    folder = Path(tempfile.mkdtemp(prefix=f"bnscale-{os.getpid()}-", dir=parent))
    (folder / OWNER).write_text(_owner(os.getpid()))
    return folder


def _owner(pid: int) -> str:
    return f"{socket.gethostname()} {pid} {psutil.Process(pid).create_time()}"


def _sweep() -> None:
    """Remove the folders of our own that runs of this machine left when they were killed."""
    parents = {tempfile.gettempdir(), "/tmp"}
    for note in [note for parent in parents for note in Path(parent).glob(f"bnscale-*/{OWNER}")]:
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            owner = note.read_text()
            host, pid, _ = owner.split()
            if host == socket.gethostname() and not (psutil.pid_exists(int(pid)) and _owner(int(pid)) == owner):
                shutil.rmtree(note.parent, ignore_errors=True)


def _most() -> Node | None:
    """What an autoscaler may bring the cluster to."""
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config()
    return Node(int(most.get("CPU", 0)), int(most.get("GPU", 0)), int(most.get("memory", 0))) if most else None


def _nodes() -> list[Node]:
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(n.get("CPU", 0)), int(n.get("GPU", 0)), int(n.get("memory", 0))) for n in alive]


# --- the driver ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """What one trial asks of the cluster. Trials with equal needs use the same warm actors."""

    workers: int
    threads: int
    gpus: int  # a worker
    memory: int  # bytes a worker

    def bundles(self) -> list[dict[str, float]]:
        gpu = {"GPU": self.gpus} if self.gpus else {}
        return [{"CPU": self.threads, "memory": self.memory, **gpu} for _ in range(self.workers)]


def run(
    jobs: list["Job"],
    forecasts: Mapping[str, "Forecast"],
    cluster: Cluster,
    *,
    workers: int,
    threads: int,
    rivals: Mapping[str, Hashable] | None,
    watch: Watch,
    mend: str,
    loop: Loop | None = None,
) -> dict[str, Outcome | None]:
    """Run every job, longest first, and return the outcome of each by trial id; None where it has no end.

    `workers` processes train one trial, each on `threads` CPUs and, where the cluster has them, a GPU.
    `rivals` puts trials into groups within which successive halving (ASHA) stops the worse ones early, by accuracy;
    None trains all to the end. `mend` is the command that goes on after Ctrl-C.

    Raises Refusal, before anything starts, where a trial fits no part of the cluster; KeyboardInterrupt after Ctrl-C
    or SIGTERM, when every running trial has its checkpoint.
    """
    needs = _needs(jobs, forecasts, cluster, workers, threads)
    by_id = {job.trial.id: job for job in jobs}
    order = sorted(by_id, key=lambda trial: -forecasts[trial].seconds)
    brief = Brief(by_id, needs, loop or Training())
    telling = _Telling(by_id, watch)
    groups = max(1, min(cluster.slots(need.threads, need.memory) // need.workers for need in needs.values()))
    # Pending trials each ask Ray for a placement; few of them keep the order and cost little.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(groups)

    with _interruptible(watch) as interrupt:
        while left := [trial for trial in order if telling.open(trial)]:
            before = Counter(telling.deaths)
            _round(left, brief, telling, _scheduler(by_id, rivals), interrupt)
            if interrupt.is_set():
                watch.say(f"stopped; every running trial has its checkpoint. To go on: {mend}")
                raise KeyboardInterrupt
            if telling.deaths == before:
                break
        for trial in order:
            if telling.deaths[trial] > DEATHS:
                text = f"a worker died {telling.deaths[trial]} times; the last time: {telling.last_words[trial]}"
                _record(brief.loop, by_id[trial], text)
                telling.outcomes[trial] = Outcome.FAILED
                watch.ended(trial, Outcome.FAILED)
    return {trial: telling.outcomes.get(trial) for trial in by_id}


def _needs(
    jobs: list["Job"], forecasts: Mapping[str, "Forecast"], cluster: Cluster, workers: int, threads: int
) -> dict[str, Need]:
    """Resources by trial id, in as few classes as memory allows: a warm actor serves only its own class."""
    gpus = 1 if cluster.gpus else 0
    # DeepSpeed has no optimiser for nothing; a trial that trains nothing only measures.
    gang = {job.trial.id: 1 if job.trial.trainable is Trainable.NONE else workers for job in jobs}
    memory = {}
    for trial, size in gang.items():
        wanted = forecasts[trial].memory
        power = GIB << max(0, math.ceil(math.log2(max(wanted, 1) / GIB)))
        memory[trial] = power if cluster.slots(threads, power) >= size else wanted
    top = max(memory.values(), default=GIB)
    if cluster.slots(threads, top) == cluster.slots(threads, 0):  # memory is not what limits the number of workers
        memory = dict.fromkeys(memory, top)
    needs = {trial: Need(size, threads, gpus, memory[trial]) for trial, size in gang.items()}
    for trial, need in needs.items():
        if not cluster.most and cluster.slots(threads, need.memory) < need.workers:
            raise Refusal(_too_large(trial, need, cluster))
    return needs


def _too_large(trial: str, need: Need, cluster: Cluster) -> str:
    gpu = ", 1 GPU" if need.gpus else ""
    nodes = ", ".join(
        f"{n} x ({node.cpus} CPUs, {node.gpus} GPUs, {node.memory / GIB:.1f} GiB)"
        for node, n in Counter(cluster.nodes).items()
    )
    return (
        f"{trial}: needs {need.workers} worker{'s' if need.workers > 1 else ''} of {need.threads} CPUs{gpu} and "
        f"{need.memory / GIB:.1f} GiB each; the cluster has {nodes}. "
        "Ask for fewer workers a trial, fewer threads a worker or a smaller batch, or a larger cluster by its address"
    )


def _round(
    trials: list[str], brief: "Brief", telling: "_Telling", scheduler: FIFOScheduler, interrupt: threading.Event
) -> None:
    """One pass of Tune over `trials`."""

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        need = brief.needs[config["trial"]]
        return tune.PlacementGroupFactory(need.bundles(), strategy="PACK")

    folder = _own_folder(tempfile.gettempdir())
    try:
        tune.run(
            tune.with_resources(tune.with_parameters(Lead, brief=brief), resources),
            config={"trial": tune.grid_search(trials)},
            name="queue",
            storage_path=str(folder),
            trial_dirname_creator=lambda trial: trial.trial_id,
            scheduler=scheduler,
            stop=_Brake(telling, interrupt),
            callbacks=[telling],
            max_failures=DEATHS,
            reuse_actors=True,
            raise_on_failed_trial=False,
            verbose=0,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Telling(tune.Callback):
    """Keeps what Tune reports and tells it to the watch."""

    def __init__(self, jobs: Mapping[str, "Job"], watch: Watch) -> None:
        self.jobs = jobs
        self.watch = watch
        self.outcomes: dict[str, Outcome | None] = {}
        self.deaths: Counter[str] = Counter()
        self.last_words: dict[str, str] = {}
        self.trials: list[Any] = []  # Tune's, of this round

    def open(self, trial: str) -> bool:
        """Whether it has yet to end: also after Tune has given it up for a death that it could survive."""
        return trial not in self.outcomes and self.deaths[trial] <= DEATHS

    def note(self, trial: str, result: Mapping[str, Any]) -> None:
        if result["outcome"]:
            self.outcomes[trial] = Outcome(result["outcome"])

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.trials = trials

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.watch.started(trial.config["trial"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        from bnscale.train import Progress

        name = trial.config["trial"]
        self.note(name, result)
        if result["spoilt"]:
            trial.max_failures = 0  # its actor now raises, to be replaced; the trial itself is over
        of = self.jobs[name].trial
        self.watch.progressed(
            name,
            Progress(
                step=result["at"],
                total=of.total_steps,
                epoch=result["epoch"],
                epochs=of.total_steps / of.steps_per_epoch,
                loss=result["loss"],
                accuracy=result.get("accuracy"),
                outcome=self.outcomes.get(name),
            ),
            result["began"],
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        self.watch.ended(name, self.outcomes.setdefault(name, None))  # without an end: stopped by ASHA

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._died(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        if name in self.outcomes:
            self.watch.ended(name, self.outcomes[name])
        else:
            self._died(trial)

    def _died(self, trial: Any) -> None:
        name = trial.config["trial"]
        self.deaths[name] += 1
        said = [line.strip() for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
        # Ours begins with the name of its class; Ray's goes on with a paragraph of advice.
        self.last_words[name] = said[-1].split("WorkerDiedError: ")[-1].split(". ")[0]
        if self.deaths[name] <= DEATHS:
            self.watch.lost(name, self.last_words[name])


class _Brake(tune.Stopper):
    """Ends the round after Ctrl-C, when every running trial has saved its checkpoint."""

    def __init__(self, telling: _Telling, interrupt: threading.Event) -> None:
        self.telling = telling
        self.interrupt = interrupt

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its stopper into its own state, which nobody reads

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if not self.interrupt.is_set():
            return False
        self.telling.watch.say("stopping: saving checkpoints (Ctrl-C again: at once)")
        running = [trial for trial in self.telling.trials if trial.status == "RUNNING"]
        actors = {trial.config["trial"]: trial.temporary_state.ray_actor for trial in running}
        halts = {actor.halt.remote(): trial for trial, actor in actors.items() if actor}
        left = list(halts)
        while left:  # as long as a step of training takes; the second Ctrl-C ends the waiting
            ready, left = ray.wait(left, timeout=0.5)
            for answer in ready:
                try:
                    self.telling.note(halts[answer], ray.get(answer))
                except RayError as error:
                    last = str(error).strip().splitlines()[-1]
                    self.telling.watch.say(f"{halts[answer]}: no new checkpoint ({last}); the one before it counts")
        return True


@contextlib.contextmanager
def _interruptible(watch: Watch) -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event; the second one ends the process at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def hear(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            watch.abandon()
            os._exit(130)
        asked.set()

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _scheduler(jobs: Mapping[str, "Job"], rivals: Mapping[str, Hashable] | None) -> FIFOScheduler:
    return FIFOScheduler() if rivals is None else _Halving(jobs, rivals)


class _Halving(FIFOScheduler):
    """One ASHA for each group of rivals: a deep network must not stop a shallow one for being better."""

    def __init__(self, jobs: Mapping[str, "Job"], rivals: Mapping[str, Hashable]) -> None:
        super().__init__()
        self.rivals = rivals
        epochs: dict[Hashable, float] = {}
        for name, job in jobs.items():
            group = rivals[name]
            epochs[group] = max(epochs.get(group, 0), job.trial.total_steps / job.trial.steps_per_epoch)
        # Beyond the end, so that none is stopped at its last step, before it is finished.
        self.halvings = {
            group: ASHAScheduler(
                "epoch",
                "accuracy",
                "max",
                max_t=math.ceil(2 * n),
                grace_period=max(1, round(n / 9)),
                reduction_factor=3,
            )
            for group, n in epochs.items()
        }

    def _of(self, trial: Any) -> ASHAScheduler:
        return self.halvings[self.rivals[trial.config["trial"]]]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)


# --- the workers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Brief:
    """What every leading worker knows, sent once: jobs and needs by trial id."""

    jobs: dict[str, "Job"]
    needs: dict[str, Need]
    loop: Loop


def _record(loop: Loop, job: "Job", error: str) -> None:
    """Write the error down, if that can be: on a full disk the trial has no end, and the next run tries it again."""
    with contextlib.suppress(Refusal, OSError):
        loop.fail(job, error)


class WorkerDiedError(RuntimeError):
    """Another worker of the gang is gone: nothing is wrong with the trial."""


def _ready(threads: int) -> "torch.device":
    """Pin this process to its share of the machine, and find its device."""
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    import torch

    torch.set_num_threads(threads)
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


class Member:
    """A worker that does not lead."""

    def __init__(self, loop: Loop, threads: int) -> None:
        self.loop = loop
        self.threads = threads

    def join(self, rank: int, workers: int, address: str, port: int) -> None:
        self.gang = self.loop.join(rank, workers, address, port, _ready(self.threads))

    def train(self, job: "Job") -> str | None:
        """Follow the leading worker to the end of a trial. Returns the error that ended it, if any."""
        try:
            for _ in self.loop.run(job, self.gang, self.threads, lambda: False):
                pass
        except Exception:
            return traceback.format_exc()
        return None


class Lead(tune.Trainable):
    """The leading worker of a gang, or the only one. Serves trial after trial."""

    def setup(self, config: dict[str, Any], brief: Brief) -> None:  # type: ignore[override]  # tune.with_parameters
        from bnscale.engine import Gang

        self.brief = brief
        self.need = brief.needs[config["trial"]]
        self.spoilt = False  # this process must serve no other trial
        self.members = self._raise()
        device = _ready(self.need.threads)  # takes seconds, on all workers at once
        self.gang = self._meet(device) if self.members else Gang(0, 1, device)
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._wind_up()
        if self.spoilt:
            return False
        self._take(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train for a slice of time. Reports where the trial stands."""
        if self.spoilt:
            raise RuntimeError("this worker is to be replaced")
        try:
            over = self._advance()
        except Exception as error:
            return self._failed(error)
        return self._report(over)

    def halt(self) -> dict[str, Any]:
        """Save a checkpoint and end. Called by the driver after Ctrl-C."""
        self._wind_up()
        return self._report(True)

    def cleanup(self) -> None:
        self._wind_up()

    # --- a trial ---------------------------------------------------------------------------------

    def _take(self, config: dict[str, Any]) -> None:
        self.job = self.brief.jobs[config["trial"]]
        self.stopping = False
        self.begun = False
        self.began = 0  # the step of the checkpoint from which it goes on
        self.at: Progress | None = None
        self.watchdog: _Watchdog | None = None
        self.steps = self.brief.loop.run(self.job, self.gang, self.need.threads, lambda: self.stopping)

    def _begin(self) -> None:
        self.begun = True
        if self.members:
            self.watchdog = _Watchdog(self.members, [each.train.remote(self.job) for each in self.members], self._lost)

    def _advance(self) -> bool:
        """Whether the trial is over."""
        if not self.begun:
            self._begin()
        if self.watchdog and self.watchdog.barked.is_set():
            raise WorkerDiedError("a worker is gone")
        start = time.monotonic()
        epoch = math.floor(self.at.epoch) if self.at else 0
        for at in self.steps:
            if self.at is None:
                self.began = at.step
            self.at = at
            # Its last step is no place to pause: what follows is measuring, and the commit.
            if at.outcome is not None or at.step >= at.total:
                continue
            passed = time.monotonic() - start
            if passed > SLICE or (passed > QUICK and math.floor(at.epoch) > epoch):
                return False
        if self.watchdog:
            self.spoilt = not self.watchdog.dismiss()
        return True

    def _wind_up(self) -> None:
        """Let the trial save a checkpoint and end, if it has not ended."""
        if self.begun and not self.spoilt:
            self.stopping = True
            for at in self.steps:
                self.at = at
            if self.watchdog:
                self.spoilt = not self.watchdog.dismiss()
        self.steps = iter(())

    def _failed(self, error: Exception) -> dict[str, Any]:
        """Raise a worker's death, so that Tune begins again with fresh workers; record an error of the code."""
        if isinstance(error, TakenOver):
            self.spoilt = self.watchdog is not None  # the others of the gang are in the middle of a step
            self.steps = iter(())
            return self._report(not self.spoilt) | {"spoilt": self.spoilt}
        text = "".join(traceback.format_exception(error))
        if self.watchdog:
            verdict = self.watchdog.verdict(text)
            self.spoilt = True
            if verdict is None:
                raise WorkerDiedError("another worker of the gang died") from error
            text = verdict
        # An error on a GPU may poison its process for good.
        self.spoilt = self.spoilt or self.gang.device.type == "cuda"
        _record(self.brief.loop, self.job, text)
        self.steps = iter(())
        return self._report(not self.spoilt) | {"outcome": str(Outcome.FAILED), "spoilt": self.spoilt}

    def _lost(self) -> None:
        """Called by the watchdog when a death has left this process hanging in a collective."""
        text = self.watchdog.found if self.watchdog else None
        if text:
            _record(self.brief.loop, self.job, text)
        os._exit(1)

    def _report(self, over: bool) -> dict[str, Any]:
        at = self.at
        result = {
            "at": at.step if at else 0,
            "began": self.began,
            "epoch": at.epoch if at else 0.0,
            "loss": at.loss if at else None,
            "outcome": str(at.outcome) if at and at.outcome else None,
            "spoilt": False,
            "done": over,
        }
        # Absent rather than None: ASHA compares what is there.
        return result | ({"accuracy": at.accuracy} if at and at.accuracy is not None else {})

    # --- a gang ----------------------------------------------------------------------------------

    def _raise(self) -> list[Any]:
        """Start the other workers, one in each further bundle of this trial's placement group."""
        place = ray.util.get_current_placement_group()
        assert place is not None
        return [
            ray.remote(Member)
            .options(
                num_cpus=self.need.threads,
                num_gpus=self.need.gpus,
                memory=self.need.memory,
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=rank),
            )
            .remote(self.brief.loop, self.need.threads)
            for rank in range(1, self.need.workers)
        ]

    def _meet(self, device: "torch.device") -> "Gang":
        """Join with the other workers; the gang stays together for all later trials."""
        loop, workers = self.brief.loop, self.need.workers
        address, port = loop.host(ray.util.get_node_ip_address(), workers)
        joins = [each.join.remote(rank, workers, address, port) for rank, each in enumerate(self.members, start=1)]
        watchdog = _Watchdog(self.members, joins, lambda: os._exit(1))
        gang = loop.join(0, workers, address, port, device)
        if not watchdog.dismiss():
            raise WorkerDiedError(watchdog.found or "a worker died while the gang met")
        return gang


class _Watchdog:
    """Watches what the other workers are doing, from a thread: this process may hang in a collective meanwhile.

    When one of them dies or fails it ends the others, which breaks the collective; if that does not
    free this process either, it calls `lost`.
    """

    def __init__(self, members: list[Any], answers: list[Any], lost: Callable[[], None]) -> None:
        self.members = members
        self.answers = answers
        self.lost = lost
        self.found: str | None = None  # the error that a worker met; None for a death
        self.barked = threading.Event()
        self.over = threading.Event()  # all answered and well
        self.freed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def dismiss(self) -> bool:
        """Wait for the end of what they do. Whether it went well."""
        while not self.barked.is_set():
            if self.over.wait(0.005):
                return True
        self.freed.set()
        return False

    def verdict(self, own: str) -> str | None:
        """The error to record, where `own` is what this process met; None where a worker died."""
        self.freed.set()
        return self.found if self.barked.wait(2 * NOTICE) else own

    def _watch(self) -> None:
        left = self.answers
        while left:
            ready, left = ray.wait(left)
            dead, error = self._hear(ready)
            if not dead and error is None:
                continue
            # A death reaches the others as a broken connection: is there one behind this error?
            if not dead and left:
                late, _ = ray.wait(left, num_returns=len(left), timeout=NOTICE)
                dead, _ = self._hear(late)
            self.found = None if dead else error
            self.barked.set()
            for member in self.members:
                ray.kill(member)
            if not self.freed.wait(PATIENCE):
                self.lost()
            return
        self.over.set()

    @staticmethod
    def _hear(answers: list[Any]) -> tuple[bool, str | None]:
        """Whether a worker died, and the error that one of them met."""
        error = None
        for answer in answers:
            try:
                error = ray.get(answer) or error
            except RayActorError:
                return True, None
            except RayError as raised:
                error = str(raised)
        return False, error
