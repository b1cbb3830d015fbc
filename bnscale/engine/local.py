"""One worker, one trial: the fast path.

Channels-last convolutions, and bfloat16 autocast where the trial says so. What else is fast about a step is its `Way`:
norms that are one operation with what follows them on a CPU; compiled blocks and a whole step as one CUDA graph on a
GPU. Nothing here knows of several workers; the gang's engine is in deepspeed.py.
"""

from contextlib import nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from bnscale.data import blank
from bnscale.engine import Gang
from bnscale.engine.checkpoint import newest, write
from bnscale.engine.compiled import compiled
from bnscale.engine.objective import Objective, decays
from bnscale.engine.recorded import Recorded, again, cuda_graph, unmoved
from bnscale.engine.state import frozen_sum, load_state, state
from bnscale.networks import trained
from bnscale.networks.norm import fuse
from bnscale.networks.recompute import Activations, recomputing
from bnscale.storage import Storage
from bnscale.trial import Norm, Refusal, Trial


class Way(Enum):
    """How a step is computed. The numbers agree to rounding; one machine takes one way."""

    PLAIN = "operation by operation"
    FUSED = "norms in one operation with what follows"  # on a CPU; see networks/fused.py
    COMPILED = "compiled blocks"
    RECORDED = "compiled blocks, the whole step recorded"


def ways(trial: Trial, device: torch.device) -> list[Way]:
    """For a trial on a device, the fastest first. A GPU may be without a compiler, or record nothing."""
    if device.type != "cuda":
        return [Way.FUSED]
    # Noise is drawn anew each step from a generator that a recording would not see.
    drawn = trial.norm in (Norm.NOISE, Norm.NOISY)
    return [*([] if drawn else [Way.RECORDED]), Way.COMPILED, Way.PLAIN]


class LocalEngine:
    """SGD on one device. `checkpoints` is where the trial's are kept, or None for runs that keep nothing."""

    def __init__(
        self,
        module: nn.Module,
        trial: Trial,
        gang: Gang,
        checkpoints: Storage | None,
        activations: Activations = Activations.KEPT,
        way: Way | None = None,
    ) -> None:
        assert gang.workers == 1, "several workers are the DeepSpeed engine's"
        self.gang = gang
        # Once, and while weights lie in order: channels last they would be copied to be summed.
        self._frozen = None if checkpoints is None else frozen_sum(module, trial)
        self.module = module.to(gang.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module.train()
        self._trial = trial
        self._objective = Objective(self.module, trial)
        self._activations = activations
        self._checkpoints = checkpoints
        self._total_steps = trial.total_steps
        self._trained = trained(self.module)
        # A tensor, for a recorded update reads nothing else.
        self._rate = torch.zeros((), device=gang.device)
        # An optimiser of nothing is refused by torch; a trial that trains nothing only moves statistics.
        self._sgd = (
            torch.optim.SGD(decays(self.module, trial), lr=trial.lr, momentum=trial.momentum, fused=True)
            if self._trained
            else None
        )
        if gang.device.type == "cuda":  # same trial, same machine: same bits
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
        self._moved = False  # whether there was an update, so that momentum means something
        self._recorded: Recorded | None = None
        self._batch: tuple[Tensor, Tensor, Tensor] | None = None  # images, targets and the loss of a recorded update
        self.way = self._first_that_works([way] if way else ways(trial, gang.device))

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        """The loss. Of a recorded update it is computed by `step`."""
        if self.way is Way.RECORDED and self._sgd is not None:
            self._batch = images_NCHW, labels_N, torch.empty((), device=self.gang.device)
            return self._batch[2]
        return self._loss(images_NCHW, labels_N)

    def backward(self, loss: Tensor) -> None:
        if self._sgd is not None and self._batch is None:
            loss.backward()

    def step(self, lr: float) -> None:
        if self._sgd is None:
            return
        self._moved = True
        if self._batch is None:
            self._update(lr)
            return
        images_NCHW, labels_N, loss = self._batch
        self._batch = None
        assert self._recorded is not None
        self._rate.fill_(lr)
        loss.copy_(self._recorded(images_NCHW, labels_N))

    def _loss(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        compiles = self.way in (Way.COMPILED, Way.RECORDED)
        with compiled(self.module) if compiles else nullcontext(), recomputing(self.module, self._activations):
            return self._objective(images_NCHW, labels_N)

    def _update(self, lr: float | Tensor) -> None:
        assert self._sgd is not None
        for group in self._sgd.param_groups:
            group["lr"] = lr
        self._sgd.step()
        self._sgd.zero_grad(set_to_none=True)

    def _first_that_works(self, ways: list[Way]) -> Way:
        """Tried on a black batch, which moves nothing. Raises what the last one raises, and out of memory at once."""
        for way in ways:
            self.way = way
            try:
                if way is Way.FUSED:
                    fuse(self.module)
                elif way is Way.COMPILED:
                    with unmoved(list(self.module.buffers())):
                        self.backward(self._loss(*blank(self._trial, self.gang.device)))
                    self.module.zero_grad(set_to_none=True)
                elif way is Way.RECORDED and self._sgd is not None:
                    self._recorded = self._record(*blank(self._trial, self.gang.device))
                break
            except RuntimeError as error:  # of a compiler that is not there, or an operation that cannot be recorded
                if way is ways[-1] or isinstance(error, torch.OutOfMemoryError):
                    raise
                self.module.zero_grad(set_to_none=True)
        return way

    def _record(self, images_NCHW: Tensor, labels_N: Tensor) -> Recorded:
        """The update of any batch of these shapes."""

        def update(images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
            loss = self._loss(images_NCHW, labels_N)
            loss.backward()
            self._update(self._rate)
            return loss.detach()

        assert self._sgd is not None
        changing = [*self._trained.values(), *self.module.buffers()]
        if self._trial.momentum:
            for parameter in self._trained.values():  # so that the first update is as any other
                self._sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                changing.append(self._sgd.state[parameter]["momentum_buffer"])
        record = cuda_graph if self.gang.device.type == "cuda" else again
        return Recorded(update, images_NCHW, labels_N, changing, record)

    def total(self, value: Tensor) -> Tensor:
        return value

    def agree(self, flag: bool) -> bool:
        return flag

    def statistics(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.module.named_buffers()}

    def momentum(self) -> dict[str, Tensor]:
        if self._sgd is None or not self._moved:
            return {}
        kept = {name: self._sgd.state[p].get("momentum_buffer") for name, p in self._trained.items()}
        return {name: buffer for name, buffer in kept.items() if buffer is not None}

    def save(self, step: int, facts: dict[str, Any]) -> None:
        if self._checkpoints is None:
            raise Refusal("checkpoints None: this engine was opened to keep nothing")
        # Nothing follows the last step: its checkpoint is the trained network, without momentum.
        last = step == self._total_steps
        momentum = {} if last else self.momentum()
        write(
            self._checkpoints,
            step,
            state(self.module, self._trial, momentum),
            facts | {"frozen": self._frozen},
            1 if last else 2,
        )

    def restore(self, most: int | None = None) -> tuple[int, dict[str, Any]]:
        found = None if self._checkpoints is None else newest(self._checkpoints, most)
        if found is None or found.facts.pop("frozen") != self._frozen:
            return 0, {}
        for name, value in load_state(self.module, found.tensors).items():
            assert self._sgd is not None
            kept = self._sgd.state[self._trained[name]]
            if self._recorded is None:
                kept["momentum_buffer"] = value
            else:  # which reads and writes this very tensor
                kept["momentum_buffer"].copy_(value)
            self._moved = True
        return found.step, found.facts

    def close(self) -> None: ...
