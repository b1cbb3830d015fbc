"""Batch norms folded into the layers beside them, for inference (Jacob et al. 2018, section 3.2).

In evaluation mode a batch norm is z = scale * y + shift for each channel, with scale = gamma / sqrt(variance + epsilon)
and shift = beta - scale * mean of its running statistics: a linear layer before it can do that with its own weights and
a bias. The outputs are the same but for rounding. Legend: C channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bnscale.networks.neighbours import Weighted, neighbours
from bnscale.networks.norm import EPS, BatchNorm, NoisyBatchNorm, NormLayer
from bnscale.networks.trainable import PairConv2d
from bnscale.trial import Norm, Trial


def foldable(trial: Trial) -> bool:
    """Whether all its norms have running statistics and add nothing else."""
    return bool(trial.norms) and trial.norm in (Norm.BATCH, Norm.RENORM, Norm.L1, Norm.L2, Norm.LINF)


@torch.no_grad()
def fold(network: nn.Module, images_NCHW: Tensor) -> None:
    """Leave no batch norm in a network: each goes into the layer that it follows, or into the linear layer that follows
    it, as one behind the last pooling. In place; the network serves for evaluation only from here on.

    `images_NCHW`, of any number, show by one pass what stands beside what.
    """
    for each in neighbours(network, images_NCHW):
        norm = network.get_submodule(each.norm)
        if not isinstance(norm, BatchNorm) or isinstance(norm, NoisyBatchNorm):
            continue
        beside = each.before or each.behind  # between two layers it goes into the first
        if beside is not None:
            merged = _merged(network.get_submodule(beside), norm, before=each.before is not None)
            _put(network, beside, merged)
            _put(network, each.norm, nn.Identity())
    left = [name for name, module in network.named_modules() if isinstance(module, NormLayer)]
    assert not left, f"{left} stand beside no layer; `foldable` and the networks know"


def _merged(layer: nn.Module, norm: BatchNorm, *, before: bool) -> Weighted:
    """A layer that does what this one does and the norm, which it stands `before`, or else behind."""
    assert isinstance(layer, Weighted)
    weight = _weight(layer).double()
    bias_C = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    if layer.bias is not None:
        bias_C = layer.bias.detach().double()
    gamma_C, beta_C = (part.detach().double() for part in norm.gamma_beta(weight))
    scale_C = gamma_C / (norm.running_var.double() + EPS).sqrt()
    shift_C = beta_C - scale_C * norm.running_mean.double()
    if before:
        weight, bias_C = weight * scale_C.view(-1, *[1] * (weight.dim() - 1)), scale_C * bias_C + shift_C
    else:
        weight, bias_C = weight * scale_C, bias_C + weight @ shift_C
    merged: Weighted
    kind: dict[str, Any] = {"bias": True, "device": "meta"}
    if isinstance(layer, nn.Linear):
        merged = nn.Linear(layer.in_features, layer.out_features, **kind)
    else:
        assert (layer.groups, layer.dilation) == (1, (1, 1)), "no network has others"
        sizes: Any = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        merged = nn.Conv2d(*sizes, **kind)
    own = layer.weight
    last = torch.channels_last if own.dim() == 4 and own.is_contiguous(memory_format=torch.channels_last) else None
    weight = weight.to(own.dtype).contiguous(memory_format=last or torch.contiguous_format)
    merged.weight, merged.bias = (nn.Parameter(part, requires_grad=False) for part in (weight, bias_C.to(own.dtype)))
    return merged.train(layer.training)


def _weight(layer: Weighted) -> Tensor:
    """Of a layer of which two weights a channel train, as it computes with it."""
    return layer.whole() if isinstance(layer, PairConv2d) else layer.weight.detach()


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)
