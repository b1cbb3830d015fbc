"""Learning curves."""

from collections.abc import Iterator
from dataclasses import dataclass

from bnscale.probes.probe import asks
from bnscale.probes.snapshot import Snapshot


@dataclass(frozen=True)
class Curve:
    """One part of the data at one step."""

    step: int  # updates taken
    epoch: float  # passes over the training images, held-out ones not counted
    split: str  # train, validation or test; train: as many training images as there are test images, unaugmented
    images: int
    loss: float  # mean cross-entropy in nats; of a regression, half the squared error, mean over vectors
    accuracy: float | None  # share of images, in [0, 1]; null for a regression
    top5: float | None  # share of images whose label is among the five largest logits


@asks(evaluations=1)
def curve(at: Snapshot) -> Iterator[Curve]:
    """Loss and accuracy in evaluation mode, on images that no augmentation touched."""
    for split in at.data.parts:
        score = at.evaluate(split)
        yield Curve(at.step, at.epoch, split, score.images, score.loss, score.accuracy, score.top5)
