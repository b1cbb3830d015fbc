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


@contextmanager
def mode(network: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode for a while, each module's own mode afterwards."""
    others = [module for module in network.modules() if module.training is not training]
    for module in others:
        module.training = training
    try:
        yield
    finally:
        for module in others:
            module.training = not training


def trunk(network: nn.Module) -> dict[str, nn.Module]:
    """The parts that the forward pass goes through one after the other, by module path; what stands before and behind
    them is not among them. Empty where a network has no such row."""
    rows = {own: part for own, part in network.named_children() if isinstance(part, nn.Sequential)}
    return {f"{own}.{name}": part for own, row in rows.items() for name, part in row.named_children()}


def part_of(layer: Layer, parts: Iterable[str]) -> str | None:
    """The part of a trunk in which a layer stands."""
    return next((part for part in parts if layer.name.startswith(f"{part}.")), None)


@contextmanager
def begun_at(network: nn.Module, part: str, x: Tensor) -> Iterator[None]:
    """Inside, the network's trunk begins at one part with `x` for its input: the parts before it do nothing."""
    parts = trunk(network)
    before = list(parts.values())[: list(parts).index(part)]
    handle = parts[part].register_forward_pre_hook(lambda module, inputs: (x,))
    for module in before:
        module.forward = _hand_on
    try:
        yield
    finally:
        handle.remove()
        for module in before:
            del module.forward  # the class's own again


def _hand_on(x: Tensor) -> Tensor:
    return x
