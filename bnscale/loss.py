"""What training minimises, by data set.

Images with labels: the mean cross-entropy over the batch. The linear teacher: half the squared error, added up over the
batch and not averaged, which is the scale of Santurkar et al. 2018, figure 3. Legend: N images, K classes or outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bnscale.trial import Trial


def of_images(trial: Trial, outputs_NK: Tensor, targets: Tensor) -> Tensor:
    """The losses of N images, one each: cross-entropy in nats, or half the squared error."""
    if trial.facts.regression:
        return (outputs_NK.float() - targets).square().sum(1) / 2
    return F.cross_entropy(outputs_NK.float(), targets, reduction="none")


def of_batch(trial: Trial, outputs_NK: Tensor, targets: Tensor) -> Tensor:
    """The loss of a batch, from any share of it: shares of equal size have it as their mean."""
    if trial.facts.regression:
        return F.mse_loss(outputs_NK.float(), targets, reduction="sum") / 2 * (trial.batch / len(targets))
    return F.cross_entropy(outputs_NK.float(), targets)


def of_each(trial: Trial, outputs_NK: Tensor, targets: Tensor) -> Tensor:
    """The losses of a batch in several networks, whose outputs follow one another: one each, as `of_batch` gives it."""
    each = outputs_NK.float().unflatten(0, (-1, len(targets)))
    if trial.facts.regression:
        return (each - targets).square().sum((1, 2)) / 2 * (trial.batch / len(targets))
    repeated = targets.expand(len(each), -1).flatten()
    return F.cross_entropy(each.flatten(0, 1), repeated, reduction="none").view(len(each), -1).mean(1)


def right(trial: Trial, outputs_NK: Tensor, targets: Tensor) -> Tensor | None:
    """Which of N images have their label as the largest output, and in the five largest: (N, 2). None for a
    regression."""
    if trial.facts.regression:
        return None
    best_N5 = outputs_NK.topk(min(5, outputs_NK.shape[1])).indices == targets[:, None]
    return torch.stack([best_N5[:, 0], best_N5.any(1)], 1)
