"""What a probe is, what it asks of a trial, and what a reading costs.

A probe is a function of a `Snapshot`. `asks` says beside it what it cannot do without, so that a trial that lacks it is
refused before anything starts, and what it costs, so that a forecast knows.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from bnscale.anatomy import FAMILIES
from bnscale.probes.cadence import Cadence
from bnscale.probes.snapshot import Snapshot
from bnscale.trial import Affine, Network, Norm, Refusal, Trainable, Trial, near


class Probe(Protocol):
    """Called with a snapshot, it gives rows; its name is that of their table."""

    @property
    def __name__(self) -> str: ...
    def __call__(self, at: Snapshot, /) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Demand:
    """What a probe asks of a trial, and what one reading costs it."""

    lacks: Callable[[Trial], str | None]  # what the trial lacks, "no gamma", with a way out; None where it serves
    steps: float  # training steps that take as long as a reading ...
    each: float  # ... and so many more for each layer or step size that it is asked about
    evaluations: float  # passes over every part of the data
    rows: Callable[[Trial], float]

    def at(self, places: int, lacks: Callable[[Trial], str | None]) -> "Demand":
        """Of the same probe at so many layers or step sizes, each with its rows."""
        return Demand(
            lacks, self.steps + places * self.each, 0, self.evaluations, lambda trial: self.rows(trial) * places
        )


def _nothing(trial: Trial) -> str | None:
    return None


def _few(trial: Trial) -> float:
    return 3


F = TypeVar("F", bound=Callable[..., Iterator[Any]])


def asks(
    lacks: Callable[[Trial], str | None] = _nothing,
    *,
    steps: float = 0.0,
    each: float = 0.0,
    evaluations: float = 0.0,
    rows: Callable[[Trial], float] = _few,
) -> Callable[[F], F]:
    """Says what the function below it asks and costs, and leaves it as it is."""

    def said(probe: F) -> F:
        vars(probe)["demand"] = Demand(lacks, steps, each, evaluations, rows)
        return probe

    return said


def demand(probe: Callable[..., Iterator[Any]]) -> Demand:
    return getattr(probe, "demand", Demand(_nothing, 0.0, 0.0, 0.0, _few))


@dataclass(frozen=True)
class AtLayers:
    """A probe that looks at some layers only, numbered from 1 at the stem: `at_layers(gradient_matrix, 45)`."""

    measure: Callable[[Snapshot, tuple[int, ...]], Iterator[Any]]
    layers: tuple[int, ...]

    @property
    def __name__(self) -> str:
        return self.measure.__name__

    def __call__(self, at: Snapshot, /) -> Iterator[Any]:
        return self.measure(at, self.layers)

    @property
    def demand(self) -> Demand:
        return demand(self.measure).at(len(self.layers), self._lacks)

    def __str__(self) -> str:
        return f"at layers {', '.join(map(str, self.layers))}"

    def _lacks(self, trial: Trial) -> str | None:
        beyond = [number for number in self.layers if number > trial.layers]
        if not beyond:
            return demand(self.measure).lacks(trial)
        return f"no layer {beyond[0]}: it has {trial.layers}, the output counted; make it deeper, with --set depth=..."


def at_layers(measure: Callable[[Snapshot, tuple[int, ...]], Iterator[Any]], *layers: int) -> AtLayers:
    """Raises `Refusal` for layers that no network has."""
    for number in layers:
        if number < 1:
            raise Refusal(f"probe {measure.__name__}: layer {number}: layers are numbered from 1 at the stem")
    if not layers or list(layers) != sorted(set(layers)):
        raise Refusal(f"probe {measure.__name__}: layers {layers}: give at least one, each once, in rising order")
    return AtLayers(measure, layers)


@dataclass(frozen=True)
class AtMultiples:
    """A probe that goes along the gradient by multiples of the trial's learning rate, at most `most`."""

    measure: Callable[[Snapshot, tuple[float, ...], float], Iterator[Any]]
    multiples: tuple[float, ...]
    most: float  # step size

    @property
    def __name__(self) -> str:
        return self.measure.__name__

    def __call__(self, at: Snapshot, /) -> Iterator[Any]:
        return self.measure(at, self.multiples, self.most)

    @property
    def demand(self) -> Demand:
        own = demand(self.measure)
        return own.at(len(self.multiples), own.lacks)

    def __str__(self) -> str:
        most = f", up to {self.most:g}" if self.most < math.inf else ""
        return f"at {', '.join(f'{multiple:g}' for multiple in self.multiples)} times the learning rate{most}"


def at_multiples(
    measure: Callable[[Snapshot, tuple[float, ...], float], Iterator[Any]], *multiples: float, most: float = math.inf
) -> AtMultiples:
    """`at_multiples(landscape, 0.5, 1, 2, 4, most=0.4)`. Raises `Refusal` for what is no step forward."""
    for each in (*multiples, most):
        if not each > 0:
            raise Refusal(f"probe {measure.__name__}: step {each:g}: must be greater than 0")
    if not multiples or list(multiples) != sorted(set(multiples)):
        raise Refusal(f"probe {measure.__name__}: steps {multiples}: give at least one, each once, in rising order")
    return AtMultiples(measure, multiples, most)


@dataclass(frozen=True)
class Only:
    """A probe that looks at some trials of a study and leaves the others alone."""

    probe: Probe
    fields: tuple[
        tuple[str, tuple[Any, ...]], ...
    ]  # of a trial that it looks at: field, and the values that it may have

    @property
    def __name__(self) -> str:
        return self.probe.__name__

    def __call__(self, at: Snapshot, /) -> Iterator[Any]:
        return self.probe(at)

    @property
    def demand(self) -> Demand:
        return demand(self.probe)

    def looks(self, trial: Trial) -> bool:
        return all(getattr(trial, field) in values for field, values in self.fields)

    def __str__(self) -> str:
        return str(self.probe) if isinstance(self.probe, AtLayers | AtMultiples) else ""


def only(probe: Probe, **fields: Iterable[Any]) -> Only:
    """`only(gradient_bound, norm=[Norm.BATCH])` looks at the trials with batch norm. Raises `Refusal` for a field that
    trials do not have."""
    for field in fields:
        if field not in Trial.model_fields:
            raise Refusal(f"probe {probe.__name__}: {field}: no such field{near(field, list(Trial.model_fields))}")
    return Only(probe, tuple((field, tuple(values)) for field, values in fields.items()))


def looking(probes: dict[Probe, Cadence], trial: Trial) -> dict[Probe, Cadence]:
    """Those of a study's probes that look at this trial."""
    return {probe: cadence for probe, cadence in probes.items() if not isinstance(probe, Only) or probe.looks(trial)}


def check(probe: Probe, trial: Trial) -> None:
    """Raises `Refusal` where the trial lacks what the probe measures."""
    lacks = demand(probe).lacks(trial)
    if lacks:
        title = FAMILIES[trial.network].title
        norm = f"norm {trial.norm}" + ("" if not trial.norms else f", placement {trial.placement}")
        raise Refusal(f"probe {probe.__name__}: the {title} of depth {trial.depth} with {norm} has {lacks}")


def described(probe: Probe, cadence: Cadence) -> str:
    """How it looks, in words: `1 epochs`, `3 steps at layers 8, 44`."""
    where = str(probe) if isinstance(probe, AtLayers | AtMultiples | Only) else ""
    return f"{cadence} {where}".rstrip()


# --- what trials may lack ---------------------------------------------------------------------------


def gamma_or_beta(trial: Trial) -> str | None:
    return None if trial.affine_norms else "no gamma or beta; give it some, with --set norm=batch"


def gamma(trial: Trial) -> str | None:
    if trial.affine_norms and trial.affine is not Affine.BETA:
        return None
    return "no gamma; give it some, with --set norm=batch --set affine=both"


def classes(trial: Trial) -> str | None:
    return "no classes: its data are a regression; measure it on images" if trial.facts.regression else None


def something_trained(trial: Trial) -> str | None:
    return None if trial.trainable is not Trainable.NONE else "nothing that trains; set trainable=all"


def relus(trial: Trial) -> str | None:
    return "no ReLU; measure another network" if trial.network is Network.LINEAR else None


def linearity(trial: Trial) -> str | None:
    return None if trial.network is Network.LINEAR else "nonlinearities, and is no matrix; set network=linear"


def whole_weights(trial: Trial) -> str | None:
    """Two trained weights a channel stand in a parameter beside the layer's weight, which has no gradient there."""
    if trial.trainable is not Trainable.TWO_PER_CHANNEL:
        return None
    return "weights in two parts, of which one trains; set trainable=all"


def plain_descent(trial: Trial) -> str | None:
    """The next update can be told from the next gradient alone."""
    if trial.momentum:
        return f"momentum {trial.momentum:g}, and only plain gradient descent is foreseen; set momentum=0"
    penalties = ("weight_decay", "norm_decay", "gamma_l1", "gamma_l2", "beta_l1", "beta_l2")
    held = next((name for name in penalties if getattr(trial, name)), None)
    if held:
        return f"{held} {getattr(trial, held):g}, and only plain gradient descent is foreseen; set {held}=0"
    if trial.plateau is not None:
        return "a rate that plateaus change, and only a known one is foreseen; set plateau=none"
    return something_trained(trial)


def batch_statistics(trial: Trial) -> str | None:
    """Batch normalization, one statistic over the whole batch."""
    if trial.norm is not Norm.BATCH or not trial.norms:
        return "no batch normalization; set norm=batch"
    if trial.norm_batch != trial.batch:
        return f"statistics over {trial.norm_batch} of {trial.batch} images; set norm_batch={trial.batch}"
    return None
