"""The gradients of a batch norm layer by a student's formulas, against autograd (Deshmukh 2020, section 1).

A layer gets y, normalizes the m values of a channel (images times pixels) to yhat = (y - mean) / sigma, with sigma =
sqrt(variance + epsilon), and hands on z = gamma yhat + beta. With g the gradient at z, the note derives

    dL/dgamma = <yhat, g>,    dL/dbeta = g, which summed over the m values is <1, g>,    dL/dy = gamma / sigma * g.

The first two are right. The third takes mean and sigma for constants, as they are in evaluation. They are functions of
y, and with them (Ioffe & Szegedy 2015, section 3)

    dL/dy = gamma / sigma * (g - <1, g> / m - yhat <yhat, g> / m):

what of g lies along 1 and along yhat is lost, since moving y along these changes nothing (but for epsilon).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from bnscale.networks.norm import EPS, BatchNorm
from bnscale.probes.passage import as_they_are, by_channel, held_constant, layer_before, passed, standardised
from bnscale.probes.probe import asks, batch_statistics, whole_weights
from bnscale.probes.snapshot import Snapshot
from bnscale.trial import Trial


@dataclass(frozen=True)
class NormGradient:
    """One batch norm layer at one step, on the first images of the next batch; lengths over all its channels.

    In float64, so that rounding is far below whatever differs. An error is the length of the difference from
    autograd's gradient over that gradient's length, null where that is 0. Of gamma and beta it is over the length of
    the sums of the terms' magnitudes, for these sums can be 0 (a shift that the next norm takes away has no gradient);
    null where the layer has no such parameter.
    """

    step: int  # updates taken
    layer: str  # module path of the norm, "blocks.4.norm2"
    layer_index: int  # of the layer before it, 1 at the stem
    images: int  # behind each statistic
    values: int  # m: images times pixels
    # As in training:
    gamma_error: float | None  # of <yhat, g>
    beta_error: float | None  # of <1, g>
    input_error: float | None  # of gamma / sigma * g
    input_cosine: float | None  # of the angle between that and autograd's
    # Over the length of gamma / sigma * g:
    ones_part: float  # what of it lies along 1, which autograd's has not
    values_part: float  # what of it lies along yhat
    residual: float  # of the formula with both subtracted, from autograd's
    kept_part: float | None  # of autograd's gradient, what lies along 1 and yhat: epsilon alone keeps some
    # The gradient of the weights of the layer before the norm, if the note's formula stands in this one norm:
    weight_error: float | None  # null behind pooling
    weight_radial: float | None  # its part along the weights, output channel by output channel, over its length
    true_radial: float | None  # the same of autograd's
    # With means and variances held constant in every norm of the network, and g and autograd's gradients taken there:
    constant_gamma_error: float | None
    constant_beta_error: float | None
    constant_input_error: float | None
    # That network's gradient at y, which has the note's formula in this and all later norms, from autograd's as above:
    compound_error: float | None
    compound_cosine: float | None


def sizes(images: int) -> list[int]:
    """Of the parts of a batch: 2, 4, 8 ... and the whole."""
    return [2**power for power in range(1, 64) if 2**power < images] + [images]


def _lacks(trial: Trial) -> str | None:
    return batch_statistics(trial) or whole_weights(trial)


def _cost(trial: Trial) -> float:
    """Two passes for each size, in float64, which takes three to five times as long."""
    return 2 * 4 * sum(sizes(trial.batch)) / trial.batch


@asks(_lacks, steps=_cost, rows=lambda trial: len(sizes(trial.batch)) * len(trial.norms))
def norm_gradient(at: Snapshot) -> Iterator[NormGradient]:
    """Deshmukh 2020: g_gamma, g_beta and g_z, on parts of the next batch. Two passes for each number of images.

    A layer that gets no gradient, or one beyond the numbers, has no row.
    """
    for images in sizes(at.trial.batch):
        yield from _on(at, images)


def _on(at: Snapshot, images: int) -> Iterator[NormGradient]:
    trained = _slopes(at, images, as_they_are)
    constant = _slopes(at, images, held_constant)
    for site, true, still in zip(at.trial.norms, trained, constant, strict=True):
        found, there = _formulas(true), _formulas(still)
        length = float(found.note_CM.norm())
        if not 0 < length < math.inf:
            continue
        slope_CM, other_CM = by_channel(true.at_y), by_channel(still.at_y)
        with_note = true.weights(true.at_z * _along_channels(found.scale_C, true.y))
        yield NormGradient(
            at.step,
            site.name,
            site.layer,
            images,
            slope_CM.shape[1],
            gamma_error=_error_of_sum(found.gamma_CM, true.at_gamma_C),
            beta_error=_error_of_sum(found.beta_CM, true.at_beta_C),
            input_error=_error(found.note_CM, slope_CM),
            input_cosine=_cosine(found.note_CM, slope_CM),
            ones_part=float(found.ones_CM.norm()) / length,
            values_part=float(found.along_CM.norm()) / length,
            residual=float((found.note_CM - found.ones_CM - found.along_CM - slope_CM).norm()) / length,
            kept_part=_kept(true.y, slope_CM),
            weight_error=_error(with_note, true.at_weight),
            weight_radial=_radial(with_note, true.weight),
            true_radial=_radial(true.at_weight, true.weight),
            constant_gamma_error=_error_of_sum(there.gamma_CM, still.at_gamma_C),
            constant_beta_error=_error_of_sum(there.beta_CM, still.at_beta_C),
            constant_input_error=_error(there.note_CM, other_CM),
            compound_error=_error(other_CM, slope_CM),
            compound_cosine=_cosine(other_CM, slope_CM),
        )


class Slopes(NamedTuple):
    """What went into a norm, and autograd's gradients around it; what the norm or the place lacks is None."""

    y: Tensor
    gamma_C: Tensor
    weight: Tensor | None  # of the layer before it
    at_y: Tensor
    at_z: Tensor
    at_gamma_C: Tensor | None
    at_beta_C: Tensor | None
    at_weight: Tensor | None

    def weights(self, slope_y: Tensor) -> Tensor | None:
        """What reaches the weights of the layer before, where this gradient stands at y."""
        if self.weight is None:
            return None
        return torch.autograd.grad(self.y, self.weight, slope_y, retain_graph=True)[0]


def _slopes(at: Snapshot, images: int, goes_on: Callable[[BatchNorm, Tensor, Tensor], Tensor]) -> list[Slopes]:
    """Of every norm, in one pass in float64 on the first images of the next batch."""
    images_NCHW, targets = at.batch()
    before = at.kept(layer_before)
    norms = {site.name: cast(BatchNorm, at.network.get_submodule(site.name)) for site in at.trial.norms}
    values = {name: parameter.detach().double() for name, parameter in at.parameters.items()}
    names = [f"{name}.{part}" for name in norms for part in ("weight", "bias")]
    names += [f"{layer}.weight" for layer in before.values()]
    own = {name: values[name].requires_grad_() for name in names if name in values}
    buffers = {name: each.double() if each.is_floating_point() else each for name, each in at.buffers().items()}
    part = images_NCHW[:images].double(), targets[:images]
    value, through = passed(at, part, list(norms.values()), goes_on, values, buffers)
    places = [tensor for norm in norms.values() for tensor in through[norm]]
    found = torch.autograd.grad(value, [*own.values(), *places], retain_graph=True)
    of, around = dict(zip(own, found, strict=False)), iter(found[len(own) :])
    slopes = []
    for name, norm in norms.items():
        y, weight = through[norm].y, f"{before.get(name)}.weight"
        slopes.append(
            Slopes(
                y,
                norm.gamma_beta(y)[0].detach().double(),
                own.get(weight),
                next(around),
                next(around),
                of.get(f"{name}.weight"),
                of.get(f"{name}.bias"),
                of.get(weight),
            )
        )
    return slopes


class Formulas(NamedTuple):
    gamma_CM: Tensor  # the terms of <yhat, g>
    beta_CM: Tensor  # the terms of <1, g>
    note_CM: Tensor  # gamma / sigma * g
    ones_CM: Tensor  # gamma / sigma * <1, g> / m
    along_CM: Tensor  # gamma / sigma * yhat <yhat, g> / m
    scale_C: Tensor  # gamma / sigma


def _formulas(at: Slopes) -> Formulas:
    g_CM = by_channel(at.at_z)
    sigma_C, yhat_CM = standardised(by_channel(at.y), EPS)
    scale_C = at.gamma_C / sigma_C
    scale_C1 = scale_C[:, None]
    products_CM = g_CM * yhat_CM
    return Formulas(
        products_CM,
        g_CM,
        scale_C1 * g_CM,
        (scale_C1 * g_CM.mean(1, keepdim=True)).expand_as(g_CM),
        scale_C1 * yhat_CM * products_CM.mean(1, keepdim=True),
        scale_C,
    )


def _along_channels(values_C: Tensor, like: Tensor) -> Tensor:
    return values_C.view(1, -1, *(1 for _ in like.shape[2:]))


def _radial(slope: Tensor | None, weight: Tensor | None) -> float | None:
    """The part of a gradient along the weights of each output channel, over its length."""
    if slope is None or weight is None:
        return None
    slope_CK, weight_CK = slope.flatten(1), weight.detach().flatten(1)
    along_C = (slope_CK * weight_CK).sum(1).square() / weight_CK.square().sum(1)
    size = float(slope_CK.norm())
    return math.sqrt(float(along_C.sum())) / size if 0 < size < math.inf else None


def _kept(y: Tensor, slope_CM: Tensor) -> float | None:
    """The part of a gradient along 1 and along yhat, which are orthogonal."""
    _, yhat_CM = standardised(by_channel(y), EPS)
    ones_C = slope_CM.sum(1).square() / slope_CM.shape[1]
    squares_C = yhat_CM.square().sum(1)
    along_C = torch.where(squares_C > 0, (slope_CM * yhat_CM).sum(1).square() / squares_C, 0)
    size = float(slope_CM.norm())
    return math.sqrt(float((ones_C + along_C).sum())) / size if 0 < size < math.inf else None


def _error(formula: Tensor | None, true: Tensor | None) -> float | None:
    if formula is None or true is None:
        return None
    size, error = float(true.norm()), float((formula - true).norm())
    return error / size if 0 < size < math.inf and math.isfinite(error) else None


def _error_of_sum(terms_CM: Tensor, true_C: Tensor | None) -> float | None:
    if true_C is None:
        return None
    size, error = float(terms_CM.abs().sum(1).norm()), float((terms_CM.sum(1) - true_C).norm())
    return error / size if 0 < size < math.inf and math.isfinite(error) else None


def _cosine(one: Tensor, other: Tensor) -> float | None:
    both = float(one.norm() * other.norm())
    return max(-1.0, min(1.0, float((one * other).sum()) / both)) if 0 < both < math.inf else None
