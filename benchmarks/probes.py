"""What a reading costs: every probe of the project as a multiple of a training step.

    python benchmarks/probes.py                           three networks; a quarter of an hour or more on 2 cores
    python benchmarks/probes.py --network vgg --turns 5   one of them

ResNet-110 (Bjorck et al. 2018) and VGG-16 of 64 to 512 channels (Santurkar et al. 2018) on random images of 32 by 32,
batch 128; and 25 matrices of 10 by 10 on 1,000 Gaussian vectors (Santurkar et al. 2018). Batch norm, all parameters
trained, fp32. Steps and readings take turns in one process, and each ratio is to the step of the same turn. A reading
stands alone here; in a training, probes that need the same gradient share it. What costs 15 steps or more is read once,
in the first turn. `curve` and `clamp` evaluate every part of the data: here 1,000 images, or the 1,000 vectors.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from norms import Loop
from step import CPU, machine, recipes, spread
from torch import Tensor

from bnscale.anatomy import FAMILIES
from bnscale.data import Resident
from bnscale.engine.machine import keep_freed_memory
from bnscale.probes import (
    TABLES,
    Probe,
    Snapshot,
    activation_histogram,
    activations,
    at_layers,
    at_multiples,
    batch_curve,
    channel_moments,
    clamp,
    class_bias,
    covariate_shift,
    curve,
    demand,
    descent,
    gamma,
    gamma_histogram,
    gamma_scaling,
    gradient,
    gradient_bound,
    gradient_histogram,
    gradient_matrix,
    gradient_noise,
    landscape,
    loss_along_gradient,
    loss_along_mean_gradient,
    mean_gradient,
    moment_change,
    moments_along_gradient,
    norm_gradient,
    parameter_gradient,
    sparsity,
    spectrum,
    spectrum_histogram,
    timing,
    weight_scaling,
)
from bnscale.trial import Network, NormInit, Pixels, Trainable, Trial

BATCH = 128
IMAGES = 1000
DEAR = 15  # steps from which on one reading must do
SIZES: dict[str, dict[str, Any]] = {
    "resnet": recipes.FRANKLE_CIFAR | {"depth": 110, "norm_init": NormInit.ONES, "momentum": 0.0, "weight_decay": 0.0},
    "vgg": recipes.SANTURKAR_VGG,
    "linear": recipes.SANTURKAR_LINEAR,
}


def probes(trial: Trial) -> list[Probe]:
    """All that the trial can serve, at the layers and step sizes of the papers' figures."""
    early, middle, late, few = {
        Network.RESNET: (8, 55, 80, (55,)),
        Network.VGG: (2, 9, 13, (5, 10)),
        Network.LINEAR: (2, 9, 17, (9, 17)),
    }[trial.network]
    multiples = (0.01, 0.1, 1, 10, 31.6) if trial.network is Network.LINEAR else (0.5, 1, 2, 4)
    every: list[Probe] = [
        curve,
        batch_curve,
        gamma,
        gamma_histogram,
        clamp,
        sparsity,
        channel_moments,
        class_bias,
        at_layers(activations, early, late),
        at_layers(activation_histogram, early, late),
        at_layers(moment_change, early, middle, late),
        gradient,
        at_layers(gradient_histogram, middle),
        at_layers(gradient_matrix, middle),
        parameter_gradient,
        mean_gradient,
        gradient_noise,
        loss_along_gradient,
        loss_along_mean_gradient,
        at_layers(moments_along_gradient, early, middle, late),
        at_multiples(landscape, *multiples),
        at_layers(covariate_shift, *few),
        gradient_bound,
        norm_gradient,
        at_multiples(descent, 0.5, 1, 2, 4),
        weight_scaling,
        gamma_scaling,
        spectrum,
        spectrum_histogram,
        timing,
    ]
    assert {probe.__name__ for probe in every} == set(TABLES)
    return [probe for probe in every if demand(probe).lacks(trial) is None]


class Random(Resident):
    """As many images or vectors as the probes look at; no data set is read."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.device = trial, CPU
        facts, draws = trial.facts, torch.Generator().manual_seed(0)
        shape = (IMAGES, facts.channels, facts.side, facts.side)
        self._images = torch.randn(shape, generator=draws).contiguous(memory_format=torch.channels_last)
        if facts.regression:
            self._targets = torch.randn(IMAGES, facts.classes, generator=draws)
        else:
            self._targets = torch.randint(facts.classes, (IMAGES,), generator=draws)

    @property
    def parts(self) -> list[str]:
        return ["test"]

    def batch(self, step: int, share: slice = slice(None)) -> tuple[Tensor, Tensor]:
        size = self.trial.batch
        place = slice(step % (IMAGES // size) * size, (step % (IMAGES // size) + 1) * size)
        return self._images[place][share], self._targets[place][share]

    def batches(self, part: str, size: int, share: slice = slice(None)) -> Any:
        yield from zip(self._images.split(size)[share], self._targets.split(size)[share], strict=True)


def reading(probe: Probe, loop: Loop, clock: Callable[[], float]) -> float:
    """Seconds of one."""
    at = Snapshot(loop.trial, 0, loop.engine, Random(loop.trial))
    start = clock()
    rows = list(probe(at))
    assert rows, probe.__name__
    return clock() - start


def measure(name: str, turns: int, clock: Callable[[], float]) -> None:
    asked = {"pixels": Pixels.ORIGINAL, "validation": 0, "trainable": Trainable.ALL, "lr": 1e-12, "seed": 0}
    trial = Trial(**(SIZES[name] | asked))
    loop = Loop(trial, *Random(trial).batch(0))
    loop.step()
    measured = probes(trial)
    steps: list[float] = []
    taken: list[dict[Probe, float]] = []
    for turn in range(turns):
        steps.append(loop.step(clock))
        now = [probe for probe in measured if turn == 0 or demand(probe).steps(trial) < DEAR]
        taken.append({probe: reading(probe, loop, clock) for probe in now})

    title = FAMILIES[trial.network].title
    size = f"depth {trial.depth}, width {trial.width}, batch {trial.batch}"
    print(f"\na reading of the {title} of {size}, fp32, random data: medians of {turns} turns (dear ones once),")
    print(f"in training steps of {median(steps):.3g} s (min-max); forecast: what a plan reckons with")
    print(f"{'probe':>24}  {'seconds':>7}  {'steps':20}  {'forecast':>8}")
    for probe in measured:
        ratio = spread([own[probe] / step for own, step in zip(taken, steps, strict=True) if probe in own])
        seconds = median(own[probe] for own in taken if probe in own)
        own = demand(probe)
        said = (
            f"{own.steps(trial):8.1f}"
            if not own.evaluations
            else f"{own.evaluations:g} evaluation{'s'[own.evaluations == 1 :]}"
        )
        print(f"{probe.__name__:>24}  {seconds:7.3f}  {ratio:20}  {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(SIZES), help="one of them (default: all three)")
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
    for name in [given.network] if given.network else SIZES:
        measure(name, given.turns, clock)


if __name__ == "__main__":
    main()
