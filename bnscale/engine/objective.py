"""What every engine minimises: the mean cross-entropy of a network, in the trial's precision."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnscale.trial import Precision


class Objective(nn.Module):
    """A network and its loss as one module, so that precision is decided in one place.

    Under BF16 the network runs in bfloat16 autocast: convolutions and linear layers in bfloat16; weights,
    gamma, beta and all statistics stay float32. Autocast is opened here, inside, because DeepSpeed
    turns off one that is opened around it.
    """

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.network = network
        self.precision = precision

    def forward(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        """Mean loss over the N images: a float32 scalar."""
        with torch.autocast(images_NCHW.device.type, torch.bfloat16, enabled=self.precision is Precision.BF16):
            logits_NK = self.network(images_NCHW)
        return F.cross_entropy(logits_NK.float(), labels_N)
