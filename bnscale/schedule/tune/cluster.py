"""The Ray cluster that trials run on: one that is there, or one of our own."""

import contextlib
import gc
import logging
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._common.utils import get_ray_address_file
from ray._private.node import Node as RayNode

from bnscale.schedule.needs import ACCELERATOR, Cluster, Node
from bnscale.schedule.tune.entry import knock, no_stderr
from bnscale.schedule.tune.nodes import on_every_node
from bnscale.trial import Refusal

OBJECT_STORE = 150 * 2**20  # bytes; a few thousand jobs and nothing else travel through it
TRIES = 3  # of starting a cluster here: a busy machine may take longer than Ray waits
OWNER = "bnscale-owner"  # the file in each of our temporary folders that names its process
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # of a pod
_TOKEN = secrets.token_hex(32)  # of the clusters that this process starts


@contextlib.contextmanager
def connect(address: str | None, *, declared: Node | None = None) -> Iterator[Cluster]:
    """The Ray cluster at `address`, or RAY_ADDRESS, or that `ray start` left on this machine; else one of our own,
    for as long as the context lasts. `local` always starts one. `declared` is what our own says it has, whatever this
    machine has: to see how a larger one is scheduled.

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
        home = _start(declared)
    try:
        gcs = ray.get_runtime_context().gcs_address
        yield Cluster(gcs, home is not None, _most(gcs) if found else None, _nodes())
    finally:
        ray.shutdown()
        if home:
            shutil.rmtree(home, ignore_errors=True)


def running(address: str | None) -> str:
    """The address of a cluster that is there, for `connect`. Raises `Refusal` where none is."""
    found = address or os.environ.get("RAY_ADDRESS") or _left_running()
    if not found or found == "local":
        raise Refusal(
            "address: no Ray cluster runs on this machine; name one with --address host:port, or start one with "
            "`ray start --head` or `ray up`"
        )
    return found


def _hush() -> None:
    """What Ray and Tune say about errors and dead workers on the terminal, we say in our own words."""
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    setattr(ray._private.worker, "print_to_stdstream", lambda data, ignore_prefix: None)  # noqa: B010 - untyped


def _left_running() -> str | None:
    """Address of the cluster that `ray start` began on this machine, if it still answers."""
    try:
        found = Path(get_ray_address_file(None)).read_text().strip()
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
    if address == "auto":
        address = _left_running() or address
    if address != "auto":
        knock(address)
    try:
        with no_stderr():
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # Ray raises a dozen classes here
        ray.shutdown()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refusal(
            f"address {address}: {reason.rstrip('.')}; this machine must be one of the cluster's nodes. "
            f"Otherwise {way_out}"
        ) from None


def _start(declared: Node | None) -> Path:
    """A cluster of this machine alone; returns the folder with all its files."""
    sweep()
    # With a token at hand Ray turns authentication on by itself and writes none into ~/.ray.
    os.environ.setdefault("RAY_AUTH_TOKEN", _TOKEN)
    # Workers find the package where this process found it, installed or not.
    package = str(Path(__file__).parents[3])
    paths = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([package, paths] if paths else [package])
    for left in reversed(range(TRIES)):
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            gc.collect()  # what a start that failed has left is no news
        try:
            return _start_once(declared)
        except Exception as error:  # Ray raises no class of its own here, and waits half a minute, not to be changed
            if not left or "timed out during startup" not in str(error):
                raise
    raise AssertionError("the last try returns or raises")


def _start_once(declared: Node | None) -> Path:
    has: dict[str, Any] = {}
    if declared:
        has = {"num_cpus": declared.cpus, "num_gpus": declared.gpus, "_memory": declared.memory}
    # Ray keeps sockets there, and the name of a socket may have 107 letters.
    folder = tempfile.gettempdir() if len(tempfile.gettempdir()) < 25 else "/tmp"
    home = own_folder(folder)
    try:
        with _spared():
            ray.init(
                "local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                _temp_dir=str(home),
                **has,
            )
    except BaseException:
        ray.shutdown()
        shutil.rmtree(home, ignore_errors=True)
        raise
    return home


@contextlib.contextmanager
def _spared() -> Iterator[None]:
    """Inside, a cluster starts without what one of a single machine that nobody else uses has no use for: an
    autoscaler, what copies logs to the driver, and the server that a dashboard would need, for which Ray waits. That is
    a quarter of the processor time of a start, and as much time again at its end."""
    kept = {name: getattr(RayNode, name) for name in ("start_monitor", "start_log_monitor", "start_api_server")}
    for name in kept:
        setattr(RayNode, name, lambda self, **asked: None)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(RayNode, name, method)


def own_folder(parent: str) -> Path:
    """A new folder that says whose it is."""
    folder = Path(tempfile.mkdtemp(prefix=f"bnscale-{os.getpid()}-", dir=parent))
    (folder / OWNER).write_text(_owner(os.getpid()))
    return folder


def _owner(pid: int) -> str:
    return f"{socket.gethostname()} {pid} {psutil.Process(pid).create_time()}"


def sweep() -> None:
    """Remove the folders of our own that runs of this machine left when they were killed."""
    parents = {tempfile.gettempdir(), "/tmp"}
    for note in [note for parent in parents for note in Path(parent).glob(f"bnscale-*/{OWNER}")]:
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            owner = note.read_text()
            host, pid, _ = owner.split()
            if host == socket.gethostname() and not (psutil.pid_exists(int(pid)) and _owner(int(pid)) == owner):
                shutil.rmtree(note.parent, ignore_errors=True)


def _most(address: str) -> list[Node] | None:
    """Every node that an autoscaler may bring the cluster to; None where there is none.

    Ray keeps that to its autoscaler alone: `ray up` leaves a file on the head, KubeRay an object with Kubernetes.
    """
    config = _autoscaling(address)
    if config is None or config["provider"]["type"] == "local":  # machines that are there, of what size no file says
        return None
    kinds = dict(config["available_node_types"])
    head = kinds.pop(config["head_node_type"])
    workers = [_node(kind["resources"]) for kind in kinds.values() for _ in range(kind.get("max_workers", 0))]
    best = sorted(workers, key=lambda node: (node.gpus, node.cpus, node.memory), reverse=True)
    return [_node(head["resources"]), *best[: config["max_workers"]]]


def _autoscaling(address: str) -> dict[str, Any] | None:
    """What the autoscaler of the cluster at `address` was told."""
    name = os.environ.get("RAY_CLUSTER_NAME")  # of Kubernetes; set by KubeRay in every container
    if name and os.environ.get("KUBERNETES_SERVICE_HOST"):
        from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

        try:
            namespace = (SERVICE_ACCOUNT / "namespace").read_text().strip()
            kept: dict[str, Any] = AutoscalingConfigProducer(name, namespace)()
        except Exception:  # nobody gave this pod the right to ask, and then it has no autoscaler either
            return None
        return kept
    # The one process that was given the file runs on the head, where the driver of such a cluster runs, too.
    for process in psutil.process_iter(["cmdline"]):
        words = dict(word.partition("=")[::2] for word in process.info["cmdline"] or [])
        file = words.get("--autoscaling-config")
        if file and words.get("--gcs-address") == address:
            with contextlib.suppress(OSError):
                told: dict[str, Any] = yaml.safe_load(Path(file).read_text())
                return told
    return None


def _node(resources: dict[str, float]) -> Node:
    types = sorted(name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR))
    return Node(
        int(resources.get("CPU", 0)),
        int(resources.get("GPU", 0)),
        int(resources.get("memory", 0)),
        types[0] if types else None,
    )


def _nodes() -> list[Node]:
    """Those that are there; each with GPUs says how much memory one has."""
    there = {node["NodeID"]: _node(node["Resources"]) for node in ray.nodes() if node["Alive"]}
    told = {}
    if any(node.gpus for node in there.values()):
        told = {reply.node: reply.found for reply in on_every_node(smallest_gpu)}
    return [replace(node, gpu_memory=told.get(name)) if node.gpus else node for name, node in there.items()]


def smallest_gpu() -> int | None:
    """Bytes of the smallest GPU of this machine, as its driver's own tool says, which takes none of them; None where
    there is no such tool."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return min(int(line) * 2**20 for line in asked.stdout.split("\n") if line.strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def roomy_nodes(gpus: int = 0) -> list[str]:
    """Ids of the nodes that are there and have a CPU for a trial, and so many GPUs."""
    there = [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return [name for name, has in there if has.get("CPU", 0) >= 1 and has.get("GPU", 0) >= gpus]


def draining_nodes() -> list[str]:
    """Ids of the nodes that are to go: drained by their autoscaler, by `ray drain-node`, or by the machine's end."""
    from ray._private.state import state

    return list(state.get_draining_nodes())
