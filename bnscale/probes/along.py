"""The loss along a direction in the space of the weights (Bjorck et al. 2018, figures 3 and 4, and a reviewer).

Every direction is of what trains, on the next batch and in training mode: theta - length * direction.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnscale.networks.layers import layers
from bnscale.probes.batches import BATCHES, mean_gradient_of, several_and_trained
from bnscale.probes.moments import seen
from bnscale.probes.probe import asks, something_trained
from bnscale.probes.snapshot import Snapshot

LENGTHS = tuple(float(f"{10 ** (third / 3):.3g}") for third in range(-15, 0))
"""Step sizes from 1e-5 to 0.464, three a decade: those of figure 3, which ends at 0.2, and one more."""
JUMP = 10.0  # times the loss at a step size, where more are looked at before the next ...
CLOSE = 1.25  # ... as long as the two are further apart than this factor
DIVERGED = 1e3  # times the loss before: what the paper calls divergence
BEYOND = 1e6  # times the loss before, where its figure ends, and where we look no further
FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class LossAlong:
    """The loss on the next batch at one distance along one direction. Where it jumps, more distances are looked at."""

    step: int  # updates taken: mini-batch 1 is the one behind step 0
    direction: str  # gradient, mean gradient, or random: orthogonal to the mean gradient, and as long
    length: float  # times the direction, which is subtracted: the step size
    loss: float  # infinite where it left the float32 numbers
    loss_before: float  # at length 0
    relative: float  # loss over loss_before


@dataclass(frozen=True)
class MomentsAlong:
    """One channel of one layer on a part of the way along the gradient."""

    step: int  # updates taken
    layer_index: int  # 1 at the stem
    length: float  # of the whole way: the least step size that multiplies the loss by more than 1,000
    diverges: bool  # False where no step size looked at does: then it is the largest
    fraction: float  # of the way, in [0, 1]
    channel: int
    mean: float | None  # over images and pixels of what the layer computes; null where that overflowed
    variance: float | None


@asks(something_trained, steps=1 + len(LENGTHS) * 0.35, rows=lambda trial: len(LENGTHS))
def loss_along_gradient(at: Snapshot) -> Iterator[LossAlong]:
    """Bjorck et al. 2018, figure 3: without normalization the loss leaves all bounds after a small step."""
    yield from at.kept(_along_gradient)


def _along_gradient(at: Snapshot) -> list[LossAlong]:
    return list(_loss_along(at, "gradient", at.gradient, LENGTHS))


@asks(several_and_trained, steps=BATCHES + len(LENGTHS) * 0.35, rows=lambda trial: len(LENGTHS))
def loss_along_mean_gradient(at: Snapshot) -> Iterator[LossAlong]:
    """A reviewer of Bjorck et al. 2018: does the part of the gradient that does not depend on the input lead down?

    Beside it a random direction that is orthogonal to it and as long.
    """
    mean = at.kept(mean_gradient_of)
    yield from _loss_along(at, "mean gradient", mean, LENGTHS[::2])
    yield from _loss_along(at, "random", orthogonal(at, mean), LENGTHS[::2])


def orthogonal(at: Snapshot, direction: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Gaussian direction less its part along `direction`, as long as that; a function of the trial and the step."""
    draws = torch.Generator().manual_seed(at.trial.seed_for(f"probe/direction/{at.step}"))
    random = {
        name: torch.randn(part.shape, generator=draws).to(part.device, part.dtype) for name, part in direction.items()
    }
    size = dot(direction, direction)
    if size == 0 or not math.isfinite(size):
        return {name: part * 0 for name, part in random.items()}
    along = dot(random, direction) / size
    random = {name: part - along * direction[name] for name, part in random.items()}
    scale = math.sqrt(size / dot(random, random))
    return {name: part * scale for name, part in random.items()}


def dot(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return float(sum(torch.dot(part.flatten().double(), right[name].flatten().double()) for name, part in left.items()))


def _loss_along(at: Snapshot, name: str, direction: dict[str, Tensor], lengths: Sequence[float]) -> Iterator[LossAlong]:
    batch = at.batch()
    before = at.loss(batch, {})
    if not 0 < before < math.inf:
        return

    def look(length: float) -> LossAlong:
        loss = at.loss(batch, moved(at, direction, length))
        return LossAlong(at.step, name, length, loss, before, loss / before)

    last: LossAlong | None = None
    for length in lengths:
        here = look(length)
        if last is not None:
            yield from _between(look, last, here)
        yield here
        if here.loss > BEYOND * before:
            return
        last = here


def _between(look: Callable[[float], LossAlong], left: LossAlong, right: LossAlong) -> Iterator[LossAlong]:
    """Readings between two lengths where the loss jumps, so that it is known where; in the order of their length."""
    if right.relative <= JUMP * left.relative or right.length <= CLOSE * left.length:
        return
    middle = look(math.sqrt(left.length * right.length))
    yield from _between(look, left, middle)
    yield middle
    if middle.relative <= BEYOND:
        yield from _between(look, middle, right)


def moved(at: Snapshot, direction: dict[str, Tensor], length: float) -> dict[str, Tensor]:
    """What trains, after a step of this length against the direction."""
    return {name: at.parameters[name].detach() - length * part for name, part in direction.items()}


@asks(something_trained, steps=1 + len(LENGTHS) * 0.35 + len(FRACTIONS) * 0.4, rows=lambda trial: 6 * 64 * trial.width)
def moments_along_gradient(at: Snapshot, numbers: tuple[int, ...]) -> Iterator[MomentsAlong]:
    """Bjorck et al. 2018, figure 4: what happens in the layers while an update diverges."""
    curve = at.kept(_along_gradient)
    if not curve:
        return
    length = next((each.length for each in curve if each.relative > DIVERGED), None)
    whole = curve[-1].length if length is None else length
    some = [layer for layer in layers(at.network) if layer.number in numbers]
    for fraction in FRACTIONS:
        moments = seen(at, some, moved(at, at.gradient, fraction * whole))
        for layer in some:
            for channel, (mean, variance) in enumerate(moments[layer.number].T.tolist()):
                where = (at.step, layer.number, whole, length is not None, fraction, channel)
                yield MomentsAlong(*where, _finite(mean), _finite(variance))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
