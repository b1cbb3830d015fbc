"""What each trial asks of a cluster, and what a cluster has. Nothing here knows Ray."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bnscale.trial import Refusal, Trainable

if TYPE_CHECKING:
    from bnscale.schedule.budget import Forecast
    from bnscale.train import Job

GIB = 2**30
ACCELERATOR = "accelerator_type:"  # how Ray calls the resource that tells the type of a node's GPUs
SHARERS = 8  # trials on one GPU at most
CONTEXT = GIB // 2  # bytes of a GPU that each process takes for itself, beside its tensors
SPARE = 1.25  # times the foreseen tensors: what an allocator holds beside them

# Bytes of one GPU of each type, by Ray's name for it; where a type is sold with several sizes, the smallest.
GPU_MEMORY = {
    name: gib * GIB
    for name, gib in {
        "K80": 12, "P4": 8, "P100": 12, "V100": 16, "T4": 16, "A10": 24, "A10G": 24, "L4": 24, "L40": 48, "L40S": 48,
        "A100": 40, "A100-40G": 40, "A100-80G": 80, "H100": 80, "H20": 96, "H200": 141, "GH200": 96, "B200": 180,
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    cpus: int
    gpus: int
    memory: int  # bytes that Ray may hand out
    gpu_type: str | None = None  # as Ray calls it: "H100"; None without GPUs
    gpu_memory: int | None = None  # bytes of one of its GPUs; None where it did not tell


@dataclass(frozen=True)
class Cluster:
    """Where trials run."""

    address: str  # host:port
    ours: bool  # started by `connect`, and ended by it
    most: list[Node] | None  # every node that an autoscaler may bring it to; None where there is none
    nodes: list[Node]  # those that are there
    gpu_type: str | None = None  # the only one that trials may use; None: any

    @property
    def cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """Those that may come count: nothing may ask for a GPU before there is one, and none comes unasked."""
        return max(sum(node.gpus for node in nodes) for nodes in (self.nodes, self.most or []))

    @property
    def memory(self) -> int:
        """Bytes, over all nodes."""
        return sum(node.memory for node in self.nodes)

    @property
    def gpu_memory(self) -> int | None:
        """Bytes of its smallest GPU; None where not all are known, and where there is none."""
        sizes = [
            node.gpu_memory or GPU_MEMORY.get(node.gpu_type or "") for node in self.most or self.nodes if node.gpus
        ]
        known = [size for size in sizes if size is not None]
        return min(known) if known and len(known) == len(sizes) else None

    def slots(self, threads: int, memory: int, sharers: int = 1) -> int:
        """Workers at work at once, each with `threads` CPUs, `memory` bytes, and where there are GPUs one of these, on
        which there are so many `sharers`."""
        each = [
            min([node.cpus // threads, node.memory // max(1, memory), *([node.gpus * sharers] if self.gpus else [])])
            for node in self.most or self.nodes
        ]
        return sum(each)

    def sharers(self, threads: int, on_gpu: int) -> int:
        """Trials on one GPU at once, of which each takes so many bytes of it: each has CPUs of its own. 1 where the
        memory of a GPU is not known."""
        room = self.gpu_memory
        cpus = [node.cpus // threads // node.gpus for node in self.most or self.nodes if node.gpus]
        if room is None or not cpus:
            return 1
        return max(1, min(SHARERS, min(cpus), int(room // (SPARE * on_gpu + CONTEXT))))


@dataclass(frozen=True)
class Need:
    """What one trial asks of the cluster. Trials with equal needs use the same warm actors."""

    workers: int
    threads: int
    gpus: int  # a worker; 0 without any
    memory: int  # bytes a worker
    gpu_type: str | None = None  # as Ray calls it; None: any
    sharers: int = 1  # trials on one GPU, this one with them

    @property
    def gpu_share(self) -> float:
        """What a worker has of a GPU, as Ray counts: in ten-thousandths, and so many of them fit."""
        return self.gpus * math.floor(10_000 / self.sharers) / 10_000

    def bundles(self) -> list[dict[str, float]]:
        gpu: dict[str, float] = {"GPU": self.gpu_share} if self.gpus else {}
        if self.gpus and self.gpu_type:
            gpu[f"{ACCELERATOR}{self.gpu_type}"] = 0.001  # a node has one of it, for whoever asks
        return [{"CPU": self.threads, "memory": self.memory, **gpu} for _ in range(self.workers)]


def needs_of(
    jobs: Sequence["Job"],
    forecasts: Mapping[str, "Forecast"],
    cluster: Cluster,
    workers: int,
    threads: int,
    sharers: Mapping[str, int] | None = None,
) -> dict[str, Need]:
    """Resources by trial id, in as few classes as memory allows: a warm actor serves only its own class.

    `sharers` says how many trials like each share a GPU; those that it does not name have one to themselves.
    """
    gpus = 1 if cluster.gpus else 0
    on_one = sharers or {}
    # DeepSpeed has no optimiser for nothing; a trial that trains nothing only measures.
    gang = {job.trial.id: 1 if job.trial.trainable is Trainable.NONE else workers for job in jobs}
    memory = {}
    for trial, size in gang.items():
        wanted = forecasts[trial].memory
        power = GIB << max(0, math.ceil(math.log2(max(wanted, 1) / GIB)))
        memory[trial] = power if cluster.slots(threads, power) >= size else wanted
    top = max(memory.values(), default=GIB)
    most = max([1, *on_one.values()])
    if cluster.slots(threads, top, most) == cluster.slots(threads, 0, most):  # what limits the workers is not memory
        memory = dict.fromkeys(memory, top)
    needs = {
        trial: Need(size, threads, gpus, memory[trial], cluster.gpu_type, on_one.get(trial, 1) if gpus else 1)
        for trial, size in gang.items()
    }
    for trial, need in needs.items():
        if cluster.slots(threads, need.memory) < need.workers:
            raise Refusal(_too_large(trial, need, cluster))
    return needs


def _too_large(trial: str, need: Need, cluster: Cluster) -> str:
    gpu = ", 1 GPU" if need.gpus else ""
    nodes = ", ".join(
        f"{n} x ({node.cpus} CPUs, {node.gpus} GPUs, {node.memory / GIB:.1f} GiB)"
        for node, n in Counter(cluster.most or cluster.nodes).items()
    )
    return (
        f"{trial}: needs {need.workers} worker{'s' if need.workers > 1 else ''} of {need.threads} CPUs{gpu} and "
        f"{need.memory / GIB:.1f} GiB each; the cluster {'may have' if cluster.most else 'has'} {nodes}. "
        "Ask for fewer workers a trial, fewer threads a worker, smaller cohorts or a smaller batch, or a larger "
        "cluster by its address"
    )


def gpu_type(device: str) -> str | None:
    """What Ray calls a GPU that torch calls "NVIDIA H100 80GB HBM3": "H100". None for what is no GPU of NVIDIA's."""
    model = re.match(r"(?:NVIDIA|Tesla|Quadro)\s+((?:[A-Z]+\s+)*[A-Z0-9]*\d[A-Z0-9]*)", device)
    if model:
        return model[1].replace(" ", "-")
    return device.removeprefix("NVIDIA ").strip().replace(" ", "-") if device.startswith("NVIDIA ") else None


def on_one_type(cluster: Cluster, devices: list[str]) -> Cluster:
    """The part of a cluster with GPUs of one type: that of the first of `devices`, on which the study has trained, or
    else that of which the cluster has most, or may have. Raises Refusal where it has none of them, and where an
    autoscaler may bring GPUs of which its file does not say the type."""
    here, may = _by_type(cluster.nodes), _by_type(cluster.most or [])
    if not devices:
        first = next((types.most_common(1)[0][0] for types in (here, may) if types), None)
    else:
        first = gpu_type(devices[0])
        if first is None and (here or may):
            raise Refusal(_other_type(devices[0], here | may))
    untold = any(node.gpus and not node.gpu_type for node in cluster.most or [])
    if untold and first not in here and first not in may:
        raise Refusal(
            "--same-gpu: the cluster's file does not say the type of the GPUs that may come; give each of its node "
            "types with GPUs a resource such as accelerator_type:L4: 1, or leave --same-gpu out"
        )
    if first is None:
        return cluster  # without GPUs
    if first not in here and first not in may:
        raise Refusal(_other_type(devices[0], here | may))
    fit = [node for node in cluster.nodes if node.gpu_type == first or not node.gpus]
    # Where nothing of that type may come, what is there is all.
    most = [node for node in cluster.most or [] if node.gpu_type == first or not node.gpus] if first in may else None
    return replace(cluster, nodes=fit, most=most, gpu_type=first)


def _by_type(nodes: list[Node]) -> Counter[str]:
    """GPUs."""
    types = Counter[str]()
    for node in nodes:
        if node.gpu_type:
            types[node.gpu_type] += node.gpus
    return types


def _other_type(device: str, here: Counter[str]) -> str:
    there = ", ".join(here) or "no GPU"
    return (
        f"--same-gpu: this study began on {device}, and the cluster has {there}; leave --same-gpu out (the report "
        "shows what ran where), or choose another cluster with --address or another store with --store"
    )
