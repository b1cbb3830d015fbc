"""How long a study takes on so many slots, before it runs: the schedule played through with its forecasts.

A slot is what one worker trains on: a GPU, or its threads where there is none. What is trained in one go (a trial, a
gang's trial, several trials in one pass) is a unit: its seconds, and its slots, which may be a share of one.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bnscale.trial import Refusal

_GRAIN = 1e-9  # of a slot: shares such as a third add up to a whole one


@dataclass(frozen=True)
class Unit:
    """What is trained in one go."""

    seconds: float
    slots: float = 1.0  # whole ones, or a share of a single one


@dataclass(frozen=True)
class Makespan:
    """Of units in rounds, each of which begins when the one before it has ended."""

    seconds: float  # from the first beginning to the last end
    work: float  # slots times seconds
    slots: int
    bound: float  # seconds that no schedule can fall below: the longest unit, or all work shared evenly

    @property
    def utilisation(self) -> float:
        """Share of the slots' time in which they train, in [0, 1]; of nothing 1."""
        return self.work / (self.slots * self.seconds) if self.seconds else 1.0

    def __add__(self, later: "Makespan") -> "Makespan":
        """One round after the other, on the same slots."""
        assert self.slots == later.slots
        return Makespan(self.seconds + later.seconds, self.work + later.work, self.slots, self.bound + later.bound)


def makespan(units: Iterable[Unit], slots: int) -> Makespan:
    """Of the order in which trials are run: longest first, each as soon as there is room for it.

    Ray asks for the room of several waiting trials at once, so one that does not fit keeps none waiting that does.
    Raises `Refusal` for a unit that has more slots than there are.
    """
    each = list(units)
    work = sum(unit.seconds * unit.slots for unit in each)
    bound = max([work / slots, *(unit.seconds for unit in each)])
    return Makespan(_played(each, slots), work, slots, bound)


def rounds(each: Sequence[Sequence[Unit]], slots: int) -> Makespan:
    """Of several rounds, one after the other."""
    whole = makespan((), slots)
    for units in each:
        whole += makespan(units, slots)
    return whole


def _played(units: list[Unit], slots: int) -> float:
    """When the last unit ends."""
    waiting: dict[float, deque[Unit]] = {}  # by the room they ask for, longest first
    for unit in sorted(units, key=lambda unit: -unit.seconds):
        waiting.setdefault(unit.slots, deque()).append(unit)
    most = max(waiting, default=0.0)
    if most > slots:
        raise Refusal(f"{most:g} slots for one trial: there are {slots}; give more, or fewer workers a trial")
    free = [1.0] * slots
    running: list[tuple[float, int, list[int], float]] = []  # end, number, slots, share of each
    now, begun = 0.0, 0
    while waiting or running:
        for size in sorted(waiting, key=lambda size: -waiting[size][0].seconds):
            while waiting[size] and (where := _room(free, size)):
                share = min(size, 1.0)
                for slot in where:
                    free[slot] -= share
                begun += 1  # a heap compares no lists
                heapq.heappush(running, (now + waiting[size].popleft().seconds, begun, where, share))
        waiting = {size: left for size, left in waiting.items() if left}
        if running:
            now = running[0][0]
            while running and running[0][0] <= now:  # all at once, or a share would take a place that a gang waits for
                _, _, where, share = heapq.heappop(running)
                for slot in where:
                    free[slot] += share
    return now


def _room(free: list[float], size: float) -> list[int]:
    """Slots with room for a unit: the fullest that has it for a share of one; none where there is too little."""
    if size < 1:
        fits = [slot for slot, left in enumerate(free) if left + _GRAIN >= size]
        return [min(fits, key=lambda slot: free[slot])] if fits else []
    whole = [slot for slot, left in enumerate(free) if left + _GRAIN >= 1]
    return whole[: round(size)] if len(whole) >= round(size) else []
