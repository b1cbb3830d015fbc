"""Dropping the learning rate where training stops getting better (Bjorck et al. 2018, protocol).

The one part of a schedule that is no function of the step alone: it listens to the losses, and what it heard is kept
in checkpoints. It hears training losses, so that neither held-out nor test images steer a training.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

from bnscale.trial import Trial

THRESHOLD = 1e-4  # share by which an epoch's mean loss must fall below the best to count (torch's default)


@dataclass
class Plateau:
    """Drops the rate once `patience` epochs in a row brought no new best mean loss; None: never."""

    patience: int | None
    epoch_steps: int
    drops: int = 0
    best: float | None = None  # mean loss of the best epoch
    waited: int = 0  # epochs since then, or since the last drop
    sum: float = 0.0  # of the losses of this epoch
    heard: int = 0  # losses of this epoch

    @classmethod
    def of(cls, trial: Trial, facts: dict[str, Any] | None) -> Self:
        """As it stood in a checkpoint, or anew."""
        return cls(trial.plateau, trial.steps_per_epoch, **(facts or {}))

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        mine = asdict(self)
        return {} if self.patience is None else {k: v for k, v in mine.items() if k not in ("patience", "epoch_steps")}

    def due(self, step: int) -> bool:
        """Whether the losses up to this step must be heard now: at the end of each epoch."""
        return self.patience is not None and step % self.epoch_steps == 0

    def hear(self, step: int, losses: list[float]) -> None:
        """The losses since the last time, none from beyond the end of an epoch; `step` updates have been taken."""
        if self.patience is None:
            return
        for loss in losses:
            self.sum += loss
            self.heard += 1
        if not losses or step % self.epoch_steps:
            return
        mean = self.sum / self.heard
        self.sum, self.heard = 0.0, 0
        if math.isfinite(mean) and (self.best is None or mean < self.best - THRESHOLD * abs(self.best)):
            self.best, self.waited = mean, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.drops += 1
            self.waited = 0
