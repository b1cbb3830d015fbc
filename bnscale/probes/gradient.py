"""Gradients of the weights, layer by layer, on one batch (Bjorck et al. 2018, figures 2 and 7, table 1).

Legend: N images, O and I output and input channels of a kernel, H, W pixels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from bnscale.networks.layers import Layer, layers, watched
from bnscale.probes.probe import asks, whole_weights
from bnscale.probes.snapshot import Snapshot

BINS = 80  # of a histogram, an even number: 0 is a bound
HILL = 0.05  # share of the largest magnitudes that the tail index stands on


@dataclass(frozen=True)
class Gradient:
    """The weights of one layer at one step: the gradient of the mean loss over the next batch."""

    step: int  # updates taken
    layer: str  # module path, "blocks.26.conv2"
    layer_index: int  # 1 at the stem, growing towards the output; shortcuts are not among them
    weights: int
    rms: float  # root mean square over the weights
    kurtosis: float | None  # fourth central moment over the variance squared; 3 for a normal distribution
    # Tail index of the magnitudes, over the largest 5 %: P(|g| > x) falls as x to the power of minus this (Hill 1975).
    # A normal distribution has about 6 there; null below 200 weights.
    hill: float | None
    q50: float  # quantiles of the magnitudes
    q90: float
    q99: float
    largest: float
    # A weight's gradient is a sum of terms over images and pixels; none of a pixel that the padding stands for.
    terms: int  # images times output pixels
    # Means over the weights:
    sum_of_magnitudes: float  # of the sum of the terms' magnitudes
    magnitude_of_sum: float  # of the magnitude of their sum, which is the gradient's
    effective_rank: float | None  # of the gradient as a matrix of O by I*H*W (Roy & Vetterli 2007); null if it is 0
    full_rank: int  # the most that it can be
    channel_rank: float | None  # the same of the matrix of O by I that `gradient_matrix` shows
    full_channel_rank: int


@dataclass(frozen=True)
class GradientHistogram:
    """One interval of the gradient's values in one layer at one step; intervals are of one width on both sides of 0."""

    step: int  # updates taken
    layer_index: int
    low: float
    high: float
    weights: int  # in the interval
    all_weights: int


@dataclass(frozen=True)
class GradientMatrix:
    """One pair of channels of one layer at one step."""

    step: int  # updates taken
    layer_index: int
    output: int  # channel
    input: int  # channel
    magnitude: float  # of the gradient, mean over the kernel's places


@asks(whole_weights, steps=2.2, rows=lambda trial: trial.layers)
def gradient(at: Snapshot) -> Iterator[Gradient]:
    """Bjorck et al. 2018: gradients without normalization are heavy-tailed, aligned over pixels, and of low rank."""
    found = layers(at.network)
    added: dict[int, Tensor] = {}  # by layer: mean over the weights of the sum of the terms' magnitudes
    terms: dict[int, int] = {}

    def see(layer: Layer, x: Tensor, output: Tensor) -> None:
        terms[layer.number] = output.numel() // output.shape[1]
        if output.requires_grad:
            output.register_hook(lambda slope: added.update({layer.number: _added(layer.module, x.detach(), slope)}))

    with watched(found, see):
        gradients = at.gradients_on(at.batch(), dict.fromkeys([*(layer.weight for layer in found), *at.names()]))
    at.share(gradients)
    for layer in _finite(found, gradients):
        yield _of(at.step, layer, gradients[layer.weight], terms[layer.number], float(added[layer.number]))


def _added(module: nn.Conv2d | nn.Linear, x: Tensor, slope: Tensor) -> Tensor:
    """Mean over the weights of sum |slope * x|: the terms' magnitudes are products of magnitudes."""
    x, slope = x.float().abs(), slope.float().abs()
    if isinstance(module, nn.Linear):
        return (slope.T @ x).mean()
    return conv2d_weight(
        x, module.weight.shape, slope, module.stride, module.padding, module.dilation, module.groups
    ).mean()  # fmt: skip


def _of(step: int, layer: Layer, slope: Tensor, terms: int, added: float) -> Gradient:
    values = slope.flatten().double().cpu().numpy()
    sizes = np.sort(np.abs(values))
    q50, q90, q99 = map(float, np.quantile(sizes, [0.5, 0.9, 0.99]))
    matrix = channels(slope)
    return Gradient(
        step,
        layer.name,
        layer.number,
        len(values),
        rms=float(np.sqrt(np.mean(values**2))),
        kurtosis=kurtosis(values),
        hill=hill(sizes),
        q50=q50,
        q90=q90,
        q99=q99,
        largest=float(sizes[-1]),
        terms=terms,
        sum_of_magnitudes=added,
        magnitude_of_sum=float(sizes.mean()),
        effective_rank=effective_rank(slope.flatten(1)),
        full_rank=min(slope.flatten(1).shape),
        channel_rank=effective_rank(matrix),
        full_channel_rank=min(matrix.shape),
    )


def kurtosis(values: np.ndarray) -> float | None:
    """Fourth central moment over the squared variance; None where all values are one."""
    centred = values - values.mean()
    variance = np.mean(centred**2)
    return float(np.mean((centred / math.sqrt(variance)) ** 4)) if variance > 0 else None


def hill(sizes: np.ndarray) -> float | None:
    """Hill's estimate of the tail index from sorted magnitudes: 1 / mean of log(x / threshold) over the largest 5 %."""
    count = round(HILL * len(sizes))
    if count < 10 or sizes[-count - 1] <= 0:
        return None
    excess = float(np.mean(np.log(sizes[-count:] / sizes[-count - 1])))
    return 1 / excess if excess > 0 else None


def channels(slope: Tensor) -> Tensor:
    """O by I: magnitudes, mean over the places of a kernel."""
    return slope.abs().flatten(2).mean(2) if slope.dim() > 2 else slope.abs()


def effective_rank(matrix: Tensor) -> float | None:
    """exp of the entropy of the singular values as shares of their sum (Roy & Vetterli 2007, definition 1)."""
    values = torch.linalg.svdvals(matrix.double().cpu())
    total = float(values.sum())
    if not total:
        return None
    share = values[values > 0] / total
    return math.exp(-float((share * share.log()).sum()))


@asks(whole_weights, steps=1, rows=lambda trial: BINS)
def gradient_histogram(at: Snapshot, numbers: tuple[int, ...]) -> Iterator[GradientHistogram]:
    """Bjorck et al. 2018, figure 2: the gradient of the weights of a middle layer."""
    for layer, slope in _at(at, numbers):
        values = slope.flatten().double().cpu().numpy()
        end = float(np.abs(values).max()) or 1.0
        bounds = np.linspace(-end, end, BINS + 1)
        counts, _ = np.histogram(values, bounds)
        for low, high, count in zip(bounds.tolist(), bounds[1:].tolist(), counts.tolist(), strict=False):
            yield GradientHistogram(at.step, layer.number, low, high, count, len(values))


@asks(whole_weights, steps=1, rows=lambda trial: 1000)
def gradient_matrix(at: Snapshot, numbers: tuple[int, ...]) -> Iterator[GradientMatrix]:
    """Bjorck et al. 2018, figure 7: the gradient over input and output channels."""
    for layer, slope in _at(at, numbers):
        for output, row in enumerate(channels(slope).double().cpu().tolist()):
            for channel, magnitude in enumerate(row):
                yield GradientMatrix(at.step, layer.number, output, channel, magnitude)


def _at(at: Snapshot, numbers: tuple[int, ...]) -> Iterator[tuple[Layer, Tensor]]:
    found = layers(at.network)
    gradients = at.gradients([layer.weight for layer in found])
    for layer in _finite(found, gradients):
        if layer.number in numbers:
            yield layer, gradients[layer.weight]


def _finite(some: list[Layer], gradients: dict[str, Tensor]) -> list[Layer]:
    """The layers whose gradient did not overflow: of the others there is nothing to say."""
    return [layer for layer in some if torch.isfinite(gradients[layer.weight]).all()]
