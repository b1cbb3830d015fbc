"""One worker, one trial: the fast path.

Channels-last convolutions, and bfloat16 autocast where the trial says so. Nothing here knows of
several workers; the gang's engine is in deepspeed.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bnscale.engine import Gang
from bnscale.engine.checkpoint import newest, write
from bnscale.engine.objective import Objective, decays
from bnscale.engine.state import frozen_sum, load_state, state
from bnscale.networks import trained
from bnscale.networks.norm import fuse
from bnscale.networks.recompute import Activations, recomputing
from bnscale.storage import Storage
from bnscale.trial import Refusal, Trial


class LocalEngine:
    """SGD on one device. `checkpoints` is where the trial's are kept, or None for runs that keep nothing."""

    def __init__(
        self,
        module: nn.Module,
        trial: Trial,
        gang: Gang,
        checkpoints: Storage | None,
        activations: Activations = Activations.KEPT,
    ) -> None:
        assert gang.workers == 1, "several workers are the DeepSpeed engine's"
        self.gang = gang
        # Once, and while weights lie in order: channels last they would be copied to be summed.
        self._frozen = None if checkpoints is None else frozen_sum(module, trial)
        self.module = module.to(gang.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module.train()
        fuse(self.module)
        self._trial = trial
        self._objective = Objective(self.module, trial)
        self._activations = activations
        self._checkpoints = checkpoints
        self._total_steps = trial.total_steps
        self._trained = trained(self.module)
        # An optimiser of nothing is refused by torch; a trial that trains nothing only moves statistics.
        self._sgd = (
            torch.optim.SGD(decays(self.module, trial), lr=trial.lr, momentum=trial.momentum, fused=True)
            if self._trained
            else None
        )
        if gang.device.type == "cuda":  # same trial, same machine: same bits
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        with recomputing(self.module, self._activations):
            return self._objective(images_NCHW, labels_N)

    def backward(self, loss: Tensor) -> None:
        if self._sgd is not None:
            loss.backward()

    def step(self, lr: float) -> None:
        if self._sgd is not None:
            for group in self._sgd.param_groups:
                group["lr"] = lr
            self._sgd.step()
            self._sgd.zero_grad(set_to_none=True)

    def total(self, value: Tensor) -> Tensor:
        return value

    def agree(self, flag: bool) -> bool:
        return flag

    def statistics(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.module.named_buffers()}

    def momentum(self) -> dict[str, Tensor]:
        if self._sgd is None:
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
            self._sgd.state[self._trained[name]]["momentum_buffer"] = value
        return found.step, found.facts

    def close(self) -> None: ...
