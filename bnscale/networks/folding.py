"""Batch norms folded into the layers beside them, for inference (Jacob et al. 2018, section 3.2).

In evaluation mode a batch norm is z = scale * y + shift for each channel, with scale = gamma / sqrt(variance + epsilon)
and shift = beta - scale * mean of its running statistics: a linear layer before it can do that with its own weights and
a bias. The outputs are the same but for rounding. Legend: C channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnscale.networks.norm import EPS, BatchNorm, NoisyBatchNorm, NormLayer
from bnscale.networks.trainable import PairConv2d
from bnscale.trial import Norm, Trial

Weighted = nn.Conv2d | nn.Linear


def foldable(trial: Trial) -> bool:
    """Whether all its norms have running statistics and add nothing else."""
    return bool(trial.norms) and trial.norm in (Norm.BATCH, Norm.RENORM, Norm.L1, Norm.L2, Norm.LINF)


@torch.no_grad()
def fold(network: nn.Module, images_NCHW: Tensor) -> None:
    """Leave no batch norm in a network: each goes into the layer that it follows, or into the linear layer that follows
    it, as one behind the last pooling. In place; the network serves for evaluation only from here on.

    `images_NCHW`, of any number, show by one pass what stands beside what.
    """
    names = {module: name for name, module in network.named_modules()}
    for norm, beside, before in _neighbours(network, images_NCHW):
        _put(network, names[beside], _merged(network.get_submodule(names[beside]), norm, before=before))
        _put(network, names[norm], nn.Identity())
    left = [name for name, module in network.named_modules() if isinstance(module, NormLayer)]
    assert not left, f"{left} stand beside no layer; `foldable` and the networks know"


def _merged(layer: nn.Module, norm: BatchNorm, *, before: bool) -> Weighted:
    """A layer that does what this one does and the norm, which it stands before or behind."""
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


def _neighbours(network: nn.Module, images_NCHW: Tensor) -> list[tuple[BatchNorm, nn.Module, bool]]:
    """Each batch norm with the layer whose output it takes (True), or else the linear layer that takes its output."""
    passed: list[tuple[nn.Module, Tensor, Tensor]] = []  # alive until the end: a tensor is known by being the same one

    def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        passed.append((module, inputs[0], output))

    with _evaluating(network):
        handles = [m.register_forward_hook(see) for m in network.modules() if isinstance(m, Weighted | BatchNorm)]
        try:
            network(images_NCHW)
        finally:
            for handle in handles:
                handle.remove()
    found: list[tuple[BatchNorm, nn.Module, bool]] = []
    for norm, given, made in passed:
        if not isinstance(norm, BatchNorm) or isinstance(norm, NoisyBatchNorm):
            continue
        makers = [module for module, _, output in passed if isinstance(module, Weighted) and output is given]
        takers = [module for module, taken, _ in passed if isinstance(module, nn.Linear) and taken is made]
        for beside in [*makers, *takers][:1]:  # between two layers it goes into the first
            found.append((norm, beside, bool(makers)))
    return found


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)
