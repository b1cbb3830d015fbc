"""The numbers of the study of a note on batch norm's gradients: from rows whose answers a hand computes."""

import importlib
import math
import sys
from pathlib import Path

import pytest

from bnscale import query, report
from bnscale.probes import (
    TABLES,
    Curve,
    Descent,
    Gamma,
    GammaScaling,
    NormGradient,
    WeightScaling,
    looking,
)
from bnscale.report import Verdict
from bnscale.store import Store
from bnscale.study.plan import plan, relate, settings
from bnscale.trial import Norm, Outcome, Pixels, WeightInit

FOLDER = Path(__file__).parents[1] / "studies"
QUERIES = report.queries((FOLDER / "bn_gradients.sql").read_text())


def declared():
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module("bn_gradients").study


PLANNED = plan(declared().paper, lambda data: Pixels.ORIGINAL)
LAST = 200


def session_with(folder, readings, diverged=()):
    """SQL over a store with these rows: by network, norm, rate and seed, from He's weights, tables with their rows."""
    store = Store(folder)
    he = [e.trial for e in PLANNED if e.trial.weight_init is WeightInit.HE_NORMAL]
    trials = {(str(t.network), str(t.norm), t.lr, t.seed): t for t in he}
    for key, tables in readings.items():
        writer = store.writer(trials[key], dict.fromkeys(tables, "start"), {})
        for table, rows in tables.items():
            writer.write(table, rows)
        writer.finish(Outcome.DIVERGED if key in diverged else Outcome.FINISHED, LAST, {})
    session = query.open(folder, TABLES)
    relate(session, PLANNED)
    return session


def ask(session, name, *by):
    rows = session.sql(QUERIES[name].sql).dicts()
    found = {tuple(row[each] for each in by): row for row in rows}
    assert len(found) == len(rows)
    return found


def errors(images, layer=1, **changes):
    none = dict.fromkeys(NormGradient.__dataclass_fields__, 0.0)
    known = {"step": 0, "layer": f"layers.{layer}.norm", "layer_index": layer, "images": images, "values": images}
    return NormGradient(**(none | known | changes))


def way(step, length, curvature, loss, multiple=1.0, square=1.0, before=1.0):
    first, second = length * square, length**2 / 2 * square * curvature
    longest = 2 / curvature if curvature > 0 else None
    return Descent(
        step, multiple, length, square, curvature, longest, first, second, before, before - first + second, loss
    )


def right(accuracy):
    return {"curve": [Curve(LAST, 9.0, split, 360, 1.0, accuracy, 1.0) for split in ("train", "test")]}


# --- its grid ---------------------------------------------------------------------------------------


def test_both_networks_are_trained_at_every_rate_with_batch_norm_and_without_and_the_vgg_from_small_weights_too():
    for preset, depths in ((declared().paper, (50, 16)), (declared().laptop, (14, 11))):
        planned = [e.trial for e in plan(preset, lambda data: Pixels.ORIGINAL)]
        assert len(planned) == 3 * (2 * 2 * 5 + 2)
        assert {(str(t.network), t.depth) for t in planned} == {("resnet", depths[0]), ("vgg", depths[1])}
        assert {(t.momentum, t.weight_decay, str(t.data), t.validation) for t in planned} == {(0.0, 0.0, "digits", 0)}


def test_what_costs_most_looks_at_one_rate_alone():
    of = {(t.norm, t.lr): {p.__name__ for p in looking(declared().probes, t)} for t in (e.trial for e in PLANNED)}
    dear = {"norm_gradient", "weight_scaling", "gamma_scaling"}
    assert all((dear <= of[norm, lr]) == (norm is Norm.BATCH and lr == 0.1) for norm, lr in of)
    assert all(dear.isdisjoint(of[norm, lr]) or dear <= of[norm, lr] for norm, lr in of)
    assert all("descent" in probes for probes in of.values())


def test_its_length_its_rates_and_its_data_can_be_set():
    asked = declared().paper
    for axis, values in settings(["steps=5", "lr=0.1,3", "data=cifar10", "norm=batch"]).items():
        asked = asked.setting(axis, values)
    planned = [e.trial for e in plan(asked, lambda data: Pixels.ORIGINAL)]
    assert {(t.steps, t.lr, str(t.norm), str(t.data)) for t in planned} == {
        (5, lr, "batch", "cifar10") for lr in (0.1, 3.0)
    }


# --- its numbers ------------------------------------------------------------------------------------


def test_a_formula_is_as_good_as_its_worst_reading_and_an_approximation_as_its_median(tmp_path):
    rows = [
        errors(2, gamma_error=1e-9, input_error=1.0, weight_error=4.0, residual=1e-12),
        errors(2, layer=2, gamma_error=None, input_error=2.0, weight_error=None, constant_input_error=1e-8),
        errors(2, layer=3, input_error=9.0, weight_error=5.0),
        errors(64, input_error=0.1, weight_error=0.5),
    ]
    found = session_with(tmp_path, {("vgg", "batch", 0.1, seed): {"norm_gradient": rows} for seed in range(3)})
    worst = ask(found, "formulas", "formula", "statistics")
    assert worst["g_gamma", "training"]["measured"] == 1e-9
    assert worst["g_z", "constant"]["measured"] == 1e-8
    assert worst["g_z and both terms", "training"] | {"n": 3} == worst["g_z and both terms", "training"]
    median = ask(found, "errors_in_training", "place", "size")
    assert {key: row["measured"] for key, row in median.items() if key[0] != "every norm"} == pytest.approx(
        {
            ("norm", "2 images"): 2.0,
            ("norm", "whole batch"): 0.1,
            ("weights", "2 images"): 4.5,
            ("weights", "whole batch"): 0.5,
        }
    )


def test_the_condition_is_counted_at_the_trials_own_rate_and_each_rate_counts_the_same(tmp_path):
    readings = {
        ("vgg", "batch", 0.1, 0): {"descent": [way(s, 0.1, 10.0, 0.5) for s in range(4)]},
        # Its length is ten times as long; curvature 0.1 holds at 10 (second 5 of first 10), 1.0 does not.
        ("vgg", "batch", 10.0, 0): {
            "descent": [
                way(0, 10.0, 0.1, 2.0),
                way(5, 10.0, 1.0, 0.5),
                way(5, 1.0, 1.0, 0.5, multiple=0.1),
                way(10, 10.0, -1.0, 0.5),
                way(15, 10.0, 1.0, math.inf),
            ]
        },
    }
    found = session_with(tmp_path, readings)
    (row,) = ask(found, "condition_holds", "network", "norm").values()
    assert (row["measured"], row["n"]) == (pytest.approx((1 + 0.5) / 2), 1)
    (row,) = ask(found, "falls_at_worst", "network", "norm").values()
    assert row["measured"] == pytest.approx(0.5)


def test_what_the_condition_says_is_held_against_the_loss_and_rounding_does_not_count(tmp_path):
    rows = [
        way(0, 1.0, 1.0, 0.9),  # holds, falls
        way(5, 1.0, 1.0, 1.1),  # holds, does not fall
        way(10, 1.0, 1.0, 0.5),
        way(15, 1.0, 1.0, 0.5),
        way(20, 1.0, 3.0, 1.1),  # fails, does not fall
        way(25, 1.0, 3.0, 0.1),  # fails, falls
        way(30, 1.0, 1.0, 1.0, square=1e-6),  # changes the loss by less than can be seen
    ]
    found = session_with(tmp_path, {("resnet", "none", 1.0, 0): {"descent": rows}})
    said = ask(found, "what_the_condition_says", "norm", "condition")
    assert said["none", "holds"]["measured"] == pytest.approx(0.75)
    assert said["none", "fails"]["measured"] == pytest.approx(0.5)


def test_d_is_a_direction_of_descent_where_a_far_shorter_step_goes_down(tmp_path):
    rows = [
        *(way(0, m, 4.0, loss, m) for m, loss in ((0.01, 0.99), (1.0, 2.0))),  # a short step goes down
        *(way(5, m, 4.0, loss, m) for m, loss in ((0.01, 1.01), (1.0, 2.0))),  # it goes up
        *(way(10, m, 4.0, loss, m) for m, loss in ((0.1, 0.9), (1.0, 2.0))),  # none is short enough
        *(way(15, m, 1.0, loss, m) for m, loss in ((0.01, 1.01), (1.0, 2.0))),  # the condition holds
    ]
    found = session_with(tmp_path, {("resnet", "none", 1.0, 0): {"descent": rows}})
    (row,) = ask(found, "no_direction_of_descent").values()
    assert row["measured"] == pytest.approx(0.5)


def test_rates_that_train_are_told_by_training_images_and_one_that_diverged_does_not(tmp_path):
    ends = {0.01: 0.6, 0.1: 0.9, 1.0: 0.95, 10.0: 0.3, 100.0: 0.1}
    readings = {("vgg", "batch", lr, 0): right(accuracy) for lr, accuracy in ends.items()}
    readings |= {("vgg", "none", lr, 0): right(0.9) for lr in (0.01, 0.1)} | {("vgg", "none", 1.0, 0): right(0.9)}
    found = session_with(tmp_path, readings, diverged=[("vgg", "none", 1.0, 0)])
    share = ask(found, "rates_that_train", "network", "norm")
    assert share["vgg", "batch"]["measured"] == pytest.approx(3 / 5)
    assert share["vgg", "none"]["measured"] == pytest.approx(2 / 3)
    (row,) = ask(found, "larger_rate", "network").values()
    assert row["measured"] == pytest.approx(10.0)


def test_the_longest_step_is_compared_before_the_first_update(tmp_path):
    readings = {}
    for seed in range(3):
        readings["vgg", "batch", 0.1, seed] = {"descent": [way(0, 0.1, 2.0, 1.0), way(5, 0.1, 100.0, 1.0)]}
        readings["vgg", "none", 0.1, seed] = {"descent": [way(0, 0.1, 8.0, 1.0)]}
        readings["resnet", "none", 0.1, seed] = {"descent": [way(0, 0.1, -8.0, 1.0)]}
    found = ask(session_with(tmp_path, readings), "longer_steps", "network")
    assert found["vgg",]["measured"] == pytest.approx(4.0)
    assert found["vgg",]["n"] == 3
    assert ("resnet",) not in found or found["resnet",]["measured"] is None


def test_exponents_are_slopes_in_sigma_where_epsilon_is_far_below_it(tmp_path):
    rows = [
        WeightScaling(0, c, of, 0.5 * c, 1.0, c**-2.0 * (c if c < 1 else 1), c**-4.0)
        for c in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
        for of in ("weights", "everything")
    ]
    found = session_with(tmp_path, {("vgg", "batch", 0.1, s): {"weight_scaling": rows} for s in range(3)})
    slopes = {key: row["measured"] for key, row in ask(found, "exponents", "parameters", "reading").items()}
    whole = {"gradient": -1.0, "hessian": -2.0, "first order": -2.0, "second order": -4.0}
    assert {key[1]: value for key, value in slopes.items() if key[0] == "weights"} == pytest.approx(whole)
    (row,) = ask(found, "exponent_below_epsilon").values()
    assert row["measured"] == pytest.approx(-1.0)
    claims = {
        claim.row.get("reading"): claim for claim in declared().claims if claim.row.get("parameters") == "weights"
    }
    said = {reading: report.judge(claim, found, QUERIES).verdict for reading, claim in claims.items()}
    assert said == {
        "gradient": Verdict.REPRODUCED,
        "hessian": Verdict.NOT_REPRODUCED,
        "first order": Verdict.REPRODUCED,
        "second order": Verdict.NOT_REPRODUCED,
    }


def test_the_exponent_of_gamma_is_the_stems_for_each_norm_on_its_way(tmp_path):
    rows = [
        GammaScaling(0, c, which, "layers.1.conv", 1, 13, gradient, 1.0)
        for c in (0.1, 0.3, 1.0, 10.0)
        for which, gradient in (("every", c**13), ("inner", 5.0))
    ]
    rows += [GammaScaling(0, 1.0, "every", "layers.2.conv", 2, 12, 1e9, 1.0)]
    found = session_with(tmp_path, {("vgg", "batch", 0.1, s): {"gamma_scaling": rows} for s in range(3)})
    slopes = {key[1]: row["measured"] for key, row in ask(found, "gamma_exponents", "network", "gammas").items()}
    assert slopes == {"every": pytest.approx(1.0), "inner": pytest.approx(0.0, abs=1e-12)}


def test_gammas_grow_from_their_start_to_the_end_of_the_training(tmp_path):
    def gammas(step, *medians):
        none = dict.fromkeys(Gamma.__dataclass_fields__)
        return [
            Gamma(**(none | {"step": step, "layer": f"l{n}", "layer_index": n, "channels": 4, "gamma_q50": value}))
            for n, value in enumerate(medians)
        ]

    rows = [*gammas(0, 1.0, 1.0), *gammas(50, 9.0, 9.0), *gammas(LAST, 1.5, 2.5)]
    found = session_with(tmp_path, {("vgg", "batch", 0.1, s): {"gamma": rows} for s in range(3)})
    (row,) = ask(found, "growth_of_gammas").values()
    assert (row["measured"], row["n"]) == (pytest.approx(2.0), 3)


def test_every_claim_of_the_note_is_of_any_network_and_judged_on_whatever_was_trained():
    claims = declared().claims
    assert {claim.source.removeprefix("Ours, from ").split(",")[0] for claim in claims} == {"Deshmukh 2020"}
    assert {claim.needs for claim in claims} == {3}
