"""One task on every node of the cluster: what `bnscale doctor --cluster` looks with, and a study before it starts."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Found = TypeVar("Found")
Asked = ParamSpec("Asked")

PATIENCE = 60.0  # seconds in which a node starts a process and answers


@dataclass(frozen=True)
class Reply(Generic[Found]):
    """Of one node."""

    node: str  # Ray's id
    name: str  # what people call it: its host, with the beginning of the id where two have the same
    found: Found | None
    error: str | None  # the last line of it; None where it answered
    lost: bool  # no answer at all: too busy, or gone meanwhile


def on_every_node(function: Callable[Asked, Found], *args: Asked.args, **kwargs: Asked.kwargs) -> list[Reply[Found]]:
    """Call `function` once on every node that is there, at once, in a process of its own with no CPU kept for it."""
    names = node_names()
    call = ray.remote(function)
    asked = {
        node: call.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(*args, **kwargs)
        for node in names
    }
    done, late = ray.wait(list(asked.values()), num_returns=len(asked), timeout=PATIENCE)
    for each in late:
        ray.cancel(each, force=True)
    return [_reply(node, names[node], answer if answer in done else None) for node, answer in asked.items()]


def this_node() -> str:
    """Ray's id of the node that this process is on."""
    return str(ray.get_runtime_context().get_node_id())


def node_names() -> dict[str, str]:
    """What people call the nodes that are there, by Ray's id; the head first."""
    alive = sorted(
        (node for node in ray.nodes() if node["Alive"]),
        key=lambda node: ("node:__internal_head__" not in node["Resources"], node["NodeManagerHostname"]),
    )
    hosts = Counter(node["NodeManagerHostname"] for node in alive)
    return {
        node["NodeID"]: node["NodeManagerHostname"]
        + (f" {node['NodeID'][:6]}" if hosts[node["NodeManagerHostname"]] > 1 else "")
        for node in alive
    }


@dataclass(frozen=True)
class Meeting:
    """A gang that is to sum, with one worker in each place."""

    places: list[str]  # Ray's ids of nodes
    gpu: bool  # each worker has one: over NCCL; else over gloo, on the CPU whatever GPUs there are


def meetings(nodes: list[dict[str, Any]], workers_alone: int) -> list[Meeting]:
    """A gang over all nodes with GPUs and one over all without, of those that may have trials (which ask for a CPU).

    A node that is alone in its gang has several workers, on its GPUs where it has so many.
    """
    found = []
    hosts = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    for gpu in (True, False):
        group = [node for node in hosts if (node["Resources"].get("GPU", 0) >= 1) is gpu]
        workers = workers_alone if len(group) == 1 else 1
        enough = gpu and all(node["Resources"]["GPU"] >= workers for node in group)
        if group:
            found.append(Meeting([node["NodeID"] for node in group] * workers, enough))
    return found


def rehearse(workers_alone: int = 2) -> list[tuple[str, str | None]]:
    """Raise gangs over the nodes that trials may run on, and let each sum once; none where there is no such node.

    Of each who took part and over what, and the error that it ended with; None where it went well.
    """
    return [_meet(meeting, node_names()) for meeting in meetings(ray.nodes(), workers_alone)]


def _meet(meeting: Meeting, names: dict[str, str]) -> tuple[str, str | None]:
    places, gpu = meeting.places, meeting.gpu
    nodes = len(set(places))
    who = f"{len(places)} processes on {nodes} node{'s' if nodes > 1 else ''} over {'NCCL' if gpu else 'gloo'}"
    worker = ray.remote(_Worker)
    gang: list[Any] = [
        worker.options(
            num_cpus=0, num_gpus=int(gpu), scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(gpu)
        for node in places
    ]
    try:
        missing = _unheard(names, places, [each.ready.remote() for each in gang])
        if missing:
            return who, f"{missing} started no worker within {PATIENCE:.0f} s; are its GPUs busy?"
        address, port = ray.get(gang[0].host.remote(len(gang)), timeout=PATIENCE)
        sums = [each.join.remote(rank, len(gang), address, port) for rank, each in enumerate(gang)]
        missing = _unheard(names, places, sums)
        if missing:
            return who, f"{missing} did not meet {address}:{port} within {PATIENCE:.0f} s; open the ports between nodes"
        seconds = max(ray.get(sums))
        return f"{who}, {1000 * seconds:.1f} ms", None
    except RayError as error:
        return who, _last_line(error)
    finally:
        for each in gang:
            ray.kill(each)


class _Worker:
    """Of a gang that only sums."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu

    def ready(self) -> None: ...

    def host(self, workers: int) -> tuple[str, int]:
        from bnscale.engine import deepspeed

        return deepspeed.host(ray.util.get_node_ip_address(), workers)

    def join(self, rank: int, workers: int, address: str, port: int) -> float:
        """Seconds of a sum over the gang."""
        import torch

        from bnscale.engine import deepspeed

        # Of a worker that asked for no GPU Ray hides none: what is there does not say what the others use.
        device = torch.device("cuda", 0) if self._gpu else torch.device("cpu")
        return deepspeed.rehearse(deepspeed.join(rank, workers, address, port, device))


def _unheard(names: dict[str, str], places: list[str], answers: list[Any]) -> str:
    """The nodes that have not answered in time; raises what the others raised."""
    deadline = time.monotonic() + PATIENCE
    left = answers
    while left and time.monotonic() < deadline:
        ready, left = ray.wait(left, timeout=max(0.0, deadline - time.monotonic()))
        ray.get(ready)
    return ", ".join(
        dict.fromkeys(names.get(node, node[:6]) for node, each in zip(places, answers, strict=True) if each in left)
    )


def _reply(node: str, name: str, answer: Any | None) -> Reply[Any]:
    if answer is None:
        return Reply(node, name, None, f"no answer within {PATIENCE:.0f} s", lost=True)
    try:
        return Reply(node, name, ray.get(answer), None, lost=False)
    except RayError as error:
        return Reply(node, name, None, _last_line(error), lost=not isinstance(error, RayTaskError))


def _last_line(error: RayError) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = str(cause).strip().splitlines()
    return lines[-1] if lines else type(cause).__name__
