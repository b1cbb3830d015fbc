"""What a trial will cost, before it runs: seconds, memory, disk.

Operations and saved activations are counted, not guessed: the training step runs once on fake tensors,
which have shapes and no storage. Seconds come from a timed step of a small network of the same shape on
the machine at hand. Where a network's costs are affine in the number of its blocks, deep ones are
extrapolated from two shallow ones, exactly in operations and bytes.
"""

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bnscale.anatomy import placed
from bnscale.data import blank
from bnscale.engine import Gang
from bnscale.engine.cohort import CohortEngine
from bnscale.engine.local import LocalEngine
from bnscale.engine.machine import release_gpu, release_memory
from bnscale.engine.objective import Objective
from bnscale.networks import build, trained
from bnscale.networks.native import imagined
from bnscale.networks.norm import fuse
from bnscale.probes import TABLES, Cadence, Probe, demand
from bnscale.score import batch_of
from bnscale.trial import Network, NormInit, OutputBias, Placement, Refusal, Trainable, Trial, WeightInit

FLOAT = 4  # bytes
MAPS = 4  # of the largest, that live at once beside what is kept
SEVERAL = 4  # members of the cohort whose step is timed
STEPS = 4  # that are timed at least
ENOUGH = 0.1  # seconds of steps that are timed, where ten times as many do not take longer


@dataclass(frozen=True)
class Forecast:
    """Of one trial, or of several that are trained in one pass."""

    seconds: float  # of one worker, alone on its cores or its GPU
    memory: int  # bytes of main memory of one worker at its peak
    on_gpu: int  # bytes of GPU memory of one worker at its peak; 0 without a GPU
    disk: int  # bytes when it has finished


@dataclass(frozen=True)
class Work:
    """Counted on one training step."""

    flops: float  # forward and backward, a multiply-add as two
    forward: float  # flops of the forward pass
    saved: float  # bytes kept for the backward pass
    fused: float  # bytes kept where norms are computed with what follows, as on a CPU
    parameters: float
    trained: float
    buffers: float  # values in running statistics
    norms: float  # norm layers

    def extrapolated(self, deeper: "Work", steps: float) -> "Work":
        """This plus `steps` times what `deeper` has more."""
        ours = ((getattr(self, f.name), getattr(deeper, f.name)) for f in fields(self))
        return Work(*(a + steps * (b - a) for a, b in ours))


def work(trial: Trial) -> Work:
    """Operations, bytes and parameters of one training step of the whole batch."""
    shallow, deeper = _ladder(trial)
    if shallow == deeper:
        return _counted(_shape(trial))
    below, above = (_counted(_shape(trial, depth=depth)) for depth in (shallow, deeper))
    return below.extrapolated(above, (trial.depth - shallow) / (deeper - shallow))


def _ladder(trial: Trial) -> tuple[int, int]:
    """Two depths from which this one's costs follow exactly, or twice its own where they follow from no others.

    Networks of 6n+2 layers grow by a block of two layers in each of three stages. Where norms stand after every k-th
    layer, their number grows evenly from n to n+k and not in between.
    """
    every = [int(place.rpartition("_")[2]) for place in (trial.placement, trial.affine_at) if place in _EVERY_KTH]
    first = math.lcm(*every)  # the first layer with gamma and beta, where the backward pass may end
    if trial.network is Network.LINEAR:
        start, period = max(2, first + 1), 1
    elif trial.network in (Network.RESNET, Network.VGG_RESIDUAL):
        start, period = 2 + 6 * max(1, math.ceil((first - 1) / 2)), 6  # so that it lies in the first stage
    else:
        return trial.depth, trial.depth
    step = period * first
    for shallow in range(start + (trial.depth - start) % step, trial.depth - step, step):
        if _shape(trial, depth=shallow):  # a placement may need more layers
            return shallow, shallow + step
    return trial.depth, trial.depth


_EVERY_KTH = (Placement.EVERY_2, Placement.EVERY_3, Placement.EVERY_4, Placement.EVERY_5, Placement.EVERY_10)


def _shape(trial: Trial, **changes: Any) -> Trial | None:
    """The trial less what its cost does not depend on, so that counts and timings are shared; None if there is none."""
    fixed = {
        "seed": 0, "lr": 0.1, "milestones": (), "warmup": 0.0, "momentum": 0.9, "epochs": None, "steps": 1,
        "plateau": None,
        "weight_decay": 0.0, "norm_decay": None, "norm_init": NormInit.ONES, "weight_init": WeightInit.HE_NORMAL,
        "output_bias": OutputBias.RANDOM,
    }  # fmt: skip
    try:
        return type(trial)(**(trial.model_dump() | fixed | changes))
    except Refusal:
        return None


def alike(trial: Trial) -> Trial | None:
    """Trials for which it is equal take the same memory, and a step of each the same time."""
    return _shape(trial)


@lru_cache(maxsize=256)
def _counted(trial: Trial | None) -> Work:
    assert trial is not None, "only a changed trial may not exist"
    with FakeTensorMode():
        network = build(trial)
        objective = Objective(network, trial)
        images_NCHW, targets = blank(trial, torch.device("cpu"))
        with FlopCounterMode(display=False) as forward:
            saved, loss = _saved(objective, images_NCHW, targets)
        with FlopCounterMode(display=False) as backward:
            if loss.requires_grad:
                loss.backward()
        fuse(network)
        with imagined():
            fused, _ = _saved(objective, images_NCHW, targets)
        return Work(
            flops=forward.get_total_flops() + backward.get_total_flops(),
            forward=forward.get_total_flops(),
            saved=saved,
            fused=fused,
            parameters=sum(p.numel() for p in network.parameters()),
            trained=sum(p.numel() for p in trained(network).values()),
            buffers=sum(b.numel() for b in network.buffers()),
            norms=len(trial.norms),
        )


def _saved(objective: Objective, images_NCHW: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """Bytes that a forward pass keeps beside the parameters, and its loss."""
    kept: dict[int, Tensor] = {}  # alive until the end, so that no storage's number is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda t: t):
        loss = objective(images_NCHW, targets)
    mine = {p.untyped_storage()._cdata for p in objective.parameters()}
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in mine), loss


@dataclass(frozen=True)
class Timed:
    """A step."""

    seconds: float
    busy: float  # of the processor, which other programs may keep us waiting for; of a GPU the same


class Pace:
    """Seconds of a training step on this machine, by timing small networks of each shape once."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device = device
        self.threads = threads
        self._timed: dict[tuple[Trial, int], Timed] = {}

    def step(self, trial: Trial, members: int = 1) -> float:
        """Seconds of one update of the whole batch by one worker, of so many trials like this one at once.

        Each member beside the first takes what it took on average in a step of `SEVERAL`.
        """
        alone = self._step(trial, 1).seconds
        if members == 1:
            return alone
        return alone + (members - 1) * max(0.0, self._step(trial, SEVERAL).seconds - alone) / (SEVERAL - 1)

    def relief(self, trial: Trial) -> float:
        """What a member's part of a step of several takes, over a step of the trial alone: less than 1 where training
        them in one pass saves time."""
        return self._step(trial, SEVERAL).busy / (SEVERAL * self._step(trial, 1).busy)

    def crowding(self, trial: Trial, sharers: int) -> float | None:
        """Seconds of a step where so many trials like this one share the GPU, over those of one that is alone there:
        from 1, where it idles between a trial's operations, to `sharers`, where one trial keeps it busy.

        A step of twice the batch tells how busy it is. None where there is no GPU to time it on.
        """
        twice = _shape(trial, batch=2 * trial.batch, norm_batch=2 * trial.norm_batch)
        if self.device.type != "cuda" or twice is None:
            return None
        busy = self._step(twice, 1).seconds / (2 * self._step(trial, 1).seconds)
        return min(max(1.0, sharers * busy), float(sharers))

    def _step(self, trial: Trial, members: int) -> Timed:
        """A step of so many.

        What is timed is a cheap relative of the trial: shallow and narrow, gamma and beta trained where there are any,
        with its data, batch, norm and precision. Width, depth and what trains then count by their operations.
        """
        relative: dict[str, Any] = {"trainable": Trainable.BN if trial.affine_norms else Trainable.ALL}
        match trial.network:
            case Network.RESNET | Network.VGG_RESIDUAL:
                relative["width"] = 1
            case Network.VGG:
                relative |= {"width": 1, "depth": 11}
            case Network.IMAGENET_RESNET:
                relative["depth"] = 18 if trial.depth < 50 else 50
        if trial.groups is not None and "width" in relative:
            relative["groups"] = math.gcd(trial.groups, 8)
        # Where there is no such relative, as for a norm after every 10th layer of 8, the trial stands for itself.
        narrow = _shape(trial, **relative) or _shape(trial)
        assert narrow is not None, "a trial is a relative of its own"
        shallow, deeper = _ladder(narrow)
        below = above = self._time(_shape(narrow, depth=shallow), members)
        steps = 0.0
        if shallow != deeper:
            above = self._time(_shape(narrow, depth=deeper), members)
            steps = (narrow.depth - shallow) / (deeper - shallow)
        share = work(trial).flops / work(narrow).flops

        def extrapolated(one: float, two: float) -> float:
            return share * (one + steps * max(two - one, 0.0))

        return Timed(extrapolated(below.seconds, above.seconds), extrapolated(below.busy, above.busy))

    def _time(self, trial: Trial | None, members: int) -> Timed:
        assert trial is not None, "the ladder has trials that exist"
        if (trial, members) not in self._timed:
            self._timed[trial, members] = _time(trial, self.device, self.threads, members)
            if members > 1 or self.device.type == "cuda":  # one trial on a CPU leaves no ring, and looking takes long
                release_gpu(self.device)
            release_memory()  # a driver lives as long as its study
        return self._timed[trial, members]


def _time(trial: Trial, device: torch.device, threads: int, members: int) -> Timed:
    """The fastest of some steps after one that warms up, of more where they are short; random images serve."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone, gang = members == 1, Gang(device=device)
        engine = (
            LocalEngine(build(trial), trial, gang, None)
            if alone
            else CohortEngine(build(trial), [trial] * members, gang, [None] * members)
        )
        images_NCHW, targets = blank(trial, device)
        images_NCHW.normal_()
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        seconds: list[float] = []
        busy: list[float] = []
        while len(seconds) < STEPS or (sum(seconds) < ENOUGH and len(seconds) < 10 * STEPS):
            start, began = time.perf_counter(), clock()
            loss = engine(images_NCHW, targets)
            engine.backward(loss)
            engine.step(*[trial.lr] * members)
            loss.sum().item()  # waits for a GPU
            seconds.append(time.perf_counter() - start)
            busy.append(clock() - began)
        engine.close()
        return Timed(min(seconds[1:]), min(busy[1:]))
    finally:
        torch.set_num_threads(before)


def forecast(
    trial: Trial, probes: dict[Probe, Cadence], pace: Pace, workers: int, *, gpu: bool, members: int = 1
) -> Forecast:
    """What one trial will take, trained by `workers` workers, on GPUs or not; or a pass of so many `members` like it,
    which train at once and are measured one after the other."""
    counted = work(trial)
    step = pace.step(trial)
    facts = trial.facts
    images = min(facts.train - trial.validation, facts.test) + facts.test + trial.validation
    evaluation = step * counted.forward / counted.flops * images / trial.batch
    readings = [(demand(probe), cadence.readings(trial)) for probe, cadence in probes.items()]
    passes = sum(asked.evaluations * times for asked, times in readings)
    # Every worker of a gang computes the whole batch for itself where a probe takes gradients or looks along them.
    alone = sum(asked.steps(trial) * times for asked, times in readings)
    # A gang's norms wait for others, and probes that take gradients take them operation by operation.
    saved = counted.fused if not gpu and workers == 1 and not alone else counted.saved
    weights, training, evaluated = _memory(trial, counted, saved, 1 if alone else workers, members)
    host = round(_process() + _data(trial))
    # A step that was recorded keeps its memory while something is read.
    reading = max(evaluated, training / members if alone else 0.0)
    return Forecast(
        seconds=(trial.total_steps * pace.step(trial, members) + members * passes * evaluation) / workers
        + members * alone * step,
        memory=host if gpu else host + round(weights + max(training, evaluated)),
        on_gpu=round(_data(trial) + weights + training + reading) if gpu else 0,
        disk=members * round(_disk(trial, counted, probes)),
    )


def _data(trial: Trial) -> float:
    """Bytes of the whole data set: a byte a pixel, or vectors of floats."""
    facts = trial.facts
    each = 2 * FLOAT * facts.channels if facts.regression else facts.side**2 * facts.channels
    return (facts.train + facts.test) * each


def _memory(trial: Trial, counted: Work, saved: float, workers: int, members: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and momentum; beside them, of what backward needs with the few maps that live for a
    moment; and of the few maps of an evaluation's larger batch. Members share what does not train."""
    frozen = counted.parameters - counted.trained
    weights = FLOAT * (frozen + members * (3 * counted.trained + counted.buffers))
    sites = placed(trial.network, trial.depth, trial.width, trial.facts.side, Placement.EVERY)
    widest = FLOAT * max((site.channels * site.side**2 for site in sites), default=0)  # one image's largest map
    training = members * (saved + MAPS * widest * trial.batch) / workers
    return weights, training, MAPS * widest * members * batch_of(members)


@lru_cache
def _process() -> float:
    """Bytes of a worker before it holds a trial: this process, which has imported the same libraries."""
    return psutil.Process(os.getpid()).memory_info().rss


def _disk(trial: Trial, counted: Work, probes: dict[Probe, Cadence]) -> float:
    """Trained weights and running statistics, and rows at 8 bytes a value: an upper bound, for Parquet compresses."""
    rows = 0.0
    for probe, cadence in probes.items():
        columns = len(fields(TABLES[probe.__name__])) if probe.__name__ in TABLES else 8
        rows += cadence.readings(trial) * demand(probe).rows(trial) * columns * 8
    return FLOAT * (counted.trained + counted.buffers) + rows


def total(forecasts: Iterable[Forecast]) -> Forecast:
    """Of a study: seconds and disk add up; memory is the largest trial's."""
    each = list(forecasts)
    return Forecast(
        sum(f.seconds for f in each),
        max((f.memory for f in each), default=0),
        max((f.on_gpu for f in each), default=0),
        sum(f.disk for f in each),
    )
