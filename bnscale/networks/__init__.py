"""The networks of the papers, with any of their parts trainable.

`build(trial)` gives the network of a trial at its initialisation: a function of the trial alone.
"""

from torch import nn

from bnscale.networks.initial import initialise
from bnscale.networks.resnet import ResNet
from bnscale.networks.trainable import restrict
from bnscale.trial import Network, Trial

__all__ = ["build", "trained"]


def build(trial: Trial) -> nn.Module:
    """The network on the CPU in float32, initialised, with `requires_grad` where the trial trains."""
    facts = trial.data.facts
    match trial.network:
        case Network.RESNET:
            network = ResNet(trial.depth, trial.width, facts.channels, facts.classes, trial.norm_batch)
    initialise(network, trial)
    restrict(network, trial)
    return network


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name, in the order of the network."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}
