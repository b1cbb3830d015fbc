"""Where norms can stand is arithmetic, and the networks that are built agree with it."""

import pytest
import torch
from examples import digits
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bnscale.anatomy import _PLACEMENTS, FAMILIES, VGG_STAGES, placed
from bnscale.networks import assemble
from bnscale.networks.norm import BatchNorm
from bnscale.trial import Augmentation, Data, Network, Norm, Placement, Refusal, Trainable, Trial

VISION = [
    (Network.RESNET, 14, 1),
    (Network.RESNET, 26, 2),
    *((Network.VGG, depth, 1) for depth in VGG_STAGES),
    (Network.VGG_RESIDUAL, 8, 1),
    (Network.VGG_RESIDUAL, 38, 2),
    *((Network.IMAGENET_RESNET, depth, 4) for depth in (18, 34, 50, 101)),
]


def trial(network: Network, depth: int, width: int, **changes) -> Trial:
    fields = {"network": network, "depth": depth, "width": width, "trainable": Trainable.ALL, "validation": 0}
    if network is Network.LINEAR:
        fields |= {"data": Data.LINEAR_TEACHER, "augmentation": Augmentation.NONE}
    return digits(**({"data": Data.CIFAR10} | fields | changes))


def weighted(network: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize("placement", [p for p in Placement if p is not Placement.NONE])
@pytest.mark.parametrize(("network", "depth", "width"), VISION, ids=str)
def test_norms_stand_in_the_network_where_arithmetic_says_on_maps_of_that_size(network, depth, width, placement):
    try:
        asked = trial(network, depth, width, placement=placement)
    except Refusal:
        assert placed(network, depth, width, 32, placement) == []
        return
    with torch.device("meta"):
        built = assemble(asked)
        found: list[tuple[str, int, int]] = []
        for name, module in built.named_modules():
            if isinstance(module, BatchNorm):
                module.register_forward_hook(
                    lambda m, inputs, output, name=name: found.append(
                        (name, m.channels, 1 if output.dim() == 2 else output.shape[-1])
                    )
                )
        built.eval()(torch.zeros(2, 3, 32, 32))
    assert found == [(site.name, site.channels, site.side) for site in asked.norms]


@pytest.mark.parametrize(("network", "depth", "width"), [*VISION, (Network.LINEAR, 25, 10)], ids=str)
def test_a_site_follows_each_layer_but_the_output_and_layers_are_as_many_as_the_depth(network, depth, width):
    asked = trial(network, depth, width)
    with torch.device("meta"):
        layers = weighted(assemble(asked))
    shortcuts = [n for n, _ in layers if {"shortcut", "downsample"} & set(n.split("."))]
    if network is Network.VGG:
        depth -= 2  # two of the linear layers in its name are left out
    assert len(layers) - len(shortcuts) == depth
    assert len(asked.norms) == len(layers) - 1
    assert len([site for site in asked.norms if site.shortcut]) == len(shortcuts)
    longest = [site.layer for site in asked.norms if not site.shortcut]
    assert longest == list(range(1, depth))
    for site in asked.norms:
        if site.shortcut:  # it ends where the last layer of its block does
            assert site.name.rsplit(".", 2)[0] == asked.norms[asked.norms.index(site) - 1].name.rsplit(".", 1)[0]


@given(st.integers(1, 60), st.sampled_from([2, 3, 4, 5, 10]))
def test_norm_counts_of_a_cifar_resnet_follow_from_its_depth(n, k):
    """6n+2 layers: 6n+1 convolutions, two shortcuts beside layers 2n+3 and 4n+3, three stage ends, 6n branch layers."""

    def count(placement: Placement) -> int:
        return len(placed(Network.RESNET, 6 * n + 2, 1, 32, placement))

    assert count(Placement.EVERY) == 6 * n + 1 + 2
    beside = sum(layer % k == 0 for layer in (2 * n + 3, 4 * n + 3))
    assert count(Placement(f"every_{k}")) == (6 * n + 1) // k + beside
    assert count(Placement.STAGE_ENDS) == 3
    assert count(Placement.BRANCH) == 6 * n
    assert count(Placement.FIRST) == count(Placement.LAST) == 1
    assert count(Placement.NONE) == 0


@pytest.mark.parametrize(("depth", "expected"), [(18, 20), (50, 53), (152, 155), (200, 203)])
def test_norm_counts_of_imagenet_resnets_are_torchvisions(depth, expected):
    # A norm after each convolution: depth - 1, and 3 (blocks of two) or 4 (blocks of three) on shortcuts.
    assert len(placed(Network.IMAGENET_RESNET, depth, 4, 224, Placement.EVERY)) == expected


def test_stage_ends_first_and_last_are_where_their_names_say():
    def names(placement: Placement, network: Network = Network.RESNET, depth: int = 14) -> list[str]:
        return [site.name for site in placed(network, depth, 1, 32, placement)]

    assert names(Placement.STAGE_ENDS) == ["blocks.1.norm2", "blocks.3.norm2", "blocks.5.norm2"]
    assert names(Placement.FIRST) == ["norm"]
    assert names(Placement.LAST) == ["head_norm"]
    assert names(Placement.EVERY_5) == ["blocks.1.norm2", "blocks.4.norm1"]
    assert names(Placement.STAGE_ENDS, Network.VGG, 11) == [f"layers.{i}.norm" for i in (1, 2, 4, 6, 8)]
    assert names(Placement.LAST, Network.LINEAR, 25) == ["layers.24.norm"]
    assert names(Placement.BRANCH, Network.VGG_RESIDUAL, 14) == [
        f"blocks.{block}.norm{i}" for block in (0, 2, 4) for i in (1, 2)
    ]


def test_every_placement_and_every_family_is_known():
    assert _PLACEMENTS.keys() == set(Placement)
    assert FAMILIES.keys() == set(Network)


@pytest.mark.parametrize(
    ("network", "depth", "near"),
    [
        (Network.RESNET, 25, [20, 26]),  # the interim report's depths that a CIFAR ResNet cannot have
        (Network.RESNET, 76, [74, 80]),
        (Network.RESNET, 100, [98, 104]),
        (Network.RESNET, 2, [8]),
        (Network.RESNET, -3, [8]),
        (Network.VGG, 12, [11, 13]),
        (Network.VGG, 38, [19]),
        (Network.VGG_RESIDUAL, 37, [32, 38]),
        (Network.IMAGENET_RESNET, 110, [101, 152]),
        (Network.IMAGENET_RESNET, 1000, [200]),
        (Network.LINEAR, 0, [1]),
    ],
)
def test_a_depth_that_a_family_lacks_is_refused_with_the_nearest_it_has(network, depth, near):
    with pytest.raises(
        Refusal, match=rf"^depth {depth}: .*{FAMILIES[network].title}.*; try {' or '.join(map(str, near))}$"
    ):
        trial(network, depth, 4)


def test_the_interim_reports_other_depths_are_legal():
    for depth in (50, 152, 200):
        assert trial(Network.RESNET, depth, 1).depth == depth


def test_norm_none_and_placement_none_are_one_trial_whatever_else_norms_would_be():
    plain = trial(Network.RESNET, 14, 1, norm=Norm.NONE)
    assert plain == trial(Network.RESNET, 14, 1, placement=Placement.NONE)
    assert plain == trial(Network.RESNET, 14, 1, norm=Norm.NONE, placement=Placement.EVERY_2, norm_batch=8)
    assert plain.norms == []
    assert trial(Network.RESNET, 14, 1, norm=Norm.LAYER, norm_batch=8) == trial(Network.RESNET, 14, 1, norm=Norm.LAYER)
    assert trial(Network.RESNET, 14, 1, groups=4) == trial(Network.RESNET, 14, 1)
