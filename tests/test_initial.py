"""Initial values have the moments and the structure that their papers give them, each tensor from its own stream."""

import math

import numpy as np
import pytest
import torch
from examples import digits
from torch import nn

from bnscale.networks import build, even_output
from bnscale.networks.initial import _WEIGHTS, even_biases
from bnscale.networks.norm import NormLayer
from bnscale.trial import (
    Affine,
    Augmentation,
    Data,
    Network,
    Norm,
    NormInit,
    OutputBias,
    Placement,
    Trainable,
    WeightInit,
)


def weights(kind: WeightInit, **changes) -> dict[str, torch.Tensor]:
    network = build(digits(data=Data.CIFAR10, validation=0, width=2, depth=14, weight_init=kind, **changes))
    return {n: m.weight.detach() for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


@pytest.mark.parametrize(
    ("kind", "uniform", "fans"),
    [
        (WeightInit.HE_NORMAL, False, lambda fan_in, fan_out: 2 / fan_in),
        (WeightInit.HE_UNIFORM, True, lambda fan_in, fan_out: 2 / fan_in),
        (WeightInit.GLOROT_NORMAL, False, lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
        (WeightInit.GLOROT_UNIFORM, True, lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
        (WeightInit.BINARY, None, lambda fan_in, fan_out: 2 / fan_in),
        (WeightInit.GAUSSIAN, False, lambda fan_in, fan_out: 1.0),
    ],
)
def test_random_weights_have_the_variance_and_the_shape_of_their_distribution(kind, uniform, fans):
    for name, weight in weights(kind).items():
        if weight.numel() < 4_000:
            continue
        pixels = weight[0, 0].numel()
        variance = fans(weight.shape[1] * pixels, weight.shape[0] * pixels)
        assert float(weight.mean()) == pytest.approx(0, abs=4 * math.sqrt(variance / weight.numel())), name
        assert float(weight.var()) == pytest.approx(variance, rel=0.08), name
        # Fourth moment over squared variance: 3 for normal, 9/5 for uniform, 1 for two values.
        kurtosis = float((weight / math.sqrt(variance)).pow(4).mean())
        assert kurtosis == pytest.approx({False: 3.0, True: 1.8, None: 1.0}[uniform], rel=0.12), name


@pytest.mark.parametrize("kind", [WeightInit.ORTHOGONAL, WeightInit.DELTA_ORTHOGONAL])
def test_orthogonal_weights_have_singular_values_one(kind):
    for name, weight in weights(kind).items():
        if kind is WeightInit.DELTA_ORTHOGONAL and weight.dim() == 4:
            middle = weight.shape[-1] // 2
            centre = weight[:, :, middle, middle].clone()
            weight[:, :, middle, middle] = 0
            assert (weight == 0).all(), f"{name}: off the centre"
            weight = centre
        torch.testing.assert_close(
            torch.linalg.svdvals(weight.flatten(1)), torch.ones(min(weight.flatten(1).shape)), msg=name
        )


def test_a_delta_orthogonal_convolution_keeps_the_norm_of_every_pixel():
    weight = weights(WeightInit.DELTA_ORTHOGONAL)["blocks.0.conv1"]
    images = torch.randn(2, weight.shape[1], 8, 8)
    out = nn.functional.conv2d(images, weight, padding=1)
    torch.testing.assert_close(out.norm(dim=1), images.norm(dim=1))


def test_products_of_gaussian_matrices_reach_the_theorys_singular_values():
    """Bjorck et al. 2018, section 4: the largest of M factors tends to sqrt((M+1)^(M+1) / M^M) sqrt(N)^M."""
    size = 300
    for factors in (1, 3):
        trial = digits(
            data=Data.LINEAR_TEACHER, augmentation=Augmentation.NONE, network=Network.LINEAR, depth=factors, width=size,
            norm=Norm.NONE, weight_init=WeightInit.GAUSSIAN, trainable=Trainable.ALL,
        )  # fmt: skip
        product = build(trial)(torch.eye(size)[..., None, None]).detach()
        largest = float(torch.linalg.svdvals(product).max()) / math.sqrt(size) ** factors
        expected = math.sqrt((factors + 1) ** (factors + 1) / factors**factors)
        assert largest == pytest.approx(expected, rel=0.05)


def test_every_way_to_draw_weights_is_known_and_gives_other_weights_from_the_same_seed():
    assert _WEIGHTS.keys() == set(WeightInit)
    drawn = [weights(kind)["blocks.3.conv2"] for kind in WeightInit]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_normal_gammas_are_standard_normal():
    network = build(digits(data=Data.CIFAR10, validation=0, depth=56, norm_init=NormInit.NORMAL))
    gamma = torch.cat([m.weight.detach() for m in network.modules() if isinstance(m, NormLayer)])
    assert (float(gamma.mean()), float(gamma.std())) == pytest.approx((0, 1), abs=0.07)


def test_a_norm_without_gamma_or_beta_takes_nothing_from_the_others_draws():
    both = build(digits()).state_dict()
    for affine, missing in ((Affine.GAMMA, "bias"), (Affine.BETA, "weight")):
        part = build(digits(affine=affine)).state_dict()
        assert both.keys() - part.keys() == {n for n in both if "norm" in n and n.endswith(missing)}
        assert all(torch.equal(part[name], both[name]) for name in part)


def test_affine_parameters_stand_where_they_are_asked_for():
    network = build(digits(affine_at=Placement.STAGE_ENDS))
    has = [n for n, m in network.named_modules() if isinstance(m, NormLayer) and m.weight is not None]
    assert has == ["blocks.0.norm2", "blocks.1.norm2", "blocks.2.norm2"]


# --- class biases -------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0, 3000.0])
def test_even_biases_even_the_mean_softmax_however_far_apart_the_logits(spread):
    draws = np.random.default_rng(0)
    logits = draws.normal(size=(128, 10)) * spread + draws.normal(size=10) * spread * 2
    biases = even_biases(logits)
    shifted = logits + biases
    softmax = np.exp(shifted - shifted.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    np.testing.assert_allclose(softmax.mean(0), 0.1, atol=1e-5)
    assert biases.mean() == pytest.approx(0, abs=1e-8 * spread)


@pytest.mark.parametrize("norm", [Norm.BATCH, Norm.NONE, Norm.NOISY])
def test_an_even_output_is_even_on_its_batch_and_moves_nothing_but_the_biases(norm):
    trial = digits(norm=norm, trainable=Trainable.ALL, output_bias=OutputBias.EVEN)
    network = build(trial)
    images_NCHW = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert network(images_NCHW).softmax(1).mean(0).max() > 0.12
    network.load_state_dict(before)
    even_output(network, images_NCHW)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == (name != "output.bias"), name
    torch.testing.assert_close(network(images_NCHW).softmax(1).mean(0), torch.full((10,), 0.1), rtol=0, atol=1e-5)


def test_output_biases_are_zero_where_asked():
    assert (build(digits(output_bias=OutputBias.ZERO)).output.bias == 0).all()
    assert (build(digits()).output.bias != 0).all()
