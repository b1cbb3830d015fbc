"""Singular values of a deep linear network (Bjorck et al. 2018, section 4, figure 8)."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from bnscale.networks.linear import Layer, Linear
from bnscale.networks.norm import BatchNorm
from bnscale.probes.probe import asks, linearity
from bnscale.probes.snapshot import Snapshot

BINS = 50  # from 0 to where the theory's support ends, as in the paper's figure


@dataclass(frozen=True)
class Spectrum:
    """The map from inputs to outputs at one step. Batch norms hold the statistics of the training vectors fixed."""

    step: int  # updates taken
    factors: int  # matrices multiplied
    dimension: int  # rows of each
    scale: (
        float  # sqrt(dimension) to the power of the factors that no norm follows: what singular values are counted in
    )
    largest: float  # singular value, in that scale
    median: float
    smallest: float
    log10_condition: float  # decimal logarithm of largest over smallest
    edge: float  # where the support of a product of so many Gaussian matrices ends, in the same scale


@dataclass(frozen=True)
class SpectrumHistogram:
    """One interval of singular values at one step."""

    step: int  # updates taken
    low: float  # from here, in the scale of Spectrum
    high: float  # to below here
    values: int  # singular values in the interval
    all_values: int


def edge(factors: int) -> float:
    """sqrt((M+1)^(M+1) / M^M), the largest singular value of M Gaussian N x N matrices over sqrt(N)^M, for large N."""
    return math.sqrt((factors + 1) ** (factors + 1) / factors**factors)


@asks(linearity, steps=1)
def spectrum(at: Snapshot) -> Iterator[Spectrum]:
    """Bjorck et al. 2018, section 4: products of random matrices become ill-conditioned. Nothing for other networks."""
    if not isinstance(at.network, Linear):
        return
    scale, values = _singular_values(at)
    factors, dimension = at.trial.depth, at.trial.width
    largest, median, smallest = float(values.max()), float(np.median(values)), float(values.min())
    condition = math.log10(largest / smallest) if smallest else math.inf
    yield Spectrum(at.step, factors, dimension, scale, largest, median, smallest, condition, edge(factors))


@asks(linearity, steps=1, rows=lambda trial: BINS + 1)
def spectrum_histogram(at: Snapshot) -> Iterator[SpectrumHistogram]:
    """The same as counts, in intervals of the paper's width and one above them."""
    if not isinstance(at.network, Linear):
        return
    _, values = _singular_values(at)
    bounds = [*np.linspace(0, edge(at.trial.depth), BINS + 1).tolist(), math.inf]
    counts, _ = np.histogram(values, bounds)
    for low, high, count in zip(bounds, bounds[1:], counts.tolist(), strict=False):
        yield SpectrumHistogram(at.step, low, high, count, len(values))


@torch.no_grad()
def _singular_values(at: Snapshot) -> tuple[float, np.ndarray]:
    """The scale, and the singular values in it, of W_M D_(M-1) W_(M-1) ... D_1 W_1 in float64.

    D divides by the deviation over the first training batch and multiplies by gamma, where a batch norm stands.
    """
    network = at.network
    assert isinstance(network, Linear)
    x_NK = at.data.batch(0)[0].flatten(1).double()
    product = torch.eye(x_NK.shape[1], dtype=torch.float64, device=x_NK.device)
    free = 1  # factors that no norm follows: the output's
    for layer in cast(Iterable[Layer], network.layers):
        weight = layer.linear.weight.double()
        x_NK, product = x_NK @ weight.T, weight @ product
        if isinstance(layer.norm, BatchNorm):
            deviation_K = (x_NK.var(0, correction=0) + 1e-5).sqrt()
            gamma_K = torch.ones_like(deviation_K) if layer.norm.weight is None else layer.norm.weight.double()
            x_NK = (x_NK - x_NK.mean(0)) / deviation_K * gamma_K
            product = product * (gamma_K / deviation_K)[:, None]
        else:
            free += 1
    product = network.output.weight.double() @ product
    scale = math.sqrt(at.trial.width) ** free
    return scale, (torch.linalg.svdvals(product) / scale).cpu().numpy()
