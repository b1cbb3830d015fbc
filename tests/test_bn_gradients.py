"""The numbers of the study of a note on batch norm's gradients: from rows whose answers a hand computes."""

import importlib
import math
import sys
from pathlib import Path

import pytest

from bnscale import query, report
from bnscale.probes import (
    TABLES,
    Descent,
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
LAST = 300


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


def ends_at(loss):
    """A training from a guess to this loss of its batch."""
    return {
        "descent": [way(s, 0.1, 1.0, 0.5, before=math.log(10) if s < 250 else loss) for s in range(0, LAST + 1, 25)]
    }


LEARNED, GUESSED = math.log(10) - 1.5 * math.log(2), math.log(10) - 0.5 * math.log(2)  # a bit and a half, half a bit


# --- its grid ---------------------------------------------------------------------------------------


def test_both_networks_are_trained_at_every_rate_with_batch_norm_and_without_and_the_vgg_from_small_weights_too():
    for preset, depths, rates in ((declared().paper, (50, 13), 8), (declared().laptop, (14, 11), 6)):
        planned = [e.trial for e in plan(preset, lambda data: Pixels.ORIGINAL)]
        assert len(planned) == 3 * 3 * 2 * rates
        assert {(str(t.network), t.depth) for t in planned} == {("resnet", depths[0]), ("vgg", depths[1])}
        assert {(t.momentum, t.weight_decay, str(t.data), t.validation) for t in planned} == {(0.0, 0.0, "digits", 0)}


DEAR = {"norm_gradient", "weight_scaling", "gamma_scaling"}


def test_what_costs_most_looks_at_one_rate_alone():
    of = {(t.norm, t.lr): {p.__name__ for p in looking(declared().probes, t)} for t in (e.trial for e in PLANNED)}
    assert all((of[norm, lr] >= DEAR) == (norm is Norm.BATCH and lr == 0.1) for norm, lr in of)
    assert all(DEAR.isdisjoint(of[norm, lr]) or of[norm, lr] >= DEAR for norm, lr in of)
    assert all("descent" in probes for probes in of.values())


def test_at_a_rate_that_the_grid_lacks_nothing_is_left_out():
    asked = declared().paper.setting("lr", [0.3])
    planned = [e.trial for e in plan(asked, lambda data: Pixels.ORIGINAL)]
    assert len(planned) == len(PLANNED) / 8
    assert {str(t.weight_init) for t in planned} == {"he_normal", "glorot_normal"}
    for trial in planned:
        probes = {probe.__name__ for probe in looking(declared().probes, trial)}
        assert probes >= DEAR if trial.norm is Norm.BATCH else "gradient" in probes


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
    median = ask(found, "errors_in_training", "network", "place", "size")
    assert {key: row["measured"] for key, row in median.items() if key[1] != "every norm"} == pytest.approx(
        {
            ("vgg", "norm", "2 images"): 2.0,
            ("vgg", "norm", "whole batch"): 0.1,
            ("vgg", "weights", "2 images"): 4.5,
            ("vgg", "weights", "whole batch"): 0.5,
        }
    )


def test_each_network_has_its_own_error_and_its_growth_is_from_its_first_layers_to_its_last(tmp_path):
    def rows(first, last):
        return {"norm_gradient": [errors(64, layer=n, input_error=first if n < 3 else last) for n in range(1, 7)]}

    readings = {("vgg", "batch", 0.1, seed): rows(0.1, 0.4) for seed in range(3)}
    readings |= {("resnet", "batch", 0.1, seed): rows(1.0, 0.5) for seed in range(3)}
    found = session_with(tmp_path, readings)
    median = ask(found, "errors_in_training", "network", "place", "size")
    assert median["vgg", "norm", "whole batch"]["measured"] == pytest.approx(0.4)
    assert median["resnet", "norm", "whole batch"]["measured"] == pytest.approx(0.5)
    growth = ask(found, "growth_over_positions", "network", "place")
    assert growth["vgg", "norm"]["measured"] == pytest.approx(4.0)
    assert growth["resnet", "norm"] | {"n": 3} == growth["resnet", "norm"]
    assert growth["resnet", "norm"]["measured"] == pytest.approx(0.5)


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
    dead = [way(s, 1.0, 1.0, 0.1, before=math.log(10)) for s in range(0, LAST + 1, 25)]
    rows.append(way(LAST, 1.0, 1.0, 1.0, square=1e-6))  # it trains
    readings = {("resnet", "none", 1.0, 0): {"descent": rows}, ("vgg", "none", 1.0, 0): {"descent": dead}}
    found = session_with(tmp_path, readings)
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


def test_a_network_trains_that_has_learned_a_bit_and_rates_too_small_for_it_do_not_count(tmp_path):
    ends = {0.01: GUESSED, 0.1: LEARNED, 1.0: LEARNED, 10.0: GUESSED, 100.0: math.inf}
    readings = {("vgg", "batch", lr, 0): ends_at(loss) for lr, loss in ends.items()}
    readings |= {("vgg", "none", lr, 0): ends_at(LEARNED) for lr in (0.01, 0.1, 1.0)}
    readings |= {("resnet", "none", lr, 0): ends_at(GUESSED) for lr in (0.01, 0.1)}
    found = session_with(tmp_path, readings, diverged=[("vgg", "none", 1.0, 0)])
    share = ask(found, "rates_that_train", "network", "norm")
    assert share["vgg", "batch"]["measured"] == pytest.approx(2 / 4)
    assert share["vgg", "none"]["measured"] == pytest.approx(2 / 3)
    assert share["resnet", "none"]["measured"] == 0
    drawn = ask(found, "bits_over_rates", "panel", "norm", "lr")
    bits = {lr: row["bits"] for (panel, norm, lr), row in drawn.items() if (panel, norm) == ("VGG-13", "batch")}
    assert bits == pytest.approx({0.01: 0.5, 0.1: 1.5, 1.0: 1.5, 10.0: 0.5, 100.0: 0})
    seeds = ask(found, "seeds_that_train", "network", "norm")
    assert (seeds["vgg", "none"]["measured"], seeds["resnet", "none"]["measured"]) == (1, 0)


@pytest.mark.parametrize(
    ("batch", "none", "times"),
    [
        ({0.1: LEARNED, 1.0: LEARNED}, {0.01: LEARNED, 0.1: LEARNED, 1.0: GUESSED}, 10.0),
        ({0.1: LEARNED, 1.0: LEARNED}, {0.01: GUESSED, 0.1: GUESSED}, 1000.0),  # at least: 0.001 may train
        ({0.1: GUESSED, 1.0: GUESSED}, {0.01: LEARNED, 0.1: GUESSED}, 0.0),
        ({0.1: GUESSED}, {0.01: GUESSED}, None),
        ({0.1: LEARNED}, {}, None),  # not looked at
    ],
)
def test_a_side_that_trains_nowhere_bounds_how_much_larger_a_rate_can_be(batch, none, times, tmp_path):
    readings = {("vgg", "batch", lr, s): ends_at(loss) for lr, loss in batch.items() for s in range(3)}
    readings |= {("vgg", "none", lr, s): ends_at(loss) for lr, loss in none.items() for s in range(3)}
    found = session_with(tmp_path, readings)
    (claim,) = (c for c in declared().claims if c.query == "larger_rate" and c.row == {"network": "vgg"})
    judged = report.judge(claim, found, QUERIES)
    if times is None:
        assert judged.verdict == Verdict.NOT_ENOUGH_DATA
        return
    assert (judged.measured, judged.n) == (pytest.approx(times), 3)
    assert judged.verdict == (Verdict.REPRODUCED if times > 1 else Verdict.NOT_REPRODUCED)


def test_the_longest_step_is_compared_before_the_first_update_and_has_no_end_where_nothing_bends_up(tmp_path):
    readings = {}
    for seed in range(3):
        readings["vgg", "batch", 0.1, seed] = {"descent": [way(0, 0.1, 2.0, 1.0), way(5, 0.1, 100.0, 1.0)]}
        readings["vgg", "none", 0.1, seed] = {"descent": [way(0, 0.1, 8.0 if seed else 1.0, 1.0)]}
        readings["resnet", "batch", 0.1, seed] = {"descent": [way(0, 0.1, -8.0, 1.0)]}
        readings["resnet", "none", 0.1, seed] = {"descent": [way(0, 0.1, 8.0, 1.0)]}
    found = session_with(tmp_path, readings)
    share = ask(found, "longer_steps", "network")
    assert (share["vgg",]["measured"], share["vgg",]["n"]) == (pytest.approx(2 / 3), 3)
    assert (share["vgg",]["batch_norm"], share["vgg",]["no_norm"]) == (1.0, 0.25)
    assert (share["resnet",]["measured"], share["resnet",]["n"]) == (1, 3)
    drawn = {key[0] for key in ask(found, "longest_step", "panel", "step")}
    assert len(drawn) == 3  # of the four, all but the one without an end


def test_what_the_series_leaves_out_is_told_over_its_second_term_where_that_is_small_and_seen(tmp_path):
    def rows(left_out):
        # First order 0.2, second 0.02, series 0.82: each loss is off by `left_out` of the second order.
        near = [way(s, 0.2, 1.0, 0.82 + 0.02 * left_out) for s in range(0, LAST + 1, 25)]
        far = [way(s, 2.0, 1.0, 9.0, multiple=10.0) for s in range(0, LAST + 1, 25)]
        return {"descent": [*near, *far]}

    readings = {("vgg", "batch", 0.1, s): rows(0.05) for s in range(3)}
    readings |= {("vgg", "none", 0.1, s): rows(-3.0) for s in range(3)}
    found = session_with(tmp_path, readings)
    said = ask(found, "beyond_the_series", "norm")
    assert said["batch",]["measured"] == pytest.approx(0.05)
    assert said["none",]["measured"] == pytest.approx(3.0)
    drawn = ask(found, "beyond_by_length", "panel", "norm", "length")
    assert [row["beyond"] for key, row in drawn.items() if key[1] == "none" and key[2] < 1] == [pytest.approx(0.3)]


def test_exponents_are_slopes_in_sigma_where_epsilon_is_far_below_it(tmp_path):
    rows = [
        WeightScaling(0, c, of, 0.5 * c, 1.0, c**-2.0 * (c if c < 1 else 1), c**-4.0)
        for c in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
        for of in ("weights", "everything")
    ]
    flat = [WeightScaling(0, c, "weights", 0.5 * c, 1.0, 1.0, 1.0) for c in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)]
    readings = {("vgg", "batch", 0.1, s): {"weight_scaling": rows} for s in range(3)}
    readings |= {("resnet", "batch", 0.1, s): {"weight_scaling": flat} for s in range(3)}
    found = session_with(tmp_path, readings)
    of = {key: row["measured"] for key, row in ask(found, "exponents", "network", "parameters", "reading").items()}
    assert of["resnet", "weights", "gradient"] == pytest.approx(0, abs=1e-12)  # another network is another number
    slopes = {key[1:]: value for key, value in of.items() if key[0] == "vgg"}
    whole = {"gradient": -1.0, "hessian": -2.0, "first order": -2.0, "second order": -4.0}
    assert {key[1]: value for key, value in slopes.items() if key[0] == "weights"} == pytest.approx(whole)
    assert ask(found, "exponent_below_epsilon", "network")["vgg",]["measured"] == pytest.approx(-1.0)
    claims = {
        claim.row["reading"]: claim
        for claim in declared().claims
        if claim.query == "exponents" and (claim.row["network"], claim.row["parameters"]) == ("vgg", "weights")
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
    rows += [GammaScaling(LAST, c, "every", "layers.1.conv", 1, 13, 7.0, 1.0) for c in (0.1, 0.3, 1.0)]
    of = {(network, "batch", 0.1, s): {"gamma_scaling": rows} for network in ("vgg", "resnet") for s in range(3)}
    found = session_with(tmp_path, of)
    slopes = {key[0]: row["measured"] for key, row in ask(found, "gamma_exponents", "gammas").items()}
    assert slopes == {"every": pytest.approx(1.0), "inner": pytest.approx(0.0, abs=1e-12)}


def test_what_learned_gammas_do_is_told_at_the_end_of_trainings_that_train(tmp_path):
    def rows(trained, loss):
        at = [(0, "every", 9.0), (0, "ones", 9.0), (LAST, "every", trained), (LAST, "ones", 2.0)]
        gammas = [GammaScaling(step, 1.0, which, "layers.1.conv", 1, 13, value, 1.0) for step, which, value in at]
        return {"gamma_scaling": gammas} | ends_at(loss)

    readings = {("vgg", "batch", 0.1, s): rows(5.0, LEARNED) for s in range(3)}
    readings |= {("resnet", "batch", 0.1, s): rows(5.0, GUESSED if s else LEARNED) for s in range(3)}
    found = ask(session_with(tmp_path, readings), "gain_of_gammas", "network", "weight_init")
    assert (found["vgg", "he_normal"]["measured"], found["vgg", "he_normal"]["n"]) == (pytest.approx(2.5), 3)
    assert found["resnet", "he_normal"]["n"] == 1


def test_every_claim_of_the_note_is_of_any_network_and_judged_on_whatever_was_trained():
    claims = declared().claims
    sources = {claim.source.removeprefix("Ours, from ").split(",")[0] for claim in claims}
    assert sources == {"Deshmukh 2020", "Ours"}
    assert {claim.needs for claim in claims} == {3}
