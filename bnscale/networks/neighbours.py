"""What stands right before and behind a norm: asked of a pass through the network, so it holds for each of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnscale.networks.norm import NormLayer

Weighted = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Neighbours:
    """Module paths. None: a pooling, an addition or a nonlinearity stands there."""

    norm: str
    before: str | None  # the convolution or matrix whose output the norm takes
    behind: str | None  # the matrix that takes what the norm hands on


@torch.no_grad()
def neighbours(network: nn.Module, images_NCHW: Tensor) -> list[Neighbours]:
    """Of every norm, shortcuts' too, in the order of the pass. Nothing of the network changes."""
    names = {module: name for name, module in network.named_modules()}
    # A tensor is known by its identity; each is kept, so that no other gets it.
    passed: list[tuple[nn.Module, Tensor, Tensor]] = []

    def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        passed.append((module, inputs[0], output))

    with _evaluating(network):
        handles = [each.register_forward_hook(see) for each in names if isinstance(each, Weighted | NormLayer)]
        try:
            network(images_NCHW)
        finally:
            for handle in handles:
                handle.remove()
    makers = {id(output): names[module] for module, _, output in passed if isinstance(module, Weighted)}
    takers = {id(taken): names[module] for module, taken, _ in passed if isinstance(module, nn.Linear)}
    return [
        Neighbours(names[module], makers.get(id(taken)), takers.get(id(output)))
        for module, taken, output in passed
        if isinstance(module, NormLayer)
    ]


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
