"""Networks as they stand in evaluation mode: plain, or compiled where an engine's steps are."""

import torch
from torch import Tensor

from bnscale.data import Resident
from bnscale.engine.objective import Objective, Objectives
from bnscale.engine.way import Way, computing
from bnscale.networks.layers import mode
from bnscale.networks.recompute import Activations
from bnscale.score import batch_of, sums


class Evaluation:
    """Of the one network of an objective, or of the several that are stacked in it."""

    def __init__(self, objective: Objective | Objectives, way: Way, networks: int = 1) -> None:
        self._objective = objective
        self._way = way
        self._size = batch_of(networks)

    def __call__(self, part: str, data: Resident, share: slice = slice(None)) -> Tensor:
        """Sums over a part of the data, as score.py has them: (K, 4). `share` is a worker's among the batches."""
        with mode(self._objective, training=False):
            return sums(self._objective.trial, self._outputs, data.batches(part, self._size, share), data.device)

    def _outputs(self, images_BCHW: Tensor) -> Tensor:
        # Code is made for one size of batch; what is left over at the end of a part is not worth its own.
        if self._way.compiles and len(images_BCHW) == self._size:
            try:
                with computing(self._objective.network, self._way, Activations.KEPT):
                    return self._objective.outputs(images_BCHW)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # compilers have many; what is not theirs comes again below
                self._way = Way.PLAIN
        return self._objective.outputs(images_BCHW)
