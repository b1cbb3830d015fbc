"""What a checkpoint holds: what training changes, and nothing that the seed gives back.

Keys: `network.<name>` for parameters that train and for running statistics, `momentum.<name>` for the
optimiser's. Frozen weights are rebuilt from the seed; their sum tells when another version of torch
would rebuild others.
"""

import hashlib

import torch
from torch import Tensor, nn

from bnscale.networks import trained


def state(network: nn.Module, momentum: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that moves, whole tensors, ready to be written."""
    moving = set(trained(network)) | {name for name, _ in network.named_buffers()}
    kept = {f"network.{name}": tensor for name, tensor in network.state_dict().items() if name in moving}
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


def frozen_sum(network: nn.Module) -> str:
    """SHA-256 over the values of all parameters that do not train, in the order of the network."""
    digest = hashlib.sha256()
    for parameter in network.parameters():
        if not parameter.requires_grad:
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
