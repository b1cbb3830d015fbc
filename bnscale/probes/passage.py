"""What norms get and hand on in a pass through the network, held so that gradients can be asked for at both places.

Legend: N images, C channels, H, W pixels, M values of a channel: images times pixels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from bnscale import loss
from bnscale.networks.neighbours import neighbours
from bnscale.networks.norm import EPS, BatchNorm
from bnscale.probes.snapshot import Snapshot


class Passage(NamedTuple):
    """Through one norm, (N, C, H, W) or (N, C) each, in the graph of the loss."""

    y: Tensor  # what it gets
    z: Tensor  # what goes on from there


def passed(
    at: Snapshot,
    batch: tuple[Tensor, Tensor],
    norms: Sequence[BatchNorm],
    goes_on: Callable[[BatchNorm, Tensor, Tensor], Tensor],
    changed: dict[str, Tensor] | None = None,
    buffers: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[nn.Module, Passage]]:
    """The loss of a batch in training mode, with `goes_on(norm, y, z)` behind each of these norms; and their passages.

    `changed` and `buffers` are as in `Snapshot.forward`.
    """
    through: dict[nn.Module, Passage] = {}

    def see(norm: BatchNorm, inputs: tuple[Tensor, ...], z: Tensor) -> Tensor:
        z = goes_on(norm, inputs[0], z)
        through[norm] = Passage(inputs[0], z)
        return z.clone()  # what follows may overwrite it

    handles = [norm.register_forward_hook(see) for norm in norms]
    try:
        images_NCHW, targets = batch
        # Whatever trains, the gradient then reaches every layer.
        outputs = at.forward(images_NCHW.requires_grad_(), changed or {}, buffers)
        value = loss.of_batch(at.trial, outputs, targets)
    finally:
        for handle in handles:
            handle.remove()
    return value, through


def layer_before(at: Snapshot) -> dict[str, str]:
    """By the path of a norm that stands right behind a convolution or a matrix, that layer's path, on shortcuts too.

    Not in it: a norm behind pooling.
    """
    images_NCHW, _ = at.batch()
    return {each.norm: each.before for each in neighbours(at.network, images_NCHW[:1]) if each.before is not None}


def by_channel(values: Tensor) -> Tensor:
    """(C, M) in float64."""
    return values.detach().double().transpose(0, 1).flatten(1)


class Standardised(NamedTuple):
    """What a batch norm divides by, and what it then has before gamma and beta."""

    sigma_C: Tensor  # sqrt(variance + epsilon)
    values_CM: Tensor


def standardised(y_CM: Tensor, eps: float) -> Standardised:
    sigma_C = (y_CM.var(1, correction=0) + eps).sqrt()
    return Standardised(sigma_C, (y_CM - y_CM.mean(1, keepdim=True)) / sigma_C[:, None])


def as_they_are(norm: BatchNorm, y: Tensor, z: Tensor) -> Tensor:
    return z


def left_out(norm: BatchNorm, y: Tensor, z: Tensor) -> Tensor:
    """The network without this norm."""
    return y


def held_constant(norm: BatchNorm, y: Tensor, z: Tensor) -> Tensor:
    """The same values, from a mean and a variance through which no gradient goes."""
    y_CM = by_channel(y)
    mean_C, variance_C = y_CM.mean(1).to(y.dtype), y_CM.var(1, correction=0).to(y.dtype)
    return F.batch_norm(y, mean_C, variance_C, *norm.gamma_beta(y), False, 0.0, EPS)
