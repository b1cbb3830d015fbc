"""Last words: what a worker that ends itself leaves for the driver, in the memory of the cluster's head."""

import pickle

from ray.experimental import internal_kv

from bnscale.schedule.failure import Failure

_NAMESPACE = "bnscale"


def leave(run: str, trial: str, failure: Failure) -> None:
    """To be taken by the driver of `run`, which hears only of a death."""
    internal_kv._internal_kv_put(f"{run}/{trial}", pickle.dumps(failure), namespace=_NAMESPACE)


def take(run: str, trial: str) -> Failure | None:
    """What the latest worker of a trial has left, once."""
    key = f"{run}/{trial}"
    left: bytes | None = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    if left is None:
        return None
    internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
    failure: Failure = pickle.loads(left)
    return failure
