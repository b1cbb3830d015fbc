"""Bisection over the values of one field of a trial: the largest one that trains, for each cell and seed.

Every value that does not train is taken for too large unless a larger one trains. Where small values cannot train in
the time there is, and only some in between can, the search may step over those and end below them: it then has found
nothing, and that none trained is no bound.

Nothing here knows a store. What is known goes in as places on the lattice, counted from its lowest value, with whether
that value trains; what to try next and how far the search is come out. So a search that was stopped goes on from what
the store knows, and so does one that begins where another study has trained the same trials.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from bnscale.trial import Refusal, Trial, near

DIGITS = 3  # significant digits of a value, so that the ids of trials read well
CLOSEST = 1.01  # factor; values any closer would be the same to so many digits


@dataclass(frozen=True)
class Bracket:
    """How far a search is: the answer lies between two neighbours when it is done.

    Where a value trains and a smaller one does not, the largest that trains counts, and what is known below it does
    not: a value that was too small to train in the time there was says nothing about the largest.
    """

    trains: int  # place of the largest value known to train; -1: none is
    fails: int  # place of the smallest value above it known not to; the number of values: none is

    @classmethod
    def of(cls, known: Mapping[int, bool], count: int) -> "Bracket":
        """From what is known of some of `count` values."""
        trains = max((place for place, good in known.items() if good), default=-1)
        return cls(trains, min((place for place, good in known.items() if not good and place > trains), default=count))

    @property
    def open(self) -> list[int]:
        """The places to try next: the middle of what is not known, or nothing where all is.

        Of two middles the one further from an end of the lattice: an end is tried when nothing else is left.
        """
        at_low_end = self.trains < 0
        return [(self.trains + self.fails + at_low_end) // 2] if self.rounds else []

    @property
    def rounds(self) -> int:
        """Trials that may yet follow, one after the other."""
        return math.ceil(math.log2(self.fails - self.trains))


@dataclass(frozen=True)
class Bisection:
    """A search for the largest value of `axis` that trains, on the lattice low, low * factor, ... up to `high`.

    `verdict` names a query of the study's .sql file: one row per trial with a result, with the columns `trial` and
    `trains`. Raises `Refusal` for a lattice that is none.
    """

    axis: str
    low: float
    high: float
    factor: float
    verdict: str

    def __post_init__(self) -> None:
        if self.axis not in Trial.model_fields:
            raise Refusal(f"search {self.axis}: no such field{near(self.axis, list(Trial.model_fields))}")
        if not 0 < self.low < self.high < math.inf:  # also refuses NaN
            raise Refusal(
                f"search {self.axis}: from {self.low:g} to {self.high:g}: must go from above 0 to a greater number"
            )
        if not CLOSEST <= self.factor < math.inf:
            raise Refusal(
                f"search {self.axis}: factor {self.factor:g}: must be at least {CLOSEST}, for its values have {DIGITS} "
                "digits; try 2"
            )

    @cached_property
    def values(self) -> list[float]:
        """The lattice, rising. Its values follow from `low` and `factor` alone, so a search that goes further has them
        too."""
        count = math.floor(math.log(self.high / self.low) / math.log(self.factor) + 1e-6) + 1
        return [float(f"{self.low * self.factor**place:.{DIGITS}g}") for place in range(count)]

    @property
    def rounds(self) -> int:
        """The most trials that one search can take."""
        return Bracket.of({}, len(self.values)).rounds

    def open(self, known: Mapping[int, bool]) -> list[int]:
        """The places on the lattice to try next; none when the answer is known."""
        return Bracket.of(known, len(self.values)).open
