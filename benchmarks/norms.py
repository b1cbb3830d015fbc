"""What a norm costs: the time of a training step with each of them, as a ratio to native batch norm.

    python benchmarks/norms.py                            all parameters train; about 2 minutes on 2 cores
    python benchmarks/norms.py --trainable bn             gamma and beta alone; as long

CIFAR ResNet-56, batch 128, fp32, on random images and without loading or augmentation, so that what differs is the
norm. The networks stand in one process and take turns of one step, and each ratio is to native batch norm of the same
turn. Memory is what a step takes at its peak beyond the process at rest, give or take what the allocator keeps.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from step import CPU, machine, recipes, spread
from torch import Tensor

from bnscale.engine import Gang
from bnscale.engine.local import LocalEngine
from bnscale.engine.machine import forget_peak, keep_freed_memory, peak_memory, release_memory
from bnscale.networks import build
from bnscale.trial import Norm, NormInit, Pixels, Trainable, Trial

DEPTH = 56
BATCH = 128


def trial(norm: Norm, trainable: Trainable) -> Trial:
    """At a rate that changes next to nothing: a network without a norm would leave the real numbers."""
    size = {"depth": DEPTH, "batch": BATCH, "norm_batch": BATCH, "pixels": Pixels.ORIGINAL, "validation": 0}
    asked = {"norm": norm, "norm_init": NormInit.ONES, "trainable": trainable, "lr": 1e-12, "seed": 0}
    return Trial(**(recipes.FRANKLE_CIFAR | size | asked | {"groups": 8} | RENORM))


RENORM = {
    "renorm_r": 3.0,
    "renorm_d": 5.0,
    "renorm_start": 0.0,
    "renorm_r_end": 0.0,
    "renorm_d_end": 0.0,
}  # at work from the first step


class Loop:
    """One network in training, always on the same images."""

    def __init__(self, of: Trial, images_NCHW: Tensor, labels_N: Tensor) -> None:
        self.trial, self.batch = of, (images_NCHW, labels_N)
        self.engine = LocalEngine(build(of), of, Gang(device=CPU), None)

    def step(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Seconds of one update."""
        start = clock()
        loss = self.engine(*self.batch)
        self.engine.backward(loss)
        self.engine.step(self.trial.lr)
        assert torch.isfinite(loss), self.trial.id
        return clock() - start

    def memory(self) -> float:
        """MiB that a step takes at its peak, beyond the process at rest; NaN outside of Linux."""
        release_memory()
        forget_peak(CPU)
        rest = peak_memory(CPU)
        self.step()
        peak = peak_memory(CPU)
        return float("nan") if rest is None or peak is None else (peak - rest) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trainable",
        type=Trainable,
        choices=[Trainable.ALL, Trainable.BN],
        default=Trainable.ALL,
        help="all, or bn: gamma and beta, without the norms that have none (default: all)",
    )
    parser.add_argument(
        "--norm", type=Norm, choices=list(Norm), nargs="+", default=list(Norm), help="beside batch (default: every one)"
    )
    parser.add_argument("--turns", type=int, default=7, help="steps of each network (default: 7)")
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

    norms = [n for n in Norm if n in (Norm.BATCH, *given.norm)]
    if given.trainable is Trainable.BN:
        norms = [n for n in norms if not n.parameterless]
    draws = torch.Generator().manual_seed(0)
    images_NCHW = torch.randn(BATCH, 3, 32, 32, generator=draws).contiguous(memory_format=torch.channels_last)
    labels_N = torch.randint(10, (BATCH,), generator=draws)
    loops = {norm: Loop(trial(norm, given.trainable), images_NCHW, labels_N) for norm in norms}
    memory = {norm: loop.memory() for norm, loop in loops.items()}
    for loop in loops.values():
        loop.step()  # memory that was handed back for the measurement is taken again
    turns = [{norm: loop.step(clock) for norm, loop in loops.items()} for _ in range(given.turns)]

    print(
        f"one step of ResNet-{DEPTH}, batch {BATCH}, fp32, random images, trainable {given.trainable}; "
        f"medians of {given.turns} turns, ratios to batch (min-max)"
    )
    print(f"{'norm':>8}  {'seconds':>7}  {'ratio':18}  {'MiB':>6}")
    for norm in norms:
        ratio = spread([turn[norm] / turn[Norm.BATCH] for turn in turns])
        print(f"{norm:>8}  {median(turn[norm] for turn in turns):7.3f}  {ratio:18}  {memory[norm]:6.0f}")


if __name__ == "__main__":
    main()
