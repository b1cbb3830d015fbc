"""The gradient over several mini-batches: what they share, and what differs (Bjorck et al. 2018, section 2.1, reviews).

Gradients are added up as they come: however many batches, memory holds one gradient and one sum. Legend: U units of a
layer, which are its output channels.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from bnscale.networks.layers import layers
from bnscale.probes.probe import asks, something_trained, whole_weights
from bnscale.probes.snapshot import Snapshot
from bnscale.trial import Trial

BATCHES = 4  # of the trial's size, from the next on
SMALL = (1, 8, 32)  # images of smaller mini-batches; 2 and not 1 where a norm takes statistics over images
IMAGES = 256  # that the smaller mini-batches are cut from ...
MOST = 24  # ... and how many of one size there are at most


@dataclass(frozen=True)
class MeanGradient:
    """The weights of one layer at one step, over several mini-batches.

    mean_square less batch_variance / batches is without bias the square of the gradient over all images.
    """

    step: int  # updates taken
    layer: str  # module path
    layer_index: int  # 1 at the stem, growing towards the output
    batches: int
    batch: int  # images of each
    mean_square: float  # squared length of the mean gradient
    batch_square: float  # squared length of a batch's gradient, mean over batches
    batch_variance: float  # squared distance of a batch's gradient from the mean, over batches less one
    # Of the mean gradient: the part along the weights, with its sign, and the length of the rest. Where a norm follows,
    # scaling the weights changes nothing, and there is no radial part.
    radial: float
    tangential: float
    weight_length: float
    # A unit's gradient has a length on each batch. Variances of it, over the squared mean of all:
    between_units: float | None  # variance over units of the mean over batches, without bias: it may come out below 0
    between_batches: float | None  # mean over units of the variance over batches


@dataclass(frozen=True)
class GradientNoise:
    """Mini-batches of one size at one step: the gradient of what trains."""

    step: int  # updates taken
    batch: int  # images of a mini-batch
    batches: int  # of this size, within an epoch no image twice
    # E |g_B - g|^2 with g the mean over the mini-batches, without bias: summed over all that trains. Section 2.1 bounds
    # it by C / |B|, with C the noise of single images; C = |B| times this, if it is so.
    variance: float
    mean_square: float  # |g|^2 over all images, without bias: it may come out below 0


class Sums:
    """Of gradients, one after the other; it holds one."""

    def __init__(self) -> None:
        self.count = 0
        self.total: dict[str, Tensor] = {}
        self.squares: dict[str, float] = {}  # by parameter, squared lengths added up

    def add(self, gradient: dict[str, Tensor]) -> None:
        self.count += 1
        for name, part in gradient.items():
            self.squares[name] = self.squares.get(name, 0.0) + square(part)
            if name in self.total:
                self.total[name] += part
            else:
                self.total[name] = part.clone()

    def mean_square(self, names: Iterable[str]) -> float:
        """Squared length of the mean."""
        return sum(square(self.total[name]) for name in names) / self.count**2

    def variance(self, names: Iterable[str]) -> float:
        """Squared distance from the mean, over the count less one."""
        names = list(names)
        spread = sum(self.squares[name] for name in names) - self.count * self.mean_square(names)
        return max(spread, 0.0) / (self.count - 1)


def square(part: Tensor) -> float:
    return float(part.double().square().sum())


def several(trial: Trial) -> str | None:
    """Mini-batches must differ, and none may hold nearly all images."""
    if trial.steps_per_epoch < BATCHES:
        return f"{trial.steps_per_epoch} batches an epoch, and {BATCHES} that differ are needed; try a smaller batch"
    return whole_weights(trial)


def several_and_trained(trial: Trial) -> str | None:
    return several(trial) or something_trained(trial)


@dataclass(frozen=True)
class Several:
    """The gradients of `BATCHES` mini-batches of the trial's size."""

    sums: Sums
    units: dict[str, Tensor]  # by parameter: lengths of the units' gradients, (batches, U)


def _several(at: Snapshot) -> Several:
    found = layers(at.network)
    names = list(dict.fromkeys([*(layer.weight for layer in found), *at.names()]))
    sums = Sums()
    lengths: dict[str, list[Tensor]] = {layer.weight: [] for layer in found}
    for ahead in range(BATCHES):
        gradient = at.gradients_on(at.batch(ahead), names) if ahead else at.gradients(names)
        sums.add(gradient)
        for layer in found:
            lengths[layer.weight].append(gradient[layer.weight].flatten(1).double().norm(dim=1))
    return Several(sums, {name: torch.stack(each) for name, each in lengths.items()})


def mean_gradient_of(at: Snapshot) -> dict[str, Tensor]:
    """Of what trains, over `BATCHES` mini-batches."""
    sums = at.kept(_several).sums
    return {name: sums.total[name] / sums.count for name in at.names()}


@asks(several, steps=BATCHES, rows=lambda trial: trial.layers)
def mean_gradient(at: Snapshot) -> Iterator[MeanGradient]:
    """Reviewers of Bjorck et al. 2018: how much of a gradient does not depend on the images, and where it points."""
    measured = at.kept(_several)
    sums = measured.sums
    for layer in layers(at.network):
        name = layer.weight
        weight = at.parameters[name].detach().double().flatten()
        mean = sums.total[name].double().flatten() / sums.count
        length = float(weight.norm())
        radial = float(mean @ weight) / length if length else 0.0
        mean_square = sums.mean_square([name])
        units_BU = measured.units[name]
        overall = float(units_BU.mean()) ** 2
        noise = float(units_BU.var(0, correction=1).mean())
        yield MeanGradient(
            at.step,
            layer.name,
            layer.number,
            batches=sums.count,
            batch=at.trial.batch,
            mean_square=mean_square,
            batch_square=sums.squares[name] / sums.count,
            batch_variance=sums.variance([name]),
            radial=radial,
            tangential=math.sqrt(max(mean_square - radial**2, 0.0)),
            weight_length=length,
            between_units=(float(units_BU.mean(0).var(correction=0)) - noise / sums.count) / overall
            if overall
            else None,
            between_batches=noise / overall if overall else None,
        )


@asks(several_and_trained, steps=BATCHES + 6, rows=lambda trial: 1 + len(SMALL))
def gradient_noise(at: Snapshot) -> Iterator[GradientNoise]:
    """Bjorck et al. 2018, section 2.1: the noise of a gradient estimate falls as 1 / |B|.

    What a noise norm adds is the same for every mini-batch, and not counted.
    Where a norm takes statistics over images a single image has no gradient of its own: mini-batches are normalized by
    themselves, as they are in training, and the bound, whose proof adds up single images, need not hold.
    """
    names = at.names()
    for size in sizes(at.trial):
        yield _noise(at.step, size, _of_size(at, size), names)
    yield _noise(at.step, at.trial.batch, at.kept(_several).sums, names)


def sizes(trial: Trial) -> list[int]:
    """Of the smaller mini-batches."""
    least = 2 if trial.norm.over_images else 1
    return sorted({max(size, least) for size in SMALL if max(size, least) < trial.batch})


def _of_size(at: Snapshot, size: int) -> Sums:
    """Of mini-batches of so many images: the batches to come, cut up; within an epoch no image serves twice."""
    sums, names = Sums(), at.names()
    enough = max(2, min(MOST, IMAGES // size))
    for images_NCHW, targets in _cut(at, size):
        sums.add(at.gradients_on((images_NCHW, targets), names))
        if sums.count == enough:
            break
    return sums


def _cut(at: Snapshot, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for ahead in count():
        images_NCHW, targets = at.batch(ahead)
        for start in range(0, len(targets) - size + 1, size):
            yield images_NCHW[start : start + size], targets[start : start + size]


def _noise(step: int, size: int, sums: Sums, names: list[str]) -> GradientNoise:
    variance = sums.variance(names)
    return GradientNoise(step, size, sums.count, variance, sums.mean_square(names) - variance / sums.count)
