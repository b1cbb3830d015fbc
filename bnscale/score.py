"""How well networks do on a part of the data, in evaluation mode.

Legend: K networks that are evaluated in one pass, B images of a batch, N images of the part.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bnscale import loss
from bnscale.trial import Trial

EVALUATION_BATCH = 500  # images; a size that changes no number, for evaluation uses running statistics
_AT_ONCE = 2 * EVALUATION_BATCH  # images of several networks in one pass


@dataclass(frozen=True)
class Score:
    images: int
    loss: float  # mean cross-entropy in nats; of a regression, half the squared error, mean over vectors
    accuracy: float | None  # share of images whose label is the largest logit; None for a regression
    top5: float | None  # share of images whose label is among the five largest logits

    @classmethod
    def of(cls, trial: Trial, counted: Sequence[float]) -> Self:
        """From one network's `sums`."""
        images, error, first, five = counted
        if trial.facts.regression:
            return cls(int(images), error / images, None, None)
        if not math.isfinite(error):
            first = five = math.nan  # the largest of logits that are no numbers says nothing
        return cls(int(images), error / images, first / images, five / images)


def batch_of(networks: int) -> int:
    """Images of a batch for so many networks in one pass: of few sizes, so that parts of the data are whole batches."""
    most = max(1, min(EVALUATION_BATCH, _AT_ONCE // networks))
    return next(size for size in range(most, 0, -1) if EVALUATION_BATCH % size == 0)


@torch.no_grad()
def sums(
    trial: Trial, outputs: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Tensor:
    """Of each of K networks, over the images of all batches: how many, their losses, how many whose label is the
    largest output, and how many where it is among the five largest: (K, 4).

    `outputs` of B images are those of one network after the other. Nobody waits for a GPU. Losses are added up at the
    end and in double precision, so that the size of a batch rounds nothing.
    """
    losses, hits = [], []
    for images_BCHW, targets in batches:
        given = outputs(images_BCHW).float()
        repeated = targets.repeat(len(given) // len(targets), *[1] * (targets.dim() - 1))
        losses.append(loss.of_images(trial, given, repeated).view(-1, len(targets)))
        right = loss.right(trial, given, repeated)
        if right is not None:
            hits.append(right.view(-1, len(targets), 2))
    if not losses:  # a worker of a gang may have none
        return torch.zeros(1, 4, dtype=torch.float64, device=device)
    losses_KN = torch.cat(losses, 1).double()
    sums_K4 = torch.zeros(len(losses_KN), 4, dtype=torch.float64, device=device)
    sums_K4[:, 0] = losses_KN.shape[1]
    sums_K4[:, 1] = torch.stack([losses_N.sum() for losses_N in losses_KN])
    if hits:
        sums_K4[:, 2:] = torch.cat(hits, 1).sum(1)
    return sums_K4
