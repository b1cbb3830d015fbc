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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

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


def slopes_of(value: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of a loss with respect to the leaves of its graph, as a function of them."""
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), create_graph=True), strict=True))


def quadratic(slopes: Mapping[str, Tensor], leaves: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """g'Hg with g the gradient with respect to the leaves of these names and H the Hessian between them, by a pass
    backward through the gradient."""
    names = list(names)
    fixed = [slopes[name].detach() for name in names]
    along = torch.stack([(slopes[name] * own).sum() for name, own in zip(names, fixed, strict=True)]).sum()
    places = [leaves[name] for name in names]
    turned = torch.autograd.grad(along, places, retain_graph=True, materialize_grads=True)
    products = zip(fixed, turned, strict=True)
    return sum(float(torch.dot(own.flatten().double(), part.flatten().double())) for own, part in products)


@asks(second_derivative, steps=5, each=0.35, rows=lambda trial: 1)
def descent(at: Snapshot, multiples: tuple[float, ...], most: float) -> Iterator[Descent]:
    """Deshmukh 2020, section 2. Two passes backward, and one forward for each step size.

    Step sizes are multiples of the trial's learning rate `lr`, cut at `most`; two that are the same then count once.
    A gradient of zero or beyond the float32 numbers has no direction, and no rows. Penalties, weight decay and momentum
    are left out: with those an update goes elsewhere.
    """
    batch = at.batch()
    value, leaves = at.differentiable(batch, at.names(), {})
    slopes = slopes_of(value, leaves)
    bend = quadratic(slopes, leaves, leaves)
    gradient = {name: slope.detach() for name, slope in slopes.items()}
    before, square = float(value.detach()), length_of(gradient) ** 2
    del value, leaves, slopes  # and their graph: the passes to come need the memory
    at.share(gradient)
    if not (0 < square < math.inf and math.isfinite(bend)):
        return
    curvature = bend / square
    for length in dict.fromkeys(min(multiple * at.trial.lr, most) for multiple in multiples):
        first, second = length * square, length**2 / 2 * bend
        yield Descent(
            at.step,
            length / at.trial.lr,
            length,
            square,
            curvature,
            largest=2 / curvature if curvature > 0 else None,
            first_order=first,
            second_order=second,
            loss_before=before,
            predicted=before - first + second,
            loss=at.loss(batch, moved(at, gradient, length)),
        )
