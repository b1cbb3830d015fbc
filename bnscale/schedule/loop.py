"""What the workers of a trial do, as the schedule sees it: nothing here knows Ray."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from bnscale.schedule.failure import Failure
from bnscale.trial import Refusal

if TYPE_CHECKING:
    import torch

    from bnscale.engine import Gang
    from bnscale.train import Job, Progress


class Loop(Protocol):
    """What the workers of a trial do. `Training` is the real one; a test may bring a toy."""

    def run(
        self, jobs: "Sequence[Job]", gang: "Gang", threads: int, stop: Callable[[], bool]
    ) -> "Iterator[list[Progress]]":
        """Train some trials, one or a cohort: where each of them stands, in their order.

        It asks `stop` after every step or few, before it saves and measures, and yields before the next: so what passes
        between a yield and the next question is training, and nothing else. One that has ended keeps its outcome.
        """

    def fail(self, job: "Job", failure: Failure) -> None:
        """Record that the trial has failed."""

    def log(self, job: "Job", text: str) -> str:
        """Add to the trial's log; returns where that is."""

    def ready(self, threads: int) -> "Gang":
        """Pin this process to its share of the machine, and find its device: a gang of one. Called once, and first."""

    def host(self, address: str, workers: int) -> tuple[str, int]: ...

    def join(self, rank: int, workers: int, address: str, port: int, device: "torch.device") -> "Gang": ...


class Training:
    """The training loop and DeepSpeed's gangs, imported where they run: a worker that is alone needs no DeepSpeed."""

    def run(
        self, jobs: "Sequence[Job]", gang: "Gang", threads: int, stop: Callable[[], bool]
    ) -> "Iterator[list[Progress]]":
        from bnscale import train

        return train.run(jobs, gang, threads, stop)

    def fail(self, job: "Job", failure: Failure) -> None:
        from bnscale import train

        train.fail(job, failure.text, failure.kind)

    def log(self, job: "Job", text: str) -> str:
        from bnscale import train

        return train.log(job, text)

    def ready(self, threads: int) -> "Gang":
        os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        import torch

        from bnscale.engine import Gang

        torch.set_num_threads(threads)
        return Gang(device=torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))

    def host(self, address: str, workers: int) -> tuple[str, int]:
        from bnscale.engine import deepspeed

        return deepspeed.host(address, workers)

    def join(self, rank: int, workers: int, address: str, port: int, device: "torch.device") -> "Gang":
        from bnscale.engine import deepspeed

        return deepspeed.join(rank, workers, address, port, device)


def record(loop: Loop, job: "Job", failure: Failure) -> None:
    """Write the failure down, if that can be: on a full disk the trial has no end, and the next run tries it again."""
    with contextlib.suppress(Refusal, OSError):
        loop.fail(job, failure)
