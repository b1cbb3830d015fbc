"""Activation checkpointing: what backward needs of a part of a network is computed again instead of kept.

Chen et al. 2016, arXiv:1604.06174. The forward pass of each part then runs twice, which may change no number: the
second run sees the buffers as the first one did, and leaves them as the first one left them, so that running statistics
move once. The same operations on the same numbers: the same bits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bnscale.networks.layers import on_shortcut, trunk
from bnscale.trial import Network, Trainable, Trial


class Activations(Enum):
    """What becomes of them between forward and backward."""

    KEPT = "kept"
    RECOMPUTED = "computed again"


def recomputable(trial: Trial) -> bool:
    """Whether computing activations again saves memory: where anything but the output layer trains. A product of
    matrices keeps next to nothing."""
    return trial.trainable not in (Trainable.NONE, Trainable.OUTPUT) and trial.network is not Network.LINEAR


def parts(network: nn.Module) -> list[nn.Module]:
    """What is computed again as a whole: blocks of a residual network, layers of a plain one."""
    found = list(trunk(network).values()) or [
        part
        for name, row in network.named_modules()
        if isinstance(row, nn.Sequential) and not on_shortcut(name)
        for part in row
    ]
    return [part for part in found if next(part.parameters(), None) is not None]


@contextmanager
def recomputing(network: nn.Module, activations: Activations) -> Iterator[None]:
    """Inside, and where asked for, a forward pass keeps only what goes into each part. Its backward pass may come
    later."""
    changed = parts(network) if activations is Activations.RECOMPUTED else []
    with replaced({part: _twice(part, part.forward) for part in changed}):
        yield


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Inside, these modules compute something else."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward  # the class's own again
            else:
                module.forward = own


def _twice(part: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x_NCHW: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(x_NCHW)
        before = {name: buffer.clone() for name, buffer in part.named_buffers()}

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _as_before(part, before)

        # Without torch's global random stream: what is random here is a function of a buffer.
        again: Tensor = checkpoint(forward, x_NCHW, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return again

    return run


@contextmanager
def _as_before(part: nn.Module, before: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the part has these buffers instead of its own, and may move them."""
    own = dict(part.named_buffers())
    _put(part, before)
    try:
        yield
    finally:
        _put(part, own)


def _put(part: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        module, _, last = name.rpartition(".")
        setattr(part.get_submodule(module), last, buffer)
