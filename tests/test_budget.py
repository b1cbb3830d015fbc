"""Forecasts: counted work is the work that is done, and memory and order are near what is measured."""

import dataclasses
import gc
import itertools
import subprocess
import sys
import weakref

import pytest
import torch
from examples import digits
from torch import nn

from bnscale.networks import build, trained
from bnscale.probes import END, EPOCH, curve, gamma
from bnscale.schedule import budget
from bnscale.schedule.budget import Pace, forecast, total, work
from bnscale.trial import Affine, Augmentation, Data, Network, Norm, Placement, Precision, Refusal, Trainable


def cifar(**changes):
    return digits(**({"data": Data.CIFAR10, "validation": 0} | changes))


def forward_flops(trial) -> int:
    """Two operations a multiply-add, convolution by convolution, by their output sizes."""
    found = 0
    network = build(trial)

    def count(module, inputs, output):
        nonlocal found
        found += 2 * output.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    facts = trial.data.facts
    network(torch.zeros(trial.batch, facts.channels, facts.side, facts.side))
    return found


@pytest.mark.parametrize("trial", [digits(), digits(depth=26, width=2), cifar(depth=20)], ids=lambda t: t.id)
def test_counted_operations_are_those_of_the_layers_also_where_depth_is_extrapolated(trial):
    assert work(trial).forward == forward_flops(trial)


@pytest.mark.parametrize("trainable", list(Trainable))
def test_counted_parameters_are_those_of_the_network(trainable):
    trial = digits(depth=32, trainable=trainable)
    network = build(trial)
    counted = work(trial)
    assert counted.parameters == sum(p.numel() for p in network.parameters())
    assert counted.trained == sum(p.numel() for p in trained(network).values())
    assert counted.buffers == sum(b.numel() for b in network.buffers())


@pytest.mark.parametrize(
    "fields",
    [
        *({"depth": 158, "placement": place} for place in Placement if place is not Placement.NONE),
        {"depth": 98, "placement": Placement.EVERY_2, "affine_at": Placement.EVERY_3, "trainable": Trainable.ALL},
        {"depth": 62, "norm": Norm.NOISY},
        {"depth": 62, "norm": Norm.L1, "affine": Affine.GAMMA},
        {"network": Network.VGG_RESIDUAL, "depth": 68, "placement": Placement.EVERY_4},
    ],
    ids=str,
)
def test_costs_extrapolated_from_shallow_networks_are_those_of_the_deep_one(fields):
    trial = digits(**fields)
    assert budget._ladder(trial)[1] < trial.depth
    counted = budget._counted(budget._shape(trial))
    for field in dataclasses.fields(counted):
        found = getattr(work(trial), field.name)
        assert found == pytest.approx(getattr(counted, field.name), rel=1e-12), field.name


@pytest.mark.parametrize("norm", list(Norm))
def test_a_step_of_every_norm_can_be_foreseen(norm):
    others = {
        "groups": 8,
        "renorm_r": 3.0,
        "renorm_d": 5.0,
        "renorm_start": 0.0,
        "renorm_r_end": 0.5,
        "renorm_d_end": 0.5,
    }
    for fields in ({"depth": 26, "width": 2}, {"network": Network.VGG, "depth": 16, "width": 4, "data": Data.CIFAR10}):
        trial = digits(norm=norm, trainable=Trainable.ALL, batch=4, norm_batch=4, **(others | fields))
        found = forecast(trial, {}, Pace(torch.device("cpu"), 1), 1, gpu=False)
        assert 0 < found.seconds < 60
        assert found.memory > work(trial).saved


SIZES = [
    (Network.RESNET, 26, 2), (Network.VGG, 16, 1), (Network.VGG_RESIDUAL, 38, 2), (Network.LINEAR, 25, 16),
]  # fmt: skip


@pytest.mark.parametrize("norm", [{}, {"norm": Norm.GROUP, "groups": 16}], ids=str)
@pytest.mark.parametrize(("network", "depth", "width"), SIZES, ids=str)
def test_every_trial_that_can_run_can_be_foreseen(network, depth, width, norm, monkeypatch):
    monkeypatch.setattr(budget, "_time", lambda trial, device, threads, members: budget.Timed(1.0, 1.0))
    fields = {
        "network": network,
        "depth": depth,
        "width": width,
        "trainable": Trainable.ALL,
        "batch": 4,
        "norm_batch": 4,
    }
    if network is Network.LINEAR:
        fields |= {"data": Data.LINEAR_TEACHER, "augmentation": Augmentation.NONE}
    foreseen = 0
    for place, affine_at in itertools.product(Placement, [Placement.EVERY, Placement.EVERY_10]):
        try:
            trial = digits(**(fields | norm | {"placement": place, "affine_at": affine_at}))
        except Refusal:
            continue
        assert forecast(trial, {}, Pace(torch.device("cpu"), 1), 1, gpu=False).seconds > 0
        foreseen += 1
    assert foreseen


def test_freezing_weights_saves_their_gradients_and_training_nothing_saves_the_backward_pass():
    whole, bn, nothing = (work(cifar(trainable=t)) for t in (Trainable.ALL, Trainable.BN, Trainable.NONE))
    assert nothing.flops == nothing.forward
    assert bn.flops - bn.forward < 0.6 * (whole.flops - whole.forward)


def test_the_deepest_network_keeps_about_eight_gibibytes_at_batch_128():
    # Measured apart from this code: about 8 GiB of saved activations in float32.
    saved = work(cifar(depth=866, batch=128, norm_batch=128)).saved
    assert saved / 2**30 == pytest.approx(8, rel=0.1)
    assert work(cifar(depth=866, batch=128, norm_batch=128, precision=Precision.BF16)).saved < 0.7 * saved


PEAK = """
import sys
sys.path.insert(0, "tests")
import torch
torch.set_num_threads(1)
from test_budget import cifar, Pace, forecast, curve, END
from bnscale.trial import Network, Trainable
from bnscale.engine import Gang
from bnscale.engine.local import LocalEngine
from bnscale.engine.machine import forget_peak, peak_memory
from bnscale.networks import build
network, depth, width, trainable = sys.argv[1:]
fields = {"network": Network(network), "depth": int(depth), "width": int(width), "trainable": Trainable(trainable)}
trial = cifar(batch=128, norm_batch=128, **fields)
cpu = torch.device("cpu")
foreseen = forecast(trial, {curve: END}, Pace(cpu, 1), 1, gpu=False).memory
data = torch.zeros(60_000, 3, 32, 32, dtype=torch.uint8) + 1  # as the images of CIFAR-10 are held
engine = LocalEngine(build(trial), trial, Gang(), None)
forget_peak(cpu)
for step in range(2):
    engine.backward(engine(torch.randn(128, 3, 32, 32), torch.zeros(128, dtype=torch.long)))
    engine.step(0.1)
with torch.no_grad():
    engine.module.eval()(torch.randn(500, 3, 32, 32))  # as the curve is read
print(foreseen, peak_memory(cpu))
"""


@pytest.mark.parametrize(
    "words",
    ["resnet 20 1 bn", "resnet 56 1 bn", "resnet 32 1 all", "vgg 16 4 all", "vgg 11 4 bn", "vgg_residual 38 2 all"],
)
def test_forecast_memory_is_within_a_quarter_of_the_measured_peak(words):
    words = [sys.executable, "-W", "ignore", "-c", PEAK, *words.split()]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    foreseen, peak = map(int, run.stdout.split())
    assert foreseen == pytest.approx(peak, rel=0.25)


def test_a_forecast_grows_with_depth_width_epochs_and_readings_and_adds_up():
    pace = Pace(torch.device("cpu"), 1)
    # A machine of which only depth matters.
    pace._time = lambda trial, members: budget.Timed(float(trial.depth), float(trial.depth))

    def seconds(probes=None, **changes):
        return forecast(digits(**({"depth": 32} | changes)), probes or {}, pace, 1, gpu=False).seconds

    assert seconds() == pytest.approx(10 * 32)
    assert seconds(steps=20) == pytest.approx(2 * seconds())
    assert seconds(depth=62) == pytest.approx(10 * 62)
    assert seconds(width=2) > 3 * seconds()
    assert seconds(trainable=Trainable.ALL) > seconds() > seconds(trainable=Trainable.OUTPUT)
    assert seconds({curve: EPOCH}) > seconds({curve: END}) > seconds({gamma: END})
    one = forecast(digits(), {curve: EPOCH}, pace, 1, gpu=False)
    both = total([one, one])
    assert (both.seconds, both.memory, both.disk) == (2 * one.seconds, one.memory, 2 * one.disk)
    assert forecast(digits(), {}, pace, 2, gpu=False).seconds == pytest.approx(seconds(depth=8) / 2)


def test_a_timed_step_is_a_time():
    pace = Pace(torch.device("cpu"), 1)
    assert 0 < pace.step(digits()) < 5
    assert pace._step(digits(depth=56), 1).busy > pace._step(digits(), 1).busy


def test_nothing_of_a_timed_network_stays_where_no_garbage_is_looked_for(monkeypatch):
    made = []

    def built(trial):
        made.append(weakref.ref(network := build(trial)))
        return network

    monkeypatch.setattr(budget, "build", built)
    budget._counted.cache_clear()
    gc.disable()
    try:
        Pace(torch.device("cpu"), 1).step(digits(depth=14, trainable=Trainable.ALL))
        assert len(made) > 1
        assert not [network for network in made if network() is not None]
    finally:
        gc.enable()
