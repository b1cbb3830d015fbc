"""Probes of batch norm's gradients, of the loss's second-order series and of scale: against finite differences, closed
forms and what the theory of a scale-invariant function says."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from examples import digits
from test_santurkar_probes import MATRICES, NETWORKS, PLAIN, VGG, Run, matrix
from torch import nn
from torch.func import functional_call

from bnscale import loss
from bnscale.networks import build
from bnscale.networks.layers import layers
from bnscale.networks.norm import EPS
from bnscale.probes import at_multiples, check, demand, descent, gamma_scaling, norm_gradient, weight_scaling
from bnscale.probes.descent import quadratic, slopes_of
from bnscale.probes.passage import layer_before
from bnscale.trial import Affine, Norm, NormInit, Placement, Precision, Refusal, Trainable

RESNET: dict[str, Any] = PLAIN | {"depth": 14}
ONES: dict[str, Any] = {"norm_init": NormInit.ONES}

# --- second derivatives -----------------------------------------------------------------------------

NORMS: dict[str, dict[str, Any]] = {
    "no norm": {"norm": Norm.NONE},
    "batch": {},
    "batch, gamma only": {"affine": Affine.GAMMA},
    "batch, beta only": {"affine": Affine.BETA},
    "batch, neither": {"affine_at": Placement.NONE},
    "ghost batches": {"norm_batch": 8},
    "layer": {"norm": Norm.LAYER},
    "layer, gamma only": {"norm": Norm.LAYER, "affine": Affine.GAMMA},
    "group, beta only": {"norm": Norm.GROUP, "groups": 8, "affine": Affine.BETA},
    "instance": {"norm": Norm.INSTANCE},
    "noisy": {"norm": Norm.NOISY},
}


@pytest.mark.parametrize("fields", NORMS.values(), ids=NORMS)
def test_the_second_derivative_along_the_gradient_is_that_of_finite_differences_of_gradients(fields):
    run = Run(**(PLAIN | {"norm_init": NormInit.NORMAL} | fields))
    run.update()  # so that beta is not 0
    network = copy.deepcopy(run.network).double().train()
    images, targets = run.data.batch(1)
    start = {name: part.detach() for name, part in network.named_parameters()}

    def graph(places: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        leaves = {name: part.clone().requires_grad_() for name, part in places.items()}
        buffers = {name: part.clone() for name, part in network.named_buffers()}
        return F.cross_entropy(functional_call(network, leaves | buffers, (images.double(),)), targets), leaves

    value, leaves = graph(start)
    slopes = slopes_of(value, leaves)
    fixed = {name: slope.detach() for name, slope in slopes.items()}
    for names in (list(leaves), [name for name in leaves if "conv" in name]):
        way = {name: fixed[name] if name in names else torch.zeros_like(fixed[name]) for name in leaves}
        length = 1e-6 / math.sqrt(sum(float(part.square().sum()) for part in way.values()))
        ends = []
        for sign in (1, -1):
            there, moved = graph({name: part + sign * length * way[name] for name, part in start.items()})
            ends.append(torch.autograd.grad(there, list(moved.values())))
        change = sum(float(((a - b) * part).sum()) for a, b, part in zip(*ends, way.values(), strict=True))
        assert quadratic(slopes, leaves, names) == pytest.approx(change / (2 * length), rel=1e-4)


def test_the_series_of_a_quadratic_is_its_loss_and_at_the_longest_step_it_is_where_it_was():
    at, _, curvature_KK, slope = matrix(lr=1e-4)
    square, bend = float(slope.square().sum()), float((slope * (slope @ curvature_KK)).sum())
    rows = list(at_multiples(descent, 0.1, 1, 30)(at))
    assert [row.length for row in rows] == pytest.approx([1e-5, 1e-4, 3e-3])
    for row in rows:
        assert row.gradient_square == pytest.approx(square, rel=1e-4)
        assert row.curvature == pytest.approx(bend / square, rel=1e-3)
        assert row.largest == pytest.approx(2 * square / bend, rel=1e-3)
        assert row.first_order == pytest.approx(row.length * square, rel=1e-4)
        assert row.second_order == pytest.approx(row.length**2 / 2 * bend, rel=1e-3)
        assert row.predicted == pytest.approx(row.loss_before - row.first_order + row.second_order)
        assert row.loss == pytest.approx(row.predicted, rel=1e-3, abs=1e-3 * row.loss_before)
    (there,) = at_multiples(descent, rows[0].largest / 1e-4)(at)
    assert there.second_order == pytest.approx(there.first_order)
    assert there.loss == pytest.approx(there.loss_before, rel=1e-3)


@pytest.mark.parametrize("fields", [RESNET, VGG, VGG | {"norm": Norm.NONE}, RESNET | {"trainable": Trainable.BN}])
def test_a_short_step_changes_the_loss_as_the_series_says_and_goes_down_and_one_rate_is_the_next_update(fields):
    run = Run(**(fields | {"lr": 1e-3, "milestones": ()}))
    short, own = at_multiples(descent, 0.1, 1)(run.look())
    assert short.loss < short.loss_before
    assert short.loss - short.loss_before == pytest.approx(short.second_order - short.first_order, rel=0.1)
    before = run.update()
    assert own.loss_before == pytest.approx(before, rel=1e-5)
    images, targets = run.data.batch(0)
    with torch.no_grad():
        after = float(loss.of_batch(run.trial, run.network(images), targets))
    assert own.loss == pytest.approx(after, rel=1e-4)


def test_a_step_out_of_the_float32_numbers_has_an_infinite_loss_and_a_network_without_a_gradient_no_rows():
    run = Run(**(MATRICES | {"depth": 5, "lr": 1e-6}))
    near, far = at_multiples(descent, 1, 1e25)(run.look())
    assert math.isfinite(near.loss)
    assert (far.loss, math.isfinite(far.second_order)) == (math.inf, True)
    with torch.no_grad():
        for part in run.network.parameters():
            part.mul_(math.nan)
    assert list(at_multiples(descent, 1)(run.look())) == []


# --- formulas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [RESNET, VGG, VGG | {"affine": Affine.BETA}, VGG | {"trainable": Trainable.OUTPUT}])
def test_the_notes_formulas_are_exact_where_statistics_are_constants_and_lack_two_terms_where_they_are_not(fields):
    run = Run(**fields)
    run.update()
    rows = list(norm_gradient(run.look()))
    assert len(rows) == demand(norm_gradient).rows(run.trial)
    assert {row.images for row in rows} == {2, 4, 8, 16}
    wrong = 0
    for row in rows:
        if run.trial.affine is Affine.BETA:
            assert row.gamma_error is row.constant_gamma_error is None
        else:
            assert max(row.gamma_error, row.constant_gamma_error) < 1e-10
        assert max(row.beta_error, row.constant_beta_error, row.constant_input_error, row.residual) < 1e-10
        # What is left is the projection of the note's gradient: a right angle at autograd's, but for epsilon.
        if row.values > 8:  # of two values nothing is left but epsilon's part
            assert row.ones_part**2 + row.values_part**2 + row.input_cosine**2 == pytest.approx(1, abs=1e-2)
            assert row.input_error**2 == pytest.approx(1 / row.input_cosine**2 - 1, rel=0.2, abs=1e-3)
            assert row.kept_part < 0.05
            assert row.true_radial < 0.01
        wrong += row.input_error > 1e-3 and row.weight_error > row.input_error / 2
    assert wrong > len(rows) / 2
    last = [row for row in rows if row.layer_index == max(each.layer_index for each in rows)]
    for row in last[-1:]:  # no norm behind it that could have the formula too
        assert row.compound_error == pytest.approx(row.input_error)


def test_in_evaluation_the_notes_formulas_are_autograds():
    norm = build(digits(**VGG)).layers.get_submodule("1").norm.double().eval()
    draws = torch.Generator().manual_seed(0)
    y = torch.randn(8, 16, 4, 4, generator=draws, dtype=torch.float64).requires_grad_()
    g = torch.randn(8, 16, 4, 4, generator=draws, dtype=torch.float64)
    with torch.no_grad():
        norm.running_mean.normal_(generator=draws)
        norm.running_var.uniform_(0.5, 2, generator=draws)
    at_y, at_gamma, at_beta = torch.autograd.grad(norm(y), [y, norm.weight, norm.bias], g)
    sigma = (norm.running_var + EPS).sqrt()[:, None, None]
    torch.testing.assert_close(at_y, norm.weight.detach()[:, None, None] / sigma * g)
    torch.testing.assert_close(at_gamma, (g * (y - norm.running_mean[:, None, None]) / sigma).sum((0, 2, 3)))
    torch.testing.assert_close(at_beta, g.sum((0, 2, 3)))


def test_the_formula_in_one_norm_gives_the_weights_before_it_the_gradient_of_a_network_with_that_norm_constant():
    run = Run(**RESNET)
    run.update()
    at = run.look()
    rows = {row.layer: row for row in norm_gradient(at) if row.images == 16}
    for name, conv in (("norm", "conv"), ("blocks.2.shortcut.norm", "blocks.2.shortcut.conv")):
        slopes = []
        for constant in (False, True):
            network = copy.deepcopy(run.network).double().train()
            if constant:
                fix(network.get_submodule(name))
            weight = network.get_submodule(conv).weight
            images, targets = at.batch()
            value = F.cross_entropy(network(images.double()), targets)
            slopes.append(torch.autograd.grad(value, weight)[0])
        true, note = slopes
        assert rows[name].weight_error == pytest.approx(float((note - true).norm() / true.norm()), rel=1e-6)
        weight = weight.detach().flatten(1)
        radial = (note.flatten(1) * weight).sum(1) / weight.norm(dim=1)
        assert rows[name].weight_radial == pytest.approx(float(radial.norm() / note.norm()), rel=1e-6)


def fix(norm: nn.Module) -> None:
    """From now on it divides by constants, which are those of the images it gets."""

    def forward(y: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(y.detach(), (0, 2, 3), correction=0)
        return F.batch_norm(y, mean, variance, norm.weight, norm.bias, False, 0.0, EPS)

    norm.forward = forward


# --- scale ------------------------------------------------------------------------------------------


FAMILIES = ("ResNet with shortcuts", "VGG", "residual VGG", "matrices", "torchvision's")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_norm_right_behind_a_layer_knows_it_in_every_family(name):
    run = Run(**NETWORKS[name])
    before = layer_before(run.look())
    numbers = {layer.name: layer.number for layer in layers(run.network)}
    assert list(before) == [site.name for site in run.trial.norms]
    for site in run.trial.norms:
        assert site.shortcut or numbers[before[site.name]] == site.layer
    assert len(set(before.values())) == len(before)


def test_a_norm_behind_pooling_has_no_layer_right_before_it():
    assert layer_before(Run(**(RESNET | {"placement": Placement.LAST})).look()) == {}


@pytest.mark.parametrize("fields", [RESNET, VGG, RESNET | {"norm": Norm.LAYER}])
def test_of_weights_before_norms_the_gradient_goes_as_one_over_their_length_and_the_hessian_as_its_square(fields):
    rows = {(row.parameters, row.factor): row for row in weight_scaling(Run(**(fields | ONES)).look())}
    one = rows["weights", 1.0]
    for factor in (10.0, 100.0):
        row = rows["weights", factor]
        assert row.sigma == pytest.approx(factor * one.sigma, rel=1e-2)
        assert row.loss == pytest.approx(one.loss, rel=1e-2)
        assert row.gradient_square == pytest.approx(one.gradient_square / factor**2, rel=0.05)
        assert row.quadratic == pytest.approx(one.quadratic / factor**4, rel=0.1)
    # What is not scaled keeps its gradient, and with it the terms of the whole.
    assert rows["everything", 100.0].gradient_square > 10 * rows["weights", 100.0].gradient_square
    small = rows["weights", 1e-3]  # sigma is at sqrt(epsilon), and dividing by it restores no scale
    assert small.gradient_square < 1e5 * one.gradient_square


def test_gradients_under_other_gammas_are_those_of_a_network_that_has_them():
    run = Run(**VGG)
    rows = list(gamma_scaling(run.look()))
    assert {row.gammas for row in rows} == {"every", "inner", "ones"}  # no residual branch
    images, targets = run.data.batch(0)
    norms = [run.network.get_submodule(site.name) for site in run.trial.norms]
    for gammas, some in (("every", norms), ("inner", norms[:-1])):
        with torch.no_grad():
            for norm in some:
                norm.weight.mul_(10)
        weights = [layer.module.weight for layer in layers(run.network)]
        slopes = torch.autograd.grad(F.cross_entropy(run.network(images), targets), weights)
        own = [row.gradient for row in rows if (row.gammas, row.factor) == (gammas, 10.0)]
        assert own == pytest.approx([float(slope.norm()) for slope in slopes], rel=1e-4)
        with torch.no_grad():
            for norm in some:
                norm.weight.div_(10)
    with torch.no_grad():
        for norm in norms:
            norm.weight.fill_(1)
    slopes = torch.autograd.grad(F.cross_entropy(run.network(images), targets), weights)
    own = [row.gradient for row in rows if row.gammas == "ones"]
    assert own == pytest.approx([float(slope.norm()) for slope in slopes], rel=1e-4)


def test_in_a_row_of_normalized_layers_gammas_before_the_last_change_no_gradient():
    rows = list(gamma_scaling(Run(**(VGG | ONES | {"batch": 64, "norm_batch": 64})).look()))
    lengths = {(row.gammas, row.factor, row.layer_index): row.gradient for row in rows}
    behind = {row.layer_index: row.norms_behind for row in rows}
    assert behind == {number: 9 - number for number in range(1, 10)}
    for number in behind:
        assert lengths["inner", 10.0, number] == pytest.approx(lengths["inner", 1.0, number], rel=0.02)
        assert lengths["every", 0.1, number] < 0.2 * lengths["every", 1.0, number]


def test_a_residual_branch_whose_gammas_are_small_gets_small_gradients_and_the_stem_does_not():
    rows = list(gamma_scaling(Run(**(RESNET | ONES)).look()))
    lengths = {row.layer: row.gradient for row in rows if (row.gammas, row.factor) == ("branch", 0.01)}
    whole = {row.layer: row.gradient for row in rows if (row.gammas, row.factor) == ("branch", 1.0)}
    assert lengths["blocks.1.conv1"] < 0.05 * whole["blocks.1.conv1"]
    assert lengths["conv"] > 0.1 * whole["conv"]


# --- what they refuse -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probe", "fields", "words"),
    [
        (at_multiples(descent, 1), {"precision": Precision.BF16}, "has bf16 values, .* set precision=fp32"),
        (at_multiples(descent, 1), {"norm": Norm.L1}, "has l1 norms, whose gradient .* once only; set norm=batch"),
        (weight_scaling, {"norm": Norm.LINF}, "has linf norms, .* set norm=batch"),
        (
            at_multiples(descent, 1),
            {"norm": Norm.RENORM, "renorm_r": 3.0, "renorm_d": 5.0, "renorm_start": 0.0, "renorm_r_end": 0.5,
             "renorm_d_end": 0.5},
            "has batch renormalization, .* set norm=batch",
        ),
        (at_multiples(descent, 1), {"trainable": Trainable.NONE}, "has nothing that trains; set trainable=all"),
        (weight_scaling, {"norm": Norm.NONE}, "has no norm right behind a layer with weights; set norm=batch"),
        (weight_scaling, {"norm": Norm.NOISE}, "has no norm right behind a layer"),
        (weight_scaling, {"placement": Placement.LAST}, "has no norm right behind .* --set placement=every"),
        (weight_scaling, {"trainable": Trainable.TWO_PER_CHANNEL}, "has weights in two parts"),
        (gamma_scaling, {"norm": Norm.NONE}, "has no gamma; give it some"),
        (gamma_scaling, {"affine": Affine.BETA}, "has no gamma; give it some"),
        (norm_gradient, {"norm": Norm.LAYER}, "has no batch normalization; set norm=batch"),
        (norm_gradient, {"norm_batch": 8}, "has statistics over 8 of 16 images; set norm_batch=16"),
        (norm_gradient, {"trainable": Trainable.TWO_PER_CHANNEL}, "has weights in two parts"),
    ],
)  # fmt: skip
def test_a_probe_refuses_what_it_cannot_measure_and_says_what_to_set(probe, fields, words):
    with pytest.raises(Refusal, match=words):
        check(probe, digits(**(PLAIN | fields)))
