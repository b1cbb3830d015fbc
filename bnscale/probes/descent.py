"""Whether a step along the gradient goes down: the loss's second-order series, and what the loss really does.

Deshmukh 2020, section 2. With d = -gradient and H the Hessian of the loss, on one batch and over all that trains,

    L(theta + alpha d) = L(theta) - alpha |d|^2 + alpha^2 / 2 d'Hd + ...,

and where the third term is no smaller than the second, the note says, d is no direction of descent. It is one whatever
H is; it is the step that is too long, from alpha = 2 |d|^2 / d'Hd on, and beyond the reach of the series nothing but
the loss itself says where it leads.

d'Hd is exact but for float32: the gradient is differentiated once more. A ReLU has no curvature, so H knows nothing of
its kink.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bnscale.probes.along import moved
from bnscale.probes.landscape import length_of
from bnscale.probes.probe import asks, second_derivative
from bnscale.probes.snapshot import Snapshot


@dataclass(frozen=True)
class Descent:
    """One step size along the gradient of the next batch. What left the float32 numbers is infinite."""

    step: int  # updates taken
    multiple: float  # of the trial's learning rate
    length: float  # alpha
    gradient_square: float  # |d|^2
    curvature: float  # d'Hd / |d|^2
    largest: float | None  # alpha at which both terms are as large: 2 / curvature; null where that is not above 0
    first_order: float  # alpha |d|^2
    second_order: float  # alpha^2 / 2 d'Hd
    loss_before: float
    predicted: float  # loss_before - first_order + second_order
    loss: float  # L(theta + alpha d)


class Bend(NamedTuple):
    """A function along its gradient g at one place."""

    value: float
    gradient: dict[str, Tensor]
    square: float  # g'g
    quadratic: float  # g'Hg


def bend(value: Tensor, leaves: Mapping[str, Tensor]) -> Bend:
    """By a second pass backward, through the gradient of `value` with respect to these leaves of its graph."""
    places = list(leaves.values())
    slopes = torch.autograd.grad(value, places, create_graph=True)
    fixed = [slope.detach() for slope in slopes]
    along = torch.stack([(slope * own).sum() for slope, own in zip(slopes, fixed, strict=True)]).sum()
    turned = torch.autograd.grad(along, places, materialize_grads=True)
    products = [
        torch.dot(own.flatten().double(), part.flatten().double()) for own, part in zip(fixed, turned, strict=True)
    ]
    gradient = dict(zip(leaves, fixed, strict=True))
    return Bend(float(value.detach()), gradient, length_of(gradient) ** 2, float(sum(products)))


@asks(second_derivative, steps=5, each=0.35, rows=lambda trial: 1)
def descent(at: Snapshot, multiples: tuple[float, ...], most: float) -> Iterator[Descent]:
    """Deshmukh 2020, section 2. Two passes backward, and one forward for each step size.

    Step sizes are multiples of the trial's learning rate `lr`, cut at `most`; two that are the same then count once.
    A gradient of zero or beyond the float32 numbers has no direction, and no rows. Penalties, weight decay and momentum
    are left out: with those an update goes elsewhere.
    """
    batch = at.batch()
    found = bend(*at.differentiable(batch, at.names(), {}))
    at.share(found.gradient)
    if not (0 < found.square < math.inf and math.isfinite(found.quadratic)):
        return
    curvature = found.quadratic / found.square
    for length in dict.fromkeys(min(multiple * at.trial.lr, most) for multiple in multiples):
        first, second = length * found.square, length**2 / 2 * found.quadratic
        yield Descent(
            at.step,
            length / at.trial.lr,
            length,
            found.square,
            curvature,
            largest=2 / curvature if curvature > 0 else None,
            first_order=first,
            second_order=second,
            loss_before=found.value,
            predicted=found.value - first + second,
            loss=at.loss(batch, moved(at, found.gradient, length)),
        )
