"""Gradients of all parameters, tensor by tensor, and how far these go: gamma and beta beside weights (interim report).

A mean over one kind of parameter is that of its tensors, weighted by `count`; the squared length of its gradient is the
sum of count * gradient_rms^2.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnscale.anatomy import FAMILIES
from bnscale.networks import build
from bnscale.networks.layers import layers
from bnscale.networks.trainable import role_of
from bnscale.probes.probe import asks, whole_weights
from bnscale.probes.snapshot import Snapshot
from bnscale.trial import OutputBias, Trial


@dataclass(frozen=True)
class ParameterGradient:
    """One parameter tensor at one step: the gradient of the mean loss over the next batch, whether it trains or not."""

    step: int  # updates taken
    parameter: str  # "blocks.3.norm1.weight"
    kind: str  # gamma, beta, convolution, shortcut (its convolution), matrix, bias, output weight, output bias
    # 1 at the stem. A norm belongs to the layer before it, and a shortcut to the layer that it runs beside.
    layer_index: int
    trains: bool
    count: int  # numbers in it
    gradient: float  # mean magnitude of the gradient; infinite where it left the float32 numbers
    gradient_rms: float  # root mean square
    size: float  # mean magnitude of the parameter; 0 for a beta that has not moved
    size_rms: float
    # Mean magnitude of the last update over its learning rate: with momentum, the decaying sum of the gradients so far,
    # weight decay and penalties with them. Null before the first update, after the last, whose checkpoint keeps no
    # momentum, without momentum, and where it does not train.
    last_update: float | None
    # Mean magnitude of its distance from where it started; null for class biases that the first batch set.
    moved: float | None


def _rows(trial: Trial) -> float:
    return trial.layers + 2 * len(trial.norms)


@asks(whole_weights, steps=1.2, rows=_rows)
def parameter_gradient(at: Snapshot) -> Iterator[ParameterGradient]:
    """Interim report, figures 2 and 3: gradients of gamma, beta, convolutions and output, per parameter.

    The gradient is that of one batch, penalties and decay left out. An update stands on about 1 / (1 - momentum)
    batches: what of the gradient is noise cancels in it, and what lasts adds up.
    """
    gradients, momentum = at.gradients(at.parameters), at.momentum
    start = dict(build(at.trial).named_parameters())
    index = _layers(at)
    for name, parameter in at.parameters.items():
        owner, _, own = name.rpartition(".")
        gradient, gradient_rms = _magnitudes(gradients[name])
        size, size_rms = _magnitudes(parameter)
        from_batch = name == "output.bias" and at.trial.output_bias is OutputBias.EVEN
        yield ParameterGradient(
            at.step,
            name,
            _kind(owner, at.network.get_submodule(owner), own),
            index[owner],
            trains=parameter.requires_grad,
            count=parameter.numel(),
            gradient=gradient,
            gradient_rms=gradient_rms,
            size=size,
            size_rms=size_rms,
            last_update=_magnitudes(momentum[name])[0] if name in momentum else None,
            moved=None if from_batch else _magnitudes(parameter - start[name].to(parameter.device))[0],
        )


def _kind(owner: str, module: nn.Module, own: str) -> str:
    """In words, what a module's own parameter is."""
    match role_of(owner, module, own):
        case "inner" if own == "bias":
            return "bias"
        case "inner":
            return "convolution" if isinstance(module, nn.Conv2d) else "matrix"
        case "output":
            return f"output {own}"
        case role:
            return role


def _layers(at: Snapshot) -> dict[str, int]:
    """The layer that each module with parameters belongs to, by module path."""
    trial = at.trial
    found = {layer.name: layer.number for layer in layers(at.network)}
    for site in FAMILIES[trial.network].sites(trial.depth, trial.width, trial.facts.side):
        found[site.name] = site.layer
        if site.shortcut:
            around = site.name.rpartition(".")[0]
            found |= {f"{around}.{own}": site.layer for own, _ in at.network.get_submodule(around).named_children()}
    return found


def _magnitudes(values: Tensor) -> tuple[float, float]:
    """Mean and root mean square of the magnitudes, in float64; infinite where one is no number."""
    # Flattened: engines keep the same weights in different layouts, and a sum goes along them.
    flat = values.detach().flatten()
    lengths = [torch.linalg.vector_norm(flat, order, dtype=torch.float64) for order in (1, 2)]
    added, euclidean = torch.stack(lengths).tolist()
    if not math.isfinite(added) or not math.isfinite(euclidean):
        return math.inf, math.inf
    return added / flat.numel(), euclidean / math.sqrt(flat.numel())
