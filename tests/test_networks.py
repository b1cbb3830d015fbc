"""The CIFAR ResNet is Frankle's: its counts, its values, its freezing."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from examples import digits
from safetensors.torch import load_file
from torch import nn

from bnscale.engine import Gang
from bnscale.engine.local import LocalEngine
from bnscale.networks import assemble, build, trained
from bnscale.networks.imagenet import ImageNetResNet
from bnscale.networks.norm import BatchNorm, norms_of
from bnscale.networks.trainable import PairConv2d
from bnscale.networks.vgg import Pair, Reduction
from bnscale.trial import Augmentation, Data, Network, Norm, NormInit, Placement, Trainable

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
    # In double precision the second loss is 4e-6 from the reference's and the fifth 9e-5: so far float32 itself is from
    # what it stands for, and kernels of another processor need not be nearer to each other.
    torch.testing.assert_close(torch.stack(losses[:2]), expected[:2], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.stack(losses), expected, rtol=1e-4, atol=0)

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


# --- the other families -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "total", "norms"),
    [(11, 9_231_114, 5_504), (13, 9_416_010, 5_888), (16, 14_728_266, 8_448), (19, 20_040_522, 11_008)],
)
def test_vggs_have_the_parameters_of_frankles_code(depth, total, norms):
    # Counted from the definition in open_lth, models/cifar_vgg.py.
    with torch.device("meta"):
        network = assemble(cifar(network=Network.VGG, depth=depth, width=4))
    assert sum(p.numel() for p in network.parameters()) == total
    assert sum(p.numel() for m in network.modules() if isinstance(m, BatchNorm) for p in m.parameters()) == norms


# Frankle et al. 2021, table of parameters: total, BatchNorm, output, shortcut convolutions; 1,000 classes.
IMAGENET = {
    18: (11_689_512, 9_600, 513_000, 172_032),
    34: (21_797_672, 17_024, 513_000, 172_032),
    50: (25_557_032, 53_120, 2_049_000, 2_768_896),
    101: (44_549_160, 105_344, 2_049_000, 2_768_896),
    200: (64_673_832, 176_000, 2_049_000, 2_768_896),
}


@pytest.mark.parametrize("depth", IMAGENET)
def test_imagenet_resnets_have_the_papers_parameters(depth):
    trial = cifar(network=Network.IMAGENET_RESNET, depth=depth, width=4)
    with torch.device("meta"):
        network = ImageNetResNet(depth, 3, 1000, norms_of(trial))
    norms = [p for m in network.modules() if isinstance(m, BatchNorm) for p in m.parameters()]
    shortcuts = [m for n, m in network.named_modules() if "downsample" in n and isinstance(m, nn.Conv2d)]
    counted = [network.parameters(), norms, network.output.parameters(), [p for m in shortcuts for p in m.parameters()]]
    assert tuple(sum(p.numel() for p in part) for part in counted) == IMAGENET[depth]


@pytest.mark.parametrize("depth", [18, 50])
def test_an_imagenet_resnet_computes_what_torchvisions_does(depth):
    trial = cifar(network=Network.IMAGENET_RESNET, depth=depth, width=4, trainable=Trainable.ALL)
    ours = ImageNetResNet(depth, 3, 1000, norms_of(trial))
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    named = {f"output.{n[3:]}" if n.startswith("fc.") else f"body.{n}": v for n, v in theirs.state_dict().items()}
    ours.load_state_dict(named, strict=True)
    images_NCHW = torch.randn(trial.norm_batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(images_NCHW), theirs(images_NCHW))
    torch.testing.assert_close(ours.eval()(images_NCHW), theirs.eval()(images_NCHW))


def test_a_vgg_computes_what_its_definition_says():
    network = build(cifar(network=Network.VGG, depth=11, width=1, trainable=Trainable.ALL))
    images_NCHW = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = images_NCHW
    for number, pool in zip(range(1, 9), [1, 1, 0, 1, 0, 1, 0, 0], strict=True):
        layer = network.layers.get_submodule(str(number))
        x = F.conv2d(x, layer.conv.weight, layer.conv.bias, padding=1)
        x = F.relu(F.batch_norm(x, None, None, layer.norm.weight, layer.norm.bias, training=True))
        x = F.max_pool2d(x, 2) if pool else x
    assert x.shape == (16, 128, 2, 2)
    torch.testing.assert_close(network(images_NCHW), network.output(F.avg_pool2d(x, 2).flatten(1)))


def test_vgg38_has_three_stages_of_six_blocks_and_skips_around_those_that_do_not_pool():
    network = build(cifar(network=Network.VGG_RESIDUAL, depth=38, width=2, trainable=Trainable.ALL))
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 37
    assert {m.out_channels for m in convolutions} == {32}
    assert [type(block) for block in network.blocks] == ([Pair] * 5 + [Reduction]) * 3
    images_NCHW = torch.randn(16, 3, 32, 32)
    sides = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    network(images_NCHW)
    assert sides == [32] * 5 + [16] * 6 + [8] * 6 + [4]
    # Without its branch a block passes on what came in, leaky ReLU apart; one that pools passes on nothing.
    with torch.no_grad():
        for block in (network.blocks[0], network.blocks[5]):
            block.norm2.weight.zero_()
            block.norm2.bias.zero_()
        x = torch.rand(16, 32, 8, 8)
        torch.testing.assert_close(network.blocks[0](x.clone()), x)
        assert (network.blocks[5](x.clone()) == 0).all()


def test_a_linear_network_is_the_product_of_its_matrices():
    fields = {"data": Data.LINEAR_TEACHER, "augmentation": Augmentation.NONE, "network": Network.LINEAR}
    trial = digits(**fields, depth=25, width=10, norm=Norm.NONE, trainable=Trainable.ALL)
    network = build(trial)
    matrices = [m.weight for m in network.modules() if isinstance(m, nn.Linear)]
    assert [tuple(m.shape) for m in matrices] == [(10, 10)] * 25
    product = torch.linalg.multi_dot([m.double() for m in reversed(matrices)])
    x = torch.randn(16, 10, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(network.double()(x), x.flatten(1) @ product.T)


def test_one_norm_before_the_classifier_stands_behind_the_last_pooling():
    network = build(cifar(placement=Placement.LAST, trainable=Trainable.ALL))
    assert [n for n, m in network.named_modules() if isinstance(m, BatchNorm)] == ["head_norm"]
    images_NCHW = torch.randn(16, 3, 32, 32)
    features = network.blocks(network.relu(network.conv(images_NCHW))).mean([2, 3])
    expected = network.output(F.batch_norm(features, None, None, network.head_norm.weight, training=True))
    torch.testing.assert_close(network(images_NCHW), expected)
