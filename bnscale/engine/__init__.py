"""What moves the weights: `local` for one worker, `cohort` for one with several trials at once, `deepspeed` for a gang.

The training loop sees one `Pass` and asks nothing about ranks, devices or precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from bnscale.score import Score

if TYPE_CHECKING:
    from bnscale.data import Resident


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


class Member(Protocol):
    """One trial of a pass, as its probes and its checkpoints see it. Collective, as below."""

    @property
    def module(self) -> nn.Module:
        """The network itself, unwrapped."""
        ...

    @property
    def gang(self) -> Gang: ...

    def total(self, value: Tensor) -> Tensor:
        """Sum of `value` over the workers, the same on each."""
        ...

    def statistics(self) -> dict[str, Tensor]:
        """Copies of the network's buffers as one worker with the whole batch would have them."""
        ...

    def momentum(self) -> dict[str, Tensor]:
        """The optimiser's whole momentum buffers by parameter, to be read only: the last update over its learning rate.
        None before the first update, or where momentum is 0."""
        ...

    def score(self, part: str, data: "Resident") -> Score:
        """How the network as it stands does on a part of the data, in evaluation mode."""
        ...

    def save(self, step: int, facts: dict[str, Any]) -> None:
        """A checkpoint after `step` updates, whole or absent; the last two are kept."""
        ...

    def restore(self, most: int | None = None) -> tuple[int, dict[str, Any]]:
        """Load the newest whole checkpoint, of at most so many steps: its step and facts, or (0, {}) where there is
        none. What the leading worker says counts."""
        ...


class Pass(Protocol):
    """What moves the weights of one or more trials, K of them, step by step: all that the training loop knows."""

    gang: Gang

    @property
    def backend(self) -> str:
        """What computes the steps, for whoever asks where a number comes from."""
        ...

    @property
    def members(self) -> Sequence[Member]: ...

    def __call__(self, images: Tensor, labels: Tensor, /) -> Tensor:
        """Mean losses of this worker's share of the batch: float32 on the device, (K,)."""
        ...

    def backward(self, losses_K: Tensor) -> None: ...

    def step(self, *rates: float) -> None:
        """One update with a learning rate for each trial; gradients are gone afterwards."""
        ...

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these members, and without the others."""
        ...

    def total(self, value: Tensor) -> Tensor:
        """Sum of `value` over the workers, the same on each."""
        ...

    def agree(self, flag: bool) -> bool:
        """Whether any worker says so, on every worker."""
        ...

    def close(self) -> None:
        """Let go of what the engine holds outside of its tensors; the gang stays."""
        ...


class Engine(Member, Protocol):
    """Holds the network of one trial, its optimiser state and its device; shared by every worker of the trial.

    Every method is collective: all workers of the gang call it in the same order.
    """

    @property
    def backend(self) -> str:
        """As a pass's."""
        ...

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        """Mean loss of this worker's share of the batch: a float32 scalar on the device."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, lr: float) -> None:
        """One update with this learning rate; gradients are gone afterwards."""
        ...

    def agree(self, flag: bool) -> bool:
        """Whether any worker says so, on every worker."""
        ...

    def close(self) -> None:
        """Let go of what the engine holds outside of its tensors; the gang stays."""
        ...


class Alone:
    """A pass of one trial: it is one member of itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.gang = engine.gang
        self.members = [engine]
        self.backend = engine.backend

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        return self._engine(images_NCHW, labels_N).reshape(1)

    def backward(self, losses_K: Tensor) -> None:
        self._engine.backward(losses_K.squeeze(0))

    def step(self, *rates: float) -> None:
        self._engine.step(*rates)

    def keep(self, places: Sequence[int]) -> None:
        assert list(places) == [0], "without its only member there is no pass"

    def total(self, value: Tensor) -> Tensor:
        return self._engine.total(value)

    def agree(self, flag: bool) -> bool:
        return self._engine.agree(flag)

    def close(self) -> None:
        self._engine.close()
