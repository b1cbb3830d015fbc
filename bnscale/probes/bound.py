"""Theorem 4.1 of Santurkar et al. 2018 (v3), unit by unit: batch normalization makes the loss more Lipschitz.

A unit j of a batch norm layer takes y (m values: images times pixels), normalizes them to yhat = (y - mean) / sigma
and hands on z = gamma yhat + beta. With Lhat the loss of the network with batch norm and L that of the same network
without,

    |dLhat/dy|^2  <=  gamma^2 / sigma^2 (|dL/dy|^2 - <1, dL/dy>^2 / m - <dL/dy, yhat>^2 / m).

Where dL/dy is taken for dLhat/dz, the gradient at the layer's output, as in the proof (fact C.1), both sides are equal
but for the epsilon in sigma. Taken in the network without norms, at what the same unit computes there, nothing makes
it hold: the paper takes for granted that this network hands on the same gradient.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from bnscale import loss
from bnscale.networks.norm import EPS, BatchNorm
from bnscale.probes.probe import asks, batch_statistics
from bnscale.probes.snapshot import Snapshot


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
    # In the network with the same weights and no norms, with dL/dy at what the unit computes there; null where that
    # overflowed:
    plain: float | None  # |dL/dy|^2
    plain_right: float | None  # the right side with it, and yhat and sigma from the network with batch norm


class Sides(NamedTuple):
    """Of the inequality, by channel, in float64."""

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
    y_CM, slope_y_CM, slope_CM = map(_by_channel, (y, slope_y, slope))
    variance_C = y_CM.var(1, correction=0)
    sigma_C = (variance_C + eps).sqrt()
    normalised_CM = (y_CM - y_CM.mean(1, keepdim=True)) / sigma_C[:, None]
    scale_C = (gamma_C.double() / sigma_C).square()
    m = y_CM.shape[1]
    return Sides(
        sigma_C,
        left_C=slope_y_CM.square().sum(1),
        whole_C=scale_C * slope_CM.square().sum(1),
        along_ones_C=scale_C * slope_CM.sum(1).square() / m,
        along_values_C=scale_C * (slope_CM * normalised_CM).sum(1).square() / m,
    )


def _by_channel(values: Tensor) -> Tensor:
    return values.detach().double().transpose(0, 1).flatten(1)


@asks(batch_statistics, steps=2.5, rows=lambda trial: sum(site.channels for site in trial.norms))
def gradient_bound(at: Snapshot) -> Iterator[GradientBound]:
    """Santurkar et al. 2018, theorem 4.1, on real activations."""
    sites = at.trial.norms
    norms = [cast(BatchNorm, at.network.get_submodule(site.name)) for site in sites]
    both = _passed(at, norms, lambda y, z: z)
    plain = _passed(at, norms, lambda y, z: y)
    for site, norm, here, there in zip(sites, norms, both, plain, strict=True):
        gamma_C = norm.gamma_beta(here.y)[0].detach()
        own = sides(here.y, gamma_C, here.slope_y, here.slope_z, EPS)
        right_C = own.right()
        if not torch.isfinite(torch.stack([own.left_C, right_C])).all():
            continue  # what overflowed is no number
        other = sides(here.y, gamma_C, there.slope_y, there.slope_y, EPS)
        columns = zip(
            gamma_C.tolist(), own.sigma_C.tolist(), own.left_C.tolist(), right_C.tolist(),
            own.whole_C.tolist(), own.along_ones_C.tolist(), own.along_values_C.tolist(),
            map(_finite, other.left_C.tolist()), map(_finite, other.right().tolist()),
            strict=True,
        )  # fmt: skip
        values = here.y.numel() // here.y.shape[1]
        for unit, row in enumerate(columns):
            yield GradientBound(at.step, site.layer, site.name, unit, values, *row)


class Passed(NamedTuple):
    """One norm layer on the way of a batch, (N, C, ...) each."""

    y: Tensor  # what it takes
    slope_y: Tensor  # gradient of the loss there
    slope_z: Tensor  # and at what it hands on; 0 where that goes nowhere


def _passed(at: Snapshot, norms: list[BatchNorm], goes_on: Callable[[Tensor, Tensor], Tensor]) -> list[Passed]:
    """The next batch in training mode, `goes_on(y, z)` behind each norm, and back."""
    takes: dict[nn.Module, Tensor] = {}
    hands: dict[nn.Module, Tensor] = {}

    def see(norm: nn.Module, inputs: tuple[Tensor, ...], z: Tensor) -> Tensor:
        takes[norm], hands[norm] = inputs[0], z
        return goes_on(inputs[0], z).clone()  # what follows may overwrite it

    handles = [norm.register_forward_hook(see) for norm in norms]
    try:
        images_NCHW, targets = at.batch()
        # Whatever trains, the gradient then reaches every layer.
        value = loss.of_batch(at.trial, at.forward(images_NCHW.requires_grad_(), {}), targets)
    finally:
        for handle in handles:
            handle.remove()
    wanted = [*(takes[norm] for norm in norms), *(hands[norm] for norm in norms)]
    slopes = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
    at_y, at_z = slopes[: len(norms)], slopes[len(norms) :]
    return [Passed(takes[norm].detach(), *both) for norm, *both in zip(norms, at_y, at_z, strict=True)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
