"""Scale and shift of every norm layer (Frankle et al. 2021, section 5)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnscale.probes import probe
from bnscale.probes.probe import asks, gamma_or_beta
from bnscale.probes.snapshot import Snapshot

DEAD = 0.01  # |gamma| below this counts as disabled (Frankle et al. 2021, section 5)


@dataclass(frozen=True)
class Gamma:
    """One norm layer at one step."""

    step: int  # updates taken
    layer: str  # module path, "blocks.143.norm2"
    layer_index: int  # 0 at the stem, growing towards the output
    channels: int
    # Null where a layer has no gamma, or no beta.
    gamma_dead: float | None  # share of channels with |gamma| < 0.01, in [0, 1]
    gamma_q05: float | None  # quantiles of |gamma| over the channels
    gamma_q25: float | None
    gamma_q50: float | None
    gamma_q75: float | None
    gamma_q95: float | None
    gamma_mean: float | None  # of gamma itself, with its sign
    gamma_sd: float | None
    # Root mean square over channels of dL/dgamma on the next batch.
    gamma_gradient_rms: float | None
    beta_mean: float | None
    beta_sd: float | None
    beta_gradient_rms: float | None


@dataclass(frozen=True)
class Clamp:
    """Accuracy with every |gamma| < 0.01 set to 0, beside accuracy as trained."""

    step: int  # updates taken
    split: str
    images: int
    threshold: float
    clamped: float  # share of all gammas that were set to 0
    accuracy: float | None  # as trained, in [0, 1]; null for a regression
    accuracy_clamped: float | None


@dataclass(frozen=True)
class GammaHistogram:
    """One interval of |gamma| at one step, over all norm layers."""

    step: int  # updates taken
    low: float  # |gamma| from here
    high: float  # to below here
    channels: int  # gammas in the interval
    all_channels: int  # gammas in the network


HISTOGRAM = [*(round(0.05 * i, 2) for i in range(41)), float("inf")]
"""Bounds of the intervals: 0, 0.05, ... 2, and everything above."""


@asks(probe.gamma, rows=lambda trial: len(HISTOGRAM) - 1)
def gamma_histogram(at: Snapshot) -> Iterator[GammaHistogram]:
    """Distribution of |gamma| over the whole network (Frankle et al. 2021, section 5); nothing where there is none."""
    gammas = _gammas(at)
    if not gammas:
        return
    values = torch.cat([gamma_C.abs() for gamma_C in gammas.values()]).float().cpu().double().numpy()
    counts, _ = np.histogram(values, HISTOGRAM)
    for low, high, channels in zip(HISTOGRAM, HISTOGRAM[1:], counts.tolist(), strict=False):
        yield GammaHistogram(at.step, low, high, channels, len(values))


@asks(gamma_or_beta, steps=1, rows=lambda trial: len(trial.norms))
def gamma(at: Snapshot) -> Iterator[Gamma]:
    """Frankle et al. 2021, section 5: BN-only training disables about a third of all features."""
    parts = {
        f"{layer}.{own}": part
        for layer, norm in at.norms
        for own, part in (("weight", norm.weight), ("bias", norm.bias))
        if part is not None
    }
    if not parts:
        return
    values, gradients = _numbers(parts), _numbers(at.gradients(list(parts)))
    for index, (layer, norm) in enumerate(at.norms):
        yield Gamma(
            at.step,
            layer,
            index,
            norm.channels,
            *_of_gamma(values.get(f"{layer}.weight"), gradients.get(f"{layer}.weight")),
            *_of_beta(values.get(f"{layer}.bias"), gradients.get(f"{layer}.bias")),
        )


def _of_gamma(gamma_C: np.ndarray | None, gradient_C: np.ndarray | None) -> list[float | None]:
    if gamma_C is None or gradient_C is None:
        return [None] * 9
    quantiles = map(float, np.quantile(abs(gamma_C), [0.05, 0.25, 0.5, 0.75, 0.95]))
    dead = float((abs(gamma_C) < DEAD).mean())
    return [dead, *quantiles, float(gamma_C.mean()), float(gamma_C.std()), _rms(gradient_C)]


def _of_beta(beta_C: np.ndarray | None, gradient_C: np.ndarray | None) -> list[float | None]:
    if beta_C is None or gradient_C is None:
        return [None] * 3
    return [float(beta_C.mean()), float(beta_C.std()), _rms(gradient_C)]


@asks(probe.gamma, evaluations=2)
def clamp(at: Snapshot) -> Iterator[Clamp]:
    """Frankle et al. 2021, section 5: setting small gammas to 0 hardly changes the accuracy."""
    gammas = _gammas(at)
    if not gammas:
        return
    dead = {name: gamma_C.abs() < DEAD for name, gamma_C in gammas.items()}
    changed = {name: gamma_C.masked_fill(dead[name], 0) for name, gamma_C in gammas.items()}
    share = float(torch.cat(list(dead.values())).double().mean())
    for split in at.data.parts:
        before, after = at.evaluate(split, {}), at.evaluate(split, changed)  # by the same operations
        yield Clamp(at.step, split, before.images, DEAD, share, before.accuracy, after.accuracy)


def _gammas(at: Snapshot) -> dict[str, Tensor]:
    """By parameter name, of the layers that have one."""
    return {f"{layer}.weight": norm.weight.detach() for layer, norm in at.norms if norm.weight is not None}


def _numbers(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """All in one transfer from the device: hundreds of small ones would each wait for it."""
    flat = torch.cat([t.detach().float() for t in tensors.values()]).cpu().double().numpy()
    ends = np.cumsum([t.numel() for t in tensors.values()])[:-1]
    return dict(zip(tensors, np.split(flat, ends), strict=True))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))
