"""What a checkpoint holds: what training changes, and nothing that the seed gives back.

Keys: `network.<name>` for parameters that train, for running statistics and for biases set by the first batch,
`momentum.<name>` for the optimiser's. Frozen weights are rebuilt from the seed; their sum tells when another version of
torch would rebuild others.
"""

import hashlib

import torch
from torch import Tensor, nn

from bnscale.networks import unseeded
from bnscale.trial import Trial


def state(network: nn.Module, trial: Trial, momentum: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that the seed does not give back, whole tensors, ready to be written."""
    whole = network.state_dict()
    kept = {f"network.{name}": whole[name] for name in unseeded(network, trial)}
    return kept | {f"momentum.{name}": tensor for name, tensor in momentum.items()}


@torch.no_grad()
def load_state(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put saved tensors back into the network; returns the momentum by parameter name, on its device."""
    here = network.state_dict()
    parameters = dict(network.named_parameters())
    momentum = {}
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        if kind == "network":
            here[name].copy_(value)
        else:
            # Same strides as the parameter: the fused update walks both in memory order.
            momentum[name] = torch.empty_like(parameters[name]).copy_(value)
    return momentum


def frozen_sum(network: nn.Module, trial: Trial) -> str:
    """SHA-256 over the values of all parameters that the seed gives back, in the order of the network."""
    digest = hashlib.sha256()
    others = set(unseeded(network, trial))
    for name, drawn in network.named_parameters():
        if name not in others:
            digest.update(drawn.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
