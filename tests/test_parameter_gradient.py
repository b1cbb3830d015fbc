"""Gradients of all parameters: against autograd, against the updates that are taken, and by their kinds."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import digits
from torch import Tensor

from bnscale import loss
from bnscale.data import Resident
from bnscale.engine import Gang
from bnscale.engine.local import LocalEngine
from bnscale.probes import Snapshot, check, parameter_gradient
from bnscale.probes.parameters import ParameterGradient
from bnscale.train import initialised
from bnscale.trial import (
    Affine,
    Augmentation,
    Data,
    DecayOn,
    Network,
    Norm,
    OutputBias,
    Refusal,
    Trainable,
    Trial,
    WeightInit,
)

CPU = torch.device("cpu")
ALL: dict[str, Any] = {"trainable": Trainable.ALL, "augmentation": Augmentation.NONE}
NETWORKS: dict[str, dict[str, Any]] = {
    "ResNet with shortcuts": ALL | {"depth": 14},
    "VGG with biases": ALL | {"network": Network.VGG, "depth": 11, "weight_decay": 0.01},
    "residual VGG": ALL | {"network": Network.VGG_RESIDUAL, "depth": 14, "affine": Affine.GAMMA, "gamma_l1": 0.01},
    "penalties": ALL | {"beta_l2": 0.1, "decay_on": DecayOn.WEIGHTS, "weight_decay": 0.1, "norm_decay": 0.3},
    "no norms": ALL | {"norm": Norm.NONE, "lr": 0.001},
    "gamma and beta": {"trainable": Trainable.BN},
    "matrices": ALL
    | {"data": Data.LINEAR_TEACHER, "network": Network.LINEAR, "depth": 3, "width": 6, "batch": 50, "norm_batch": 50}
    | {"lr": 1e-4},
    "torchvision's": ALL | {"network": Network.IMAGENET_RESNET, "depth": 18, "width": 4, "batch": 4, "norm_batch": 4},
}


class Run:
    """A trial that can be looked at and trained on."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.data = Resident(trial, Path("/nonexistent"), CPU)
        self.engine = LocalEngine(initialised(trial, self.data), trial, Gang(), None)
        self.step = 0

    def look(self) -> dict[str, ParameterGradient]:
        at = Snapshot(self.trial, self.step, self.engine, self.data)
        return {row.parameter: row for row in parameter_gradient(at)}

    def update(self) -> None:
        self.engine.backward(self.engine(*self.data.batch(self.step)))
        self.engine.step(self.trial.rate(self.step))
        self.step += 1

    def values(self) -> dict[str, Tensor]:
        return {name: each.detach().clone() for name, each in self.engine.module.named_parameters()}


def magnitude(values: Tensor) -> Any:
    return pytest.approx(float(values.double().abs().mean()), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_reading_is_the_gradient_of_the_next_batch_without_penalties_and_the_update_that_was_taken(name):
    run = Run(digits(**NETWORKS[name]))
    start = run.values()
    for _ in range(2):
        run.update()
    before = run.values()
    run.update()
    after = run.values()
    rows = run.look()
    assert list(rows) == list(after)
    lr = run.trial.rate(run.step - 1)
    trained = {each for each, parameter in run.engine.module.named_parameters() if parameter.requires_grad}
    for parameter in run.engine.module.parameters():
        parameter.requires_grad_()
    images, targets = run.data.batch(run.step)
    loss.of_batch(run.trial, run.engine.module(images), targets).backward()
    for each, parameter in run.engine.module.named_parameters():
        row = rows[each]
        assert (row.step, row.count, row.trains) == (3, parameter.numel(), each in trained)
        assert row.gradient == magnitude(parameter.grad)
        assert row.gradient_rms == magnitude(parameter.grad.double().square().mean().sqrt())
        assert row.size == magnitude(after[each])
        assert row.size_rms == magnitude(after[each].double().square().mean().sqrt())
        assert row.moved == magnitude(after[each] - start[each])
        if each in trained:
            # An update is as small beside its parameter as float32 rounds that.
            slack = 1e-6 * float(after[each].abs().max()) / lr
            assert row.last_update == pytest.approx(float((after[each] - before[each]).abs().mean()) / lr, 1e-3, slack)
        else:
            assert (row.last_update, row.moved) == (None, 0.0)


def test_momentum_is_read_between_the_first_update_and_the_last_alone():
    run = Run(digits(steps=2))
    seen = []
    for _ in range(3):
        seen.append({row.last_update is None for row in run.look().values() if row.trains})
        run.update()
    assert seen == [{True}, {False}, {True}]
    plain = Run(digits(momentum=0.0))
    plain.update()
    assert {row.last_update for row in plain.look().values()} == {None}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("ResNet with shortcuts", {"gamma", "beta", "convolution", "shortcut", "output weight", "output bias"}),
        ("VGG with biases", {"gamma", "beta", "convolution", "bias", "output weight", "output bias"}),
        ("residual VGG", {"gamma", "convolution", "output weight", "output bias"}),
        ("no norms", {"convolution", "shortcut", "output weight", "output bias"}),
        ("matrices", {"gamma", "beta", "matrix", "output weight"}),
        ("torchvision's", {"gamma", "beta", "convolution", "shortcut", "output weight", "output bias"}),
    ],
)
def test_each_parameter_is_of_one_kind_and_belongs_to_a_layer_of_the_network(name, kinds):
    run = Run(digits(**NETWORKS[name]))
    rows = run.look()
    assert {row.kind for row in rows.values()} == kinds
    weights = [row.layer_index for row in rows.values() if row.kind in ("convolution", "matrix", "output weight")]
    assert weights == list(range(1, run.trial.layers + 1))
    channels = {row.layer_index: row.count for row in rows.values() if row.kind == "gamma"}
    for row in rows.values():
        if row.kind in ("convolution", "shortcut", "matrix") and run.trial.norms:
            assert row.count % channels[row.layer_index] == 0
            fan_in = row.count / channels[row.layer_index]
            # He's weights, of which so many leave a root mean square uncertain by 1 / sqrt(2 count).
            assert row.size_rms == pytest.approx(math.sqrt(2 / fan_in), rel=4 / math.sqrt(2 * row.count))


def test_a_shortcut_and_its_norm_belong_to_the_layer_that_they_run_beside():
    rows = Run(digits(**NETWORKS["ResNet with shortcuts"])).look()  # blocks 0 and 1 are layers 2 to 5
    of = {name: rows[name].layer_index for name in rows}
    assert of["blocks.2.shortcut.conv.weight"] == of["blocks.2.shortcut.norm.bias"] == of["blocks.2.conv2.weight"] == 7
    assert (of["conv.weight"], of["norm.weight"], of["blocks.0.norm1.bias"], of["output.bias"]) == (1, 1, 2, 14)


def test_weights_in_front_of_a_batch_norm_have_a_gradient_as_small_as_they_are_large_and_gamma_has_the_same():
    # He's and unscaled weights are the same draws; only the classifier's scale is seen, by every gradient behind it.
    he, unscaled = (
        Run(digits(**ALL, network=Network.VGG_RESIDUAL, depth=14, width=2, weight_init=init)) for init in
        (WeightInit.HE_NORMAL, WeightInit.GAUSSIAN)
    )  # fmt: skip
    with torch.no_grad():
        unscaled.engine.module.output.weight.copy_(he.engine.module.output.weight)
    one, other = he.look(), unscaled.look()
    for name, row in one.items():
        scale = other[name].size / row.size if row.size else 1.0
        assert other[name].gradient == pytest.approx(row.gradient / scale, rel=0.01)
        if row.kind == "convolution":
            assert scale == pytest.approx(math.sqrt(row.count / 32 / 2))


def test_class_biases_that_the_first_batch_set_have_no_distance_from_a_start_that_the_seed_gives():
    run = Run(digits(**ALL, output_bias=OutputBias.EVEN))
    run.update()
    rows = run.look()
    assert rows["output.bias"].moved is None
    assert rows["output.weight"].moved > 0


def test_a_reading_leaves_torchs_own_stream_of_random_numbers_where_it_was():
    run = Run(digits())
    before = torch.random.get_rng_state()
    run.look()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_gradient_that_left_the_float32_numbers_is_infinite():
    run = Run(digits(**ALL))
    with torch.no_grad():
        run.engine.module.output.weight.fill_(1e38)
    assert run.look()["conv.weight"].gradient == math.inf


def test_weights_in_two_parts_are_refused():
    with pytest.raises(Refusal, match="parameter_gradient: .* weights in two parts"):
        check(parameter_gradient, digits(trainable=Trainable.TWO_PER_CHANNEL))
