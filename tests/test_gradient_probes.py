"""Probes of gradients, moments and losses along directions, against closed forms and brute force.

The smallest networks that can be written down are matrices: W x against A x on Gaussian x, whose loss is
half the squared error, added up over the vectors, so that its gradient is sum_n (W x_n - A x_n) x_n^T.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from examples import digits
from torch import Tensor

from bnscale.data import Resident
from bnscale.engine import Gang
from bnscale.engine.local import LocalEngine
from bnscale.networks import build
from bnscale.networks.layers import layers
from bnscale.networks.norm import BatchNorm
from bnscale.probes import (
    Snapshot,
    along,
    at_layers,
    batches,
    channel_moments,
    check,
    clamp,
    class_bias,
    gamma,
    gradient,
    gradient_histogram,
    gradient_matrix,
    gradient_noise,
    loss_along_gradient,
    loss_along_mean_gradient,
    mean_gradient,
    moments_along_gradient,
    spectrum,
)
from bnscale.probes.along import LENGTHS, dot, moved, orthogonal
from bnscale.probes.gradient import effective_rank, hill, kurtosis
from bnscale.trial import Augmentation, Data, Network, Norm, Placement, Refusal, Trainable, Trial

CPU = torch.device("cpu")


def snapshot(**changes: Any) -> Snapshot:
    """Of an 8-layer network on digits, everything trained, before its first update."""
    trial = digits(**({"trainable": Trainable.ALL, "augmentation": Augmentation.NONE} | changes))
    engine = LocalEngine(build(trial), trial, Gang(), None)
    return Snapshot(trial, 0, engine, Resident(trial, Path("/nonexistent"), CPU))


def matrix(**changes: Any) -> tuple[Snapshot, Tensor, Tensor, Tensor]:
    """One matrix: the snapshot, W, x as rows, and the errors W x - A x as rows, in float64."""
    fields = {
        "data": Data.LINEAR_TEACHER, "network": Network.LINEAR, "depth": 1, "width": 6, "norm": Norm.NONE, "batch": 50,
        "norm_batch": 50,
    }  # fmt: skip
    at = snapshot(**(fields | changes))
    images, targets_NK = at.batch()
    weight_KK, x_NK = at.network.output.weight.detach().double(), images.flatten(1).double()
    return at, weight_KK, x_NK, x_NK @ weight_KK.T - targets_NK.double()


# --- one layer's gradient ---------------------------------------------------------------------------


def test_a_linear_layers_sums_of_gradients_are_those_of_its_terms():
    at, _, x_NK, error_NK = matrix()
    terms_NKK = error_NK[:, :, None] * x_NK[:, None, :]
    (row,) = gradient(at)
    assert (row.layer, row.layer_index, row.weights, row.terms) == ("output", 1, 36, 50)
    assert row.sum_of_magnitudes == pytest.approx(float(terms_NKK.abs().sum(0).mean()), rel=1e-5)
    assert row.magnitude_of_sum == pytest.approx(float(terms_NKK.sum(0).abs().mean()), rel=1e-5)
    assert row.rms == pytest.approx(float(terms_NKK.sum(0).square().mean().sqrt()), rel=1e-5)


def test_a_convolutions_sums_of_gradients_are_those_of_its_terms_over_images_and_pixels():
    at = snapshot(batch=4, norm_batch=4)
    images, labels = at.batch()
    rows = {row.layer_index: row for row in gradient(at)}
    assert rows[1].terms == 4 * 64
    # The stem's terms, written out: its output's gradient times the patch of the image under the kernel.
    network = at.network
    stem = network.conv(images).detach().requires_grad_()
    rest = network.output(
        F.avg_pool2d(x := network.blocks(torch.relu(network.norm(stem))), x.shape[-1]).flatten(1)
    )  # fmt: skip
    (slope_NOHW,) = torch.autograd.grad(F.cross_entropy(rest, labels), [stem])
    patches_NKP = F.unfold(images, 3, padding=1)  # nine places of one channel, 64 pixels
    terms = slope_NOHW.flatten(2)[:, :, None, :] * patches_NKP[:, None, :, :]  # N, O, K, P
    assert rows[1].sum_of_magnitudes == pytest.approx(float(terms.abs().sum((0, 3)).mean()), rel=1e-4)
    assert rows[1].magnitude_of_sum == pytest.approx(float(terms.sum((0, 3)).abs().mean()), rel=1e-4)


def test_the_gradient_of_a_single_vector_has_rank_one():
    at, _, _, _ = matrix(batch=1, norm_batch=1)
    (row,) = gradient(at)
    assert row.effective_rank == pytest.approx(1, abs=1e-4)
    assert row.channel_rank == pytest.approx(1, abs=1e-4)
    assert row.full_rank == row.full_channel_rank == 6
    first = next(iter(gradient(snapshot())))  # the stem: 16 channels of 1 by 3 by 3
    assert (first.full_rank, first.full_channel_rank) == (9, 1)


def test_effective_rank_counts_equal_singular_values_and_ignores_small_ones():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-9]))) == pytest.approx(3, abs=1e-5)
    assert effective_rank(torch.zeros(3, 3)) is None


def test_the_tail_index_of_a_pareto_distribution_is_its_exponent():
    draws = np.random.default_rng(0)
    for exponent in (1.5, 3.0):
        sizes = np.sort(draws.pareto(exponent, 200_000) + 1)
        assert hill(sizes) == pytest.approx(exponent, rel=0.03)
    # P(|z| > 1.96) is 5 %; beyond it log |z| / 1.96 is 0.165 in the mean (numerically), so the index is 6.05.
    assert hill(np.sort(abs(draws.normal(size=500_000)))) == pytest.approx(6.05, rel=0.03)
    assert hill(np.ones(1000)) is None, "without an excess there is no tail"
    assert hill(np.sort(abs(draws.normal(size=100)))) is None, "too few"


def test_kurtosis_is_3_for_a_normal_and_6_for_a_laplace_distribution():
    draws = np.random.default_rng(0)
    assert kurtosis(draws.normal(3, 2, size=1_000_000)) == pytest.approx(3, rel=0.02)
    assert kurtosis(draws.laplace(size=1_000_000)) == pytest.approx(6, rel=0.03)
    assert kurtosis(np.full(5, 2.0)) is None


def test_the_histogram_counts_every_weight_of_its_layer_once_and_the_matrix_holds_every_pair_of_channels():
    at = snapshot()
    weight = at.gradients(["blocks.1.conv2.weight"])["blocks.1.conv2.weight"]  # layer 5: stem, two blocks of two
    rows = list(at_layers(gradient_histogram, 5)(at))
    assert sum(row.weights for row in rows) == rows[0].all_weights == weight.numel()
    assert -rows[0].low == rows[-1].high == pytest.approx(float(weight.abs().max()))
    upper = [row.weights for row in rows if row.low >= -1e-12]
    assert sum(upper) == int((weight >= 0).sum())
    pairs = {(row.output, row.input): row.magnitude for row in at_layers(gradient_matrix, 5)(at)}
    assert len(pairs) == 32 * 32
    assert pairs[3, 7] == pytest.approx(float(weight[3, 7].abs().mean()))


def test_layers_are_counted_as_the_papers_do():
    for network, depth in ((Network.RESNET, 20), (Network.VGG_RESIDUAL, 14), (Network.VGG, 16)):
        trial = digits(network=network, depth=depth)
        found = layers(build(trial))
        assert [layer.number for layer in found] == list(range(1, trial.layers + 1))
        assert found[-1].name == "output"
        assert trial.layers == {"resnet": 20, "vgg_residual": 14, "vgg": 14}[network]
        for site in trial.norms:
            if not site.shortcut:
                assert found[site.layer - 1].module.weight.shape[0] == site.channels


# --- moments ----------------------------------------------------------------------------------------


def test_channel_moments_are_of_what_a_layer_computes_before_any_norm():
    at = snapshot()
    stem = F.conv2d(at.batch()[0], at.network.conv.weight, padding=1).detach().double()
    row = next(iter(channel_moments(at)))
    mean_C, sd_C = stem.mean((0, 2, 3)), stem.std((0, 2, 3), correction=0)
    assert (row.layer_index, row.channels) == (1, 16)
    assert row.mean == pytest.approx(float(mean_C.abs().mean()), rel=1e-5)
    assert row.mean_sd == pytest.approx(float(mean_C.abs().std(correction=0)), rel=1e-5)
    assert row.sd == pytest.approx(float(sd_C.mean()), rel=1e-5)
    assert row.sd_sd == pytest.approx(float(sd_C.std(correction=0)), rel=1e-5)


# --- along directions -------------------------------------------------------------------------------


def test_a_quadratics_loss_along_its_gradient_is_the_parabola_of_slope_and_curvature():
    at, _, x_NK, error_NK = matrix()
    slope_KK = error_NK.T @ x_NK
    before = float(error_NK.square().sum()) / 2
    rows = list(loss_along_gradient(at))
    assert len(rows) > 5
    for row in rows:
        curvature = float((x_NK @ slope_KK.T).square().sum())
        expected = before - row.length * float(slope_KK.square().sum()) + row.length**2 / 2 * curvature
        assert row.loss == pytest.approx(expected, rel=1e-4)
        assert row.loss_before == pytest.approx(before, rel=1e-5)
        assert row.relative == pytest.approx(row.loss / row.loss_before)


def test_a_loss_is_looked_at_up_to_a_million_times_what_it_was_and_no_further(monkeypatch):
    at, _, _, _ = matrix()
    monkeypatch.setattr(along, "LENGTHS", (1e-3, 0.1, 10.0, 1e4, 1e6, 1e30))
    rows = list(loss_along_gradient(at))
    assert {1e-3, 0.1, 10.0, 1e4} <= {row.length for row in rows}, "between them it looks more closely"
    assert rows == sorted(rows, key=lambda row: row.length)
    assert rows[-1].length == 1e4, "the fourth is beyond"
    for left, right in itertools.pairwise(rows):
        if left.relative <= 1e6:  # where the loss jumps it is known within a quarter
            assert right.relative <= 10 * left.relative or right.length <= 1.25 * left.length
    monkeypatch.setattr(along, "LENGTHS", (1e30,))
    (row,) = loss_along_gradient(Snapshot(at.trial, 0, at._engine, at.data))
    assert row.loss == math.inf, "what left the float32 numbers is infinite, not missing"


def test_a_random_direction_is_orthogonal_to_the_gradient_as_long_and_the_same_each_time():
    at = snapshot()
    random = orthogonal(at, at.gradient)
    length = dot(at.gradient, at.gradient)
    assert dot(random, random) == pytest.approx(length, rel=1e-5)
    assert abs(dot(random, at.gradient)) < 1e-5 * length
    again = orthogonal(snapshot(), at.gradient)
    assert all(torch.equal(part, again[name]) for name, part in random.items())
    other = orthogonal(snapshot(seed=1), at.gradient)
    assert not torch.equal(random["conv.weight"], other["conv.weight"])


def test_the_mean_gradient_leads_down_and_a_random_direction_of_its_length_hardly_changes_the_loss():
    rows = list(loss_along_mean_gradient(snapshot()))
    first = {row.direction: row for row in rows if row.length == LENGTHS[0]}
    slope = dot((at := snapshot()).gradient, at.kept(batches.mean_gradient_of))
    expected = first["mean gradient"].loss_before - LENGTHS[0] * slope
    assert first["mean gradient"].loss == pytest.approx(expected, rel=1e-5)
    assert abs(first["random"].relative - 1) < abs(first["mean gradient"].relative - 1)


def test_moments_along_the_gradient_are_those_of_the_moved_network():
    at = snapshot(norm=Norm.NONE)
    rows = list(at_layers(moments_along_gradient, 1, 4)(at))
    assert {row.layer_index for row in rows} == {1, 4}
    end = [row for row in rows if row.fraction == 1 and row.layer_index == 1]
    weight = moved(at, at.gradient, end[0].length)["conv.weight"]
    stem = F.conv2d(at.batch()[0], weight, padding=1).double()
    assert [row.mean for row in end] == pytest.approx(stem.mean((0, 2, 3)).tolist(), rel=1e-4, abs=1e-5)
    assert [row.variance for row in end] == pytest.approx(stem.var((0, 2, 3), correction=0).tolist(), rel=1e-4)
    losses = {row.length: row.relative for row in loss_along_gradient(at)}
    assert end[0].diverges == (losses[end[0].length] > 1e3)
    assert all(relative <= 1e3 for length, relative in losses.items() if length < end[0].length)


# --- several mini-batches ---------------------------------------------------------------------------


@pytest.fixture
def sixty_four(monkeypatch):
    """64 images in one batch, cut into mini-batches of 1, 8 and 32; and the gradient of each image, by brute force."""
    monkeypatch.setattr(batches, "MOST", 64)
    monkeypatch.setattr(batches, "IMAGES", 64)
    at = snapshot(norm=Norm.NONE, batch=64, norm_batch=64)
    images, labels = at.batch()
    each = []
    for image, label in zip(images, labels, strict=True):
        at.network.zero_grad()
        F.cross_entropy(at.network(image[None]), label[None]).backward()
        each.append(torch.cat([p.grad.flatten() for p in at.network.parameters()]).double())
    at.network.zero_grad()
    return at, torch.stack(each)


def test_the_noise_of_single_images_is_the_variance_of_their_gradients(sixty_four):
    at, each_NP = sixty_four
    rows = {row.batch: row for row in gradient_noise(at)}
    assert set(rows) == {1, 8, 32, 64}
    assert rows[1].batches == 64
    assert rows[1].variance == pytest.approx(float(each_NP.var(0, correction=1).sum()), rel=1e-4)
    for size in (8, 32):
        means = each_NP.view(64 // size, size, -1).mean(1)
        assert rows[size].variance == pytest.approx(float(means.var(0, correction=1).sum()), rel=1e-4)
        unbiased = float(means.mean(0).square().sum()) - rows[size].variance / len(means)
        assert rows[size].mean_square == pytest.approx(unbiased, rel=1e-3)


def test_a_mini_batch_with_norms_over_images_is_normalized_by_itself():
    at = snapshot()
    rows = list(gradient_noise(at))
    assert [row.batch for row in rows] == [2, 8, 16], "a single image has no statistics over images"
    images, labels = (part[:8] for part in at.batch())
    fresh = build(digits(trainable=Trainable.ALL, batch=8, norm_batch=8, augmentation=Augmentation.NONE))
    F.cross_entropy(fresh(images), labels).backward()
    for name, part in at.gradients_on((images, labels), at.names()).items():
        torch.testing.assert_close(part, fresh.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    assert {m.norm_batch for m in at.network.modules() if isinstance(m, BatchNorm)} == {16}


def test_the_mean_gradient_is_split_into_what_batches_share_and_what_they_do_not():
    at = snapshot()
    name = "blocks.0.conv1.weight"
    each = [at.gradients_on(at.batch(ahead), [name])[name] for ahead in range(4)]
    stacked = torch.stack(each).flatten(1).double()
    row = next(row for row in mean_gradient(at) if row.layer == "blocks.0.conv1")
    assert (row.batches, row.batch) == (4, 16)
    assert row.mean_square == pytest.approx(float(stacked.mean(0).square().sum()), rel=1e-5)
    assert row.batch_square == pytest.approx(float(stacked.square().sum(1).mean()), rel=1e-5)
    assert row.batch_variance == pytest.approx(float(stacked.var(0, correction=1).sum()), rel=1e-4)
    lengths = torch.stack(each).flatten(2).double().norm(dim=2)
    overall = float(lengths.mean()) ** 2
    noise = float(lengths.var(0).mean())
    assert row.between_batches == pytest.approx(noise / overall, rel=1e-5)
    between = float(lengths.mean(0).var(correction=0)) - noise / 4
    assert row.between_units == pytest.approx(between / overall, rel=1e-4)


def test_a_weight_that_a_batch_norm_follows_has_no_radial_gradient_and_one_without_has():
    normed = [row for row in mean_gradient(snapshot()) if row.layer != "output"]
    assert all(abs(row.radial) < 1e-4 * row.tangential for row in normed), "scaling such weights changes nothing"
    free = [row for row in mean_gradient(snapshot(norm=Norm.NONE)) if row.layer != "output"]
    assert any(abs(row.radial) > 1e-2 * row.tangential for row in free)
    for row in [*normed, *free]:
        assert row.radial**2 + row.tangential**2 == pytest.approx(row.mean_square, rel=1e-6)


# --- classes ----------------------------------------------------------------------------------------


def test_the_gradient_at_the_output_is_that_of_the_mean_loss_and_evened_classes_share_the_images():
    at = snapshot(norm=Norm.NONE)
    images, labels = at.batch()
    logits = at.network(images).detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, labels), [logits])
    logits = logits.detach()
    rows = list(class_bias(at))
    for biases in ("as they are", "evened"):
        own = [row for row in rows if row.biases == biases]
        assert len(own) == 16 * 10
        taken = np.zeros(10)
        for row in own:
            taken[row.output] += row.probability / 16
        assert taken.sum() == pytest.approx(1)
        if biases == "evened":
            assert taken == pytest.approx(np.full(10, 0.1), abs=1e-5)
        else:
            assert max(abs(taken - 0.1)) > 0.01
            for row in own:
                assert row.gradient == pytest.approx(float(slope[row.image, row.output]), rel=1e-4, abs=1e-7)
                assert row.logit == pytest.approx(float(logits[row.image, row.output]), rel=1e-4, abs=1e-6)


# --- refusals ---------------------------------------------------------------------------------------


def without(**changes: Any) -> Trial:
    return digits(trainable=Trainable.ALL, **changes)


@pytest.mark.parametrize(
    ("probe", "trial", "words"),
    [
        (gamma, without(norm=Norm.NONE), "gamma: the CIFAR ResNet of depth 8 with norm none has no gamma or beta"),
        (clamp, without(norm=Norm.NOISE), "clamp: .* depth 8 with norm noise, placement every has no gamma"),
        (spectrum, without(), "spectrum: the CIFAR ResNet of depth 8 .* has nonlinearities"),
    ],
)
def test_a_probe_refuses_a_trial_that_lacks_what_it_measures(probe, trial, words):
    with pytest.raises(Refusal, match=words):
        check(probe, trial)


def test_a_probe_of_some_layers_refuses_a_network_that_is_not_so_deep():
    check(at_layers(gradient_matrix, 3, 8), digits())
    with pytest.raises(Refusal, match=r"gradient_matrix: the CIFAR ResNet of depth 8 .* has no layer 55: it has 8"):
        check(at_layers(gradient_matrix, 3, 55), digits())
    for layers_ in ((), (0,), (4, 3), (2, 2)):
        with pytest.raises(Refusal, match="gradient_matrix"):
            at_layers(gradient_matrix, *layers_)


def test_a_regression_has_no_classes():
    at, _, _, _ = matrix()
    with pytest.raises(Refusal, match="class_bias: the deep linear network of depth 1 with norm none has no classes"):
        check(class_bias, at.trial)


def test_a_network_whose_gradient_overflows_is_read_as_far_as_it_has_numbers():
    at = snapshot(norm=Norm.NONE, placement=Placement.NONE)
    with torch.no_grad():
        at.network.blocks[1].conv1.weight.fill_(1e38)
    assert all(math.isfinite(row.rms) for row in gradient(at))
    assert {row.layer_index for row in channel_moments(at)} == {1, 2, 3}, "layer 4 and what follows overflowed"
    assert list(class_bias(at)) == []
    assert list(loss_along_gradient(at)) == []
