"""What a probe is, what it asks of a trial, and what a reading costs.

A probe is a function of a `Snapshot`. `asks` says beside it what it cannot do without, so that a trial that lacks it is
refused before anything starts, and what it costs, so that a forecast knows.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from bnscale.anatomy import FAMILIES
from bnscale.probes.cadence import Cadence
from bnscale.probes.snapshot import Snapshot
from bnscale.trial import Affine, Network, Norm, Precision, Refusal, Trainable, Trial, near, parse


class Probe(Protocol):
    """Called with a snapshot, it gives rows; its name is that of their table."""

    @property
    def __name__(self) -> str: ...
    def __call__(self, at: Snapshot, /) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Demand:
    """What a probe asks of a trial, and what one reading costs it."""

    lacks: Callable[[Trial], str | None]  # what the trial lacks, "no gamma", with a way out; None where it serves
    steps: Callable[[Trial], float]  # training steps that take as long as a reading ...
    each: float  # ... and so many more for each layer or step size that it is asked about
    evaluations: float  # passes over every part of the data
    rows: Callable[[Trial], float]

    def at(self, places: int, lacks: Callable[[Trial], str | None]) -> "Demand":
        """Of the same probe at so many layers or step sizes, each with its rows."""
        steps, rows = self.steps, self.rows
        more = places * self.each
        return Demand(lacks, lambda trial: steps(trial) + more, 0, self.evaluations, lambda trial: rows(trial) * places)


def _nothing(trial: Trial) -> str | None:
    return None


def _always(steps: float | Callable[[Trial], float]) -> Callable[[Trial], float]:
    return steps if callable(steps) else lambda trial: steps


def _few(trial: Trial) -> float:
    return 3


F = TypeVar("F", bound=Callable[..., Iterator[Any]])


def asks(
    lacks: Callable[[Trial], str | None] = _nothing,
    *,
    steps: float | Callable[[Trial], float] = 0.0,
    each: float = 0.0,
    evaluations: float = 0.0,
    rows: Callable[[Trial], float] = _few,
) -> Callable[[F], F]:
    """Says what the function below it asks and costs, and leaves it as it is."""

    def said(probe: F) -> F:
        vars(probe)["demand"] = Demand(lacks, _always(steps), each, evaluations, rows)
        return probe

    return said


def demand(probe: Callable[..., Iterator[Any]]) -> Demand:
    return getattr(probe, "demand", Demand(_nothing, _always(0.0), 0.0, 0.0, _few))


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
        if not isinstance(number, int) or number < 1:
            raise Refusal(f"probe {measure.__name__}: layer {number}: layers are numbered 1, 2, 3 ... from the stem")
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
        if not isinstance(each, int | float) or not each > 0 or (each == math.inf and each in multiples):
            raise Refusal(f"probe {measure.__name__}: step {each}: must be a finite number greater than 0")
    if not multiples or list(multiples) != sorted(set(multiples)):
        raise Refusal(f"probe {measure.__name__}: steps {multiples}: give at least one, each once, in rising order")
    return AtMultiples(measure, multiples, most)


@dataclass(frozen=True)
class Only:
    """A probe that looks at some trials of a study and leaves the others alone."""

    probe: Probe
    fields: tuple[tuple[str, tuple[Any, ...]], ...]  # of a trial: field, and the values that it may have
    these: bool = True  # it looks at the trials with all these values; else at all the others

    @property
    def __name__(self) -> str:
        return self.probe.__name__

    def __call__(self, at: Snapshot, /) -> Iterator[Any]:
        return self.probe(at)

    @property
    def demand(self) -> Demand:
        return demand(self.probe)

    def looks(self, trial: Trial) -> bool:
        inner = not isinstance(self.probe, Only) or self.probe.looks(trial)
        return inner and self.these == all(getattr(trial, field) in values for field, values in self.fields)

    def __str__(self) -> str:
        return str(self.probe) if isinstance(self.probe, AtLayers | AtMultiples | Only) else ""


def only(probe: Probe, **fields: Iterable[Any]) -> Only:
    """`only(gradient_bound, norm=[Norm.BATCH])` looks at the trials with batch norm. Raises `Refusal` for a field that
    trials do not have, and for a value that it cannot have."""
    return Only(probe, _fields(probe, fields))


def unless(probe: Probe, **fields: Iterable[Any]) -> Only:
    """`unless(landscape, lr=[0.1])` looks at the trials that `only(landscape, lr=[0.1])` leaves alone; raises as it."""
    return Only(probe, _fields(probe, fields), these=False)


def _fields(probe: Probe, fields: Mapping[str, Iterable[Any]]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    some: list[tuple[str, tuple[Any, ...]]] = []
    for field, values in fields.items():
        said = f"probe {probe.__name__}: {field}"
        if field not in Trial.model_fields:
            raise Refusal(f"{said}: no such field{near(field, list(Trial.model_fields))}")
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise Refusal(f"{said} {values}: give a list of values: {field}=[...]")
        values = tuple(parse(Trial, field, value) for value in values)
        kind = Trial.model_fields[field].annotation
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            for value in values:
                if not isinstance(value, kind):
                    members = [str(member) for member in kind]
                    raise Refusal(f"{said} {value}: must be one of {', '.join(members)}{near(str(value), members)}")
        some.append((field, values))
    return tuple(some)


def looking(probes: dict[Probe, Cadence], trial: Trial) -> dict[Probe, Cadence]:
    """Those of a study's probes that look at this trial. Raises `Refusal` where two of them write one table: a trial's
    manifest keeps one cadence for a table."""
    found = {probe: cadence for probe, cadence in probes.items() if not isinstance(probe, Only) or probe.looks(trial)}
    for name, times in Counter(probe.__name__ for probe in found).items():
        if times > 1:
            raise Refusal(
                f"probe {name}: looks at {trial.id} in {times} ways; give it one, at all layers that you want"
            )
    return found


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
    if trial.precision is not Precision.FP32:
        return f"{trial.precision} values, whose rounding is as large as what is compared; set precision=fp32"
    return None


def second_derivative(trial: Trial) -> str | None:
    """The gradient of what trains can be differentiated once more, and is itself a derivative of the loss."""
    if trial.precision is not Precision.FP32:
        return f"{trial.precision} values, whose rounding drowns second derivatives; set precision=fp32"
    if trial.norms and trial.norm in (Norm.L1, Norm.L2, Norm.LINF):
        return f"{trial.norm} norms, whose gradient can be taken once only; set norm=batch"
    if trial.norms and trial.norm is Norm.RENORM:
        return "batch renormalization, whose corrections no gradient goes through; set norm=batch"
    return something_trained(trial)
