"""One worker, one trial: the fast path.

Channels-last convolutions, and bfloat16 autocast where the trial says so; what else makes a step fast is in way.py.
Nothing here knows of several workers; the gang's engine is in deepspeed.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bnscale.data import Resident, blank
from bnscale.engine import Gang
from bnscale.engine.evaluation import Evaluation
from bnscale.engine.objective import Objective, decays
from bnscale.engine.state import Kept, frozen_sum
from bnscale.engine.way import Steps, Way, backend, computing, keep_bits, ways
from bnscale.networks import trained
from bnscale.networks.norm import fuse
from bnscale.networks.recompute import Activations
from bnscale.score import Score
from bnscale.storage import Storage
from bnscale.trial import Trial


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
        """`way`: this one alone, and not the fastest that works."""
        assert gang.workers == 1, "several workers are the DeepSpeed engine's"
        self.gang = gang
        # Once, and while weights lie in order: channels last they would be copied to be summed.
        self._kept = Kept(checkpoints, trial, None if checkpoints is None else frozen_sum(module, trial))
        self.module = module.to(gang.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module.train()
        self._trial = trial
        self._objective = Objective(self.module, trial)
        self._activations = activations
        self._trained = trained(self.module)
        # An optimiser of nothing is refused by torch; a trial that trains nothing only moves statistics.
        self._sgd = (
            torch.optim.SGD(decays(self.module, trial), lr=trial.lr, momentum=trial.momentum, fused=True)
            if self._trained
            else None
        )
        self._rate = torch.zeros((), device=gang.device)  # what a recorded step reads
        self._moved = False  # whether there has been an update of which momentum is left
        keep_bits(gang.device)
        self._steps = Steps(self, [way] if way else ways(trial, gang.device), blank(trial, gang.device))
        self.way = self._steps.way
        self._evaluation = Evaluation(self._objective, self.way)

    @property
    def backend(self) -> str:
        return backend(self._steps, self._trial, self.gang.device)

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        """The loss; of a recorded step it is there after `step`."""
        return self._steps.losses(images_NCHW, labels_N)

    def backward(self, loss: Tensor) -> None:
        self._steps.descend(loss)

    def step(self, lr: float) -> None:
        if self.way.records:
            self._rate.fill_(lr)
        else:
            self._give(lr)
        self._steps.move()
        self._moved = True

    def _give(self, rate: float | Tensor) -> None:
        for group in self._sgd.param_groups if self._sgd else []:
            group["lr"] = rate

    # --- the parts of a step ---------------------------------------------------------------------

    def begin(self, way: Way) -> None:
        self.way = way
        if way is Way.FUSED:
            fuse(self.module)
        elif way.records and self._sgd is not None:
            self._give(self._rate)
            if self._sgd.defaults["momentum"]:
                for parameter in self._trained.values():  # so that the first update is as any other
                    self._sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def losses(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        with computing(self.module, self.way, self._activations):
            return self._objective(images_NCHW, labels_N)

    def descend(self, loss: Tensor) -> None:
        if self._sgd is not None:
            loss.backward()

    def move(self) -> None:
        if self._sgd is not None:
            self._sgd.step()
            self.forget()

    def forget(self) -> None:
        self.module.zero_grad(set_to_none=True)

    def changing(self) -> list[Tensor]:
        return [*self._trained.values(), *self.module.buffers(), *self._momenta().values()]

    # --- the trial ---------------------------------------------------------------------------------

    def total(self, value: Tensor) -> Tensor:
        return value

    def agree(self, flag: bool) -> bool:
        return flag

    def statistics(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.module.named_buffers()}

    def momentum(self) -> dict[str, Tensor]:
        return self._momenta() if self._moved else {}

    def _momenta(self) -> dict[str, Tensor]:
        if self._sgd is None:
            return {}
        kept = {name: self._sgd.state[p].get("momentum_buffer") for name, p in self._trained.items()}
        return {name: buffer for name, buffer in kept.items() if buffer is not None}

    def score(self, part: str, data: Resident) -> Score:
        return Score.of(self._objective.trial, self._evaluation(part, data)[0].tolist())

    def save(self, step: int, facts: dict[str, Any]) -> None:
        self._kept.save(self.module, self.momentum(), step, facts)

    def restore(self, most: int | None = None) -> tuple[int, dict[str, Any]]:
        step, facts, momentum = self._kept.restore(self.module, most)
        own = self._momenta()
        for name, value in momentum.items():
            assert self._sgd is not None
            if name in own:  # a recorded step reads and writes this very tensor
                own[name].copy_(value)
            else:
                self._sgd.state[self._trained[name]]["momentum_buffer"] = value
        self._moved = bool(momentum)
        return step, facts

    def close(self) -> None:
        """A recording holds what it computes with; without this the next trial would find it in memory."""
        del self._steps
