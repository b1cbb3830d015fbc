"""The CIFAR ResNet is Frankle's: its counts, its values, its freezing."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from examples import digits
from safetensors.torch import load_file
from torch import nn

from bnscale.engine import Gang
from bnscale.engine.local import LocalEngine
from bnscale.networks import assemble, build, trained
from bnscale.networks.norm import BatchNorm
from bnscale.networks.trainable import PairConv2d
from bnscale.trial import Data, NormInit, Trainable

SHARED = Path(__file__).parents[2] / "shared" / "reference" / "resnet14_bn_only.safetensors"
OWN = Path(__file__).parent / "reference" / "resnet8.safetensors"


def cifar(**changes):
    return digits(data=Data.CIFAR10, validation=0, **changes)


# Frankle et al. 2021, table of parameters; exact integers of the authors' code.
TABLE = {
    (14, 1): (175_258, 1_120),
    (32, 1): (466_906, 2_464),
    (56, 1): (855_770, 4_256),
    (110, 1): (1_730_714, 8_288),
    (218, 1): (3_480_602, 16_352),
    (434, 1): (6_980_378, 32_480),
    (866, 1): (13_979_930, 64_736),
    (14, 2): (696_618, 2_240),
    (14, 4): (2_777_674, 4_480),
    (14, 8): (11_093_130, 8_960),
    (14, 16): (44_337_418, 17_920),
    (14, 32): (177_279_498, 35_840),
}


@pytest.mark.parametrize(("depth", "width"), TABLE)
def test_parameter_counts_are_the_papers(depth, width):
    with torch.device("meta"):
        network = assemble(cifar(depth=depth, width=width))
    norms = [p for m in network.modules() if isinstance(m, BatchNorm) for p in m.parameters()]
    assert (sum(p.numel() for p in network.parameters()), sum(p.numel() for p in norms)) == TABLE[depth, width]
    assert sum(p.numel() for p in network.output.parameters()) == 640 * width + 10
    shortcuts = [m for n, m in network.named_modules() if "shortcut" in n and isinstance(m, nn.Conv2d)]
    assert sum(p.numel() for m in shortcuts for p in m.parameters()) == 2_560 * width**2


@pytest.mark.parametrize(
    ("trainable", "count"),
    [
        (Trainable.ALL, 175_258),
        (Trainable.BN, 1_120),
        (Trainable.BN_OUTPUT, 1_120 + 650),
        (Trainable.BN_SHORTCUT_OUTPUT, 1_120 + 2_560 + 650),
        (Trainable.SHORTCUT_OUTPUT, 2_560 + 650),
        (Trainable.OUTPUT, 650),
        (Trainable.GAMMA, 560),
        (Trainable.BETA, 560),
        (Trainable.WEIGHTS, 175_258 - 1_120),
        (Trainable.TWO_PER_CHANNEL, 1_120),
        (Trainable.NONE, 0),
    ],
)
def test_what_may_train_has_as_many_parameters_as_the_papers_table_says(trainable, count):
    assert sum(p.numel() for p in trained(build(cifar(depth=14, trainable=trainable))).values()) == count


def theirs(name: str) -> str:
    """Our name of a tensor for open_lth's."""
    name = name.replace("fc.", "output.").replace("bn", "norm")
    return name.replace("shortcut.0", "shortcut.conv").replace("shortcut.1", "shortcut.norm")


@pytest.mark.parametrize("file", [SHARED, OWN] if SHARED.exists() else [OWN], ids=lambda file: file.stem)
def test_logits_gradients_and_five_steps_are_those_of_frankles_code(file):
    values, depth = load_file(file), 14 if file == SHARED else 8
    images_NCHW, labels_N = values["input"], values["target"]
    trial = cifar(depth=depth, batch=len(labels_N), norm_batch=len(labels_N))
    network = build(trial)
    initial = {theirs(n.removeprefix("state.")): v for n, v in values.items() if n.startswith("state.")}
    network.load_state_dict(initial, strict=True)
    network.train()
    logits_NK = network(images_NCHW)
    loss = F.cross_entropy(logits_NK, labels_N)
    loss.backward()
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(logits_NK, values["logits.train"], **close)
    torch.testing.assert_close(loss, values["loss.train"].reshape(()), **close)
    gradients = {theirs(n.removeprefix("grad.")): v for n, v in values.items() if n.startswith("grad.")}
    assert gradients.keys() == trained(network).keys()
    for name, parameter in trained(network).items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    network.eval()
    torch.testing.assert_close(network(images_NCHW), values["logits.eval_after_one_step"], rtol=1e-5, atol=1e-5)

    again = build(trial)
    again.load_state_dict(initial)
    sgd = torch.optim.SGD(trained(again).values(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(5):
        sgd.zero_grad()
        loss = F.cross_entropy(again(images_NCHW), labels_N)
        loss.backward()
        sgd.step()
        losses.append(loss.detach())
    expected = values["losses.five_sgd_steps"].reshape(-1)
    torch.testing.assert_close(torch.stack(losses), expected, rtol=1e-5, atol=0)

    # The engine's channels-last convolutions sum in another order, which five steps amplify.
    engine = LocalEngine(build(trial), trial, Gang(), None)
    engine.module.load_state_dict(initial)
    losses = []
    for _ in range(5):
        loss = engine(images_NCHW, labels_N)
        engine.backward(loss)
        engine.step(0.1)
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), expected, rtol=1e-4, atol=0)


def test_he_normal_weights_have_variance_two_over_fan_in():
    network = build(cifar(depth=32, width=2))
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            assert float(module.weight.var()) == pytest.approx(2 / module.weight[0].numel(), rel=0.05), name


@pytest.mark.parametrize(
    ("kind", "low", "high", "mean", "beta"),
    [
        (NormInit.UNIFORM, 0, 1, 0.5, 0),
        (NormInit.ONES, 1, 1, 1, 0),
        (NormInit.ONES_ONES, 1, 1, 1, 1),
        (NormInit.SYMMETRIC, -1, 1, 0, 0),
    ],
)
def test_gamma_and_beta_start_as_the_trial_says(kind, low, high, mean, beta):
    norms = [m for m in build(cifar(depth=32, norm_init=kind)).modules() if isinstance(m, BatchNorm)]
    gamma = torch.cat([m.weight.detach() for m in norms])
    assert low <= gamma.min() <= low + 0.01
    assert high - 0.01 <= gamma.max() <= high
    assert float(gamma.mean()) == pytest.approx(mean, abs=0.05)
    assert all((m.bias == beta).all() for m in norms)


def test_the_initial_network_is_a_function_of_the_seed_alone():
    first, same, other = (build(digits(seed=s, lr=lr)).state_dict() for s, lr in [(0, 0.1), (0, 0.3), (1, 0.1)])
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not torch.equal(first["conv.weight"], other["conv.weight"])
    assert not torch.equal(first["norm.weight"], other["norm.weight"])


def test_a_frozen_part_draws_nothing_away_from_the_others():
    whole = build(digits(trainable=Trainable.ALL)).state_dict()
    for trainable in Trainable:
        part = build(digits(trainable=trainable)).state_dict()
        assert all(torch.equal(whole[name], part[name]) for name in whole), trainable


def test_two_weights_a_channel_start_at_the_frozen_networks_function_and_are_distinct():
    images_NCHW = torch.randn(16, 1, 8, 8)
    pairs, plain = build(digits(trainable=Trainable.TWO_PER_CHANNEL)), build(digits())
    torch.testing.assert_close(pairs(images_NCHW), plain(images_NCHW))
    for module in pairs.modules():
        if isinstance(module, PairConv2d):
            assert (module.index[:, 0] != module.index[:, 1]).all()
