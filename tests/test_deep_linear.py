"""The numbers of the deep linear study: from rows whose answers a hand computes, of trials that nobody trained."""

import importlib
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from bnscale import query, report
from bnscale.data import Resident
from bnscale.probes import TABLES, BatchCurve, CovariateShift, GradientBound, Landscape
from bnscale.report import Verdict
from bnscale.store import Store
from bnscale.study.plan import plan, relate, settings
from bnscale.trial import Outcome, Pixels

FOLDER = Path(__file__).parents[1] / "studies"
QUERIES = report.queries((FOLDER / "deep_linear.sql").read_text())
LAST = 10_000
T95 = 4.3026527  # Student's t for three readings, 97.5 %


def declared():
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module("deep_linear").study


PLANNED = plan(declared().paper, lambda data: Pixels.ORIGINAL)


def session_with(folder, readings, diverged=()):
    """SQL over a store with these rows: by norm, rate and seed, tables with their rows."""
    store = Store(folder)
    trials = {(str(e.trial.norm), e.trial.lr, e.trial.seed): e.trial for e in PLANNED}
    for key, tables in readings.items():
        writer = store.writer(trials[key], dict.fromkeys(tables, "start"), {})
        for table, rows in tables.items():
            writer.write(table, rows)
        outcome = Outcome.DIVERGED if key in diverged else Outcome.FINISHED
        writer.finish(outcome, LAST, {})
    session = query.open(folder, TABLES)
    relate(session, PLANNED)
    return session


def ask(session, name, *by):
    rows = session.sql(QUERIES[name].sql).dicts()
    found = {tuple(row[each] for each in by): row for row in rows}
    assert len(found) == len(rows)
    return found


def planned(*sets):
    asked = declared().paper
    for axis, values in settings(sets).items():
        asked = asked.setting(axis, values)
    return plan(asked, lambda data: Pixels.ORIGINAL)


def papers_numbers(folder, every, outcome=Outcome.FINISHED):
    """What is measured of each number of the paper, where every trial wrote readings at its first and last step."""
    store = Store(folder)
    for each in every:
        last = each.trial.steps
        tables = {
            "batch_curve": [BatchCurve(s, float(s), 1000, 9.0, None) for s in (0, last)],
            "covariate_shift": [CovariateShift(last, f"layers.{n}.linear", n, 1.0, 1.0, 2.0, 0.5) for n in (9, 17)],
            "landscape": way(last, each.trial.lr, 0.02, 2.0),
        }
        writer = store.writer(each.trial, dict.fromkeys(tables, "start"), {})
        for table, rows in tables.items():
            writer.write(table, rows)
        writer.finish(outcome, last, {})
    session = query.open(folder, TABLES)
    relate(session, every)
    of_the_paper = ("losses", "shift", "extremes", "growth_of_gradient_difference")
    claims = [claim for claim in declared().claims if claim.query in of_the_paper]
    assert len(claims) == 20
    return {claim.sentence: report.judge(claim, session, QUERIES).measured for claim in claims}


def test_the_papers_networks_and_protocol_answer_for_all_its_numbers(tmp_path):
    assert None not in papers_numbers(tmp_path, planned()).values()


@pytest.mark.parametrize(
    "sets",
    [
        ["depth=24"],
        ["width=9"],
        ["batch=500", "norm_batch=500"],
        ["norm_batch=500"],
        ["trainable=bn"],
        ["placement=last"],
        ["affine_at=last"],
        ["affine_at=none"],
        ["weight_init=he_normal"],
        ["norm_init=uniform"],
        ["affine=gamma"],
        ["momentum=0.9"],
        ["weight_decay=0.0005"],
        ["milestones=0.5"],
        ["plateau=5"],
        ["warmup=0.1"],
        ["gamma_l1=0.1"],
        ["gamma_l2=0.1"],
        ["beta_l1=0.1"],
        ["beta_l2=0.1"],
        ["norm_decay=0.1"],
        ["precision=bf16"],
        ["lr_drop=0.1,0.2"],  # two settings of one seed
    ],
)
def test_the_papers_numbers_are_held_against_its_own_network_and_protocol_alone(sets, tmp_path):
    every = planned("norm=batch", "seed=0", *sets)
    assert set(papers_numbers(tmp_path, every).values()) == {None}


@pytest.mark.parametrize(
    ("sets", "outcome"), [(["steps=20000"], "finished"), (["steps=1000"], "finished"), ([], "diverged")]
)
def test_a_training_that_is_not_as_long_as_the_papers_answers_for_its_beginning_alone(sets, outcome, tmp_path):
    found = papers_numbers(tmp_path, planned(*sets), Outcome(outcome))
    known = {sentence for sentence, measured in found.items() if measured is not None}
    assert known == {f"Loss before the first step, {norm}." for norm in ("no norm", "batch norm")}


def losses(*values):
    steps = (0, 5000, LAST)
    return {"batch_curve": [BatchCurve(s, float(s), 1000, v, None) for s, v in zip(steps, values, strict=False)]}


def way(step, lr, *changes, losses=(5.0, 7.0), gradient=1.0, before=6.0):
    """One step of each of some multiples of the rate, with the gradient's changes."""
    multiples = (0.01, 1.0)
    return [
        Landscape(step, m, m * lr, m * lr * gradient, before, loss, gradient, change, change / (m * lr * gradient))
        for m, change, loss in zip(multiples, changes, losses, strict=True)
    ]


def unit(step, left, right, plain):
    return GradientBound(step, 1, "layers.1.norm", 0, 1000, 1.0, 1.0, left, right, right, 0.0, 0.0, plain, plain)


def test_the_paper_is_repeated_over_seeds_and_what_costs_most_is_trained_once():
    trials = [each.trial for each in PLANNED]
    assert {(t.depth, t.width, t.steps, t.batch, str(t.data), t.momentum) for t in trials} == {
        (25, 10, LAST, 1000, "linear_teacher", 0.0)
    }
    counts = Counter((str(t.norm), t.lr) for t in trials)
    once = dict.fromkeys([(norm, lr) for norm in ("l1", "l2", "linf") for lr in (1e-6, 1e-7)], 1)
    assert counts == once | {(norm, lr): 3 for norm in ("none", "batch") for lr in (1e-6, 1e-7)}


def test_the_loss_at_the_end_is_a_geometric_mean_and_a_trial_that_diverged_has_none(tmp_path):
    readings = {("batch", 1e-6, seed): losses(100.0, 50.0, end) for seed, end in enumerate((1.0, 10.0, 100.0))}
    readings |= {("none", 1e-6, seed): losses(100.0, 50.0, 40.0) for seed in range(2)}
    readings["none", 1e-6, 2] = losses(100.0, math.inf)
    session = session_with(tmp_path, readings, diverged=[("none", 1e-6, 2)])
    found = ask(session, "losses", "norm", "place")
    assert (found["batch", "end"]["measured"], found["batch", "end"]["n"]) == (pytest.approx(10.0), 3)
    half = T95 * math.log(10) / math.sqrt(3)  # the logarithms are a decade apart
    assert found["batch", "end"]["high"] == pytest.approx(10 * math.exp(half), rel=1e-6)
    assert (found["none", "end"]["measured"], found["none", "end"]["n"]) == (pytest.approx(40.0), 2)
    assert found["none", "start"]["n"] == 3
    (row,) = ask(session, "times_less_loss", "lr").values()
    assert (row["measured"], row["n"]) == (pytest.approx(40 / math.sqrt(10)), 2)  # seeds that have both


def test_what_a_loss_lacks_is_counted_in_directions_of_the_teacher_that_networks_learn_from(tmp_path):
    _, outputs = Resident(PLANNED[0].trial, tmp_path, torch.device("cpu")).batch(0)
    squares = torch.linalg.svdvals(outputs.double()).square().flip(0)
    sums = [0.0, *(squares.cumsum(0) / 2).tolist()]
    between = (sums[4] + sums[5]) / 2
    readings = {
        ("batch", 1e-6, 0): losses(1e9, between, sums[4] + 0.1),
        ("none", 1e-6, 0): losses(1e9, sums[7] + 0.1, sums[6] + 0.1),
    }
    session = session_with(tmp_path / "store", readings)
    known = {row["directions"]: row["loss"] for row in ask(session, "spectrum", "directions").values()}
    assert known == {k: pytest.approx(each, abs=0.1) for k, each in enumerate(sums)}
    found = ask(session, "directions_over_training", "norm", "step")
    left = {key: row["directions_left"] for key, row in found.items()}
    assert left == {
        ("batch", 0): 10, ("batch", 5000): pytest.approx(4.5, abs=1e-3), ("batch", LAST): pytest.approx(4, abs=1e-3),
        ("none", 0): 10, ("none", 5000): pytest.approx(7, abs=1e-3), ("none", LAST): pytest.approx(6, abs=1e-3),
    }  # fmt: skip


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_one_seed_that_overflows_leaves_a_maximum_and_two_contradict_the_paper(norm, tmp_path):
    def most(*values):
        return {
            (norm, 1e-6, seed): {"landscape": way(0, 1e-6, 1.0, 2.0, losses=(5.0, value))}
            for seed, value in enumerate(values)
        }

    claims = [c for c in declared().claims if c.query == "extremes" and c.row["norm"] == norm]
    of_loss = next(c for c in claims if c.row["quantity"] == "loss")
    inside = of_loss.paper
    one = session_with(tmp_path / "one", most(1e3, inside, math.inf))
    row = ask(one, "extremes", "quantity", "statistic")["loss", "maximum"]
    assert (row["measured"], row["n"], row["high"]) == (pytest.approx(inside), 3, 1e30)
    assert report.judge(of_loss, one, QUERIES).verdict is Verdict.REPRODUCED
    two = session_with(tmp_path / "two", most(1e3, math.inf, math.inf))
    judged = report.judge(of_loss, two, QUERIES)
    assert (judged.measured, judged.verdict) == (1e30, Verdict.NOT_REPRODUCED)


def test_a_quadratic_at_the_edge_of_stability_has_its_plateau_at_2_over_lr_at_every_step_size(tmp_path):
    # The gradient's change over a step t of curvature 2 / LR is 2 t / LR times the gradient.
    lr = 1e-7
    readings = {
        ("batch", lr, seed): {"landscape": [row for step in (0, 5000, LAST) for row in way(step, lr, 0.02, 2.0)]}
        for seed in range(3)
    }
    found = ask(session_with(tmp_path, readings), "plateau", "reading")
    readings_of_beta = ("every step size", "steps from LR on", "the shortest step")
    assert {reading: row["measured"] for (reading,), row in found.items()} == dict.fromkeys(
        readings_of_beta, pytest.approx(1.0)
    )
    assert all(row["n"] == 3 for row in found.values())


def test_a_plateau_is_of_the_second_half_of_a_training_and_a_median_over_training_of_all(tmp_path):
    lr = 1e-6
    early, late = (0, 1000, 2000), (5000, LAST)
    rows = [row for step in early for row in way(step, lr, 0.2, 20.0)]
    rows += [row for step in late for row in way(step, lr, 0.02, 2.0)]
    session = session_with(tmp_path, {("batch", lr, 0): {"landscape": rows}})
    assert all(row["measured"] == pytest.approx(1.0) for row in ask(session, "plateau", "reading").values())
    whole = ask(session, "extremes", "quantity", "statistic")["beta", "median"]
    assert whole["measured"] == pytest.approx(10 * 2 / lr)


def test_gradients_that_turn_by_their_own_length_at_the_shortest_step_would_put_it_at_50_times_that(tmp_path):
    session = session_with(tmp_path, {("batch", 1e-6, 0): {"landscape": way(LAST, 1e-6, 1.0, 1.0)}})
    found = ask(session, "plateau", "reading")
    measured = {reading: row["measured"] for (reading,), row in found.items()}
    assert measured == {
        "every step size": pytest.approx(50.0), "the shortest step": pytest.approx(50.0),
        "steps from LR on": pytest.approx(0.5),
    }  # fmt: skip
    assert {(row["low"], row["high"]) for row in found.values()} == {(None, None)}  # one seed has no interval


def test_rounding_of_the_gradient_over_the_shortest_step_does_not_count_as_a_plateau(tmp_path):
    # A sharpness of a thousandth of 2 / LR, and over LR / 100 a gradient that float32 rounds by a hundredth of itself.
    session = session_with(tmp_path, {("none", 1e-6, 0): {"landscape": way(LAST, 1e-6, 0.01, 0.002)}})
    found = ask(session, "plateau", "reading")
    assert found["every step size",]["measured"] == pytest.approx(0.5)
    assert found["steps from LR on",]["measured"] == pytest.approx(0.001)


def test_the_growth_of_the_gradients_change_is_its_largest_over_its_least_over_step_sizes(tmp_path):
    readings = {
        ("batch", 1e-6, seed): {
            "landscape": [
                Landscape(LAST, m, m * 1e-6, m * 1e-6, 6.0, 5.0, 1.0, change, 1.0)
                for m, change in ((0.01, 2.0), (0.1, 1.0), (1.0, 50.0), (10.0, 30.0))
            ]
        }
        for seed in range(3)
    }
    (row,) = ask(session_with(tmp_path, readings), "growth_of_gradient_difference", "norm").values()
    assert (row["measured"], row["n"]) == (pytest.approx(50.0), 3)


def test_the_range_of_the_loss_is_over_the_steps_and_not_from_where_they_start(tmp_path):
    rows = way(0, 1e-6, 1.0, 2.0, losses=(5.0, 7.0), before=100.0)
    session = session_with(tmp_path, {("batch", 1e-6, 0): {"landscape": rows}})
    row = ask(session, "extremes", "quantity", "statistic")["loss range", "maximum"]
    assert (row["measured"], row["low"], row["high"]) == (2.0, None, None)


@pytest.mark.parametrize(("with_norm", "measured"), [(10.0, 1e29), (math.inf, None)])
def test_a_network_that_overflows_without_norms_is_less_smooth_unless_it_does_with_them_too(
    tmp_path, with_norm, measured
):
    def most(value):
        return {"landscape": way(0, 1e-6, 1.0, 2.0, losses=(0.0, value))}

    readings = {("none", 1e-6, seed): most(math.inf) for seed in range(3)}
    readings |= {("batch", 1e-6, seed): most(with_norm) for seed in range(3)}
    session = session_with(tmp_path, readings)
    row = ask(session, "times_smoother", "quantity", "statistic").get(("loss range", "maximum"))
    assert (row and row["measured"]) == (measured and pytest.approx(measured))
    claim = next(c for c in declared().claims if c.query == "times_smoother" and c.row["quantity"] == "loss range")
    verdict = report.judge(claim, session, QUERIES).verdict
    assert verdict is (Verdict.REPRODUCED if measured else Verdict.NOT_ENOUGH_DATA)


def test_the_loss_of_other_norms_is_compared_seed_by_seed(tmp_path):
    readings = {
        ("batch", 1e-6, 0): losses(90.0, 40.0, 10.0),
        ("batch", 1e-6, 1): losses(90.0, 1.0, 1.0),  # a seed that l_1 lacks
        ("l1", 1e-6, 0): losses(70.0, 10.0, 10.0),
    }
    found = ask(session_with(tmp_path, readings), "times_the_loss_of_batch_norm", "norm", "reading")
    assert found["l1", "end"]["measured"] == pytest.approx(1.0)
    assert found["l1", "on the way"]["measured"] == pytest.approx(0.5)  # of 1/4 and 1, and not of the start
    assert found["l1", "end"]["n"] == 1


def shifts(*layers):
    return {
        "covariate_shift": [
            CovariateShift(step, f"layers.{number}.linear", number, size, size, l2, cosine)
            for number, size, l2, cosine in layers
            for step in (0, LAST)
        ]
    }


def test_covariate_shift_is_compared_in_the_layer_that_favours_batch_norm_most(tmp_path):
    readings = {
        # |G| is 2 and 5 without norms, 100 and 4 with batch norm: |G - G'| in units of it 0.5, 0.8, 0.5 and 2
        ("none", 1e-6, 0): shifts((9, 2.0, 1.0, 0.9), (17, 5.0, 4.0, 0.5)),
        ("batch", 1e-6, 0): shifts((9, 100.0, 50.0, 0.2), (17, 4.0, 8.0, 0.6)),
    }
    found = ask(session_with(tmp_path, readings), "shift_with_and_without", "reading")
    measured = {reading: row["measured"] for (reading,), row in found.items()}
    assert measured == {"l2": pytest.approx(2.0), "relative": pytest.approx(1.0), "cosine": pytest.approx(0.1)}
    assert {(row["n"], row["low"], row["high"]) for row in found.values()} == {(1, None, None)}


def test_covariate_shift_in_units_of_the_gradient_is_not_its_reciprocal(tmp_path):
    readings = {
        ("none", 1e-6, 0): shifts((9, 2.0, 1.0, 0.9)),  # half of the gradient
        ("batch", 1e-6, 0): shifts((9, 2.0, 6.0, 0.9)),  # three times the gradient
    }
    found = ask(session_with(tmp_path, readings), "shift_with_and_without", "reading")
    assert found["relative",]["measured"] == pytest.approx(6.0)


def test_covariate_shift_with_and_without_norms_is_compared_from_the_same_weights(tmp_path):
    # By seed |G - G'| grows 2, 5 and 3 times, its middle values 5 times; and cosines change by 0.1, -0.3 and 0.2.
    readings = {
        ("none", 1e-7, seed): shifts((9, 1.0, l2, cosine))
        for seed, (l2, cosine) in enumerate([(1.0, 0.5), (2.0, 0.8), (100.0, 0.1)])
    }
    readings |= {
        ("batch", 1e-7, seed): shifts((9, 1.0, l2, cosine))
        for seed, (l2, cosine) in enumerate([(2.0, 0.6), (10.0, 0.5), (300.0, 0.3)])
    }
    readings["batch", 1e-6, 0] = shifts((9, 1.0, 1.0, 0.5))  # a rate without its other
    found = ask(session_with(tmp_path, readings), "shift_with_and_without", "lr", "reading")
    ranges = {key: (row["measured"], row["low"], row["high"]) for key, row in found.items()}
    assert ranges == {
        (1e-7, "l2"): pytest.approx((3.0, 2.0, 5.0)), (1e-7, "relative"): pytest.approx((3.0, 2.0, 5.0)),
        (1e-7, "cosine"): pytest.approx((0.1, -0.3, 0.2)),
    }  # fmt: skip
    assert {row["n"] for row in found.values()} == {3}


def test_covariate_shift_is_the_median_over_seeds_from_the_least_to_the_greatest_and_one_seed_has_no_range(tmp_path):
    def rows(l2, cosine):
        return {"covariate_shift": [CovariateShift(s, "layers.9.linear", 9, 1.0, 1.0, l2, cosine) for s in (0, LAST)]}

    readings = {("none", 1e-7, seed): rows(*each) for seed, each in enumerate([(0.5, 0.9), (1.0, 0.2), (100.0, 0.8)])}
    readings |= {("batch", 1e-7, 0): rows(7.0, 0.5)}
    found = ask(session_with(tmp_path, readings), "shift", "norm", "reading")
    ranges = {key: (row["measured"], row["low"], row["high"]) for key, row in found.items()}
    assert ranges == {
        ("none", "l2"): pytest.approx((1.0, 0.5, 100.0)), ("none", "cosine"): pytest.approx((0.8, 0.2, 0.9)),
        ("batch", "l2"): (pytest.approx(7.0), None, None), ("batch", "cosine"): (0.5, None, None),
    }  # fmt: skip


def test_a_share_of_one_seed_has_no_interval_and_a_thousandth_above_a_bound_is_rounding(tmp_path):
    rows = [unit(0, 1.0, 1.0, 0.9995), unit(0, 1.0, 1.0, 0.998)]
    rows = [row.__class__(**vars(row) | {"unit": place}) for place, row in enumerate(rows)]
    session = session_with(tmp_path, {("batch", 1e-6, 0): {"gradient_bound": rows}})
    row = ask(session, "bound", "place", "question")["start", "bounded"]
    assert (row["measured"], row["low"], row["high"]) == (0.5, None, None)


def test_a_bound_is_counted_unit_by_unit_and_before_training_apart(tmp_path):
    rows = [unit(0, 1.0, 1.0, 0.5), unit(0, 1.0, 1.0, 2.0), unit(LAST, 1.0, 1.005, 2.0), unit(LAST, 1.0, 2.0, None)]
    rows = [row.__class__(**vars(row) | {"unit": place}) for place, row in enumerate(rows)]
    session = session_with(tmp_path, {("batch", 1e-6, 0): {"gradient_bound": rows}})
    shares = {key: row["measured"] for key, row in ask(session, "bound", "place", "question").items()}
    assert shares == {
        ("start", "equal"): 1.0, ("start", "bounded"): 0.5, ("on the way", "equal"): 0.5, ("on the way", "bounded"): 1.0
    }  # fmt: skip
