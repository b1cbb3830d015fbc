"""How the loss and its gradient change on the way of an update (Santurkar et al. 2018, figures 4 and 10).

All on one batch, in training mode and over everything that trains: x' = x - length * gradient(x). Penalties, weight
decay and momentum are left out: with those an update goes elsewhere. In float32: where a gradient hardly changes, what
is seen of the change is rounding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bnscale.probes.along import moved
from bnscale.probes.probe import asks, something_trained
from bnscale.probes.snapshot import Snapshot


@dataclass(frozen=True)
class Landscape:
    """One step size along the gradient of the next batch. What left the float32 numbers is infinite."""

    step: int  # updates taken
    multiple: float  # of the trial's learning rate
    length: float  # times the gradient: the step size
    distance: float  # |x' - x|, as float32 has them
    loss_before: float  # at x
    loss: float  # at x'; over step sizes, its range is the variation of the loss (figure 4a)
    gradient: float  # |gradient(x)|
    gradient_change: float  # |gradient(x) - gradient(x')|: gradient predictiveness (figure 4b)
    beta: float  # gradient_change / distance; over step sizes, its largest is the effective beta-smoothness (figure 4c)


@asks(something_trained, steps=1, each=1, rows=lambda trial: 1)
def landscape(at: Snapshot, multiples: tuple[float, ...], most: float) -> Iterator[Landscape]:
    """Santurkar et al. 2018, section 3.2. One pass forward and backward, and one more for each step size.

    Step sizes are multiples of the trial's learning rate `lr`, cut at `most`; two that are the same then count once.
    A gradient of zero or beyond the float32 numbers has no direction, and no rows.
    """
    batch, names = at.batch(), at.names()
    before, slope = at.slope(batch, names, {})
    at.share(slope)
    norm = length_of(slope)
    if not 0 < norm < math.inf:
        return
    for length in dict.fromkeys(min(multiple * at.trial.lr, most) for multiple in multiples):
        far = moved(at, slope, length)
        distance = length_of({name: part - at.parameters[name].detach() for name, part in far.items()})
        loss, there = at.slope(batch, names, far)
        if distance == 0:
            continue  # a step that float32 cannot take
        change = length_of({name: part - there[name] for name, part in slope.items()})
        yield Landscape(
            at.step,
            length / at.trial.lr,
            length,
            distance=distance,
            loss_before=before,
            loss=loss,
            gradient=norm,
            gradient_change=change,
            beta=change / distance,
        )


def length_of(parts: dict[str, Tensor]) -> float:
    """Euclidean length of all parts together, in float64; infinite where one is no number."""
    # Flattened: engines keep the same weights in different layouts, and a sum goes along them.
    squares = [torch.dot(flat, flat) for flat in (part.flatten().double() for part in parts.values())]
    square = float(torch.stack(squares).sum())
    return math.sqrt(square) if math.isfinite(square) else math.inf
