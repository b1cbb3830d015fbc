"""How a step is computed: the same numbers to rounding, in less time where the machine allows it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor, nn

from bnscale.engine.compiled import compiled
from bnscale.engine.recorded import Recorded, again, cuda_graph, unmoved
from bnscale.networks import native
from bnscale.networks.recompute import Activations, recomputing
from bnscale.trial import Norm, Precision, Trial


class Way(Enum):
    PLAIN = "operation by operation"
    FUSED = "norms in one operation with what follows"  # on a CPU; see networks/fused.py and chain.py
    REPLAYED = "operation by operation, the whole step recorded"  # needs no compiler
    COMPILED = "compiled blocks"
    RECORDED = "compiled blocks, the whole step recorded"

    @property
    def compiles(self) -> bool:
        return self in (Way.COMPILED, Way.RECORDED)

    @property
    def records(self) -> bool:
        return self in (Way.REPLAYED, Way.RECORDED)


def ways(trial: Trial, device: torch.device) -> list[Way]:
    """For a trial on a device, the fastest first: a compiler may not be there, or an operation not to be recorded."""
    if device.type != "cuda":
        return [Way.FUSED if native.kernels() else Way.PLAIN]
    # Noise is drawn anew each step from a generator that a recording would not see.
    drawn = trial.norm in (Norm.NOISE, Norm.NOISY)
    return [Way.COMPILED, Way.PLAIN] if drawn else [Way.RECORDED, Way.REPLAYED, Way.COMPILED, Way.PLAIN]


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

    A way is tried on a batch without meaning, and moves nothing. What does not work is said in `refused`. Raises what
    the last one raises, and out of memory at once.
    """

    def __init__(self, update: Update, candidates: Sequence[Way], batch: tuple[Tensor, Tensor]) -> None:
        self._update = update
        self._recorded: Recorded | None = None
        self._asked: tuple[Tensor, Tensor, Tensor] | None = None  # images, targets and losses of a recorded step
        self.refused: list[str] = []
        for self.way in candidates:
            try:
                update.begin(self.way)
                self._try(*batch)
                break
            except Exception as error:  # compilers have many; of one that is not there, or what cannot be recorded
                if self.way is candidates[-1] or isinstance(error, torch.OutOfMemoryError):
                    raise
                self.refused.append(f"{self.way.value}: {_gist(error)}")
                update.forget()

    def _try(self, images: Tensor, targets: Tensor) -> None:
        if self.way is Way.COMPILED:
            with unmoved(self._update.changing()):
                self._update.descend(self._update.losses(images, targets))
            self._update.forget()
        elif self.way.records:
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


def backend(steps: Steps, trial: Trial, device: torch.device) -> str:
    """What computes the steps, and why not another way."""
    said = [f"local, {steps.way.value}"]
    if device.type == "cuda" and trial.precision is Precision.FP32 and torch.backends.cudnn.allow_tf32:
        said.append("convolutions in TF32")  # of 10 bits of mantissa: torch's default, and the plain loop's
    return "; ".join([*said, *(f"not {each}" for each in steps.refused)])


def _gist(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'it said nothing'}"


def keep_bits(device: torch.device) -> None:
    """Same trial, same machine, in the same company: same bits."""
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
