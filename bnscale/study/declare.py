"""What a study file declares: a grid in two sizes, what measures it, and what its paper claims."""

import inspect
import itertools
import math
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from operator import mul
from pathlib import Path
from typing import Any

from bnscale.probes import Cadence, Probe
from bnscale.report import Claim, Figure
from bnscale.study.mistake import Twice
from bnscale.study.search import Bisection
from bnscale.trial import Refusal, Trainable, near

MOST = 100_000  # trials of one study; a larger grid is a slip of the pen
MANY = 5_000  # trials that are trained without being asked for twice


def grid(**axes: Iterable[Any]) -> list[dict[str, Any]]:
    """The product of some axes as a list of dicts, so that `+`, comprehensions and `if` make larger grids.

    Raises `Refusal` for an empty axis. A value that stands twice counts once, with a warning.
    """
    _check_cells(axes, [len(each) for each in axes.values() if isinstance(each, Sized)])
    values = {}
    for name, each in axes.items():
        values[name] = once(name, each)
    _check_cells(values, [len(each) for each in values.values()])
    return [dict(zip(values, cell, strict=True)) for cell in itertools.product(*values.values())]


def _check_cells(names: Iterable[str], sizes: list[int]) -> None:
    if math.prod(sizes) > MOST:
        raise Refusal(f"grid of {', '.join(names)}: has {math.prod(sizes):,} cells; {MOST:,} at most")


def once(name: str, values: Iterable[Any]) -> list[Any]:
    """The values of an axis, each once; warns of one that stands twice. Raises `Refusal` for none."""
    counts = Counter(values)
    if not counts:
        raise Refusal(f"{name}: the axis is empty; give it at least one value")
    for value, times in counts.items():
        if times > 1:
            said = f"{name} {value}: stands {times} times on its axis and counts once"
            warnings.warn(said, Twice, stacklevel=3)  # at whoever called our caller, such as a study file
    return list(counts)


@dataclass(frozen=True)
class Same:
    """A value of a preset's `fixed` that another field gives: `"norm_batch": Same("batch")`, whatever the batch."""

    field: str

    def of(self, values: dict[str, Any]) -> Any:
        if self.field not in values:
            raise Refusal(f"Same({self.field!r}): the trials are given no {self.field}{near(self.field, list(values))}")
        return values[self.field]


@dataclass(frozen=True)
class Preset:
    """One size of a study. `scientific` axes are the question, `nuisance` axes are tuned away on held-out images.

    A cell of `scientific` that names a `seed` is trained for that one of the preset's alone, and one that names a
    nuisance axis at its own value of it: there nothing is chosen, as where labels are random and no image can say.
    With a `search`, each cell and seed is trained at the values of one more axis, of which a bisection needs a few.
    """

    fixed: dict[str, Any]  # what the conclusion holds for
    scientific: list[dict[str, Any]]
    nuisance: list[dict[str, Any]]  # [{}] where nothing is tuned away
    seeds: Sequence[int]
    note: str = ""  # what a reader of its report must know first, such as that the data is not the paper's
    search: Bisection | None = None
    chosen: str = ""  # the scientific axis among whose values the study's own queries choose, on held-out images
    added: Mapping[str, list[Any]] = field(default_factory=dict)  # scientific axes that every cell has all values of

    def __post_init__(self) -> None:
        if self.search is None:
            return
        axis = self.search.axis
        if axis == "seed" or axis in {*self.fixed, *self.axes, *self.nuisances}:
            raise Refusal(f"search {axis}: the preset sets {axis} too; take it out of its fields, axes and seeds")
        if len(self.nuisance) > 1:
            raise Refusal(
                f"search {axis}: {', '.join(self.nuisances)} has {len(self.nuisance)} values to choose among, and a "
                "search compares no accuracies; make it a scientific axis"
            )

    def setting(self, axis: str, values: list[Any]) -> "Preset":
        """The preset with one axis narrowed, widened or fixed.

        On a scientific axis, values that the grid has keep their cells, a new one gets the cells that all
        others have, and parts of the grid that do not vary the axis are left out. Values of the axis of a search take
        its place, as a scientific axis.
        """
        values = once(axis, values)
        if self.search and axis == self.search.axis:
            return replace(self, search=None, added={**self.added, axis: values})
        if axis in self.added:
            return replace(self, added={**self.added, axis: values})
        if axis == "seed":
            every = [{name: value for name, value in cell.items() if name != "seed"} for cell in self.scientific]
            return replace(self, scientific=every, seeds=values)
        if axis in self.axes:
            return replace(self, scientific=_set_axis([c for c in self.scientific if axis in c], axis, values))
        if axis in self.nuisances:
            free = [{name: value for name, value in cell.items() if name != axis} for cell in self.scientific]
            tuned = _set_axis([c for c in self.nuisance if axis in c], axis, values)
            return replace(self, scientific=free, nuisance=tuned)
        if len(values) == 1:
            return replace(self, fixed=self.fixed | {axis: values[0]})
        return replace(self, added={**self.added, axis: values})

    @property
    def axes(self) -> list[str]:
        """Names of the scientific axes; seeds are repeats and no axis, nor is a nuisance axis that some cells fix."""
        others = {"seed", *self.nuisances}
        own = (name for cell in self.scientific for name in cell if name not in others)
        return list(dict.fromkeys([*own, *self.added]))

    @property
    def cells(self) -> Iterator[dict[str, Any]]:
        """Those of the scientific axes, one at a time: there may be more than memory holds."""
        for cell in self.scientific:
            for values in itertools.product(*self.added.values()):
                yield cell | dict(zip(self.added, values, strict=True))

    @property
    def combinations(self) -> int:
        """Of cells, seeds and values of the other axes, before those that are one training are found. Builds none."""
        repeats = [len(self.seeds) if "seed" not in cell else cell["seed"] in self.seeds for cell in self.scientific]
        tuned = [len(self.tuned(cell)) for cell in self.scientific]
        return sum(map(mul, repeats, tuned)) * math.prod(map(len, self.added.values())) * len(self.searched)

    @property
    def trials(self) -> int:
        """The most that are trained: of a search, as many as it takes. Builds none."""
        return self.combinations // len(self.searched) * (self.search.rounds if self.search else 1)

    def sample(self, count: int) -> list[dict[str, Any]]:
        """The fields of so many combinations, drawn over the whole grid; always the same ones, and builds no others."""
        draw = random.Random(0)
        found = []
        for _ in range(count):
            cell = draw.choice(self.scientific) | {name: draw.choice(values) for name, values in self.added.items()}
            place, seed = draw.choice(self.searched), draw.choice(self.seeds)
            found.append(self.fields(cell, draw.choice(self.tuned(cell)), seed, place))
        return found

    def fields(
        self, cell: dict[str, Any], nuisance: dict[str, Any], seed: int, place: dict[str, Any]
    ) -> dict[str, Any]:
        """Of one trial; `place` is of its search. One that trains nothing has the first value of every axis that only
        training knows."""
        values = self.fixed | cell | nuisance | {"seed": seed} | place
        if values.get("trainable") is Trainable.NONE:
            values |= self.nuisance[0] | self.searched[0]
        return {name: value.of(values) if isinstance(value, Same) else value for name, value in values.items()}

    @property
    def nuisances(self) -> list[str]:
        return list(dict.fromkeys(name for cell in self.nuisance for name in cell))

    def tuned(self, cell: dict[str, Any]) -> list[dict[str, Any]]:
        """The values of the nuisance axes at which a cell is trained, each once."""
        own = {name: cell[name] for name in self.nuisances if name in cell}
        if not own:
            return self.nuisance
        values = [each | own for each in self.nuisance]
        return [each for place, each in enumerate(values) if each not in values[:place]]

    @property
    def searched(self) -> list[dict[str, Any]]:
        """Every value of the axis of its search, as a grid; of a preset without one, a grid of nothing."""
        return grid(**{self.search.axis: self.search.values}) if self.search else grid()


def _set_axis(cells: list[dict[str, Any]], axis: str, values: list[Any]) -> list[dict[str, Any]]:
    rests: dict[Any, list[dict[str, Any]]] = {}
    for cell in cells:
        rests.setdefault(cell[axis], []).append({k: v for k, v in cell.items() if k != axis})
    # What every value has, whichever seeds it has it for.
    bare = [[{k: v for k, v in rest.items() if k != "seed"} for rest in each] for each in rests.values()]
    shared = [
        rest for place, rest in enumerate(bare[0]) if rest not in bare[0][:place] and all(rest in o for o in bare)
    ]
    for value in values:
        if value not in rests and not shared:
            raise Refusal(f"{axis} {value}: the grid has cells for {', '.join(map(str, rests))} alone; try one of them")
    count = sum(len(rests.get(value, shared)) for value in values)
    if count > MOST:
        raise Refusal(f"--set {axis}: makes {count:,} cells; {MOST:,} at most; name fewer values")
    order = dict.fromkeys(name for cell in cells for name in cell)  # of the columns of a plan: as it was
    return [
        {name: (rest | {axis: value})[name] for name in order if name == axis or name in rest}
        for value in values
        for rest in rests.get(value, shared)
    ]


@dataclass(frozen=True)
class Study:
    """One question: its grid in two sizes, what measures it, and what its paper claims."""

    name: str
    doc: str  # the docstring of its file: question, prediction, what would refute it
    paper: Preset  # the paper's own grid
    laptop: Preset  # minutes on two cores, offline
    probes: dict[Probe, Cadence]
    claims: Sequence[Claim]
    figures: Sequence[Figure]

    def preset(self, name: str) -> Preset:
        presets = {"laptop": self.laptop, "paper": self.paper}
        if name not in presets:
            raise Refusal(f"preset {name}: must be one of {', '.join(presets)}{near(name, list(presets))}")
        return presets[name]

    def main(self) -> None:
        """The command line of a study file."""
        from bnscale.study.command import main  # the command line stands on the declaration

        main(self, Path(inspect.stack()[1].filename))
