"""Probes of how training goes on: landscape, covariate shift, activations, theorem 4.1; against closed forms, brute
force and what training really does next."""

import copy
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from examples import digits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnscale import loss, query, train
from bnscale.data import Resident
from bnscale.engine import Gang
from bnscale.engine.local import LocalEngine
from bnscale.networks import build, trained
from bnscale.networks.layers import begun_at, layers, trunk
from bnscale.networks.norm import Noise
from bnscale.probes import (
    END,
    START,
    STEP,
    TABLES,
    Snapshot,
    activation_histogram,
    activations,
    at_layers,
    at_multiples,
    batch_curve,
    check,
    covariate_shift,
    curve,
    demand,
    described,
    gradient_bound,
    landscape,
    looking,
    moment_change,
    only,
    unless,
)
from bnscale.probes.activations import from_normal
from bnscale.probes.bound import sides
from bnscale.trial import (
    Affine,
    Augmentation,
    Data,
    Network,
    Norm,
    NormInit,
    Placement,
    Precision,
    Refusal,
    Trainable,
    Trial,
)

PLAIN: dict[str, Any] = {
    "trainable": Trainable.ALL, "augmentation": Augmentation.NONE, "momentum": 0.0, "weight_decay": 0.0,
}  # fmt: skip
MATRICES: dict[str, Any] = PLAIN | {
    "data": Data.LINEAR_TEACHER, "network": Network.LINEAR, "depth": 1, "width": 6, "norm": Norm.NONE, "batch": 50,
    "norm_batch": 50,
}  # fmt: skip
VGG: dict[str, Any] = PLAIN | {"network": Network.VGG, "depth": 11}
NETWORKS: dict[str, dict[str, Any]] = {
    "ResNet with shortcuts": PLAIN | {"depth": 14},
    "VGG": VGG,
    "VGG with noise": VGG | {"norm": Norm.NOISY},
    "VGG without norms": VGG | {"norm": Norm.NONE},
    "residual VGG": PLAIN | {"network": Network.VGG_RESIDUAL, "depth": 14, "placement": Placement.EVERY_2},
    "gamma and beta": PLAIN | {"trainable": Trainable.BN},
    "matrices": MATRICES | {"depth": 5, "norm": Norm.BATCH, "lr": 1e-3},
    "torchvision's": PLAIN | {"network": Network.IMAGENET_RESNET, "depth": 18, "width": 4},
}


class Run:
    """A trial that can be looked at and trained on."""

    def __init__(self, **changes: Any) -> None:
        self.trial = digits(**changes)
        self.data = Resident(self.trial, Path("/nonexistent"), torch.device("cpu"))
        self.engine = LocalEngine(build(self.trial), self.trial, Gang(), None)
        self.step = 0

    @property
    def network(self) -> nn.Module:
        return self.engine.module

    def look(self) -> Snapshot:
        return Snapshot(self.trial, self.step, self.engine, self.data)

    def update(self) -> float:
        value = self.engine(*self.data.batch(self.step))
        self.engine.backward(value)
        self.engine.step(self.trial.rate(self.step))
        self.step += 1
        return float(value.detach())


def matrix(**changes: Any) -> tuple[Snapshot, Tensor, Tensor, Tensor]:
    """One matrix: the snapshot, W, X'X, and the gradient (W - A) X'X, in float64; the loss is 1/2 sum |W x - A x|^2."""
    at = Run(**(MATRICES | changes)).look()
    x, targets_NK = at.batch()
    x_NK = x.flatten(1).double()
    weight = at.network.output.weight.detach().double()
    return at, weight, x_NK.T @ x_NK, (x_NK @ weight.T - targets_NK.double()).T @ x_NK


# --- landscape --------------------------------------------------------------------------------------


def test_the_loss_of_a_quadratic_along_its_gradient_is_a_parabola_and_its_gradient_changes_by_its_curvature():
    at, _, curvature_KK, slope = matrix(lr=1e-4)
    rows = list(at_multiples(landscape, 0.1, 1, 30)(at))
    size, change = float(slope.norm()), float((slope @ curvature_KK).norm())
    bend = float((slope * (slope @ curvature_KK)).sum())
    before = rows[0].loss_before
    assert [row.length for row in rows] == pytest.approx([1e-5, 1e-4, 3e-3])
    for row in rows:
        assert row.loss_before == before
        assert row.gradient == pytest.approx(size, rel=1e-5)
        assert row.distance == pytest.approx(row.length * size, rel=1e-5)
        parabola = before - row.length * size**2 + row.length**2 / 2 * bend
        assert row.loss == pytest.approx(parabola, rel=1e-4, abs=1e-3 * before)
        assert row.gradient_change == pytest.approx(row.length * change, rel=2e-3)
        assert row.beta == pytest.approx(change / size, rel=2e-3)


def test_effective_beta_of_a_quadratic_is_its_curvature_where_the_gradient_lies_along_it():
    at, weight, curvature_KK, slope = matrix(lr=1e-4)
    values, vectors = torch.linalg.eigh(curvature_KK)
    for index in (0, 3, 5):
        # W such that W - A has rank one along an eigenvector: then so has the gradient.
        teacher = weight - slope @ torch.linalg.inv(curvature_KK)
        with torch.no_grad():
            at.network.output.weight.copy_(teacher + torch.outer(torch.ones(6).double(), vectors[:, index]))
        there = Snapshot(at.trial, 0, at._engine, at.data)
        for row in at_multiples(landscape, 0.5, 5)(there):
            assert row.beta == pytest.approx(float(values[index]), rel=2e-3)


def test_step_sizes_beyond_the_cap_are_cut_and_looked_at_once():
    at = Run(**VGG, lr=0.5).look()
    rows = list(at_multiples(landscape, 0.5, 1, 2, 4, most=0.4)(at))
    assert [row.length for row in rows] == pytest.approx([0.25, 0.4])
    assert [row.multiple for row in rows] == pytest.approx([0.5, 0.8])


def test_the_landscape_takes_a_pass_to_begin_with_and_one_for_each_step_size(monkeypatch):
    at = Run(**VGG).look()
    passes = []
    forward = Snapshot.forward
    monkeypatch.setattr(Snapshot, "forward", lambda *args: passes.append(1) or forward(*args))
    rows = list(at_multiples(landscape, 0.5, 1, 2, 4)(at))
    assert len(rows) == 4
    assert len(passes) == 5
    assert at.gradient
    assert len(passes) == 5, "what others ask for is shared"


def test_what_overflows_along_the_gradient_is_infinite_and_the_trial_goes_on(tmp_path):
    trial = digits(**(MATRICES | {"depth": 5, "lr": 1e-6, "steps": 4}))
    data = Resident(trial, Path("/nonexistent"), torch.device("cpu"))
    engine = LocalEngine(build(trial), trial, Gang(), None)
    at = Snapshot(trial, 0, engine, data)
    near, far = at_multiples(landscape, 1, 1e25)(at)
    assert math.isfinite(near.loss + near.gradient_change + near.beta)
    assert (far.loss, far.gradient_change, far.beta) == (math.inf, math.inf, math.inf)
    job = train.Job(trial, {at_multiples(landscape, 1e25): STEP}, str(tmp_path), "/nonexistent", None, 0, 1e9)
    *_, (last,) = train.run([job], Gang(), 1, lambda: False)
    assert last.outcome == "finished"
    said = "select count(*) as n, min(loss) as loss, min(gradient_change) as change, min(beta) as beta from landscape"
    (row,) = query.open(tmp_path, TABLES).sql(said).rows
    assert row == (5, math.inf, math.inf, math.inf)


@pytest.mark.parametrize("norm", [Norm.BATCH, Norm.NONE, Norm.NOISY])
def test_one_learning_rate_along_the_gradient_is_where_the_next_update_leads(norm):
    run = Run(**(VGG | {"norm": norm}))
    run.update()
    (row,) = at_multiples(landscape, 1)(run.look())
    batch, before = run.data.batch(1), copy.deepcopy(run.network.state_dict())
    buffers = {name for name, _ in run.network.named_buffers()}
    run.update()
    # The weights after the update, with the noise that was drawn before it.
    run.network.load_state_dict({n: before[n] if n in buffers else v for n, v in run.network.state_dict().items()})
    with torch.no_grad():
        assert row.loss == pytest.approx(float(loss.of_batch(run.trial, run.network(batch[0]), batch[1])), rel=1e-4)


def test_a_network_without_a_gradient_has_no_landscape():
    at, *_ = matrix()
    with torch.no_grad():
        for part in at.network.parameters():
            part.mul_(math.nan)
    assert list(at_multiples(landscape, 1)(Snapshot(at.trial, 0, at._engine, at.data))) == []


# --- the next update, and covariate shift -----------------------------------------------------------


@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)
def test_the_update_foreseen_is_the_one_that_training_makes(fields):
    run = Run(**fields, warmup=0.2, milestones=(0.6,))
    for _ in range(3):
        expected = {name: part.clone() for name, part in run.look().updated.items()}
        assert expected.keys() == trained(run.network).keys()
        run.update()
        for name, part in trained(run.network).items():
            torch.testing.assert_close(part.detach(), expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)
def test_covariate_shift_is_that_of_a_network_whose_earlier_layers_were_updated(fields):
    run = Run(**fields)
    run.update()
    at = run.look()
    every = [layer.number for layer in layers(run.network)]
    some = every if len(every) < 16 else [1, 2, 3, 9, 17, every[-1]]
    rows = list(at_layers(covariate_shift, *some)(at))
    assert [row.layer_index for row in rows] == some
    before = copy.deepcopy(run.network)
    noises = {name: int(each.steps) for name, each in before.named_modules() if isinstance(each, Noise)}
    run.update()
    after, names = dict(run.network.named_parameters()), [name for name, _ in before.named_parameters()]
    for row in rows:
        slopes = []
        for moved in (False, True):
            network = copy.deepcopy(before).train()
            for name, each in network.named_modules():
                if isinstance(each, Noise):
                    each.steps.fill_(noises[name])
            for name, part in network.named_parameters():
                if moved and names.index(name) < names.index(f"{row.layer}.weight"):
                    part.data.copy_(after[name])
            weight = network.get_submodule(row.layer).weight.requires_grad_()
            images, targets = at.batch()
            (slope,) = torch.autograd.grad(loss.of_batch(run.trial, network(images), targets), [weight])
            slopes.append(slope.double().flatten())
        one, other = slopes
        assert row.before == pytest.approx(float(one.norm()), rel=1e-4)
        assert row.after == pytest.approx(float(other.norm()), rel=1e-3)
        assert row.l2 == pytest.approx(float((one - other).norm()), rel=5e-3, abs=2e-4 * row.before)
        assert row.cosine == pytest.approx(float(F.cosine_similarity(one, other, dim=0)), abs=1e-4)


def test_covariate_shift_of_two_matrices_is_the_closed_form():
    run = Run(**(MATRICES | {"depth": 2, "lr": 1e-3}))
    x, targets = (part.double().flatten(1).T for part in run.data.batch(0))
    first, second = (part.detach().double() for part in run.network.parameters())

    def slopes(first: Tensor) -> tuple[Tensor, Tensor]:
        error = second @ first @ x - targets
        return second.T @ error @ x.T, error @ (first @ x).T

    one, two = slopes(first)
    _, moved = slopes(first - 1e-3 * one)
    still, shifted = at_layers(covariate_shift, 1, 2)(run.look())
    assert (still.l2, still.cosine) == (0, pytest.approx(1))
    assert shifted.l2 == pytest.approx(float((two - moved).norm()), rel=1e-4)
    assert shifted.before == pytest.approx(float(two.norm()), rel=1e-5)
    assert shifted.after == pytest.approx(float(moved.norm()), rel=1e-5)
    assert shifted.cosine == pytest.approx(float((two * moved).sum() / two.norm() / moved.norm()), abs=1e-6)


@pytest.mark.parametrize("norm", [Norm.BATCH, Norm.NONE, Norm.NOISY])
def test_there_is_no_covariate_shift_where_earlier_layers_do_not_move(norm):
    run = Run(**(VGG | {"norm": norm, "trainable": Trainable.OUTPUT}))
    rows = list(at_layers(covariate_shift, 1, 2, 5, 9)(run.look()))
    assert len(rows) == 4
    assert [row.l2 for row in rows] == [0, 0, 0, 0]
    assert all(row.before > 0 for row in rows)


def test_a_network_begun_at_a_part_of_its_trunk_goes_through_that_part_and_what_follows_and_is_itself_again():
    network = build(digits(**VGG)).eval()
    images = torch.randn(4, 1, 8, 8)
    parts = trunk(network)
    assert list(parts)[:3] == ["layers.1", "layers.halve1", "layers.2"]
    with torch.no_grad():
        expected = network(images)
        x = images
        for name, part in parts.items():
            with begun_at(network, name, x):
                torch.testing.assert_close(network(torch.full_like(images, math.nan)), expected)
            x = part(x)
        torch.testing.assert_close(network(images), expected, rtol=0, atol=0)


# --- theorem 4.1 ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), images=st.integers(2, 9), channels=st.integers(1, 4), pixels=st.integers(1, 4),
    scale=st.floats(1e-2, 1e3), eps=st.sampled_from([0.0, 1e-5, 0.1]),
)  # fmt: skip
def test_theorem_41_holds_on_random_inputs_and_is_an_equality_but_for_epsilon(
    seed, images, channels, pixels, scale, eps
):
    draws = torch.Generator().manual_seed(seed)
    shape = (images, channels, pixels, pixels + 1)
    y, g = (torch.randn(shape, generator=draws, dtype=torch.float64) for _ in range(2))
    y = (scale * y + 3).requires_grad_()
    gamma_C = torch.randn(channels, generator=draws, dtype=torch.float64)
    variance_1C11, mean_1C11 = torch.var_mean(y, (0, 2, 3), correction=0, keepdim=True)
    z = gamma_C[:, None, None] * (y - mean_1C11) / (variance_1C11 + eps).sqrt()
    (slope_y,) = torch.autograd.grad(z, y, g)
    found = sides(y, gamma_C, slope_y, g, eps)
    slack = 1e-9 * (found.whole_C + 1e-300)
    assert (found.left_C <= found.right() + slack).all()
    if eps == 0:
        torch.testing.assert_close(found.left_C, found.right(), rtol=1e-7, atol=float(slack.max()))
    else:
        # With q = variance / (variance + epsilon) the gap is (1 - q) of what lies along the values.
        gap_C = (1 - found.sigma_C.square().sub(eps) / found.sigma_C.square()) * found.along_values_C
        torch.testing.assert_close(found.right() - found.left_C, gap_C, rtol=1e-5, atol=float(slack.max()))


@pytest.mark.parametrize("changes", [{}, {"affine": Affine.BETA}, {"trainable": Trainable.OUTPUT}])
def test_both_sides_of_theorem_41_are_equal_on_real_activations(changes):
    run = Run(**(VGG | changes))
    for _ in range(2):
        rows = list(gradient_bound(run.look()))
        assert len(rows) == sum(site.channels for site in run.trial.norms)
        for row in rows:
            gap = 1e-5 / row.sigma**2 * row.along_values  # what the epsilon in sigma leaves of it
            assert row.left == pytest.approx(row.right - gap, rel=1e-4, abs=1e-5 * row.whole)
            assert row.right == pytest.approx(row.whole - row.along_ones - row.along_values)
        run.update()


def test_the_gradient_without_a_norm_is_that_of_the_same_network_without_that_one():
    run = Run(**VGG)
    run.update()
    at = run.look()
    rows = list(gradient_bound(at))
    images, targets = at.batch()
    for number in (1, 4, 8):
        network = copy.deepcopy(run.network).train()
        norm = network.layers.get_submodule(str(number)).norm
        network.layers.get_submodule(str(number)).norm = nn.Identity()
        kept: list[Tensor] = []
        network.layers.get_submodule(str(number)).conv.register_forward_hook(
            lambda module, inputs, out, kept=kept: kept.append(out) or out.clone()
        )
        (slope,) = torch.autograd.grad(F.cross_entropy(network(images), targets), kept)
        own = [row for row in rows if row.layer_index == number]
        y_CM, g_CM = (part.detach().double().transpose(0, 1).flatten(1) for part in (kept[0], slope))
        assert [row.plain for row in own] == pytest.approx(g_CM.square().sum(1).tolist(), rel=1e-3, abs=1e-12)
        # The right side as a projection: what is left of g beside the constant and the normalized values, which are
        # orthogonal, times gamma / sigma.
        sigma_C = (y_CM.var(1, correction=0) + 1e-5).sqrt()
        centred_CM = y_CM - y_CM.mean(1, keepdim=True)
        m = y_CM.shape[1]
        along_C = (g_CM * centred_CM).sum(1).square() / sigma_C.square() / m
        right_C = (norm.weight.detach() / sigma_C).square() * (
            (g_CM - g_CM.mean(1, keepdim=True)).square().sum(1) - along_C
        )
        expected = pytest.approx(right_C.tolist(), rel=1e-3, abs=1e-12)
        assert [row.plain_right for row in own] == expected


# --- activations ------------------------------------------------------------------------------------


def values_of(run: Run) -> dict[tuple[int, str], np.ndarray]:
    """What layers 1 and 2 get, and what stands behind the norm of the first, on the next batch."""
    images, _ = run.data.batch(0)
    network = copy.deepcopy(run.network).train()
    first = network.layers.get_submodule("1")
    output = first.norm(first.conv(images))
    found = {(1, "input"): images, (1, "output"): output, (2, "input"): network.layers.halve1(F.relu(output))}
    return {key: values.detach().double().flatten().numpy() for key, values in found.items()}


def test_activations_are_what_a_layer_gets_and_what_stands_behind_its_norm():
    run = Run(**VGG)
    rows = {(row.layer_index, row.place): row for row in at_layers(activations, 1, 2)(run.look())}
    for key, values in values_of(run).items():
        row, centred = rows[key], values - values.mean()
        assert row.values == len(values)
        assert row.mean == pytest.approx(values.mean(), abs=1e-6)
        assert row.sd == pytest.approx(values.std(), rel=1e-5)
        assert row.skewness == pytest.approx(np.mean(centred**3) / values.std() ** 3, rel=1e-4, abs=1e-5)
        assert row.kurtosis == pytest.approx(np.mean(centred**4) / values.std() ** 4, rel=1e-4)


def test_of_many_activations_a_sample_is_taken_that_is_the_same_each_time(monkeypatch):
    monkeypatch.setattr(sys.modules[from_normal.__module__], "SAMPLE", 4000)
    run = Run(**VGG)
    rows = {(row.layer_index, row.place): row for row in at_layers(activations, 1)(run.look())}
    values = values_of(run)[1, "output"]
    row = rows[1, "output"]
    assert row.values == 4000 < len(values)
    assert row.mean == pytest.approx(values.mean(), abs=5 * values.std() / math.sqrt(4000))
    assert row.sd == pytest.approx(values.std(), rel=0.1)
    assert repr(row) in map(repr, at_layers(activations, 1)(run.look()))


def test_the_distance_from_normal_is_kolmogorovs():
    draws = np.random.default_rng(0)
    assert from_normal(draws.standard_normal(50_000)) < 0.01
    exponential = draws.standard_exponential(50_000) - 1
    # The largest gap between 1 - exp(-x - 1) and the normal distribution function is at -1, where it is 0.1587.
    assert from_normal(exponential) == pytest.approx(0.1587, abs=0.01)
    assert from_normal(np.zeros(10)) == pytest.approx(0.5)


def test_a_histogram_of_activations_holds_all_but_a_thousandth_in_intervals_of_one_width():
    at = Run(**VGG).look()
    rows = list(at_layers(activation_histogram, 1)(at))
    for place in ("output",):
        own = [row for row in rows if row.place == place]
        assert sum(row.count for row in own) / own[0].values == pytest.approx(0.999, abs=3e-4)
        widths = [row.high - row.low for row in own]
        assert widths == pytest.approx([widths[0]] * len(own))
        assert [row.low for row in own[1:]] == pytest.approx([row.high for row in own[:-1]])


@pytest.mark.parametrize("norm", [Norm.NONE, Norm.BATCH, Norm.NOISY, Norm.NOISE, Norm.LINF, Norm.RENORM])
def test_moment_changes_are_those_between_two_updates_of_training(norm):
    free = {"renorm_r": 3.0, "renorm_d": 5.0, "renorm_start": 0.0, "renorm_r_end": 0.0, "renorm_d_end": 0.0}
    run = Run(**(VGG | {"norm": norm, "lr": 0.02} | (free if norm is Norm.RENORM else {})))
    run.update()
    (row,) = at_layers(moment_change, 3)(run.look())
    moments: list[Tensor] = []
    run.network.layers.get_submodule("3").norm.register_forward_hook(
        lambda module, inputs, out: moments.append(
            torch.stack([out.detach().mean((0, 2, 3)), out.detach().var((0, 2, 3), correction=0)])
        )
    )
    run.update()
    run.update()
    change = (moments[1] - moments[0]).abs().mean(1)
    assert (row.step, row.channels) == (1, 64)
    assert [row.mean_change, row.variance_change] == pytest.approx(change.tolist(), rel=1e-3, abs=1e-6)


def test_noise_moves_means_and_variances_as_its_algorithm_says():
    """E |mu - mu'| for two of U(-1/2, 1/2) is 1/3; E |sigma^2 - sigma'^2| for two of U(1, 5/4) is about 0.19."""
    run = Run(**(VGG | {"norm": Norm.NOISY, "norm_init": NormInit.ONES, "batch": 64, "norm_batch": 64}))
    rows = []
    for _ in range(4):
        rows += at_layers(moment_change, 1, 2, 3, 4)(run.look())
        run.update()
    sizes = [row.channels for row in rows]
    assert np.average([row.mean_change for row in rows], weights=sizes) == pytest.approx(1 / 3, abs=0.03)
    assert np.average([row.variance_change for row in rows], weights=sizes) == pytest.approx(0.1875, abs=0.015)


# --- the batch's own curve --------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [VGG, VGG | {"norm": Norm.NOISY}, MATRICES | {"lr": 1e-4}])
def test_the_curve_of_batches_is_the_loss_that_training_sees_next(fields):
    run = Run(**fields)
    for _ in range(3):
        (row,) = batch_curve(run.look())
        assert row.images == run.trial.batch
        assert row.loss == pytest.approx(run.update(), rel=1e-5)
        assert (row.accuracy is None) == run.trial.facts.regression


# --- which trials a probe looks at ------------------------------------------------------------------


def trial(**changes: Any) -> Trial:
    return digits(**(PLAIN | changes))


@pytest.mark.parametrize(
    ("probe", "of", "words"),
    [
        (gradient_bound, trial(norm=Norm.NONE), "gradient_bound: .* has no batch normalization; set norm=batch"),
        (gradient_bound, trial(norm_batch=8), "gradient_bound: .* statistics over 8 of 16 images; set norm_batch=16"),
        (gradient_bound, trial(precision=Precision.BF16), "gradient_bound: .* bf16 values, .* set precision=fp32"),
        (at_layers(covariate_shift, 2), trial(momentum=0.9), "covariate_shift: .* momentum 0.9, .* set momentum=0"),
        (at_layers(covariate_shift, 2), trial(weight_decay=1e-4), "covariate_shift: .* weight_decay 0.0001.*=0"),
        (at_layers(moment_change, 2), trial(gamma_l1=0.1), "moment_change: .* gamma_l1 0.1"),
        (at_layers(covariate_shift, 9), trial(), "covariate_shift: .* no layer 9: it has 8"),
        (at_multiples(landscape, 1), trial(trainable=Trainable.NONE), "landscape: .* nothing that trains"),
    ],
)
def test_a_probe_refuses_a_trial_that_it_cannot_serve(probe, of, words):
    with pytest.raises(Refusal, match=words):
        check(probe, of)


def test_step_sizes_must_rise_and_be_steps():
    for multiples in ((), (0,), (-1,), (2, 1), (1, 1), (math.nan,), (1, math.inf), ("1",)):
        with pytest.raises(Refusal, match="landscape"):
            at_multiples(landscape, *multiples)
    with pytest.raises(Refusal, match="landscape"):
        at_multiples(landscape, 1, most=0)


def test_a_probe_of_some_trials_leaves_the_others_alone_and_is_not_asked_of_them():
    bound = only(gradient_bound, norm=[Norm.BATCH])
    probes = {curve: END, bound: START}
    assert bound.__name__ in TABLES
    assert looking(probes, trial()) == probes
    assert looking(probes, trial(norm=Norm.NONE)) == {curve: END}
    assert demand(bound) == demand(gradient_bound)
    with pytest.raises(Refusal, match="norms: no such field; did you mean norm"):
        only(gradient_bound, norms=[Norm.BATCH])
    with pytest.raises(Refusal, match="norm bach: must be one of .*did you mean batch"):
        only(gradient_bound, norm=["bach"])
    with pytest.raises(Refusal, match=r"norm batch: give a list of values: norm=\[...\]"):
        only(gradient_bound, norm=Norm.BATCH)
    assert only(gradient_bound, norm=["batch"]) == bound
    both = only(bound, lr=[0.5])
    assert looking({both: START}, trial(lr=0.5)) == {both: START}
    assert looking({both: START}, trial(lr=0.5, norm=Norm.NONE)) == {}


def test_what_one_probe_leaves_alone_the_other_looks_at():
    often, seldom = only(landscape, norm=[Norm.BATCH], lr=[0.1]), unless(landscape, norm=[Norm.BATCH], lr=[0.1])
    among = only(seldom, norm=[Norm.BATCH])
    for norm in (Norm.BATCH, Norm.NONE):
        for lr in (0.1, 0.5):
            of = trial(norm=norm, lr=lr)
            (one,) = looking({often: STEP, seldom: END}, of)
            assert (one == often) == (norm is Norm.BATCH and lr == 0.1)
            assert among.looks(of) == (norm is Norm.BATCH and lr == 0.5)
    with pytest.raises(Refusal, match="lrs: no such field; did you mean lr"):
        unless(landscape, lrs=[0.1])


def test_two_probes_of_one_table_may_not_look_at_one_trial():
    early, late = at_layers(covariate_shift, 2), at_layers(covariate_shift, 5)
    apart = {only(early, norm=[Norm.BATCH]): STEP, only(late, norm=[Norm.NONE]): END}
    assert len(looking(apart, trial())) == len(looking(apart, trial(norm=Norm.NONE))) == 1
    with pytest.raises(Refusal, match="covariate_shift: looks at resnet8-.* in 2 ways; give it one"):
        looking({early: STEP, late: END}, trial())


def test_a_probe_of_more_layers_or_step_sizes_costs_more_and_writes_more_rows():
    of = trial()
    for one, three in (
        (at_layers(covariate_shift, 2), at_layers(covariate_shift, 2, 3, 5)),
        (at_multiples(landscape, 1), at_multiples(landscape, 1, 2, 4)),
    ):
        assert demand(three).rows(of) == 3 * demand(one).rows(of)
        assert demand(three).steps(of) > demand(one).steps(of)
    passes = [demand(gradient_bound).steps(trial(depth=depth)) for depth in (8, 14)]
    assert passes[1] > passes[0]  # one more for each norm


def test_a_manifest_says_where_a_probe_looks():
    assert described(at_layers(covariate_shift, 5, 10), 100 * STEP) == "100 steps at layers 5, 10"
    assert described(only(at_layers(covariate_shift, 5), norm=[Norm.BATCH]), STEP) == "1 steps at layers 5"
    assert (
        described(at_multiples(landscape, 0.5, 4, most=0.4), END) == "end at 0.5, 4 times the learning rate, up to 0.4"
    )
    assert described(only(gradient_bound, norm=[Norm.BATCH]), START) == "start"
