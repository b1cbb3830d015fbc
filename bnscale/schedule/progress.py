"""What a person sees while a study runs: a live view on a terminal, plain lines in a log.

One line of counts, a bar and the time left for the whole study; one line for each running trial.
"""

import math
import select
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bnscale.schedule.patient import Patient
from bnscale.trial import Outcome

if TYPE_CHECKING:  # the loop brings torch, which nothing here needs
    from bnscale.train import Progress

PLAIN_SECONDS = 5.0  # between two lines of counts in a log
ENOUGH = 1.0  # forecast seconds done: a first step takes far longer than those that follow, and says nothing of them
ROWS = 16  # running trials that a terminal shows; the others are counted


@dataclass
class Running:
    """A trial on its way."""

    since: float  # seconds on the monotonic clock
    share: float = 0.0  # of the training that a checkpoint had in store
    at: "Progress | None" = None

    @property
    def done(self) -> float:
        """Share of the training behind us, in [0, 1]."""
        return self.at.step / max(1, self.at.total) if self.at else 0.0


class Watch:
    """Told by the schedule what happens; shows it. Use as a context manager around the run.

    `seconds` maps each trial's id to the forecast of its pass on one gang, and `parts` to its part of that pass, where
    it is not trained alone. `later` is the forecast of the most that follows these trials, on all gangs together.
    """

    def __init__(
        self,
        seconds: Mapping[str, float],
        console: Console | None = None,
        later: float = 0.0,
        parts: Mapping[str, float] | None = None,
    ) -> None:
        self.seconds = dict(seconds)
        self.parts = dict.fromkeys(self.seconds, 1.0) | dict(parts or {})
        self.console = console or Console(highlight=False)
        self.later = later
        self.running: dict[str, Running] = {}
        self.waiting = set(self.seconds)
        self.elsewhere: dict[str, str] = {}  # trials that another driver trains, and who that is
        self.outcomes: Counter[Outcome | None] = Counter()
        self.aside = 0  # trials that are left as they are
        self.spent = 0.0  # seconds that trials took, beside
        self.foreseen = 0.0  # the seconds that were forecast for the same work
        self._last_line = -math.inf
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._file = self.console._file  # None follows sys.stdout
        self._patient = Patient(cast(TextIO, self.console.file))
        self.console.file = cast(IO[str], self._patient)
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=self._view, console=self.console, refresh_per_second=2, redirect_stdout=False,
                redirect_stderr=False,
            )  # fmt: skip
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._live:
                self._live.stop()
                self._live = None
            elif kind is None:
                self.console.print(self.counts(), soft_wrap=True)
        finally:
            self.console._file = self._file
            self._patient.drain()

    # --- what the schedule tells -----------------------------------------------------------------

    def started(self, trial: str) -> None:
        self.waiting.discard(trial)
        self.running[trial] = Running(time.monotonic())

    def progressed(self, trial: str, at: "Progress", began: int) -> None:
        """`began` is the step from which this worker goes on: speed is measured from there."""
        run = self.running.setdefault(trial, Running(time.monotonic()))
        run.share = began / max(1, at.total)
        run.at = at
        self.passes()

    def ended(self, trial: str, outcome: Outcome | None) -> None:
        """`None`: stopped before its end, its checkpoint kept."""
        self.waiting.discard(trial)
        self.elsewhere.pop(trial, None)
        run = self.running.pop(trial, None)
        self.outcomes[outcome] += 1
        if run and outcome in (Outcome.FINISHED, Outcome.DIVERGED):
            self.spent += time.monotonic() - run.since
            self.foreseen += self.seconds[trial] * (run.done - run.share)
        if not self._live or outcome is Outcome.FAILED:
            accuracy = run.at.accuracy if run and run.at else None
            reading = f"  accuracy {accuracy:.4f}" if accuracy is not None else ""
            self.say(f"{_word(outcome)} {trial}{reading}  ({sum(self.outcomes.values())}/{len(self.seconds)})")

    def lost(self, trial: str, what: str, also: Sequence[str] = ()) -> None:
        """Its workers are gone, and it waits to go on from its checkpoint, as those do that it shared a pass with."""
        for each in (trial, *also):
            self.running.pop(each, None)
            self.waiting.add(each)
        self.say(what)

    def apart(self, seconds: Mapping[str, float], parts: Mapping[str, float], what: str) -> None:
        """These trials are trained in other passes from now on, which take so long."""
        self.seconds.update(seconds)
        self.parts.update(parts)
        self.lost(next(iter(seconds)), what, also=list(seconds)[1:])

    def set_aside(self, trial: str, what: str) -> None:
        """Nothing trains it any more in this run, and it has no end."""
        self.waiting.discard(trial)
        self.running.pop(trial, None)
        self.aside += 1
        self.say(what)

    def held(self, trial: str, who: str) -> None:
        """Another driver trains it: it is left to that one."""
        self.running.pop(trial, None)
        self.waiting.discard(trial)
        if self.elsewhere.get(trial) != who:
            self.say(f"{trial} is trained by {who}")
        self.elsewhere[trial] = who

    def freed(self, trial: str) -> None:
        """The other driver has died or stopped before the trial's end: it waits to be trained here."""
        who = self.elsewhere.pop(trial, "another driver")
        self.waiting.add(trial)
        self.say(f"{who} trains {trial} no more; it goes on here")

    def passes(self) -> None:
        """Time: a log gets a line of counts now and then."""
        if not self._live and time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(self.counts(), soft_wrap=True)

    def say(self, text: str) -> None:
        """A line above the view."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def abandon(self) -> None:
        """The process ends at once: give the terminal its cursor back."""
        if self._live and select.select([], [sys.stdout], [], 0)[1]:  # a stopped terminal would keep us
            sys.stdout.write("\x1b[?25h\n")
            sys.stdout.flush()

    # --- what it shows ---------------------------------------------------------------------------

    @property
    def slowness(self) -> float:
        """Seconds that a forecast second takes, measured over what has been done so far; 1 before that is `ENOUGH`."""
        now = time.monotonic()
        began = [
            (now - run.since, self.seconds[trial] * (run.done - run.share))
            for trial, run in self.running.items()
            if run.at is not None
        ]
        spent = self.spent + sum(s for s, _ in began)
        foreseen = self.foreseen + sum(f for _, f in began)
        return spent / foreseen if spent > 0 and foreseen >= ENOUGH else 1.0

    @property
    def left(self) -> float:
        """Seconds until the study ends at the speed measured so far: at least those of its longest trial."""
        rests = {trial: self.seconds[trial] * (1 - run.done) for trial, run in self.running.items()}
        rests |= {trial: self.seconds[trial] for trial in self.waiting}
        work = sum(rest * self.parts[trial] for trial, rest in rests.items())
        passes = sum(self.parts[trial] for trial in self.running)
        return self.slowness * max(work / max(1.0, passes), max(rests.values(), default=0.0))

    def counts(self) -> str:
        """`12 done, 2 running, 1 failed, 35 waiting; 3 min left`."""
        numbers = {
            "done": self.outcomes[Outcome.FINISHED],
            "running": len(self.running),
            "failed": self.outcomes[Outcome.FAILED],
            "diverged": self.outcomes[Outcome.DIVERGED],
            "stopped early": self.outcomes[None],
            "set aside": self.aside,
            "elsewhere": len(self.elsewhere),
            "waiting": len(self.waiting),
        }
        always = {"done", "running", "failed", "diverged", "waiting"}
        said = ", ".join(f"{n} {what}" for what, n in numbers.items() if n or what in always)
        if not self.running and not self.waiting:  # for the others' speed is not known here
            return said
        if not self.later:
            return f"{said}; {clock(self.left)} left"
        most = self.left + self.slowness * self.later
        return f"{said}; {clock(self.left)} left, at most {clock(most)} for all rounds"

    def _view(self) -> Group:
        ended = sum(self.outcomes.values()) + self.aside
        part = ended + sum(run.done for run in self.running.values())
        head = Table.grid(padding=(0, 1))
        head.add_row(ProgressBar(total=max(1, len(self.seconds)), completed=part, width=24), Text(self.counts()))
        rows = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
        for title in ("running", "epoch", "loss", "accuracy"):
            rows.add_column(title, justify="left" if title == "running" else "right", no_wrap=True)
        shown = list(self.running.items())[:ROWS]
        for trial, run in shown:
            at = run.at
            rows.add_row(
                trial,
                f"{at.epoch:.1f}/{at.epochs:g}" if at else "",
                f"{at.loss:.4f}" if at and at.loss is not None else "",
                f"{at.accuracy:.4f}" if at and at.accuracy is not None else "",
            )
        more = len(self.running) - len(shown)
        return Group(head, *([rows] if shown else []), *([Text(f"and {more} more")] if more else []))


def clock(seconds: float) -> str:
    """`40 s`, `3 min`, `2 h 05 min`, `3 d 4 h`: as exact as a forecast deserves."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def _word(outcome: Outcome | None) -> str:
    return "stopped early" if outcome is None else str(outcome)
