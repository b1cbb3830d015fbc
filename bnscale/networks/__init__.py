"""The networks of the papers, with any norm at any site, any initialisation, and any of their parts trainable.

`build(trial)` gives the network of a trial at its initialisation: a function of the trial alone. One file a family;
where norms can stand in each is arithmetic, in anatomy.py.
"""

import torch
from torch import nn

from bnscale.networks.imagenet import ImageNetResNet
from bnscale.networks.initial import even_output, initialise
from bnscale.networks.linear import Linear
from bnscale.networks.norm import norms_of
from bnscale.networks.resnet import ResNet
from bnscale.networks.trainable import restrict
from bnscale.networks.vgg import VGG, ResidualVGG
from bnscale.trial import Network, OutputBias, Trial

__all__ = ["assemble", "build", "even_output", "trained", "unseeded"]


def assemble(trial: Trial) -> nn.Module:
    """The network of a trial with values that nobody has set yet.

    torch draws values for new modules from its own stream, which is put back: building one disturbs no other draw.
    """
    with torch.random.fork_rng(devices=[]):
        return _assemble(trial)


def _assemble(trial: Trial) -> nn.Module:
    facts, depth, width, norm = trial.facts, trial.depth, trial.width, norms_of(trial)
    match trial.network:
        case Network.RESNET:
            return ResNet(depth, width, facts.channels, facts.classes, norm)
        case Network.VGG:
            return VGG(depth, width, facts.channels, facts.classes, norm)
        case Network.VGG_RESIDUAL:
            return ResidualVGG(depth, width, facts.channels, facts.classes, norm)
        case Network.IMAGENET_RESNET:
            return ImageNetResNet(depth, facts.channels, facts.classes, norm)
        case Network.LINEAR:
            return Linear(depth, width, facts.channels * facts.side**2, facts.classes, norm)


def build(trial: Trial) -> nn.Module:
    """The network on the CPU in float32, initialised, with `requires_grad` where the trial trains."""
    network = assemble(trial)
    initialise(network, trial)
    restrict(network, trial)
    return network


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name, in the order of the network."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def unseeded(network: nn.Module, trial: Trial) -> list[str]:
    """Names of the tensors that the seed does not give back: what trains, running statistics, biases set by a batch."""
    kept = set(trained(network)) | {name for name, _ in network.named_buffers()}
    if trial.output_bias is OutputBias.EVEN:
        kept.add("output.bias")
    return [name for name in network.state_dict() if name in kept]
