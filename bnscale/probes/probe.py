"""What a probe is, what it asks of a trial, and what a reading costs.

A probe is a function of a `Snapshot`. `asks` says beside it what it cannot do without, so that a trial that lacks it is
refused before anything starts, and what it costs, so that a forecast knows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from bnscale.anatomy import FAMILIES
from bnscale.probes.cadence import Cadence
from bnscale.probes.snapshot import Snapshot
from bnscale.trial import Affine, Network, Refusal, Trainable, Trial


class Probe(Protocol):
    """Called with a snapshot, it gives rows; its name is that of their table."""

    @property
    def __name__(self) -> str: ...
    def __call__(self, at: Snapshot, /) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Demand:
    """What a probe asks of a trial, and what one reading costs it."""

    lacks: Callable[[Trial], str | None]  # what the trial lacks, "no gamma", with a way out; None where it serves
    steps: float  # training steps that take as long as a reading
    evaluations: float  # passes over every part of the data
    rows: Callable[[Trial], float]


def _nothing(trial: Trial) -> str | None:
    return None


def _few(trial: Trial) -> float:
    return 3


F = TypeVar("F", bound=Callable[..., Iterator[Any]])


def asks(
    lacks: Callable[[Trial], str | None] = _nothing,
    *,
    steps: float = 0.0,
    evaluations: float = 0.0,
    rows: Callable[[Trial], float] = _few,
) -> Callable[[F], F]:
    """Says what the function below it asks and costs, and leaves it as it is."""

    def said(probe: F) -> F:
        vars(probe)["demand"] = Demand(lacks, steps, evaluations, rows)
        return probe

    return said


def demand(probe: Callable[..., Iterator[Any]]) -> Demand:
    return getattr(probe, "demand", Demand(_nothing, 0.0, 0.0, _few))


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
        own = demand(self.measure)
        return Demand(self._lacks, own.steps, own.evaluations, lambda trial: own.rows(trial) * len(self.layers))

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


def check(probe: Probe, trial: Trial) -> None:
    """Raises `Refusal` where the trial lacks what the probe measures."""
    lacks = demand(probe).lacks(trial)
    if lacks:
        title = FAMILIES[trial.network].title
        norm = f"norm {trial.norm}" + ("" if not trial.norms else f", placement {trial.placement}")
        raise Refusal(f"probe {probe.__name__}: the {title} of depth {trial.depth} with {norm} has {lacks}")


def described(probe: Probe, cadence: Cadence) -> str:
    """How it looks, in words: `1 epochs`, `3 steps at layers 8, 44`."""
    layers = f" at layers {', '.join(map(str, probe.layers))}" if isinstance(probe, AtLayers) else ""
    return f"{cadence}{layers}"


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
