"""What went wrong with a trial, told from its evidence, and what follows. Nothing here knows Ray.

A failure of the machines is no failure of the trial: it goes on from its checkpoint, as often as it takes, as long as
it gets any further in between. `POLICY` says how often each kind may strike in a row without that, and what then.
"""

import errno
import re
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum

from bnscale.lease import Unseen
from bnscale.storage import StoreFailure
from bnscale.trial import Outcome

ALIKE = 3  # trials that end in the same error of the code, before any ends otherwise: the study's error, not theirs
MARGIN = 2**29  # bytes of a device that others hold: less is a driver's own context


class Kind(StrEnum):
    """As the store keeps it. First what explains the others: one failure of a gang shows on each worker as another."""

    UNSEEN = "store not seen"  # by one machine, which has another under its name
    STORAGE = "storage"
    OOM = "oom"  # of the device's memory, or of the machine's where there is no other
    NEIGHBOUR = "neighbour"  # out of memory that somebody else holds
    PREEMPTED = "preempted"  # the node is about to go, and said so
    NODE = "node lost"
    PORT = "port in use"
    CODE = "code"
    HANG = "hang"
    WORKER = "worker lost"


class Then(Enum):
    """What becomes of a trial."""

    AGAIN = "goes on from its checkpoint"
    RECOMPUTING = "goes on from its checkpoint with activation checkpointing"
    ASIDE = "stays where its checkpoint is until the study is run again"
    FAILED = "has failed"


@dataclass(frozen=True)
class Policy:
    """What follows a failure of one kind."""

    said: str  # to a person
    patience: int  # how many in a row, without the trial getting any further, are nothing
    then: Then  # what follows one more


POLICY: Mapping[Kind, Policy] = {
    Kind.WORKER: Policy("a worker died", 3, Then.FAILED),
    Kind.HANG: Policy("no step for too long", 3, Then.FAILED),
    Kind.NODE: Policy("its node was lost", 10, Then.ASIDE),
    Kind.PREEMPTED: Policy("its node is taken away", 10, Then.ASIDE),
    Kind.PORT: Policy("its workers found a port in use", 10, Then.FAILED),
    Kind.NEIGHBOUR: Policy("out of memory that others hold", 3, Then.ASIDE),
    Kind.OOM: Policy("out of memory", 0, Then.FAILED),  # and once more where it can recompute
    Kind.UNSEEN: Policy("its node does not see the store", 10, Then.ASIDE),
    Kind.STORAGE: Policy("the store failed", 0, Then.ASIDE),
    Kind.CODE: Policy("an error of the code", 0, Then.FAILED),
}


# What the first trials may have in common with all. Not memory: the longest come first, and a smaller one may fit.
_COMMON = {Kind.STORAGE, *(kind for kind, policy in POLICY.items() if policy.then is Then.FAILED)} - {Kind.OOM}


@dataclass(frozen=True)
class Failure:
    """One, of one attempt."""

    kind: Kind
    text: str  # the whole story; its last line says it in short
    place: str = ""  # of an error of the code: its class, and the line of code

    @property
    def short(self) -> str:
        return next((line for line in reversed(self.text.strip().splitlines()) if line.strip()), "").strip()

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """What a raised error is evidence of."""
        return cls(_kind(error), "".join(traceback.format_exception(error)), _place(error))

    @classmethod
    def of_death(cls, words: str, *, preempted: bool = False) -> "Failure":
        """Of a process that ended without a word of its own; `words` are the cluster's."""
        if "creation task" in words:
            return cls.of_words(words)
        kind = Kind.PREEMPTED if preempted else _heard(words, _DEATHS) or Kind.WORKER
        lines = [line.strip() for line in words.splitlines() if line.strip()]
        return cls(kind, lines[-1].split(". ")[0] if lines else "it said nothing")  # a page of advice follows

    @classmethod
    def of_words(cls, words: str) -> "Failure":
        """Of an error of another process, as far as its words tell."""
        failure = cls(_heard(words, _ERRORS) or Kind.CODE, words)
        return replace(failure, place=failure.short)

    def or_(self, other: "Failure | None") -> "Failure":
        """Of two from one gang, the one that explains the other."""
        order = list(Kind)
        return self if other is None or order.index(self.kind) <= order.index(other.kind) else other


@dataclass(frozen=True)
class Ending:
    """Of a trial in one run. Without an outcome it was stopped, or set aside for a failure."""

    outcome: Outcome | None = None
    failure: Failure | None = None


class Stopped(Exception):
    """The whole run ended before its trials did; each has its checkpoint. The message has been shown."""


class OutOfTime(Stopped):
    """The hours that were asked for are over."""


class Hopeless(Stopped):
    """The first trials ended in one and the same error, and so would the rest."""


@dataclass(frozen=True)
class Memory:
    """Of a device, when it ran out; bytes."""

    total: int
    others: int  # what other processes hold
    peak: int  # what this process held at most
    forecast: int

    def shared(self, sharers: int) -> "Memory":
        """As a process sees it that may take only its equal part: others are none while they keep to theirs."""
        part = self.total // sharers
        return replace(self, total=part, others=max(0, self.others - (self.total - part)))

    @property
    def kind(self) -> Kind:
        """A neighbour's, where the trial would have had room alone."""
        need = max(self.forecast, self.peak)
        return Kind.NEIGHBOUR if self.others > MARGIN and need <= self.total < need + self.others else Kind.OOM


@dataclass
class _Past:
    """Of one trial in this run."""

    furthest: int = 0  # updates
    since: Counter[Kind] = field(default_factory=Counter)  # what struck since it last got further
    recomputing: bool = False


class Judge:
    """Hears every failure of a run, and says what follows."""

    def __init__(self, trials: int) -> None:
        self._trials = trials
        self._past: dict[str, _Past] = {}
        self._first: list[Failure | None] = []  # how the first trials ended; None: otherwise than in an error

    def progressed(self, trial: str, step: int) -> None:
        """The trial has taken so many updates, lost ones not counted twice."""
        past = self._past.setdefault(trial, _Past())
        if step > past.furthest:
            past.furthest = step
            past.since.clear()

    def failed(self, trial: str, failure: Failure, *, may_recompute: bool) -> Then:
        """What follows. `may_recompute`: the trial's activations can be computed again instead of kept."""
        past = self._past.setdefault(trial, _Past())
        past.since[failure.kind] += 1
        policy = POLICY[failure.kind]
        if failure.kind is Kind.OOM and may_recompute and not past.recomputing:
            past.recomputing = True
            return Then.RECOMPUTING
        return Then.AGAIN if past.since[failure.kind] <= policy.patience else policy.then

    def forgive(self, trial: str) -> None:
        """What struck it may have been another's fault: it goes on apart from that one."""
        self._past[trial].since.clear()

    def recomputing(self, trial: str) -> bool:
        """Whether its activations are now computed again instead of kept."""
        return trial in self._past and self._past[trial].recomputing

    def story(self, trial: str, failure: Failure) -> Failure:
        """The failure as it is recorded when the trial has been given up."""
        past = self._past[trial]
        times = past.since[failure.kind]
        if times <= 1:
            return failure
        said = f"{POLICY[failure.kind].said} {times} times at step {past.furthest} or before it; the last time: "
        return Failure(failure.kind, said + failure.text, failure.place)

    def ended(self, failure: Failure | None) -> None:
        """A trial has ended: given up for a failure, or otherwise."""
        self._first.append(failure)

    @property
    def hopeless(self) -> Failure | None:
        """The failure with which every trial would end, as far as can be judged: that of the first few, or of all."""
        first = self._first[: min(ALIKE, self._trials)]
        if len(first) < min(ALIKE, self._trials):
            return None
        failures = [each for each in first if each is not None and each.kind in _COMMON]
        places = {(each.kind, each.place if each.kind is Kind.CODE else "") for each in failures}
        return failures[0] if len(failures) == len(first) and len(places) == 1 else None


# --- evidence -------------------------------------------------------------------------------------

_ERRORS = {
    Kind.STORAGE: r"could not write the checkpoint|No space left on device|Disk quota exceeded",
    Kind.OOM: r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|_STATUS_ALLOC_FAILED",
    Kind.PORT: r"address already in use|EADDRINUSE",
    Kind.HANG: r"collective operation timeout|timed out waiting \d+ ?ms|wait timeout after",
    # Also of a GPU that breaks: another process, perhaps on another GPU, may do better.
    Kind.WORKER: r"connection (was )?(closed|reset|refused|aborted)|broken pipe|remote process exited|ncclRemoteError"
    r"|ncclSystemError|communicator was aborted|WorkerDiedError|uncorrectable ECC|fallen off the bus|NVLink",
}
_DEATHS = {
    Kind.OOM: r"running low on memory|OutOfMemoryError",
    Kind.PREEMPTED: r"actor's node was preempted|forcibly preempted|due to draining",
    Kind.NODE: r"node has died|actor's node was|node it was running on is dead",
}
# Without the store's word for it. A right that lacks may be to anything: that is told as an error of the code.
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}


def _kind(error: BaseException) -> Kind:
    kinds = [kind for each in _chain(error) if (kind := _own_kind(each)) is not None]
    return min(kinds, key=list(Kind).index, default=Kind.CODE)


def _own_kind(error: BaseException) -> Kind | None:
    """Without what led to it; None where it says nothing."""
    if isinstance(error, Unseen):
        return Kind.UNSEEN
    if isinstance(error, StoreFailure):
        return Kind.STORAGE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's has several homes
        return Kind.OOM
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return Kind.PORT
    if isinstance(error, ConnectionError):
        return Kind.WORKER
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return Kind.STORAGE
    return _heard(str(error), _ERRORS) if isinstance(error, RuntimeError | OSError) else None


def _heard(words: str, evidence: Mapping[Kind, str]) -> Kind | None:
    return next((kind for kind, pattern in evidence.items() if re.search(pattern, words, re.IGNORECASE)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"
