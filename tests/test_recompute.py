"""Activations that are computed again change no number and take less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from examples import digits
from torch import nn

from bnscale.data import Resident, blank
from bnscale.engine import Alone, Gang
from bnscale.engine.local import LocalEngine
from bnscale.networks import build
from bnscale.networks.recompute import Activations, parts, recomputable, recomputing
from bnscale.probes import EPOCH, STEP, curve, gradient, parameter_gradient
from bnscale.train import Course, train
from bnscale.trial import Network, Norm, Placement, Precision, Trainable, Trial

NOWHERE = Path("/nonexistent")

TRIALS: dict[str, dict[str, Any]] = {
    "a ResNet of which all trains": {"trainable": Trainable.ALL, "depth": 14},
    "gamma and beta only": {"depth": 14},
    "a VGG": {"network": Network.VGG, "depth": 11, "trainable": Trainable.ALL},
    "a VGG with skips": {"network": Network.VGG_RESIDUAL, "depth": 14, "trainable": Trainable.ALL},
    "torchvision's ResNet": {"network": Network.IMAGENET_RESNET, "depth": 18, "width": 4, "trainable": Trainable.ALL},
    "a product of matrices": {"network": Network.LINEAR, "depth": 4, "width": 8, "trainable": Trainable.ALL},
    "ghost batches": {"norm_batch": 4, "trainable": Trainable.ALL},
    "norms here and there": {"placement": Placement.EVERY_3, "trainable": Trainable.ALL},
    "bfloat16": {"precision": Precision.BF16, "trainable": Trainable.ALL},
    "two weights a channel": {"trainable": Trainable.TWO_PER_CHANNEL},
    # In these a forward pass reads what it moves.
    "renorm": {
        "norm": Norm.RENORM, "renorm_r": 3.0, "renorm_d": 5.0, "renorm_start": 0.0, "renorm_r_end": 0.5,
        "renorm_d_end": 0.5, "trainable": Trainable.ALL,
    },
    "noise that is drawn anew each step": {"norm": Norm.NOISY, "trainable": Trainable.ALL},
    "noise alone": {"norm": Norm.NOISE, "trainable": Trainable.ALL},
    "l1": {"norm": Norm.L1, "trainable": Trainable.ALL},
}  # fmt: skip


class Rows:
    """A notebook that keeps what it is told."""

    reached = 0

    def __init__(self) -> None:
        self.rows: list[str] = []

    def write(self, table: str, rows: list[Any]) -> None:
        self.rows += map(repr, rows)

    def flush(self, step: int) -> None: ...
    def rewind(self, step: int) -> None: ...
    def finish(self, *ending: Any) -> None: ...


def trained(trial: Trial, activations: Activations, probes: dict[Any, Any]) -> tuple[dict[str, torch.Tensor], Rows]:
    """Every parameter and buffer after training, and all that was read on the way."""
    gang, rows = Gang(), Rows()
    engine = LocalEngine(build(trial), trial, gang, None, activations)
    data = Resident(trial, NOWHERE, gang.device)
    list(train([Course(trial, rows, probes)], Alone(engine), data, 1e9, lambda: False))
    return engine.module.state_dict(), rows


@pytest.mark.parametrize("named", TRIALS)
def test_the_same_network_is_trained_to_the_last_bit(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalEngine, "save", lambda *told: None)
    trial = digits(**({"steps": 3} | TRIALS[named]))
    kept, _ = trained(trial, Activations.KEPT, {})
    again, _ = trained(trial, Activations.RECOMPUTED, {})
    assert kept.keys() == again.keys()
    assert [name for name in kept if not torch.equal(kept[name], again[name])] == []


def test_readings_between_the_steps_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalEngine, "save", lambda *told: None)
    trial = digits(steps=4, trainable=Trainable.ALL)
    probes = {curve: EPOCH, gradient: 2 * STEP, parameter_gradient: 2 * STEP}
    kept, before = trained(trial, Activations.KEPT, probes)
    again, after = trained(trial, Activations.RECOMPUTED, probes)
    assert before.rows == after.rows != []
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize(
    ("network", "depth", "width", "share"),
    [
        (Network.RESNET, 20, 1, 0.35),
        (Network.VGG, 11, 1, 0.65),  # of the two maps a layer one stays
        (Network.VGG_RESIDUAL, 20, 1, 0.4),
        (Network.IMAGENET_RESNET, 18, 4, 0.5),
    ],
)
def test_less_is_kept_for_backward(network: Network, depth: int, width: int, share: float) -> None:
    trial = digits(network=network, depth=depth, width=width, trainable=Trainable.ALL)
    assert recomputable(trial)
    assert len(parts(build(trial))) >= 8
    assert held(trial, Activations.RECOMPUTED) < share * held(trial, Activations.KEPT)


def held(trial: Trial, activations: Activations) -> int:
    """Bytes that a forward pass leaves for the backward pass."""
    network = build(trial)
    images_NCHW, targets = blank(trial, torch.device("cpu"))
    with torch.profiler.profile(profile_memory=True) as profile, recomputing(network, activations):
        loss = nn.functional.cross_entropy(network(images_NCHW), targets)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


def test_what_has_no_backward_pass_is_not_computed_again() -> None:
    assert not recomputable(digits(trainable=Trainable.NONE))
    assert not recomputable(digits(trainable=Trainable.OUTPUT))
    assert recomputable(digits(trainable=Trainable.BN))
    network = build(digits())
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with recomputing(network, Activations.RECOMPUTED), torch.no_grad():
        network(torch.randn(16, 1, 8, 8))
    moved = [name for name, buffer in network.named_buffers() if not torch.equal(buffer, before[name])]
    assert len(moved) == len(before)
    assert all("forward" not in vars(part) for part in parts(network))
