"""Internal covariate shift: how far an update of the earlier layers turns a layer's gradient (Santurkar et al. 2018).

Definition 2.1. With W_i the weights of layer i and everything before the next update but what is named,

    G  = the gradient of the loss on the next batch with respect to W_i,
    G' = the same, on the same batch, with layers 1 to i - 1 as the update leaves them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnscale.networks.layers import Layer, begun_at, layers, part_of, trunk
from bnscale.probes.landscape import length_of
from bnscale.probes.probe import asks, plain_descent, whole_weights
from bnscale.probes.snapshot import Snapshot
from bnscale.trial import Trial


@dataclass(frozen=True)
class CovariateShift:
    """One layer at one step. What left the float32 numbers is infinite, and its cosine null."""

    step: int  # updates taken
    layer: str  # module path, "layers.5.conv"
    layer_index: int  # 1 at the stem
    before: float  # |G|
    after: float  # |G'|
    l2: float  # |G - G'|
    cosine: float | None  # of the angle between them; null where one is 0


def _lacks(trial: Trial) -> str | None:
    return whole_weights(trial) or plain_descent(trial)


@asks(_lacks, steps=1.35, each=0.6, rows=lambda trial: 1)
def covariate_shift(at: Snapshot, numbers: tuple[int, ...]) -> Iterator[CovariateShift]:
    """Santurkar et al. 2018, definition 2.1 and figures 3, 8 and 9.

    The updated network runs forward once; what it hands to the parts of its trunk with these layers is kept, and from
    there on one pass forward and backward a layer is enough. torchvision's have no trunk and take whole passes.
    """
    some = [layer for layer in layers(at.network) if layer.number in numbers]
    gradients = at.gradients([*at.names(), *(layer.weight for layer in some)])
    handed = _handed(at, some)
    for layer in some:
        part = part_of(layer, trunk(at.network))
        earlier = {name: at.updated[name] for name in _before(at, layer)}
        with begun_at(at.network, part, handed[part]) if part else nullcontext():
            _, after = at.slope(at.batch(), [layer.weight], earlier)
        yield _of(at.step, layer, gradients[layer.weight], after[layer.weight])


def _before(at: Snapshot, layer: Layer) -> list[str]:
    """Of what trains, all that stands before this layer's weights."""
    names = list(at.parameters)
    before = set(names[: names.index(layer.weight)])
    return [name for name in at.updated if name in before]


@torch.no_grad()
def _handed(at: Snapshot, some: list[Layer]) -> dict[str, Tensor]:
    """What the updated network hands to each part of its trunk that has one of these layers, by the part's path."""
    parts = trunk(at.network)
    wanted = dict.fromkeys(part for layer in some if (part := part_of(layer, parts)))
    handed: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: handed.update({name: inputs[0]})

    handles = [parts[name].register_forward_pre_hook(keep(name)) for name in wanted]
    try:
        at.forward(at.batch()[0], at.updated)
    finally:
        for handle in handles:
            handle.remove()
    return handed


def _of(step: int, layer: Layer, before: Tensor, after: Tensor) -> CovariateShift:
    before, after = before.double().flatten(), after.double().flatten()
    sizes = length_of({"": before}), length_of({"": after})
    both = sizes[0] * sizes[1]
    return CovariateShift(
        step,
        layer.name,
        layer.number,
        *sizes,
        l2=length_of({"": before - after}),
        cosine=max(-1.0, min(1.0, float(before @ after) / both)) if 0 < both < math.inf else None,
    )
