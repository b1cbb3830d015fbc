"""How a step is computed: the same numbers to rounding, in less time where the machine allows it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor, nn

from bnscale.engine.compiled import compiled
from bnscale.engine.recorded import Recorded, again, cuda_graph, unmoved
from bnscale.networks import fused
from bnscale.networks.recompute import Activations, recomputing
from bnscale.trial import Norm, Trial


class Way(Enum):
    PLAIN = "operation by operation"
    FUSED = "norms in one operation with what follows"  # on a CPU; see networks/fused.py
    COMPILED = "compiled blocks"
    RECORDED = "compiled blocks, the whole step recorded"

    @property
    def compiles(self) -> bool:
        return self in (Way.COMPILED, Way.RECORDED)


def ways(trial: Trial, device: torch.device) -> list[Way]:
    """For a trial on a device, the fastest first: a compiler may not be there, or an operation not to be recorded."""
    if device.type != "cuda":
        return [Way.FUSED if fused.kernels() else Way.PLAIN]
    # Noise is drawn anew each step from a generator that a recording would not see.
    drawn = trial.norm in (Norm.NOISE, Norm.NOISY)
    return [*([] if drawn else [Way.RECORDED]), Way.COMPILED, Way.PLAIN]


class Update(Protocol):
    """One update in its parts, of which `Steps` makes a step."""

    def begin(self, way: Way) -> None:
        """From now on it is computed in this way."""
        ...

    def losses(self, images: Tensor, targets: Tensor, /) -> Tensor: ...

    def descend(self, losses: Tensor, /) -> None:
        """Gradients of the losses."""
        ...

    def move(self) -> None:
        """From gradients to values; gradients are gone afterwards. A recorded one reads its rates from tensors."""
        ...

    def forget(self) -> None:
        """Gradients, without a move."""
        ...

    def changing(self) -> list[Tensor]:
        """All that a step changes."""
        ...


class Steps:
    """The steps of an update, in the first of some ways that works.

    A way is tried on a batch without meaning, and moves nothing. Raises what the last one raises, and out of memory at
    once.
    """

    def __init__(self, update: Update, candidates: Sequence[Way], batch: tuple[Tensor, Tensor]) -> None:
        self._update = update
        self._recorded: Recorded | None = None
        self._asked: tuple[Tensor, Tensor, Tensor] | None = None  # images, targets and losses of a recorded step
        for self.way in candidates:
            try:
                update.begin(self.way)
                self._try(*batch)
                break
            except RuntimeError as error:  # of a compiler that is not there, or an operation that cannot be recorded
                if self.way is candidates[-1] or isinstance(error, torch.OutOfMemoryError):
                    raise
                update.forget()

    def _try(self, images: Tensor, targets: Tensor) -> None:
        if self.way is Way.COMPILED:
            with unmoved(self._update.changing()):
                self._update.descend(self._update.losses(images, targets))
            self._update.forget()
        elif self.way is Way.RECORDED:
            record = cuda_graph if images.is_cuda else again
            self._recorded = Recorded(self._whole, images, targets, self._update.changing(), record)

    def _whole(self, images: Tensor, targets: Tensor) -> Tensor:
        losses = self._update.losses(images, targets)
        self._update.descend(losses)
        self._update.move()
        return losses.detach()

    def losses(self, images: Tensor, targets: Tensor) -> Tensor:
        """Of a recorded step they are there after `step`."""
        if self._recorded is None:
            return self._update.losses(images, targets)
        self._asked = images, targets, torch.empty_like(self._recorded.losses)
        return self._asked[2]

    def descend(self, losses: Tensor) -> None:
        if self._recorded is None:
            self._update.descend(losses)

    def move(self) -> None:
        if self._recorded is None:
            self._update.move()
            return
        assert self._asked, "losses come before the move"
        images, targets, losses = self._asked
        self._recorded(images, targets)
        losses.copy_(self._recorded.losses)  # the next step writes over its own
        self._asked = None


@contextmanager
def computing(network: nn.Module, way: Way, activations: Activations) -> Iterator[None]:
    """Inside, the parts of a network are computed in this way."""
    if way.compiles:
        with compiled(network), recomputing(network, activations):
            yield
    else:
        with recomputing(network, activations):
            yield


def keep_bits(device: torch.device) -> None:
    """Same trial, same machine: same bits."""
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
