"""Which kind of machine Ray's autoscaler starts: spot where there is any, on demand where there is none.

Ray (2.60) tells its scorer which kinds of machines the cloud last refused, but its own scorer does not look there: it
would ask for the same spot machines for ever. cluster/node.sh puts this one in its place, on the head of a cluster.
Spot and on-demand machines of one kind score the same, and Ray takes the later name in the alphabet: `spot_gpu` comes
before `on_demand_gpu`.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol


class Availability(Protocol):
    """As much of Ray's NodeAvailabilitySummary as is needed: by kind of node, what came of the last launch."""

    node_availabilities: Mapping[str, "Record"]


class Record(Protocol):
    is_available: bool


def score(
    node: Mapping[str, float],
    demands: Sequence[Mapping[str, float]],
    kind: str,
    *,
    node_availability_summary: Availability,
) -> tuple[bool, bool, int, float, float] | None:
    """How well a new node of this `kind`, with the resources of `node`, serves what waits; the highest is started.
    None where it serves nothing.

    In this order: the cloud did not refuse the kind in the last half hour; no GPU is started for who asks for none;
    it has most of the kinds of resources asked for; it is used best, in its least used resource and on average.
    """
    left = dict(node)
    served = 0
    for demand in demands:
        if all(left.get(name, 0) >= amount for name, amount in demand.items()):
            served += 1
            for name, amount in demand.items():
                left[name] = left.get(name, 0) - amount
    used = [amount * ((amount - left[name]) / amount) ** 3 for name, amount in node.items() if amount >= 1]
    if not served or not used:
        return None
    record = node_availability_summary.node_availabilities.get(kind)
    asked = {name for demand in demands for name, amount in demand.items() if amount > 0}
    matching = sum(name in asked and amount >= 1 for name, amount in node.items())
    return (
        record is None or record.is_available,
        "GPU" in asked or not node.get("GPU"),
        matching,
        min(used),
        sum(used) / len(used),
    )
