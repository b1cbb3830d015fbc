"""Learning curves: on whole parts of the data, or on the batches as they come."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bnscale import loss
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
    accuracy: float | None  # share of images, in [0, 1], by the labels trained on, if noisy; null for a regression
    top5: float | None  # share of images whose label is among the five largest logits


@asks(evaluations=1)
def curve(at: Snapshot) -> Iterator[Curve]:
    """Loss and accuracy in evaluation mode, on images that no augmentation touched."""
    for split in at.data.parts:
        score = at.evaluate(split)
        yield Curve(at.step, at.epoch, split, score.images, score.loss, score.accuracy, score.top5)


@dataclass(frozen=True)
class BatchCurve:
    """The next batch at one step, in training mode; penalties left out."""

    step: int  # updates taken
    epoch: float
    images: int
    loss: float  # mean cross-entropy in nats; of a regression, half the squared error, summed over vectors
    accuracy: float | None  # share of images, in [0, 1]; null for a regression and where the loss is infinite


@asks(steps=0.35, rows=lambda trial: 1)
def batch_curve(at: Snapshot) -> Iterator[BatchCurve]:
    """Loss and accuracy in training mode: what Santurkar et al. 2018 call training accuracy (figures 1, 2 and 5)."""
    images_NCHW, targets = at.batch()
    with torch.no_grad():
        outputs = at.forward(images_NCHW, {})
    value = float(loss.of_batch(at.trial, outputs, targets))
    if not math.isfinite(value):  # the largest of logits that are no numbers says nothing
        yield BatchCurve(at.step, at.epoch, len(targets), math.inf, None)
        return
    right = loss.right(at.trial, outputs, targets)
    accuracy = None if right is None else float(right[:, 0].sum()) / len(targets)
    yield BatchCurve(at.step, at.epoch, len(targets), value, accuracy)
