"""Initial values: each tensor drawn by itself, as a function of (seed, its name).

So two trials with one seed start from the same weights whatever else they differ in, and a frozen
weight never needs to be stored.
"""

import math

import torch
from torch import Tensor, nn

from bnscale.networks.norm import BatchNorm
from bnscale.trial import NormInit, Trial


def generator(trial: Trial, purpose: str) -> torch.Generator:
    """A stream of its own on the CPU, so that every device starts from the same numbers."""
    return torch.Generator().manual_seed(trial.seed_for(purpose))


@torch.no_grad()
def initialise(network: nn.Module, trial: Trial) -> None:
    """He normal weights, and gamma and beta as the trial says."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            he_normal(module.weight, generator(trial, f"weight/{name}"))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5  # torch's own; Frankle's code leaves it alone
                module.bias.uniform_(-bound, bound, generator=generator(trial, f"bias/{name}"))
        elif isinstance(module, BatchNorm):
            gamma_beta(module, trial.norm_init, generator(trial, f"norm/{name}"))


def he_normal(weight: Tensor, draws: torch.Generator) -> None:
    """Normal with variance 2 / fan-in (He et al. 2015, equation 10)."""
    weight.normal_(0, math.sqrt(2 / weight[0].numel()), generator=draws)


def gamma_beta(norm: BatchNorm, kind: NormInit, draws: torch.Generator) -> None:
    """Scale and shift of one norm layer (open_lth, models/bn_initializers.py)."""
    match kind:
        case NormInit.UNIFORM:
            norm.weight.uniform_(0, 1, generator=draws)
            norm.bias.zero_()
        case NormInit.ONES:
            norm.weight.fill_(1)
            norm.bias.zero_()
        case NormInit.ONES_ONES:
            norm.weight.fill_(1)
            norm.bias.fill_(1)
        case NormInit.SYMMETRIC:
            norm.weight.uniform_(-1, 1, generator=draws)
            norm.bias.zero_()
