"""How long a training step and inference take: what norms cost, and what is left of it when they are folded away.

Everything runs on a copy of the network, on the next batch. The passes take turns, so that a machine whose pace changes
changes it for all. Readings are seconds: no two are the same, and rows of this table alone differ between two runs of
one trial.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from bnscale import loss
from bnscale.networks import assemble
from bnscale.networks.folding import fold, foldable
from bnscale.networks.trainable import restrict
from bnscale.probes.probe import asks
from bnscale.probes.snapshot import Snapshot
from bnscale.trial import Precision, Trial

WARM = 1  # turns that are not counted: a first pass chooses kernels
REPEATS = 5  # turns


@dataclass(frozen=True)
class Timing:
    """One kind of pass over one batch at one step."""

    step: int  # updates taken
    # train: forward and backward in training mode, as a step does before its update; evaluation: forward in evaluation
    # mode; folded: the same with every norm folded into a layer beside it, where that can be.
    mode: str
    norms: int  # norm layers that the pass goes through
    images: int  # of the batch
    repeats: int  # turns of which `seconds` is the median
    clock: str  # processor: time that one CPU thread computed; wall: until the device had finished
    seconds: float  # a pass


@asks(steps=(WARM + REPEATS) * 1.7)
def timing(at: Snapshot) -> Iterator[Timing]:
    """Seconds of a step and of inference, with norms and with norms folded (Jacob et al. 2018, section 3.2).

    On a CPU one thread computes, and its own time counts: other work on the machine, which stretches the wall clock, is
    left out. In a gang each worker computes the whole batch.
    """
    trial, (images_NCHW, targets) = at.trial, at.batch()
    device = images_NCHW.device
    network = _copy(at)
    passes: dict[str, tuple[int, Callable[[], None]]] = {
        "train": (len(trial.norms), partial(_learn, trial, network, images_NCHW, targets)),
        "evaluation": (len(trial.norms), partial(_infer, trial, network, images_NCHW)),
    }
    if foldable(trial):
        without = _copy(at)
        fold(without, images_NCHW[:2])
        passes["folded"] = 0, partial(_infer, trial, without, images_NCHW)
    clock = "processor" if device.type == "cpu" else "wall"
    taken: dict[str, list[float]] = {mode: [] for mode in passes}
    with _one_thread(device):
        for turn in range(WARM + REPEATS):
            for mode, (_, each) in passes.items():
                (without if mode == "folded" else network).train(mode == "train")
                start = _now(device)
                each()
                seconds = _now(device) - start
                network.zero_grad(set_to_none=True)
                if turn >= WARM:
                    taken[mode].append(seconds)
    for mode, (norms, _) in passes.items():
        yield Timing(at.step, mode, norms, len(targets), REPEATS, clock, median(taken[mode]))


def _copy(at: Snapshot) -> nn.Module:
    """The network as it stands, on this worker alone; what trains in it trains in the copy."""
    own = at.network.state_dict()
    with torch.random.fork_rng(devices=[]):  # a new network draws values, which the next line replaces
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
    """On a CPU: its time is all the time there is."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if device.type == "cpu":
            torch.set_num_threads(before)
