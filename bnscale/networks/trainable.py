"""Which tensors may change: `requires_grad`, and the paper's baseline of two weights a channel."""

from typing import cast

import torch
from torch import Tensor, nn

from bnscale.networks.initial import generator
from bnscale.networks.layers import on_shortcut
from bnscale.networks.norm import NormLayer
from bnscale.trial import Trainable, Trial


class PairConv2d(nn.Conv2d):
    """A convolution of which two random weights of each output channel train and the rest is frozen.

    As many parameters as the gamma and beta of the norm that follows it (Frankle et al. 2021,
    section 4, the baseline of equal count). `pair` holds their values, `index` their places.
    """

    pair: nn.Parameter  # (channels, 2)
    index: Tensor  # (channels, 2), places in the channel's flattened weights; from the seed

    def choose(self, draws: torch.Generator) -> None:
        places = torch.rand(self.out_channels, self.weight[0].numel(), generator=draws)
        self.register_buffer("index", places.argsort(1)[:, :2].contiguous(), persistent=False)
        self.pair = nn.Parameter(self.weight.detach().flatten(1).gather(1, self.index))

    def whole(self) -> Tensor:
        """The weight that it computes with."""
        return self.weight.flatten(1).scatter(1, self.index, self.pair).view_as(self.weight)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self._conv_forward(x_NCHW, self.whole(), self.bias)


def restrict(network: nn.Module, trial: Trial) -> None:
    """Set `requires_grad` on every parameter as `trial.trainable` says."""
    parts = _PARTS[trial.trainable]
    for name, module in network.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(role_of(name, module, own) in parts)
        if trial.trainable is Trainable.TWO_PER_CHANNEL and isinstance(module, nn.Conv2d):
            module.__class__ = PairConv2d
            cast(PairConv2d, module).choose(generator(trial, f"pair/{name}"))


def role_of(name: str, module: nn.Module, own: str) -> str:
    """What a module's own parameter is in the words of the paper's table: gamma, beta, output, shortcut or inner."""
    if isinstance(module, NormLayer):
        return {"weight": "gamma", "bias": "beta"}[own]
    if name == "output":
        return "output"
    return "shortcut" if on_shortcut(name) else "inner"


_PARTS = {
    Trainable.ALL: {"gamma", "beta", "output", "shortcut", "inner"},
    Trainable.BN: {"gamma", "beta"},
    Trainable.BN_OUTPUT: {"gamma", "beta", "output"},
    Trainable.BN_SHORTCUT_OUTPUT: {"gamma", "beta", "shortcut", "output"},
    Trainable.SHORTCUT_OUTPUT: {"shortcut", "output"},
    Trainable.OUTPUT: {"output"},
    Trainable.GAMMA: {"gamma"},
    Trainable.BETA: {"beta"},
    Trainable.WEIGHTS: {"output", "shortcut", "inner"},
    Trainable.TWO_PER_CHANNEL: set(),
    Trainable.NONE: set(),
}
