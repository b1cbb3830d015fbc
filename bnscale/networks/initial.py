"""Initial values: each tensor drawn by itself, as a function of (seed, its name).

So two trials with one seed start from the same weights whatever else they differ in, and a frozen
weight never needs to be stored. Legend: N images, K classes.
"""

import math
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp
from torch import Tensor, nn
from torch.func import functional_call

from bnscale.networks.norm import NormLayer
from bnscale.trial import NormInit, OutputBias, Trial, WeightInit


def generator(trial: Trial, purpose: str) -> torch.Generator:
    """A stream of its own on the CPU, so that every device starts from the same numbers."""
    return torch.Generator().manual_seed(trial.seed_for(purpose))


@torch.no_grad()
def initialise(network: nn.Module, trial: Trial) -> None:
    """Weights, biases, gamma and beta as the trial says."""
    draw = _WEIGHTS[trial.weight_init]
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            draw(module.weight, generator(trial, f"weight/{name}"))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5  # torch's own; Frankle's code leaves it alone
                module.bias.uniform_(-bound, bound, generator=generator(trial, f"bias/{name}"))
                if name == "output" and trial.output_bias is OutputBias.ZERO:
                    module.bias.zero_()
        elif isinstance(module, NormLayer):
            gamma_beta(module, trial.norm_init, generator(trial, f"norm/{name}"))


# --- weights ----------------------------------------------------------------------------------------


def he_normal(weight: Tensor, draws: torch.Generator) -> None:
    """Normal with variance 2 / fan-in (He et al. 2015, equation 10)."""
    weight.normal_(0, math.sqrt(2 / _fan_in(weight)), generator=draws)


def he_uniform(weight: Tensor, draws: torch.Generator) -> None:
    """Uniform with variance 2 / fan-in (He et al. 2015)."""
    bound = math.sqrt(6 / _fan_in(weight))
    weight.uniform_(-bound, bound, generator=draws)


def glorot_normal(weight: Tensor, draws: torch.Generator) -> None:
    """Normal with variance 2 / (fan-in + fan-out) (Glorot & Bengio 2010, equation 12)."""
    weight.normal_(0, math.sqrt(2 / (_fan_in(weight) + _fan_out(weight))), generator=draws)


def glorot_uniform(weight: Tensor, draws: torch.Generator) -> None:
    """Uniform with variance 2 / (fan-in + fan-out) (Glorot & Bengio 2010, equation 16)."""
    bound = math.sqrt(6 / (_fan_in(weight) + _fan_out(weight)))
    weight.uniform_(-bound, bound, generator=draws)


def orthogonal(weight: Tensor, draws: torch.Generator) -> None:
    """The weight of an output channel flattened into a row: rows, or if these are more, columns are orthonormal
    (Saxe et al. 2014, in torch's convention and with gain 1, as in Frankle's code)."""
    nn.init.orthogonal_(weight, generator=draws)


def delta_orthogonal(weight: Tensor, draws: torch.Generator) -> None:
    """0 but at the kernel's centre, which is orthogonal from channels to channels (Xiao et al. 2018, algorithm 2).

    With fewer outputs than inputs its rows are orthonormal: then it keeps no norm, but projects.
    """
    weight.zero_()
    height, width = weight.shape[2:] if weight.dim() == 4 else (1, 1)
    centre = weight.view(*weight.shape[:2], height, width)[:, :, height // 2, width // 2]
    centre.copy_(nn.init.orthogonal_(torch.empty_like(centre), generator=draws))


def binary(weight: Tensor, draws: torch.Generator) -> None:
    """Plus or minus sqrt(2 / fan-in), the deviation of He's normal weights (Frankle's code, initializers.py)."""
    weight.bernoulli_(0.5, generator=draws).mul_(2).sub_(1).mul_(math.sqrt(2 / _fan_in(weight)))


def gaussian(weight: Tensor, draws: torch.Generator) -> None:
    """Standard normal (Bjorck et al. 2018, section 4)."""
    weight.normal_(generator=draws)


_WEIGHTS: dict[WeightInit, Callable[[Tensor, torch.Generator], None]] = {
    WeightInit.HE_NORMAL: he_normal,
    WeightInit.HE_UNIFORM: he_uniform,
    WeightInit.GLOROT_NORMAL: glorot_normal,
    WeightInit.GLOROT_UNIFORM: glorot_uniform,
    WeightInit.ORTHOGONAL: orthogonal,
    WeightInit.DELTA_ORTHOGONAL: delta_orthogonal,
    WeightInit.BINARY: binary,
    WeightInit.GAUSSIAN: gaussian,
}


def _fan_in(weight: Tensor) -> int:
    return weight[0].numel()


def _fan_out(weight: Tensor) -> int:
    return weight.shape[0] * weight[0, 0].numel()


# --- gamma and beta ---------------------------------------------------------------------------------


def gamma_beta(norm: NormLayer, kind: NormInit, draws: torch.Generator) -> None:
    """Scale and shift of one norm layer, as far as it has them (open_lth, models/bn_initializers.py)."""
    if norm.weight is not None:
        match kind:
            case NormInit.UNIFORM:
                norm.weight.uniform_(0, 1, generator=draws)
            case NormInit.SYMMETRIC:
                norm.weight.uniform_(-1, 1, generator=draws)
            case NormInit.NORMAL:
                norm.weight.normal_(generator=draws)
            case NormInit.ONES | NormInit.ONES_ONES:
                norm.weight.fill_(1)
    if norm.bias is not None:
        norm.bias.fill_(1 if kind is NormInit.ONES_ONES else 0)


# --- class biases -----------------------------------------------------------------------------------


@torch.no_grad()
def even_output(network: nn.Module, images_NCHW: Tensor) -> None:
    """Set the classifier's biases so that the softmax, averaged over these images, is the same for every class.

    The remedy that a reviewer of Bjorck et al. 2018 proposed for figure 6, where one class takes nearly all images.
    The network is in training mode, and neither its running statistics nor its noise move.
    """
    output = cast(nn.Linear, network.output)
    output.bias.zero_()
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    logits_NK = functional_call(network, buffers, (images_NCHW.to(output.bias.device),))
    output.bias.copy_(torch.from_numpy(even_biases(logits_NK.double().cpu().numpy())))


def even_biases(logits_NK: np.ndarray) -> np.ndarray:
    """Biases b_K of mean 0 with mean_N softmax(logits + b) = 1 / K, to 1e-6.

    They minimise the convex mean_N logsumexp(logits + b) - mean_K b, whose gradient is that difference. Logits that
    lie far apart make it nearly piecewise linear, so it is solved with closer logits first, solution near solution.
    """
    classes = logits_NK.shape[1]
    spread = max(float(np.ptp(logits_NK, axis=1).max()), 1.0)
    biases_K = np.zeros(classes)
    for heat in np.geomspace(spread, 1, num=max(2, math.ceil(math.log2(spread)) + 1)):

        def cost(b_K: np.ndarray, heat: float = heat) -> tuple[float, np.ndarray]:
            hot_NK = logits_NK / heat + b_K
            even = float(logsumexp(hot_NK, axis=1).mean() - b_K.mean())
            return even, np.exp(log_softmax(hot_NK, axis=1)).mean(0) - 1 / classes

        found = minimize(
            cost, biases_K / heat, jac=True, method="BFGS", options={"gtol": 1e-7, "maxiter": 2000}
        )  # fmt: skip
        biases_K = (found.x - found.x.mean()) * heat
    return biases_K
