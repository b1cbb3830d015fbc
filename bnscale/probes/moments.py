"""Means and deviations of the channels, layer by layer (Bjorck et al. 2018, figure 5)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bnscale.networks.layers import Layer, layers, watched
from bnscale.networks.statistic import Size, statistic
from bnscale.probes.probe import asks
from bnscale.probes.snapshot import Snapshot


@dataclass(frozen=True)
class ChannelMoments:
    """What one layer computes from the next batch, before any norm behind it, at one step."""

    step: int  # updates taken
    layer: str  # module path, "blocks.26.conv2"
    layer_index: int  # 1 at the stem, growing towards the output
    channels: int
    # Over images and pixels each channel has a mean and a standard deviation. Over the channels:
    mean: float  # mean of the magnitudes of the means
    mean_sd: float  # standard deviation of these magnitudes
    sd: float  # mean of the standard deviations
    sd_sd: float  # standard deviation of the standard deviations


@asks(steps=0.5, rows=lambda trial: trial.layers)
def channel_moments(at: Snapshot) -> Iterator[ChannelMoments]:
    """Bjorck et al. 2018, figure 5: without normalization they grow with depth."""
    found = layers(at.network)
    moments = seen(at, found, {})
    for layer in found:
        if not torch.isfinite(moments[layer.number]).all():
            continue  # what overflowed is no number
        mean_C, variance_C = moments[layer.number]
        sizes_C, sd_C = mean_C.abs(), variance_C.sqrt()
        spread = [float(each.std(correction=0)) for each in (sizes_C, sd_C)]
        yield ChannelMoments(
            at.step, layer.name, layer.number, len(mean_C),
            float(sizes_C.mean()), spread[0], float(sd_C.mean()), spread[1],
        )  # fmt: skip


@torch.no_grad()
def seen(at: Snapshot, some: list[Layer], changed: dict[str, Tensor]) -> dict[int, Tensor]:
    """By layer number: means and variances of its channels on the next batch, (2, C) in float64."""
    moments: dict[int, Tensor] = {}

    def see(layer: Layer, x: Tensor, output: Tensor) -> None:
        found = statistic(output, Size.DEVIATION, output.shape[1], None)  # faster than torch.var_mean
        moments[layer.number] = torch.stack([found.mean_C, found.square_C]).double()

    with watched(some, see):
        at.forward(at.batch()[0], changed)
    return moments
