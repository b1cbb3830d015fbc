"""What a reading costs: each probe of the project as a multiple of a training step.

    python benchmarks/probes.py                           ResNet-110, batch 128; about 3 minutes on 2 cores
    python benchmarks/probes.py --depth 20 --turns 5

CIFAR ResNet with batch norm, all parameters trained, fp32, on random images: steps and readings take turns in one
process, and each ratio is to the step of the same turn. A reading stands alone here; in a training, probes that need
the same gradient share it. Not among them: `curve` and `clamp`, which evaluate whole data sets, and what only deep
linear networks have.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from norms import Loop
from step import CPU, FRANKLE_CIFAR, machine, spread
from torch import Tensor

from bnscale.data import Resident
from bnscale.engine.machine import keep_freed_memory
from bnscale.probes import (
    Probe,
    Snapshot,
    at_layers,
    channel_moments,
    class_bias,
    demand,
    gamma,
    gamma_histogram,
    gradient,
    gradient_histogram,
    gradient_matrix,
    gradient_noise,
    loss_along_gradient,
    loss_along_mean_gradient,
    mean_gradient,
    moments_along_gradient,
    sparsity,
)
from bnscale.trial import NormInit, Pixels, Trainable, Trial

BATCH = 128


def probes(depth: int) -> list[Probe]:
    early, middle, late = (max(1, depth * part // 110) for part in (8, 55, 80))
    return [
        gamma,
        gamma_histogram,
        sparsity,
        channel_moments,
        class_bias,
        gradient,
        at_layers(gradient_histogram, middle),
        at_layers(gradient_matrix, middle),
        mean_gradient,
        gradient_noise,
        loss_along_gradient,
        loss_along_mean_gradient,
        at_layers(moments_along_gradient, early, middle, late),
    ]


class RandomImages(Resident):
    """As many as the probes look at; no data set is read."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.device = trial, CPU
        draws = torch.Generator().manual_seed(0)
        self._images = torch.randn(1000, 3, 32, 32, generator=draws).contiguous(memory_format=torch.channels_last)
        self._labels = torch.randint(10, (1000,), generator=draws)

    def batch(self, step: int, share: slice = slice(None)) -> tuple[Tensor, Tensor]:
        place = slice(step * BATCH % 896, step * BATCH % 896 + BATCH)
        return self._images[place][share], self._labels[place][share]

    def batches(self, part: str, size: int, share: slice = slice(None)) -> Any:
        yield from zip(self._images.split(size)[share], self._labels.split(size)[share], strict=True)


def reading(probe: Probe, loop: Loop, clock: Callable[[], float]) -> float:
    """Seconds of one."""
    at = Snapshot(loop.trial, 0, loop.engine, RandomImages(loop.trial))
    start = clock()
    rows = list(probe(at))
    assert rows, probe.__name__
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=110, help="layers (default: 110)")
    parser.add_argument("--turns", type=int, default=3, help="readings of each probe (default: 3)")
    parser.add_argument("--threads", type=int, help="cores that torch uses (default: all)")
    parser.add_argument(
        "--shared", action="store_true", help="on a shared machine: processor time of one thread, not time on the wall"
    )
    given = parser.parse_args()
    threads, clock = (1, time.process_time) if given.shared else (given.threads, time.perf_counter)
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    print(machine())
    if given.shared:
        print("clock    processor time of one thread")

    size = {"depth": given.depth, "batch": BATCH, "norm_batch": BATCH, "pixels": Pixels.ORIGINAL, "validation": 0}
    asked = {"norm_init": NormInit.ONES, "trainable": Trainable.ALL, "lr": 1e-12, "seed": 0}
    trial = Trial(**(FRANKLE_CIFAR | size | asked))
    loop = Loop(trial, *RandomImages(trial).batch(0))
    loop.step()
    measured = probes(given.depth)
    steps: list[float] = []
    turns: list[dict[Probe, float]] = []
    for _ in range(given.turns):
        steps.append(loop.step(clock))
        turns.append({probe: reading(probe, loop, clock) for probe in measured})

    print(
        f"a reading of ResNet-{given.depth}, batch {BATCH}, fp32, random images; medians of {given.turns} turns, "
        f"in training steps of {median(steps):.2f} s (min-max); forecast: what a plan reckons with"
    )
    print(f"{'probe':>24}  {'seconds':>7}  {'steps':20}  {'forecast':>8}")
    for probe in measured:
        ratio = spread([turn[probe] / step for turn, step in zip(turns, steps, strict=True)])
        seconds = median(turn[probe] for turn in turns)
        print(f"{probe.__name__:>24}  {seconds:7.2f}  {ratio:20}  {demand(probe).steps:8.1f}")


if __name__ == "__main__":
    main()
