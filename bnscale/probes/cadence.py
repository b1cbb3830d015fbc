"""How often a probe looks: `EPOCH`, `10 * EPOCH`, `100 * STEP`, `START`, `END`.

`START` is before the first update and `END` after the last; all others include both.
"""

from dataclasses import dataclass

from bnscale.trial import Trial


@dataclass(frozen=True)
class Cadence:
    epochs: int = 0
    steps: int = 0
    once: str = ""  # start or end, where it is neither epochs nor steps

    def __rmul__(self, times: int) -> "Cadence":
        assert times > 0
        assert not self.once, "the start and the end come once"
        return Cadence(times * self.epochs, times * self.steps)

    def due(self, step: int, trial: Trial) -> bool:
        """Whether to look after `step` updates."""
        if self.once:
            return step == (0 if self == START else trial.total_steps)
        return step == trial.total_steps or step % self._every(trial) == 0

    def readings(self, trial: Trial) -> int:
        """How many times it looks over a whole training."""
        return 1 if self.once else -(-trial.total_steps // self._every(trial)) + 1

    def _every(self, trial: Trial) -> int:
        return self.steps or self.epochs * trial.steps_per_epoch

    def __str__(self) -> str:
        return self.once or (f"{self.epochs} epochs" if self.epochs else f"{self.steps} steps")


EPOCH = Cadence(epochs=1)
STEP = Cadence(steps=1)
START = Cadence(once="start")
END = Cadence(once="end")
