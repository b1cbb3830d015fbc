"""Scale and shift of every norm layer (Frankle et al. 2021, section 5)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnscale.probes.snapshot import Snapshot

DEAD = 0.01  # |gamma| below this counts as disabled (Frankle et al. 2021, section 5)


@dataclass(frozen=True)
class Gamma:
    """One norm layer at one step."""

    step: int  # updates taken
    layer: str  # module path, "blocks.143.norm2"
    layer_index: int  # 0 at the stem, growing towards the output
    channels: int
    gamma_dead: float  # share of channels with |gamma| < 0.01, in [0, 1]
    gamma_q05: float  # quantiles of |gamma| over the channels
    gamma_q25: float
    gamma_q50: float
    gamma_q75: float
    gamma_q95: float
    gamma_mean: float  # of gamma itself, with its sign
    gamma_sd: float
    gamma_gradient_rms: float  # root mean square over channels of dL/dgamma on the next batch; at the end, on the last
    beta_mean: float
    beta_sd: float
    beta_gradient_rms: float


@dataclass(frozen=True)
class Clamp:
    """Accuracy with every |gamma| < 0.01 set to 0, beside accuracy as trained."""

    step: int  # updates taken
    split: str
    images: int
    threshold: float
    clamped: float  # share of all gammas that were set to 0
    accuracy: float  # as trained, in [0, 1]
    accuracy_clamped: float


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


def gamma_histogram(at: Snapshot) -> Iterator[GammaHistogram]:
    """Distribution of |gamma| over the whole network (Frankle et al. 2021, section 5)."""
    values = torch.cat([norm.weight.detach().abs() for _, norm in at.norms]).float().cpu().double().numpy()
    counts, _ = np.histogram(values, HISTOGRAM)
    for low, high, channels in zip(HISTOGRAM, HISTOGRAM[1:], counts.tolist(), strict=False):
        yield GammaHistogram(at.step, low, high, channels, len(values))


def gamma(at: Snapshot) -> Iterator[Gamma]:
    """Frankle et al. 2021, section 5: BN-only training disables about a third of all features."""
    names = [f"{layer}.{kind}" for layer, _ in at.norms for kind in ("weight", "bias")]
    gradients = at.gradients(names)
    sizes = [norm.num_features for _, norm in at.norms]
    gammas = _by_layer([norm.weight for _, norm in at.norms], sizes)
    betas = _by_layer([norm.bias for _, norm in at.norms], sizes)
    gamma_gradients = _by_layer([gradients[f"{layer}.weight"] for layer, _ in at.norms], sizes)
    beta_gradients = _by_layer([gradients[f"{layer}.bias"] for layer, _ in at.norms], sizes)
    for index, (layer, norm) in enumerate(at.norms):
        gamma_C, beta_C = gammas[index], betas[index]
        q05, q25, q50, q75, q95 = map(float, np.quantile(abs(gamma_C), [0.05, 0.25, 0.5, 0.75, 0.95]))
        yield Gamma(
            at.step,
            layer,
            index,
            norm.num_features,
            float((abs(gamma_C) < DEAD).mean()),
            q05,
            q25,
            q50,
            q75,
            q95,
            float(gamma_C.mean()),
            float(gamma_C.std()),
            _rms(gamma_gradients[index]),
            float(beta_C.mean()),
            float(beta_C.std()),
            _rms(beta_gradients[index]),
        )


def clamp(at: Snapshot) -> Iterator[Clamp]:
    """Frankle et al. 2021, section 5: setting small gammas to 0 hardly changes the accuracy."""
    dead = {f"{layer}.weight": norm.weight.detach().abs() < DEAD for layer, norm in at.norms}
    changed = {
        f"{layer}.weight": norm.weight.detach().masked_fill(dead[f"{layer}.weight"], 0) for layer, norm in at.norms
    }
    share = float(torch.cat(list(dead.values())).double().mean())
    for split in at.data.parts:
        before, after = at.evaluate(split), at.evaluate(split, changed)
        yield Clamp(at.step, split, before.images, DEAD, share, before.accuracy, after.accuracy)


def _by_layer(tensors: list[Tensor], sizes: list[int]) -> list[np.ndarray]:
    """All layers in one transfer from the device: hundreds of small ones would each wait for it."""
    flat = torch.cat([t.detach().float() for t in tensors]).cpu().double().numpy()
    return np.split(flat, np.cumsum(sizes)[:-1])


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))
