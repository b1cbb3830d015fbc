"""What a layer gets and what it hands to the nonlinearity (Santurkar et al. 2018, figures 1, 2, 7, 8 and 14).

`output` is what stands behind a layer's norm, noise included, and before any nonlinearity; without a norm, what the
layer itself computes. Legend: N images, C channels, H, W pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bnscale.anatomy import FAMILIES
from bnscale.networks.layers import Layer, layers
from bnscale.networks.statistic import Size, statistic
from bnscale.probes.probe import asks, plain_descent
from bnscale.probes.snapshot import Snapshot

SAMPLE = 50_000  # values of a layer that its distribution stands on
BINS = 60
TAIL = 0.0005  # share of the values beyond each end of the histogram


@dataclass(frozen=True)
class Activations:
    """The values of one layer on the next batch at one step, over images, pixels and channels."""

    step: int  # updates taken
    layer_index: int  # 1 at the stem
    place: str  # input or output
    values: int  # sampled, each as likely as any other
    mean: float
    sd: float
    skewness: float | None  # third central moment over the cubed deviation; 0 for a normal distribution
    kurtosis: float | None  # fourth central moment over the squared variance; 3 for a normal distribution
    # Largest distance between the distribution function and that of the normal distribution with this mean and
    # deviation, in [0, 1] (Kolmogorov). A sample of 50,000 normal values comes to about 0.003.
    from_normal: float | None


@dataclass(frozen=True)
class ActivationHistogram:
    """One interval of the values of one layer at one step; all its intervals are of one width and hold 99.9 %."""

    step: int  # updates taken
    layer_index: int
    place: str  # input or output
    low: float
    high: float
    count: int  # values in the interval
    values: int  # sampled


@dataclass(frozen=True)
class MomentChange:
    """One layer: from one update to the next, its output on the batch of each (Santurkar et al. 2018, figure 8)."""

    step: int  # updates taken before the first of the two
    layer: str  # module path, "layers.9.conv"
    layer_index: int
    channels: int
    # A channel has a mean and a variance over images and pixels. Over the channels, means of the magnitudes of:
    mean_change: float  # the change of the mean
    variance_change: float  # the change of the variance


@asks(steps=0.7, rows=lambda trial: 2)
def activations(at: Snapshot, numbers: tuple[int, ...]) -> Iterator[Activations]:
    """Santurkar et al. 2018, figures 1 and 14: how far from Gaussian, how far from where they were."""
    for layer, place, sample in _sampled(at, numbers):
        mean, sd = float(sample.mean()), float(sample.std())
        standard = (sample - mean) / sd if sd else None
        yield Activations(
            at.step,
            layer.number,
            place,
            len(sample),
            mean,
            sd,
            skewness=None if standard is None else float(np.mean(standard**3)),
            kurtosis=None if standard is None else float(np.mean(standard**4)),
            from_normal=None if standard is None else from_normal(standard),
        )


@asks(steps=0.4, rows=lambda trial: 2 * BINS)
def activation_histogram(at: Snapshot, numbers: tuple[int, ...]) -> Iterator[ActivationHistogram]:
    """Santurkar et al. 2018, figures 1 and 2, its ridges, and figure 14."""
    for layer, place, sample in _sampled(at, numbers):
        first, last = np.quantile(sample, [TAIL, 1 - TAIL]).tolist()
        if first == last:
            continue  # a distribution without width has no histogram
        bounds = np.linspace(first, last, BINS + 1)
        counts, _ = np.histogram(sample, bounds)
        for low, high, count in zip(bounds.tolist(), bounds[1:].tolist(), counts.tolist(), strict=False):
            yield ActivationHistogram(at.step, layer.number, place, low, high, count, len(sample))


@asks(plain_descent, steps=1.9, rows=lambda trial: 1)
def moment_change(at: Snapshot, numbers: tuple[int, ...]) -> Iterator[MomentChange]:
    """Santurkar et al. 2018, figure 8: the noise behind batch norm moves them far more than training ever does."""
    some = [layer for layer in layers(at.network) if layer.number in numbers]
    buffers = at.buffers()  # the second pass draws the noise and has the running statistics that the first leaves it
    before = _moments(at, some, 0, {}, buffers)
    after = _moments(at, some, 1, at.updated, buffers)
    for layer in some:
        change_2 = (after[layer.number] - before[layer.number]).abs().mean(1)
        if torch.isfinite(change_2).all():
            yield MomentChange(at.step, layer.name, layer.number, before[layer.number].shape[1], *change_2.tolist())


def _moments(
    at: Snapshot, some: list[Layer], ahead: int, changed: dict[str, Tensor], buffers: dict[str, Tensor]
) -> dict[int, Tensor]:
    """By layer number: means and variances of its output's channels, (2, C) in float64."""
    moments: dict[int, Tensor] = {}

    def see(layer: Layer, place: str, values: Tensor) -> None:
        if place == "output":
            found = statistic(values, Size.DEVIATION, values.shape[1], None)
            moments[layer.number] = torch.stack([found.mean_C, found.square_C]).double()

    _watch(at, some, at.batch(ahead)[0], changed, buffers, see)
    return moments


def _sampled(at: Snapshot, numbers: tuple[int, ...]) -> Iterator[tuple[Layer, str, np.ndarray]]:
    """Values of these layers in float64, drawn with a generator that is a function of trial, step, layer and place.

    A layer whose values left the float32 numbers has none.
    """
    some = [layer for layer in layers(at.network) if layer.number in numbers]
    samples: list[tuple[Layer, str, np.ndarray]] = []

    def see(layer: Layer, place: str, values: Tensor) -> None:
        draws = torch.Generator().manual_seed(at.trial.seed_for(f"probe/{place}/{layer.number}/{at.step}"))
        if values.numel() > SAMPLE:
            chosen = torch.randint(values.numel(), (SAMPLE,), generator=draws).to(values.device)
            values = torch.take(values, chosen)
        samples.append((layer, place, values.flatten().double().cpu().numpy()))

    _watch(at, some, at.batch()[0], {}, None, see)
    yield from ((layer, place, sample) for layer, place, sample in samples if np.isfinite(sample).all())


@torch.no_grad()
def _watch(
    at: Snapshot,
    some: list[Layer],
    images_NCHW: Tensor,
    changed: dict[str, Tensor],
    buffers: dict[str, Tensor] | None,
    see: Callable[[Layer, str, Tensor], None],
) -> None:
    """One pass forward, and `see` gets the inputs and outputs of these layers as they come."""
    behind = {
        site.layer: at.network.get_submodule(site.name)
        for site in FAMILIES[at.trial.network].sites(at.trial.depth, at.trial.width, at.trial.facts.side)
        if not site.shortcut and not site.head
    }

    def entering(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: see(layer, "input", inputs[0])

    def leaving(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, output: see(layer, "output", output)

    handles = [layer.module.register_forward_pre_hook(entering(layer)) for layer in some]
    handles += [behind.get(layer.number, layer.module).register_forward_hook(leaving(layer)) for layer in some]
    try:
        at.forward(images_NCHW, changed, buffers)
    finally:
        for handle in handles:
            handle.remove()


def from_normal(standard: np.ndarray) -> float:
    """Kolmogorov's distance between standardised values and the standard normal distribution."""
    values, count = np.sort(standard), len(standard)
    normal = torch.special.ndtr(torch.from_numpy(values)).numpy()
    above = np.arange(1, count + 1) / count - normal
    return float(max(above.max(), (1 / count - above).max()))
