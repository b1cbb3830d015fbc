"""What every engine minimises: the loss of a network in the trial's precision, and penalties on gamma and beta."""

import torch
from torch import Tensor, nn

from bnscale import loss
from bnscale.networks.cohort import Stacked
from bnscale.networks.norm import NormLayer
from bnscale.trial import DecayOn, Precision, Trial


class Objective(nn.Module):
    """A network and its loss as one module, so that precision is decided in one place.

    Under BF16 the network runs in bfloat16 autocast: convolutions and linear layers in bfloat16; weights,
    gamma, beta and all statistics stay float32. Autocast is opened here, inside, because DeepSpeed
    turns off one that is opened around it.
    """

    def __init__(self, network: nn.Module, trial: Trial) -> None:
        super().__init__()
        self.network = network
        self.trial = trial

    def forward(self, images_NCHW: Tensor, targets: Tensor) -> Tensor:
        """The objective of a batch, from N images of it: a float32 scalar."""
        return loss.of_batch(self.trial, self.outputs(images_NCHW), targets) + self._penalties()

    def outputs(self, images_NCHW: Tensor) -> Tensor:
        """The network's, in the trial's precision."""
        return _outputs(self.network, self.trial, images_NCHW)

    def _penalties(self) -> Tensor | float:
        """l1 times the sum of |gamma|, l2 times the sum of gamma^2, over all norm layers; and so for beta."""
        trial = self.trial
        total: Tensor | float = 0.0
        for own, l1, l2 in (("weight", trial.gamma_l1, trial.gamma_l2), ("bias", trial.beta_l1, trial.beta_l2)):
            if not l1 and not l2:
                continue
            parts = [getattr(m, own) for m in self.network.modules() if isinstance(m, NormLayer)]
            values = torch.cat([part for part in parts if part is not None])
            total = total + l1 * values.abs().sum() + l2 * values.square().sum()
        return total


class Objectives(nn.Module):
    """A stacked network and the losses of its trials, without their penalties, as one module; precision as above."""

    def __init__(self, network: Stacked, trial: Trial) -> None:
        """`trial` is any of the cohort's."""
        super().__init__()
        self.network = network
        self.trial = trial

    def forward(self, images_BCHW: Tensor, targets: Tensor) -> Tensor:
        """Of each trial: float32, (K,)."""
        return loss.of_each(self.trial, self.outputs(images_BCHW), targets)

    def outputs(self, images_BCHW: Tensor) -> Tensor:
        """Of one trial after the other, in their precision."""
        return _outputs(self.network, self.trial, images_BCHW)


def _outputs(network: nn.Module, trial: Trial, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=trial.precision is Precision.BF16):
        outputs: Tensor = network(images)
        return outputs


def decays(network: nn.Module, trial: Trial) -> list[dict[str, object]]:
    """The parameters that train, in groups of one weight decay each, as torch's optimisers take them."""
    groups: dict[float, list[nn.Parameter]] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                groups.setdefault(decay_of(module, parameter, trial), []).append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def decay_of(module: nn.Module, parameter: nn.Parameter, trial: Trial) -> float:
    """The weight decay of one parameter that trains."""
    if isinstance(module, NormLayer) and trial.norm_decay is not None:
        return trial.norm_decay
    if trial.decay_on is DecayOn.WEIGHTS and parameter.dim() == 1:
        return 0.0
    return trial.weight_decay
