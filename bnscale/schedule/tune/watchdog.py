"""Watches the other workers of a gang, and on every worker whether it gets on."""

import faulthandler
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from bnscale.schedule.failure import Failure

PATIENCE = 10.0  # seconds until a process that hangs in a collective, because another worker is gone, is ended
NOTICE = 3.0  # seconds in which Ray learns of a death that other workers have already felt

SLOWNESS = 10  # times the median step, that no step may take
FLOOR = 120.0  # seconds that every step may take
REST = 900.0  # seconds that everything else between two steps may take
LONG = 1000  # steps, as long as a first reading may take
TICK = 1.0  # seconds between two looks at the clock
FROZEN = 300.0  # seconds in which not even that thread ran: the interpreter itself is stuck


class Watchdog:
    """Watches what the other workers are doing, from a thread: this process may hang in a collective meanwhile.

    When one of them dies or fails it ends the others, which breaks the collective; if that does not
    free this process either, it calls `lost`.
    """

    def __init__(self, members: list[Any], answers: list[Any], lost: Callable[[Failure], None]) -> None:
        self.members = members
        self.answers = answers
        self.lost = lost
        self.found: Failure | None = None  # what a worker met
        self.died = False  # whether that was its death
        self.barked = threading.Event()
        self.over = threading.Event()  # all answered and well
        self.freed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def dismiss(self) -> bool:
        """Wait for the end of what they do. Whether it went well."""
        while not self.barked.is_set():
            if self.over.wait(0.005):
                return True
        self.freed.set()
        return False

    def verdict(self, own: Failure) -> Failure:
        """What befell the gang, where `own` is what this process met."""
        self.freed.set()
        if not self.barked.wait(2 * NOTICE) or self.found is None:
            return own
        return self.found if self.died else own.or_(self.found)

    def _watch(self) -> None:
        left = self.answers
        while left:
            ready, left = ray.wait(left)
            death, error = self._hear(ready)
            if death is None and error is None:
                continue
            # A death reaches the others as a broken connection: is there one behind this error?
            if death is None and left:
                late, _ = ray.wait(left, num_returns=len(left), timeout=NOTICE)
                death, others = self._hear(late)
                error = error.or_(others) if error else others
            self.died = death is not None
            self.found = death or error
            self.barked.set()
            for member in self.members:
                ray.kill(member)
            if not self.freed.wait(PATIENCE) and self.found:
                self.lost(self.found)
            return
        self.over.set()

    @staticmethod
    def _hear(answers: list[Any]) -> tuple[Failure | None, Failure | None]:
        """The death of a worker, and the error that one of them met."""
        error: Failure | None = None
        for answer in answers:
            try:
                met: Failure | None = ray.get(answer)
            except RayActorError as raised:
                return Failure.of_death(str(raised), preempted=raised.preempted), None
            except RayError as raised:
                met = Failure.of_words(str(raised))
            error = met.or_(error) if isinstance(met, Failure) else error
        return None, error


class Pulse:
    """Measures the steps of a trial on this worker; where one takes too long, `stalled` is called from a thread.

    A step has max(`SLOWNESS` x the median of those before it, `floor`) seconds, the first ones `SLOWNESS` x what was
    foreseen: that clock runs from `going` to `beat`. What comes between two steps, readings and checkpoints, has
    max(`SLOWNESS` x the longest before it, `LONG` steps, `rest`) seconds, from `beat` to `going`. Nobody's turn is what
    passes from `idle` on. Both clocks run only while this process does.
    """

    def __init__(
        self, foreseen: float, stalled: Callable[[str], None], *, floor: float = FLOOR, rest: float = REST
    ) -> None:
        self._foreseen = foreseen
        self._stalled = stalled
        self._floor = floor
        self._taken: deque[float] = deque(maxlen=101)  # seconds of the latest steps
        self._rest = rest
        self._longest = 0.0  # seconds between two steps
        self._stepping = False
        self._since: float | None = time.monotonic()  # when the step, or what comes between two, began; None: idle
        self._silent = 0.0  # seconds of it that the thread has seen pass
        self._over = threading.Event()
        threading.Thread(target=self._watch, args=(min(TICK, floor / 4, rest / 4),), name="pulse", daemon=True).start()

    def going(self) -> None:
        """A step begins."""
        if self._since is not None and not self._stepping:
            self._longest = max(self._longest, time.monotonic() - self._since)
        self._begin(stepping=True)

    def beat(self) -> None:
        """A step has ended."""
        if self._since is not None and self._stepping:
            self._taken.append(time.monotonic() - self._since)
        self._begin(stepping=False)

    def idle(self) -> None:
        """Nothing is asked of this worker."""
        self._since = None

    def _begin(self, *, stepping: bool) -> None:
        self._silent, self._stepping, self._since = 0.0, stepping, time.monotonic()

    def end(self) -> None:
        self._over.set()

    @property
    def limit(self) -> float:
        """Seconds, of what is done now."""
        usual = statistics.median(self._taken) if self._taken else self._foreseen
        if self._stepping:
            return max(SLOWNESS * usual, self._floor)
        return max(SLOWNESS * self._longest, LONG * usual, self._rest)

    def _watch(self, tick: float) -> None:
        last = time.monotonic()
        try:
            while not self._over.wait(tick):
                # Where the interpreter itself is stuck, no thread of it can say so: this one is C.
                faulthandler.dump_traceback_later(FROZEN, exit=True, file=sys.__stderr__ or sys.stderr)
                now = time.monotonic()
                # Of a pause of the whole process no more than this counts.
                passed, last = min(now - last, 2 * tick), now
                if self._since is not None:
                    self._silent += passed
                    if self._silent > self.limit and not self._over.is_set():
                        usual = f"the median step takes {statistics.median(self._taken):.2g} s" if self._taken else ""
                        told = usual or "there has been none before"
                        what = "no step" if self._stepping else "no end of what comes between two steps"
                        self._stalled(f"{what} in {self._silent:.0f} s, and the limit is {self.limit:.0f} s: {told}")
                        return
        finally:
            faulthandler.cancel_dump_traceback_later()


def stacks() -> str:
    """Where every thread of this process is."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
