"""The numbers of the deep linear study: from rows whose answers a hand computes, of trials that nobody trained."""

import importlib
import math
import sys
from collections import Counter
from pathlib import Path

import pytest

from bnscale import query, report
from bnscale.probes import TABLES, BatchCurve, CovariateShift, GradientBound, Landscape
from bnscale.report import Verdict
from bnscale.store import Store
from bnscale.study.plan import plan, relate
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
    once |= {("none", 3e-7): 1, ("batch", 3e-7): 1}
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


def test_one_seed_that_overflows_leaves_a_maximum_and_two_leave_none(tmp_path):
    def most(*values):
        return {
            ("none", 1e-6, seed): {"landscape": way(0, 1e-6, 1.0, 2.0, losses=(5.0, value))}
            for seed, value in enumerate(values)
        }

    one = session_with(tmp_path / "one", most(1e3, 1e5, math.inf))
    row = ask(one, "extremes", "quantity", "statistic")["loss", "maximum"]
    assert (row["measured"], row["n"], row["high"]) == (1e5, 3, math.inf)
    two = session_with(tmp_path / "two", most(1e3, math.inf, math.inf))
    assert ask(two, "extremes", "quantity", "statistic")["loss range", "maximum"]["measured"] == math.inf
    claims = [c for c in declared().claims if c.query == "extremes" and c.row["norm"] == "none"]
    of_loss = next(c for c in claims if c.row["quantity"] == "loss")
    assert report.judge(of_loss, two, QUERIES).verdict is Verdict.NOT_ENOUGH_DATA
    assert report.judge(of_loss, one, QUERIES).measured == 1e5


def test_a_quadratic_at_the_edge_of_stability_has_its_plateau_at_2_over_lr_at_every_step_size(tmp_path):
    # The gradient's change over a step t of curvature 2 / LR is 2 t / LR times the gradient.
    lr = 1e-7
    readings = {
        ("batch", lr, seed): {"landscape": [row for step in (0, 5000, LAST) for row in way(step, lr, 0.02, 2.0)]}
        for seed in range(3)
    }
    found = ask(session_with(tmp_path, readings), "plateau", "reading")
    assert {reading: row["measured"] for (reading,), row in found.items()} == {
        "effective beta": pytest.approx(1.0), "at the smallest step": pytest.approx(1.0), "turn": pytest.approx(0.02)
    }  # fmt: skip
    assert all(row["n"] == 3 for row in found.values())


def test_gradients_that_turn_by_their_own_length_at_the_smallest_step_would_put_it_at_50_times_that(tmp_path):
    session = session_with(tmp_path, {("batch", 1e-6, 0): {"landscape": way(LAST, 1e-6, 1.0, 1.0)}})
    found = ask(session, "plateau", "reading")
    assert found["effective beta",]["measured"] == pytest.approx(50.0)
    assert found["turn",]["measured"] == pytest.approx(1.0)


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


def test_covariate_shift_is_compared_in_the_layer_that_favours_batch_norm_most(tmp_path):
    def rows(*layers):
        return {
            "covariate_shift": [
                CovariateShift(step, f"layers.{number}.linear", number, size, size, l2, cosine)
                for number, size, l2, cosine in layers
                for step in (0, LAST)
            ]
        }

    readings = {
        ("none", 1e-6, 0): rows((9, 1.0, 1.0, 0.9), (17, 1.0, 4.0, 0.5)),
        ("batch", 1e-6, 0): rows((9, 100.0, 50.0, 0.2), (17, 1.0, 8.0, 0.6)),
    }
    found = ask(session_with(tmp_path, readings), "shift_with_and_without", "reading")
    measured = {reading: row["measured"] for (reading,), row in found.items()}
    assert measured == {"l2": pytest.approx(2.0), "relative": pytest.approx(0.5), "cosine": pytest.approx(0.1)}


def test_a_bound_is_counted_unit_by_unit_and_before_training_apart(tmp_path):
    rows = [unit(0, 1.0, 1.0, 0.5), unit(0, 1.0, 1.0, 2.0), unit(LAST, 1.0, 1.005, 2.0), unit(LAST, 1.0, 2.0, None)]
    rows = [row.__class__(**vars(row) | {"unit": place}) for place, row in enumerate(rows)]
    session = session_with(tmp_path, {("batch", 1e-6, 0): {"gradient_bound": rows}})
    shares = {key: row["measured"] for key, row in ask(session, "bound", "place", "question").items()}
    assert shares == {
        ("start", "equal"): 1.0, ("start", "bounded"): 0.5, ("on the way", "equal"): 0.5, ("on the way", "bounded"): 1.0
    }  # fmt: skip
