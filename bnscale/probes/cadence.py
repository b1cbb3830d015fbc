"""How often a probe looks: `EPOCH`, `10 * EPOCH`, `100 * STEP`, `END`.

Every cadence includes the end of training; all but `END` include the start.
"""

from dataclasses import dataclass

from bnscale.trial import Trial


@dataclass(frozen=True)
class Cadence:
    epochs: int = 0
    steps: int = 0

    def __rmul__(self, times: int) -> "Cadence":
        assert times > 0
        return Cadence(times * self.epochs, times * self.steps)

    def due(self, step: int, trial: Trial) -> bool:
        """Whether to look after `step` updates."""
        every = self.steps or self.epochs * trial.steps_per_epoch
        return step == trial.total_steps or (every > 0 and step % every == 0)

    def readings(self, trial: Trial) -> int:
        """How many times it looks over a whole training."""
        every = self.steps or self.epochs * trial.steps_per_epoch
        return 1 if every == 0 else -(-trial.total_steps // every) + 1

    def __str__(self) -> str:
        return f"{self.epochs} epochs" if self.epochs else f"{self.steps} steps" if self.steps else "end"


EPOCH = Cadence(epochs=1)
STEP = Cadence(steps=1)
END = Cadence()
