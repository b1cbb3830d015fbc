"""The limit of the machine: how fast it copies and multiplies, and how long a BN-only training step must take by that.

    python benchmarks/limit.py                                  this CPU, all cores; CIFAR ResNet-20 and -110
    python benchmarks/limit.py --device cuda --members 1 16     this GPU

What a machine does at best is measured: bytes read and written a second by a copy and by a triad (a = b + s * c), at
sizes from 2 MiB up to 1 GiB, and operations a second (a multiply-add is two) by a large product of matrices and a
large 3x3 convolution, in fp32 as convolutions may compute it here (TF32 on a GPU, where torch allows it) and in bf16.
An operation is held to the best bandwidth at its own size or a larger one, so that one whose maps stay in a cache is
held to the cache.

What a step must do is counted from the network, operation by operation, each at the larger of operations / rate and
bytes / bandwidth; the limit is their sum. It is a bound for anybody who computes layer by layer, and no wish: an
operation reads each map that it needs once and writes each that it makes once, whatever it fuses, and between two
operations maps go through memory. Weights, gammas, betas, statistics and the sums behind them are counted where they
are read or written as a whole; a convolution's nine looks at a pixel are one read: lines of a map stay in a cache.

  forward   convolution: its input and weights, its output. Norm: one pass over the convolution's output for the
            statistics; one that normalises, adds the shortcut where a block ends, rectifies, and writes what is next.
            A norm on the shortcut is applied by that same pass. The pooling reads, the last layer is counted whole.
  backward  norm: one pass for the sums over gradient and input (the mask of relu follows from the input); one that
            reads both again and writes the input's gradient. Where a block ends the first pass also adds the two
            gradients that meet there, takes relu's mask from the block's output, and writes the sum, which is the
            shortcut's too. Convolution: the gradient of the input from that of the output, the same operations once
            more; none for the first layer, below which nothing trains. No gradient of a weight.
  update    gamma, beta, their gradients and momentum, read and written once in float32.

K trials of one seed have all maps K times and all weights once; the first convolution and its norm's statistics once.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import table
import torch
import torch.nn.functional as F
from step import recipes
from torch import Tensor, nn

from bnscale.engine.machine import device_name
from bnscale.networks import build
from bnscale.networks.resnet import Block, ResNet
from bnscale.trial import Network, Norm, Pixels, Precision, Refusal, Trainable, Trial

FLOAT = 4  # bytes
TYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    sizes: tuple[int, ...]  # bytes read and written by one copy
    side: int  # of square matrices
    images: int  # of 32 by 32 pixels and 256 channels, under the convolution
    seconds: float  # that each measurement repeats itself for


def effort(device: torch.device, *, quick: bool) -> Effort:
    """What tells a device's best from its overheads; or next to nothing, for a rehearsal."""
    if quick:
        return Effort((2**21, 2**23), 256, 1, 0.01)
    sizes = tuple(2**power for power in (21, 23, 25, 27, 29, 30))
    return Effort(sizes, 8192, 256, 0.2) if device.type == "cuda" else Effort(sizes, 1024, 16, 0.2)


@dataclass(frozen=True)
class Machine:
    """What a device does at best, with the threads it was given."""

    name: str
    bandwidths: dict[int, float]  # bytes read and written a second, by how many there were
    rates: dict[Precision, float]  # operations a second
    parts: dict[str, float]  # the measurements behind both, in GB/s and GFLOP/s

    def bandwidth(self, footprint: float) -> float:
        """The best at this many bytes or more."""
        return max(each for size, each in self.bandwidths.items() if size >= min(footprint, max(self.bandwidths)))

    def or_better(self, again: "Machine") -> "Machine":
        """The best of two measurements: what else a machine did meanwhile only makes one slower."""
        return Machine(
            self.name,
            {size: max(rate, again.bandwidths[size]) for size, rate in self.bandwidths.items()},
            {precision: max(rate, again.rates[precision]) for precision, rate in self.rates.items()},
            {name: max(rate, again.parts[name]) for name, rate in self.parts.items()},
        )


@dataclass(frozen=True)
class Limit:
    """The least that a training step takes."""

    seconds: float
    flops: float
    bytes: float
    bound: float  # share of the seconds in which bytes, not operations, are what is waited for


@dataclass(frozen=True)
class Operation:
    """One that nobody can split: what it computes, and values that it reads or writes once each."""

    flops: float
    maps: float  # values of maps: of the precision's width
    fixed: float = 0.0  # values of float32


# --- the machine --------------------------------------------------------------------------------


def measured(device: torch.device, threads: int, effort: Effort) -> Machine:
    """Takes some seconds. `threads` says how many torch uses."""
    assert threads == torch.get_num_threads(), "what is measured is what computes"
    bandwidths: dict[int, float] = {}
    parts: dict[str, float] = {}
    for size in effort.sizes:
        rates = {"copy": _copy(device, size, effort), "triad": _triad(device, size, effort)}
        bandwidths[size] = max(rates.values())
        for name, rate in rates.items():
            parts[f"{name} {size // 2**20} MiB GB/s"] = rate / 1e9
    rates_of: dict[Precision, float] = {}
    for precision, kind in TYPES.items():
        found = {
            "matrices": _matrices(device, kind, effort),
            "convolution": _convolution(device, kind, effort),
        }
        rates_of[precision] = max(found.values())
        for name, rate in found.items():
            parts[f"{name} {precision} GFLOP/s"] = rate / 1e9
    return Machine(device_name(device), bandwidths, rates_of, parts)


def _copy(device: torch.device, size: int, effort: Effort) -> float:
    source, target = (torch.ones(max(1, size // 2 // FLOAT), device=device) for _ in range(2))
    return size / _seconds(lambda: target.copy_(source), device, effort)


def _triad(device: torch.device, size: int, effort: Effort) -> float:
    b, c, a = (torch.ones(max(1, size // 3 // FLOAT), device=device) for _ in range(3))
    return 3 * a.numel() * FLOAT / _seconds(lambda: torch.add(b, c, alpha=3.0, out=a), device, effort)


def _matrices(device: torch.device, kind: torch.dtype, effort: Effort) -> float:
    """With TF32 where convolutions may use it: what the units can do is the limit."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        side = effort.side
        a, b, c = (torch.ones(side, side, device=device, dtype=kind) for _ in range(3))
        return 2.0 * side**3 / _seconds(lambda: torch.mm(a, b, out=c), device, effort)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@torch.no_grad()
def _convolution(device: torch.device, kind: torch.dtype, effort: Effort) -> float:
    images, channels, side = effort.images, 256, 32
    last = torch.channels_last
    x_NCHW = torch.ones(images, channels, side, side, device=device, dtype=kind).contiguous(memory_format=last)
    weight = torch.ones(channels, channels, 3, 3, device=device, dtype=kind).contiguous(memory_format=last)
    flops = 2.0 * images * side**2 * channels**2 * 9
    return flops / _seconds(lambda: F.conv2d(x_NCHW, weight, padding=1), device, effort)


def _seconds(call: Callable[[], Tensor], device: torch.device, effort: Effort) -> float:
    """Of one call, the best of several rows of them. A GPU replays a row from a graph: launches are not its limit."""
    if device.type == "cpu":
        call()
        best = math.inf
        until = time.perf_counter() + effort.seconds
        while time.perf_counter() < until or best == math.inf:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        return max(best, 1e-9)
    many = 10
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):  # torch's own recipe: warm up on another stream, then capture
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(many):
            call()
    graph.replay()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize(device)
    rows = max(1, min(1000, int(effort.seconds / max(time.perf_counter() - start, 1e-6))))
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(rows):
            graph.replay()
        torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - start) / rows / many)
    return max(best, 1e-9)


# --- the step -----------------------------------------------------------------------------------


def limit(trial: Trial, members: int, of: Machine) -> Limit:
    """Of a step of so many trials in one pass. Raises Refusal for one that it cannot count."""
    width = 2 if trial.precision is Precision.BF16 else FLOAT
    seconds = flops = size = waited = 0.0
    for operation in operations(trial, members):
        moved = operation.maps * width + operation.fixed * FLOAT
        compute, memory = operation.flops / of.rates[trial.precision], moved / of.bandwidth(moved)
        seconds += max(compute, memory)
        waited += memory if memory > compute else 0.0
        flops, size = flops + operation.flops, size + moved
    return Limit(seconds, flops, size, waited / seconds)


@lru_cache(maxsize=64)
def operations(trial: Trial, members: int) -> tuple[Operation, ...]:
    """What a step does, in the order of its forward pass and back."""
    if trial.network is not Network.RESNET or trial.norm is not Norm.BATCH or trial.trainable is not Trainable.BN:
        raise Refusal(
            f"network {trial.network}, norm {trial.norm}, trainable {trial.trainable}: what its step moves is not "
            f"counted; use resnet, batch and bn"
        )
    with torch.device("meta"):
        network = build(trial)
    assert isinstance(network, ResNet)
    side, batch = trial.facts.side, trial.batch
    all_images = members * batch
    found: list[Operation] = []

    def convolve(layer: nn.Module, side: int, *, first: bool = False) -> tuple[float, int]:
        """Values of the output of all trials, and its side."""
        assert isinstance(layer, nn.Conv2d)
        after = (side - 1) // layer.stride[0] + 1
        images = batch if first else all_images
        moved = images * (layer.in_channels * side**2 + layer.out_channels * after**2)
        weights = layer.weight.numel()
        once = Operation(2.0 * images * after**2 * weights, moved, weights)
        found.extend([once] if first else [once, once])  # forward, and back to the input
        return all_images * layer.out_channels * after**2, after

    values, side = convolve(network.conv, side, first=True)
    shared = values / members
    found.append(Operation(0, shared))  # statistics
    found.append(Operation(0, shared + values))  # x, what is next
    found.append(Operation(0, 2 * values + shared))  # two gradients, x: sums
    for number, block in enumerate(network.blocks, start=1):
        assert isinstance(block, Block)
        middle, inner = convolve(block.conv1, side)
        found.append(Operation(0, middle))  # statistics
        found.append(Operation(0, 2 * middle))  # x, what is next
        found.append(Operation(0, 2 * middle))  # gradient, x: sums
        found.append(Operation(0, 3 * middle))  # gradient, x, gradient of x
        end, inner = convolve(block.conv2, inner)
        found.append(Operation(0, end))  # statistics of norm2
        if isinstance(block.shortcut, nn.Sequential):
            convolve(block.shortcut[0], side)
            found.append(Operation(0, end))  # statistics of the shortcut's norm
            found.append(Operation(0, 2 * end))  # g and s once more: its sums
            found.append(Operation(0, 3 * end))  # g, s, gradient of s
        found.append(Operation(0, 3 * end))  # x, shortcut, what is next
        arriving = 1 if number == len(network.blocks) else 2
        found.append(Operation(0, (3 + arriving) * end))  # gradients, output, x, the gradients' sum: sums
        found.append(Operation(0, 3 * end))  # sum, x, gradient of x
        values, side = end, inner
    assert isinstance(network.output, nn.Linear)
    weights = network.output.weight.numel()
    vectors = all_images * (network.output.in_features + network.output.out_features)
    found.append(Operation(0, values + all_images * network.output.in_features))  # pooling, forward and back
    found.append(Operation(0, values + all_images * network.output.in_features))
    found.extend([Operation(2.0 * all_images * weights, vectors, weights)] * 2)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    found.append(Operation(0, 0, 5.0 * members * trained))  # value, momentum, gradient; value, momentum
    return tuple(found)


def trial(depth: int, batch: int, precision: Precision, lr: float = 0.1) -> Trial:
    """BatchNorm alone on CIFAR-10, as Frankle et al. train it."""
    size = {"depth": depth, "batch": batch, "norm_batch": batch, "precision": precision}
    kind = {"pixels": Pixels.ORIGINAL, "validation": 0, "trainable": Trainable.BN, "lr": lr, "seed": 0}
    return Trial(**(recipes.FRANKLE_CIFAR | size | kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table.asked(parser)
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 110], help="layers (default: 20 110)")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 16], help="trials in one pass (default: 1 16)")
    parser.add_argument("--batch", type=int, default=128, help="images of each trial (default: 128)")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    print(table.told(given.device))
    here = measured(given.device, torch.get_num_threads(), effort(given.device, quick=given.quick))
    for name, rate in here.parts.items():
        what, unit = name.rsplit(" ", 1)
        print(f"         {what:22} {rate:10.1f} {unit}")
    lines = table.Table(
        "limit",
        [
            table.Column("depth", "5d"),
            table.Column("trials", "6d"),
            table.Column("precision", "9s"),
            table.Column("GFLOP", "9.1f"),
            table.Column("GB moved", "9.2f"),
            table.Column("ms", "9.2f", compared=True),
            table.Column("% waits for memory", "4.0f"),
        ],
        ("depth", "trials", "precision"),
        given.device,
        f"the least that a BN-only step of CIFAR ResNets takes, batch {given.batch}",
    )
    for depth in given.depth:
        for members in given.members:
            for precision in TYPES:
                least = limit(trial(depth, given.batch, precision), members, here)
                lines.line(
                    {
                        "depth": depth,
                        "trials": members,
                        "precision": precision,
                        "GFLOP": least.flops / 1e9,
                        "GB moved": least.bytes / 1e9,
                        "ms": 1000 * least.seconds,
                        "% waits for memory": 100 * least.bound,
                        "machine": here.parts,
                    }
                )
    lines.save(given.out)


if __name__ == "__main__":
    main()
