"""Timing only looks, its clock is the one it names, and a folded network is the same function."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import digits
from torch import Tensor, nn

from bnscale.data import Resident
from bnscale.engine import Gang
from bnscale.engine.local import LocalEngine
from bnscale.networks import build
from bnscale.networks.folding import fold, foldable
from bnscale.networks.norm import BatchNorm
from bnscale.probes import Snapshot, timing
from bnscale.trial import Affine, Augmentation, Data, Network, Norm, NormInit, Placement, Trainable, Trial

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "ResNet with shortcuts": {"depth": 14},
    "every second": {"depth": 14, "placement": Placement.EVERY_2},
    "one behind the pooling": {"placement": Placement.LAST},
    "beta alone, ghost batches": {"affine": Affine.BETA, "norm_batch": 4},
    "two weights a channel": {"trainable": Trainable.TWO_PER_CHANNEL},
    "convolutions with biases": {"network": Network.VGG, "depth": 11},
    "biases, and one behind the pooling": {"network": Network.VGG, "depth": 11, "placement": Placement.LAST},
    "l1": {"norm": Norm.L1},
    "residual VGG": {"network": Network.VGG_RESIDUAL, "depth": 14},
    "torchvision's": {"network": Network.IMAGENET_RESNET, "depth": 18, "width": 4},
    "matrices": {
        "data": Data.LINEAR_TEACHER, "network": Network.LINEAR, "depth": 5, "width": 6,
    },
}  # fmt: skip


def trial_of(**changes: Any) -> Trial:
    plain = {"trainable": Trainable.ALL, "norm_init": NormInit.NORMAL}
    if changes.get("data") is Data.LINEAR_TEACHER:
        plain |= {"augmentation": Augmentation.NONE}
    return digits(**(plain | changes))


def trained(trial: Trial) -> nn.Module:
    """In evaluation mode and float64, with running statistics, gammas and betas that are not what they start as."""
    network = build(trial).double().eval()
    draws = torch.Generator().manual_seed(1)
    for norm in network.modules():
        if isinstance(norm, BatchNorm):
            norm.running_mean.normal_(generator=draws)
            norm.running_var.uniform_(0.5, 2, generator=draws)
            if norm.bias is not None:
                norm.bias.data.normal_(generator=draws)
    return network


def images_of(trial: Trial) -> Tensor:
    facts = trial.facts
    shape = (6, facts.channels, facts.side, facts.side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_network_whose_norms_are_folded_is_the_same_function_without_them(kind):
    trial = trial_of(**KINDS[kind])
    network, images = trained(trial), images_of(trial)
    expected = network(images)
    assert sum(isinstance(m, BatchNorm) for m in network.modules()) == len(trial.norms) > 0
    fold(network, images[:1])
    assert not any(isinstance(m, BatchNorm) for m in network.modules())
    assert not network.training
    torch.testing.assert_close(network(images), expected, rtol=1e-11, atol=1e-11 * float(expected.abs().max()))
    assert float(expected.std()) > 0


@pytest.mark.parametrize(
    ("changes", "can"),
    [
        ({}, True),
        ({"norm": Norm.RENORM, "renorm_r": 3.0, "renorm_d": 5.0, "renorm_start": 0.1, "renorm_r_end": 0.3,
          "renorm_d_end": 0.2}, True),
        ({"norm": Norm.LAYER}, False),  # its statistics are each image's own
        ({"norm": Norm.NOISY}, False),
        ({"placement": Placement.NONE}, False),  # nothing to fold
    ],
)  # fmt: skip
def test_what_can_be_folded_has_a_row_for_it_and_what_cannot_has_none(changes, can):
    trial = trial_of(**changes)
    rows = {row.mode: row for row in timing(looking_at(trial)) if row.placement == trial.placement}
    assert set(rows) == {"train", "evaluation"} | ({"folded"} if can else set())
    assert foldable(trial) == can
    assert {rows[mode].norms for mode in ("train", "evaluation")} == {len(trial.norms)}
    assert not can or rows["folded"].norms == 0
    assert {(row.step, row.images, row.clock) for row in rows.values()} == {(0, 16, "processor")}
    assert all(row.seconds > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("own", "beside", "norms"), [("every_2", "every", 9), ("none", "every", 9), ("every", "none", 0)]
)
def test_a_network_is_timed_beside_that_with_every_norm_and_that_one_beside_none(own, beside, norms):
    trial = trial_of(depth=8, placement=Placement(own))
    rows = {(row.placement, row.mode): row for row in timing(looking_at(trial))}
    assert {place for place, _ in rows} == {own, beside}
    assert rows[own, "train"].norms == len(trial.norms)
    assert rows[beside, "train"].norms == norms
    assert ((beside, "folded") in rows) == (beside == "every")


def test_the_clock_runs_without_numbers_that_a_processor_is_slow_for(monkeypatch):
    small: list[float] = []

    def now(device: torch.device) -> float:
        small.append(float(torch.full((), 1e-40) * 1))
        return float(len(small))

    monkeypatch.setattr(sys.modules[timing.__module__], "_now", now)
    list(timing(looking_at(trial_of())))
    assert set(small) == {0.0}


def test_gamma_and_beta_alone_are_timed_alone():
    """Without norms nothing of that network would train."""
    assert {row.placement for row in timing(looking_at(trial_of(trainable=Trainable.BN)))} == {"every"}


def looking_at(trial: Trial, network: nn.Module | None = None) -> Snapshot:
    engine = LocalEngine(network or build(trial), trial, Gang(), None)
    return Snapshot(trial, 0, engine, Resident(trial, Path("/nonexistent"), CPU))


def test_timing_moves_no_parameter_buffer_gradient_random_number_mode_or_thread():
    at = looking_at(trial_of(trainable=Trainable.TWO_PER_CHANNEL))
    before = {name: value.clone() for name, value in at.network.state_dict().items()}
    draws, threads = torch.get_rng_state(), torch.get_num_threads()
    list(timing(at))
    assert torch.equal(torch.get_rng_state(), draws)
    assert torch.get_num_threads() == threads
    assert float(torch.tensor(1e-40) * 1) > 0  # small numbers are 0 while the clock runs, and not after
    assert all(torch.equal(value, before[name]) for name, value in at.network.state_dict().items())
    assert all(parameter.grad is None for parameter in at.network.parameters())
    assert all(module.training for module in at.network.modules())


def test_seconds_are_the_shortest_of_the_turns_after_those_that_warm_up(monkeypatch):
    """A clock that each pass moves on by what it is said to take: the warming turn is shortest, the last one longest.

    In a turn come the trial's own passes (train, evaluation, folded) and then those without norms (train, evaluation).
    """
    turns = [1, 5, 4, 3, 6, 900]
    takes = iter([seconds * factor for seconds in turns for factor in (1, 10, 100, 1000, 10_000)])
    state = {"now": 0.0, "open": False}

    def now(device: torch.device) -> float:
        if state["open"]:
            state["now"] += next(takes)
        state["open"] = not state["open"]
        return state["now"]

    monkeypatch.setattr(sys.modules[timing.__module__], "_now", now)
    rows = {(row.placement, row.mode): row for row in timing(looking_at(trial_of()))}
    assert {which: (row.seconds, row.repeats) for which, row in rows.items()} == {
        ("every", "train"): (3, 5), ("every", "evaluation"): (30, 5), ("every", "folded"): (300, 5),
        ("none", "train"): (3000, 5), ("none", "evaluation"): (30_000, 5),
    }  # fmt: skip
    assert next(takes, None) is None
