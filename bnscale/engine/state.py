"""What a checkpoint holds: what training changes, and nothing that the seed gives back.

Keys: `network.<name>` for parameters that train, for running statistics and for biases set by the first batch,
`momentum.<name>` for the optimiser's. Frozen weights are rebuilt from the seed; their sum tells when another version of
torch would rebuild others.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from bnscale.engine.checkpoint import newest, write
from bnscale.networks import unseeded
from bnscale.storage import Storage
from bnscale.trial import Refusal, Trial


def state(network: nn.Module, trial: Trial, momentum: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that the seed does not give back, whole tensors, ready to be written."""
    whole = network.state_dict()
    kept = {f"network.{name}": whole[name] for name in unseeded(network, trial)}
    return kept | {f"momentum.{name}": tensor for name, tensor in momentum.items()}


@torch.no_grad()
def load_state(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put saved tensors back into the network; returns the momentum by parameter name, on its device."""
    here = network.state_dict()
    parameters = dict(network.named_parameters())
    momentum = {}
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        if kind == "network":
            here[name].copy_(value)
        else:
            # Same strides as the parameter: the fused update walks both in memory order.
            momentum[name] = torch.empty_like(parameters[name]).copy_(value)
    return momentum


def frozen_sum(network: nn.Module, trial: Trial) -> str:
    """SHA-256 over the values of all parameters that the seed gives back, in the order of the network."""
    digest = hashlib.sha256()
    others = set(unseeded(network, trial))
    for name, drawn in network.named_parameters():
        if name not in others:
            digest.update(drawn.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Kept:
    """The checkpoints of a trial on one worker: whole networks in, whole networks out."""

    def __init__(self, place: Storage | None, trial: Trial, frozen: str | None) -> None:
        """`frozen` is the sum of what the seed gives back; `place` None for runs that keep nothing."""
        self._place = place
        self._trial = trial
        self._frozen = frozen

    def save(self, network: nn.Module, momentum: dict[str, Tensor], step: int, facts: dict[str, Any]) -> None:
        """Whole or absent; the last two are kept, and of a trial that has come to its end the last one."""
        if self._place is None:
            raise Refusal("checkpoints None: this engine was opened to keep nothing")
        # Nothing follows the last step: its checkpoint is the trained network, without momentum.
        last = step == self._trial.total_steps
        tensors = state(network, self._trial, {} if last else momentum)
        write(self._place, step, tensors, facts | {"frozen": self._frozen}, 1 if last else 2)

    def restore(self, network: nn.Module, most: int | None) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
        """Load the newest of at most so many steps: its step, its facts and the momentum by parameter; (0, {}, {})
        where there is none."""
        found = None if self._place is None else newest(self._place, most)
        if found is None or found.facts.pop("frozen") != self._frozen:
            return 0, {}, {}
        return found.step, found.facts, load_state(network, found.tensors)
