"""Theorem 4.1 of Santurkar et al. 2018 (v3), unit by unit: batch normalization makes the loss more Lipschitz.

A unit j of a batch norm layer takes y (m values: images times pixels), normalizes them to yhat = (y - mean) / sigma
and hands on z = gamma yhat + beta. With Lhat the loss of the network with this norm and L that of the same network
without it,

    |dLhat/dy|^2  <=  gamma^2 / sigma^2 (|dL/dy|^2 - <1, dL/dy>^2 / m - <dL/dy, yhat>^2 / m).

Where dLhat/dz, the gradient at the layer's output, stands for dL/dy, both sides are equal but for the epsilon in sigma
(fact C.1): with q = variance / sigma^2, the left is (1 - q) gamma^2 / sigma^2 <dLhat/dz, yhat>^2 / m below the right.
Taken in the network without this one norm, dL/dy is the gradient at other values, for what follows sees y and not z;
then nothing but measuring says whether it holds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from bnscale.networks.norm import EPS, BatchNorm
from bnscale.probes.passage import as_they_are, by_channel, left_out, passed, standardised
from bnscale.probes.probe import asks, batch_statistics
from bnscale.probes.snapshot import Snapshot

AT_ONCE = 2**19  # values that are looked at in float64 together: memory


@dataclass(frozen=True)
class GradientBound:
    """One channel of one batch norm layer at one step, on the next batch. Squared lengths over the channel's values."""

    step: int  # updates taken
    layer_index: int  # of the layer before the norm, 1 at the stem
    layer: str  # module path of the norm, "layers.5.norm"
    unit: int  # channel
    values: int  # m: images times pixels
    gamma: float
    sigma: float  # sqrt(variance + epsilon)
    left: float  # |dLhat/dy|^2
    right: float  # the right side with dLhat/dz for dL/dy
    # Of the right side, gamma^2 / sigma^2 times:
    whole: float  # |dLhat/dz|^2
    along_ones: float  # <1, dLhat/dz>^2 / m
    along_values: float  # <dLhat/dz, yhat>^2 / m
    # In the same network without this one norm; null where that overflowed:
    plain: float | None  # |dL/dy|^2
    plain_right: float | None  # the right side with it


class Sides(NamedTuple):
    """Of the inequality, (C,) each, in float64."""

    sigma_C: Tensor
    left_C: Tensor
    whole_C: Tensor
    along_ones_C: Tensor
    along_values_C: Tensor

    def right(self) -> Tensor:
        """The right side, (C,)."""
        return self.whole_C - self.along_ones_C - self.along_values_C


def sides(y: Tensor, gamma_C: Tensor, slope_y: Tensor, slope: Tensor, eps: float) -> Sides:
    """`slope_y` is dLhat/dy, and `slope` the gradient on the right side; (N, C, ...) each."""
    channels = max(1, AT_ONCE * y.shape[1] // y.numel())
    parts = [each.split(channels, 1) for each in (y, slope_y, slope)]
    found = [
        _sides(some_y, some_slope_y, some_slope, some_gamma_C, eps)
        for some_y, some_slope_y, some_slope, some_gamma_C in zip(*parts, gamma_C.split(channels), strict=True)
    ]
    return Sides(*map(torch.cat, zip(*found, strict=True)))


def _sides(y: Tensor, slope_y: Tensor, slope: Tensor, gamma_C: Tensor, eps: float) -> Sides:
    y_CM, slope_y_CM, slope_CM = map(by_channel, (y, slope_y, slope))
    sigma_C, normalised_CM = standardised(y_CM, eps)
    scale_C = (gamma_C.double() / sigma_C).square()
    m = y_CM.shape[1]
    return Sides(
        sigma_C,
        left_C=slope_y_CM.square().sum(1),
        whole_C=scale_C * slope_CM.square().sum(1),
        along_ones_C=scale_C * slope_CM.sum(1).square() / m,
        along_values_C=scale_C * (slope_CM * normalised_CM).sum(1).square() / m,
    )


@asks(
    batch_statistics,
    steps=lambda trial: 1 + 0.65 * len(trial.norms),
    rows=lambda trial: sum(site.channels for site in trial.norms),
)
def gradient_bound(at: Snapshot) -> Iterator[GradientBound]:
    """Santurkar et al. 2018, theorem 4.1, on real activations. One pass more for each norm, which is then left out.

    A unit whose gradient left the float32 numbers has no row.
    """
    norms = [(site, cast(BatchNorm, at.network.get_submodule(site.name))) for site in at.trial.norms]
    every = _with_norms(at, [norm for _, norm in norms])
    for (site, norm), own in zip(norms, every, strict=True):
        value, through = passed(at, at.batch(), [norm], left_out)
        y = through[norm].y  # the same as with this norm, for nothing changed before it
        (plain,) = torch.autograd.grad(value, [y])
        other = sides(y, norm.gamma_beta(y)[0].detach(), plain, plain, EPS)
        columns = (
            norm.gamma_beta(y)[0], own.sigma_C, own.left_C, own.right(), own.whole_C, own.along_ones_C,
            own.along_values_C,
        )  # fmt: skip
        plains = [map(_finite, column.tolist()) for column in (other.left_C, other.right())]
        values = y.numel() // y.shape[1]
        for unit, row in enumerate(zip(*(column.tolist() for column in columns), *plains, strict=True)):
            if all(map(math.isfinite, row[: len(columns)])):
                yield GradientBound(at.step, site.layer, site.name, unit, values, *row)


def _with_norms(at: Snapshot, norms: list[BatchNorm]) -> list[Sides]:
    """Both sides with the gradient at the layer's output, of each norm, from one backward pass."""
    value, through = passed(at, at.batch(), norms, as_they_are)
    slopes = iter(torch.autograd.grad(value, [each for norm in norms for each in through[norm]]))
    found = []
    for norm in norms:
        y, _ = through[norm]
        found.append(sides(y, norm.gamma_beta(y)[0].detach(), next(slopes), next(slopes), EPS))
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
