"""What the classifier says of each image at a step (Bjorck et al. 2018, figure 6; a reviewer asked for both parts)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import softmax

from bnscale.networks.initial import even_biases
from bnscale.probes.probe import asks, classes
from bnscale.probes.snapshot import Snapshot


@dataclass(frozen=True)
class ClassBias:
    """One image of the next batch and one class, with the classifier's biases as they are or evened."""

    step: int  # updates taken
    # as they are, or evened: such that the softmax, averaged over these images, is the same for every class
    biases: str
    image: int  # place in the batch
    label: int  # the image's class
    output: int  # the class that this row is of
    logit: float
    probability: float  # softmax of the logits
    gradient: float  # of the mean loss over the batch with respect to the logit


@asks(classes, steps=0.4, rows=lambda trial: 2.0 * trial.batch * trial.facts.classes)
def class_bias(at: Snapshot) -> Iterator[ClassBias]:
    """Bjorck et al. 2018, figure 6: without normalization one class takes nearly all images. Training mode."""
    images_NCHW, labels_N = at.batch()
    with torch.no_grad():
        logits_NK = at.forward(images_NCHW, {}).double().cpu().numpy()
    if not np.isfinite(logits_NK).all():
        return  # a loss that is no number says nothing of classes
    labels = labels_N.tolist()
    for biases, shown_NK in (("as they are", logits_NK), ("evened", logits_NK + even_biases(logits_NK))):
        probability_NK = softmax(shown_NK, axis=1)
        slope_NK = (probability_NK - np.eye(shown_NK.shape[1])[labels]) / len(labels)
        for image, label in enumerate(labels):
            readings = zip(shown_NK[image], probability_NK[image], slope_NK[image], strict=True)
            for output, (logit, probability, slope) in enumerate(readings):
                yield ClassBias(at.step, biases, image, label, output, float(logit), float(probability), float(slope))
