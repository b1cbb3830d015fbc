"""Whose turn it is to train a trial, where several drivers share a store: leases as the schedule sees them."""

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bnscale import lease
from bnscale.lease import Held, Lease
from bnscale.storage import storage
from bnscale.store import Manifest, Store
from bnscale.trial import Outcome, Refusal

if TYPE_CHECKING:
    from bnscale.train import Job


@dataclass(frozen=True)
class Elsewhere:
    """What another driver does or did with a trial, so that it is not trained here."""

    who: str  # "another driver" where it has ended
    over: bool
    outcome: Outcome | None = None  # None while it is trained, and where successive halving has given it up


@dataclass(frozen=True)
class Turn:
    """The right to train a trial, until `end`."""

    job: "Job"  # with the fence of the lease
    store: Store
    lease: Lease

    def end(self) -> None:
        """What cannot be given back is free when this driver ends."""
        with contextlib.suppress(OSError):
            lease.release(self.store.storage, self.lease)

    def overtaken(self) -> bool:
        """Whether another driver trains the trial by now, or has trained it to its end, while this one slept."""
        from bnscale.train import readings

        with contextlib.suppress(Refusal, OSError):
            manifest = self.store.manifest(self.job.trial.id)
            if manifest is not None:
                return manifest.fence > self.lease.fence or manifest.covers(readings(self.job.probes))
        return False


def take(job: "Job", driver: str, *, halving: bool) -> Turn | Elsewhere:
    """Claim a trial just before its training begins. Raises `StoreFailure`, and `Refusal` for a damaged manifest.

    On a machine that does not see the driver's store that is `Unseen`, and nothing is made there: its node may have
    joined after all nodes were asked.
    """
    lease.check_seen(storage(job.store), driver)
    store = Store(job.store)
    got = lease.claim(store.storage, job.trial.id, driver)
    if isinstance(got, Held):
        return Elsewhere(got.who, over=False)
    # Only now, for until then its holder may have trained it to the end.
    manifest = store.manifest(job.trial.id)
    if manifest and manifest.fence >= got.fence:
        got = lease.claim(store.storage, job.trial.id, driver, above=manifest.fence)
        if isinstance(got, Held):
            return Elsewhere(got.who, over=False)
    turn = Turn(replace(job, fence=got.fence), store, got)
    ended = _ended(job, manifest, halving=halving)
    if ended is not None:
        turn.end()
        return ended
    return turn


def look(job: "Job", driver: str, dead: Collection[str], *, halving: bool) -> Elsewhere | None:
    """What became of a trial that another driver trained; None where it is free. Raises `StoreFailure`."""
    store = Store(job.store)
    held = lease.holder(store.storage, job.trial.id)
    ended = _ended(job, store.manifest(job.trial.id), halving=halving)
    if ended is None and held and held.driver not in {driver, *dead}:
        return Elsewhere(held.who, over=False)
    return ended


def _ended(job: "Job", manifest: Manifest | None, *, halving: bool) -> Elsewhere | None:
    """How a trial ended after it was planned here. An error is another driver's as it would be ours."""
    if manifest is None:
        return None
    from bnscale.train import readings

    failed = manifest.outcome is Outcome.FAILED and manifest.attempts > job.attempts
    if failed or manifest.covers(readings(job.probes)):
        return Elsewhere("another driver", over=True, outcome=manifest.outcome)
    if halving and manifest.outcome is None and manifest.facts.get("stopped_early"):
        return Elsewhere("another driver", over=True)
    return None
