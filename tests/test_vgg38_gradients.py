"""The numbers of the study of VGG-38's gradients: from rows whose answers a hand computes, and from its own networks
before they train."""

import importlib
import math
import sys
from pathlib import Path

import pytest

from bnscale import query, report
from bnscale.engine import Gang
from bnscale.probes import TABLES, parameter_gradient
from bnscale.probes.cadence import STEP
from bnscale.probes.parameters import ParameterGradient
from bnscale.report import Verdict
from bnscale.store import Store
from bnscale.study.plan import plan, relate, settings
from bnscale.train import Job, run
from bnscale.trial import Outcome, Pixels

FOLDER = Path(__file__).parents[1] / "studies"
QUERIES = report.queries((FOLDER / "vgg38_gradients.sql").read_text())
VGG38, FROM_ONE, UNSCALED, RESNET, NO_NORM = "VGG-38", "gamma from 1", "unscaled weights", "ResNet", "no norm"


def declared():
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module("vgg38_gradients").study


def planned(preset, *sets):
    asked = declared().preset(preset)
    for axis, values in settings(sets).items():
        asked = asked.setting(axis, values)
    return plan(asked, lambda data: Pixels.ORIGINAL)


def leg_of(trial):
    if trial.norm == "none":
        return NO_NORM
    if trial.network == "resnet":
        return RESNET
    if trial.weight_init == "gaussian":
        return UNSCALED
    return FROM_ONE if trial.norm_init == "ones" else VGG38


def session_with(folder, every, rows_of, outcome=Outcome.FINISHED):
    """SQL over a store in which every planned trial has the rows that `rows_of` gives it."""
    store = Store(folder)
    for each in every:
        writer = store.writer(each.trial, {"parameter_gradient": "start"}, {})
        writer.write("parameter_gradient", rows_of(each.trial))
        writer.finish(outcome, each.trial.total_steps, {})
    session = query.open(folder, TABLES)
    relate(session, every)
    return session


def tensor(step, kind, count=1, gradient=1.0, size=1.0, update=None, moved=0.0, layer=1, name=None, size_rms=None):
    return ParameterGradient(
        step, name or f"{layer}.{kind}", kind, layer, True, count, gradient, gradient, size,
        size if size_rms is None else size_rms, update, moved,
    )  # fmt: skip


def reading(step, **changes):
    """A network of one tensor a kind, as `changes` has it."""
    of = {kind: {} for kind in ("gamma", "beta", "convolution", "output weight", "output bias")}
    return [tensor(step, kind, **(own | changes.get(kind.replace(" ", "_"), {}))) for kind, own in of.items()]


def ask(session, name, *by):
    rows = session.sql(QUERIES[name].sql).dicts()
    found = {tuple(row[each] for each in by): row for row in rows}
    assert len(found) == len(rows)
    return found


def readings(session, leg=VGG38, scope="any"):
    found = ask(session, "over_seeds", "leg", "scope", "reading")
    return {key[2]: row["measured"] for key, row in found.items() if key[:2] == (leg, scope)}


ONE = ["network=vgg_residual", "norm=batch", "norm_init=uniform", "weight_init=he_normal", "seed=0"]


def test_both_presets_train_the_reports_network_and_four_relatives_on_three_seeds():
    for preset, data, epochs in (("paper", "cifar100", 100), ("laptop", "digits", 20)):
        trials = [each.trial for each in planned(preset)]
        assert {(t.depth, str(t.data), t.epochs, str(t.trainable)) for t in trials} == {(38, data, epochs, "all")}
        assert sorted(map(leg_of, trials)) == sorted(3 * [VGG38, FROM_ONE, UNSCALED, RESNET, NO_NORM])
    assert len(planned("paper", "data=cifar10", "epochs=1", *ONE)) == 1


def test_a_mean_counts_every_number_once_however_they_lie_in_tensors(tmp_path):
    def rows(trial):
        at = reading(0, gamma={"count": 3, "gradient": 2.0}, beta={"count": 1, "gradient": 6.0})
        return [*at, tensor(0, "convolution", 97, 0.5, layer=2), tensor(10, "gamma")]

    session = session_with(tmp_path, planned("laptop", *ONE), rows)
    found = ask(session, "by_kind", "step", "kind")
    assert found[0, "batch norm"]["gradient"] == pytest.approx((3 * 2 + 6) / 4)
    assert found[0, "rest"]["gradient"] == pytest.approx((97 * 0.5 + 3) / 100)
    assert found[0, "all"]["numbers"] == 104
    assert readings(session)["gradient"] == pytest.approx(3 / 0.515)


def test_ratios_of_a_training_are_geometric_means_the_least_is_the_worst_reading_and_ends_are_the_last(tmp_path):
    weight = {"output_weight": {"count": 0}, "output_bias": {"count": 0}}

    def side(step, norm, rest):
        both = {"gradient": norm, "size": 2.0, "moved": step * norm}
        other = {"gradient": rest, "size": 0.5, "moved": step * 1.0}
        update = {} if step in (0, 500) else {"update": 3 * norm}
        rest_update = {} if step in (0, 500) else {"update": 1.0}
        return reading(
            step, gamma=both | update, beta=both | update, convolution=other | rest_update, **weight
        )  # fmt: skip

    def rows(trial):
        return [*side(0, 8.0, 1.0), *side(250, 4.0, 2.0), *side(500, 1.0, 2.0)]

    session = session_with(tmp_path, planned("laptop", *ONE), rows)
    found = readings(session)
    assert found["least"] == pytest.approx(1 / 2)
    assert found["gradient"] == pytest.approx(2.0)  # of 8, 2 and 1/2
    assert found["update"] == pytest.approx(12.0)  # there is none at either end
    assert found["moved"] == pytest.approx(1.0)
    assert found["relative"] == pytest.approx(2.0 / 4)  # gamma is four times as large
    assert found["moved relative"] == pytest.approx(1.0 / 4)
    assert found["stays"] == pytest.approx(1 / 8)
    squares = [(2 * norm**2, rest**2) for norm, rest in ((8, 1), (4, 2), (1, 2))]
    assert found["share"] == pytest.approx(sum(ours / (ours + other) for ours, other in squares) / 3)
    assert ask(session, "kinds_over_training", "kind", "step")["beta", 0]["relative"] == pytest.approx(4.0)


def test_a_gradient_of_nothing_refutes_that_it_is_higher_and_is_no_missing_seed(tmp_path):
    def rows(trial):
        none = {"gradient": 0.0} if trial.seed == 0 else {"gradient": 8.0}
        return [*reading(1, gamma=none, beta=none), *reading(trial.total_steps, gamma={"gradient": 2.0})]

    session = session_with(tmp_path, planned("paper"), rows)
    found = ask(session, "over_seeds", "leg", "scope", "reading")
    for reads in ("least", "gradient"):
        assert (found[VGG38, "report", reads]["measured"], found[VGG38, "report", reads]["n"]) == (0.0, 3)
    said = [c for c in declared().claims if c.row == {"leg": VGG38, "scope": "report", "reading": "least"}]
    assert [report.judge(claim, session, QUERIES).verdict for claim in said] == [Verdict.NOT_REPRODUCED]


def test_the_output_layer_is_compared_alone_and_among_the_rest(tmp_path):
    def rows(trial):
        loud = {"gradient": 4.0, "count": 10}
        return [
            row for step in (0, 500)
            for row in reading(step, gamma={"gradient": 2.0}, beta={"gradient": 2.0}, output_weight=loud,
                               output_bias=loud, convolution={"count": 980, "gradient": 0.1})
        ]  # fmt: skip

    found = readings(session_with(tmp_path, planned("laptop", *ONE), rows))
    assert found["output"] == pytest.approx(0.5)
    assert found["gradient"] == pytest.approx(2 / (0.02 * 4 + 0.98 * 0.1))


def test_a_beta_that_has_not_moved_has_no_relative_gradient_and_a_step_that_overflowed_does_not_count(tmp_path):
    def rows(trial):
        lost = reading(250, gamma={"gradient": math.inf})
        return [*reading(0, beta={"size": 0.0}), *lost, *reading(500, beta={"size": 0.5})]

    session = session_with(tmp_path, planned("laptop", *ONE), rows)
    found = ask(session, "relative_over_training", "kind", "step")
    assert {step: found["beta", step]["relative"] for step in (0, 500)} == {0: None, 500: 2.0}
    assert {step for _, step in found} == {0, 500}
    assert readings(session)["gradient"] == 1.0


def test_what_sizes_give_is_taken_layer_by_layer_and_a_shortcuts_norm_is_no_layers(tmp_path):
    def layer(step, number, measured, fan_in, rms, gamma):
        return [
            tensor(step, "gamma", 4, measured, gamma, layer=number, name=f"blocks.{number}.norm2.weight"),
            tensor(step, "beta", 4, 2 * measured, 0.0, layer=number, name=f"blocks.{number}.norm2.bias"),
            tensor(step, "convolution", 4 * fan_in, 1.0, 0.9 * rms, layer=number, size_rms=rms),
            tensor(step, "gamma", 4, 99.0, 1.0, layer=number, name=f"blocks.{number}.shortcut.norm.weight"),
            tensor(step, "beta", 4, 99.0, 1.0, layer=number, name=f"blocks.{number}.shortcut.norm.bias"),
            tensor(step, "output weight", layer=number),
        ]

    def rows(trial):
        # Sizes give 0.5 * 4 / 0.5 = 4 and 0.1 * 10 / 1 = 1.
        at = [*layer(0, 1, 8.0, 16, 0.5, 0.5), *layer(0, 2, 0.5, 100, 0.1, 1.0)]
        return [*at, *layer(500, 1, 8.0, 16, 0.5, 0.5), *layer(500, 2, 2.0, 100, 0.1, 1.0)]

    session = session_with(tmp_path, planned("laptop", *ONE), rows)
    found = readings(session)
    assert found["expected"] == pytest.approx(1.0)  # twice and half of what sizes give
    assert found["expected in training"] == pytest.approx(2.0)
    assert found["beta"] == pytest.approx(2.0)
    assert found["layers"] == pytest.approx(3 / 4)
    intervals = {(row["low"], row["high"]) for row in ask(session, "over_seeds", "scope", "reading").values()}
    assert intervals == {(None, None)}  # one seed has none
    drawn = ask(session, "gamma_over_convolution", "step", "reading")
    assert drawn[0, "expected"]["times"] == pytest.approx(2.0)


def of_the_report(session):
    claims = [claim for claim in declared().claims if claim.row.get("scope") == "report"]
    assert len(claims) == 6
    return {report.judge(claim, session, QUERIES).verdict for claim in claims}


def any_rows(trial):
    last = trial.total_steps
    both = [{"update": 2.0, "moved": 1.0}, {"moved": 1.0}]
    kinds = ("gamma", "beta", "convolution", "output_weight", "output_bias")
    return [
        row for step, own in ((1, both[0]), (last, both[1])) for row in reading(step, **dict.fromkeys(kinds, own))
    ]  # fmt: skip


def test_the_reports_sentences_are_held_against_its_own_training_and_ours_against_whatever_was_trained(tmp_path):
    found = of_the_report(session_with(tmp_path / "paper", planned("paper"), any_rows))
    assert found == {Verdict.REPRODUCED, Verdict.NOT_REPRODUCED}
    laptop = session_with(tmp_path / "laptop", planned("laptop"), any_rows)
    assert of_the_report(laptop) == {Verdict.NOT_ENOUGH_DATA}
    assert readings(laptop)["gradient"] == 1.0


@pytest.mark.parametrize(
    ("sets", "outcome"),
    [
        (["data=cifar10"], "finished"),
        (["epochs=99"], "finished"),
        (["width=1"], "finished"),
        (["trainable=bn"], "finished"),
        (["affine=gamma"], "finished"),
        (["gamma_l1=0.1"], "finished"),
        (["weight_init=glorot_normal"], "finished"),
        (["depth=20"], "finished"),
        (["label_noise=0.5"], "finished"),
        (["lr=0.3"], "finished"),
        (["momentum=0"], "finished"),
        (["batch=32", "norm_batch=32"], "finished"),
        (["norm_batch=32"], "finished"),
        (["weight_decay=0"], "finished"),
        (["norm_decay=0"], "finished"),
        (["augmentation=none"], "finished"),
        (["milestones=0.5"], "finished"),
        (["weight_decay=0.0001,0.001"], "finished"),  # two settings of one seed
        ([], "diverged"),
    ],
)
def test_another_training_says_nothing_of_the_reports(sets, outcome, tmp_path):
    every = planned("paper", "norm=batch", "network=vgg_residual", *sets)
    assert of_the_report(session_with(tmp_path, every, any_rows, Outcome(outcome))) == {Verdict.NOT_ENOUGH_DATA}


def test_on_the_studys_own_networks_sizes_give_what_gamma_receives_before_training(tmp_path):
    every = planned("laptop", "seed=0", "epochs=none", "steps=1")
    for each in every:
        job = Job(each.trial, {parameter_gradient: STEP}, str(tmp_path), str(tmp_path), None, 0, 60.0)
        for _ in run([job], Gang(), 1, lambda: False):
            pass
    session = query.open(tmp_path, TABLES)
    relate(session, every)
    start = ask(session, "gamma_over_convolution", "leg", "step", "reading")
    times = {leg: start[leg, 0, "measured"]["times"] for leg in (VGG38, FROM_ONE, UNSCALED, RESNET)}
    # sqrt(2) over a mean gamma of 1/2, and over 1; unscaled weights are 12 times He's but in the stem.
    by_hand = {VGG38: 2 * 2**0.5, FROM_ONE: 2**0.5, UNSCALED: 24 * 2**0.5, RESNET: 2 * 2**0.5}
    assert times == {leg: pytest.approx(each, rel=0.2) for leg, each in by_hand.items()}
    for leg in times:
        assert readings(session, leg)["expected"] == pytest.approx(1.0, rel=0.15)
    apart = ask(session, "between_legs", "what")
    assert apart[UNSCALED,]["measured"] == pytest.approx(apart[f"{UNSCALED}, by size",]["measured"], rel=0.15)
    assert apart[NO_NORM,]["n"] == 1
