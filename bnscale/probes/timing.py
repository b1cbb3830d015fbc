"""How long a training step and inference take: what norms cost, and what is left of it when they are folded away.

Everything runs on a copy of the network, on the next batch. Beside it runs a new network of the same trial with a norm
everywhere, or without any if that is what the trial has; beside one without norms, batch norm everywhere. Times of two
trials, minutes apart or on two machines, do not compare, but these two networks take turns: a machine whose pace
changes changes it for both. Of the turns the shortest counts, which other work delayed least. Readings are seconds: no
two are the same, and rows of this table alone differ between two runs of one trial.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bnscale import loss
from bnscale.networks import assemble, build
from bnscale.networks.folding import fold, foldable
from bnscale.networks.trainable import restrict
from bnscale.probes.probe import asks
from bnscale.probes.snapshot import Snapshot
from bnscale.trial import Norm, Placement, Precision, Refusal, Trial

WARM = 1  # turns that are not counted: a first pass chooses kernels
REPEATS = 5  # turns


@dataclass(frozen=True)
class Timing:
    """One kind of pass over one batch at one step."""

    step: int  # updates taken
    placement: str  # where norms stand in the network that was timed: the trial's own, or that of the one beside it
    # train: forward and backward in training mode, as a step does before its update; evaluation: forward in evaluation
    # mode; folded: the same with every norm folded into a layer beside it, where that can be.
    mode: str
    norms: int  # norm layers that the pass goes through
    images: int  # of the batch
    repeats: int  # turns of which `seconds` is the shortest
    clock: str  # processor: time that one CPU thread computed; wall: until the device had finished
    seconds: float  # a pass


@asks(steps=(WARM + REPEATS) * 2 * 1.7)
def timing(at: Snapshot) -> Iterator[Timing]:
    """Seconds of a step and of inference, with norms and with norms folded (Jacob et al. 2018, section 3.2).

    On a CPU one thread computes, and its own time counts: other work on the machine, which stretches the wall clock, is
    left out. In a gang each worker computes the whole batch.
    """
    trial, (images_NCHW, targets) = at.trial, at.batch()
    device = images_NCHW.device
    passes = _passes(trial, partial(_copy, at), images_NCHW, targets)
    beside = _beside(trial)
    if beside is not None:
        passes += _passes(beside, partial(_new, beside, device), images_NCHW, targets)
    shortest = [math.inf] * len(passes)
    with _one_thread(device):
        for turn in range(WARM + REPEATS):
            for place, each in enumerate(passes):
                each.network.train(each.mode == "train")
                start = _now(device)
                each.run()
                seconds = _now(device) - start
                each.network.zero_grad(set_to_none=True)
                if turn >= WARM:
                    shortest[place] = min(shortest[place], seconds)
    clock = "processor" if device.type == "cpu" else "wall"
    for each, seconds in zip(passes, shortest, strict=True):
        yield Timing(at.step, each.placement, each.mode, each.norms, len(targets), REPEATS, clock, seconds)


@dataclass(frozen=True)
class _Pass:
    placement: str
    mode: str
    norms: int
    network: nn.Module
    run: Callable[[], None]


def _passes(trial: Trial, make: Callable[[], nn.Module], images_NCHW: Tensor, targets: Tensor) -> list[_Pass]:
    """The kinds of pass of one network; its norms are folded in a second of it."""
    network, placement, norms = make(), str(trial.placement), len(trial.norms)
    learn, infer = partial(_learn, trial, network, images_NCHW, targets), partial(_infer, trial, network, images_NCHW)
    found = [_Pass(placement, "train", norms, network, learn), _Pass(placement, "evaluation", norms, network, infer)]
    if foldable(trial):
        without = make()
        fold(without, images_NCHW[:2])
        found.append(_Pass(placement, "folded", 0, without, partial(_infer, trial, without, images_NCHW)))
    return found


def _beside(trial: Trial) -> Trial | None:
    """The trial with a norm everywhere, or without any where it has that; None where what trains, or a penalty, needs
    norms and would have none.
    """
    match trial.placement:
        case Placement.EVERY:
            changes = {"norm": Norm.NONE, "placement": Placement.NONE}
        case Placement.NONE:
            changes = {"norm": Norm.BATCH, "placement": Placement.EVERY, "affine_at": Placement.EVERY}
        case _:
            changes = {"placement": Placement.EVERY}
    with suppress(Refusal):
        return Trial(**(trial.model_dump() | changes))
    return None


def _new(trial: Trial, device: torch.device) -> nn.Module:
    return build(trial).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _copy(at: Snapshot) -> nn.Module:
    """The network as it stands, on this worker alone; what trains in it trains in the copy."""
    own = at.network.state_dict()
    network = assemble(at.trial)
    restrict(network, at.trial)
    network.load_state_dict(own | {name: value for name, value in at.statistics.items() if name in own})
    return network.to(at.data.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _learn(trial: Trial, network: nn.Module, images_NCHW: Tensor, targets: Tensor) -> None:
    with _precision(trial, images_NCHW):
        outputs = network(images_NCHW)
    value = loss.of_batch(trial, outputs, targets)
    if value.requires_grad:
        value.backward()


@torch.no_grad()
def _infer(trial: Trial, network: nn.Module, images_NCHW: Tensor) -> None:
    with _precision(trial, images_NCHW):
        network(images_NCHW)


def _precision(trial: Trial, images_NCHW: Tensor) -> torch.autocast:
    return torch.autocast(images_NCHW.device.type, torch.bfloat16, enabled=trial.precision is Precision.BF16)


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.thread_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU: its time is all the time there is. Numbers too small for full precision count as 0 meanwhile: it takes
    many times as long for them, and where a network without norms saturates its loss, gradients are full of them.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if device.type == "cpu":
            torch.set_flush_denormal(False)
            torch.set_num_threads(before)
