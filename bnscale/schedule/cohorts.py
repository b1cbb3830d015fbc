"""Which trials are trained in one pass, and how many. Nothing here knows Ray.

Trials of one kin (networks/cohort.py) with the same readings to take may share a pass. How many do is a question of
time and memory, and so of the machine; it changes no number but in its last digits.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bnscale.schedule.needs import Cluster
from bnscale.trial import Trial

if TYPE_CHECKING:
    from bnscale.schedule.budget import Forecast

MOST = 32  # members of a pass: what more would save is little, and an error is everybody's
WORTH = 0.9  # of the time alone, that a member may take in a pass that is worth its while
ROOM = 0.9  # of a GPU's memory, that a pass may fill
SMALL_GPU = 16 * 2**30  # bytes of a GPU of which nobody told more


@dataclass(frozen=True)
class Unit:
    """Trials that are trained in one pass, or one alone."""

    trials: tuple[str, ...]  # their ids
    forecast: "Forecast"  # of the whole pass

    @property
    def name(self) -> str:
        return self.trials[0]

    def of(self, trials: Iterable[str], forecasts: Mapping[str, "Forecast"]) -> "Unit":
        """The pass of these of its members alone. `forecasts` are of each trial alone; what a pass takes beside is
        taken to grow evenly with its members."""
        left = tuple(trials)
        if left == self.trials:
            return self
        first = forecasts[left[0]]
        share = (len(left) - 1) / (len(self.trials) - 1)

        def between(one: float, all_: float) -> float:
            return one + share * (all_ - one)

        whole = self.forecast
        return Unit(
            left,
            replace(
                first,
                seconds=between(first.seconds, whole.seconds),
                memory=round(between(first.memory, whole.memory)),
                on_gpu=round(between(first.on_gpu, whole.on_gpu)),
                disk=sum(forecasts[trial].disk for trial in left),
            ),
        )

    def halves(self, forecasts: Mapping[str, "Forecast"]) -> "list[Unit]":
        """It needs too much memory."""
        middle = math.ceil(len(self.trials) / 2)
        return [self.of(part, forecasts) for part in (self.trials[:middle], self.trials[middle:])]

    def singles(self, forecasts: Mapping[str, "Forecast"]) -> "list[Unit]":
        """Somebody's error ended all."""
        return [self.of([trial], forecasts) for trial in self.trials]


def alone(trials: Iterable[str], forecasts: Mapping[str, "Forecast"]) -> list[Unit]:
    """Each in a pass of its own."""
    return [Unit((trial,), forecasts[trial]) for trial in trials]


def units_of(
    trials: Sequence[Trial],
    forecasts: Mapping[str, "Forecast"],
    foresee: "Callable[[Trial, int], Forecast]",
    cluster: Cluster,
    threads: int,
    *,
    readings: Callable[[Trial], Hashable],
    reached: Mapping[str, int],
    worth: Callable[[Trial], bool],
    most: int | None = None,
) -> list[Unit]:
    """Passes for all trials: as many members each as the memory of the cluster holds, no fewer passes than it can run
    at once, and of near equal size.

    `foresee` says what a pass of so many trials like one takes, and `worth` whether a member takes less time in one
    than alone; neither is asked in vain, for both time steps. `readings` are what a trial is measured by, and `reached`
    the steps from which some go on. `most` is what a user wants: passes of so many members, whatever they take; 1:
    all train alone.
    """
    from bnscale.networks.cohort import kin  # brings torch, of no use to a worker of toys

    groups: dict[Hashable, list[Trial]] = defaultdict(list)
    single: list[Trial] = []
    for trial in trials:
        likeness = kin(trial) if most != 1 else None
        if likeness is None:
            single.append(trial)
        else:
            groups[likeness, readings(trial), trial.id in reached].append(trial)
    slots = max(1, cluster.slots(threads, 0))
    several = []
    for group in groups.values():
        group.sort(key=lambda trial: reached.get(trial.id, 0))  # those of one pass go on together
        may_pay = len(group) > 1 and (most is not None or len(trials) > slots)
        if may_pay and (most is not None or worth(group[0])):
            several.append(_Group(group, foresee))
        else:
            single += group
    if most is not None:
        for each in several:
            each.passes = math.ceil(len(each.trials) / most)
    else:
        room = _Room(cluster, threads, max((forecasts[trial.id].memory for trial in trials), default=0))
        for each in several:
            each.passes = math.ceil(len(each.trials) / _fitting(each, room))
        _spread(several, [forecasts[trial.id].seconds for trial in single], slots)
    return [unit for each in several for unit in each.units()] + alone([trial.id for trial in single], forecasts)


class _Group:
    """Trials of which any number may share a pass."""

    def __init__(self, trials: list[Trial], foresee: "Callable[[Trial, int], Forecast]") -> None:
        self.trials = trials
        self.passes = len(trials)
        self._foresee = foresee
        self._foreseen: dict[int, Forecast] = {}

    def forecast(self, members: int) -> "Forecast":
        if members not in self._foreseen:
            self._foreseen[members] = self._foresee(self.trials[0], members)
        return self._foreseen[members]

    @property
    def sizes(self) -> list[int]:
        """Members of each pass, the larger ones first."""
        size, more = divmod(len(self.trials), self.passes)
        return [size + 1] * more + [size] * (self.passes - more)

    @property
    def seconds(self) -> list[float]:
        """Of each pass, the longest first."""
        return [self.forecast(size).seconds for size in self.sizes]

    def units(self) -> list[Unit]:
        names = iter([trial.id for trial in self.trials])
        return [Unit(tuple(next(names) for _ in range(size)), self.forecast(size)) for size in self.sizes]


class _Room:
    """Whether a pass fits where each of these trials does, with as many at once."""

    def __init__(self, cluster: Cluster, threads: int, memory: int) -> None:
        self._cluster = cluster
        self._threads = threads
        self._slots = cluster.slots(threads, memory)
        self._gpu = ROOM * (cluster.gpu_memory or SMALL_GPU)

    def holds(self, forecast: "Forecast") -> bool:
        return forecast.on_gpu <= self._gpu and self._cluster.slots(self._threads, forecast.memory) >= self._slots


def _fitting(group: _Group, room: _Room) -> int:
    """Members that a pass may have at most."""
    fit, too_many = 1, min(len(group.trials), MOST) + 1
    while too_many - fit > 1:
        middle = (fit + too_many) // 2
        if room.holds(group.forecast(middle)):
            fit = middle
        else:
            too_many = middle
    return fit


def _spread(groups: list[_Group], singles: list[float], slots: int) -> None:
    """More and smaller passes: until no slot idles from the start, and further where all then ends earlier."""
    soonest, best = math.inf, [group.passes for group in groups]
    tries = 0  # since no slot idles
    while tries <= slots:
        seconds = [*singles, *(each for group in groups for each in group.seconds)]
        passed = _span(seconds, slots)
        if not tries or passed < 0.99 * soonest:
            soonest, best = passed, [group.passes for group in groups]
        tries += len(seconds) >= slots
        divisible = [group for group in groups if group.passes < len(group.trials)]
        if not divisible:
            break
        max(divisible, key=lambda group: group.seconds[0]).passes += 1
    for group, passes in zip(groups, best, strict=True):
        group.passes = passes


def _span(seconds: Iterable[float], slots: int) -> float:
    """As makespan.py has it, where each takes a whole slot, and quickly: of a study's many divisions."""
    ends = [0.0] * max(1, slots)
    for each in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)
