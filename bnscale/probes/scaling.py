"""What norms make of scale: of the weights before them, and of their own gammas (Deshmukh 2020, section 2).

A norm divides by sigma, so that the weights W before it can be multiplied by any c > 0 without a change of what it
hands on, but for epsilon; sigma becomes c sigma. The loss is then a function of W's direction, its gradient with
respect to W goes as 1 / c and its Hessian as 1 / c^2: in the series of the loss along -gradient the first-order term
goes as 1 / c^2 and the second-order term as 1 / c^4. The note has 1 / sigma^2 and 1 / sigma^3.

Of gamma the note says that it raises gradients that vanish. But a norm that follows divides by what an earlier gamma
multiplied with; so in a row of normalized layers only the last gamma counts.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnscale.anatomy import Site
from bnscale.networks.layers import layers
from bnscale.networks.norm import EPS
from bnscale.probes.descent import quadratic, slopes_of
from bnscale.probes.landscape import length_of
from bnscale.probes.passage import by_channel, layer_before
from bnscale.probes.probe import asks, gamma, second_derivative, whole_weights
from bnscale.probes.snapshot import Snapshot
from bnscale.trial import Trial

WEIGHTS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
"""Factors of the weights before norms: with sigma near 1 to begin with, the smallest come to sqrt(epsilon)."""
GAMMAS = (0.01, 0.1, 0.3, 1.0, 10.0)
_READINGS = 3 * len(GAMMAS) + 1


@dataclass(frozen=True)
class WeightScaling:
    """Every weight and bias right before a norm times a factor, on the next batch: the series of the loss there."""

    step: int  # updates taken
    factor: float  # c
    parameters: str  # along which the series goes: weights (those that are scaled), or everything (that trains)
    sigma: float  # sqrt(variance + epsilon) of what these layers compute, geometric mean over their channels
    loss: float
    gradient_square: float  # |d|^2
    quadratic: float  # d'Hd


@dataclass(frozen=True)
class GammaScaling:
    """One layer's weights, with some gammas times a factor, on the next batch."""

    step: int  # updates taken
    factor: float
    # which: every, inner (all but the last norm's), branch (of residual branches), or ones: each is set to 1
    gammas: str
    layer: str  # module path, "blocks.4.conv2"
    layer_index: int  # 1 at the stem, growing towards the output
    norms_behind: int  # norms in a row from this layer to the output, its own counted and shortcuts' not
    gradient: float  # length of the gradient of the mean loss
    loss: float


def _weights(trial: Trial) -> str | None:
    if trial.norm.parameterless or all(site.head for site in trial.norms):
        return "no norm right behind a layer with weights; set norm=batch --set placement=every"
    return second_derivative(trial) or whole_weights(trial)


@asks(_weights, steps=8 * len(WEIGHTS), rows=lambda trial: 2 * len(WEIGHTS))
def weight_scaling(at: Snapshot) -> Iterator[WeightScaling]:
    """Exponents of the terms of the series in sigma. Two passes forward and three backward for each factor.

    What left the float32 numbers has no row.
    """
    before = at.kept(layer_before)
    names = [f"{layer}.{part}" for layer in before.values() for part in ("weight", "bias")]
    scaled = [name for name in names if name in at.parameters]  # most convolutions have no bias
    every = list(dict.fromkeys([*scaled, *at.names()]))
    for factor in WEIGHTS:
        changed = {name: factor * at.parameters[name].detach() for name in scaled}
        sigma = _sigma(at, before, changed)
        value, leaves = at.differentiable(at.batch(), every, changed)
        slopes = slopes_of(value, leaves)
        for parameters, names in (("weights", scaled), ("everything", at.names())):
            square = length_of({name: slopes[name].detach() for name in names}) ** 2
            bend = quadratic(slopes, leaves, names)
            if math.isfinite(square + bend):
                yield WeightScaling(at.step, factor, parameters, sigma, float(value.detach()), square, bend)


@torch.no_grad()
def _sigma(at: Snapshot, norms: Iterable[str], changed: dict[str, Tensor]) -> float:
    """Geometric mean of sqrt(variance + epsilon) over the channels of what these norms get."""
    logarithms: list[Tensor] = []

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        logarithms.append((by_channel(inputs[0]).var(1, correction=0) + EPS).log() / 2)

    handles = [at.network.get_submodule(name).register_forward_pre_hook(see) for name in norms]
    try:
        at.forward(at.batch()[0], changed)
    finally:
        for handle in handles:
            handle.remove()
    return float(torch.cat(logarithms).mean().exp())


def _gammas(trial: Trial) -> str | None:
    return gamma(trial) or whole_weights(trial)


@asks(_gammas, steps=_READINGS, rows=lambda trial: _READINGS * trial.layers)
def gamma_scaling(at: Snapshot) -> Iterator[GammaScaling]:
    """Gradients of the weights, layer by layer, as gammas grow and shrink, or are all 1. A pass for each factor and set
    of gammas.

    A layer whose gradient left the float32 numbers has no row.
    """
    found = layers(at.network)
    for which, factor, changed in _changes(at):
        value, slopes = at.slope(at.batch(), [layer.weight for layer in found], changed)
        for layer in found:
            length = float(slopes[layer.weight].flatten().double().norm())
            if math.isfinite(length):
                behind = sum(site.layer >= layer.number and not site.shortcut for site in at.trial.norms)
                yield GammaScaling(at.step, factor, which, layer.name, layer.number, behind, length, value)


def _changes(at: Snapshot) -> Iterator[tuple[str, float, dict[str, Tensor]]]:
    """Set, factor, and the gammas of the set times the factor, by name."""
    sites = [site for site in at.trial.affine_norms if f"{site.name}.weight" in at.parameters]
    gammas = {site.name: at.parameters[f"{site.name}.weight"].detach() for site in sites}
    for which, some in _sets(sites).items():
        for factor in GAMMAS:
            yield which, factor, {f"{site.name}.weight": factor * gammas[site.name] for site in some}
    yield "ones", 1.0, {f"{name}.weight": torch.ones_like(own) for name, own in gammas.items()}


def _sets(sites: list[Site]) -> dict[str, list[Site]]:
    """Sites by the name of their set; what has no site, and branches that are all or all but the last, are left out."""
    every = {"every": sites, "inner": sites[:-1], "branch": [site for site in sites if site.branch]}
    return {name: some for name, some in every.items() if some}
