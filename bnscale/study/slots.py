"""What a plan's makespan is forecast for: so many GPUs or CPUs, and the units that a study has for them."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import psutil
import torch

from bnscale.schedule.budget import Forecast
from bnscale.schedule.makespan import Makespan, Unit, rounds
from bnscale.schedule.needs import Cluster, Node
from bnscale.study.asked import Asked
from bnscale.trial import Refusal, Trainable, Trial


@dataclass(frozen=True)
class Slots:
    """What the makespan is forecast for."""

    count: int  # workers at work at once
    said: str  # "64 GPUs", "2 CPUs of this machine"
    gpus: int
    memory: int  # bytes of main memory; where it is another machine's, as much for each worker as this one has

    @classmethod
    def of(cls, gpus: int | None, cpus: int | None, workers: int, threads: int) -> "Slots":
        """As asked for, or of this machine. Raises `Refusal` for fewer than one trial takes."""
        here = "" if gpus or cpus else " of this machine"
        if here:
            gpus, cpus = torch.cuda.device_count() or None, os.cpu_count() or 1
        most = {"GPU": gpus, "CPU": None if cpus is None else cpus // threads}
        count = min(each for each in most.values() if each is not None)
        each = {"GPU": gpus, "CPU": None if here and gpus else cpus}
        said = " and ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in each.items() if n)
        if count < workers:
            raise Refusal(
                f"{said}{here}: room for {count} workers of {threads} CPUs, and a trial has {workers}; give "
                "more with --gpus or --cpus, or ask for less with --workers-per-trial or --threads"
            )
        return cls(count, said + here, gpus or 0, psutil.virtual_memory().total * (1 if here else count))

    def cluster(self, threads: int) -> Cluster:
        """As one machine, with GPUs like that of this one."""
        gpu_memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        return Cluster("", True, None, [Node(self.count * threads, self.gpus, self.memory, gpu_memory=gpu_memory)])


def units(trials: Iterable[Trial], forecasts: Mapping[str, Forecast], workers: int) -> list[Unit]:
    """What the schedule trains in one go; their slots are workers."""
    # A trial that trains nothing has no gang.
    return [Unit(forecasts[each.id].seconds, 1 if each.trainable is Trainable.NONE else workers) for each in trials]


def makespan_of(
    asked: Asked, left: list[Unit], forecasts: Mapping[str, Forecast], workers: int, slots: int
) -> Makespan:
    """Of these; of a search with all the rounds that may follow."""
    most = max((times for _, times in asked.later), default=0)
    turns = [[each.trial for each, times in asked.later if times > turn] for turn in range(most)]
    return rounds([left, *(units(trials, forecasts, workers) for trials in turns)], slots)
