"""The numbers of the study of placement: from rows whose answers a hand computes, of trials that nobody trained."""

import importlib
import math
import sys
from collections import Counter
from pathlib import Path

import pytest

from bnscale import query, report
from bnscale.anatomy import placed
from bnscale.probes import TABLES, Curve, Timing
from bnscale.report import Verdict, figures
from bnscale.store import Store
from bnscale.study.plan import plan, relate, settings
from bnscale.trial import Network, Outcome, Pixels, Placement, Refusal, Trainable

FOLDER = Path(__file__).parents[1] / "studies"
QUERIES = report.queries((FOLDER / "placement.sql").read_text())
T95 = 4.3026527  # Student's t for three readings, 97.5 %
HALF = {50: 26, 26: 14, 152: 74, 200: 98}


def declared():
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module("placement").study


def planned(preset, *sets):
    asked = getattr(declared(), preset)
    for axis, values in settings(sets).items():
        asked = asked.setting(axis, values)
    return plan(asked, lambda data: Pixels.ORIGINAL)


def session_with(folder, every, reached, seconds=lambda trial, mode, norms: 1.0, host=lambda trial: "here"):
    """SQL over a store with these trials. `reached`: training, test and held-out accuracy and training loss at the end,
    None for one that diverged, and () for one that has not been run."""
    store = Store(folder)
    for each in every:
        trial, found = each.trial, reached(each.trial)
        if found == ():
            continue
        writer = store.writer(trial, {"curve": "10 epochs", "timing": "start"}, {"host": host(trial), "device": "cpu"})
        start = (0.1, 0.9, 0.1, 9.0)  # it must not count
        for step, end in ((0, start), (trial.total_steps, found)):
            if end is not None:
                train, test, held_out, loss = end
                for split, accuracy in (("train", train), ("test", test), ("validation", held_out)):
                    writer.write("curve", [Curve(step, 0.0, split, 100, loss, accuracy, 1.0)])
        beside = Placement.NONE if trial.placement is Placement.EVERY else Placement.EVERY
        for place in (trial.placement, beside):
            norms = len(placed(trial.network, trial.depth, trial.width, trial.facts.side, place))
            for mode in ("train", "evaluation", "folded"):
                if norms or mode != "folded":
                    took = seconds(trial, mode, norms)
                    row = Timing(0, str(place), mode, norms * (mode != "folded"), 48, 5, "processor", took)
                    writer.write("timing", [row])
        writer.finish(Outcome.FINISHED if found else Outcome.DIVERGED, trial.total_steps, {})
    session = query.open(folder, TABLES)
    relate(session, every)
    return session


def answer(session, name, *by):
    """Rows of a query by the columns that tell them apart."""
    rows = session.sql(QUERIES[name].sql).dicts()
    found = {tuple(row[each] for each in by) if len(by) > 1 else row[by[0]]: row for row in rows}
    assert len(found) == len(rows)
    return found


def only_row(session, name):
    (row,) = session.sql(QUERIES[name].sql).dicts()
    return row


def measured(row):
    return (pytest.approx(row["measured"]), row["n"])


# --- what is declared -----------------------------------------------------------------------------


def test_the_paper_preset_is_the_reports_schedule_on_its_depths_and_on_the_legal_halves():
    trials = [each.trial for each in planned("paper")]
    said = {(str(t.data), t.epochs, t.batch, t.momentum, t.weight_decay, t.milestones) for t in trials}
    assert said == {("cifar10", 160, 128, 0.9, 1e-4, (0.5, 0.75))}
    assert {str(t.norm_init) for t in trials if t.norms} == {"uniform"}
    places = {depth: {t.placement for t in trials if t.depth == depth} for depth in {t.depth for t in trials}}
    all_of_them = {
        Placement.EVERY, Placement.EVERY_2, Placement.EVERY_5, Placement.STAGE_ENDS, Placement.LAST, Placement.NONE
    }  # fmt: skip
    assert places == {n: all_of_them if n in (50, 152, 200) else {Placement.EVERY} for n in (26, 50, 74, 98, 152, 200)}
    assert {t.depth for t in trials if t.trainable is Trainable.BN} == {50, 152, 200}
    for t in trials:
        assert t.placement not in (Placement.EVERY, Placement.EVERY_2) or 0.1 in rates(trials, t)


def rates(trials, like):
    return {t.lr for t in trials if (t.depth, t.placement, t.trainable) == (like.depth, like.placement, like.trainable)}


@pytest.mark.parametrize(("depth", "half"), HALF.items())
def test_every_second_norm_leaves_about_as_many_as_half_the_depth_has_and_twice_the_convolutions(depth, half):
    def norms(layers, place):
        return len(placed(Network.RESNET, layers, 1, 32, place))

    fewer, control = norms(depth, Placement.EVERY_2), norms(half, Placement.EVERY)
    assert abs(fewer - control) <= 3
    assert depth <= 100 or fewer == control
    assert abs(half - depth / 2) <= 3  # no legal depth is nearer
    assert fewer == (depth - 2) // 2  # one a block, behind its first convolution


def test_the_run_on_real_images_trains_six_networks_and_leaves_gamma_and_beta_alone_out():
    sets = ("depth=50", "placement=every,every_2", "epochs=1", "seed=0")
    assert Counter(str(each.trial.placement) for each in planned("paper", *sets)) == {"every": 3, "every_2": 3}


def test_without_held_out_images_nothing_can_choose_a_rate_and_one_rate_needs_no_choice():
    with pytest.raises(Refusal, match="validation 0: lr has .* --set lr="):
        planned("laptop", "depth=50", "validation=0")
    assert len(planned("laptop", "depth=50", "validation=0", "lr=0.1", "placement=every,every_2")) == 6


# --- which rate answers ---------------------------------------------------------------------------


def done(test, train=0.95, held_out=0.5, loss=0.1):
    return train, test, held_out, loss


def test_the_rate_is_chosen_on_held_out_images_and_one_without_divergence_comes_first(tmp_path):
    def reached(trial):
        if trial.lr == 0.1:
            return done(0.99, held_out=0.4)  # test images choose nothing
        if trial.placement is Placement.NONE:
            return (
                None if trial.lr == 1e-4 and trial.seed == 2 else done(0.3, held_out=0.9 if trial.lr == 1e-4 else 0.2)
            )
        return done(0.8, held_out=0.6 if trial.lr == 0.01 else 0.5)

    session = session_with(tmp_path, planned("laptop", "depth=50", "placement=every,none"), reached)
    found = answer(session, "accuracy_over_depth", "kind", "depth")
    assert (found["every", 50]["lr"], found["every", 50]["accuracy"]) == (0.01, pytest.approx(0.8))
    assert found["none", 50]["lr"] == 1e-5
    assert found["none", 50]["diverged"] == 0
    assert (found["every", 50]["at_end"], found["none", 50]["at_end"]) == (None, "least")


def test_a_seed_that_lacks_a_rate_is_left_out_and_a_setting_is_not_a_seed(tmp_path):
    every = planned("laptop", "depth=50", "placement=every")
    session = session_with(
        tmp_path / "a", every, lambda t: () if (t.seed, t.lr) == (1, 0.1) else done(0.8, held_out=0.6 - t.lr)
    )
    assert answer(session, "accuracy_over_depth", "kind")["every"]["n"] == 2
    session = session_with(tmp_path / "b", planned("laptop", "depth=14", "weight_decay=0,0.0001"), lambda t: done(0.8))
    assert answer(session, "accuracy_over_depth", "kind") == {}


# --- accuracy -------------------------------------------------------------------------------------

# By depth and place: test accuracy of seeds 0, 1, 2 is this and a point more and two points more.
TEST = {
    (50, "every"): 0.90, (50, "every_2"): 0.89, (50, "every_5"): 0.80, (50, "stage_ends"): None, (50, "last"): 0.85,
    (50, "none"): None, (26, "every"): 0.86, (26, "every_2"): 0.87, (26, "every_5"): 0.85, (26, "none"): 0.2,
    (14, "every"): 0.85,
}  # fmt: skip
BN = {14: 0.5, 26: 0.45, 50: 0.7}


def reaches(trial):
    base = BN[trial.depth] if trial.trainable is Trainable.BN else TEST[trial.depth, str(trial.placement)]
    if base is None:
        return None
    return done(base + trial.seed / 100, train=1.0 if base > 0.8 else 0.85, loss=1 - base)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return session_with(tmp_path_factory.mktemp("whole"), planned("laptop"), reaches)


def test_fewer_norms_are_held_against_every_norm_at_the_same_depth_and_seed_over_all_depths(whole):
    kept = answer(whole, "kept_accuracy", "placement")
    chance = 0.1 - 0.91  # of a network that diverged, less the mean over seeds
    assert {place: measured(row) for place, row in kept.items()} == {
        "every_2": (0.0, 3), "every_5": ((-0.10 - 0.01) / 2, 3), "stage_ends": (chance, 3), "last": (-0.05, 3),
        "none": ((chance + 0.2 - 0.86) / 2, 3),
    }  # fmt: skip
    assert kept["every_5"]["low"] == pytest.approx(kept["every_5"]["measured"])  # seeds differ alike on both sides
    assert kept["stage_ends"]["high"] - chance == pytest.approx(T95 * 0.01 / math.sqrt(3))
    gain = only_row(whole, "gain_of_norms")
    assert gain["measured"] == pytest.approx(-kept["none"]["measured"])
    assert gain["low"] < gain["measured"] < gain["high"]


def test_larger_blocks_are_held_against_every_norm_at_the_same_depth_and_as_many_norms_in_half_the_layers(whole):
    apart = answer(whole, "blocks_and_norms", "other")
    assert measured(apart["half the layers"]) == (((0.89 - 0.86) + (0.87 - 0.85)) / 2, 3)
    assert measured(apart["every norm"]) == (0.0, 3)
    assert {other: (row["norms"], row["other_norms"]) for other, row in apart.items()} == {
        "half the layers": (24 + 12, 27 + 15), "every norm": (24 + 12, 51 + 27)
    }  # fmt: skip
    row = only_row(whole, "larger_blocks")
    assert (row["other"], row["measured"]) == ("every norm", pytest.approx(0))
    apart = answer(whole, "told_apart", "depth", "network")
    assert {key: (row["layers"], row["norms"], pytest.approx(row["accuracy"])) for key, row in apart.items()} == {
        (50, "every"): (50, 51, 0.91), (50, "every_2"): (50, 24, 0.90), (50, "half the depth"): (26, 27, 0.87),
        (26, "every"): (26, 27, 0.87), (26, "every_2"): (26, 12, 0.88), (26, "half the depth"): (14, 15, 0.86),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("of", "holds"),
    [
        (lambda depth, place: {14: 0.5, 26: 0.7, 50: 0.9}[depth], False),  # depth alone matters
        (lambda depth, place: 0.9 if place is Placement.EVERY_2 else 0.7, True),
        (lambda depth, place: {14: 0.9, 26: 0.7, 50: 0.5}[depth] + 0.2 * (place is Placement.EVERY_2), False),  # norms
        (lambda depth, place: 0.91 if place is Placement.EVERY_2 else 0.90, False),  # less than 100 images tell
        (lambda depth, place: 0.9, False),
    ],
)
def test_larger_blocks_help_only_where_neither_depth_nor_the_number_of_norms_alone_would_do(of, holds, tmp_path):
    every = planned("laptop", "placement=every,every_2")
    session = session_with(tmp_path, every, lambda trial: done(of(trial.depth, trial.placement)))
    (claim,) = (each for each in declared().claims if each.query == "larger_blocks")
    expected = Verdict.REPRODUCED if holds else Verdict.NOT_REPRODUCED
    assert report.judge(claim, session, QUERIES).verdict is expected


def test_a_depth_without_its_half_has_no_number_for_larger_blocks(tmp_path):
    session = session_with(tmp_path, planned("laptop", "depth=50"), reaches)
    assert session.sql(QUERIES["larger_blocks"].sql).rows == []
    assert measured(answer(session, "kept_accuracy", "placement")["every_2"]) == (-0.01, 3)


def test_the_gap_is_training_less_test_accuracy_of_one_step_and_is_asked_of_networks_that_fit(whole):
    gaps = answer(whole, "gap_over_depth", "kind", "depth")
    assert gaps["every", 50]["gap"] == pytest.approx(1.0 - 0.91)
    assert gaps["bn, every", 50]["gap"] == pytest.approx(0.85 - 0.71)
    wider = answer(whole, "wider_gap", "placement")
    assert measured(wider["every_2"]) == (0.0, 3)
    assert set(wider) == {"every_2", "last"}  # every fifth has 85 % of the training images right at 50 layers


def test_expressive_power_is_a_ratio_of_training_losses_and_a_network_that_diverged_has_none(whole):
    power = answer(whole, "expressive_power", "placement")
    assert measured(power["every_2"]) == (math.sqrt((0.11 / 0.10) * (0.13 / 0.14)), 3)
    assert set(power) == {"every_2", "every_5", "last"}


def test_gamma_and_beta_alone_are_held_against_themselves_from_the_shallowest_to_the_deepest(whole):
    row = only_row(whole, "bn_only_gain")
    assert (row["gain"], row["n"]) == (pytest.approx(0.2), 3)
    of_images = sum((p * (1 - p) for s in range(3) for p in (0.5 + s / 100, 0.7 + s / 100)), 0.0) / 3 / 100
    assert row["measured"] == pytest.approx(0.2 / math.sqrt(of_images))  # seeds gain alike


def test_the_deepest_network_of_gamma_and_beta_alone_is_that_of_the_preset_whatever_has_been_run(tmp_path):
    every = planned("laptop", "trainable=bn")
    session = session_with(tmp_path, every, lambda trial: () if trial.depth == 50 else reaches(trial))
    assert session.sql(QUERIES["bn_only_gain"].sql).rows == []


def test_accuracy_over_norms_has_a_family_of_depths_and_families_of_places(whole):
    found = answer(whole, "accuracy_over_norms", "family", "norms")
    families = {
        family: [norms for each, norms in found if each == family] for family in ("every", "26 layers", "50 layers")
    }
    assert families == {"every": [15, 27, 51], "26 layers": [5, 12, 27], "50 layers": [1, 3, 10, 24, 51]}
    assert len(found) == 3 + 3 + 5
    assert found["50 layers", 24]["accuracy"] == pytest.approx(0.90)


# --- time -----------------------------------------------------------------------------------------

TAKES = {"train": 3.0, "evaluation": 1.0, "folded": 0.8}


def takes(trial, mode, norms):
    """A hundredth a norm, unless it is folded; each trial on a machine of its own pace, for all its networks alike."""
    pace = 1 + trial.seed + 100 * trial.lr + len(trial.norms) % 7
    return (TAKES[mode if norms else "folded"] + 0.01 * norms * (mode != "folded")) * pace


def test_times_are_ratios_within_a_trial_whatever_the_pace_of_its_machine(tmp_path):
    # A trial that diverged was timed before that.
    session = session_with(tmp_path, planned("laptop"), lambda trial: None, takes, host=lambda trial: trial.id)
    rows = answer(session, "time_over_every", "depth", "placement", "mode")
    row = rows[50, "every_2", "train"]
    assert (row["ratio"], row["n"], row["norms"], row["clock"]) == (pytest.approx(3.24 / 3.51), 3, 24, "processor")
    assert (row["low"], row["high"]) == pytest.approx((row["ratio"], row["ratio"]))
    assert rows[50, "every", "evaluation"]["ratio"] == 1
    assert (50, "none", "folded") not in rows
    saved = answer(session, "time_saved", "placement", "mode", "other")
    both = math.sqrt((3.24 / 3.51) * (3.12 / 3.27))
    assert measured(saved["every_2", "train", "every"]) == (both, 3)
    assert measured(saved["every", "folded", "none"]) == (1.0, 3)
    assert measured(saved["every_2", "folded", "every"]) == (1.0, 3)
    assert len(saved) == 6


def test_a_ratio_of_times_that_seeds_leave_uncertain_or_a_depth_lacks_has_no_number(tmp_path):
    def noisy(trial, mode, norms):
        own = norms == len(trial.norms) and trial.placement is Placement.EVERY_2
        return takes(trial, mode, norms) * (1 + 0.05 * trial.seed * own)

    every = planned("laptop", "placement=every,every_2")
    session = session_with(tmp_path / "noisy", every, lambda trial: None, noisy)
    row = answer(session, "time_saved", "placement", "mode")["every_2", "train"]
    assert row["measured"] is None
    assert row["high"] / row["ratio"] > 1.05
    session = session_with(tmp_path / "half", every, lambda trial: () if trial.depth == 50 else None, takes)
    assert answer(session, "time_saved", "placement", "mode") == {}


# --- the whole ------------------------------------------------------------------------------------


def test_what_any_data_can_judge_is_judged_and_what_speaks_of_cifar10_is_not(whole):
    judged = {j.claim.sentence: j for j in (report.judge(c, whole, QUERIES) for c in declared().claims)}
    unknown = {said for said, each in judged.items() if each.verdict is Verdict.NOT_ENOUGH_DATA}
    assert {said for said in unknown if "CIFAR" in said} == {said for said in judged if "CIFAR" in said}
    assert len(unknown) == 6 + 1  # and the gap after every fifth, which does not fit
    for figure in declared().figures:
        figures.render(figure, whole.sql(QUERIES[figure.query].sql), "python study.py")


@pytest.mark.parametrize(
    ("sets", "answers"),
    [([], 6), (["epochs=100"], 0), (["weight_decay=0"], 0), (["norm_init=ones"], 0), (["width=2"], 0), (["lr=0.3"], 0),
     (["placement=every", "gamma_l1=0.1"], 0), (["label_noise=0.5"], 0), (["milestones=0.5"], 0)],
)  # fmt: skip
def test_the_numbers_of_cifar10_are_held_against_the_reports_protocol_alone(sets, answers, tmp_path):
    every = [e for e in planned("paper", "depth=50,152,200", *sets) if e.trial.placement is Placement.EVERY]
    session = session_with(tmp_path, [e for e in every if e.trial.seed == 0], lambda trial: done(0.6))
    assert len(session.sql(QUERIES["accuracy_on_cifar10"].sql).rows) == answers


@pytest.mark.parametrize("sets", [["depth=20"], ["depth=50"]])
def test_figures_can_be_drawn_of_one_depth(sets, tmp_path):
    session = session_with(tmp_path, planned("laptop", *sets, "seed=0,1"), lambda trial: done(0.9))
    for figure in declared().figures:
        figures.render(figure, session.sql(QUERIES[figure.query].sql), "python study.py")
