"""Layers with weights, as the papers count them: 1 is the stem, the last is the output, shortcuts do not count."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class Layer(NamedTuple):
    number: int  # from 1
    name: str  # module path, "blocks.26.conv2"
    module: nn.Conv2d | nn.Linear

    @property
    def weight(self) -> str:
        """Name of its weight among the network's parameters."""
        return f"{self.name}.weight"


def layers(network: nn.Module) -> list[Layer]:
    """In the order of the forward pass: as many as `Trial.layers` says."""
    found = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not on_shortcut(name)
    ]
    return [Layer(number, name, module) for number, (name, module) in enumerate(found, start=1)]


def on_shortcut(name: str) -> bool:
    """Whether a module or parameter belongs to a shortcut, by its path."""
    return bool({"shortcut", "downsample"} & set(name.split(".")))


@contextmanager
def watched(some: Iterable[Layer], see: Callable[[Layer, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, `see` gets each of these layers as it computes, with its input and its output before any norm.

    What stands behind a layer may overwrite its output: take from it what is needed at once.
    """

    def hook(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, output: see(layer, inputs[0], output)

    handles = [layer.module.register_forward_hook(hook(layer)) for layer in some]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
