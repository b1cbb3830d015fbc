"""What moves the weights: `local` for one worker, `deepspeed` for a gang of several.

The training loop sees one `Engine` and asks nothing about ranks, devices or precision.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Gang:
    """Where this process stands among the workers of its trial."""

    rank: int = 0
    workers: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """One worker of a gang writes to the store."""
        return self.rank == 0


class Engine(Protocol):
    """Holds the network, its optimiser state and its device; shared by every worker of the trial.

    Every method is collective: all workers of the gang call it in the same order.
    """

    module: nn.Module  # the network itself, unwrapped
    gang: Gang

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        """Mean loss of this worker's share of the batch: a float32 scalar on the device."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, lr: float) -> None:
        """One update with this learning rate; gradients are gone afterwards."""
        ...

    def total(self, value: Tensor) -> Tensor:
        """Sum of `value` over the workers, the same on each."""
        ...

    def agree(self, flag: bool) -> bool:
        """Whether any worker says so, on every worker."""
        ...

    def statistics(self) -> dict[str, Tensor]:
        """Copies of the network's buffers as one worker with the whole batch would have them."""
        ...

    def momentum(self) -> dict[str, Tensor]:
        """The optimiser's whole momentum buffers by parameter, to be read only: the last update over its learning rate.
        None before the first update, or where momentum is 0."""
        ...

    def save(self, step: int, facts: dict[str, Any]) -> None:
        """A checkpoint after `step` updates, whole or absent; the last two are kept."""
        ...

    def restore(self, most: int | None = None) -> tuple[int, dict[str, Any]]:
        """Load the newest whole checkpoint, of at most so many steps: its step and facts, or (0, {}) where there is
        none. What the leading worker says counts."""
        ...

    def close(self) -> None:
        """Let go of what the engine holds outside of its tensors; the gang stays."""
        ...
